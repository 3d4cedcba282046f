"""What the pages say can be typed: their commands parse, their Python runs, the flags and files that they name exist.

README.md, the pages of assets/ and of tiny_model/, each with its Chinese twin: what agrees with English code blocks is checked once.
"""

import csv
import importlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import av
import pytest
import torch

import bench
import exactness
import memory_rows
import random_dataset
import random_pipeline
import step_time
import tables
import test_lora_inference
import world
from args import (
    make_caption_parser,
    make_prepare_parser,
    make_training_parser,
    parse_caption_args,
    parse_prepare_args,
    parse_training_args,
)
from base.flag_parser import EPILOG, FIRST, SCRIPTS
from dry_run import dry_run, printed_commands
from synthetic_clips import ffmpeg_path
from test_hub import assert_first_frames_are_raw
from test_shell import CONFIGS, ORIGINAL_SWEEP


ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
FLAGS_PAGE = ROOT / "assets/flags.md"
MOST_BYTES_OF_README = 14_000
FIRST_SCREEN = 50  # lines of text, the commands among them


def twin(page):
    """The same page in Chinese."""
    return page.with_name(f"{page.stem}_zh.md")


ASSETS = sorted(page for page in (ROOT / "assets").glob("*.md") if not page.stem.endswith("_zh"))
PAGES = [README, *ASSETS, ROOT / "tiny_model/README.md"]
name_of = lambda page: "-".join(page.relative_to(ROOT).with_suffix("").parts)  # noqa: E731
by_page = pytest.mark.parametrize("page", PAGES, ids=name_of)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
SCRIPT_KEYS = {name: key for key, name in SCRIPTS.items()}
KIND_OF_MODEL = {
    "zai-org/CogVideoX-2b": "2b",
    "zai-org/CogVideoX-5b": "5b",
    "zai-org/CogVideoX-5b-I2V": "5b-i2v",
    "zai-org/CogVideoX1.5-5B": "1.5-5b",
    "zai-org/CogVideoX1.5-5B-I2V": "1.5-5b-i2v",
}


def read(page):
    return page.read_text(encoding="utf-8")


def prose(page):
    """The page without its code blocks."""
    return FENCE.sub("", read(page))


def code_blocks(language):
    """pytest parameters, one a block of the English pages, named after its first line."""
    return [
        pytest.param(match[2], id=f"{name_of(page)}-line{read(page).count(chr(10), 0, match.start()) + 2}")
        for page in PAGES
        for match in FENCE.finditer(read(page))
        if match[1] == language
    ]


def page_named(name):
    """README.md, or a page of assets/ by its name."""
    return README if name == "README" else ROOT / f"assets/{name}.md"


def table(page_name, *heading):
    """The rows, heading first, of the one table of a page whose heading begins with these cells: no section is asked for."""
    found = map(table_rows, re.findall(r"(?:^\|.*\n)+", prose(page_named(page_name)), re.M))
    [rows] = [rows for rows in found if rows[0][: len(heading)] == list(heading)]
    return rows


