"""torch's memory on the GPU in segments that grow by pages: less of it is held and not used.

By default torch asks for memory in blocks of fixed size, and what does not fit into a gap of one asks for a further one.
How much either holds is in benchmarks/speed.csv. See "Optimizing memory usage" in torch's notes on CUDA.
"""

import logging
import os
import re

import torch

from base.errors import first_line


logger = logging.getLogger(__name__)

SETTING = "expandable_segments"
# torch's own, of which it takes the first that is set, the last the newest; what a user sets there stands
VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def given_settings() -> str | None:
    """What the environment tells torch's allocator, if anything."""
    return next((os.environ[name] for name in VARIABLES if name in os.environ), None)


def uses_expandable_segments() -> bool:
    """Whether segments grow: unless the environment configures torch's allocator otherwise."""
    given = given_settings()
    return given is None or re.findall(rf"{SETTING}\s*:\s*(\w+)", given)[-1:] == ["True"]


def expand_segments(device: torch.device) -> None:
    """Let segments grow from here on. Where the driver cannot map pages, a warning, and torch's default.

    Raises what torch does where the GPU cannot be used at all.
    """
    if device.type != "cuda" or given_settings() is not None:
        return
    configure(f"{SETTING}:True")
    try:
        torch.empty(1, device=device)
    except RuntimeError as error:
        os.environ[VARIABLES[-1]] = f"{SETTING}:False"  # for the estimates, too
        configure(f"{SETTING}:False")
        torch.empty(1, device=device)  # or it was something else
        logger.warning("GPU memory cannot grow by pages here, so that more of it is needed: %s", first_line(error))


def configure(settings: str) -> None:
    """Give torch's allocator settings in the form of its variables, which it reads but once."""
    torch._C._accelerator_setAllocatorSettings(settings)  # torch.cuda's own function for it is deprecated
