"""What reaches the console: the project's own lines, every error, and nothing else unless --verbose asks for it.

Libraries write a dozen lines while they are imported, so this is in force before they are: it needs nothing but Python.
What they say below an error is kept, to be shown before the traceback of an internal error.
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
NUM_KEPT = 60  # lines

# What libraries ask the environment; where the user has set one of these it stays
QUIET = {
    # Any text turns a library's bars off; this one, inherited by other processes too, is told from a user's own
    "TQDM_DISABLE": "libraries",
    "TOKENIZERS_PARALLELISM": "false",  # one caption at a time has no use for it, and it warns in forked data workers
    "TF_CPP_MIN_LOG_LEVEL": "3",  # tensorboard imports TensorFlow wherever that is installed
    "WANDB_QUIET": "true",
    "WANDB_SHOW_INFO": "false",
    "WANDB_SHOW_WARNINGS": "false",
}
# The C++ of torch. With several processes c10d's warnings stay: they alone explain a wrong MASTER_ADDR
QUIET_ALONE = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
# Who sets one of these asks for that library's log, on the console or in files
LOG_VARIABLES = {
    "torch": ("TORCH_LOGS", "TORCH_TRACE", "TORCH_COMPILE_DEBUG"),
    "transformers": ("TRANSFORMERS_VERBOSITY",),
    "diffusers": ("DIFFUSERS_VERBOSITY",),
    "huggingface_hub": ("HF_HUB_VERBOSITY",),
    "accelerate": ("ACCELERATE_LOG_LEVEL",),
}
# Of warnings: a run that is worse or slower than the user thinks
ALWAYS_SHOWN = (
    "CUDA initialization",  # a driver that torch cannot use; what follows speaks only of a machine without a GPU
    "recompile_limit",  # a compiled function runs uncompiled from here on
    "cause the process to hang",  # accelerate, of an old kernel
    "slow or even freeze",  # torch, of more data workers than cores
)


class KeptLines(io.TextIOBase):
    """A stream that remembers its last lines."""

    def __init__(self):
        self.lines: collections.deque[str] = collections.deque(maxlen=NUM_KEPT)
        self.part = ""  # of a line that is still written

    def write(self, text: str) -> int:
        *whole, self.part = (self.part + text).replace("\r", "\n").split("\n")
        self.lines.extend(line for line in whole if line.strip())
        return len(text)

    def take(self) -> list[str]:
        """The lines, which are forgotten."""
        self.write("\n")
        taken = list(self.lines)
        self.lines.clear()
        return taken


KEPT = KeptLines()  # of this process
KEEPER = logging.StreamHandler(KEPT)
KEEPER.setFormatter(logging.Formatter("%(name)s: %(message)s"))
IN_FORCE = False  # whether `set_up` has quieted this process


class GatedLogger(logging.Logger):
    """A logger whose records pass the gate, whatever handlers and levels its library gives it."""

    def __init__(self, name: str, level: int = logging.NOTSET):
        super().__init__(name, level)
        self.addFilter(passes)


class ConsoleHandler(logging.StreamHandler):
    """Lines on stderr that leave a bar whole."""

    def emit(self, record: logging.LogRecord) -> None:
        with beside_bars():
            super().emit(record)


def set_up(verbose: bool = False) -> None:
    """Before anything heavy is imported, in the process of a script: data workers are forked from it."""
    global IN_FORCE
    log_to_stderr()
    if verbose:
        return
    is_alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    for name, value in (QUIET | QUIET_ALONE if is_alone else QUIET).items():
        os.environ.setdefault(name, value)
    logging.setLoggerClass(GatedLogger)
    for logger in all_loggers():
        logger.addFilter(passes)
    IN_FORCE = True
    if not sys.warnoptions:
        logging.captureWarnings(True)


def log_to_stderr() -> None:
    """The project's lines; where logging is set up already it stays."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", handlers=[ConsoleHandler(sys.stderr)])


def log_errors_only() -> None:
    """The first process speaks for all; what libraries say in another still comes to the gate, and is kept there."""
    for handler in logging.root.handlers:
        handler.setLevel(logging.ERROR)


def all_loggers() -> list[logging.Logger]:
    named = list(logging.root.manager.loggerDict.values())  # some only stand in for a parent that nobody asked for
    return [logging.root, *(logger for logger in named if isinstance(logger, logging.Logger))]


def is_quiet() -> bool:
    """Whether `set_up` is in force here."""
    return IN_FORCE


def wants_no_bars() -> bool:
    """Whether the user has turned tqdm's bars off."""
    return os.environ.get("TQDM_DISABLE", "") not in ("", "0", QUIET["TQDM_DISABLE"])


# ---------------------------------------------------------------- the gate


def passes(record: logging.LogRecord) -> bool:
    """Whether a record reaches the console; one that does not is kept."""
    if record.levelno >= logging.ERROR or is_own(record) or is_asked_for(record.name) or is_always_shown(record):
        return True
    KEEPER.handle(record)
    return False


def is_own(record: logging.LogRecord) -> bool:
    return os.path.realpath(record.pathname).startswith(OWN_CODE)


def is_asked_for(logger_name: str) -> bool:
    variables = LOG_VARIABLES.get(logger_name.partition(".")[0], ())
    return any(os.environ.get(name, "0") not in ("", "0") for name in variables)


def is_always_shown(record: logging.LogRecord) -> bool:
    """By the first process, which speaks for all."""
    if record.levelno < logging.WARNING or os.environ.get("RANK", "0") != "0":
        return False
    try:
        message = record.getMessage()
    except (TypeError, ValueError, KeyError):  # a library's mistake, which its own logging call would survive
        message = str(record.msg)
    return any(phrase in message for phrase in ALWAYS_SHOWN)


@contextlib.contextmanager
def capture_prints() -> Iterator[None]:
    """Within, what is printed is kept too: for libraries that print instead of logging."""
    if not is_quiet():
        yield
        return
    try:
        with contextlib.redirect_stdout(KEPT), contextlib.redirect_stderr(KEPT):
            yield
    finally:
        release_handlers()


def release_handlers() -> None:
    """Handlers that libraries made of the captured streams would keep their errors for the rest of the run."""
    for handler in [handler for logger in all_loggers() for handler in logger.handlers]:
        if getattr(handler, "stream", None) is KEPT:
            handler.setStream(sys.stderr)


def dump_kept() -> None:
    """What libraries have said, on stderr: it may explain the error that follows."""
    if lines := KEPT.take():
        print(f"libraries' last messages ({len(lines)}):", *lines, "", sep="\n", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- beside bars


@contextlib.contextmanager
def beside_bars() -> Iterator[None]:
    """On a terminal, bars are taken away for what is written within, and drawn again below it."""
    tqdm = sys.modules.get("tqdm")
    if tqdm is None or not sys.stderr.isatty():
        yield
        return
    with tqdm.tqdm.external_write_mode(file=sys.stderr):
        yield


# ---------------------------------------------------------------- usage


class Parser(argparse.ArgumentParser):
    """Of a small tool, whose docstring is its description: a mistake is one line, with no block of usage before it."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}; --help lists all flags\n")
