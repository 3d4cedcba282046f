"""Turns on expandable segments in torch's CUDA allocator, which reduce fragmentation.

By default torch allocates segments of fixed size, and a tensor that fits into no gap takes another one. The memory
reserved both ways is in benchmarks/speed.csv. See "Optimizing memory usage" in torch's notes on CUDA.
"""

import logging
import os
import re

import torch

from base.errors import first_line


logger = logging.getLogger(__name__)

SETTING = "expandable_segments"
# torch reads the first of these that is set (the last is the newest name). A user's setting is left alone
VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def given_settings() -> str | None:
    """The allocator settings in the environment, if any."""
    return next((os.environ[name] for name in VARIABLES if name in os.environ), None)


def uses_expandable_segments() -> bool:
    """Whether segments are expandable: yes, unless the environment configures torch's allocator otherwise."""
    given = given_settings()
    return given is None or re.findall(rf"{SETTING}\s*:\s*(\w+)", given)[-1:] == ["True"]


def expand_segments(device: torch.device) -> None:
    """Turn expandable segments on. If the driver cannot map pages, warn and keep torch's default.

    Raises torch's own error if the GPU cannot be used at all.
    """
    if device.type != "cuda" or given_settings() is not None:
        return
    configure(f"{SETTING}:True")
    try:
        torch.empty(1, device=device)
    except RuntimeError as error:
        os.environ[VARIABLES[-1]] = f"{SETTING}:False"  # read by `uses_expandable_segments`, for the estimates
        configure(f"{SETTING}:False")
        torch.empty(1, device=device)  # raises if the cause was another
        logger.warning("expandable segments do not work here, so more GPU memory is needed: %s", first_line(error))


def configure(settings: str) -> None:
    """Apply settings, in the syntax of the environment variables, which torch itself reads only once."""
    torch._C._accelerator_setAllocatorSettings(settings)  # torch.cuda's public function is deprecated
