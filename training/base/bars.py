"""Progress: a bar on a terminal, and in a log a line now and then."""

import functools
import logging
import sys
import time
from collections.abc import Collection, Iterator

from tqdm import tqdm

from base.console import wants_no_bars


logger = logging.getLogger(__name__)

LOG_SECONDS = 30  # between two lines of a log
LINE = "{desc} {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class LogLines:
    """What a bar shows, as a line of the log every LOG_SECONDS and at the end."""

    def __init__(self, total: int, desc: str, initial: int = 0, delay: float = 0):
        self.total, self.desc, self.n, self.delay, self.postfix = total, desc, initial, delay, ""
        self.start = time.monotonic()
        self.told, self.told_n = self.start, initial

    def update(self, n: int = 1) -> None:
        self.n += n
        if time.monotonic() - self.told >= LOG_SECONDS:
            self.tell()

    def set_postfix(self, **values) -> None:
        self.postfix = ", ".join(f"{name}={value}" for name, value in values.items())

    def tell(self) -> None:
        """The rate is that since the line before: compiling and validation are in the first lines alone."""
        now = time.monotonic()
        rate = (self.n - self.told_n) / max(now - self.told, 1e-9)
        self.told, self.told_n = now, self.n
        options = {"prefix": self.desc, "rate": rate, "postfix": self.postfix, "bar_format": LINE}
        logger.info("%s", tqdm.format_meter(self.n, self.total, now - self.start, **options))

    def close(self) -> None:
        if self.n > self.told_n and time.monotonic() - self.start >= self.delay:
            self.tell()

    def __enter__(self) -> "LogLines":
        return self

    def __exit__(self, *error) -> None:
        self.close()


def progress(total: int, desc: str, initial: int = 0, disable: bool = False, delay: float = 0) -> tqdm | LogLines:
    """A bar of `total`, or lines where there is no terminal or TQDM_DISABLE is set; nothing before `delay` seconds."""
    if disable or (sys.stderr.isatty() and not wants_no_bars()):
        return tqdm(total=total, desc=desc, initial=initial, disable=disable, delay=delay, file=sys.stderr)
    return LogLines(total, desc, initial, delay)


def tracked(items: Collection, desc: str, disable: bool = False, delay: float = 0) -> Iterator:
    """Hand on `items`, with a bar."""
    with progress(len(items), desc, disable=disable, delay=delay) as bar:
        for item in items:
            yield item
            bar.update()


def download_bar(model: str) -> type:
    """What the hub shows its progress with: nothing for what is there already, else a line, and bytes on a terminal.

    It makes several, of files and of bytes, and none knows beforehand whether there is anything to do.
    """
    from huggingface_hub.utils import are_progress_bars_disabled

    class DownloadBar(tqdm):
        def __init__(self, *positional, **named):
            named.pop("name", None)  # the hub's own
            self.counts_bytes, self.has_begun = named.get("unit") == "B", False
            disable = not sys.stderr.isatty() or wants_no_bars() or are_progress_bars_disabled()
            super().__init__(*positional, **named | {"disable": disable, "leave": False})

        def update(self, n=1):
            if n and self.counts_bytes and not self.has_begun:
                self.has_begun = True
                say_download(model)
            return super().update(n)

        def display(self, *positional, **named):
            return super().display(*positional, **named) if self.has_begun else None

    return DownloadBar


@functools.cache
def say_download(model: str) -> None:
    """Once: the hub's bars are several."""
    logger.info("%s is downloaded from the hub", model)
