"""What the loop carries from step to step: `State`, a value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nextscale.contracts import Cache, Edit, Generators, Pick, Prepared
from nextscale.modules import usual_defaults
from nextscale.sampling.guidance import Guidance
from nextscale.sampling.pick import ScalePick
from nextscale.schedule import Schedule
from nextscale.settings import as_int, brief
from nextscale.tokens import Tokens, each


@contextmanager
def plain_tensors() -> Iterator[None]:
    """No gradients, and ordinary tensors even inside of a caller's `inference_mode`: a state may be stepped outside of it, and
    tables that are made here may be used in training next."""
    with usual_defaults(), torch.inference_mode(False), torch.no_grad():
        yield


@dataclass(frozen=True)
class State:
    """All that a sampling carries from step to step. It is a value: a step makes another one and leaves it as it is, so it can
    be stepped again, kept, or have several children. Nothing lives on a module, so samplings cannot disturb each other.

    Rows of `prepared` and `cache` are images x branches, branch by branch; all other rows are images.
    """

    schedule: Schedule
    guidance: Guidance
    pick: Pick | ScalePick
    f_hat: Tensor  # [B, C, H, W]
    prepared: Prepared
    cache: Cache
    branches: tuple[int, ...]  # those of the guidance that run
    noise: Noise
    edit: Edit | None = None
    k: int = 0  # the next scale
    tokens: list[Tokens] = field(default_factory=list)  # of the scales so far, [B, l_k] each
    carried: Mapping[str, Tensor] = field(default_factory=dict)  # what else a stepper carries, one row an image

    def __len__(self) -> int:
        return len(self.f_hat)

    @plain_tensors()
    def select(self, rows: Tensor) -> State:
        """Keep, re-order or copy images (int64 [rows']); a copied image continues with a copy of its generator. Raises
        ValueError for rows that there are not."""
        rows = torch.as_tensor(rows)
        if rows.ndim != 1 or rows.dtype.is_floating_point or not all(0 <= row < len(self) for row in rows.tolist()):
            raise ValueError(f"select: expected rows from 0 to {len(self) - 1}, got {brief(rows.tolist())}")
        stacked = torch.cat([rows + b * len(self) for b in range(len(self.branches))])
        edit = self.edit
        if edit is not None and hasattr(edit, "select"):  # one that knows images by their rows
            edit = edit.select(rows)
        return replace(
            self,
            f_hat=self.f_hat[rows],
            prepared=self.prepared.select(stacked),
            cache=self.cache.select(stacked),
            noise=self.noise.select(rows),
            edit=edit,
            tokens=[each(lambda t: t[rows], tokens) for tokens in self.tokens],
            carried={name: value[rows] for name, value in self.carried.items()},
        )


@dataclass(frozen=True)
class Noise:
    """Where the random numbers of the next step come from: the states of generators, so that the step can be taken again.

    states: one an image, or the one of `shared`, a generator of the caller that serves the whole batch and moves on with it.
    """

    device: torch.device
    states: tuple[Tensor, ...]
    shared: torch.Generator | None = None

    @classmethod
    def of(
        cls, seed: int | Sequence[int], generator: torch.Generator | None, batch: int, device: torch.device
    ) -> Noise:
        """Image i draws from seed + i, or from `seed[i]` of a sequence; or all from one generator. Raises ValueError for
        another number of seeds, and for what is no whole number."""
        if generator is not None:
            return cls(generator.device, (generator.get_state(),), generator)
        several = isinstance(seed, Sequence) or getattr(seed, "ndim", None)
        try:
            seeds = [as_int(one) for one in seed] if several else [as_int(seed) + i for i in range(batch)]  # type: ignore
        except TypeError:
            raise ValueError(f"seed: expected a whole number, or one for each image, got {brief(seed)}") from None
        if wrong := [one for one in seeds if not 0 <= one < 2**63]:
            raise ValueError(f"seed: expected numbers from 0 to 2^63 - 1, got {brief(wrong[0])}")
        if len(seeds) != batch:
            raise ValueError(f"seed needs one number, or one for each of {batch} images, got {len(seeds)}")
        return cls(device, tuple(torch.Generator(device).manual_seed(s).get_state() for s in seeds))

    def generators(self) -> Generators:
        """Generators in these states."""
        if self.shared is not None:
            return self.shared.set_state(self.states[0])
        return [torch.Generator(self.device).set_state(state) for state in self.states]

    def after(self, generators: Generators) -> Noise:
        """The states that generators have come to."""
        several = [generators] if isinstance(generators, torch.Generator) else generators
        return replace(self, states=tuple(one.get_state() for one in several))

    def select(self, rows: Tensor) -> Noise:
        """Keep, re-order or copy those of images; one for all stays."""
        if self.shared is not None:
            return self
        return replace(self, states=tuple(self.states[i] for i in rows.tolist()))
