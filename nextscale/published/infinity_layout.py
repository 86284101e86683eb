"""The official layout of Infinity (github.com/FoundationVision/Infinity, MIT), and its published models.

Methods that build on that code keep its names, so recipes share these tables.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from nextscale.aspect import BUDGETS, SQUARE
from nextscale.contracts import Tokenizer
from nextscale.published.arguments import Argument, Constructor, fixed, ignored
from nextscale.published.keys import ADALN_KEYS, Rename, down_up_levels, rewrite
from nextscale.published.layout import Arguments, Layout, Published, State
from nextscale.sampling.defaults import SamplingDefaults
from nextscale.system import System

# ---- arguments ---------------------------------------------------------------------------------------------------------


def _stride(multipliers: tuple[int, ...]) -> int:
    return 2 ** (len(multipliers) - 1)


# The last two are set inside it.
VAE_MODEL = Constructor(
    "official vae_model",
    (
        ignored("vqgan_ckpt"),
        ignored("schedule_mode"),
        Argument("codebook_dim", 32, "bits"),
        Argument(
            "codebook_size",
            allowed=lambda size, args: size in (None, 2 ** args["codebook_dim"]),
            only="2 ** codebook_dim",
        ),
        Argument(
            "patch_size",
            16,
            theirs=lambda _, config: _stride(config.autoencoder.multipliers),
            allowed=lambda size, args: size == _stride(args["encoder_ch_mult"]),
            only="the stride of its levels",
        ),
        Argument("encoder_ch_mult", (1, 2, 4, 4, 4), "autoencoder.multipliers"),
        Argument("decoder_ch_mult", (1, 2, 4, 4, 4), "autoencoder.multipliers"),
        ignored("test_mode"),
        Argument("base_ch", 128, "autoencoder.width"),
        Argument("num_res_blocks", 2, "autoencoder.blocks"),
    ),
    always={"autoencoder.attention": False, "autoencoder.around": 0},
)


def _text_channels_a_head(arguments: Arguments) -> int:
    return 64 if arguments["embed_dim"] > 4096 else 128


def _positions_before(only_first: int, arguments: Arguments) -> tuple[int, ...]:
    """Before each chunk, if not only before the first; a single chunk counts as one for each block."""
    depth, chunks = arguments["depth"], arguments["block_chunks"]
    if only_first:
        return (0,)
    return tuple(range(0, depth, depth // chunks if chunks > 1 else 1))


ROTARY_MODES = ("raw", "resized", "rounded")

INFINITY = Constructor(
    "official Infinity",
    (
        ignored("vae_local"),
        Argument(
            "text_channels",
            0,
            "text.dim",
            allowed=lambda width, args: width >= _text_channels_a_head(args),
            only="text to image, with as many channels as a head of the pooling has or more",
        ),
        Argument(
            "text_channels",
            0,
            "text.pool_heads",
            ours=lambda width, args: width // _text_channels_a_head(args),
            theirs=None,
        ),
        Argument("text_maxlen", 0, "text.length", allowed=lambda length, _: length > 0, only="text to image"),
        ignored("selecting_idx"),
        Argument("embed_dim", 1024, "transformer.dim"),
        Argument("depth", 16, "transformer.depth"),
        Argument("num_heads", 16, "transformer.num_heads"),
        Argument("mlp_ratio", 4.0, "transformer.mlp_ratio"),
        Argument("drop_rate", 0.0, "transformer.dropout"),
        Argument("drop_path_rate", 0.0, "transformer.drop_path"),
        Argument("norm_eps", 1e-6, "transformer.eps"),
        Argument(
            "rms_norm",
            False,
            "transformer.norm",
            ours=lambda rms, _: "rms" if rms else "layer",
            theirs=lambda norm, _: norm == "rms",
        ),
        Argument("shared_aln", False, "transformer.shared_adaln"),
        fixed("head_aln", True),
        ignored("cond_drop_rate"),
        ignored("rand_uncond"),
        Argument(
            "cross_attn_layer_scale",
            -1.0,
            "context_scale",
            ours=lambda scale, _: scale if scale >= 0 else None,
            theirs=lambda scale, _: -1.0 if scale is None else scale,
        ),
        fixed("nm0", False),
        ignored("tau"),
        fixed("cos_attn", True),
        fixed("swiglu", False),
        ignored("raw_scale_schedule"),
        fixed("head_depth", 1),
        ignored("top_p"),
        ignored("top_k"),
        ignored("customized_flash_attn"),
        ignored("fused_mlp"),
        ignored("fused_norm"),
        Argument(  # no setting of ours: it says under which names the blocks are
            "block_chunks", 1, allowed=lambda chunks, args: args["depth"] % chunks == 0, only="a divisor of the depth"
        ),
        ignored("checkpointing"),
        ignored("pad_to_multiplier"),
        ignored("use_flex_attn"),
        ignored("batch_size"),
        Argument(
            "add_lvl_embeding_only_first_block",
            1,
            "positions_before",
            ours=_positions_before,
            theirs=lambda before, _: int(before == (0,)),
        ),
        fixed("use_bit_label", 1),
        Argument("rope2d_each_sa_layer", 0, theirs=lambda _, config: 1, allowed=lambda each, _: each == 1, only="1"),
        Argument(
            "rope2d_normalized_by_hw",
            0,
            "rotary.mode",
            ours=lambda number, _: ROTARY_MODES[number],
            theirs=lambda mode, _: ROTARY_MODES.index(mode),
            allowed=lambda number, _: number in range(len(ROTARY_MODES)),
            only="0, 1 and 2",
        ),
        Argument(
            "pn",
            None,
            "sizes",
            ours=lambda budget, _: SQUARE[: BUDGETS[budget or "1M"]],
            theirs=None,
            allowed=lambda budget, _: budget is None or budget in BUDGETS,
            only=", ".join(BUDGETS),
        ),
        ignored("train_h_div_w_list"),
        ignored("video_frames"),
        ignored("always_training_scales"),
        Argument(
            "apply_spatial_patchify",
            0,
            "fold",
            ours=lambda patchify, _: 2 if patchify else 1,
            theirs=lambda fold, _: int(fold == 2),
        ),
        ignored("inference_mode"),
    ),
    always={"transformer.init_gate": 5e-6, "transformer.init_adaln": 1e-3},
)
# What every published model and its scripts set.
PUBLISHED_ARGS: dict[str, Any] = {
    "text_channels": 2048,
    "text_maxlen": 512,
    "shared_aln": True,
    "drop_path_rate": 0.1,
    "rope2d_each_sa_layer": 1,
    "rope2d_normalized_by_hw": 2,
}

# ---- entries of state dicts --------------------------------------------------------------------------------------------

KEYS = (
    (r"^conditioner\.null_text$", "cfg_uncond"),
    (r"^conditioner\.norm", "text_norm"),
    (r"^conditioner\.pool\.query$", "text_proj_for_sos.ca.mat_q"),
    (r"^conditioner\.pool\.kv", "text_proj_for_sos.ca.mat_kv"),
    (r"^conditioner\.pool", "text_proj_for_sos.ca"),
    (r"^conditioner\.project", "text_proj_for_ca"),
    (r"^positions\.start$", "pos_start"),
    *ADALN_KEYS,
    (r"branches\.0\.layer\.qkv", "sa.mat_qkv"),
    (r"branches\.0\.layer\.log_scale", "sa.scale_mul_1H11"),
    (r"branches\.0\.layer", "sa"),
    (r"branches\.1\.layer\.(q|kv)\.", r"ca.mat_\1."),
    (r"branches\.1\.layer", "ca"),
    (r"branches\.1\.norm", "ca_norm"),
    (r"branches\.1\.scale", "ca_gamma"),
    (r"branches\.2\.layer", "ffn"),
)
TOKENIZER_KEYS = (
    (r"\.middle\.0\.", ".mid.block_1."),
    (r"\.middle\.1\.", ".mid.block_2."),
    (r"\.shortcut\.", ".nin_shortcut."),
    (r"(conv\w*|nin_shortcut)\.(weight|bias)$", r"\1.conv.\2"),
    (r"(norm\w*)\.(weight|bias)$", r"\1.norm.\2"),
)


def model_key(depth: int, chunks: int) -> Callable[[str], str]:
    """Our transformer's key names to the official ones: block i is number i % n of chunk i // n, if there are several."""
    size = depth // chunks

    def place(found: re.Match[str]) -> str:
        i = int(found.group(1))
        return found.group() if chunks == 1 else f"block_chunks.{i // size}.module.{i % size}."

    return lambda key: re.sub(r"^blocks\.(\d+)\.", place, rewrite(key, KEYS))


