"""Fixtures that every test may use: tiny pipelines, sample clips, and a process left as it was found."""

import fcntl
import functools
import importlib.metadata
import importlib.util
import logging
import os
import shutil
import sys
from pathlib import Path


# Before torch and transformers are imported, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once; for tests that compare runs on a GPU

import pytest
import torch

from few_cases import check_few_cases, is_left_to_test_all


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "assets" / "tests"))

from base import files
from script_runs import clips, command, module, own_copy, prepared, script, stops, train  # noqa: F401 - fixtures
from synthetic_clips import write_clip


SAMPLE_DATA = Path(__file__).resolve().parents[1] / "assets" / "tests"
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(config, items):
    available = torch.cuda.device_count()
    if not any("::" in arg for arg in config.args):  # whole files
        check_few_cases([item.nodeid for item in items])
    for item in items:
        if is_left_to_test_all(item.nodeid):
            item.add_marker(pytest.mark.slow)
        for marker, needed in (("gpu", 1), ("multi_gpu", 2)):
            if item.get_closest_marker(marker) and available < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA device(s), found {available}"))


@pytest.fixture
def deterministic():
    """Two runs are the same to the byte, also on a GPU; with warn_only attention's backward pass would not be."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def reset_accelerate():
    """A second Accelerator of another precision raises while the first one's process-wide state stands."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@pytest.fixture(autouse=True)
def console_as_found():
    """What quiets the console does so for a process's whole life: a test that turns it on undoes it."""
    before = logging.getLoggerClass()
    yield
    assert logging.getLoggerClass() is before, "console.set_up is still in force: replace it in this test"


@pytest.fixture(autouse=True)
def release_locks():
    """A run holds its output folder until its process ends; tests run several in one process."""
    yield
    files.release_locks()


@pytest.fixture(autouse=True)
def blank_pictures(request, monkeypatch):
    """loss.png is an empty file but in tests marked `draws`: a run of a tiny model takes 0.33 s, of which drawing is 0.14."""

    def leave_blank(runs, figure_path, *rest, **options):
        Path(figure_path).touch()
        return []

    result = loaded("run.result")
    if result and not request.node.get_closest_marker("draws"):
        monkeypatch.setattr(result, "draw_losses", leave_blank)


def loaded(name):
    """Module `name`, if a test has imported it; an error where there is none of that name."""
    assert importlib.util.find_spec(name), f"no module {name}: what is patched there is patched nowhere"
    return sys.modules.get(name)


@pytest.fixture(autouse=True, scope="session")
def remembered_versions():
    """Each of the dozen versions that a run asks for is a file to parse: a tenth of a tiny run."""
    importlib.metadata.version = functools.cache(importlib.metadata.version)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """What is remembered between runs stays out of the user's folder. Set late: the hub's cache is found already."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """(name, build) -> a folder that `build(folder)` filled, whichever worker of pytest-xdist asked first; read-only."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    built = set()

    def folder_of(name, build):
        folder = base / name
        if name not in built:
            with open(base / f".{name}.lock", "a+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
                if not os.fstat(lock.fileno()).st_size:
                    shutil.rmtree(folder, ignore_errors=True)  # of a build that failed
                    folder.mkdir()
                    build(folder)
                    lock.write("built")
            built.add(name)
        return folder

    return folder_of


@pytest.fixture(scope="session")
def tiny(once):
    """kind -> folder of a tiny pipeline; treat it as read-only."""
    from tiny_pipeline import make_tiny_pipeline

    return lambda kind: once(f"tiny-{kind}", lambda folder: make_tiny_pipeline(folder, kind))


@pytest.fixture(scope="session")
def sample_data():
    """The committed sample clips: prompts.txt, videos.txt, metadata.csv, videos/."""
    return SAMPLE_DATA


@pytest.fixture(scope="session")
def prepared_data(once, tiny, sample_data):
    """The sample clips as prepare_dataset.py writes them for the tiny 5b pipeline, in two sizes; read-only."""
    import prepare_dataset
    from args import parse_prepare_args

    def build(out):
        argv = ["--model_id", str(tiny("5b")), "--data_root", str(sample_data), "--output_dir", str(out)]
        argv += ["--caption_column", "prompts.txt", "--video_column", "videos.txt", "--save_latents_and_embeddings"]
        buckets = ["--height_buckets", "64", "--width_buckets", "64", "96", "--frame_buckets", "9"]
        prepare_dataset.main(parse_prepare_args([*argv, *buckets]))
        files.release_locks()

    return once("prepared-samples", build)


@pytest.fixture(scope="session")
def real_clips():
    """The folder of real clips named by COGVIDEOX_TEST_CLIPS."""
    folder = os.environ.get("COGVIDEOX_TEST_CLIPS")
    if not folder:
        pytest.skip("COGVIDEOX_TEST_CLIPS names no folder of real clips")
    return Path(folder)


@pytest.fixture(name="write_clip", scope="session")
def write_clip_fixture():
    return write_clip
