"""`status.json`: the id of the last run in an output folder, and how it ended.

`accelerate launch` and torchrun turn every exit code into 1, so wrappers read the real one here. Runs are identified
by id, not by file times: a file server's clock may differ from this machine's.
"""

import json
import os
import secrets
from pathlib import Path

from base.errors import REFUSED, StorageError
from base.files import to_json, write_json


RUN_ID_VARIABLE = "COGVIDEOX_RUN_ID"  # set by wrappers, a new one per run


class ThisRun:
    """The run that this process belongs to: `id` is the same on all ranks, and different for every run."""

    def __init__(self, launch_id: str | None = None):
        self.id = os.environ.get(RUN_ID_VARIABLE) or launch_id or secrets.token_hex(8)
        self.has_begun = False
        self.writes_status = True  # off for a command that only looks: the folder's status stays as it is


THIS_RUN = ThisRun()  # of this process


def read_status(output_dir: Path) -> dict:
    """The content of status.json; empty if it is missing or damaged."""
    try:
        content = json.loads((output_dir / "status.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_status(output_dir: Path, state: str, exit_code: int, **more) -> None:
    output_dir.mkdir(parents=True, exist_ok=True)
    path, content = output_dir / "status.json", {"state": state, "exit_code": exit_code, "run": THIS_RUN.id, **more}
    try:
        write_json(path, content)
    except StorageError:  # a disk without rename: write in place, since this file is what reports the error
        path.write_text(to_json(content), encoding="utf-8")


def is_of_this_run(status: dict) -> bool:
    """True if a rank of this run wrote it, or was refused."""
    return THIS_RUN.id in (status.get("run"), status.get("refused", {}).get("run"))


def begin_run(output_dir: Path, is_main_process: bool) -> None:
    """Remove the previous run's status. All ranks call it just before the folder is first changed.

    Otherwise a killed run would leave the previous status behind. Keeps it if another rank of this run already failed.
    """
    THIS_RUN.has_begun = True
    if is_main_process and not is_of_this_run(read_status(output_dir)):
        (output_dir / "status.json").unlink(missing_ok=True)


def record_refusal(output_dir: Path, message: str, exit_code: int = REFUSED) -> None:
    """Tell the wrapper, if one started this, that the command was refused, or failed before it changed anything.

    The status of the run in the folder is kept. Without a wrapper nothing is written: the exit code is enough.
    """
    if RUN_ID_VARIABLE not in os.environ:
        return
    output_dir.mkdir(parents=True, exist_ok=True)
    refused = {"run": THIS_RUN.id, "exit_code": exit_code, "message": message}
    write_json(output_dir / "status.json", {**read_status(output_dir), "refused": refused})


def clear_refusal(output_dir: Path) -> None:
    """Remove an earlier refusal, once the command has been accepted."""
    status = read_status(output_dir)
    if status.pop("refused", None):
        write_json(output_dir / "status.json", status)
