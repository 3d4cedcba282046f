"""A full GPU: one line that says what was tried and what to do, the cheapest first; the last checkpoint stays."""

import pytest
import torch

from args import parse_training_args
from cogvideox import loading
from engine import objective
from run.exits import memory_savers
from script_runs import checkpoints, status


ADVICE = "If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
MESSAGE = (
    f"CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB. {ADVICE}\nsecond line"
)
ARGV = ["--pretrained_model_name_or_path", "m", "--data_root", "d"]
SMALLER = "smaller --frame_buckets, --height_buckets, --width_buckets"


def fill_memory(monkeypatch, call):
    calls, add_noise = [], objective.add_noise

    def full(*arguments):
        calls.append(None)
        if len(calls) == call:
            raise torch.cuda.OutOfMemoryError(MESSAGE)
        return add_noise(*arguments)

    monkeypatch.setattr(objective, "add_noise", full)


def test_one_line_says_peak_shape_and_flags(stops, script, monkeypatch, tmp_path):
    fill_memory(monkeypatch, 3)
    monkeypatch.setattr("run.exits.memory_report", lambda device: {"peak_allocated_gib": 78.9})
    line = stops(70, "out", "--max_train_steps", "4", "--train_batch_size", "2", data="two")
    assert "the GPU's memory is full (peak 78.9 GiB): batches of 2 with up to 9 frames of 64x96" in line
    level, what = ("stream", "weights") if script.module.endswith("lora") else ("offload", "optimizer")
    cheapest = f"--memory {level}, with host memory for the {what}"
    assert f"cheapest first: {cheapest}; --train_batch_size 1 --gradient_accumulation_steps 2;" in line
    assert "Tried to allocate 2.00 GiB" in line and ADVICE not in line and "second line" not in line
    assert status(tmp_path / "out")["message"] in line and checkpoints(tmp_path / "out") == [1, 2]


@pytest.mark.parametrize("script", ["t2v_lora"], indirect=True)
def test_outside_of_the_loop_it_is_one_line_too(stops, monkeypatch):
    def full(*arguments, **options):
        raise torch.cuda.OutOfMemoryError(MESSAGE)

    monkeypatch.setattr(loading, "load_transformer", full)
    line = stops(70, "out")
    assert "the GPU's memory is full: CUDA out of memory" in line and ADVICE not in line
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")  # with it segments do not grow
    assert ADVICE in stops(70, "other")


def test_what_was_trained_goes_on_with_the_flag_that_makes_it_fit(script, stops, train, monkeypatch):
    """Flags that change memory alone may change when a run goes on."""
    with monkeypatch.context() as patches:
        fill_memory(patches, 3)
        stops(70, "out", "--max_train_steps", "4")
    flags = ["--memory", "stream"] if script.module.endswith("lora") else ["--gradient_checkpointing"]
    out = train("out", "--max_train_steps", "4", *flags)
    assert status(out)["state"] == "complete" and checkpoints(out) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("more", "level", "expected"),
    [
        (
            [], None,
            ["--memory offload, with host memory for the optimizer", "--load_tensors", "--train_batch_size 1", SMALLER],
        ),
        (
            ["--load_tensors", "--gradient_checkpointing", "--train_batch_size", "1"], None,
            ["--memory offload in place of --gradient_checkpointing, with", SMALLER],
        ),
        (["--load_tensors", "--memory", "auto", "--train_batch_size", "1"], "speed",
         ["--memory balanced", "--memory offload, with", SMALLER]),
        (["--load_tensors", "--memory", "auto", "--train_batch_size", "1"], "offload", ["--memory stream, with", SMALLER]),
        (
            ["--load_tensors", "--memory", "stream", "--states_on_gpu", "0.2", "--train_batch_size", "1"], "stream",
            ["a smaller --states_on_gpu", SMALLER],
        ),
        (
            ["--load_tensors", "--memory", "balanced", "--use_cpu_offload_optimizer", "--train_batch_size", "1"],
            "balanced", ["--memory offload, with", SMALLER],
        ),
        (
            ["--load_tensors", "--optimizer", "came", "--train_batch_size", "1"], None,
            ["--gradient_checkpointing", "--use_cpu_offload_optimizer", SMALLER],
        ),
        (
            ["--load_tensors", "--gradient_checkpointing", "--train_batch_size", "1", "--mixed_precision", "no"], None,
            ["--mixed_precision bf16", "--use_8bit", "--use_cpu_offload_optimizer", SMALLER],
        ),
        (["--load_tensors", "--gradient_checkpointing", "--train_batch_size", "1", "--use_8bit"], None,
         ["--memory offload in place of --gradient_checkpointing, with", SMALLER]),
        (
            ["--load_tensors", "--gradient_checkpointing", "--train_batch_size", "1", "--use_cpu_offload_optimizer",
             "--optimizer", "came"], None, ["--offload_gradients", SMALLER],
        ),
        (["--load_tensors", "--memory", "auto", "--train_batch_size", "1", "--use_8bit"], "speed",
         ["--memory balanced", "--memory offload, with", SMALLER]),
        (["--load_tensors", "--memory", "auto", "--train_batch_size", "1", "--use_8bit"], "balanced", ["--memory offload, with", SMALLER]),
    ],
)  # fmt: skip
def test_only_flags_not_in_use_and_that_go_together_are_named(more, level, expected):
    savers = memory_savers(parse_training_args("t2v_sft", [*ARGV, *more]), level, is_lora=False)
    assert len(savers) == len(expected)
    assert all(saver.startswith(start) for saver, start in zip(savers, expected, strict=True)), savers


@pytest.mark.parametrize(
    ("more", "level", "deepspeed", "expected"),
    [
        ([], None, False, ["--memory stream, with host memory", SMALLER]),
        (["--gradient_checkpointing"], None, False, ["--memory stream in place of --gradient_checkpointing, with", SMALLER]),
        (["--memory", "auto"], "offload", False, ["--memory stream, with", SMALLER]),
        (["--memory", "auto"], "stream", False, [SMALLER]),
        ([], None, True, ["--gradient_checkpointing", SMALLER]),
    ],
)  # fmt: skip
def test_frozen_weights_may_leave_the_gpu(more, level, deepspeed, expected, monkeypatch):
    monkeypatch.setattr("run.exits.uses_deepspeed", lambda: deepspeed)
    monkeypatch.setattr("run.launch.uses_deepspeed", lambda: deepspeed)
    argv = [*ARGV, "--load_tensors", "--train_batch_size", "1", "--use_8bit", *more]
    savers = memory_savers(parse_training_args("t2v_lora", argv), level, is_lora=True)
    assert len(savers) == len(expected)
    assert all(saver.startswith(start) for saver, start in zip(savers, expected, strict=True)), savers


def test_every_flag_named_exists():
    args = parse_training_args("t2v_sft", ARGV)
    named = [
        word
        for is_lora in (True, False)
        for saver in memory_savers(args, None, is_lora)
        for word in saver.replace(",", "").split()
        if "--" in word
    ]
    assert {word.removeprefix("--") for word in named} <= vars(args).keys()
