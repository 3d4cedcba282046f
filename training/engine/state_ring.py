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

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from engine.split import join, split
from memory.host import TransferStream, aligned, pinned_memory, wait, wrap_blocks


CHUNK = 2**23  # weights that are updated at a time
NUM_SLOTS = 7  # chunks on the GPU: 0.66 GiB. Fewer stall while saved activations leave through the same link
QUEUED_AHEAD = 2  # blocks whose update is queued before the forward pass comes to them
LEAVING = 2  # blocks whose gradients may still be on their way to the host
PINNING_THREADS = 4
STATES = {"remainders": torch.int16, "exp_avg": torch.float32, "exp_avg_sq": torch.float32}
MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names


class Piece(NamedTuple):
    """What a chunk holds of one weight."""

    index: int  # of the weight
    inside: slice  # of the chunk
    part: slice  # of the flattened weight


class Chunk(NamedTuple):
    """A stretch of a block's buffers."""

    inside: slice
    size: int
    pieces: list[Piece]


class Step(NamedTuple):
    """An update that is decided on, and perhaps not applied to all blocks yet."""

    rule: Callable  # torch's fused kernel with its settings
    coefficient: torch.Tensor  # [], clips the gradients
    skipped: torch.Tensor  # [], fp32: 1 if the gradients are not finite
    has_gradient: set[int]  # indices of weights; the others stay as they are
    ready: object  # event: the backward pass is over, and its gradients are where the update expects them


@dataclass(eq=False)
class Slot:
    """Room on the GPU for a chunk's states and gradients."""

    buffers: dict[str, torch.Tensor]
    free: object  # event: what was there has left


@dataclass(eq=False)
class Leaving:
    """A block's gradients on their way to the host."""

    block: "BlockStates"
    gradients: list[torch.Tensor]
    sent: object = None  # event


class BlockStates:
    """The states of a few weights, each kind in one flat buffer on the host or the GPU."""

    def __init__(self, weights: dict[int, nn.Parameter], on_host: bool, chunk: int):
        self.weights, self.on_host = weights, on_host  # by index among the model's weights
        # Weights start at multiples of 128, so that a vector of the kernel never holds two
        self.start_of, self.size = {}, 0
        for index, weight in weights.items():
            self.start_of[index] = self.size
            self.size += aligned(weight.numel() * 2) // 2
        self.chunks = list(self.cut(chunk))
        self.buffers: dict[str, torch.Tensor] = {}
        self.gradients: dict[int, torch.Tensor] = {}  # on the GPU, if the states are
        self.due: Step | None = None
        self.updated = None  # event: the weights' last update is done

    def cut(self, size: int) -> Iterator[Chunk]:
        for start in range(0, self.size, size):
            stop = min(start + size, self.size)
            pieces = []
            for index, at in self.start_of.items():
                low, high = max(start, at), min(stop, at + self.weights[index].numel())
                if low < high:
                    pieces.append(Piece(index, slice(low - start, high - start), slice(low - at, high - at)))
            yield Chunk(slice(start, stop), stop - start, pieces)

    def allocate(self, device: torch.device, gradients: torch.dtype) -> None:
        kinds = {**STATES, "gradients": gradients} if self.on_host else STATES
        sizes = [aligned(self.size * dtype.itemsize) for dtype in kinds.values()]
        if self.on_host:
            memory = pinned_memory(sum(sizes), device)
        else:
            memory = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
        for (name, dtype), flat in zip(kinds.items(), memory.split(sizes), strict=True):
            self.buffers[name] = flat.view(dtype)[: self.size]

    def view(self, name: str, index: int) -> torch.Tensor:
        """A weight's part of a buffer, in its shape."""
        weight, start = self.weights[index], self.start_of[index]
        return self.buffers[name][start : start + weight.numel()].view(weight.shape)


