"""Exceptions that end a script with one line on stderr and a documented exit code instead of a traceback."""

import contextlib
import os
import sys
import tempfile
import traceback
from pathlib import Path


# Exit codes, where possible those of sysexits.h; 0 is success
REFUSED, BAD_DATA, INTERNAL, STORAGE, INTERRUPTED = 2, 65, 70, 74, 75
ERROR_LOG_VARIABLE = (
    "COGVIDEOX_ERROR_LOG"  # path for `log_traceback`; an environment variable, so data workers inherit it
)


class UserError(Exception):
    """A problem that the user can fix. `str(error)` is the whole line shown: file, row, what is wrong, what to do."""

    exit_code = INTERNAL


class UsageError(UserError):
    """Flags that contradict each other, the machine, or the contents of the output folder."""

    exit_code = REFUSED


class DataError(UserError):
    """Bad input data: a missing video, a corrupt clip, captions that do not match."""

    exit_code = BAD_DATA


class NumbersError(UserError):
    """Training produced NaN or infinity."""

    exit_code = INTERNAL


class MemoryFullError(UserError):
    """The run does not fit into memory."""

    exit_code = INTERNAL


class StorageError(UserError):
    """The disk is full or not writable."""

    exit_code = STORAGE


class Interrupted(UserError):
    """Stopped on request; the same command resumes."""

    exit_code = INTERRUPTED


def first_line(error: Exception) -> str:
    """The first line of a library's error message, or its type if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def named_line(error: Exception) -> str:
    """`first_line` after the error's class, for errors of any kind: `KeyError: 'x'`."""
    kind, line = type(error).__name__, first_line(error)
    return line if line == kind else f"{kind}: {line}"


MAX_LISTED = 5  # items listed in an error; the rest are only counted


def first_few(items: list[str]) -> str:
    """`a, b, c` or `a, b, c, d, e and 7 more (12 in all)`."""
    if len(items) <= MAX_LISTED:
        return ", ".join(items)
    return f"{', '.join(items[:MAX_LISTED])} and {len(items) - MAX_LISTED} more ({len(items)} in all)"


def log_traceback() -> Path:
    """Append the current traceback to the run's errors.log; returns its path, to be named in the error line."""
    path = Path(os.environ.get(ERROR_LOG_VARIABLE, ""))
    if not path.name or not path.parent.is_dir():
        path = Path(tempfile.gettempdir(), "cogvideox-errors.log")
    with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:
        file.write(traceback.format_exc() + "\n")
    return path


def print_to_pipe(text: str) -> None:
    """Print to stdout; a closed pipe, as with `| head`, is not an error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout again at exit
