"""Validation renders the trained weights as the stock pipelines do, and training does not notice."""

import contextlib
import http.server
import io
import json
import logging
import random
import re
import shutil
import sys
import threading
import time
import types
import weakref

import av
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import CogVideoXPipeline, DiffusionPipeline
from PIL import Image
from torch.nn import functional as F

from args import parse_training_args
from attention import kernels
from base.draws import draw_seed
from base.errors import UsageError
from cogvideox import config as config_module
from cogvideox import encoding, loading, pipeline
from cogvideox.config import check_sample_size, read_config
from cogvideox.encoding import fits
from data.artifacts import write_video
from data.buckets import Bucket
from run import held_out, launch, tracking, validation
from run import render as render_module
from run.steps import plan_steps
from script_runs import losses, result_hash, run_ranks
from test_dataset import model
from test_lora_inference import parse_args, render
from tiny_pipeline import KINDS


CPU = torch.device("cpu")
PROMPTS = ["a red square moves", "a green circle, slowly"]
SIZE = (9, 64, 96)  # of the tiny clips: frames, height, width


@pytest.fixture
def image(tmp_path):
    """A first frame of the clips' size."""
    pixels = np.random.default_rng(0).integers(0, 256, size=(8, 12, 3), dtype=np.uint8)
    path = tmp_path / "first.png"
    Image.fromarray(pixels).resize((96, 64)).save(path)
    return path


@pytest.fixture
def sampling(script, image):
    """Flags that render the given prompts in the script, with 2 denoising steps."""

    def flags(*prompts):
        prompts = prompts or PROMPTS[:1]
        images = ["--validation_images", ":::".join([str(image)] * len(prompts))] if script.key[0] == "i" else []
        return ["--validation_prompt", ":::".join(prompts), *images, "--num_inference_steps", "2"]

    return flags


@pytest.fixture
def black(monkeypatch):
    """Nothing is computed where only the moment of a validation matters: its videos are black."""
    monkeypatch.setattr(render_module, "render_one", lambda *given: np.zeros((*SIZE, 3), np.uint8))


def events(folder, name):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row.get("event") == name]


def sampled(folder):
    """step -> names of its videos."""
    steps = {int(path.name.removeprefix("step_")): path for path in (folder / "samples").iterdir()}
    return {step: sorted(video.stem for video in path.glob("*.mp4")) for step, path in sorted(steps.items())}


def video_bytes(folder, step, name="0_0"):
    return (folder / "samples" / f"step_{step}" / f"{name}.mp4").read_bytes()


only_t2v_lora = pytest.mark.parametrize("script", ["t2v_lora"], indirect=True)
only_i2v_lora = pytest.mark.parametrize("script", ["i2v_lora"], indirect=True)


# ---------------------------------------------------------------- when and where


@only_t2v_lora
def test_videos_and_prompts_are_written_at_the_start_in_between_and_at_the_end(train, sampling):
    flags = ["--validation_steps", "2", "--num_validation_videos", "2", "--max_train_steps", "4"]
    out = train("out", *sampling(*PROMPTS), *flags)
    names = ["0_0", "0_1", "1_0", "1_1"]
    assert sampled(out) == dict.fromkeys((0, 2, 4), names)
    folder = out / "samples/step_4"
    assert [(folder / f"{name}.txt").read_text() for name in names] == [f"{PROMPTS[int(n[0])]}\n" for n in names]
    with av.open(folder / "0_0.mp4") as video:
        stream = video.streams.video[0]
        assert (sum(1 for _ in video.decode(video=0)), stream.height, stream.width) == SIZE
        assert stream.average_rate == 8
    assert len({video_bytes(out, 4, name) for name in names}) == 4
    assert len({video_bytes(out, step) for step in (0, 2, 4)}) == 3
    # At the end nothing is left of how files are written
    assert {path.suffix for path in folder.iterdir()} == {".mp4", ".txt"}


@only_t2v_lora
def test_the_noise_is_the_same_at_every_validation(train, sampling):
    """At a learning rate too small to matter the videos are equal, and so is the first of a run of other prompts."""
    still = ["--learning_rate", "1e-20", "--max_train_steps", "2", "--validation_steps", "1"]
    out = train("out", *sampling(*PROMPTS), *still)
    assert video_bytes(out, 0, "1_0") == video_bytes(out, 1, "1_0") == video_bytes(out, 2, "1_0")
    other = train("other", *sampling(PROMPTS[0], "something else"), *still)
    assert video_bytes(other, 2, "0_0") == video_bytes(out, 2, "0_0")
    assert video_bytes(other, 2, "1_0") != video_bytes(out, 2, "1_0")


def due(plan, **flags):
    args = types.SimpleNamespace(validation_steps=None, validation_epochs=50, **{})
    vars(args).update(flags)
    steps = range(1, plan.num_steps + 1)
    return [step for step in steps if validation.is_due(args, plan, step)]


def test_epochs_are_over_at_the_first_update_at_or_after_their_last_batch():
    plan = plan_steps(batches_per_epoch=3, accumulation=1, num_epochs=1, max_steps=10)
    assert due(plan, validation_epochs=1) == [3, 6, 9]
    assert due(plan, validation_epochs=2) == [6]
    plan = plan_steps(batches_per_epoch=5, accumulation=1, num_epochs=2)
    assert due(plan, validation_epochs=1) == [5]  # not after the last update: the test after training does that
    plan = plan_steps(batches_per_epoch=7, accumulation=4, num_epochs=1, max_steps=5)
    assert due(plan, validation_epochs=1) == [2, 4]  # batches 7 and 14, within updates 2 and 4
    assert due(plan._replace(batches_per_epoch=2), validation_epochs=1) == [1, 2, 3, 4]  # several epochs an update
    assert due(plan, validation_steps=3) == [3]
    assert due(plan, validation_steps=5) == []


