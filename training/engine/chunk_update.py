"""The update of a chunk of split masters: join, clip, one step of Adam, moving average, split; all on the GPU."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from engine.block_states import AVERAGE, GRADIENTS, Chunk, moments, within
from engine.split import join, split


class Step(NamedTuple):
    """An update that is decided on, and perhaps not applied to all blocks yet."""

    rule: Callable  # (masters, gradients, states by name, counts, skipped): each a list of flat tensors, in place
    coefficient: torch.Tensor  # [], clips the gradients
    skipped: torch.Tensor  # [], fp32: 1 if the gradients are not finite
    counts: torch.Tensor  # [weights]: updates of each, this one included
    has_gradient: set[int]  # indices of weights; the others stay as they are
    ema_rate: float  # 1 - decay
    sent: object  # event: the gradients are on the host
    ready: object = None  # event: the backward pass is over


class ChunkUpdate:
    """Room for one chunk's fp32 masters and gradients, and for its bf16 weights side by side."""

    def __init__(self, params: list[nn.Parameter], size: int, device: torch.device):
        self.params = params
        self.master, self.gradient = torch.empty(size, device=device), torch.empty(size, device=device)
        self.weight = torch.empty(size, dtype=torch.bfloat16, device=device)

    def apply(
        self, chunk: Chunk, states: dict, gradients: dict, step: Step, weight: torch.Tensor | None = None
    ) -> None:
        """Update a chunk's `states`, which hold its gradients if they came from the host, else these are `gradients`.

        `weight`: the chunk's weights, if they lie side by side like its states.
        """
        self.take_gradients(chunk, states, gradients, step)
        own = []
        if weight is None:
            weight = self.weight[: chunk.size]
            own = [self.params[piece.index].data.view(-1)[piece.part] for piece in chunk.pieces]
            torch._foreach_copy_([weight[piece.inside] for piece in chunk.pieces], own)
        master, gradient = self.master[: chunk.size], self.gradient[: chunk.size]
        join(weight, states["remainders"], master)
        gradient *= step.coefficient
        if pieces := [piece for piece in chunk.pieces if piece.index in step.has_gradient]:
            lists = {name: [states[name][within(piece.inside, name)] for piece in pieces] for name in moments(states)}
            masters, gradients = ([flat[piece.inside] for piece in pieces] for flat in (master, gradient))
            step.rule(masters, gradients, lists, [step.counts[piece.index] for piece in pieces], step.skipped)
        if AVERAGE in states:
            average = states[AVERAGE]
            average.sub_(step.ema_rate * (average - master))  # as EMAModel.step
        split(master, weight, states["remainders"])
        if own:
            torch._foreach_copy_(own, [weight[piece.inside] for piece in chunk.pieces])

    def take_gradients(self, chunk: Chunk, states: dict, gradients: dict, step: Step) -> None:
        if GRADIENTS in states:
            self.gradient[: chunk.size].copy_(states[GRADIENTS])
            return
        for piece in chunk.pieces:
            if piece.index in step.has_gradient:
                self.gradient[piece.inside].copy_(gradients[piece.index].flatten()[piece.part])
