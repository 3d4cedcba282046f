"""--memory changes what is kept for the backward pass, not what is trained."""

import importlib

import pytest
import torch
from safetensors.torch import load_file

import cogvideox_text_to_video_lora as script
from args import parse_training_args
from cogvideox.inputs import ofs_input, rotary_embeddings
from cogvideox.loading import load_transformer
from memory.recompute import checkpoint_blocks, compile_blocks


ATTENTION_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
KINDS = ("2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v")


@pytest.fixture
def train(tiny, prepared_data, tmp_path):
    def run(name, *flags, task="t2v_lora", kind="5b"):
        torch.compiler.reset()
        argv = ["--pretrained_model_name_or_path", str(tiny(kind)), "--data_root", str(prepared_data)]
        argv += ["--load_tensors", "--optimizer", "adamw", "--learning_rate", "1e-3", "--seed", "0"]
        argv += ["--lr_warmup_steps", "0", "--train_batch_size", "1", "--max_train_steps", "6"]
        argv += ["--gradient_accumulation_steps", "2", "--output_dir", str(tmp_path / name), *flags]
        module = importlib.import_module(script.__name__.replace("lora", task.partition("_")[2]))
        module.main(parse_training_args(task, argv))
        files = sorted((tmp_path / name).rglob("*.safetensors"))
        return {file.name: load_file(file) for file in files}

    return run


def make_inputs(transformer, num_frames=None, dtype=torch.float32):
    """Of the base size; another number of latent frames only without learned positions."""
    config, generator = transformer.config, torch.Generator().manual_seed(2)
    frames = num_frames or (config.sample_frames - 1) // 4 + 1
    frames += -frames % (config.patch_size_t or 1)
    shape = (1, frames, config.in_channels, config.sample_height, config.sample_width)
    latents = torch.randn(shape, generator=generator).to(dtype)
    return {
        "hidden_states": latents,
        "encoder_hidden_states": torch.randn(1, 226, config.text_embed_dim, generator=generator).to(dtype),
        "timestep": torch.tensor([500]),
        "image_rotary_emb": rotary_embeddings(config, latents),
        "ofs": ofs_input(config, latents),
    }


@pytest.mark.parametrize("task", ["t2v_lora", "t2v_sft"])
@pytest.mark.parametrize("level", ["speed", "balanced"])
def test_a_level_trains_the_same_bits(level, task, train):
    plain, level_result = train("plain", task=task), train(level, "--memory", level, task=task)
    assert plain.keys() == level_result.keys() and plain
    for name, tensors in plain.items():
        assert all(torch.equal(tensor, level_result[name][key]) for key, tensor in tensors.items())


def loss_and_grads(transformer, inputs):
    for param in transformer.parameters():
        param.requires_grad_(True).grad = None
    loss = transformer(**inputs, return_dict=False)[0].square().mean()
    loss.backward()
    return loss.item(), {name: param.grad for name, param in transformer.named_parameters() if param.grad is not None}


class Tape:
    """Bytes that autograd saves."""

    def __init__(self):
        self.addresses, self.num_bytes = set(), 0

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.addresses:
            self.addresses.add(storage.data_ptr())
            self.num_bytes += storage.nbytes()
        return tensor


@pytest.mark.parametrize("kind", KINDS)
def test_balanced_is_bit_equal_and_keeps_far_less(kind, tiny):
    transformer = load_transformer(tiny(kind), torch.float32)
    inputs = make_inputs(transformer)
    tapes = [Tape(), Tape()]
    with torch.autograd.graph.saved_tensors_hooks(tapes[0].pack, lambda tensor: tensor):
        reference = loss_and_grads(transformer, inputs)
    checkpoint_blocks(transformer.transformer_blocks, [ATTENTION_ON_CPU])
    with torch.autograd.graph.saved_tensors_hooks(tapes[1].pack, lambda tensor: tensor):
        loss, grads = loss_and_grads(transformer, inputs)
    assert loss == reference[0] and grads.keys() == reference[1].keys()
    assert all(torch.equal(grad, reference[1][name]) for name, grad in grads.items())
    assert tapes[1].num_bytes < 0.6 * tapes[0].num_bytes


def test_all_blocks_share_one_graph_and_each_bucket_adds_one(tiny):
    """Counted are forward graphs; the first block would else differ by its inputs."""
    graphs, aot_eager = [], torch._dynamo.lookup_backend("aot_eager")

    def counted(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    transformer, reference = (load_transformer(tiny("5b"), torch.float32) for _ in range(2))
    torch.compiler.reset()
    checkpoint_blocks(transformer.transformer_blocks, [ATTENTION_ON_CPU])
    compile_blocks(transformer.transformer_blocks, counted)
    for model in (transformer, reference):
        for name, param in model.named_parameters():
            param.requires_grad_("transformer_blocks" in name)
    for round_, frames in enumerate((3, 5, 3, 5)):
        inputs = make_inputs(transformer, frames)
        losses, grads = [], []
        for model in (transformer, reference):
            loss = model(**inputs, return_dict=False)[0].square().mean()
            params = list(model.transformer_blocks[0].parameters())
            grads.append(torch.autograd.grad(loss, params))
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
        for ours, exact in zip(*grads, strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-7)
        assert len(graphs) == min(round_ + 1, 2)


@pytest.mark.parametrize("level", ["speed", "balanced"])
def test_levels_compile_on_a_gpu_unless_told_not_to(level, monkeypatch):
    from engine import compose

    compiled = []
    monkeypatch.setattr(compose, "compile_blocks", lambda blocks, backend: compiled.append(backend))
    monkeypatch.setattr(compose, "checkpoint_blocks", lambda blocks, ops: None)
    monkeypatch.setattr(compose, "uses_triton", lambda device: device.type == "cuda")
    transformer = torch.nn.Module()
    transformer.transformer_blocks = []
    base = ["--pretrained_model_name_or_path", "m", "--data_root", "d", "--memory", level]
    for device, flags, expected in (
        ("cuda", [], ["inductor"]),
        ("cuda", ["--no_compile_blocks"], []),
        ("cpu", [], []),
        ("cpu", ["--compile_blocks"], ["inductor"]),
    ):
        compiled.clear()
        args = parse_training_args("t2v_lora", [*base, *flags])
        compose.set_memory_level(args, level, transformer, torch.device(device))
        assert compiled == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--memory", "balanced", "--gradient_checkpointing"],
            "--memory balanced --gradient_checkpointing: the level",
        ),
        (["--memory", "speed", "--compile_blocks", "--no_compile_blocks"], "give one of them"),
        (["--base_precision", "fp8", "--use_dora"], "DoRA needs the norms of exact weights"),
    ],
)
def test_two_answers_to_one_question_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_training_args("t2v_lora", ["--pretrained_model_name_or_path", "m", "--data_root", "d", *flags])
    assert stop.value.code == 2 and message in capsys.readouterr().err
