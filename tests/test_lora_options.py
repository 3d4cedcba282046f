"""Target modules, DoRA, rsLoRA, ways to start: all of it trains, and loads by plain diffusers calls with difference 0."""

import importlib
import json
import re
import shutil

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from args import parse_training_args
from base.errors import UsageError
from cogvideox.config import TEXT_TO_VIDEO_PIPELINE
from cogvideox.loading import load_transformer
from engine.lora import ADAPTER, add_lora, check_saved_lora, load_lora, save_lora, start_from_lora
from engine.lora_file import WEIGHTS_NAME
from random_dataset import write_dataset
from test_lora import example_inputs


EVERYWHERE = [
    "to_q", "to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear", "norm_out.linear", "proj_out", "text_proj",
    "time_embedding.linear_1",
]  # fmt: skip
OPTIONS = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "gaussian": {"init": "gaussian"},
    "orthogonal": {"init": "orthogonal"},
    "modules": {"target_modules": ["ff.net.0.proj", "norm1.linear"]},
    "all": {"use_dora": True, "use_rslora": True, "init": "orthogonal", "target_modules": EVERYWHERE},
}


def make(model_dir, dtype=torch.float32, trained=True, rank=4, alpha=8, seed=0, **options):
    """(transformer, its trainable weights), as if trained: every one of them is moved."""
    transformer = load_transformer(model_dir, dtype).eval()
    params = add_lora(transformer, rank, alpha, seed, **options)
    if trained:
        generator = torch.Generator().manual_seed(1)
        for param in params:
            param.data += torch.randn(param.shape, generator=generator) * 0.05
    return transformer, params


def loaded_output(model_dir, lora_dir, inputs, dtype):
    pipe = TEXT_TO_VIDEO_PIPELINE.from_pretrained(model_dir, dtype=dtype)
    pipe.load_lora_weights(lora_dir)
    return pipe.transformer(**inputs)[0]


# ---------------------------------------------------------------- what is saved is what was trained


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_plain_load_gives_the_trained_model_exactly(options, dtype, tiny, tmp_path):
    transformer, _ = make(tiny("5b"), dtype, **options)
    inputs = example_inputs(transformer, dtype)
    trained = transformer(**inputs)[0]
    save_lora(transformer, tmp_path, TEXT_TO_VIDEO_PIPELINE)
    check_saved_lora(transformer, tmp_path)
    assert torch.equal(loaded_output(tiny("5b"), tmp_path, inputs, dtype), trained)
    transformer.disable_adapters()
    assert (transformer(**inputs)[0] - trained).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_fresh_adapter_leaves_the_model_unchanged(options, dtype, tiny):
    transformer, _ = make(tiny("5b"), dtype, trained=False, **options)
    inputs = example_inputs(transformer, dtype)
    fresh = transformer(**inputs)[0]
    transformer.disable_adapters()
    base = transformer(**inputs)[0]
    if options.get("init") == "orthogonal":  # B A is zero but for rounding
        torch.testing.assert_close(fresh, base, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.2)
    else:
        assert torch.equal(fresh, base)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_all_that_is_trained_is_fp32_and_gets_a_gradient(options, tiny):
    transformer, params = make(tiny("5b"), torch.bfloat16, **options)
    output = transformer(**example_inputs(transformer, torch.bfloat16))[0]
    assert output.dtype == torch.bfloat16
    output.float().square().mean().backward()
    assert all(param.dtype == torch.float32 and param.grad.dtype == torch.float32 for param in params)
    without = {name for name, param in transformer.named_parameters() if param.requires_grad and not param.grad.any()}
    assert all("lora_magnitude" not in name for name in without)
    parts = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if options.get("use_dora") else set())
    trainable = [name for name, param in transformer.named_parameters() if param.requires_grad]
    assert {part for name in trainable for part in name.split(".") if part.startswith("lora_")} == parts


