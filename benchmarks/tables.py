#!/usr/bin/env python3
"""Write the measurement tables into assets/measurements.md and its Chinese version, between their markers.

    python benchmarks/tables.py

Rows come from benchmarks/speed.csv; of repeated rows for one GPU, the last counts. The original's speed comes from
benchmarks/original_speed.csv, its memory from benchmarks/original_memory.csv, next to ours from lora_memory.csv and
sft_memory.csv. Rows on several GPUs stand beside the same row on one; rows on slower links, and cards that were not
measured, beside what predict.py says. Capped rows may share the GPU and then have no time: they show the time of the
same model and level without a cap on the same GPU, which is the same, or else their own. Those of full fine-tuning
stand in its table, too. A table without rows is left empty.
"""

import csv
import re
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from base import console
from bench import LEVELS, MODELS, parse_row, rows_in
from memory_rows import ORIGINAL_OPTIMIZERS, ORIGINAL_ROWS, STAGES, side_by_side
from predict import UTILISATION, cards, predicted_seconds
from step_time import PACKAGES, ROOT


NAMES = {"2b": "2b", "5b": "5b", "5b-i2v": "5b-I2V", "1.5-5b": "1.5-5B", "1.5-5b-i2v": "1.5-5B-I2V"}  # CogVideoX-...
HEADINGS = {
    "speed": {
        "measurements.md": "model | size | level | attention | s/step | allocated | reserved | host | MFU | the original | card",
        "measurements_zh.md": "模型 | 尺寸 | 级别 | 注意力 | 秒/步 | 已分配 | 预留 | 内存 | MFU | 原版 | GPU",
    },
    "sft": {
        "measurements.md": "model | size | level | attention | s/step | of balanced | allocated | reserved | host | MFU | "
        "card",
        "measurements_zh.md": "模型 | 尺寸 | 级别 | 注意力 | 秒/步 | 与 balanced 之比 | 已分配 | 预留 | 内存 | MFU | GPU",
    },
    "gpus": {
        "measurements.md": "model | trained | level | batch per GPU | GPUs | s/step | of n times one GPU's rate | "
        "reserved | host | card",
        "measurements_zh.md": "模型 | 训练 | 级别 | 每张 GPU 的批大小 | GPU 数 | 秒/步 | 与单卡速率的 n 倍之比 | 预留 | 内存 | GPU",
    },
    "links": {
        "measurements.md": "model | trained | level | link, GB/s | s/step | predicted | card",
        "measurements_zh.md": "模型 | 训练 | 级别 | 链路，GB/s | 秒/步 | 预测 | GPU",
    },
    "fits": {
        "measurements.md": "GPU memory allowed | model | size | level | T5 | reserved | host | 1,000 steps | "
        "validates and tests | card",
        "measurements_zh.md": "允许的显存 | 模型 | 尺寸 | 级别 | T5 | 预留 | 内存 | 1,000 步 | 验证和测试 | GPU",
    },
}
ORIGINAL_HEADINGS = {
    "measurements.md": "model | trained | optimizer | batch | rank | checkpointing | before training | training | "
    "with validation | last test | level here",
    "measurements_zh.md": "模型 | 训练 | 优化器 | 批大小 | 秩 | 检查点 | 训练之前 | 训练 | 含验证 | 最后测试 | 本项目的级别",
}
CARD_HEADINGS = {
    "measurements.md": "card | host | LoRA 2b | LoRA 5b | SFT 2b | SFT 5b",
    "measurements_zh.md": "GPU | 内存 | LoRA 2b | LoRA 5b | SFT 2b | SFT 5b",
}
# For the original's rows; its CPUOffloadOptimizer offloads gradients too
OPTIMIZER_NAMES = {"adamw": "AdamW", "adamw-8bit": "8-bit AdamW", "offload-gradients": "AdamW on the CPU"}
TASKS = {False: "LoRA", True: "SFT"}  # is it full fine-tuning?
METHODS = ("lora", "sft")  # the original's names of them
VERSIONS = {"measurements.md": "Versions: {}.", "measurements_zh.md": "版本：{}。"}
WORDS = {"measurements.md": {"yes": "yes", "no": "no", "minutes": "min", "tiny": "tiny"}}
WORDS["measurements_zh.md"] = {"yes": "是", "no": "否", "minutes": "分钟", "tiny": "微型"}


# ---------------------------------------------------------------- cells


