#!/usr/bin/env python3
"""Draw the GPU memory of training beside the original's published figures: assets/lora_2b.png, sft_2b.png and of 5b.

    python benchmarks/draw_memory.py

Bars show GiB reserved from benchmarks/original_memory.csv and, written by memory_rows.py --original, from
benchmarks/lora_memory.csv and sft_memory.csv. Rows that were not measured are left out; a model without any gets no
figure. Where the original ran out of memory, its bar is missing.
"""

import itertools
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from base import console
from bench import rows_in
from memory_rows import ORIGINAL_OPTIMIZERS, STAGES, side_by_side
from step_time import ROOT


MODELS = ("2b", "5b")
FILES = {"lora": "lora_memory.csv", "sft": "sft_memory.csv"}
SHORT_NAMES = {"adamw": "AdamW", "adamw-8bit": "8-bit AdamW", "offload-gradients": "AdamW on the CPU"}
COLOURS = {"original": "0.72", "ours": "#123f7d"}  # light and dark: distinguishable without colour
BAR = 0.45  # bar height, relative to the distance between rows
INCHES = {"width": 11.0, "row": 0.36, "around": 1.6}  # at 150 dpi
FONT = 11  # points; 11.5 pixels on a page that shows the figure 830 pixels wide


def group_of(original):
    """The group of a row: rows with the same batch size and checkpointing are drawn together."""
    checkpointing = "checkpointing" if original["gradient_checkpointing"] == "True" else "no checkpointing"
    return f"batch {original['batch']}, {checkpointing}"


def name_of(original):
    """A row's label within its group."""
    rank = f", rank {original['lora_rank']}" if original["lora_rank"] else ""
    return SHORT_NAMES[ORIGINAL_OPTIMIZERS[original["optimizer"]]] + rank


def grouped(pairs):
    """{group: its pairs}, in file order."""
    groups = {}
    for pair in pairs:
        groups.setdefault(group_of(pair[0]), []).append(pair)
    return groups


def lines_of(groups):
    """(label, pair) from top to bottom; group headings have no pair."""
    return [line for group, pairs in groups.items() for line in ((group, None), *((name_of(p[0]), p) for p in pairs))]


def bars_of(pairs, stage):
    """(the original's values, ours) in GiB, row by row; 0 where it ran out of memory."""
    originals = [float(original[f"memory_{stage}"].replace("OOM", "0")) for original, _ in pairs]
    return originals, [float(ours[f"{stage}_peak_reserved_gib"]) for _, ours in pairs]


def levels_of(pairs):
    """Our --memory levels, with and without checkpointing, as text."""
    levels = {}
    for original, ours in pairs:
        levels.setdefault(original["gradient_checkpointing"] == "True", set()).add(ours["label"].rsplit(" ", 1)[1])
    words = {False: "without checkpointing", True: "with checkpointing"}
    if pairs[0][0]["method"] == "sft":
        return " or ".join(sorted(levels[True]))
    return ", ".join(f"{' or '.join(sorted(levels[kind]))} {words[kind]}" for kind in words if kind in levels)


def draw_panel(axes, lines, stage):
    """Draw one column of the original's table: a pair of bars per row, a gap at each group heading."""
    places = [place for place, (_, pair) in enumerate(lines) if pair]
    pairs = [pair for _, pair in lines if pair]
    for side, (who, values) in enumerate(zip(COLOURS, bars_of(pairs, stage), strict=True)):
        offsets = [place + (side - 0.5) * BAR for place in places]
        bars = axes.barh(offsets, values, BAR, color=COLOURS[who])
        axes.bar_label(bars, [f"{value:.1f}" if value else "OOM" for value in values], fontsize=FONT, padding=2)
    axes.set_title(stage.replace("_", " "), fontsize=FONT + 1)
    axes.set_xlabel("GiB", fontsize=FONT)
    axes.tick_params(axis="x", labelsize=FONT)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)


def draw(model, pairs, path):
    """Draw one panel per column of the original's table, rows grouped by batch size and checkpointing."""
    from matplotlib.figure import Figure  # not pyplot: it keeps figures alive and may need a display

    lines = lines_of(grouped(pairs))
    size = INCHES["width"], INCHES["around"] + INCHES["row"] * len(lines)
    figure = Figure(figsize=size, layout="constrained", dpi=150)
    panels = figure.subplots(1, len(STAGES), sharex=True, sharey=True)
    for axes, stage in zip(panels, STAGES, strict=True):
        draw_panel(axes, lines, stage)
    panels[0].set_yticks(range(len(lines)), [label for label, _ in lines], fontsize=FONT)
    panels[0].set_ylim(len(lines) - 0.4, -0.5)  # the first row on top; the panels share both axes
    panels[0].set_xlim(0, 1.3 * max(value for when in STAGES for side in bars_of(pairs, when) for value in side))
    for text, (_, pair) in zip(panels[0].get_yticklabels(), lines, strict=True):
        text.set_fontweight("normal" if pair else "bold")
    cards = sorted({ours["card"].removeprefix("NVIDIA ").removesuffix(" HBM3") for _, ours in pairs})
    labels = ["CogVideoX Factory (A100 80GB)", f"here ({', '.join(cards)})"]
    figure.legend(axes.containers, labels, loc="outside lower center", ncols=2, fontsize=FONT, frameon=False)
    trained = {"lora": "LoRA", "sft": "full fine-tuning"}[pairs[0][0]["method"]]
    title = f"CogVideoX-{model}, {trained}, 49x480x720: peak of reserved GPU memory in GiB, T5 not counted"
    figure.suptitle(f"{title}\nhere: --memory {levels_of(pairs)}", fontsize=FONT + 1)
    figure.savefig(path)


def main():
    parser = console.Parser(description=__doc__)
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks", help="folder of the rows of memory_rows.py")
    parser.add_argument("--out", type=Path, default=ROOT / "assets", help="folder of the figures")
    args = parser.parse_args()
    for folder in (args.csv, args.out):
        if not folder.is_dir():
            parser.error(f"{folder}: no such folder")
    drawn = 0
    for (task, file), model in itertools.product(FILES.items(), MODELS):
        if pairs := side_by_side(model, rows_in(args.csv / file), task):
            draw(model, pairs, args.out / f"{task}_{model}.png")
            print(f"{args.out / f'{task}_{model}.png'}: {len(pairs)} rows")
            drawn += 1
    if not drawn:
        sys.exit(
            f"{args.csv}: no rows of {' or '.join(FILES.values())}; benchmarks/memory_rows.py --original writes them"
        )


if __name__ == "__main__":
    main()
