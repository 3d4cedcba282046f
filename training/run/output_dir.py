"""A run's output folder: whose it is, whether this command continues it, and args.json."""

import contextlib
import importlib.metadata
import itertools
import json
import logging
import re
import time
from pathlib import Path

from base.errors import UsageError
from base.files import (
    REPLACED,
    clean_up,
    forget_undo,
    lock_folder,
    make_folder,
    remove_unfinished,
    rename,
    undo,
    write_json,
)
from base.flag_parser import recorded_flags
from base.ranks import on_main_process
from base.startup import STARTUP
from base.status import begin_run, read_status
from engine.lora import hash_lora
from run.held_out import HeldOutClips, draw_rule


logger = logging.getLogger(__name__)

# Flags that do not affect what is trained: they may change when a run continues
FREE_FLAGS = {
    "allow_cpu", "allow_outside_root", "cache_dir", "checkpointing_steps", "checkpoints_total_limit",
    "dataloader_num_workers",
    "enable_model_cpu_offload", "export", "guidance_scale", "height", "host_memory", "hub_model_id", "hub_public", "log_every",
    "logging_dir", "max_bad_steps", "nccl_timeout", "no_first_validation", "num_inference_steps",
    "num_validation_videos", "output_dir", "overwrite", "pin_memory", "push_to_hub", "report_to",
    "resume_from_checkpoint", "tracker_name", "use_dynamic_cfg",
    "validation_attention", "validation_data_root", "validation_epochs", "validation_images", "validation_num_clips",
    "validation_prompt", "validation_prompt_separator", "validation_steps", "width",
}  # fmt: skip
# These affect memory and time, not what is computed: after running out of memory, a run may continue with others
MEMORY_FLAGS = {
    "gradient_checkpointing", "memory", "compile_blocks", "no_compile_blocks", "attention", "enable_slicing",
    "offload_gradients", "use_cpu_offload_optimizer", "states_on_gpu",
}  # fmt: skip
LENGTH_FLAGS = {"max_train_steps", "num_train_epochs"}
# The paths may change when a run continues: hashes of what they name are compared instead, see check_provenance
DATA_FLAGS = ("data_root", "dataset_file", "video_column", "caption_column")
MODEL_FLAGS = ("pretrained_model_name_or_path", "revision", "variant", "init_transformer")
HASHED_FLAGS = {*DATA_FLAGS, *MODEL_FLAGS, "init_lora"}
HASHED = {  # name in args.json -> (what it is, the flags that name it)
    "data": ("the list of clips, captions and sizes", DATA_FLAGS),
    "files": ("the files of the clips", DATA_FLAGS),
    "transformer": ("the transformer's weights", MODEL_FLAGS),
    "others": ("the model's settings, VAE or text encoder", MODEL_FLAGS),
    "init_lora": ("the LoRA that it started from", ("init_lora",)),
}
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft")
CONSTANT_SCHEDULES = {"constant", "constant_with_warmup"}


def open_output_dir(args, accelerator) -> int | None:
    """Create or reopen `output_dir`. Returns the seed that was drawn by the run to continue there, else None.

    Refuses, with UsageError on all ranks, a folder that another process writes to, or that holds another run, unless
    --overwrite moves it aside. If the command is refused, here or before `record_run`, everything stays as it was.
    """
    return on_main_process(accelerator, lambda: claim_output_dir(args))


def claim_output_dir(args) -> int | None:
    output_dir = Path(args.output_dir)
    forget_undo()  # left by an earlier run in this process
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
    for folder in output_dir.glob("samples/*"):
        remove_unfinished(folder)
    return None if args.overwrite or is_new or args.seed is not None else read_record(output_dir)["seed"]


def refuse_own_checkpoint(args, output_dir: Path) -> None:
    """Raise UsageError if --overwrite would move the checkpoint to resume from aside."""
    wanted = args.resume_from_checkpoint
    if wanted is None:
        return
    if wanted == "latest" or named_checkpoint(output_dir, wanted).resolve().parent == output_dir.resolve():
        raise UsageError(
            f"--overwrite and --resume_from_checkpoint {wanted}: the checkpoint would be moved aside with {output_dir}; "
            "leave out one of them"
        )