def test_dora_computes_what_peft_computes(tiny):
    """Outputs and gradients in fp32, where casting to the compute dtype changes nothing."""
    ours, params = make(tiny("5b"), use_dora=True, use_rslora=True)
    theirs = load_transformer(tiny("5b"), torch.float32).eval()
    theirs.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"],
                                  use_dora=True, use_rslora=True), adapter_name=ADAPTER)  # fmt: skip
    reference = [param for param in theirs.parameters() if param.requires_grad]
    for param, copy in zip(params, reference, strict=True):
        copy.data.copy_(param.data)
    outputs = [model(**example_inputs(model))[0] for model in (ours, theirs)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().mean().backward()
    for param, copy in zip(params, reference, strict=True):
        torch.testing.assert_close(param.grad, copy.grad, rtol=1e-5, atol=1e-9)


def test_the_check_finds_a_magnitude_that_was_not_saved(tiny, tmp_path):
    transformer, params = make(tiny("2b"), use_dora=True)
    path = save_lora(transformer, tmp_path, TEXT_TO_VIDEO_PIPELINE)
    next(param for param in params if param.ndim == 1).data[0] += 1e-3
    with pytest.raises(RuntimeError, match="differs after saving"):
        check_saved_lora(transformer, tmp_path)
    tensors = load_file(path)
    save_file({key: tensor for key, tensor in tensors.items() if "magnitude" not in key}, path)
    with pytest.raises(RuntimeError, match="after saving"):
        check_saved_lora(transformer, tmp_path)


@pytest.mark.parametrize("options", [OPTIONS["all"], {}], ids=["all", "plain"])
def test_a_saved_adapter_is_restored_bit_for_bit(options, tiny, tmp_path):
    transformer, params = make(tiny("2b"), **options)
    save_lora(transformer, tmp_path, TEXT_TO_VIDEO_PIPELINE)
    fresh, fresh_params = make(tiny("2b"), seed=7, **options)
    load_lora(fresh, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(fresh_params, params, strict=True))


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (
            "to_z",
            "--lora_target_modules to_z: no layer is called so; the linear layers are .*attn1.to_q, .*ff.net.0.proj",
        ),
        ("q", "no layer is called so"),
        ("norm1", "norm1 is a CogVideoXLayerNormZero; the linear layers are"),
        ("proj", "patch_embed.proj is a Conv2d"),
        ("all-linear", "no layer is called so"),
    ],
)
def test_target_modules_that_are_no_linear_layers_are_refused(name, line, tiny):
    transformer = load_transformer(tiny("5b"), torch.float32)
    with pytest.raises(UsageError, match=line) as error:
        add_lora(transformer, 4, 4, 0, target_modules=["to_q", name])
    assert "\n" not in str(error.value)
    assert not hasattr(transformer, "peft_config")


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            "--lora_init pissa",
            "changes the base weights too, and diffusers would load .* one of default, gaussian, orth",
        ),
        ("--lora_init pissa_niter_16", "changes the base weights"),
        ("--lora_init olora", "changes the base weights"),
        ("--lora_init corda", "changes the base weights"),
        ("--lora_init loftq", "changes the base weights"),
        ("--lora_init eva", "needs the layers' inputs"),
        ("--lora_init kaiming", "--lora_init kaiming: must be one of default, gaussian, orthogonal"),
        ("--lora_init orthogonal --rank 5", "needs an even rank"),
        ("--lora_init gaussian --init_lora x.safetensors", "give one of them"),
    ],
)
def test_ways_to_start_that_do_not_load_back_are_refused_at_once(flags, line, capsys):
    argv = ["--pretrained_model_name_or_path", "m", "--data_root", "d", *flags.split()]
    with pytest.raises(SystemExit) as ended:
        parse_training_args("t2v_lora", argv)
    assert ended.value.code == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert re.search(line, error)


# ---------------------------------------------------------------- --init_lora


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("as_folder", [True, False])
def test_a_new_run_starts_from_a_trained_lora(options, as_folder, tiny, tmp_path):
    _, params = trained = make(tiny("2b"), **options)
    path = save_lora(trained[0], tmp_path, TEXT_TO_VIDEO_PIPELINE)
    fresh, fresh_params = make(tiny("2b"), trained=False, seed=3, **options)
    start_from_lora(fresh, tmp_path if as_folder else path)
    assert all(torch.equal(a, b) and a.requires_grad for a, b in zip(fresh_params, params, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_of_other_trainers_have_no_metadata(dtype, tiny, tmp_path):
    """Then alpha is the rank, as diffusers takes it; half precision is common."""
    path = tmp_path / "other.safetensors"
    trained, params = make(tiny("2b"), rank=4, alpha=4)
    save_lora(trained, tmp_path, TEXT_TO_VIDEO_PIPELINE)
    save_file({key: tensor.to(dtype) for key, tensor in load_file(tmp_path / WEIGHTS_NAME).items()}, path)
    fresh, fresh_params = make(tiny("2b"), trained=False, rank=4, alpha=4)
    start_from_lora(fresh, path)
    assert all(torch.equal(a, b.to(dtype).float()) for a, b in zip(fresh_params, params, strict=True))
    assert {param.dtype for param in fresh_params} == {torch.float32}
    with pytest.raises(UsageError, match=r"give --lora_alpha 4 \(not 8\)$"):
        start_from_lora(make(tiny("2b"), trained=False, rank=4, alpha=8)[0], path)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"rank": 8}, r"flags; give --rank 4 \(not 8\)$"),
        ({"alpha": 1}, r"flags; give --lora_alpha 8 \(not 1\)$"),
        ({"use_dora": True, "rank": 2}, r"give --rank 4 \(not 2\), leave out --use_dora$"),
        ({"use_rslora": True}, r"leave out --use_rslora$"),
        ({"target_modules": ["to_q", "to_k"]}, r"give --lora_target_modules to_k to_out.0 to_q to_v$"),
    ],
)
def test_a_lora_of_other_flags_is_refused_with_the_flags_to_give(options, line, tiny, tmp_path):
    path = save_lora(make(tiny("2b"))[0], tmp_path, TEXT_TO_VIDEO_PIPELINE)
    with pytest.raises(UsageError, match=line) as error:
        start_from_lora(make(tiny("2b"), trained=False, **options)[0], path)
    assert str(error.value).startswith(f"{path}: --init_lora")


