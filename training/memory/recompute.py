"""Selective activation checkpointing and torch.compile, per transformer block.

Checkpointing happens inside the block, so torch.compile sees forward and recompute as one graph, drops what no
gradient needs (in a frozen block, the last feed-forward matmul) and fuses the rest.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from base.toolchain import missing_for_triton


logger = logging.getLogger(__name__)

STATES = ("hidden_states", "encoder_hidden_states")  # a block's first two inputs, and its outputs
TRITON_CAPABILITY = (8, 0)  # Ampere: what Triton supports
MAX_GRAPHS_PER_BLOCK = 64  # compiled graphs per block, one per bucket; torch's default stops compiling after 8


def checkpoint_blocks(blocks: Iterable[nn.Module], saved_ops: list) -> None:
    """Recompute the blocks in the backward pass; only their inputs and the outputs of `saved_ops` are kept.

    Checkpointing as in arXiv 1604.06174, selective as in arXiv 2205.05198. Applied to the class, not the instance, so
    that all blocks of a class share one compiled graph.
    """
    names = sorted(map(str, saved_ops))
    context_fn = functools.partial(selective_contexts, *names)
    context_fn.cache_hash = "keeps " + ", ".join(names)  # without it, AOTAutograd's disk cache is bypassed
    classes = {}
    for block in blocks:
        cls = type(block)
        if cls not in classes:
            classes[cls] = checkpointed_class(cls, context_fn)
        block.__class__ = classes[cls]


def selective_contexts(*names: str):
    """`context_fn` for torch's `checkpoint` that keeps the outputs of the operators `names` ("aten.mm.default").

    Names, because operators cannot be pickled, and a policy that cannot be pickled is recompiled at every start (13
    s).
    """
    operators = [functools.reduce(getattr, name.split("."), torch.ops) for name in names]
    return create_selective_checkpoint_contexts(operators)


def checkpointed_class(cls: type, context_fn) -> type:
    """`cls` with its forward pass checkpointed whenever grad is enabled."""

    plain_forward = cls.forward  # bound here: torch.compile cannot trace the lookup on the class

    def forward(self, *inputs, **named):
        if not torch.is_grad_enabled():
            return plain_forward(self, *inputs, **named)
        names = tuple(named)

        def run(*values):
            return plain_forward(self, *values[: len(inputs)], **dict(zip(names, values[len(inputs) :], strict=True)))

        # Blocks draw no random numbers, so there is no RNG state to preserve. Inputs are passed by position because
        # saved-tensor hooks do not see keyword arguments
        options = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": context_fn}
        return checkpoint(run, *inputs, *named.values(), **options)

    return type(f"Checkpointed{cls.__name__}", (cls,), {"forward": forward})


def compile_blocks(blocks: Sequence[nn.Module], backend: str = "inductor") -> None:
    """torch.compile the blocks' forward pass, without changing state dict keys. All blocks share one graph per bucket.

    Hooks on a block stay outside the graph.
    """
    torch._dynamo.config.recompile_limit = MAX_GRAPHS_PER_BLOCK
    # Without this, graphs that contain our autograd functions are recompiled at every start. The cache key does not
    # cover their code: `code_hash` adds it
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
    tag = code_hash()
    if not torch.compiler.config.cache_key_tag.endswith(tag):  # a tag set by the user is kept
        torch.compiler.config.cache_key_tag += tag
    classes = {}
    for block in blocks:
        cls = type(block)
        if cls not in classes:
            forward = torch.compile(cls.forward, backend=backend, dynamic=False, fullgraph=True)
            classes[cls] = type(f"Compiled{cls.__name__}", (cls,), {"forward": forward})
        block.__class__ = classes[cls]
    blocks[0].register_forward_pre_hook(match_other_blocks, with_kwargs=True)


@functools.cache
def code_hash() -> str:
    """Hash of the code that the compile cache does not see: custom operators and their backward passes."""
    rooms = Path(__file__).resolve().parents[1]
    sources = [path.read_bytes() for path in sorted(rooms.rglob("*.py"))]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        sources.append(importlib.metadata.version("flash-attn-4").encode())
    return hashlib.sha256(b"".join(sources)).hexdigest()


def match_other_blocks(block: nn.Module, inputs: tuple, named: dict) -> tuple[tuple, dict]:
    """Make the first block's inputs look like every other block's: requiring grad, and contiguous.

    Without this, block 0 gets a graph of its own (10 s to compile); the unused gradient costs 1 ms per step.
    """
    inputs = [copy_with_grad(value) if index < len(STATES) else value for index, value in enumerate(inputs)]
    return tuple(inputs), {name: copy_with_grad(value) if name in STATES else value for name, value in named.items()}


def copy_with_grad(states: torch.Tensor) -> torch.Tensor:
    return NeedsGradient.apply(states, states.new_empty(0, requires_grad=True))


class NeedsGradient(torch.autograd.Function):
    """A copy that requires grad and drops the gradient at once; a leaf would keep both until the end of the step."""

    @staticmethod
    def forward(ctx, states, anchor):
        return states.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx, grad):
        return (grad if ctx.needs_input_grad[0] else None), None


@functools.cache  # it warns once
def uses_triton(device: torch.device) -> bool:
    """True if Triton kernels can be compiled and run."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < TRITON_CAPABILITY:
        return False
    lack = missing_for_triton()
    if lack:
        logger.warning("steps are slower than they could be, without compiled kernels: %s", lack)
    return lack is None
