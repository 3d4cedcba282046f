"""Finds the compilers and headers that Triton and DeepSpeed need to build kernels at the first step."""

import os
import shutil
import sys
import sysconfig
from pathlib import Path


def c_compiler() -> str | None:
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def cxx_compiler() -> str | None:
    """The compiler that torch's extensions use."""
    return shutil.which(os.environ.get("CXX", "c++"))


def cuda_toolkit() -> str | None:
    """nvcc, where torch's extensions look for it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which(str(Path(home, "bin", "nvcc")))
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def python_header() -> Path:
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # Debian's own Python
    return Path(sysconfig.get_path("include", scheme), "Python.h")


def missing_for_triton() -> str | None:
    """What is missing, with the command that installs it; None if nothing is."""
    if c_compiler() is None:
        return "there is no C compiler; apt-get install gcc"
    if not python_header().exists():
        return f"Python.h is missing; apt-get install python{sys.version_info.major}.{sys.version_info.minor}-dev"
    return None
