"""A LoRA in its other forms is the LoRA that was trained: ComfyUI's layout, and the base model with it added."""

import json
import math
import re
import shutil

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from args import parse_training_args
from base.errors import UsageError
from cogvideox.config import IMAGE_TO_VIDEO_PIPELINE, TEXT_TO_VIDEO_PIPELINE
from cogvideox.loading import load_transformer
from engine.lora import ADAPTER, save_lora
from engine.lora_file import WEIGHTS_NAME, comfyui_module
from run.export import COMFYUI_NAME, KOHYA_NAME, export_comfyui, export_kohya, export_lora, merge_lora
from test_lora import example_inputs
from tiny_pipeline import KINDS


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
ALL_KINDS_OF_LAYER = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "norm1.linear", "patch_embed.proj", "proj_out"]

# The names that comfy/ldm/cogvideo/model.py of ComfyUI gives to the linear layers and the convolution of its model,
# written down from its source: diffusers' name -> its name. Blocks are numbered alike.
COMFYUI_MODULES = {
    "patch_embed.proj": "patch_embed.proj",
    "patch_embed.text_proj": "patch_embed.text_proj",
    "time_embedding.linear_1": "time_embedding_linear_1",
    "time_embedding.linear_2": "time_embedding_linear_2",
    "ofs_embedding.linear_1": "ofs_embedding_linear_1",
    "ofs_embedding.linear_2": "ofs_embedding_linear_2",
    "transformer_blocks.N.norm1.linear": "blocks.N.norm1.linear",
    "transformer_blocks.N.attn1.to_q": "blocks.N.q",
    "transformer_blocks.N.attn1.to_k": "blocks.N.k",
    "transformer_blocks.N.attn1.to_v": "blocks.N.v",
    "transformer_blocks.N.attn1.to_out.0": "blocks.N.attn_out",
    "transformer_blocks.N.norm2.linear": "blocks.N.norm2.linear",
    "transformer_blocks.N.ff.net.0.proj": "blocks.N.ff_proj",
    "transformer_blocks.N.ff.net.2": "blocks.N.ff_out",
    "norm_out.linear": "norm_out.linear",
    "proj_out": "proj_out",
}


@pytest.fixture
def base(tiny, tmp_path):
    """kind, dtype -> a copy of the tiny pipeline whose transformer is stored in that dtype."""

    def copy(kind, dtype=torch.float32, name="base"):
        folder = shutil.copytree(tiny(kind), tmp_path / name)
        for path in (folder / "transformer").glob("*.safetensors"):
            save_file({key: value.to(dtype) for key, value in load_file(path).items()}, path, {"format": "pt"})
        return folder

    return copy


def trained(model_dir, folder, inference_notes=None, targets=ATTENTION, pipeline=TEXT_TO_VIDEO_PIPELINE, **config):
    """Write a LoRA that does something into `folder`; returns the transformer that carries it."""
    config = {"r": 4, "lora_alpha": 2, **config}
    transformer = load_transformer(
        model_dir, torch.float32, None, bool((inference_notes or {}).get("drop_learned_positions"))
    )
    torch.manual_seed(0)
    transformer.add_adapter(LoraConfig(target_modules=targets, init_lora_weights=True, **config), ADAPTER)
    generator = torch.Generator().manual_seed(1)
    for param in transformer.parameters():
        if param.requires_grad:
            param.data += 0.05 * torch.randn(param.shape, generator=generator)
    folder.mkdir(exist_ok=True)
    save_lora(transformer, folder, pipeline, inference_notes)
    return transformer.eval()


def merged_from(model_dir, folder, variant=None):
    merge_lora(folder / WEIGHTS_NAME, model_dir / "transformer", folder / "transformer", variant)
    return load_transformer(folder, torch.float32).eval()


@torch.no_grad()
def outputs(transformer):
    return transformer(**example_inputs(transformer))[0]


