"""The formula of --memory auto and plan is within 10 % of every measured peak; auto takes the fastest level that fits."""

import csv
import functools
import importlib
import logging
import math
import re
import shlex
from pathlib import Path

import pytest
import torch

from args import parse_training_args
from base.errors import UsageError
from base.memory_levels import HOST, HOST_LEVELS, RING, SPLIT
from engine import state_ring
from memory import estimate
from memory.allocator import VARIABLES
from memory.choose_level import fastest_that_fits, levels_of, table
from memory.estimate import CHECKPOINTING, GIB, memory_peaks
from predict import real_model
from random_dataset import write_dataset
from run import levels
from run.levels import make_workload


ROOT = Path(__file__).resolve().parents[1]
SIZE_1_0, SIZE_1_5 = (49, 480, 720), (81, 768, 1360)
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
LORA_FILE = "pytorch_lora_weights.safetensors"
REQUIRED = ["--pretrained_model_name_or_path", "m", "--data_root", "d"]


def make_run(kind, *flags, size=SIZE_1_0, task="t2v_lora", data=("--load_tensors",)):
    args = parse_training_args(task, [*REQUIRED, *data, "--train_batch_size", "1", *flags])
    dtype = torch.float16 if args.mixed_precision == "fp16" else torch.bfloat16
    model = real_model(kind)
    return make_workload(args, model, model.stored_dtype, [size], dtype, is_lora=task.endswith("lora"))


def calibration():
    """{(file, label, card, GiB reserved) of a measured row that the formula is held to: masters it had, if not today's}.

    `earlier_masters` is of full fine-tuning before it split its masters, and loaded its weights in the files' dtype.
    Rows of other cards and versions say nothing about it: they join benchmarks/calibration.csv when it is fitted to them.
    `vae`: "stock" if it encoded or decoded, before the walk of our own.
    """
    with open(ROOT / "benchmarks/calibration.csv", newline="") as file:
        return {tuple(row.values())[:4]: (row["earlier_masters"], row["vae"]) for row in csv.DictReader(file)}


def measured_rows():
    """(file, command, GiB allocated, reserved, on the host, most that torch could have, (earlier masters, vae)) of each run."""
    columns = {"results": ("", "host_gib"), "speed": ("", "host_gib")}
    files = ("optimizers", "lora_memory", "sft_memory", "deepspeed_memory")
    columns |= dict.fromkeys(files, ("_peak_", "host_peak_gib"))  # the latter of one process
    held_to = calibration()
    for name, (before, host) in columns.items():
        with open(ROOT / "benchmarks" / f"{name}.csv", newline="") as file:
            for row in csv.DictReader(file):
                kinds = ("allocated_gib", "reserved_gib")
                peaks = [max(float(row[key]) for key in row if key.endswith(f"{before}{kind}")) for kind in kinds]
                key = (name, row["label"], row["card"], f"{peaks[1]:g}")
                if key not in held_to:
                    continue
                earlier = held_to.pop(key)  # measured again to the same figure
                cap = float(row.get("memory_cap_gib") or "inf")
                command = shlex.split(row["command"])
                on_host = float(row[host]) * (num_processes(command) if host == "host_peak_gib" else 1)
                figures = (*peaks, on_host, cap)
                yield pytest.param(name, command, *figures, earlier, id=f"{name}-{row['label']}")


def num_processes(command):
    return int(command[command.index("--num_processes") + 1]) if "--num_processes" in command else 1


def test_every_row_of_the_calibration_was_measured():
    with open(ROOT / "benchmarks/calibration.csv", newline="") as file:
        num_rows = len(list(csv.DictReader(file)))
    assert num_rows == len(calibration()) == len(list(measured_rows())) > 100


def expected_need(file, run, level, cap_gib):
    """torch reserves between what is needed and what it takes with ample memory, as the cap allows. Hosts had ample memory."""
    if cap_gib < math.inf:
        needed, ample_memory = memory_peaks(run, level), memory_peaks(run, level, ample_memory=True)
        reserved = max(needed.reserved, min(cap_gib * GIB, ample_memory.reserved))
        return needed._replace(reserved=reserved, host=ample_memory.host)
    needed = memory_peaks(run, level, ample_memory=True)
    if file == "optimizers":  # measured when training's caches were not given back before rendering
        training = memory_peaks(run._replace(renders=False), level, ample_memory=True)
        needed = needed._replace(reserved=max(needed.reserved, training.reserved + estimate.VAE_UNUSED))
    return needed