def move_aside(output_dir: Path) -> None:
    """Rename the folder: the new name has the time, and a number that makes it unique."""
    whole = output_dir.resolve()
    name = f"{whole.name}.{time.strftime('%Y%m%d-%H%M%S')}"
    number = next(n for n in itertools.count(1) if not whole.with_name(f"{name}.{n}").exists())
    aside = whole.with_name(f"{name}.{number}")
    rename(whole, aside)
    undo.append(lambda: aside.rename(whole))
    logger.info("the old %s is now %s", output_dir, aside)


def read_record(output_dir: Path) -> dict:
    """args.json of the run whose checkpoints are in `output_dir`."""
    record = output_dir / "args.json"
    if not record.exists():
        raise UsageError(f"{record}: missing, so it is unknown which run made the checkpoints beside it")
    return json.loads(record.read_text(encoding="utf-8"))


def refuse_other_run(args, output_dir: Path, advice: str) -> None:
    """Raise UsageError, ending in `advice`, unless the run in `output_dir` had the same flags.

    Exempt are flags that do not affect what was trained, and paths: what lies there is compared by its hash.
    """
    record, flags = read_record(output_dir), recorded_flags(args)
    earlier = record["flags"]
    if earlier.get("seed") is None and flags["seed"] == record["seed"]:
        earlier = earlier | {"seed": record["seed"]}  # the seed it drew, now given
    # Flags added since then count as unchanged unless they are given now
    earlier = {name: flags[name] for name in flags.keys() - earlier.keys() - set(args.given)} | earlier
    names = sorted(name for name in flags.keys() | earlier.keys() if flags.get(name) != earlier.get(name))
    may_extend = args.lr_scheduler in CONSTANT_SCHEDULES or not is_complete(output_dir)
    free = FREE_FLAGS | MEMORY_FLAGS | HASHED_FLAGS | (LENGTH_FLAGS if may_extend else set())
    if args.load_tensors:
        free |= {"enable_tiling"}  # the VAE only decodes samples
    refused = [f"--{name} {earlier.get(name)} -> {flags.get(name)}" for name in names if name not in free]
    if refused:
        raise UsageError(f"{output_dir}: holds a run with other flags ({', '.join(refused)}); {advice}")
    if changed := [name for name in names if name in LENGTH_FLAGS]:
        logger.info("continuing with changed %s", ", ".join(f"--{name} {flags.get(name)}" for name in changed))


def holds_run(output_dir: Path) -> bool:
    return bool(checkpoint_dirs(output_dir)) or is_complete(output_dir)


def check_provenance(args, run, model, clips, held_out: HeldOutClips) -> dict[str, str | int | None]:
    """What the run is made from, and one that continues it must share: hashes of data and model, seed, ranks, draws.

    The main process hashes for all ranks. UsageError on all of them if output_dir holds a run made from something else.
    """

    def read() -> dict:
        hashes = {
            "data": clips.fingerprint(),
            "data_as_written": clips.fingerprint(as_written=True),
            "files": clips.hash_files(),
            **model.hash_from_args(args),
            **hash_lora(args.init_lora),
        }
        if holds_run(Path(args.output_dir)):
            advice = "choose another --output_dir, or pass --overwrite to move it aside"
            refuse_other_hashes(args, Path(args.output_dir), hashes, advice)
        return hashes

    hashes = on_main_process(run.accelerator, read)
    return {**hashes, "seed": run.seed, "num_processes": run.num_ranks, "draws": draw_rule(clips, held_out)}


