# ruff: noqa: F811 (fixtures)
"""Every memory level works with everything else that a run may do, and changes none of it."""

import functools
import gc
import importlib
import logging

import pytest
import torch
from accelerate import cpu_offload_with_hook
from safetensors.torch import load_file

from args import parse_training_args
from base.memory_levels import HOST_LEVELS
from cogvideox import encoding, loading
from cogvideox.encoding import encode_captions, place_text_encoder
from cogvideox.loading import load_text_encoder, load_transformer
from engine import compose
from memory import activations, host, streaming
from memory.activations import offload_activations
from memory.streaming import stream_weights, streamed_tensors
from run import metrics
from run import render as render_module
from script_runs import result_hash
from test_streaming import LateCopies
from test_validation import image, sampled, sampling, video_bytes  # noqa: F401 - two are fixtures


CPU = torch.device("cpu")
LEVELS = ("balanced", "offload", "stream")


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    """Tiny activations leave too."""
    monkeypatch.setattr(compose, "offload_activations", functools.partial(offload_activations, min_bytes=2048))


# ---------------------------------------------------------------- captions


PROMPTS = ["a red square moves left", "", "a dog"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("copies", [host.TransferStream, LateCopies])
def test_a_streamed_text_encoder_gives_the_same_bits(dtype, copies, tiny, monkeypatch):
    resident = list(encode_captions(tiny("5b"), PROMPTS, dtype, CPU, 226, level="balanced"))
    monkeypatch.setattr(activations, "TransferStream", copies)
    monkeypatch.setattr(streaming, "TransferStream", copies)
    rings = []
    monkeypatch.setattr(encoding, "stream_weights", lambda *given: rings.append(stream_weights(*given, num_slots=1)))
    for level in ("offload", "stream"):
        streamed = encode_captions(tiny("5b"), PROMPTS, dtype, CPU, 226, level=level)
        assert all(map(torch.equal, streamed, resident))
    assert len(rings) == 2


def test_a_text_encoder_that_does_not_fit_is_streamed(tiny, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    resident = list(encode_captions(tiny("5b"), PROMPTS, torch.float32, CPU, 226))
    assert "T5" not in caplog.text
    monkeypatch.setattr(encoding, "fits", lambda model, device: False)
    streamed = encode_captions(tiny("5b"), PROMPTS, torch.float32, CPU, 226)
    assert all(map(torch.equal, streamed, resident))
    assert "T5 does not fit into what is free on the GPU: its weights are streamed" in caplog.text


def test_weights_of_a_streamed_text_encoder_are_copied_once_for_many_captions(tiny, monkeypatch):
    """In the last pass for fewer; to the bit what each caption gives alone."""
    prompts = [f"caption {number} of " + "many " * number for number in range(2 * encoding.CAPTIONS_PER_PASS + 3)]
    resident = list(encode_captions(tiny("5b"), prompts, torch.float32, CPU, 226))
    samples, load = set(), encoding.load_text_encoder

    def watched(*given):
        tokenizer, text_encoder = load(*given)
        for layer in (text_encoder.encoder.block[-1].layer[0], text_encoder.encoder.final_layer_norm):
            layer.register_forward_pre_hook(lambda layer, inputs: samples.add(len(inputs[0])))
        return tokenizer, text_encoder

    monkeypatch.setattr(encoding, "load_text_encoder", watched)
    passes, forward = [], streaming.WeightRing.forward
    monkeypatch.setattr(
        streaming.WeightRing,
        "forward",
        lambda ring, index, *inputs, **named: (passes.append(index), forward(ring, index, *inputs, **named))[1],
    )
    streamed = list(encode_captions(tiny("5b"), prompts, torch.float32, CPU, 226, level="stream"))
    assert len(streamed) == len(prompts) and all(map(torch.equal, streamed, resident))
    assert passes == 3 * sorted(set(passes)) and samples == {1}


def test_nothing_is_left_of_a_streamed_text_encoder(tiny):
    gc.collect()
    before = num_page_locked()
    _, text_encoder = load_text_encoder(tiny("5b"), torch.float32)
    place_text_encoder(text_encoder, CPU, streamed=True)
    assert num_page_locked() == before + len(text_encoder.encoder.block)
    del text_encoder
    encoding.free_memory(CPU)
    assert num_page_locked() == before


def num_page_locked():
    return sum(type(thing) is host.PinnedMemory for thing in gc.get_objects())


# ---------------------------------------------------------------- validation


TILES = ["--enable_slicing", "--enable_tiling"]
OFFLOAD = ["--enable_model_cpu_offload"]


def train_by_single_samples(train, monkeypatch, *flags):
    """Without a level, its videos rendered as at `offload` and `stream`."""
    render = render_module.render_jobs

    def one_by_one(args, pipe, *rest, **named):
        with render_module.one_sample_at_a_time(pipe.transformer):
            return render(args, pipe, *rest, **named)

    with monkeypatch.context() as patched:
        patched.setattr(render_module, "render_jobs", one_by_one)
        return train("single", *flags)


def test_videos_and_result_are_the_same_at_every_level(train, sampling, script, monkeypatch, caplog):
    """Balanced denoises both samples of guidance at once, the levels that keep things on the host one by one."""
    caplog.set_level(logging.INFO)
    vaes, load = [], loading.load_vae
    monkeypatch.setattr(loading, "load_vae", lambda *given, **named: vaes.append(load(*given, **named)) or vaes[-1])
    is_lora = script.key.endswith("lora")
    flags = [*sampling(), "--max_train_steps", "2", "--validation_steps", "1"]
    flags += [] if is_lora else ["--mixed_precision", "bf16"]
    plain = train("plain", *flags, *TILES)
    said = "guidance's two samples are denoised one after the other"
    assert said not in caplog.text
    single = train_by_single_samples(train, monkeypatch, *flags)
    for level in LEVELS:
        in_small_pieces = level in HOST_LEVELS
        more = OFFLOAD if in_small_pieces else TILES
        out = train(level, *flags, "--memory", level, *more)
        assert sampled(out) == {0: ["0_0"], 1: ["0_0"], 2: ["0_0"]}
        same = single if in_small_pieces else plain
        assert [video_bytes(out, step) == video_bytes(same, step) for step in (0, 1, 2)] == [True] * 3
        assert result_hash(out) == result_hash(plain)
        assert (f"at --memory {level} {said}" in caplog.text) == in_small_pieces
        assert vaes[-1].use_tiling == vaes[-1].use_slicing == (not in_small_pieces)  # as before


def test_accelerates_hooks_leave_streamed_weights_in_host_memory(tiny):
    transformer = load_transformer(tiny("5b"), torch.float32)
    stream_weights(transformer.transformer_blocks, CPU)
    streamed = [tensor for block in transformer.transformer_blocks for *_, tensor in streamed_tensors(block)]
    before = [(tensor.data_ptr(), tensor.clone()) for tensor in streamed]
    transformer, hook = cpu_offload_with_hook(transformer, "meta")  # what no weight comes back from
    transformer._hf_hook.pre_forward(transformer)
    assert transformer.proj_out.weight.device.type == "meta"
    for tensor, (address, value) in zip(streamed, before, strict=True):
        assert tensor.data_ptr() == address and torch.equal(tensor, value)


# ---------------------------------------------------------------- adapters, optimizers, checkpoints


@pytest.fixture
def train_lora(tiny, prepared_data, tmp_path):
    """(name, flags) -> the LoRA file's tensors of the text-to-video script; two buckets, accumulation 2."""
    module = importlib.import_module("cogvideox_text_to_video_lora")

    def run(name, *flags, steps=3):
        argv = ["--pretrained_model_name_or_path", str(tiny("5b")), "--data_root", str(prepared_data)]
        argv += ["--load_tensors", "--output_dir", str(tmp_path / name), "--seed", "0", "--rank", "32"]
        argv += ["--lora_alpha", "32", "--train_batch_size", "1", "--gradient_accumulation_steps", "2"]
        argv += ["--lr_warmup_steps", "0", "--max_train_steps", str(steps), "--mixed_precision", "bf16", *flags]
        if "--learning_rate" not in flags:
            argv += ["--learning_rate", "1e-2"]
        module.main(parse_training_args("t2v_lora", argv))
        return load_file(tmp_path / name / "pytorch_lora_weights.safetensors")

    return run


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [name for name, tensor in theirs.items() if not torch.equal(ours[name], tensor)] == []


@pytest.fixture
def eager():
    """torchao compiles its step, 20 s a kind of state on a CPU; the arithmetic is the same without."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


OPTIMIZERS = {
    "adamw": "",
    "bitsandbytes": "--use_8bit",
    "torchao 8": "--use_8bit --use_torchao",
    "torchao 4": "--use_4bit",
    "torchao fp8": "--use_fp8",
    "host": "--use_cpu_offload_optimizer",
    "host, gradients too": "--use_cpu_offload_optimizer --offload_gradients",
    "prodigy": "--optimizer prodigy --learning_rate 1",
    "came": "--optimizer came",
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_the_same_at_every_level(name, train_lora, eager):
    """At rank 32 the adapters have 4,096 weights each, the least that is kept in few bits."""
    flags = OPTIMIZERS[name].split()
    flags = flags if "--optimizer" in flags else ["--optimizer", "adamw", *flags]
    plain = train_lora("plain", *flags)
    assert any(tensor.abs().max() > 0 for key, tensor in plain.items() if "lora_B" in key)
    for level in LEVELS:
        assert_equal(train_lora(level, *flags, "--memory", level), plain)


ADAPTERS = {
    "dora": "--use_dora",
    "rslora": "--use_rslora",
    "orthogonal": "--lora_init orthogonal",
    "more layers": "--lora_target_modules to_q to_out.0 ff.net.0.proj ff.net.2",
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_adapter_trains_the_same_with_streamed_weights_and_resumes(name, train_lora, tmp_path):
    flags = ADAPTERS[name].split()
    plain = train_lora("plain", *flags)
    streamed = [*flags, "--memory", "stream", "--checkpointing_steps", "2"]
    assert_equal(train_lora("stream", *streamed), plain)
    resume = ["--resume_from_checkpoint", str(tmp_path / "stream" / "checkpoint-2")]
    assert_equal(train_lora("resumed", *streamed, *resume), plain)


def test_a_lora_goes_on_from_another_with_streamed_weights(train_lora, tmp_path):
    train_lora("first")
    flags = ["--init_lora", str(tmp_path / "first")]
    assert_equal(train_lora("stream", *flags, "--memory", "stream"), train_lora("plain", *flags))


# ---------------------------------------------------------------- reports


def test_peaks_on_a_gpu_are_those_since_the_last_report(monkeypatch):
    said = []

    class Meter:
        accelerator = type("Accelerator", (), {"device": torch.device("cuda")})

        def write_event(self, step, event, **values):
            said.append(values["peak"])

    peaks = [5.0]
    monkeypatch.setattr(metrics, "memory_report", lambda device: {"peak": peaks[-1]})
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peaks.append(1.0))
    for when in ("before_training", "before_validation"):
        metrics.report_memory(Meter(), 0, when)
    assert said == [5.0, 1.0]
