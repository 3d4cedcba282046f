"""Errors that end a script: one clear line on stderr and a documented exit code, never a traceback."""


class UserError(Exception):
    """A problem that the user can mend. `str(error)` is the whole line shown: file, row, what is wrong, what to do."""

    exit_code = 70


class UsageError(UserError):
    """Flags that contradict one another, the machine, or what lies in the output folder."""

    exit_code = 2


class DataError(UserError):
    """Bad input data: a missing video, a corrupt clip, captions that do not match."""

    exit_code = 65


class NumbersError(UserError):
    """Training left the finite numbers."""

    exit_code = 70


class MemoryFullError(UserError):
    """The GPU's memory does not hold the run."""

    exit_code = 70


class StorageError(UserError):
    """The disk is full or cannot be written."""

    exit_code = 74


class Interrupted(UserError):
    """Asked to stop, and stopped where the same command continues."""

    exit_code = 75


def first_line(error: Exception) -> str:
    """What an error of a library says, for a line of ours."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
