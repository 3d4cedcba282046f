"""Trackers: what metrics.jsonl holds, sent to wandb, tensorboard or trackio through accelerate.

A tracker that fails never ends a run: it is named in a warning and left, and metrics.jsonl stays complete.
"""

import importlib.util
import logging
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from args import recorded_flags
from errors import UsageError, first_line


logger = logging.getLogger(__name__)

INSTALL = {"wandb": "wandb", "tensorboard": "tensorboard", "trackio": "trackio"}  # tracker -> package


def tracker_names_from_args(args) -> list[str]:
    """The trackers of --report_to; UsageError for one that is not installed. `all` is those that are."""
    wanted = (args.report_to or "none").split(",")
    if wanted == ["none"]:
        return []
    if wanted == ["all"]:
        return [name for name in INSTALL if importlib.util.find_spec(name)]
    for name in wanted:
        if not importlib.util.find_spec(name):
            raise UsageError(f"--report_to {name}: not installed; pip install {INSTALL[name]}")
    return list(dict.fromkeys(wanted))


def tracking_options_from_args(args) -> dict:
    """What the Accelerator must know of trackers when it is made."""
    folder = Path(args.output_dir)
    project = ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / args.logging_dir))
    return {"log_with": tracker_names_from_args(args) or None, "project_config": project}


def start_trackers_from_args(args, accelerator: Accelerator, project: str) -> None:
    """Open a run at every tracker, with the flags as its configuration; `project` unless --tracker_name is given.

    Called by all ranks: accelerate keeps the trackers to the main process.
    """
    flags = recorded_flags(args)
    # Strings, because tensorboard takes no lists; wandb's own folder would else lie in the working directory
    config = {name: value if isinstance(value, bool | int | float) else str(value) for name, value in flags.items()}
    options = {"wandb": {"dir": accelerator.logging_dir}}
    if accelerator.log_with and accelerator.is_main_process:
        Path(accelerator.logging_dir).mkdir(parents=True, exist_ok=True)
    try:
        accelerator.init_trackers(args.tracker_name or project, config, options)
    except Exception as error:  # a tracker's own, of any kind
        leave(accelerator, error)


def log_values(accelerator: Accelerator, values: dict, step: int) -> None:
    """Send numbers of update `step`."""
    if not accelerator.trackers:
        return
    try:
        accelerator.log(values, step=step)
    except Exception as error:  # a server that is down, a full disk
        leave(accelerator, error)


def finish_trackers(accelerator: Accelerator) -> None:
    """Close the run at every tracker, whatever becomes of it at another."""
    for tracker in accelerator.trackers:
        try:
            tracker.finish()
        except Exception as error:  # a tracker's own, of any kind
            logger.warning("%s was not closed, metrics.jsonl is complete: %s", tracker.name, first_line(error))
    accelerator.trackers = []


def leave(accelerator: Accelerator, error: Exception) -> None:
    """Go on without trackers."""
    logger.warning("tracking stops, metrics.jsonl goes on: %s", first_line(error))
    accelerator.trackers = []
