"""Checkpoints that continue exactly where the data stood, and the folder they live in.

A checkpoint is the result's file or folder beside `optimizer.safetensors`, `state.json` and `manifest.json`, which
holds every file's size and hash, and the trained weights where the result's differ; nothing is pickled.
Random state need not be kept: every draw is a function of the seed and of the sample's position in the run.
"""

import contextlib
import importlib.metadata
import itertools
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from args import recorded_flags
from captions import remove_caption_embeds
from durable import (
    REPLACED,
    TEMPORARY,
    clean_up,
    damage,
    free_bytes,
    keep,
    lock_folder,
    make_folder,
    remove,
    rename,
    undo,
    write_json,
    written_folder,
)
from errors import Interrupted, NumbersError, StorageError, UsageError, first_line
from hub import RunFacts, push_from_args, write_outputs_from_args
from lora import hash_lora
from optimizers import join_tensors, schedule_state, split_tensors, state_bytes_from_args
from quantization import bytes_unquantized
from runtime import memory_report, on_main_process
from signals import INTERRUPTION
from status import begin_run, forget_refusal, read_status, write_status
from tracking import finish_trackers
from update import TrainingState


logger = logging.getLogger(__name__)

# Flags that do not touch what is trained: they may differ when a run goes on
FREE_FLAGS = {
    "allow_cpu", "allow_outside_root", "cache_dir", "checkpointing_steps", "checkpoints_total_limit",
    "dataloader_num_workers",
    "enable_model_cpu_offload", "export", "guidance_scale", "height", "hub_model_id", "hub_public", "log_every",
    "logging_dir", "max_bad_steps", "nccl_timeout", "no_first_validation", "num_inference_steps",
    "num_validation_videos", "output_dir", "overwrite", "pin_memory", "push_to_hub", "report_to",
    "resume_from_checkpoint", "tracker_name", "use_dynamic_cfg",
    "validation_attention", "validation_data_root", "validation_epochs", "validation_images", "validation_num_clips",
    "validation_prompt", "validation_prompt_separator", "validation_steps", "width",
}  # fmt: skip
# These change memory and time, not what is computed: what ran out of memory may go on with them
MEMORY_FLAGS = {
    "gradient_checkpointing", "memory", "compile_blocks", "no_compile_blocks", "attention", "enable_slicing",
    "offload_gradients",
}  # fmt: skip
LENGTH_FLAGS = {"max_train_steps", "num_train_epochs"}
# What these name may lie elsewhere when a run goes on: what they hold is compared, see content_from_args
DATA_FLAGS = ("data_root", "dataset_file", "video_column", "caption_column")
MODEL_FLAGS = ("pretrained_model_name_or_path", "revision", "variant", "init_transformer")
CONTENT_FLAGS = {*DATA_FLAGS, *MODEL_FLAGS, "init_lora"}
CONTENT = {  # name in args.json -> (what it is, the flags that name it)
    "data": ("the list of clips, captions and sizes", DATA_FLAGS),
    "files": ("the files of the clips", DATA_FLAGS),
    "transformer": ("the transformer's weights", MODEL_FLAGS),
    "others": ("the model's settings, VAE or text encoder", MODEL_FLAGS),
    "init_lora": ("the LoRA that it started from", ("init_lora",)),
}
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft")
SAID_FROM = 2**30  # bytes: a result of less is written in no time
CONSTANT_SCHEDULES = {"constant", "constant_with_warmup"}


# ---------------------------------------------------------------- the output folder


def open_output_dir_from_args(args, accelerator) -> int | None:
    """Make or re-open `output_dir`. Returns the seed that a run to go on with there had drawn, else None.

    Refuses, with UsageError on all ranks, a folder that another process writes, or that holds another run, unless
    --overwrite moves it aside. Where the command is refused, here or until `record_run_from_args`, all stays as it was.
    """
    return on_main_process(accelerator, lambda: claim_output_dir_from_args(args))


