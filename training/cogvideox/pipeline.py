"""diffusers' pipeline around the models in training."""

import torch
from diffusers import DiffusionPipeline

from cogvideox import vae as vae_walk


def make_pipeline(model, vae, scheduler, image_latent_scale: str, transformer) -> DiffusionPipeline:
    """The stock pipeline of `model` around existing models, for prompts given as embeddings: it has no T5.

    The scheduler is a new one with the checkpoint's class and config, since sampling changes its state.
    """
    scheduler = type(scheduler).from_config(scheduler.config)
    pipe = model.pipeline_class(
        tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=scheduler
    )
    if image_latent_scale == "raw":
        use_raw_image_latents(pipe)
    decode_on_gpu(pipe)
    return pipe


def decode_on_gpu(pipe) -> None:
    """Decode in less time and memory than the stock VAE does, which is used on a CPU and for tiles."""
    decode_latents = pipe.decode_latents

    def decode(latents: torch.Tensor) -> torch.Tensor:
        if not vae_walk.is_used_on(latents.device):
            return decode_latents(latents)
        return vae_walk.decode(pipe.vae, 1 / pipe.vae_scaling_factor_image * latents.permute(0, 2, 1, 3, 4))

    pipe.decode_latents = decode


def use_raw_image_latents(pipe) -> None:
    """Feed the first frame's latents unscaled; the pipeline keeps its factor for decoding."""
    prepare_latents, factor = pipe.prepare_latents, pipe.vae_scaling_factor_image

    def prepare_raw(*positional, **named):
        pipe.vae_scaling_factor_image = 1.0
        try:
            return prepare_latents(*positional, **named)
        finally:
            pipe.vae_scaling_factor_image = factor

    pipe.prepare_latents = prepare_raw
