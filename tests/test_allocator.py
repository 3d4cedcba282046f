"""torch's GPU memory grows by pages unless the user configures it otherwise or the driver cannot."""

import logging

import pytest
import torch

import allocator
from allocator import VARIABLES, configure, expand_segments, uses_expandable_segments


CUDA = torch.device("cuda", 0)


@pytest.fixture
def settings(monkeypatch):
    """What torch's allocator is told, in order, in an environment that says nothing of it."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that what is set in the test goes with it
        monkeypatch.delenv(name)
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
    ("given", "grow"), [("expandable_segments:False", False), ("max_split_size_mb:64,expandable_segments:True", True)]
)
def test_what_the_user_configures_stands(name, given, grow, settings, monkeypatch):
    monkeypatch.setenv(name, given)
    expand_segments(CUDA)
    assert settings == [] and uses_expandable_segments() is grow


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
    assert caplog.messages == [f"GPU memory cannot grow by pages here, so that more of it is needed: {message}"]


def test_a_gpu_that_cannot_be_used_is_no_matter_of_segments(settings, monkeypatch, caplog):
    refused = ["expandable_segments:True", "expandable_segments:False"]
    monkeypatch.setattr(torch, "empty", refuse("CUDA error: out of memory", settings, refused))
    with pytest.raises(RuntimeError, match="out of memory"):
        expand_segments(CUDA)
    assert caplog.messages == []


@pytest.mark.gpu
def test_on_a_gpu_segments_grow(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    expand_segments(CUDA)
    tensor = torch.empty(2**27, dtype=torch.uint8, device=CUDA)
    segments = [segment for segment in torch.cuda.memory_snapshot() if segment["is_expandable"]]
    assert any(
        segment["address"] <= tensor.data_ptr() < segment["address"] + segment["total_size"] for segment in segments
    )
