"""Infinity: Scaling Bitwise AutoRegressive Modeling for High-Resolution Image Synthesis (Han et al., CVPR 2025, arXiv
2412.04431): text to image.

Tokenizer: a token is d signs, not one of V codes (`BitPyramid`), from an autoencoder without attention. Schedule: 13 scales
for each of 15 shapes of images (`schedule_for`). Model: cross-attention to the text in every block, rotary positions, a
vector for each scale (`TextBlock`, `Rotary`, `ScalePositions`). Condition: hidden states of a frozen text encoder
(`TextCondition`). Head: two logits a bit (`BitHead`). Objective: some bits of the inputs are flipped, and the targets are
what then is left to do (`SelfCorrection`). Guidance: on logits, or inside a layer (`sampling/inside.py`).

What the official code (github.com/FoundationVision/Infinity, MIT) does and this does not: it rounds the queries, keys and
values of cross-attention and text pooling to bfloat16 even in float32; it forgets the rotation of later scales while sampling
unless a fused norm is chosen; its reweighted loss fails (here it runs); its images are BGR. `from_official` and `to_official`
bring its models over and back, `OFFICIAL` lists the published ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from nextscale.draws import Draws
from nextscale.keymap import fill, renamed, with_defaults
from nextscale.keymap_infinity import (
    FIXED,
    IGNORED,
    MODEL_ARGS,
    PUBLISHED_ARGS,
    VAE_ARGS,
    model_key,
    tokenizer_key,
)
from nextscale.model.bit_head import BitHead
from nextscale.model.block import replaced
from nextscale.model.rotary import Rotary, RotarySettings, ScalePositions
from nextscale.model.text_condition import NegativeText, TextBlock, TextCondition
from nextscale.model.text_encoders import HashWords, MiniLM, T5Encoder, TextEncoder
from nextscale.model.transformer import Transformer
from nextscale.model.transformer_settings import TransformerSettings
from nextscale.sampling.defaults import SamplingDefaults
from nextscale.schedule import Schedule
from nextscale.settings import Settings
from nextscale.system import System
from nextscale.tokenizer.autoencoder import AutoencoderSettings
from nextscale.tokenizer.bits import BitPyramid
from nextscale.tokenizer.tokenizer import Tokenizer
from nextscale.training.config import TokenizerLoss
from nextscale.training.objective import Batch, NextScale, Wants

# ---- schedules: 13 scales for each shape ------------------------------------------------------------------------------

Sizes = tuple[tuple[int, int], ...]

SQUARE: Sizes = tuple((side, side) for side in (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64))
TALL: dict[float, str] = {
    1.25: "1x1 2x2 3x3 5x4 10x8 15x12 20x16 25x20 30x24 35x28 45x36 55x44 70x56",
    1.333: "1x1 2x2 4x3 8x6 12x9 16x12 20x15 24x18 28x21 36x27 48x36 60x45 72x54",
    1.5: "1x1 2x2 3x2 6x4 9x6 15x10 21x14 27x18 33x22 39x26 48x32 63x42 78x52",
    1.75: "1x1 2x2 3x3 7x4 11x6 14x8 21x12 28x16 35x20 42x24 56x32 70x40 84x48",
    2.0: "1x1 2x2 4x2 6x3 10x5 16x8 22x11 30x15 38x19 46x23 60x30 74x37 90x45",
    2.5: "1x1 2x2 5x2 10x4 15x6 20x8 25x10 30x12 40x16 50x20 65x26 80x32 100x40",
    3.0: "1x1 2x2 6x2 9x3 15x5 21x7 27x9 36x12 45x15 54x18 72x24 90x30 111x37",
}


def _published_sizes() -> dict[float, Sizes]:
    found: dict[float, Sizes] = {1.0: SQUARE}
    for ratio, text in TALL.items():
        pairs = (size.split("x") for size in text.split())
        found[ratio] = tuple((int(h), int(w)) for h, w in pairs)
        found[int(1000 / ratio) / 1000] = tuple((w, h) for h, w in found[ratio])
    return found


# The published scales of each shape, by height / width; the wide ones are the tall ones turned, with their ratios cut off
# after three digits.
SIZES = _published_sizes()
# How many scales make an image of so many pixels.
BUDGETS: dict[str, int] = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}


def schedule_for(height: int, width: int, budget: str = "1M") -> Schedule:
    """The published schedule whose shape is nearest to that of an image; `budget` says how many pixels it will have:
    0.06M, 0.25M, 0.60M or 1M (256, 512, 768 and 1024 px, if square)."""
    if height < 1 or width < 1 or budget not in BUDGETS:
        raise ValueError(
            f"expected a height, a width and a budget of {', '.join(BUDGETS)}, got {height}, {width} and {budget!r}"
        )
    nearest = min(SIZES, key=lambda ratio: abs(height / width - ratio))
    return Schedule(SIZES[nearest][: BUDGETS[budget]])


# ---- objective: bitwise self-correction -------------------------------------------------------------------------------


class SelfCorrection(Settings, NextScale):
    """The objective: bits that enter the sum are flipped at random, and later targets are what is left to do after that,
    so the model learns to repair its own mistakes.

    One share of flips is drawn for each scale and batch, a whole percentage from 0 to 100 x `strength`, as published.
    """

    wants: ClassVar[Wants] = "features"

    strength: float = Field(0.3, ge=0, le=1, description="largest share of bits that are flipped")
    scales: int | None = Field(
        None, ge=0, description="scales whose bits are flipped, the coarsest first; default: all"
    )
    reweight: bool = Field(
        False, description="weigh a token by 1 / sqrt(tokens of its scale), so that coarse scales count more"
    )

    def batch(self, pyramid: Any, content: Tensor, schedule: Schedule, draws: Draws) -> Batch:
        """Inputs and targets of features [B, C, h, w]."""
        flips = self.draw(pyramid.code_dim, schedule, draws)
        return self.flipped(pyramid, content, schedule, [flip.to(content.device) for flip in flips])

    def draw(self, bits: int, schedule: Schedule, draws: Draws) -> list[Tensor]:
        """Which bits to flip, bool [B, l_k, C] of each scale that has any."""
        flips = []
        for length in schedule.lengths[: self.scales]:
            share = int(torch.randint(round(100 * self.strength) + 1, (1,), generator=draws.generator)) / 100
            flips.append(draws.rand(length, bits) < share)
        return flips

    def flipped(self, pyramid: Any, content: Tensor, schedule: Schedule, flips: Sequence[Tensor]) -> Batch:
        """Inputs and targets with given flips; scales without any come last."""

        def corrupt(tokens: Tensor, k: int) -> Tensor:
            return tokens ^ flips[k].to(tokens.dtype) if k < len(flips) else tokens

        encoded = pyramid.encode(content, schedule, corrupt)
        inputs = torch.cat(encoded.inputs, dim=1) if encoded.inputs else None
        weights = self.weights(schedule).to(content.device) if self.reweight else None
        return Batch(schedule, inputs, torch.cat(encoded.tokens, dim=1), weights)

    @staticmethod
    def weights(schedule: Schedule) -> Tensor:
        """Weight of each token [L], in proportion to 1 / sqrt(tokens of its scale); they sum to 1."""
        lengths = torch.tensor(schedule.lengths)
        weights = lengths.float().rsqrt().repeat_interleave(lengths)
        return weights / weights.sum()


# ---- guidance ---------------------------------------------------------------------------------------------------------


def with_negative(system: System, prompts: str | Sequence[str]) -> System:
    """The same system, whose guidance leads away from a prompt (or from one each) instead of from no text."""
    model = system.need_model()
    name = next((name for name, reader in system.readers.items() if reader.field == "caption"), None)
    if name is None:
        raise ValueError("this system is told classes, not texts, so it has no use for a negative prompt")
    negative = system.readers[name]([prompts] if isinstance(prompts, str) else list(prompts)).to(system.device)
    return system.with_model(replaced(model, conditioner=NegativeText(model.conditioner, negative, name)))


# ---- the system -------------------------------------------------------------------------------------------------------


class TextSettings(Settings):
    """Which text encoder the model reads. The defaults are Infinity's."""

    encoder: Literal["t5", "minilm", "hash"] = Field(
        "t5",
        description="t5: flan-t5-xl (extra nextscale[t5]); minilm: all-MiniLM-L6-v2 (extra nextscale[text]); hash: random "
        "vectors of words, for tests",
    )
    dim: int = Field(2048, ge=1, description="E, channels of its hidden states")
    length: int = Field(512, ge=1, description="longest text in tokens; rows of the table for images without a text")
    pool_heads: int = Field(16, ge=1, description="heads of the pooling; the official code has E / 128")

    def reader(self) -> TextEncoder:
        """The encoder; it loads its files when it reads the first text."""
        if self.encoder == "hash":
            return HashWords(self.dim, self.length)
        return MiniLM(self.length) if self.encoder == "minilm" else T5Encoder(self.length)