class StateRing:
    """Holds the states of all weights of `model`, takes their gradients, and applies updates block by block.

    `blocks` are called in order, compiled or not. Weights outside of them have their states on the GPU. `accumulates`:
    several backward passes may come before an update; their gradients are summed in fp32.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: nn.ModuleList,
        device: torch.device,
        on_host: bool,
        accumulates: bool = False,
        chunk: int = CHUNK,
    ):
        self.device, self.accumulates = device, accumulates
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
        gradients = torch.float32 if self.accumulates else torch.bfloat16
        with ThreadPoolExecutor(PINNING_THREADS) as pool:
            allocated = pool.map(lambda block: block.allocate(self.device, gradients), self.blocks)
            for block, _ in zip(self.blocks, allocated, strict=True):
                for index, weight in block.weights.items():
                    master = weight.data
                    weight.data = torch.empty(weight.shape, dtype=torch.bfloat16, device=self.device)
                    self.set_master(index, master)
                    weight.register_post_accumulate_grad_hook(functools.partial(self.take_gradient, block, index))

    def make_room(self, size: int, on_host: bool) -> None:
        empty = functools.partial(torch.empty, size, device=self.device)
        self.master, self.gradient, self.weight = empty(), empty(), empty(dtype=torch.bfloat16)
        gradients = torch.float32 if self.accumulates else torch.bfloat16
        kinds = {**STATES, "gradients": gradients}
        self.slots = [
            Slot({name: empty(dtype=dtype) for name, dtype in kinds.items()}, self.inward.mark())
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
        host, computed = block.view("gradients", index), self.outward.mark()
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
            wait(self.leaving.pop(0).sent)

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
        with self.outward.api.stream(self.inward.stream):
            wait(sent)
        step = Step(rule, coefficient, skipped.float(), set(self.norms), None)
        self.norms = {}
        *blocks, around = self.blocks
        self.update_resident(around, step)
        step = step._replace(ready=self.work.mark())
        for block in blocks:
            block.due = step
        self.queue_updates(QUEUED_AHEAD)
        return norm, skipped

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
            pieces = [piece for piece in chunk.pieces if piece.index in step.has_gradient]
            if pieces:
                gradients = [block.gradients[piece.index].flatten()[piece.part] for piece in pieces]
                torch._foreach_copy_([self.gradient[piece.inside] for piece in pieces], gradients)
                self.update_chunk(chunk, {name: flat[chunk.inside] for name, flat in block.buffers.items()}, step)

    def update_on_host(self, block: BlockStates, step: Step) -> None:
        for chunk in block.chunks:
            slot = self.slots[self.turn % len(self.slots)]
            self.turn += 1
            there = {name: flat[: chunk.size] for name, flat in slot.buffers.items()}
            here = {name: flat[chunk.inside] for name, flat in block.buffers.items()}
            arrived = self.inward.start([(there[name], here[name]) for name in here], after=[slot.free, step.ready])
            block.updated = self.work.run(functools.partial(self.update_arrived, chunk, there, step), after=[arrived])
            slot.free = self.outward.start([(here[name], there[name]) for name in STATES], after=[block.updated])

    def update_arrived(self, chunk: Chunk, there: dict[str, torch.Tensor], step: Step) -> None:
        self.gradient[: chunk.size].copy_(there["gradients"])
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
        split(master, weight, states["remainders"])
        torch._foreach_copy_(own, copies)

    # ---- forward

    may_recompute = True  # a block that is called again in the backward pass has been updated

    def forward(self, index: int, call: Callable, *args, **kwargs):
        """Call a block once it is updated."""
        self.release_gradients(0)
        self.queue_updates(index + 1 + QUEUED_AHEAD)
        self.await_update(self.blocks[index])
        return call(*args, **kwargs)

    def await_update(self, block: BlockStates) -> None:
        if block.updated:
            wait(block.updated)
            block.updated = None
            block.gradients.clear()

    # ---- reading and writing, by name or index

    def complete(self) -> None:
        """Apply what is due, and wait for it: afterwards weights and states may be read, written and moved."""
        self.queue_updates(len(self.blocks))
        for block in self.blocks:
            self.await_update(block)
        self.outward.api.synchronize()

    def get_master(self, index: int) -> torch.Tensor:
        """fp32, made on access."""
        weight, remainder = self.params[index].data, self.block_of[index].view("remainders", index)
        master = torch.empty(weight.shape, device=weight.device)
        join(weight, remainder.to(weight.device), master)
        return master

    def set_weight(self, name: str, master: torch.Tensor) -> None:
        self.set_master(self.names[name], master)

    def set_master(self, index: int, master: torch.Tensor) -> None:
        weight, kept = self.params[index].data, self.block_of[index].view("remainders", index)
        master = master.to(weight.device, torch.float32).contiguous()
        remainder = torch.empty(weight.shape, dtype=torch.int16, device=weight.device)
        split(master, weight, remainder)
        kept.copy_(remainder)


class MastersByName(Mapping):
    """The fp32 masters by name, each made when it is asked for."""

    def __init__(self, states: StateRing):
        self.states = states

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.states.get_master(self.states.names[name])

    def __iter__(self):
        return iter(self.states.names)

    def __len__(self) -> int:
        return len(self.states.names)


class RingAdam(torch.optim.Optimizer):
    """torch's fused `kind` (Adam or AdamW), bit for bit, on the states of a StateRing; state dicts are in its format."""

    RULES = {torch.optim.Adam: torch._fused_adam_, torch.optim.AdamW: torch._fused_adamw_}

    def __init__(self, states: StateRing, kind: type, settings: dict):
        self.states, self.kernel = states, self.RULES[kind]
        super().__init__(states.params, kind(states.params, **settings, fused=True).defaults)
        self.stepped: set[int] = set()  # indices of weights that have moments

    @torch.no_grad()
    def step(self, max_norm: float = math.inf) -> tuple[torch.Tensor, torch.Tensor]:
        """(gradient norm before clipping, whether the update was skipped because of it), both [] on the device."""
        self.stepped |= set(self.states.norms)
        group = self.param_groups[0]
        beta1, beta2 = group["betas"]
        settings = {name: group[name] for name in ("lr", "weight_decay", "eps", "amsgrad", "maximize")}
        rule = functools.partial(self.kernel, **settings, beta1=beta1, beta2=beta2)
        return self.states.start_step(rule, max_norm)

    def state_dict(self) -> dict:
        """Views, without a copy; call `states.complete()` first."""
        state = {}
        for index in sorted(self.stepped):
            block = self.states.block_of[index]
            state[index] = {"step": self.states.num_updates[index]} | {
                name: block.view(name, index) for name in MOMENTS
            }
        return super().state_dict() | {"state": state}

    def load_state_dict(self, state_dict: dict) -> None:
        entries = ((f"{index}.{name}", value) for index, e in state_dict["state"].items() for name, value in e.items())
        self.load_tensors(entries, state_dict)

    @torch.no_grad()
    def load_tensors(self, tensors: Iterable[tuple[str, torch.Tensor]], rest: dict) -> None:
        """Load a state dict's tensors, named `<index>.<name>`, one by one; `rest` has the param_groups.

        Overwrites everything: what an earlier attempt loaded, too.
        """
        self.stepped = set()
        for name, tensor in tensors:
            index, kind = name.split(".")
            self.place(int(index), kind).copy_(tensor)
            self.stepped.add(int(index))
        for index in set(self.states.block_of) - self.stepped:
            for kind in ("step", *MOMENTS):
                self.place(index, kind).zero_()
        super().load_state_dict({"state": {}, "param_groups": rest["param_groups"]})

    def place(self, index: int, kind: str) -> torch.Tensor:
        """The state `kind`, by torch's name, of a weight."""
        return self.states.num_updates[index] if kind == "step" else self.states.block_of[index].view(kind, index)


def divide(weights: list[nn.Parameter], blocks: nn.ModuleList, on_host: bool, chunk: int) -> list[BlockStates]:
    """The weights of each block, then those around the blocks."""
    rest = {id(weight): index for index, weight in enumerate(weights)}
    divided = []
    for block in blocks:
        indices = [rest.pop(id(weight)) for weight in block.parameters()]
        divided.append(BlockStates({index: weights[index] for index in indices}, on_host, chunk))
    return [*divided, BlockStates({index: weights[index] for index in rest.values()}, False, chunk)]


def norm_of(gradient: torch.Tensor) -> torch.Tensor:
    """The L2 norm [] in fp32."""
    return torch.linalg.vector_norm(gradient, dtype=torch.float32)
