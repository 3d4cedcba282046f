import csv
import importlib.metadata
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bench
import checkpoint_rate
import draw_memory
import memory_rows
import overlap
import same_files
import step_time
import tables
from flops import latent_size, num_tokens, peak_tflops, step_flops
from memory import allocator
from random_dataset import write_dataset
from random_pipeline import real_sizes
from tiny_pipeline import KINDS, kind_transformer


STEP_TIME = Path(__file__).resolve().parents[1] / "benchmarks" / "step_time.py"

TOY = """
import sys, time, torch
from toy_helper import SLEEP
print("flags", sys.argv[1:])
weight = torch.nn.Parameter(torch.ones(1))
first, second = (torch.optim.SGD([weight], lr=0.1) for _ in range(2))
for step in range(int(sys.argv[1])):
    time.sleep(1.0 if step < 2 else SLEEP)
    weight.sum().backward()
    first.step()
    second.step()
if "--fail" in sys.argv:
    sys.exit(65)
"""


@pytest.fixture
def toy(tmp_path):
    (tmp_path / "toy_helper.py").write_text("SLEEP = 0.05\n")
    (tmp_path / "toy.py").write_text(TOY)
    return tmp_path / "toy.py"


def run_step_time(*args):
    return subprocess.run([sys.executable, STEP_TIME, *map(str, args)], capture_output=True, text=True)


@pytest.mark.slow  # a script that knows nothing of being measured: a process
def test_step_time_measures_an_unchanged_script(toy, tmp_path):
    rows_path = tmp_path / "rows.csv"
    result = run_step_time("--warmup", 2, "--label", "toy", "--csv", rows_path, "--", toy, 6, "--rank", 4)
    assert result.returncode == 0, result.stderr
    first_line, *_, last_line = result.stdout.splitlines()
    row = json.loads(last_line)
    assert first_line == "flags ['6', '--rank', '4']"
    assert row["steps"] == 4  # 6 less the warm-up; a second optimizer's steps are not counted
    assert 0.05 <= row["p10_s"] <= row["median_s"] <= row["p90_s"] < 0.9
    assert row["torch"] == importlib.metadata.version("torch")
    assert row["host_gib"] > 0.05
    if not torch.cuda.is_available():
        assert (row["allocated_gib"], row["reserved_gib"], row["card"]) == (0, 0, "cpu")

    assert run_step_time("--csv", rows_path, "--", toy, 1, "--fail").returncode == 65
    with open(rows_path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["label"], row["exit_code"], row["steps"]) for row in rows] == [("toy", "0", "4"), ("", "65", "0")]
    assert [row["median_s"] for row in rows] == [str(json.loads(last_line)["median_s"]), ""]


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--no_resul", "--", __file__], "unrecognized arguments: --no_resul"),
        (["--warmup", "2"], "name the script after --"),
    ],
)
def test_step_time_refuses_what_it_cannot_run(argv, line, capsys):
    with pytest.raises(SystemExit, match="2"):
        step_time.parse_args(argv)
    [shown] = capsys.readouterr().err.splitlines()
    assert line in shown


def test_a_script_that_is_not_there_is_one_line():
    with pytest.raises(SystemExit, match="^nowhere.py: no such script$"):
        step_time.run_script(["nowhere.py"])


