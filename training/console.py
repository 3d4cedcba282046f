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
    "TQDM_DISABLE": "1",  # bars that do not say whether they are shown; the project's own do
    "TOKENIZERS_PARALLELISM": "false",  # one caption at a time has no use for it, and it warns in forked data workers
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # of c10d and NCCL, written by C++
    "TF_CPP_MIN_LOG_LEVEL": "3",  # tensorboard imports TensorFlow wherever that is installed
    "WANDB_QUIET": "true",
    "WANDB_SHOW_INFO": "false",
    "WANDB_SHOW_WARNINGS": "false",
}
# Who sets one of these asks for that library's log (`py`: Python's warnings)
WISHES = {
    "torch": "TORCH_LOGS",
    "transformers": "TRANSFORMERS_VERBOSITY",
    "diffusers": "DIFFUSERS_VERBOSITY",
    "huggingface_hub": "HF_HUB_VERBOSITY",
    "accelerate": "ACCELERATE_LOG_LEVEL",
    "py": "PYTHONWARNINGS",
}
# A driver that torch cannot use: what follows speaks only of a machine without a GPU
SERIOUS = "CUDA initialization"


class KeptLines(io.TextIOBase):
    """A stream that remembers its last lines."""

    def __init__(self):
        self.lines: collections.deque[str] = collections.deque(maxlen=NUM_KEPT)

    def write(self, text: str) -> int:
        self.lines.extend(line for line in text.splitlines() if line.strip())
        return len(text)


KEPT = KeptLines()  # of this process
KEEPER = logging.StreamHandler(KEPT)
KEEPER.setFormatter(logging.Formatter("%(name)s: %(message)s"))


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
    log_to_stderr()
    if verbose:
        return
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    logging.setLoggerClass(GatedLogger)
    for logger in [logging.root, *logging.root.manager.loggerDict.values()]:
        if isinstance(logger, logging.Logger):  # others stand in for a parent that nobody has asked for
            logger.addFilter(passes)
    if not sys.warnoptions:
        logging.captureWarnings(True)


def log_to_stderr() -> None:
    """The project's lines; where logging is set up already it stays."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", handlers=[ConsoleHandler(sys.stderr)])


def is_quiet() -> bool:
    """Whether `set_up` is in force here."""
    return logging.getLoggerClass() is GatedLogger


# ---------------------------------------------------------------- the gate


def passes(record: logging.LogRecord) -> bool:
    """Whether a record reaches the console; one that does not is kept."""
    if record.levelno >= logging.ERROR or is_own(record) or is_wished(record.name) or is_serious(record):
        return True
    KEEPER.handle(record)
    return False


def is_own(record: logging.LogRecord) -> bool:
    return os.path.realpath(record.pathname).startswith(OWN_CODE)


def is_wished(logger_name: str) -> bool:
    return bool(os.environ.get(WISHES.get(logger_name.partition(".")[0], "")))


def is_serious(record: logging.LogRecord) -> bool:
    return record.name == "py.warnings" and SERIOUS in record.getMessage()


@contextlib.contextmanager
def prints_kept() -> Iterator[None]:
    """Within, what a library prints by itself is kept too; for those that know no other way to be quiet."""
    if not is_quiet():
        yield
        return
    with contextlib.redirect_stdout(KEPT), contextlib.redirect_stderr(KEPT):
        yield


def tell_kept() -> None:
    """What libraries have said, on stderr: it may explain the error that follows."""
    if KEPT.lines:
        text = "\n".join(KEPT.lines)
        print(f"what libraries said before, the last {len(KEPT.lines)} lines:\n{text}\n", file=sys.stderr, flush=True)
        KEPT.lines.clear()


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