def table_rows(text):
    """The cells of each row of the tables in `text`, headings included."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]


def flags_in(text):
    return re.findall(r"--[a-z][\w-]*", text)


# ---------------------------------------------------------------- commands


def commands_of(block):
    """(settings in front, words) of each command of a shell block; loops are unrolled by bash itself."""
    if re.search("^for ", block, re.M):
        block = unrolled(block)
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        num_settings = next((i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)), 0)
        if words:
            yield dict(word.split("=", 1) for word in words[:num_settings]), words[num_settings:]


def unrolled(block):
    """What the block would launch, one command a line."""
    stub = """accelerate() { printf '%q ' accelerate "$@"; echo; }\n"""
    env = {"PATH": os.defpath}
    return subprocess.run(["bash", "-euc", stub + block], env=env, capture_output=True, text=True, check=True).stdout


def check_command(settings, words, monkeypatch):
    """Give the words to the parser that they are meant for; a program that nothing here knows is an error."""
    program, *rest = words
    if program == "tiny_model/teach.sh":
        assert set(rest) < set(world.CONCEPTS)
        text = read(ROOT / program)
        assert all(re.search(rf"^ *{name}=", text, re.M) for name in settings)
    elif program.startswith("./"):
        check_wrapper(settings, words, monkeypatch)
    elif program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        assert rest[0] == "launch"
        launched = launch_command_parser().parse_args(rest[1:])
        assert (ROOT / launched.config_file).is_file()
        check_script(launched.training_script, launched.training_script_args, monkeypatch)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        launched = get_args_parser().parse_args(rest)
        check_script(launched.training_script, launched.training_script_args, monkeypatch)
    elif program == "python":
        check_script(rest[0], rest[1:], monkeypatch)
    elif program == "make":
        subprocess.run(["make", "-n", *rest], cwd=ROOT, check=True, capture_output=True)
        if rest[0] == "bench":
            [rows] = [word.removeprefix("ROWS=") for word in rest if word.startswith("ROWS=")]
            bench.parse_args(rows.split())
    elif program == "ffmpeg":
        check_ffmpeg(rest)
    else:
        assert program in ("hf", "pip", "source", "vllm")


def check_ffmpeg(argv):
    """Run it on a clip of 20 seconds: what it writes has frames."""
    quiet = [ffmpeg_path(), "-v", "error"]
    clip = argv[argv.index("-i") + 1]
    subprocess.run([*quiet, "-f", "lavfi", "-i", "testsrc=duration=20:rate=8:size=64x64", clip], check=True)
    subprocess.run([*quiet, *argv], check=True)
    with av.open(argv[-1]) as written:
        assert next(written.decode(video=0)).width == 64


def check_wrapper(settings, words, monkeypatch):
    """A dry run, whose every command is checked."""
    printed = printed_commands(dry_run(words, settings))
    assert printed
    for command in printed:
        check_command(*command, monkeypatch)


def check_script(script, argv, monkeypatch):
    name = (ROOT / script).resolve().relative_to(ROOT).as_posix()
    if name == "tests/test_lora_inference.py":
        Path(argv[argv.index("--lora_path") + 1]).mkdir()
        test_lora_inference.parse_args(argv)
    elif name == "benchmarks/step_time.py":
        measured, *flags = step_time.parse_args(argv).command
        check_script(measured, flags, monkeypatch)
    elif name == "assets/plot_loss.py":
        assert [word for word in argv if word.endswith("metrics.jsonl")]
    elif name in ("assets/make_flags.py", "benchmarks/tables.py", "benchmarks/draw_memory.py"):
        assert not argv
    elif name in ("benchmarks/vae.py", "benchmarks/prepare.py"):
        importlib.import_module(Path(name).stem).parse_args(argv)
    elif name.startswith("tiny_model/"):
        monkeypatch.chdir(ROOT)  # where the model's folder is looked for
        importlib.import_module(Path(name).stem).parse_args(argv)
    elif name.startswith("benchmarks/"):
        check_benchmark(name, argv, monkeypatch)
    elif argv == ["--help"]:
        with pytest.raises(SystemExit, match="^0$"):
            parse_flags(name, argv)
    else:
        parse_flags(name, argv)


def parse_flags(name, argv):
    if name == "training/prepare_dataset.py":
        return parse_prepare_args(argv)
    if name == "training/caption_dataset.py":
        return parse_caption_args(argv)
    assert name.startswith("training/")
    return parse_training_args(SCRIPT_KEYS[Path(name).name], argv)


def check_benchmark(name, argv, monkeypatch):
    """Up to the calls that would write gigabytes or train for minutes."""
    num_rows = len(memory_rows.SCRIPTS) * len(memory_rows.OPTIMIZERS)
    if "--original" in argv:
        tasks, gpus = [task for task in ("lora", "sft") if task in argv] or ["lora"], 2 if "--gpus" in argv else 1
        num_rows = sum(len(memory_rows.read_originals("2b", task, gpus)) for task in tasks)
    module, worker, num_calls = {
        "benchmarks/random_pipeline.py": (random_pipeline, "write_pipeline", 1),
        "benchmarks/random_dataset.py": (random_dataset, "write_dataset", 1),
        "benchmarks/memory_rows.py": (memory_rows, "measure", num_rows),
        "benchmarks/exactness.py": (exactness, "rows_of", 1),
    }[name]
    calls = []
    for flag, value in zip(argv, argv[1:], strict=False):
        if name == "benchmarks/memory_rows.py" and flag in ("--model", "--data"):
            Path(value).mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(memory_rows, "card_name", lambda: "cpu")
    monkeypatch.setattr(module, worker, lambda *args: calls.append(args) or [])
    monkeypatch.setattr("sys.argv", [name, *argv])
    module.main()
    assert len(calls) == num_calls


@pytest.mark.parametrize("block", code_blocks("bash"))
def test_shell_blocks_can_be_typed(block, monkeypatch, tmp_path):
    subprocess.run(["bash", "-n"], input=block, text=True, check=True)
    monkeypatch.chdir(tmp_path)
    commands = list(commands_of(block))
    assert commands
    for command in commands:
        check_command(*command, monkeypatch)


@pytest.mark.parametrize(
    "line",
    [
        "accelerate launch --config_file accelerate_configs/uncompiled_1.yaml training/cogvideox_text_to_video_lora.py "
        "--pretrained_model_name_or_path m --data_root d --learning_rat 1",
        "python training/prepare_dataset.py --data_root d",
        "DATA_ROOT= ./prepare_dataset.sh",
        "DATA_ROOT=d ./train_text_to_video_sft.sh --rank 4",
        "torchrun --nproc_per_node 2 training/prepare_dataset.py --data_root d",
        "python benchmarks/random_pipeline.py models/2b --kind 3b",
        "make no-such-target",
        "make bench ROWS=5b-fast",
        "unknown-program",
    ],
)
def test_wrong_commands_would_be_found(line, monkeypatch):
    with pytest.raises((SystemExit, AssertionError, subprocess.CalledProcessError)):
        check_command(*next(commands_of(line)), monkeypatch)


# ---------------------------------------------------------------- Python

# Sizes and steps of the examples, and what they become for a tiny pipeline
SIZES = {"49": "9", "33": "17", "480": "64", "720": "96", "50": "2", "25": "2"}


@pytest.fixture(scope="module")
def results(tiny, tmp_path_factory):
    """A folder of what the examples read: results of training and a first frame."""
    from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline
    from PIL import Image

    from cogvideox.loading import load_transformer
    from engine.lora import save_lora
    from test_lora import trained_transformer

    folder = tmp_path_factory.mktemp("results")
    save_lora(trained_transformer(tiny("2b")), folder / "cogvideox-lora", CogVideoXPipeline)
    facts = {"drop_learned_positions": True}
    trained = trained_transformer(tiny("5b-i2v"))
    save_lora(trained, folder / "cogvideox-i2v-lora", CogVideoXImageToVideoPipeline, facts)
    load_transformer(tiny("2b"), torch.float32).save_pretrained(folder / "cogvideox-sft/transformer")
    Image.linear_gradient("L").convert("RGB").save(folder / "first_frame.png")
    return folder


@pytest.fixture
def run_block(results, tiny, tmp_path, monkeypatch):
    """Run a block on tiny models in a copy of `results`; returns its variables."""
    from diffusers import DiffusionPipeline

    # Offloading needs an accelerator
    monkeypatch.setattr(DiffusionPipeline, "enable_model_cpu_offload", lambda pipe: None)
    monkeypatch.chdir(shutil.copytree(results, tmp_path / "results"))

    def run(block):
        code = re.sub(r'"([\w-]+/CogVideoX[\w.-]+)"', lambda match: repr(str(tiny(KIND_OF_MODEL[match[1]]))), block)
        sizes = r"\b(num_frames|height|width|num_inference_steps)=(\d+)"
        code = re.sub(sizes, lambda match: f"{match[1]}={SIZES[match[2]]}", code)
        code = code.replace('"assets/', f'"{ROOT}/assets/')
        Path("block.py").write_text(code.replace("torch.bfloat16", "torch.float32"))
        return runpy.run_path("block.py")

    return run


@pytest.mark.parametrize("block", code_blocks("python"))
def test_python_blocks_run(block, run_block, capsys):
    run_block(block)
    if "export_to_video" not in block:
        assert "drop_learned_positions" in capsys.readouterr().out
        return
    # Dropped positions are what other sizes work with
    size = (17, 64, 64) if "use_learned_positional_embeddings=False" in block else (9, 64, 96)
    if "tiny-cogvideox" in block:
        size = (9, 64, 64)
    with av.open("output.mp4") as video:
        stream = video.streams.video[0]
        assert (stream.frames, stream.height, stream.width) == size


def test_raw_first_frames_are_left_as_the_vae_gave_them(run_block):
    [block] = [param.values[0] for param in code_blocks("python") if "RawFirstFramePipeline" in param.values[0]]
    pipe = run_block(block)["pipe"]
    assert_first_frames_are_raw(pipe)


# ---------------------------------------------------------------- what is named


def flags_of_other_scripts():
    """Options of the scripts whose parsers nothing else here imports."""
    scripts = [
        *ROOT.glob("benchmarks/*.py"),
        *ROOT.glob("tiny_model/*.py"),
        ROOT / "tests/test_lora_inference.py",
        ROOT / "tests/tiny_pipeline.py",
    ]
    pattern = r'add_argument\(\s*"(--[\w-]+)"'
    return {flag for script in scripts for flag in re.findall(pattern, script.read_text(encoding="utf-8"))}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_flags_named_in_the_text_exist(page):
    from accelerate.commands.launch import launch_command_parser

    own = [make_prepare_parser(), make_caption_parser(), *map(make_training_parser, SCRIPTS)]
    parsers = [launch_command_parser(), *own]
    known = {flag for parser in parsers for flag in parser._option_string_actions} | flags_of_other_scripts()
    named = {flag for code in re.findall(r"`([^`]+)`", prose(page)) for flag in flags_in(code)}
    assert named
    assert not named - known


def test_the_page_of_flags_is_in_step():
    make_flags = runpy.run_path(ROOT / "assets/make_flags.py")
    assert read(FLAGS_PAGE) == make_flags["flags_page"](), "run python assets/make_flags.py"
    assert read(twin(FLAGS_PAGE)) == make_flags["in_chinese"](read(FLAGS_PAGE)), "run python assets/make_flags.py"
    for flag in FIRST["t2v_lora"] + FIRST["t2v_sft"]:
        row = re.search(rf"^\| `--{flag}` \|.*\| (.*) \|$", read(twin(FLAGS_PAGE)), re.M)
        assert re.search("[\u4e00-\u9fff]", row[1]), f"--{flag}: reworded; put it into assets/translate_flags.py"
    listed = set(re.findall(r"^\| `(--\w+)`", read(FLAGS_PAGE), re.M))
    parsers = [make_prepare_parser(), make_caption_parser(), *map(make_training_parser, SCRIPTS)]
    assert listed == {flag for parser in parsers for flag in parser._option_string_actions} - {"--help", "-h"}


def test_the_sweep_is_the_originals_flag_for_flag():
    [block] = [param.values[0] for param in code_blocks("bash") if "for learning_rate in" in param.values[0]]
    commands = [words for _, words in commands_of(block)]
    assert len(commands) == 4
    for words in commands:
        script = words.index("training/cogvideox_text_to_video_lora.py")
        assert [word for word in words[script:] if word.startswith("--")] == list(ORIGINAL_SWEEP)
        given = {flag: words[words.index(flag) + 1] for flag, value in ORIGINAL_SWEEP.items() if value is not None}
        assert given == {flag: value or given[flag] for flag, value in ORIGINAL_SWEEP.items() if value is not None}


def model_of(settings, words):
    """The model of a command that prepares or trains: by its flag or setting, else the wrapper's own."""
    for flag in ("--pretrained_model_name_or_path", "--model_id"):
        if flag in words:
            return words[words.index(flag) + 1]
    return settings.get("MODEL") or re.search(r'MODEL="\$\{MODEL:-(.*)\}"', read(ROOT / words[0]))[1]


