"""Reads the headers of new clips in a process of its own while the script imports its libraries.

What it has read when it is asked to end is in the headers' cache, and that is all it does: what it could not list or
read, the script reads itself, and says what is wrong.
"""

import contextlib
import ctypes
import logging
import os
from typing import NamedTuple


M_TOP_PAD, PAD_BYTES = -2, 2**26  # mallopt's


class Reader(NamedTuple):
    process: object
    end: object  # a connection: anything sent to it ends the process


READERS: list[Reader] = []  # one, until it has ended


def start_from_args(args, uses_cache: bool = True) -> None:
    """Begin to read the clips that `args` names: before anything starts threads, which a fork would not have."""
    if not uses_cache or getattr(args, "load_tensors", False) or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    from multiprocessing import get_context  # --help does without

    fork = get_context("fork")
    asked, end = fork.Pipe(duplex=False)
    process = fork.Process(target=read_until_asked, args=(args, asked), daemon=True)
    process.start()
    READERS.append(Reader(process, end))


def finish() -> None:
    """Have what was read so far written to the cache; at once if nothing is being read."""
    while READERS:
        reader = READERS.pop()
        with contextlib.suppress(BrokenPipeError):  # it has read everything
            reader.end.send(None)
        reader.process.join()


def read_until_asked(args, asked) -> None:
    from base.errors import UserError
    from base.signals import ignore_group_signals
    from data.clip_lists import read_clips_from_args
    from data.header_cache import HeaderCache, header_or_error
    from data.headers import Header

    ignore_group_signals()
    os.nice(5)  # where cores are few, the imports go first
    keep_freed_memory()
    logging.disable(logging.CRITICAL)  # the script says all that there is to say
    with contextlib.suppress(UserError), HeaderCache() as cache:
        paths = dict.fromkeys(os.fspath(clip.video) for clip in read_clips_from_args(args))
        for path in paths:
            if asked.poll():
                return
            if cache.find(path) is None and isinstance(header := header_or_error(path), Header):
                cache.add(path, header)


def keep_freed_memory() -> None:
    """In a small process, glibc gives what FFmpeg frees back to the system after each file: a quarter of the time."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_TOP_PAD, PAD_BYTES)
