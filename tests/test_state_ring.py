"""States on the GPU or the host, in chunks of any size: bit for bit torch's fused AdamW on plain fp32 masters."""

import functools
import sys
import weakref
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from engine import ring_adam, state_ring
from engine.block_states import Storage, spread
from engine.optimizers import load_states, make_bitsandbytes_adam, split_tensors
from engine.ring_adam import RingAdam, WeightsByName, on_default_stream
from engine.split import join, round_to_bf16, split
from engine.state_ring import StateRing, averaged
from memory import host, streaming
from run.render import may_move


CPU = torch.device("cpu")
DEVICE, HALF, HOST, STREAM = Storage(1.0), Storage(0.5), Storage(0.0), Storage(0.0, streams=True)
STORAGES = {"device": DEVICE, "half": HALF, "host": HOST, "stream": STREAM, "half, stream": Storage(0.5, streams=True)}
wherever = pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


class Block(nn.Module):
    def __init__(self, width=24):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), nn.LayerNorm(width)
        self.unused = nn.Parameter(torch.randn(5))

    def forward(self, states):
        return states + self.down(torch.nn.functional.gelu(self.up(self.norm(states))))


class Model(nn.Module):
    def __init__(self, num_blocks=4):
        super().__init__()
        self.embed, self.out = nn.Linear(8, 24), nn.Linear(24, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))

    def forward(self, states):
        states = self.embed(states)
        for block in self.blocks:
            states = block(states)
        return self.out(states)


def make_model():
    torch.manual_seed(0)
    return Model()


def make_loss(model, seed, scale=1.0):
    inputs = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return (model(inputs).float() - 1).square().mean() * scale


class PlainRun:
    """fp32 masters and torch's own optimizer and clipping; the model's copies are rounded as the ring's."""

    def __init__(self, kind, model=make_model, fused=True):
        self.model = model()
        self.masters = [nn.Parameter(weight.detach().clone()) for weight in self.model.parameters()]
        self.optimizer = kind(self.masters, **SETTINGS, fused=fused)
        self.copy()

    def copy(self):
        for weight, master in zip(self.model.parameters(), self.masters, strict=True):
            weight.data = round_to_bf16(master.detach())

    def update(self, losses, max_norm, lr):
        for make in losses:
            make(self.model).backward()
            for weight, master in zip(self.model.parameters(), self.masters, strict=True):
                if weight.grad is not None:
                    master.grad = weight.grad.float() if master.grad is None else master.grad + weight.grad
                    weight.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self.masters, max_norm)
        self.optimizer.param_groups[0]["lr"] = lr
        if norm.isfinite():
            self.optimizer.step()
            self.copy()
        self.optimizer.zero_grad()
        return norm


class RingRun:
    def __init__(self, kind, storage, accumulates=False, chunk=1024, ema=None, model=make_model):
        self.model = model()
        self.states = StateRing(self.model, self.model.blocks, CPU, storage, accumulates, ema, chunk)
        self.optimizer = RingAdam(self.states, kind, SETTINGS)

    def update(self, losses, max_norm, lr):
        for make in losses:
            make(self.model).backward()
        self.optimizer.param_groups[0]["lr"] = lr
        return self.optimizer.step(max_norm)[0]

    @property
    def masters(self):
        self.states.complete()
        return masters_of(self.states)


class LateWork(host.TransferStream):
    """Copies and updates are done when their event is waited for, in order, and copies only from what is still there.

    `early`: as soon as what they come after is done.
    """

    early = False

    def __init__(self, device, priority=0):
        super().__init__(device, priority)
        self.waiting, self.done, self.queued = deque(), 0, 0

    def mark(self):
        return LateEvent()

    def start(self, pairs, after):
        """Views are of buffers that stay."""
        kept = [
            (target, weakref.ref(source) if source._base is None else lambda s=source: s) for target, source in pairs
        ]
        return self.run(functools.partial(self.copy, kept), after)

    def run(self, action, after):
        self.waiting.append((action, after))
        self.queued += 1
        if self.early and all(event.is_done() for event in after):
            self.synchronize()
        return LateEvent(self, self.queued)

    def copy(self, pairs):
        for target, source in pairs:
            assert source() is not None, "given back before it was copied"
            target.copy_(source())

    def synchronize(self):
        while self.waiting:
            action, after = self.waiting.popleft()
            for event in after:
                event.wait()
            action()
            self.done += 1


