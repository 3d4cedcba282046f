"""The model card says what was trained and how to use it; an upload sends what it should, where it should."""

import importlib
import json
import logging
import math
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import av
import pytest
import torch
from huggingface_hub import ModelCard, get_session
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from PIL import Image
from safetensors.torch import load_file

from args import parse_prepare_args, parse_training_args
from base.errors import UsageError
from cogvideox import loading
from cogvideox.config import read_config
from cogvideox.folder import resolve_model_dir
from cogvideox.models import Model
from data import dataset
from run import curves, hub, model_card
from run import result as result_module
from run.exits import run_script
from test_shell import TRAININGS, output_dir_of
from tiny_pipeline import KINDS


ROOT = Path(__file__).resolve().parent.parent
MODULES = {
    "t2v_lora": "cogvideox_text_to_video_lora",
    "t2v_sft": "cogvideox_text_to_video_sft",
    "i2v_lora": "cogvideox_image_to_video_lora",
    "i2v_sft": "cogvideox_image_to_video_sft",
}
FLAGS = ["--train_batch_size", "1", "--optimizer", "adamw", "--learning_rate", "1e-2", "--lr_warmup_steps", "0"]
FLAGS += ["--max_train_steps", "2", "--checkpointing_steps", "9"]
LORA_FLAGS = ["--rank", "4", "--lora_alpha", "2"]


@pytest.fixture(scope="session")
def prepared(once, tiny, sample_data):
    """(kind, width) -> a prepared folder of the sample clips, 9 frames of height 64; read-only."""
    import prepare_dataset

    def build(out, kind, width):
        flags = ["--model_id", str(tiny(kind)), "--data_root", str(sample_data), "--output_dir", str(out)]
        flags += ["--caption_column", "prompts.txt", "--video_column", "videos.txt", "--save_latents_and_embeddings"]
        flags += ["--height_buckets", "64", "--width_buckets", str(width), "--frame_buckets", "9"]
        if kind.endswith("i2v"):
            flags += ["--save_image_latents", "--num_image_variants", "1"]
        prepare_dataset.main(parse_prepare_args(flags))

    return lambda kind, width=96: once(f"hub-{kind}-{width}", lambda out: build(out, kind, width))


@pytest.fixture
def command(tiny, prepared, tmp_path):
    """(script, flags) -> argv of two updates on the tiny pipeline of `kind`."""

    def make(script, *flags, kind=None, name="my-run", width=96):
        kind = kind or ("5b-i2v" if script.startswith("i2v") else "2b")
        argv = ["--pretrained_model_name_or_path", str(tiny(kind)), "--data_root", str(prepared(kind, width))]
        argv += ["--load_tensors", "--output_dir", str(tmp_path / name), "--seed", "1", *FLAGS]
        return [*argv, *(LORA_FLAGS if script.endswith("lora") else []), *flags]

    return make


@pytest.fixture
def train(command, tmp_path):
    """Run a script in this process; returns its output folder."""

    def run(script, *flags, name="my-run", **where):
        module = importlib.import_module(MODULES[script])
        module.main(parse_training_args(script, command(script, *flags, name=name, **where)))
        return tmp_path / name

    return run


@pytest.fixture
def stops(train, tmp_path, capsys):
    """Run a script that is expected to end with an exit code; returns its last line on stderr."""

    def run(code, script, *flags):
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            run_script(lambda: train(script, *flags), tmp_path / "my-run")
        assert left.value.code == code
        return capsys.readouterr().err.splitlines()[-1]

    return run


def status(folder):
    return json.loads((folder / "status.json").read_text())


def card_of(folder):
    return ModelCard.load(folder / "README.md")


# ---------------------------------------------------------------- the card


def snippet(folder):
    [code] = re.findall(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(), re.M | re.S)
    return code


@pytest.fixture
def run_snippet(tiny, tmp_path, monkeypatch):
    """Run the Python of a card, beside the output folder that it names; returns its variables."""
    from diffusers import DiffusionPipeline
    from PIL import Image

    def run(folder, kind):
        monkeypatch.setattr(DiffusionPipeline, "enable_model_cpu_offload", lambda pipe: None)  # needs a GPU
        monkeypatch.chdir(folder.parent)
        Image.linear_gradient("L").convert("RGB").save("first_frame.png")
        code = snippet(folder).replace('"path/to/base_model"', repr(str(tiny(kind))))
        code = re.sub(r'base_model = "zai-org/[^"]*"', f"base_model = {str(tiny(kind))!r}", code)
        code = re.sub(r"num_inference_steps=\d+", "num_inference_steps=2", code)
        Path("snippet.py").write_text(code)
        return runpy.run_path("snippet.py")

    return run


