"""What a CogVideoX folder's configs say about the model: version, task, sizes, and whether the flags fit it."""

import json
import logging
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)

from base.errors import UsageError


logger = logging.getLogger(__name__)

TEXT_TO_VIDEO_PIPELINE = CogVideoXPipeline
IMAGE_TO_VIDEO_PIPELINE = CogVideoXImageToVideoPipeline
SPATIAL_FACTOR, TEMPORAL_FACTOR = 8, 4  # pixels per latent; the VAE's first latent frame covers one pixel frame
CONFIGS = ["transformer/config.json", "vae/config.json"]  # a few kilobytes that identify the model


class VaeConfig(NamedTuple):
    """The two values that latents need from the VAE; with prepared latents a run loads nothing else of it."""

    scaling_factor: float
    invert_scale_latents: bool


class WeightFiles(NamedTuple):
    """A transformer's weight files: their folder and the variant to read."""

    folder: Path
    variant: str | None


def read_config(model_dir: Path, component: str) -> dict:
    """The component's config; UsageError if the transformer is not CogVideoX's."""
    name = "scheduler_config.json" if component == "scheduler" else "config.json"
    config = json.loads((model_dir / component / name).read_text(encoding="utf-8"))
    if component == "transformer":
        check_class(model_dir, config)
    return config


def check_class(source: Path, transformer_config) -> None:
    wanted, found = CogVideoXTransformer3DModel.__name__, transformer_config.get("_class_name")
    if found != wanted:
        raise UsageError(f"{source}: no CogVideoX model, its transformer is {found}, not {wanted}")


def is_version_1_5(transformer_config) -> bool:
    """True for CogVideoX 1.5, which patches two latent frames into one token and was trained at 16 fps."""
    return transformer_config.get("patch_size_t") is not None


def default_fps(transformer_config) -> int:
    """Frames per second that the checkpoint was trained at: 8 (1.0) or 16 (1.5)."""
    return 16 if is_version_1_5(transformer_config) else 8


def takes_image(transformer_config) -> bool:
    """True for an image-to-video transformer, which takes image latents beside the video's."""
    return transformer_config["in_channels"] == 2 * transformer_config.get("out_channels", 16)


def num_parameters(transformer_config) -> float:
    """Approximate count, per block 12 d^2 for attention and feed-forward, 6 x 2 x d x time_embed_dim for modulation."""
    width = transformer_config["num_attention_heads"] * transformer_config["attention_head_dim"]
    per_block = 12 * width**2 + 12 * width * transformer_config.get("time_embed_dim", 512)
    return transformer_config["num_layers"] * per_block


def empty_transformer(transformer_config) -> CogVideoXTransformer3DModel:
    """The transformer on the meta device, to count and name its weights without allocating them."""
    with torch.device("meta"):
        return CogVideoXTransformer3DModel.from_config(transformer_config)


def text_length(transformer_config) -> int:
    """Number of text tokens that the checkpoint was trained with."""
    return transformer_config.get("max_text_seq_length", 226)


def text_shape(transformer_config) -> tuple[int, int]:
    """[S, D] of a prompt embedding."""
    return text_length(transformer_config), transformer_config.get("text_embed_dim", 4096)


def check_task(model: str, transformer_config, image_to_video: bool) -> None:
    """Refuse a checkpoint for the other task."""
    has_image = takes_image(transformer_config)
    if has_image != image_to_video:
        names = {True: "an image-to-video", False: "a text-to-video"}
        raise UsageError(f"{model}: {names[has_image]} model, and this script trains {names[image_to_video]} model")


