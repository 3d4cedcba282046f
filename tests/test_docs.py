"""What README.md says can be typed: its commands parse, its Python runs, and the flags and files it names exist."""

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

import random_dataset
import random_pipeline
import step_time
import test_lora_inference
from args import (
    AVAILABLE,
    EPILOG,
    LATER,
    SCRIPTS,
    make_prepare_parser,
    make_training_parser,
    parse_prepare_args,
    parse_training_args,
)


ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
SCRIPT_KEYS = {name: key for key, name in SCRIPTS.items()}
KIND_OF_MODEL = {
    "zai-org/CogVideoX-2b": "2b",
    "zai-org/CogVideoX-5b": "5b",
    "zai-org/CogVideoX-5b-I2V": "5b-i2v",
    "zai-org/CogVideoX1.5-5B": "1.5-5b",
    "zai-org/CogVideoX1.5-5B-I2V": "1.5-5b-i2v",
}


def code_blocks(language):
    """pytest parameters, one a block of README.md, named after its first line."""
    text = README.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)
    return [pytest.param(match[1], id=f"line{text.count(chr(10), 0, match.start()) + 2}") for match in found]


def section(heading):
    """The text below `## heading`, up to the next one."""
    return README.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]


def table_rows(text):
    """The cells of each row of the tables in `text`, headings included."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]


def flags_in(text):
    return re.findall(r"--[a-z][\w-]*", text)


# ---------------------------------------------------------------- commands


def commands_of(block):
    """(settings in front, words) of each command of a shell block."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        num_settings = next((i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)), 0)
        if words:
            yield dict(word.split("=", 1) for word in words[:num_settings]), words[num_settings:]


def check_command(settings, words, monkeypatch):
    """Give the words to the parser that they are meant for; a program that nothing here knows is an error."""
    program, *rest = words
    if program.startswith("./"):
        check_wrapper(settings, words, monkeypatch)
    elif program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        assert rest[0] == "launch"
        launched = launch_command_parser().parse_args(rest[1:])
        assert (ROOT / launched.config_file).is_file()
        check_script(launched.training_script, launched.training_script_args, monkeypatch)
    elif program == "python":
        check_script(rest[0], rest[1:], monkeypatch)
    elif program == "make":
        subprocess.run(["make", "-n", *rest], cwd=ROOT, check=True, capture_output=True)
    else:
        assert program in ("hf", "source")


def check_wrapper(settings, words, monkeypatch):
    """A dry run, whose every line is checked as a command."""
    env = {"PATH": os.defpath, **settings, "DRY_RUN": "1"}
    result = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    printed = list(commands_of(result.stdout))
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
    elif name.startswith("benchmarks/"):
        check_random_writer(name, argv, monkeypatch)
    elif argv == ["--help"]:
        with pytest.raises(SystemExit, match="^0$"):
            parse_flags(name, argv)
    else:
        parse_flags(name, argv)


def parse_flags(name, argv):
    if name == "training/prepare_dataset.py":
        return parse_prepare_args(argv)
    assert name.startswith("training/")
    return parse_training_args(SCRIPT_KEYS[Path(name).name], argv)


def check_random_writer(name, argv, monkeypatch):
    """Up to the call that would write gigabytes."""
    module, writer = {
        "benchmarks/random_pipeline.py": (random_pipeline, "write_pipeline"),
        "benchmarks/random_dataset.py": (random_dataset, "write_dataset"),
    }[name]
    calls = []
    monkeypatch.setattr(module, writer, lambda *args: calls.append(args))
    monkeypatch.setattr("sys.argv", [name, *argv])
    module.main()
    assert len(calls) == 1


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
        "DATA_ROOT=d ./train_text_to_video_sft.sh --use_8bit",
        "python benchmarks/random_pipeline.py models/2b --kind 3b",
        "make no-such-target",
        "unknown-program",
    ],
)
def test_wrong_commands_would_be_found(line, monkeypatch):
    with pytest.raises((SystemExit, AssertionError, subprocess.CalledProcessError)):
        check_command(*next(commands_of(line)), monkeypatch)


# ---------------------------------------------------------------- Python

# Sizes and steps of the examples, and what they become for a tiny pipeline
SIZES = {"49": "9", "33": "17", "480": "64", "720": "96", "50": "2"}


@pytest.fixture(scope="module")
def results(tiny, tmp_path_factory):
    """A folder of what the examples read: results of training and a first frame."""
    from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline
    from PIL import Image

    from cogvideox import load_transformer
    from lora import save_lora
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
    with av.open("output.mp4") as video:
        stream = video.streams.video[0]
        assert (stream.frames, stream.height, stream.width) == size