def trained_weights(folder):
    from safetensors.torch import load_file

    files = [*folder.glob("pytorch_lora_weights.safetensors"), *folder.glob("transformer/*.safetensors")]
    return {name: tensor.float() for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("script", MODULES)
def test_the_example_of_the_card_runs_and_uses_what_was_trained(script, train, run_snippet):
    folder = train(script)
    values = run_snippet(folder, "5b-i2v" if script.startswith("i2v") else "2b")
    with av.open(folder.parent / "output.mp4") as video:
        stream = video.streams.video[0]
        assert (stream.frames, stream.height, stream.width, stream.average_rate) == (9, 64, 96, 8)
    weights = values["pipe"].transformer.state_dict()
    for name, trained in trained_weights(folder).items():
        name = name.removeprefix("transformer.")
        name = name.replace(".lora_A.", ".lora_A.default_0.").replace(".lora_B.", ".lora_B.default_0.")
        assert torch.equal(weights[name].float(), trained), name
    if script.endswith("lora"):
        assert values["pipe"].transformer.transformer_blocks[0].attn1.to_q.scaling == {"default_0": 1.0}


def test_the_example_drops_learned_positions_as_training_did(train, run_snippet):
    folder = train("i2v_lora", "--drop_learned_positions", width=64)
    values = run_snippet(folder, "5b-i2v")
    assert not values["pipe"].transformer.config.use_learned_positional_embeddings
    with av.open(folder.parent / "output.mp4") as video:
        assert video.streams.video[0].width == 64
    folder = train("i2v_sft", "--drop_learned_positions", width=64, name="sft")
    assert not run_snippet(folder, "5b-i2v")["pipe"].transformer.config.use_learned_positional_embeddings


def assert_first_frames_are_raw(pipe):
    """What `pipe` makes of a first frame is the VAE's latents, which the stock pipeline scales."""
    from diffusers import CogVideoXImageToVideoPipeline

    def image_latents(pipeline_class):
        image = torch.linspace(-1, 1, 3 * 64 * 96).view(1, 3, 64, 96)
        inputs = (image, 1, 16, 9, 64, 96, torch.float32, torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        return pipeline_class.prepare_latents(pipe, *inputs, generator=generator)[1]

    stock = image_latents(CogVideoXImageToVideoPipeline)
    assert stock.abs().max() > 0.1
    torch.testing.assert_close(image_latents(type(pipe)) * pipe.vae.config.scaling_factor, stock)


@pytest.mark.parametrize("script", ["i2v_lora", "i2v_sft"])
def test_the_example_leaves_raw_first_frames_alone(script, train, run_snippet):
    pipe = run_snippet(train(script, "--image_latent_scale", "raw"), "5b-i2v")["pipe"]
    assert_first_frames_are_raw(pipe)


def test_both_facts_at_once_run_too(train, run_snippet):
    folder = train("i2v_lora", "--drop_learned_positions", "--image_latent_scale", "raw", width=64)
    pipe = run_snippet(folder, "5b-i2v")["pipe"]
    assert type(pipe).__name__ == "RawFirstFramePipeline"
    assert not pipe.transformer.config.use_learned_positional_embeddings


def test_the_card_of_a_hub_model_names_it(train, tiny, monkeypatch):
    monkeypatch.setattr("cogvideox.models.resolve_model_dir", lambda *given: tiny("2b"))
    flags = ["--pretrained_model_name_or_path", "zai-org/CogVideoX-2b", "--id_token", "BW_STYLE"]
    monkeypatch.setattr(dataset, "build_dataset_from_args", without_id_token(dataset.build_dataset_from_args))
    prompt = 'A "kite": {red}\\n # ```'
    size = ["--num_inference_steps", "2", "--height", "64", "--width", "80"]
    folder = train("t2v_lora", *flags, "--validation_prompt", prompt, *size)
    card, text = card_of(folder), (folder / "README.md").read_text()
    assert card.data.to_dict() == {
        "base_model": "zai-org/CogVideoX-2b",
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-video",
        "license": "apache-2.0",
        "tags": [
            "text-to-video", "diffusers", "diffusers-training", "cogvideox", "cogvideox-diffusers", "lora",
            "template:diffusion-lora",
        ],
        "instance_prompt": "BW_STYLE",
        "widget": [{"text": prompt, "output": {"url": "samples/step_2/0_0.mp4"}}],
    }  # fmt: skip
    assert (folder / "samples/step_2/0_0.mp4").exists()
    for line in (f"prompt={json.dumps(prompt)}", "num_frames=9", "height=64", "width=80", "num_inference_steps=2"):
        assert f"    {line},\n" in snippet(folder)
    assert 'base_model = "zai-org/CogVideoX-2b"\n' in snippet(folder)
    assert "Apache License 2.0" in text and "licence of the base model is not" not in text and "`BW_STYLE`" in text
    for row in ("| Rank, alpha | 4, 2 |", "| Updates | 2, of 1 clips each |", "| Optimizer | adamw |", "| Seed | 1 |",
                "| Clips | 6, of 9 frames of 64x96 |", "| Learning rate | 0.01, constant |"):  # fmt: skip
        assert row in text


@pytest.mark.parametrize(
    ("base", "apache", "licence"),
    [
        ("zai-org/CogVideoX-2b", True, "apache-2.0"),
        ("THUDM/CogVideoX-2b", True, "apache-2.0"),
        ("zai-org/CogVideoX1.5-5B-I2V", False, "other"),
        ("THUDM/CogVideoX-5b", False, "other"),
        ("somebody/CogVideoX-2b", True, "unknown"),
        ("somebody/my-finetune", False, "unknown"),
        ("not-zai-org/CogVideoX-5b", False, "unknown"),
        (None, False, "unknown"),
    ],
)
def test_the_card_claims_a_licence_only_of_the_released_models(base, apache, licence):
    summary = SimpleNamespace(model=SimpleNamespace(has_apache_licence=apache))
    data, text = model_card.licence_data(base, summary), model_card.licence_text(base, summary)
    assert data["license"] == licence
    assert ("CogVideoX LICENSE" in text) == (licence == "other") == (data.get("license_name") == "cogvideox-license")
    assert ("Apache" in text) == (licence == "apache-2.0")
    assert "inherit" not in text


@pytest.mark.parametrize(
    ("task", "flags", "expected"),
    [
        ("t2v_sft", "--memory offload", "adamw"),
        ("t2v_sft", "--use_cpu_offload_optimizer --offload_gradients --optimizer adam", "adam"),
        ("t2v_sft", "--use_cpu_offload_optimizer --optimizer came", "came, on the CPU"),
        ("t2v_sft", "--use_cpu_offload_optimizer --ema", "adamw"),
        ("t2v_sft", "--use_8bit", "adamw, 8-bit states"),
        ("t2v_lora", "--use_cpu_offload_optimizer", "adamw, on the CPU"),
        ("t2v_lora", "--memory offload", "adamw"),
    ],
)
def test_the_card_says_which_optimizer_ran_on_the_cpu(task, flags, expected):
    required = ["--pretrained_model_name_or_path", "m", "--data_root", "d", "--mixed_precision", "bf16"]
    required += ["--optimizer", "adamw"]
    args = parse_training_args(task, [*required, *flags.split()])
    run, is_lora = SimpleNamespace(num_ranks=1), task == "t2v_lora"
    summary = SimpleNamespace(run=run, dtype=torch.bfloat16, is_lora=is_lora)
    assert model_card.optimizer_text(args, summary) == expected


def test_a_lora_over_quantised_weights_is_merged_into_the_exact_ones(train, tiny):
    folder = train("t2v_lora", "--base_precision", "nf4", "--export", "merged")
    assert "float32, most frozen weights in nf4 |" in (folder / "README.md").read_text()
    [base_file] = (tiny("2b") / "transformer").glob("*.safetensors")
    lora = load_file(folder / "pytorch_lora_weights.safetensors")
    base, merged = (load_file(path) for path in (base_file, folder / "transformer" / base_file.name))
    assert base.keys() == merged.keys()
    for name, weight in base.items():
        down, up = (lora.get(f"transformer.{name.removesuffix('.weight')}.lora_{part}.weight") for part in "AB")
        exact = weight if down is None else (weight.float() + up @ down).to(weight.dtype)
        assert torch.equal(merged[name], exact)


def without_id_token(build):
    """The prepared folders of these tests hold no token."""
    return lambda args, *rest, **named: build(SimpleNamespace(**{**vars(args), "id_token": None}), *rest, **named)


def test_the_card_of_a_local_model_names_no_place(train, tiny, tmp_path):
    Image.new("RGB", (96, 64)).save(tmp_path / "first.png")
    image = str(tmp_path / "first.png")
    flags = ["--validation_prompt", "a kite:::a boat", "--validation_images", f"{image}:::{image}"]
    folder = train("i2v_sft", *flags, "--num_inference_steps", "2")
    card, text = card_of(folder), (folder / "README.md").read_text()
    assert card.data.base_model is None and card.data.pipeline_tag == "image-to-video"
    assert card.data.license == "unknown" and "CogVideoX LICENSE" not in text and "see the base model's own" in text
    assert "lora" not in card.data.tags and "every weight" in text
    assert 'prompt="a kite",' in text and "# my-run\n" in text
    for place in (str(tmp_path), str(tiny("5b-i2v")), str(Path.home()), os.uname().nodename):
        assert place not in text


@pytest.mark.parametrize("kind", KINDS)
def test_only_2b_is_under_the_apache_licence(kind, tiny):
    model = Model(tiny(kind), read_config(tiny(kind), "transformer"), None, None)
    assert model.has_apache_licence == (kind == "2b") and model.image_to_video == kind.endswith("i2v")
    assert model.fps == (16 if kind.startswith("1.5") else 8)


@pytest.mark.draws
def test_equal_runs_write_equal_cards(train, tmp_path):
    first = train("t2v_lora", name="one/run")
    second = train("t2v_lora", name="two/run")
    assert (first / "README.md").read_bytes() == (second / "README.md").read_bytes()
    assert (first / "loss.png").read_bytes() == (second / "loss.png").read_bytes()
    assert (first / "README.md").read_text() != (train("t2v_sft", name="three/run") / "README.md").read_text()


def write_samples(folder):
    """Videos as validation leaves them, those of an earlier step and one without its prompt too."""
    for name in ("step_2/old_0.mp4", "step_2/old_0.txt", "step_10/a_kite_0.mp4", "step_10/a_kite_1.mp4",
                 "step_10/nameless_0.mp4", "step_10/prompts.json"):  # fmt: skip
        path = folder / "samples" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("old")
    for number in range(2):
        (folder / f"samples/step_10/a_kite_{number}.txt").write_text("a kite: 'red'\n")


def test_videos_of_the_last_validation_are_shown(train):
    folder = train("t2v_lora")
    assert card_of(folder).data.get("widget") is None and "<Gallery />" not in (folder / "README.md").read_text()
    write_samples(folder)
    (folder / "status.json").unlink()
    train("t2v_lora")
    paths = [f"samples/step_10/a_kite_{number}.mp4" for number in range(2)]
    assert card_of(folder).data.widget == [{"text": "a kite: 'red'", "output": {"url": path}} for path in paths]
    assert "<Gallery />" in (folder / "README.md").read_text()


def test_exports_are_made_and_named(train):
    folder = train("t2v_lora", "--export", "comfyui", "kohya", "merged")
    for form in ("comfyui", "kohya"):
        assert (folder / f"pytorch_lora_weights_{form}.safetensors").exists()
    assert (folder / "transformer/config.json").exists()
    text = (folder / "README.md").read_text()
    assert "ComfyUI" in text and "VideoX-Fun" in text and 'subfolder="transformer"' in text
    other = train("t2v_lora", name="other")
    assert "ComfyUI" not in (other / "README.md").read_text() and not (other / "transformer").exists()
    metrics = (other / "metrics.jsonl").read_text()
    train("t2v_lora", "--export", "comfyui", name="other")  # complete: only the export is missing
    assert (other / "pytorch_lora_weights_comfyui.safetensors").exists()
    assert (other / "metrics.jsonl").read_text() == metrics


# ---------------------------------------------------------------- the picture


def write_metrics(folder, rows):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def axes_of(tmp_path, monkeypatch):
    """A function that draws runs, name -> rows of metrics.jsonl, and returns the picture's axes."""
    from matplotlib.figure import Figure

    def draw(window=2, **runs):
        figures = []
        monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: (figures.append(figure), path.touch()))
        for name, rows in runs.items():
            (tmp_path / name).mkdir()
            write_metrics(tmp_path / name, rows)
        paths = {name: tmp_path / name / "metrics.jsonl" for name in runs}
        assert curves.draw_losses(paths, tmp_path / "loss.png", window=window) == []
        [axes] = figures[0].axes
        return axes

    return draw


def updates_of(losses):
    return [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]


def legend_of(axes):
    [legend] = axes.figure.legends
    return [text.get_text() for text in legend.get_texts()]


def test_the_picture_shows_updates_mean_and_held_out_loss(axes_of):
    rows = updates_of([1.0, None, 3.0, 4.0])
    rows[2:2] = [{"event": "memory", "step": 2}, {"event": "held_out_loss", "step": 2, "loss": 7.0}]
    axes = axes_of(run=rows)
    lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]
    assert lines[:3] == [([1, 3, 4], [1, 3, 4]), ([1, 3, 4], [1, 2, 3.5]), ([2], [7])]
    assert legend_of(axes) == ["mean of 2 updates", "held-out clips"]
    assert axes.get_title(loc="right") == "\u00d7 not finite: 1" and list(axes.lines[-1].get_xdata()) == [2]
    low, high = axes.get_ylim()
    assert 0 < low < 1 and 7 < high < 8


