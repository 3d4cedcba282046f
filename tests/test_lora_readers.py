"""The LoRA's file in the hands of others: every reader takes it at its trained strength, and theirs start a run here."""

import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections import defaultdict

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from args import parse_training_args
from base.errors import UsageError
from base.files import write_manifest
from base.manifest import find_damage
from cogvideox.config import IMAGE_TO_VIDEO_PIPELINE, TEXT_TO_VIDEO_PIPELINE
from cogvideox.loading import load_transformer
from engine.engines import LoraEngine
from engine.lora import ADAPTER, UNSCALED_NAME, check_saved_lora, load_lora, save_lora, save_unscaled, start_from_lora
from engine.lora_file import METADATA_KEY, WEIGHTS_NAME, kohya_module
from engine.optimizers import state_bytes_from_args
from run.export import export_comfyui, export_kohya
from run.result import file_bytes
from test_lora import example_inputs
from test_lora_options import EVERYWHERE, losses, make, train, weights_equal  # noqa: F401
from tiny_pipeline import KINDS, is_image_to_video


# Scalings of 1/4, 2, 4/3, 5/sqrt(8) and 3/4: powers of two, and others
SCALED = {
    "quarter": {"rank": 4, "alpha": 1},
    "double": {"rank": 4, "alpha": 8, "target_modules": EVERYWHERE},
    "third": {"rank": 6, "alpha": 8},
    "rslora": {"rank": 8, "alpha": 5, "use_rslora": True},
    "dora": {"rank": 4, "alpha": 3, "use_dora": True},
    "all": {"rank": 8, "alpha": 5, "use_rslora": True, "use_dora": True, "target_modules": EVERYWHERE},
}
scaled_loras = pytest.mark.parametrize("options", SCALED.values(), ids=SCALED)
KNOWN_SETTINGS = {
    "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout", "bias",
}  # fmt: skip


@torch.no_grad()
def output(transformer):
    return transformer(**example_inputs(transformer))[0]


def difference(ours, theirs):
    """Norm of the difference, as a share of the norm."""
    return ((ours - theirs).norm() / theirs.norm()).item()


def header(path):
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    return metadata | {METADATA_KEY: json.loads(metadata.get(METADATA_KEY, "{}"))}


def saved(transformer, folder):
    return save_lora(transformer, folder, TEXT_TO_VIDEO_PIPELINE)


def loaded(model_dir, lora):
    """A pipeline's transformer with a LoRA, which is a folder or, for a reader that sees no metadata, its tensors."""
    pipe = TEXT_TO_VIDEO_PIPELINE.from_pretrained(model_dir, dtype=torch.float32)
    pipe.load_lora_weights(lora)
    return pipe.transformer


def save_with_alpha(transformer, folder):
    """The file as it was written earlier: weights as trained, and the whole configuration of peft in the metadata."""
    config = transformer.peft_config[ADAPTER].to_dict()
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    TEXT_TO_VIDEO_PIPELINE.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(transformer, adapter_name=ADAPTER),
        transformer_lora_adapter_metadata={key: getattr(value, "value", value) for key, value in config.items()},
    )
    return folder / WEIGHTS_NAME


# ---------------------------------------------------------------- the file