def test_raw_first_frames_are_left_as_the_vae_gave_them(run_block):
    from diffusers import CogVideoXImageToVideoPipeline

    [block] = [param.values[0] for param in code_blocks("python") if "RawFirstFramePipeline" in param.values[0]]
    pipe = run_block(block)["pipe"]

    def image_latents(pipeline_class):
        image = torch.linspace(-1, 1, 3 * 64 * 96).view(1, 3, 64, 96)
        inputs = (image, 1, 16, 9, 64, 96, torch.float32, torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        return pipeline_class.prepare_latents(pipe, *inputs, generator=generator)[1]

    stock = image_latents(CogVideoXImageToVideoPipeline)
    assert stock.abs().max() > 0.1
    torch.testing.assert_close(image_latents(type(pipe)) * pipe.vae.config.scaling_factor, stock)


# ---------------------------------------------------------------- what is named


def flags_of_other_scripts():
    """Options of the scripts whose parsers nothing else here imports."""
    scripts = [*ROOT.glob("benchmarks/*.py"), ROOT / "tests/test_lora_inference.py", ROOT / "tests/tiny_pipeline.py"]
    pattern = r'add_argument\(\s*"(--[\w-]+)"'
    return {flag for script in scripts for flag in re.findall(pattern, script.read_text(encoding="utf-8"))}


def test_flags_named_in_the_text_exist():
    parsers = [make_prepare_parser(), *map(make_training_parser, SCRIPTS)]
    known = {flag for parser in parsers for flag in parser._option_string_actions} | flags_of_other_scripts()
    text = re.sub(r"^```.*?^```$", "", README.read_text(encoding="utf-8"), flags=re.M | re.S)
    named = {flag for code in re.findall(r"`([^`]+)`", text) for flag in flags_in(code)}
    assert len(named) > 90
    assert not named - known


@pytest.mark.parametrize(
    ("heading", "parser"), [("Training", make_training_parser("t2v_lora")), ("Preparation", make_prepare_parser())]
)
def test_the_flag_tables_are_complete(heading, parser):
    table = section("Flags").split(f"| {heading} | |\n")[1].split("\n\n")[0]
    shown = {cells[0]: flags_in(cells[1]) for cells in table_rows(table)}
    not_yet = {f"--{dest}" for dest in LATER if dest not in AVAILABLE} if heading == "Training" else set()
    groups = {}
    for group in parser._action_groups:
        flags = [flag for action in group._group_actions for flag in action.option_strings if flag.startswith("--")]
        groups[group.title] = [flag for flag in flags if flag not in not_yet | {"--help"}]
    assert shown == {title: flags for title, flags in groups.items() if flags}


def test_the_table_of_refused_flags_is_complete():
    table = section("Flags").split("| Not available yet | |\n")[1].split("\n\n")[0]
    shown = [flag for _, flags in table_rows(table) for flag in flags_in(flags)]
    assert sorted(shown) == sorted(f"--{dest}" for dest in LATER if dest not in AVAILABLE)


def test_exit_codes_are_those_of_the_scripts():
    shown = [cells[0] for cells in table_rows(section("Output, resume, exit codes")) if cells[0].isdigit()]
    assert shown == re.findall(r"\d+", EPILOG)


def test_files_named_in_the_text_exist():
    text = README.read_text(encoding="utf-8")
    folders = "accelerate_configs|assets|benchmarks|tests|training"
    layout = section("Development").split("```text")[1]
    pattern = rf"(?<![\w/.-])(?:(?:{folders})/[\w./-]*\w|\w+\.sh)"
    named = set(re.findall(pattern, text.replace(layout, "")))
    assert len(named) > 15
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_layout_names_every_module():
    layout = section("Development").split("```text\ntraining/\n")[1].split("```")[0]
    patterns = [name for line in layout.splitlines() for name in re.findall(r"[\w*]+\.(?:py|sh)", line)]
    modules = {path.name for path in (ROOT / "training").iterdir() if path.suffix in (".py", ".sh")}
    assert {name for name in modules if any(fnmatch(name, pattern) for pattern in patterns)} == modules
    assert all(any(fnmatch(name, pattern) for name in modules) for pattern in patterns)


def test_the_wrapper_table_matches_the_wrappers():
    rows = [cells for cells in table_rows(section("Train")) if cells[0].startswith("`train_")]
    assert len(rows) == len(SCRIPTS)
    for wrapper, script, model in rows:
        text = (ROOT / wrapper.strip("`")).read_text(encoding="utf-8")
        assert f'"$here/{script.strip("`")}"' in text
        assert f'MODEL="${{MODEL:-{model}}}"' in text


def test_every_checkpoint_has_its_licence_and_its_tests():
    licensed = [cells[0] for cells in table_rows(section("Licences"))]
    assert licensed == ["Checkpoint", *KIND_OF_MODEL]
    compared = [cells[0] for cells in table_rows(section("What trains is what diffusers infers"))]
    assert compared == ["Checkpoint", *(model.removeprefix("zai-org/") for model in KIND_OF_MODEL)]


def test_links_within_the_page_lead_somewhere():
    text = README.read_text(encoding="utf-8")
    headings = {re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-") for name in re.findall(r"^#+ (.*)", text, re.M)}
    assert set(re.findall(r"\]\(#([\w-]+)\)", text)) <= headings
