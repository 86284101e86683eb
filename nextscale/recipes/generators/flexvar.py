"""FlexVAR: Flexible Visual Autoregressive Modeling without Residual Prediction (Jiao et al., NeurIPS 2025, arXiv 2502.20313).

Tokenizer: LlamaGen's autoencoder with unit-length codes; the map of every scale is the whole image at that size
(`PlainPyramid`). Model: VAR's transformer with one table of positions, resized to each scale (`ResizedPositions`). Objective:
another random list of sizes each step (`RandomSchedules`). So any list of sizes can be sampled, with as many steps, and
every step is an image.

What the official code (github.com/jiaosiyu1999/FlexVAR, MIT) does beyond that is left out unless asked for: guidance that
passes its weight after ten steps (`official_ramp`), greedy choices at sizes missing from a list (`official_pick`). Its images
are what the decoder gives; ours are clamped to [-1, 1]. `from_official` and `to_official` bring its models over and back.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from nextscale.contracts import Pyramid
from nextscale.draws import Draws
from nextscale.model.class_condition import ClassCondition
from nextscale.model.head import SoftmaxHead
from nextscale.model.joint_condition import style_readers, with_styles
from nextscale.model.positions import ResizedPositions
from nextscale.model.transformer import Transformer
from nextscale.model.transformer_settings import TransformerSettings
from nextscale.published.flexvar_layout import LAYOUT
from nextscale.published.flexvar_layout import OFFICIAL as OFFICIAL
from nextscale.published.flexvar_sampling import SAMPLING as SAMPLING
from nextscale.published.flexvar_sampling import SIZES
from nextscale.published.flexvar_sampling import SIZES_512 as SIZES_512
from nextscale.published.flexvar_sampling import official_pick as official_pick
from nextscale.published.flexvar_sampling import official_ramp as official_ramp
from nextscale.published.layout import from_states, to_states, with_own_weights
from nextscale.readers import ClassReader
from nextscale.sampling.defaults import SamplingDefaults
from nextscale.schedule import Schedule
from nextscale.settings import Settings
from nextscale.system import System
from nextscale.system_settings import ClassSystemSettings, Side, Sides
from nextscale.tokenizer.autoencoder import AutoencoderSettings
from nextscale.tokenizer.plain import PlainPyramid, PlainSettings
from nextscale.tokenizer.tokenizer import ImageTokenizer
from nextscale.tokens import joined
from nextscale.training.config import TokenizerLoss
from nextscale.training.objective import Batch, NextScale, Wants

# ---- objective: random schedules --------------------------------------------------------------------------------------


class RandomSchedules(Settings, NextScale):
    """The objective: teacher forcing on other (square) sizes each step. The defaults are FlexVAR's, for maps of 16x16.

    With Python's `random` seeded alike, `draw` gives the lists of the official trainer: it makes the same calls.
    """

    wants: ClassVar[Wants] = "features"

    whole: tuple[Side, ...] = Field(
        SIZES[10], min_length=1, max_length=1024, description="the list that is used as it is now and then"
    )
    whole_share: float = Field(0.05, ge=0, le=1, description="share of the steps that use it")
    first: tuple[Side, ...] = Field(
        (1, 2), min_length=1, max_length=1024, description="sizes that open all other lists"
    )
    ranges: tuple[tuple[Side, Side, Annotated[int, Field(ge=0, le=1024)]], ...] = Field(
        ((3, 10, 5), (11, 15, 2)),
        max_length=1024,
        description="then: smallest and largest size, and how many of them are drawn",
    )
    last: int = Field(16, ge=1, le=1024, description="size that ends them")
    drops: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(
        (0.1, 0.05, 0.02, 0.01),
        max_length=1024,
        description="share of the lists that lose at least one inner size, two, ...",
    )
    most_tokens: int = Field(
        680, ge=1, le=10**9, description="while a list has more tokens, one of its last four sizes is left out"
    )

    @model_validator(mode="after")
    def _check(self) -> RandomSchedules:
        for low, high, count in self.ranges:
            if not (1 <= low <= high and 0 <= count <= high - low + 1):
                raise ValueError(f"cannot draw {count} different sizes from {low} to {high}")
        if self.most_tokens < max(self.first[0], self.whole[0]) ** 2:
            raise ValueError(f"most_tokens={self.most_tokens} leaves no room for the first size of a list")
        return self

    def draw(self, rng: random.Random) -> list[int]:
        """The sides of one list, coarse to fine."""
        if rng.random() < self.whole_share:
            sides = list(self.whole)
        else:
            inner = [side for low, high, count in self.ranges for side in rng.sample(range(low, high + 1), count)]
            sides = [*self.first, *sorted(inner), self.last]
        fate = rng.random()
        for share in self.drops:
            places = range(len(self.first), len(sides) - 1)
            if fate > 1 - share and places:
                sides.pop(rng.choice(places))
        while sum(side**2 for side in sides) > self.most_tokens:  # may drop the last size: a third of FlexVAR's lists
            sides.pop(rng.choice(range(max(1, len(sides) - 4), len(sides))))
        return sides

    def batch(self, pyramid: Pyramid, content: Tensor, schedule: Schedule, draws: Draws) -> Batch:
        """Inputs and targets of features [B, C, h, w] on a schedule of this step's own."""
        seed = int(torch.randint(2**62, (1,), generator=draws.generator))
        drawn = Schedule.squares(*self.draw(random.Random(seed)))
        encoded = pyramid.encode(content, drawn)
        inputs = torch.cat(encoded.inputs, dim=1) if encoded.inputs else None
        return Batch(drawn, inputs, joined(encoded.tokens))


# ---- the system -------------------------------------------------------------------------------------------------------