@scaled_loras
def test_b_holds_the_scaling_and_the_metadata_what_every_peft_knows(options, tiny, tmp_path):
    transformer, _ = make(tiny("5b"), **options)
    path = saved(transformer, tmp_path)
    metadata = header(path)
    settings = {key.removeprefix("transformer."): value for key, value in metadata[METADATA_KEY].items()}
    assert settings.keys() == KNOWN_SETTINGS
    assert settings["r"] == settings["lora_alpha"] == options["rank"] and not settings["use_rslora"]
    assert settings["use_dora"] == bool(options.get("use_dora"))
    assert metadata.keys() == {"format", METADATA_KEY, "training"}
    recorded = {"lora_alpha": options["alpha"], "use_rslora": bool(options.get("use_rslora"))}
    assert json.loads(metadata["training"]) == recorded

    tensors, layer = load_file(path), transformer.transformer_blocks[1].attn1.to_out[0]
    name = "transformer.transformer_blocks.1.attn1.to_out.0.lora"
    exact = layer.lora_B[ADAPTER].weight.double() * layer.scaling[ADAPTER]
    assert torch.equal(tensors[f"{name}_A.weight"], layer.lora_A[ADAPTER].weight)
    if math.frexp(layer.scaling[ADAPTER])[0] == 0.5:
        assert torch.equal(tensors[f"{name}_B.weight"].double(), exact)
    else:
        assert 0 < difference(tensors[f"{name}_B.weight"], exact) < 5e-8


@scaled_loras
def test_readers_with_and_without_metadata_render_what_was_trained(options, tiny, tmp_path):
    transformer, _ = make(tiny("5b"), **options)
    path = saved(transformer, tmp_path)
    check_saved_lora(transformer, tmp_path)
    trained, bare = output(transformer), load_file(path)
    assert difference(output(loaded(tiny("5b"), tmp_path)), trained) < 1e-6
    assert difference(output(loaded(tiny("5b"), bare)), trained) < 1e-6
    transformer.disable_adapters()
    assert difference(output(transformer), trained) > 1e-3


def test_the_check_finds_a_file_of_another_strength(tiny, tmp_path):
    transformer, _ = make(tiny("2b"), rank=4, alpha=8)
    save_with_alpha(transformer, tmp_path)
    with pytest.raises(RuntimeError, match="scaled differently after saving"):
        check_saved_lora(transformer, tmp_path)
    path = saved(transformer, tmp_path)
    tensors = {key: tensor / 2 if "lora_B" in key else tensor for key, tensor in load_file(path).items()}
    save_file(tensors, path)
    with pytest.raises(RuntimeError, match="differs after saving"):
        check_saved_lora(transformer, tmp_path)


# ---------------------------------------------------------------- checkpoints


@scaled_loras
def test_what_a_checkpoint_holds_is_the_trained_adapter_bit_for_bit(options, tiny, tmp_path):
    transformer, params = make(tiny("2b"), **options)
    saved(transformer, tmp_path)
    save_unscaled(transformer, tmp_path)
    fresh, fresh_params = make(tiny("2b"), seed=7, **options)
    load_lora(fresh, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(fresh_params, params, strict=True))
    is_power_of_two = math.frexp(transformer.transformer_blocks[0].attn1.to_q.scaling[ADAPTER])[0] == 0.5
    assert (tmp_path / UNSCALED_NAME).exists() != is_power_of_two


@pytest.mark.parametrize(("alpha", "value"), [(1, 1e-45), (8, 3e38)])
def test_numbers_at_the_ends_of_the_range_survive_too(alpha, value, tiny, tmp_path):
    """A quarter of the least fp32 number is 0, twice the largest infinite."""
    transformer, _ = make(tiny("2b"), rank=4, alpha=alpha)
    weight = transformer.transformer_blocks[0].attn1.to_q.lora_B[ADAPTER].weight
    weight.data[0, 0] = value
    saved(transformer, tmp_path)
    save_unscaled(transformer, tmp_path)
    fresh, _ = make(tiny("2b"), seed=7, rank=4, alpha=alpha)
    load_lora(fresh, tmp_path)
    assert torch.equal(fresh.transformer_blocks[0].attn1.to_q.lora_B[ADAPTER].weight, weight)


@scaled_loras
def test_a_file_with_alpha_in_it_is_restored_bit_for_bit(options, tiny, tmp_path):
    transformer, params = make(tiny("2b"), **options)
    save_with_alpha(transformer, tmp_path)
    fresh, fresh_params = make(tiny("2b"), seed=7, **options)
    load_lora(fresh, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(fresh_params, params, strict=True))


