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

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from nextscale.draws import Draws
from nextscale.keymap import Rename, fill, model_key, ordered, rename_levels, renamed, rewrite, with_defaults
from nextscale.model.class_condition import ClassCondition
from nextscale.model.head import SoftmaxHead
from nextscale.model.init import var_normal_
from nextscale.model.transformer import Transformer
from nextscale.model.transformer_settings import TransformerSettings
from nextscale.sampling.defaults import SamplingDefaults
from nextscale.sampling.guidance import Guidance
from nextscale.sampling.pick import Generators, Pick, top_k_top_p
from nextscale.schedule import Schedule, Span
from nextscale.settings import Settings
from nextscale.system import System
from nextscale.tokenizer.autoencoder import AutoencoderSettings
from nextscale.tokenizer.plain import PlainPyramid, PlainSettings
from nextscale.tokenizer.tokenizer import Tokenizer
from nextscale.tokens import Tokens
from nextscale.training.config import TokenizerLoss
from nextscale.training.objective import Batch

# The published lists of sizes for 256 px by their number of steps (`scripts/evaluate_c2i.sh`). Trained models know 10.
SIZES: dict[int, tuple[int, ...]] = {
    6: (1, 2, 4, 6, 10, 16),
    8: (1, 2, 3, 5, 7, 10, 13, 16),
    9: (1, 2, 3, 4, 5, 7, 10, 13, 16),
    10: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    11: (1, 2, 3, 4, 5, 6, 7, 9, 11, 13, 16),
    12: (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16),
    13: (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16),
    14: (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16),
}
SIZES_512 = (*SIZES[13], 23, 32)


# ---- model: positions for any size ------------------------------------------------------------------------------------


class ResizedPositions(nn.Module):
    """One learned map of positions, averaged down (or repeated up) to the size of each scale, and a vector for start tokens.

    It begins as sines of y in the even channels and cosines of x in the odd ones: not the usual 2-D table, which has both
    of each coordinate.
    """

    def __init__(self, dim: int, side: int, starts: int = 1) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.zeros(starts, dim))
        place = torch.arange(side, dtype=torch.float32)
        rates = torch.exp(torch.arange(0, dim, 2, dtype=torch.float32) * -(math.log(10_000) / dim))
        angles = rates[:, None] * place  # [D / 2, side]
        table = torch.empty(dim, side, side)
        table[0::2] = angles.sin()[:, :, None]
        table[1::2] = angles.cos()[:, None, :]
        self.table = nn.Parameter(table)

    def reset_parameters(self, settings: TransformerSettings, generator: torch.Generator) -> None:
        """VAR's initial weights for the start; the table keeps its own."""
        var_normal_(self.start, settings.dim, generator)

    def forward(self, span: Span) -> Tensor:
        """Positions of the tokens of a span, [l, D]."""
        maps = [F.interpolate(self.table[None], size=size, mode="area")[0] for size in span.sizes]
        return span.gather(torch.cat([positions.flatten(1).T for positions in maps]))


# ---- objective: random schedules --------------------------------------------------------------------------------------