def claim_output_dir_from_args(args) -> int | None:
    output_dir = Path(args.output_dir)
    keep()  # of a run before it in this process
    make_folder(output_dir)
    lock_folder(output_dir)
    if args.overwrite:
        refuse_own_checkpoint(args, output_dir)
    if args.overwrite and any(path.name != ".lock" for path in output_dir.iterdir()):
        move_aside(output_dir)
        make_folder(output_dir)
        lock_folder(output_dir)
    unfinished = list(output_dir.glob(f"{REPLACED}checkpoint-*"))
    is_new = not (checkpoint_dirs(output_dir) or unfinished or is_complete(output_dir))
    if not (args.overwrite or is_new):
        refuse_other_run(args, output_dir, "choose another --output_dir, or pass --overwrite to move it aside")
    clean_up(output_dir)
    return None if args.overwrite or is_new or args.seed is not None else read_record(output_dir)["seed"]


def refuse_own_checkpoint(args, output_dir: Path) -> None:
    """UsageError if the checkpoint to go on from would be moved aside with the folder."""
    wanted = args.resume_from_checkpoint
    if wanted is None:
        return
    if wanted == "latest" or named_checkpoint(output_dir, wanted).resolve().parent == output_dir.resolve():
        raise UsageError(
            f"--overwrite and --resume_from_checkpoint {wanted}: the checkpoint would be moved aside with {output_dir}; "
            "leave out one of them"
        )


def move_aside(output_dir: Path) -> None:
    """Rename the folder: the time in its new name, and a number where that is taken."""
    whole = output_dir.resolve()
    name = f"{whole.name}.{time.strftime('%Y%m%d-%H%M%S')}"
    number = next(n for n in itertools.count(1) if not whole.with_name(f"{name}.{n}").exists())
    aside = whole.with_name(f"{name}.{number}")
    rename(whole, aside)
    undo.append(lambda: aside.rename(whole))
    logger.info("the old %s is now %s", output_dir, aside)


def read_record(output_dir: Path) -> dict:
    """args.json of the run whose checkpoints lie in `output_dir`."""
    record = output_dir / "args.json"
    if not record.exists():
        raise UsageError(f"{record}: missing, so that nothing tells which run made the checkpoints beside it")
    return json.loads(record.read_text(encoding="utf-8"))


def refuse_other_run(args, output_dir: Path, advice: str) -> None:
    """UsageError, ending in `advice`, unless the run in `output_dir` had the same flags, save those that do not touch
    what was trained and those whose content is compared.
    """
    record, flags = read_record(output_dir), recorded_flags(args)
    earlier = record["flags"]
    if earlier.get("seed") is None and flags["seed"] == record["seed"]:
        earlier = earlier | {"seed": record["seed"]}  # the seed it drew, now named
    # Flags that are new since then count as they are now, unless they were given
    earlier = {name: flags[name] for name in flags.keys() - earlier.keys() - set(args.given)} | earlier
    names = sorted(name for name in flags.keys() | earlier.keys() if flags.get(name) != earlier.get(name))
    may_extend = args.lr_scheduler in CONSTANT_SCHEDULES or not is_complete(output_dir)
    free = FREE_FLAGS | MEMORY_FLAGS | CONTENT_FLAGS | (LENGTH_FLAGS if may_extend else set())
    refused = [f"--{name} {earlier.get(name)} -> {flags.get(name)}" for name in names if name not in free]
    if refused:
        raise UsageError(f"{output_dir}: holds a run with other flags ({', '.join(refused)}); {advice}")
    if changed := [name for name in names if name in LENGTH_FLAGS]:
        logger.info("continuing with changed %s", ", ".join(f"--{name} {flags.get(name)}" for name in changed))


def holds_run(output_dir: Path) -> bool:
    return bool(checkpoint_dirs(output_dir)) or is_complete(output_dir)


def content_from_args(args, accelerator, dataset, hash_model: Callable[[], dict]) -> dict[str, str | None]:
    """Hashes of all that a run is trained on, see CONTENT; UsageError on all ranks where output_dir holds a run on
    something else. The main process reads for all.
    """

    def read() -> dict:
        content = {
            "data": dataset.fingerprint(),
            "data_as_written": dataset.fingerprint(as_written=True),
            "files": dataset.content(),
            **hash_model(),
            **hash_lora(args.init_lora),
        }
        if holds_run(Path(args.output_dir)):
            advice = "choose another --output_dir, or pass --overwrite to move it aside"
            refuse_other_content(args, Path(args.output_dir), content, advice)
        return content

    return on_main_process(accelerator, read)