def tokenizer_key(tokenizer: Tokenizer) -> Callable[[str], str]:
    """Our tokenizer's key names to the official ones."""
    levels = down_up_levels(tokenizer)
    return lambda key: rewrite(levels(key), TOKENIZER_KEYS)


def _keys(system: System, model_args: Arguments) -> tuple[Rename, Rename]:
    return tokenizer_key(system.tokenizer), model_key(model_args["depth"], model_args["block_chunks"])


def _derived(system: System, model_args: Arguments) -> tuple[State, State]:
    t, rename = system.config.transformer, model_key(model_args["depth"], model_args["block_chunks"])
    mask = torch.tensor(1) << torch.arange(system.config.bits - 1, -1, -1)  # the 64th is negative there too
    blocks = [rename(f"blocks.{i}.") for i in range(t.depth)]
    model = {f"{name}ca.zero_k_bias": torch.zeros(t.dim) for name in ("text_proj_for_sos.", *blocks)}
    model |= {f"{name}sa.zero_k_bias": torch.zeros(t.dim) for name in blocks}
    if t.norm == "rms":
        model |= {f"{name}ln_wo_grad.weight": torch.ones(t.dim) for name in ("head_nm.", *blocks)}
    return {"quantizer.lfq.mask": mask, "quantize.lfq.mask": mask}, model