def latest(rows):
    """(Row, figures) per label and GPU, the last in the file, sorted by model, level and additions."""
    kept = {(figures["label"], figures["card"]): figures for figures in rows}
    pairs = [(parse_row(label), figures) for (label, _), figures in kept.items()]
    models, levels = list(MODELS), list(LEVELS)
    return sorted(pairs, key=lambda pair: (models.index(pair[0].model), levels.index(pair[0].level), pair[0].label))


def level_of(row, shown_elsewhere=r"@|\+sft|\+gpus|\+link|\+zero2"):
    """The level and its additions as text, except those that have their own column."""
    added = [name.lstrip("+") for name in row.additions if not re.match(shown_elsewhere, name)]
    return ", ".join([row.level, *(re.sub(r"^(batch|rank|accum)", r"\1 ", name) for name in added)])


def attention_of(row):
    """The kernel asked for; "auto", the fastest, if none was."""
    named = [name[1:] for name in row.additions if name.startswith("@")]
    return named[0] if named else ("torch" if row.level == "reference" else "auto")


def size_of(row):
    return "x".join(map(str, MODELS[row.model]))


def original_of(row, originals):
    """The original's time and memory for the row's task with or without checkpointing; "" if not measured."""
    key = (row.model, "sft" if row.is_sft else "lora", "no" if row.level == "speed" else "yes")
    found = originals.get(key) if (row.batch, row.rank) == (1, 64) else None
    if not found:
        return ""
    time = found["s_per_step"] if found["s_per_step"] == "OOM" else f"{float(found['s_per_step']):.3g} s"
    return ", ".join(filter(None, [time, found["reserved"]])) + f" ({found['card']})"


def gib(figures, name):
    return f"{float(figures[name]):.1f} GiB"


def text_encoder_of(row, words):
    """Which T5 encoded the prompts; "" of a row without any."""
    if not row.is_validated:
        return ""
    return "T5-XXL" if "+xxl" in row.additions else words["tiny"]


def minutes_of(row, figures, pairs):
    """Minutes per 1,000 steps of the same row without cap and videos, on the same GPU with its fastest kernel.

    Otherwise the row's own time; None if neither was measured.
    """

    def bare(row):
        added = tuple(name for name in row.additions if not re.match(r"@|\+validated|\+xxl|\+cap", name))
        return row._replace(label="", additions=added, cap=None)

    alike = [other for kind, other in pairs if kind.cap is None and bare(kind) == bare(row)]
    seconds = [float(other["median_s"]) for other in alike if other["card"] == figures["card"]]
    if not seconds and figures["median_s"]:
        seconds = [float(figures["median_s"])]
    return 1000 * min(seconds) / 60 if seconds else None


def percent(figures, name):
    return f"{float(figures[name]):.0%}".replace("%", " %") if figures[name] else ""


def speed_cells(row, figures, pairs, originals, words):
    return [
        NAMES[row.model], size_of(row), level_of(row), attention_of(row),
        f"{float(figures['median_s']):.2f}", gib(figures, "allocated_gib"), gib(figures, "reserved_gib"),
        gib(figures, "host_gib"), percent(figures, "mfu"), original_of(row, originals),
        figures["card"].removeprefix("NVIDIA "),
    ]  # fmt: skip


def relative_time(row, figures, pairs):
    """Relative to `balanced` on the same GPU, with fp32 states and without a cap; "" if that was not measured."""
    kept = [name for name in row.additions if not re.match(r"\+cap|\+share|\+validated|\+xxl|\+8bit", name)]
    label = f"{row.model}-balanced" + "".join(kept)
    found = [other for kind, other in pairs if kind.label == label and other["card"] == figures["card"]]
    return f"{float(figures['median_s']) / float(found[0]['median_s']):.2f}" if found else ""


def sft_cells(row, figures, pairs, originals, words):
    return [
        NAMES[row.model], size_of(row), level_of(row), attention_of(row), f"{float(figures['median_s']):.2f}",
        relative_time(row, figures, pairs), gib(figures, "allocated_gib"), gib(figures, "reserved_gib"),
        gib(figures, "host_gib"), percent(figures, "mfu"), figures["card"].removeprefix("NVIDIA "),
    ]  # fmt: skip