class LateEvent:
    def __init__(self, stream=None, number=0):
        self.stream, self.number = stream, number

    def is_done(self):
        return self.stream is None or self.stream.done >= self.number

    def wait(self):
        while self.stream and self.stream.done < self.number:
            action, after = self.stream.waiting.popleft()
            for event in after:
                event.wait()
            action()
            self.stream.done += 1


def masters_of(states):
    return list(WeightsByName(states, states.get_master).values())


PLAN = [((1,), 0.02, 1e-2), ((2,), 1e3, 2e-2), ((3,), 1e-3, 3e-2), ((4,), 1.0, 1e-2)]  # seeds, max_norm, lr


def micro_steps(seeds, accumulation):
    return [
        lambda model, seed=seed, k=k: make_loss(model, 10 * seed + k) for seed in seeds for k in range(accumulation)
    ]


def run_plan(run, accumulation=1, plan=PLAN):
    return [float(run.update(micro_steps(seeds, accumulation), *rest)) for seeds, *rest in plan]


def assert_same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.detach(), other.detach())


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
@pytest.mark.parametrize("accumulation", [1, 3])
@wherever
@pytest.mark.parametrize("chunk", [256, 1024, 2**20])
def test_updates_are_the_bits_of_plain_fused_adamw(kind, accumulation, storage, chunk):
    """Clipping in force in the first and third update; one weight of each block takes no part in the loss."""
    plain, ring = PlainRun(kind), RingRun(kind, storage, accumulation > 1, chunk)
    assert run_plan(plain, accumulation) == run_plan(ring, accumulation)
    assert_same(ring.masters, plain.masters)
    assert_same(ring.model.parameters(), plain.model.parameters())
    ours, theirs = ring.optimizer.state_dict()["state"], plain.optimizer.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    for index, entry in theirs.items():
        assert entry.keys() == ours[index].keys()
        assert_same(ours[index].values(), [entry[name] for name in ours[index]])


@pytest.mark.parametrize("early", [(), ("outward",), ("inward", "work"), ("work", "outward"), ("copies",)], ids=str)
@pytest.mark.parametrize("chunk", [256, 2**20])
@pytest.mark.parametrize("accumulation", [1, 3])
@wherever
def test_every_use_waits_for_what_it_needs(accumulation, storage, chunk, early, monkeypatch):
    """Copies and updates as late as their events allow, or as early."""
    for module in (state_ring, streaming):
        monkeypatch.setattr(module, "TransferStream", LateWork)
    plain, ring = PlainRun(torch.optim.AdamW), RingRun(torch.optim.AdamW, storage, accumulation > 1, chunk)
    for name in early:
        if name != "copies" or storage.streams:
            getattr(ring.states.weights if name == "copies" else ring.states, name).early = True
    assert run_plan(plain, accumulation) == run_plan(ring, accumulation)
    assert_same(ring.masters, plain.masters)
    assert_same(ring.model.parameters(), plain.model.parameters())


def test_chunks_follow_each_other_without_waiting_for_the_way_back(monkeypatch):
    """As many as there are slots: else the link is used in one direction at a time."""
    monkeypatch.setattr(state_ring, "TransferStream", LateWork)
    ring = RingRun(torch.optim.AdamW, HOST, chunk=256)
    for number in (1, 2):
        make_loss(ring.model, number).backward()
        sent = ring.states.outward.queued
        ring.optimizer.step()
        for stream in (ring.states.inward, ring.states.inward_gradients):
            assert len(stream.waiting) > state_ring.NUM_SLOTS
            first = [after for _, after in stream.waiting][: state_ring.NUM_SLOTS]
            assert all(
                event.number <= sent + 1 for after in first for event in after
            )  # + 1: the event of the last one


@wherever
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_update_with_bad_gradients_changes_nothing(storage, bad):
    plain, ring = PlainRun(torch.optim.AdamW), RingRun(torch.optim.AdamW, storage)
    for run in (plain, ring):
        run_plan(run, plan=PLAN[:2])
        run.update([lambda model: make_loss(model, 7, scale=bad)], 1.0, 1e-2)
        run_plan(run, plan=PLAN[2:])
    assert_same(ring.masters, plain.masters)


