"""AdamW for bf16 weights with exact fp32 masters, whose states lie on the GPU or in host memory, block by block.

A master is a bf16 weight and its 16-bit remainder (engine/split.py). A block's update runs right before its next forward
pass, beside that of the blocks before it. With states on the host, gradients leave during the backward pass; then, chunk
by chunk, remainders, moments and gradients are copied to slots on the GPU, torch's fused kernel steps there, and states
are copied back. Where they lie changes no bit, and the host never waits for the GPU.

    states = StateRing(model, model.transformer_blocks, device, on_host=True)  # weights in bf16 from here on
    optimizer = RingAdam(states, torch.optim.AdamW, {"lr": 1e-5})
    for ...:
        loss.backward()
        optimizer.step(max_norm=1.0)
    states.complete()  # before anything reads weights or states
"""

import contextlib
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from engine.block_states import AVERAGE, GRADIENTS, MOMENTS, STATES, BlockStates, Chunk, divide
from engine.split import join, rounded, split
from memory.host import TransferStream, wait, wrap_blocks


CHUNK = 2**23  # weights that are updated at a time
NUM_SLOTS = 7  # chunks on the GPU: 0.66 GiB. Fewer stall while saved activations leave through the same link
QUEUED_AHEAD = 2  # blocks whose update is queued before the forward pass comes to them
LEAVING = 2  # blocks whose gradients may still be on their way to the host
PINNING_THREADS = 4


class Step(NamedTuple):
    """An update that is decided on, and perhaps not applied to all blocks yet."""

    rule: Callable  # torch's fused kernel with its settings
    coefficient: torch.Tensor  # [], clips the gradients
    skipped: torch.Tensor  # [], fp32: 1 if the gradients are not finite
    has_gradient: set[int]  # indices of weights; the others stay as they are
    ema_rate: float  # 1 - decay
    sent: object  # event: the gradients are on the host, and so are the states of the step before
    ready: object  # event: the backward pass is over


@dataclass(eq=False)
class Slot:
    """Room on the GPU for a chunk's states and gradients."""

    buffers: dict[str, torch.Tensor]
    free: object  # event: what was there has left


@dataclass(eq=False)
class Leaving:
    """A block's gradients on their way to the host."""

    block: BlockStates
    gradients: list[torch.Tensor]
    sent: object = None  # event


