"""--ema: the average is what is written and rendered; the trained weights go on as if there were none."""

import contextlib
import importlib
import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file

from args import parse_training_args
from cogvideox.loading import load_transformer
from engine.compose import build_sft_engine_from_args
from engine.master_weights import rounded
from engine.update import TrainingState, update
from random_dataset import write_dataset
from test_update import engine_of


CPU = torch.device("cpu")
PLACES = {"device": [], "host": ["--use_cpu_offload_optimizer"]}


@pytest.fixture
def train(tiny, tmp_path):
    """Run the text-to-video SFT script on random latents; returns its output folder."""
    write_dataset(tmp_path / "data", num_clips=4, frames=9, height=32, width=48, text_shape=(16, 32))

    def run(name, *flags, steps=4):
        argv = ["--pretrained_model_name_or_path", tiny("5b"), "--data_root", tmp_path / "data", "--load_tensors"]
        argv += ["--output_dir", tmp_path / name, "--train_batch_size", 1, "--max_train_steps", steps, "--seed", 0]
        argv += ["--optimizer", "adamw", "--learning_rate", 1e-3, "--lr_warmup_steps", 0, "--save_dtype", "fp32"]
        module = importlib.import_module("cogvideox_text_to_video_sft")
        module.main(parse_training_args("t2v_sft", list(map(str, [*argv, *flags]))))
        return tmp_path / name

    return run


def result(out):
    return load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def averaged(weights_by_step, decay):
    """EMAModel's average of the weights after each update: its decay starts at 0 and rises to `decay`."""
    average = weights_by_step[0]
    for step, weights in enumerate(weights_by_step[1:], start=1):
        share = 1 - min((1 + step) / (10 + step), decay)
        average = {name: value + share * (weights[name] - value) for name, value in average.items()}
    return average


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("place", PLACES)
def test_the_result_is_the_average_of_all_updates(place, precision, train):
    flags = [*PLACES[place], "--mixed_precision", precision, "--checkpointing_steps", "1"]
    plain = train("plain", *flags)
    out = train("ema", *flags, "--ema", "--ema_decay", "0.2")
    masters = [load_file(plain / f"checkpoint-{step}" / "masters.safetensors") for step in (1, 2, 3, 4)]
    # What is trained does not know of the average, also after a checkpoint wrote it
    assert equal(load_file(out / "checkpoint-4" / "masters.safetensors"), masters[-1])
    expected = averaged(masters, 0.2)
    assert result(out).keys() == expected.keys()
    for name, value in result(out).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7, msg=name)
    assert not equal(result(out), result(plain))


@pytest.mark.parametrize("place", PLACES)
def test_a_resumed_average_is_the_same_bit_for_bit(place, train):
    flags = [*PLACES[place], "--ema", "--mixed_precision", "bf16", "--checkpointing_steps", "2"]
    unbroken = train("unbroken", *flags)
    train("resumed", *flags, steps=2)
    resumed = train("resumed", *flags)
    for name in ("ema.safetensors", "masters.safetensors"):
        ours, theirs = (load_file(out / "checkpoint-4" / name) for out in (unbroken, resumed))
        assert equal(ours, theirs), name
    assert equal(result(unbroken), result(resumed))
    loaded = CogVideoXTransformer3DModel.from_pretrained(resumed, subfolder="transformer", dtype=torch.float32)
    assert equal(dict(loaded.named_parameters()), result(resumed))


def make_engine(model_dir, dtype, *flags):
    argv = ["--pretrained_model_name_or_path", "m", "--data_root", "d", *flags]
    transformer = load_transformer(model_dir, torch.float32)
    args = parse_training_args("t2v_sft", argv)
    return build_sft_engine_from_args(args, None, 0.0, transformer, (1, 8, 1, 64), dtype, torch.float32, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", PLACES)
def test_inference_shows_the_weights_that_will_be_saved_and_puts_the_trained_ones_back(place, dtype, tiny):
    engine = make_engine(tiny("2b"), dtype, "--ema", *PLACES[place])
    with torch.no_grad():
        for shadow in engine.average.values():
            shadow += 0.5
    trained = [param.detach().clone() for param in engine.weights.values()]
    in_model = [param.detach().clone() for param in engine.transformer.parameters()]
    average = [shadow.clone() for shadow in engine.average.values()]
    with contextlib.suppress(KeyboardInterrupt), engine.inference() as transformer:
        assert not transformer.training and not torch.is_grad_enabled()
        for shown, expected in zip(transformer.parameters(), average, strict=True):
            assert torch.equal(shown, rounded(expected, dtype))
        raise KeyboardInterrupt  # an interrupted validation must not leave the average to be trained
    assert engine.transformer.training
    assert all(torch.equal(a, b) for a, b in zip(engine.weights.values(), trained, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(engine.transformer.parameters(), in_model, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(engine.average.values(), average, strict=True))


def test_inference_without_an_average_shows_what_is_trained(tiny):
    engine = make_engine(tiny("2b"), torch.bfloat16)
    assert engine.ema is None
    with engine.inference() as transformer:
        for shown, param in zip(transformer.parameters(), engine.weights.values(), strict=True):
            assert torch.equal(shown, rounded(param, torch.bfloat16))


def test_a_skipped_update_is_not_averaged():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    ema = SimpleNamespace(count=0)
    ema.step = lambda params: setattr(ema, "count", ema.count + 1)
    state = TrainingState(engine_of(weight, ema=ema), optimizer, schedule)
    update(weight.sum() / 2, state, False, 1.0)
    assert ema.count == 0  # nor a micro-step
    update(weight.sum() / 2, state, True, 1.0)
    update((weight * torch.nan).sum(), state, True, 1.0)
    assert ema.count == 1


def test_a_run_says_that_the_average_is_what_is_written(train, caplog):
    with caplog.at_level("INFO"):
        out = train("ema", "--ema", steps=1)
    assert caplog.text.count("moving average") == 1
    assert not (out / "transformer" / "training.json").exists()
    assert json.loads((out / "args.json").read_text())["flags"]["ema"] is True
