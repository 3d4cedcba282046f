"""Progress: a tqdm bar on a terminal, otherwise a log line every 30 seconds."""

import functools
import logging
import sys
import time
from collections.abc import Iterable, Iterator

from tqdm import tqdm

from base.console import wants_no_bars


logger = logging.getLogger(__name__)

LOG_SECONDS = 30  # between two log lines
LINE = "{desc} {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class LogLines:
    """Logs what a bar would show, every LOG_SECONDS and at the end."""

    def __init__(self, total: int, desc: str, initial: int = 0, delay: float = 0):
        self.total, self.desc, self.n, self.delay, self.postfix = total, desc, initial, delay, ""
        self.start = time.monotonic()
        self.logged_at, self.logged_n = self.start, initial

    def update(self, n: int = 1) -> None:
        self.n += n
        if time.monotonic() - self.logged_at >= LOG_SECONDS:
            self.log()

    def set_postfix(self, **values) -> None:
        self.postfix = ", ".join(f"{name}={value}" for name, value in values.items())

    def log(self) -> None:
        """Log a line. The rate is since the previous line, so compilation only affects the first ones."""
        now = time.monotonic()
        rate = (self.n - self.logged_n) / max(now - self.logged_at, 1e-9)
        self.logged_at, self.logged_n = now, self.n
        options = {"prefix": self.desc, "rate": rate, "postfix": self.postfix, "bar_format": LINE}
        logger.info("%s", tqdm.format_meter(self.n, self.total, now - self.start, **options))

    def close(self) -> None:
        if self.n > self.logged_n and time.monotonic() - self.start >= self.delay:
            self.log()

    def __enter__(self) -> "LogLines":
        return self

    def __exit__(self, *error) -> None:
        self.close()


def progress(total: int, desc: str, initial: int = 0, disable: bool = False, delay: float = 0) -> tqdm | LogLines:
    """A bar of `total`, or log lines without a terminal or with TQDM_DISABLE; nothing before `delay` seconds."""
    if disable or (sys.stderr.isatty() and not wants_no_bars()):
        return tqdm(total=total, desc=desc, initial=initial, disable=disable, delay=delay, file=sys.stderr)
    return LogLines(total, desc, initial, delay)


def with_progress(
    items: Iterable, desc: str, disable: bool = False, delay: float = 0, total: int | None = None
) -> Iterator:
    """Yield `items` with a progress bar; `total`: their number, where they have no length."""
    with progress(len(items) if total is None else total, desc, disable=disable, delay=delay) as bar:
        for item in items:
            yield item
            bar.update()


def download_bar(model: str) -> type:
    """A tqdm class for huggingface_hub: nothing for cached files, else one log line, and a byte bar on a terminal.

    The hub creates several bars, for files and for bytes, before it knows whether there is anything to download.
    """
    from huggingface_hub.utils import are_progress_bars_disabled

    class DownloadBar(tqdm):
        def __init__(self, *positional, **named):
            named.pop("name", None)  # huggingface_hub's own argument
            self.counts_bytes, self.has_begun = named.get("unit") == "B", False
            disable = not sys.stderr.isatty() or wants_no_bars() or are_progress_bars_disabled()
            super().__init__(*positional, **named | {"disable": disable, "leave": False})

        def update(self, n=1):
            if n and self.counts_bytes and not self.has_begun:
                self.has_begun = True
                log_download(model)
            return super().update(n)

        def display(self, *positional, **named):
            return super().display(*positional, **named) if self.has_begun else None

    return DownloadBar


@functools.cache
def log_download(model: str) -> None:
    """Cached, so that it logs once although the hub creates several bars."""
    logger.info("%s is downloaded from the hub", model)