def decoding_in_tiles(level, workload, ample_memory):
    """As the rows were measured, with the stock VAE: --enable_tiling, and smaller tiles where room was short."""
    tiles = 1.45 * GIB if level in HOST_LEVELS or not ample_memory else estimate.DECODING_TILED
    return tiles + estimate.VIDEO_TILED * workload.item_bytes * workload.pixels


def with_earlier_masters(run, masters):
    """Full fine-tuning as it was measured: fp32 masters, on the GPU or on the host, of weights loaded in fp32."""
    on_host = 4 + 4 + 2 + run.state_bytes + (10 if run.deepspeed else 0)
    return run._replace(masters=masters, stored_bytes=4, host_optimizer=on_host if masters == HOST else 0)


@pytest.mark.parametrize(
    ("file", "command", "allocated", "reserved", "host", "cap_gib", "earlier"), list(measured_rows())
)
def test_estimates_are_within_a_tenth_of_what_was_measured(
    file, command, allocated, reserved, host, cap_gib, earlier, monkeypatch
):
    given = dict(zip(command, command[1:], strict=False))
    earlier, vae = earlier
    if vae == "stock":
        monkeypatch.setattr(estimate, "decoding_bytes", functools.partial(decoding_in_tiles, given.get("--memory")))
        monkeypatch.setattr(estimate, "encoding_bytes", lambda workload, ample_memory: 8.2 * GIB)
    if file != "results" and "xxl" not in given["--pretrained_model_name_or_path"]:  # a tiny text encoder
        monkeypatch.setattr(estimate, "T5_XXL", 0)
        monkeypatch.setattr(estimate, "T5_STREAMED", 0)
        monkeypatch.setattr(estimate, "T5_HOST", 0)
    if any("deepspeed.yaml" in word for word in command):
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, str(num_processes(command)))
    place = next(place for place, word in enumerate(command) if word.startswith("training/"))
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for word in command[:place]:  # the environment that the command is given
        if "=" in word:
            monkeypatch.setenv(*word.split("=", 1))
    script, *flags = command[place:]
    task = f"{'i2v' if 'image_to_video' in script else 't2v'}_{script.removesuffix('.py').rpartition('_')[2]}"
    kind = re.search(r"(2b|1\.5-5b|5b)(-i2v)?(?=-xxl|$)", given["--pretrained_model_name_or_path"])[0]
    size = SIZE_1_5 if "768" in given["--data_root"] else SIZE_1_0
    run = make_run(kind, *flags, size=size, task=task, data=())
    run = run._replace(tiled=True) if vae == "stock" else run
    if earlier:
        run = with_earlier_masters(run, earlier)
    level = parse_training_args(task, flags).memory or CHECKPOINTING
    # The VAE keeps frames on the GPU as far as a cap allows, and others on the host
    if run.renders and vae != "stock":
        needed = memory_peaks(run, level, gpu_bytes=cap_gib * GIB)
        most = memory_peaks(run, level, ample_memory=True)
        assert 0.9 * needed.allocated < allocated * GIB < 1.1 * most.allocated
        assert 0.9 * needed.reserved < reserved * GIB < 1.1 * min(most.reserved, cap_gib * GIB)
        on_host = most.host if cap_gib == math.inf else needed.host
        assert on_host / GIB == pytest.approx(host, rel=0.1)
        return
    needed = expected_need(file, run, level, cap_gib)
    assert needed.allocated / GIB == pytest.approx(allocated, rel=0.1)
    assert needed.reserved / GIB == pytest.approx(reserved, rel=0.1)
    assert needed.host / GIB == pytest.approx(host, rel=0.1)


def test_levels_are_ordered_by_what_they_take():
    for kind in ("2b", "5b"):
        run = make_run(kind)
        assert levels_of(run) == ("speed", "balanced", "offload", "stream")
        sizes = [memory_peaks(run, level).reserved for level in levels_of(run)]
        assert sizes == sorted(sizes, reverse=True)
        hosts = [memory_peaks(run, level).host for level in levels_of(run)]
        assert hosts == sorted(hosts)


