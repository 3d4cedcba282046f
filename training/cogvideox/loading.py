"""The models of a folder, each loaded in the dtype that is asked for."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from transformers import AutoTokenizer, T5EncoderModel

from base.errors import UsageError
from base.tensor_file import weight_files
from cogvideox.config import CONFIGS, attention_shape, default_fps, takes_image
from cogvideox.folder import (
    read_configs_from_args,
    resolve_model_dir,
    stored_dtype,
    transformer_folder,
    weights_from_args,
)


def num_parameters(transformer_config) -> float:
    """About how many parameters: 12 d^2 of attention and feed-forward, 6 x 2 x d x time_embed_dim of modulation."""
    width = transformer_config["num_attention_heads"] * transformer_config["attention_head_dim"]
    per_block = 12 * width**2 + 12 * width * transformer_config.get("time_embed_dim", 512)
    return transformer_config["num_layers"] * per_block


class TransformerWithoutBlocks(CogVideoXTransformer3DModel):
    """Read without a word on the blocks' weights, which the files hold as well."""

    _keys_to_ignore_on_load_unexpected = [r"^transformer_blocks\."]


def load_transformer(
    model_dir: Path,
    dtype: torch.dtype,
    variant: str | None = None,
    drop_learned_positions: bool = False,
    load_blocks: Callable | None = None,
) -> CogVideoXTransformer3DModel:
    """The transformer in `dtype`, on the CPU, frozen; without 5b-I2V's learned positions if they are dropped.

    `model_dir`: a pipeline's folder, or the transformer's own.
    `load_blocks(blocks, prefix, files, dtype)` may fill the blocks, which then come without memory, by itself.
    """
    changes = {"use_learned_positional_embeddings": False} if drop_learned_positions else {}
    cls = CogVideoXTransformer3DModel
    if load_blocks is not None:
        cls, changes["num_layers"] = TransformerWithoutBlocks, 0
    folder = transformer_folder(model_dir)
    transformer = load_whole(cls, folder, dtype=dtype, variant=variant, **changes)
    if load_blocks is not None:
        transformer.__class__ = CogVideoXTransformer3DModel
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        blocks = empty_transformer(config).transformer_blocks
        load_blocks(blocks, "transformer_blocks.", weight_files(folder, variant), dtype)
        transformer.transformer_blocks = blocks
        transformer.register_to_config(num_layers=len(blocks), _class_name=type(transformer).__name__)
    return transformer.requires_grad_(False).eval()


def load_whole(model_class, folder: Path, dtype: torch.dtype, **options):
    """`model_class.from_pretrained`; UsageError where files lack weights, which libraries draw at random with a warning."""
    model, loading = model_class.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    if loading["missing_keys"]:
        raise UsageError(f"{folder}: lacks {min(loading['missing_keys'])}; download the model again")
    return model


def empty_transformer(transformer_config) -> CogVideoXTransformer3DModel:
    """The transformer without memory for its weights, to count and to name them."""
    with torch.device("meta"):
        return CogVideoXTransformer3DModel.from_config(transformer_config)


class Outline(NamedTuple):
    """A model as far as its memory goes, before any weights are read."""

    transformer: CogVideoXTransformer3DModel  # without memory
    stored: torch.dtype
    shape_of: Callable  # (buckets, batch size) -> [B, S, heads, head_dim] of the largest batch
    fps: int
    image_to_video: bool
    scaling_factor: float | None = None


def outline_of(config, stored: torch.dtype) -> Outline:
    shape_of = functools.partial(attention_shape, config)
    return Outline(empty_transformer(config), stored, shape_of, default_fps(config), takes_image(config))


def read_outline_from_args(args, image_to_video: bool) -> Outline:
    """From the configurations alone: of a model on the hub no weights are fetched, and it counts as stored in bf16."""
    config, vae_config = read_configs_from_args(args, image_to_video)
    model_dir = resolve_model_dir(args.pretrained_model_name_or_path, CONFIGS, args.revision, args.cache_dir)
    weights = weights_from_args(args, model_dir)
    has_weights = any(weights.folder.glob("*.safetensors"))
    stored = stored_dtype(*weights) if has_weights else torch.bfloat16
    return outline_of(config, stored)._replace(scaling_factor=vae_config.scaling_factor)


def load_vae(
    model_dir: Path, dtype: torch.dtype, variant: str | None = None, slicing: bool = False, tiling: bool = False
) -> AutoencoderKLCogVideoX:
    """The frozen VAE in `dtype`, on the CPU."""
    vae = load_whole(AutoencoderKLCogVideoX, model_dir / "vae", dtype=dtype, variant=variant)
    if slicing:
        vae.enable_slicing()
    if tiling:
        vae.enable_tiling()
    return vae.requires_grad_(False).eval()


def load_text_encoder(model_dir: Path, dtype: torch.dtype, variant: str | None = None):
    """(tokenizer, frozen T5 encoder in `dtype`), on the CPU."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir, subfolder="tokenizer")
    text_encoder = load_whole(T5EncoderModel, model_dir / "text_encoder", dtype=dtype, variant=variant)
    return tokenizer, text_encoder.requires_grad_(False).eval()
