"""SageAttention (arXiv 2410.02367) in place of torch's attention, for sampling alone: it has no backward pass."""

import contextlib

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from torch import nn

from errors import UsageError


class SageProcessor:
    """Joint attention over text and video, as the transformer's own processor does it, by `sageattn`."""

    def __init__(self, sageattn):
        self.sageattn = sageattn

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        """(video states, text states), each [B, tokens, D]; there is no mask, all prompts are padded to one length."""
        num_text = encoder_hidden_states.shape[1]
        states = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        query, key, value = (
            linear(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for linear in (attn.to_q, attn.to_k, attn.to_v)
        )  # [B, heads, tokens, head_dim]
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        if image_rotary_emb is not None:
            query[:, :, num_text:] = apply_rotary_emb(query[:, :, num_text:], image_rotary_emb)
            key[:, :, num_text:] = apply_rotary_emb(key[:, :, num_text:], image_rotary_emb)
        states = self.sageattn(query, key, value, tensor_layout="HND", is_causal=False)
        states = attn.to_out[0](states.transpose(1, 2).flatten(2))
        return states[:, num_text:], states[:, :num_text]


def check_sage(dtype: torch.dtype, device: torch.device) -> None:
    """Refuse where SageAttention cannot run: said at the start, not at the first validation."""
    import_sage()
    if device.type != "cuda" or dtype == torch.float32:
        raise UsageError("--validation_attention sage: computes on CUDA in bf16 or fp16 only; leave it out here")


def import_sage():
    try:
        from sageattention import sageattn
    except ImportError as error:
        raise UsageError("--validation_attention sage needs SageAttention: pip install sageattention") from error
    return sageattn


@contextlib.contextmanager
def sage_attention(transformer: nn.Module):
    """Every attention of `transformer` by SageAttention; its own processors are back afterwards."""
    own = {module: module.processor for module in transformer.modules() if isinstance(module, Attention)}
    processor = SageProcessor(import_sage())
    try:
        for module in own:
            module.processor = processor
        yield
    finally:
        for module, before in own.items():
            module.processor = before
