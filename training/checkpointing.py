"""Checkpoints that continue exactly where the data stood, and the folder they live in.

A checkpoint is the adapter's file beside `optimizer.safetensors` and `state.json`; nothing is pickled. Random state
need not be kept: every draw is a function of the seed and of the sample's position in the run.
"""

import importlib.metadata
import itertools
import json
import logging
import math
import os
import shutil
import time
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from args import recorded_flags
from errors import StorageError, UsageError
from hub import RunFacts, push_from_args, write_outputs_from_args
from optimizers import join_tensors, schedule_state, split_tensors
from runtime import memory_report, remove_earlier_status, write_json, write_status
from update import TrainingState


logger = logging.getLogger(__name__)

# Flags that do not touch what is trained: they may differ when a run goes on
FREE_FLAGS = {
    "allow_cpu", "cache_dir", "checkpointing_steps", "checkpoints_total_limit", "dataloader_num_workers",
    "enable_model_cpu_offload", "export", "guidance_scale", "height", "hub_model_id", "hub_public", "hub_token",
    "log_every", "max_bad_steps", "nccl_timeout", "num_inference_steps", "num_validation_videos", "output_dir",
    "overwrite", "pin_memory", "push_to_hub", "report_to", "resume_from_checkpoint", "use_dynamic_cfg",
    "validation_attention", "validation_data_root", "validation_epochs", "validation_images", "validation_num_clips",
    "validation_prompt", "validation_prompt_separator", "validation_steps", "width",
}  # fmt: skip
LENGTH_FLAGS = {"max_train_steps", "num_train_epochs"}
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft")
CONSTANT_SCHEDULES = {"constant", "constant_with_warmup"}


# ---------------------------------------------------------------- the output folder