def test_drawing_without_rows_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["draw_memory.py", "--csv", str(tmp_path), "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="no rows of lora_memory.csv or sft_memory.csv; benchmarks/memory_rows.py"):
        draw_memory.main()
    monkeypatch.setattr("sys.argv", ["draw_memory.py", "--csv", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="2"):
        draw_memory.main()
    assert "nowhere: no such folder" in capsys.readouterr().err


def test_step_time_refuses_a_csv_of_other_columns_before_running(toy, tmp_path):
    rows_path = tmp_path / "rows.csv"
    rows_path.write_text("name,seconds\n")
    result = run_step_time("--csv", rows_path, "--", toy, 1)
    assert result.returncode == 1
    assert "other columns" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("kind", KINDS)
def test_real_sizes_have_the_checkpoints_parameter_counts(kind):
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel(**kind_transformer(kind), **real_sizes(kind)["transformer"])
    billions = sum(parameter.numel() for parameter in transformer.parameters()) / 1e9
    assert 1.6 < billions < 1.8 if kind == "2b" else 5.5 < billions < 5.7
    assert transformer.config.text_embed_dim == 4096


def test_random_dataset_layout(tmp_path):
    write_dataset(tmp_path, num_clips=3, frames=9, height=64, width=96, text_shape=(226, 32))
    rows = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert [row["prompt"] for row in rows] == (tmp_path / "prompts.txt").read_text().splitlines()
    assert [row["video"] for row in rows] == (tmp_path / "videos.txt").read_text().splitlines()
    for row in rows:
        assert row["metadata"] == {"num_frames": 9, "height": 64, "width": 96}
        assert load_file(tmp_path / row["image_latent"])["moments"].shape == (2, 32, 1, 8, 12)
        moments = load_file(tmp_path / row["video_latent"])["moments"]
        assert moments.shape == (32, 3, 8, 12)
        assert load_file(tmp_path / row["prompt_embed"])["prompt_embeds"].shape == (226, 32)
    assert load_file(tmp_path / "prompt_embeds" / "_empty.safetensors")["prompt_embeds"].shape == (226, 32)


def test_clips_of_two_lengths_take_turns(tmp_path):
    write_dataset(tmp_path, num_clips=3, frames=[9, 5], height=64, width=96, text_shape=(226, 32))
    rows = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    assert [row["metadata"]["num_frames"] for row in rows] == [9, 5, 9]
    shapes = [load_file(tmp_path / row["video_latent"])["moments"].shape for row in rows]
    assert shapes == [(32, 3, 8, 12), (32, 2, 8, 12), (32, 3, 8, 12)]


def test_random_dataset_refuses_sizes_the_vae_does_not_take(tmp_path):
    with pytest.raises(ValueError, match="4k\\+1"):
        write_dataset(tmp_path, num_clips=1, frames=10, height=64, width=96)


# ---------------------------------------------------------------- model FLOPs


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "is_lora"), [("2b", True), ("2b", False), ("1.5-5b", True)])
def test_step_flops_are_those_that_torch_counts(kind, is_lora):
    """At the real size, on the meta device; attention as plain products, since a flash kernel recomputes one of them."""
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel(**kind_transformer(kind), **real_sizes(kind)["transformer"])
        config, size = transformer.config, bench.MODELS[kind]
        if is_lora:
            transformer.requires_grad_(False)
            targets = ["to_q", "to_k", "to_v", "to_out.0"]
            transformer.add_adapter(LoraConfig(r=64, lora_alpha=64, target_modules=targets))
        frames, height, width = latent_size(*size)
        frames += -frames % (config.patch_size_t or 1)
        text = torch.empty(1, config.max_text_seq_length, config.text_embed_dim)
        num_video = num_tokens(config, *size) - config.max_text_seq_length
        rotary = None if kind == "2b" else (torch.empty(num_video, 64), torch.empty(num_video, 64))
        latents, timestep = torch.empty(1, frames, 16, height, width), torch.empty(1, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            transformer(latents, text, timestep, image_rotary_emb=rotary, return_dict=False)[0].sum().backward()
    counted = counter.get_total_flops()
    assert step_flops(config, size, is_lora=is_lora) == pytest.approx(counted, rel=0.02)
    assert step_flops(config, size, batch=4, is_lora=is_lora) == pytest.approx(4 * counted, rel=0.02)


def test_utilisation_is_of_the_cards_peak():
    assert step_time.utilisation(827, 2.0, "NVIDIA H100 80GB HBM3") == pytest.approx(827 / 2 / 989, abs=1e-4)
    assert peak_tflops("NVIDIA H100 PCIe") < peak_tflops("NVIDIA H100 80GB HBM3")
    assert step_time.utilisation(827, 2.0, "Some Card 9000") is None
    assert step_time.utilisation(None, 2.0, "NVIDIA H200") is None


# ---------------------------------------------------------------- rows


def test_a_label_says_what_runs():
    row = bench.parse_row("5b-balanced@fa4+rank16+fp8+batch4+cap5.5")
    assert row == bench.parse_row("5b-balanced+cap5.5+fp8+batch4+rank16@fa4")  # a row has one label
    assert (row.batch, row.rank, row.cap) == (4, 16, 5.5)
    flags = " ".join(bench.script_flags(row, steps=20))
    assert bench.script_of(row).name == "cogvideox_text_to_video_lora.py"
    for expected in (
        "--memory balanced",
        "--attention fa4",
        "--base_precision fp8",
        "--train_batch_size 4",
        "--rank 16",
    ):
        assert expected in flags
    assert "gradient_checkpointing" not in flags
    assert bench.script_of(bench.parse_row("5b-i2v-speed+sft")).name == "cogvideox_image_to_video_sft.py"
    assert bench.data_folder(bench.parse_row("1.5-5b-stream")) == "data/81x768x1360"


def test_full_fine_tuning_runs_at_its_levels_and_is_validated_in_whole_frames():
    row = bench.parse_row("5b-offload+sft+accum4+validated+cap15.5")
    flags = " ".join(bench.script_flags(row, steps=20))
    assert row.is_sft and row.cap == 15.5 and bench.script_of(row).name == "cogvideox_text_to_video_sft.py"
    for expected in ("--memory offload", "--gradient_accumulation_steps 4", "--validation_prompt"):
        assert expected in flags
    assert "--enable_tiling" not in flags and "--rank" not in flags
    assert "--enable_tiling" in bench.script_flags(bench.parse_row("5b-offload+sft+tiled+validated"), steps=20)
    plain = bench.script_flags(bench.parse_row("5b-balanced"), steps=20)
    assert "--gradient_accumulation_steps" not in plain  # as rows in the file were measured


def test_a_row_of_several_gpus_starts_a_process_for_each():
    row = bench.parse_row("2b-checkpointing+zero2+gpus2+sft+batch4")
    launch = " ".join(bench.launcher(row.gpus, deepspeed=True))
    assert "accelerate_configs/deepspeed.yaml --num_processes 2 --gpu_ids 0,1" in launch
    assert launch.endswith("--main_process_port 0")  # rows of several GPUs at once each find a free one
    assert "--train_batch_size 4" in " ".join(bench.script_flags(row, steps=20))  # of each
    launch = " ".join(bench.launcher(bench.parse_row("5b-balanced+gpus4").gpus))
    assert "uncompiled_2.yaml --num_processes 4 --gpu_ids 0,1,2,3" in launch
    assert bench.launcher(bench.parse_row("5b-balanced").gpus) == [sys.executable]


@pytest.mark.parametrize(
    "label",
    [
        "5b",
        "5b-fast",
        "3b-speed",
        "5b-speed+fp9",
        "5b-speed+batch",
        "5b-reference+sft",
        "5b-stream+share1",
        "5b-balanced+sft+share1",
        "5b-reference+gpus2",
        "5b-reference+zero2",
        "5b-offload+sft+link25+accum4",  # sums of gradients on the host are not slowed down
    ],
)
def test_a_row_of_no_table_is_refused_before_anything_runs(label, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        bench.parse_args(["5b-speed", label])
    assert f"error: {label}: " in capsys.readouterr().err


@pytest.fixture
def work(tiny, tmp_path, monkeypatch):
    """A work folder with a tiny pipeline in place of a real one."""
    monkeypatch.setitem(bench.MODELS, "tiny", (9, 64, 96))
    shutil.copytree(tiny("5b"), tmp_path / "work/models/tiny")
    return tmp_path / "work"


def run_bench(monkeypatch, work, *rows):
    """(exit code, rows of the CSV)"""
    path = work / "speed.csv"
    argv = ["bench.py", "--csv", str(path), "--work", str(work), "--steps", "4", "--warmup", "1", *rows]
    monkeypatch.setattr("sys.argv", argv)
    exit_code = bench.main()
    return exit_code, bench.rows_in(path)


@pytest.mark.slow  # each row is a process of its own, as it is measured
def test_a_profile_is_printed_and_writes_no_row(work, monkeypatch, capsys):
    monkeypatch.setattr(bench, "card_name", lambda: "cpu")
    exit_code, rows = run_bench(monkeypatch, work, "tiny-speed", "--profile", "--steps", "5")
    assert exit_code == 0 and rows == []
    assert capsys.readouterr().out.startswith("tiny-speed: no profile: it needs a GPU")
    exit_code, rows = run_bench(monkeypatch, work, "tiny-speed+compiled+eager", "--profile", "--steps", "5")
    assert (
        exit_code == 1 and "give one of them" in capsys.readouterr().out
    )  # why it failed, not that there is no profile
    with pytest.raises(SystemExit):
        run_bench(monkeypatch, work, "tiny-speed", "--profile")
    assert "--profile: at least 5 --steps, of which 3 to 5 are profiled" in capsys.readouterr().err


@pytest.mark.slow  # each row is a process of its own, as it is measured
def test_rows_of_each_kind_run_and_one_that_fails_leaves_the_others(work, monkeypatch, capsys):
    monkeypatch.setattr(bench, "card_name", lambda: "cpu")
    labels = ["tiny-reference", "tiny-speed+compiled+eager", "tiny-checkpointing+rank4+validated", "2b-speed"]
    labels += ["tiny-balanced+batch4+sft", "tiny-offload+accum2+sft+validated"]
    exit_code, rows = run_bench(monkeypatch, work, *labels)
    shown, _, sent = capsys.readouterr().out.partition("to send in, for the tables: ")
    shown = dict(line.split(": ", 1) for line in shown.splitlines())
    assert exit_code == 1 and sent.splitlines() == (work / "speed.csv").read_text().splitlines()[1:]
    assert list(shown) == labels
    assert "--compile_blocks and --no_compile_blocks: give one of them" in shown["tiny-speed+compiled+eager"]
    assert "needs a GPU" in shown["2b-speed"]  # gigabytes of random weights, on a machine that could not train them
    assert [row["label"] for row in rows] == [label for label in labels if "FAILED" not in shown[label]]
    assert len(rows) == 4
    for label in labels[-2:]:  # gigabytes at the real size: only where the run's end is measured, too
        said = (work / f"logs/{bench.parse_row(label).label}.log").read_text()
        assert ("the result: " in said) == ("validated" in label)
    for row in rows:
        assert row["steps"] == "3"
        assert 0 < float(row["p10_s"]) <= float(row["median_s"]) <= float(row["p90_s"]) < 60
        assert 0.1 < float(row["host_gib"]) < 8
        assert 1 < float(row["first_step_s"]) < 120
        assert not Path(row["command"].split()[0]).is_absolute()
        assert not (work / "runs" / row["label"]).exists()


def test_measured_rows_are_left_out_unless_asked_for_again(work, monkeypatch, capsys):
    measured = []

    def measure(row, args, card):
        measured.append((row.label, card))
        figures = {"allocated_gib": 1.0, "reserved_gib": 1.0, "first_step_s": 1.0, "host_gib": 1.0, "mfu": None}
        return dict.fromkeys(step_time.FIELDS) | speed_row(row.label, card=card, **figures), ""

    monkeypatch.setattr(bench, "measure", measure)
    cards = iter(["one", "one", "one", "other"])
    monkeypatch.setattr(bench, "card_name", lambda: next(cards))
    assert run_bench(monkeypatch, work, "tiny-speed", "tiny-speed")[0] == 0
    assert run_bench(monkeypatch, work, "tiny-speed", "tiny-stream")[0] == 0
    shown = capsys.readouterr().out
    assert "tiny-speed: in " in shown and "for the tables: tiny-stream,0," in shown
    run_bench(monkeypatch, work, "tiny-speed", "--again")
    run_bench(monkeypatch, work, "tiny-speed")
    labels = [("tiny-speed", "one"), ("tiny-stream", "one"), ("tiny-speed", "one"), ("tiny-speed", "other")]
    assert measured == labels


def speed_row(label, **figures):
    """A row of speed.csv."""
    row = {
        "label": label,
        "exit_code": 0,
        "median_s": 2.0,
        "p10_s": 1.9,
        "p90_s": 2.1,
        "card": "NVIDIA H100 80GB HBM3",
    }
    row |= {"allocated_gib": 20.04, "reserved_gib": 22.46, "host_gib": 6.0, "mfu": 0.4181}
    return row | {"torch": "2.11.0", "diffusers": "0.42.1", "cuda": "13.0"} | figures


def test_a_row_is_validated_only_with_its_videos(tmp_path):
    row, log_path = bench.parse_row("5b-stream+validated"), tmp_path / "log"
    log_path.write_text("WARNING step 2: validation videos failed, training continues: OutOfMemoryError\nbye\n")
    args = SimpleNamespace(work=tmp_path, steps=4)
    for step in (0, 2, 4):
        with pytest.raises(bench.RowError, match=f"no video of step {step}: .*OutOfMemoryError"):
            bench.check_videos(row, args, log_path)
        folder = tmp_path / f"runs/5b-stream+validated/samples/step_{step}"
        folder.mkdir(parents=True)
        (folder / "0_0.mp4").touch()
    bench.check_videos(row, args, log_path)


def test_a_killed_process_is_said(tmp_path):
    killed = [sys.executable, "-c", "import os; print('so far', flush=True); os.kill(os.getpid(), 9)"]
    with pytest.raises(bench.RowError, match="^signal 9: so far "):
        bench.run_logged(killed, tmp_path / "logs/row.log")


@pytest.mark.slow  # scripts write the inputs
def test_inputs_are_made_whole_or_not_at_all_and_once(tmp_path):
    folder, log_path = tmp_path / "data/9x64x96", tmp_path / "log"
    size = ["--frames", "9", "--height", "64", "--width", "90"]
    with pytest.raises(bench.RowError, match="exit code 2"):
        bench.make_once(folder, "random_dataset.py", log_path, *size)
    assert not folder.exists()
    (tmp_path / "data/9x64x96.partial/left-over").mkdir(parents=True)
    texts = ["--text_width", "32", "--num_clips", "2"]
    bench.make_once(folder, "random_dataset.py", log_path, *size[:-1], "96", *texts)
    assert (folder / "data.jsonl").exists()
    assert not (folder / "left-over").exists()
    bench.make_once(folder, "no-such-script.py", log_path)


def test_the_cap_waits_for_cuda_to_start():
    queued, fractions = [], []
    cuda = SimpleNamespace(
        _lazy_call=queued.append,
        current_device=lambda: 0,
        get_device_properties=lambda device: SimpleNamespace(total_memory=80 * 2**30),
        set_per_process_memory_fraction=fractions.append,
    )
    step_time.cap_memory(SimpleNamespace(cuda=cuda), 5.5)
    assert not fractions
    queued[0]()
    assert fractions == [5.5 / 80]


def test_a_rows_command_says_what_torchs_allocator_was_told(monkeypatch):
    assert step_time.ALLOCATOR_VARIABLES == allocator.VARIABLES
    for name in allocator.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    command = [step_time.ROOT / "training/script.py", "--prompt", "a ball"]
    assert step_time.command_line(command) == "training/script.py --prompt 'a ball'"
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:False")
    assert step_time.command_line(command).startswith(
        "PYTORCH_ALLOC_CONF=expandable_segments:False training/script.py "
    )
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "roundup_power2_divisions:[256:1,>:4]")
    assert shlex.split(step_time.command_line(command))[0] == "PYTORCH_ALLOC_CONF=roundup_power2_divisions:[256:1,>:4]"


@pytest.mark.gpu
def test_capped_memory_is_refused_beyond_the_cap(tmp_path):
    (tmp_path / "greedy.py").write_text(
        "import torch; kept = [torch.empty(gib * 2**30, dtype=torch.uint8, device='cuda') for gib in (1, 2)]"
    )
    result = run_step_time("--memory_cap", 2, "--", tmp_path / "greedy.py")
    assert result.returncode == 1
    assert "OutOfMemoryError" in result.stderr
    assert 1 <= json.loads(result.stdout.splitlines()[-1])["reserved_gib"] <= 2


# ---------------------------------------------------------------- tables of the pages


def page(*contents):
    parts = []
    for kind in tables.HEADINGS:
        content = contents[len(parts)] if contents else ""
        end = f"<!-- end of the {kind} table -->\n"
        parts.append(f"<!-- {kind} table: python benchmarks/tables.py -->\n{content}{end}")
    return "Before\n" + "Between\n".join(parts) + "After\n"


def filled(rows, page_name="measurements.md", text=None):
    rows = [{key: "" if value is None else str(value) for key, value in row.items()} for row in rows]
    rows = [dict.fromkeys(step_time.FIELDS, "") | row for row in rows]
    return tables.filled(text or page(), page_name, rows, tables.read_originals())


def test_tables_show_the_rows_of_the_csv():
    rows = [speed_row("5b-stream+validated+cap5.5", median_s=None, mfu=None), speed_row("5b-speed", median_s=1.71)]
    rows += [speed_row("5b-balanced+batch4+fp8@fa4", median_s=9), speed_row("5b-balanced+batch4+fp8@fa4", median_s=8)]
    rows += [speed_row("5b-reference"), speed_row("1.5-5b-balanced", median_s=9.5), speed_row("2b-balanced+sft")]
    rows += [speed_row("2b-offload+sft", median_s=2.5), speed_row("2b-offload+sft", card="another")]
    text = filled(rows)
    lines = ["|".join(cell.strip() for cell in line.split("|")) for line in text.splitlines() if "x7" in line]
    common, card = "20.0 GiB|22.5 GiB|6.0 GiB|42 %", "H100 80GB HBM3"
    assert lines == [
        f"|5b|49x480x720|reference|torch|2.00|{common}|3.92 s, 19.7 GiB (H100)|{card}|",
        f"|5b|49x480x720|balanced, batch 4, fp8|fa4|8.00|{common}||{card}|",
        f"|5b|49x480x720|speed|auto|1.71|{common}|OOM (H100)|{card}|",
        f"|1.5-5B|81x768x1360|balanced|auto|9.50|{common}|40 s, 35 GB (A800)|{card}|",
        f"|2b|49x480x720|balanced|auto|2.00|1.00|{common}|{card}|",
        f"|2b|49x480x720|offload|auto|2.50|1.25|{common}|{card}|",
        f"|2b|49x480x720|offload|auto|2.00||{common}|another|",
        f"|5.5 GiB|5b|49x480x720|stream|tiny|22.5 GiB|6.0 GiB||yes|{card}|",
    ]
    assert "Versions: torch 2.11.0, diffusers 0.42.1, CUDA 13.0." in text
    assert filled(rows, text=text) == text
    assert filled([], text=text) == page()


def test_what_fits_under_a_cap_takes_the_time_of_the_same_level_without_one():
    others = [speed_row("5b-stream@fa4", median_s=2.4), speed_row("5b-stream@cudnn", median_s=3)]
    others += [speed_row("5b-stream+fp8", median_s=1), speed_row("5b-balanced", median_s=1)]
    others += [speed_row("5b-stream", median_s=1, card="another")]
    text = filled([speed_row("5b-stream+validated+cap5.5", median_s=99), *others])
    assert "| 40 min | yes |" in text


def test_what_fits_under_a_cap_says_which_t5_and_card_and_its_own_time_where_it_has_one():
    own = speed_row("5b-stream+cap5.5+validated+xxl@cudnn", median_s=2.4, card="NVIDIA H200")
    shared = speed_row("2b-offload+cap7.5+validated+xxl", median_s=None, card="NVIDIA H200")
    text = filled([own, shared, speed_row("2b-stream+cap4", median_s=None), speed_row("5b-stream", median_s=1)])
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "GiB | 5b" in line]
    assert cells[0][:5] == ["5.5 GiB", "5b", "49x480x720", "stream", "T5-XXL"]
    assert cells[0][-3:] == ["40 min", "yes", "H200"]
    assert "| 7.5 GiB | 2b | 49x480x720 | offload | T5-XXL | 22.5 GiB | 6.0 GiB | | yes | H200 |" in text
    assert "| 4 GiB | 2b | 49x480x720 | stream | | 22.5 GiB | 6.0 GiB | | no | H100 80GB HBM3 |" in text


