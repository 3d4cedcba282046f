"""Joint attention over text and video tokens: one processor for every block.

Tensors are [B, S, heads, head_dim] throughout, S the text tokens followed by the video's.
"""

from collections.abc import Callable

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn


def project_each(states: Tensor, layers: list[nn.Module]) -> list[Tensor]:
    """[B, S, D] of each layer; what fuses them takes the place of this."""
    return [layer(states) for layer in layers]


class JointAttention:
    """What diffusers' own processor of these transformers computes, in a layout that compiles without copies.

    attend(query, key, value): [B, S, heads, head_dim] from three of them.
    project(states, layers): one [B, S, D] for each layer; called with those of q, k and v together, then with the last.
    """

    def __init__(self, attend: Callable, project: Callable = project_each):
        self.attend, self.project = attend, project

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
        query, key, value = make_heads(attn, states, image_rotary_emb, num_text, self.project)
        [states] = self.project(self.attend(query, key, value).flatten(2), [attn.to_out[0]])
        states = attn.to_out[1](states)
        return states[:, num_text:], states[:, :num_text]


def make_heads(
    attn: Attention, states: Tensor, rotary: tuple[Tensor, Tensor] | None, num_text: int, project: Callable
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of `states` [B, S, D]: projection, norm of query and key over each head, RoPE of the video."""
    projected = project(states, [attn.to_q, attn.to_k, attn.to_v])
    query, key, value = [part.unflatten(-1, (attn.heads, -1)) for part in projected]
    query = query if attn.norm_q is None else attn.norm_q(query)
    key = key if attn.norm_k is None else attn.norm_k(key)
    if rotary is not None:
        cos, sin = still_text(rotary, num_text)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    return query, key, value


def still_text(rotary: tuple[Tensor, Tensor], num_text: int) -> tuple[Tensor, Tensor]:
    """(cos, sin) [S, head_dim] of the whole sequence: text is turned by nothing.

    Turning the video's part alone, in place, would cut the compiled block in pieces and copy in the backward pass.
    """
    cos, sin = rotary
    shape = (num_text, cos.shape[-1])
    return torch.cat([cos.new_ones(shape), cos]), torch.cat([sin.new_zeros(shape), sin])


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of [B, S, heads, head_dim] on pairs of neighbours, computed in fp32 or finer, as `apply_rotary_emb` does."""
    exact = states.to(torch.promote_types(states.dtype, torch.float32))
    real, imaginary = exact.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    return (exact * cos[:, None] + turned * sin[:, None]).to(states.dtype)