@pytest.mark.parametrize("count", [3, 40, 1000])
@pytest.mark.parametrize("spike", [1000.0, math.nan, None])
def test_an_outlier_does_not_set_the_axis_and_is_marked(axes_of, count, spike):
    losses = [0.1 + 0.1 * (step % 5) for step in range(count)]
    losses[count // 2] = spike
    axes = axes_of(run=updates_of(losses))
    low, high = axes.get_ylim()
    assert low < 0.1 and max(losses[: count // 2]) < high < 0.6
    marks = {line.get_marker(): list(line.get_xdata()) for line in axes.lines if line.get_marker() in "^x"}
    place = [count // 2 + 1]
    assert marks == ({"^": place, "x": []} if spike == 1000 else {"^": [], "x": place})
    note = "\u25b2 above the axis: 1, up to 1e+03" if spike == 1000 else "\u00d7 not finite: 1"
    assert axes.get_title(loc="right") == note


@pytest.mark.parametrize("losses", [[0.3], [0.1, 0.5], [0.3, 0.2, 0.4], [0.0] * 9, [1.0] * 30 + [2.5] * 30])
def test_without_outliers_everything_lies_within_the_axis(axes_of, losses):
    axes = axes_of(run=updates_of(losses))
    low, high = axes.get_ylim()
    assert low < min(losses) and max(losses) < high and not axes.get_title(loc="right")


def test_no_run_and_no_held_out_loss_is_taken_for_an_outlier_of_the_others(axes_of):
    held = [{"event": "held_out_loss", "step": step, "loss": 30.0} for step in (1, 40)]
    axes = axes_of(low=updates_of([0.1] * 40), high=updates_of([9.0] * 40) + held)
    assert axes.get_ylim()[1] > 30 and not axes.get_title(loc="right")
    assert legend_of(axes) == ["low", "high", "held-out clips"]


def test_a_dozen_runs_have_colours_of_their_own(axes_of):
    axes = axes_of(**{f"run{number}": updates_of([0.1, 0.2]) for number in range(12)})
    assert len({line.get_color() for line in axes.lines if line.get_label().startswith("run")}) == 12


def test_runs_are_called_by_what_tells_them_apart():
    names = [f"lora__optimizer_{name}__steps_9__learning-rate_{rate}" for name, rate in (("adamw", 1), ("came", 2))]
    assert curves.short_labels(names) == [
        "optimizer_adamw, learning-rate_1", "optimizer_came, learning-rate_2",
    ]  # fmt: skip
    assert curves.short_labels(["/a/x/run", "/b/x/run"]) == ["a", "b"]
    assert curves.short_labels(["run", "run__more"]) == ["run", "more"]
    [long, other] = curves.short_labels(["a" * 50 + "1", "a" * 50 + "2"])
    assert len(long) <= curves.LABEL + 1 and long != other


def test_a_long_run_is_drawn_into_a_small_file(tmp_path):
    write_metrics(tmp_path, updates_of([0.1 + step % 97 / 100 for step in range(20_000)]))
    for name in ("loss.png", "loss.svg"):
        curves.draw_losses({"run": tmp_path / "metrics.jsonl"}, tmp_path / name)
        assert (tmp_path / name).stat().st_size < 500_000
    with Image.open(tmp_path / "loss.png") as image:
        assert image.width == 960 and 450 < image.height < 600


@pytest.mark.draws
def test_a_picture_that_cannot_be_drawn_is_a_warning(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    write_metrics(tmp_path, [{"step": 1, "loss": None}])
    result_module.draw_loss(tmp_path)
    assert not (tmp_path / "loss.png").exists() and "no update had a finite loss" in caplog.text
    write_metrics(tmp_path, [{"step": 1, "loss": 1.0}])
    result_module.draw_loss(tmp_path)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result_module.draw_loss(tmp_path)
    assert [record.levelname for record in caplog.records][-1] == "WARNING"


def test_the_script_draws_several_runs(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_metrics(tmp_path / name, [{"step": 1, "loss": 1.0}])
    paths = [str(tmp_path / name / "metrics.jsonl") for name in ("a", "b")]
    argv = [sys.executable, str(ROOT / "assets/plot_loss.py"), *paths, str(tmp_path / "loss.png")]
    subprocess.run(argv, check=True)
    assert (tmp_path / "loss.png").exists()
    write_metrics(tmp_path / "b", [])
    result = subprocess.run(argv, capture_output=True, text=True)
    assert result.returncode == 2 and "b/metrics.jsonl: holds no update yet" in result.stderr


# ---------------------------------------------------------------- upload


class FakeHub:
    """The hub as HfApi shows it: repositories, uploads, and errors on demand."""

    def __init__(self):
        self.tokens, self.private, self.uploaded, self.errors = [], {}, {}, {}

    def __call__(self, token=None):
        self.tokens.append(token)
        return self

    def answer(self, call):
        if call in self.errors:
            raise self.errors[call]

    def whoami(self):
        self.answer("whoami")
        return {"name": "me"}

    def create_repo(self, repo_id, private, exist_ok):
        self.answer("create_repo")
        validate_repo_id(repo_id)
        assert exist_ok
        self.private[repo_id] = private

    def auth_check(self, repo_id, write):
        self.answer("auth_check")
        assert write

    def upload_folder(self, repo_id, folder_path, allow_patterns, commit_message):
        self.answer("upload_folder")
        folder = Path(folder_path)
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        chosen = sorted(filter_repo_objects(files, allow_patterns=allow_patterns))
        self.uploaded[repo_id] = {path: (folder / path).read_bytes() for path in chosen}


@pytest.fixture
def fake_hub(monkeypatch):
    fake = FakeHub()
    monkeypatch.setattr(hub, "HfApi", fake)
    return fake


RESULT = ["README.md", "loss.png"]
SAMPLES = [f"samples/step_10/a_kite_{number}.{kind}" for number in range(2) for kind in ("mp4", "txt")]
SAMPLES += ["samples/step_10/nameless_0.mp4", "samples/step_2/old_0.mp4", "samples/step_2/old_0.txt"]


@pytest.mark.parametrize("script", ["t2v_lora", "t2v_sft"])
def test_the_result_is_uploaded_and_nothing_else(script, train, fake_hub, tiny, tmp_path):
    write_samples(tmp_path / "my-run")
    for name in ("logs/events.bin", "notes.txt", "transformer.old/x.json", "checkpoint-old/README.md"):
        path = tmp_path / "my-run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("private")
    flags = ["--push_to_hub", "--hub_token", "hf_canary", "--checkpointing_steps", "1"]
    export = ["--export", "comfyui"] if script == "t2v_lora" else []
    folder = train(script, *flags, *export)
    weights = ["transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"]
    if script == "t2v_lora":
        weights = ["pytorch_lora_weights.safetensors", "pytorch_lora_weights_comfyui.safetensors"]
    assert sorted(fake_hub.uploaded["me/my-run"]) == sorted([*RESULT, *SAMPLES, *weights])
    assert fake_hub.private == {"me/my-run": True} and set(fake_hub.tokens) == {"hf_canary"}
    assert (folder / "checkpoint-2").is_dir() and (folder / "args.json").exists()
    assert "# my-run\n" in (folder / "README.md").read_text() and '"me/my-run"' in snippet(folder)
    assert status(folder)["state"] == "complete" and status(folder)["exit_code"] == 0
    for name, content in fake_hub.uploaded["me/my-run"].items():
        for secret in (str(tmp_path), str(tiny("2b")), "hf_canary"):
            assert secret.encode() not in content, name


def test_repository_and_visibility_by_flag(train, fake_hub):
    train("t2v_lora", "--push_to_hub", "--hub_model_id", "team/kites", "--hub_public", "--max_train_steps", "1")
    assert fake_hub.private == {"team/kites": False} and fake_hub.tokens == [None, None]


def test_without_the_flag_nothing_asks_the_hub(train, fake_hub):
    folder = train("t2v_lora", "--max_train_steps", "1")
    assert fake_hub.tokens == [] and (folder / "README.md").exists()


CLIENT = importlib.import_module(type(get_session()).__module__.partition(".")[0])  # httpx or httpx2
# The second is what a cut line raises; it is no OSError
REFUSALS = [OSError("403 Forbidden\nrequest id abc"), CLIENT.ReadError("403 Forbidden\nrequest id abc")]


@pytest.mark.parametrize("refusal", REFUSALS, ids=["response", "cut"])
@pytest.mark.parametrize("call", ["whoami", "create_repo", "auth_check"])
def test_a_hub_that_refuses_is_heard_before_anything_heavy(call, refusal, stops, fake_hub, monkeypatch, tmp_path):
    monkeypatch.setattr("cogvideox.models.resolve_model_dir", lambda *given: pytest.fail("too late"))
    fake_hub.errors[call] = refusal
    line = stops(2, "t2v_lora", "--push_to_hub", "--hub_token", "hf_canary")
    assert line.startswith(
        "error: --push_to_hub: my-run cannot be written (403 Forbidden); log in with `hf auth login`"
    )
    assert not (tmp_path / "my-run").exists() and "hf_canary" not in line


def test_a_line_that_is_cut_during_a_download_is_one_line(monkeypatch):
    def cut(*given, **options):
        raise CLIENT.ReadError("the line is cut")

    monkeypatch.setattr("huggingface_hub.snapshot_download", cut)
    with pytest.raises(UsageError, match=r"^me/model: neither .* \(the line is cut\); if it cannot be reached"):
        resolve_model_dir("me/model", ["vae"])


def test_a_refusal_on_the_main_process_ends_the_others_alike(monkeypatch):
    """Else they wait for it until the launcher kills them, and write that into the output folder."""

    def receive(values, src):
        values[0] = UsageError("no such team")

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", receive)
    argv = ["--pretrained_model_name_or_path", "m", "--data_root", "d", "--push_to_hub"]
    other = SimpleNamespace(is_main_process=False, num_processes=2)
    with pytest.raises(UsageError, match="no such team"):
        hub.check_hub(parse_training_args("t2v_lora", argv), other)


def test_without_a_network_the_real_client_is_refused_in_one_line(stops, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")  # HF_HUB_OFFLINE is set for all tests
    assert "error: --push_to_hub: my-run cannot be written (" in stops(2, "t2v_lora", "--push_to_hub")


def test_a_defect_is_not_blamed_on_the_hub(stops, fake_hub):
    fake_hub.errors["create_repo"] = TypeError("a wrong call")
    assert stops(70, "t2v_lora", "--push_to_hub").endswith("error: TypeError('a wrong call')")


def test_a_failing_upload_keeps_everything_and_is_tried_again(stops, train, fake_hub, tmp_path, monkeypatch):
    folder = tmp_path / "my-run"
    fake_hub.errors["upload_folder"] = ConnectionError("the line is cut")
    line = stops(74, "t2v_lora", "--push_to_hub")
    assert "the line is cut" in line and hub.upload_command("me/my-run", str(folder)) in line
    assert status(folder)["state"] == "complete" and status(folder)["exit_code"] == 74 and status(folder)["step"] == 2
    assert status(folder)["message"] in line
    before = {path: path.read_bytes() for path in folder.glob("*") if path.is_file() and path.name != "status.json"}
    assert {"pytorch_lora_weights.safetensors", "README.md", "loss.png"} <= {path.name for path in before}

    monkeypatch.setattr(loading, "load_transformer", lambda *given: pytest.fail("trains again"))
    assert "the line is cut" in stops(74, "t2v_lora", "--push_to_hub") and status(folder)["exit_code"] == 74
    fake_hub.errors.clear()
    train("t2v_lora", "--push_to_hub")
    assert "pytorch_lora_weights.safetensors" in fake_hub.uploaded["me/my-run"]
    assert status(folder)["state"] == "complete" and status(folder)["exit_code"] == 0 and status(folder)["step"] == 2
    assert "message" not in status(folder)
    assert before == {path: path.read_bytes() for path in before}


def test_the_command_by_hand_uploads_the_same(train, fake_hub, tmp_path, monkeypatch):
    """Parsed by the hub's own command line."""
    from huggingface_hub import HfApi
    from huggingface_hub.cli.hf import main

    folder = train("t2v_lora", "--push_to_hub", name="a run")
    repo = f"me/{hub.default_repo_name('a run')}"
    ours = fake_hub.uploaded.pop(repo)

    def upload(api, *, repo_id, folder_path, allow_patterns, **options):
        fake_hub.upload_folder(repo_id, folder_path, allow_patterns, "")
        assert options["path_in_repo"] == "."
        return SimpleNamespace(commit_url="url", pr_url=None)

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    monkeypatch.setattr(HfApi, "create_repo", lambda api, repo_id, **options: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(sys, "argv", shlex.split(hub.upload_command(repo, str(folder))))
    try:
        main()
    except SystemExit as left:
        assert not left.code
    assert fake_hub.uploaded[repo] == ours


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("my-run", "my-run"),
        ("x" * 96, "x" * 96),
        ("a.b_c", "a.b_c"),
        ("cogvideox-lora__optimizer_adamw__learning-rate_1e-4", "cogvideox-lora__optimizer_adamw__learning-rate_1e-4"),
    ],
)
def test_a_folder_whose_name_the_hub_takes_is_called_so_there(folder, name):
    assert hub.default_repo_name(folder) == name
    validate_repo_id(f"me/{name}")


@pytest.mark.parametrize(
    ("folders", "beginning"),
    [
        (["my run", "my  run", "my+run", "my/run", "my\nrun"], "my-run-"),
        (["a--b..c", "a-b...c", "-a-b.c", "a-b.c.git"], "a-b.c-"),
        ([".hidden-", "hidden.", "_hidden"], "hidden-"),
        (["x" * 97, "x" * 120, "x" * 96 + "-"], "x" * 87 + "-"),
        (["-" * 90 + "x" * 20, "_" * 90 + "x" * 20], "x" * 20 + "-"),
        (["y" * 86 + "-" * 30, "y" * 86 + "." * 30], "y" * 86 + "-"),
        (["日本", "中国", "\udcff", "...", "---"], "cogvideox-finetune-"),
        (
            [os.path.basename(output_dir_of(rate, "came")) + more for rate in ("1e-4", "2e-4") for more in ("", "0")],
            "cogvideox-lora__optimizer_came__steps_3000__lr-schedule_cosine_with_restarts__learning-",
        ),
    ],
)
def test_folders_whose_names_must_be_altered_share_no_repository(folders, beginning):
    names = [hub.default_repo_name(folder) for folder in folders]
    altered = [name for name, folder in zip(names, folders, strict=True) if name != folder]
    assert len(set(names)) == len(folders) and altered
    for name in names:
        validate_repo_id(f"me/{name}")
    for name in altered:
        assert re.fullmatch(re.escape(beginning) + "[0-9a-f]{8}", name)


def test_no_two_runs_of_a_sweep_share_a_repository():
    """Whose folders differ in the last characters alone."""
    names = {
        hub.default_repo_name(os.path.basename(output_dir_of(rate, optimizer, training.output_name)))
        for training in TRAININGS
        for rate in ("1e-4", "1e-3", "1.5e-4", "1.25e-4", "0.00010")
        for optimizer in ("adamw", "prodigy")
    }
    assert len(names) == len(TRAININGS) * 5 * 2 and max(map(len, names)) <= 96


# ---------------------------------------------------------------- secrets


def test_the_token_leaves_the_command_line(monkeypatch):
    flags = ["--pretrained_model_name_or_path", "m", "--data_root", "d"]
    for given in (["--hub_token", "hf_canary"], ["--hub_token=hf_canary"]):
        monkeypatch.setattr(sys, "argv", ["script.py", *flags, *given, "--push_to_hub"])
        monkeypatch.setattr(sys, "orig_argv", ["python", *sys.argv])
        args = parse_training_args("t2v_lora")
        assert args.hub_token == "hf_canary" and args.push_to_hub
        assert not any("hf_canary" in word for word in [*sys.argv, *sys.orig_argv])
        assert sys.argv[:5] == ["script.py", *flags] and sys.argv[-1] == "--push_to_hub"


@pytest.mark.slow  # a real process: trackers write at its start and at its exit
def test_no_file_of_a_run_holds_a_secret(command, tmp_path):
    """A real process, launched, with two trackers; every file that it leaves anywhere is read."""
    pytest.importorskip("tensorboard"), pytest.importorskip("wandb")
    canaries = {"HF_TOKEN": "hf_canaryINhfTOKEN", "WANDB_API_KEY": "canary" * 6 + "aaaa"}
    places = {name: str(tmp_path / name) for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "HOME")}
    for place in places.values():
        Path(place).mkdir()
    env = {**os.environ, **canaries, **places, "WANDB_MODE": "offline", "TMPDIR": str(tmp_path)}
    flags = ["--report_to", "tensorboard,wandb", "--hub_token", "hf_canaryINflag", "--export", "comfyui", "merged"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    config = ["--config_file", str(ROOT / "accelerate_configs/uncompiled_1.yaml")]
    script = str(ROOT / "training" / f"{MODULES['t2v_lora']}.py")
    argv = [*launch, *config, script, *command("t2v_lora", *flags)]
    result = subprocess.run(argv, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert status(tmp_path / "my-run")["state"] == "complete"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    for tracker_file in ("events.out.tfevents", ".wandb"):
        assert any(tracker_file in path.name for path in files)
    secrets = [*canaries.values(), "hf_canaryINflag"]
    assert {(path, secret) for path in files for secret in secrets if secret.encode() in path.read_bytes()} == set()
    assert not any(secret in result.stderr + result.stdout for secret in secrets)
