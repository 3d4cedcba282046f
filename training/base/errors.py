"""Errors that end a script: one clear line on stderr and a documented exit code, never a traceback."""

import contextlib
import os
import sys
import tempfile
import traceback
from pathlib import Path


# Exit codes, where it has one those of sysexits.h; 0 is done
REFUSED, BAD_DATA, INTERNAL, STORAGE, INTERRUPTED = 2, 65, 70, 74, 75
ERROR_LOG = "COGVIDEOX_ERROR_LOG"  # where `keep_trace` writes: in the environment, so that data workers know it too


class UserError(Exception):
    """A problem that the user can mend. `str(error)` is the whole line shown: file, row, what is wrong, what to do."""

    exit_code = INTERNAL


class UsageError(UserError):
    """Flags that contradict one another, the machine, or what lies in the output folder."""

    exit_code = REFUSED


class DataError(UserError):
    """Bad input data: a missing video, a corrupt clip, captions that do not match."""

    exit_code = BAD_DATA


class NumbersError(UserError):
    """Training left the finite numbers."""

    exit_code = INTERNAL


class MemoryFullError(UserError):
    """The GPU's memory does not hold the run."""

    exit_code = INTERNAL


class StorageError(UserError):
    """The disk is full or cannot be written."""

    exit_code = STORAGE


class Interrupted(UserError):
    """Asked to stop, and stopped where the same command continues."""

    exit_code = INTERRUPTED


def first_line(error: Exception) -> str:
    """What an error of a library says, for a line of ours."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def named_line(error: Exception) -> str:
    """The same with the error's kind, where any kind may come: `KeyError: 'x'`."""
    kind, line = type(error).__name__, first_line(error)
    return line if line == kind else f"{kind}: {line}"


NAMED = 5  # items that an error lists before it only counts


def first_few(items: list[str]) -> str:
    """`a, b, c` or `a, b, c, d, e and 7 more (12 in all)`."""
    if len(items) <= NAMED:
        return ", ".join(items)
    return f"{', '.join(items[:NAMED])} and {len(items) - NAMED} more ({len(items)} in all)"


def keep_trace() -> Path:
    """Append the traceback of the error at hand to the run's errors.log, for a line that names it; returns its path."""
    path = Path(os.environ.get(ERROR_LOG, ""))
    if not path.name or not path.parent.is_dir():
        path = Path(tempfile.gettempdir(), "cogvideox-errors.log")
    with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:
        file.write(traceback.format_exc() + "\n")
    return path


def print_to_pipe(text: str) -> None:
    """Print to stdout; a reader that has closed it, as `| head` does, is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where Python flushes at its end
