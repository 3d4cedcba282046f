"""Loads a folder's models, each in the requested dtype."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from transformers import AutoTokenizer, T5EncoderModel

from base.errors import UsageError
from base.startup import STARTUP
from base.tensor_file import weight_files
from cogvideox.config import WeightFiles, empty_transformer
from cogvideox.folder import transformer_folder
from memory.streaming import load_blocks as load_streamed_blocks


class TransformerWithoutBlocks(CogVideoXTransformer3DModel):
    """Suppresses the warning about the blocks' weights, which are loaded separately."""

    _keys_to_ignore_on_load_unexpected = [r"^transformer_blocks\."]


def load_transformer(
    model_dir: Path,
    dtype: torch.dtype,
    variant: str | None = None,
    drop_learned_positions: bool = False,
    load_blocks: Callable | None = None,
) -> CogVideoXTransformer3DModel:
    """The frozen transformer in `dtype`, on the CPU; without 5b-I2V's learned positions if they are dropped.

    `model_dir`: a pipeline's folder, or the transformer's own. `load_blocks(blocks, prefix, files, dtype)`, if given,
    fills the blocks, which it gets on the meta device.
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
    STARTUP.mark("loading")
    return transformer.requires_grad_(False).eval()


def load_transformer_from_args(
    args, weights: WeightFiles, dtype: torch.dtype, level: str | None = None, device: torch.device | None = None
) -> CogVideoXTransformer3DModel:
    """The transformer that training starts from; blocks that stay in host memory as they are go there directly.

    `level`: of memory, where the weights are frozen.
    """
    stays = level == "stream" and args.base_precision == "bf16"
    load_blocks = functools.partial(load_streamed_blocks, device=device) if stays else None
    return load_transformer(weights.folder, dtype, weights.variant, args.drop_learned_positions, load_blocks)


def load_whole(model_class, folder: Path, dtype: torch.dtype, **options):
    """`from_pretrained`, but missing weights are a UsageError: the libraries only warn and draw them at random."""
    model, loading = model_class.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    if loading["missing_keys"]:
        raise UsageError(f"{folder}: lacks {min(loading['missing_keys'])}; download the model again")
    return model


def load_vae_from_args(args, model_dir: Path, dtype: torch.dtype, device: torch.device) -> AutoencoderKLCogVideoX:
    """The VAE for a training run, on `device`; on the CPU with prepared data, where only validation uses it."""
    vae = load_vae(model_dir, dtype, args.variant, args.enable_slicing, args.enable_tiling)
    return vae.to("cpu" if args.load_tensors else device)


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
