"""Every optimizer trains, with clipping, accumulation and a schedule, and goes on from a checkpoint bit for bit."""

import contextlib
import copy
import json
import logging
import math
import sys
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from args import parse_training_args
from base.errors import UsageError
from engine.compose import build_engine_optimizer_from_args, build_sft_engine_from_args
from engine.optimizers import make_lr_scheduler_from_args, make_optimizer_from_args, schedule_state
from engine.ring_adam import RingAdam
from engine.state_ring import StateRing
from engine.update import TrainingState, update
from run import checkpoints
from run.checkpoints import write_checkpoint


MICRO_STEPS, MAX_NORM = 3, 0.5
NUM_WEIGHTS = 64 * 64  # of each layer: the least that is kept in low bits
PROVENANCE = {"seed": 0}
CPU = torch.device("cpu")


class Row(NamedTuple):
    """A row of the README's table: the flags, and the type or dtype of the states where that is the point."""

    flags: str
    state: str = "float32"
    learning_rate: float = 3e-3
    num_steps: int = 20


PRODIGY = {"learning_rate": 1.0, "num_steps": 60}  # it starts at a step of 1e-6 and finds its own
ROWS = {
    "adam": Row("--optimizer adam"),
    "adamw": Row("--optimizer adamw"),
    "prodigy": Row("--optimizer prodigy", **PRODIGY),
    "prodigy_all": Row(
        "--optimizer prodigy --prodigy_decouple --prodigy_use_bias_correction --prodigy_safeguard_warmup",
        **PRODIGY,
    ),
    "came": Row("--optimizer came"),
    "bnb_adam8": Row("--optimizer adam --use_8bit", "uint8"),
    "bnb_adamw8": Row("--optimizer adamw --use_8bit", "uint8"),
    "ao_adam8": Row("--optimizer adam --use_8bit --use_torchao", "OptimState8bit"),
    "ao_adamw8": Row("--optimizer adamw --use_8bit --use_torchao", "OptimState8bit"),
    "ao_adam4": Row("--optimizer adam --use_4bit", "OptimState4bit"),
    "ao_adamw4": Row("--optimizer adamw --use_4bit", "OptimState4bit"),
    "ao_adamfp8": Row("--optimizer adam --use_fp8", "OptimStateFp8"),
    "ao_adamwfp8": Row("--optimizer adamw --use_fp8", "OptimStateFp8"),
}
PLAIN = ("adam", "adamw", "prodigy", "prodigy_all", "came")
PLACES = {
    "device": "",
    "host": "--use_cpu_offload_optimizer",
    "host, gradients too": "--use_cpu_offload_optimizer --offload_gradients",
}
# Every optimizer where it is by default; those whose states need no GPU also in host memory
COMBINATIONS = [(row, "device") for row in ROWS] + [(row, place) for row in PLAIN for place in list(PLACES)[1:]]


