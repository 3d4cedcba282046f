"""Checkpoints from which a run continues exactly: write, find, load.

A checkpoint is the result's file or folder beside `optimizer.safetensors`, `state.json` and `manifest.json` (size and
hash of every file), plus the trained weights where they differ from the result's. Nothing is pickled. No random state
is saved: every draw is a function of the seed and the sample's position in the run.
"""

import json
import logging
from pathlib import Path

import torch
from safetensors.torch import load_file

from base.errors import Interrupted, NumbersError, UsageError
from base.files import find_damage, remove, write_json, written_folder
from base.ranks import on_main_process
from base.signals import INTERRUPTION
from base.tensor_file import save_tensors
from engine.optimizers import join_tensors, schedule_state, split_tensors
from engine.update import TrainingState
from run.held_out import data_identity
from run.output_dir import (
    checkpoint_dirs,
    is_complete,
    named_checkpoint,
    refuse_other_content,
    refuse_other_run,
    step_of,
)


logger = logging.getLogger(__name__)


# ---------------------------------------------------------------- save


def write_checkpoint(output_dir: Path, step: int, state: TrainingState, identity: dict) -> Path:
    """Write `checkpoint-<step>/` atomically: whatever has that name is complete, be it this one or an earlier one."""
    tensors, optimizer = split_tensors(state.optimizer.state_dict())
    refuse_bad_numbers([*state.engine.params, *tensors.values()])
    target = output_dir / f"checkpoint-{step}"
    with written_folder(target) as folder:
        state.engine.save_state(folder)
        save_tensors(folder / "optimizer.safetensors", tensors)
        content = {
            **identity,
            "step": step,
            "optimizer": optimizer,
            "lr_scheduler": schedule_state(state.lr_scheduler),
            "scaler": state.scaler.state_dict() if state.scaler else None,
        }
        write_json(folder / "state.json", content)
    return target


def refuse_bad_numbers(tensors: list[torch.Tensor]) -> None:
    """Raise NumbersError if any value is NaN or infinite: such weights are never written."""
    checked = [
        torch.isfinite(tensor).all() for tensor in tensors if tensor.is_floating_point() and tensor.itemsize > 1
    ]
    if not all(torch.stack([flag.cpu() for flag in checked]) if checked else ()):
        raise NumbersError(
            "weights or optimizer states are no longer finite, so nothing is written; lower --learning_rate, and give the "
            "last checkpoint as --resume_from_checkpoint"
        )


def save(args, run, step: int, state: TrainingState, identity: dict) -> None:
    """Write a checkpoint on the main process, then remove the oldest over the limit; the other ranks wait."""
    state.all_gather()
    if run.rank == 0:
        write_checkpoint(run.output_dir, step, state, identity)
        prune_checkpoints(run.output_dir, args.checkpoints_total_limit, step)
    run.accelerator.wait_for_everyone()


def leave_if_interrupted(
    args, run, first_step: int, step: int, num_steps: int, state: TrainingState, identity: dict
) -> None:
    """After the loop: if it ended early, all ranks leave with a checkpoint of the last update and exit code 75."""
    if step == num_steps:
        return
    if step > first_step and step % args.checkpointing_steps:
        save(args, run, step, state, identity)
    reason = INTERRUPTION.reason or "a signal to another process"
    raise Interrupted(f"stopped by {reason} after step {step} of {num_steps}; the same command continues from there")


def prune_checkpoints(output_dir: Path, limit: int | None, newest: int) -> None:
    """Remove the oldest checkpoints over `limit`; call it once the checkpoint of step `newest` is complete.

    Later checkpoints do not count: they are damaged, or belong to a run that was resumed from an older one.
    """
    if limit is not None:
        for directory in [path for path in checkpoint_dirs(output_dir) if step_of(path) <= newest][:-limit]:
            remove(directory)


# ---------------------------------------------------------------- load


