"""Memory of the process: how much it took at most, and what it does with what is freed."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor, nn

from nextscale.modules import as_module
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
    Raises ValueError with the two numbers.
    """
    if not _is_counted(config):
        return build()
    with torch.device("meta"):
        system, outputs = build(), 0
        if not config.recompute:
            outputs = _outputs_of_tokenizer(system) if trained == "tokenizer" else _outputs(system)
    check_memory(getattr(system, trained), trained, config, config.batch_size // config.accumulate * outputs)
    return build()


def _is_counted(config: TrainConfig) -> bool:
    """Whether what a training takes lies in this machine's memory, and all of it."""
    return torch.device(config.device).type == "cpu" and os.environ.get("WORLD_SIZE", "1") == "1"


def check_memory(module: nn.Module, name: str, config: TrainConfig, outputs: int = 0) -> None:
    """Refuse a module, perhaps on the device meta, whose training cannot fit into this machine. `outputs`: numbers that its
    layers put out in a step. Accelerators say themselves what is too much, and several processes may share it."""
    if not _is_counted(config):
        return
    needed = KEPT * sum(parameter.numel() for parameter in module.parameters()) + 4 * outputs
    if needed > (there := machine_memory()):
        raise ValueError(
            f"training this {name} takes {needed / 1e9:,.0f} GB or more, and this machine has {there / 1e9:.0f}; choose a "
            "smaller shape, or fewer images a step"
        )


def _outputs_of_tokenizer(system: System) -> int:
    """Numbers that the layers of encoder and decoder, on the device meta, put out for an image."""
    tokenizer, found = system.tokenizer, 0

    def count(layer: nn.Module, given: tuple[object, ...], output: object) -> None:
        nonlocal found
        found += output.numel() if isinstance(output, Tensor) and output is not given[0] else 0

    handles = [
        layer.register_forward_hook(count) for layer in as_module(tokenizer).modules() if not [*layer.children()]
    ]
    try:
        with torch.no_grad():
            tokenizer.decode(
                tokenizer.features(torch.zeros(1, *system.output.shape(system.schedule, tokenizer.stride)))
            )
    finally:
        for handle in handles:
            handle.remove()
    return found


def _outputs(system: System) -> int:
    """Numbers that the linear layers of the model put out for an image, without those of coarser maps."""
    named = as_module(system.model).named_modules()
    widths = [m.out_features for name, m in named if isinstance(m, nn.Linear) and "modulation" not in name]
    return system.schedule.lengths[-1] * sum(widths)


def machine_memory() -> float:
    """Bytes of memory of this machine; where it does not say, as many as there can be."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return float("inf")