class Config(ClassSystemSettings):
    """A FlexVAR system. The defaults are FlexVAR-d16 for 256 px ImageNet."""

    sizes: Sides = SIZES[10]
    autoencoder: AutoencoderSettings = AutoencoderSettings(width=128, latent=256, around=1)
    pyramid: PlainSettings = PlainSettings()
    transformer: TransformerSettings = TransformerSettings(drop_path=0.1 * 16 / 24, init_gate=1e-3)
    position_side: int = Field(32, ge=1, le=1024, description="side of the learned map of positions")
    schedules: RandomSchedules = RandomSchedules()
    sampling: SamplingDefaults = SamplingDefaults(guidance=3.5, top_k=900, top_p=0.95)


def tiny(**changes: object) -> Config:
    """A system of a hundred thousand parameters, for tests and first tries on a CPU: 64x64 pixels, scales 1 to 4."""
    settings: dict[str, object] = {
        "sizes": (1, 2, 3, 4),
        "num_classes": 124,
        "autoencoder": AutoencoderSettings(width=16, multipliers=(1, 1, 1), patch=4, blocks=1, groups=8, around=1),
        "pyramid": PlainSettings(codebook_size=32, code_dim=8),
        "transformer": TransformerSettings(depth=2, dim=32, num_heads=2, init_head=1.0, init_gate=1.0),
        "position_side": 8,
        "schedules": RandomSchedules(whole=(1, 2, 3, 4), first=(1,), ranges=((2, 3, 1),), last=4, drops=()),
        "sampling": SamplingDefaults(guidance=2.5, top_k=0, top_p=0.95),
    }
    return Config.model_validate(settings | changes)


def emoji_64(**changes: object) -> Config:
    """64x64 pixels on a stride of 8: maps of up to 8x8, trained on four to six of the sizes 1 to 8."""
    settings: dict[str, object] = {
        "sizes": (1, 2, 3, 4, 6, 8),
        "num_classes": 0,
        "autoencoder": AutoencoderSettings(patch=4, width=96, multipliers=(1, 1), groups=16, attention=False, around=1),
        "pyramid": PlainSettings(codebook_size=512, code_dim=16),
        "transformer": TransformerSettings(
            depth=8, dim=192, num_heads=6, shared_adaln=True, dropout=0.1, drop_path=0.1, init_gate=0.1
        ),
        "position_side": 16,
        "schedules": RandomSchedules(
            whole=(1, 2, 3, 4, 6, 8), first=(1, 2), ranges=((3, 5, 2), (6, 7, 1)), last=8, drops=(0.4, 0.2)
        ),
        "sampling": SamplingDefaults(guidance=4.0, top_k=50, top_p=0.85),
    }
    return Config.model_validate(settings | changes)


# How its tokenizer is trained here: half of the steps at another size than the last, so that the decoder knows them all.
TOKENIZER_LOSS = TokenizerLoss(drop_scales=0.5)


def build(config: Config, seed: int = 0, *, model: bool = True) -> System:
    """A system with initial weights that follow from `seed`; with `model=False`, or without classes, a tokenizer alone."""
    config.check_classes()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = ImageTokenizer(config.autoencoder, PlainPyramid(config.pyramid))
        transformer = build_model(config) if model and config.num_classes else None
    if transformer is not None:
        transformer.reset_parameters(torch.Generator().manual_seed(seed))
    return System(
        "flexvar",
        config,
        config.schedule,
        tokenizer,
        transformer,
        config.classes,
        sampling=config.sampling,
        objective=config.schedules,
        readers={"label": ClassReader(config.classes, config.num_classes), **style_readers(config.styles)},
    )


def build_model(config: Config) -> Transformer:
    """The transformer alone, with torch's own initial weights."""
    dim = config.transformer.dim
    return Transformer(
        config.transformer,
        code_dim=config.pyramid.code_dim,
        **with_styles("label", ClassCondition(config.num_classes, dim), config.styles, dim),
        positions=ResizedPositions(dim, config.position_side, starts=config.schedule.lengths[0]),
        head=SoftmaxHead(dim, config.pyramid.codebook_size),
    )


# ---- the official models: `published/flexvar_layout.py` ----------------------------------------------------------------


def from_official(
    vae_state: Mapping[str, Tensor],
    var_state: Mapping[str, Tensor],
    vae_args: Mapping[str, Any] | None = None,
    var_args: Mapping[str, Any] | None = None,
) -> System:
    """A system from state dicts of the official code; its weights are copies.

    Args:
        vae_state, var_state: its VQModel's and FlexVAR's state dicts, under their own key names. `zero_k_bias` may be left
            out; `quantize.codebook_used` and `attn_bias_for_masking` are not read.
        vae_args, var_args: keyword arguments of its constructors; missing ones take its defaults.

    Raises ValueError for unknown arguments, and for keys, shapes or values that do not fit.
    """
    config = official_config(vae_args or {}, var_args or {})
    return with_own_weights(from_states(LAYOUT, build, config, (vae_state, var_state)))


def to_official(system: System) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State dicts of the official VQModel and FlexVAR that hold a system; weights are shared.

    Raises ValueError for a system that the official classes cannot express.
    """
    return to_states(LAYOUT, system)


def official_config(vae_args: Mapping[str, Any], var_args: Mapping[str, Any]) -> Config:
    """Our settings for the official constructors' arguments."""
    return LAYOUT.settings(Config, vae_args, var_args)


PRESETS: dict[str, Callable[..., Config]] = {
    "emoji-64": emoji_64,
    "tiny": tiny,
    **{name.removeprefix("flexvar-"): published.config for name, published in OFFICIAL.items()},
}
