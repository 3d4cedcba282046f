"""Checkpoints from which a run continues exactly: write, find, load.

A checkpoint is the result, `pytorch_lora_weights.safetensors` or `transformer/`, beside `optimizer.safetensors`,
`state.json` and `manifest.json` (size and hash of every file), plus `masters.safetensors` in full fine-tuning,
`ema.safetensors` with --ema, and `lora_unscaled.safetensors` if a LoRA's scaling cannot be undone exactly. Nothing is
pickled. No random state is saved: every draw is a function of the seed and the sample's position in the run.

Tensors are written and read one at a time, and read once: hashed while they are loaded.
"""

import functools
import itertools
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import torch

from base.errors import Interrupted, NumbersError, UsageError
from base.files import remove, write_json, written_folder
from base.manifest import DamagedFile, find_damage, verified_folder
from base.ranks import exchange_on_host, on_main_process
from base.signals import INTERRUPTION
from base.tensor_file import read_tensors, save_tensors
from engine.optimizers import load_states, schedule_state, split_tensors
from engine.update import TrainingState
from run.output_dir import (
    checkpoint_dirs,
    is_complete,
    named_checkpoint,
    refuse_other_hashes,
    refuse_other_run,
    step_of,
)


logger = logging.getLogger(__name__)

OPTIMIZER_NAME = "optimizer.safetensors"
SHARED = ("seed", "num_processes", "data")  # of the provenance: the same in all checkpoints of a run
RECORDED = (*SHARED, "data_as_written", "draws")  # of the provenance, in state.json


# ---------------------------------------------------------------- save


def write_checkpoint(output_dir: Path, step: int, state: TrainingState, provenance: dict) -> Path:
    """Write `checkpoint-<step>/` atomically: whatever has that name is complete, be it this one or an earlier one."""
    tensors, optimizer = split_tensors(state.optimizer.state_dict())
    refuse_bad_numbers(itertools.chain(state.engine.weights.values(), tensors.values()))
    target = output_dir / f"checkpoint-{step}"
    with written_folder(target) as folder:
        state.engine.save_state(folder)
        save_tensors(folder / OPTIMIZER_NAME, tensors)
        record = {
            **{name: provenance[name] for name in RECORDED if name in provenance},
            "step": step,
            "optimizer": optimizer,
            "lr_scheduler": schedule_state(state.lr_scheduler),
            "scaler": state.scaler.state_dict() if state.scaler else None,
        }
        write_json(folder / "state.json", record)
    return target


def refuse_bad_numbers(tensors: Iterable[torch.Tensor]) -> None:
    """Raise NumbersError if any value is NaN or infinite: such weights are never written.

    One tensor at a time, before the first is written: a pass over memory takes a fraction of the time on the disk.
    """
    flags: dict[torch.device, list[torch.Tensor]] = {}
    for flag in map(is_finite, tensors):
        flags.setdefault(flag.device, []).append(flag)
    if not all(torch.stack(on_device).all() for on_device in flags.values()):  # waits once per device
        raise NumbersError(
            "weights or optimizer states are no longer finite, so nothing is written; lower --learning_rate, and give the "
            "last checkpoint as --resume_from_checkpoint"
        )


def is_finite(tensor: torch.Tensor) -> torch.Tensor:
    """A bool [] on the tensor's device. One pass without a copy: NaN becomes both ends, infinity is one of them."""
    if not (tensor.is_floating_point() and tensor.itemsize > 1 and tensor.numel()):
        return torch.ones((), dtype=torch.bool)
    lowest, highest = torch.aminmax(tensor.detach())
    return lowest.isfinite() & highest.isfinite()


def save(args, run, step: int, state: TrainingState, provenance: dict) -> None:
    """Write a checkpoint on the main process, then remove the oldest over the limit; the other ranks wait."""
    state.complete()
    if run.rank == 0:
        write_checkpoint(run.output_dir, step, state, provenance)
        prune_checkpoints(run.output_dir, args.checkpoints_total_limit, step)
    run.accelerator.wait_for_everyone()


def leave_if_interrupted(
    args, run, first_step: int, step: int, num_steps: int, state: TrainingState, provenance: dict
) -> None:
    """After the loop: if it ended early, all ranks leave with a checkpoint of the last update and exit code 75."""
    if step == num_steps:
        return
    if step > first_step and step % args.checkpointing_steps:
        save(args, run, step, state, provenance)
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


def find(args, run, num_steps: int, provenance: dict) -> Path | None:
    """The checkpoint to resume from: a path as given, a name or step in output_dir, or the newest intact one there.

    None if there is none: the run starts at step 0. The main process searches for all ranks. What `resume` reads is
    verified there.
    """
    return on_main_process(run.accelerator, lambda: choose_checkpoint(args, num_steps, provenance))


def is_loaded(name: str) -> bool:
    """Is this file of a checkpoint read by `load`? The result in its folder is not."""
    return name.endswith(".safetensors") and "/" not in name


