#!/usr/bin/env python3
"""Write a complete CogVideoX pipeline folder with tiny random weights, offline, for tests.

    python tests/tiny_pipeline.py OUT --kind 5b

The five kinds differ as the released checkpoints do. benchmarks/random_pipeline.py writes the real sizes with the same code.
"""

import argparse
import io
import json
from pathlib import Path

import sentencepiece
import torch
import transformers
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXTransformer3DModel,
    __version__,
)
from transformers import T5Config, T5EncoderModel


KINDS = ("2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v")

# 226 is the pipelines' default max_sequence_length; sincos and learned positions fit no other length.
TEXT_LENGTH = 226

# 1.0: 9 frames of 64x96 pixels by default, as the real ones have 49 of 480x720. 5b-i2v takes no other height and width.
# 1.5 needs 192 channels: a token of two latent frames holds 128 numbers, and hidden 128 cannot carry them through noise.
TINY_1_0 = {"num_attention_heads": 4, "sample_height": 8, "sample_width": 12, "sample_frames": 9}
TINY_1_5 = {"num_attention_heads": 6, "sample_height": 32, "sample_width": 32, "sample_frames": 17}
TINY_TRANSFORMER = {"attention_head_dim": 32, "num_layers": 2, "time_embed_dim": 32}
TINY_OFS_WIDTH = 32
# The real VAE's compression (8x in space, 4x in time) and latent channels follow from four blocks and the defaults.
TINY_VAE = {
    "block_out_channels": (8, 8, 8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "sample_height": 96,  # as in the real one, tiles of half this size overlap by whole latents: 1/6 and 1/5
    "sample_width": 80,
}
TINY_TEXT_ENCODER = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 512}

# The tokenizer learns its pieces from these; the last two lines make every printable ASCII character known.
TOKENIZER_TEXT = """\
a red circle moves slowly from left to right over a dark blue background
the green square falls down quickly and bounces on the ground near the bottom of the picture
a small yellow triangle turns around while a large white star grows bigger and then shrinks again
a black and white cat walks toward the camera across a bright green lawn on a sunny day
an old man with a long grey beard reads a book beside the window of his quiet kitchen
two children run along the beach at sunset and waves roll over the warm golden sand
a woman in a blue dress dances in the rain under the street lights of a busy city at night
the train passes a platform at dusk, its windows glowing, and people wait with their bags
a horse gallops past a plain wall in an early motion study filmed in black and white
a chef cooks a pancake in a hot pan, throws it into the air and catches it with a smile
slow motion close up of water drops on fresh leaves, soft light, shallow depth of field, film grain
an animated mouse wearing red shorts steers a wooden boat on the river and whistles a happy song
a robot made of shiny metal builds a tall tower from coloured blocks in a modern laboratory
birds fly high above snowy mountains while clouds drift and the wind moves the trees in the forest
the camera pans up, zooms out and follows a car that drives fast down an empty road into the desert
a dog jumps through a hoop, then sits, looks at its owner and waits for food beside the garden door
first the video shows one person, next three other people come, they talk, laugh and play music together
this is what we can see there when you look at it from the side, with no sound and in good quality
a cartoon style scene of flowers, fire, smoke, fish, ships, stars, stone, glass, paper, hair and hands
her eyes open, his face turns to us, who would have thought about how time goes by after such a long year
! " # $ % & ' ( ) * + , - . / 0 1 2 3 4 5 6 7 8 9 : ; < = > ? @ [ \\ ] ^ _ ` { | } ~
A B C D E F G H I J K L M N O P Q R S T U V W X Y Z a b c d e f g h i j k l m n o p q r s t u v w x y z"""


def is_image_to_video(kind):
    return kind.endswith("i2v")


def stored_dtype(kind):
    return torch.float16 if kind == "2b" else torch.bfloat16


def kind_transformer(kind):
    """The transformer config values that tell the released checkpoints apart at any size."""
    config = {"max_text_seq_length": TEXT_LENGTH, "spatial_interpolation_scale": 1.875}
    config["use_rotary_positional_embeddings"] = kind != "2b"
    config["use_learned_positional_embeddings"] = kind == "5b-i2v"
    config["in_channels"] = 32 if is_image_to_video(kind) else 16
    if kind.startswith("1.5"):
        config.update(patch_size_t=2, patch_bias=False)
    return config


def kind_vae(kind):
    """The VAE config values that tell the released checkpoints apart."""
    return {
        "scaling_factor": 1.15258426 if kind == "2b" else 0.7,
        "invert_scale_latents": kind.startswith("1.5"),
    }


def kind_scheduler(kind):
    """The scheduler of a kind. 1.5 stores DDIM too: https://github.com/huggingface/finetrainers/issues/120"""
    scheduler_class = CogVideoXDPMScheduler if kind in ("5b", "5b-i2v") else CogVideoXDDIMScheduler
    return scheduler_class(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=3.0 if kind == "2b" else 1.0,
        timestep_spacing="trailing",
    )