@pytest.mark.parametrize("flags", [["--lora_alpha", 3], ["--rank", 6, "--use_rslora", "--use_dora"]], ids=str)
def test_a_run_goes_on_from_both_kinds_of_checkpoint(flags, train, tiny, tmp_path):  # noqa: F811
    """With a scaling that is no power of two; also where a checkpoint holds weights as trained, with their alpha."""
    flags = [*flags, "--optimizer", "adamw"]
    unbroken = train("unbroken", *flags)
    for name in ("new", "old"):
        out = train(name, *flags, "--checkpointing_steps", 1, steps=1)
        checkpoint = out / "checkpoint-1"
        options = json.loads((out / "args.json").read_text())["flags"]
        options = {key: options[key] for key in ("rank", "use_rslora", "use_dora")} | {"alpha": options["lora_alpha"]}
        transformer, _ = make(tiny("5b"), trained=False, **options)
        load_lora(transformer, checkpoint)
        assert difference(output(loaded(tiny("5b"), checkpoint)), output(transformer)) < 1e-6
        unscaled = checkpoint / UNSCALED_NAME
        content = unscaled.read_bytes()
        unscaled.unlink()
        assert find_damage(checkpoint) == f"{UNSCALED_NAME} is missing"
        if name == "new":
            unscaled.write_bytes(content)
        else:
            save_with_alpha(transformer, checkpoint)
            (checkpoint / "manifest.json").unlink()
            write_manifest(checkpoint)
        assert find_damage(checkpoint) is None
        out = train(name, *flags, "--checkpointing_steps", 2)
        assert losses(out) == losses(unbroken) and weights_equal(out, unbroken)


@pytest.mark.parametrize("flags", [[], ["--lora_alpha", "3"], ["--lora_alpha", "4", "--use_rslora"]], ids=str)
def test_the_disk_is_asked_for_all_that_a_checkpoint_takes(flags, tiny, tmp_path):
    argv = ["--pretrained_model_name_or_path", "m", "--data_root", "d", "--rank", "4", "--lora_alpha", "4", *flags]
    args = parse_training_args("t2v_lora", argv)
    transformer, params = make(tiny("2b"), rank=4, alpha=args.lora_alpha, use_rslora=args.use_rslora)
    engine = LoraEngine(transformer, params, {}, None, TEXT_TO_VIDEO_PIPELINE)
    engine.save_state(tmp_path)
    written = sum(tensor.nbytes for path in tmp_path.iterdir() for tensor in load_file(path).values())
    checkpoint, result = file_bytes(args, engine)
    states = sum(param.numel() for param in params) * state_bytes_from_args(args)
    assert result <= written <= checkpoint - states <= 2 * result


# ---------------------------------------------------------------- --init_lora


def as_peft(transformer, model_dir, folder, with_config=True):
    """peft's own layout: save_pretrained of a model that carries the adapter."""
    config = transformer.peft_config[ADAPTER]
    names = ("r", "lora_alpha", "use_rslora", "use_dora", "target_modules")
    model = get_peft_model(
        load_transformer(model_dir, torch.float32), LoraConfig(**{name: getattr(config, name) for name in names})
    )
    params = dict(transformer.named_parameters())
    for name, param in model.base_model.model.named_parameters():
        if ".lora_" in name:
            param.data.copy_(params[name].data)
    model.save_pretrained(folder)
    if not with_config:
        (folder / "adapter_config.json").unlink()
    return folder


def in_layout(layout, transformer, model_dir, folder):
    """What --init_lora is given: the trained adapter as others write it."""
    if layout == "peft":
        return as_peft(transformer, model_dir, folder)
    if layout == "alpha in the metadata":
        return save_with_alpha(transformer, folder)
    path = saved(transformer, folder)
    if layout in ("kohya", "comfyui"):
        {"kohya": export_kohya, "comfyui": export_comfyui}[layout](path, folder / "export.safetensors")
        return folder / "export.safetensors"
    return path


