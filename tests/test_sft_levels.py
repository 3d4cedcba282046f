# ruff: noqa: F811 (fixtures)
"""Full fine-tuning in bf16: where its states lie changes nothing of a run, and every run goes on from any other's.

Whole scripts, because checkpoints, validation and the schedule come from there; each takes about two seconds.
"""

import functools
import shutil

import pytest
import torch
from diffusers import CogVideoXPipeline

from engine import block_states, compose, update
from engine.state_ring import StateRing
from memory.activations import offload_activations
from script_runs import checkpoints, losses, metrics, result_hash, same_run
from test_validation import image, sampled, sampling, video_bytes  # noqa: F401 - two are fixtures


LEVELS = {
    "resident": ("--memory", "balanced"),
    "plain": (),
    "offload": ("--memory", "offload"),
    "half": ("--memory", "offload", "--states_on_gpu", "0.5"),
    "all": ("--memory", "offload", "--states_on_gpu", "1"),
    "stream": ("--memory", "stream"),
    "half, stream": ("--memory", "stream", "--states_on_gpu", "0.5"),
    "host": ("--memory", "balanced", "--use_cpu_offload_optimizer", "--offload_gradients"),
    "checkpointing": ("--gradient_checkpointing", "--use_cpu_offload_optimizer"),
}
BF16 = ("--mixed_precision", "bf16", "--max_train_steps", "4", "--max_grad_norm", "0.05")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    """Tiny activations leave too, and a block's states come in several chunks."""
    monkeypatch.setattr(compose, "offload_activations", functools.partial(offload_activations, min_bytes=2048))
    monkeypatch.setattr(StateRing, "__init__", functools.partialmethod(StateRing.__init__, chunk=2048))
    monkeypatch.setattr(block_states, "MIN_8BIT", 256)


@pytest.mark.parametrize("script", ["t2v_sft", pytest.param("i2v_sft", marks=pytest.mark.slow)], indirect=True)
@pytest.mark.parametrize("accumulation", ["1", "3"])
def test_every_level_gives_the_same_run(train, script, accumulation):
    """Two buckets; clipping in force."""
    flags = [*BF16, "--gradient_accumulation_steps", accumulation, "--lr_scheduler", "linear"]
    out = {name: train(name, *flags, *more, data="two") for name, more in LEVELS.items()}
    assert all(row["grad_norm"] > 0.05 for row in metrics(out["resident"]))
    for name in LEVELS:
        assert same_run(out[name], out["resident"], 4), name


@pytest.mark.parametrize("script", ["t2v_sft"], indirect=True)
@pytest.mark.parametrize(
    "more", [("--use_8bit",), ("--ema", "--ema_decay", "0.5"), ("--use_8bit", "--optimizer", "adam")], ids=str
)
def test_every_level_gives_the_same_run_with_8bit_states_and_with_a_moving_average(train, more):
    flags = [*BF16, *more, "--weight_decay", "0.1"]
    out = {name: train(name, *flags, *LEVELS[name], data="two") for name in ("resident", "host", "half", "stream")}
    for name in out:
        assert same_run(out[name], out["resident"], 4), name
    plain = train("unlike", *BF16, *LEVELS["stream"], data="two")
    assert result_hash(plain) != result_hash(out["stream"])


@pytest.mark.parametrize("script", ["t2v_sft"], indirect=True)
def test_8bit_states_go_on_at_another_level_and_from_those_of_bitsandbytes(train, monkeypatch, tmp_path):
    """As runs of earlier versions had them, beside fp32 masters."""
    flags = [*BF16, "--use_8bit"]
    whole = train("whole", *flags, *LEVELS["offload"])
    with monkeypatch.context() as patched:
        patched.setattr(compose, "choose_masters_from_args", lambda *_: "fp32")
        train("begun", *flags)
    for begun in (whole, tmp_path / "begun"):
        out = shutil.copytree(begun, tmp_path / f"continued-{begun.name}")
        for step in (3, 4):
            shutil.rmtree(out / f"checkpoint-{step}")
        shutil.rmtree(out / "transformer")
        (out / "status.json").unlink()
        train(out.name, *flags, *LEVELS["half, stream"])
        assert losses(out) == (losses(whole) if begun == whole else pytest.approx(losses(whole), rel=1e-2))
    assert same_run(tmp_path / "continued-whole", whole, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, kind",
    [("t2v_sft", "2b"), ("t2v_sft", "1.5-5b"), ("i2v_sft", "5b-i2v"), ("i2v_sft", "1.5-5b-i2v")],
    indirect=["script"],
)
def test_every_checkpoint_trains_with_its_states_on_the_host(train, tiny, prepared, kind):
    where = {"model": tiny(kind), "data": prepared(kind, "one")}
    out = {name: train(name, *BF16, *LEVELS[name], **where) for name in ("resident", "half", "stream")}
    for name in out:
        assert same_run(out[name], out["resident"], 4), name


