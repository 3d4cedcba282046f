"""Trackers: sends what metrics.jsonl holds to wandb, tensorboard or trackio through accelerate.

A failing tracker never ends a run: it is dropped with a warning, and metrics.jsonl stays complete. The run's name and
id at the trackers are in `trackers.json` of the output folder, so that a resumed run continues there too.
"""

import contextlib
import importlib
import importlib.util
import io
import json
import logging
import os
import secrets
import shlex
import sys
from pathlib import Path

import av
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from accelerate.utils import ProjectConfiguration

from base.console import capture_prints
from base.errors import UsageError, first_line
from base.files import written_beside
from base.flag_parser import recorded_flags
from base.startup import STARTUP


logger = logging.getLogger(__name__)

INSTALL = {"wandb": "wandb", "tensorboard": "tensorboard", "trackio": "trackio"}  # tracker -> package
MODULES = INSTALL | {"tensorboard": "torch.utils.tensorboard"}  # tracker -> what accelerate imports to start it
RUN_NAME = "trackers.json"


def tracker_names(args) -> list[str]:
    """The trackers of --report_to, `all` meaning those that are installed; UsageError for one that is not."""
    wanted = (args.report_to or "none").split(",")
    if wanted == ["none"]:
        return []
    if wanted == ["all"]:
        return [name for name in INSTALL if importlib.util.find_spec(name)]
    for name in wanted:
        if not importlib.util.find_spec(name):
            raise UsageError(f"--report_to {name}: not installed; pip install {INSTALL[name]}")
    return list(dict.fromkeys(wanted))


def tracking_options(args) -> dict:
    """The Accelerator's options for trackers; UsageError for one that is not installed."""
    tracker_names(args)
    folder = Path(args.output_dir)
    project = ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / args.logging_dir))
    return {"project_config": project}


def start_trackers(args, run, project: str, first_step: int) -> None:
    """Open a run at every tracker with the flags as its config, in project --tracker_name, or else `project`.

    A run resumed after `first_step` is resumed at the trackers too. Only the main process has trackers.
    """
    names = tracker_names(args)
    if names and run.rank == 0:
        open_trackers(args, run.accelerator, names, args.tracker_name or project, first_step)
    STARTUP.mark("trackers")


def open_trackers(args, accelerator: Accelerator, names: list[str], project: str, first_step: int) -> None:
    output_dir = Path(args.output_dir).resolve()
    earlier = read_run(output_dir, project) if first_step else {}
    tracked_run = {"project": project, "name": output_dir.name, "id": new_id()} | earlier | {"trackers": names}
    try:
        with written_beside(output_dir / RUN_NAME) as temporary:
            temporary.write_text(json.dumps(tracked_run) + "\n", encoding="utf-8")
        logging_dir = Path(accelerator.logging_dir).resolve()
        logging_dir.mkdir(parents=True, exist_ok=True)
        config = tracked_config(args)
        for name in names:
            continues = name in earlier.get("trackers", ())
            tracker = make_tracker(name, tracked_run, output_dir, logging_dir, first_step)
            # tensorboard purges repeated steps; the others would show them twice
            tracker.known_step = last_update(output_dir) if continues and name != "tensorboard" else -1
            start_quietly(tracker)
            accelerator.trackers.append(tracker)
            if where := where_to_look(tracker, project):
                logger.info("%s: %s", name, where)
            if not (continues and name == "tensorboard"):  # where it would look like another run
                tracker.store_init_configuration(config)
    except Exception as error:  # noqa: BLE001 - trackers raise anything
        leave(accelerator, error)


def make_tracker(name: str, run: dict, output_dir: Path, logging_dir: Path, first_step: int) -> GeneralTracker:
    """The tracker, not yet started; it continues a run that it already has."""
    project, unique = run["project"], f"{run['name']}-{run['id']}"
    if name == "wandb":  # its folder would otherwise be in the working directory
        display_name = os.environ.get("WANDB_NAME", run["name"])
        return WandBTracker(project, dir=str(logging_dir), id=run["id"], name=display_name, resume="allow")
    if name == "trackio":  # which identifies runs by name
        return TrackioTracker(project, name=unique, resume="allow")
    # The folder may hold the logs of several runs: they must not be read as one
    folder = project if logging_dir.is_relative_to(output_dir) else f"{project}/{unique}"
    is_used = any((logging_dir / folder).glob("events.out.tfevents.*"))
    purge = {"purge_step": first_step + 1 if first_step else 0} if is_used else {}
    return TensorBoardTracker(folder, str(logging_dir), **purge)


