#!/usr/bin/env python
"""Check this machine for everything that training needs: one line per check, with the fix.

python training/doctor.py

Exit code 0 unless something required is broken. Standard library only, so that it runs before anything is installed;
no network access.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


sys.path.insert(0, str(Path(__file__).parent))  # missing under python -I (isolated mode)

from base.errors import print_to_pipe
from base.toolchain import c_compiler, cuda_toolkit, cxx_compiler, python_header


ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "assets" / "tests" / "videos" / "circle_right.mp4"
GIB = 2**30
MODEL_DISK = 20e9  # bytes for a model, T5-XXL included
MIN_HOST_GIB = 32  # GiB: T5-XXL in fp32 takes 18 during data preparation
MIN_GPU_GIB = 4  # GiB: a LoRA of 2b with --memory stream, the minimum in the README's table, plus the CUDA context
DEEPSPEED_WITHOUT_NVCC = (
    "0.19.8"  # the first DeepSpeed that can compile its CPU optimizer on a GPU machine without nvcc
)
# {major CUDA version of the driver: PyTorch's build}; any driver of that major version runs it
TORCH_BUILDS = {12: "cu126", 13: "cu130"}

# Optional back ends: {package: (flag that needs it, or None; pip requirement)}
OPTIONAL = {
    "bitsandbytes": ("--use_8bit", "bitsandbytes"),
    "torchao": ("--use_torchao, --use_4bit and --use_fp8", "torchao"),
    "prodigyopt": ("--optimizer prodigy", "prodigyopt"),
    "came-pytorch": ("--optimizer came", "came-pytorch"),
    "wandb": ("--report_to wandb", "wandb"),
    "tensorboard": ("--report_to tensorboard", "tensorboard"),
    "trackio": ("--report_to trackio", "trackio"),
    "deepspeed": ("accelerate_configs/deepspeed.yaml", "deepspeed"),
    "sageattention": ("--validation_attention sage", "sageattention"),
    "flash-attn-4": ("--attention fa4", "flash-attn-4==4.0.0b36"),
    "flash-attn": (None, "flash-attn"),
}


class Finding(NamedTuple):
    state: str  # OK, WARN or FAIL; only FAIL is an error
    text: str  # what was found and, unless OK, what to do


class Gpu(NamedTuple):
    name: str
    memory: float  # GiB
    capability: tuple[int, int]


def main() -> int:
    driver, cuda, num_gpus = probe_driver()
    findings = [check_python(sys.version_info[:3])]
    findings += check_packages(read_requirements(ROOT / "requirements.txt"), installed_version)
    findings += check_gpus(driver, cuda, num_gpus, probe_torch())
    findings.append(check_compiler(c_compiler(), python_header().exists()))
    findings.append(check_memory(host_memory()))
    findings += [check_disk(name, folder, free_bytes(folder)) for name, folder in disk_folders()]
    findings += check_decoders({name: probe_decoder(name) for name in ("av", "decord") if installed_version(name)})
    findings += [check_optional(name, installed_version(name)) for name in OPTIONAL]
    builders = cxx_compiler(), shutil.which("ninja"), cuda_toolkit()
    findings.append(check_deepspeed_ops(installed_version("deepspeed"), *builders, has_gpu=num_gpus > 0))
    findings += [check_login(hub_token()), Finding("OK", "ffmpeg: not needed")]
    print_to_pipe("\n".join(f"{finding.state:<4}  {finding.text}" for finding in findings))
    return int(any(finding.state == "FAIL" for finding in findings))


# ---------------------------------------------------------------- Python and packages


def check_python(version: tuple[int, ...]) -> Finding:
    text = f"Python {'.'.join(map(str, version))}"
    if (3, 11) <= version[:2] <= (3, 13):
        return Finding("OK", text)
    return Finding("FAIL", f"{text}: 3.11, 3.12 or 3.13 is needed; make install PYTHON=python3.12")


class Requirement(NamedTuple):
    name: str
    bounds: str  # >=1,<2
    optional: bool
    marker: str | None  # the only platform_machine with a wheel


def read_requirements(path: Path) -> list[Requirement]:
    """The lines of requirements.txt; those below its heading "Optional back ends" are not required."""
    found, optional = [], False
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            optional = optional or line.startswith("# Optional")
            continue
        requirement, _, marker = line.partition("#")[0].partition(";")
        if match := re.match(r"\s*([\w.-]+)\s*(\S*)\s*$", requirement):
            machine = re.search(r'platform_machine == "(\w+)"', marker)
            found.append(Requirement(match[1], match[2], optional, machine[1] if machine else None))
    return found


def check_packages(requirements: list[Requirement], version_of) -> list[Finding]:
    """One line per required package, and per optional package installed in an unsupported version."""
    findings = []
    for name, bounds, optional, marker in requirements:
        if marker and marker != platform.machine():
            continue
        version, wanted = version_of(name), f'pip install "{name}{bounds}"'
        if version is None:
            if not optional:
                findings.append(Finding("FAIL", f"{name}: not installed; make install, or {wanted}"))
        elif not within(version, bounds):
            state = "WARN" if optional else "FAIL"
            findings.append(Finding(state, f"{name} {version}: {bounds} is needed; {wanted}"))
        elif not optional:
            findings.append(Finding("OK", f"{name} {version}"))
    return findings


def within(version: str, bounds: str) -> bool:
    """Whether a version meets bounds such as >=1.2,<2; suffixes (rc1, +cu130) are ignored."""
    tests = {">=": lambda a, b: a >= b, "<": lambda a, b: a < b, "==": lambda a, b: a == b}
    number = numbers(version)
    pairs = re.findall(r"(>=|==|<)([\d.]+)", bounds)
    return all(tests[sign](number, numbers(bound)) for sign, bound in pairs)


def numbers(version: str) -> tuple[int, ...]:
    """1.2.0+cu130 as (1, 2): trailing zeros are dropped, so that 1.2 equals 1.2.0."""
    parts = [int(part) for part in re.match(r"[\d.]*", version)[0].split(".") if part]
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_optional(name: str, version: str | None) -> Finding:
    flag, package = OPTIONAL[name]
    if flag is None:
        return Finding("OK", f"{name}: {version or 'not installed'}; not needed, PyTorch brings the same attention")
    if version:
        return Finding("OK", f"{name} {version}, for {flag}")
    return Finding("OK", f"{name}: not installed, and needed for {flag} only; pip install {package}")


def check_deepspeed_ops(
    version: str | None, compiler: str | None, ninja: str | None, toolkit: str | None, has_gpu: bool
) -> Finding:
    """Whether DeepSpeed can compile its CPU optimizer, which it does on first use."""
    use = "DeepSpeed's CPU optimizer (accelerate_configs/deepspeed.yaml)"
    found = f"C++ compiler {compiler or 'none'}, ninja {ninja or 'none'}, nvcc {toolkit or 'none'}"
    needs_toolkit = has_gpu and version is not None and not within(version, f">={DEEPSPEED_WITHOUT_NVCC}")
    lacking = [
        (compiler is None, "apt-get install g++"),
        (ninja is None, "pip install ninja, and its folder on PATH"),
        (needs_toolkit and toolkit is None, f'pip install "deepspeed>={DEEPSPEED_WITHOUT_NVCC},<1", or set CUDA_HOME'),
    ]
    fixes = [fix for lacks, fix in lacking if lacks]
    if fixes:
        return Finding("WARN", f"{use} cannot be compiled: {found}; {'; '.join(fixes)}")
    return Finding("OK", f"{use} can be compiled: {found}{'' if needs_toolkit else ', which it can do without'}")


# ---------------------------------------------------------------- GPU


class TorchProbe(NamedTuple):
    """What torch reports; `error` if it cannot be imported."""

    cuda: str | None = None  # the CUDA version it was built for; None: a CPU build
    available: bool = False
    gpus: tuple[Gpu, ...] = ()
    error: str | None = None


def probe_driver() -> tuple[str | None, str | None, int]:
    """(driver, highest CUDA version it supports, number of GPUs) from nvidia-smi; (None, None, 0) without it."""
    try:
        shown = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=30).stdout
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None, None, 0
    driver, cuda = re.search(r"Driver Version: *([\d.]+)", shown), re.search(r"CUDA Version: *([\d.]+)", shown)
    return driver and driver[1], cuda and cuda[1], len(re.findall(r"^GPU \d+:", listed, re.M))


def probe_torch() -> TorchProbe | None:
    """Import torch and list its GPUs; None if torch is not installed."""
    if installed_version("torch") is None:
        return None
    try:
        import torch
    except (ImportError, OSError) as error:
        return TorchProbe(error=str(error).splitlines()[0])
    if not torch.cuda.is_available():
        return TorchProbe(torch.version.cuda)
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    gpus = tuple(Gpu(device.name, device.total_memory / GIB, (device.major, device.minor)) for device in devices)
    return TorchProbe(torch.version.cuda, True, gpus)


def check_gpus(driver: str | None, cuda: str | None, num_gpus: int, torch: TorchProbe | None) -> list[Finding]:
    """One line comparing the driver with torch's CUDA, then one line per GPU."""
    if torch is None:
        return [Finding("FAIL", "GPU: not looked at, because torch is not installed; make install")]
    if torch.error:
        return [Finding("FAIL", f"torch cannot be imported ({torch.error}); install it again: make install")]
    if torch.gpus:
        text = f"driver {driver or 'unknown'} for CUDA {cuda or 'unknown'}, torch built for CUDA {torch.cuda}"
        return [Finding("OK", text), *(check_gpu(index, gpu) for index, gpu in enumerate(torch.gpus))]
    if not num_gpus:
        return [Finding("WARN", "GPU: none found by nvidia-smi; only tiny models train on a CPU")]
    if torch.cuda is None:
        return [Finding("FAIL", f"torch is built for the CPU, and there are {num_gpus} GPUs; {install_torch(cuda)}")]
    if cuda and major(cuda) < major(torch.cuda):
        text = f"driver {driver} supports CUDA {cuda}, torch is built for {torch.cuda}"
        return [Finding("FAIL", f"{text}; update the driver, or {install_torch(cuda)}")]
    fix = "look at CUDA_VISIBLE_DEVICES, and start a container with --gpus all"
    return [Finding("FAIL", f"torch sees none of the {num_gpus} GPUs; {fix}")]


