"""Numbers that are not finite: the step is skipped on all ranks, the samples are named, and nothing of it is written."""

import json
import logging
import math
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from args import parse_training_args
from base.errors import NumbersError
from data.buckets import pack_batches
from engine.update import Update, update
from run.exits import run_script
from run.metrics import BadSteps
from script_runs import (
    SCRIPTS,
    checkpoints,
    losses,
    make_loss_nan,
    metrics,
    result_hash,
    result_tensors,
    run_ranks,
    status,
)
from test_update import make_state


@pytest.fixture(params=["t2v_lora"])
def script(request):
    return SCRIPTS[request.param]


by_script = pytest.mark.parametrize("script", SCRIPTS, indirect=True)
BAD_LOSS, BAD_GRADIENT = Update(True, skipped=True, grad_norm=math.nan), Update(True, skipped=True, grad_norm=math.inf)
GOOD, SEARCHING = Update(True, grad_norm=1.0), Update(True, skipped=True, searching=True)


# ---------------------------------------------------------------- one update


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_a_bad_loss_changes_no_weight_and_does_not_linger(bad, accumulated):
    weight, state = make_state()
    for micro_step in range(accumulated):  # the first of them is bad
        result = update((weight * (bad if micro_step == 0 else 1)).sum(), state, micro_step == accumulated - 1, 1.0)
    assert result.stepped and result.skipped and not math.isfinite(result.grad_norm)
    assert torch.equal(weight.data, torch.tensor([1.0, 2.0]))
    assert not update(weight.sum(), state, True, 1.0).skipped
    assert torch.isfinite(weight).all()


def test_a_loss_that_overflows_is_bad_even_with_a_finite_gradient():
    weight, state = make_state()
    assert update((weight * 1e20).square().sum(), state, True, 1.0).skipped  # the gradient is 2e40 w: infinite
    result = update(weight.sum() + torch.tensor(math.inf), state, True, 1.0)  # the gradient is 1
    assert result.skipped and torch.equal(weight.data, torch.tensor([1.0, 2.0]))


def test_an_infinite_gradient_of_a_finite_loss_is_bad():
    weight, state = make_state()
    result = update((weight - torch.tensor([1.0, 0.0])).abs().sqrt().sum(), state, True, 1.0)  # sqrt at 0
    assert result.skipped and torch.equal(weight.data, torch.tensor([1.0, 2.0]))


def test_a_finite_loss_is_left_bit_for_bit():
    weight, state = make_state()
    loss = (weight * torch.tensor([0.1, -0.3])).sum()
    expected = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    update(loss, state, False, 1.0)
    assert torch.equal(weight.grad, expected)


# ---------------------------------------------------------------- what is said


def test_the_line_names_step_norm_samples_and_files(caplog):
    bad_steps = BadSteps(5, ["a.mp4", "b.mp4", "c.mp4"])
    bad_steps.count(7, BAD_LOSS, [(2, 0.5), (0, math.nan), (1, 0.5)])
    bad_steps.count(8, BAD_GRADIENT, [(2, 0.5), (1, 0.5)])
    bad_steps.count(9, GOOD, [(0, 0.5)])
    bad_steps.count(10, SEARCHING, [(0, math.inf)])  # fp16's scaler lowers its scale: nothing is wrong
    assert [record.getMessage() for record in caplog.records] == [
        "step 7 skipped, gradient norm nan: the loss is not finite for sample 0 (a.mp4)",
        "step 8 skipped, gradient norm inf: the gradient is not finite, among samples 1 (b.mp4), 2 (c.mp4)",
    ]


def test_bad_steps_stop_the_run_only_in_a_row():
    bad_steps = BadSteps(2, [])
    for step, result in enumerate((BAD_LOSS, GOOD, BAD_LOSS, SEARCHING, BAD_LOSS), start=1):
        bad_steps.count(step, result, [])
    with pytest.raises(NumbersError, match="step 6: 2 updates in a row"):
        bad_steps.count(6, BAD_GRADIENT, [])


# ---------------------------------------------------------------- the scripts