def refuse_other_content(args, output_dir: Path, content: dict, advice: str) -> None:
    """UsageError, ending in `advice`, unless the run in `output_dir` was trained on the same. What moved is said in one
    line, and so is what cannot be compared.
    """
    earlier, flags, known = read_record(output_dir)["flags"], recorded_flags(args), recorded_content(output_dir)
    if args.init_transformer and "transformer" not in known:  # of a version that had no such start
        known["transformer"] = None
    if "data" in known and known["data"] == content.get(
        "data_as_written"
    ):  # of a version that hashed absolute paths as such
        known["data"] = content.get("data")
    names = [name for name in sorted(CONTENT_FLAGS) if earlier.get(name) != flags[name]]
    changes = {name: f"--{name} {earlier.get(name)} -> {flags[name]}" for name in names}
    both = [name for name in CONTENT if name in known and name in content]
    if differing := [name for name in both if known[name] != content[name]]:
        what = " and ".join(CONTENT[name][0] for name in differing)
        flags_of_these = {flag for name in differing for flag in CONTENT[name][1]}
        named = ", ".join(changes[flag] for flag in names if flag in flags_of_these)
        raise UsageError(f"{output_dir}: holds a run with other content: {what}{named and f' ({named})'}; {advice}")
    if changes:
        logger.info("%s goes on, with the same content at other places: %s", output_dir, ", ".join(changes.values()))
    if unknown := [what for name, (what, _) in CONTENT.items() if name not in both]:
        logger.warning(
            "%s goes on, though it cannot be compared whether these are the same: %s", output_dir, "; ".join(unknown)
        )


def recorded_content(output_dir: Path) -> dict:
    """What args.json says of the content. Of earlier versions the data's hash, in a checkpoint, and what they had not."""
    record = read_record(output_dir)
    if "content" in record:
        return record["content"]
    content = {} if record["flags"].get("init_lora") else {"init_lora": None}
    for directory in checkpoint_dirs(output_dir):
        with contextlib.suppress(OSError, ValueError, KeyError):  # damaged ones are named later
            content["data"] = json.loads((directory / "state.json").read_text(encoding="utf-8"))["data"]
    return content


def is_complete(output_dir: Path) -> bool:
    return read_status(output_dir).get("state") == "complete"


def is_complete_from_args(args, num_steps: int) -> bool:
    """True if the output folder holds the result of these very steps: the same command again has nothing to do."""
    output_dir = Path(args.output_dir)
    if args.resume_from_checkpoint not in (None, "latest") or not is_complete(output_dir):
        return False
    step = read_status(output_dir)["step"]
    if step >= num_steps:
        logger.info("%s is complete at step %d: nothing to do", output_dir, step)
    return step >= num_steps


def record_run_from_args(args, accelerator, engine, seed: int, first_step: int, num_steps: int, content: dict) -> None:
    """Before the first step, the main process: check the disk, rehearse checkpoints and the end, write args.json, drop the
    status of an earlier run.
    """
    keep()
    on_main_process(accelerator, lambda: check_disk_from_args(args, engine, first_step, num_steps))
    on_main_process(accelerator, lambda: rehearse_checkpoint(Path(args.output_dir)))
    if first_step == 0:
        rehearse_end_from_args(args, accelerator, engine)
    if accelerator.is_main_process:
        write_record_from_args(args, seed, content)
    begin_run(Path(args.output_dir), accelerator.is_main_process)


