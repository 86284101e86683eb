"""Infinity: Scaling Bitwise AutoRegressive Modeling for High-Resolution Image Synthesis (Han et al., CVPR 2025, arXiv
2412.04431): text to image.

Tokenizer: a token is d signs, not one of V codes (`BitPyramid`), from an autoencoder without attention. Schedule: 13 scales
for each of 15 shapes of images (`aspect.py`). Model: cross-attention to the text in every block, rotary positions, a
vector for each scale (`TextBlock`, `Rotary`, `ScalePositions`). Condition: hidden states of a frozen text encoder
(`TextCondition`). Head: two logits a bit (`BitHead`). Objective: some bits of the inputs are flipped, and the targets are
what then is left to do (`SelfCorrection`). Guidance: on logits, or inside a block
(recipe `inside`), and away from another text (`negative`).

What the official code (github.com/FoundationVision/Infinity, MIT) does and this does not: it rounds the queries, keys and
values of cross-attention and text pooling to bfloat16 even in float32; it forgets the rotation of later scales while sampling
unless a fused norm is chosen; its reweighted loss fails (here it runs); its images are BGR. `from_official` and `to_official`
bring its models over and back, `OFFICIAL` lists the published ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from nextscale.aspect import SIZES, SQUARE, Sizes
from nextscale.model.bit_head import BitHead
from nextscale.model.joint_condition import style_readers, with_styles
from nextscale.model.rotary import Rotary, RotarySettings, ScalePositions
from nextscale.model.text_condition import TextBlock, TextCondition
from nextscale.model.text_encoders import TextEncoder, TextSettings
from nextscale.model.transformer import Transformer
from nextscale.model.transformer_settings import TransformerSettings
from nextscale.published.infinity_layout import LAYOUT, OFFICIAL, SHAPES
from nextscale.published.infinity_layout import SAMPLING as SAMPLING
from nextscale.published.layout import from_states, to_states, with_own_weights
from nextscale.sampling.defaults import SamplingDefaults
from nextscale.schedule import Schedule
from nextscale.system import Part, System
from nextscale.system_settings import Side, Sides, SystemSettings
from nextscale.tokenizer.autoencoder import AutoencoderSettings
from nextscale.tokenizer.bits import BitPyramid
from nextscale.tokenizer.tokenizer import ImageTokenizer
from nextscale.training.config import TokenizerLoss
from nextscale.training.self_correction import SelfCorrection as SelfCorrection

# ---- the system -------------------------------------------------------------------------------------------------------


class Config(SystemSettings):
    """An Infinity system. The defaults are Infinity-2B for 1024 px."""

    sizes: Sides = SQUARE
    tables: tuple[Annotated[tuple[tuple[Side, Side], ...], Field(max_length=1024)], ...] | None = Field(
        None,
        max_length=1024,
        description="the longest schedule of each shape, whose last scale is the grid of the rotary positions; default: the "
        "published ones if one of them begins with `sizes`, else `sizes`",
    )
    most_scales: int = Field(15, ge=1, le=1024, description="scales for which the model has a learned vector")
    autoencoder: AutoencoderSettings = AutoencoderSettings(
        width=128, multipliers=(1, 2, 4, 4, 4), attention=False, around=0
    )
    bits: int = Field(32, ge=1, le=1024, description="d, bits of a vector of the feature map")
    fold: int = Field(1, ge=1, le=64, description="side of the squares of vectors that make one token")
    transformer: TransformerSettings = TransformerSettings(
        depth=32, dim=2048, num_heads=16, shared_adaln=True, drop_path=0.1, init_gate=5e-6, init_adaln=1e-3
    )
    rotary: RotarySettings = RotarySettings()
    positions_before: tuple[Annotated[int, Field(ge=0, le=1024)], ...] = Field(
        (0,), max_length=1024, description="blocks before which the scale's vector is added"
    )
    context_scale: float | None = Field(
        None,
        ge=0,
        le=1000,
        description="initial value of a learned factor of cross-attention for each channel; default: none",
    )
    hidden_multiple: int = Field(
        256, ge=1, le=65_536, description="the feed-forward's hidden width is a multiple of it"
    )
    text: TextSettings = TextSettings()
    bit_loss: Literal["mean", "sum"] = Field("mean", description="loss of a token: over its bits")
    objective: SelfCorrection = SelfCorrection()
    sampling: SamplingDefaults = SamplingDefaults(guidance=3.0, ramp=False, top_k=0, top_p=0.97)

    @property
    def rotary_tables(self) -> list[Schedule]:
        """The tables as schedules."""
        sizes = self.schedule.sizes
        published = any(table[: len(sizes)] == sizes for table in SIZES.values())
        return [Schedule(table) for table in self.tables or (SIZES.values() if published else (sizes,))]


def tiny(**changes: object) -> Config:
    """A system of a hundred thousand parameters that needs no text encoder, for tests and first tries on a CPU: 64x64
    pixels, scales 1 to 4."""
    settings: dict[str, object] = {
        "sizes": (1, 2, 3, 4),
        "autoencoder": AutoencoderSettings(
            width=16, multipliers=(1, 1, 1), patch=4, blocks=1, groups=8, attention=False, around=0
        ),
        "bits": 8,
        "transformer": TransformerSettings(
            depth=2, dim=32, num_heads=2, shared_adaln=True, init_head=1.0, init_gate=1.0, init_adaln=1.0
        ),
        "hidden_multiple": 64,
        "text": TextSettings(encoder="hash", dim=32, length=12, pool_heads=2),
        "sampling": SamplingDefaults(guidance=2.5, top_k=0, top_p=0.0),
    }
    return Config.model_validate(settings | changes)


def emoji_64_text(**changes: object) -> Config:
    """Emoji from their names: 64x64 pixels on a stride of 8, 130 tokens of 16 bits, MiniLM as text encoder."""
    settings: dict[str, object] = {
        "sizes": (1, 2, 3, 4, 6, 8),
        "autoencoder": AutoencoderSettings(patch=4, width=96, multipliers=(1, 1), groups=16, attention=False, around=0),
        "bits": 16,
        "transformer": TransformerSettings(
            depth=8, dim=256, num_heads=4, shared_adaln=True, dropout=0.1, drop_path=0.1, init_gate=0.1
        ),
        "text": TextSettings(encoder="minilm", dim=384, length=32, pool_heads=4),
        "sampling": SamplingDefaults(guidance=4.0, ramp=False, top_k=0, top_p=0.0, temperature=0.5),
    }
    return Config.model_validate(settings | changes)


# How its tokenizer is trained: BitVAE's quantizer loss, and every scale but the last dropped at even odds.
TOKENIZER_LOSS = TokenizerLoss(codebook=4.0, entropy=0.001, drop="independent", drop_scales=1.0, drop_from=0)


def build(config: Config, seed: int = 0, *, model: bool = True, reader: TextEncoder | None = None) -> System:
    """A system with initial weights that follow from `seed`; with `model=False` a tokenizer alone.

    `reader`: another text encoder than that of the settings, with as many channels.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer(config)
        transformer = build_model(config) if model else None
    if transformer is not None:
        transformer.reset_parameters(torch.Generator().manual_seed(seed))
    reader = reader or config.text.reader()
    return System(
        "infinity",
        config,
        config.schedule,
        tokenizer,
        transformer,
        sampling=config.sampling,
        objective=config.objective,
        readers={"caption": reader, **style_readers(config.styles)},
        parts={"text_encoder": Part(reader, "external")} if isinstance(reader, nn.Module) else None,
    )