def test_full_fine_tuning_under_a_cap_stands_in_both_tables_beside_balanced():
    rows = [speed_row("5b-balanced+sft@fa4"), speed_row("5b-offload+cap28+sft+share0.2@fa4", median_s=2.5)]
    lines = [line for line in filled(rows).splitlines() if "share0.2" in line]
    common = "20.0 GiB | 22.5 GiB | 6.0 GiB | 42 % | H100 80GB HBM3 |"
    assert lines[0] == f"| 5b | 49x480x720 | offload, cap28, share0.2 | fa4 | 2.50 | 1.25 | {common}"
    assert lines[1].startswith("| 28 GiB | 5b | 49x480x720 | offload, sft, share0.2 | | 22.5 GiB |")
    assert len(lines) == 2


def test_tables_have_the_same_figures_in_both_languages():
    rows = [speed_row("5b-stream+cap5.5"), speed_row("2b-speed")]
    english, chinese = (filled(rows, name).split("---|\n") for name in ("measurements.md", "measurements_zh.md"))
    assert len(english) == len(chinese) == 3
    for one, other in zip(english[1:], chinese[1:], strict=True):
        assert re.findall(r"[\d.]+", one.split("\n")[0]) == re.findall(r"[\d.]+", other.split("\n")[0])


def test_a_page_without_markers_is_an_error():
    with pytest.raises(ValueError, match="measurements.md: needs one <!-- speed table"):
        filled([], text="nothing\n")


