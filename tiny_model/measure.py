#!/usr/bin/env python
"""Measure with the stock pipelines how well the small model obeys captions that it never saw in training.

    python tiny_model/measure.py --model assets/tiny-cogvideox --image_model assets/tiny-cogvideox-i2v

Prints the VAE's PSNR, the judge's own accuracy, caption accuracy with a confusion table per attribute, and for
image-to-video how well it keeps the first frame and obeys the direction. --json saves the numbers.
"""

import argparse
import json
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from base import console


if __name__ == "__main__":
    console.set_up()  # before the libraries are imported

import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline

from judge import accuracy, confusion, judge
from world import (
    ATTRIBUTES,
    CONCEPTS,
    MEASURED,
    NUM_FRAMES,
    SIZE,
    caption,
    draw_clips,
    draw_geometry,
    render,
    test_contents,
    words_of,
)


STEPS, GUIDANCE = 25, 3.0
TEST_SEED = 1  # for geometry and sampling noise


def psnr(clips: torch.Tensor, others: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB, averaged over clips [B, ...] in 0..1."""
    error = (clips.float().clamp(0, 1) - others.float().clamp(0, 1)).square().flatten(1).mean(1)
    return float((-10 * error.clamp(min=1e-10).log10()).mean())


@torch.no_grad()
def reconstruct(vae, clips: torch.Tensor) -> torch.Tensor:
    """Encode and decode clips [B, F', 3, h, w] in 0..1; the result is on the CPU."""
    pieces = []
    for piece in clips.split(16):
        latents = vae.encode((2 * piece - 1).permute(0, 2, 1, 3, 4).to(vae.device, vae.dtype)).latent_dist.mode()
        pieces.append(vae.decode(latents).sample.permute(0, 2, 1, 3, 4).float().cpu() / 2 + 0.5)
    return torch.cat(pieces).clamp(0, 1)


def measure_vae(vae, contents: list) -> dict[str, float]:
    """PSNR of reconstructions, and the judge's accuracy on them and on the clips themselves."""
    clips = draw_clips(torch.tensor(contents), TEST_SEED)
    rebuilt = reconstruct(vae, clips)
    return {
        "psnr": psnr(rebuilt, clips),
        "caption_of_real": accuracy(judge(clips), contents)["caption"],
        "caption_of_rebuilt": accuracy(judge(rebuilt), contents)["caption"],
    }


def sample(
    pipe,
    prompts: list[str],
    images: torch.Tensor | None = None,
    batch_size: int = 50,
    seed: int = TEST_SEED,
    **options,
) -> torch.Tensor:
    """Clips [B, F', 3, h, w] in 0..1 on the CPU, sampled by a stock pipeline; noise depends on (seed, place)."""
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, **options}
    pipe.set_progress_bar_config(disable=True)
    clips = []
    for start in range(0, len(prompts), batch_size):
        places = range(start, min(start + batch_size, len(prompts)))
        generators = [torch.Generator().manual_seed(10000 * seed + place) for place in places]
        more = {} if images is None else {"image": images[places.start : places.stop]}
        result = pipe(
            prompt=prompts[places.start : places.stop], num_frames=NUM_FRAMES, height=SIZE, width=SIZE,
            generator=generators, output_type="pt", **more, **options,
        )  # fmt: skip
        clips.append(result.frames.float().cpu())
    return torch.cat(clips)


def captions_of(contents: list) -> list[str]:
    return [caption(row, wording) for wording, row in enumerate(contents)]  # cycles through the wordings


def first_frames(contents: list) -> torch.Tensor:
    """[B, 3, h, w] with the shape in the middle, so that the frame does not reveal the direction."""
    rows = torch.tensor(contents)
    geometry = draw_geometry(rows, torch.Generator().manual_seed(TEST_SEED))
    middle = SIZE / 2 + 4 * (torch.rand(len(rows), 2, generator=torch.Generator().manual_seed(TEST_SEED)) - 0.5)
    return render(rows, geometry._replace(start=middle, end=middle), num_frames=1)[:, 0]


def measure_image_to_video(pipe, contents: list, **options) -> dict[str, float]:
    """PSNR of frame 0 and caption accuracy, on slow clips: only these can start in the middle."""
    slow = ATTRIBUTES["speed"].index("slowly")
    contents = [(*row[:3], slow, *row[4:]) for row in contents]
    images = first_frames(contents)
    clips = sample(pipe, captions_of(contents), images, **options)
    return {"psnr_of_first_frame": psnr(clips[:, 0], images), **accuracy(judge(clips), contents)}


def score_line(scores: dict[str, float]) -> str:
    return "  ".join(
        f"{name} {value:.1f} dB" if "psnr" in name else f"{name} {value:.0%}" for name, value in scores.items()
    )


def parse_args(argv=None) -> argparse.Namespace:
    parser = console.Parser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("assets/tiny-cogvideox"))
    parser.add_argument("--image_model", type=Path, help="the image-to-video folder; none: not measured")
    parser.add_argument("--lora", type=Path, help="folder of a LoRA to load into --model")
    parser.add_argument(
        "--concept", choices=CONCEPTS, help="measure captions of this concept, not of what the model knows"
    )
    parser.add_argument("--num_clips", type=int, default=100)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, nargs="+", default=[GUIDANCE], help="several: each is measured")
    parser.add_argument(
        "--max_sequence_length", type=int, default=226, help="text tokens; the small model takes 32 too"
    )
    parser.add_argument("--json", type=Path, help="file for the numbers")
    args = parser.parse_args(argv)
    check_pipeline(parser, args.model)
    if args.image_model:
        check_pipeline(parser, args.image_model)
    return args


def check_pipeline(parser: argparse.ArgumentParser, folder: Path) -> None:
    """One-line usage error in place of diffusers' traceback."""
    if not (folder / "model_index.json").exists():
        parser.error(f"{folder}: no pipeline is in it; tiny_model/pretrain.py writes one")


def main() -> None:
    args = parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    contents = test_contents(args.num_clips, args.concept)
    pipe = CogVideoXPipeline.from_pretrained(args.model, dtype=torch.float32).to(device)
    if args.lora:
        pipe.load_lora_weights(args.lora)
    numbers = {"vae": measure_vae(pipe.vae, contents)}
    print("VAE:", score_line(numbers["vae"]))
    options = {"num_inference_steps": args.steps, "max_sequence_length": args.max_sequence_length}
    for guidance in args.guidance:
        started = time.monotonic()
        verdicts = judge(sample(pipe, captions_of(contents), guidance_scale=guidance, **options))
        numbers[f"guidance {guidance}"] = accuracy(verdicts, contents)
        print(
            f"\nguidance {guidance}: {score_line(accuracy(verdicts, contents))} ({time.monotonic() - started:.0f} s)"
        )
        for name in ATTRIBUTES if guidance == args.guidance[-1] else ():
            print(confusion(verdicts, contents, name))
    wrong = [
        words_of(row)
        for found, row in zip(verdicts, contents, strict=True)
        if any(found[n] != words_of(row)[n] for n in MEASURED)
    ]
    print("\nnot as the caption says:", *(" ".join(row.values()) for row in wrong), sep="\n  ")
    if args.image_model:
        pipe = CogVideoXImageToVideoPipeline.from_pretrained(args.image_model, dtype=torch.float32).to(device)
        for guidance in args.guidance:
            numbers[f"image_to_video {guidance}"] = measure_image_to_video(
                pipe, contents, guidance_scale=guidance, **options
            )
            print(f"\nimage-to-video, guidance {guidance}:", score_line(numbers[f"image_to_video {guidance}"]))
    if args.json:
        args.json.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
