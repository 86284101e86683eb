"""The official layout of FlexVAR (github.com/jiaosiyu1999/FlexVAR, MIT), and its published checkpoints."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from nextscale.published.arguments import Argument, Constructor, ignored
from nextscale.published.imagenet import imagenet_classes
from nextscale.published.keys import Rename, model_key, rename_levels, rewrite
from nextscale.published.layout import Arguments, Layout, Published, State
from nextscale.published.var_layout import TRANSFORMER, attention_bias, zero_key_biases
from nextscale.system import System

# ---- arguments ---------------------------------------------------------------------------------------------------------


def _latent(latent: int | None, config: Any) -> int:
    return latent or config.pyramid.code_dim


# `ch` is an argument of its encoder and decoder.
VQMODEL = Constructor(
    "official VQModel",
    (
        Argument("codebook_size", 16384, "pyramid.codebook_size"),
        Argument("codebook_embed_dim", 8, "pyramid.code_dim"),
        Argument("codebook_l2_norm", True, "pyramid.unit"),
        ignored("codebook_show_usage", True),
        ignored("commit_loss_beta", 0.25),
        ignored("entropy_loss_ratio", 0.0),
        Argument("encoder_ch_mult", (1, 1, 2, 2, 4), "autoencoder.multipliers"),
        Argument("decoder_ch_mult", (1, 1, 2, 2, 4), "autoencoder.multipliers"),
        Argument("z_channels", 256, "autoencoder.latent", theirs=_latent),
        Argument("dropout_p", 0.0, "autoencoder.dropout"),
        Argument("ch", 128, "autoencoder.width"),
    ),
    always={"autoencoder.around": 1},
)
FLEXVAR = Constructor(
    "official FlexVAR",
    (*TRANSFORMER, ignored("token_dropout_p", 0.05)),  # created there, and never applied
    always={"position_side": 32},
)

# ---- entries of state dicts --------------------------------------------------------------------------------------------

# They say nothing about the weights: which codes were looked up last, and the mask of the last schedule.
USAGE, MASK = "quantize.codebook_used", "attn_bias_for_masking"


def _keys(system: System, model_args: Arguments) -> tuple[Rename, Rename]:
    """Of the tokenizer those of LlamaGen's VQModel, which keeps queries, keys and values apart."""
    levels = rename_levels(system.tokenizer, lambda side, i: f"{side}.conv_blocks.{i}", "res")
    rules = (
        (r"^pyramid\.codebook\.", "quantize.embedding."),
        (r"\.middle\.", ".mid."),
        (r"\.shortcut\.", ".nin_shortcut."),
        (r"\.proj\.", ".proj_out."),
    )

    def tokenizer_key(key: str) -> str | tuple[str, ...]:
        name = rewrite(levels(key), rules)
        return tuple(name.replace(".qkv.", f".{part}.") for part in "qkv") if ".qkv." in name else name

    return tokenizer_key, model_key


def _derived(system: System, model_args: Arguments) -> tuple[State, State]:
    return {USAGE: torch.zeros(65_536)}, {MASK: attention_bias(system)} | zero_key_biases(system)


def _files(config: Any) -> tuple[str, str]:
    return "FlexVAE.pth", f"FlexVARd{config.transformer.depth}.pth"


LAYOUT = Layout(
    hub="jiaosiyu1999/FlexVAR",
    constructors=(VQMODEL, FLEXVAR),
    keys=_keys,
    derived=_derived,
    files=_files,
    unread={USAGE: 1, MASK: 4},
    free=frozenset({"classes", "sampling", "schedules", "autoencoder.latent"}),
    within=("model", ""),
    trained=("vae_local", "var_wo_ddp"),
    sort=(False, True),
)

# ---- the published checkpoints -----------------------------------------------------------------------------------------


class PublishedFlexVAR(Published):
    """A published checkpoint (MIT; hub page jiaosiyu1999/FlexVAR) with the scores of the official README."""

    recipe: ClassVar[str] = "flexvar"

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

    @property
    def beyond(self) -> dict[str, Any]:
        """The initial gates of its training."""
        return {"transformer.init_gate": self.init_gate}

    @property
    def classes(self) -> tuple[str, ...]:
        """Those of ImageNet."""
        return imagenet_classes()

    @property
    def card(self) -> str:
        return f"""FlexVAR (arXiv 2502.20313), trained on 256x256 pixels, ImageNet classes 0 to 999. Licence: MIT
(jiaosiyu1999/FlexVAR).

FID {self.fid}, IS {self.inception_score} in the README of that repository, at 256 pixels with ten steps, guidance 3.5 (its
cfg=2.5), top-k 900, top-p 0.95. Not measured by us."""


OFFICIAL: dict[str, PublishedFlexVAR] = {
    "flexvar-d16": PublishedFlexVAR(depth=16, epochs=180, init_gate=1e-3, fid=3.05, inception_score=291.3),
    "flexvar-d20": PublishedFlexVAR(depth=20, epochs=250, init_gate=1e-3, fid=2.41, inception_score=299.3),
    # With thirteen steps, on which it was not trained, d24 has FID 2.08.
    "flexvar-d24": PublishedFlexVAR(depth=24, epochs=350, init_gate=1e-4, fid=2.21, inception_score=299.1),
}