def test_rows_of_the_original_have_ours_beside_them_where_we_have_one():
    adamw = {"method": "lora", "optimizer": "AdamW", "batch": "4", "model": "CogVideoX-5b", "lora_rank": "16"}
    adamw |= {"gradient_checkpointing": "True"} | {f"memory_{stage}": "46.26" for stage in memory_rows.STAGES}
    sft = adamw | {"method": "sft", "batch": "1", "lora_rank": "", "memory_before_validation": "OOM"}
    offloaded = sft | {"optimizer": "AdamW + CPUOffloadOptimizer (with gradient offloading)"}
    zero = sft | {"optimizer": "DeepSpeed (AdamW + CPU/Parameter offloading)"}
    figures = {f"{stage}_peak_reserved_gib": "13.04" for stage in memory_rows.STAGES}
    pairs = [(adamw, {"label": "5b lora adamw batch 4 rank 16 stream"} | figures)]
    pairs += [(offloaded, {"label": "5b sft offload-gradients batch 1 offload"} | figures)]
    rows = [sft, zero, zero | {"batch": "4"}, sft | {"batch": "4"}, adamw]
    text = tables.original_table("measurements.md", rows, pairs)
    lines = ["|".join(cell.strip() for cell in line.split("|")) for line in text.splitlines() if "| 5b" in line]
    assert lines == [
        "|5b|LoRA|AdamW|4|16|yes|" + "46.3 / 13.0|" * 4 + "stream|",
        "|5b|SFT|AdamW|1||yes|46.3 /|OOM /|46.3 /|46.3 /||",
        "|5b|SFT|DeepSpeed|1||yes|46.3 / 13.0|OOM / 13.0|46.3 / 13.0|46.3 / 13.0|offload|",
        "|5b|SFT|DeepSpeed|4||yes|46.3 /|OOM /|46.3 /|46.3 /||",
        "|5b|SFT|AdamW|4||yes|46.3 /|OOM /|46.3 /|46.3 /||",
    ]


