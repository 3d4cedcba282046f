#!/usr/bin/env python3
"""Write a prepared dataset of random latents and embeddings, to benchmark training without videos, VAE or T5.

    python benchmarks/random_dataset.py OUT --num_clips 8 --frames 49 --height 480 --width 720

Same layout as prepare_dataset.py --save_latents_and_embeddings; train on it with --load_tensors.
"""

import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

import torch
from safetensors.torch import save_file

from base import console
from flops import latent_size


LATENT_CHANNELS = 16


def random_moments(size, generator):
    """[2C, F, H, W] like the VAE's: posterior mean with unit standard deviation, log variance of about -6."""
    mean = torch.randn(LATENT_CHANNELS, *size, generator=generator)
    logvar = 0.1 * torch.randn(LATENT_CHANNELS, *size, generator=generator) - 6.0
    return torch.cat([mean, logvar])


def write_clip_files(out, stem, size, text_shape, generator):
    """Write one clip's tensors, with two variants of the first frame; returns its manifest fields."""
    latent, embed = f"video_latents/{stem}.safetensors", f"prompt_embeds/{stem}.safetensors"
    save_file({"moments": random_moments(size, generator)}, out / latent)
    save_file({"prompt_embeds": torch.randn(text_shape, generator=generator)}, out / embed)
    image = f"image_latents/{stem}.safetensors"
    variants = [random_moments((1, *size[1:]), generator) for _ in range(2)]
    save_file({"moments": torch.stack(variants)}, out / image)
    return {"prompt_embed": embed, "video": f"videos/{stem}.mp4", "video_latent": latent, "image_latent": image}


def write_dataset(out, num_clips, frames, height, width, text_shape=(226, 4096), seed=0):
    """Write `num_clips` random clips to the folder `out`; the videos named in the manifest do not exist.

    `frames` may be a list, which the clips cycle through.
    """
    out, counts = Path(out), [frames] if isinstance(frames, int) else frames
    sizes = [latent_size(count, height, width) for count in counts]
    for folder in ("video_latents", "prompt_embeds", "image_latents"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(num_clips):
        metadata = {"num_frames": counts[index % len(counts)], "height": height, "width": width}
        fields = write_clip_files(out, f"random_{index:05d}", sizes[index % len(sizes)], text_shape, generator)
        rows.append({"prompt": f"random clip number {index}", **fields, "metadata": metadata})
    empty = {"prompt_embeds": torch.randn(text_shape, generator=generator)}
    save_file(empty, out / "prompt_embeds" / "_empty.safetensors")
    (out / "prompts.txt").write_text("".join(row["prompt"] + "\n" for row in rows))
    (out / "videos.txt").write_text("".join(row["video"] + "\n" for row in rows))
    (out / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main():
    parser = console.Parser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--num_clips", type=int, default=8, help="clips (default: %(default)s)")
    parser.add_argument(
        "--frames",
        type=int,
        nargs="+",
        default=[49],
        help="pixel frames of a clip, 4k+1; of several numbers clips take one each in turn",
    )
    parser.add_argument("--height", type=int, default=480, help="pixel height (default: %(default)s)")
    parser.add_argument("--width", type=int, default=720, help="pixel width (default: %(default)s)")
    parser.add_argument("--text_length", type=int, default=226, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--text_width", type=int, default=4096, help="width of an embedding (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random numbers (default: %(default)s)")
    args = parser.parse_args()
    text_shape = (args.text_length, args.text_width)
    try:
        write_dataset(args.out, args.num_clips, args.frames, args.height, args.width, text_shape, args.seed)
    except ValueError as error:
        parser.error(str(error))
    frames = " or ".join(map(str, args.frames))
    print(f"{args.num_clips} random clips of {frames}x{args.height}x{args.width}: {args.out}")


if __name__ == "__main__":
    main()