@only_t2v_lora
def test_a_resumed_run_renders_no_untrained_sample(train, sampling, black):
    out = train("out", "--max_train_steps", "1")
    assert not (out / "samples").exists()
    train("out", "--max_train_steps", "2", *sampling())  # validation may be added to a run
    assert sampled(out) == {2: ["0_0"]}


def test_the_untrained_model_is_left_out_where_asked(train, sampling, prepared, script):
    flags = [*sampling(), "--validation_data_root", str(prepared(script.kind)), "--validation_num_clips", "2"]
    flags += ["--validation_steps", "1"]
    plain = train("plain", *flags, "--max_train_steps", "2")
    train("later", *flags, "--max_train_steps", "1", "--no_first_validation")
    later = train("later", *flags, "--max_train_steps", "2")  # a run may go on without it
    assert sampled(later) == {1: ["0_0"], 2: ["0_0"]}
    assert [event["step"] for event in events(later, "held_out_loss")] == [1, 2]
    assert [video_bytes(later, step) for step in (1, 2)] == [video_bytes(plain, step) for step in (1, 2)]


def test_training_does_not_notice(train, sampling, prepared, script, monkeypatch):
    """Bit-identical results; random state, train mode and the very parameters are as before."""
    seen, validate = [], validation.validate

    def watched(args, run, meter, engine, *rest):
        before, objects = state_of_the_process(), list(engine.transformer.parameters())
        validate(args, run, meter, engine, *rest)
        assert state_of_the_process() == before
        assert all(a is b for a, b in zip(objects, engine.transformer.parameters(), strict=True))
        seen.append(engine.transformer.training)

    def noisy(*arguments):
        torch.rand(1), random.random(), np.random.rand()
        return render_one(*arguments)

    render_one = render_module.render_one
    flags = ["--max_train_steps", "3", "--text_dropout", "0.5"]
    plain = train("plain", *flags)
    monkeypatch.setattr(validation, "validate", watched)
    monkeypatch.setattr(render_module, "render_one", noisy)
    held_out_flags = ["--validation_data_root", str(prepared(script.kind)), "--validation_num_clips", "2"]
    out = train("validated", *flags, *sampling(), *held_out_flags, "--validation_steps", "1")
    assert seen == [True] * 4 and len(sampled(out)) == 4
    assert result_hash(out) == result_hash(plain) and losses(out) == losses(plain)


def state_of_the_process():
    numpy = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), numpy[1].tolist(), numpy[2:]


# ---------------------------------------------------------------- what is rendered


@pytest.fixture
def written(monkeypatch):
    """step -> frames of the first video as they were rendered."""
    frames_of = {}

    def keep(path, frames, fps):
        frames_of[int(path.parent.name.removeprefix("step_"))] = frames.astype(int)
        write_video(path, frames, fps)

    monkeypatch.setattr(render_module, "write_video", keep)
    return frames_of


def test_the_last_sample_is_the_result_in_the_stock_pipeline(train, sampling, script, tiny, image, written):
    """Whole pipeline with T5 from the folder, trained part from the run; rounding may turn one of 255 steps."""
    out = train("out", *sampling(), "--max_train_steps", "2", "--guidance_scale", "3", "--use_dynamic_cfg")
    parts = {}
    if script.key.endswith("sft"):
        parts["transformer"] = config_module.CogVideoXTransformer3DModel.from_pretrained(
            out, subfolder="transformer", dtype=torch.float32
        )
    pipe = DiffusionPipeline.from_pretrained(tiny(script.kind), dtype=torch.float32, **parts)
    if script.key.endswith("lora"):
        pipe.load_lora_weights(out)
    frames = pipe(
        prompt=PROMPTS[0], num_frames=9, height=64, width=96, num_inference_steps=2, guidance_scale=3, use_dynamic_cfg=True,
        generator=torch.Generator().manual_seed(draw_seed(1, "validation", 0, 0)), output_type="np",
        **({"image": Image.open(image)} if script.key[0] == "i" else {}),
    ).frames[0]  # fmt: skip
    assert np.abs((frames * 255).round() - written[2]).max() <= 1
    assert np.abs(written[0] - written[2]).max() > 20  # which it would not be with the untrained weights


CHOICES = {  # kind, flags, size of the clips
    "raw image latents": ("1.5-5b-i2v", ["--image_latent_scale", "raw"], (9, 64, 96)),
    "dropped positions": ("5b-i2v", ["--drop_learned_positions"], (9, 64, 64)),
}