def major(cuda: str) -> int:
    return int(cuda.split(".")[0])


def install_torch(cuda: str | None) -> str:
    """The command that installs a torch build for a driver that supports this CUDA version."""
    build = TORCH_BUILDS.get(min(major(cuda), max(TORCH_BUILDS)) if cuda else max(TORCH_BUILDS))
    if build is None:
        return "update the driver: no torch of these releases supports it"
    return f"pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/{build}"


def check_gpu(index: int, gpu: Gpu) -> Finding:
    bf16 = gpu.capability >= (8, 0)
    capability = ".".join(map(str, gpu.capability))
    text = f"GPU {index}: {gpu.name}, {gpu.memory:.0f} GiB, compute capability {capability}, bf16 {'yes' if bf16 else 'no'}"
    if not bf16:
        return Finding("WARN", f"{text}; train CogVideoX-2b with --mixed_precision fp16, the other models need bf16")
    if gpu.memory < MIN_GPU_GIB:
        return Finding(
            "WARN",
            f"{text}; a LoRA of CogVideoX-2b at full size takes {MIN_GPU_GIB} GiB, without validation: smaller buckets",
        )
    return Finding("OK", text)


def check_compiler(compiler: str | None, has_header: bool) -> Finding:
    """Triton compiles its kernel launchers as C code at the first step."""
    use = "a LoRA and compiled blocks need on a GPU"
    if compiler is None:
        return Finding("WARN", f"C compiler: none, which {use}; apt-get install gcc")
    if not has_header:
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        return Finding("WARN", f"C compiler: {compiler}, without Python.h, which {use}; apt-get install {package}")
    return Finding("OK", f"C compiler: {compiler}, with Python.h")


