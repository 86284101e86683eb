"""The official layout of VAR (github.com/FoundationVision/VAR, MIT), and its published checkpoints."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from nextscale.published.arguments import Argument, Constructor, fixed, ignored
from nextscale.published.imagenet import imagenet_classes
from nextscale.published.keys import Rename, model_key, tokenizer_key
from nextscale.published.layout import Arguments, Layout, Published, State
from nextscale.sampling.defaults import SamplingDefaults
from nextscale.settings import Settings
from nextscale.system import System
from nextscale.training.config import TrainConfig

SIZES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SIZES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)

# ---- arguments ---------------------------------------------------------------------------------------------------------


def squares(sizes: Any, config: Any) -> tuple[int, ...]:
    """The sides of a system's scales. Of rectangles it is the height, which does not lead back to them."""
    return tuple(h for h, _ in config.schedule.sizes)


def sides(name: str) -> Argument:
    """The argument that says the sizes of the scales."""
    return Argument(name, SIZES_256, "sizes", theirs=squares)


# The released tokenizer has ch=160.
VQVAE = Constructor(
    "reference's VQVAE",
    (
        Argument("vocab_size", 4096, "pyramid.codebook_size"),
        Argument("z_channels", 32, "pyramid.code_dim"),
        Argument("ch", 128, "autoencoder.width"),
        Argument("dropout", 0.0, "autoencoder.dropout"),
        ignored("beta", 0.25),
        Argument("using_znorm", False, "pyramid.cosine"),
        Argument("quant_conv_ks", 3, "autoencoder.around"),
        Argument("quant_resi", 0.5, "pyramid.phi_ratio"),
        Argument(
            "share_quant_resi",
            4,
            "pyramid.phi",
            ours=lambda count, _: count or "each",
            theirs=lambda phi, _: 0 if phi == "each" else phi,
        ),
        ignored("default_qresi_counts", 0),
        sides("v_patch_nums"),
        ignored("test_mode", True),
    ),
)
# What VAR's transformer is told; forks of its code have these arguments too.
TRANSFORMER = (
    Argument("num_classes", 1000, "num_classes"),
    Argument("depth", 16, "transformer.depth"),
    Argument("embed_dim", 1024, "transformer.dim"),
    Argument("num_heads", 16, "transformer.num_heads"),
    Argument("mlp_ratio", 4.0, "transformer.mlp_ratio"),
    Argument("drop_rate", 0.0, "transformer.dropout"),
    fixed("attn_drop_rate", 0.0),
    Argument("drop_path_rate", 0.0, "transformer.drop_path"),
    Argument("norm_eps", 1e-6, "transformer.eps"),
    Argument("shared_aln", False, "transformer.shared_adaln"),
    ignored("cond_drop_rate", 0.1),
    Argument("attn_l2_norm", False, "transformer.qk_norm"),
    sides("patch_nums"),
    ignored("flash_if_available", True),
    ignored("fused_if_available", True),
)
VAR = Constructor("reference's VAR", TRANSFORMER)

# ---- entries of state dicts --------------------------------------------------------------------------------------------

USAGE = "quantize.ema_vocab_hit_SV"  # how often each code is used at each scale: kept by conversions, read by nothing


def _keys(system: System, model_args: Arguments) -> tuple[Rename, Rename]:
    return tokenizer_key(system.tokenizer, system.config.pyramid.phi), model_key


def _derived(system: System, model_args: Arguments) -> tuple[State, State]:
    span = system.schedule.span()
    vae = {USAGE: torch.zeros(len(system.schedule), system.config.pyramid.codebook_size)}
    var = {"lvl_1L": span.scale_index().unsqueeze(0), "attn_bias_for_masking": attention_bias(system)}
    return vae, var | zero_key_biases(system)


def attention_bias(system: System) -> Tensor:
    """The block-causal mask of the system's schedule as those codes keep it: 0 or -inf, [1, 1, L, L]."""
    span = system.schedule.span()
    return torch.zeros(span.end, span.end).masked_fill_(~span.mask(), -torch.inf)[None, None]


def zero_key_biases(system: System) -> State:
    """Keys have no bias; those codes keep zeros for it."""
    t = system.config.transformer
    return {f"blocks.{i}.attn.zero_k_bias": torch.zeros(t.dim) for i in range(t.depth)}


def _files(config: Any) -> tuple[str, str]:
    pyramid = config.pyramid
    vae = f"vae_ch{config.autoencoder.width}v{pyramid.codebook_size}z{pyramid.code_dim}.pth"
    return vae, f"var_d{config.transformer.depth}.pth"


LAYOUT = Layout(
    hub="FoundationVision/var",
    constructors=(VQVAE, VAR),
    keys=_keys,
    derived=_derived,
    files=_files,
    unread={USAGE: 1},  # it may be of another schedule, as in the reference
    trained=("vae_local", "var_wo_ddp"),
    sort=(True, True),
    complete=True,
)

# ---- the published checkpoints -----------------------------------------------------------------------------------------

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


class PublishedVAR(Published):
    """A published checkpoint (MIT): its shape, its scores and its training.

    The repository's FID goes with the released files. Those of the paper's final tables are of other runs in part.
    """

    recipe: ClassVar[str] = "var"

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

    @property
    def beyond(self) -> dict[str, Any]:
        """The initial gates of its training."""
        return {"transformer.init_gate": self.training.init_gate}

    @property
    def classes(self) -> tuple[str, ...]:
        """Those of ImageNet."""
        return imagenet_classes()

    @property
    def card(self) -> str:
        side = 16 * self.sizes[-1]
        return f"""VAR (arXiv 2404.02905), {side}x{side} pixels, ImageNet classes 0 to 999. Licence: MIT (FoundationVision/VAR).

FID {self.fid} in the README of that repository, with guidance 2.5 (its cfg=1.5), top-k 900, top-p 0.96. The paper's final
table has FID {self.paper_fid}, IS {self.paper_is}. Not measured by us."""


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


OFFICIAL: dict[str, PublishedVAR] = {
    # With rejection sampling (unpublished details) d30 has FID 1.80, in the final paper 1.73.
    "var-d16": PublishedVAR(
        depth=16, training=_training(200, 333_800, 6676, 3e-4, 1e-3, 0.1), fid=3.55, paper_fid=3.30, paper_is=274.4
    ),
    "var-d20": PublishedVAR(
        depth=20, training=_training(250, 417_250, 8345, 3e-4, 1e-3, 0.1), fid=2.95, paper_fid=2.57, paper_is=302.6
    ),
    "var-d24": PublishedVAR(
        depth=24, training=_training(350, 584_150, 11_683, 2.4e-4, 1e-4, 0.01), fid=2.33, paper_fid=2.09, paper_is=312.9
    ),
    "var-d30": PublishedVAR(
        depth=30,
        training=_training(350, 438_200, 8764, 3.2e-4, 1e-5, 0.01, wd=0.08, batch=1024),
        fid=1.97,
        paper_fid=1.92,
        paper_is=323.1,
    ),
    "var-d36": PublishedVAR(  # 512 px; the same tokenizer file
        depth=36,
        training=_training(350, 584_150, 11_683, 2.4e-4, 5e-6, 0.01, wd=0.08),
        fid=2.63,
        paper_fid=2.63,
        paper_is=303.2,
        sizes=SIZES_512,
        shared_adaln=True,
    ),
}
