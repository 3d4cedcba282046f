#!/usr/bin/env python3
"""Draw the GPU memory of LoRA training beside the original's published figures: assets/lora_2b.png and lora_5b.png.

    python benchmarks/draw_memory.py

Bars are GiB reserved of benchmarks/original_memory.csv and of benchmarks/lora_memory.csv, which memory_rows.py --original
fills; a row that the second file has not yet is left out, a model without any has no figure.
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

import console
from bench import rows_in
from memory_rows import MOMENTS, ORIGINAL_OPTIMIZERS, side_by_side
from step_time import ROOT


MODELS = ("2b", "5b")
SHORT_NAMES = {"adamw": "AdamW", "adamw-8bit": "8-bit AdamW", "offload-gradients": "AdamW on the CPU"}
COLOURS = {"original": "0.65", "ours": "tab:blue"}
BAR = 0.4  # of the distance between rows


def name_of(original, ours):
    """A row in words; the level is the last word of our label."""
    optimizer = SHORT_NAMES[ORIGINAL_OPTIMIZERS[original["optimizer"]]]
    level = ours["label"].rsplit(" ", 1)[1]
    return f"{optimizer}, batch {original['batch']}, rank {original['lora_rank']}, {level}"


def bars_of(pairs, moment):
    """(the original's figures, ours) in GiB, row by row."""
    originals = [float(original[f"memory_{moment}"]) for original, _ in pairs]
    return originals, [float(ours[f"{moment}_peak_reserved_gib"]) for _, ours in pairs]


def draw(model, pairs, path):
    """One panel a column of the original's table, one pair of bars a row."""
    from matplotlib.figure import Figure  # not pyplot: that one keeps figures and asks for a display

    figure = Figure(figsize=(14, 1.6 + 0.36 * len(pairs)), layout="constrained")
    places = range(len(pairs))
    for axes, moment in zip(figure.subplots(1, len(MOMENTS), sharex=True, sharey=True), MOMENTS, strict=True):
        for side, (who, values) in enumerate(zip(COLOURS, bars_of(pairs, moment), strict=True)):
            offsets = [place + (side - 0.5) * BAR for place in places]
            bars = axes.barh(offsets, values, BAR, color=COLOURS[who])
            axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=2)
        axes.set_title(moment.replace("_", " "), fontsize="medium")
        axes.margins(x=0.15, y=0.02)
        axes.set_yticks(places, [name_of(*pair) for pair in pairs], fontsize="small")
    axes.invert_yaxis()  # the first row on top; the panels share it
    card = pairs[0][1]["card"].removeprefix("NVIDIA ")
    handles = [axes.patches[0], axes.patches[len(pairs)]]
    labels = ["CogVideoX Factory, as published: one A100 80GB", f"these scripts: one {card}"]
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    counted = "not counted: T5, which is gone before the transformer is loaded"
    figure.suptitle(f"CogVideoX-{model}, LoRA, 49x480x720: peak of reserved GPU memory, GiB; {counted}")
    figure.savefig(path, dpi=100)


def main():
    parser = console.Parser(description=__doc__)
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks/lora_memory.csv", help="rows of memory_rows.py")
    parser.add_argument("--out", type=Path, default=ROOT / "assets", help="folder of the figures")
    args = parser.parse_args()
    for model in MODELS:
        if pairs := side_by_side(model, rows_in(args.csv)):
            draw(model, pairs, args.out / f"lora_{model}.png")
            print(f"{args.out / f'lora_{model}.png'}: {len(pairs)} rows")


if __name__ == "__main__":
    main()
