#!/usr/bin/env python
"""Show and measure what fine-tuning taught the small model: the same captions and noise before and after.

    python tiny_model/compare.py --concept pink --lora outputs/teach/run --out outputs/teach

Writes an animated contact sheet of the concept's captions (before, after, obeyed or not) and a video of the first
ones; prints accuracies on new captions of the concept and on captions of what the model knew. Exit code 1 if the
accuracy is below --at_least.
"""

import argparse
import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from base import console


if __name__ == "__main__":
    console.set_up()  # before the libraries are imported

import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel

from contact_sheet import Row, draw_sheet, save_sheet
from judge import accuracy, confusion, judge, mistakes
from measure import GUIDANCE, STEPS, captions_of, check_pipeline, sample, score_line
from networks import TEXT_LENGTH
from world import CONCEPTS, FPS, test_contents


def load_pipelines(model: Path, lora: Path | None, transformer: Path | None) -> tuple:
    """(pipeline of the base model, pipeline with the LoRA or the transformer from a run's output folder)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before = CogVideoXPipeline.from_pretrained(model, dtype=torch.float32)
    parts = {}
    if transformer:
        parts["transformer"] = CogVideoXTransformer3DModel.from_pretrained(
            transformer, subfolder="transformer", dtype=torch.float32
        )
    after = CogVideoXPipeline.from_pretrained(model, dtype=torch.float32, **parts)
    if lora:
        after.load_lora_weights(lora)
    return before.to(device), after.to(device)


def write_video(path: Path, before: torch.Tensor, after: torch.Tensor) -> None:
    """Write a video with before above after, one column per prompt."""
    from make_clips import encode_video

    clips = torch.stack([before, after])  # [2, B, F', 3, h, w]
    frames = (clips * 255).round().byte().permute(2, 0, 4, 1, 5, 3).flatten(3, 4).flatten(1, 2)  # [F', 2h, Bw, 3]
    encode_video(path, frames.contiguous().numpy(), FPS)


def summary(numbers: dict[str, dict[str, float]], concept: str, num_clips: int) -> str:
    """Captions obeyed before and after, one sentence per set."""
    obeyed = {name: round(scores["caption"] * num_clips) for name, scores in numbers.items()}
    sentence = "{what}: {before} of {count} obeyed before, {after} after"
    return "\n".join(
        sentence.format(what=what, before=obeyed[f"{name} before"], after=obeyed[f"{name} after"], count=num_clips)
        for name, what in ((concept, f"new captions with {concept!r}"), ("known", "captions of what the model knew"))
    )


def rows_of(contents: list, clips: list, verdicts: list) -> list[Row]:
    """The sheet's rows; `clips` and `verdicts` are (before, after)."""
    rows = zip(contents, captions_of(contents), zip(*clips, strict=True), zip(*verdicts, strict=True), strict=True)
    return [Row(text, both, tuple(mistakes(found, row) for found in pair)) for row, text, both, pair in rows]


def title_of(concept: str, rows: list[Row]) -> str:
    before, after = (sum(not row.wrong[side] for row in rows) for side in (0, 1))
    count = len(rows)
    return f"New captions with {concept!r}: {before} of {count} obeyed before training, {after} of {count} after"


def parse_args(argv=None) -> argparse.Namespace:
    parser = console.Parser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("assets/tiny-cogvideox"))
    parser.add_argument("--lora", type=Path, help="folder of the LoRA")
    parser.add_argument("--transformer", type=Path, help="output folder of full fine-tuning")
    parser.add_argument("--concept", choices=CONCEPTS, required=True)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the contact sheet, the video and numbers.json"
    )
    parser.add_argument("--num_clips", type=int, default=12, help="of the concept, and as many of what was known")
    parser.add_argument("--num_shown", type=int, default=6, help="of the concept, in the video")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--max_sequence_length", type=int, default=TEXT_LENGTH, help="text tokens, as in training")
    parser.add_argument("--at_least", type=float, help="accuracy on the concept's captions under which to fail")
    args = parser.parse_args(argv)
    if bool(args.lora) == bool(args.transformer):
        parser.error("give --lora or --transformer")
    check_pipeline(parser, args.model)
    return args


def main(argv=None) -> None:
    args = parse_args(argv)
    pipes = dict(zip(("before", "after"), load_pipelines(args.model, args.lora, args.transformer), strict=True))
    sets = {args.concept: test_contents(args.num_clips, args.concept), "known": test_contents(args.num_clips)}
    options = {
        "num_inference_steps": args.steps, "guidance_scale": args.guidance,
        "max_sequence_length": args.max_sequence_length,
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    numbers, clips, verdicts = {}, {}, {}
    for name, contents in sets.items():
        for when, pipe in pipes.items():
            clips[name, when] = sample(pipe, captions_of(contents), **options)
            verdicts[name, when] = judge(clips[name, when])
            numbers[f"{name} {when}"] = accuracy(verdicts[name, when], contents)
            print(f"{name} {when}: {score_line(numbers[f'{name} {when}'])}")
        if name == args.concept:
            print(confusion(verdicts[name, when], contents, CONCEPTS[name]))
    both = [(args.concept, when) for when in pipes]
    rows = rows_of(sets[args.concept], [clips[key] for key in both], [verdicts[key] for key in both])
    save_sheet(draw_sheet(title_of(args.concept, rows), rows), args.out / "contact_sheet.webp")
    write_video(args.out / "before_and_after.mp4", *(clips[key][: args.num_shown] for key in both))
    (args.out / "numbers.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    print(summary(numbers, args.concept, args.num_clips))
    learned = numbers[f"{args.concept} after"]["caption"]
    if args.at_least and learned < args.at_least:
        sys.exit(
            f"error: {learned:.0%} of the captions of {args.concept} are obeyed, and {args.at_least:.0%} were expected"
        )


if __name__ == "__main__":
    main()
