"""Graceful stop: SIGTERM, SIGINT, SIGUSR1 and the launcher's death are recorded, and the run ends at a safe point.

Python runs handlers in the main thread between bytecodes, anywhere. So a handler only records the signal, and raises
only while nothing can be lost: before the loop, while waiting for data, and inside `ending_body`.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator

from base.errors import INTERRUPTED


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ECHO = 0.3  # seconds; torchrun forwards the Ctrl-C that the terminal has already sent to every process
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Interruption:
    """Whether this process was asked to stop: `reason` is the signal's name, or None."""

    def __init__(self):
        self.reason: str | None = None
        self.at_once = True

    def note(self, number: int, frame) -> None:
        """Signal handler."""
        if self.reason is None:
            self.reason = signal.Signals(number).name
            if self.at_once:
                raise KeyboardInterrupt

    def until_asked(self, batches: Iterable, alone: bool = True) -> Iterator:
        """Yield `batches`; once asked to stop, end before the next batch, or while waiting for it.

        Unless `alone`, nothing is cut short: all ranks must stop together, which the loop arranges.
        """
        iterator = iter(batches)
        while True:
            try:
                self.at_once = alone
                if alone and self.reason:
                    return
                batch = next(iterator)
            except StopIteration:
                return
            except KeyboardInterrupt:
                if self.reason is None:
                    raise
                for worker in multiprocessing.active_children():
                    worker.terminate()  # otherwise a hanging worker would be joined forever
                return
            finally:
                self.at_once = False
            yield batch

    @contextlib.contextmanager
    def ending_body(self) -> Iterator[None]:
        """For a body that may be cut short, such as validation: a signal ends it, and `reason` is set afterwards."""
        before = self.at_once
        try:
            self.at_once = True
            yield
        except KeyboardInterrupt:
            if self.reason is None:
                raise
        finally:
            self.at_once = before


INTERRUPTION = Interruption()  # global, because signals are per process


@contextlib.contextmanager
def caught_signals(before_abandoning: Callable[[], None]) -> Iterator[None]:
    """Record signals in INTERRUPTION while the body (a whole script) runs. A second Ctrl-C ends the process at once.

    A thread listens for the second one: the main thread may be stuck in a collective that never returns.
    """
    INTERRUPTION.__init__()
    follow_launcher()
    heard, written = os.pipe()
    os.set_blocking(written, False)
    handlers = {number: signal.signal(number, INTERRUPTION.note) for number in SIGNALS}
    earlier = signal.set_wakeup_fd(written, warn_on_full_buffer=False)
    threading.Thread(target=abandon_on_second, args=(heard, before_abandoning), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(earlier)
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
        os.close(written)
        INTERRUPTION.__init__()


def abandon_on_second(heard: int, before_abandoning: Callable[[], None]) -> None:
    """End the process at the second SIGINT; `heard` is the read end of the wakeup pipe, one byte per signal."""
    first = None
    with open(heard, "rb", buffering=0) as pipe:
        while number := pipe.read(1):
            if number[0] != signal.SIGINT:
                continue
            if first is not None and time.monotonic() - first > ECHO:
                before_abandoning()
                os._exit(INTERRUPTED)
            first = first or time.monotonic()


def follow_launcher() -> None:
    """Get SIGTERM when the launcher dies: `accelerate launch` exits on a signal and would orphan this process."""
    if {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        signal_at_parents_death(signal.SIGTERM)


def signal_at_parents_death(number: int) -> None:
    """Linux only; does nothing elsewhere."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl:
        prctl(PR_SET_PDEATHSIG, int(number))


def shield_worker(worker: int = 0) -> None:
    """In a data worker: ignore signals sent to the whole process group, since the training process needs its workers
    to finish the step. Only the parent's SIGTERM ends a worker, and it dies with its parent.
    """
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=obey_parent, daemon=True).start()
    signal_at_parents_death(signal.SIGKILL)


def obey_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