def rehearse_checkpoint(output_dir: Path) -> None:
    """Write a small checkpoint and one in its place, read it back and remove it: StorageError for a disk that cannot."""
    folder = output_dir / f"{TEMPORARY}{os.getpid()}-rehearsed-checkpoint"
    target, tensors = folder / "checkpoint-0", {"step": torch.arange(2)}
    try:
        folder.mkdir()
        for step in (1, 2):
            with written_folder(target) as unfinished:
                save_file(tensors, unfinished / "optimizer.safetensors")
                for _ in range(2):  # a file in place of another
                    write_json(unfinished / "state.json", {"step": step})
        if reason := damage(target):
            raise StorageError(
                f"{output_dir}: gives back other files than were written ({reason}); choose another disk"
            )
        load_file(target / "optimizer.safetensors")
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{output_dir}: cannot hold checkpoints ({first_line(error)}); choose another disk"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def rehearse_end_from_args(args, accelerator, engine) -> None:
    """Write the untrained result, check it as at the end, and remove it: what would fail there fails here.

    Nothing is loaded twice: the check compares file and weights. Validation has its rehearsal in that of step 0.
    """
    _, num_bytes = file_bytes_from_args(args, engine)
    if num_bytes > SAID_FROM:
        logger.info(
            "rehearsing the end of the run: a result of %.1f GiB is written, checked and removed", num_bytes / 2**30
        )
    engine.gather()
    if accelerator.is_main_process:
        folder = Path(args.output_dir) / f"{TEMPORARY}{os.getpid()}-rehearsal"
        folder.mkdir(exist_ok=True)
        try:
            engine.save(folder)
            engine.check(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    accelerator.wait_for_everyone()


def write_record_from_args(args, seed: int, content: dict) -> None:
    """args.json: the flags as given, which of them were given, the seed in force, hashes of `content`, the packages."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    record = {"flags": recorded_flags(args), "given": args.given, "seed": seed, "content": content}
    write_json(Path(args.output_dir) / "args.json", record | {"versions": versions})


# ---------------------------------------------------------------- save


def save_checkpoint(output_dir: Path, step: int, engine, state: TrainingState, facts: dict) -> Path:
    """Write `checkpoint-<step>/`: what has that name is complete, an earlier one of that name included."""
    tensors, optimizer = split_tensors(state.optimizer.state_dict())
    refuse_bad_numbers([*engine.params, *tensors.values()])
    target = output_dir / f"checkpoint-{step}"
    with written_folder(target) as folder:
        engine.save_state(folder)
        save_file(tensors, folder / "optimizer.safetensors")
        content = {
            **facts,
            "step": step,
            "optimizer": optimizer,
            "lr_scheduler": schedule_state(state.lr_scheduler),
            "scaler": state.scaler.state_dict() if state.scaler else None,
        }
        write_json(folder / "state.json", content)
    return target


def refuse_bad_numbers(tensors: list[torch.Tensor]) -> None:
    """NumbersError if a value is not finite: such weights are written nowhere."""
    checked = [
        torch.isfinite(tensor).all() for tensor in tensors if tensor.is_floating_point() and tensor.itemsize > 1
    ]
    if not all(torch.stack([flag.cpu() for flag in checked]) if checked else ()):
        raise NumbersError(
            "weights or optimizer states are no longer finite, so that nothing is written; lower --learning_rate, and "
            "name the last checkpoint with --resume_from_checkpoint"
        )


def check_disk_from_args(args, engine, first_step: int, num_steps: int) -> None:
    """StorageError if the checkpoints and the result cannot fit on the disk.

    Where no limit is set and only the later ones do not fit, a warning: the user may delete some.
    """
    output_dir, limit = Path(args.output_dir), args.checkpoints_total_limit
    checkpoint, result = file_bytes_from_args(args, engine)
    if "merged" in args.export:  # the whole base model again
        result += bytes_unquantized(engine.transformer)
    saves = num_steps // args.checkpointing_steps - first_step // args.checkpointing_steps
    # The newest is written before the oldest goes; those that lie there already take no more room
    together = saves if limit is None else min(saves, limit + 1 - min(limit, len(checkpoint_dirs(output_dir))))
    needed, free = checkpoint * together + result, free_bytes(output_dir)
    if needed <= free:
        return
    line = (
        f"{output_dir}: {together} checkpoints of {checkpoint / 2**30:.1f} GiB and the result of {result / 2**30:.1f} "
        f"GiB need {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
    )
    if limit is None and checkpoint + result <= free:
        logger.warning("%s; --checkpoints_total_limit keeps fewer", line)
    else:
        raise StorageError(f"{line}; free some, or lower --checkpoints_total_limit")


def file_bytes_from_args(args, engine) -> tuple[int, int]:
    """(bytes of a checkpoint, of the result), estimated from above."""
    weights = sum(param.numel() for param in engine.params)
    states = weights * state_bytes_from_args(args)
    copies = weights * 4 * (1 + args.ema)  # fp32 weights, and their average
    save_dtype = getattr(engine, "save_dtype", None)  # full fine-tuning writes the model too
    result = weights * (save_dtype.itemsize if save_dtype else 4)
    if save_dtype:
        return states + copies + result, result
    is_scaled = args.lora_alpha != args.rank or args.use_rslora
    return states + copies + (result if is_scaled else 0), result  # B as it is trained, beside the file


def save_checkpoint_from_args(args, accelerator, step: int, engine, state: TrainingState, facts: dict) -> None:
    """A checkpoint by the main process, the oldest removed after it is complete; the other ranks wait."""
    output_dir = Path(args.output_dir)
    state.gather()
    if accelerator.is_main_process:
        save_checkpoint(output_dir, step, engine, state, facts)
        prune_checkpoints(output_dir, args.checkpoints_total_limit, step)
    accelerator.wait_for_everyone()


def leave_if_interrupted_from_args(
    args, accelerator, first_step: int, step: int, num_steps: int, engine, state: TrainingState, facts: dict
) -> None:
    """After the loop: where it ended early, all ranks leave with a checkpoint of the last update, exit code 75."""
    if step == num_steps:
        return
    if step > first_step and step % args.checkpointing_steps:
        save_checkpoint_from_args(args, accelerator, step, engine, state, facts)
    reason = INTERRUPTION.reason or "a signal to another process"
    raise Interrupted(f"stopped by {reason} after step {step} of {num_steps}; the same command continues from there")


def save_result(accelerator, output_dir: Path, engine) -> None:
    """Write the result and check it as diffusers loads it: before the last test, whatever becomes of that."""
    engine.gather()
    if accelerator.is_main_process:
        refuse_bad_numbers(engine.params)
        result = engine.save(output_dir)
        engine.check(output_dir)
        logger.info("the result: %s", result)
    accelerator.wait_for_everyone()


def finish_run_from_args(args, accelerator, about: RunFacts) -> None:
    """Write what belongs beside the result, say in status.json that all is done, upload."""
    output_dir = Path(args.output_dir)
    remove_caption_embeds(output_dir)
    if accelerator.is_main_process:
        write_outputs_from_args(args, about)
        write_status(output_dir, "complete", 0, step=about.num_steps, **memory_report(accelerator.device))
        logger.info("complete at step %d: %s", about.num_steps, output_dir)
    accelerator.wait_for_everyone()
    finish_trackers(accelerator)
    accelerator.end_training()  # an upload may outlast every timeout: nobody waits for it
    upload_from_args(args, about)


def finish_again_from_args(args, accelerator, about: RunFacts) -> None:
    """A complete run's forms that --export asks for and that are not there yet, and its upload."""
    if accelerator.is_main_process:
        forget_refusal(Path(args.output_dir))
        if args.export or about.hub_repo:
            write_outputs_from_args(args, about, only_missing=True)
    upload_from_args(args, about)


def upload_from_args(args, about: RunFacts) -> None:
    """Upload a complete run where that was asked for; status.json tells of a failure and stays complete."""
    if about.hub_repo is None:
        return
    output_dir = Path(args.output_dir)
    told_anew = ("state", "exit_code", "message", "run")
    rest = {name: value for name, value in read_status(output_dir).items() if name not in told_anew}
    try:
        push_from_args(args, about.hub_repo)
    except StorageError as error:
        write_status(output_dir, "complete", error.exit_code, message=str(error), **rest)
        raise
    write_status(output_dir, "complete", 0, **rest)


def prune_checkpoints(output_dir: Path, limit: int | None, newest: int) -> None:
    """Remove the oldest checkpoints over `limit`; called after the one of step `newest` is complete.

    Later ones do not count: damaged, or left by a run that an older checkpoint was named to replace.
    """
    if limit is not None:
        for directory in [path for path in checkpoint_dirs(output_dir) if step_of(path) <= newest][:-limit]:
            remove(directory)


# ---------------------------------------------------------------- load


def checkpoint_dirs(output_dir: Path) -> list[Path]:
    """Folders named checkpoint-<step>, oldest first, whole or not; others are ignored."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def find_checkpoint_from_args(args, accelerator, num_steps: int, content: dict) -> Path | None:
    """The checkpoint to go on from: a path as written, a name or step in output_dir, or the newest whole one there.

    None: start at step 0, because there is none. The main process looks, and hashes, for all.
    """
    return on_main_process(accelerator, lambda: choose_checkpoint_from_args(args, num_steps, content))


def choose_checkpoint_from_args(args, num_steps: int, content: dict) -> Path | None:
    output_dir, wanted = Path(args.output_dir), args.resume_from_checkpoint
    if wanted in (None, "latest"):
        newest = newest_whole(output_dir)
        if newest is None and (wanted or is_complete(output_dir)):
            logger.info("%s holds no checkpoint: starting at step 0", output_dir)
        if newest:
            refuse_later_step(newest, step_of(newest), num_steps)
        return newest
    path = named_checkpoint(output_dir, wanted)
    if reason := damage(path):
        raise UsageError(
            f"--resume_from_checkpoint {wanted}: {reason}; name another, or latest for the newest whole one"
        )
    folder = path.resolve().parent
    if folder != output_dir.resolve():
        advice = "give the same, or name a checkpoint of a run like this"
        refuse_other_run(args, folder, advice)
        refuse_other_content(args, folder, content, advice)
    refuse_later_step(path, json.loads((path / "state.json").read_text(encoding="utf-8"))["step"], num_steps)
    return path


def refuse_later_step(checkpoint: Path, step: int, num_steps: int) -> None:
    """UsageError for a checkpoint that the run would have to go back from."""
    if step > num_steps:
        raise UsageError(
            f"{checkpoint}: already beyond the {num_steps} updates of this run; name an older checkpoint with "
            "--resume_from_checkpoint, or raise --max_train_steps or --num_train_epochs"
        )


def named_checkpoint(output_dir: Path, wanted: str) -> Path:
    """The folder that --resume_from_checkpoint names; UsageError if there is none."""
    for path in (Path(wanted), output_dir / wanted, output_dir / f"checkpoint-{wanted}"):
        if (path / "state.json").exists() or (path / "manifest.json").exists():
            return path
    raise UsageError(
        f"--resume_from_checkpoint {wanted}: no checkpoint there (no state.json); give a path, a name, a step or latest"
    )


def newest_whole(output_dir: Path) -> Path | None:
    """The newest checkpoint that is as it was written, a line for each newer one that is not; None without any.

    UsageError if there are some, but none is whole: starting anew is for the user to say.
    """
    directories = checkpoint_dirs(output_dir)[::-1]
    for directory in directories:
        reason = damage(directory)
        if reason is None:
            return directory
        logger.warning("%s cannot be used: %s", directory, reason)
    if directories:
        raise UsageError(
            f"{output_dir}: none of its {len(directories)} checkpoints is whole (the newest: {reason}); restore one, or "
            "pass --overwrite to move the folder aside and start anew"
        )
    return None


def load_checkpoint(path: Path, engine, state: TrainingState, facts: dict) -> int:
    """Restore weights, optimizer, schedule and scaler of a whole checkpoint; returns the step.

    `facts` must equal those saved, but for the rule of draws about clips.
    """
    saved = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if facts.get("draws") and "draws" not in saved:
        logger.warning(
            "%s: made when starts, crops, flips, first frames and the noise on held-out clips were drawn by a clip's place "
            "in the list; from here on they are drawn by its path, so that they differ from those before",
            path,
        )
    if "data_as_written" in facts and saved.get("data") == facts["data_as_written"]:  # of an earlier version
        saved["data"] = facts["data"]
    for name, value in facts.items():
        if name not in ("draws", "data_as_written") and saved.get(name) != value:
            raise UsageError(
                f"{path}: its {name} was {saved.get(name)}, now it is {value}; it cannot go on from there"
            )
    engine.load_state(path)
    state.optimizer.load_state_dict(join_tensors(load_file(path / "optimizer.safetensors"), saved["optimizer"]))
    state.lr_scheduler.load_state_dict(saved["lr_scheduler"])
    if state.scaler:
        state.scaler.load_state_dict(saved["scaler"])
    logger.info("continuing from %s at step %d", path, saved["step"])
    return saved["step"]
