"""Memory of the process: how much it took at most, and what it does with what is freed."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import nn

from nextscale.system import System
from nextscale.training.config import TrainConfig

# Of glibc's malloc.h.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3


def peak_memory(device: str) -> float:
    """Most memory in use so far, in GB: of the accelerator, or else of this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # not on Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def keep_freed_memory() -> None:
    """Let glibc keep what this process frees, up to 2 GB, instead of giving it back and fetching it again page by page in
    every step: a tenth of the time of training on a CPU. Tensors above 32 MB are still given back.

    Does nothing with another C library, or where the environment already says something (`MALLOC_...`, `GLIBC_TUNABLES`).
    """
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)


# Bytes that training keeps of each weight in float32: the weight, its gradient, two averages of AdamW, the averaged weight.
KEPT = 5 * 4


def built_to_train(build: Callable[[], System], trained: str, config: TrainConfig) -> System:
    """A new system, after a look, without memory, at whether its training fits into that of this machine.

    trained: `tokenizer` or `model`. What is counted, weights and the outputs of layers, is less than what training takes.
    Accelerators say themselves what is too much, and several processes may share it. Raises ValueError with the two numbers.
    """
    if torch.device(config.device).type != "cpu" or os.environ.get("WORLD_SIZE", "1") != "1":
        return build()
    with torch.device("meta"):
        system = build()
    module = getattr(system, trained)
    needed = KEPT * sum(parameter.numel() for parameter in module.parameters())
    if not config.recompute:
        height, width = system.schedule[-1]
        needed += 4 * (config.batch_size // config.accumulate) * height * width * _widths(module)
    if needed > (there := machine_memory()):
        raise ValueError(
            f"training this {trained} takes {needed / 1e9:,.0f} GB or more, and this machine has {there / 1e9:.0f}; choose a "
            "smaller shape, or fewer images a step"
        )
    return build()


def _widths(module: nn.Module) -> int:
    """Numbers that layers put out for a place of the token map, without those of finer maps."""
    convolutions = [layer.out_channels for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    if convolutions:
        return sum(convolutions)
    named = module.named_modules()
    return sum(m.out_features for name, m in named if isinstance(m, nn.Linear) and "modulation" not in name)


def machine_memory() -> float:
    """Bytes of memory of this machine; where it does not say, as many as there can be."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return float("inf")
