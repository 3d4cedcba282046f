#!/usr/bin/env python3
"""Predict step times on cards that were not measured, from rows of speed.csv and the cards' published rates.

    python benchmarks/predict.py                        # the table of cards
    python benchmarks/predict.py 5b-offload+sft+link25  # a row as it would be on the card of the measurements

A step is a forward and a backward pass. Each takes the time of its compute or of its copies one way over the link,
whichever is longest, since they overlap. Compute is the model's FLOPs at the utilisation measured (the
5b-balanced@cudnn row for a LoRA, 5b-balanced+sft@cudnn for full fine-tuning); copies are counted in closed form
below. A test holds this to every row that was measured at a slower link. The level, and the share of optimizer states on
the GPU, are those of --memory auto.
"""

import functools
import sys
from pathlib import Path
from typing import NamedTuple


for folder in ("tests", "training"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / folder))

from args import parse_training_args
from base import console
from base.memory_levels import HOST_LEVELS
from bench import MODELS, parse_row, rows_in, script_flags
from cogvideox.config import empty_transformer
from cogvideox.models import Model, WeightFiles
from flops import peak_tflops, step_flops
from memory.choose_level import fastest_that_fits
from memory.estimate import REMAINDER, Workload, gradient_bytes, kept_bytes
from random_pipeline import real_sizes
from run.levels import make_workload
from step_time import ROOT
from tiny_pipeline import kind_transformer


import torch  # isort: skip


class Card(NamedTuple):
    name: str
    gigabytes: int
    link: float  # GB/s each way, of PCIe x16 as it is reached


CARDS = (Card("RTX 3090", 24, 25), Card("RTX 4090", 24, 25), Card("RTX 5090", 32, 50))
HOSTS = (32, 64, 96)  # GB
IN_USE = 1, 6  # GB of the card and of the host, by others
FORWARD = 0.27  # of a step's compute: 0.686 of 2.562 s of 5b, 0.267 of 0.977 s of 2b, full fine-tuning on an H200
NOT_LINKED = 54.0  # GB/s, PCIe 5 x16 of the H200
UTILISATION = {True: "5b-balanced@cudnn", False: "5b-balanced+sft@cudnn"}  # is it a LoRA?


# ---------------------------------------------------------------- a run


class RealSize(Model):
    """A model of real size, of which there are no weights."""

    @property
    def stored_dtype(self):
        return torch.float16 if self.has_apache_licence else torch.bfloat16

    def empty_transformer(self):
        return transformer_of(self.folder.name)


def real_model(kind: str) -> RealSize:
    config = {**kind_transformer(kind), **real_sizes(kind)["transformer"]}
    return RealSize(Path(kind), config, None, WeightFiles(Path(kind), None))


@functools.cache
def transformer_of(kind: str):
    """Half a second to build; read-only."""
    return empty_transformer(real_model(kind).config)


def workload_of(row) -> Workload:
    """What the formulas know about a row of bench.py."""
    task = ("i2v" if row.model.endswith("i2v") else "t2v") + ("_sft" if row.is_sft else "_lora")
    args = parse_training_args(task, script_flags(row, steps=20))
    model = real_model(row.model)
    return make_workload(args, model, model.stored_dtype, [MODELS[row.model]], torch.bfloat16, not row.is_sft)


# ---------------------------------------------------------------- time


def copied_bytes(workload: Workload, level: str) -> dict[tuple[str, str], float]:
    """{(pass, way over the link): bytes} of a step; "up" is to the GPU."""
    copied = dict.fromkeys([("forward", "up"), ("forward", "down"), ("backward", "up"), ("backward", "down")], 0.0)
    if level not in HOST_LEVELS:
        return copied
    copied["forward", "down"] += (workload.num_blocks - 1) * kept_bytes(workload)
    copied["backward", "up"] += (workload.num_blocks - 1) * kept_bytes(workload)
    weights = workload.num_block_weights * workload.item_bytes
    if level == "stream":
        copied["forward", "up"] += weights
        copied["backward", "up"] += weights
    if not workload.is_lora:
        hosted = (1 - workload.share) * workload.num_block_weights
        states = REMAINDER + workload.state_bytes
        copied["forward", "up"] += hosted * (states + gradient_bytes(workload))
        copied["forward", "down"] += hosted * states + (weights if level == "stream" else 0)
        copied["backward", "down"] += hosted * gradient_bytes(workload)
    return copied


