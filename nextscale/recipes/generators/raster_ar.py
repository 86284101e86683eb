"""Next-token prediction in raster order: the baseline that VAR is measured against (Sec. 3.1 of VAR; VQGAN, Esser et al. 2021).

One token map, token after token, row after row. Steps are scales of one token each: block-causal attention is then causal
attention, and the cache of keys and values, guidance, likelihood and the loop are VAR's own. Only the pyramid differs: a
token is put in its place of the feature map, and the next step reads the code before it.

Its tokenizer is VAR's with a single scale, trained by `nextscale train tokenizer --recipe raster_ar`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from pydantic import field_validator
from torch import Tensor

from nextscale.contracts import Corrupt, Encoded
from nextscale.model.joint_condition import style_readers
from nextscale.output import Images
from nextscale.readers import ClassReader
from nextscale.recipes.generators import var
from nextscale.schedule import Schedule
from nextscale.system import System
from nextscale.system_settings import Sides
from nextscale.tokenizer.maps import as_rows
from nextscale.tokenizer.pyramid import PyramidSettings, ResidualPyramid
from nextscale.tokenizer.tokenizer import ImageTokenizer
from nextscale.tokens import Tokens
from nextscale.training.config import TokenizerLoss
from nextscale.training.objective import TeacherForcing

# A single scale has no residuals: what upsampling needs is left out.
PYRAMID = PyramidSettings(phi_ratio=0)


class Config(var.Config):
    """A raster-order system. The defaults are VAR-d16's tokenizer and transformer, for 256 px ImageNet."""

    sizes: Sides = (16,)
    pyramid: PyramidSettings = PYRAMID

    @field_validator("sizes")
    @classmethod
    def _one_map(cls, sizes: tuple[int | tuple[int, int], ...]) -> tuple[int | tuple[int, int], ...]:
        if len(sizes) != 1:
            raise ValueError(f"a raster order goes through one token map, got {len(sizes)}; give the size of one")
        return sizes


def tiny(**changes: object) -> Config:
    """VAR's tiny system with one map of 4x4 tokens."""
    shape = var.tiny()
    settings: dict[str, object] = {
        "sizes": (4,),
        "num_classes": shape.num_classes,
        "autoencoder": shape.autoencoder,
        "pyramid": PYRAMID.model_copy(update={"codebook_size": 32, "code_dim": 8}),
        "transformer": shape.transformer,
    }
    return Config.model_validate(settings | changes)


def emoji_64(**changes: object) -> Config:
    """The shipped system `emoji-64` with one map of 8x8 tokens."""
    shape = var.emoji_64()
    settings: dict[str, object] = {
        "sizes": (8,),
        "num_classes": shape.num_classes,
        "autoencoder": shape.autoencoder,
        "pyramid": PYRAMID.model_copy(update={"codebook_size": 512, "code_dim": 16, "standardize": True}),
        "transformer": shape.transformer,
        "sampling": shape.sampling,
    }
    return Config.model_validate(settings | changes)


TOKENIZER_LOSS = TokenizerLoss(drop_scales=0.0)  # there is one, which is always kept


class RasterPyramid(ResidualPyramid):
    """VAR's pyramid of one scale, [h, w], whose tokens may also come one a step: `Schedule(((1, 1),) * (h * w))`."""

    def __init__(self, settings: PyramidSettings, size: tuple[int, int]) -> None:
        super().__init__(settings, num_scales=1)
        self.size = size

    def start(self, batch: int, schedule: Schedule, device: torch.device | str | None = None) -> Tensor:
        """No token is known: zeros [B, C, h, w]."""
        return super().start(batch, Schedule((self.size,)), device)

    def add(self, f_hat: Tensor, tokens: Tokens, k: int, schedule: Schedule) -> Tensor:
        """The codes of step k in their place."""
        if not self._by_token(schedule):
            return super().add(f_hat, tokens, k, schedule)
        return _put(f_hat, super().contribution(tokens, 0, schedule), k)

    def next_input(self, f_hat: Tensor, k: int, schedule: Schedule) -> Tensor:
        """The code before, [B, 1, C]."""
        return as_rows(f_hat)[:, k - 1 : k]

    def encode(self, f: Tensor, schedule: Schedule, corrupt: Corrupt | None = None) -> Encoded:
        """Tokens, inputs and maps of a feature map [B, C, h, w]."""
        if not self._by_token(schedule):
            return super().encode(f, schedule, corrupt)
        (whole,) = super().encode(f, Schedule((self.size,))).tokens
        found = Encoded(list(whole.split(1, dim=1)), [], [])  # type: ignore[union-attr]
        f_hat = self.start(len(f), schedule, f.device)
        for k, tokens in enumerate(found.tokens):
            f_hat = self.add(f_hat, tokens if corrupt is None else corrupt(tokens, k), k, schedule)
            found.f_hats.append(f_hat)
            if k + 1 < len(schedule):
                found.inputs.append(self.next_input(f_hat, k + 1, schedule))
        return found

    def check_scales(self, schedule: Schedule, trained: Schedule) -> None:
        """The one map, or its steps."""
        if schedule.sizes != (self.size,) and not self._by_token(schedule):
            raise ValueError(f"this tokenizer has one map of {self.size[0]}x{self.size[1]} tokens, got {schedule}")

    def _by_token(self, schedule: Schedule) -> bool:
        return schedule == steps(self.size) and schedule.sizes != (self.size,)


def _put(f_hat: Tensor, codes: Tensor, k: int) -> Tensor:
    """A map [B, C, h, w] with `codes` [B, C, 1, 1] at its k-th place."""
    filled = f_hat.clone()
    filled.flatten(2)[:, :, k] = codes[:, :, 0, 0]
    return filled


def steps(size: tuple[int, int]) -> Schedule:
    """One token a step."""
    return Schedule(((1, 1),) * (size[0] * size[1]))


@dataclass(frozen=True)
class OneMap(Images):
    """Images of one token map, whatever the steps: `size` is the map's."""

    size: tuple[int, int] = (1, 1)

    def shape(self, schedule: Schedule, stride: int) -> tuple[int, ...]:
        """(channels, H, W)."""
        return self.channels, self.size[0] * stride, self.size[1] * stride


def build(config: Config, seed: int = 0, *, model: bool = True) -> System:
    """A system with initial weights that follow from `seed`. With `model=False`, or without classes, a tokenizer alone,
    which is trained on its map as one scale."""
    config.check_classes()
    (size,) = config.schedule.sizes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = ImageTokenizer(config.autoencoder, RasterPyramid(config.pyramid, size))
        transformer = var.build_model(config, steps(size)) if model and config.num_classes else None
    if transformer is not None:
        transformer.reset_parameters(torch.Generator().manual_seed(seed))
    return System(
        "raster_ar",
        config,
        config.schedule if transformer is None else steps(size),
        tokenizer,
        transformer,
        config.classes,
        sampling=config.sampling,
        objective=TeacherForcing(),
        readers={"label": ClassReader(config.classes, config.num_classes), **style_readers(config.styles)},
        output=OneMap(tokenizer.channels, size=size),
    )


PRESETS: dict[str, Callable[..., Config]] = {"emoji-64": emoji_64, "tiny": tiny, "d16": Config}