def commands_on_data(text_of_commands):
    """(does it prepare, prepared folder, model) of each command that prepares data or trains on it."""
    for settings, words in text_of_commands:
        values = {**settings, **{flag: value for flag, value in values_of(words).items() if value}}
        source = values.get("DATA_ROOT") or values.get("--data_root")
        if source and any("prepare_dataset" in word for word in words):
            written = values.get("OUTPUT_ROOT") or values.get("--output_dir") or f"{source}-prepared"
            yield True, written, model_of(settings, words)
        elif source and ("--load_tensors" in words or words[0].startswith("./train_")):
            yield False, source, model_of(settings, words)


def test_examples_train_on_data_that_their_own_model_prepared():
    """On the pages, and in each wrapper's header by itself."""
    blocks = [param.values[0] for param in code_blocks("bash")]
    headers = ["".join(re.findall(r"^#   (.*\n)", read(path), re.M)) for path in sorted(ROOT.glob("train_*.sh"))]
    for text in ("".join(block for block in blocks if "for learning_rate" not in block), *headers):
        uses = list(commands_on_data(commands_of(text)))
        prepared = {(folder, model) for prepares, folder, model in uses if prepares}
        trained = {(folder, model) for prepares, folder, model in uses if not prepares}
        assert trained and prepared
        assert trained - prepared <= {("data/random", "models/2b")}  # which benchmarks/random_dataset.py writes


