"""Checkpoints: whole or not there, exact, and refused by any other run."""

import importlib.metadata
import json
import os
import shutil
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from args import parse_training_args
from base.errors import NumbersError, UsageError
from base.status import write_status
from engine.optimizers import join_tensors, split_tensors
from engine.update import TrainingState, update
from run import checkpoints, output_dir, result
from run.checkpoints import prune_checkpoints, refuse_bad_numbers, write_checkpoint
from run.launch import Run
from run.output_dir import checkpoint_dirs, open_output_dir, write_record


MAIN = Namespace(is_main_process=True, num_processes=1, wait_for_everyone=lambda: None)  # what is used of Accelerator
PROVENANCE = {"seed": 1, "data": "abc", "num_processes": 1}
HASHES = {"data": "abc", "files": "d", "transformer": "e", "others": "f", "init_lora": None}
OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


class OneTensorEngine:
    """The smallest thing that can be trained and saved."""

    def __init__(self):
        self.weight = torch.nn.Parameter(torch.linspace(-1, 1, 6))
        self.unused = torch.nn.Parameter(torch.ones(2))  # like the text half of the last block: never a gradient
        self.params = [self.weight, self.unused]
        self.weights = {"weight": self.weight, "unused": self.unused}
        self.masters = self.ema = None

    def complete(self):
        pass

    def save_state(self, directory):
        save_file({"weight": self.weight.data}, directory / "weight.safetensors")

    def load_state(self, directory):
        self.weight.data.copy_(load_file(directory / "weight.safetensors")["weight"])


def make_state(optimizer="adamw", engine_class=OneTensorEngine):
    engine = engine_class()
    optimizer = OPTIMIZERS[optimizer](engine.params, lr=0.1, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return TrainingState(engine, optimizer, schedule)


def step(state, count=1):
    for _ in range(count):
        target = torch.arange(6.0) / 7
        assert update((state.engine.weight - target).square().sum(), state, True, 1.0).stepped


def run_in(folder, rank=0, accelerator=MAIN):
    """A run that writes into `folder`."""
    return Run(accelerator, torch.device("cpu"), rank, 1, 1, Path(folder), None)


@pytest.fixture
def state():
    state = make_state()
    step(state, 3)
    return state


@pytest.fixture
def flags(tmp_path):
    """The parsed flags of a run in tmp_path/out, with changes."""

    def make(*more):
        argv = ["--pretrained_model_name_or_path", "m", "--data_root", "d", "--load_tensors"]
        return parse_training_args("t2v_lora", [*argv, "--output_dir", str(tmp_path / "out"), *more])

    return make


@pytest.fixture
def out(flags, state, tmp_path):
    """An output folder as a run of `flags()` left it: seed 5 drawn, checkpoints 2 and 10."""
    args = flags()
    assert open_output_dir(args, MAIN) is None
    write_record(args, 5, HASHES)
    for number in (2, 10):
        write_checkpoint(tmp_path / "out", number, state, PROVENANCE)
    return tmp_path / "out"


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder): path.read_bytes() for path in files}


# ---------------------------------------------------------------- exact


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_continuing_is_bit_exact(name, tmp_path):
    state = make_state(name)
    step(state, 3)
    path = write_checkpoint(tmp_path, 3, state, PROVENANCE)
    step(state, 2)

    other = make_state(name)
    assert checkpoints.load(path, other, PROVENANCE) == 3
    assert torch.equal(load_file(path / "weight.safetensors")["weight"], other.engine.weight.data)
    step(other, 2)
    assert torch.equal(state.engine.weight, other.engine.weight)
    ours, theirs = split_tensors(state.optimizer.state_dict()), split_tensors(other.optimizer.state_dict())
    assert ours[0].keys() == theirs[0].keys()
    assert all(torch.equal(ours[0][key], theirs[0][key]) for key in ours[0])
    assert json.loads(json.dumps(ours[1])) == json.loads(json.dumps(theirs[1]))
    assert state.lr_scheduler.get_last_lr() == other.lr_scheduler.get_last_lr() == [0.1 / 6]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_survives_files(name, tmp_path):
    state = make_state(name)
    step(state, 2)
    before = state.optimizer.state_dict()
    tensors, rest = split_tensors(before)
    save_file(tensors, tmp_path / "x.safetensors")
    after = join_tensors(load_file(tmp_path / "x.safetensors"), json.loads(json.dumps(rest)))
    assert after["state"].keys() == before["state"].keys() == {0}  # no state without a gradient
    for key, value in before["state"][0].items():
        assert torch.equal(value, after["state"][0][key]) and value.dtype == after["state"][0][key].dtype
    assert after["param_groups"][0]["lr"] == before["param_groups"][0]["lr"]