def start_quietly(tracker: GeneralTracker) -> None:
    """Start it without its prints. Import its module first: wandb captures the streams that it finds at import."""
    importlib.import_module(MODULES[tracker.name])
    may_ask = tracker.name == "wandb" and sys.stderr.isatty()  # for the API key
    with contextlib.nullcontext() if may_ask else capture_prints():
        tracker.start()


def where_to_look(tracker: GeneralTracker, project: str) -> str:
    """Where to find the run: a URL, else a command that shows it; empty if nothing is recorded."""
    if tracker.name == "wandb":
        offline = f"offline; wandb sync {shlex.quote(str(Path(tracker.run.dir).parent))}"
        return "" if tracker.run.disabled else tracker.run.url or offline
    if tracker.name == "trackio":
        return f"trackio show --project {shlex.quote(project)}"
    return f"tensorboard --logdir {shlex.quote(tracker.logging_dir)}"


def new_id() -> str:
    """A run id: the one in wandb's own variable if a sweep or scheduler set it, else a random one."""
    return os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)


def read_run(output_dir: Path, project: str) -> dict:
    """This folder's run at the trackers; empty if there is none in `project`."""
    try:
        run = json.loads((output_dir / RUN_NAME).read_text(encoding="utf-8"))
        return run if run["project"] == project and run["name"] and run["id"] else {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        logger.warning("%s: not readable (%r); trackers start a new run", output_dir / RUN_NAME, error)
        return {}


def last_update(output_dir: Path) -> int:
    """The last update in metrics.jsonl, before a resumed run truncates it; -1 without any."""
    path = output_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return max((row["step"] for row in rows if "event" not in row), default=-1)


def tracked_config(args) -> dict:
    """The flags; lists and the like as strings, because tensorboard takes only plain values."""
    flags = recorded_flags(args)
    return {name: value if isinstance(value, bool | int | float) else str(value) for name, value in flags.items()}


def log_values(accelerator: Accelerator, values: dict, step: int) -> None:
    """Send a validation's numbers, after update `step`."""
    send(accelerator, accelerator.trackers, values, step)


def log_update(accelerator: Accelerator, values: dict, step: int) -> None:
    """Send the numbers of update `step`, except to trackers that have them from before an interruption."""
    send(accelerator, [tracker for tracker in accelerator.trackers if step > tracker.known_step], values, step)


def send(accelerator: Accelerator, trackers: list[GeneralTracker], values: dict, step: int) -> None:
    try:
        for tracker in trackers:
            tracker.log(values, step=step)
    except Exception as error:  # noqa: BLE001 - a server that is down, a full disk
        leave(accelerator, error)


def finish_trackers(accelerator: Accelerator) -> None:
    """Close the run at every tracker, even if another one fails."""
    for tracker in accelerator.trackers:
        try:
            with capture_prints():
                tracker.finish()
        except Exception as error:  # noqa: BLE001 - trackers raise anything
            logger.warning("%s was not closed, metrics.jsonl is complete: %s", tracker.name, first_line(error))
    accelerator.trackers = []


def leave(accelerator: Accelerator, error: Exception) -> None:
    """Continue without trackers."""
    logger.warning("tracking stops, metrics.jsonl continues: %s", first_line(error))
    accelerator.trackers = []


GIF_SIDE = 320  # pixels: longest side of the videos that tensorboard gets


def log_videos(accelerator, directory: Path, step: int) -> None:
    """Send a step's videos and prompts to the trackers that show videos. Call it on the main process."""
    paths = sorted(directory.glob("*.mp4"))
    prompts = [path.with_suffix(".txt").read_text(encoding="utf-8").rstrip("\n") for path in paths]
    videos = {f"validation/{path.stem}": (path, prompt) for path, prompt in zip(paths, prompts, strict=True)}
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            import wandb

            tracker.log({key: wandb.Video(str(path), caption=text) for key, (path, text) in videos.items()}, step=step)
        elif tracker.name == "trackio":
            import trackio

            tracker.log(
                {key: trackio.Video(str(path), caption=text) for key, (path, text) in videos.items()}, step=step
            )
        elif tracker.name == "tensorboard":
            for key, (path, text) in videos.items():
                add_gif(tracker.writer, key, path, step)
                tracker.writer.add_text(f"{key}/prompt", text, step)


def add_gif(writer, tag: str, path: Path, step: int) -> None:
    """Add an animated GIF, which tensorboard plays; its own add_video needs moviepy."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    with av.open(str(path)) as container:
        fps = float(container.streams.video[0].average_rate)
        frames = [frame.to_image() for frame in container.decode(video=0)]
    for frame in frames:
        frame.thumbnail((GIF_SIDE, GIF_SIDE))
    content = io.BytesIO()
    frames[0].save(content, "GIF", save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0)
    width, height = frames[0].size
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content.getvalue())
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