def open_output_dir_from_args(args, is_main_process: bool) -> int | None:
    """Make or re-open `output_dir`. Returns the seed that a run to go on with there had drawn, else None.

    Refuses, with UsageError, a folder that holds another run, unless --overwrite moves it aside.
    """
    output_dir = Path(args.output_dir)
    if args.overwrite and is_main_process and output_dir.exists() and any(output_dir.iterdir()):
        move_aside(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if args.overwrite or not (checkpoint_dirs(output_dir) or read_state(output_dir) == "complete"):
        return None
    refuse_other_run(args, output_dir, "choose another --output_dir, or pass --overwrite to move it aside")
    return read_record(output_dir)["seed"] if args.seed is None else None


def move_aside(output_dir: Path) -> None:
    """Rename the folder: the time in its new name, and a number where that is taken."""
    whole = output_dir.resolve()
    name = f"{whole.name}.{time.strftime('%Y%m%d-%H%M%S')}"
    number = next(n for n in itertools.count(1) if not whole.with_name(f"{name}.{n}").exists())
    aside = whole.with_name(f"{name}.{number}")
    whole.rename(aside)
    logger.info("the old %s is now %s", output_dir, aside)


def read_record(output_dir: Path) -> dict:
    """args.json of the run whose checkpoints lie in `output_dir`."""
    record = output_dir / "args.json"
    if not record.exists():
        raise UsageError(f"{record}: missing, so that nothing tells which run made the checkpoints beside it")
    return json.loads(record.read_text(encoding="utf-8"))


def refuse_other_run(args, output_dir: Path, advice: str) -> None:
    """UsageError, ending in `advice`, unless the run in `output_dir` had the same flags, save those that do not touch
    what was trained.
    """
    record, flags = read_record(output_dir), recorded_flags(args)
    earlier = record["flags"]
    if earlier.get("seed") is None and flags["seed"] == record["seed"]:
        earlier = earlier | {"seed": record["seed"]}  # the seed it drew, now named
    names = sorted(name for name in flags.keys() | earlier.keys() if flags.get(name) != earlier.get(name))
    may_extend = args.lr_scheduler in CONSTANT_SCHEDULES or read_state(output_dir) != "complete"
    free = FREE_FLAGS | (LENGTH_FLAGS if may_extend else set())
    refused = [f"--{name} {earlier.get(name)} -> {flags.get(name)}" for name in names if name not in free]
    if refused:
        raise UsageError(f"{output_dir}: holds a run with other flags ({', '.join(refused)}); {advice}")
    if changed := [name for name in names if name in LENGTH_FLAGS]:
        logger.info("continuing with changed %s", ", ".join(f"--{name} {flags.get(name)}" for name in changed))


def read_state(output_dir: Path) -> str | None:
    status = output_dir / "status.json"
    return json.loads(status.read_text(encoding="utf-8"))["state"] if status.exists() else None


def is_complete_from_args(args, num_steps: int) -> bool:
    """True if the output folder holds the result of these very steps: the same command again has nothing to do."""
    status = Path(args.output_dir) / "status.json"
    if args.resume_from_checkpoint not in (None, "latest") or not status.exists():
        return False
    content = json.loads(status.read_text(encoding="utf-8"))
    complete = content["state"] == "complete" and content["step"] >= num_steps
    if complete:
        logger.info("%s is complete at step %d: nothing to do", args.output_dir, content["step"])
    return complete


def record_run_from_args(args, seed: int) -> None:
    """Write args.json: the flags as given, which of them were given, the seed in force, the packages."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    content = {"flags": recorded_flags(args), "given": args.given, "seed": seed, "versions": versions}
    write_json(Path(args.output_dir) / "args.json", content)
    remove_earlier_status(Path(args.output_dir))


# ---------------------------------------------------------------- save


def save_checkpoint(output_dir: Path, step: int, engine, state: TrainingState, facts: dict) -> Path:
    """Write `checkpoint-<step>/` beside and rename it: what has that name is complete."""
    target = output_dir / f"checkpoint-{step}"
    temporary = output_dir / f".tmp-checkpoint-{step}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        engine.save_state(temporary)
        tensors, optimizer = split_tensors(state.optimizer.state_dict())
        save_file(tensors, temporary / "optimizer.safetensors")
        content = {
            **facts,
            "step": step,
            "optimizer": optimizer,
            "lr_scheduler": schedule_state(state.lr_scheduler),
            "scaler": state.scaler.state_dict() if state.scaler else None,
        }
        write_json(temporary / "state.json", content)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def save_checkpoint_from_args(args, accelerator, step: int, engine, state: TrainingState, facts: dict) -> None:
    """A checkpoint by the main process, the oldest removed after it is complete; the other ranks wait."""
    output_dir = Path(args.output_dir)
    state.gather()
    if accelerator.is_main_process:
        save_checkpoint(output_dir, step, engine, state, facts)
        prune_checkpoints(output_dir, args.checkpoints_total_limit)
    accelerator.wait_for_everyone()


def save_result(accelerator, output_dir: Path, engine) -> None:
    """Write the result and check it as diffusers loads it: before the last test, whatever becomes of that."""
    engine.gather()
    if accelerator.is_main_process:
        result = engine.save(output_dir)
        engine.check(output_dir)
        logger.info("the result: %s", result)
    accelerator.wait_for_everyone()


def finish_run_from_args(args, accelerator, about: RunFacts) -> None:
    """Write what belongs beside the result, say in status.json that all is done, upload."""
    output_dir = Path(args.output_dir)
    if accelerator.is_main_process:
        write_outputs_from_args(args, about)
        write_status(output_dir, "complete", 0, step=about.num_steps, **memory_report(accelerator.device))
        logger.info("complete at step %d: %s", about.num_steps, output_dir)
    accelerator.wait_for_everyone()
    accelerator.end_training()  # an upload may outlast every timeout: nobody waits for it
    upload_from_args(args, about)


def finish_again_from_args(args, accelerator, about: RunFacts) -> None:
    """A complete run's forms that --export asks for and that are not there yet, and its upload."""
    if accelerator.is_main_process and (args.export or about.hub_repo):
        write_outputs_from_args(args, about, only_missing=True)
    upload_from_args(args, about)


def upload_from_args(args, about: RunFacts) -> None:
    """Upload a complete run where that was asked for; status.json tells of a failure and stays complete."""
    if about.hub_repo is None:
        return
    output_dir = Path(args.output_dir)
    earlier = json.loads((output_dir / "status.json").read_text(encoding="utf-8"))
    rest = {name: value for name, value in earlier.items() if name not in ("state", "exit_code", "message")}
    try:
        push_from_args(args, about.hub_repo)
    except StorageError as error:
        write_status(output_dir, "complete", error.exit_code, message=str(error), **rest)
        raise
    write_status(output_dir, "complete", 0, **rest)


def prune_checkpoints(output_dir: Path, limit: int | None) -> None:
    """Remove the oldest checkpoints over `limit`; called after the newest is complete."""
    if limit is not None:
        for directory in checkpoint_dirs(output_dir)[:-limit]:
            shutil.rmtree(directory)


# ---------------------------------------------------------------- load


def checkpoint_dirs(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first; other folders are ignored."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    complete = [path for path in found if (path / "state.json").exists()]
    return sorted(complete, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def find_checkpoint_from_args(args) -> Path | None:
    """The checkpoint to go on from: a path as written, a name in output_dir, or the newest there; None to start."""
    output_dir, wanted = Path(args.output_dir), args.resume_from_checkpoint
    if wanted in (None, "latest"):
        newest = (checkpoint_dirs(output_dir) or [None])[-1]
        if newest is None and (wanted or read_state(output_dir) == "complete"):
            logger.info("%s holds no checkpoint: starting at step 0", output_dir)
        if newest and (args.max_train_steps or math.inf) < step_of(newest):
            raise UsageError(
                f"{newest}: already beyond --max_train_steps {args.max_train_steps}; name an older checkpoint with "
                "--resume_from_checkpoint"
            )
        return newest
    for path in (Path(wanted), output_dir / wanted):
        if (path / "state.json").exists():
            if path.resolve().parent != output_dir.resolve():
                refuse_other_run(args, path.resolve().parent, "give the same, or name a checkpoint of a run like this")
            return path
    raise UsageError(
        f"--resume_from_checkpoint {wanted}: no checkpoint there (no state.json); give a path, a name or latest"
    )


def load_checkpoint(path: Path, engine, state: TrainingState, facts: dict) -> int:
    """Restore weights, optimizer, schedule and scaler; returns the step. `facts` must equal those saved."""
    try:
        saved = json.loads((path / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(path / "optimizer.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise UsageError(f"{path}: not a readable checkpoint ({error}); name an older one") from error
    for name, value in facts.items():
        if saved.get(name) != value:
            raise UsageError(
                f"{path}: its {name} was {saved.get(name)}, now it is {value}; it cannot go on from there"
            )
    engine.load_state(path)
    state.optimizer.load_state_dict(join_tensors(tensors, saved["optimizer"]))
    state.lr_scheduler.load_state_dict(saved["lr_scheduler"])
    if state.scaler:
        state.scaler.load_state_dict(saved["scaler"])
    logger.info("continuing from %s at step %d", path, saved["step"])
    return saved["step"]