# ---------------------------------------------------------------- the original's memory


def memory_event(step, when, peak):
    return {"event": "memory", "step": step, "when": when, "reserved_gib": peak - 1, "peak_reserved_gib": peak}


def test_memory_columns_are_those_of_the_original():
    """Load, train, validate: all that came before; the test alone; no video of the untrained model."""
    events = [
        memory_event(0, "before_training", 3.0),
        memory_event(0, "before_validation", 2.0),
        memory_event(0, "after_validation", 9.0),
        memory_event(2, "before_validation", 6.0),
        memory_event(2, "after_validation", 5.0),
        memory_event(4, "before_validation", 7.0),
        memory_event(4, "after_validation", 4.0),
        memory_event(4, "after_testing", 3.5),
    ]
    figures = memory_rows.memory_figures(events, middle=2)
    assert [figures[f"{when}_peak_reserved_gib"] for when in memory_rows.STAGES] == [3.0, 6.0, 6.0, 4.0]
    assert [figures[f"{when}_reserved_gib"] for when in memory_rows.STAGES] == [2.0, 5.0, 4.0, 2.5]
    assert figures["after_testing_allocated_gib"] is None


def test_every_lora_of_the_original_on_one_gpu_has_a_row():
    args = ["x.csv", "--model", "m", "--data", "d", "--original", "--label"]
    rows = [row for model in ("2b", "5b") for row in memory_rows.original_rows(memory_rows.parse_args([*args, model]))]
    assert len({row.label for row in rows}) == len(rows) == 27 + 18
    levels = [row.flags[row.flags.index("--memory") + 1] for row in rows]
    assert (levels.count("speed"), levels.count("stream")) == (9, 36)
    eight_bit = next(row for row in rows if row.label == "5b lora adamw-8bit batch 4 rank 256 stream")
    argv = memory_rows.command_of(memory_rows.parse_args([*args, "5b"]), eight_bit, Path("out"))
    assert "--use_8bit" in argv
    assert "--rank 256 --lora_alpha 256 --no_first_validation" in " ".join(argv)