def build_tokenizer(config: Config) -> ImageTokenizer:
    """The tokenizer alone. With `fold`, what lies around the pyramid puts squares of vectors into channels and back."""
    pyramid = BitPyramid(config.bits, config.fold)
    if config.fold == 1:
        return ImageTokenizer(config.autoencoder, pyramid)
    folded = {"latent": config.bits, "around": 1}
    tokenizer = ImageTokenizer(config.autoencoder.model_copy(update=folded), pyramid)
    tokenizer.quant_conv, tokenizer.post_quant_conv = nn.PixelUnshuffle(config.fold), nn.PixelShuffle(config.fold)
    tokenizer.stride *= config.fold
    return tokenizer


def build_model(config: Config) -> Transformer:
    """The transformer alone, with torch's own initial weights."""
    t = config.transformer
    rotary = Rotary(config.rotary, t.dim // t.num_heads, config.rotary_tables)
    text = TextCondition(config.text.dim, t.dim, config.text.length, config.text.pool_heads, t.eps)
    return Transformer(
        t,
        code_dim=config.bits * config.fold**2,
        **with_styles("caption", text, config.styles, t.dim),
        positions=ScalePositions(config.most_scales, t.dim),
        head=BitHead(t.dim, config.bits * config.fold**2, config.bit_loss),
        block=partial(TextBlock, rotary=rotary, context_scale=config.context_scale, round_to=config.hidden_multiple),
        positions_before=config.positions_before,
    )


# ---- the official models: `published/infinity_layout.py` ---------------------------------------------------------------


def from_official(
    vae_state: Mapping[str, Tensor],
    model_state: Mapping[str, Tensor],
    vae_args: Mapping[str, Any] | None = None,
    model_args: Mapping[str, Any] | None = None,
    *,
    sizes: Sizes | None = None,
    tables: Sequence[Sizes] | None = None,
    reader: TextEncoder | None = None,
) -> System:
    """A system from state dicts of the official code; its weights are copies.

    Args:
        vae_state, model_state: the tokenizer's (of its files, what is under `vae`) and the transformer's state dicts, under
            their own key names. Entries that follow from the settings (masks, zero biases, weights of norms without any)
            may be left out, and so may the second copy of the quantizer, `quantize.*`.
        vae_args, model_args: keyword arguments of its `vae_model` and of its class Infinity; missing ones take its defaults.
        sizes: the system's scales; default: the square ones of the official budget `pn`.
        tables: as in `Config`.
        reader: as for `build`.

    Raises ValueError for unknown arguments, and for keys, shapes or values that do not fit.
    """
    config = official_config(vae_args or {}, model_args or {}, sizes, tables)
    states = vae_state, model_state
    return with_own_weights(from_states(LAYOUT, build, config, states, given=model_args, reader=reader))


def to_official(system: System, chunks: int = 1) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State dicts of the official tokenizer and transformer (its blocks in so many chunks) that hold a system; weights are
    shared.

    Raises ValueError for a system that the official classes cannot express.
    """
    return to_states(LAYOUT, system, given={"block_chunks": chunks})


def official_config(
    vae_args: Mapping[str, Any],
    model_args: Mapping[str, Any],
    sizes: Sizes | None = None,
    tables: Sequence[Sizes] | None = None,
) -> Config:
    """Our settings for the official code's arguments."""
    config = LAYOUT.settings(Config, vae_args, model_args)
    return Config.model_validate(config.model_dump() | {"sizes": sizes or config.sizes, "tables": tables})


def _preset(depth: int, dim: int, heads: int) -> Callable[..., Config]:
    def preset(**changes: object) -> Config:
        transformer = Config().transformer.model_copy(update={"depth": depth, "dim": dim, "num_heads": heads})
        return Config.model_validate({"transformer": transformer} | changes)

    return preset


PRESETS: dict[str, Callable[..., Config]] = {
    "emoji-64-text": emoji_64_text,
    "tiny": tiny,
    **{name: _preset(*shape) for name, shape in SHAPES.items()},
    **{name.removeprefix("infinity-"): published.config for name, published in OFFICIAL.items()},
}
