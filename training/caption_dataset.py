#!/usr/bin/env python
"""Caption clips with a vision-language model behind an OpenAI-compatible server, such as vLLM's.

python training/caption_dataset.py --data_root my-clips --base_url http://localhost:8000/v1 \\
    --pretrained_model_name_or_path zai-org/CogVideoX-2b

Writes prompts.txt, videos.txt and metadata.jsonl, which training and prepare_dataset.py read. Every answer is kept in
captions.jsonl as it comes: a second run of the same command asks only about what is missing or has changed, and leaves
captions that were edited. Clips that get no caption are named and left out; exit code 65.
"""

from args import parse_caption_args
from base import console, startup


if __name__ == "__main__":  # before the heavy imports: --help answers at once
    ARGS = parse_caption_args()
    console.set_up(ARGS.verbose)
    startup.expect_imports()

import asyncio
import contextlib
import logging
from functools import partial
from pathlib import Path

from transformers import AutoTokenizer

from base.bars import with_progress
from base.errors import DataError, UsageError
from base.files import forget_undo, lock_folder, make_folder, remove_unfinished
from base.hashes import HashCache
from base.status import begin_run, write_status
from cogvideox.config import CONFIGS, read_config, text_length
from cogvideox.folder import resolve_model_dir
from data import caption_files
from data.caption_files import AnswerFile, Key, text_hash
from data.caption_rules import (
    CAPTION_NOTE,
    FILE_NOTE,
    PROMPT,
    Limit,
    caption_fault,
    word_limit,
    words_to_ask_for,
)
from data.clip_lists import Clip, clips_in_layout, draw_keys, find_root, with_id_token
from data.frame_images import show_frames, show_video
from data.tables import read_text
from data.uncaptioned import find_clips, find_unlisted
from run.caption_clips import Asking, Job, caption_clips
from run.chat_server import ChatServer
from run.exits import run_script


logger = logging.getLogger(__name__)

RESUME_ADVICE = "every answer so far is kept, and the same command asks for the others"
MAX_TOKENS = 226  # T5 tokens of a caption, for CogVideoX 1.0


def main(args) -> None:
    # ---------------------------------------------------------------- clips, and what is known of them
    output_dir = claim_output_dir(args)
    clips = read_clips(args, output_dir)
    names = caption_files.names_in(clips, is_in_place(args))
    edits = caption_files.read_edits(output_dir)
    captions = known_captions(args, clips, names, edits)
    num_given, problems = len(captions), {}

    # ---------------------------------------------------------------- the others are asked for
    asking = make_asking(args)
    todo = [index for index in range(len(clips)) if index not in captions]
    if todo:
        with contextlib.closing(AnswerFile(output_dir)) as answers:
            found, problems = asyncio.run(ask(args, asking, clips, names, todo, answers))
        captions |= {index: with_id_token(caption, args.trigger) for index, caption in found.items()}

    # ---------------------------------------------------------------- lists
    done = sorted(captions)
    accept(output_dir)
    if done:
        if not is_in_place(args):
            caption_files.link_clips([clips[index] for index in done], [names[index] for index in done], output_dir)
        caption_files.write_lists(output_dir, [(names[index], captions[index]) for index in done], edits)
    logger.info(
        "%s: %d clips: %d captions of the model, %d others as they were, %d clips left out",
        output_dir, len(clips), len(done) - num_given, num_given, len(problems),
    )  # fmt: skip
    report(output_dir, len(clips), list(problems.values()))
    write_status(output_dir, "complete", 0)


# ---------------------------------------------------------------- set-up


def folder_of(args) -> Path:
    return Path(args.output_dir or args.data_root)


def is_in_place(args) -> bool:
    return folder_of(args).resolve() == Path(args.data_root).resolve()


def replaces_captions(args) -> bool:
    return args.recaption or args.context == "caption"


def claim_output_dir(args) -> Path:
    """Create the output folder and lock it until this process ends."""
    root, output_dir = find_root(args.data_root, args.dataset_file), folder_of(args)
    if is_in_place(args) and replaces_captions(args):
        flag = "--recaption" if args.recaption else "--context caption"
        raise UsageError(f"{flag}: captions in --data_root are not written over; give another folder as --output_dir")
    if not is_in_place(args) and output_dir.resolve().is_relative_to(root.resolve()):
        raise UsageError(
            f"--output_dir {output_dir}: is inside of --data_root, whose clips it would add to; give another"
        )
    forget_undo()  # left by an earlier run in this process
    make_folder(output_dir)
    lock_folder(output_dir)
    caption_files.refuse_other_lists(output_dir)
    return output_dir


def accept(output_dir: Path) -> None:
    """The command can be carried out: from here on nothing is undone."""
    forget_undo()
    remove_unfinished(output_dir)
    begin_run(output_dir, is_main_process=True)


def make_asking(args) -> Asking:
    frames = partial(show_frames, num_frames=args.num_frames, max_size=args.max_size)
    show = frames if args.send == "frames" else partial(show_video, max_size=args.max_size)
    return Asking(show, caption_limit(args), args.trigger)


def caption_limit(args) -> Limit:
    """In tokens of the model's own tokenizer, or without a model in words."""
    model = args.pretrained_model_name_or_path
    if model is None:
        return word_limit(args.max_tokens or MAX_TOKENS)
    folder, length = Path(model), MAX_TOKENS
    if not (folder / "tokenizer_config.json").is_file():
        model_dir = resolve_model_dir(model, [*CONFIGS, "tokenizer"], args.revision, args.cache_dir)
        folder, length = model_dir / "tokenizer", text_length(read_config(model_dir, "transformer"))
    tokenizer, most = AutoTokenizer.from_pretrained(folder), args.max_tokens or length
    return Limit(most, "tokens", lambda text: len(tokenizer(text, verbose=False).input_ids), words_to_ask_for(most))


