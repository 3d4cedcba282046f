"""--compile_blocks changes speed, not what is trained; nor what is saved."""

import pytest
import torch
from safetensors.torch import load_file

import cogvideox_text_to_video_lora as script
from args import parse_training_args


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