class Config(Settings):
    """An Infinity system. The defaults are Infinity-2B for 1024 px."""

    sizes: tuple[int | tuple[int, int], ...] = Field(
        SQUARE,
        min_length=1,
        description="sizes of the scales unless others are asked for: a side, or height and width",
    )
    tables: tuple[Sizes, ...] | None = Field(
        None,
        description="the longest schedule of each shape, whose last scale is the grid of the rotary positions; default: the "
        "published ones if one of them begins with `sizes`, else `sizes`",
    )
    most_scales: int = Field(15, ge=1, description="scales for which the model has a learned vector")
    autoencoder: AutoencoderSettings = AutoencoderSettings(
        width=128, multipliers=(1, 2, 4, 4, 4), attention=False, around=0
    )
    bits: int = Field(32, ge=1, description="d, bits of a vector of the feature map")
    fold: int = Field(1, ge=1, description="side of the squares of vectors that make one token")
    transformer: TransformerSettings = TransformerSettings(
        depth=32, dim=2048, num_heads=16, shared_adaln=True, drop_path=0.1, init_gate=5e-6, init_adaln=1e-3
    )
    rotary: RotarySettings = RotarySettings()
    positions_before: tuple[int, ...] = Field((0,), description="blocks before which the scale's vector is added")
    context_scale: float | None = Field(
        None, ge=0, description="initial value of a learned factor of cross-attention for each channel; default: none"
    )
    hidden_multiple: int = Field(256, ge=1, description="the feed-forward's hidden width is a multiple of it")
    text: TextSettings = TextSettings()
    bit_loss: Literal["mean", "sum"] = Field("mean", description="loss of a token: over its bits")
    objective: SelfCorrection = SelfCorrection()
    sampling: SamplingDefaults = SamplingDefaults(guidance=3.0, ramp=False, top_k=0, top_p=0.97)

    @property
    def schedule(self) -> Schedule:
        """The sizes as a `Schedule`."""
        return Schedule(tuple((size, size) if isinstance(size, int) else size for size in self.sizes))

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
    return System(
        "infinity",
        config,
        config.schedule,
        tokenizer,
        transformer,
        sampling=config.sampling,
        objective=config.objective,
        readers={"caption": reader or config.text.reader()},
    )