def test_values_that_are_no_tensors_survive_too():
    before = {"state": {3: {"step": 7, "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [3]}]}
    tensors, rest = split_tensors(before)
    assert list(tensors) == ["3.exp_avg"]
    after = join_tensors(tensors, json.loads(json.dumps(rest)))
    assert after["state"][3]["step"] == 7 and torch.equal(after["state"][3]["exp_avg"], torch.ones(2))


def test_a_gradient_scaler_is_kept(state, tmp_path):
    state.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    state.scaler.scale(torch.ones(()))  # the scale exists from its first use
    path = write_checkpoint(tmp_path, 1, state, PROVENANCE)
    other = make_state()
    other.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    checkpoints.load(path, other, PROVENANCE)
    assert other.scaler.get_scale() == 8.0


def test_an_optimizer_may_take_its_states_one_by_one(state, tmp_path):
    class Streaming(torch.optim.AdamW):
        def load_tensors(self, pairs, rest):
            self.pairs, self.rest = {name: tensor.clone() for name, tensor in pairs}, rest

    path = write_checkpoint(tmp_path, 3, state, PROVENANCE)
    other = make_state()
    other.optimizer = Streaming(other.engine.params)
    assert checkpoints.load(path, other, PROVENANCE) == 3
    tensors, rest = split_tensors(state.optimizer.state_dict())
    assert other.optimizer.pairs.keys() == tensors.keys() and other.optimizer.rest == json.loads(json.dumps(rest))
    assert all(torch.equal(other.optimizer.pairs[name], tensor) for name, tensor in tensors.items())


def test_states_are_split_without_a_copy(state):
    before = state.optimizer.state_dict()["state"][0]
    tensors, _ = split_tensors({"state": {0: before, 1: before}, "param_groups": []})
    for name, tensor in before.items():
        assert tensors[f"0.{name}"] is tensors[f"1.{name}"] is tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 7, 5000])
def test_numbers_that_are_not_finite_are_found_in_any_tensor(size, dtype):
    largest = torch.finfo(dtype).max
    others = [torch.zeros(0), torch.ones(3, dtype=torch.int64), torch.full((9,), largest, dtype=dtype)]
    good = [*others, -others[-1], torch.cat([others[-1], -others[-1]])]  # whose sum, or difference, is infinite
    refuse_bad_numbers(iter(good))
    for value in (float("nan"), float("inf"), -float("inf")):
        for place in {0, size // 2, size - 1}:
            bad = torch.randn(size).to(dtype)
            bad[place] = value
            with pytest.raises(NumbersError):
                refuse_bad_numbers(iter([*good, bad, *others]))
    refuse_bad_numbers([])


# ---------------------------------------------------------------- whole or not there


@pytest.mark.parametrize("place", ["save_state", "split_tensors", "save_tensors", "write_json", "rename"])
def test_an_error_in_a_save_leaves_the_checkpoints_before(place, state, tmp_path, monkeypatch):
    write_checkpoint(tmp_path, 1, state, PROVENANCE)
    before = contents(tmp_path)

    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patches:
        owner = {"save_state": state.engine, "rename": Path}.get(place, checkpoints)
        patches.setattr(owner, place, fail)
        with pytest.raises(OSError, match="No space"):
            write_checkpoint(tmp_path, 2, state, PROVENANCE)
    assert contents(tmp_path) == before and [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert write_checkpoint(tmp_path, 2, state, PROVENANCE).name == "checkpoint-2"


def test_what_a_killed_save_left_is_removed(out, flags):
    before = contents(out)
    shutil.copytree(out / "checkpoint-2", out / ".tmp-123-checkpoint-4")
    (out / ".tmp-123-status.json").write_text("{")
    (out / "transformer").mkdir()
    assert open_output_dir(flags(), MAIN) == 5
    assert contents(out) == before and not list(out.glob(".tmp-*")) and (out / "transformer").is_dir()


def test_the_number_orders_checkpoints_not_the_name(state, tmp_path):
    for number in (10, 9, 100):
        write_checkpoint(tmp_path, number, state, PROVENANCE)
    assert [path.name for path in checkpoint_dirs(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]


def test_pruning_keeps_the_newest_and_everything_else(state, tmp_path):
    (tmp_path / "checkpoint-mine").mkdir()
    for number in (8, 9, 10):
        write_checkpoint(tmp_path, number, state, PROVENANCE)
    prune_checkpoints(tmp_path, None, 10)
    assert len(checkpoint_dirs(tmp_path)) == 3
    prune_checkpoints(tmp_path, 2, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9", "checkpoint-mine"]


def test_the_old_one_goes_only_when_the_new_one_is_there(state, tmp_path, monkeypatch):
    args, run = Namespace(checkpoints_total_limit=1), run_in(tmp_path)
    checkpoints.save(args, run, 1, state, PROVENANCE)

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patches:
        patches.setattr(checkpoints, "write_json", fail)
        patches.setattr(output_dir, "write_json", fail)
        patches.setattr(result, "write_json", fail)
        with pytest.raises(OSError, match="No space"):
            checkpoints.save(args, run, 2, state, PROVENANCE)
    assert [path.name for path in checkpoint_dirs(tmp_path)] == ["checkpoint-1"]
    checkpoints.save(args, run, 2, state, PROVENANCE)
    assert [path.name for path in checkpoint_dirs(tmp_path)] == ["checkpoint-2"]


def test_only_the_main_process_writes(state, tmp_path):
    waited = []
    accelerator = Namespace(wait_for_everyone=lambda: waited.append(True))
    run = run_in(tmp_path, rank=1, accelerator=accelerator)
    checkpoints.save(Namespace(checkpoints_total_limit=1), run, 1, state, PROVENANCE)
    assert waited and not list(tmp_path.iterdir())


# ---------------------------------------------------------------- whose it is


@pytest.mark.parametrize("name", PROVENANCE)
def test_a_checkpoint_of_other_provenance_is_refused(name, state, tmp_path):
    path = write_checkpoint(tmp_path, 3, state, PROVENANCE)
    state = make_state()
    before = state.engine.weight.clone()
    with pytest.raises(UsageError, match=f"its {name} was {PROVENANCE[name]}, now it is other"):
        checkpoints.load(path, state, {**PROVENANCE, name: "other"})
    assert torch.equal(state.engine.weight, before) and not state.optimizer.state_dict()["state"]


def test_the_same_flags_continue_with_the_drawn_seed(out, flags):
    assert open_output_dir(flags(), MAIN) == 5
    assert checkpoints.find(flags(), run_in(out), 100, HASHES).name == "checkpoint-10"
    assert open_output_dir(flags("--seed", "5"), MAIN) is None  # the flag gives it
    with pytest.raises(UsageError, match="--seed None -> 6"):
        open_output_dir(flags("--seed", "6"), MAIN)


@pytest.mark.parametrize(
    "more",
    [
        ["--checkpointing_steps", "7", "--checkpoints_total_limit", "1", "--log_every", "3"],
        ["--dataloader_num_workers", "4", "--pin_memory", "--nccl_timeout", "9", "--report_to", "none"],
        ["--max_train_steps", "20"],
        ["--num_train_epochs", "20"],
        ["--memory", "balanced", "--attention", "math", "--no_compile_blocks"],
        ["--enable_slicing", "--enable_tiling"],
        ["--hub_token", "secret"],
        ["--report_to", "tensorboard", "--tracker_name", "mine", "--logging_dir", "there"],
        ["--config", "{out}/args.json"],
    ],
)
def test_flags_that_train_nothing_may_change(out, flags, more):
    more = [text.format(out=out) for text in more]
    assert open_output_dir(flags(*more), MAIN) == (None if "--config" in more else 5)  # which names the seed


@pytest.mark.parametrize(
    "more",
    [
        ["--learning_rate", "1e-3"], ["--rank", "8"], ["--lora_alpha", "1"], ["--train_batch_size", "2"],
        ["--gradient_accumulation_steps", "2"], ["--optimizer", "adamw"], ["--mixed_precision", "bf16"],
        ["--text_dropout", "0.5"], ["--lr_scheduler", "cosine"], ["--base_precision", "int8"],
    ],
)  # fmt: skip
def test_flags_that_train_are_named(out, flags, more):
    before = contents(out)
    with pytest.raises(UsageError, match=f"{more[0]} .* -> ") as caught:
        open_output_dir(flags(*more), MAIN)
    assert str(out) in str(caught.value) and "--overwrite" in str(caught.value)
    assert str(caught.value).count(" -> ") == 1 and contents(out) == before


def test_a_flag_that_the_run_did_not_know_yet_may_have_its_default(out, flags):
    record = json.loads((out / "args.json").read_text())
    del record["flags"]["base_precision"]
    (out / "args.json").write_text(json.dumps(record))
    assert open_output_dir(flags(), MAIN) == 5
    with pytest.raises(UsageError, match="--base_precision None -> nf4"):
        open_output_dir(flags("--base_precision", "nf4"), MAIN)


def test_without_a_checkpoint_anything_may_start(out, flags):
    for path in checkpoint_dirs(out):
        shutil.rmtree(path)
    assert open_output_dir(flags("--rank", "8", "--seed", "3"), MAIN) is None
    assert checkpoints.find(flags(), run_in(out), 100, HASHES) is None


def test_checkpoints_of_an_unknown_run_are_refused(out, flags):
    (out / "args.json").unlink()
    with pytest.raises(UsageError, match=r"args\.json: missing"):
        open_output_dir(flags(), MAIN)


@pytest.mark.parametrize(("ended", "refused"), [("complete", True), ("interrupted", False), (None, False)])
def test_a_decaying_schedule_is_stretched_only_if_it_did_not_end(ended, refused, flags, state, tmp_path):
    out, args = tmp_path / "out", flags("--lr_scheduler", "cosine", "--max_train_steps", "10")
    open_output_dir(args, MAIN)
    write_record(args, 5, HASHES)
    write_checkpoint(out, 10, state, PROVENANCE)
    if ended:
        write_status(out, ended, 0)
    longer = flags("--lr_scheduler", "cosine", "--max_train_steps", "20")
    if refused:
        with pytest.raises(UsageError, match="--max_train_steps 10 -> 20"):
            open_output_dir(longer, MAIN)
    else:
        assert open_output_dir(longer, MAIN) == 5


def test_overwrite_moves_everything_aside_and_nothing_is_lost(out, flags, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _: "now")  # twice within a second
    before = contents(out)
    assert open_output_dir(flags("--overwrite"), MAIN) is None
    assert [path.name for path in out.iterdir()] == [".lock"] and contents(out.with_name("out.now.1")) == before
    (out / "file").write_text("second")
    open_output_dir(flags("--overwrite"), MAIN)
    assert (out.with_name("out.now.2") / "file").read_text() == "second"


@pytest.mark.parametrize("wanted", ["latest", "checkpoint-2", "2", "{out}/checkpoint-2"])
def test_overwrite_does_not_move_the_checkpoint_that_is_named(wanted, out, flags, tmp_path):
    before, wanted = contents(out), wanted.format(out=out)
    with pytest.raises(UsageError, match="leave out one of them"):
        open_output_dir(flags("--overwrite", "--resume_from_checkpoint", wanted), MAIN)
    assert contents(out) == before and not list(tmp_path.glob("out.*"))
    elsewhere = flags("--overwrite", "--resume_from_checkpoint", wanted, "--output_dir", str(tmp_path / "new"))
    if "/" in wanted:
        assert open_output_dir(elsewhere, MAIN) is None


@pytest.mark.parametrize("below", ["", "/run"])
def test_an_output_folder_that_is_a_file_is_refused(below, flags, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="is a file; give a folder"):
        open_output_dir(flags("--output_dir", f"{tmp_path}/file{below}"), MAIN)
    assert (tmp_path / "file").read_text() == "mine"


def test_only_the_main_process_moves_it(out, flags):
    before = contents(out)
    open_output_dir(flags("--overwrite"), Namespace(is_main_process=False, num_processes=1))
    assert contents(out) == before


def test_a_named_checkpoint_is_a_path_a_name_or_a_step(out, flags, tmp_path, monkeypatch):
    def find(name):
        return checkpoints.find(flags("--resume_from_checkpoint", name), run_in(out), 100, HASHES)

    monkeypatch.chdir(tmp_path)
    for name in ("checkpoint-2", "checkpoint-2/", "2", f"{out}/checkpoint-2/", os.path.join("out", "checkpoint-2")):
        assert find(name).samefile(out / "checkpoint-2"), name
    for name in (f"{tmp_path}/elsewhere/checkpoint-2", "checkpoint-3", "7", "auto", "."):
        with pytest.raises(UsageError, match="no checkpoint there"):
            find(name)


def test_stray_folders_are_no_checkpoints(out, flags):
    for name in ("checkpoint-backup", "checkpoint-1000-tmp", "checkpoint-11 (copy)", ".tmp-1-checkpoint-12"):
        shutil.copytree(out / "checkpoint-2", out / name)
    (out / "checkpoint-99").write_text("a file")
    latest = checkpoints.find(flags("--resume_from_checkpoint", "latest"), run_in(out), 100, HASHES)
    assert latest == out / "checkpoint-10"


def test_a_checkpoint_of_another_folder_must_be_of_such_a_run(out, flags, tmp_path):
    path = ["--resume_from_checkpoint", str(out / "checkpoint-2"), "--output_dir", str(tmp_path / "new")]
    assert checkpoints.find(flags(*path), run_in(out), 100, HASHES) == out / "checkpoint-2"
    with pytest.raises(UsageError, match="--lora_alpha 64 -> 1"):
        checkpoints.find(flags(*path, "--lora_alpha", "1"), run_in(out), 100, HASHES)


def test_a_run_does_not_end_before_its_checkpoint(out, flags):
    for more in ([], ["--resume_from_checkpoint", "10"]):
        with pytest.raises(UsageError, match="checkpoint-10: already beyond the 9 updates of this run"):
            checkpoints.find(flags(*more), run_in(out), 9, HASHES)
        assert checkpoints.find(flags(*more), run_in(out), 10, HASHES).name == "checkpoint-10"


def test_the_record_holds_the_flags_and_no_token(out, flags):
    write_record(flags("--hub_token", "hf_canary", "--rank", "8"), 5, HASHES)
    text = (out / "args.json").read_text()
    record = json.loads(text)
    assert "hf_canary" not in text and record["seed"] == 5 and record["flags"]["rank"] == 8
    assert record["flags"]["seed"] is None and "rank" in record["given"] and "lora_alpha" not in record["given"]
    assert record["versions"]["torch"] == importlib.metadata.version("torch")
