"""Attention kernels for the processor: torch's, FlashAttention-4, and SageAttention for sampling.

Tensors are [B, S, heads, head_dim] throughout. No kernel takes a mask: all prompts are padded to one length, and cuDNN
returns NaN gradients with a mask (https://github.com/pytorch/pytorch/issues/196678).
"""

import contextlib
import os
from collections.abc import Callable

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from attention.processor import JointAttention, project_each
from base.errors import UsageError, first_line


aten = torch.ops.aten


def make_attend(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The kernel `name` for JointAttention: cudnn, flash, fa4, math, or sdpa, which leaves the choice to torch.

    torch's kernels are called as operators, not selected with `sdpa_kernel`: AOTAutograd does not cache graphs that
    contain it, so they would be recompiled at every start.
    """
    if name == "fa4":
        import_fa4()  # fail now, not at the first step
        return lambda query, key, value: fa4_forward(query, key, value)[0]
    return heads_first(
        {
            "cudnn": lambda *heads: aten._scaled_dot_product_cudnn_attention(*heads, None, True)[0],
            "flash": lambda *heads: aten._scaled_dot_product_flash_attention(*heads)[0],
            "math": lambda *heads: aten._scaled_dot_product_attention_math(*heads)[0],
            "sdpa": F.scaled_dot_product_attention,
        }[name]
    )


def heads_first(attention: Callable) -> Callable:
    """Adapt a kernel for [B, heads, S, head_dim] to [B, S, heads, head_dim] by views; it must take strided inputs."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)).transpose(1, 2)

    return attend


# ---------------------------------------------------------------- FlashAttention-4


# Wrapped as operators with a registered backward, so that torch.compile and selective checkpointing see them. The
# package's own function is opaque to both, and torch's hook for installing it expects another version of the package.


def import_fa4():
    """FlashAttention-4's module; call signatures as of 4.0.0b36."""
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")  # its kernels take seconds to compile
    try:
        from flash_attn.cute import interface
    except ImportError as error:
        raise UsageError(
            f"--attention fa4 needs FlashAttention-4: pip install flash-attn-4==4.0.0b36 ({first_line(error)})"
        ) from error
    return interface


@torch.library.custom_op("cogvideox::fa4_forward", mutates_args=())
def fa4_forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """(output [B, S, heads, head_dim], log-sum-exp [B, heads, S] in fp32)."""
    out, lse = import_fa4()._flash_attn_fwd(query, key, value, return_lse=True)[:2]
    return out, lse


@fa4_forward.register_fake
def fake_fa4_forward(query, key, value):
    batch, tokens, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((batch, heads, tokens), dtype=torch.float32)


@torch.library.custom_op("cogvideox::fa4_backward", mutates_args=())
def fa4_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; deterministic (and slower) if torch.use_deterministic_algorithms is on."""
    exact = torch.are_deterministic_algorithms_enabled()
    grads = import_fa4()._flash_attn_bwd(query, key, value, out, grad, lse, deterministic=exact)
    query_grad, key_grad, value_grad = [part.contiguous() for part in grads]  # strides must match the fake kernel's
    return query_grad, key_grad, value_grad


@fa4_backward.register_fake
def fake_fa4_backward(grad, query, key, value, out, lse):
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def keep_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)


def differentiate_fa4(ctx, grad, lse_grad):
    return fa4_backward(grad, *ctx.saved_tensors)


fa4_forward.register_autograd(differentiate_fa4, setup_context=keep_for_backward)


# ---------------------------------------------------------------- checkpointing

# Operators whose outputs checkpointing saves; the rest of a block is recomputed. math is absent: it decomposes into
# plain matmuls, and saving those would save S x S values per head.
SAVED_OPS = frozenset(
    {
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        fa4_forward._opoverload,
    }
)


# ---------------------------------------------------------------- SageAttention (arXiv 2410.02367), for sampling alone


def check_sage(dtype: torch.dtype, device: torch.device) -> None:
    """Raise UsageError if SageAttention cannot run: at the start, not at the first validation."""
    import_sage()
    if device.type != "cuda" or dtype == torch.float32:
        raise UsageError("--validation_attention sage: computes on CUDA in bf16 or fp16 only; leave it out here")


def import_sage():
    try:
        from sageattention import sageattn
    except ImportError as error:
        raise UsageError("--validation_attention sage needs SageAttention: pip install sageattention") from error
    return sageattn


# An operator without a backward: compiled blocks call it as is, and training through it raises an error.
@torch.library.custom_op("cogvideox::sage", mutates_args=())
def sage_attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    attend = heads_first(lambda *heads: import_sage()(*heads, tensor_layout="HND", is_causal=False))
    return attend(query, key, value).contiguous()


@sage_attend.register_fake
def fake_sage_attend(query, key, value):
    return query.new_empty(query.shape)


@contextlib.contextmanager
def sage_attention(transformer: nn.Module):
    """Run every attention of `transformer` with SageAttention; its own processors are restored on exit."""
    import_sage()
    own = {module: module.processor for module in transformer.modules() if isinstance(module, Attention)}
    try:
        for module, before in own.items():
            module.processor = JointAttention(sage_attend, getattr(before, "project", project_each))
        yield
    finally:
        for module, before in own.items():
            module.processor = before
