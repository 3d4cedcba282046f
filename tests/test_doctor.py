"""`make doctor` finds what keeps a machine from training and says the fix, on machines that are not this one."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import doctor
from doctor import Gpu, TorchProbe


ROOT = Path(__file__).resolve().parent.parent
H100 = Gpu("NVIDIA H100 80GB HBM3", 79.1, (9, 0))
V100 = Gpu("Tesla V100", 31.7, (7, 0))
SMALL = Gpu("RTX 3050", 7.8, (8, 6))


def states(findings):
    return [finding.state for finding in findings]


@pytest.mark.parametrize(
    ("probes", "state", "words"),
    [
        (("580.1", "13.0", 1, None), "FAIL", ["torch is not installed", "make install"]),
        (
            ("580.1", "13.0", 1, TorchProbe(error="libcudart.so.13: cannot open")),
            "FAIL",
            ["libcudart", "make install"],
        ),
        ((None, None, 0, TorchProbe("13.0")), "WARN", ["none found", "tiny models"]),
        (("580.1", "13.0", 2, TorchProbe(None)), "FAIL", ["built for the CPU", "2 GPUs", "whl/cu130"]),
        (("550.1", "12.4", 1, TorchProbe(None)), "FAIL", ["built for the CPU", "whl/cu126"]),
        (
            ("550.1", "12.4", 1, TorchProbe("13.0")),
            "FAIL",
            ["CUDA 12.4", "for 13.0", "update the driver", "whl/cu126"],
        ),
        (("470.1", "11.4", 1, TorchProbe("12.6")), "FAIL", ["CUDA 11.4", "update the driver"]),
        (("600.1", "14.0", 1, TorchProbe(None)), "FAIL", ["whl/cu130"]),
        (("580.1", "13.0", 1, TorchProbe("13.0")), "FAIL", ["sees none of the 1 GPUs", "CUDA_VISIBLE_DEVICES"]),
    ],
)
def test_a_gpu_that_cannot_be_used_is_explained(probes, state, words):
    [finding] = doctor.check_gpus(*probes)
    assert finding.state == state
    assert not [word for word in words if word not in finding.text]


def test_every_gpu_has_its_line():
    findings = doctor.check_gpus("580.1", "13.0", 3, TorchProbe("13.0", True, (H100, V100, SMALL)))
    assert states(findings) == ["OK", "OK", "WARN", "OK"]
    assert "driver 580.1 for CUDA 13.0, torch built for CUDA 13.0" in findings[0].text
    assert "GPU 0: NVIDIA H100 80GB HBM3, 79 GiB, compute capability 9.0, bf16 yes" in findings[1].text
    assert "bf16 no" in findings[2].text and "--mixed_precision fp16" in findings[2].text
    assert "8 GiB" in findings[3].text
    assert "smaller buckets" in doctor.check_gpu(0, SMALL._replace(memory=3)).text
    # An older minor version of the same CUDA, or no nvidia-smi, is no hindrance where torch sees the GPU
    assert states(doctor.check_gpus("580.1", "13.0", 1, TorchProbe("13.2", True, (H100,)))) == ["OK", "OK"]
    assert states(doctor.check_gpus(None, None, 0, TorchProbe("13.0", True, (H100,)))) == ["OK", "OK"]


SMI = """\
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI 580.95.05              Driver Version: 580.95.05      CUDA Version: 13.0     |
"""


def test_nvidia_smi_is_read(monkeypatch):
    listed = "GPU 0: NVIDIA H100 (UUID: GPU-1)\nGPU 1: NVIDIA H100 (UUID: GPU-2)\n"
    monkeypatch.setattr(
        doctor.subprocess, "run", lambda argv, **options: SimpleNamespace(stdout=listed if "-L" in argv else SMI)
    )
    assert doctor.probe_driver() == ("580.95.05", "13.0", 2)
    monkeypatch.setattr(doctor.subprocess, "run", lambda *given, **options: SimpleNamespace(stdout="No devices\n"))
    assert doctor.probe_driver() == (None, None, 0)

    def missing(*given, **options):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(doctor.subprocess, "run", missing)
    assert doctor.probe_driver() == (None, None, 0)


@pytest.mark.parametrize(
    ("version", "state"), [((3, 10, 9), "FAIL"), ((3, 11, 0), "OK"), ((3, 13, 2), "OK"), ((3, 14, 0), "FAIL")]
)
def test_python(version, state):
    assert doctor.check_python(version).state == state


def test_requirements_are_those_of_the_file():
    requirements = {found.name: found for found in doctor.read_requirements(ROOT / "requirements.txt")}
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert len(requirements) == len([line for line in lines if line and not line.startswith("#")])
    assert requirements["torch"].bounds.startswith(">=") and not requirements["torch"].optional
    assert requirements["decord"].marker == "x86_64" and requirements["wandb"].optional
    assert {found.name for found in requirements.values() if found.optional} <= set(doctor.OPTIONAL)


def test_packages_that_are_missing_or_out_of_range(tmp_path, monkeypatch):
    path = tmp_path / "requirements.txt"
    path.write_text(
        "# Training\ntorch>=2.11,<3\npeft>=0.21,<1\nav>=15,<19\ndecord>=0.6,<0.7; platform_machine == 'x86_64'\n"
        "\n# Optional back ends\nwandb>=0.22,<1  # --report_to wandb\ntorchao>=0.17,<1\n".replace("'", '"')
    )
    monkeypatch.setattr(doctor.platform, "machine", lambda: "aarch64")
    versions = {"torch": "2.13.0+cu130", "peft": "0.20.9", "wandb": "0.21.4"}
    findings = doctor.check_packages(doctor.read_requirements(path), versions.get)
    assert states(findings) == ["OK", "FAIL", "FAIL", "WARN"]
    assert 'peft 0.20.9: >=0.21,<1 is needed; pip install "peft>=0.21,<1"' in findings[1].text
    assert "av: not installed; make install" in findings[2].text and "wandb 0.21.4" in findings[3].text


@pytest.mark.parametrize(
    ("version", "bounds", "inside"),
    [
        ("2.11.0", ">=2.11,<3", True),
        ("2.9.1", ">=2.11,<3", False),
        ("3.0.0", ">=2.11,<3", False),
        ("3.0.0rc1", ">=2.11,<3", False),
        ("10.0", ">=9.5,<14", True),
        ("0.6.0", ">=0.6,<0.7", True),
        ("1.0", "", True),
    ],
)
def test_version_bounds(version, bounds, inside):
    assert doctor.within(version, bounds) == inside


def test_what_triton_builds_with(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "cc")
    assert doctor.c_compiler() == "cc"
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.c_compiler() is None
    assert doctor.python_header().name == "Python.h" and doctor.python_header().is_absolute()
    results = [doctor.check_compiler(*found) for found in ((None, True), ("gcc", False), ("gcc", True))]
    assert states(results) == ["WARN", "WARN", "OK"]
    assert "install gcc" in results[0].text and "-dev" in results[1].text


@pytest.mark.parametrize(
    ("version", "builders", "has_gpu", "state", "words"),
    [
        ("0.19.8", ("/c++", "/ninja", None), True, "OK", ["can be compiled", "nvcc none, which it can do without"]),
        ("0.19.7", ("/c++", "/ninja", None), False, "OK", ["can be compiled"]),
        ("0.19.7", ("/c++", "/ninja", "/nvcc"), True, "OK", ["nvcc /nvcc"]),
        ("0.19.7", ("/c++", "/ninja", None), True, "WARN", ["cannot", 'pip install "deepspeed>=0.19.8', "CUDA_HOME"]),
        ("0.19.8", (None, "/ninja", "/nvcc"), True, "WARN", ["cannot", "apt-get install g++"]),
        (None, (None, None, None), False, "WARN", ["cannot", "g++", "pip install ninja"]),
    ],
)
def test_whether_deepspeeds_ops_can_be_compiled(version, builders, has_gpu, state, words):
    finding = doctor.check_deepspeed_ops(version, *builders, has_gpu)
    assert finding.state == state and not [word for word in words if word not in finding.text]


def test_what_deepspeed_builds_with_is_found_as_torch_finds_it(monkeypatch, tmp_path):
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "bin").mkdir()
    for name in ("c++", "nvcc", "other++"):
        (tmp_path / "bin" / name).touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert doctor.cxx_compiler() == str(tmp_path / "bin" / "c++")
    assert doctor.cuda_toolkit() == str(tmp_path / "bin" / "nvcc")
    monkeypatch.setenv("CXX", "other++")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))  # it rules, whatever is on the path
    assert doctor.cxx_compiler() == str(tmp_path / "bin" / "other++")
    assert doctor.cuda_toolkit() is None


def test_memory_and_disk(tmp_path):
    assert doctor.check_memory(31.0).state == "WARN" and doctor.check_memory(64.0).state == "OK"
    assert doctor.check_disk("models", tmp_path, 19.9e9).state == "WARN"
    assert "20 GB" in doctor.check_disk("models", tmp_path, 19.9e9).text
    assert doctor.check_disk("models", tmp_path, 21e9).state == "OK"
    assert doctor.free_bytes(tmp_path / "not" / "yet" / "there") > 0


def test_a_decoder_that_fails_is_named(monkeypatch, tmp_path):
    assert doctor.probe_decoder("av") is None
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(doctor.SAMPLE.read_bytes()[:100])
    monkeypatch.setattr(doctor, "SAMPLE", broken)
    problem = doctor.probe_decoder("av")
    [good, bad] = doctor.check_decoders({"decord": None, "av": problem})
    assert problem and good.state == "OK" and bad.state == "FAIL" and "--force-reinstall av" in bad.text


def test_the_login_is_looked_for_and_never_shown(monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert not doctor.hub_token() and "hf auth login" in doctor.check_login(False).text
    (tmp_path / "token").write_text("hf_canary")
    assert doctor.hub_token() and "hf_canary" not in doctor.check_login(True).text
    (tmp_path / "token").unlink()
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    assert doctor.hub_token()


def test_optional_back_ends_come_with_their_flag_and_install_line():
    assert doctor.check_optional("wandb", "0.31.0").text == "wandb 0.31.0, for --report_to wandb"
    missing = doctor.check_optional("prodigyopt", None)
    assert missing.state == "OK" and "--optimizer prodigy" in missing.text and "pip install prodigyopt" in missing.text


def test_only_what_is_required_and_broken_fails(monkeypatch, capsys):
    assert doctor.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 25 and all(re.match(r"(OK  |WARN|FAIL)  \S", line) for line in lines)
    monkeypatch.setattr(doctor, "check_memory", lambda gib: doctor.Finding("WARN", "little"))
    assert doctor.main() == 0
    monkeypatch.setattr(doctor, "check_python", lambda version: doctor.Finding("FAIL", "old"))
    assert doctor.main() == 1


def test_it_runs_where_nothing_is_installed():
    """Isolated and without site-packages: the standard library alone, as before `make install`."""
    argv = [sys.executable, "-I", "-S", str(ROOT / "training/doctor.py")]
    result = subprocess.run(argv, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr == ""
    assert "FAIL  torch: not installed" in result.stdout and "torch is not installed; make install" in result.stdout


@pytest.mark.parametrize("command", ["training/doctor.py", "training/cogvideox_text_to_video_lora.py --help"])
def test_a_reader_that_closes_the_pipe_is_no_error(command):
    """As `| head -1` does. In a process of its own: what is tested is its end."""
    command = [sys.executable, *command.split()]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    stderr = process.stderr.read()
    assert process.wait(60) in (0, 1) and b"Broken" not in stderr and b"Traceback" not in stderr