def fits_cells(row, figures, pairs, originals, words):
    minutes = minutes_of(row, figures, pairs)
    time = "" if minutes is None else f"{minutes:.0f} {words['minutes']}"
    return [
        f"{row.cap:g} GiB", NAMES[row.model], size_of(row), level_of(row, r"@|\+cap|\+validated|\+xxl"),
        text_encoder_of(row, words),
        gib(figures, "reserved_gib"), gib(figures, "host_gib"), time, words["yes" if row.is_validated else "no"],
        figures["card"].removeprefix("NVIDIA "),
    ]  # fmt: skip


def rate_of_one(row, figures, pairs):
    """The rate as a share of n times that of the same row on one GPU of the same kind; "" if that was not measured."""
    label = re.sub(r"\+gpus\d+", "", row.label)
    one = [other for kind, other in pairs if kind.label == label and other["card"] == figures["card"]]
    return f"{float(one[0]['median_s']) / float(figures['median_s']):.0%}".replace("%", " %") if one else ""


def gpus_cells(row, figures, pairs, originals, words):
    level = "DeepSpeed ZeRO-2" if "+zero2" in row.additions else level_of(row)
    return [
        NAMES[row.model], TASKS[row.is_sft], re.sub(r", batch \d+", "", level), str(row.batch), str(row.gpus),
        f"{float(figures['median_s']):.2f}", rate_of_one(row, figures, pairs),
        gib(figures, "reserved_gib"), gib(figures, "host_gib"), figures["card"].removeprefix("NVIDIA "),
    ]  # fmt: skip


def links_cells(row, figures, pairs, originals, words):
    same_card = [other for _, other in pairs if other["card"] == figures["card"]]
    return [
        NAMES[row.model], TASKS[row.is_sft], level_of(row), f"{row.link:g}", f"{float(figures['median_s']):.2f}",
        f"{predicted_seconds(row, same_card, figures['card']):.2f}", figures["card"].removeprefix("NVIDIA "),
    ]  # fmt: skip


# ---------------------------------------------------------------- pages


def versions_of(rows):
    """The package versions that the rows were measured with, as text."""
    found = {name: sorted({row[name] for row in rows} - {""}) for name in (*PACKAGES, "cuda")}
    texts = {name: " / ".join(versions) for name, versions in found.items() if versions}
    cuda = texts.pop("cuda", None)
    shown = [f"{name} {versions}" for name, versions in texts.items()]
    return ", ".join(shown + ([f"CUDA {cuda}"] if cuda else []))


CELLS = {"speed": speed_cells, "sft": sft_cells, "gpus": gpus_cells, "links": links_cells, "fits": fits_cells}


def tables_of(row):
    """The kinds of table that show a row."""
    if row.link:
        return {"links"}
    if row.gpus > 1 or "+zero2" in row.additions:
        return {"gpus"}
    kinds = {"fits"} if row.cap else set()
    if row.is_sft:
        return kinds | {"sft"}
    return kinds or {"speed"}


def markdown(cells):
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def table(kind, page_name, rows, originals):
    """The table as Markdown, with the versions below it; "" without rows."""
    measured, cells = latest(rows), CELLS[kind]
    pairs = [pair for pair in measured if kind in tables_of(pair[0])]
    if not pairs:
        return ""
    if kind == "fits":
        pairs.sort(key=lambda pair: -pair[0].cap)
    heading = HEADINGS[kind][page_name]
    lines = [f"| {heading} |", "|---" * (heading.count("|") + 1) + "|"]
    lines += [markdown(cells(*pair, measured, originals, WORDS[page_name])) for pair in pairs]
    versions = VERSIONS[page_name].format(versions_of([figures for _, figures in pairs]))
    return "\n".join(["", *lines, "", versions, "", ""])


def between_markers(text, page_name, kind, content):
    """The page with `content` between the markers of table `kind`; ValueError without the markers."""
    start, end = f"<!-- {kind} table: python benchmarks/tables.py -->\n", f"<!-- end of the {kind} table -->\n"
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f"{page_name}: needs one {start.strip()} and one {end.strip()}")
    before, rest = text.split(start)
    return before + start + content + end + rest.split(end)[1]


def filled(text, page_name, rows, originals):
    """The page with its tables filled from `rows`, measured by bench.py."""
    for kind in HEADINGS:
        text = between_markers(text, page_name, kind, table(kind, page_name, rows, originals))
    return text