@pytest.mark.parametrize("layout", ["ours", "alpha in the metadata", "peft", "kohya", "comfyui"])
@scaled_loras
def test_a_run_starts_with_the_effect_of_the_file(options, layout, tiny, tmp_path):
    if options.get("use_dora") and layout in ("kohya", "comfyui"):
        pytest.skip("these layouts cannot hold DoRA")
    transformer, _ = make(tiny("5b"), **options)
    given = in_layout(layout, transformer, tiny("5b"), tmp_path / "lora")
    fresh, params = make(tiny("5b"), trained=False, seed=3, **options)
    start_from_lora(fresh, given)
    assert difference(output(fresh), output(transformer)) < 1e-6
    assert {param.dtype for param in params} == {torch.float32}
    other, _ = make(tiny("5b"), trained=False, **(options | {"alpha": 16}))
    with pytest.raises(UsageError, match=rf"flags; give --lora_alpha {options['alpha']} \(not 16\)$"):
        start_from_lora(other, given)


def with_kohya_alpha(transformer, alpha, dtype=torch.float32, prefix="lora_unet__"):
    """A file of another trainer: weights as trained, the strength in `.alpha`."""
    tensors = {}
    for name, module in transformer.named_modules():
        if hasattr(module, "lora_A"):
            layer = prefix + name.replace(".", "_")
            tensors[f"{layer}.lora_down.weight"] = module.lora_A[ADAPTER].weight.detach().to(dtype)
            tensors[f"{layer}.lora_up.weight"] = module.lora_B[ADAPTER].weight.detach().to(dtype)
            tensors[f"{layer}.alpha"] = torch.tensor(float(alpha), dtype=dtype)
    return tensors


@pytest.mark.parametrize("prefix", ["lora_unet__", "lora_unet_", "lora_transformer_"])
@pytest.mark.parametrize("alpha", [2, 8])
def test_alpha_tensors_of_other_trainers_count(alpha, prefix, tiny, tmp_path):
    transformer, _ = make(tiny("2b"), rank=4, alpha=alpha, target_modules=EVERYWHERE[:-1])
    path = tmp_path / "kohya.safetensors"
    save_file(with_kohya_alpha(transformer, alpha, prefix=prefix), path)
    fresh, _ = make(tiny("2b"), trained=False, rank=4, alpha=alpha, target_modules=EVERYWHERE[:-1])
    start_from_lora(fresh, path)
    assert torch.equal(output(fresh), output(transformer))
    with pytest.raises(UsageError, match=rf"give --lora_alpha {alpha} \(not 4\)$"):
        start_from_lora(make(tiny("2b"), trained=False, rank=4, alpha=4, target_modules=EVERYWHERE[:-1])[0], path)


@pytest.mark.parametrize("options", [{"alpha": 4}, {"alpha": 16}, {"alpha": 4, "use_rslora": True}], ids=str)
def test_an_alpha_that_no_flag_names_is_kept_in_effect(options, tiny, tmp_path):
    transformer, _ = make(tiny("2b"), rank=4, alpha=2.5)
    save_file(with_kohya_alpha(transformer, 2.5), tmp_path / "kohya.safetensors")
    fresh, _ = make(tiny("2b"), trained=False, rank=4, **options)
    start_from_lora(fresh, tmp_path / "kohya.safetensors")
    assert difference(output(fresh), output(transformer)) < 1e-6


def test_keys_of_peft_without_its_configuration_have_alpha_as_their_rank(tiny, tmp_path):
    transformer, _ = make(tiny("2b"), rank=4, alpha=4)
    folder = as_peft(transformer, tiny("2b"), tmp_path, with_config=False)
    fresh, _ = make(tiny("2b"), trained=False, rank=4, alpha=4)
    start_from_lora(fresh, folder)
    assert torch.equal(output(fresh), output(transformer))