def test_exit_codes_are_those_of_the_scripts():
    shown = [cells[0] for cells in table("running", "Exit code")[1:]]
    assert shown == re.findall(r"\d+", EPILOG)


def values_of(words):
    """{flag: its value, None without one} of a command."""
    following = dict(zip(words, [*words[1:], "--"], strict=True))
    return {word: None if next_.startswith("--") else next_ for word, next_ in following.items() if word[:2] == "--"}


def test_every_flag_that_the_wrapper_gives_otherwise_than_the_original_is_listed(tmp_path):
    settings = {"DATA_ROOT": str(tmp_path), "VALIDATION_PROMPT": "p", "LOAD_TENSORS": "false", "DRY_RUN": "1"}
    env = {"PATH": os.defpath, **settings}
    dry = subprocess.run([ROOT / LORA], env=env, capture_output=True, text=True, check=True)
    [(_, words)] = commands_of(dry.stdout)
    ours = values_of(words[words.index(str(ROOT / "training/cogvideox_text_to_video_lora.py")) :])
    listed = {flag: cells for cells in table("from_the_original", "Setting")[1:] for flag in flags_in(cells[0])}
    swept = {"--learning_rate", "--optimizer"}  # several values there
    for flag in sorted(ours.keys() | ORIGINAL_SWEEP.keys()):
        theirs = ORIGINAL_SWEEP.get(flag, "none")
        if flag in swept or theirs not in (ours.get(flag, "empty"), ""):
            _, original, here = listed[flag]
            assert theirs is None or theirs in original
            assert (ours.get(flag) or "") in here


