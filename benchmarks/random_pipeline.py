#!/usr/bin/env python3
"""Write a full-size CogVideoX pipeline with random weights, to benchmark memory and time without a download.

    python benchmarks/random_pipeline.py OUT --kind 5b

Both depend only on shapes and dtypes. With --load_tensors neither text encoder nor VAE is used: make those tiny.
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from base import console


if __name__ == "__main__":
    console.set_up()  # before the libraries are imported

import torch
import transformers


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from tiny_pipeline import KINDS, TINY_TEXT_ENCODER, TINY_VAE, write_pipeline


TEXT_WIDTH = 4096  # T5-XXL's, expected by the transformers of all five checkpoints
# t5-v1_1-xxl's encoder, 4.8 billion parameters: https://huggingface.co/google/t5-v1_1-xxl
XXL_TEXT_ENCODER = {"d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
FULL_VAE = {"sample_height": 480, "sample_width": 720}
REAL_2B = {"num_attention_heads": 30, "num_layers": 30}
REAL_5B = {"num_attention_heads": 48, "num_layers": 42}
# Latent sizes. The 1.5 checkpoints say 300x300; their RoPE is a slice of that.
REAL_1_0_SAMPLE = {"sample_height": 60, "sample_width": 90, "sample_frames": 49}
REAL_1_5_SAMPLE = {"sample_height": 300, "sample_width": 300, "sample_frames": 81}


def real_sizes(kind, text_encoder="xxl", vae="full"):
    """Config overrides with the released checkpoint's sizes; a tiny text encoder keeps the embedding width."""
    transformer = dict(REAL_2B if kind == "2b" else REAL_5B)
    transformer.update(REAL_1_5_SAMPLE if kind.startswith("1.5") else REAL_1_0_SAMPLE)
    transformer.update(attention_head_dim=64, time_embed_dim=512, text_embed_dim=TEXT_WIDTH)
    if kind == "1.5-5b-i2v":
        transformer["ofs_embed_dim"] = 512
    return {
        "transformer": transformer,
        "vae": FULL_VAE if vae == "full" else TINY_VAE,
        "text_encoder": {**(XXL_TEXT_ENCODER if text_encoder == "xxl" else TINY_TEXT_ENCODER), "d_model": TEXT_WIDTH},
    }


def main():
    parser = console.Parser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--kind", choices=KINDS, required=True, help="checkpoint to imitate")
    parser.add_argument("--text_encoder", choices=("tiny", "xxl"), default="xxl", help="xxl: 9 GiB on disk")
    parser.add_argument("--vae", choices=("full", "tiny"), default="full", help="tiny: same compression, few channels")
    parser.add_argument(
        "--num_layers", type=int, help="fewer blocks, of the real width; unset: the checkpoint's number"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights (default: %(default)s)")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"  # 5b: seconds on a GPU, a minute or more on a CPU
    sizes = real_sizes(args.kind, args.text_encoder, args.vae)
    if args.num_layers:
        sizes["transformer"]["num_layers"] = args.num_layers
    write_pipeline(args.out, args.kind, sizes, args.seed, device)
    print(f"random {args.kind} pipeline: {args.out}")


if __name__ == "__main__":
    main()