def choose_checkpoint(args, num_steps: int, provenance: dict) -> Path | None:
    output_dir, wanted = Path(args.output_dir), args.resume_from_checkpoint
    if wanted in (None, "latest"):
        newest = newest_whole(output_dir)
        if newest is None and (wanted or is_complete(output_dir)):
            logger.info("%s holds no checkpoint: starting at step 0", output_dir)
        if newest:
            refuse_later_step(newest, step_of(newest), num_steps)
        return newest
    path = named_checkpoint(output_dir, wanted)
    if reason := find_damage(path, is_loaded):
        refuse_damaged(wanted, reason)
    folder = path.resolve().parent
    if folder != output_dir.resolve():
        advice = "give the same, or name a checkpoint of a run like this"
        refuse_other_run(args, folder, advice)
        refuse_other_hashes(args, folder, provenance, advice)
    refuse_later_step(path, json.loads((path / "state.json").read_text(encoding="utf-8"))["step"], num_steps)
    return path


def refuse_later_step(checkpoint: Path, step: int, num_steps: int) -> None:
    """Raise UsageError for a checkpoint that is already past the end of this run."""
    if step > num_steps:
        raise UsageError(
            f"{checkpoint}: already beyond the {num_steps} updates of this run; name an older checkpoint with "
            "--resume_from_checkpoint, or raise --max_train_steps or --num_train_epochs"
        )


def refuse_damaged(wanted: str, reason: str) -> NoReturn:
    raise UsageError(f"--resume_from_checkpoint {wanted}: {reason}; give another, or latest for the newest intact one")


def newest_whole(output_dir: Path, damaged: Path | None = None, reason: str | None = None) -> Path | None:
    """The newest intact checkpoint, with a warning for each newer one that is damaged; None if there are none at all.

    Raises UsageError if all are damaged: only the user may decide to start over. `damaged`, and the `reason`: what turned
    out to be so while it was loaded; the search goes on with the one before.
    """
    directories = checkpoint_dirs(output_dir)[::-1]
    for directory in directories[directories.index(damaged) if damaged else 0 :]:
        if directory != damaged:
            reason = find_damage(directory, is_loaded)
        if reason is None:
            return directory
        logger.warning("%s cannot be used: %s", directory, reason)
    if directories:
        raise UsageError(
            f"{output_dir}: none of its {len(directories)} checkpoints is intact (the newest: {reason}); restore one, or "
            "pass --overwrite to move the folder aside and start over"
        )
    return None


def choose_older(args, damaged: Path, reason: str) -> Path:
    """The checkpoint to load instead of one that turned out `damaged`; a named one is refused."""
    if args.resume_from_checkpoint not in (None, "latest"):
        refuse_damaged(args.resume_from_checkpoint, reason)
    return newest_whole(Path(args.output_dir), damaged, reason)


def resume(args, run, checkpoint: Path, state: TrainingState, provenance: dict) -> int:
    """Load `checkpoint`, or the next older one if it turns out damaged; returns its step. All ranks must call it.

    Nothing is left of a damaged one: the next overwrites all that was loaded, and without a next the run is refused.
    """
    while True:
        step, reason = None, ""
        try:
            step = load(checkpoint, state, provenance)
        except DamagedFile as error:
            reason = str(error)
        reason = next(filter(None, exchange_on_host(f"loaded {checkpoint}", reason)), None)  # of any rank
        if reason is None:
            logger.info("continuing from %s at step %d", checkpoint, step)
            return step
        checkpoint = on_main_process(run.accelerator, functools.partial(choose_older, args, checkpoint, reason))


def load(path: Path, state: TrainingState, provenance: dict) -> int:
    """Restore weights, optimizer, schedule and loss scaler from a checkpoint that `find` chose; returns its step.

    Raises DamagedFile if what was read is not what was written: `state` is then unusable until another is loaded.
    What it shares with the run's `provenance` must be the same now; another rule of random draws about clips is only a
    warning.
    """
    saved = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if provenance.get("draws") and "draws" not in saved:
        logger.warning(
            "%s: made when starts, crops, flips, first frames and the noise on held-out clips were drawn by a clip's place "
            "in the list; from here on they are drawn by its path, so they differ from those before",
            path,
        )
    if "data_as_written" in provenance and saved.get("data") == provenance["data_as_written"]:  # by an earlier version
        saved["data"] = provenance["data"]
    for name in SHARED:
        if name in provenance and saved.get(name) != provenance[name]:
            raise UsageError(
                f"{path}: its {name} was {saved.get(name)}, now it is {provenance[name]}; it cannot continue from there"
            )
    with verified_folder(path, is_loaded):
        state.engine.load_state(path)
        pairs, device = read_tensors(path / OPTIMIZER_NAME), state.engine.params[0].device
        load_states(state.optimizer, pairs, saved["optimizer"], device)
    state.lr_scheduler.load_state_dict(saved["lr_scheduler"])
    if state.scaler:
        state.scaler.load_state_dict(saved["scaler"])
    return saved["step"]