def test_full_fine_tuning_of_the_original_has_rows_when_asked_for():
    args = ["x.csv", "--model", "m", "--data", "d", "--original", "--tasks", "sft", "--label"]
    rows = [row for model in ("2b", "5b") for row in memory_rows.original_rows(memory_rows.parse_args([*args, model]))]
    assert len({row.label for row in rows}) == len(rows) == 12
    assert {"5b sft adamw batch 1 offload", "5b sft adamw batch 4 offload"} < {row.label for row in rows}
    hosted = next(row for row in rows if row.label == "5b sft offload-gradients batch 1 offload")
    argv = " ".join(memory_rows.command_of(memory_rows.parse_args([*args, "5b"]), hosted, Path("out")))
    assert "cogvideox_text_to_video_sft.py" in argv and "--memory offload" in argv and "--rank" not in argv
    assert "--gradient_checkpointing" not in argv
    pairs = memory_rows.side_by_side("5b", [{"label": row.label} for row in rows], "sft")
    assert [ours["label"] for _, ours in pairs] == [row.label for row in rows if row.label.startswith("5b")]


def test_rows_that_the_original_trained_with_deepspeed_are_run_on_two_gpus(tmp_path, monkeypatch):
    args = ["x.csv", "--model", "m", "--data", "d", "--original", "--gpus", "2", "--tasks", "lora", "sft", "--label"]
    rows = [row for model in ("2b", "5b") for row in memory_rows.original_rows(memory_rows.parse_args([*args, model]))]
    assert len({row.label for row in rows}) == len(rows) == 8
    lora = next(row for row in rows if row.label == "5b lora deepspeed batch 4 rank 256 checkpointing")
    argv = " ".join(memory_rows.command_of(memory_rows.parse_args([*args, "5b"]), lora, Path("out")))
    assert "deepspeed.yaml --num_processes 2 --gpu_ids 0,1" in argv and "--rank 256 --lora_alpha 256" in argv
    assert "--gradient_checkpointing --train_batch_size 4" in argv and "--memory" not in argv
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert tables.deepspeed_table("measurements.md") == ""
    figures = {f"{stage}_peak_reserved_gib": "13.04" for stage in memory_rows.STAGES}
    row = dict.fromkeys(memory_rows.FIELDS) | {"label": lora.label, "exit_code": 0} | figures
    step_time.append_row(tmp_path / "benchmarks/deepspeed_memory.csv", row, memory_rows.FIELDS)
    shown = tables.deepspeed_table("measurements.md").splitlines()[3]
    assert shown.startswith(
        "| 5b | LoRA | DeepSpeed | 4 | | yes | 20.2 / 13.0 | 40.6 / 13.0 | 40.7 / 13.0 | 39.0 / 13.0"
    )


def test_memory_rows_of_several_gpus_are_the_originals(capsys):
    with pytest.raises(SystemExit):
        memory_rows.parse_args(["x.csv", "--model", "m", "--data", "d", "--label", "2b", "--gpus", "2"])
    assert "--gpus: with --original" in capsys.readouterr().err


def test_memory_is_taken_after_the_optimizer_has_its_states(capsys):
    assert [memory_rows.middle_of(steps) for steps in (3, 4, 5, 10)] == [2, 2, 2, 5]
    with pytest.raises(SystemExit):
        memory_rows.parse_args(["x.csv", "--model", "m", "--data", "d", "--label", "2b", "--steps", "2"])
    assert "at least 3" in capsys.readouterr().err


def test_memory_rows_of_no_model_are_refused_once(tmp_path, monkeypatch):
    argv = ["memory_rows.py", str(tmp_path / "x.csv"), "--model", "nowhere", "--data", str(tmp_path), "--label", "2b"]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit, match="^--model nowhere: no such folder; benchmarks/random_pipeline.py makes one$"):
        memory_rows.main()