def files_in(text):
    folders = "accelerate_configs|assets|benchmarks|tests|tiny_model|training"
    return set(re.findall(rf"(?<![\w/.-])(?:(?:{folders})/[\w./-]*\w|\w+\.sh)", text))


@by_page
def test_files_named_in_the_text_exist(page):
    folders = [ROOT, ROOT / "training", ROOT / "tiny_model"]
    assert not [name for name in files_in(read(page)) if not any((folder / name).exists() for folder in folders)]
    assert files_in("`benchmarks/no.csv` and no_such.sh") == {"benchmarks/no.csv", "no_such.sh"}


def test_the_layout_names_every_module():
    """Below each room its promise and its modules; the tree fits a screen."""
    layout = read(ROOT / "assets/contribute.md").split("\n## Layout\n")[1].split("\n## ")[0]
    tree = layout.split("```text\n")[1].split("```")[0]
    assert tree.count("\n") <= 50 and max(map(len, tree.splitlines())) <= 110
    scripts, *parts = re.split(r"^  (\w+)/ ", tree, flags=re.M)
    beside = {path.name for path in (ROOT / "training").iterdir() if path.suffix in (".py", ".sh")}
    patterns = re.findall(r"[\w*]+\.(?:py|sh)", scripts)
    assert {name for name in beside if any(fnmatch(name, pattern) for pattern in patterns)} == beside
    rooms = {path.parent: path.read_text(encoding="utf-8") for path in (ROOT / "training").glob("*/__init__.py")}
    described = dict(zip(parts[::2], parts[1::2], strict=True))
    assert described.keys() == {room.name for room in rooms}
    for room, promise in rooms.items():
        text = " ".join(described[room.name].split())
        assert text.startswith(promise.strip().strip('"'))
        named = re.findall(r"(\w+\.py)(?:,|  )", described[room.name])
        assert sorted(named) == sorted(path.name for path in room.glob("*.py") if path.stem != "__init__")


def test_the_wrapper_table_matches_the_wrappers():
    rows = table("training", "Wrapper")[1:]
    assert len(rows) == len(SCRIPTS)
    for wrapper, script, model in rows:
        text = read(ROOT / wrapper.strip("`"))
        assert f'"$here/{script.strip("`")}"' in text
        assert f'MODEL="${{MODEL:-{model}}}"' in text


def test_the_table_of_configs_names_each():
    rows = [cells[0].strip("`") for cells in table("training", "`accelerate_configs/`")[1:]]
    assert sorted(rows) == [config.name for config in CONFIGS]


def optimizer_rows():
    header, *rows = table("training", "Optimizer")
    return [dict(zip(header, cells, strict=True)) for cells in rows]


@pytest.mark.parametrize("row", optimizer_rows(), ids=lambda row: row["Flags"].strip("`"))
def test_the_table_of_optimizers_says_what_the_flags_accept(row):
    flags = [] if row["Flags"].endswith(".yaml`") else row["Flags"].strip("`").split()
    needed = ["--pretrained_model_name_or_path", "m", "--data_root", "d"]
    for script in ("t2v_lora", "t2v_sft"):
        parse_training_args(script, needed + flags)
    if row["`--use_cpu_offload_optimizer`"] in ("yes", "full fine-tuning"):
        parse_training_args("t2v_sft", [*needed, *flags, "--use_cpu_offload_optimizer"])
    elif any("bit" in flag or "fp8" in flag for flag in flags):
        with pytest.raises(SystemExit):
            parse_training_args("t2v_sft", [*needed, *flags, "--use_cpu_offload_optimizer"])


