"""What would end a run at its end ends it before its first step, and what ends a validation ends only that."""

import logging
import os
import signal

import pytest
import torch

from base.errors import StorageError
from run import render as render_module
from run import result
from run.exits import run_script
from script_runs import checkpoints, metrics, result_hash, status


one_script = pytest.mark.parametrize("script", ["t2v_lora"], indirect=True)
PROMPT = ["--validation_prompt", "a red ball", "--num_inference_steps", "1", "--max_num_frames", "9"]
PROMPT += ["--height", "64", "--width", "96", "--validation_steps", "2"]


def engine_class(module):
    from engine import compose

    return compose.LoraEngine if module.__name__.endswith("lora") else compose.SftEngine


@pytest.mark.parametrize("part", ["save", "check"])
def test_a_result_that_cannot_be_written_or_read_ends_the_run_before_step_1(
    part, stops, module, monkeypatch, tmp_path
):
    def fail(*arguments):
        raise StorageError("the result cannot be kept")

    monkeypatch.setattr(engine_class(module), part, fail)
    assert "the result cannot be kept" in stops(74, "out", "--max_train_steps", "2")
    assert not (tmp_path / "out/metrics.jsonl").exists() and not list((tmp_path / "out").glob(".tmp*"))


def test_the_rehearsal_leaves_nothing_and_a_resumed_run_has_none(train, module, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(result, "LOG_ABOVE_BYTES", 0)  # of a 5b model it is 10 GiB on the disk, for a minute
    saves, save = [], engine_class(module).save

    def seen(engine, directory):
        saves.append(directory)
        return save(engine, directory)

    monkeypatch.setattr(engine_class(module), "save", seen)
    out = train("out", "--max_train_steps", "2")
    assert saves[0].name.endswith("-rehearsal") and saves[0].parent == out and saves[-1] == out
    assert not list(out.glob(".tmp*")) and status(out)["state"] == "complete"
    assert caplog.text.count("rehearsing the end of the run: a result of 0.0 GiB is written") == 1
    saves.clear()
    train("out", "--max_train_steps", "3")
    assert caplog.text.count("rehearsing") == 1
    assert not [path for path in saves if path.name.endswith("-rehearsal")]


@one_script
def test_validation_that_runs_out_of_memory_is_tried_one_by_one(train, monkeypatch, caplog):
    """(samples at once in the transformer, whether the VAE works on tiles) of each attempt."""
    attempts, render = [], render_module.render_one

    def full(args, pipe, *rest):
        batches, block = set(), pipe.transformer.transformer_blocks[0]
        hook = block.register_forward_pre_hook(
            lambda block, inputs, named: batches.add(len(named["hidden_states"])), with_kwargs=True
        )
        try:
            frames = render(args, pipe, *rest)
        finally:
            hook.remove()
        attempts.append((*batches, pipe.vae.use_tiling))
        if len(attempts) % 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")
        return frames

    monkeypatch.setattr(render_module, "render_one", full)
    with caplog.at_level(logging.WARNING):
        out = train("out", "--max_train_steps", "3", *PROMPT, raw=True)
    assert attempts == [(2, False), (1, False)] * 3
    assert {path.parent.name for path in out.glob("samples/*/0_0.mp4")} == {"step_0", "step_2", "step_3"}
    assert "tried again with one sample and one model at a time" in caplog.text and "failed" not in caplog.text


@one_script
def test_validation_that_never_fits_is_skipped_with_one_line(train, monkeypatch, caplog):
    def full(*arguments):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")

    plain = train("plain", "--max_train_steps", "3")
    monkeypatch.setattr(render_module, "render_one", full)
    with caplog.at_level(logging.WARNING):
        out = train("out", "--max_train_steps", "3", *PROMPT)
    failed = [record.getMessage() for record in caplog.records if "training continues" in record.getMessage()]
    assert len(failed) == 3 and all("out of memory" in line for line in failed)
    assert result_hash(out) == result_hash(plain) and status(out)["state"] == "complete"


@one_script
@pytest.mark.parametrize("at", [0, 2])
def test_a_signal_ends_a_validation_and_the_run_with_a_checkpoint(at, train, stops, monkeypatch, tmp_path):
    calls, render = [], render_module.render_one

    def asked(*arguments):
        calls.append(None)
        if len(calls) == at // 2 + 1:
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("went on")
        return render(*arguments)

    flags = ["--max_train_steps", "4", "--checkpointing_steps", "100", *PROMPT]
    with monkeypatch.context() as patches:
        patches.setattr(render_module, "render_one", asked)
        line = stops(75, "out", *flags)
    out = tmp_path / "out"
    assert f"stopped by SIGTERM after step {at} of 4" in line and status(out)["state"] == "interrupted"
    assert checkpoints(out) == ([at] if at else []) and len(calls) == at // 2 + 1
    run_script(lambda: train("out", *flags), out)
    assert result_hash(out) == result_hash(train("unbroken", *flags))
    assert len(metrics(out)) >= 4