@only_i2v_lora
@pytest.mark.parametrize("case", CHOICES)
def test_choices_of_training_hold_in_validation(
    case, train, sampling, tiny, image, tmp_path, write_clip, written, monkeypatch
):
    """As test_lora_inference.py applies what the LoRA's metadata records."""
    kind, flags, (frames, height, width) = CHOICES[case]
    folder = tmp_path / "clips"
    folder.mkdir()
    write_clip(folder / "0.mp4", frames, height, width)
    (folder / "videos.txt").write_text("0.mp4\n")
    (folder / "prompts.txt").write_text("a square\n")
    Image.open(image).resize((width, height)).save(image)
    out = train("out", *sampling(), *flags, "--max_train_steps", "1", data=folder, raw=True, model=tiny(kind))
    argv = ["--prompt", PROMPTS[0], "--model_path", str(tiny(kind)), "--lora_path", str(out), "--image", str(image)]
    argv += ["--num_frames", str(frames), "--height", str(height), "--width", str(width), "--num_inference_steps", "2"]
    monkeypatch.setattr(encoding.AutoencoderKLCogVideoX, "enable_tiling", lambda vae: None)
    rendered = render(parse_args([*argv, "--seed", str(draw_seed(1, "validation", 0, 0))]))
    assert np.abs((rendered * 255).round() - written[1]).max() <= 1


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], (9, 64, 96)),  # the most clips, not the largest nor the first
        (["--height", "80"], (9, 80, 96)),
        (["--width", "48", "--max_num_frames", "17"], (17, 64, 48)),
        (["--max_num_frames", "20"], (17, 64, 96)),  # what the pipelines make of it
        (["--height", "480", "--width", "720"], (9, 480, 720)),  # as given, also where it is the default
    ],
)
def test_the_size_is_what_was_given_else_the_most_used(argv, expected):
    base = ["--pretrained_model_name_or_path", "m", "--data_root", "d", "--load_tensors"]
    args = parse_training_args("t2v_lora", [*base, *argv])
    buckets = [Bucket(9, 128, 128), *[Bucket(9, 64, 96)] * 3, Bucket(17, 64, 96)]
    assert validation.sample_size(args, buckets) == expected


@pytest.mark.parametrize(
    ("kind", "good", "bad", "drop", "reason"),
    [
        ("5b-i2v", (9, 64, 96), (9, 64, 64), False, "learned positions fit 9 frames of 64x96 only"),
        ("5b-i2v", (9, 64, 64), (9, 64, 72), True, "multiples of 16"),
        ("1.5-5b", (49, 256, 256), (9, 256, 272), False, "positions up to 256x256"),
        ("5b", (17, 480, 720), (9, 24, 64), False, "multiples of 16"),
    ],
)
def test_sizes_that_the_checkpoint_cannot_render_are_refused(kind, good, bad, drop, reason, tiny):
    config = read_config(tiny(kind), "transformer")
    check_sample_size(config, good, drop)
    with pytest.raises(UsageError, match=reason):
        check_sample_size(config, bad, drop)


@only_t2v_lora
def test_a_size_that_cannot_be_rendered_stops_the_run_before_weights_are_read(stops, sampling, tiny, own_copy):
    bare = own_copy(tiny("1.5-5b"), "bare")
    for path in bare.rglob("*.safetensors"):
        if path.parent.name != "transformer":
            path.unlink()
    line = stops(2, "out", *sampling(), "--height", "512", "--max_train_steps", "1", model=bare)
    assert "--height" in line and "positions up to 256x256" in line


# ---------------------------------------------------------------- prompts and images


def read(*argv, image_to_video=True):
    base = ["--pretrained_model_name_or_path", "m", "--data_root", "d", "--load_tensors"]
    args = parse_training_args("i2v_lora", [*base, *argv])
    return validation.read_prompts(args, image_to_video)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--validation_prompt", "a"], "starts from an image; give --validation_images"),
        (["--validation_prompt", "a:::b", "--validation_images", "x.png"], "1 for 2 prompts, split at :::"),
        (["--validation_prompt", "a|", "--validation_prompt_separator", "|"], "prompt 2 of 2 is empty"),
        (["--validation_prompt", "a", "--validation_images", "missing.png"], "missing.png: cannot be read"),
        (["--validation_prompt", "a", "--validation_images", "ftp://host/x.png"], "only paths and http"),
        (["--validation_prompt", "a", "--validation_images", "file:///etc/passwd"], "only paths and http"),
        (["--validation_prompt", "a", "--validation_images", "data:image/png;base64,AAAA"], "cannot be read"),
        (["--validation_prompt", "a", "--validation_images", __file__], "cannot be read"),
    ],
)
def test_prompts_and_images_that_do_not_fit_are_refused(argv, message):
    with pytest.raises(UsageError, match=message) as caught:
        read(*argv)
    assert len(str(caught.value).splitlines()) == 1


def test_without_a_prompt_nothing_is_read():
    assert read("--validation_images", "missing.png") == ([], [])


