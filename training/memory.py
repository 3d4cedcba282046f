"""What a block keeps for the backward pass: everything, or its inputs and the outputs of a few costly operations.

Checkpointing lies inside of the block, so that torch.compile sees both as one graph, drops what no gradient needs (of a
frozen block the last product of the feed-forward) and fuses the rest.
"""

import functools
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts


MOST_GRAPHS = 64  # of a block, one a bucket; torch gives up compiling after 8


def checkpoint_blocks(blocks: Iterable[nn.Module], saved_ops: list) -> None:
    """Compute the blocks again in the backward pass, except for what `saved_ops` gave, which is kept.

    Sublinear memory (arXiv 1604.06174), selective as in arXiv 2205.05198. By class, not by instance: blocks of one class
    share one compiled graph.
    """
    context_fn = functools.partial(create_selective_checkpoint_contexts, list(saved_ops))
    context_fn.cache_hash = "keeps " + ", ".join(sorted(map(str, saved_ops)))  # for the compiler's cache on disk
    classes = {}
    for block in blocks:
        cls = type(block)
        if cls not in classes:
            classes[cls] = checkpointed_class(cls, context_fn)
        block.__class__ = classes[cls]


def checkpointed_class(cls: type, context_fn) -> type:
    """`cls` with a forward pass that is checkpointed wherever gradients are recorded."""

    plain_forward = cls.forward  # taken here: torch.compile cannot trace through the class

    def forward(self, *inputs, **named):
        if not torch.is_grad_enabled():
            return plain_forward(self, *inputs, **named)
        # Nothing in a block is random: no state to keep
        options = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": context_fn}
        return checkpoint(functools.partial(plain_forward, self), *inputs, **named, **options)

    return type(f"Checkpointed{cls.__name__}", (cls,), {"forward": forward})


def compile_blocks(blocks: Sequence[nn.Module], backend: str = "inductor") -> None:
    """torch.compile the blocks' forward pass, keys unchanged. One graph serves all, and a further one each bucket.

    Hooks on a block stay outside of the graph.
    """
    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    classes = {}
    for block in blocks:
        cls = type(block)
        if cls not in classes:
            forward = torch.compile(cls.forward, backend=backend, dynamic=False, fullgraph=True)
            classes[cls] = type(f"Compiled{cls.__name__}", (cls,), {"forward": forward})
        block.__class__ = classes[cls]
    blocks[0].register_forward_pre_hook(like_other_blocks, with_kwargs=True)


def like_other_blocks(block: nn.Module, inputs: tuple, named: dict) -> tuple[tuple, dict]:
    """The first block's inputs as all others get theirs: with a gradient, and with plain strides.

    It would else be compiled apart, which takes 10 s, against 1 ms a step for a gradient that nobody needs.
    """
    needs = torch.is_grad_enabled()
    named = dict(named)
    for name in ("hidden_states", "encoder_hidden_states"):
        states = named[name].clone(memory_format=torch.contiguous_format)
        named[name] = states.requires_grad_() if needs and not states.requires_grad else states
    return inputs, named