@pytest.fixture
def eager():
    """torchao compiles its step, 20 s a kind of state on a CPU; the arithmetic is the same without."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


class TinyModel(torch.nn.Module):
    """Two layers of 4,096 weights; the second of two outputs is never used, so that one weight never gets a gradient."""

    transformer_blocks = ()

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(64, 64, generator=generator) / 8 for _ in range(3)]
        self.first, self.second, self.unused = (torch.nn.Parameter(weight) for weight in weights)

    def forward(self, noisy, timestep):
        return torch.tanh((noisy * (1 + timestep)) @ self.first) @ self.second

    def enable_gradient_checkpointing(self):
        pass


class TinyEngine:
    """The real engine's weights, in files that need no names of diffusers'."""

    def __init__(self, engine):
        self.transformer, self.params, self.weights = engine.transformer, engine.params, engine.weights
        self.masters, self.ema = engine.masters, engine.ema

    def save_state(self, directory):
        self.names = [f"{index}.pt" for index in range(len(self.params))]
        for name, weight in zip(self.names, masters_of(self), strict=True):
            torch.save(weight, directory / name)

    def load_state(self, directory):
        with torch.no_grad():
            for index, param in enumerate(self.params):
                weight = torch.load(directory / f"{index}.pt", weights_only=True)
                if isinstance(self.masters, StateRing):
                    self.masters.set_master(index, weight)
                else:
                    param.copy_(weight)
        if self.masters:
            self.masters.write_to_model()


def masters_of(engine):
    """The fp32 weights that are trained."""
    if not isinstance(engine.masters, StateRing):
        return [param.detach() for param in engine.params]
    engine.masters.complete()
    return [engine.masters.get_master(index) for index in range(len(engine.params))]


def parse(row, place="device"):
    argv = ["--pretrained_model_name_or_path", "m", "--data_root", "d", *ROWS[row].flags.split()]
    argv += [*PLACES[place].split(), "--learning_rate", str(ROWS[row].learning_rate), "--lr_scheduler", "cosine"]
    argv += ["--gradient_accumulation_steps", str(MICRO_STEPS)]
    return parse_training_args(
        "t2v_sft", [*argv, "--lr_warmup_steps", "0", "--max_train_steps", str(ROWS[row].num_steps)]
    )


def make_state(row, place="device", dtype=torch.float32, device=CPU):
    args = parse(row, place)
    engine = build_sft_engine_from_args(args, None, 0.0, TinyModel(), (1, 8, 1, 64), dtype, torch.float32, device)
    optimizer = build_engine_optimizer_from_args(args, None, engine, args.learning_rate)
    schedule = make_lr_scheduler_from_args(args, optimizer, args.max_train_steps)
    return TrainingState(TinyEngine(engine), optimizer, schedule)


def grid_loss(model, timesteps=(0.1, 0.5, 0.9)):
    """Mean loss on a fixed grid of (noise, timestep)."""
    generator = torch.Generator().manual_seed(1)
    clean = torch.randn(16, 64, generator=generator)
    target = clean @ torch.randn(64, 64, generator=generator) / 8
    device, dtype = model.first.device, model.first.dtype
    losses = []
    for timestep in timesteps:
        noisy = clean + timestep * torch.randn(16, 64, generator=generator)
        velocity = model(noisy.to(device, dtype), timestep)
        losses.append((velocity.float() - target.to(device)).square().mean())
    return torch.stack(losses).mean()


def train(state, first, last):
    """Updates of three micro-steps, one per timestep of the grid; returns them."""
    updates = []
    for _ in range(first, last):
        for micro_step, timestep in enumerate((0.1, 0.5, 0.9)):
            loss = grid_loss(state.engine.transformer, (timestep,)) / MICRO_STEPS
            updates.append(update(loss, state, micro_step == MICRO_STEPS - 1, MAX_NORM))
    return [made for made in updates if made.stepped]


def states_of(optimizer):
    """Type names of subclasses, else dtypes, of the states as large as a weight."""
    state = optimizer.state_dict()["state"] if isinstance(optimizer, RingAdam) else optimizer.state
    values = [value for entry in state.values() for value in entry.values()]
    tensors = [value for value in values if isinstance(value, torch.Tensor) and value.numel() == NUM_WEIGHTS]
    return {str(t.dtype).removeprefix("torch.") if type(t) is torch.Tensor else type(t).__name__ for t in tensors}


@pytest.mark.parametrize(("row", "place"), COMBINATIONS)
def test_every_optimizer_lowers_the_loss_with_clipping_accumulation_and_schedule(row, place, eager):
    state = make_state(row, place)
    with torch.no_grad():
        before = grid_loss(state.engine.transformer)
    num_steps = ROWS[row].num_steps
    updates = train(state, 0, num_steps)
    with torch.no_grad():
        after = grid_loss(state.engine.transformer)
    assert len(updates) == num_steps and not any(made.skipped for made in updates)
    assert any(made.grad_norm > MAX_NORM for made in updates)
    assert after < 0.9 * before
    rates = [made.lr / ROWS[row].learning_rate for made in updates]
    assert rates[0] == pytest.approx(1) and rates[num_steps // 2] == pytest.approx(0.5) and rates[-1] < 0.01
    assert states_of(state.optimizer) == {ROWS[row].state}
    assert len(state.optimizer.state) == 2  # nothing for the weight that has no gradient


def four_updates(row, places, dtype):
    """(updates, weights and the model's copies) of the same run with masters in each place."""
    states = [make_state(row, place, dtype) for place in places]
    updates = [train(state, 0, 4) for state in states]
    assert any(made.grad_norm > MAX_NORM for made in updates[0])
    return updates, [[*state.engine.params, *state.engine.transformer.parameters()] for state in states]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", list(PLACES)[1:])
@pytest.mark.parametrize("row", ["prodigy", "prodigy_all", "came"])
def test_masters_in_host_memory_change_nothing(row, place, dtype):
    """Bit for bit, on the CPU; in bf16 there are masters without it too."""
    updates, weights = four_updates(row, ("device", place), dtype)
    assert updates[0] == updates[1]
    assert all(map(torch.equal, *weights))


@pytest.mark.parametrize("place", list(PLACES)[1:])
@pytest.mark.parametrize("row", ["adam", "adamw"])
def test_a_step_that_clips_by_itself_changes_last_bits_only(row, place):
    """torch's fused kernel divides where clip_grad_norm_ multiplies: a thousandth of a step is far more than that."""
    updates, weights = four_updates(row, ("device", place), torch.float32)
    for ours, theirs in zip(*updates, strict=True):
        assert float(ours.grad_norm) == pytest.approx(float(theirs.grad_norm), rel=1e-5)
    for ours, theirs in zip(*weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3 * ROWS[row].learning_rate)


@pytest.mark.parametrize("row", ["adam", "adamw", "bnb_adam8", "bnb_adamw8"])
def test_a_resumed_run_on_split_masters_is_the_unbroken_one(row, tmp_path):
    """bf16 weights whose masters are updated block by block; here none is in a block."""
    state, other = (make_state(row, dtype=torch.bfloat16) for _ in range(2))
    assert isinstance(state.engine.masters, StateRing)
    train(state, 0, 2)
    path = write_checkpoint(tmp_path, 2, state, PROVENANCE)
    checkpoints.load(path, other, PROVENANCE)
    updates = train(state, 2, ROWS[row].num_steps)
    assert train(other, 2, ROWS[row].num_steps) == updates and any(made.grad_norm > MAX_NORM for made in updates)
    assert all(map(torch.equal, masters_of(state.engine), masters_of(other.engine)))
    with torch.no_grad():
        assert grid_loss(state.engine.transformer) < 0.9 * grid_loss(TinyModel())
    assert states_of(state.optimizer) == {ROWS[row].state}


@pytest.mark.parametrize(("row", "place"), COMBINATIONS)
def test_four_updates_equal_two_and_a_resumed_two(row, place, eager, tmp_path):
    state = make_state(row, place)
    train(state, 0, 2)
    path = write_checkpoint(tmp_path, 2, state, PROVENANCE)
    unbroken = train(state, 2, 4)

    other = make_state(row, place)
    assert checkpoints.load(path, other, PROVENANCE) == 2
    assert train(other, 2, 4) == unbroken
    for ours, theirs in zip(state.engine.params, other.engine.params, strict=True):
        assert torch.equal(ours, theirs)
    assert states_of(other.optimizer) == {ROWS[row].state}
    first = write_checkpoint(tmp_path, 3, state, PROVENANCE)
    second = write_checkpoint(tmp_path, 4, other, PROVENANCE)
    ours, theirs = (load_file(path / "optimizer.safetensors") for path in (first, second))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    ours, theirs = (json.loads((path / "state.json").read_text()) for path in (first, second))
    assert ours | {"step": 4} == theirs


@pytest.mark.parametrize("row", ["ao_adamw8", "adamw"])
@pytest.mark.parametrize(
    "scheduler", ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant_with_warmup"]
)
def test_a_resumed_schedule_is_the_same_to_the_last_bit(row, scheduler):
    """torchao's learning rate is an fp32 tensor that the schedule fills."""
    args = parse(row)
    args = type(args)(**vars(args) | {"lr_scheduler": scheduler, "lr_warmup_steps": 3, "learning_rate": 1.7e-4})
    rates, weights = [], [torch.nn.Parameter(torch.zeros(2))]
    for resume_at in (None, 5):
        optimizer = make_optimizer_from_args(args, weights, args.learning_rate)
        schedule = make_lr_scheduler_from_args(args, optimizer, args.max_train_steps)
        seen = []
        for step in range(args.max_train_steps):
            if step == resume_at:
                saved, group = schedule_state(schedule), copy.deepcopy(optimizer.param_groups[0]["lr"])
                optimizer = make_optimizer_from_args(args, weights, args.learning_rate)
                schedule = make_lr_scheduler_from_args(args, optimizer, args.max_train_steps)
                schedule.load_state_dict(saved)
                optimizer.param_groups[0]["lr"] = group
            seen.append(float(optimizer.param_groups[0]["lr"]))
            optimizer.step()
            schedule.step()
        rates.append(seen)
    assert rates[0] == rates[1] and len(set(rates[0])) > 2


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "polynomial", "constant_with_warmup"])
@pytest.mark.parametrize("warmup", [4, 6])
def test_a_warm_up_as_long_as_the_run_is_no_error(scheduler, warmup):
    args = parse("adamw")
    args = type(args)(**vars(args) | {"lr_scheduler": scheduler, "lr_warmup_steps": warmup})
    optimizer = make_optimizer_from_args(args, [torch.nn.Parameter(torch.zeros(2))], 1e-3)
    schedule = make_lr_scheduler_from_args(args, optimizer, 4)
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([1e-3 * step / warmup for step in range(4)])


