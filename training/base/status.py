"""`status.json`: how the last run in a folder ended, and which run that was.

`accelerate launch` and torchrun turn every exit code into 1, so that wrappers read it here. A run is known by its id,
never by the time of a file: the clock of a file server is not that of this machine.
"""

import json
import os
import secrets
from pathlib import Path

from base.errors import REFUSED, StorageError
from base.files import to_json, write_json


RUN_ID_VARIABLE = "COGVIDEOX_RUN_ID"  # set by a wrapper for each run that it starts


class Run:
    """What this process belongs to: `id` is the same on all ranks, and another one each time."""

    def __init__(self, launch_id: str | None = None):
        self.id = os.environ.get(RUN_ID_VARIABLE) or launch_id or secrets.token_hex(8)
        self.has_begun = False


RUN = Run()  # of this process


def read_status(output_dir: Path) -> dict:
    """The content of status.json; empty where it is missing or damaged."""
    try:
        content = json.loads((output_dir / "status.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_status(output_dir: Path, state: str, exit_code: int, **more) -> None:
    output_dir.mkdir(parents=True, exist_ok=True)
    path, content = output_dir / "status.json", {"state": state, "exit_code": exit_code, "run": RUN.id, **more}
    try:
        write_json(path, content)
    except StorageError:  # a disk without renaming: in place, for it is what says so
        path.write_text(to_json(content), encoding="utf-8")


def is_of_this_run(status: dict) -> bool:
    """True if a rank of this run has written it, or was refused."""
    return RUN.id in (status.get("run"), status.get("refused", {}).get("run"))


def begin_run(output_dir: Path, is_main_process: bool) -> None:
    """All ranks call it where the folder begins to change.

    What a killed run leaves must not be the status of the run before it. Another rank may have failed already.
    """
    RUN.has_begun = True
    if is_main_process and not is_of_this_run(read_status(output_dir)):
        (output_dir / "status.json").unlink(missing_ok=True)


def note_refusal(output_dir: Path, message: str, exit_code: int = REFUSED) -> None:
    """Tell the wrapper, if one started this, that the command was refused, or failed before it changed anything.

    What is said of the run in the folder stays. Started by hand, nothing is written: the exit code says it.
    """
    if RUN_ID_VARIABLE not in os.environ:
        return
    output_dir.mkdir(parents=True, exist_ok=True)
    refused = {"run": RUN.id, "exit_code": exit_code, "message": message}
    write_json(output_dir / "status.json", {**read_status(output_dir), "refused": refused})


def forget_refusal(output_dir: Path) -> None:
    """Drop a refusal: the command was accepted since."""
    status = read_status(output_dir)
    if status.pop("refused", None):
        write_json(output_dir / "status.json", status)
