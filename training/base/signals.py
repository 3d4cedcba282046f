"""Graceful stop: SIGTERM, SIGINT, SIGUSR1 and the launcher's death are recorded, and the run ends at a safe point.

Python runs handlers in the main thread between bytecodes, anywhere. So a handler only records the signal, and raises
only while nothing can be lost: before the loop, while waiting for data, and inside `interruptible`.
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
ECHO_SECONDS = 0.3  # seconds; torchrun forwards the Ctrl-C that the terminal has already sent to every process
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Interruption:
    """Whether this process was asked to stop: `reason` is the signal's name, or None."""

    def __init__(self):
        self.reason: str | None = None
        self.raise_in_handler = True

    def note(self, number: int, frame) -> None:
        """Signal handler."""
        if self.reason is None:
            self.reason = signal.Signals(number).name
            if self.raise_in_handler:
                raise KeyboardInterrupt

    def until_interrupted(self, batches: Iterable, alone: bool = True) -> Iterator:
        """Yield `batches`; once asked to stop, end before the next batch, or while waiting for it.

        Unless `alone`, nothing is cut short: all ranks must stop together, which the loop arranges.
        """
        iterator = iter(batches)
        while True:
            try:
                self.raise_in_handler = alone
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
                self.raise_in_handler = False
            yield batch

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """For a body that may be cut short, such as validation: a signal ends it, and `reason` is set afterwards."""
        before = self.raise_in_handler
        try:
            self.raise_in_handler = True
            yield
        except KeyboardInterrupt:
            if self.reason is None:
                raise
        finally:
            self.raise_in_handler = before


INTERRUPTION = Interruption()  # global, because signals are per process


@contextlib.contextmanager
def catch_signals(before_exit: Callable[[], None]) -> Iterator[None]:
    """Record signals in INTERRUPTION while the body (a whole script) runs. A second Ctrl-C ends the process at once.

    A thread listens for the second one: the main thread may be stuck in a collective that never returns.
    """
    INTERRUPTION.__init__()
    terminate_with_launcher()
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    handlers = {number: signal.signal(number, INTERRUPTION.note) for number in SIGNALS}
    earlier = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    threading.Thread(target=exit_on_second_interrupt, args=(read_end, before_exit), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(earlier)
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
        os.close(write_end)
        INTERRUPTION.__init__()


def exit_on_second_interrupt(read_end: int, before_exit: Callable[[], None]) -> None:
    """End the process at the second SIGINT; `read_end` is the read end of the wakeup pipe, one byte per signal."""
    first = None
    with open(read_end, "rb", buffering=0) as pipe:
        while number := pipe.read(1):
            if number[0] != signal.SIGINT:
                continue
            if first is not None and time.monotonic() - first > ECHO_SECONDS:
                before_exit()
                os._exit(INTERRUPTED)
            first = first or time.monotonic()


def terminate_with_launcher() -> None:
    """Get SIGTERM when the launcher dies: `accelerate launch` exits on a signal and would orphan this process."""
    if {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        signal_at_parents_death(signal.SIGTERM)


def signal_at_parents_death(number: int) -> None:
    """Linux only; does nothing elsewhere."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl:
        prctl(PR_SET_PDEATHSIG, int(number))


def ignore_group_signals(worker: int = 0) -> None:
    """In a data worker: ignore signals sent to the whole process group, since the training process needs its workers
    to finish the step. Only the parent's SIGTERM ends a worker, and it dies with its parent.
    """
    signal.set_wakeup_fd(-1)  # inherited by the fork: the parent's thread would hear the worker's signals
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # left to the thread, which sees who sent it
    threading.Thread(target=exit_with_parent, daemon=True).start()
    signal_at_parents_death(signal.SIGKILL)


def exit_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