@pytest.mark.parametrize(
    ("scheduler", "share"),
    [
        ("cosine_with_restarts", lambda done: (1 + math.cos(math.pi * (3 * done % 1))) / 2),
        ("polynomial", lambda done: (1 - done) ** 2),
    ],
)
def test_cycles_and_power_are_the_flags(scheduler, share):
    args = parse("adamw")
    args = type(args)(**vars(args) | {"lr_scheduler": scheduler, "lr_num_cycles": 3, "lr_power": 2.0})
    optimizer = make_optimizer_from_args(args, [torch.nn.Parameter(torch.zeros(2))], 1.0)
    schedule = make_lr_scheduler_from_args(args, optimizer, 8)
    for step in range(8):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(share(step / 8), abs=1e-6)
        optimizer.step()
        schedule.step()


def test_the_numbers_of_the_flags_reach_every_optimizer():
    given = {"beta1": 0.8, "beta2": 0.93, "epsilon": 1e-5, "weight_decay": 0.07}
    wrong = []
    for row in ROWS:
        args = parse(row)
        args = type(args)(**vars(args) | given)
        optimizer = make_optimizer_from_args(args, [torch.nn.Parameter(torch.zeros(64, 64)) for _ in range(2)], 0.5)
        (group,) = optimizer.param_groups
        found = {"lr": float(group["lr"]), "betas": tuple(group["betas"])[:2], "decay": float(group["weight_decay"])}
        # bitsandbytes' Adam is given none: a hook adds it to the gradient
        expected = {"lr": 0.5, "betas": (0.8, 0.93), "decay": 0.0 if row == "bnb_adam8" else 0.07}
        if row != "came":  # whose two are the paper's
            found, expected = found | {"eps": group["eps"]}, expected | {"eps": 1e-5}
        wrong += [(row, found)] if found != expected else []
    assert not wrong