def test_the_measured_optimizers_are_those_of_the_csv():
    with open(ROOT / "benchmarks/optimizers.csv", newline="") as file:
        measured = {row["label"]: row for row in csv.DictReader(file)}
    names = {
        "AdamW": "adamw",
        "`accelerate_configs/deepspeed.yaml`": "deepspeed",
        "`--use_8bit`": "adamw-8bit",
        "`--use_cpu_offload_optimizer`": "offload",
        "`--use_cpu_offload_optimizer --offload_gradients`": "offload-gradients",
    }
    shown = {}
    for task, optimizer, *figures in table("measurements", "Task", "Optimizer")[1:]:
        shown[f"2b {task.lower()} {names[optimizer]}"] = re.findall(r"[\d.]+", " ".join(figures))
    assert shown == {label: figures_of(row) for label, row in measured.items() if label.startswith("2b ")}


@pytest.mark.parametrize("page", ["measurements", "measurements_zh"])
def test_the_table_of_preparing_is_that_of_the_csv(page):
    with open(ROOT / "benchmarks/prepare.csv", newline="") as file:
        measured = {row["label"]: row for row in csv.DictReader(file)}
    shown = re.findall(
        r"^\| `([\w+.-]+)` \| ([\d.]+) \| ([\d.]+), ([\d.]+) \| ([\d.]+) GiB \| ([\d.]+) GiB",
        read(ROOT / f"assets/{page}.md"),
        re.M,
    )
    assert {label for label, *_ in shown} == measured.keys()
    for label, *figures in shown:
        row = measured[label]
        names = {"seconds_a_clip": 2, "caption_s": 3, "clip_s": 3, "reserved_gib": 1, "host_gib": 1}
        assert figures == [f"{float(row[name]):.{digits}f}" for name, digits in names.items()]


def figures_of(row):
    """Of a row of benchmarks/optimizers.csv, as the page shows them."""
    peak = max(float(value) for name, value in row.items() if name.endswith("peak_reserved_gib"))
    memory = [float(row["before_training_reserved_gib"]), peak, float(row["host_peak_gib"])]
    losses = [float(row["loss_before"]), float(row["loss_after"])]
    return [f"{float(row['median_s']):.2f}", *(f"{gib:.1f}" for gib in memory), *(f"{loss:.4f}" for loss in losses)]


@pytest.mark.parametrize("name", tables.VERSIONS)
def test_the_tables_of_measurements_are_those_of_the_csv_files(name):
    text = read(ROOT / "assets" / name)
    rows = bench.rows_in(ROOT / "benchmarks/speed.csv")
    written = tables.filled(text, name, rows, tables.read_originals())
    written = tables.between_markers(written, name, "original", tables.original_table_of_files(name))
    assert text == written, "run python benchmarks/tables.py"


def last_rows(name, card=""):
    """Rows of a CSV of benchmarks/ by label, the later of two; those of one card if it is named."""
    return {row["label"]: row for row in bench.rows_in(ROOT / f"benchmarks/{name}.csv") if card in row["card"]}


@pytest.mark.parametrize("page", [README, twin(README)], ids=lambda page: page.stem)
def test_the_readme_is_short_and_begins_with_a_run_on_own_clips(page):
    assert len(page.read_bytes()) <= MOST_BYTES_OF_README
    [_, commands, *_] = FENCE.finditer(read(page))
    assert read(page).count("\n", 0, commands.end()) < FIRST_SCREEN
    run = ["make install", "prepare_dataset.sh", "train_text_to_video_lora.sh", "tests/test_lora_inference.py"]
    assert [step for line in commands[2].splitlines() for step in run if step in line] == run


def test_every_page_is_reached_from_the_readme():
    for readme, pages in ((README, ASSETS), (twin(README), map(twin, ASSETS))):
        links = set(re.findall(r"\]\((assets/[\w.]+)", read(readme)))
        assert {page.relative_to(ROOT).as_posix() for page in pages} <= links


def figures_in(text):
    """(GiB of the GPU, GiB of host memory or None, seconds per step or None) of a cell of the README's table."""
    gpu, host, seconds = (
        re.search(pattern, text) for pattern in (r"^([\d.]+) GiB", r"(\d+) GiB of", r"([\d.]+) s/step")
    )
    return gpu[1], host and host[1], seconds and seconds[1]