def check_sizes(transformer_config, buckets, drop_learned_positions: bool = False) -> None:
    """Refuse sizes that do not fit learned positions (5b-I2V); warn of frame counts that the pipelines change.

    `buckets` are (frames, height, width) in pixels.
    """
    config = transformer_config
    learned = config.get("use_learned_positional_embeddings", False)
    if drop_learned_positions and not learned:
        raise UsageError("--drop_learned_positions: this checkpoint has no learned positions; leave it out")
    base = base_size(config)
    other = sorted({tuple(bucket) for bucket in buckets} - {base})
    if learned and not drop_learned_positions and other:
        raise UsageError(
            f"this checkpoint's learned positions fit {shape_text(base)} only, and the data holds "
            f"{', '.join(map(shape_text, other[:3]))}; prepare it at that size or pass --drop_learned_positions"
        )
    period = 2 * TEMPORAL_FACTOR * (config.get("patch_size_t") or 1)  # 8N+1 frames for 1.0, 16N+1 for 1.5
    odd = sorted({bucket[0] for bucket in buckets if bucket[0] % period != 1})
    if odd:
        logger.warning(
            "%s frames: this checkpoint was made for %dN+1; for other counts, the pipeline renders a few frames more",
            ", ".join(map(str, odd)),
            period,
        )


def check_sample_size(transformer_config, size, drop_learned_positions: bool = False) -> None:
    """Refuse a video `size` (frames, height, width in pixels) that the pipelines cannot render with this checkpoint."""
    config, base = transformer_config, base_size(transformer_config)
    unit = SPATIAL_FACTOR * config.get("patch_size", 2)
    reason = None
    if size[1] % unit or size[2] % unit:
        reason = f"height and width must be multiples of {unit}"
    elif config.get("use_learned_positional_embeddings", False) and not drop_learned_positions and size != base:
        reason = f"this checkpoint's learned positions fit {shape_text(base)} only"
    elif is_version_1_5(config) and (size[1] > base[1] or size[2] > base[2]):
        reason = f"this checkpoint has positions up to {base[1]}x{base[2]}"
    if reason:
        raise UsageError(
            f"validation videos of {shape_text(size)}: {reason}; choose another size by --max_num_frames, --height "
            "and --width"
        )


def base_size(transformer_config) -> tuple[int, int, int]:
    """(frames, height, width) in pixels that the checkpoint's position embeddings were made for."""
    config = transformer_config
    return config["sample_frames"], config["sample_height"] * SPATIAL_FACTOR, config["sample_width"] * SPATIAL_FACTOR


def shape_text(bucket) -> str:
    return f"{bucket[0]} frames of {bucket[1]}x{bucket[2]}"


def load_scheduler(model_dir: Path) -> CogVideoXDPMScheduler | CogVideoXDDIMScheduler:
    """The checkpoint's own noise schedule; its `alphas_cumprod` [1000] is in fp32 or fp64."""
    name = json.loads((model_dir / "model_index.json").read_text(encoding="utf-8"))["scheduler"][1]
    scheduler_class = CogVideoXDDIMScheduler if name == "CogVideoXDDIMScheduler" else CogVideoXDPMScheduler
    return scheduler_class.from_pretrained(model_dir, subfolder="scheduler")


def load_vae_config(model_dir: Path) -> VaeConfig:
    """The scaling of latents, without the VAE's weights."""
    config = read_config(model_dir, "vae")
    return VaeConfig(config["scaling_factor"], config.get("invert_scale_latents", False))


def attention_shape(transformer_config, buckets, batch_size: int) -> tuple[int, int, int, int]:
    """[B, S, heads, head_dim] of attention for the largest of `buckets` (frames, height, width in pixels)."""
    config = transformer_config
    patch, patch_t = config.get("patch_size", 2) * SPATIAL_FACTOR, config.get("patch_size_t") or 1
    frames = {bucket: (bucket[0] - 1) // TEMPORAL_FACTOR + 1 for bucket in buckets}
    num_tokens = max(-(-frames[bucket] // patch_t) * (bucket[1] // patch) * (bucket[2] // patch) for bucket in frames)
    return batch_size, text_length(config) + num_tokens, config["num_attention_heads"], config["attention_head_dim"]