def _usual(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """One attention kernel wants another order of the dimensions of the scales."""
    return {
        name: tensor.transpose(1, 2) if name.endswith("scale_mul_1H11") and tensor.shape[1:2] == (1,) else tensor
        for name, tensor in state.items()
    }


def _files(config: Any) -> tuple[str, str]:
    return f"infinity_vae_d{config.bits}.pth", f"infinity_{config.transformer.depth}x{config.transformer.dim}.pth"


def _given(config: Any) -> dict[str, Any]:
    """In how many chunks the blocks are: those before which the scale's vector is added, else eight (as published) or the
    most that go into both. The official code cannot generate with one."""
    several = len(config.positions_before)
    return {"block_chunks": several if several > 1 else math.gcd(config.transformer.depth, 8)}


LAYOUT = Layout(
    hub="FoundationVision/Infinity",
    constructors=(VAE_MODEL, INFINITY),
    keys=_keys,
    derived=_derived,
    files=_files,
    given=_given,
    # It is told schedules when it is called; how bits are flipped, and whether their losses are summed, is its trainer's.
    free=frozenset({"sampling", "objective", "bit_loss", "sizes", "tables"}),
    usual=_usual,
    within=("vae", ""),
    trained=("", "gpt_fsdp"),
)

# ---- the published models ----------------------------------------------------------------------------------------------

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


class PublishedInfinity(Published):
    """A published checkpoint (MIT): its shape and its scores, as the repository gives them."""

    recipe: ClassVar[str] = "infinity"

    shape: str = Field(description="of `SHAPES`")
    tokenizer_file: str
    generator_file: str = Field(description="a file, or a folder of shards")
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
    def files(self) -> tuple[str, str]:
        """Names of the published files: tokenizer (its weights are under the key `vae`), generator."""
        return self.tokenizer_file, self.generator_file

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

    @property
    def card(self) -> str:
        side = 16 * SQUARE[BUDGETS[self.budget] - 1][0]
        named = {
            "GenEval": self.geneval,
            "GenEval with rewritten prompts": self.geneval_rewritten,
            "DPG": self.dpg,
            "HPSv2.1": self.hps,
            "ImageReward": self.image_reward,
        }
        scores = ", ".join(f"{name} {score}" for name, score in named.items() if score is not None)
        return f"""Infinity (arXiv 2412.04431), text to image, {side}x{side} pixels and other shapes of as many. Licence: MIT
(FoundationVision/Infinity).

{f"The repository's scores: {scores}. Not measured by us." if scores else "The repository gives no scores of it."}"""


OFFICIAL: dict[str, PublishedInfinity] = {
    "infinity-2b": PublishedInfinity(
        shape="2b",
        tokenizer_file="infinity_vae_d32reg.pth",
        generator_file="infinity_2b_reg.pth",
        bits=32,
        sampling="2b-notebook",
        geneval=0.69,
        geneval_rewritten=0.73,
        dpg=83.5,
        hps=32.2,
        image_reward=0.96,
    ),
    "infinity-8b": PublishedInfinity(
        shape="8b",
        tokenizer_file="infinity_vae_d56_f8_14_patchify.pth",
        generator_file="infinity_8b_weights",
        bits=14,
        patchify=True,
        sampling="8b-notebook",
        geneval_rewritten=0.79,
        dpg=86.6,
    ),
    "infinity-8b-512": PublishedInfinity(
        shape="8b",
        tokenizer_file="infinity_vae_d56_f8_14_patchify.pth",
        generator_file="infinity_8b_512x512_weights",
        bits=14,
        patchify=True,
        budget="0.25M",
        sampling="8b-notebook",
    ),
}
