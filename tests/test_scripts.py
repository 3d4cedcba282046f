"""The training scripts from end to end on tiny models: same data, same weights, whatever way leads there."""

import json
import logging
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from args import parse_training_args
from base.errors import DataError
from data.buckets import pack_batches
from engine import compose, objective
from run import exits
from run.exits import run_script
from script_runs import (
    EVERY_SCRIPT,
    LORA_SCRIPTS,
    ROOT,
    SCRIPTS,
    SIZES,
    checkpoints,
    distance,
    four_scripts,
    image_flags,
    interrupt,
    losses,
    metrics,
    prepare,
    result_hash,
    result_tensors,
    run_ranks,
    same_run,
    status,
    write_lists,
)
from synthetic_clips import write_clip


ATEN = torch.ops.aten


# ---------------------------------------------------------------- same data, same weights


@four_scripts
def test_raw_videos_equal_prepared_latents(script, train):
    # The noise on a first frame is drawn per clip in one, per position in the other: only without the image are they equal
    flags = ["--max_train_steps", "3", *(["--noised_image_dropout", "1"] if script.kind.endswith("i2v") else [])]
    raw = train("raw", *flags, raw=True)
    latents = train("latents", *flags)
    assert result_hash(raw) == result_hash(latents)
    assert losses(raw) == losses(latents)
    other_seed = train("other", *flags, seed=2)
    assert result_hash(other_seed) != result_hash(latents)


def test_prepared_latents_need_neither_t5_nor_vae_weights(script, train, tiny, own_copy):
    bare = own_copy(tiny(script.kind), "bare")
    for name in ("text_encoder", "tokenizer"):
        shutil.rmtree(bare / name)
    for path in (bare / "vae").glob("*.safetensors"):
        path.unlink()
    assert status(train("out", "--max_train_steps", "1", model=bare))["state"] == "complete"


def test_data_workers_change_nothing(train):
    flags = ["--max_train_steps", "4", "--random_flip", "0.5", "--train_batch_size", "2"]
    runs = [train(n, *flags, "--dataloader_num_workers", n, raw=True, data="two") for n in ("0", "2")]
    assert same_run(*runs, step=4)


@four_scripts
def test_the_originals_folder_trains_alike(script, train, prepared, tmp_path):
    folder = write_original_folder(prepared(script.kind, "two"), tmp_path / "original")
    ours = train("ours", "--max_train_steps", "6", data="two")
    theirs = train("theirs", "--max_train_steps", "6", data=folder)
    assert result_hash(ours) == result_hash(theirs)


