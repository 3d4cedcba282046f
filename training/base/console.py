"""Console output: only the project's own lines and all errors, unless --verbose is given.

Libraries already log a dozen lines while they are imported, so `set_up` runs before them and needs nothing but Python.
Their suppressed messages are kept, and printed before the traceback of an internal error.
"""

import argparse
import collections
import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path


OWN_CODE = str(next(folder for folder in Path(__file__).resolve().parents if folder.name == "training")) + os.sep
NUM_SUPPRESSED_LINES = 60  # lines

# Environment variables that quiet libraries; a value set by the user is kept
QUIET = {
    # Any text disables tqdm's bars; this one can be told apart from a user's value, in child processes too
    "TQDM_DISABLE": "libraries",
    "TOKENIZERS_PARALLELISM": "false",  # useless for one caption at a time, and it warns in forked data workers
    "TF_CPP_MIN_LOG_LEVEL": "3",  # tensorboard imports TensorFlow wherever that is installed
    "WANDB_QUIET": "true",
    "WANDB_SHOW_INFO": "false",
    "WANDB_SHOW_WARNINGS": "false",
}
# torch's C++ log, for single-process runs only: c10d's warnings are all that explains a wrong MASTER_ADDR
QUIET_ALONE = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
# If the user sets one of these, that library's log is shown
LOG_VARIABLES = {
    "torch": ("TORCH_LOGS", "TORCH_TRACE", "TORCH_COMPILE_DEBUG"),
    "transformers": ("TRANSFORMERS_VERBOSITY",),
    "diffusers": ("DIFFUSERS_VERBOSITY",),
    "huggingface_hub": ("HF_HUB_VERBOSITY",),
    "accelerate": ("ACCELERATE_LOG_LEVEL",),
}
# Warnings that a run is worse or slower than the user thinks
ALWAYS_SHOWN = (
    "CUDA initialization",  # torch cannot use the driver; later messages only say that there is no GPU
    "recompile_limit",  # a compiled function runs eagerly from here on
    "cause the process to hang",  # accelerate, about an old kernel
    "slow or even freeze",  # torch, about more data workers than cores
)


class LastLines(io.TextIOBase):
    """A text stream that keeps its last NUM_SUPPRESSED_LINES lines."""

    def __init__(self):
        self.lines: collections.deque[str] = collections.deque(maxlen=NUM_SUPPRESSED_LINES)
        self.part = ""  # the unfinished last line

    def write(self, text: str) -> int:
        *whole, self.part = (self.part + text).replace("\r", "\n").split("\n")
        self.lines.extend(line for line in whole if line.strip())
        return len(text)

    def take(self) -> list[str]:
        """Return the lines and forget them."""
        self.write("\n")
        taken = list(self.lines)
        self.lines.clear()
        return taken


SUPPRESSED = LastLines()  # of this process
SUPPRESSED_HANDLER = logging.StreamHandler(SUPPRESSED)
SUPPRESSED_HANDLER.setFormatter(logging.Formatter("%(name)s: %(message)s"))
IS_SET_UP = False  # True once `set_up` has quieted this process


class FilteredLogger(logging.Logger):
    """A logger whose records are filtered by `is_shown`, whatever handlers and levels its library sets."""

    def __init__(self, name: str, level: int = logging.NOTSET):
        super().__init__(name, level)
        self.addFilter(is_shown)


class ConsoleHandler(logging.StreamHandler):
    """Logs to stderr without breaking progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        with bars_cleared():
            super().emit(record)


def set_up(verbose: bool = False) -> None:
    """Quiet the libraries. Call it in the script's process before heavy imports; forked data workers inherit it."""
    global IS_SET_UP
    log_to_stderr()
    if verbose:
        return
    is_alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    for name, value in (QUIET | QUIET_ALONE if is_alone else QUIET).items():
        os.environ.setdefault(name, value)
    logging.setLoggerClass(FilteredLogger)
    for logger in all_loggers():
        logger.addFilter(is_shown)
    IS_SET_UP = True
    if not sys.warnoptions:
        logging.captureWarnings(True)


def log_to_stderr() -> None:
    """Log the project's lines to stderr, unless logging is configured already."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", handlers=[ConsoleHandler(sys.stderr)])


def log_errors_only() -> None:
    """For ranks other than 0. Libraries' records are still filtered and kept, for the traceback of an error."""
    for handler in logging.root.handlers:
        handler.setLevel(logging.ERROR)


def all_loggers() -> list[logging.Logger]:
    named = list(logging.root.manager.loggerDict.values())  # may include PlaceHolders for missing parents
    return [logging.root, *(logger for logger in named if isinstance(logger, logging.Logger))]


def is_quiet() -> bool:
    """Whether `set_up` has quieted this process."""
    return IS_SET_UP


def wants_no_bars() -> bool:
    """Whether the user has turned tqdm's bars off."""
    return os.environ.get("TQDM_DISABLE", "") not in ("", "0", QUIET["TQDM_DISABLE"])


# ---------------------------------------------------------------- the gate


def is_shown(record: logging.LogRecord) -> bool:
    """Logging filter: whether a record reaches the console; the others are kept."""
    if record.levelno >= logging.ERROR or is_own(record) or is_asked_for(record.name) or is_always_shown(record):
        return True
    SUPPRESSED_HANDLER.handle(record)
    return False


def is_own(record: logging.LogRecord) -> bool:
    return os.path.realpath(record.pathname).startswith(OWN_CODE)


def is_asked_for(logger_name: str) -> bool:
    variables = LOG_VARIABLES.get(logger_name.partition(".")[0], ())
    return any(os.environ.get(name, "0") not in ("", "0") for name in variables)


def is_always_shown(record: logging.LogRecord) -> bool:
    """Whether it is a warning of ALWAYS_SHOWN; on rank 0 only, to show it once."""
    if record.levelno < logging.WARNING or os.environ.get("RANK", "0") != "0":
        return False
    try:
        message = record.getMessage()
    except (TypeError, ValueError, KeyError):  # a library's bad format arguments, which logging itself survives
        message = str(record.msg)
    return any(phrase in message for phrase in ALWAYS_SHOWN)


@contextlib.contextmanager
def capture_prints() -> Iterator[None]:
    """Capture stdout and stderr as well, for libraries that print instead of logging."""
    if not is_quiet():
        yield
        return
    try:
        with contextlib.redirect_stdout(SUPPRESSED), contextlib.redirect_stderr(SUPPRESSED):
            yield
    finally:
        release_handlers()


def release_handlers() -> None:
    """Point handlers that libraries created on the captured streams to stderr, or later errors would be hidden."""
    for handler in [handler for logger in all_loggers() for handler in logger.handlers]:
        if getattr(handler, "stream", None) is SUPPRESSED:
            handler.setStream(sys.stderr)


def print_suppressed() -> None:
    """Print the kept lines to stderr: they may explain the error that follows."""
    if lines := SUPPRESSED.take():
        print(f"libraries' last messages ({len(lines)}):", *lines, "", sep="\n", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- beside bars


@contextlib.contextmanager
def bars_cleared() -> Iterator[None]:
    """On a terminal, clear progress bars while the body writes, and redraw them below."""
    tqdm = sys.modules.get("tqdm")
    if tqdm is None or not sys.stderr.isatty():
        yield
        return
    with tqdm.tqdm.external_write_mode(file=sys.stderr):
        yield


# ---------------------------------------------------------------- usage


class Parser(argparse.ArgumentParser):
    """For small tools: the module docstring is the description, and an error is one line without the usage block.

    A flag is written out, so that a typo is not taken for another.
    """

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}; --help lists all flags\n")
