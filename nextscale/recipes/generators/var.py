"""VAR: Visual Autoregressive Modeling (Tian et al., NeurIPS 2024, arXiv 2404.02905).

Tokenizer: convolutional autoencoder with a residual pyramid. Model: transformer with AdaLN and qk-norm attention over
learned positions, class condition, softmax head. Nothing differs from the paper; the settings add `patch`, `dropout`
and rectangular schedules.

`from_official` brings over any model of the reference code (github.com/FoundationVision/VAR, MIT) and `to_official` takes
one back; the tables are in `nextscale/published/var_layout.py`. `OFFICIAL` lists the published checkpoints, which
`nextscale convert` reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from nextscale.model.class_condition import ClassCondition
from nextscale.model.head import SoftmaxHead
from nextscale.model.joint_condition import style_readers, with_styles
from nextscale.model.positions import LearnedPositions
from nextscale.model.transformer import Transformer
from nextscale.model.transformer_settings import TransformerSettings
from nextscale.published.layout import from_states, to_states, with_own_weights
from nextscale.published.var_layout import LAYOUT, SIZES_256, USAGE
from nextscale.published.var_layout import OFFICIAL as OFFICIAL
from nextscale.published.var_layout import SAMPLING as SAMPLING
from nextscale.published.var_layout import SIZES_512 as SIZES_512
from nextscale.readers import ClassReader
from nextscale.sampling.defaults import SamplingDefaults
from nextscale.schedule import Schedule
from nextscale.system import System
from nextscale.system_settings import ClassSystemSettings, Sides
from nextscale.tokenizer.autoencoder import AutoencoderSettings
from nextscale.tokenizer.pyramid import PyramidSettings, ResidualPyramid
from nextscale.tokenizer.tokenizer import ImageTokenizer
from nextscale.training.config import TokenizerLoss
from nextscale.training.objective import TeacherForcing


class Config(ClassSystemSettings):
    """A VAR system. The defaults are VAR-d16 for 256 px ImageNet."""

    sizes: Sides = SIZES_256
    autoencoder: AutoencoderSettings = AutoencoderSettings()
    pyramid: PyramidSettings = PyramidSettings()
    transformer: TransformerSettings = TransformerSettings()
    sampling: SamplingDefaults = SamplingDefaults()


def tiny(**changes: object) -> Config:
    """A system of a hundred thousand parameters, for tests and first tries on a CPU: 64x64 pixels, scales 1 to 4; it has
    room for the classes of OpenMoji."""
    settings: dict[str, object] = {
        "sizes": (1, 2, 3, 4),
        "num_classes": 124,
        "autoencoder": AutoencoderSettings(width=16, multipliers=(1, 1, 1), patch=4, blocks=1, groups=8),
        "pyramid": PyramidSettings(codebook_size=32, code_dim=8),
        "transformer": TransformerSettings(depth=2, dim=32, num_heads=2, init_head=1.0, init_gate=1.0),
    }
    return Config.model_validate(settings | changes)


def emoji_64(**changes: object) -> Config:
    """The shipped system `emoji-64`: 64x64 pixels on a stride of 8, 167 tokens."""
    settings: dict[str, object] = {
        "sizes": (1, 2, 3, 5, 8, 8),
        "num_classes": 0,
        "autoencoder": AutoencoderSettings(patch=4, width=96, multipliers=(1, 1), groups=16, attention=False),
        "pyramid": PyramidSettings(
            codebook_size=512, code_dim=16, limits=(16, 64, 512, 512, 512, 512), standardize=True
        ),
        "transformer": TransformerSettings(
            depth=8, dim=256, num_heads=4, shared_adaln=True, dropout=0.1, drop_path=0.1, init_gate=0.1
        ),
        "sampling": SamplingDefaults(guidance=4.0, top_k=50, top_p=0.85),
    }
    return Config.model_validate(settings | changes)


TOKENIZER_LOSS = TokenizerLoss()


def build(config: Config, seed: int = 0, *, model: bool = True) -> System:
    """A system with initial weights that follow from `seed`; with `model=False`, or without classes, a tokenizer alone."""
    config.check_classes()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = ImageTokenizer(config.autoencoder, ResidualPyramid(config.pyramid, len(config.schedule)))
        transformer = build_model(config) if model and config.num_classes else None
    if transformer is not None:
        transformer.reset_parameters(torch.Generator().manual_seed(seed))
    return System(
        "var",
        config,
        config.schedule,
        tokenizer,
        transformer,
        config.classes,
        sampling=config.sampling,
        objective=TeacherForcing(),
        readers={"label": ClassReader(config.classes, config.num_classes), **style_readers(config.styles)},
    )


def build_model(config: Config, schedule: Schedule | None = None) -> Transformer:
    """The transformer alone, with torch's own initial weights; `schedule`: whose positions it learns, by default the
    config's."""
    dim = config.transformer.dim
    return Transformer(
        config.transformer,
        code_dim=config.pyramid.code_dim,
        **with_styles("label", ClassCondition(config.num_classes, dim), config.styles, dim),
        positions=LearnedPositions(schedule or config.schedule, dim),
        head=SoftmaxHead(dim, config.pyramid.codebook_size),
    )


# ---- the reference's models: `published/var_layout.py` ------------------------------------------------------------------


def from_official(
    vae_state: Mapping[str, Tensor],
    var_state: Mapping[str, Tensor],
    vae_args: Mapping[str, Any] | None = None,
    var_args: Mapping[str, Any] | None = None,
) -> System:
    """A system from state dicts of the reference code; its weights are copies.

    Args:
        vae_state, var_state: its VQVAE's and VAR's state dicts, under their own key names. Entries that follow from the
            settings (`lvl_1L`, `attn_bias_for_masking`, `zero_k_bias`) and the usage statistic may be left out.
        vae_args, var_args: keyword arguments of its constructors; missing ones take the reference's defaults.

    Raises ValueError for unknown arguments, and for keys, shapes or values that do not fit.
    """
    config = official_config(vae_args or {}, var_args or {})
    return with_own_weights(from_states(LAYOUT, build, config, (vae_state, var_state)))


def to_official(system: System, usage: Tensor | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State dicts of the reference's VQVAE and VAR that hold a system: its names, shapes and order; weights are shared.

    `usage` is the statistic `quantize.ema_vocab_hit_SV` [K, V], for which a system has no use; default: zeros, as in a
    new reference model. Raises ValueError for a system that the reference's classes cannot express.
    """
    return to_states(LAYOUT, system, {} if usage is None else {USAGE: usage})


def official_config(vae_args: Mapping[str, Any], var_args: Mapping[str, Any]) -> Config:
    """Our settings for the reference's constructor arguments."""
    return LAYOUT.settings(Config, vae_args, var_args)


PRESETS: dict[str, Callable[..., Config]] = {
    "emoji-64": emoji_64,
    "tiny": tiny,
    **{name.removeprefix("var-"): published.config for name, published in OFFICIAL.items()},
}