def test_the_memory_in_the_readme_is_that_of_the_csv_files():
    labels = [
        ("H100", "2b-balanced@fa4", "5b-balanced@fa4"),
        ("H100", "2b-stream@fa4", "5b-stream@fa4"),
        ("H200", "2b-stream+cap4+validated+xxl@cudnn", "5b-stream+cap5.5+validated+xxl@cudnn"),
        ("H200", "2b-balanced+sft@fa4", "5b-balanced+sft@fa4"),
        ("H200", "2b-offload+sft@fa4", "5b-offload+sft@fa4"),
    ]
    assert "on one H100 80GB; the last three rows on an H200" in read(README).replace("\n", " ")
    shown = table("README", "49 frames of 480x720, batch 1")[1:]
    for (card, *pair), cells in zip(labels, shown, strict=True):
        rows = last_rows("speed", card)
        for row, cell in zip((rows[label] for label in pair), cells[1:], strict=True):
            gpu, host, seconds = figures_in(cell)
            assert abs(float(gpu) - float(row["memory_cap_gib"] or row["reserved_gib"])) < 0.051
            assert not host or abs(float(host) - float(row["host_gib"])) < 0.51
            assert not seconds or abs(float(seconds) - float(row["median_s"])) < 0.0051


GLANCE = "49 frames of 480x720, batch 1, bf16"


def test_what_is_enough_says_which_t5_it_was_measured_with():
    """T5-XXL wherever a row has it; the host's memory is that row's."""
    rows = {label.partition("@")[0]: row for label, row in last_rows("speed").items()}
    said = [" ".join(cells) for cells in table("measurements", GLANCE) if "are enough" in cells[1]]
    assert len(said) == 3
    for text in said:
        model, cap, host = re.search(r"CogVideoX-?(\S+?),? .*?([\d.]+) GiB are enough, (\d+) GiB", text).groups()
        label = f"{model.lower()}-stream+cap{cap}+validated"
        has_xxl = f"{label}+xxl" in rows
        assert ("(with T5-XXL)" if has_xxl else "(with a tiny T5)") in text
        assert f"{float(rows[label + '+xxl' * has_xxl]['host_gib']):.0f}" == host


@pytest.mark.parametrize("level", ["balanced", "offload"])
@pytest.mark.parametrize("model", ["2b", "5b"])
def test_what_full_fine_tuning_takes_is_that_of_the_csv(model, level):
    row = last_rows("speed")[f"{model}-{level}+sft@fa4"]
    label = f"SFT of CogVideoX-{model}, `--memory {level}`"
    [glance] = [cells[1] for cells in table("measurements", GLANCE) if cells[0] == label]
    heading, *levels = table("training", "Flags", "On the GPU")
    [cells] = [cells for cells in levels if cells[0] == f"`--memory {level}`"]
    cell = cells[heading.index(f"CogVideoX-{model}")]
    gpu, host = f"{float(row['reserved_gib']):.1f} GiB", float(row["host_gib"])
    assert glance.startswith(f"{gpu} reserved") and f"{float(row['median_s']):.2f} s/step" in glance
    assert f"{host:.0f} GiB of host memory" in glance or level == "balanced"
    assert cell in (f"{gpu}, host {host:.0f} GiB", f"{gpu}, host {host:.1f} GiB")


LORA, SFT = "train_text_to_video_lora.sh", "train_text_to_video_sft.sh"


@pytest.mark.parametrize(
    ("wrapper", "card", "label", "reserved", "host", "step"),
    [
        (LORA, "H100", "5b-stream@fa4", "4.4 GiB", None, "1.96 s"),
        (LORA, "H100", "2b-stream@fa4", "2.8 GiB", None, "0.85 s"),
        (LORA, "H100", "5b-balanced@fa4", "22.1", None, None),
        (LORA, "H100", "2b-balanced@fa4", "9.0 GiB", None, None),
        (LORA, "H200", "5b-stream+cap5.5+validated+xxl@cudnn", "4.9", None, None),
        (LORA, "H200", "2b-stream+cap5.5+validated+xxl@cudnn", "4.1 GiB", None, None),
        ("train_image_to_video_lora.sh", "H100", "5b-stream@fa4", "4.4 GiB", None, None),
        ("train_image_to_video_lora.sh", "H100", "5b-balanced@fa4", "22.1 GiB", None, None),
        (SFT, "H200", "2b-balanced+sft@fa4", "25.8 GiB", None, None),
        (SFT, "H200", "5b-balanced+sft@fa4", "76.5 GiB", None, None),
        (SFT, "H200", "2b-offload+sft@fa4", "6.2 GiB", "25 GiB", "1.02 s"),
        (SFT, "H200", "5b-offload+sft@fa4", "15.0 GiB", "73 GiB", "3.13 s"),
        ("train_image_to_video_sft.sh", "H200", "5b-balanced+sft@fa4", "76.5 GiB", None, None),
        ("train_image_to_video_sft.sh", "H200", "5b-offload+sft@fa4", "15.0 GiB", "73 GiB", None),
    ],
)
def test_the_wrappers_headers_show_what_was_measured_and_at_what(wrapper, card, label, reserved, host, step):
    lines = (line.removeprefix("#").strip() for line in read(ROOT / wrapper).splitlines() if line.startswith("#"))
    header, row = " ".join(lines), last_rows("speed", card)[label]
    assert not step or card in header
    shown = {"reserved_gib": reserved, "host_gib": host, "median_s": step}
    for column, figure in shown.items():
        if figure:
            assert figure in header
            number = figure.split()[0]
            assert f"{float(row[column]):.{len(number.partition('.')[2])}f}" == number
    assert "49x480x720" in header and "batch 1" in header


