"""Model FLOPs of a training step, and what a card could do: their quotient over the time is the model FLOP utilisation.

Counted is what the arithmetic needs: forward and backward, nothing computed again. A kernel that recomputes does more
work, not more of the model's. Standard library only.
"""

# Dense bf16 with fp32 accumulation, TFLOP/s, from NVIDIA's data sheets; the first name that the card's contains counts.
PEAKS = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200": 989,
    "B200": 2250,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "RTX 4090": 165,
    "RTX 3090": 71,
}


def peak_tflops(card):
    """None for a card that the table does not know."""
    return next((peak for name, peak in PEAKS.items() if name in card), None)


def latent_size(frames, height, width):
    """Latent [F, H, W] of a video of `frames` x `height` x `width` pixels. Raises ValueError where the VAE has none."""
    if frames % 4 != 1 or height % 16 or width % 16:
        raise ValueError(f"{frames}x{height}x{width}: need 4k+1 frames, height and width divisible by 16")
    return (frames - 1) // 4 + 1, height // 8, width // 8


def num_tokens(config, frames, height, width):
    """Text and video tokens that the transformer of `config` sees of `frames` x `height` x `width` pixels."""
    latent_frames, latent_height, latent_width = latent_size(frames, height, width)
    frames_per_patch, patch = config.get("patch_size_t") or 1, config["patch_size"]
    video = -(-latent_frames // frames_per_patch) * (latent_height // patch) * (latent_width // patch)
    return config["max_text_seq_length"] + video


def step_flops(config, size, batch=1, is_lora=True):
    """FLOPs of forward and backward of the blocks; adaLN, embeddings and the LoRA itself are 1 to 3 % more.

    A frozen weight has no gradient of its own: its layer costs as much backward as forward, a trained one twice that.
    """
    tokens, layers = num_tokens(config, *size), config["num_layers"]
    width = config["num_attention_heads"] * config["attention_head_dim"]
    linear = 24 * width**2 * tokens * layers  # q, k, v, out: 8; feed-forward of 4 x width: 16
    attention = 4 * tokens**2 * width * layers
    return batch * ((2 if is_lora else 3) * linear + 3 * attention)
