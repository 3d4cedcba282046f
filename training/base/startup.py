"""How long a run takes from launch to first update, by part."""

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