def test_peft_reads_its_layout_as_we_do(tiny, tmp_path):
    """What the test above is compared with is peft's own model."""
    transformer, _ = make(tiny("2b"), **SCALED["all"])
    folder = as_peft(transformer, tiny("2b"), tmp_path)
    model = PeftModel.from_pretrained(load_transformer(tiny("2b"), torch.float32), folder).eval()
    assert difference(output(model.base_model.model), output(transformer)) < 1e-6


@pytest.mark.parametrize(
    "metadata",
    [
        {METADATA_KEY: "[1]"},
        {METADATA_KEY: "{"},
        {METADATA_KEY: json.dumps({"transformer.lora_alpha": "8"})},
        {METADATA_KEY: json.dumps({"transformer.lora_alpha": None})},
        {METADATA_KEY: json.dumps({"transformer.lora_alpha": math.nan})},
        {"training": "yes"},
        {"training": json.dumps({"lora_alpha": [8]})},
    ],
    ids=str,
)
def test_metadata_that_is_none_is_refused_in_one_line(metadata, tiny, tmp_path):
    transformer, _ = make(tiny("2b"), rank=4, alpha=8)
    path = saved(transformer, tmp_path)
    save_file(load_file(path), path, metadata)
    with pytest.raises(UsageError, match="not readable as a LoRA file") as error:
        start_from_lora(make(tiny("2b"), trained=False, rank=4, alpha=8)[0], path)
    assert "\n" not in str(error.value)


def test_files_that_mix_strengths_or_fit_another_model_are_refused_in_one_line(tiny, tmp_path):
    transformer, _ = make(tiny("2b"), rank=4, alpha=4)
    fresh, _ = make(tiny("2b"), trained=False, rank=4, alpha=4)
    path = tmp_path / "other.safetensors"
    tensors = with_kohya_alpha(transformer, 4)
    name = kohya_module("transformer_blocks.0.attn1.to_q")
    for changed, line in (
        ({f"{name}.alpha": torch.tensor(8.0)}, "one rank and one alpha"),
        ({f"{name}.lora_down.weight": torch.ones(2, 128)}, "one rank and one alpha"),
        ({f"{name}.alpha": torch.ones(2)}, "not readable as a LoRA file"),
        ({f"{name}.dora_scale": torch.ones(128, 1)}, f"1 keys differ, e.g. {name}.dora_scale"),
        (
            {f"{kohya_module('transformer_blocks.7.attn1.to_q')}.lora_down.weight": torch.ones(4, 128)},
            "has no layer lora_unet__transformer_blocks_7_attn1_to_q",
        ),
    ):
        save_file(tensors | changed, path)
        with pytest.raises(UsageError, match=re.escape(line)) as error:
            start_from_lora(fresh, path)
        assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_a_run_starts_from_any_file_of_another(train):  # noqa: F811
    """Through the script: the first loss is that of the run that goes on from the result itself."""
    flags = ["--lora_alpha", 3]
    first = train("first", *flags, "--export", "kohya", "comfyui")
    expected, *others = (
        losses(train(f"from-{path.name}", *flags, "--init_lora", path, steps=1))[0]
        for path in (first, *sorted(first.glob("pytorch_lora_weights_*")), first / WEIGHTS_NAME)
    )
    assert len(others) == 3 and others == pytest.approx([expected] * 3, rel=1e-6)
    assert abs(expected - losses(first)[0]) > 1e-3


# ---------------------------------------------------------------- kohya's layout, as its readers walk it


def child(module, name):
    """The child of that name, None without: nn.Module's own look-up, which knows no other attributes."""
    return module._modules.get(name)


def walk_piece_by_piece(transformer, layer):
    """kijai's wrapper and earlier VideoX-Fun: pieces between underscores are joined until a child has that name."""
    module, name = transformer, ""
    for piece in layer.split("lora_unet_")[-1].split("_"):
        name = f"{name}_{piece}" if name else piece
        if child(module, name) is not None:
            module, name = child(module, name), ""
    assert not name, f"{layer}: {name} is left over"
    return module


