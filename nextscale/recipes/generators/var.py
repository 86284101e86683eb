"""VAR: Visual Autoregressive Modeling (Tian et al., NeurIPS 2024, arXiv 2404.02905).

Tokenizer: convolutional autoencoder with a residual pyramid. Model: transformer with AdaLN and unit-norm attention over
learned positions, class condition, softmax head. Nothing differs from the paper; the settings add `patch`, `dropout`
and rectangular schedules.

`from_official` brings over any model of the reference code (github.com/FoundationVision/VAR, MIT) and `to_official` takes
one back; the key map is `nextscale/keymap.py`. `OFFICIAL` lists the published checkpoints, which `nextscale/official.py` reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from nextscale.keymap import USAGE, fill, model_key, ordered, renamed, tokenizer_key, with_defaults
from nextscale.model.class_condition import ClassCondition
from nextscale.model.head import SoftmaxHead
from nextscale.model.positions import LearnedPositions
from nextscale.model.transformer import Transformer
from nextscale.model.transformer_settings import TransformerSettings
from nextscale.readers import ClassReader
from nextscale.sampling.defaults import SamplingDefaults
from nextscale.schedule import Schedule
from nextscale.settings import Settings
from nextscale.system import System
from nextscale.tokenizer.autoencoder import AutoencoderSettings
from nextscale.tokenizer.pyramid import PyramidSettings, ResidualPyramid
from nextscale.tokenizer.tokenizer import Tokenizer
from nextscale.training.config import TokenizerLoss, TrainConfig
from nextscale.training.objective import TeacherForcing


class Config(Settings):
    """A VAR system. The defaults are VAR-d16 for 256 px ImageNet."""

    sizes: tuple[int | tuple[int, int], ...] = Field(
        (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), min_length=1, description="sizes of the scales: a side, or height and width"
    )
    classes: tuple[str, ...] = Field((), description="names of the classes")
    num_classes: int = Field(1000, ge=0, description="number of classes; 0: a tokenizer without a generator")
    autoencoder: AutoencoderSettings = AutoencoderSettings()
    pyramid: PyramidSettings = PyramidSettings()
    transformer: TransformerSettings = TransformerSettings()
    sampling: SamplingDefaults = SamplingDefaults()

    @field_validator("classes")
    @classmethod
    def _unique(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(classes)) != len(classes):
            raise ValueError("class names must differ from each other")
        return classes

    @property
    def schedule(self) -> Schedule:
        """The sizes as a `Schedule`."""
        return Schedule(tuple((size, size) if isinstance(size, int) else size for size in self.sizes))


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
    if config.classes and config.num_classes != len(config.classes):
        raise ValueError(
            f"num_classes is {config.num_classes}, but there are {len(config.classes)} class names; give one number"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = Tokenizer(config.autoencoder, ResidualPyramid(config.pyramid, len(config.schedule)))
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
        config.sampling,
        objective=TeacherForcing(),
        readers={"label": ClassReader(config.classes, config.num_classes)},
    )


def build_model(config: Config) -> Transformer:
    """The transformer alone, with torch's own initial weights."""
    dim = config.transformer.dim
    return Transformer(
        config.transformer,
        code_dim=config.pyramid.code_dim,
        conditioner=ClassCondition(config.num_classes, dim),
        positions=LearnedPositions(config.schedule, dim),
        head=SoftmaxHead(dim, config.pyramid.codebook_size),
    )


# ---- the reference's models -------------------------------------------------------------------------------------------

