"""Builds and saves the small model's components.

Everything but the sizes is as in CogVideoX-5b: classes, VAE compression, RoPE, noise schedule. One latent is one token
(the released models have 2x2 patches): a clip of 9 frames of 64x64 is 3x8x8 latents and as many tokens.
"""

import copy
import os
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from torch import nn
from transformers import AutoTokenizer, T5Config, T5EncoderModel


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from tiny_pipeline import TOKENIZER_TEXT, kind_scheduler, kind_transformer, write_model_index, write_tokenizer
from world import CONCEPTS, NUM_FRAMES, NUM_WORDINGS, SIZE, caption, test_contents


TEXT_TO_VIDEO, IMAGE_TO_VIDEO = "tiny-cogvideox", "tiny-cogvideox-i2v"  # folders
TEXT_LENGTH = 32  # tokens that training pads captions to; the longest caption has 24
LONG_TEXT_LENGTH = 226  # tokens that the pipelines pad to by default; pretraining uses both lengths
VAE = {
    "block_out_channels": (16, 24, 32, 40),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "scaling_factor": 1.0,  # set from the latents once the VAE is trained
}
TRANSFORMER = {
    "num_attention_heads": 5,
    "attention_head_dim": 32,
    "num_layers": 6,
    "time_embed_dim": 32,
    "patch_size": 1,
    "sample_height": SIZE // 8,
    "sample_width": SIZE // 8,
    "sample_frames": NUM_FRAMES,
    "text_embed_dim": 64,
    "max_text_seq_length": TEXT_LENGTH,
}
TEXT_ENCODER = {"d_model": 64, "d_kv": 16, "d_ff": 160, "num_layers": 3, "num_heads": 4, "dropout_rate": 0.0}


def new_vae() -> AutoencoderKLCogVideoX:
    return AutoencoderKLCogVideoX(**VAE)


def new_transformer() -> CogVideoXTransformer3DModel:
    """A text-to-video transformer that initially predicts zero velocity."""
    transformer = CogVideoXTransformer3DModel(**{**kind_transformer("5b"), **TRANSFORMER})
    nn.init.zeros_(transformer.proj_out.weight)
    return transformer


def new_text_encoder(vocab_size: int) -> T5EncoderModel:
    config = T5Config(vocab_size=vocab_size, feed_forward_proj="gated-gelu", tie_word_embeddings=False, **TEXT_ENCODER)
    return T5EncoderModel(config)


def image_to_video_from(transformer: CogVideoXTransformer3DModel) -> CogVideoXTransformer3DModel:
    """The same transformer with input channels for image latents, zero-initialized."""
    config = {**transformer.config, "in_channels": 2 * transformer.config.in_channels}
    config.pop("_name_or_path", None)
    grown, state = CogVideoXTransformer3DModel.from_config(config), transformer.state_dict()
    weight = state["patch_embed.proj.weight"]  # [D, C, p, p]
    state["patch_embed.proj.weight"] = torch.cat([weight, torch.zeros_like(weight)], dim=1)
    grown.load_state_dict(state)
    return grown


def num_parameters(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())


# ---------------------------------------------------------------- folders


def write_vocabulary(folder: Path):
    """Train the tokenizer, with one piece per word of the world; returns it."""
    captions = [caption(row, wording) for row in test_contents() for wording in range(NUM_WORDINGS)]
    words = sorted({word.strip(".,") for text in captions for word in text.split()} | set(CONCEPTS))
    write_tokenizer(folder / "tokenizer", "\n".join([*captions, TOKENIZER_TEXT]), words)
    return AutoTokenizer.from_pretrained(folder, subfolder="tokenizer")


def write_part(folder: Path, name: str, module: nn.Module, dtype: torch.dtype = torch.float16) -> None:
    part = copy.deepcopy(module).cpu()
    (part.half() if dtype == torch.float16 else part.float()).save_pretrained(folder / name)


def write_text_encoder(folder: Path, text_encoder: T5EncoderModel) -> None:
    """Saved in fp32: transformers keeps a file's dtype where diffusers casts to fp32, so a pipeline loaded without
    `dtype` would fail at its first call. It is the smallest component.
    """
    write_part(folder, "text_encoder", text_encoder, torch.float32)


def write_index(folder: Path, kind: str = "5b") -> None:
    scheduler = kind_scheduler(kind)
    scheduler.save_pretrained(folder / "scheduler")
    write_model_index(folder, kind, scheduler)


def write_image_to_video(folder: Path, transformer: CogVideoXTransformer3DModel) -> None:
    """A folder next to the text-to-video one: its own transformer and index, symlinks to everything else."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("scheduler", "vae", "text_encoder", "tokenizer"):
        link, target = folder / name, Path("..", TEXT_TO_VIDEO, name)
        if not link.is_symlink():
            os.symlink(target, link)
    write_part(folder, "transformer", transformer)
    write_model_index(folder, "5b-i2v", kind_scheduler("5b-i2v"))