def build(make_model, dtype, device):
    """A model made by `make_model()`, its random weights drawn in `dtype` on `device`: never twice in memory."""
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return make_model()
    finally:
        torch.set_default_dtype(default_dtype)


@torch.no_grad()
def scale_transformer(transformer):
    """Bring torch's initial weights to unit gain, so that output, prompt and timestep all matter visibly."""
    for module in transformer.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.mul_(3**0.5)  # torch draws with variance 1 / (3 fan_in)
    if transformer.config.use_learned_positional_embeddings:
        # The released 5b-i2v learned values near 0, far from the sincos values that a mistake would put there.
        patch_embed = transformer.patch_embed
        small = 0.02 * torch.randn_like(patch_embed.pos_embedding, dtype=patch_embed.text_proj.weight.dtype)
        patch_embed.register_buffer("pos_embedding", small, persistent=True)


@torch.no_grad()
def scale_vae(vae):
    """Make latents of about unit deviation that carry the picture, with a posterior as narrow as the real VAE's."""
    mean, logvar = vae.encoder.conv_out.conv.weight.chunk(2)
    mean.mul_(4.0)
    logvar.mul_(0.1)
    vae.encoder.conv_out.conv.bias.chunk(2)[1].fill_(-6.0)
    vae.decoder.conv_out.conv.weight.mul_(2.0)


def write_tokenizer(folder, text=TOKENIZER_TEXT, words=()):
    """Train a sentencepiece model on `text` and lay it out as the released checkpoints do; each of `words` is one piece."""
    model = io.BytesIO()
    # One thread and no file names in the model: the same bytes each time.
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_writer=model,
        model_type="unigram",
        vocab_size=512,
        hard_vocab_limit=False,  # the built-in text yields about 280
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        user_defined_symbols=[f"\u2581{word}" for word in words],  # the mark is sentencepiece's space
        num_threads=1,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    # transformers 5 ignores T5Tokenizer(vocab_file=...): only a folder with both files gives the trained pieces.
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": TEXT_LENGTH}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_model_index(out, kind, scheduler):
    index = {
        "_class_name": "CogVideoXImageToVideoPipeline" if is_image_to_video(kind) else "CogVideoXPipeline",
        "_diffusers_version": __version__,
        "scheduler": ["diffusers", type(scheduler).__name__],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
    }
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_pipeline(out, kind, sizes, seed=0, device="cpu"):
    """Write a loadable pipeline folder; `sizes` has the size values for transformer, vae and text_encoder configs."""
    out, dtype = Path(out), stored_dtype(kind)
    transformer_config = {**kind_transformer(kind), **sizes["transformer"]}
    text_config = T5Config(feed_forward_proj="gated-gelu", tie_word_embeddings=False, **sizes["text_encoder"])
    vae_config = {**kind_vae(kind), **sizes["vae"]}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = build(lambda: CogVideoXTransformer3DModel(**transformer_config), dtype, device)
        scale_transformer(transformer)
        transformer.save_pretrained(out / "transformer", max_shard_size="5GB")
        del transformer  # 11 GiB at the 5b size: freed before the text encoder comes
        text_encoder = build(lambda: T5EncoderModel(text_config), dtype, device)
        text_encoder.save_pretrained(out / "text_encoder", max_shard_size="5GB")
        del text_encoder
        vae = build(lambda: AutoencoderKLCogVideoX(**vae_config), dtype, device)
        scale_vae(vae)
        vae.save_pretrained(out / "vae")
    scheduler = kind_scheduler(kind)
    scheduler.save_pretrained(out / "scheduler")
    write_tokenizer(out / "tokenizer")
    write_model_index(out, kind, scheduler)


def tiny_sizes(kind):
    """Sizes of the tiny pipelines: about 1 MB and a tenth of a second a forward on one core."""
    transformer = {**TINY_TRANSFORMER, **(TINY_1_5 if kind.startswith("1.5") else TINY_1_0)}
    transformer["text_embed_dim"] = TINY_TEXT_ENCODER["d_model"]
    if kind == "1.5-5b-i2v":
        transformer["ofs_embed_dim"] = TINY_OFS_WIDTH
    return {"transformer": transformer, "vae": TINY_VAE, "text_encoder": TINY_TEXT_ENCODER}


def make_tiny_pipeline(out, kind, seed=0):
    """Write a tiny pipeline of `kind` to the folder `out`; the same seed gives the same bytes."""
    write_pipeline(out, kind, tiny_sizes(kind), seed)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--kind", choices=KINDS, required=True, help="checkpoint to imitate")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights (default: %(default)s)")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    make_tiny_pipeline(args.out, args.kind, args.seed)
    print(f"tiny {args.kind} pipeline: {args.out}")


if __name__ == "__main__":
    main()