@pytest.mark.slow  # each row is a process of its own, as it is measured
def test_memory_rows_run_and_are_not_run_twice(tiny, prepared_data, tmp_path, monkeypatch, capsys):
    [original] = [row for row in memory_rows.read_originals("2b") if row["optimizer"] == "AdamW"][5:6]
    originals = [original | {"lora_rank": "4"}, original | {"batch": "0"}]
    monkeypatch.setattr(memory_rows, "read_originals", lambda model, task="lora", gpus=1: originals)
    monkeypatch.setattr(memory_rows, "card_name", lambda: "cpu")
    path = tmp_path / "rows.csv"
    argv = ["memory_rows.py", str(path), "--model", str(tiny("5b")), "--data", str(prepared_data), "--label", "2b"]
    argv += ["--original", "--steps", "3", "--level", "balanced", "--jobs", "2", "--work", str(tmp_path / "work")]
    monkeypatch.setattr("sys.argv", argv)
    assert memory_rows.main() == 1
    failed, done = sorted(capsys.readouterr().out.splitlines())
    assert failed.startswith("2b lora adamw batch 0 rank 256 balanced: FAILED, exit code 2: ")
    assert "--train_batch_size" in failed
    [row] = bench.rows_in(path)
    assert done.startswith(f"{row['label']}: ")
    assert row["label"] == "2b lora adamw batch 1 rank 4 balanced"
    assert float(row["host_peak_gib"]) > 0.1
    assert row["median_s"] == ""  # two at once
    del originals[1]
    assert memory_rows.main() == 0
    assert len(bench.rows_in(path)) == 1


def test_figures_of_memory_are_drawn_of_the_rows_that_both_have(tmp_path, monkeypatch, capsys):
    path = tmp_path / "lora_memory.csv"
    labels = ["2b lora adamw batch 1 rank 16 speed", "2b lora adamw batch 1 rank 16 balanced"]
    labels += ["2b lora offload-gradients batch 4 rank 256 stream", "2b lora adamw batch 1 rank 16 stream"]
    for place, label in enumerate(labels):
        figures = {f"{when}_peak_reserved_gib": place for when in memory_rows.STAGES}
        row = {"label": label, "exit_code": 0, "card": "NVIDIA H200"} | figures
        step_time.append_row(path, dict.fromkeys(memory_rows.FIELDS) | row, memory_rows.FIELDS)
    pairs = memory_rows.side_by_side("2b", bench.rows_in(path))
    assert [ours["label"] for _, ours in pairs] == [labels[0], labels[3], labels[2]]  # the later of two levels
    assert draw_memory.bars_of(pairs, "after_testing") == ([24.234, 24.234, 24.709], [0, 3, 2])
    assert draw_memory.levels_of(pairs) == "speed without checkpointing, stream with checkpointing"
    trained = {"label": "5b sft adamw batch 1 offload", "exit_code": 0, "card": "NVIDIA H200"} | figures
    step_time.append_row(tmp_path / "sft_memory.csv", dict.fromkeys(memory_rows.FIELDS) | trained, memory_rows.FIELDS)
    monkeypatch.setattr("sys.argv", ["draw_memory.py", "--csv", str(tmp_path), "--out", str(tmp_path)])
    draw_memory.main()
    assert "3 rows" in capsys.readouterr().out
    assert {drawn.name for drawn in tmp_path.glob("*.png")} == {"lora_2b.png", "sft_5b.png"}
    with Image.open(tmp_path / "lora_2b.png") as image:
        assert len(image.convert("RGB").getcolors(2**20)) > 10
        points = image.width / draw_memory.INCHES["width"] / 72  # pixels each
        assert draw_memory.FONT * points * 830 / image.width >= 11, "too small where a page shows it 830 wide"


def test_figures_of_memory_are_grouped_by_batch_and_checkpointing():
    """Each pair stands once, under the heading that is true of it."""
    for model in draw_memory.MODELS:
        pairs = memory_rows.side_by_side(model, bench.rows_in(memory_rows.ROOT / "benchmarks/lora_memory.csv"))
        lines = draw_memory.lines_of(draw_memory.grouped(pairs))
        headings = [label for label, pair in lines if pair is None]
        assert len(headings) == len(set(headings)) and set(headings) <= {
            f"batch {batch}, {kind}" for batch in (1, 4) for kind in ("checkpointing", "no checkpointing")
        }
        shown = [pair for _, pair in lines if pair]
        assert sorted(map(repr, shown)) == sorted(map(repr, pairs))
        heading = None
        for label, pair in lines:
            heading = label if pair is None else heading
            assert pair is None or draw_memory.group_of(pair[0]) == heading
            assert pair is None or label.endswith(f"rank {pair[0]['lora_rank']}")


def test_figures_of_memory_tell_the_two_apart_without_colour():
    from matplotlib.colors import to_rgb

    original, ours = (np.dot(to_rgb(draw_memory.COLOURS[who]), (0.299, 0.587, 0.114)) for who in ("original", "ours"))
    assert original - ours > 0.4


# ---------------------------------------------------------------- exactness and overlap of the levels


@pytest.mark.slow  # each run is a process of its own, as it is proven
def test_levels_are_proven_by_their_hashes(work, monkeypatch, capsys):
    monkeypatch.setattr(same_files, "card_name", lambda: "cpu")
    width = json.loads((work / "models/tiny/transformer/config.json").read_text())["text_embed_dim"]
    write_dataset(work / "data/9+5x64x96", num_clips=4, frames=[9, 5], height=64, width=96, text_shape=(226, width))
    argv = ["same_files.py", "tiny", "--levels", "balanced", "stream", "--times", "1", "--steps", "2", "--jobs", "2"]
    argv += ["--frames", "9", "5", "--attention", "math", "--work", str(work), "--csv", str(work / "same.csv")]
    monkeypatch.setattr("sys.argv", argv)
    assert same_files.main() == 0
    rows = same_files.read_rows(work / "same.csv")
    assert len(rows) == 2 and len({row["sha256"] for row in rows}) == 1
    assert [line.split()[:3] for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["tiny", "balanced", "1"], ["tiny", "stream", "1"],
    ]  # fmt: skip
    monkeypatch.setattr(same_files, "train", None)  # nothing is trained again
    assert same_files.main() == 0
    path = work / "same.csv"
    path.write_text(path.read_text().replace(rows[1]["sha256"], "0" * 64, 1))
    assert same_files.main() == 1
    assert capsys.readouterr().out.splitlines()[-1] == "tiny: not proven, hashes differ or runs are missing"


