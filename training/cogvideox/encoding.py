"""Encodes prompts with T5, and videos and first frames with the VAE.

Axes: B batch, F' pixel frames, F latent frames, C latent channels, h/w pixels, H/W latent size (h = 8H), S text
tokens, D text width.
"""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX, training_utils

from base.bars import with_progress
from base.memory_levels import HOST_LEVELS
from cogvideox import vae as vae_walk
from cogvideox.loading import load_text_encoder
from memory.host import free_gpu_bytes, wrap_blocks
from memory.streaming import stream_weights


logger = logging.getLogger(__name__)

CAPTIONS_PER_PASS = 16  # of a streamed T5: its weights are copied once for all of them
IMAGE_NOISE_MEAN, IMAGE_NOISE_STD = -3.0, 0.5  # of log sigma, the noise on image-to-video's first frame


@torch.no_grad()
def encode_prompts(tokenizer, text_encoder, prompts: list[str], max_length: int = 226) -> torch.Tensor:
    """T5 embeddings [B, S, D] as the pipelines make them: truncated or padded to S tokens, no attention mask."""
    tokens = tokenizer(prompts, padding="max_length", max_length=max_length, truncation=True, return_tensors="pt")
    return text_encoder(tokens.input_ids.to(text_encoder.device))[0]


@torch.no_grad()
def encode_videos(vae: AutoencoderKLCogVideoX, pixels: torch.Tensor) -> torch.Tensor:
    """Moments [B, 2C, F, H, W] (mean and log-variance) of pixels [B, F', 3, h, w] in [-1, 1].

    On a GPU in less time and memory than the stock module, which is used on a CPU and for tiles.
    """
    pixels_BCFhw = pixels.to(vae.device, vae.dtype).permute(0, 2, 1, 3, 4)
    if vae_walk.is_used_on(vae.device):
        return vae_walk.encode(vae, pixels_BCFhw)
    return vae.encode(pixels_BCFhw).latent_dist.parameters


@torch.no_grad()
def encode_noised_images(
    vae: AutoencoderKLCogVideoX, images: torch.Tensor, noise: torch.Tensor, log_sigma: torch.Tensor
) -> torch.Tensor:
    """Moments [B, 2C, 1, H, W] of first frames [B, 3, h, w] in [-1, 1] under log-normal noise, added before the VAE.

    `noise` is standard normal like `images`; `log_sigma` [B] is drawn from N(-3, 0.5), as CogVideoX was trained
    (sat/diffusion_video.py of zai-org/CogVideo).
    """
    noisy_images = images + noise * log_sigma.exp().view(-1, 1, 1, 1)
    # One by one, as the pipelines do: a batch rounds differently (6e-6 in fp32)
    return torch.cat([encode_videos(vae, image[None, None]) for image in noisy_images])


def pixels_to_unit(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels to fp32 in [-1, 1], the VAE's range; rounded as the pipelines' VideoProcessor rounds."""
    return 2.0 * (pixels.float() / 255.0) - 1.0


def encode_captions(
    model_dir: Path,
    prompts: list[str],
    dtype: torch.dtype,
    device: torch.device,
    max_length: int,
    variant: str | None = None,
    level: str | None = None,
) -> Iterator[torch.Tensor]:
    """Yield the embedding [S, D] of each prompt, on the CPU.

    T5 is loaded, used and freed: it is never in memory beside the transformer (T5-XXL alone takes 9 GiB in bf16). At a
    memory `level` that uses host memory, T5 is streamed too.
    """
    if not prompts:
        return
    tokenizer, text_encoder = load_text_encoder(model_dir, dtype, variant)
    at_once = place_text_encoder(text_encoder, device, streamed=level in HOST_LEVELS)
    embeds = encode_by_passes(tokenizer, text_encoder, prompts, max_length, at_once)
    for _ in with_progress(prompts, "captions", delay=1):
        yield next(embeds)
    del text_encoder, embeds
    free_memory(device)


def encode_by_passes(
    tokenizer, text_encoder, prompts: list[str], max_length: int, at_once: int
) -> Iterator[torch.Tensor]:
    """Yield the embedding [S, D] of each prompt, on the CPU, `at_once` from each pass through T5."""
    for start in range(0, len(prompts), at_once):
        yield from encode_prompts(tokenizer, text_encoder, prompts[start : start + at_once], max_length).cpu()


def place_text_encoder(text_encoder, device: torch.device, streamed: bool = False) -> int:
    """Move T5 to `device`; if asked to, or if it does not fit, its blocks are streamed from pinned host memory.

    Returns how many captions to encode at once. Same bits either way: in a batch, the other captions would change the
    last bits of an embedding, so a streamed block takes one after the other. Streaming T5-XXL takes 1.4 GiB of the GPU,
    and one transfer of 8.6 GiB per pass.
    """
    if not streamed and not fits(text_encoder, device):
        logger.info("T5 does not fit into what is free on the GPU: its weights are streamed from host memory")
        streamed = True
    if streamed:
        encoder = text_encoder.encoder
        wrap_blocks([*encoder.block, encoder.final_layer_norm], OneByOne())
        stream_weights(encoder.block, device)  # one block at a time is in host memory twice
    text_encoder.to(device)
    return CAPTIONS_PER_PASS if streamed else 1


class OneByOne:
    """A batch passes a T5 block sample by sample; what a block returns beside hidden states is the same for all."""

    def forward(self, index: int, call: Callable, hidden_states: torch.Tensor, *shared, **named):
        outputs = [call(states, *shared, **named) for states in hidden_states.split(1)]
        if torch.is_tensor(outputs[0]):
            return torch.cat(outputs)
        return torch.cat([states for states, *_ in outputs]), *outputs[0][1:]


def free_memory(device: torch.device) -> None:
    """Release the memory of models that are no longer referenced."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # weights may still be prefetched for a pass that never comes
    training_utils.free_memory()  # collects garbage first: streamed blocks are reference cycles


def fits(model: torch.nn.Module, device: torch.device) -> bool:
    """True unless `device` is a GPU without room for the weights of `model` and 1 GiB to compute with."""
    if device.type != "cuda":
        return True
    needed = sum(param.nbytes for param in model.parameters()) + 2**30
    return needed <= free_gpu_bytes(device)