def walk_all_the_rest_first(transformer, layer):
    """VideoX-Fun: at every step all that is left is tried as one name, then the pieces so far."""
    pieces = layer.split("lora_unet_")[-1].split("_")
    module = child(transformer, "_".join(pieces[1:]))
    if module is not None:
        return module
    module, name = transformer, pieces.pop(0)
    while True:
        whole = child(module, f"{name}_{'_'.join(pieces)}")
        if whole is not None:
            return whole
        if child(module, name) is not None:
            module = child(module, name)
            if not pieces:
                return module
            name = pieces.pop(0)
        else:
            name = f"{name}_{pieces.pop(0)}" if name else pieces.pop(0)


def merge_as_videox_fun_does(transformer, path, walk):
    layers = defaultdict(dict)
    for key, tensor in load_file(path).items():
        layer, part = key.split(".", 1)
        layers[layer][part] = tensor
    for layer, parts in layers.items():
        up, down = parts["lora_up.weight"], parts["lora_down.weight"]
        scale = parts["alpha"].item() / up.shape[1] if "alpha" in parts else 1.0
        walk(transformer, layer).weight.data += scale * torch.mm(up, down)
    return transformer


WALKS = [walk_piece_by_piece, walk_all_the_rest_first]


@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_layer_is_found_by_its_name(kind, walk, tiny):
    transformer = load_transformer(tiny(kind), torch.float32)
    linear = {name: module for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)}
    assert len(linear) > 15
    assert all(walk(transformer, kohya_module(name)) is module for name, module in linear.items())


@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("options", [SCALED[name] for name in ("double", "third", "rslora")], ids=str)
def test_the_kohya_export_merged_as_its_readers_do_is_what_was_trained(options, walk, tiny, tmp_path):
    transformer, _ = make(tiny("5b"), **options)
    export_kohya(saved(transformer, tmp_path), tmp_path / "kohya.safetensors")
    base = load_transformer(tiny("5b"), torch.float32).eval()
    merged = merge_as_videox_fun_does(base, tmp_path / "kohya.safetensors", walk)
    assert difference(output(merged), output(transformer)) < 1e-5