def test_prompts_are_split_and_images_upright(tmp_path):
    turned = Image.new("RGB", (20, 10), (255, 0, 0))
    turned.paste((0, 0, 255), (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    turned.save(tmp_path / "turned.png", exif=exif)
    Image.new("RGBA", (4, 4), (0, 255, 0, 128)).save(tmp_path / "alpha.png")
    paths = f"{tmp_path / 'turned.png'} ||{tmp_path / 'alpha.png'}"
    flags = ["--validation_prompt", "one ||two", "--validation_images", paths, "--validation_prompt_separator", "||"]
    prompts, (upright, plain) = read(*flags)
    assert prompts == ["one", "two"]
    assert (
        upright.size == (10, 20)
        and upright.getpixel((5, 2)) == (0, 0, 255)
        and upright.getpixel((5, 18)) == (255, 0, 0)
    )
    assert plain.mode == "RGB" and plain.getpixel((0, 0)) == (0, 255, 0)


class Pages(http.server.BaseHTTPRequestHandler):
    requests = []

    def do_GET(self):
        self.requests.append(self.path)
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header(
                "Location", {"image": "/image.png", "file": "file:///etc/passwd", "ftp": "ftp://h/x"}[self.path[4:]]
            )
            self.end_headers()
            return
        self.send_response(200 if self.path != "/missing" else 404)
        self.end_headers()
        content = io.BytesIO()
        Image.new("RGB", (8, 6), (1, 2, 3)).save(content, "PNG")
        with contextlib.suppress(ConnectionError):
            if self.path in ("/trickles", "/stalls"):
                for _ in range(20):
                    self.wfile.write(b"x")
                    time.sleep(0.1 if self.path == "/trickles" else 1)
            self.wfile.write(b"x" * 5000 if self.path == "/large" else content.getvalue())

    def log_message(self, *values):
        pass


@pytest.fixture
def server():
    Pages.requests.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_images_are_fetched_from_urls(server, monkeypatch):
    for path in ("/image.png", "/to/image"):
        assert validation.open_image(server + path).getpixel((7, 5)) == (1, 2, 3)
    for path, reason in (("/missing", "404"), ("/to/file", "'file://'"), ("/to/ftp", "'ftp://'")):
        with pytest.raises(UsageError, match=reason) as caught:
            validation.open_image(server + path)
        assert len(str(caught.value).splitlines()) == 1
    for url, reason in (
        ("http://127.0.0.1:9/image.png", "refused"),
        ("http://a:b/c", "Invalid port"),
        ("https:///x", "https"),
    ):
        with pytest.raises(UsageError, match=rf"cannot be read \(.*{reason}"):
            validation.open_image(url)


def test_what_is_fetched_has_a_largest_size_and_a_longest_time(server, monkeypatch):
    with monkeypatch.context() as patches, pytest.raises(UsageError, match="larger than"):
        patches.setattr(validation, "FETCH_BYTES", 4000)
        validation.open_image(server + "/large")
    monkeypatch.setattr(validation, "FETCH_SECONDS", 0.4)
    for path, reason in (("/trickles", "not complete after"), ("/stalls", "timed out")):
        with pytest.raises(UsageError, match=reason):
            validation.open_image(server + path)


@only_i2v_lora
def test_images_are_fetched_once(train, server):
    flags = ["--validation_prompt", "a:::b", "--validation_images", f"{server}/1.png:::{server}/2.png"]
    out = train("out", *flags, "--num_inference_steps", "1", "--max_train_steps", "2", "--validation_steps", "1")
    assert sampled(out) == {step: ["0_0", "1_0"] for step in (0, 1, 2)}
    assert sorted(Pages.requests) == ["/1.png", "/2.png"]


# ---------------------------------------------------------------- models


@only_t2v_lora
@pytest.mark.parametrize("raw", [True, False])
def test_t5_and_the_vae_are_loaded_once(raw, train, sampling, monkeypatch):
    loaded = []

    def counted(holder, name):
        load = getattr(holder, name)
        monkeypatch.setattr(holder, name, lambda *values, **named: loaded.append(name) or load(*values, **named))

    counted(encoding, "load_text_encoder")
    counted(loading, "load_vae")
    counted(loading, "load_transformer")
    train("out", *sampling(), "--max_train_steps", "2", "--validation_steps", "1", raw=raw)
    assert sorted(loaded) == ["load_text_encoder", "load_transformer", "load_vae"]


@only_t2v_lora
def test_the_vae_is_sliced_and_tiled_as_flagged(train, sampling, monkeypatch):
    vaes, load = [], loading.load_vae
    monkeypatch.setattr(loading, "load_vae", lambda *values, **named: vaes.append(load(*values, **named)) or vaes[-1])
    train("out", *sampling(), "--max_train_steps", "1", "--enable_slicing", "--enable_tiling")
    assert vaes[0].use_slicing and vaes[0].use_tiling


@pytest.mark.parametrize("kind", KINDS)
def test_samples_of_guidance_may_pass_one_by_one(kind, tiny, image):
    """The same video to rounding, from blocks that see one sample; the stock pipeline calls the transformer."""
    pipe = DiffusionPipeline.from_pretrained(tiny(kind), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    frames, height, width = SIZE
    call = {"prompt": PROMPTS, "num_frames": frames, "height": height, "width": width, "num_inference_steps": 3}
    call |= {"image": [Image.open(image)] * 2} if kind.endswith("i2v") else {}
    batches = []
    pipe.transformer.transformer_blocks[0].register_forward_pre_hook(
        lambda block, inputs, named: batches.append(len(named["hidden_states"])), with_kwargs=True
    )
    forward = pipe.transformer.forward

    def sample():
        return pipe(**call, output_type="latent", generator=torch.Generator().manual_seed(0)).frames

    whole = sample()
    assert batches == [4] * 3
    batches.clear()
    with render_module.one_sample_at_a_time(pipe.transformer):
        parts = sample()
    assert batches == [1] * 12
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
    assert pipe.transformer.forward == forward


def test_t5_goes_where_there_is_room(monkeypatch):
    model = torch.nn.Linear(1024, 1024, bias=False)  # 4 MiB
    gpu = torch.device("cuda")
    for free, expected in ((2**30 + 2**22, True), (2**30 + 2**22 - 1, False)):
        for card, share in ((free, 1.0), (80 * 2**30, free / (80 * 2**30))):  # what is left, or what may be taken
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, card=card: (card, 80 * 2**30))
            monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device, share=share: share)
            assert fits(model, gpu) is expected
    assert fits(model, CPU)


@only_t2v_lora
def test_cpu_offload_leaves_no_hook(train, sampling, monkeypatch):
    moved, validate = [], validation.validate

    def watched(args, run, meter, engine, *rest):
        validate(args, run, meter, engine, *rest)
        moved.append([name for name, part in engine.transformer.named_modules() if hasattr(part, "_hf_hook")])

    plain = train("plain", *sampling(), "--max_train_steps", "1")
    monkeypatch.setattr(validation, "validate", watched)
    out = train("out", *sampling(), "--max_train_steps", "1", "--enable_model_cpu_offload")
    assert moved == [[], []] and result_hash(out) == result_hash(plain)
    assert video_bytes(out, 1) == video_bytes(plain, 1)


def test_weights_that_are_parts_of_a_buffer_stay_where_they_are(tiny, caplog):
    """As DeepSpeed lays them out: moved away and back they would no longer be what it updates."""
    transformer = loading.load_transformer(tiny("5b"), torch.float32)
    vae = loading.load_vae(tiny("5b"), torch.float32)
    scheduler = config_module.load_scheduler(tiny("5b"))
    pipe = pipeline.make_pipeline(model(), vae, scheduler, "pipeline", transformer)
    frozen, trained = list(transformer.parameters())[:2]
    frozen.data = torch.zeros(2 * frozen.numel())[: frozen.numel()].view_as(frozen)
    trained.requires_grad_(True)
    trained.data = trained.data.clone()
    with render_module.placed(pipe, CPU, offload=True):
        assert hasattr(transformer, "_hf_hook")
    buffer = torch.zeros(2 * trained.numel())
    trained.data = buffer[: trained.numel()].view_as(trained)
    with render_module.placed(pipe, CPU, offload=True):
        assert not hasattr(transformer, "_hf_hook")
    assert "the transformer stays" in caplog.text


def test_what_a_full_gpu_held_is_gone_before_weights_come_back(tiny, monkeypatch):
    """The frames of a failed decode hold its tensors as long as the exception has a traceback."""
    transformer = loading.load_transformer(tiny("5b"), torch.float32)
    vae = loading.load_vae(tiny("5b"), torch.float32)
    scheduler = config_module.load_scheduler(tiny("5b"))
    pipe = pipeline.make_pipeline(model(), vae, scheduler, "pipeline", transformer)
    held, held_at_return, move = [], [], torch.nn.Module.to

    def decode():
        activations = torch.zeros(4)
        held.append(weakref.ref(activations))
        raise RuntimeError("CUDNN_STATUS_ALLOC_FAILED")

    def watched(model, *places):
        held_at_return.extend(reference() for reference in held)
        return move(model, *places)

    monkeypatch.setattr(torch.nn.Module, "to", watched)
    with pytest.raises(RuntimeError), render_module.placed(pipe, CPU, offload=True):
        decode()
    assert held_at_return and not any(tensor is not None for tensor in held_at_return)


class Placements:
    """render_videos on a GPU that is not there: which models were placed how, and what each attempt rendered."""

    tiles = False

    def __init__(self, monkeypatch, fails=()):
        self.monkeypatch, self.offloads, self.fails, self.batches = monkeypatch, [], list(fails), []
        monkeypatch.setattr(render_module, "placed", self.placed)
        monkeypatch.setattr(render_module, "render_one", self.render_one)
        monkeypatch.setattr(render_module, "write_video", lambda *given: None)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        self.set_free(0)

    def set_free(self, gib):
        self.monkeypatch.setattr(render_module, "free_gpu_bytes", lambda device: gib * 2**30)

    @contextlib.contextmanager
    def placed(self, pipe, device, offload):
        self.offloads.append(offload)
        yield

    def render_one(self, args, pipe, *rest):
        samples = [torch.zeros(2, 1)] * 3
        pipe.transformer(*samples)
        if self.fails and self.fails.pop(0):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    def render(self, level, directory, *flags):
        transformer = torch.nn.Module()
        transformer.forward = lambda hidden, *rest, **shared: (self.batches.append(len(hidden)) or hidden,)
        vae = types.SimpleNamespace(use_tiling=self.tiles, dtype=torch.bfloat16)
        pipe = types.SimpleNamespace(transformer=transformer, vae=vae, set_progress_bar_config=lambda **options: None)
        samples = types.SimpleNamespace(prompts=["a ball"], make_pipeline=lambda transformer: pipe, fps=8)
        samples.size = (49, 480, 720)
        argv = ["--pretrained_model_name_or_path", "m", "--data_root", "d", *flags]
        run = types.SimpleNamespace(rank=0, num_ranks=1, device=torch.device("cuda"))
        engine = types.SimpleNamespace(transformer=transformer, level=level)
        render_module.render_videos(parse_training_args("t2v_lora", argv), run, engine, samples, directory)


@pytest.mark.parametrize("level", ["offload", "stream"])
def test_levels_that_save_memory_have_one_model_on_the_gpu_from_the_start(level, monkeypatch, tmp_path):
    placements = Placements(monkeypatch)
    placements.render(level, tmp_path)
    assert placements.offloads == [True] and placements.batches == [1, 1]
    placements = Placements(monkeypatch, fails=[True])
    with pytest.raises(torch.cuda.OutOfMemoryError):  # nothing is left to save: not denoised a second time
        placements.render(level, tmp_path)
    assert placements.offloads == [True]


@pytest.mark.parametrize("level", ["offload", "stream"])
def test_the_transformer_stays_on_the_gpu_where_the_vae_has_room_beside_it(level, monkeypatch, tmp_path):
    """At 49x480x720: 3.5 GiB. Moved, 5b takes 10.4 GiB of the host and seconds."""
    for free, tiles, moved in ((3.4, False, True), (3.6, False, False), (3.6, True, True)):
        placements = Placements(monkeypatch)
        placements.set_free(free)
        placements.tiles = tiles
        placements.render(level, tmp_path)
        assert placements.offloads == [moved] and placements.batches == [1, 1]
    placements = Placements(monkeypatch, fails=[True, False])  # it was less than thought
    placements.set_free(3.6)
    placements.render(level, tmp_path)
    assert placements.offloads == [False, True] and placements.batches == [1, 1] * 2


def test_other_levels_save_memory_once_there_is_too_little(monkeypatch, tmp_path):
    placements = Placements(monkeypatch)
    placements.render("balanced", tmp_path)
    placements.render(None, tmp_path, "--enable_model_cpu_offload")
    assert placements.offloads == [False, True] and placements.batches == [2, 2]
    placements = Placements(monkeypatch, fails=[True, False])
    placements.render("balanced", tmp_path)
    assert placements.offloads == [False, True] and placements.batches == [2, 1, 1]


@only_t2v_lora
def test_the_log_says_how_long_denoising_and_decoding_took(train, sampling, monkeypatch, caplog):
    caplog.set_level("INFO")
    decode = CogVideoXPipeline.decode_latents
    monkeypatch.setattr(
        CogVideoXPipeline, "decode_latents", lambda pipe, latents: time.sleep(0.5) or decode(pipe, latents)
    )
    train("out", *sampling(*PROMPTS), "--max_train_steps", "1", "--no_first_validation")
    lines = re.findall(r"validation video (\S+): denoised in (\S+) s, decoded in (\S+) s", caplog.text)
    assert [name for name, _, _ in lines] == ["0_0", "1_0"]
    assert all(float(decoding) >= 0.5 and float(denoising) > 0 for _, denoising, decoding in lines)


def test_frames_are_rounded_as_numpy_rounds_them():
    """Halves to even, in fp32 even if the VAE computes in less."""
    for dtype in (torch.float32, torch.bfloat16):
        frames = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
        frames[0, 0, 0, :4] = torch.tensor([0.0, 1.0, 0.5, 1.5 / 255])
        expected = (frames.float().permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
        rounded = render_module.to_uint8(frames)
        assert np.array_equal(rounded, expected) and rounded.flags["C_CONTIGUOUS"]


# ---------------------------------------------------------------- SageAttention


@pytest.fixture
def sage(monkeypatch):
    """A stand-in that records shapes and computes the same."""
    shapes = []

    def sageattn(query, key, value, tensor_layout, is_causal):
        assert tensor_layout == "HND" and not is_causal and not torch.is_grad_enabled()
        shapes.append(tuple(query.shape))
        return F.scaled_dot_product_attention(query, key, value)

    monkeypatch.setitem(sys.modules, "sageattention", types.SimpleNamespace(sageattn=sageattn))
    return shapes


@pytest.mark.parametrize("script", ["t2v_lora", "i2v_sft"], indirect=True)
def test_sage_attention_renders_and_never_trains(train, module, sampling, sage, written, monkeypatch):
    monkeypatch.setattr(launch, "check_sage", lambda dtype, device: kernels.import_sage())
    seen, update = [], module.update

    def watched(*arguments):
        seen.append(len(sage))
        return update(*arguments)

    plain = train("plain", *sampling(), "--max_train_steps", "2")
    assert not sage
    exact = written[2]
    monkeypatch.setattr(module, "update", watched)
    out = train("out", *sampling(), "--max_train_steps", "2", "--validation_attention", "sage")
    assert len(sage) == 2 * seen[0] == 2 * seen[1] > 0  # at the start and at the end, never in between
    assert result_hash(out) == result_hash(plain)
    assert np.abs(exact - written[2]).max() <= 1


def test_sage_attention_puts_the_processors_back(tiny, sage):
    transformer = loading.load_transformer(tiny("5b"), torch.float32)
    before = dict(transformer.attn_processors)
    with pytest.raises(RuntimeError), kernels.sage_attention(transformer):
        assert {item.attend for item in transformer.attn_processors.values()} == {kernels.sage_attend}
        raise RuntimeError
    assert transformer.attn_processors == before


def test_sage_attention_that_cannot_run_is_refused(monkeypatch, sage):
    with pytest.raises(UsageError, match="CUDA"):
        kernels.check_sage(torch.bfloat16, CPU)
    with pytest.raises(UsageError, match="bf16 or fp16"):
        kernels.check_sage(torch.float32, torch.device("cuda"))
    kernels.check_sage(torch.bfloat16, torch.device("cuda"))
    monkeypatch.setitem(sys.modules, "sageattention", None)
    with pytest.raises(UsageError, match="pip install sageattention"):
        kernels.check_sage(torch.bfloat16, torch.device("cuda"))


# ---------------------------------------------------------------- failures and ranks


@only_t2v_lora
@pytest.mark.parametrize(
    "error", [torch.cuda.OutOfMemoryError("out of memory\nmore"), ValueError(""), OSError(28, "full")]
)
def test_a_failing_validation_is_one_warning(error, train, sampling, monkeypatch, caplog):
    def fail(*arguments):
        raise error

    plain = train("plain", "--max_train_steps", "2")
    monkeypatch.setattr(render_module, "render_one", fail)
    caplog.clear()
    out = train("out", *sampling(*PROMPTS), "--max_train_steps", "2", "--validation_steps", "1")
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    warnings = [text for text in warnings if "tried again" not in text]  # a full GPU is given a second chance
    assert [text.split(":")[0] for text in warnings] == ["step 0", "step 1", "step 2"]
    assert all(type(error).__name__ in text and len(text.splitlines()) == 1 for text in warnings)
    assert result_hash(out) == result_hash(plain)
    assert json.loads((out / "status.json").read_text())["state"] == "complete"


@only_t2v_lora
def test_a_slow_rank_and_a_failing_one_do_not_end_the_run(module, command, sampling, script, tmp_path, monkeypatch):
    """The second rank is slow, longer than collectives may take, then fails: the first waits and both train on."""
    render_one, slept = render_module.render_one, []

    def slow(args, pipe, samples, device, number, video):
        if (number, video) == (0, 1) and not slept:
            slept.append(True)
            time.sleep(6)
        if (number, video) == (1, 1):
            raise ValueError("no such luck")
        return render_one(args, pipe, samples, device, number, video)

    monkeypatch.setattr(render_module, "render_one", slow)
    flags = ["--max_train_steps", "2", "--nccl_timeout", "2", "--num_validation_videos", "2"]
    argv = command("out", *sampling(*PROMPTS), *flags)

    def main():
        logging.getLogger().addHandler(logging.FileHandler(tmp_path / "log.txt"))
        module.main(parse_training_args(script.key, argv))

    assert run_ranks(main, 2) == [0, 0]
    # The first renders 0_0 and 1_0, the second 0_1 and 1_1
    assert sampled(tmp_path / "out") == {step: ["0_0", "0_1", "1_0"] for step in (0, 2)}
    log = (tmp_path / "log.txt").read_text()
    assert log.count("validation videos failed, training continues: ValueError: no such luck (process 1)") == 2


def test_a_signal_during_a_validation_is_no_promise_to_go_on(caplog):
    validation.warn_of(3, "validation videos", ["", f"{validation.CUT_SHORT} SIGINT"])
    assert [record.getMessage() for record in caplog.records] == [
        "step 3: validation videos incomplete: ended by SIGINT (process 1)"
    ]


# ---------------------------------------------------------------- held-out loss


def held_out_rows(folder):
    return [(row["step"], row["loss"], row["bins"]) for row in events(folder, "held_out_loss")]


def test_the_held_out_loss_is_the_mean_over_clips_and_timesteps(train, module, script, prepared, monkeypatch):
    """What training computes itself at these timesteps, clip by clip, without any dropout."""
    calls, compute_losses = [], module.compute_losses

    def kept(*arguments, **options):
        result = compute_losses(*arguments, **options)
        calls.append((int(arguments[-1][0]), float(result[0].detach())))
        return result

    monkeypatch.setattr(module, "compute_losses", kept)
    flags = ["--validation_data_root", str(prepared(script.kind, "two")), "--validation_num_clips", "3"]
    out = train("out", *flags, "--text_dropout", "1", "--max_train_steps", "2", "--validation_steps", "1")
    rows = held_out_rows(out)
    assert [row[0] for row in rows] == [0, 1, 2]
    first = calls[:30]
    assert sorted({timestep for timestep, _ in first}) == list(range(50, 1000, 100))
    assert rows[0][1] == pytest.approx(np.mean([loss for _, loss in first]))
    assert list(rows[0][2]) == [f"{100 * i}-{100 * i + 99}" for i in range(10)]
    assert rows[0][2]["300-399"] == pytest.approx(np.mean([loss for timestep, loss in first if timestep == 350]))
    assert len({row[1] for row in rows}) == 3


@pytest.mark.parametrize("script", ["t2v_lora", "i2v_sft"], indirect=True)
def test_the_held_out_loss_is_the_same_in_every_setting(train, module, script, command, prepared, clips, tmp_path):
    """Raw or prepared, on one rank or two, whatever is trained on: before the first step only the clips matter."""
    steps = ["--max_train_steps", "1"]
    data = ["--validation_data_root", str(prepared(script.kind, "two"))]
    reference = held_out_rows(train("one", *data, *steps))[0]
    assert (
        held_out_rows(train("batch", *data, *steps, "--train_batch_size", "2", "--text_dropout", "0.5"))[0]
        == reference
    )
    argv = command("ranks", *data, *steps)
    assert run_ranks(lambda: module.main(parse_training_args(script.key, argv)), 2) == [0, 0]
    assert held_out_rows(tmp_path / "ranks")[0][1] == pytest.approx(reference[1], rel=1e-6)
    if script.key[0] == "t":  # a first frame's noise is drawn by prepare_dataset.py, in another way
        raw = train("raw", "--validation_data_root", str(clips["two"]), *steps, "--random_flip", "1", raw=True)
        assert held_out_rows(raw)[0] == reference


@only_t2v_lora
def test_the_order_of_held_out_clips_changes_nothing(train, prepared, own_copy):
    data = own_copy(prepared("5b", "two"), "data")
    rows = (data / "data.jsonl").read_text().splitlines()
    flags = ["--validation_data_root", str(data), "--max_train_steps", "1"]
    before = held_out_rows(train("before", *flags))[0]
    (data / "data.jsonl").write_text("".join(f"{row}\n" for row in reversed(rows)))
    assert held_out_rows(train("after", *flags))[0][1] == pytest.approx(before[1], rel=1e-9)


@only_t2v_lora
def test_the_held_out_loss_falls_on_what_is_trained(train, prepared):
    flags = ["--validation_data_root", str(prepared("5b")), "--max_train_steps", "30", "--train_batch_size", "4"]
    first, last = held_out_rows(train("out", *flags))
    assert last[1] < 0.9 * first[1]


@only_t2v_lora
def test_held_out_clips_are_checked_like_the_training_data(train, stops, prepared, own_copy, tiny):
    data = own_copy(prepared("5b"), "data")
    for path in (data / "video_latents").iterdir():
        path.write_bytes(b"nothing")
    line = stops(65, "damaged", "--validation_data_root", str(data), "--max_train_steps", "1")
    assert "damaged" in line
    assert "no such folder" in stops(
        65, "missing", "--validation_data_root", str(data / "x"), "--max_train_steps", "1"
    )
    # A folder without the empty prompt's embedding serves: nothing is dropped here
    other = own_copy(prepared("5b"), "other")
    (other / "prompt_embeds/_empty.safetensors").unlink()
    train("out", "--validation_data_root", str(other), "--text_dropout", "0.5", "--max_train_steps", "1")


def test_a_csv_of_held_out_clips_has_the_name_of_the_training_one(sample_data, tmp_path):
    shutil.copytree(sample_data, tmp_path / "own")
    argv = ["--pretrained_model_name_or_path", "m", "--dataset_file", str(sample_data / "metadata.csv")]
    argv += ["--caption_column", "caption", "--video_column", "video", "--validation_data_root", str(tmp_path / "own")]
    argv += ["--height_buckets", "64", "--width_buckets", "64", "--frame_buckets", "9", "--validation_num_clips", "2"]
    clips = held_out.read_clips(parse_training_args("t2v_lora", argv), model(), 0)
    assert len(clips.prompts) == 2 and clips.dataset.clips[0].video.is_relative_to(tmp_path / "own")


@only_t2v_lora
def test_a_failing_held_out_loss_is_a_warning(train, prepared, monkeypatch, caplog):
    monkeypatch.setattr(validation, "sum_losses", lambda held_out: 1 / 0)
    out = train("out", "--validation_data_root", str(prepared("5b")), "--max_train_steps", "1")
    assert held_out_rows(out) == []
    texts = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(texts) == 2 and all(
        "held-out loss failed, training continues: ZeroDivisionError" in text for text in texts
    )


# ---------------------------------------------------------------- memory


@only_t2v_lora
def test_memory_is_reported_at_four_points(train, sampling, black, caplog):
    with caplog.at_level(logging.INFO):
        out = train("out", *sampling(), "--max_train_steps", "2", "--validation_steps", "1")
    rows = events(out, "memory")
    validations = [(step, f"{when}_validation") for step in (0, 1, 2) for when in ("before", "after")]
    assert [(row["step"], row["when"]) for row in rows] == [(0, "before_training"), *validations, (2, "after_testing")]
    assert all(0.1 < row["host_peak_gib"] < 100 for row in rows)
    assert sum("memory before training, GiB: host peak" in record.getMessage() for record in caplog.records) == 1
    plain = train("plain", "--max_train_steps", "1")
    assert [row["when"] for row in events(plain, "memory")] == ["before_training", "after_testing"]


# ---------------------------------------------------------------- trackers


@pytest.fixture
def video_folder(tmp_path):
    folder = tmp_path / "step_3"
    frames = np.random.default_rng(0).integers(0, 256, size=(5, 64, 96, 3), dtype=np.uint8)
    for number in range(2):
        write_video(folder / f"{number}_0.mp4", frames, 8)
        (folder / f"{number}_0.txt").write_text(f"prompt {number}\n")
    return folder


def test_tensorboard_gets_animated_pictures_and_prompts(video_folder, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=str(tmp_path))
    accelerator.init_trackers("run")
    tracking.log_videos(accelerator, video_folder, 3)
    accelerator.end_training()
    reader = events.EventAccumulator(str(tmp_path / "run"), size_guidance={"tensors": 0}).Reload()
    (picture,) = reader.Images("validation/1_0")
    with Image.open(io.BytesIO(picture.encoded_image_string)) as gif:
        assert (gif.format, gif.n_frames, gif.size, picture.step) == ("GIF", 5, (96, 64), 3)
    (text,) = reader.Tensors("validation/1_0/prompt/text_summary")
    assert text.tensor_proto.string_val[0] == b"prompt 1"


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_get_the_files(name, video_folder, monkeypatch):
    logged = []
    package = types.SimpleNamespace(Video=lambda path, caption: (path, caption))
    monkeypatch.setitem(sys.modules, name, package)
    tracker = types.SimpleNamespace(name=name, log=lambda values, step: logged.append((values, step)))
    tracking.log_videos(types.SimpleNamespace(trackers=[tracker]), video_folder, 3)
    expected = {f"validation/{i}_0": (str(video_folder / f"{i}_0.mp4"), f"prompt {i}") for i in range(2)}
    assert logged == [(expected, 3)]


@only_t2v_lora
def test_a_run_sends_its_validation_to_tensorboard(train, sampling, prepared):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    data = ["--validation_data_root", str(prepared("5b")), "--max_train_steps", "1"]
    out = train("out", *sampling(), *data, "--report_to", "tensorboard", "--tracker_name", "run")
    reader = events.EventAccumulator(str(out / "logs/run")).Reload()
    rows = held_out_rows(out)
    assert [event.value for event in reader.Scalars("validation/loss")] == pytest.approx([row[1] for row in rows])
    assert "validation/loss_0-99" in reader.Tags()["scalars"] and "validation/0_0" in reader.Tags()["images"]
