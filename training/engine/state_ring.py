"""AdamW for bf16 weights with exact fp32 masters, whose states lie on the GPU or in host memory, block by block.

A master is a bf16 weight and its 16-bit remainder (engine/split.py). A block's update runs right before its next forward
pass, beside that of the blocks before it. With states on the host, gradients leave during the backward pass; then, chunk
by chunk, remainders, moments and gradients are copied to slots on the GPU, torch's fused kernel steps there, and states
are copied back. Weights may be on the host, too, and are then updated where the forward pass is about to read them.
Where things lie changes no bit, and the host never waits for the GPU, but for a moving average or 8-bit states once per
update: these must know whether it is skipped.

    states = StateRing(model, model.transformer_blocks, device)  # weights in bf16 from here on
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

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from engine.block_states import (
    AVERAGE,
    GRADIENTS,
    ON_HOST,
    STATES,
    STATES_8BIT,
    BlockStates,
    Chunk,
    Storage,
    allocate,
    divide,
    within,
)
from engine.chunk_update import ChunkUpdate, Step
from engine.split import join, rounded, split
from memory.host import TransferStream, wait, wrap_blocks
from memory.streaming import WeightRing, stream_weights


CHUNK = 2**23  # weights that are updated at a time
NUM_SLOTS = 7  # chunks on the GPU: 0.66 GiB. Fewer stall while saved activations leave through the same link
QUEUED_AHEAD = 2  # blocks whose update is queued before the forward pass comes to them; streamed weights have 3 slots
LEAVING = 2  # blocks whose gradients may still be on their way to the host
PINNING_THREADS = 4


@dataclass(eq=False)
class Slot:
    """Room on the GPU for a chunk's states and gradients."""

    buffers: dict[str, torch.Tensor]
    free: object  # event: what was there has left

    def parts(self, chunk: Chunk) -> dict[str, torch.Tensor]:
        return {name: flat[within(slice(0, chunk.size), name)] for name, flat in self.buffers.items()}


@dataclass(eq=False)
class Leaving:
    """A block's gradients on their way to the host."""

    block: BlockStates
    gradients: list[torch.Tensor]
    sent: object = None  # event


