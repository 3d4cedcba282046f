"""Model FLOPs of a training step and the peak FLOP/s of GPUs, for the model FLOP utilization (MFU).

Counts forward and backward as the model defines them; recomputation does not count. Standard library only.
"""

# Dense bf16 with fp32 accumulation, TFLOP/s, from NVIDIA's data sheets. The first entry contained in the GPU's name
# counts.
PEAKS = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200": 989,
    "B200": 2250,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "RTX 5090": 209,
    "RTX 4090": 165,
    "RTX 3090": 71,
}


def peak_tflops(card):
    """Peak TFLOP/s, or None if the GPU is not in the table."""
    return next((peak for name, peak in PEAKS.items() if name in card), None)


def latent_size(frames, height, width):
    """Latent size [F, H, W] of a video of `frames` x `height` x `width` pixels; ValueError if the VAE rejects it."""
    if frames % 4 != 1 or height % 16 or width % 16:
        raise ValueError(f"{frames}x{height}x{width}: need 4k+1 frames, height and width divisible by 16")
    return (frames - 1) // 4 + 1, height // 8, width // 8


def num_tokens(config, frames, height, width):
    """Number of text and video tokens for `frames` x `height` x `width` pixels and the transformer's `config`."""
    latent_frames, latent_height, latent_width = latent_size(frames, height, width)
    frames_per_patch, patch = config.get("patch_size_t") or 1, config["patch_size"]
    video = -(-latent_frames // frames_per_patch) * (latent_height // patch) * (latent_width // patch)
    return config["max_text_seq_length"] + video


def step_flops(config, size, batch=1, is_lora=True):
    """FLOPs of the blocks' forward and backward; adaLN, embeddings and the LoRA itself would add 1 to 3 %.

    Backward costs as much as forward for a frozen layer (no weight gradient), and twice as much for a trained one.
    """
    tokens, layers = num_tokens(config, *size), config["num_layers"]
    width = config["num_attention_heads"] * config["attention_head_dim"]
    linear = 24 * width**2 * tokens * layers  # q, k, v, out: 8; feed-forward of 4 x width: 16
    attention = 4 * tokens**2 * width * layers
    return batch * ((2 if is_lora else 3) * linear + 3 * attention)