def relative(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


VARIANTS = {
    "alpha is rank": {"lora_alpha": 4},
    "alpha below rank": {"lora_alpha": 1},
    "alpha above rank": {"r": 2, "lora_alpha": 32},
    "rank-stabilised": {"use_rslora": True},
}


# ---------------------------------------------------------------- ComfyUI


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_has_the_name_that_comfyui_gives_it(kind, tiny):
    modules = load_transformer(tiny(kind), torch.float32).named_modules()
    layers = [name for name, module in modules if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)]
    numbered = {re.sub(r"(?<=transformer_blocks\.)\d+", "N", name) for name in layers}
    without = set() if kind == "1.5-5b-i2v" else {"ofs_embedding.linear_1", "ofs_embedding.linear_2"}
    assert numbered == set(COMFYUI_MODULES) - without
    for name in layers:
        number = next(iter(re.findall(r"transformer_blocks\.(\d+)", name)), "")
        expected = COMFYUI_MODULES[re.sub(r"(?<=transformer_blocks\.)\d+", "N", name)]
        assert comfyui_module(name) == expected.replace("N", number, 1)


def test_the_file_holds_these_keys_and_shapes_and_no_others(base, tmp_path):
    """Width 128, 2 blocks, rank 4, key by key; trained with an alpha of 2, which is in the weights."""
    folder = tmp_path / "run"
    trained(base("2b"), folder)
    export_comfyui(folder / WEIGHTS_NAME, folder / COMFYUI_NAME)
    expected = {}
    for block in range(2):
        for layer in ("q", "k", "v", "attn_out"):
            name = f"diffusion_model.blocks.{block}.{layer}"
            expected |= {f"{name}.lora_up.weight": (128, 4), f"{name}.lora_down.weight": (4, 128), f"{name}.alpha": ()}
    tensors = load_file(folder / COMFYUI_NAME)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert all(tensors[name].item() == 4.0 for name in expected if name.endswith(".alpha"))


def apply_as_comfyui_does(weights, lora, strength=1.0):
    """ComfyUI's formula, W + strength * alpha / rank * up @ down, on a model's weights by its own names."""
    weights, used = dict(weights), set()
    for key in weights:
        name = f"diffusion_model.{key.removesuffix('.weight')}"
        keys = [f"{name}.lora_up.weight", f"{name}.lora_down.weight", f"{name}.alpha"]
        if not key.endswith(".weight") or keys[0] not in lora:
            continue
        up, down, alpha = (lora[key] for key in keys)
        change = torch.mm(up.flatten(start_dim=1), down.flatten(start_dim=1)).reshape(weights[key].shape)
        weights[key] = weights[key] + strength * (alpha.item() / down.shape[0]) * change
        used |= set(keys)
    assert used == set(lora)  # ComfyUI warns of keys that it does not know, and leaves them out
    return weights