class StateRing:
    """Holds the states of all weights of `model`, takes their gradients, and applies updates block by block.

    `blocks` are called in order, compiled or not. Weights around them, and their states, are on the GPU. `accumulates`:
    several backward passes may come before an update; their gradients are summed in fp32. `ema`: the decay of a moving
    average of the masters, kept with the other states; it holds no weights itself.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: nn.ModuleList,
        device: torch.device,
        storage: Storage = ON_HOST,
        accumulates: bool = False,
        ema: EMAModel | None = None,
        chunk: int = CHUNK,
    ):
        self.device, self.storage, self.accumulates, self.ema = device, storage, accumulates, ema
        self.states = (STATES_8BIT if storage.low_bit else STATES) | ({AVERAGE: torch.float32} if ema else {})
        gradients = {GRADIENTS: torch.float32 if accumulates else torch.bfloat16}
        self.names = {name: index for index, (name, _) in enumerate(model.named_parameters())}
        self.params = list(model.parameters())
        # In the order of the forward pass, and the weights around them
        self.blocks, self.around = divide(self.params, blocks, self.states, gradients, storage.share, chunk)
        self.all = [*self.blocks, *self.around]
        self.block_of = {index: block for block in self.all for index in block.weights}
        # Of each weight, as torch's AdamW counts; bitsandbytes wants to know them on the host
        self.num_updates = torch.zeros(len(self.params), device="cpu" if storage.low_bit else device)
        self.norms: dict[int, torch.Tensor] = {}  # of the gradients that have come for the next update
        self.inward, self.inward_gradients = TransferStream(device), TransferStream(device)
        # Updates are many short kernels: with priority, none queues behind what an attention kernel has yet to start
        self.work, self.outward = TransferStream(device, priority=-1), TransferStream(device)
        self.leaving: list[Leaving] = []
        self.take_weights()
        self.room = min(chunk, max(block.size for block in self.all)), self.states | gradients
        self.make_room(*self.room)
        self.weights = self.stream_weights(blocks) if storage.streams else None
        wrap_blocks(blocks, self)

    # ---- set-up

    def take_weights(self) -> None:
        """Turn the model's weights, in any dtype and anywhere, into bf16 at their place and remainders; take gradients.

        Pinning is what takes time. A block's weights are freed once its states are there.
        """
        self.weights = None
        with ThreadPoolExecutor(PINNING_THREADS) as pool:
            streams = [self.storage.streams] * len(self.blocks) + [False] * len(self.around)
            allocated = pool.map(lambda block, streams: block.allocate(self.device, streams), self.all, streams)
            for block, _ in zip(self.all, allocated, strict=True):
                block.kept = self.outward.mark()
                for index, weight in block.weights.items():
                    master, weight.data = weight.data, block.new_weight(index, self.device)
                    self.set_master(index, master)
                    if self.ema:
                        block.view(AVERAGE, index).copy_(master)
                    weight.register_post_accumulate_grad_hook(functools.partial(self.take_gradient, block, index))

    def make_room(self, size: int, kinds: dict[str, torch.dtype]) -> None:
        self.arithmetic = ChunkUpdate(self.params, size, self.device)
        num_slots = NUM_SLOTS if any(block.on_host for block in self.blocks) else 0
        self.slots = [Slot(allocate(kinds, size, self.device), self.inward.mark()) for _ in range(num_slots)]
        self.turn = 0

    def stream_weights(self, blocks: nn.ModuleList) -> WeightRing:
        streamed = {id(weight) for block in self.blocks for weight in block.weights.values()}
        return stream_weights(blocks, self.device, streams=lambda tensor: id(tensor) in streamed)

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
        return [gradient for block in self.all for gradient in block.gradients.values()]

    def measure_norms(self) -> None:
        for block in self.all:
            self.norms |= {index: norm_of(gradient) for index, gradient in block.gradients.items()}

    def release_gradients(self, keep: int) -> None:
        """Free the gradients of all but the last `keep` blocks: their copies are done, so that nothing has to wait."""
        while len(self.leaving) > keep:
            wait(self.leaving[0].sent)
            self.leaving.pop(0)

    # ---- update

    def start_step(self, rule: Callable, max_norm: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Decide on an update, as `clip_grad_norm_` and a loss scaler do; returns (norm before clipping, skipped).

        `queue_update` updates a block when the next forward pass comes to it; the weights around them are updated now.
        """
        sent = self.outward.run(lambda: None, after=[])
        if self.accumulates:
            wait(sent)  # norms come from there, too
        norm = torch.linalg.vector_norm(torch.stack([norm for _, norm in sorted(self.norms.items())]))
        skipped, has_gradient = ~norm.isfinite(), set(self.norms)
        self.norms = {}
        if (self.ema or self.storage.low_bit) and skipped:  # what counts on the host waits here
            self.drop_gradients()
            return norm, skipped
        stepped = (1 - skipped.float()).to(self.num_updates.device)
        if len(has_gradient) == len(self.params):
            self.num_updates += stepped
        else:  # some take no part in the loss
            self.num_updates[sorted(has_gradient)] += stepped
        step = Step(
            rule,
            coefficient=torch.clamp(max_norm / (norm + 1e-6), max=1.0),
            skipped=skipped.float(),
            counts=self.num_updates,
            has_gradient=has_gradient,
            ema_rate=self.next_ema_rate(),
            sent=sent,
        )
        for around in self.around:
            for chunk in around.chunks:
                self.arithmetic.apply(chunk, around.parts(chunk), around.gradients, step)
            around.gradients.clear()
        # Kept until the next one: the work stream still reads its tensors when the last block's update is queued
        self.step = step = step._replace(ready=self.work.mark())
        for block in self.blocks:
            block.due = step
        self.queue_updates(QUEUED_AHEAD)
        return norm, skipped

    def next_ema_rate(self) -> float:
        if self.ema is None:
            return 0.0
        self.ema.optimization_step += 1
        return 1 - self.ema.get_decay(self.ema.optimization_step)

    def drop_gradients(self) -> None:
        self.release_gradients(0)
        for block in self.all:
            block.gradients.clear()

    def queue_updates(self, stop: int) -> None:
        """Queue the updates that are due of the first `stop` blocks, beside what the compute stream does meanwhile."""
        for index, block in enumerate(self.blocks[:stop]):
            step, block.due = block.due, None
            if step:
                self.queue_update(index, block, step)

    def queue_update(self, index: int, block: BlockStates, step: Step) -> None:
        weights, ready = self.weights.lend(index) if self.weights else (None, step.ready)
        kept = block.kept  # of the update before: chunks do not wait for one another
        for chunk in block.chunks:
            weight = None if weights is None else weights.view(torch.bfloat16)[chunk.inside]
            here, slot, after = block.parts(chunk), None, [step.ready, ready]
            there = here
            if block.on_host:
                slot = self.slots[self.turn % len(self.slots)]
                self.turn += 1
                there = slot.parts(chunk)
                after += self.fetch(here, there, after=[slot.free, kept], sent=step.sent)
            update = functools.partial(self.arithmetic.apply, chunk, there, block.gradients, step, weight)
            block.updated = self.work.run(update, after)
            changed = [(here[name], there[name]) for name in self.states] if slot else []
            changed += [] if weight is None else [(block.streamed[chunk.inside], weight)]
            if changed:
                block.kept = self.outward.start(changed, after=[block.updated])
            if slot:
                slot.free = block.kept
        if self.weights:
            self.weights.give_back(index, block.kept)

    def fetch(self, here: dict, there: dict, after: list, sent) -> list:
        """Start copying a chunk to a slot; returns events. States may come while the backward pass is not over."""
        states = self.inward.start([(there[name], here[name]) for name in self.states], after)
        gradients = self.inward_gradients.start([(there[GRADIENTS], here[GRADIENTS])], [*after, sent])
        return [states, gradients]

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
        for stream in (self.inward, self.inward_gradients, self.work, self.outward):
            stream.synchronize()

    @contextlib.contextmanager
    def at_rest(self):
        """What is due is applied, and what updates need on the GPU is free for others."""
        self.complete()
        self.slots, self.arithmetic = [], None
        try:
            yield
        finally:
            self.make_room(*self.room)

    def write_to_model(self) -> None:
        """Nothing to do: the weights are part of the masters."""

    def get_average(self, index: int) -> torch.Tensor:
        """fp32, a view."""
        return self.block_of[index].view(AVERAGE, index)

    def get_master(self, index: int) -> torch.Tensor:
        """fp32, made on access."""
        weight = self.params[index].data.to(self.device)
        master = torch.empty(weight.shape, device=self.device)
        join(weight, self.block_of[index].view("remainders", index).to(self.device), master)
        return master

    def set_master(self, index: int, master: torch.Tensor) -> None:
        master = master.to(self.device, torch.float32).contiguous()
        weight = torch.empty(master.shape, dtype=torch.bfloat16, device=self.device)
        remainder = torch.empty(master.shape, dtype=torch.int16, device=self.device)
        split(master, weight, remainder)
        self.set_weight(index, weight)
        self.block_of[index].view("remainders", index).copy_(remainder)

    def set_weight(self, index: int, weight: torch.Tensor) -> None:
        self.params[index].data.copy_(weight)
        if self.weights:
            self.weights.forget()


@contextlib.contextmanager
def averaged(states: StateRing):
    """The moving average in the model, rounded. What it replaces is kept on the host, 2 bytes per weight."""
    states.complete()
    kept = [weight.data.to("cpu", copy=True) for weight in states.params]
    for index in range(len(kept)):
        states.set_weight(index, rounded(states.get_average(index).to(states.device), torch.bfloat16))
    try:
        yield
    finally:
        for index, values in enumerate(kept):
            states.set_weight(index, values)


def norm_of(gradient: torch.Tensor) -> torch.Tensor:
    """The L2 norm [] in fp32."""
    return torch.linalg.vector_norm(gradient, dtype=torch.float32)