# ---------------------------------------------------------------- memory and disk


def host_memory() -> float:
    """GiB of this machine, or of this container if its limit is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else ""
    return min(total, int(text) if text.isdigit() else total) / GIB


def check_memory(gib: float) -> Finding:
    text = f"host memory: {gib:.0f} GiB"
    if gib < MIN_HOST_GIB:
        return Finding(
            "WARN", f"{text}; the 5b models want {MIN_HOST_GIB}: prepare with --dtype bf16, close other programs"
        )
    return Finding("OK", text)


def disk_folders() -> list[tuple[str, Path]]:
    cache = os.environ.get("HF_HUB_CACHE") or Path(
        os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface", "hub"
    )
    return [("models from the hub (HF_HOME)", Path(cache)), ("the working directory", Path.cwd())]


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk where `folder` is or will be."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def check_disk(name: str, folder: Path, free: int) -> Finding:
    text = f"disk for {name}, {folder}: {free / 1e9:.0f} GB free"
    if free < MODEL_DISK:
        return Finding("WARN", f"{text}; a model takes {MODEL_DISK / 1e9:.0f} GB: make room, or choose another disk")
    return Finding("OK", text)


# ---------------------------------------------------------------- videos and the hub


def probe_decoder(name: str) -> str | None:
    """None if the installed package decodes the sample clip, else why not."""
    try:
        {"av": decode_by_av, "decord": decode_by_decord}[name](str(SAMPLE))
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return None


def decode_by_av(path: str) -> None:
    import av

    with av.open(path) as video:
        next(video.decode(video=0))


def decode_by_decord(path: str) -> None:
    import decord

    try:
        decord.VideoReader(path)[0]
    except decord.DECORDError as error:
        raise RuntimeError(str(error)) from error


def check_decoders(problems: dict[str, str | None]) -> list[Finding]:
    """One line per installed decoder."""
    findings = []
    for name, problem in problems.items():
        fix = f"({problem}); pip install --force-reinstall {name}"
        failed = Finding("FAIL", f"{name} cannot decode a sample clip {fix}")
        findings.append(failed if problem else Finding("OK", f"{name} decodes a sample clip"))
    return findings


def hub_token() -> bool:
    """Whether a token exists, in the environment or from an earlier `hf auth login`. It is not tested."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    stored = Path(os.environ.get("HF_TOKEN_PATH") or home / "token")
    return any(os.environ.get(name) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")) or stored.exists()


def check_login(logged_in: bool) -> Finding:
    if logged_in:
        return Finding("OK", "hub: there is a token (not tried), for --push_to_hub")
    return Finding("OK", "hub: not logged in, and needed for --push_to_hub only; hf auth login")


if __name__ == "__main__":
    sys.exit(main())
