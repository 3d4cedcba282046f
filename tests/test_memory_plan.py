"""The formula of --memory auto and plan is within 10 % of every measured peak; auto takes the fastest level that fits."""

import csv
import importlib
import logging
import math
import re
import shlex
from pathlib import Path

import pytest
import torch

import planning
from args import parse_training_args
from cogvideox import attention_shape, empty_transformer
from errors import UsageError
from memory_plan import CHECKPOINTING, GIB, fastest_that_fits, levels_of, need, table
from planning import choose_level_from_args, run_from_args
from random_dataset import write_dataset
from random_pipeline import real_sizes
from tiny_pipeline import kind_transformer


ROOT = Path(__file__).resolve().parents[1]
SIZE_1_0, SIZE_1_5 = (49, 480, 720), (81, 768, 1360)
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
REQUIRED = ["--pretrained_model_name_or_path", "m", "--data_root", "d", "--load_tensors"]


def real_transformer(kind):
    return empty_transformer({**kind_transformer(kind), **real_sizes(kind)["transformer"]})


def make_run(kind, *flags, size=SIZE_1_0, task="t2v_lora"):
    args = parse_training_args(task, [*REQUIRED, "--train_batch_size", "1", *flags])
    transformer = real_transformer(kind)
    dtype = torch.float16 if args.mixed_precision == "fp16" else torch.bfloat16
    shape = attention_shape(transformer.config, [size], args.train_batch_size)
    return run_from_args(args, transformer, shape, dtype, is_lora=task.endswith("lora"))


def measured_rows():
    """(label, run, level, allocated, reserved) of the rows that train on prepared data without rendering videos."""
    for name in ("results", "speed"):
        with open(ROOT / "benchmarks" / f"{name}.csv", newline="") as file:
            for row in csv.DictReader(file):
                command = shlex.split(row["command"])
                plain = "--load_tensors" in command and "--validation_prompt" not in command
                if plain and command[0].startswith("training/"):
                    yield pytest.param(
                        command, float(row["allocated_gib"]), float(row["reserved_gib"]), id=row["label"]
                    )


@pytest.mark.parametrize(("command", "allocated", "reserved"), measured_rows())
def test_estimates_are_within_a_tenth_of_what_was_measured(command, allocated, reserved):
    script, *flags = command
    task = f"{'i2v' if 'image_to_video' in script else 't2v'}_{script.removesuffix('.py').rpartition('_')[2]}"
    given = dict(zip(flags, flags[1:], strict=False))
    kind = re.search(r"(2b|1\.5-5b|5b)(-i2v)?$", given["--pretrained_model_name_or_path"])[0]
    size = SIZE_1_5 if "768" in given["--data_root"] else SIZE_1_0
    args = parse_training_args(task, flags)
    run = make_run(kind, *flags, size=size, task=task)
    needed = need(run, args.memory or CHECKPOINTING)
    assert needed.allocated / GIB == pytest.approx(allocated, rel=0.1)
    assert needed.reserved / GIB == pytest.approx(reserved, rel=0.1)


def test_levels_are_ordered_by_what_they_take():
    for kind in ("2b", "5b"):
        run = make_run(kind)
        assert levels_of(run) == ("speed", "balanced", "offload", "stream")
        sizes = [need(run, level).reserved for level in levels_of(run)]
        assert sizes == sorted(sizes, reverse=True)
        hosts = [need(run, level).host for level in levels_of(run)]
        assert hosts == sorted(hosts)


@pytest.mark.parametrize(
    ("kind", "gpu_gib", "host_gib", "level"),
    [
        ("5b", 79, 64, "speed"),
        ("5b", 47, 64, "balanced"),
        ("5b", 16, 64, "offload"),
        ("5b", 7.5, 64, "stream"),
        ("5b", 7.5, 16, None),  # the host cannot hold the weights and activations
        ("5b", 4, 64, None),
        ("2b", 40, 64, "speed"),
        ("2b", 11, 64, "balanced"),
        ("2b", 4, 64, "stream"),
    ],
)
def test_the_fastest_level_that_fits(kind, gpu_gib, host_gib, level):
    assert fastest_that_fits(make_run(kind), gpu_gib * GIB, host_gib * GIB) == level


