"""Captions clips: many at once, each asked again until its answer is a caption."""

import asyncio
import base64
import json
import logging
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from base.bars import progress
from base.errors import DataError, UsageError
from data.caption_files import AnswerFile, Key
from data.caption_rules import FRAMES_NOTE, STILL_NOTE, Limit, as_caption, find_fault, question
from data.frame_images import Shown
from run.chat_server import ChatServer, RequestRefused


logger = logging.getLogger(__name__)

MAX_ANSWERS = 4  # to one clip, before it is given up
RETRY_TEMPERATURE = 0.7  # the first answer is the most likely one, others have to differ
NUM_HOPELESS = 20  # the run ends when so many clips at its start all get no caption


class Job(NamedTuple):
    """A clip to ask about: `name` is for messages."""

    key: Key
    name: str
    video: str
    prompt: str
    notes: tuple[str, ...]


class Asking(NamedTuple):
    """How clips are asked about; `show`: path -> Shown."""

    show: Callable[[str], Shown]
    limit: Limit
    trigger: str | None


class GivenUp(Exception):
    """A clip that gets no caption, with the reason."""


async def caption_clips(
    server: ChatServer, asking: Asking, jobs: list[Job], answers: AnswerFile, concurrency: int
) -> dict[Key, str]:
    """{key: why there is no caption} of the clips that got none; the captions are in `answers`."""
    problems: dict[Key, str] = {}
    waiting = iter(jobs)
    with progress(len(jobs), "captions") as bar:

        async def work() -> None:
            for job in waiting:  # shared: what is held in memory is what is being asked
                try:
                    answers.keep(job.key, await caption_clip(server, asking, job), job.name)
                except GivenUp as error:
                    problems[job.key] = f"{job.name}: {error}"
                    refuse_hopeless(problems, int(bar.n) + 1, len(jobs))
                bar.update()

        await run_all([work() for _ in range(min(concurrency, len(jobs)))])
    return problems


async def run_all(workers: list) -> None:
    """Run coroutines until all are done or one raises, which ends the others."""
    tasks = [asyncio.ensure_future(worker) for worker in workers]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def refuse_hopeless(problems: dict[Key, str], num_done: int, num_jobs: int) -> None:
    """UsageError once none of the first NUM_HOPELESS clips has got a caption: it is not about the clips."""
    if len(problems) == num_done == NUM_HOPELESS < num_jobs:
        raise UsageError(
            f"none of the first {NUM_HOPELESS} clips got a caption: {next(iter(problems.values()))}; is the model one that "
            "sees, and are the flags right for it?"
        )


async def caption_clip(server: ChatServer, asking: Asking, job: Job) -> str:
    """The clip's caption. GivenUp if it cannot be shown, or none of MAX_ANSWERS answers is one."""
    try:
        shown = await asyncio.to_thread(asking.show, job.video)
    except (DataError, OSError) as error:
        raise GivenUp(str(error).removeprefix(f"{job.video}: ")) from error
    parts = await asyncio.to_thread(lambda: [media_part(*file) for file in shown.files])
    fault = None
    for number in range(MAX_ANSWERS):
        advice = [fault.advice] if fault else []
        text = question(job.prompt, [note_on(shown), *job.notes, *advice])
        make_body = partial(request_body, job.key.model, parts, text, asking.limit, RETRY_TEMPERATURE * (number > 0))
        try:
            reply = await server.ask(await asyncio.to_thread(make_body))
        except RequestRefused as error:
            raise GivenUp(str(error)) from error
        fault = find_fault(reply.text, reply.is_cut, reply.is_refused, asking.limit, asking.trigger)
        if fault is None:
            return as_caption(reply.text)
        logger.debug("%s: %s", job.name, fault.what)
    raise GivenUp(f"{MAX_ANSWERS} answers and no caption, the last one {fault.what}")


def note_on(shown: Shown) -> str:
    """What the question says of the files; nothing of a video."""
    if not shown.seconds:
        return STILL_NOTE
    is_video = not shown.files[0][0].startswith("image/")
    return "" if is_video else FRAMES_NOTE.format(count=len(shown.files), seconds=shown.seconds)


def media_part(media_type: str, content: bytes) -> dict:
    kind = "image_url" if media_type.startswith("image/") else "video_url"  # the second is vLLM's and others'
    return {"type": kind, kind: {"url": f"data:{media_type};base64,{base64.b64encode(content).decode()}"}}


def request_body(model: str, parts: list[dict], text: str, limit: Limit, temperature: float) -> bytes:
    """A chat completion's body. Far more tokens are allowed than are asked for: only a runaway answer is cut."""
    content = [*parts, {"type": "text", "text": text}]
    body = {"model": model, "messages": [{"role": "user", "content": content}], "temperature": temperature}
    return json.dumps(body | {"max_tokens": max(256, 4 * limit.words)}).encode()
