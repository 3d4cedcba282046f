"""What a block keeps for the backward pass: everything, or its inputs and the outputs of a few costly operations.

Checkpointing lies inside of the block, so that torch.compile sees both as one graph, drops what no gradient needs (of a
frozen block the last product of the feed-forward) and fuses the rest.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts


STATES = ("hidden_states", "encoder_hidden_states")  # what a block takes first, and gives
MOST_GRAPHS = 64  # of a block, one a bucket; torch gives up compiling after 8


def checkpoint_blocks(blocks: Iterable[nn.Module], saved_ops: list) -> None:
    """Compute the blocks again in the backward pass, except for what `saved_ops` gave, which is kept.

    Sublinear memory (arXiv 1604.06174), selective as in arXiv 2205.05198. By class, not by instance: blocks of one class
    share one compiled graph.
    """
    names = sorted(map(str, saved_ops))
    context_fn = functools.partial(selective_contexts, *names)
    context_fn.cache_hash = "keeps " + ", ".join(names)  # AOTAutograd's cache on disk takes no policy without one
    classes = {}
    for block in blocks:
        cls = type(block)
        if cls not in classes:
            classes[cls] = checkpointed_class(cls, context_fn)
        block.__class__ = classes[cls]


def selective_contexts(*names: str):
    """What `checkpoint` wants of a selective policy: keep the outputs of the operators `names` ("aten.mm.default").

    By name, since an operator cannot be pickled, and a policy that cannot is compiled anew at every start (13 s).
    """
    operators = [functools.reduce(getattr, name.split("."), torch.ops) for name in names]
    return create_selective_checkpoint_contexts(operators)


def checkpointed_class(cls: type, context_fn) -> type:
    """`cls` with a forward pass that is checkpointed wherever gradients are recorded."""

    plain_forward = cls.forward  # taken here: torch.compile cannot trace through the class

    def forward(self, *inputs, **named):
        if not torch.is_grad_enabled():
            return plain_forward(self, *inputs, **named)
        names = tuple(named)

        def run(*values):
            return plain_forward(self, *values[: len(inputs)], **dict(zip(names, values[len(inputs) :], strict=True)))

        # Nothing in a block is random: no state to keep. By position, since hooks on saved tensors see only those
        options = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": context_fn}
        return checkpoint(run, *inputs, *named.values(), **options)

    return type(f"Checkpointed{cls.__name__}", (cls,), {"forward": forward})


def compile_blocks(blocks: Sequence[nn.Module], backend: str = "inductor") -> None:
    """torch.compile the blocks' forward pass, keys unchanged. One graph serves all, and a further one each bucket.

    Hooks on a block stay outside of the graph.
    """
    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    # Else a graph that holds an autograd function of ours is compiled anew at every start; its code is in the key
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
    tag = code_tag()
    if not torch.compiler.config.cache_key_tag.endswith(tag):  # the user's own stays
        torch.compiler.config.cache_key_tag += tag
    classes = {}
    for block in blocks:
        cls = type(block)
        if cls not in classes:
            forward = torch.compile(cls.forward, backend=backend, dynamic=False, fullgraph=True)
            classes[cls] = type(f"Compiled{cls.__name__}", (cls,), {"forward": forward})
        block.__class__ = classes[cls]
    blocks[0].register_forward_pre_hook(like_other_blocks, with_kwargs=True)


@functools.cache
def code_tag() -> str:
    """What the compile cache does not see of a graph: the code behind custom operators, their backward passes too."""
    rooms = Path(__file__).resolve().parents[1]
    sources = [path.read_bytes() for path in sorted(rooms.rglob("*.py"))]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        sources.append(importlib.metadata.version("flash-attn-4").encode())
    return hashlib.sha256(b"".join(sources)).hexdigest()


def like_other_blocks(block: nn.Module, inputs: tuple, named: dict) -> tuple[tuple, dict]:
    """The first block's inputs as all others get theirs: with a gradient, and with plain strides.

    It would else be compiled apart, which takes 10 s, against 1 ms a step for a gradient that nobody needs.
    """
    inputs = [as_others(value) if place < len(STATES) else value for place, value in enumerate(inputs)]
    return tuple(inputs), {name: as_others(value) if name in STATES else value for name, value in named.items()}


def as_others(states: torch.Tensor) -> torch.Tensor:
    return NeedsGradient.apply(states, states.new_empty(0, requires_grad=True))


class NeedsGradient(torch.autograd.Function):
    """A copy that needs a gradient, which is dropped as soon as it is there; a leaf would keep both to the step's end."""

    @staticmethod
    def forward(ctx, states, anchor):
        return states.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx, grad):
        return (grad if ctx.needs_input_grad[0] else None), None