@pytest.mark.parametrize("form", [export_kohya, export_comfyui])
def test_an_export_made_later_of_a_file_with_alpha_in_it_is_the_same(form, tiny, tmp_path):
    """A run that was complete before files were scaled may still be exported."""
    transformer, _ = make(tiny("2b"), rank=4, alpha=8)
    for name, save in (("new", saved), ("old", save_with_alpha)):
        form(save(transformer, tmp_path / name), tmp_path / f"{name}.safetensors")
    ours, theirs = (load_file(tmp_path / f"{name}.safetensors") for name in ("new", "old"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


# ---------------------------------------------------------------- readers of other versions


READER = """
import json, sys
sys.modules["torchao"] = sys.modules["bitsandbytes"] = None  # of another time than these packages
import torch
import diffusers
from safetensors.torch import load_file

for case in json.loads(sys.argv[1]):
    transformer = diffusers.CogVideoXTransformer3DModel.from_pretrained(
        case["model"], subfolder="transformer", torch_dtype=torch.float32
    )
    parts = dict(tokenizer=None, text_encoder=None, vae=None, scheduler=diffusers.CogVideoXDDIMScheduler())
    pipe = getattr(diffusers, case["pipeline"])(transformer=transformer, **parts)
    pipe.load_lora_weights(case["lora"], weight_name="pytorch_lora_weights.safetensors")
    inputs = load_file(case["lora"] + "/inputs.safetensors")
    expected = inputs.pop("output")
    with torch.no_grad():
        output = pipe.transformer(**inputs, return_dict=False)[0]
    print(json.dumps([case["name"], float((output - expected).norm() / expected.norm())]))
"""
# diffusers before 0.36 takes no transformers 5, before 0.34 it knows no metadata, before 0.32 no 1.5
# and no DoRA
EARLIER = ["transformers==4.57.6", "huggingface_hub==0.36.0", "tokenizers==0.22.1"]
READERS = {
    "0.31.0": ["peft==0.13.0", "diffusers==0.31.0", *EARLIER],
    "0.32.2": ["peft==0.13.0", "diffusers==0.32.2", *EARLIER],
    "0.33.1": ["peft==0.14.0", "diffusers==0.33.1", *EARLIER],
    "0.34.0": ["peft==0.17.1", "diffusers==0.34.0", *EARLIER],
    "0.35.0": ["peft==0.18.0", "diffusers==0.35.0", *EARLIER],
    "0.36.0": ["peft==0.18.1", "diffusers==0.36.0"],
    "0.37.1": ["peft==0.19.0", "diffusers==0.37.1"],
    "0.38.0": ["peft==0.19.0", "diffusers==0.38.0"],
    "0.39.0": ["peft==0.19.1", "diffusers==0.39.0"],
    "0.40.0": ["peft==0.20.0", "diffusers==0.40.0"],
    "0.41.0": ["peft==0.20.0", "diffusers==0.41.0"],
    "0.42.1": ["peft==0.21.2", "diffusers==0.42.1"],
    "installed with an earlier peft": ["peft==0.18.0"],
    "newest": ["peft", "diffusers"],
}


@pytest.fixture(scope="module")
def cases(tiny, tmp_path_factory):
    """A LoRA of every kind of model and of scaling, with inputs and the trained model's output beside it."""
    folder, found = tmp_path_factory.mktemp("loras"), []
    for kind, (name, options) in itertools.product(KINDS, SCALED.items()):
        pipeline = IMAGE_TO_VIDEO_PIPELINE if is_image_to_video(kind) else TEXT_TO_VIDEO_PIPELINE
        transformer, _ = make(tiny(kind), **options)
        lora = folder / f"{kind}-{name}"
        save_lora(transformer, lora, pipeline)
        inputs = inputs_of(transformer.config)
        with torch.no_grad():
            result = transformer(**inputs, return_dict=False)[0]
        save_file(inputs | {"output": result}, lora / "inputs.safetensors")
        case = {"name": lora.name, "model": str(tiny(kind)), "lora": str(lora), "pipeline": pipeline.__name__}
        found.append(case | {"known_to_0.31": "use_dora" not in options and not kind.startswith("1.5")})
    return found


def inputs_of(config):
    generator = torch.Generator().manual_seed(2)
    frames = 4 if config.patch_size_t else 3
    inputs = {
        "hidden_states": torch.randn(1, frames, config.in_channels, 8, 12, generator=generator),
        "encoder_hidden_states": torch.randn(1, 226, config.text_embed_dim, generator=generator),
        "timestep": torch.tensor([500]),
    }
    return inputs | ({"ofs": torch.tensor([2.0])} if config.ofs_embed_dim else {})


@pytest.mark.slow  # fourteen installations, each in a process of its own
@pytest.mark.parametrize("packages", READERS.values(), ids=READERS)
def test_readers_of_other_versions_render_what_was_trained(packages, cases, tmp_path):
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path / "site"]
    done = subprocess.run([*install, *packages], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot install {' '.join(packages)}: {done.stderr.strip().splitlines()[-1]}")
    if "diffusers==0.31.0" in packages:
        cases = [case for case in cases if case["known_to_0.31"]]
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    reader = [sys.executable, "-c", READER, json.dumps(cases)]
    done = subprocess.run(reader, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    assert found.keys() == {case["name"] for case in cases}
    versions = sorted(path.name.removesuffix(".dist-info") for path in (tmp_path / "site").glob("*.dist-info"))
    print(f"\n{' '.join(versions)}: largest difference {max(found.values()):.1e}")
    assert max(found.values()) < 1e-5, found