# Constructor arguments of the reference's VQVAE and VAR with their defaults (its released tokenizer has ch=160).
VAE_ARGS: dict[str, Any] = {
    "vocab_size": 4096,
    "z_channels": 32,
    "ch": 128,
    "dropout": 0.0,
    "beta": 0.25,
    "using_znorm": False,
    "quant_conv_ks": 3,
    "quant_resi": 0.5,
    "share_quant_resi": 4,
    "default_qresi_counts": 0,
    "v_patch_nums": (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    "test_mode": True,
}
VAR_ARGS: dict[str, Any] = {
    "num_classes": 1000,
    "depth": 16,
    "embed_dim": 1024,
    "num_heads": 16,
    "mlp_ratio": 4.0,
    "drop_rate": 0.0,
    "attn_drop_rate": 0.0,
    "drop_path_rate": 0.0,
    "norm_eps": 1e-6,
    "shared_aln": False,
    "cond_drop_rate": 0.1,
    "attn_l2_norm": False,
    "patch_nums": (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    "flash_if_available": True,
    "fused_if_available": True,
}


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
    system = from_states(official_config(vae_args or {}, var_args or {}), vae_state, var_state)
    for parameter in system.parameters():  # training the system must not train the caller's state dicts
        parameter.data = parameter.data.clone()
    return system


def from_states(
    config: Config,
    vae_state: Mapping[str, Tensor],
    var_state: Mapping[str, Tensor],
    *,
    sources: tuple[str, str] = ("the tokenizer's state dict", "the transformer's state dict"),
    complete: bool = False,
) -> System:
    """The system of `config` with the weights of official state dicts; `complete`: no entry may be left out."""
    with torch.device("meta"):
        system = build(config)
    vae_layout, var_layout = to_official(system)
    rename = tokenizer_key(system.tokenizer, config.pyramid.phi)
    fill(system.tokenizer, vae_state, vae_layout, rename, sources[0], complete)
    fill(system.model, var_state, var_layout, model_key, sources[1], complete)
    return system.eval()


def to_official(system: System, usage: Tensor | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State dicts of the reference's VQVAE and VAR that hold a system: its names, shapes and order; weights are shared.

    `usage` is the statistic `quantize.ema_vocab_hit_SV` [K, V], for which a system has no use; default: zeros, as in a
    new reference model. Raises ValueError for a system that the reference's classes cannot express.
    """
    config: Config = system.config
    official_args(config)  # raises for what the reference has no word for
    vae = renamed(system.tokenizer, tokenizer_key(system.tokenizer, config.pyramid.phi))
    vae[USAGE] = torch.zeros(len(system.schedule), config.pyramid.codebook_size) if usage is None else usage
    var = renamed(system.need_model(), model_key)
    span = system.schedule.span()
    var["lvl_1L"] = span.scale_index().unsqueeze(0)
    var["attn_bias_for_masking"] = torch.zeros(span.end, span.end).masked_fill_(~span.mask(), -torch.inf)[None, None]
    for i in range(config.transformer.depth):
        var[f"blocks.{i}.attn.zero_k_bias"] = torch.zeros(config.transformer.dim)
    return ordered(vae), ordered(var)


def official_config(vae_args: Mapping[str, Any], var_args: Mapping[str, Any]) -> Config:
    """Our settings for the reference's constructor arguments."""
    vae, var = (
        with_defaults(vae_args, VAE_ARGS, "reference's VQVAE"),
        with_defaults(var_args, VAR_ARGS, "reference's VAR"),
    )
    if tuple(vae["v_patch_nums"]) != tuple(var["patch_nums"]):
        raise ValueError(
            f"tokenizer and transformer must have the same scales, got v_patch_nums={tuple(vae['v_patch_nums'])} and "
            f"patch_nums={tuple(var['patch_nums'])}"
        )
    if var["attn_drop_rate"]:
        raise ValueError("attn_drop_rate is not supported (no published model has it); pass attn_drop_rate=0")
    return Config(
        sizes=tuple(var["patch_nums"]),
        num_classes=var["num_classes"],
        autoencoder=AutoencoderSettings(width=vae["ch"], dropout=vae["dropout"], around=vae["quant_conv_ks"]),
        pyramid=PyramidSettings(
            codebook_size=vae["vocab_size"],
            code_dim=vae["z_channels"],
            cosine=vae["using_znorm"],
            phi=vae["share_quant_resi"] or "each",
            phi_ratio=vae["quant_resi"],
        ),
        transformer=TransformerSettings(
            depth=var["depth"],
            dim=var["embed_dim"],
            num_heads=var["num_heads"],
            mlp_ratio=var["mlp_ratio"],
            shared_adaln=var["shared_aln"],
            unit_norm=var["attn_l2_norm"],
            drop_path=var["drop_path_rate"],
            dropout=var["drop_rate"],
            eps=var["norm_eps"],
        ),
    )


def official_args(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword arguments of the reference's VQVAE and VAR for our settings: the inverse of `official_config`.

    Raises ValueError for settings that the reference does not have.
    """
    sides = [h for h, w in config.schedule.sizes if h == w]
    a, p, t = config.autoencoder, config.pyramid, config.transformer
    vae = {
        "vocab_size": p.codebook_size,
        "z_channels": p.code_dim,
        "ch": a.width,
        "dropout": a.dropout,
        "using_znorm": p.cosine,
        "quant_conv_ks": a.around,
        "quant_resi": p.phi_ratio,
        "share_quant_resi": 0 if p.phi == "each" else p.phi,
        "v_patch_nums": tuple(sides),
    }
    var = {
        "num_classes": config.num_classes,
        "depth": t.depth,
        "embed_dim": t.dim,
        "num_heads": t.num_heads,
        "mlp_ratio": t.mlp_ratio,
        "drop_rate": t.dropout,
        "drop_path_rate": t.drop_path,
        "norm_eps": t.eps,
        "shared_aln": t.shared_adaln,
        "attn_l2_norm": t.unit_norm,
        "patch_nums": tuple(sides),
    }
    again = official_config(vae, var)
    # What is left over has no counterpart there. Initial weights are set by a call, not by the constructor.
    wrong = [
        f"{part}.{name}={value!r}"
        for part in ("autoencoder", "pyramid", "transformer")
        for name, value in getattr(config, part)
        if not name.startswith("init_") and value != getattr(getattr(again, part), name)
    ]
    if len(sides) < len(config.sizes):
        wrong.append(f"sizes={config.schedule}")
    if wrong:
        raise ValueError(f"the reference's classes cannot express {', '.join(wrong)}; only VAR's own shapes convert")
    return vae, var


# ---- the published checkpoints ----------------------------------------------------------------------------------------

SIZES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SIZES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


# Guidance is a ramp from 1: the first scale is never guided. The reference's `cfg=c` is guidance 1 + c. Its README gives one
# setting for the FID of both resolutions.
SAMPLING: dict[str, SamplingDefaults] = {
    "paper-256": SamplingDefaults(guidance=2.5, top_k=900, top_p=0.96),
    "paper-512": SamplingDefaults(guidance=2.5, top_k=900, top_p=0.96),
    "demo": SamplingDefaults(guidance=5.0, top_k=900, top_p=0.95),
    "better": SamplingDefaults(guidance=6.0, top_k=900, top_p=0.95, smooth=True),
    "editing": SamplingDefaults(guidance=4.0, top_k=900, top_p=0.95, smooth=True),
}


class PublishedTraining(Settings):
    """How a published generator was trained, in our words; all in float16 with 1,281,167 ImageNet images.

    Common to all: AdamW with betas (0.9, 0.95), gradient norm at most 2, labels dropped with probability 0.1, no label
    smoothing, no averaged weights, no flips. The learning rate warms up from 0.005 of its peak for a fiftieth of the
    run, stays there for 5 % of the rest and falls linearly; weight decay follows half a cosine over the whole run.
    """

    epochs: int
    steps: int
    batch_size: int
    warmup: int = Field(description="steps")
    lr: float = Field(description="peak learning rate")
    final_lr: float = Field(description="learning rate at the end / peak")
    weight_decay: float = 0.05
    final_weight_decay: float = 0.05
    init_gate: float = Field(description="initial AdaLN gate weights / usual ones")

    def config(self, **changes: object) -> TrainConfig:
        """The settings of our training that match it."""
        shared = ("steps", "batch_size", "warmup", "lr", "final_lr", "weight_decay", "final_weight_decay")
        settings: dict[str, object] = {name: getattr(self, name) for name in shared}
        settings |= {"first_lr": 0.005, "decay": "linear", "hold": 0.05, "betas": (0.9, 0.95), "clip": 2.0, "ema": 0.0}
        return TrainConfig.model_validate(settings | changes)


class Published(Settings):
    """A published checkpoint (MIT): its shape, its scores and its training.

    The repository's FID goes with the released files. Those of the paper's final tables are of other runs in part.
    """

    depth: int
    training: PublishedTraining
    fid: float = Field(description="FID in the repository's README, with the preset paper-256")
    paper_fid: float
    paper_is: float = Field(description="inception score beside it")
    sizes: tuple[int, ...] = SIZES_256
    shared_adaln: bool = False

    @property
    def files(self) -> tuple[str, str]:
        """Names of the published files: tokenizer, generator."""
        return "vae_ch160v4096z32.pth", f"var_d{self.depth}.pth"

    @property
    def constructor(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Keyword arguments of the reference's VQVAE and VAR, where they are not the defaults."""
        depth = self.depth
        var: dict[str, Any] = {
            "depth": depth,
            "embed_dim": 64 * depth,
            "num_heads": depth,
            "drop_path_rate": 0.1 * depth / 24,
        }
        var |= {"attn_l2_norm": True, "shared_aln": self.shared_adaln, "patch_nums": self.sizes}
        return {"ch": 160, "v_patch_nums": self.sizes}, var

    def config(self) -> Config:
        """Our settings, with the initial gates of its training."""
        config = official_config(*self.constructor)
        transformer = config.transformer.model_copy(update={"init_gate": self.training.init_gate})
        return config.model_copy(update={"transformer": transformer})


def _training(
    epochs: int, steps: int, warmup: int, lr: float, gate: float, end: float, wd: float = 0.05, batch: int = 768
) -> PublishedTraining:
    return PublishedTraining(
        epochs=epochs,
        steps=steps,
        batch_size=batch,
        warmup=warmup,
        lr=lr,
        final_lr=end,
        final_weight_decay=wd,
        init_gate=gate,
    )


OFFICIAL: dict[str, Published] = {
    # With rejection sampling (unpublished details) d30 has FID 1.80, in the final paper 1.73.
    "var-d16": Published(
        depth=16, training=_training(200, 333_800, 6676, 3e-4, 1e-3, 0.1), fid=3.55, paper_fid=3.30, paper_is=274.4
    ),
    "var-d20": Published(
        depth=20, training=_training(250, 417_250, 8345, 3e-4, 1e-3, 0.1), fid=2.95, paper_fid=2.57, paper_is=302.6
    ),
    "var-d24": Published(
        depth=24, training=_training(350, 584_150, 11_683, 2.4e-4, 1e-4, 0.01), fid=2.33, paper_fid=2.09, paper_is=312.9
    ),
    "var-d30": Published(
        depth=30,
        training=_training(350, 438_200, 8764, 3.2e-4, 1e-5, 0.01, wd=0.08, batch=1024),
        fid=1.97,
        paper_fid=1.92,
        paper_is=323.1,
    ),
    "var-d36": Published(  # 512 px; the same tokenizer file
        depth=36,
        training=_training(350, 584_150, 11_683, 2.4e-4, 5e-6, 0.01, wd=0.08),
        fid=2.63,
        paper_fid=2.63,
        paper_is=303.2,
        sizes=SIZES_512,
        shared_adaln=True,
    ),
}


def _published_preset(published: Published) -> Callable[..., Config]:
    def preset(**changes: object) -> Config:
        return Config.model_validate(published.config().model_dump() | changes)

    return preset


PRESETS: dict[str, Callable[..., Config]] = {
    "emoji-64": emoji_64,
    "tiny": tiny,
    **{name.removeprefix("var-"): _published_preset(published) for name, published in OFFICIAL.items()},
}