def refuse_other_hashes(args, output_dir: Path, hashes: dict, advice: str) -> None:
    """Raise UsageError, ending in `advice`, unless the run in `output_dir` was trained on the same data and model.

    What only moved is logged in one line, and so is what cannot be compared.
    """
    earlier, flags, known = read_record(output_dir)["flags"], recorded_flags(args), recorded_hashes(output_dir)
    if args.init_transformer and "transformer" not in known:  # recorded before the flag existed
        known["transformer"] = None
    # Earlier versions hashed absolute paths as they are written
    if "data" in known and known["data"] == hashes.get("data_as_written"):
        known["data"] = hashes.get("data")
    names = [name for name in sorted(HASHED_FLAGS) if earlier.get(name) != flags[name]]
    changes = {name: f"--{name} {earlier.get(name)} -> {flags[name]}" for name in names}
    both = [name for name in HASHED if name in known and name in hashes]
    if differing := [name for name in both if known[name] != hashes[name]]:
        what = " and ".join(HASHED[name][0] for name in differing)
        flags_of_these = {flag for name in differing for flag in HASHED[name][1]}
        named = ", ".join(changes[flag] for flag in names if flag in flags_of_these)
        raise UsageError(f"{output_dir}: holds a run with other content: {what}{named and f' ({named})'}; {advice}")
    if changes:
        logger.info("%s continues, with the same content in other places: %s", output_dir, ", ".join(changes.values()))
    if unknown := [what for name, (what, _) in HASHED.items() if name not in both]:
        logger.warning(
            "%s continues, but these cannot be compared with what it was trained on: %s",
            output_dir,
            "; ".join(unknown),
        )


def recorded_hashes(output_dir: Path) -> dict:
    """The hashes in args.json. Earlier versions: the data's from a checkpoint, None for an unused --init_lora."""
    record = read_record(output_dir)
    if "content" in record:
        return record["content"]
    hashes = {} if record["flags"].get("init_lora") else {"init_lora": None}
    for directory in checkpoint_dirs(output_dir):
        with contextlib.suppress(OSError, ValueError, KeyError):  # damaged ones are reported later
            hashes["data"] = json.loads((directory / "state.json").read_text(encoding="utf-8"))["data"]
    return hashes


def is_complete(output_dir: Path) -> bool:
    return read_status(output_dir).get("state") == "complete"


def is_done(args, num_steps: int) -> bool:
    """True if the output folder holds the finished result of this command: there is nothing left to do."""
    output_dir = Path(args.output_dir)
    if args.resume_from_checkpoint not in (None, "latest") or not is_complete(output_dir):
        return False
    step = read_status(output_dir)["step"]
    if step >= num_steps:
        logger.info("%s is complete at step %d: nothing to do", output_dir, step)
    return step >= num_steps


def record_run(args, run, provenance: dict) -> None:
    """Rewrite args.json and drop the status of an earlier run: from here on the folder is this run's."""
    if run.rank == 0:
        write_record(args, run.seed, provenance)
    begin_run(run.output_dir, run.rank == 0)
    STARTUP.mark("checkpoint")


def write_record(args, seed: int, provenance: dict) -> None:
    """Write args.json: the flags, which of them were given, the seed in use, hashes of data and model, package versions."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    hashes = {name: provenance[name] for name in (*HASHED, "data_as_written") if name in provenance}
    record = {"flags": recorded_flags(args), "given": args.given, "seed": seed, "content": hashes}
    write_json(Path(args.output_dir) / "args.json", record | {"versions": versions})


def checkpoint_dirs(output_dir: Path) -> list[Path]:
    """Folders named checkpoint-<step>, oldest first, intact or not; others are ignored."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def named_checkpoint(output_dir: Path, wanted: str) -> Path:
    """The folder that --resume_from_checkpoint names; UsageError if there is none."""
    for path in (Path(wanted), output_dir / wanted, output_dir / f"checkpoint-{wanted}"):
        if (path / "state.json").exists() or (path / "manifest.json").exists():
            return path
    raise UsageError(
        f"--resume_from_checkpoint {wanted}: no checkpoint there (no state.json); give a path, a name, a step or latest"
    )
