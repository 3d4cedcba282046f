"""torch's GPU memory grows by pages unless the user configures it otherwise or the driver cannot."""

import logging

import pytest
import torch

import prepare_dataset
from args import parse_prepare_args, parse_training_args
from base import files
from cogvideox import models
from memory import allocator
from memory.allocator import VARIABLES, configure, expand_segments, uses_expandable_segments
from run import launch, levels


CUDA = torch.device("cuda", 0)


@pytest.fixture
def silent_environment(monkeypatch):
    """An environment that says nothing of torch's allocator."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that what is set in the test goes with it
        monkeypatch.delenv(name)


@pytest.fixture
def settings(silent_environment, monkeypatch):
    """What torch's allocator is told, in order."""
    told = []
    monkeypatch.setattr(allocator, "configure", told.append)
    return told


def test_segments_grow_on_a_gpu(settings, monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)
    expand_segments(CUDA)
    assert settings == ["expandable_segments:True"] and uses_expandable_segments()


@pytest.mark.filterwarnings("error")
def test_torch_takes_the_settings_without_a_warning():
    configure("expandable_segments:False")


def test_a_cpu_has_no_segments(settings):
    expand_segments(torch.device("cpu"))
    assert settings == []


@pytest.mark.parametrize("name", VARIABLES)
@pytest.mark.parametrize(
    ("given", "grow"),
    [
        ("expandable_segments:False", False),
        ("max_split_size_mb:64", False),
        ("max_split_size_mb:64,expandable_segments: True", True),
        ("expandable_segments:True,expandable_segments:False", False),
    ],
)
def test_what_the_user_configures_stands(name, given, grow, settings, monkeypatch):
    monkeypatch.setenv(name, given)
    expand_segments(CUDA)
    assert settings == [] and uses_expandable_segments() is grow


def test_of_two_variables_torch_takes_its_older_one(settings, monkeypatch):
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    assert not uses_expandable_segments()


def refuse(message, settings, refused):
    """A torch.empty that raises under these settings."""

    def empty(*size, device):
        if settings[-1] in refused:
            raise RuntimeError(message)

    return empty


def test_a_driver_that_maps_no_pages_is_a_warning(settings, monkeypatch, caplog):
    message = "CUDA driver error: operation not supported"
    monkeypatch.setattr(torch, "empty", refuse(f"{message}\nmore", settings, ["expandable_segments:True"]))
    with caplog.at_level(logging.WARNING):
        expand_segments(CUDA)
    assert settings[-1] == "expandable_segments:False" and not uses_expandable_segments()
    assert caplog.messages == [f"expandable segments do not work here, so more GPU memory is needed: {message}"]


def test_a_gpu_that_cannot_be_used_is_no_matter_of_segments(settings, monkeypatch, caplog):
    refused = ["expandable_segments:True", "expandable_segments:False"]
    monkeypatch.setattr(torch, "empty", refuse("CUDA error: out of memory", settings, refused))
    with pytest.raises(RuntimeError, match="out of memory"):
        expand_segments(CUDA)
    assert caplog.messages == []


@pytest.fixture
def order(monkeypatch):
    """What is done, in order; each a function that is called, or the device that is set to grow."""
    done = []

    def note(module, name):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **more: (done.append(name), function(*args, **more))[1])

    for module in (launch, levels, prepare_dataset):
        monkeypatch.setattr(module, "expand_segments", lambda device: done.append(str(device)))
    note(levels, "make_workload")
    note(prepare_dataset, "place_text_encoder")
    note(prepare_dataset, "load_vae")
    return done


def test_a_run_and_its_plan_set_it_before_they_estimate_and_load(tiny, prepared_data, order, monkeypatch):
    flags = ["--pretrained_model_name_or_path", str(tiny("5b")), "--data_root", str(prepared_data), "--load_tensors"]
    args = parse_training_args("t2v_lora", flags)
    accelerator = launch.init_accelerator(args)
    assert order == [str(accelerator.device)]
    model = models.open_from_args(args, image_to_video=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(levels, "free_gpu_bytes", lambda device: 2**34)
    levels.print_plan(args, model, is_lora=True)
    assert order[1:] == ["cuda", "make_workload"]


def test_preparing_sets_it_where_a_model_comes_to_the_gpu_and_only_there(tiny, sample_data, order, tmp_path):
    out = tmp_path / "prepared"
    flags = ["--model_id", str(tiny("5b")), "--data_root", str(sample_data), "--output_dir", str(out)]
    flags += ["--caption_column", "prompts.txt", "--video_column", "videos.txt"]
    flags += ["--height_buckets", "64", "--width_buckets", "96", "--frame_buckets", "9"]

    def prepare(*more):
        order.clear()
        prepare_dataset.main(parse_prepare_args([*flags, *more]))
        files.release_locks()
        return order

    assert prepare("--save_previews") == []
    text, vae = ["cpu", "place_text_encoder"], ["cpu", "load_vae"]
    assert prepare("--save_latents_and_embeddings") == text + vae
    assert prepare("--save_latents_and_embeddings") == []
    (out / "prompt_embeds/_empty.safetensors").unlink()
    assert prepare("--save_latents_and_embeddings") == text
    assert prepare("--save_latents_and_embeddings", "--save_previews") == []


@pytest.mark.gpu
def test_on_a_gpu_segments_grow(silent_environment):
    torch.cuda.empty_cache()  # or a block of before is taken
    expand_segments(CUDA)
    tensor = torch.empty(2**27, dtype=torch.uint8, device=CUDA)
    segments = [segment for segment in torch.cuda.memory_snapshot() if segment["is_expandable"]]
    assert any(
        segment["address"] <= tensor.data_ptr() < segment["address"] + segment["total_size"] for segment in segments
    )