def find(args, run, num_steps: int, content: dict) -> Path | None:
    """The checkpoint to resume from: a path as given, a name or step in output_dir, or the newest intact one there.

    None if there is none: the run starts at step 0. The main process searches and hashes for all ranks.
    """
    return on_main_process(run.accelerator, lambda: choose_checkpoint(args, num_steps, content))


def choose_checkpoint(args, num_steps: int, content: dict) -> Path | None:
    output_dir, wanted = Path(args.output_dir), args.resume_from_checkpoint
    if wanted in (None, "latest"):
        newest = newest_whole(output_dir)
        if newest is None and (wanted or is_complete(output_dir)):
            logger.info("%s holds no checkpoint: starting at step 0", output_dir)
        if newest:
            refuse_later_step(newest, step_of(newest), num_steps)
        return newest
    path = named_checkpoint(output_dir, wanted)
    if reason := find_damage(path):
        raise UsageError(
            f"--resume_from_checkpoint {wanted}: {reason}; give another, or latest for the newest intact one"
        )
    folder = path.resolve().parent
    if folder != output_dir.resolve():
        advice = "give the same, or name a checkpoint of a run like this"
        refuse_other_run(args, folder, advice)
        refuse_other_content(args, folder, content, advice)
    refuse_later_step(path, json.loads((path / "state.json").read_text(encoding="utf-8"))["step"], num_steps)
    return path


def refuse_later_step(checkpoint: Path, step: int, num_steps: int) -> None:
    """Raise UsageError for a checkpoint that is already past the end of this run."""
    if step > num_steps:
        raise UsageError(
            f"{checkpoint}: already beyond the {num_steps} updates of this run; name an older checkpoint with "
            "--resume_from_checkpoint, or raise --max_train_steps or --num_train_epochs"
        )


def newest_whole(output_dir: Path) -> Path | None:
    """The newest intact checkpoint, with a warning for each newer one that is damaged; None if there are none at all.

    Raises UsageError if all are damaged: only the user may decide to start over.
    """
    directories = checkpoint_dirs(output_dir)[::-1]
    for directory in directories:
        reason = find_damage(directory)
        if reason is None:
            return directory
        logger.warning("%s cannot be used: %s", directory, reason)
    if directories:
        raise UsageError(
            f"{output_dir}: none of its {len(directories)} checkpoints is intact (the newest: {reason}); restore one, or "
            "pass --overwrite to move the folder aside and start over"
        )
    return None


def run_identity(run, dataset, held_out_clips) -> dict:
    """What a checkpoint records of its run besides the flags; a run that resumes from it must match, see `load`."""
    return {"seed": run.seed, "num_processes": run.num_ranks, **data_identity(dataset, held_out_clips)}


def load(path: Path, state: TrainingState, identity: dict) -> int:
    """Restore weights, optimizer, schedule and loss scaler from an intact checkpoint; returns its step.

    `identity` must equal the saved one, except for the rule of random draws about clips: a change there is only a
    warning.
    """
    saved = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if identity.get("draws") and "draws" not in saved:
        logger.warning(
            "%s: made when starts, crops, flips, first frames and the noise on held-out clips were drawn by a clip's place "
            "in the list; from here on they are drawn by its path, so they differ from those before",
            path,
        )
    if "data_as_written" in identity and saved.get("data") == identity["data_as_written"]:  # by an earlier version
        saved["data"] = identity["data"]
    for name, value in identity.items():
        if name not in ("draws", "data_as_written") and saved.get(name) != value:
            raise UsageError(
                f"{path}: its {name} was {saved.get(name)}, now it is {value}; it cannot continue from there"
            )
    state.engine.load_state(path)
    state.optimizer.load_state_dict(join_tensors(load_file(path / "optimizer.safetensors"), saved["optimizer"]))
    state.lr_scheduler.load_state_dict(saved["lr_scheduler"])
    if state.scaler:
        state.scaler.load_state_dict(saved["scaler"])
    logger.info("continuing from %s at step %d", path, saved["step"])
    return saved["step"]