@pytest.mark.parametrize(
    ("more", "less"),
    [
        (["--rank", "256"], ["--rank", "16"]),
        (["--train_batch_size", "4"], ["--train_batch_size", "1"]),
        ([], ["--base_precision", "nf4"]),
        ([], ["--use_8bit"]),
        ([], ["--use_cpu_offload_optimizer"]),
        (["--lora_target_modules", "to_q", "to_k", "to_v", "to_out.0", "ff.net.2"], []),
    ],
)
def test_flags_count(more, less):
    for level in ("speed", "balanced", "offload", "stream"):
        assert need(make_run("5b", *more), level).allocated > need(make_run("5b", *less), level).allocated


def test_full_fine_tuning_has_no_frozen_weights_to_stream():
    run = make_run("2b", task="t2v_sft")
    assert levels_of(run) == ("speed", "balanced")
    hosted = make_run("2b", "--use_cpu_offload_optimizer", "--offload_gradients", task="t2v_sft")
    assert need(hosted, "balanced").reserved < 0.5 * need(run, "balanced").reserved
    assert need(hosted, "balanced").host > need(run, "balanced").host


def test_the_table_names_every_level_and_what_is_short():
    lines = table(make_run("5b"), 16 * GIB, 8 * GIB).splitlines()
    assert [line.split()[0] for line in lines] == [
        "--memory", "(checkpoints)", "speed", "balanced", "offload", "stream",
    ]  # fmt: skip
    assert "no, 16.0 GiB are free on the GPU" in lines[2] and "no, 8.0 GiB are free on the host" in lines[5]
    assert table(make_run("5b"), math.inf, 8 * GIB).count("no GPU") == 5


# ---------------------------------------------------------------- on this machine


def choose(monkeypatch, gpu_gib, host_gib=64, kind="5b", task="t2v_lora", level="auto"):
    monkeypatch.setattr(planning, "free_on_gpu", lambda device: gpu_gib * GIB)
    monkeypatch.setattr(planning.psutil, "virtual_memory", lambda: type("", (), {"available": host_gib * GIB}))
    args, transformer = parse_training_args(task, [*REQUIRED, "--memory", level]), real_transformer(kind)
    shape = attention_shape(transformer.config, [SIZE_1_0], 1)
    return choose_level_from_args(args, transformer, shape, torch.bfloat16, CUDA, is_lora=task.endswith("lora"))


def test_auto_says_what_it_compares_and_chooses(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    assert choose(monkeypatch, 23)[0] == "offload"
    assert "GPU, reserved" in caplog.text and "--memory auto: offload" in caplog.text
    level, fill = choose(monkeypatch, 8)
    assert level == "stream" and fill is not None


def test_auto_refuses_in_one_line_what_fits_nowhere(monkeypatch):
    with pytest.raises(UsageError, match="no level fits the 3.0 GiB .* smaller --frame_buckets"):
        choose(monkeypatch, 3)
    with pytest.raises(UsageError, match="or train a LoRA"):
        choose(monkeypatch, 16, kind="2b", task="t2v_sft")


@pytest.mark.parametrize("task", ["t2v_lora", "t2v_sft", "i2v_lora", "i2v_sft"])
def test_plan_prints_and_ends_before_anything_is_loaded_or_written(task, tiny, tmp_path, capsys, monkeypatch):
    write_dataset(tmp_path / "data", num_clips=2, frames=9, height=64, width=96, text_shape=(226, 32))
    module = importlib.import_module(f"cogvideox_{'image' if task[0] == 'i' else 'text'}_to_video_{task[4:]}")
    for loader in ("load_transformer", "load_vae", "encode_captions"):
        monkeypatch.setattr(module, loader, None)
    argv = ["--pretrained_model_name_or_path", str(tiny("1.5-5b-i2v" if task[0] == "i" else "5b"))]
    argv += ["--data_root", str(tmp_path / "data"), "--load_tensors", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        module.main(parse_training_args(task, [*argv, "--memory", "plan"]))
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "speed" in printed and "balanced" in printed and ("stream" in printed) == task.endswith("lora")
    assert not (tmp_path / "out").exists()


def test_auto_on_a_cpu_keeps_everything(tiny, caplog):
    caplog.set_level(logging.INFO)
    args, transformer = parse_training_args("t2v_lora", [*REQUIRED, "--memory", "auto"]), real_transformer("2b")
    level, fill = choose_level_from_args(args, transformer, (1, 9, 30, 64), torch.float32, CPU, is_lora=True)
    assert level == "speed" and fill is None
    assert "no GPU" in caplog.text


def test_a_share_of_the_card_is_all_that_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.25)
    assert planning.free_on_gpu(CUDA) == 20 * GIB
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)
    assert planning.free_on_gpu(CUDA) == 70 * GIB