@pytest.mark.parametrize(
    ("kind", "gpu_gib", "host_gib", "level"),
    [
        ("5b", 79, 64, "speed"),
        ("5b", 47, 64, "balanced"),
        ("5b", 16, 64, "offload"),
        ("5b", 7.5, 64, "stream"),
        ("5b", 7.5, 16, None),  # the host cannot hold the weights and activations
        ("5b", 4, 64, None),
        ("2b", 40, 64, "speed"),
        ("2b", 11, 64, "balanced"),
        ("2b", 4, 64, "stream"),
    ],
)
def test_the_fastest_level_that_fits(kind, gpu_gib, host_gib, level):
    assert fastest_that_fits(make_run(kind), gpu_gib * GIB, host_gib * GIB) == (level and (level, 0))


@pytest.mark.parametrize(
    ("more", "less"),
    [
        (["--rank", "256"], ["--rank", "16"]),
        (["--train_batch_size", "4"], ["--train_batch_size", "1"]),
        ([], ["--base_precision", "nf4"]),
        ([], ["--use_8bit"]),
        ([], ["--use_cpu_offload_optimizer"]),
        (["--lora_target_modules", "to_q", "to_k", "to_v", "to_out.0", "ff.net.2"], []),
    ],
)
def test_flags_count(more, less):
    for level in ("speed", "balanced", "offload", "stream"):
        assert (
            memory_peaks(make_run("5b", *more), level).allocated > memory_peaks(make_run("5b", *less), level).allocated
        )


def sft(kind, *flags):
    return make_run(kind, *flags, task="t2v_sft")


def test_full_fine_tuning_streams_states_where_it_can(monkeypatch):
    """In bf16, with fp32 or bitsandbytes' 8-bit states of Adam, in one process."""
    assert levels_of(sft("2b")) == levels_of(sft("2b", "--use_8bit")) == ("speed", "balanced", "offload", "stream")
    for flags in ("--use_4bit", "--optimizer came", "--optimizer prodigy", "--mixed_precision fp16"):
        assert levels_of(sft("2b", *flags.split())) == ("speed", "balanced")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert levels_of(sft("2b")) == ("speed", "balanced")
    assert sft("2b").masters == SPLIT and sft("2b", "--use_cpu_offload_optimizer").masters == HOST


