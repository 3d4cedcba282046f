"""Plots the losses of runs from their metrics files."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from base.files import written_beside


WINDOW = 20  # updates of the running mean
HELD_OUT = "held_out_loss"  # the event that validation writes between the updates
OUTLIERS, HEADROOM = 0.05, 3.0  # the axis may cut off this share of the losses, if above 3 times the others
LABEL = 36  # characters of a run's name in the two-column legend
WIDTH, HEIGHT, LINE = 6.4, 3.2, 0.21  # inches: the figure without its legend, and one line of the legend


class Losses(NamedTuple):
    """Contents of a metrics file: update numbers and losses [N], and the same for the held-out clips [M]."""

    steps: np.ndarray
    losses: np.ndarray
    held_steps: np.ndarray
    held_losses: np.ndarray
    not_finite: list[int]  # update numbers

    @property
    def held(self):
        return self.held_steps, self.held_losses


def draw_losses(runs: dict[str, Path], figure_path: Path, window: int = WINDOW) -> list[str]:
    """Plot the losses of metrics files, {name: path}, in one figure; its suffix sets the format.

    Returns the names of runs without a finite loss so far. Nothing is written if that is all of them.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # not pyplot, which keeps figures alive and looks for a display

    read = {name: read_losses(path) for name, path in runs.items()}
    drawn = {name: run for name, run in read.items() if len(run.steps)}
    if drawn:
        figure = Figure(dpi=150)
        axes = figure.add_subplot()
        if len(drawn) > 10:  # the default cycle has 10 colours
            axes.set_prop_cycle(color=colormaps["tab20"].colors)
        fill_axes(axes, drawn, window)
        place_legend(figure)
        with written_beside(figure_path) as temporary:
            figure.savefig(temporary)
    return [name for name in runs if name not in drawn]


# ---------------------------------------------------------------- reading


def read_losses(path: Path) -> Losses:
    """Parse a metrics.jsonl: one line per update, with events in between."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    updates = [row for row in rows if "event" not in row]
    held = [row for row in rows if row.get("event") == HELD_OUT]
    return Losses(*series(updates), *series(held), [row["step"] for row in updates if not is_finite(row)])


def is_finite(row: dict) -> bool:
    return row.get("loss") is not None and math.isfinite(row["loss"])


def series(rows: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """(update numbers, losses), both [N], of the rows with a finite loss."""
    pairs = [(row["step"], row["loss"]) for row in rows if is_finite(row)]
    return np.array([step for step, _ in pairs]), np.array([loss for _, loss in pairs], dtype=float)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` values, or of as many as there are so far; same length as `values`."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


# ---------------------------------------------------------------- drawing


def fill_axes(axes, runs: dict[str, Losses], window: int) -> None:
    """Plot the runs, set the limits, and mark what lies outside them."""
    alone = len(runs) == 1
    labels = [f"mean of {window} updates"] if alone else short_labels(list(runs))
    for label, run in zip(labels, runs.values(), strict=True):
        draw_run(axes, label, run, window)
    if any(len(run.held_steps) for run in runs.values()):
        axes.plot([], [], "o--", color="0.3", markersize=4, label="held-out clips")
    bottom, top = limits([values for run in runs.values() for values in (run.losses, run.held_losses)])
    axes.set_ylim(bottom, top)
    mark_the_rest(axes, list(runs.values()), top)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.set_xlabel("update")
    axes.set_ylabel("loss" if alone else f"loss, mean of {window} updates")
    axes.grid(alpha=0.25)


def place_legend(figure) -> None:
    """Put the legend above the axes, where it hides nothing. Margins are given: finding them means drawing twice."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    lines = -(-len(labels) // 2)
    height = HEIGHT + lines * LINE
    figure.set_size_inches(WIDTH, height)
    figure.subplots_adjust(left=0.13, right=0.98, bottom=0.53 / height, top=1 - (0.3 + lines * LINE) / height)
    figure.legend(handles, labels, fontsize="small", loc="upper left", bbox_to_anchor=(0.02, 1), ncols=2,
                  frameon=False)  # fmt: skip


def draw_run(axes, label: str, run: Losses, window: int) -> None:
    """Points, running mean and, if there is one, the held-out loss."""
    few = len(run.steps) <= WINDOW
    (points,) = axes.plot(run.steps, run.losses, ".", markersize=6 if few else 2, alpha=0.4, rasterized=True)
    axes.plot(run.steps, running_mean(run.losses, window), color=points.get_color(), label=label)
    axes.plot(*run.held, "o--", color=points.get_color(), markeredgecolor="black", markersize=4)


def mark_the_rest(axes, runs: list[Losses], top: float) -> None:
    """Triangles at the top edge for losses above it, crosses at the bottom for updates without a finite loss."""
    pairs = [pair for run in runs for pair in ((run.steps, run.losses), run.held)]
    above = np.concatenate([steps[values > top] for steps, values in pairs])
    not_finite = np.concatenate([run.not_finite for run in runs])
    notes = []
    if len(above):
        largest = max(values.max() for _, values in pairs if len(values))
        notes.append(f"\u25b2 above the axis: {len(above)}, up to {largest:.3g}")
    if len(not_finite):
        notes.append(f"\u00d7 not finite: {len(not_finite)}")
    for steps, height, marker in ((above, 0.98, "^"), (not_finite, 0.02, "x")):
        axes.plot(steps, np.full(len(steps), height), marker, color="black", markersize=4,
                  transform=axes.get_xaxis_transform())  # fmt: skip
    axes.set_title("   ".join(notes), loc="right", fontsize="small")


def limits(columns: list[np.ndarray]) -> tuple[float, float]:
    """Axis limits over all `columns`: from the smallest loss to the largest that is no outlier, plus a margin."""
    columns = [values for values in columns if len(values)]
    low, high = min(values.min() for values in columns), max(ceiling(values) for values in columns)
    margin = 0.05 * (high - low or abs(high) or 1.0)
    return low - margin, high + margin


def ceiling(values: np.ndarray) -> float:
    """The largest of `values` [N] that is no outlier. There are none at the low end: a loss is a mean of squares."""
    ordered = np.sort(values)
    if len(ordered) < 3:
        return float(ordered[-1])  # of two values, either could be the outlier
    largest_of_others = ordered[-1 - math.ceil(OUTLIERS * len(ordered))]
    return float(ordered[ordered <= max(HEADROOM * largest_of_others, ordered[0])][-1])


def short_labels(names: list[str]) -> list[str]:
    """Labels that tell the runs apart: parts shared by all names are dropped, long labels lose their middle."""
    parts = [name.replace("/", "__").split("__") for name in names]
    shared = set.intersection(*map(set, parts))
    labels = [", ".join(part for part in some if part not in shared) or some[-1] for some in parts]
    half = LABEL // 2
    short = [label if len(label) <= LABEL else f"{label[:half]}\u2026{label[-half:]}" for label in labels]
    return short if len(set(short)) == len(set(labels)) else labels
