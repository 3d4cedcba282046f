"""Fixtures that every test may use: tiny pipelines, sample clips, and a process left as it was found."""

import os
import sys
from pathlib import Path


# Before torch and transformers are imported, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "assets" / "tests"))

from make_clips import encode_video


SAMPLE_DATA = Path(__file__).resolve().parents[1] / "assets" / "tests"
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    available = torch.cuda.device_count()
    for item in items:
        for marker, needed in (("gpu", 1), ("multi_gpu", 2)):
            if item.get_closest_marker(marker) and available < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA device(s), found {available}"))


@pytest.fixture(autouse=True)
def reset_accelerate():
    """A second Accelerator of another precision raises while the first one's process-wide state stands."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@pytest.fixture(autouse=True)
def release_locks():
    """A run holds its output folder until its process ends; tests run several in one process."""
    yield
    if "durable" in sys.modules:
        sys.modules["durable"].release_locks()


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """What is remembered between runs stays out of the user's folder. Set late: the hub's cache is found already."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """kind -> folder of a tiny pipeline, made once per session; treat it as read-only."""
    from tiny_pipeline import make_tiny_pipeline

    folders = {}

    def folder_of(kind):
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(f"tiny-{kind}")
            make_tiny_pipeline(folders[kind], kind)
        return folders[kind]

    return folder_of


@pytest.fixture(scope="session")
def sample_data():
    """The committed sample clips: prompts.txt, videos.txt, metadata.csv, videos/."""
    return SAMPLE_DATA


@pytest.fixture(scope="session")
def prepared_data(tiny, sample_data, tmp_path_factory):
    """The sample clips as prepare_dataset.py writes them for the tiny 5b pipeline, in two sizes; read-only."""
    import prepare_dataset
    from args import parse_prepare_args

    out = tmp_path_factory.mktemp("prepared")
    argv = ["--model_id", str(tiny("5b")), "--data_root", str(sample_data), "--output_dir", str(out)]
    argv += ["--caption_column", "prompts.txt", "--video_column", "videos.txt", "--save_latents_and_embeddings"]
    buckets = ["--height_buckets", "64", "--width_buckets", "64", "96", "--frame_buckets", "9"]
    prepare_dataset.main(parse_prepare_args([*argv, *buckets]))
    sys.modules["durable"].release_locks()
    return out


@pytest.fixture(scope="session")
def real_clips():
    """The folder of real clips named by COGVIDEOX_TEST_CLIPS."""
    folder = os.environ.get("COGVIDEOX_TEST_CLIPS")
    if not folder:
        pytest.skip("COGVIDEOX_TEST_CLIPS names no folder of real clips")
    return Path(folder)


def write_clip(path, num_frames=9, height=64, width=96, fps=8, seed=0):
    """Write a small mp4 whose every frame differs: a bright square crossing a colour gradient. Returns the path."""
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 160, size=(2, 3))
    colour = rng.integers(180, 256, size=3)
    ramp = np.linspace(0, 1, width)[None, :, None]
    background = np.broadcast_to(corners[0] * (1 - ramp) + corners[1] * ramp, (height, width, 3))
    frames = np.repeat(background[None], num_frames, axis=0)
    side = max(2, height // 4)
    top = rng.integers(0, height - side + 1)
    for index, frame in enumerate(frames):
        left = round(index * (width - side) / max(num_frames - 1, 1))
        frame[top : top + side, left : left + side] = colour
    encode_video(path, frames.astype(np.uint8), fps)
    return Path(path)


@pytest.fixture(name="write_clip", scope="session")
def write_clip_fixture():
    return write_clip