def step_seconds(workload: Workload, level: str, compute: float, link: float) -> float:
    """Seconds of a step that takes `compute` seconds without copies, on a link of `link` GB/s each way."""
    copies = {key: num_bytes / (link * 1e9) for key, num_bytes in copied_bytes(workload, level).items()}
    passes = {"forward": FORWARD * compute, "backward": (1 - FORWARD) * compute}
    return sum(max(own, copies[name, "up"], copies[name, "down"]) for name, own in passes.items())


def predicted_seconds(row, rows: list[dict], card: str) -> float:
    """Seconds of a step of a row of bench.py on a card that `rows` were measured on."""
    workload = workload_of(row)
    compute = compute_seconds(row, workload, peak_tflops(card), rows)
    return step_seconds(workload, row.level, compute, row.link or NOT_LINKED)


def utilisation(rows: list[dict], is_lora: bool) -> float:
    """Model FLOP utilisation of the row of `rows` that stands for all others, the last one."""
    return [float(row["mfu"]) for row in rows if row["label"] == UTILISATION[is_lora]][-1]


def compute_seconds(row, workload: Workload, peak: float, rows: list[dict]) -> float:
    config = transformer_of(row.model).config
    flops = step_flops(config, MODELS[row.model], row.batch, workload.is_lora)
    return row.accumulation * flops / (peak * 1e12 * utilisation(rows, workload.is_lora))


# ---------------------------------------------------------------- cards


class Prediction(NamedTuple):
    level: str
    share: float  # of the optimizer states, on the GPU
    low_bit: bool  # with --use_8bit
    seconds: float


def predict(card: Card, host: int, model: str, is_lora: bool, rows: list[dict]) -> Prediction | None:
    """What --memory auto takes on a card and how long a step is; None if nothing fits, with 8-bit states neither."""
    room = (card.gigabytes - IN_USE[0]) * 1e9, (host - IN_USE[1]) * 1e9
    for low_bit in (False,) if is_lora else (False, True):
        row = parse_row(f"{model}-offload" + ("" if is_lora else "+sft") + ("+8bit" if low_bit else ""))
        workload = workload_of(row)
        found = fastest_that_fits(workload, *room)
        if found:
            compute = compute_seconds(row, workload, peak_tflops(card.name), rows)
            seconds = step_seconds(workload._replace(share=found[1]), found[0], compute, card.link)
            return Prediction(*found, low_bit, seconds)
    return None


def cell(prediction: Prediction | None) -> str:
    if prediction is None:
        return "-"
    states = f", {prediction.share:.0%}".replace("%", " %") if prediction.share else ""
    return f"{prediction.seconds:.1f} s ({prediction.level}{states}{', 8-bit' if prediction.low_bit else ''})"


def cards(rows: list[dict]) -> list[list[str]]:
    """Card, host, then LoRA of 2b and 5b, and full fine-tuning of 2b and 5b."""
    kinds = [(model, is_lora) for is_lora in (True, False) for model in ("2b", "5b")]
    return [
        [
            f"{card.name}, {card.gigabytes} GB",
            f"{host} GB",
            *(cell(predict(card, host, *kind, rows)) for kind in kinds),
        ]
        for card in CARDS
        for host in HOSTS
    ]


def main():
    parser = console.Parser(description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="of bench.py; none: the table of cards")
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks/speed.csv", help="rows of bench.py")
    parser.add_argument("--card", default="NVIDIA H200", help="of ROW (default: %(default)s)")
    args = parser.parse_args()
    try:
        args.rows = [parse_row(label) for label in args.rows]
    except ValueError as error:
        parser.error(str(error))
    measured = rows_in(args.csv)
    of_card = [row for row in measured if row["card"] == args.card]
    for row in args.rows:
        print(f"{row.label}: {predicted_seconds(row, of_card, args.card):.3f} s/step")
    for line in [] if args.rows else cards(measured):
        print(" | ".join(line))


if __name__ == "__main__":
    main()