def test_dora_and_rslora_files_name_their_flags(tiny, tmp_path):
    save_lora(make(tiny("2b"), use_dora=True, use_rslora=True)[0], tmp_path, TEXT_TO_VIDEO_PIPELINE)
    with pytest.raises(UsageError, match="give --use_dora, give --use_rslora$"):
        start_from_lora(make(tiny("2b"), trained=False)[0], tmp_path)


def test_files_that_are_no_such_lora_are_refused(tiny, tmp_path):
    fresh, _ = make(tiny("2b"), trained=False, rank=4, alpha=4)
    with pytest.raises(UsageError, match="missing.*: not readable as a LoRA file"):
        start_from_lora(fresh, tmp_path / "missing.safetensors")
    (tmp_path / "text.safetensors").write_text("not a LoRA")
    with pytest.raises(UsageError, match="not readable as a LoRA file"):
        start_from_lora(fresh, tmp_path / "text.safetensors")
    save_file({"transformer.x.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="one rank"):
        start_from_lora(fresh, tmp_path / "model.safetensors")
    save_lora(make(tiny("1.5-5b"), rank=4, alpha=4)[0], tmp_path, TEXT_TO_VIDEO_PIPELINE)
    with pytest.raises(UsageError, match="does not fit this model"):
        start_from_lora(fresh, tmp_path)


# ---------------------------------------------------------------- from end to end


@pytest.fixture
def train(tiny, tmp_path):
    """Run the text-to-video LoRA script on random latents; returns its output folder."""
    write_dataset(tmp_path / "data", num_clips=4, frames=9, height=32, width=48, text_shape=(16, 32))

    def run(name, *flags, steps=3):
        argv = ["--pretrained_model_name_or_path", tiny("5b"), "--data_root", tmp_path / "data", "--load_tensors"]
        argv += ["--output_dir", tmp_path / name, "--train_batch_size", 1, "--max_train_steps", steps, "--seed", 0]
        argv += ["--rank", 4, "--lora_alpha", 8, "--learning_rate", 1e-3, "--lr_warmup_steps", 0, *flags]
        module = importlib.import_module("cogvideox_text_to_video_lora")
        module.main(parse_training_args("t2v_lora", list(map(str, argv))))
        return tmp_path / name

    return run


def losses(out):
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]  # others are events


def weights_equal(first, second):
    ours, theirs = load_file(first / WEIGHTS_NAME), load_file(second / WEIGHTS_NAME)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


KIND_FLAGS = ["--use_dora", "--use_rslora", "--lora_target_modules", "to_q", "ff.net.0.proj"]
ALL_FLAGS = [*KIND_FLAGS, "--lora_init", "orthogonal"]


def test_host_masters_and_a_resume_change_nothing(train, tmp_path):
    """Weights, losses: without masters, with them in host memory, and interrupted in between."""
    reference = train("device", *ALL_FLAGS, "--optimizer", "adamw")
    for name, more in (("host", []), ("gradients", ["--offload_gradients"])):
        flags = [*ALL_FLAGS, "--optimizer", "adamw", "--use_cpu_offload_optimizer", *more]
        out = train(name, *flags)
        assert losses(out) == losses(reference) and weights_equal(out, reference)
        train(f"{name}-resumed", *flags, "--checkpointing_steps", "1", steps=1)
        assert weights_equal(train(f"{name}-resumed", *flags, "--checkpointing_steps", "2"), reference)


def test_a_run_goes_on_from_another_runs_lora(train, tmp_path):
    first = train("first", *ALL_FLAGS)
    flags = [*KIND_FLAGS, "--init_lora", first]
    second = train("second", *flags, "--checkpointing_steps", "2", steps=2)
    assert not weights_equal(first, second)
    # Its fresh start would have shown the losses of `first` again: the draws are the same
    assert losses(second)[0] != losses(first)[0]
    with pytest.raises(UsageError, match="give --use_dora$"):
        train("third", *flags[1:])
    # A checkpoint goes on without the file
    shutil.rmtree(first)
    assert len(losses(train("second", *flags, "--checkpointing_steps", "2"))) == 3
