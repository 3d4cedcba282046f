"""Attention processor for joint attention over text and video tokens.

Tensors are [B, S, heads, head_dim] throughout; S is the text tokens followed by the video tokens.
"""

import functools
from collections.abc import Callable

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn


def project_each(states: Tensor, layers: list[nn.Module]) -> list[Tensor]:
    """One [B, S, D] per layer, one matmul each; the fused projections replace this."""
    return [layer(states) for layer in layers]


class JointAttention:
    """Computes the same as diffusers' CogVideoX processor, in a layout that compiles without copies.

    attend(query, key, value): the kernel; all [B, S, heads, head_dim].
    project(states, layers): one [B, S, D] per layer; called once with to_q, to_k and to_v, once with to_out.
    make_heads(attn, states, rotary, num_text): (query, key, value), replaces `heads_by_torch`.
    """

    def __init__(self, attend: Callable, project: Callable = project_each, make_heads: Callable | None = None):
        self.attend, self.project = attend, project
        self.make_heads = make_heads or functools.partial(heads_by_torch, project=project)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(video states, text states), each [B, tokens, D]."""
        if attention_mask is not None:
            raise ValueError("joint attention takes no mask")
        num_text = encoder_hidden_states.shape[1]
        states = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        query, key, value = self.make_heads(attn, states, image_rotary_emb, num_text)
        [states] = self.project(self.attend(query, key, value).flatten(2), [attn.to_out[0]])
        states = attn.to_out[1](states)
        return states[:, num_text:], states[:, :num_text]


def heads_by_torch(
    attn: Attention, states: Tensor, rotary: tuple[Tensor, Tensor] | None, num_text: int, project: Callable
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of `states` [B, S, D]: projection, q/k norm over each head, RoPE on the video tokens."""
    projected = project(states, [attn.to_q, attn.to_k, attn.to_v])
    query, key, value = [part.unflatten(-1, (attn.heads, -1)) for part in projected]
    query = query if attn.norm_q is None else attn.norm_q(query)
    key = key if attn.norm_k is None else attn.norm_k(key)
    if rotary is not None:
        cos, sin = extend_rotary_to_text(rotary, num_text)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    return query, key, value


def extend_rotary_to_text(rotary: tuple[Tensor, Tensor], num_text: int) -> tuple[Tensor, Tensor]:
    """(cos, sin) [S, head_dim] for the whole sequence: text tokens get the identity rotation.

    Rotating only the video tokens, in place, would split the compiled block's kernels and copy in the backward pass.
    """
    cos, sin = rotary
    shape = (num_text, cos.shape[-1])
    return torch.cat([cos.new_ones(shape), cos]), torch.cat([sin.new_zeros(shape), sin])


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved RoPE on [B, S, heads, head_dim], computed in fp32 or higher, as in diffusers' `apply_rotary_emb`."""
    exact = states.to(torch.promote_types(states.dtype, torch.float32))
    real, imaginary = exact.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    return (exact * cos[:, None] + turned * sin[:, None]).to(states.dtype)
