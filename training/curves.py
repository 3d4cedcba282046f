"""The loss of a run as a picture."""

import json
from pathlib import Path

import numpy as np


WINDOW = 20  # updates of the running mean
HELD_OUT = "held_out_loss"  # the event that validation writes between the updates


def draw_losses(runs: dict[str, Path], figure_path: Path, window: int = WINDOW) -> list[str]:
    """Draw the losses of metrics files, name -> path, into one figure; its suffix says the format.

    Returns the names of those that hold no finite loss yet. Nothing is written if none does.
    """
    from matplotlib.figure import Figure  # not pyplot: that one keeps figures and asks for a display

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    empty = [name for name, path in runs.items() if not draw_run(axes, name, read_rows(path), window)]
    if len(empty) == len(runs):
        return empty
    axes.set_xlabel("update")
    axes.set_ylabel(f"loss (line: mean of {window} updates)")
    axes.legend(fontsize="small", loc="upper right")
    figure.savefig(figure_path, dpi=120)
    return empty


def draw_run(axes, name: str, rows: list[dict], window: int) -> bool:
    """Points, running mean and, where there is one, the held-out loss; False without a finite loss."""
    steps, losses = series(row for row in rows if "event" not in row)
    if not len(steps):
        return False
    (points,) = axes.plot(steps, losses, ".", markersize=2, alpha=0.4)
    colour = points.get_color()
    axes.plot(steps, running_mean(losses, window), color=colour, label=name)
    held_steps, held_losses = series(row for row in rows if row.get("event") == HELD_OUT)
    if len(held_steps):
        axes.plot(held_steps, held_losses, "o--", color=colour, markersize=4, label=f"{name}: held-out clips")
    return True


def read_rows(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl: one an update, and events between them."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def series(rows) -> tuple[np.ndarray, np.ndarray]:
    """(update numbers, losses) [N] of the rows whose loss was finite."""
    pairs = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
    return np.array([step for step, _ in pairs]), np.array([loss for _, loss in pairs])


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` values, at the start of as many as there are: same length, no delay at the edges."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)