@by_script
def test_a_bad_step_is_as_if_it_had_not_been(script, train, monkeypatch, caplog):
    """The weights after it are those before it, bit for bit, and training continues."""
    make_loss_nan(monkeypatch, lambda call: call == 4)
    with caplog.at_level(logging.WARNING):
        out = train("out", "--max_train_steps", "3", "--gradient_accumulation_steps", "2")
    assert [row["skipped"] for row in metrics(out)] == [False, True, False]
    assert [loss is None for loss in losses(out)] == [False, True, False]
    assert result_hash(out / "checkpoint-2") == result_hash(out / "checkpoint-1") != result_hash(out)
    names = ("optimizer.safetensors", "manifest.json")
    before, after = [[(out / f"checkpoint-{n}" / name) for name in names] for n in (1, 2)]
    assert before[0].read_bytes() == after[0].read_bytes()
    for path in out.rglob("*.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values()), path
    [line] = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    index = pack_batches([(9, 64, 96)] * 4, batch_size=1, num_ranks=1, seed=1, epoch=0)[3][0][0]
    assert (
        line.startswith("step 2 skipped, gradient norm nan: the loss is not finite for sample") and str(index) in line
    )


def test_too_many_in_a_row_stop_it_and_the_last_good_checkpoint_stays(stops, train, monkeypatch, tmp_path):
    unbroken = train("unbroken", "--max_train_steps", "5")
    out = tmp_path / "out"
    with monkeypatch.context() as patches:
        make_loss_nan(patches, lambda call: call > 2)
        line = stops(70, "out", "--max_train_steps", "5", "--max_bad_steps", "3", "--checkpointing_steps", "2")
    assert "step 5: 3 updates in a row" in line and status(out)["exit_code"] == 70
    assert result_hash(out / "checkpoint-2") == result_hash(unbroken / "checkpoint-2")
    assert all(torch.isfinite(tensor).all() for tensor in result_tensors(out / "checkpoint-4").values())


def test_weights_that_overflow_reach_no_file(stops, module, monkeypatch, tmp_path):
    calls, update_weights = [], module.update

    def overflowing(loss, state, *rest):
        result = update_weights(loss, state, *rest)
        calls.append(None)
        if len(calls) == 2:
            state.engine.params[-1].data.view(-1)[0] = math.inf
        return result

    monkeypatch.setattr(module, "update", overflowing)
    line = stops(70, "out", "--max_train_steps", "2")
    assert "weights or optimizer states are no longer finite" in line
    assert checkpoints(tmp_path / "out") == [1] and not list((tmp_path / "out").glob("*.safetensors"))
    calls.clear()
    line = stops(70, "last", "--max_train_steps", "4", "--checkpointing_steps", "9")
    assert "weights or optimizer states" in line and not list((tmp_path / "last").glob("*.safetensors"))


def test_one_ranks_bad_loss_skips_the_step_on_both(script, module, command, monkeypatch, tmp_path):
    argv = command("out", "--max_train_steps", "3")

    def main():
        logging.getLogger().addHandler(logging.FileHandler(tmp_path / "log"))
        make_loss_nan(monkeypatch, lambda call: call == 2 and os.environ["RANK"] == "1")
        run_script(lambda: module.main(parse_training_args(script.key, argv)), tmp_path / "out")

    assert run_ranks(main, 2) == [0, 0]
    out = tmp_path / "out"
    assert [row["skipped"] for row in metrics(out)] == [False, True, False]
    assert result_hash(out / "checkpoint-2") == result_hash(out / "checkpoint-1") != result_hash(out)
    index = pack_batches([(9, 64, 96)] * 4, batch_size=1, num_ranks=2, seed=1, epoch=0)[1][1][0]
    [line] = [line for line in (tmp_path / "log").read_text().splitlines() if "skipped" in line]
    assert f"not finite for sample {index} (" in line


# ---------------------------------------------------------------- data


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("folder", ["video_latents", "prompt_embeds"])
def test_prepared_values_that_are_not_finite_are_found(folder, workers, stops, prepared, own_copy, script):
    data = own_copy(prepared(script.kind), "data")
    row = json.loads((data / "data.jsonl").read_text().splitlines()[1])
    bad = data / row["video_latent" if folder == "video_latents" else "prompt_embed"]
    tensors = load_file(bad)
    next(iter(tensors.values())).view(-1)[5] = math.nan
    save_file(tensors, bad)
    line = stops(65, "out", "--num_train_epochs", "1", "--dataloader_num_workers", workers, data=data)
    assert f"{bad}: holds values that are not finite" in line and "prepare_dataset.py" in line