def comfyui_weights(folder):
    """A transformer's weights by ComfyUI's names."""
    names = {}
    for path in (folder / "transformer").glob("*.safetensors"):
        for key, value in load_file(path).items():
            module, kind = key.rpartition(".")[::2]
            names[f"{comfyui_module(module)}.{kind}"] = value
    return names


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_comfyui_at_strength_1_computes_the_merged_weights(config, base, tmp_path):
    model_dir, folder = base("5b"), tmp_path / "run"
    trained(model_dir, folder, targets=ALL_KINDS_OF_LAYER, **config)
    export_comfyui(folder / WEIGHTS_NAME, folder / COMFYUI_NAME)
    merged_from(model_dir, folder)
    untouched, merged = comfyui_weights(model_dir), comfyui_weights(folder)
    patched = apply_as_comfyui_does(untouched, load_file(folder / COMFYUI_NAME))
    assert patched.keys() == merged.keys()
    changed = [key for key in merged if not torch.equal(merged[key], untouched[key])]
    assert len(changed) == 2 * 7 + 2
    for key in merged:
        torch.testing.assert_close(patched[key], merged[key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("form", "export"), [("comfyui", export_comfyui), ("kohya", export_kohya)])
def test_dora_is_refused_before_training_and_in_a_file(form, export, base, tmp_path, capsys):
    argv = ["--pretrained_model_name_or_path", "m", "--data_root", "d", "--use_dora", "--export"]
    assert parse_training_args("t2v_lora", [*argv, "merged"]).export == ["merged"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        parse_training_args("t2v_lora", [*argv, form, "merged"])
    err = capsys.readouterr().err
    assert left.value.code == 2 and err.count("\n") == 1 and f"--use_dora --export {form}" in err and "merged" in err

    folder = tmp_path / "run"
    trained(base("2b"), folder, use_dora=True)
    with pytest.raises(UsageError, match="DoRA"):
        export(folder / WEIGHTS_NAME, folder / "export.safetensors")
    assert sorted(path.name for path in folder.iterdir()) == [WEIGHTS_NAME]


# ---------------------------------------------------------------- merge


@pytest.mark.parametrize("kind", ["2b", "1.5-5b"])
@pytest.mark.parametrize("config", [*VARIANTS.values(), {"use_dora": True}], ids=[*VARIANTS, "DoRA"])
def test_the_merged_model_is_the_pipeline_with_the_lora(config, kind, base, tmp_path):
    """In fp32 within 1e-5 of the output; the LoRA changes it by a hundred times that and more."""
    model_dir, folder = base(kind), tmp_path / "run"
    in_training = outputs(trained(model_dir, folder, targets=ALL_KINDS_OF_LAYER, **config))
    merged = outputs(merged_from(model_dir, folder))
    pipe = TEXT_TO_VIDEO_PIPELINE.from_pretrained(model_dir, dtype=torch.float32)
    untouched = outputs(pipe.transformer)
    pipe.load_lora_weights(folder)
    loaded = outputs(pipe.transformer)
    assert relative(merged, loaded) < 1e-5 and relative(merged, in_training) < 1e-5
    assert relative(loaded, untouched) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_keep_their_dtype_and_are_rounded_once(dtype, base, tmp_path):
    model_dir, folder = base("5b", dtype), tmp_path / "run"
    transformer = trained(model_dir, folder)
    transformer.fuse_lora()
    merged_from(model_dir, folder)
    [path] = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(path)
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    for name, weight in transformer.named_parameters():
        if ".base_layer.weight" in name:
            saved = tensors[name.replace(".base_layer", "")]
            assert (saved.float() - weight).abs().max() <= torch.finfo(dtype).eps * weight.abs().max()
    [original] = (model_dir / "transformer").glob("*.safetensors")
    untouched = [name for name, tensor in load_file(original).items() if torch.equal(tensor, tensors[name])]
    assert len(tensors) - len(untouched) == 2 * 4


def test_shards_and_variants_of_the_base_are_read(base, tmp_path):
    model_dir, folder = base("2b"), tmp_path / "run"
    expected = outputs(trained(model_dir, folder))
    for variant in (None, "fp16"):
        divided = shutil.copytree(model_dir, tmp_path / f"divided-{variant}")
        shutil.rmtree(divided / "transformer")
        transformer = load_transformer(model_dir, torch.float32)
        transformer.save_pretrained(divided / "transformer", max_shard_size="500KB", variant=variant)
        if variant:  # beside it, weights that must not be taken
            wrong = {name: torch.zeros_like(value) for name, value in transformer.state_dict().items()}
            save_file(wrong, divided / "transformer/diffusion_pytorch_model.safetensors")
        merged = merged_from(divided, folder, variant)
        assert relative(outputs(merged), expected) < 1e-5
        names = sorted(path.name for path in (folder / "transformer").iterdir())
        assert len(names) > 3 and not any("fp16" in name for name in names)
        index = json.loads((folder / "transformer/diffusion_pytorch_model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == {name for name in names if name.endswith(".safetensors")}
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in merged.state_dict().values())


def test_dropped_positions_and_raw_image_latents_are_in_the_merged_folder(base, tmp_path):
    model_dir, folder = base("5b-i2v"), tmp_path / "run"
    inference_notes = {"drop_learned_positions": True, "image_latent_scale": "raw"}
    expected = outputs(trained(model_dir, folder, inference_notes, pipeline=IMAGE_TO_VIDEO_PIPELINE))
    merged = merged_from(model_dir, folder)
    assert not merged.config.use_learned_positional_embeddings
    assert relative(outputs(merged), expected) < 1e-5
    assert json.loads((folder / "transformer/training.json").read_text()) == inference_notes
    with safe_open(next((folder / "transformer").glob("*.safetensors")), "pt") as file:
        assert "patch_embed.pos_embedding" not in file.keys()  # noqa: SIM118


def test_a_lora_of_another_model_is_refused_and_leaves_nothing(base, tmp_path):
    folder = tmp_path / "run"
    trained(base("2b"), folder)
    other = base("2b", name="other")
    [path] = (other / "transformer").glob("*.safetensors")
    tensors = load_file(path)
    save_file({name: value for name, value in tensors.items() if "transformer_blocks.1" not in name}, path)
    with pytest.raises(RuntimeError, match="transformer_blocks.1.attn1"):
        merge_lora(folder / WEIGHTS_NAME, other / "transformer", folder / "transformer")
    assert sorted(path.name for path in folder.iterdir()) == [WEIGHTS_NAME]


def test_exports_name_no_place_and_equal_ones_are_equal_bytes(base, tmp_path):
    folders = [tmp_path / name for name in ("run", "again")]
    model_dir = base("2b")
    for folder in folders:
        trained(model_dir, folder)
        argv = ["--pretrained_model_name_or_path", str(model_dir), "--data_root", "d", "--output_dir", str(folder)]
        args = parse_training_args("t2v_lora", [*argv, "--export", "comfyui", "kohya", "merged"])
        export_lora(args, model_dir / "transformer", None)
    files = sorted(path.relative_to(folders[0]) for path in folders[0].rglob("*") if path.is_file())
    assert [str(path) for path in files] == [
        WEIGHTS_NAME, COMFYUI_NAME, KOHYA_NAME, "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    for path in files:
        contents = [(folder / path).read_bytes() for folder in folders]
        assert contents[0] == contents[1] and str(tmp_path).encode() not in contents[0]

    stamps = {path: (folders[1] / path).stat().st_mtime_ns for path in files if path.name != COMFYUI_NAME}
    (folders[1] / COMFYUI_NAME).unlink()
    export_lora(args, model_dir / "transformer", None, only_missing=True)
    assert (folders[1] / COMFYUI_NAME).read_bytes() == (folders[0] / COMFYUI_NAME).read_bytes()
    assert stamps == {path: (folders[1] / path).stat().st_mtime_ns for path in files if path.name != COMFYUI_NAME}


@pytest.mark.parametrize("use_rslora", [False, True])
def test_up_holds_the_whole_scaling(use_rslora, base, tmp_path):
    """Also the square root of rank-stabilised LoRA, of which ComfyUI knows nothing; alpha / rank is 1."""
    folder = tmp_path / "run"
    transformer = trained(base("2b"), folder, r=4, lora_alpha=3, use_rslora=use_rslora)
    layer = transformer.transformer_blocks[0].attn1.to_q
    assert layer.scaling[ADAPTER] == (3 / math.sqrt(4) if use_rslora else 3 / 4)
    export_comfyui(folder / WEIGHTS_NAME, folder / COMFYUI_NAME)
    tensors = load_file(folder / COMFYUI_NAME)
    assert tensors["diffusion_model.blocks.0.q.alpha"].item() == 4
    up = tensors["diffusion_model.blocks.0.q.lora_up.weight"]
    assert torch.equal(up, layer.lora_B[ADAPTER].weight * layer.scaling[ADAPTER])