def test_adam_adds_its_decay_to_the_gradient_also_in_8_bits():
    """bitsandbytes' own Adam decays the weights as AdamW does: 0.9 of them would be left without any gradient."""
    for row, decoupled in (("bnb_adam8", False), ("bnb_adamw8", True)):
        args = parse(row)
        args = type(args)(**vars(args) | {"weight_decay": 1.0})
        weight = torch.nn.Parameter(torch.linspace(1, 2, NUM_WEIGHTS).view(64, 64))
        optimizer = make_optimizer_from_args(args, [weight], 0.1)
        weight.grad = torch.zeros_like(weight)
        start = weight.detach().clone()
        optimizer.step()
        # Adam's first step is the learning rate, however large the gradient
        torch.testing.assert_close(weight.data, start * 0.9 if decoupled else start - 0.1, rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("row", "beta3", "expected"),
    [
        ("prodigy", None, None),
        ("prodigy", 0.5, 0.5),
        ("came", None, (0.9, 0.95, 0.9999)),
        ("came", 0.5, (0.9, 0.95, 0.5)),
    ],
)
def test_the_third_beta(row, beta3, expected):
    """Prodigy takes sqrt(beta2) for None."""
    args = parse(row)
    args = type(args)(**vars(args) | {"beta3": beta3})
    (group,) = make_optimizer_from_args(args, [torch.nn.Parameter(torch.ones(2))], 1.0).param_groups
    assert group["beta3" if row == "prodigy" else "betas"] == expected