@pytest.mark.slow  # each run is a process of its own, as it is proven
def test_levels_of_full_fine_tuning_are_proven_by_the_hashes_of_fp32_weights(work, monkeypatch):
    monkeypatch.setattr(same_files, "card_name", lambda: "cpu")
    width = json.loads((work / "models/tiny/transformer/config.json").read_text())["text_embed_dim"]
    write_dataset(work / "data/9+5x64x96", num_clips=4, frames=[9, 5], height=64, width=96, text_shape=(226, width))
    argv = ["same_files.py", "tiny", "--sft", "--accumulation", "1", "--levels", "balanced", "offload", "--times", "1"]
    argv += ["--steps", "2", "--frames", "9", "5", "--attention", "math"]
    monkeypatch.setattr("sys.argv", [*argv, "--work", str(work), "--csv", str(work / "same.csv")])
    assert same_files.main() == 0
    rows = same_files.read_rows(work / "same.csv")
    assert [row["level"] for row in rows] == ["balanced+accum1+sft", "offload+accum1+sft"]
    assert len({row["sha256"] for row in rows}) == 1
    assert all("--save_dtype fp32" in row["command"] for row in rows)


def test_full_fine_tuning_is_compared_wherever_its_states_are():
    args = same_files.parse_args(["2b", "--sft"])
    runs = same_files.runs_of(args)
    assert len(runs) == 18 and [run["level"] for run in runs[:3]] == [
        "balanced+sft",
        "balanced+hostadam+sft",
        "offload+sft",
    ]
    commands = [same_files.command_of(run, args, "out") for run in runs[:3]]
    assert ["--use_cpu_offload_optimizer" in command for command in commands] == [False, True, False]
    assert [command[command.index("--memory") + 1] for command in commands] == ["balanced", "balanced", "offload"]
    assert all("--rank" not in command for command in commands)


class FakeCuda:
    """A clock that goes on by a millisecond with each event, and by ten in a wait for a copy."""

    time = 0.0

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            FakeCuda.time += 1
            self.time = FakeCuda.time

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.time - self.time

    @staticmethod
    def memory_reserved():
        return 3 * 2**30 + int(FakeCuda.time) * 2**20


def test_waits_for_copies_are_a_share_of_the_update(monkeypatch):
    def wait(event):
        FakeCuda.time += 10

    streaming = SimpleNamespace(wait=wait)
    clock = overlap.CopyClock(SimpleNamespace(cuda=FakeCuda))
    steps = []
    hooks = sys.modules["torch.optim.optimizer"]
    monkeypatch.setattr(hooks, "register_optimizer_step_post_hook", steps.append)
    clock.install(streaming)
    for _ in range(4):
        FakeCuda.time += 50
        streaming.wait(None)
        steps[0](None)
    clock.read()
    assert clock.waited == [0.011] * 4 and clock.durations() == [pytest.approx(0.063)] * 3
    row = overlap.figures(clock.durations(), clock.waited, clock.reserved, warmup=1)
    times, memory = overlap.describe_row(row).splitlines()
    assert times == "3 updates of 0.063 s: 17.46% of the time waits for copies (at most 17.46%)"
    assert memory.endswith("grew by 126 MiB") and set(row) <= set(overlap.FIELDS)


# ---------------------------------------------------------------- checkpoints


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--use_cpu_offload_optimizer"], ["--ema", "--optimizer", "came"]])
def test_a_checkpoint_is_timed_both_ways_and_comes_back_as_it_was(flags, tmp_path, monkeypatch, capsys):
    csv_path = tmp_path / "rate.csv"
    argv = ["checkpoint_rate.py", str(tmp_path), "--tiny", "--csv", str(csv_path), "--", *flags]
    monkeypatch.setattr(sys, "argv", argv)
    checkpoint_rate.main()
    [row] = same_files.read_rows(csv_path)
    for way in ("write", "load"):
        seconds, rate = float(row[f"{way}_s"]), float(row[f"{way}_gb_s"])
        assert seconds > 0 and rate * seconds == pytest.approx(float(row["gb"]), rel=0.5)
        assert float(row[f"{way}_growth_gib"]) < 0.1
    assert "GB/s" in capsys.readouterr().out and not (tmp_path / "checkpoint-rate").exists()

    monkeypatch.setattr("engine.engines.SftEngine.load_state", lambda engine, folder: None)
    with pytest.raises(SystemExit, match="is not the one that was written"):
        checkpoint_rate.main()
    assert len(same_files.read_rows(csv_path)) == 1


def test_the_peak_of_a_phase_is_more_than_what_stays(tmp_path):
    with checkpoint_rate.Phase() as phase:
        kept = bytearray(2**26)
        del kept
        kept = bytearray(b"1") * 2**27
        time.sleep(0.05)
        del kept
        kept = bytearray(b"1") * 2**26
    assert phase.seconds > 0.05 and 0.05 < phase.growth < 0.15  # 128 MiB at most, 64 of them still there
    assert len(kept) == 2**26