class RandomSchedules(Settings):
    """The objective: teacher forcing on other (square) sizes each step. The defaults are FlexVAR's, for maps of 16x16.

    With Python's `random` seeded alike, `draw` gives the lists of the official trainer: it makes the same calls.
    """

    cached: ClassVar[Literal["features"]] = "features"

    whole: tuple[int, ...] = Field(SIZES[10], min_length=1, description="the list that is used as it is now and then")
    whole_share: float = Field(0.05, ge=0, le=1, description="share of the steps that use it")
    first: tuple[int, ...] = Field((1, 2), min_length=1, description="sizes that open all other lists")
    ranges: tuple[tuple[int, int, int], ...] = Field(
        ((3, 10, 5), (11, 15, 2)), description="then: smallest and largest size, and how many of them are drawn"
    )
    last: int = Field(16, ge=1, description="size that ends them")
    drops: tuple[float, ...] = Field(
        (0.1, 0.05, 0.02, 0.01), description="share of the lists that lose at least one inner size, two, ..."
    )
    most_tokens: int = Field(
        680, ge=1, description="while a list has more tokens, one of its last four sizes is left out"
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

    def batch(self, pyramid: Any, content: Tensor, schedule: Schedule, draws: Draws) -> Batch:
        """Inputs and targets of features [B, C, h, w] on a schedule of this step's own."""
        seed = int(torch.randint(2**62, (1,), generator=draws.generator))
        drawn = Schedule.squares(*self.draw(random.Random(seed)))
        encoded = pyramid.encode(content, drawn)
        inputs = torch.cat(encoded.inputs, dim=1) if encoded.inputs else None
        return Batch(drawn, inputs, torch.cat(encoded.tokens, dim=1))


# ---- sampling as the official code does it ----------------------------------------------------------------------------


def official_ramp(weight: float, max_side: int = 16) -> Guidance:
    """The official guidance: a ramp from 1 that reaches `weight` at the last scale, but never later than at the tenth, and
    goes on rising after it; scales larger than `max_side` have `weight` itself.

    The official `cfg=c` is `official_ramp(1 + c)`; its other form (`used_llamagen_cfg`) is `ns.cfg(c)`.
    """

    def weights(schedule: Schedule, k: int) -> tuple[float, float]:
        t = weight - 1
        if max(schedule[k]) <= max_side and len(schedule) > 1:  # of one scale the official code divides by zero
            t *= k / min(len(schedule) - 1, 9)
        return 1 + t, -t

    return Guidance(weights)


@dataclass(frozen=True)
class official_pick:  # noqa: N801 - reads as the function that it is to its users
    """The official choice of tokens: `top_k_top_p(k, p)` at the sizes that the code lists, the most likely token at others.

    So 7, 9, 11, 12, 14, 15 and all sizes above `max_side` are greedy, with no word about it. `excluded` ids are never picked.
    """

    k: int = 0
    p: float = 0.0
    max_side: int = 16
    excluded: tuple[int, ...] = ()

    LISTED: ClassVar[frozenset[int]] = frozenset((*SIZES[10], 23, 24, 32))

    def at(self, schedule: Schedule, k: int) -> Pick:
        drawn = all(side <= self.max_side and side in self.LISTED for side in schedule[k])
        pick = top_k_top_p(self.k if drawn else 1, self.p)
        if not self.excluded:
            return pick

        def without(logits: Tensor, generators: Generators) -> Tokens:
            ids = torch.tensor(self.excluded, device=logits.device)
            return pick(logits.index_fill(-1, ids, -100.0), generators)

        return without


# ---- the system -------------------------------------------------------------------------------------------------------


class Config(Settings):
    """A FlexVAR system. The defaults are FlexVAR-d16 for 256 px ImageNet."""

    sizes: tuple[int | tuple[int, int], ...] = Field(
        SIZES[10],
        min_length=1,
        description="sizes of the scales unless others are asked for: a side, or height and width",
    )
    classes: tuple[str, ...] = Field((), description="names of the classes")
    num_classes: int = Field(1000, ge=0, description="number of classes; 0: a tokenizer without a generator")
    autoencoder: AutoencoderSettings = AutoencoderSettings(width=128, latent=256, around=1)
    pyramid: PlainSettings = PlainSettings()
    transformer: TransformerSettings = TransformerSettings(drop_path=0.1 * 16 / 24, init_gate=1e-3)
    position_side: int = Field(32, ge=1, description="side of the learned map of positions")
    schedules: RandomSchedules = RandomSchedules()
    sampling: SamplingDefaults = SamplingDefaults(guidance=3.5, top_k=900, top_p=0.95)

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
    if config.classes and config.num_classes != len(config.classes):
        raise ValueError(
            f"num_classes is {config.num_classes}, but there are {len(config.classes)} class names; give one number"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = Tokenizer(config.autoencoder, PlainPyramid(config.pyramid))
        transformer = build_model(config) if model and config.num_classes else None
    if transformer is not None:
        transformer.reset_parameters(torch.Generator().manual_seed(seed))
    return System(
        "flexvar", config, config.schedule, tokenizer, transformer, config.classes, config.sampling, config.schedules
    )


def build_model(config: Config) -> Transformer:
    """The transformer alone, with torch's own initial weights."""
    dim = config.transformer.dim
    return Transformer(
        config.transformer,
        code_dim=config.pyramid.code_dim,
        conditioner=ClassCondition(config.num_classes, dim),
        positions=ResizedPositions(dim, config.position_side, starts=config.schedule.lengths[0]),
        head=SoftmaxHead(dim, config.pyramid.codebook_size),
    )


# ---- the official models ----------------------------------------------------------------------------------------------

# Constructor arguments of the official VQModel and FlexVAR with their defaults. `ch` is one of its encoder and decoder.
VAE_ARGS: dict[str, Any] = {
    "codebook_size": 16384,
    "codebook_embed_dim": 8,
    "codebook_l2_norm": True,
    "codebook_show_usage": True,
    "commit_loss_beta": 0.25,
    "entropy_loss_ratio": 0.0,
    "encoder_ch_mult": (1, 1, 2, 2, 4),
    "decoder_ch_mult": (1, 1, 2, 2, 4),
    "z_channels": 256,
    "dropout_p": 0.0,
    "ch": 128,
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
    "token_dropout_p": 0.05,  # created there, and never applied
    "attn_l2_norm": False,
    "patch_nums": SIZES[10],
    "flash_if_available": True,
    "fused_if_available": True,
}

# Entries that say nothing about the weights: what was looked up last, and the mask of the last schedule.
USAGE, MASK = "quantize.codebook_used", "attn_bias_for_masking"


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
    with torch.device("meta"):
        system = build(official_config(vae_args or {}, var_args or {}))
    vae_layout, var_layout = to_official(system)
    for module, state, layout, rename, unread, source in (
        (system.tokenizer, vae_state, vae_layout, _tokenizer_key(system.tokenizer), USAGE, "tokenizer"),
        (system.model, var_state, var_layout, model_key, MASK, "transformer"),
    ):
        wanted = {name: tensor for name, tensor in state.items() if name != unread}
        fill(module, wanted, layout, rename, f"the {source}'s state dict", complete=False)
    for parameter in system.parameters():  # training the system must not train the caller's state dicts
        parameter.data = parameter.data.clone()
    return system.eval()


def to_official(system: System) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State dicts of the official VQModel and FlexVAR that hold a system; weights are shared.

    Raises ValueError for a system that the official classes cannot express.
    """
    config: Config = system.config
    _check_official(config)
    vae = renamed(system.tokenizer, _tokenizer_key(system.tokenizer))
    vae[USAGE] = torch.zeros(65_536)
    var = renamed(system.need_model(), model_key)
    span = config.schedule.span()
    var[MASK] = torch.zeros(span.end, span.end).masked_fill_(~span.mask(), -torch.inf)[None, None]
    for i in range(config.transformer.depth):
        var[f"blocks.{i}.attn.zero_k_bias"] = torch.zeros(config.transformer.dim)
    return vae, ordered(var)


def official_config(vae_args: Mapping[str, Any], var_args: Mapping[str, Any]) -> Config:
    """Our settings for the official constructors' arguments."""
    vae, var = (
        with_defaults(vae_args, VAE_ARGS, "official VQModel"),
        with_defaults(var_args, VAR_ARGS, "official FlexVAR"),
    )
    if tuple(vae["encoder_ch_mult"]) != tuple(vae["decoder_ch_mult"]):
        raise ValueError(
            f"encoder and decoder must have the same levels, got encoder_ch_mult={vae['encoder_ch_mult']} and "
            f"decoder_ch_mult={vae['decoder_ch_mult']}"
        )
    if var["attn_drop_rate"]:
        raise ValueError("attn_drop_rate is not supported (no published model has it); pass attn_drop_rate=0")
    return Config(
        sizes=tuple(var["patch_nums"]),
        num_classes=var["num_classes"],
        autoencoder=AutoencoderSettings(
            width=vae["ch"],
            multipliers=tuple(vae["encoder_ch_mult"]),
            dropout=vae["dropout_p"],
            latent=vae["z_channels"],
            around=1,
        ),
        pyramid=PlainSettings(
            codebook_size=vae["codebook_size"], code_dim=vae["codebook_embed_dim"], unit=vae["codebook_l2_norm"]
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


def _check_official(config: Config) -> None:
    fixed = {"image_channels": 3, "patch": 1, "blocks": 2, "attention": True, "groups": 32, "around": 1}
    wrong = [f"autoencoder.{name}" for name, value in fixed.items() if getattr(config.autoencoder, name) != value]
    wrong += ["transformer.norm"] if config.transformer.norm != "layer" else []
    wrong += ["position_side"] if config.position_side != 32 else []
    wrong += ["sizes"] if any(h != w for h, w in config.schedule.sizes) else []
    if wrong:
        raise ValueError(f"the official classes cannot express the {', '.join(wrong)} of this system")


def _tokenizer_key(tokenizer: Tokenizer) -> Rename:
    """Our tokenizer's key names to those of LlamaGen's VQModel."""
    levels = rename_levels(tokenizer, lambda side, i: f"{side}.conv_blocks.{i}", "res")
    rules = (
        (r"^pyramid\.codebook\.", "quantize.embedding."),
        (r"\.middle\.", ".mid."),
        (r"\.shortcut\.", ".nin_shortcut."),
        (r"\.proj\.", ".proj_out."),
    )

    def rename(key: str) -> str | tuple[str, ...]:
        name = rewrite(levels(key), rules)
        return tuple(name.replace(".qkv.", f".{part}.") for part in "qkv") if ".qkv." in name else name

    return rename


# ---- the published checkpoints ----------------------------------------------------------------------------------------


class SamplingPreset(SamplingDefaults):
    """Sampling as the official evaluation does it, its oddities included."""

    sizes: tuple[int, ...] = Field(SIZES[10], description="sizes of the scales")

    def options(self) -> dict[str, Any]:
        """Arguments `guidance`, `pick` and `schedule` of `ns.sample`."""
        return {
            "guidance": official_ramp(self.guidance),
            "pick": official_pick(self.top_k, self.top_p),
            "schedule": Schedule.squares(*self.sizes),
        }


# The official `cfg=c` is guidance 1 + c. The scores below are said to be of ten steps; the README's command has nine.
SAMPLING: dict[str, SamplingPreset] = {
    "paper-256": SamplingPreset(guidance=3.5, top_k=900, top_p=0.95),
    "paper-256-9": SamplingPreset(guidance=3.5, top_k=900, top_p=0.95, sizes=SIZES[9]),
    "paper-256-13": SamplingPreset(guidance=3.5, top_k=900, top_p=0.95, sizes=SIZES[13]),
    "paper-512": SamplingPreset(guidance=4.0, top_k=900, top_p=0.95, sizes=SIZES_512),
}


class Published(Settings):
    """A published checkpoint (MIT; hub page jiaosiyu1999/FlexVAR) with the scores of the official README."""

    depth: int
    epochs: int
    init_gate: float = Field(description="initial AdaLN gate weights / usual ones, of its training")
    fid: float = Field(description="FID at 256 px, ten steps")
    inception_score: float

    @property
    def files(self) -> tuple[str, str]:
        """Names of the published files: tokenizer (its weights are under the key `model`), generator."""
        return "FlexVAE.pth", f"FlexVARd{self.depth}-epo{self.epochs - 1}.pth"

    @property
    def constructor(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Keyword arguments of the official VQModel and FlexVAR, where they are not the defaults."""
        depth = self.depth
        var = {"depth": depth, "embed_dim": 64 * depth, "num_heads": depth, "drop_path_rate": 0.1 * depth / 24}
        return {"codebook_size": 8912, "codebook_embed_dim": 32}, var | {"attn_l2_norm": True}

    def config(self, **changes: object) -> Config:
        """Our settings, with the initial gates of its training."""
        config = official_config(*self.constructor)
        transformer = config.transformer.model_copy(update={"init_gate": self.init_gate})
        return Config.model_validate(config.model_dump() | {"transformer": transformer} | changes)


OFFICIAL: dict[str, Published] = {
    "flexvar-d16": Published(depth=16, epochs=180, init_gate=1e-3, fid=3.05, inception_score=291.3),
    "flexvar-d20": Published(depth=20, epochs=250, init_gate=1e-3, fid=2.41, inception_score=299.3),
    # With thirteen steps, on which it was not trained, d24 has FID 2.08.
    "flexvar-d24": Published(depth=24, epochs=350, init_gate=1e-4, fid=2.21, inception_score=299.1),
}

PRESETS: dict[str, Callable[..., Config]] = {
    "emoji-64": emoji_64,
    "tiny": tiny,
    **{name.removeprefix("flexvar-"): published.config for name, published in OFFICIAL.items()},
}
