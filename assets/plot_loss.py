#!/usr/bin/env python
"""Draw the loss of one or several runs.

python assets/plot_loss.py outputs/RUN/metrics.jsonl [outputs/OTHER/metrics.jsonl ...] loss.png
"""

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np


matplotlib.use("Agg")  # writes files, needs no display

import matplotlib.pyplot as plt


def main():
    parser = argparse.ArgumentParser(description="Draw the loss of one or several runs.")
    parser.add_argument("metrics", nargs="+", type=Path, metavar="metrics.jsonl", help="one line per update")
    parser.add_argument("figure", type=Path, metavar="loss.png", help="file to write; its suffix says the format")
    parser.add_argument("--window", type=int, default=20, metavar="UPDATES", help="length of the running mean")
    args = parser.parse_args()

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for path in args.metrics:
        steps, losses = read_losses(path)
        if not len(steps):
            parser.error(f"{path}: holds no update yet")
        (points,) = axes.plot(steps, losses, ".", markersize=2, alpha=0.4)
        axes.plot(steps, running_mean(losses, args.window), color=points.get_color(), label=path.parent.name)
    axes.set_xlabel("update")
    axes.set_ylabel(f"loss (line: mean of {args.window} updates)")
    axes.legend(fontsize="small", loc="upper right")
    figure.savefig(args.figure, dpi=120)


def read_losses(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Update numbers and losses [N] of one metrics.jsonl; events and updates whose loss was not finite are left out."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if "event" not in row and row["loss"] is not None]
    return np.array([row["step"] for row in rows]), np.array([row["loss"] for row in rows])


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` values, at the start of as many as there are: same length, no delay at the edges."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


if __name__ == "__main__":
    main()