def table_of_cards(page_name, rows):
    """Predicted, by card and host memory; "" without the rows that it is made from."""
    if not {*UTILISATION.values()} <= {row["label"] for row in rows}:
        return ""
    heading = CARD_HEADINGS[page_name]
    lines = [f"| {heading} |", "|---" * (heading.count("|") + 1) + "|", *map(markdown, cards(rows))]
    return "\n".join(["", *lines, "", ""])


def read_originals():
    with open(ROOT / "benchmarks/original_speed.csv", newline="") as file:
        return {(row["model"], row["task"], row["checkpointing"]): row for row in csv.DictReader(file)}


# ---------------------------------------------------------------- the original's own tables


def ours_beside(original, pairs):
    """Our counterpart to one of the original's rows, or None. To DeepSpeed's on two GPUs: ours on one, without it."""
    if original["optimizer"] not in ORIGINAL_OPTIMIZERS:
        alike = {"sft": ("offload-gradients", ""), "lora": ("adamw", "256")}[original["method"]]
        kind = (original["method"], original["model"], original["batch"], "True", *alike)
        return next((ours for theirs, ours in pairs if kind_of(theirs) == kind), None)
    return next((ours for theirs, ours in pairs if theirs == original), None)


def kind_of(original):
    named = [original[name] for name in ("method", "model", "batch", "gradient_checkpointing")]
    return (*named, ORIGINAL_OPTIMIZERS[original["optimizer"]], original["lora_rank"])


def memory_cell(original, ours, stage):
    """Theirs / ours, in GiB reserved; nothing after the slash if we have no row."""
    theirs = original[f"memory_{stage}"]
    theirs = theirs if theirs == "OOM" else f"{float(theirs):.1f}"
    return f"{theirs} / {float(ours[f'{stage}_peak_reserved_gib']):.1f}" if ours else f"{theirs} /"


def original_cells(original, ours, words):
    level = re.search(r" (speed|balanced|offload|stream|checkpointing)$", ours["label"]) if ours else None
    optimizer = OPTIMIZER_NAMES.get(ORIGINAL_OPTIMIZERS.get(original["optimizer"]), "DeepSpeed")
    return [
        original["model"].removeprefix("CogVideoX-"), TASKS[original["method"] == "sft"],
        optimizer, original["batch"], original["lora_rank"],
        words["yes" if original["gradient_checkpointing"] == "True" else "no"],
        *(memory_cell(original, ours, stage) for stage in STAGES),
        level[1] if level else "",
    ]  # fmt: skip


def original_table(page_name, originals, pairs):
    """All rows that the original published, by task and model, next to ours."""
    rows = sorted(originals, key=lambda row: (row["method"], row["model"]))
    return table_of_pairs(page_name, [(row, ours_beside(row, pairs)) for row in rows])


def table_of_pairs(page_name, pairs):
    if not pairs:
        return ""
    heading = ORIGINAL_HEADINGS[page_name]
    lines = [f"| {heading} |", "|---" * (heading.count("|") + 1) + "|"]
    lines += [markdown(original_cells(*pair, WORDS[page_name])) for pair in pairs]
    return "\n".join(["", *lines, "", ""])


def original_table_of_files(page_name):
    """`original_table` from the files in benchmarks/."""
    with open(ORIGINAL_ROWS, newline="") as file:
        originals = list(csv.DictReader(file))
    pairs = [
        pair
        for task in METHODS
        for model in ("2b", "5b")
        for pair in side_by_side(model, rows_in(ROOT / f"benchmarks/{task}_memory.csv"), task)
    ]
    return original_table(page_name, originals, pairs)


def deepspeed_table(page_name):
    """The rows that the original trained with DeepSpeed on two GPUs, next to ours on two; "" without ours."""
    measured = rows_in(ROOT / "benchmarks/deepspeed_memory.csv")
    pairs = [
        pair for task in METHODS for model in ("2b", "5b") for pair in side_by_side(model, measured, task, gpus=2)
    ]
    return table_of_pairs(page_name, pairs)


def main():
    parser = console.Parser(description=__doc__)
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks/speed.csv", help="rows of bench.py")
    args = parser.parse_args()
    for page_name in VERSIONS:
        page = ROOT / "assets" / page_name
        text = filled(page.read_text(encoding="utf-8"), page_name, rows_in(args.csv), read_originals())
        text = between_markers(text, page_name, "cards", table_of_cards(page_name, rows_in(args.csv)))
        text = between_markers(text, page_name, "original", original_table_of_files(page_name))
        text = between_markers(text, page_name, "deepspeed", deepspeed_table(page_name))
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
