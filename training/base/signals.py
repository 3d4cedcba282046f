"""Being asked to stop: SIGTERM, SIGINT, SIGUSR1 or the launcher's death are noted, and the run leaves where nothing is lost.

Python calls handlers in the main thread between two of its own operations, so that noting is all they do, unless
nothing is in flight: before the loop, while it waits for data, and where a body says so.
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
ECHO = 0.3  # seconds; torchrun passes on the Ctrl-C that the terminal has sent to every process already
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Interruption:
    """What this process has been asked: `reason` is the signal's name, None while it may go on."""

    def __init__(self):
        self.reason: str | None = None
        self.at_once = True

    def note(self, number: int, frame) -> None:
        """The handler."""
        if self.reason is None:
            self.reason = signal.Signals(number).name
            if self.at_once:
                raise KeyboardInterrupt

    def until_asked(self, batches: Iterable, alone: bool = True) -> Iterator:
        """Hand on `batches`, and end before the next one, or while waiting for it, once this process is asked to stop.

        Not `alone`: the ranks leave together, which is for the loop to do; nothing is cut short here.
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
                    worker.terminate()  # one that hangs would be waited for
                return
            finally:
                self.at_once = False
            yield batch

    @contextlib.contextmanager
    def ending_body(self) -> Iterator[None]:
        """A body that may be cut short, such as validation: the signal ends it, and what follows finds `reason` set."""
        before = self.at_once
        try:
            self.at_once = True
            yield
        except KeyboardInterrupt:
            if self.reason is None:
                raise
        finally:
            self.at_once = before


INTERRUPTION = Interruption()  # of this process: signals have no other owner


@contextlib.contextmanager
def caught_signals(before_abandoning: Callable[[], None]) -> Iterator[None]:
    """Note signals in INTERRUPTION while the body, a whole script, runs. A second Ctrl-C ends the process at once.

    That one is for a thread to hear: the main one may be in a collective that never comes back.
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
    """End the process at the second SIGINT; `heard` is the pipe that the system writes signals' numbers to."""
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
    """Get SIGTERM when the launcher dies: accelerate launch ends at a signal and would leave this process an orphan."""
    if {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        signal_at_parents_death(signal.SIGTERM)


def signal_at_parents_death(number: int) -> None:
    """Linux only; elsewhere nothing."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl:
        prctl(PR_SET_PDEATHSIG, int(number))


def shield_worker(worker: int = 0) -> None:
    """In a data worker: what is sent to the whole process group is for the training process, which needs its workers
    to finish the step. A worker obeys its parent alone, and never outlives it.
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
