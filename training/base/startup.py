"""How long a run takes from launch to first update, by part; importing and then starting with less garbage collection."""

import gc
import time


class StartupTimer:
    """Seconds since the launch, by part; each slow service marks its own part when it is done."""

    def __init__(self):
        self.begin(time.time())

    def begin(self, launched: float) -> None:
        """Restart at `launched`, in seconds since the epoch."""
        self.parts: dict[str, float] = {}
        self.since = launched

    def mark(self, part: str) -> None:
        """Count the time since the last mark as `part`."""
        now = time.time()
        self.parts[part] = round(self.parts.get(part, 0.0) + now - self.since, 2)
        self.since = now


STARTUP = StartupTimer()  # of this process
USUAL_THRESHOLD = gc.get_threshold()
RARE_THRESHOLD = 100_000, 50, 100


def expect_imports() -> None:
    """Before the heavy imports: of the half a million objects that they make nearly all stay, and looking for garbage
    among them takes a tenth of the time.
    """
    gc.set_threshold(*RARE_THRESHOLD)


def end_imports() -> None:
    """What was imported stays, and is not looked through again: 0.3 s each time. Does nothing without `expect_imports`."""
    if gc.get_threshold() == RARE_THRESHOLD:
        gc.freeze()
        gc.set_threshold(*USUAL_THRESHOLD)