class StateRing:
    """Holds the states of all weights of `model`, takes their gradients, and applies updates block by block.

    `blocks` are called in order, compiled or not. Weights outside of them have their states on the GPU. `accumulates`:
    several backward passes may come before an update; their gradients are summed in fp32. `ema`: the decay of a moving
    average of the masters, kept with the other states; it holds no weights itself.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: nn.ModuleList,
        device: torch.device,
        on_host: bool,
        accumulates: bool = False,
        ema: EMAModel | None = None,
        chunk: int = CHUNK,
    ):
        self.device, self.accumulates, self.ema = device, accumulates, ema
        self.states = STATES | {AVERAGE: torch.float32} if ema else STATES
        self.states_and_gradients = self.states | {GRADIENTS: torch.float32 if accumulates else torch.bfloat16}
        self.names = {name: index for index, (name, _) in enumerate(model.named_parameters())}
        self.params = list(model.parameters())
        self.blocks = divide(self.params, blocks, on_host, chunk)  # in the order of the forward pass, then the rest
        self.block_of = {index: block for block in self.blocks for index in block.weights}
        self.num_updates = torch.zeros(len(self.params), device=device)  # of each weight, as torch's AdamW counts
        self.norms: dict[int, torch.Tensor] = {}  # of the gradients that have come for the next update
        self.inward, self.work, self.outward = (TransferStream(device) for _ in range(3))
        self.leaving: list[Leaving] = []
        self.take_weights()
        self.make_room(min(chunk, max(block.size for block in self.blocks)), on_host)
        wrap_blocks(blocks, self)

    # ---- set-up

    def take_weights(self) -> None:
        """Turn the model's weights, in any dtype and anywhere, into bf16 on the device and remainders; take gradients.

        Pinning is what takes time. A block's weights are freed once its states are there.
        """
        kinds = {True: self.states_and_gradients, False: self.states}
        with ThreadPoolExecutor(PINNING_THREADS) as pool:
            allocated = pool.map(lambda block: block.allocate(kinds[block.on_host], self.device), self.blocks)
            for block, _ in zip(self.blocks, allocated, strict=True):
                for index, weight in block.weights.items():
                    master = weight.data
                    weight.data = torch.empty(weight.shape, dtype=torch.bfloat16, device=self.device)
                    self.set_master(index, master)
                    if self.ema:
                        block.view(AVERAGE, index).copy_(master)
                    weight.register_post_accumulate_grad_hook(functools.partial(self.take_gradient, block, index))

    def make_room(self, size: int, on_host: bool) -> None:
        empty = functools.partial(torch.empty, size, device=self.device)
        self.master, self.gradient, self.weight = empty(), empty(), empty(dtype=torch.bfloat16)
        kinds = self.states_and_gradients.items()
        self.slots = [
            Slot({name: empty(dtype=dtype) for name, dtype in kinds}, self.inward.mark())
            for _ in range(NUM_SLOTS if on_host else 0)
        ]
        self.turn = 0

    # ---- backward

    def take_gradient(self, block: BlockStates, index: int, weight: nn.Parameter) -> None:
        gradient, weight.grad = weight.grad, None
        if index in self.norms and not self.accumulates:
            raise RuntimeError("a second backward pass before the update: give StateRing accumulates=True")
        if block.due:
            raise RuntimeError("a backward pass through a block without its forward pass, which updates it first")
        if block.on_host:
            self.send_gradient(block, index, gradient)
            return
        if index in self.norms:
            block.gradients[index] += gradient
        else:
            block.gradients[index] = gradient.float() if self.accumulates else gradient
        self.norms[index] = norm_of(block.gradients[index])

    def send_gradient(self, block: BlockStates, index: int, gradient: torch.Tensor) -> None:
        """Add `gradient` to what the host has, while the backward pass goes on."""
        if not self.leaving or self.leaving[-1].block is not block:
            self.leaving.append(Leaving(block, []))
            self.release_gradients(LEAVING)
        host, computed = block.view(GRADIENTS, index), self.outward.mark()
        if self.accumulates:
            add = functools.partial(self.add_to_host, host, index, gradient)
            self.leaving[-1].sent = self.outward.run(add, after=[computed])
        else:
            self.norms[index] = norm_of(gradient)
            self.leaving[-1].sent = self.outward.start([(host, gradient)], after=[computed])
        self.leaving[-1].gradients.append(gradient)

    def add_to_host(self, host: torch.Tensor, index: int, gradient: torch.Tensor) -> None:
        total = gradient.float()
        if index in self.norms:
            total += host.to(self.device, non_blocking=True)
        self.norms[index] = norm_of(total)
        host.copy_(total, non_blocking=True)

    def gradients(self) -> list[torch.Tensor]:
        """Those that are on the GPU, to be averaged over ranks in place; call `measure_norms` afterwards."""
        return [gradient for block in self.blocks for gradient in block.gradients.values()]

    def measure_norms(self) -> None:
        for block in self.blocks:
            self.norms |= {index: norm_of(gradient) for index, gradient in block.gradients.items()}

    def release_gradients(self, keep: int) -> None:
        """Free the gradients of all but the last `keep` blocks: their copies are done, so that nothing has to wait."""
        while len(self.leaving) > keep:
            wait(self.leaving[0].sent)
            self.leaving.pop(0)

    # ---- update

    def start_step(self, rule: Callable, max_norm: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Decide on an update, as `clip_grad_norm_` and a loss scaler do; returns (norm before clipping, skipped).

        The blocks are updated when the next forward pass comes to them, the weights around them now.
        """
        sent = self.outward.run(lambda: None, after=[])
        if self.accumulates:
            wait(sent)  # norms come from there, too
        norm = torch.linalg.vector_norm(torch.stack([norm for _, norm in sorted(self.norms.items())]))
        coefficient = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        skipped = ~norm.isfinite()
        if len(self.norms) == len(self.params):
            self.num_updates += 1 - skipped.float()
        else:  # some take no part in the loss
            self.num_updates[sorted(self.norms)] += 1 - skipped.float()
        rate = self.next_ema_rate(skipped)
        step = Step(rule, coefficient, skipped.float(), set(self.norms), rate, sent, None)
        self.norms = {}
        *blocks, around = self.blocks
        self.update_resident(around, step)
        # Kept until the next one: the work stream still reads its tensors when the last block's update is queued
        self.step = step = step._replace(ready=self.work.mark())
        for block in blocks:
            block.due = step
        self.queue_updates(QUEUED_AHEAD)
        return norm, skipped

    def next_ema_rate(self, skipped: torch.Tensor) -> float:
        """0 for a skipped update. Only a moving average needs the verdict on the host, which waits for it."""
        if self.ema is None or skipped:
            return 0.0
        self.ema.optimization_step += 1
        return 1 - self.ema.get_decay(self.ema.optimization_step)

    def queue_updates(self, stop: int) -> None:
        """Queue the updates that are due of the first `stop` blocks, beside what the compute stream does meanwhile."""
        for block in self.blocks[:stop]:
            step, block.due = block.due, None
            if step and block.on_host:
                self.update_on_host(block, step)
            elif step:
                update = functools.partial(self.update_resident, block, step)
                block.updated = self.work.run(update, after=[step.ready])

    def update_resident(self, block: BlockStates, step: Step) -> None:
        for chunk in block.chunks:
            for piece in chunk.pieces:
                if piece.index in step.has_gradient:
                    self.gradient[piece.inside].copy_(block.gradients[piece.index].flatten()[piece.part])
            self.update_chunk(chunk, {name: flat[chunk.inside] for name, flat in block.buffers.items()}, step)

    def update_on_host(self, block: BlockStates, step: Step) -> None:
        for chunk in block.chunks:
            slot = self.slots[self.turn % len(self.slots)]
            self.turn += 1
            there = {name: flat[: chunk.size] for name, flat in slot.buffers.items()}
            here = {name: flat[chunk.inside] for name, flat in block.buffers.items()}
            pairs = [(there[name], here[name]) for name in here]
            arrived = self.inward.start(pairs, after=[slot.free, step.sent, step.ready])
            block.updated = self.work.run(functools.partial(self.update_arrived, chunk, there, step), after=[arrived])
            slot.free = self.outward.start([(here[name], there[name]) for name in self.states], after=[block.updated])

    def update_arrived(self, chunk: Chunk, there: dict[str, torch.Tensor], step: Step) -> None:
        self.gradient[: chunk.size].copy_(there[GRADIENTS])
        self.update_chunk(chunk, there, step)

    def update_chunk(self, chunk: Chunk, states: dict[str, torch.Tensor], step: Step) -> None:
        """Step a chunk whose fp32 gradients are in `self.gradient`."""
        master, gradient, weight = (flat[: chunk.size] for flat in (self.master, self.gradient, self.weight))
        own = [self.params[piece.index].data.view(-1)[piece.part] for piece in chunk.pieces]
        copies = [weight[piece.inside] for piece in chunk.pieces]
        torch._foreach_copy_(copies, own)
        join(weight, states["remainders"], master)
        gradient *= step.coefficient
        pieces = [piece for piece in chunk.pieces if piece.index in step.has_gradient]
        flats = (master, gradient, *(states[name] for name in MOMENTS))
        lists = [[flat[piece.inside] for piece in pieces] for flat in flats]
        if pieces:
            counts = [self.num_updates[piece.index] for piece in pieces]
            step.rule(*lists, [], counts, found_inf=step.skipped)
        if self.ema:
            average = states[AVERAGE]
            average.sub_(step.ema_rate * (average - master))  # as EMAModel.step
        split(master, weight, states["remainders"])
        torch._foreach_copy_(own, copies)

    # ---- forward

    may_recompute = True  # a block that is called again in the backward pass has been updated

    def forward(self, index: int, call: Callable, *args, **kwargs):
        """Call a block once it is updated."""
        self.queue_updates(index + 1 + QUEUED_AHEAD)
        self.await_update(self.blocks[index])
        return call(*args, **kwargs)

    def await_update(self, block: BlockStates) -> None:
        if block.updated:
            wait(block.updated)
            block.updated = None
            block.gradients.clear()
            self.release_gradients(0)  # an update comes after them: nothing more to wait for

    # ---- reading and writing, by name or index

    def complete(self) -> None:
        """Apply what is due, and wait for it: afterwards weights and states may be read, written and moved."""
        self.queue_updates(len(self.blocks))
        for block in self.blocks:
            self.await_update(block)
        for stream in (self.inward, self.work, self.outward):
            stream.synchronize()

    def write_to_model(self) -> None:
        """Nothing to do: the weights are part of the masters."""

    def get_average(self, index: int) -> torch.Tensor:
        """fp32, a view."""
        return self.block_of[index].view(AVERAGE, index)

    def get_master(self, index: int) -> torch.Tensor:
        """fp32, made on access."""
        weight, remainder = self.params[index].data, self.block_of[index].view("remainders", index)
        master = torch.empty(weight.shape, device=weight.device)
        join(weight, remainder.to(weight.device), master)
        return master

    def set_master(self, index: int, master: torch.Tensor) -> None:
        weight, kept = self.params[index].data, self.block_of[index].view("remainders", index)
        master = master.to(weight.device, torch.float32).contiguous()
        remainder = torch.empty(weight.shape, dtype=torch.int16, device=weight.device)
        split(master, weight, remainder)
        kept.copy_(remainder)


@contextlib.contextmanager
def averaged(states: StateRing):
    """The moving average in the model, rounded. What it replaces is kept on the host, 2 bytes per weight."""
    states.complete()
    kept = [weight.data.to("cpu", copy=True) for weight in states.params]
    for index, weight in enumerate(states.params):
        weight.data.copy_(rounded(states.get_average(index).to(weight.device), weight.dtype))
    try:
        yield
    finally:
        for weight, values in zip(states.params, kept, strict=True):
            weight.data.copy_(values)


def norm_of(gradient: torch.Tensor) -> torch.Tensor:
    """The L2 norm [] in fp32."""
    return torch.linalg.vector_norm(gradient, dtype=torch.float32)