# ---------------------------------------------------------------- clips


def read_clips(args, output_dir: Path) -> list[Clip]:
    """The clips of --data_root, captioned or not."""
    root = find_root(args.data_root, args.dataset_file)
    is_found = args.dataset_file is None
    if is_in_place(args):
        if not is_found or args.video_column or args.caption_column:
            raise UsageError("a list of clips is not written over: give an --output_dir other than --data_root")
        own_files = caption_files.OWN_FILES if caption_files.has_own_lists(output_dir) else {caption_files.ANSWERS}
        layout = find_unlisted(root, own_files)
    else:
        layout = find_clips(root, args.dataset_file, args.caption_column, args.video_column)
    clips = clips_in_layout(root, layout, is_found, args.allow_outside_root, blank_captions=True)
    logger.info("%s: found %s: %d clips, %s", root, layout.name, len(clips), layout.columns)
    if any(clip.repeats > 1 for clip in clips):
        logger.warning("%s: how often clips are repeated is not taken over", layout.listing)
    if broken := [clip for clip in clips if "\n" in clip.source or "\r" in clip.source]:
        raise DataError(f"{root}: {broken[0].source!r}: a path with a line break cannot be listed; rename the file")
    return clips


def known_captions(args, clips: list[Clip], names: list[str], edits: dict[str, str]) -> dict[int, str]:
    """{index: caption} of clips that are not asked about: edited ones, and those that the data has."""
    known = {}
    for index, (clip, place) in enumerate(zip(clips, draw_keys(names), strict=True)):
        if place in edits:
            known[index] = edits[place]
        elif clip.prompt.strip() and not replaces_captions(args):
            known[index] = caption_files.one_line(clip.prompt)
    if args.context == "caption" and not any(clip.prompt.strip() for clip in clips):
        logger.warning("--context caption: no clip has a caption")
    return known


# ---------------------------------------------------------------- questions


async def ask(
    args, asking: Asking, clips: list[Clip], names: list[str], todo: list[int], answers: AnswerFile
) -> tuple[dict[int, str], dict[int, str]]:
    """({index: caption}, {index: why there is none}) of the clips of `todo`, without the trigger."""
    prompt = question_from_args(args, asking.limit)
    async with ChatServer(args.base_url, args.api_key_env, args.timeout, args.max_wait) as server:
        model = args.model or await server.only_model()
        accept(folder_of(args))
        jobs, problems = make_jobs(args, model, prompt, clips, names, todo)
        missing = {job.key: job for job in jobs.values() if not is_kept(answers, job.key, asking)}
        logger.info("%d answers are kept, %s is asked for %d", len(jobs) - len(missing), model, len(missing))
        failed = await caption_clips(server, asking, list(missing.values()), answers, args.concurrency)
    problems |= {index: failed[job.key] for index, job in jobs.items() if job.key in failed}
    return {index: answers.known[job.key] for index, job in jobs.items() if job.key not in failed}, problems


def question_from_args(args, limit: Limit) -> str:
    if args.prompt_file is None:
        return PROMPT.format(words=limit.words)
    text = read_text(Path(args.prompt_file)).strip()
    if not text:
        raise UsageError(f"--prompt_file {args.prompt_file}: is blank")
    return text


def make_jobs(
    args, model: str, prompt: str, clips: list[Clip], names: list[str], todo: list[int]
) -> tuple[dict[int, Job], dict[int, str]]:
    """({index: what is asked}, {index: why the file cannot be read}). Clips asked alike share a key."""
    jobs, problems = {}, {}
    shown = [args.send, args.max_size, *([args.num_frames] if args.send == "frames" else [])]
    with HashCache() as hashes:
        for index in with_progress(todo, "comparing", delay=5):
            clip, note = clips[index], note_from_args(args, clips[index])
            try:
                content = hashes.hash(clip.video)
            except OSError as error:  # a bad sector, or a clip deleted since
                problems[index] = f"{names[index]}: cannot be read ({error.strerror})"
                continue
            key = Key(content, model, text_hash(prompt, note, *shown))
            jobs[index] = Job(key, names[index], str(clip.video), prompt, (note,))
    return jobs, problems


def note_from_args(args, clip: Clip) -> str:
    """What --context adds to the question about a clip."""
    if args.context == "file_name":
        return FILE_NOTE.format(text=clip.video.stem)
    return CAPTION_NOTE.format(text=clip.prompt) if args.context == "caption" and clip.prompt.strip() else ""


def is_kept(answers: AnswerFile, key: Key, asking: Asking) -> bool:
    """Whether there is an answer that these flags would take."""
    caption = answers.known.get(key)
    return caption is not None and caption_fault(caption, asking.limit, asking.trigger) is None


def report(output_dir: Path, num_clips: int, problems: list[str]) -> None:
    """DataError if any clip is left out."""
    for line in problems:
        logger.warning("left out: %s", line)
    if problems:
        named = "; ".join(problems[:5]) + ("; ..." if len(problems) > 5 else "")
        others = "" if len(problems) == num_clips else f", the others are in {output_dir}"
        raise DataError(f"{len(problems)} of {num_clips} clips got no caption{others}: {named}")


if __name__ == "__main__":
    run_script(lambda: main(ARGS), folder_of(ARGS), RESUME_ADVICE)
