"""The end of a run, rehearsed before its first step: disk space, the result and what lies beside it, the upload."""

import logging
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from base.errors import StorageError, first_line
from base.files import forget_undo, free_bytes, scratch_folder, write_json, written_folder
from base.manifest import find_damage
from base.ranks import on_main_process
from base.status import clear_refusal, read_status, write_status
from base.tensor_file import save_tensors
from data.captions import remove_caption_embeds
from engine.optimizers import state_bytes_from_args
from memory.quantization import unquantized_bytes
from run.checkpoints import refuse_bad_numbers
from run.curves import draw_losses
from run.export import export_lora
from run.hub import push
from run.metrics import memory_report
from run.model_card import LOSS_NAME, RunSummary, write_card
from run.output_dir import checkpoint_dirs
from run.tracking import finish_trackers


logger = logging.getLogger(__name__)

LOG_ABOVE_BYTES = 2**30  # smaller results take under a second to write: not logged


# ---------------------------------------------------------------- rehearsed before the first step


def rehearse(args, run, engine, first_step: int, num_steps: int) -> None:
    """Before the first step, on the main process: check disk space, and that checkpoints and the result can be
    written.
    """
    forget_undo()
    on_main_process(run.accelerator, lambda: check_disk(args, engine, first_step, num_steps))
    on_main_process(run.accelerator, lambda: rehearse_checkpoint(run.output_dir))
    if first_step == 0:
        rehearse_end(args, run.accelerator, engine)


def rehearse_checkpoint(output_dir: Path) -> None:
    """Write a small checkpoint, replace it, read it back and remove it; StorageError if the disk cannot do that."""
    tensors = {"step": torch.arange(2)}
    try:
        with scratch_folder(output_dir / "rehearsed-checkpoint") as folder:
            target = folder / "checkpoint-0"
            for step in (1, 2):
                with written_folder(target) as unfinished:
                    save_tensors(unfinished / "optimizer.safetensors", tensors)
                    for _ in range(2):  # the second replaces the first
                        write_json(unfinished / "state.json", {"step": step})
            if reason := find_damage(target):
                raise StorageError(
                    f"{output_dir}: gives back other files than were written ({reason}); choose another disk"
                )
            load_file(target / "optimizer.safetensors")
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{output_dir}: cannot hold checkpoints ({first_line(error)}); choose another disk"
        ) from error


def rehearse_end(args, accelerator, engine) -> None:
    """Write the untrained result, check it as at the end, and remove it: what would fail then fails now.

    Nothing is loaded twice: the check compares files with weights. Validation at step 0 is its own rehearsal.
    """
    _, num_bytes = file_bytes(args, engine)
    if num_bytes > LOG_ABOVE_BYTES:
        logger.info(
            "rehearsing the end of the run: a result of %.1f GiB is written, checked and removed", num_bytes / 2**30
        )
    engine.complete()
    if accelerator.is_main_process:
        with scratch_folder(Path(args.output_dir, "rehearsal")) as folder:
            engine.save(folder)
            engine.check(folder)
    accelerator.wait_for_everyone()


# ---------------------------------------------------------------- the end


def check_disk(args, engine, first_step: int, num_steps: int) -> None:
    """StorageError if the checkpoints and the result cannot fit on the disk.

    Only a warning if no limit is set and just the later ones do not fit: the user may delete some.
    """
    output_dir, limit = Path(args.output_dir), args.checkpoints_total_limit
    checkpoint, result = file_bytes(args, engine)
    if "merged" in args.export:  # another copy of the base model
        result += unquantized_bytes(engine.transformer)
    saves = num_steps // args.checkpointing_steps - first_step // args.checkpointing_steps
    # The newest is written before the oldest is removed; existing ones need no more space
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


def file_bytes(args, engine) -> tuple[int, int]:
    """(bytes of a checkpoint, of the result), upper estimates."""
    weights = sum(param.numel() for param in engine.params)
    states = weights * state_bytes_from_args(args)
    masters = weights * 4 * (1 + args.ema)  # fp32 weights, and their average
    save_dtype = getattr(engine, "save_dtype", None)  # full fine-tuning writes the model too
    result = weights * (save_dtype.itemsize if save_dtype else 4)
    if save_dtype:
        return states + masters + result, result
    is_scaled = args.lora_alpha != args.rank or args.use_rslora
    return states + masters + (result if is_scaled else 0), result  # plus the unscaled B, in a file of its own


def save(run, engine) -> None:
    """Write the result and check it as diffusers loads it, before the final validation, which may fail."""
    engine.complete()
    if run.rank == 0:
        refuse_bad_numbers(engine.weights.values())
        result = engine.save(run.output_dir)
        engine.check(run.output_dir)
        logger.info("the result: %s", result)
    run.accelerator.wait_for_everyone()


def finish(args, run, summary: RunSummary) -> None:
    """Write what belongs beside the result, mark the run complete in status.json, upload."""
    remove_caption_embeds(run.output_dir)
    if run.rank == 0:
        write_outputs(args, summary)
        write_status(run.output_dir, "complete", 0, step=summary.plan.num_steps, **memory_report(run.device))
        logger.info("complete at step %d: %s", summary.plan.num_steps, run.output_dir)
    run.accelerator.wait_for_everyone()
    finish_trackers(run.accelerator)
    run.accelerator.end_training()  # before the upload, which may outlast any timeout: no rank waits for it
    upload_result(args, run)


def finish_again(args, run, summary: RunSummary) -> None:
    """For a run that is already complete: write the formats of --export that are missing, and upload."""
    if run.rank == 0:
        clear_refusal(run.output_dir)
        if args.export or run.hub_repo:
            write_outputs(args, summary, only_missing=True)
    upload_result(args, run)


def upload_result(args, run) -> None:
    """Upload a complete run if asked to; a failure is recorded in status.json, whose state stays complete."""
    if run.hub_repo is None:
        return
    output_dir = run.output_dir
    rewritten = ("state", "exit_code", "message", "run")
    rest = {name: value for name, value in read_status(output_dir).items() if name not in rewritten}
    try:
        push(args, run.hub_repo)
    except StorageError as error:
        write_status(output_dir, "complete", error.exit_code, message=str(error), **rest)
        raise
    write_status(output_dir, "complete", 0, **rest)


def write_outputs(args, summary: RunSummary, only_missing: bool = False) -> None:
    """Write what belongs beside the result: exports, the loss plot, the model card."""
    export_lora(args, *summary.model.weights, only_missing)
    draw_loss(Path(args.output_dir))
    write_card(args, summary)


def draw_loss(output_dir: Path) -> None:
    """Write `loss.png`; failing to draw it is only a warning."""
    name = output_dir.resolve().name
    try:
        if draw_losses({name: output_dir / "metrics.jsonl"}, output_dir / LOSS_NAME):
            logger.info("no update had a finite loss: %s is not drawn", LOSS_NAME)
    except (ImportError, OSError, StorageError, ValueError, KeyError, RuntimeError) as error:
        logger.warning("%s not drawn: %r", output_dir / LOSS_NAME, error)