@pytest.mark.parametrize("of_run", ["plain", *STORAGES])
@wherever
def test_a_run_goes_on_from_the_states_of_any_other(of_run, storage):
    whole = PlainRun(torch.optim.AdamW)
    run_plan(whole)
    first = PlainRun(torch.optim.AdamW) if of_run == "plain" else RingRun(torch.optim.AdamW, STORAGES[of_run])
    run_plan(first, plan=PLAN[:2])
    masters, state = list(first.masters), first.optimizer.state_dict()
    ring = RingRun(torch.optim.AdamW, storage)
    for index, master in enumerate(masters):
        ring.states.set_master(index, master.detach())
    ring.optimizer.load_state_dict(state)
    run_plan(ring, plan=PLAN[2:])
    assert_same(ring.masters, whole.masters)


@wherever
def test_an_update_waits_for_its_blocks_forward_pass_but_no_reader_sees_old_weights(storage):
    ring = RingRun(torch.optim.AdamW, storage)
    before = [weight.clone() for weight in ring.model.blocks[3].parameters()]
    ring.update(micro_steps((1,), 1), 1.0, 1e-2)
    assert_same(ring.model.blocks[3].parameters(), before)  # deferred
    with torch.no_grad():
        seen = make_loss(ring.model, 5)
    plain = PlainRun(torch.optim.AdamW)
    plain.update(micro_steps((1,), 1), 1.0, 1e-2)
    assert torch.equal(seen, make_loss(plain.model, 5))


@wherever
def test_the_moving_average_is_that_of_the_masters(storage):
    """Bit for bit diffusers' own; a skipped update does not count. Seen in the model, it leaves no trace there."""
    plain, ring = PlainRun(torch.optim.AdamW), RingRun(torch.optim.AdamW, storage, ema=EMAModel([], decay=0.7))
    reference = EMAModel(plain.masters, decay=0.7)
    for number, (seeds, *rest) in enumerate(PLAN):
        losses = micro_steps(seeds, 1)
        if number == 1:
            losses = [lambda model: make_loss(model, 7, scale=float("nan"))]
        for run in (plain, ring):
            norm = run.update(losses, *rest)
        if norm.isfinite():
            reference.step(plain.masters)
        with averaged(ring.states):
            assert_same(ring.model.parameters(), map(round_to_bf16, reference.shadow_params))
    assert_same(map(ring.states.get_average, range(len(plain.masters))), reference.shadow_params)
    assert_same(ring.masters, plain.masters)
    assert ring.states.ema.optimization_step == reference.optimization_step == 3


@pytest.mark.parametrize("storage", [HOST, STREAM], ids=["host", "stream"])
def test_what_is_written_between_updates_is_what_the_next_pass_reads(storage):
    """A checkpoint is loaded, and a moving average is looked at, when blocks are still in their slots."""
    plain, ring = PlainRun(torch.optim.AdamW), RingRun(torch.optim.AdamW, storage, ema=EMAModel([], decay=0.7))
    for run in (plain, ring):
        run_plan(run, plan=PLAN[:2])
    ring.states.complete()
    for index, master in enumerate(plain.masters):
        master.data.mul_(1.01)
        ring.states.set_master(index, master.data)
    plain.copy()
    assert torch.equal(make_loss(ring.model, 5), make_loss(plain.model, 5))
    with averaged(ring.states), torch.no_grad():
        seen = make_loss(ring.model, 5)
    for weight, average in zip(plain.model.parameters(), map(ring.states.get_average, range(99)), strict=False):
        weight.data = round_to_bf16(average)
    assert torch.equal(seen, make_loss(plain.model, 5))
    plain.copy()
    for run in (ring, plain):
        run_plan(run, plan=PLAN[2:])
    assert_same(ring.masters, plain.masters)


@pytest.mark.parametrize("count", range(7))
def test_blocks_on_the_host_are_spread_evenly(count):
    places = spread(count, 6)
    assert sum(places) == count
    gaps = [places[:at].count(True) - at * count / 6 for at in range(7)]
    assert max(gaps) - min(gaps) < 1


