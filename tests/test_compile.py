"""--compile_blocks changes speed, not what is trained; nor what is saved."""

import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import cogvideox_text_to_video_lora as script
from args import parse_training_args
from memory import recompute


@pytest.fixture
def train(tiny, prepared_data, tmp_path):
    def run(name, *flags):
        torch.compiler.reset()
        argv = [
            "--pretrained_model_name_or_path",
            str(tiny("5b")),
            "--data_root",
            str(prepared_data),
            "--load_tensors",
        ]
        argv += ["--rank", "4", "--lora_alpha", "4", "--optimizer", "adamw", "--learning_rate", "1e-3", "--seed", "0"]
        argv += ["--lr_warmup_steps", "0", "--train_batch_size", "1", "--max_train_steps", "6"]
        script.main(parse_training_args("t2v_lora", [*argv, "--output_dir", str(tmp_path / name), *flags]))
        return load_file(tmp_path / name / "pytorch_lora_weights.safetensors")

    return run


@pytest.fixture
def graphs(monkeypatch):
    """Let the launcher choose aot_eager; every graph that it compiles."""
    found, aot_eager, torch_compile = [], torch._dynamo.lookup_backend("aot_eager"), torch.compile

    def counted(graph, inputs):
        found.append(graph)
        return aot_eager(graph, inputs)

    def compile_counted(function, backend, **options):
        assert backend == "aot_eager"
        return torch_compile(function, backend=counted, **options)

    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "AOT_EAGER")
    monkeypatch.setattr(torch, "compile", compile_counted)
    return found


@pytest.mark.parametrize(
    "more", [pytest.param([], marks=pytest.mark.slow), ["--gradient_checkpointing"]], ids=["", "checkpointing"]
)
def test_the_launchers_backend_compiles_blocks_and_trains_the_same(more, train, graphs, monkeypatch):
    compiled = train("compiled", *more)
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND")
    plain = train("plain", *more)
    assert compiled.keys() == plain.keys()
    for name in plain:
        torch.testing.assert_close(compiled[name], plain[name], rtol=1e-4, atol=1e-6)
    # Two buckets, one graph each for both blocks but for the last one's unused text; forward alone is counted
    assert 2 <= len(graphs) <= 8


def test_the_flag_takes_inductor(train, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "compile", lambda function, backend, **options: chosen.append(backend) or function)
    train("flag", "--compile_blocks", "--max_train_steps", "1")
    assert chosen == ["inductor"]  # once, for all blocks


@pytest.mark.slow
def test_inductor_trains_the_same(train):
    plain, compiled = train("plain"), train("compiled", "--compile_blocks")
    for name in plain:
        torch.testing.assert_close(compiled[name], plain[name], rtol=1e-2, atol=1e-4)


def test_a_checkpoint_policy_outlives_its_process(monkeypatch):
    """A policy that cannot be pickled keeps its graph out of the compile cache: every start compiles again, 13 s."""
    kept = []
    monkeypatch.setattr(recompute, "checkpoint", lambda run, *inputs, context_fn, **options: kept.append(context_fn))
    layer = torch.nn.Linear(4, 4)
    recompute.checkpoint_blocks([layer], [torch.ops.aten.mm.default, torch.ops.aten.addmm.default])
    layer(torch.zeros(2, 4))
    again = pickle.loads(pickle.dumps(kept[0]))
    assert again.cache_hash == kept[0].cache_hash == "keeps aten.addmm.default, aten.mm.default"
    forward, _ = again()
    keeps = forward.policy_fn
    decisions = {str(op): keeps(None, op).name for op in (torch.ops.aten.mm.default, torch.ops.aten.add.Tensor)}
    assert decisions == {"aten.mm.default": "MUST_SAVE", "aten.add.Tensor": "PREFER_RECOMPUTE"}


COMPILE = """
import json, torch
from torch import nn
from attention import kernels
from memory import quantization, recompute

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(32, 32).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(32))

    def forward(self, hidden_states, encoder_hidden_states):
        heads = quantization.frozen_products(hidden_states * self.scale, [self.frozen])[0][:, None]
        return kernels.make_attend("sdpa")(heads, heads, heads)[:, 0], encoder_hidden_states

torch.manual_seed(0)
blocks = [Block()]
recompute.checkpoint_blocks(blocks, kernels.SAVED_OPS)
recompute.compile_blocks(blocks)
states, _ = blocks[0](torch.randn(1, 8, 32), torch.randn(1, 4, 32))
states.square().mean().backward()
print(json.dumps([torch._dynamo.utils.counters["aot_autograd"], blocks[0].scale.grad.sum().item()]))
"""


@pytest.mark.slow
def test_a_second_start_finds_compiled_blocks(tmp_path):
    """Two processes, since a cache that outlives one is what is tested; inductor takes half a minute in the first."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}

    def start():
        done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    (first, gradient), (second, same_gradient) = start(), start()
    assert first["autograd_cache_saved"] >= 1 and "autograd_cache_bypass" not in {**first, **second}
    assert second["autograd_cache_hit"] == first["autograd_cache_saved"] and "autograd_cache_miss" not in second
    assert same_gradient == gradient


def test_changed_code_behind_an_operator_is_compiled_anew(tmp_path, monkeypatch):
    """The compile cache knows a custom operator by its name: its backward pass may have been mended since."""
    monkeypatch.setattr(recompute, "__file__", str(tmp_path / "memory/recompute.py"))
    (tmp_path / "attention").mkdir()
    tags = []
    for scale in "223":
        (tmp_path / "attention/kernels.py").write_text(f"backward = lambda grad: {scale} * grad")
        tags.append(recompute.code_hash.__wrapped__())
    assert tags[0] == tags[1] != tags[2]
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    with torch.compiler.config.patch(cache_key_tag="the user's"):  # monkeypatch would delete it afterwards
        for _ in range(2):
            recompute.compile_blocks([torch.nn.Linear(2, 2)])
        assert torch.compiler.config.cache_key_tag == f"the user's{recompute.code_hash()}"
