#!/usr/bin/env python
"""Draw the loss of one or several runs.

python assets/plot_loss.py outputs/RUN/metrics.jsonl [outputs/OTHER/metrics.jsonl ...] loss.png
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from base import console
from run.curves import WINDOW, draw_losses


def main():
    parser = console.Parser(description=__doc__)
    parser.add_argument("metrics", nargs="+", type=Path, metavar="metrics.jsonl", help="one line per update")
    parser.add_argument("figure", type=Path, metavar="loss.png", help="file to write; its suffix says the format")
    parser.add_argument("--window", type=int, default=WINDOW, metavar="UPDATES", help="length of the running mean")
    args = parser.parse_args()

    runs = {name_of(path, args.metrics): path for path in args.metrics}
    if empty := draw_losses(runs, args.figure, args.window):
        parser.error(f"{', '.join(str(runs[name]) for name in empty)}: holds no update yet")


def name_of(path: Path, others: list[Path]) -> str:
    """The run's folder, or its whole path where several are called alike."""
    folder = path.resolve().parent
    same = [other for other in others if other.resolve().parent.name == folder.name]
    return folder.name if len(same) == 1 else str(folder)


if __name__ == "__main__":
    main()