def test_weights_may_move_and_return():
    """As a validation does that has one model at a time on the GPU, and the memory that updates need."""
    ring, plain = RingRun(torch.optim.AdamW, HOST), PlainRun(torch.optim.AdamW)
    for run in (ring, plain):
        run_plan(run, plan=PLAN[:2])
    with ring.states.at_rest():
        assert not ring.states.slots and ring.states.arithmetic is None
        assert_same(ring.masters, plain.masters)
        for weight in ring.model.parameters():
            weight.data = weight.data.clone()
    for run in (ring, plain):
        run_plan(run, plan=PLAN[2:])
    assert_same(ring.masters, plain.masters)


def test_a_validation_moves_only_what_is_on_the_gpu():
    """Weights that are streamed are views of one buffer on the host; DeepSpeed's are on the GPU."""
    gpu, streamed, flat = torch.device("meta"), nn.Linear(4, 4), nn.Linear(4, 4, device="meta")
    assert may_move(flat, gpu)
    for layer in (streamed, flat):
        layer.weight.data = torch.zeros(99, device=layer.weight.device)[:16].view(4, 4)
    assert may_move(streamed, gpu) and not may_move(flat, gpu)


def test_a_second_backward_pass_is_refused_where_it_would_be_rounded():
    ring = RingRun(torch.optim.AdamW, HOST)
    make_loss(ring.model, 1).backward()
    with pytest.raises(RuntimeError, match="accumulates=True"):
        make_loss(ring.model, 2).backward()


# ---------------------------------------------------------------- 8-bit states


class WideModel(nn.Module):
    """Blocks of a weight of 8-bit states and of smaller ones with fp32 states."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Linear(8, 72), nn.Linear(72, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(72, 72), nn.GELU()) for _ in range(4))

    forward = Model.forward


class BitsandbytesRun(PlainRun):
    def __init__(self, kind):
        super().__init__(kind, WideModel)
        self.optimizer = make_bitsandbytes_adam(self.masters, kind is torch.optim.AdamW, SETTINGS)


class LowBitRun(RingRun):
    def __init__(self, kind, storage, **kwargs):
        super().__init__(kind, storage._replace(low_bit=True), model=WideModel, **kwargs)


@wherever
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
@pytest.mark.parametrize("chunk", [256, 2**20])
def test_8bit_states_are_the_bits_of_bitsandbytes(kind, storage, chunk):
    """Of tensors that it gives 8-bit states; those of smaller ones are torch's, equal to rounding."""
    plain, ring = BitsandbytesRun(kind), LowBitRun(kind, storage, chunk=chunk)
    assert run_plan(ring, plan=PLAN[:1]) == run_plan(plain, plan=PLAN[:1])
    for ours, theirs in zip(ring.masters, plain.masters, strict=True):
        assert torch.equal(ours, theirs) if ours.numel() >= 4096 else torch.allclose(ours, theirs, atol=1e-7)
    (ours, _), (theirs, rest) = (split_tensors(run.optimizer.state_dict()) for run in (ring, plain))
    for name, value in ours.items():
        torch.testing.assert_close(value, torch.as_tensor((theirs | rest["values"])[name]).to(value.dtype))


@wherever
def test_where_8bit_states_lie_changes_no_bit(storage):
    """Clipping, a skipped update and a moving average among it."""
    runs = [LowBitRun(torch.optim.AdamW, where, ema=EMAModel([], decay=0.7)) for where in (DEVICE, storage)]
    for run in runs:
        run_plan(run, plan=PLAN[:2])
        run.update([lambda model: make_loss(model, 7, scale=float("nan"))], 1.0, 1e-2)
        run_plan(run, plan=PLAN[2:])
    assert_same(*(run.masters for run in runs))
    assert_same(*(map(run.states.get_average, range(12)) for run in runs))