def test_prodigy_warns_of_a_learning_rate_that_is_meant_for_adam(caplog):
    weights = [torch.nn.Parameter(torch.ones(2))]
    with caplog.at_level(logging.WARNING):
        make_optimizer_from_args(parse("prodigy"), weights, 1.0)
        assert not caplog.records
        make_optimizer_from_args(parse("prodigy"), weights, 1e-4)
    assert len(caplog.records) == 1 and "give 1" in caplog.text


@pytest.mark.parametrize(
    ("row", "module", "line"),
    [
        ("prodigy", "prodigyopt", "--optimizer prodigy: needs prodigyopt .*pip install prodigyopt"),
        ("came", "came_pytorch", "--optimizer came: needs came-pytorch .*pip install came-pytorch"),
        ("bnb_adam8", "bitsandbytes", "--use_8bit: needs bitsandbytes .*pip install bitsandbytes"),
        ("ao_adamw4", "torchao.optim", "needs torchao .*pip install torchao"),
    ],
)
def test_a_missing_package_is_one_line(row, module, line, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=line):
        make_optimizer_from_args(parse(row), [torch.nn.Parameter(torch.ones(2))], 1.0)


def test_fp8_is_refused_on_a_gpu_before_ada(monkeypatch):
    class OnGpu(torch.nn.Parameter):
        device = torch.device("cuda", 0)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UsageError, match=r"--use_fp8 needs .* 8\.9 .* this one has 8\.0; use --use_8bit"):
        make_optimizer_from_args(parse("ao_adamwfp8"), [OnGpu(torch.ones(2))], 1.0)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--optimizer came --use_8bit", "low-bit states exist for adam and adamw only"),
        ("--optimizer adamw --use_8bit --use_4bit", "give one of them"),
        ("--optimizer adamw --use_4bit --use_cpu_offload_optimizer", "give one of them"),
        ("--mixed_precision fp16 --use_8bit --use_cpu_offload_optimizer", "give one of them"),
        ("--optimizer adamw --use_torchao", "add --use_8bit"),
    ],
)
def test_combinations_that_do_not_exist_are_refused_before_anything_is_loaded(flags, line, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_training_args("t2v_sft", ["--pretrained_model_name_or_path", "m", "--data_root", "d", *flags.split()])
    assert ended.value.code == 2 and line in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "idle"), [("--optimizer came --epsilon 1e-6", "--epsilon"), ("--beta3 0.9", "--beta3")]
)
def test_flags_that_an_optimizer_does_not_read_are_named(flags, idle, capsys):
    parse_training_args("t2v_sft", ["--pretrained_model_name_or_path", "m", "--data_root", "d", *flags.split()])
    assert f"warning: {idle}: no effect" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("row", ["ao_adamw8", "ao_adam4", "ao_adamwfp8"])
def test_the_compiled_step_follows_the_schedule(row, tmp_path):
    """As without compiling; a learning rate that were frozen or rounded at compile time would show, as would a resume."""
    torch.compiler.reset()
    runs = []
    for stance in ("default", "force_eager"):
        with set_stance(stance):
            state = make_state(row)
            train(state, 0, 10)
            path = write_checkpoint(tmp_path, 10 if stance == "default" else 11, state, PROVENANCE)
            train(state, 10, 20)
            resumed = make_state(row)
            checkpoints.load(path, resumed, PROVENANCE)
            train(resumed, 10, 20)
        assert all(torch.equal(a, b) for a, b in zip(state.engine.params, resumed.engine.params, strict=True))
        runs.append(state.engine.params)
    moved = [(a - b).abs().max() for a, b in zip(runs[0], TinyModel().parameters(), strict=True)]
    for ours, theirs, distance in zip(*runs, moved, strict=True):
        assert (ours - theirs).abs().max() <= 0.02 * distance


@contextlib.contextmanager
def set_stance(stance):
    torch.compiler.set_stance(stance)
    yield
    torch.compiler.set_stance("default")