@pytest.mark.parametrize("script", ["t2v_sft"], indirect=True)
@pytest.mark.parametrize("first", ["resident", "offload", "fp32 masters"])
def test_a_run_goes_on_at_another_level(train, first, monkeypatch, tmp_path):
    """Also one whose fp32 masters were not split, as those of earlier versions."""
    whole = train("whole", *BF16, *LEVELS["offload"])
    with monkeypatch.context() as patched:
        if first == "fp32 masters":
            patched.setattr(compose, "choose_masters_from_args", lambda *_: "fp32")
        begun = train("begun", *BF16, *LEVELS.get(first, ()))
        assert losses(begun) == losses(whole)
    for number, more in enumerate([LEVELS["resident"], LEVELS["half"], LEVELS["stream"]]):
        out = shutil.copytree(begun, tmp_path / f"continued-{number}")
        for step in (3, 4):
            shutil.rmtree(out / f"checkpoint-{step}")
        shutil.rmtree(out / "transformer")
        (out / "status.json").unlink()
        train(out.name, *BF16, *more)
        assert checkpoints(out) == checkpoints(whole) and same_run(out, whole, 4)


@pytest.mark.parametrize("script", ["i2v_sft"], indirect=True)
def test_validation_sees_the_updated_weights_and_changes_nothing(train, sampling):
    """One model at a time on the device at `offload`, so that the weights leave and come back between updates."""
    flags = [*BF16, *sampling(), "--validation_steps", "2"]
    plain = train("plain", *flags, *LEVELS["resident"], "--enable_model_cpu_offload")
    for level in ("half", "stream"):
        out = train(level, *flags, *LEVELS[level])
        assert sampled(out) == {0: ["0_0"], 2: ["0_0"], 4: ["0_0"]}
        assert video_bytes(out, 0) != video_bytes(out, 2) != video_bytes(out, 4)
        assert result_hash(out) == result_hash(plain)
        assert result_hash(out) == result_hash(train(f"{level} unseen", *BF16, *LEVELS[level]))


@pytest.mark.parametrize("script", ["t2v_sft", "t2v_lora"], indirect=True)
def test_decoding_has_the_memory_of_passes_and_updates(train, sampling, monkeypatch):
    """What waits for the next pass is not on the GPU; it took 0.6 GiB of the 4 that 2b validates in."""
    held, decode = [], CogVideoXPipeline.decode_latents

    def noted(pipe, latents):
        techniques = pipe.transformer.transformer_blocks[0].wrapped[1]
        held.append([slot for technique in techniques for slot in technique.slots if slot is not None])
        return decode(pipe, latents)

    monkeypatch.setattr(CogVideoXPipeline, "decode_latents", noted)
    train("out", *BF16, *sampling(), "--validation_steps", "2", *LEVELS["stream"])
    assert held == [[], [], []]


@pytest.mark.parametrize("script", ["t2v_sft"], indirect=True)
def test_a_skipped_update_is_reported_and_changes_nothing(train, monkeypatch, caplog):
    """The third update's loss is not finite."""
    real, calls = update.ring_update, []
    runs = {}
    for name in ("resident", "offload", "stream"):
        calls.clear()

        def spoil(state, max_grad_norm, calls=calls):
            calls.append(None)
            if len(calls) == 3:
                state.engine.masters.norms[0] = state.engine.masters.norms[0] * float("nan")
            return real(state, max_grad_norm)

        monkeypatch.setattr(update, "ring_update", spoil)
        runs[name] = train(name, *BF16, *LEVELS[name])
    assert caplog.text.count("step 3 skipped") == 3
    assert same_run(runs["offload"], runs["resident"], 4)
    assert same_run(runs["stream"], runs["resident"], 4)