def test_a_start_under_deepspeed_copies_a_share_of_the_weights(monkeypatch):
    """On one GPU all of them, which is more than training takes; host memory is divided among the processes."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    peaks = {}
    for number in ("1", "2"):
        monkeypatch.setenv("WORLD_SIZE", number)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", number)
        peaks[number] = memory_peaks(sft("5b"), CHECKPOINTING)
    bf16 = 2 * sft("5b").num_weights
    assert 2 * bf16 < peaks["1"].reserved < 2.2 * bf16 and peaks["2"].reserved < 1.8 * bf16
    assert peaks["2"].host < 1.2 * peaks["1"].host


@pytest.mark.parametrize("kind", ["2b", "5b"])
def test_what_full_fine_tuning_has_on_the_gpu_and_on_the_host(kind):
    """Bytes per weight: 12 on the GPU, or 2 there and 12 on the host; a gradient has 2, and 4 where it is a sum."""
    run, summed = sft(kind), sft(kind, "--gradient_accumulation_steps", "2")
    hosted, by_cpu = (sft(kind, "--use_cpu_offload_optimizer", *more) for more in ([], ["--optimizer", "came"]))
    assert hosted.masters == RING and by_cpu.masters == HOST
    size = run.num_weights

    def difference(ours, theirs, part):
        return (getattr(memory_peaks(ours, "balanced"), part) - getattr(memory_peaks(theirs, "balanced"), part)) / size

    assert difference(run, hosted, "allocated") == pytest.approx(10, abs=2.5)  # + 2 as activations are freed
    assert difference(hosted, run, "host") == pytest.approx(12, abs=0.5)  # pinned while weights are read
    assert difference(summed, run, "allocated") == pytest.approx(2, abs=1)
    assert difference(
        sft(kind, "--use_cpu_offload_optimizer", "--gradient_accumulation_steps", "2"), hosted, "host"
    ) == (pytest.approx(2, abs=0.1))
    assert difference(by_cpu, hosted, "host") == pytest.approx(2, abs=1.5)  # 14 with the states of came
    # `offload` is that with activations on the host
    assert memory_peaks(run, "offload") == memory_peaks(hosted, "offload")
    assert memory_peaks(run, "offload").reserved < memory_peaks(hosted, "balanced").reserved
    assert memory_peaks(run, "offload").host >= memory_peaks(hosted, "balanced").host


def test_the_formula_has_the_rings_own_sizes():
    sizes = (estimate.CHUNK, estimate.RING_SLOTS, estimate.LEAVING_BLOCKS)
    assert sizes == (state_ring.CHUNK, state_ring.NUM_SLOTS, state_ring.LEAVING + 1)


def test_full_fine_tuning_fits_the_cards_it_is_made_for():
    """(level, blocks of 42 or 30 whose states are on the GPU)."""
    for kind, gpu_gib, host_gib, best in (("5b", 15.5, 96, ("offload", 0)), ("5b", 79, 96, ("balanced", 0)),
                                          ("5b", 23, 96, ("offload", 4)), ("5b", 5.5, 96, ("stream", 0)),
                                          ("5b", 15.5, 64, None), ("2b", 7.5, 31, ("offload", 1)),
                                          ("2b", 79, 31, ("speed", 0)), ("2b", 23, 31, ("offload", 25))):  # fmt: skip
        level, share = fastest_that_fits(sft(kind), gpu_gib * GIB, host_gib * GIB) or (None, 0)
        assert (best and (level, round(share * sft(kind).num_blocks))) == best or level is None
    assert fastest_that_fits(sft("5b", "--use_8bit"), 15.5 * GIB, 64 * GIB) == ("offload", 0)
    asked = sft("5b", "--memory", "auto", "--states_on_gpu", "0.1")
    assert fastest_that_fits(asked, 47 * GIB, 96 * GIB) == ("offload", 0.1)


@pytest.mark.parametrize("language", ["", "_zh"])
def test_the_page_says_what_full_fine_tuning_fits(language):
    """As its table of cards: 1 GB of them and 6 GB of the host are in use."""
    page = (ROOT / f"assets/training{language}.md").read_text()
    rows = re.findall(r"^\| (\d+) GB \| (\d+) GB \| (.+) \| (.+) \|$", page, re.MULTILINE)
    assert len(rows) == 14
    for gpu, host, *said in rows:
        room = (int(gpu) - 1) * 1e9, (int(host) - 6) * 1e9
        for kind, level in zip(("2b", "5b"), said, strict=True):
            exact, low_bit = (fastest_that_fits(sft(kind, *flags), *room) for flags in ((), ("--use_8bit",)))
            best = exact or low_bit
            assert re.findall(r"`(\w+)`", level) == ([best[0]] if best else []), (gpu, host, kind)
            assert ("--use_8bit" in level) == (exact is None and low_bit is not None)


def test_the_table_shows_the_share_that_auto_would_take():
    lines = table(sft("5b"), 23 * GIB, 96 * GIB).splitlines()
    assert [line.split("  ")[0] for line in lines[4:]] == ["offload --states_on_gpu 0.0952", "offload", "stream"]


def test_the_host_holds_the_weights_while_the_vae_decodes_where_the_gpu_has_no_room_for_both():
    run = sft("2b", "--validation_prompt", "x")
    weights = run.num_weights * run.item_bytes
    hosts = [memory_peaks(run, "offload", gpu_bytes=gib * GIB).host for gib in (7, 8)]
    assert hosts[0] - hosts[1] == weights
    assert memory_peaks(sft("2b"), "offload", gpu_bytes=7 * GIB) == memory_peaks(sft("2b"), "offload")


def test_what_comes_beside_training_counts():
    plain, flags = make_run("2b"), ["--validation_prompt", "x"]
    raw = ["--height_buckets", "480", "--width_buckets", "720", "--frame_buckets", "49"]
    assert memory_peaks(make_run("2b", *flags), "stream").allocated > memory_peaks(plain, "stream").allocated
    encoding = make_run("2b", *raw, data=())
    assert memory_peaks(encoding, "stream").allocated > memory_peaks(plain, "stream").allocated
    for run in (encoding, make_run("2b", *flags)):  # what the VAE keeps from pass to pass may lie on the host
        short, ample = memory_peaks(run, "stream"), memory_peaks(run, "stream", ample_memory=True)
        assert short.allocated < 5 * GIB and ample.allocated > short.allocated + GIB
        assert memory_peaks(run._replace(tiled=True), "stream").allocated not in (short.allocated, ample.allocated)
    eager = make_run("2b", "--no_compile_blocks")
    assert all(memory_peaks(eager, level).reserved > memory_peaks(plain, level).reserved for level in levels_of(plain))
    plain, averaged = (sft("2b", "--optimizer", "came", *more) for more in ([], ["--ema"]))
    more = memory_peaks(averaged, "balanced").allocated - memory_peaks(plain, "balanced").allocated
    assert more == 4 * plain.num_trained


def test_t5_and_decoding_are_small_where_weights_are_on_the_host():
    run = make_run("2b", "--validation_prompt", "x")
    assert memory_peaks(run, "stream").allocated < 5 * GIB
    streamed, least = (memory_peaks(run, level, ample_memory=True).allocated for level in ("stream", "balanced"))
    assert streamed < 7.5 * GIB < 8.9 * GIB < least


def test_a_host_that_streams_or_converts_t5_holds_it():
    validated, least = ["--validation_prompt", "x"], 9 * GIB  # T5-XXL in bf16
    for kind, level in [("5b", "offload"), ("2b", "stream"), ("2b", "balanced"), ("1.5-5b", "offload")]:
        short = memory_peaks(make_run(kind, *validated), level)
        assert memory_peaks(make_run(kind), level).host < least + 3 * GIB < short.host
        assert short.host < memory_peaks(make_run(kind, *validated), level, ample_memory=True).host
    plain, straight = (
        memory_peaks(make_run("5b", *flags), "balanced", ample_memory=True).host for flags in ([], validated)
    )
    assert straight - plain < 2 * GIB  # from its file to the GPU


def test_ranks_of_one_machine_share_streamed_weights(monkeypatch):
    one = make_run("5b")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    four = make_run("5b")
    assert memory_peaks(four, "offload").host == 4 * memory_peaks(one, "offload").host
    shared = 2 * one.num_weights
    assert memory_peaks(four, "stream").host == pytest.approx(4 * memory_peaks(one, "stream").host - 3 * shared)


def test_the_table_names_every_level_and_what_is_short():
    lines = table(make_run("5b"), 16 * GIB, 8 * GIB).splitlines()
    assert [line.split()[0] for line in lines] == [
        "--memory", "(checkpoints)", "speed", "balanced", "offload", "stream",
    ]  # fmt: skip
    assert "no, 16.0 GiB are free on the GPU" in lines[2] and "no, 8.0 GiB are free on the host" in lines[5]
    assert table(make_run("5b"), None, 8 * GIB).count("no GPU") == 5


# ---------------------------------------------------------------- on this machine


def choose(monkeypatch, gpu_gib, host_gib=64, kind="5b", task="t2v_lora", flags=("--memory", "auto"), device=CUDA):
    monkeypatch.setattr(levels, "free_gpu_bytes", lambda device: gpu_gib * GIB)
    monkeypatch.setattr(levels.psutil, "virtual_memory", lambda: type("", (), {"available": host_gib * GIB}))
    args = parse_training_args(task, [*REQUIRED, "--load_tensors", "--train_batch_size", "1", *flags])
    return levels.choose(args, real_model(kind), [SIZE_1_0], torch.bfloat16, device, is_lora=task.endswith("lora"))[0]


def test_auto_says_what_it_compares_and_chooses(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    assert choose(monkeypatch, 23) == "offload"
    assert "GPU, reserved" in caplog.text and "--memory auto: offload" in caplog.text
    assert choose(monkeypatch, 8) == "stream"


def test_auto_refuses_in_one_line_what_fits_nowhere(monkeypatch):
    with pytest.raises(UsageError, match="no level fits the 3.0 GiB .* smaller --frame_buckets"):
        choose(monkeypatch, 3)
    with pytest.raises(UsageError, match="or train a LoRA"):
        choose(monkeypatch, 3, kind="2b", task="t2v_sft")
    with pytest.raises(UsageError, match="or --use_cpu_offload_optimizer --offload_gradients, or train a LoRA"):
        choose(monkeypatch, 16, kind="2b", task="t2v_sft", flags=("--memory", "auto", "--optimizer", "came"))


@pytest.mark.parametrize("task", ["t2v_lora", "t2v_sft", "i2v_lora", "i2v_sft"])
def test_plan_prints_and_ends_before_anything_is_loaded_or_written(task, tiny, tmp_path, capsys):
    write_dataset(tmp_path / "data", num_clips=2, frames=9, height=64, width=96, text_shape=(226, 32))
    module = importlib.import_module(f"cogvideox_{'image' if task[0] == 'i' else 'text'}_to_video_{task[4:]}")
    model_dir = tmp_path / "configs"  # without weights
    for path in tiny("1.5-5b-i2v" if task[0] == "i" else "5b").rglob("*.json"):
        target = model_dir / path.relative_to(tiny("1.5-5b-i2v" if task[0] == "i" else "5b"))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text())
    argv = ["--pretrained_model_name_or_path", str(model_dir), "--data_root", str(tmp_path / "data")]
    argv += ["--load_tensors", "--output_dir", str(tmp_path / "out"), "--memory", "plan"]
    assert module.main(parse_training_args(task, argv)) is None
    printed = capsys.readouterr().out
    assert all(level in printed for level in ("speed", "balanced", "offload", "stream"))
    assert not (tmp_path / "out").exists()


def test_auto_on_a_cpu_keeps_everything(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    assert choose(monkeypatch, 0, host_gib=1, device=CPU) == "speed"
    assert "--memory auto: speed, since there is no GPU" in caplog.text


def test_auto_trains_what_a_run_without_trains_and_another_level_goes_on_with_it(tiny, tmp_path):
    write_dataset(tmp_path / "data", num_clips=2, frames=9, height=64, width=96, text_shape=(226, 32))
    module = importlib.import_module("cogvideox_text_to_video_lora")
    results = {}
    for name, runs in {"plain": [("4",)], "auto": [("2", "auto"), ("4", "balanced")]}.items():
        out = tmp_path / name
        for steps, *level in runs:
            argv = ["--pretrained_model_name_or_path", str(tiny("2b")), "--data_root", str(tmp_path / "data")]
            argv += [
                "--load_tensors",
                "--output_dir",
                str(out),
                "--rank",
                "4",
                "--seed",
                "1",
                "--lr_warmup_steps",
                "0",
            ]
            argv += ["--checkpointing_steps", "2", "--max_train_steps", steps, "--lr_scheduler", "constant"]
            module.main(parse_training_args("t2v_lora", [*argv, *(["--memory", *level] if level else [])]))
            results[name, steps] = (out / "checkpoint-2" / LORA_FILE).read_bytes(), (out / LORA_FILE).read_bytes()
    assert results["auto", "2"][0] == results["plain", "4"][0]
    assert results["auto", "4"][1] == results["plain", "4"][1]


def test_a_share_of_the_card_is_all_that_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda index: {None: 0.25, 0: 0.25}[index])
    assert levels.free_gpu_bytes(CUDA) == 20 * GIB
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda index: {None: 1.0, 0: 1.0}[index])
    assert levels.free_gpu_bytes(CUDA) == 70 * GIB


def test_the_host_memory_of_a_run_can_be_named(monkeypatch):
    """Rented machines may report little at their start and grow as memory is used."""
    for_all_weights = {"kind": "2b", "task": "t2v_sft", "host_gib": 8}
    with pytest.raises(UsageError, match="no level fits the 16.0 GiB .* 8.0 GiB of host memory"):
        choose(monkeypatch, 16, **for_all_weights)
    named = ("--memory", "auto", "--host_memory", "48")
    assert choose(monkeypatch, 16, flags=named, **for_all_weights) == "offload"
    asked = ("--memory", "offload")
    with pytest.raises(UsageError, match="8 GiB are available"):
        choose(monkeypatch, 16, flags=asked, **for_all_weights)
    assert choose(monkeypatch, 16, flags=(*asked, "--host_memory", "48"), **for_all_weights) == "offload"
    with pytest.raises(UsageError, match="8 GiB are available"):
        choose(monkeypatch, 16, flags=(*asked, "--host_memory", "8"), kind="2b", task="t2v_sft", host_gib=64)
