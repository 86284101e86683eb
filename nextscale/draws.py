"""Random numbers of training: what step s draws follows from the seed and s, for any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


def generator_for(seed: int, step: int, use: str = "step") -> torch.Generator:
    """The generator of one step (or epoch) and one use, on the CPU."""
    salt = {"step": 0, "order": 1, "validation": 2, "init": 3, "augment": 4, "restart": 5}[use]
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 8 + salt)


@dataclass(frozen=True)
class Draws:
    """Random numbers for some images of a batch.

    They are drawn for the whole batch, and each part of it takes its rows: an image gets the same numbers however many
    processes and pieces the batch is shared by. `generator` itself is for what the whole batch shares.

    Args:
        generator: of the step; every part of a batch begins with one in the same state.
        total: images of the whole batch.
        rows: those of this part; all by default.
    """

    generator: torch.Generator
    total: int
    rows: slice = field(default_factory=lambda: slice(None))

    def __len__(self) -> int:
        return len(range(*self.rows.indices(self.total)))

    def rand(self, *shape: int) -> Tensor:
        """Uniform in [0, 1), [rows, *shape]."""
        return torch.rand(self.total, *shape, generator=self.generator)[self.rows]

    def randn(self, *shape: int) -> Tensor:
        """Normal, [rows, *shape]."""
        return torch.randn(self.total, *shape, generator=self.generator)[self.rows]

    def randint(self, low: int, high: int, *shape: int) -> Tensor:
        """Whole numbers from `low` to `high - 1`, int64 [rows, *shape]."""
        return torch.randint(low, high, (self.total, *shape), generator=self.generator)[self.rows]


@dataclass(frozen=True)
class BatchPart:
    """Some images of a batch, and their random numbers."""

    batch: dict[str, Any]  # entries [rows, ...]: tensors, lists, named tuples of tensors, or dicts of those
    draws: Draws


def normal(shape: Sequence[int], generators: torch.Generator | list[torch.Generator]) -> Tensor:
    """Normal numbers [B, ...] for sampling: of each image's own generator, or of one for all."""
    if isinstance(generators, torch.Generator):
        return torch.randn(tuple(shape), generator=generators, device=generators.device)
    return torch.stack([torch.randn(tuple(shape[1:]), generator=one, device=one.device) for one in generators])


def rows_of(values: Any, rows: int | slice) -> Any:
    """Some images of an entry of a batch, or one of them."""
    if isinstance(values, dict):
        return {name: rows_of(part, rows) for name, part in values.items()}
    if isinstance(values, tuple):
        return type(values)(*(part[rows] for part in values))
    return values[rows]


def rows_in(values: Any) -> int:
    """How many images an entry holds."""
    return len(values[0]) if isinstance(values, tuple) else len(values)
