#!/usr/bin/env python3
"""Baseline for bench.py: trains a LoRA as plainly as diffusers and peft allow.

    python benchmarks/step_time.py -- benchmarks/reference.py --pretrained_model_name_or_path models/5b

diffusers' own block under full checkpointing, peft's LoRA in fp32, bf16 autocast, fused AdamW: the original scripts'
arithmetic on random latents. It shares no code with training/. Axes: B batch, F latent frames, C channels, H/W latent size.
"""

import argparse
import contextlib

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from peft import LoraConfig
from torch.nn.attention import SDPBackend, sdpa_kernel

from flops import latent_size


TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}


def load_with_lora(folder, rank, device):
    """(transformer with frozen bf16 weights, its fp32 adapter weights)."""
    transformer = CogVideoXTransformer3DModel.from_pretrained(folder, subfolder="transformer", dtype=torch.bfloat16)
    transformer.requires_grad_(False)
    transformer.to(device).train()
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS))
    transformer.enable_gradient_checkpointing()
    params = [param for param in transformer.parameters() if param.requires_grad]
    for param in params:
        param.data = param.data.float()
    return transformer, params


def rotary_embeddings(transformer, num_frames, height, width, device):
    """(cos, sin) as the pipeline computes them; None for 2b, whose positions are part of the patch embedding."""
    if not transformer.config.use_rotary_positional_embeddings:
        return None
    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
    pipe = CogVideoXPipeline(transformer=transformer, **parts)
    return pipe._prepare_rotary_positional_embeddings(height, width, num_frames, device)


def weighted_loss(output, noisy, latents, timesteps, scheduler):
    """Error of the denoised latents weighted by 1 / (1 - alpha_bar): equals the velocity's, as in the original."""
    denoised = scheduler.get_velocity(output, noisy, timesteps)
    weights = 1 / (1 - scheduler.alphas_cumprod[timesteps])
    return (weights.view(-1, 1, 1, 1, 1) * (denoised.float() - latents.float()) ** 2).mean()


def train(args, device):
    torch.manual_seed(args.seed)
    transformer, params = load_with_lora(args.pretrained_model_name_or_path, args.rank, device)
    config, batch = transformer.config, args.train_batch_size
    if config.in_channels != config.out_channels:
        raise SystemExit("reference.py: text-to-video models only")
    scheduler = CogVideoXDDIMScheduler.from_pretrained(args.pretrained_model_name_or_path, subfolder="scheduler")
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(device)
    frames, *latent_sides = latent_size(args.frames, args.height, args.width)
    frames += -frames % (config.patch_size_t or 1)  # 1.5 takes latent frames in pairs
    options = {"device": device, "dtype": torch.bfloat16}
    latents = torch.randn(batch, frames, config.in_channels, *latent_sides, **options)  # [B, F, C, H, W]
    prompt_embeds = torch.randn(batch, config.max_text_seq_length, config.text_embed_dim, **options)
    rotary = rotary_embeddings(transformer, frames, args.height, args.width, device)
    optimizer = torch.optim.AdamW(params, lr=1e-4, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)
    for _ in range(args.max_train_steps):
        noise = torch.randn_like(latents)
        timesteps = torch.randint(len(scheduler.alphas_cumprod), (batch,), device=device)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        with torch.autocast(device, torch.bfloat16):
            inputs = {"hidden_states": noisy, "encoder_hidden_states": prompt_embeds, "timestep": timesteps}
            output = transformer(**inputs, image_rotary_emb=rotary, return_dict=False)[0]
        loss = weighted_loss(output, noisy, latents, timesteps, scheduler)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    print(f"loss {loss.item():.4f}")


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--pretrained_model_name_or_path", required=True, help="pipeline folder")
    parser.add_argument("--frames", type=int, default=49, help="pixel frames (default: %(default)s)")
    parser.add_argument("--height", type=int, default=480, help="pixel height (default: %(default)s)")
    parser.add_argument("--width", type=int, default=720, help="pixel width (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=64, help="of the LoRA (default: %(default)s)")
    parser.add_argument("--train_batch_size", type=int, default=1, help="clips in a step (default: %(default)s)")
    parser.add_argument("--max_train_steps", type=int, default=20, help="steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of weights, noise and timesteps (default: %(default)s)")
    parser.add_argument("--attention", choices=BACKENDS, help="torch's kernel (default: torch's choice)")
    args = parser.parse_args()
    with sdpa_kernel(BACKENDS[args.attention]) if args.attention else contextlib.nullcontext():
        train(args, "cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    main()