@wherever
@pytest.mark.parametrize("of_run", ["bitsandbytes", *STORAGES])
def test_a_run_with_8bit_states_goes_on_from_any_other(of_run, storage):
    first, whole = (
        BitsandbytesRun(torch.optim.AdamW)
        if of_run == "bitsandbytes"
        else LowBitRun(torch.optim.AdamW, STORAGES[of_run])
        for _ in range(2)
    )
    run_plan(first, plan=PLAN[:2])
    run_plan(whole)
    masters = [master.detach().clone() for master in first.masters]
    tensors, rest = split_tensors(first.optimizer.state_dict())
    ring = LowBitRun(torch.optim.AdamW, storage)
    for index, master in enumerate(masters):
        ring.states.set_master(index, master)
    load_states(ring.optimizer, iter(tensors.items()), rest, CPU)
    run_plan(ring, plan=PLAN[2:])
    for ours, theirs in zip(ring.masters, whole.masters, strict=True):
        assert torch.equal(ours, theirs) if of_run != "bitsandbytes" else torch.allclose(ours, theirs, atol=2e-3)


# ---------------------------------------------------------------- split masters


def test_splitting_is_lossless_for_every_low_half():
    """For NaN, infinities, subnormals and the largest numbers, too."""
    low = torch.arange(2**16, dtype=torch.int32)
    for high in (0x0000, 0x0001, 0x007F, 0x3F80, 0x3FFF, 0x7F7F, 0x7F80, 0x7FFF, 0x8000, 0xBF81, 0xFF7F, 0xFFFF):
        bits = (low + (high << 16)).to(torch.int32) if high < 2**15 else low + ((high - 2**16) << 16)
        master = bits.view(torch.float32)
        weight, remainder = torch.empty(2**16, dtype=torch.bfloat16), torch.empty(2**16, dtype=torch.int16)
        split(master, weight, remainder)
        back = torch.empty(2**16)
        join(weight, remainder, back)
        assert torch.equal(back.view(torch.int32), bits)
        assert torch.equal(round_to_bf16(master).view(torch.int16), weight.view(torch.int16))


def test_rounding_is_to_the_nearest_and_away_from_zero_between_two():
    master = torch.randn(100_000)
    master = master[master.view(torch.int32) & 0xFFFF != 0x8000]  # about one is a tie
    assert torch.equal(round_to_bf16(master), master.bfloat16())
    tie = torch.tensor([1 + 2**-8, -1 - 2**-8, 1 + 3 * 2**-8])
    assert round_to_bf16(tie).tolist() == [1 + 2**-7, -1 - 2**-7, 1 + 2**-6]


# ---------------------------------------------------------------- on a GPU