def write_original_folder(prepared, folder):
    """The same tensors as .pt files named after the videos, and no manifest."""
    for line in (prepared / "data.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name, key in (("video_latent", "moments"), ("prompt_embed", "prompt_embeds"), ("image_latent", "moments")):
            if row[name]:
                target = folder / Path(row[name]).parent / f"{Path(row['video']).stem}.pt"
                target.parent.mkdir(parents=True, exist_ok=True)
                tensor = load_file(prepared / row[name])[key]
                torch.save(tensor[0] if name == "image_latent" else tensor, target)
    for name in ("prompts.txt", "videos.txt"):
        shutil.copy(prepared / name, folder / name)
    return folder


# Rounding moves the weights by about 1e-6 of their norm; --epsilon keeps Adam from dividing noise by noise.
ROUNDING = 2e-5
COARSE_ADAM = ["--epsilon", "1e-3", "--max_train_steps", "3"]


@four_scripts
def test_accumulation_equals_a_larger_batch(train):
    accumulated = train("accumulated", *COARSE_ADAM, "--gradient_accumulation_steps", "4")
    batched = train("batched", *COARSE_ADAM, "--train_batch_size", "4")
    assert losses(accumulated) == pytest.approx(losses(batched), rel=1e-5)
    assert distance(accumulated, batched) < ROUNDING
    assert distance(accumulated, train("fewer", *COARSE_ADAM, "--gradient_accumulation_steps", "2")) > 10 * ROUNDING


@four_scripts
def test_two_processes_equal_one_with_twice_the_batch(script, module, command, train, tmp_path):
    flags = [*COARSE_ADAM, "--text_dropout", "0.5", "--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "2"]
    argv = command("two", *flags, "--train_batch_size", "2", "--gradient_accumulation_steps", "2")
    assert run_ranks(lambda: module.main(parse_training_args(script.key, argv)), 2) == [0, 0]
    one = train("one", *flags, "--train_batch_size", "4", "--gradient_accumulation_steps", "2")
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-5)
    assert distance(tmp_path / "two", one) < ROUNDING


def test_gradient_checkpointing_changes_nothing(train):
    plain = train("plain", "--max_train_steps", "3")
    checkpointed = train("checkpointed", "--max_train_steps", "3", "--gradient_checkpointing")
    assert losses(plain) == losses(checkpointed)
    assert result_hash(plain) == result_hash(checkpointed)


# ---------------------------------------------------------------- a step does not wait for the device


class Unread(TorchDispatchMode):
    """No tensor's values are asked for: on a GPU each such question waits for all that was asked of it before."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        asks = func in (ATEN._local_scalar_dense.default, ATEN.nonzero.default, ATEN.masked_select.default)
        indices = args[1] if func in (ATEN.index.Tensor, ATEN.index_put_.default) else []
        assert not asks and not any(index is not None and index.dtype == torch.bool for index in indices), func
        return func(*args, **(kwargs or {}))


def between_logs(monkeypatch, guard):
    """`guard` is active from the end of the first update, which is logged, to the end of the sixth: for all of steps 2 to 6."""
    calls, stop_is_due = [], exits.stop_is_due

    def watched(*arguments):
        calls.append(None)
        if len(calls) == 6:
            guard.__exit__(None, None, None)
        due = stop_is_due(*arguments)
        if len(calls) == 1:
            guard.__enter__()
        return due

    monkeypatch.setattr(exits, "stop_is_due", watched)
    return calls


STEPS_THAT_COUNT = ["--max_train_steps", "7", "--log_every", "100", "--checkpointing_steps", "100"]
DROPOUTS = ["--text_dropout", "0.5", "--train_batch_size", "2"]


@pytest.mark.parametrize("raw", [False, True], ids=["latents", "raw"])
def test_no_step_between_logs_reads_what_it_computes(raw, train, monkeypatch):
    """As far as a CPU shows: values, and choices by values. test_gpu.py has what a GPU adds, copies."""
    calls = between_logs(monkeypatch, Unread())
    precision = "no" if raw else "bf16"  # in which a VAE is slow on a CPU
    flags = [*STEPS_THAT_COUNT, *DROPOUTS, "--gradient_checkpointing", "--mixed_precision", precision]
    train("out", *flags, "--dataloader_num_workers", "1", raw=raw)  # workers may read: their tensors are on the host
    assert len(calls) == 7


def test_the_guard_sees_what_reads():
    values = torch.tensor([1.0, 2.0])
    for read in (values.sum().item, lambda: values[values > 1], lambda: bool(values[0] > 0), values.nonzero):
        with pytest.raises(AssertionError), Unread():
            read()


# ---------------------------------------------------------------- resume

RESUMED = {
    "plain": ([], {}),
    "accumulation_over_buckets": (
        [
            "--train_batch_size",
            "4",
            "--gradient_accumulation_steps",
            "3",
            "--lr_scheduler",
            "cosine",
            "--text_dropout",
            "0.5",
        ],
        {"data": "two"},
    ),
    "raw_with_flips": (["--random_flip", "0.5", "--dataloader_num_workers", "1"], {"raw": True, "data": "two"}),
}


FULLEST = [
    ("accumulation_over_buckets", name) for name in SCRIPTS
]  # of every script, the others of two in `make test`
OTHERS = [
    pytest.param(case, *name.values, marks=name.marks) for case in ("plain", "raw_with_flips") for name in EVERY_SCRIPT
]


@pytest.mark.parametrize(("case", "script"), [*FULLEST, *OTHERS], indirect=["script"])
def test_an_interrupted_run_continues_bit_for_bit(case, train, stops, module, monkeypatch):
    """At the 4th update, when the 3rd is in metrics.jsonl already and the newest checkpoint is the 2nd."""
    flags, where = RESUMED[case]
    flags = [*flags, "--max_train_steps", "4", "--checkpointing_steps", "2", "--log_every", "1"]
    micro_steps = 3 if case == "accumulation_over_buckets" else 1
    unbroken = train("unbroken", *flags, **where)
    with monkeypatch.context() as patches:
        interrupt(patches, module, 3 * micro_steps + 1)
        line = stops(75, "broken", *flags, **where)
    broken = unbroken.with_name("broken")
    assert "same command continues" in line
    assert status(broken)["state"] == "interrupted" and status(broken)["step"] == 2
    assert checkpoints(broken) == [2] and len(metrics(broken)) == 3 and not result_hash(broken)

    train("broken", *flags, **where)
    assert [row["step"] for row in metrics(broken)] == [1, 2, 3, 4]
    assert same_run(broken, unbroken, step=4)
    assert status(broken)["state"] == "complete" and status(broken)["step"] == 4


def test_a_run_continues_from_a_named_checkpoint(train, stops):
    flags = ["--max_train_steps", "4"]
    unbroken = train("unbroken", *flags)
    path = unbroken / "checkpoint-2"
    elsewhere = train("elsewhere", *flags, "--resume_from_checkpoint", str(path))
    assert result_hash(elsewhere) == result_hash(unbroken) and len(metrics(elsewhere)) == 2
    train("unbroken", *flags, "--resume_from_checkpoint", "checkpoint-3")
    assert result_hash(elsewhere) == result_hash(unbroken) and len(metrics(unbroken)) == 4

    line = stops(2, "missing", *flags, "--resume_from_checkpoint", "checkpoint-7")
    assert "checkpoint-7" in line and "no checkpoint there" in line
    line = stops(2, "other", *flags, "--weight_decay", "0.5", "--resume_from_checkpoint", str(path))
    assert "--weight_decay 0.0001 -> 0.5" in line


def test_latest_without_a_checkpoint_starts_at_0(train, caplog):
    with caplog.at_level(logging.INFO):
        out = train("out", "--max_train_steps", "1", "--resume_from_checkpoint", "latest")
    assert [r.message for r in caplog.records if "no checkpoint: starting at step 0" in r.message]
    assert [row["step"] for row in metrics(out)] == [1]


def test_a_complete_run_says_so_and_can_be_extended(train, caplog):
    train("out", "--max_train_steps", "2")
    with caplog.at_level(logging.INFO):
        out = train("out", "--max_train_steps", "2")
    assert [r for r in caplog.records if "complete at step 2: nothing to do" in r.message]
    assert len(metrics(out)) == 2
    with caplog.at_level(logging.INFO):
        train("out", "--max_train_steps", "4")
    assert [r for r in caplog.records if "continuing with changed --max_train_steps 4" in r.message]
    assert same_run(out, train("straight", "--max_train_steps", "4"), step=4)


def test_a_complete_decaying_run_is_not_extended(train, stops):
    flags = ["--lr_scheduler", "cosine"]
    train("out", *flags, "--max_train_steps", "2")
    assert "--max_train_steps 2 -> 4" in stops(2, "out", *flags, "--max_train_steps", "4")


def test_a_run_is_not_shortened_below_its_checkpoint(train, stops, module, monkeypatch):
    with monkeypatch.context() as patches:
        interrupt(patches, module, 4)
        stops(75, "out", "--max_train_steps", "9")
    for more in ([], ["--resume_from_checkpoint", "checkpoint-3"]):
        assert "beyond the 2 updates of this run" in stops(2, "out", "--max_train_steps", "2", *more)
    out = train("out", "--max_train_steps", "2", "--resume_from_checkpoint", "checkpoint-2")
    assert status(out)["step"] == 2 and len(metrics(out)) == 2


def test_another_run_is_refused_or_moved_aside(train, stops):
    out = train("out", "--max_train_steps", "1")
    before = result_hash(out)
    line = stops(2, "out", "--max_train_steps", "1", "--weight_decay", "0.5", seed=3)
    assert "--weight_decay 0.0001 -> 0.5" in line and "--seed 1 -> 3" in line and "--overwrite" in line
    assert "learning_rate" not in line
    assert status(out)["state"] == "complete" and result_hash(out) == before

    flags = ["--max_train_steps", "1", "--weight_decay", "0.5", "--overwrite"]
    train("out", *flags, seed=3)
    assert result_hash(out) != before and len(metrics(out)) == 1
    train("out", *flags, seed=3)
    aside = sorted(out.parent.glob("out.*"))
    assert len(aside) == 2 and sum(result_hash(folder) == before for folder in aside) == 1


def test_other_data_under_the_same_name_is_refused(script, train, stops, prepared, own_copy):
    data = own_copy(prepared(script.kind), "data")
    train("out", "--max_train_steps", "1", data=data)
    manifest = data / "data.jsonl"
    manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[:-1]))
    assert "other content: the list of clips" in stops(2, "out", "--max_train_steps", "2", data=data)


def test_an_unset_seed_is_drawn_once(train, stops, module, monkeypatch):
    flags = ["--max_train_steps", "3"]
    with monkeypatch.context() as patches:
        interrupt(patches, module, 3)
        stops(75, "out", *flags, seed=None)
    out = train("out", *flags, seed=None)
    seed = json.loads((out / "args.json").read_text())["seed"]
    assert same_run(out, train("named", *flags, seed=seed), step=3)
    assert same_run(out, train("out", *flags, seed=seed), step=3)  # the drawn seed, now named: still this run
    assert json.loads((train("more", *flags, seed=None) / "args.json").read_text())["seed"] != seed


def test_seed_0_is_a_seed_like_others(train):
    first, second = (train(name, "--max_train_steps", "2", seed=0) for name in ("first", "second"))
    other = train("other", "--max_train_steps", "2", seed=1)
    assert result_hash(first) == result_hash(second) != result_hash(other)


def test_a_batch_larger_than_a_bucket_holds_takes_what_is_there(train, caplog):
    """Two buckets, of 4 and of 2 clips: two batches an epoch, every clip in it once."""
    caplog.set_level(logging.INFO)
    out = train("out", "--train_batch_size", "16", "--num_train_epochs", "1", data="two")
    assert len(metrics(out)) == 2
    assert "a bucket holds 2 clips, fewer than a batch of 16" in caplog.text


def test_a_given_seed_holds_where_an_earlier_run_left_nothing(train, stops, module, monkeypatch):
    with monkeypatch.context() as patches:
        interrupt(patches, module, 1)
        stops(75, "out", "--max_train_steps", "1", seed=7)
    again, fresh = train("out", "--max_train_steps", "1", seed=8), train("fresh", "--max_train_steps", "1", seed=8)
    assert same_run(again, fresh, step=1)


def test_old_checkpoints_are_removed(train):
    out = train("out", "--max_train_steps", "4", "--checkpoints_total_limit", "2")
    assert checkpoints(out) == [3, 4]
    assert not list(out.glob(".tmp*"))


def test_a_full_disk_ends_with_74_and_what_was_there_stays(train, stops):
    out = train("out", "--max_train_steps", "2")
    before = result_hash(out / "checkpoint-2")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))  # bytes; the trained weights take more
    try:
        line = stops(74, "out", "--max_train_steps", "4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in line and status(out)["exit_code"] == 74
    assert checkpoints(out) == [1, 2] and result_hash(out / "checkpoint-2") == before
    assert not [path for path in out.rglob("*") if path.name.startswith(".tmp")]
    assert same_run(train("out", "--max_train_steps", "4"), train("straight", "--max_train_steps", "4"), step=4)


# ---------------------------------------------------------------- results and counts


@pytest.mark.parametrize("script", LORA_SCRIPTS, indirect=True)
@pytest.mark.parametrize("alpha", ["4", "1"])
def test_plain_load_lora_weights_gives_the_trained_transformer(alpha, script, train, tiny, monkeypatch):
    engines, build = [], compose.build_lora_engine_from_args

    def keep(*arguments, **options):
        engines.append(build(*arguments, **options))
        return engines[-1]

    monkeypatch.setattr(compose, "build_lora_engine_from_args", keep)
    out = train("out", "--max_train_steps", "3", "--lora_alpha", alpha)
    trained = engines[0].transformer.eval()
    pipe = engines[0].pipeline_class.from_pretrained(tiny(script.kind), dtype=torch.float32)
    inputs = example_inputs(pipe.transformer.config)
    assert trained.peft_config["default"].lora_alpha == int(alpha)
    with torch.no_grad():
        untrained = pipe.transformer(**inputs)[0]
        pipe.load_lora_weights(out)
        loaded = pipe.transformer(**inputs)[0]
        assert (loaded - trained(**inputs)[0]).abs().max() == 0
        assert (loaded - untrained).abs().max() > 1e-3


def example_inputs(config):
    """A forward pass at the bucket that the tiny models are made for: 9 frames of 64x96."""
    from cogvideox.inputs import ofs_input, rotary_embeddings

    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(1, 3 + (config.patch_size_t or 1) - 1, config.in_channels, 8, 12, generator=generator)
    return {
        "hidden_states": latents,
        "encoder_hidden_states": torch.randn(1, 226, config.text_embed_dim, generator=generator),
        "timestep": torch.tensor([500]),
        "ofs": ofs_input(config, latents),
        "image_rotary_emb": rotary_embeddings(config, latents),
        "return_dict": False,
    }


def test_epochs_steps_and_the_last_partial_group(train):
    """6 clips in 2 epochs, 5 to an update: the third update has what is left, 2."""
    flags = ["--gradient_accumulation_steps", "5"]
    out = train("epochs", *flags, "--num_train_epochs", "2", data="two")
    assert [row["step"] for row in metrics(out)] == [1, 2, 3] and status(out)["step"] == 3
    assert checkpoints(out) == [1, 2, 3]
    assert result_hash(out / "checkpoint-2") != result_hash(out) == result_hash(out / "checkpoint-3")
    assert losses(out)[2] == pytest.approx(losses(out)[0], rel=0.4)  # the mean over 2 clips, not a fifth of their sum
    steps = train("steps", *flags, "--num_train_epochs", "2", "--max_train_steps", "2", data="two")
    assert result_hash(steps) == result_hash(out / "checkpoint-2") and len(metrics(steps)) == 2


def test_training_lowers_the_loss(train, monkeypatch):
    """On four fixed draws of noise and timestep, in turn with every clip."""

    def fix(name):
        draw = getattr(objective, name)

        def fixed(seed, *values):
            values = [[p % 4 for p in value] if isinstance(value, list) else value for value in values]
            return draw(seed, *values)

        monkeypatch.setattr(objective, name, fixed)

    fix("draw_normal")
    fix("draw_timesteps")
    out = train("out", "--max_train_steps", "30", "--train_batch_size", "4")
    first, last = losses(out)[0], sum(losses(out)[-4:]) / 4
    assert last < 0.6 * first


@four_scripts
def test_every_kind_of_checkpoint_trains(script, train, tiny, prepared):
    for kind in script.other_kinds:
        out = train(kind, "--max_train_steps", "1", model=tiny(kind), data=prepared(kind))
        assert 0.1 < losses(out)[0] < 10 and metrics(out)[0]["grad_norm"] > 0
        assert all(torch.isfinite(tensor).all() for tensor in result_tensors(out).values())


def test_a_model_of_the_other_task_is_refused(script, stops, tiny):
    other = "5b" if script.kind.endswith("i2v") else "5b-i2v"
    assert "this script trains" in stops(2, "out", model=tiny(other))


# ---------------------------------------------------------------- clipping, text dropout


@four_scripts
def test_gradients_are_clipped_as_flagged(script, train):
    free, clipped = (train(name, "--max_train_steps", "2", "--max_grad_norm", name) for name in ("1e9", "1e-3"))
    assert losses(free)[0] == losses(clipped)[0] and result_hash(free) != result_hash(clipped)


@four_scripts
def test_full_text_dropout_is_training_on_the_empty_prompt(script, train, prepared, own_copy):
    empty = own_copy(prepared(script.kind), "empty")
    for path in (empty / "prompt_embeds").iterdir():
        save_file(load_file(empty / "prompt_embeds/_empty.safetensors"), path)
    flags = ["--max_train_steps", "2"]
    dropped, emptied = train("dropped", *flags, "--text_dropout", "1.0"), train("emptied", *flags, data=empty)
    assert result_hash(dropped) == result_hash(emptied)
    assert result_hash(dropped) != result_hash(train("captions", *flags))


def test_text_dropout_without_the_empty_prompt(script, train, stops, prepared, own_copy):
    data = own_copy(prepared(script.kind), "data")
    (data / "prompt_embeds/_empty.safetensors").unlink()
    assert len(metrics(train("none", "--max_train_steps", "1", data=data))) == 1
    line = stops(65, "some", "--max_train_steps", "1", "--text_dropout", "0.1", data=data)
    assert "_empty" in line and "prepare_dataset.py" in line


# ---------------------------------------------------------------- precision and bad numbers


def test_bf16_trains_fp32_weights(train):
    bf16 = train("bf16", "--max_train_steps", "2", "--mixed_precision", "bf16")
    fp32 = train("fp32", "--max_train_steps", "2", "--mixed_precision", "no")
    assert {tensor.dtype for tensor in result_tensors(bf16).values()} == {torch.float32}
    assert losses(bf16) != losses(fp32) and losses(bf16) == pytest.approx(losses(fp32), rel=0.02)


def test_fp16_on_a_cpu_and_a_contradicting_launcher_are_refused(stops, monkeypatch):
    assert "fp16" in stops(2, "fp16", "--mixed_precision", "fp16")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    line = stops(2, "no", "--mixed_precision", "no")
    assert "--mixed_precision no" in line and "mixed_precision: bf16" in line


# ---------------------------------------------------------------- refusals


BAD_CLIPS = {
    "empty dataset": (lambda folder: write_lists(folder, []), [], "no clips"),
    "missing video": (lambda folder: (folder / "videos/2.mp4").unlink(), [], "'videos/2.mp4' (row 3) not found"),
    "other length": (
        lambda folder: (folder / "prompts.txt").write_text("a\nb\n"),
        [],
        "prompts.txt has 2 captions and {folder}/videos.txt 4 videos",
    ),
    "unknown bucket": (
        lambda folder: write_clip(folder / "videos/1.mp4", 9, 80, 96),
        ["--video_reshape_mode", "none"],
        "videos/1.mp4: unknown bucket: 9 frames of 80x96",
    ),
    "corrupt clip": (lambda folder: cut(folder / "videos/3.mp4"), [], "videos/3.mp4"),
}


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("case", BAD_CLIPS)
def test_bad_clips_stop_training_before_step_1(case, stops, clips, own_copy, tmp_path):
    spoil, flags, expected = BAD_CLIPS[case]
    folder = own_copy(clips["one"], "clips")
    spoil(folder)
    line = stops(65, "out", "--max_train_steps", "1", *flags, data=folder, raw=True)
    assert expected.format(folder=folder) in line
    assert status(tmp_path / "out")["exit_code"] == 65 and status(tmp_path / "out")["message"] in line
    assert not (tmp_path / "out/metrics.jsonl").exists()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_bad_latents_stop_training(workers, script, stops, prepared, own_copy):
    data = own_copy(prepared(script.kind), "data")
    bad = sorted((data / "video_latents").iterdir())[0]
    cut(bad)
    flags = ["--num_train_epochs", "1", "--dataloader_num_workers", workers]
    assert f"{bad}: damaged" in stops(65, "damaged", *flags, data=data)
    bad.unlink()
    assert f"{bad.name} not found" in stops(65, "missing", *flags, data=data)
    assert "unknown bucket" in stops(65, "bucket", *flags, "--frame_buckets", "17", "--max_num_frames", "17")


def test_a_model_of_real_size_needs_a_gpu(script, stops, tiny, own_copy):
    large = own_copy(tiny(script.kind), "large")
    config = json.loads((large / "transformer/config.json").read_text())
    config |= {"num_layers": 30, "num_attention_heads": 30, "attention_head_dim": 64, "time_embed_dim": 512}  # of 2b
    (large / "transformer/config.json").write_text(json.dumps(config))
    line = stops(2, "out", model=large)
    assert "no GPU" in line and "1.7 billion" in line and "--allow_cpu" in line


def test_a_hub_token_is_written_nowhere(train):
    out = train("out", "--max_train_steps", "1", "--hub_token", "hf_canary")
    assert not [path for path in out.rglob("*") if path.is_file() and b"hf_canary" in path.read_bytes()]


def test_a_defect_of_the_script_is_70_with_its_traceback(train, monkeypatch, tmp_path, capsys):
    def broken(*arguments, **options):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(objective, "add_noise", broken)
    with pytest.raises(SystemExit) as left:
        run_script(lambda: train("out"), tmp_path / "out")
    assert left.value.code == 70 and status(tmp_path / "out")["exit_code"] == 70
    assert "Traceback" in capsys.readouterr().err


def test_the_rank_that_meets_a_bad_file_is_heard(script, module, command, prepared, own_copy, tmp_path):
    """The second one, which else never writes; the first then loses its connection, a defect as far as it can tell."""
    data = own_copy(prepared(script.kind), "data")
    index = pack_batches(SIZES["one"], batch_size=1, num_ranks=2, seed=1, epoch=0)[0][1][0]
    cut(data / json.loads((data / "data.jsonl").read_text().splitlines()[index])["video_latent"])
    argv = command("out", data=data)
    main = lambda: module.main(parse_training_args(script.key, argv))  # noqa: E731
    assert run_ranks(lambda: run_script(main, tmp_path / "out"), 2) == [70, 65]
    assert status(tmp_path / "out")["exit_code"] == 65 and "damaged" in status(tmp_path / "out")["message"]


# ---------------------------------------------------------------- real processes


@four_scripts
def test_a_usage_error_answers_at_once(script, command):
    path = ROOT / "training" / f"{script.module}.py"
    result = subprocess.run([sys.executable, path, *command("out", "--ranc", "4")], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [f"{path.name}: error: unknown flag --ranc; did you mean --rank?"]


@pytest.mark.slow  # the launcher itself; test_exits.py has one in its place
@pytest.mark.parametrize("script", ["t2v_lora"], indirect=True)
def test_the_launcher_hides_the_exit_code_and_the_status_keeps_it(script, command, prepared, own_copy, tmp_path):
    data = own_copy(prepared(script.kind), "data")
    bad = sorted((data / "video_latents").iterdir())[0]
    cut(bad)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    config = ["--config_file", str(ROOT / "accelerate_configs/uncompiled_1.yaml")]
    argv = [*launch, *config, str(ROOT / "training" / f"{script.module}.py"), *command("out", data=data)]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=200)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"error: {bad}: damaged") and "Traceback" not in result.stderr
    assert status(tmp_path / "out")["exit_code"] == 65 and "damaged" in status(tmp_path / "out")["message"]


# ---------------------------------------------------------------- real clips


def test_real_clips_train_raw_and_prepared(script, train, tiny, real_clips, tmp_path):
    folder = tmp_path / "prepared"
    prepare(tiny(script.kind), real_clips, folder, *image_flags(script.kind))
    assert len((folder / "data.jsonl").read_text().splitlines()) == 6
    for run in (train("prepared-run", "--num_train_epochs", "1", data=folder),
                train("raw-run", "--max_train_steps", "3", data=real_clips, raw=True)):  # fmt: skip
        assert all(0.1 < loss < 10 for loss in losses(run)) and status(run)["state"] == "complete"


# ---------------------------------------------------------------- data before models


@pytest.fixture
def downloads(script, tiny, monkeypatch):
    """What is asked of a hub that serves the script's tiny model as zai-org/model."""
    asked = []

    def download_model(model, components, revision, cache_dir):
        asked.extend(components)
        return tiny(script.kind)

    monkeypatch.setattr("cogvideox.folder.download_model", download_model)
    return asked


@pytest.mark.parametrize("fault", ["no folder", "a clip that is gone", "a clip that is damaged", "not prepared"])
def test_data_is_read_before_a_model_is_downloaded(
    module, script, command, downloads, clips, own_copy, tmp_path, fault
):
    data = own_copy(clips["one"], "data")
    if fault == "no folder":
        shutil.rmtree(data)
    elif fault == "a clip that is gone":
        (data / "videos/2.mp4").unlink()
    elif fault == "a clip that is damaged":
        (data / "videos/2.mp4").write_bytes(b"no video")
    raw = fault != "not prepared"
    argv = command("out", data=data, raw=raw, model="zai-org/model")
    with pytest.raises(DataError):
        module.main(parse_training_args(script.key, [*argv, "--max_train_steps", "1"]))
    assert set(downloads) == {"transformer/config.json", "vae/config.json"}


def test_preparing_reads_the_lists_before_a_model_is_downloaded(tiny, clips, own_copy, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "cogvideox.folder.download_model", lambda model, components, *rest: asked.extend(components) or tiny("2b")
    )
    data = own_copy(clips["one"], "data")
    (data / "videos/2.mp4").unlink()
    with pytest.raises(DataError, match="videos/2.mp4"):
        prepare("zai-org/model", data, tmp_path / "out")
    assert set(asked) == {"transformer/config.json", "vae/config.json"}