def build_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer alone. With `fold`, what lies around the pyramid puts squares of vectors into channels and back."""
    pyramid = BitPyramid(config.bits, config.fold)
    if config.fold == 1:
        return Tokenizer(config.autoencoder, pyramid)
    folded = {"latent": config.bits, "around": 1}
    tokenizer = Tokenizer(config.autoencoder.model_copy(update=folded), pyramid)
    tokenizer.quant_conv, tokenizer.post_quant_conv = nn.PixelUnshuffle(config.fold), nn.PixelShuffle(config.fold)
    tokenizer.stride *= config.fold
    return tokenizer


def build_model(config: Config) -> Transformer:
    """The transformer alone, with torch's own initial weights."""
    t = config.transformer
    rotary = Rotary(config.rotary, t.dim // t.num_heads, config.rotary_tables)
    return Transformer(
        t,
        code_dim=config.bits * config.fold**2,
        conditioner=TextCondition(config.text.dim, t.dim, config.text.length, config.text.pool_heads, t.eps),
        positions=ScalePositions(config.most_scales, t.dim),
        head=BitHead(t.dim, config.bits * config.fold**2, config.bit_loss),
        block=partial(TextBlock, rotary=rotary, context_scale=config.context_scale, round_to=config.hidden_multiple),
        positions_before=config.positions_before,
    )


# ---- the official models ----------------------------------------------------------------------------------------------


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
    chunks = int((model_args or {}).get("block_chunks", 1))
    system = from_states(
        official_config(vae_args or {}, model_args or {}, sizes, tables), vae_state, model_state, chunks, reader=reader
    )
    for parameter in system.parameters():  # training the system must not train the caller's state dicts
        parameter.data = parameter.data.clone()
    return system


def from_states(
    config: Config,
    vae_state: Mapping[str, Tensor],
    model_state: Mapping[str, Tensor],
    chunks: int,
    *,
    sources: tuple[str, str] = ("the tokenizer's state dict", "the transformer's state dict"),
    complete: bool = False,
    reader: TextEncoder | None = None,
) -> System:
    """The system of `config` with the weights of official state dicts, the blocks in so many chunks; `complete`: no entry
    may be left out."""
    with torch.device("meta"):
        system = build(config, reader=reader)
    vae_layout, model_layout = to_official(system, chunks)
    # One attention kernel wants another order of the dimensions of this one.
    turned = {
        name: tensor.transpose(1, 2) if name.endswith("scale_mul_1H11") and tensor.shape[1:2] == (1,) else tensor
        for name, tensor in model_state.items()
    }
    fill(system.tokenizer, vae_state, vae_layout, tokenizer_key(system.tokenizer), sources[0], complete)
    fill(system.model, turned, model_layout, model_key(config.transformer.depth, chunks), sources[1], complete)
    return system.eval()


def to_official(system: System, chunks: int = 1) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State dicts of the official tokenizer and transformer (its blocks in so many chunks) that hold a system; weights are
    shared."""
    config: Config = system.config
    t, rename = config.transformer, model_key(config.transformer.depth, chunks)
    vae = renamed(system.tokenizer, tokenizer_key(system.tokenizer))
    mask = torch.tensor(1) << torch.arange(config.bits - 1, -1, -1)  # the 64th is negative there too
    vae |= {"quantizer.lfq.mask": mask, "quantize.lfq.mask": mask}
    model = renamed(system.need_model(), rename)
    model["text_proj_for_sos.ca.mat_q"] = model["text_proj_for_sos.ca.mat_q"].unsqueeze(0)
    blocks = [rename(f"blocks.{i}.") for i in range(t.depth)]
    for name in ("text_proj_for_sos.", *blocks):
        model[f"{name}ca.zero_k_bias"] = torch.zeros(t.dim)
    model |= {f"{name}sa.zero_k_bias": torch.zeros(t.dim) for name in blocks}
    if t.norm == "rms":
        model |= {f"{name}ln_wo_grad.weight": torch.ones(t.dim) for name in ("head_nm.", *blocks)}
    return vae, model


def official_config(
    vae_args: Mapping[str, Any],
    model_args: Mapping[str, Any],
    sizes: Sizes | None = None,
    tables: Sequence[Sizes] | None = None,
) -> Config:
    """Our settings for the official code's arguments."""
    vae = with_defaults(vae_args, VAE_ARGS, "official vae_model", IGNORED)
    model = with_defaults(model_args, MODEL_ARGS, "official Infinity", IGNORED)
    stride = 2 ** (len(vae["encoder_ch_mult"]) - 1)
    depth, dim, chunks = model["depth"], model["embed_dim"], model["block_chunks"]
    wrong = [f"{name}={model[name]!r} (only {value!r})" for name, value in FIXED.items() if model[name] != value]
    if not (model["text_channels"] and model["text_maxlen"]):
        wrong.append("text_channels=0 or text_maxlen=0 (only text to image)")
    if tuple(vae["encoder_ch_mult"]) != tuple(vae["decoder_ch_mult"]) or vae["patch_size"] != stride:
        wrong.append(
            f"patch_size={vae['patch_size']} and channel multipliers that do not go with it or with each other"
        )
    if vae["codebook_size"] not in (None, 2 ** vae["codebook_dim"]):
        wrong.append(f"codebook_size={vae['codebook_size']} (only 2 ** codebook_dim)")
    if depth % chunks:
        wrong.append(f"block_chunks={chunks} for {depth} blocks")
    if wrong:
        raise ValueError(f"not supported, and set by no published model: {'; '.join(wrong)}")
    size = depth // chunks
    every = tuple(range(0, depth, size)) if chunks > 1 else tuple(range(depth))  # what the official code does there
    scale = model["cross_attn_layer_scale"]
    heads = model["text_channels"] // (64 if dim > 4096 else 128)
    fold = 2 if model["apply_spatial_patchify"] else 1
    return Config(
        sizes=sizes or SQUARE[: BUDGETS[model["pn"] or "1M"]],
        tables=None if tables is None else tuple(tables),
        autoencoder=AutoencoderSettings(
            width=vae["base_ch"],
            multipliers=tuple(vae["encoder_ch_mult"]),
            blocks=vae["num_res_blocks"],
            attention=False,
            around=0,
        ),
        bits=vae["codebook_dim"],
        fold=fold,
        transformer=TransformerSettings(
            depth=depth,
            dim=dim,
            num_heads=model["num_heads"],
            mlp_ratio=model["mlp_ratio"],
            shared_adaln=model["shared_aln"],
            drop_path=model["drop_path_rate"],
            dropout=model["drop_rate"],
            norm="rms" if model["rms_norm"] else "layer",
            eps=model["norm_eps"],
            init_gate=5e-6,
            init_adaln=1e-3,
        ),
        rotary=RotarySettings(mode=("raw", "resized", "rounded")[model["rope2d_normalized_by_hw"]]),
        positions_before=(0,) if model["add_lvl_embeding_only_first_block"] else every,
        context_scale=scale if scale >= 0 else None,
        text=TextSettings(dim=model["text_channels"], length=model["text_maxlen"], pool_heads=heads),
    )


# ---- the published models ---------------------------------------------------------------------------------------------


# The same guidance and temperature at all scales, the first included. 900 is more than a bit's two values: no effect.
SAMPLING: dict[str, SamplingDefaults] = {
    "2b-script": SamplingDefaults(guidance=4.0, ramp=False, temperature=0.5, top_p=0.97),
    "2b-notebook": SamplingDefaults(guidance=3.0, ramp=False, temperature=0.5, top_p=0.97),
    "8b-notebook": SamplingDefaults(guidance=3.0, ramp=False, top_p=0.97),
}

# Depth, width and heads of the sizes that the official code names.
SHAPES: dict[str, tuple[int, int, int]] = {
    "125m": (12, 768, 8),
    "layer16": (16, 1152, 12),
    "1b": (24, 1536, 16),
    "2b": (32, 2048, 16),
    "layer32": (32, 2080, 20),
    "layer40": (40, 2688, 24),
    "8b": (40, 3584, 28),
    "layer48": (48, 3360, 28),
    "20b": (58, 4608, 36),
}


class Published(Settings):
    """A published checkpoint (MIT): its shape and its scores, as the repository gives them."""

    shape: str = Field(description="of `SHAPES`")
    files: tuple[str, str] = Field(description="names of the published files: tokenizer, generator")
    bits: int
    patchify: bool = Field(False, description="tokens of 2x2 vectors of a tokenizer of stride 8")
    budget: str = "1M"
    sampling: str = Field(description="of `SAMPLING`")
    geneval: float | None = None
    geneval_rewritten: float | None = Field(None, description="with prompts that a language model rewrote")
    dpg: float | None = None
    hps: float | None = Field(None, description="HPSv2.1")
    image_reward: float | None = None

    @property
    def constructor(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arguments of the official `vae_model` and Infinity, where they are not the defaults."""
        depth, dim, heads = SHAPES[self.shape]
        model = PUBLISHED_ARGS | {"depth": depth, "embed_dim": dim, "num_heads": heads, "block_chunks": 8}
        model |= {"pn": self.budget, "apply_spatial_patchify": int(self.patchify)}
        vae: dict[str, Any] = {"codebook_dim": self.bits}
        if self.patchify:
            vae |= {"patch_size": 8, "encoder_ch_mult": (1, 2, 4, 4), "decoder_ch_mult": (1, 2, 4, 4)}
        return vae, model

    def config(self) -> Config:
        """Our settings."""
        return official_config(*self.constructor)


OFFICIAL: dict[str, Published] = {
    "infinity-2b": Published(
        shape="2b",
        files=("infinity_vae_d32reg.pth", "infinity_2b_reg.pth"),
        bits=32,
        sampling="2b-notebook",
        geneval=0.69,
        geneval_rewritten=0.73,
        dpg=83.5,
        hps=32.2,
        image_reward=0.96,
    ),
    "infinity-8b": Published(
        shape="8b",
        files=("infinity_vae_d56_f8_14_patchify.pth", "infinity_8b_weights"),
        bits=14,
        patchify=True,
        sampling="8b-notebook",
        geneval_rewritten=0.79,
        dpg=86.6,
    ),
    "infinity-8b-512": Published(
        shape="8b",
        files=("infinity_vae_d56_f8_14_patchify.pth", "infinity_8b_512x512_weights"),
        bits=14,
        patchify=True,
        budget="0.25M",
        sampling="8b-notebook",
    ),
}


def _preset(depth: int, dim: int, heads: int) -> Callable[..., Config]:
    def preset(**changes: object) -> Config:
        transformer = Config().transformer.model_copy(update={"depth": depth, "dim": dim, "num_heads": heads})
        return Config.model_validate({"transformer": transformer} | changes)

    return preset


def _published_preset(published: Published) -> Callable[..., Config]:
    def preset(**changes: object) -> Config:
        return Config.model_validate(published.config().model_dump() | changes)

    return preset


PRESETS: dict[str, Callable[..., Config]] = {
    "emoji-64-text": emoji_64_text,
    "tiny": tiny,
    **{name: _preset(*shape) for name, shape in SHAPES.items()},
    **{name.removeprefix("infinity-"): _published_preset(published) for name, published in OFFICIAL.items()},
}
