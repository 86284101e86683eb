"""Memory of the process: how much it took at most, and what it does with what is freed."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from nextscale.system import System

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


def built_to_train(build: Callable[[], System], batch: int, trained: str) -> System:
    """A new system, after a look, without memory, at whether its training fits into that of this machine.

    trained: `tokenizer` or `model`. batch: images in a forward pass. What is counted, weights and the outputs of layers, is
    less than what training takes. Raises ValueError with the two numbers.
    """
    with torch.device("meta"):
        system = build()
    module = getattr(system, trained)
    needed = KEPT * sum(parameter.numel() for parameter in module.parameters())
    needed += 4 * batch * (_outputs(system) if trained == "tokenizer" else system.schedule.length * _widths(module))
    if needed > (there := machine_memory()):
        raise ValueError(
            f"training this {trained} takes {needed / 1e9:,.0f} GB or more, and this machine has {there / 1e9:.0f}; choose a "
            "smaller shape, or fewer images a step"
        )
    return build()


def _widths(model: nn.Module) -> int:
    """Numbers that a transformer's linear layers put out for a token; modulations are for images."""
    layers = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "modulation" not in name]
    return sum(layer.out_features for layer in layers)


def machine_memory() -> float:
    """Bytes of memory of this machine; where it does not say, as many as there can be."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return float("inf")


def _outputs(system: System) -> int:
    """Numbers that the layers of a tokenizer put out for an image, which the backward pass wants."""
    count = 0

    def add(module: nn.Module, inputs: object, output: object) -> None:
        nonlocal count
        count += output.numel() if isinstance(output, torch.Tensor) else 0

    tokenizer: Any = system.tokenizer
    layers = [module for module in tokenizer.modules() if not list(module.children())]
    hooks = [layer.register_forward_hook(add) for layer in layers]
    image = torch.zeros(1, *system.output.shape(system.schedule, tokenizer.stride), device="meta")
    with torch.no_grad():
        tokenizer.decode(tokenizer.features(image))
    for hook in hooks:
        hook.remove()
    return count