def test_the_changes_of_losses_and_gradients_are_those_of_the_csv():
    with open(ROOT / "benchmarks/exactness.csv", newline="") as file:
        measured = {row["row"]: row for row in csv.DictReader(file) if row["row"] != "reference"}
    shown = {cells[0].strip("`"): cells[1:] for cells in table("measurements", "row")[1:]}
    assert shown == {
        label: [f"{100 * float(row['largest_step_change']):.4f} %", f"{float(row['cosine_min']):.5f}"]
        for label, row in measured.items()
    }


@pytest.mark.parametrize("row", bench.rows_in(ROOT / "benchmarks/lora_memory.csv"), ids=lambda row: row["label"])
def test_every_lora_needs_less_memory_than_the_originals(row):
    [pair] = memory_rows.side_by_side(row["label"].split()[0], [row])
    for stage in memory_rows.STAGES:
        assert float(row[f"{stage}_peak_reserved_gib"]) < float(pair[0][f"memory_{stage}"]), stage


def test_every_recipe_has_its_source():
    header, *rows = table("recipes", "Goal")
    assert header[-1] == "Source"
    assert len(rows) > 5
    assert all("](https://" in cells[-1] for cells in rows)


def test_every_checkpoint_has_its_licence_and_its_tests():
    licensed = [cells[0] for cells in table("inference", "Checkpoint")]
    assert licensed == ["Checkpoint", *KIND_OF_MODEL]
    compared = [cells[0] for cells in table("measurements", "Checkpoint")]
    assert compared == ["Checkpoint", *(model.removeprefix("zai-org/") for model in KIND_OF_MODEL)]


# ---------------------------------------------------------------- links and translations


def anchors(page):
    headings = re.findall(r"^#+ (.*)", prose(page), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *map(twin, PAGES)], ids=name_of)
def test_links_within_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https://)([^)]+)\)", prose(page)):
        name, _, anchor = target.partition("#")
        other = (page.parent / name).resolve() if name else page
        assert other.is_file(), target
        assert not anchor or anchor in anchors(other), target


@by_page
def test_both_languages_are_linked_at_the_top(page):
    assert f"[中文]({twin(page).name})" in read(page).split("\n## ")[0]
    assert f"[English]({page.name})" in read(twin(page)).split("\n## ")[0]


@by_page
def test_both_languages_have_the_same_code_blocks(page):
    assert FENCE.findall(read(page)) == FENCE.findall(read(twin(page)))


def outline(page):
    """Levels of the headings and, below each, the number of cells in every row of tables and of list items."""
    lines = []
    for line in prose(page).splitlines():
        if mark := re.match(r"(#+) |([-*]|\d+\.) ", line):
            lines.append(mark[1] or mark[2])
        elif line.startswith("|"):
            lines.append(len(re.findall(r"(?<!\\)\|", line)))
    return lines


@by_page
def test_both_languages_have_the_same_headings_tables_and_lists(page):
    assert outline(page) == outline(twin(page))


@by_page
@pytest.mark.parametrize("pattern", [r"`[^`]+`", r"https?://[^)\s]+"], ids=["code", "links"])
def test_both_languages_name_the_same_code_and_links(page, pattern):
    def found(text):
        return {re.sub(r"\s+", " ", item) for item in re.findall(pattern, text)}

    assert found(prose(page)) == found(prose(twin(page)))


@by_page
def test_the_same_figures_and_verdicts_stand_in_both_languages(page):
    """Numbers of the tables, row by row, and cells that begin with yes or no."""
    verdicts = {"是": "yes", "否": "no"}

    def facts(page):
        rows = [line for line in prose(page).splitlines() if line.startswith("|")]
        found = [re.findall(r"\d(?:[\d.x]*[\dx])?|(?<=\| )(?:yes|no|是|否)(?=[ ;；])", row) for row in rows]
        return [[verdicts.get(fact, fact) for fact in row] for row in found]

    assert facts(page) == facts(twin(page))
