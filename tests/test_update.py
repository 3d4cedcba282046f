"""One update: accumulation, clipping, schedule, bad numbers."""

import json
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from engine.master_weights import HostMasters, Masters, group_by_bytes
from engine.update import LossScaler, TrainingState, make_scaler, skips_on_device, update
from run.steps import plan_steps, sample_ids


def engine_of(weight, masters=None, ema=None):
    """What an update needs of an engine."""
    return SimpleNamespace(params=[weight], masters=masters, ema=ema)


def make_state(lr=0.1):
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.SGD([weight], lr=lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    return weight, TrainingState(engine_of(weight), optimizer, scheduler)


def test_accumulated_gradients_are_one_update():
    weight, state = make_state()
    inner = update((weight * torch.tensor([1.0, 0.0])).sum() / 2, state, False, 100.0)
    assert not inner.stepped and torch.equal(weight.data, torch.tensor([1.0, 2.0]))
    last = update((weight * torch.tensor([0.0, 1.0])).sum() / 2, state, True, 100.0)
    assert last.stepped and not last.skipped
    torch.testing.assert_close(weight.data, torch.tensor([0.95, 1.95]))
    assert weight.grad is None


def test_clipping_bounds_the_step_and_reports_the_norm_before():
    weight, state = make_state(lr=1.0)
    result = update((weight * torch.tensor([3.0, 4.0])).sum(), state, True, 1.0)
    assert result.grad_norm == pytest.approx(5.0)
    torch.testing.assert_close(weight.data, torch.tensor([1 - 0.6, 2 - 0.8]))


def test_the_reported_learning_rate_is_the_one_used():
    weight, state = make_state()
    assert update(weight.sum(), state, True, 1.0).lr == pytest.approx(0.1)
    assert update(weight.sum(), state, True, 1.0).lr == pytest.approx(0.05)


def test_only_fp16_needs_a_scaler():
    assert isinstance(make_scaler(torch.float16), LossScaler)
    assert make_scaler(torch.float32) is None and make_scaler(torch.bfloat16) is None


def test_scaling_changes_neither_norm_nor_step():
    results = []
    for scaler in (None, LossScaler()):
        weight, state = make_state()
        state.scaler = scaler
        seen = []
        loss = (weight * torch.tensor([3.0, 4.0])).sum()
        loss.register_hook(lambda grad, seen=seen: seen.append(float(grad)))
        results.append((update(loss, state, True, 1.0), weight.tolist()))
        assert seen == [1.0 if scaler is None else 2.0**16]
    assert results[0] == results[1]


def test_the_scale_is_searched_downwards_and_grows_again():
    """Halved while gradients overflow, which is no bad number before it is 1; doubled after 2,000 good updates."""
    weight, state = make_state(lr=0.0)
    state.scaler = LossScaler(scale=2.0, growth_tracker=1999)
    assert not update(weight.sum(), state, True, 1.0).skipped
    assert vars(state.scaler) == {"scale": 4.0, "growth_tracker": 0}
    flags = [update((weight * math.inf).sum(), state, True, 1.0)[1:3] for _ in range(3)]
    assert flags == [(True, True), (True, True), (True, False)]
    saved = json.loads(json.dumps(state.scaler.state_dict()))
    assert saved == {"scale": 0.5, "growth_tracker": 0}
    other = LossScaler()
    other.load_state_dict(saved)
    assert other == state.scaler


def five_updates(optimizer_class, bad, device, on_device, monkeypatch):
    """What five updates leave behind, where those of the steps `bad` have a gradient that is not finite."""
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 10_000, device=device))
    optimizer = optimizer_class([weight], lr=0.1, weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    state = TrainingState(engine_of(weight), optimizer, schedule)
    with monkeypatch.context() as patches:
        patches.setattr("engine.update.skips_on_device", lambda state: on_device)
        results = []
        for step in range(1, 6):
            loss = (weight.square() + weight).sum() / step
            results.append(update(loss * (math.nan if step in bad else 1), state, True, 2.0))
    assert [bool(result.skipped) for result in results] == [step in bad for step in range(1, 6)]
    assert all(torch.is_tensor(value) is on_device for made in results for value in (made.skipped, made.grad_norm))
    rates = [result.lr for result in results]
    assert rates == pytest.approx([0.1 / step for step in range(1, 6)])  # a skipped update has had its rate
    norms = [float(result.grad_norm) for result in results if not result.skipped]
    states = {name: value.tolist() for name, value in optimizer.state[weight].items()}
    assert states["step"] == 5 - len(bad)
    return rates, norms, weight.tolist(), states


@pytest.mark.parametrize("optimizer_class", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("bad", [(1,), (2, 3), ()])
def test_what_is_skipped_on_the_device_is_as_if_decided_on_the_host(optimizer_class, bad, monkeypatch):
    """Bit for bit: weights, moments, the count of steps, the schedule."""
    runs = [five_updates(optimizer_class, bad, torch.device("cpu"), where, monkeypatch) for where in (True, False)]
    assert runs[0] == runs[1]


def test_what_must_know_at_once_decides_on_the_host():
    """Another optimizer, fp16's scale, a moving average, masters in host memory."""
    weight, state = make_state()
    assert not skips_on_device(state)
    state.optimizer = torch.optim.AdamW([weight], fused=True)
    assert skips_on_device(state)
    assert not skips_on_device(replace(state, scaler=LossScaler()))
    assert not skips_on_device(replace(state, engine=engine_of(weight, ema=object())))
    masters = [kind([weight], torch.device("cpu")) for kind in (Masters, partial(HostMasters, dtype=torch.float32))]
    assert [skips_on_device(replace(state, engine=engine_of(weight, masters=kind))) for kind in masters] == [
        True,
        False,
    ]


def hosted_state(optimizer_class, offload_gradients, scaler=None):
    """A weight in host memory; its first moment is the gradient that it stepped with."""
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 4096))
    masters = HostMasters([weight], torch.device("cpu"), torch.float32, offload_gradients)
    optimizer = optimizer_class(masters.params, lr=0.1, betas=(0.0, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    engine = SimpleNamespace(params=masters.params, masters=masters, ema=None)
    return weight, TrainingState(engine, optimizer, schedule, scaler)


@pytest.mark.parametrize("offload_gradients", [False, True])
@pytest.mark.parametrize("scaler", [None, LossScaler])
@pytest.mark.parametrize("fused", [False, True])
def test_gradients_in_host_memory_are_clipped_and_unscaled_on_the_way(fused, scaler, offload_gradients, monkeypatch):
    """By the fused step or by one product; never by torch's passes over host memory. A bad number is skipped."""
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", None)
    monkeypatch.setattr(LossScaler, "unscale", None)
    adamw = partial(torch.optim.AdamW, fused=fused)
    weight, state = hosted_state(adamw, offload_gradients, scaler and scaler())
    for factor in (1.0, math.nan, 0.001):  # clipped; skipped; too small to be clipped
        gradient, before = factor * 2 * weight.detach(), weight.detach().clone()
        result = update(factor * weight.square().sum(), state, True, 1.0)
        assert result.skipped == (not math.isfinite(factor))
        if result.skipped:
            assert torch.equal(weight, before)
            continue
        moment = state.optimizer.state[state.engine.params[0]]["exp_avg"]
        assert result.grad_norm == pytest.approx(float(gradient.norm()), rel=1e-6)
        torch.testing.assert_close(moment, gradient * min(1.0, 1.0 / float(gradient.norm())))


def test_groups_keep_order_and_limit():
    tensors = [torch.zeros(n) for n in (10, 20, 5, 100, 1)]
    groups = group_by_bytes(tensors, 4 * 32)
    assert [tensor.numel() for group in groups for tensor in group] == [10, 20, 5, 100, 1]
    assert [len(group) for group in groups] == [2, 1, 1, 1]


@pytest.mark.parametrize(
    ("batches", "accumulation", "epochs", "max_steps", "expected"),
    [
        (10, 1, 2, None, (20, 2, 20)),
        (10, 3, 1, None, (4, 1, 10)),  # the last update has one micro-step: nothing is dropped
        (10, 4, 3, None, (8, 3, 30)),  # accumulation crosses the ends of epochs
        (10, 3, 1, 7, (7, 3, 21)),
        (1, 1, 1, 5, (5, 5, 5)),
    ],
)
def test_plan(batches, accumulation, epochs, max_steps, expected):
    plan = plan_steps(batches, accumulation, epochs, max_steps)
    assert (plan.num_steps, plan.num_epochs, plan.num_micro_steps) == expected
    due = [i for i in range(plan.num_micro_steps) if plan.is_last_of_update(i)]
    assert len(due) == plan.num_steps
    assert sum(plan.micro_steps_in(step) for step in range(plan.num_steps)) == plan.num_micro_steps


def test_positions_do_not_depend_on_how_a_global_batch_is_cut():
    alone, *ranks = (SimpleNamespace(rank=rank, num_ranks=num) for rank, num in ((0, 1), (0, 2), (1, 2)))
    whole = sample_ids(alone, 1, 4, 4)
    shared = [position for rank in ranks for position in sample_ids(rank, 1, 2, 2)]
    accumulated = [position for micro_step in range(4, 8) for position in sample_ids(alone, micro_step, 1, 1)]
    assert whole == shared == accumulated == [4, 5, 6, 7]