@pytest.mark.gpu
def test_kernels_split_and_join_as_torch_does():
    bits = torch.randint(-(2**31), 2**31, (2**22 + 5,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    master = bits.view(torch.float32)
    halves = []
    for device in (CPU, torch.device("cuda", 0)):
        weight = torch.empty(len(bits), dtype=torch.bfloat16, device=device)
        remainder = torch.empty(len(bits), dtype=torch.int16, device=device)
        split(master.to(device), weight, remainder)
        back = torch.empty(len(bits), device=device)
        join(weight, remainder, back)
        assert torch.equal(back.cpu().view(torch.int32), bits)
        halves.append((weight.cpu().view(torch.int16), remainder.cpu()))
    assert_same(*halves)


class Given(nn.Module):
    """Weights whose gradients are what it is told."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(shape) for shape in ((24, 48), (5,), (48,), (72, 72)))
        self.gradients = []

    def forward(self, total):
        return total + sum(
            (weight * gradient).sum() for weight, gradient in zip(self.weights, self.gradients, strict=True)
        )


class GivenModel(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.blocks = Given(), nn.ModuleList(Given() for _ in range(8))

    def backward(self, gradients):
        total, rest = 0, iter(gradients)
        for part in (self.embed, *self.blocks):
            part.gradients = [next(rest) for _ in part.weights]
            total = part(total)
        total.backward()


@pytest.mark.gpu
@pytest.mark.parametrize("accumulation", [1, 3])
def test_on_a_gpu_where_states_and_weights_are_changes_no_bit(accumulation):
    """Against torch's fused AdamW on the GPU, given the same gradients; repeated, so that a missing wait shows."""
    device, runs = torch.device("cuda", 0), []
    for storage in (DEVICE, HALF, HOST, HOST, STREAM, STREAM):
        model = GivenModel()
        states = StateRing(model, model.blocks, device, storage, accumulation > 1, chunk=1024)
        runs.append((model, states, RingAdam(states, torch.optim.AdamW, SETTINGS)))
    plain = [weight.detach().float().requires_grad_() for weight in masters_of(runs[0][1])]
    torchs = torch.optim.AdamW(plain, **SETTINGS, fused=True)
    for step in range(20):
        sums = [None] * len(plain)
        for micro_step in range(accumulation):
            seeds = [torch.Generator().manual_seed(100 * step + 10 * micro_step + n) for n in range(len(plain))]
            gradients = [
                torch.randn(weight.shape, generator=seed).to(device).bfloat16()
                for weight, seed in zip(plain, seeds, strict=True)
            ]
            for model, *_ in runs:
                model.backward(gradients)
            floats = [gradient.float() for gradient in gradients]
            sums = [new if old is None else old + new for old, new in zip(sums, floats, strict=True)]
        norms = [optimizer.step(1.0)[0] for *_, optimizer in runs]
        assert len(set(map(float, norms))) == 1
        coefficient = torch.clamp(1.0 / (norms[0] + 1e-6), max=1.0)
        for weight, total in zip(plain, sums, strict=True):
            weight.grad = total * coefficient
        torchs.step()
    for _, states, _ in runs:
        states.complete()
        assert_same(masters_of(states), plain)


def test_what_runs_on_the_default_stream_waits_for_the_current_one_and_is_waited_for(monkeypatch):
    """bitsandbytes' kernels take no stream; between chunks' copies and updates they would be too early and too late."""
    order = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            order.append(f"{self.name} waits for {other.name}")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("work"))
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream("default"))
    with on_default_stream(torch.device("cuda", 0)):
        order.append("kernel")
    assert order == ["default waits for work", "kernel", "work waits for default"]


@pytest.mark.parametrize("compiles", [True, False])
def test_8bit_states_need_no_compiler(monkeypatch, compiles):
    """Without one, as on an older card, the update is that of bitsandbytes' CUDA kernels."""
    monkeypatch.setattr(ring_adam, "uses_triton", lambda device: compiles)
    triton = SimpleNamespace(optimizer_update_8bit_blockwise="in Triton")
    monkeypatch.setitem(sys.modules, "bitsandbytes.backends.triton.ops", triton)
    eight_bit = ring_adam.EightBit(torch.device("cpu"))
    assert (eight_bit.update == "in Triton") == compiles
    assert (eight_bit.around is on_default_stream) != compiles


@pytest.mark.gpu
def test_on_a_gpu_8bit_states_are_the_same_wherever_they_are():
    """And near those of bitsandbytes' CUDA kernels, which choose another code of 256 where two are as near."""
    device, kept = torch.device("cuda", 0), []
    for storage in (DEVICE, HALF, HOST, STREAM):
        model = GivenModel()
        states = StateRing(model, model.blocks, device, storage._replace(low_bit=True), chunk=1024)
        optimizer = RingAdam(states, torch.optim.AdamW, SETTINGS)
        first = [master.clone() for master in masters_of(states)]
        plain = [master.clone().requires_grad_() for master in first]
        theirs = make_bitsandbytes_adam(plain, True, SETTINGS)
        for step in range(10):
            seeds = [torch.Generator().manual_seed(10 * step + n) for n in range(len(plain))]
            pairs = zip(plain, seeds, strict=True)
            gradients = [torch.randn(w.shape, generator=seed).to(device).bfloat16() for w, seed in pairs]
            model.backward(gradients)
            norm, _ = optimizer.step(1.0)
            for weight, gradient in zip(plain, gradients, strict=True):
                weight.grad = gradient.float() * torch.clamp(1.0 / (norm + 1e-6), max=1.0)
            theirs.step()
        states.complete()
        kept.append(masters_of(states))
        assert sum(master.numel() >= 4096 for master in first) >= 2  # those in 8 bits
        for ours, their, start in zip(kept[-1], plain, first, strict=True):
            assert (ours - their).norm() < 0.01 * (their - start).norm()
    for masters in kept[1:]:
        assert_same(masters, kept[0])
