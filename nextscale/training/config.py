"""Settings of a training run. No torch in here: the command line reads them to print its help."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from nextscale.settings import Settings

Weight = Annotated[float, Field(ge=0, le=1e6)]
Beta = Annotated[float, Field(ge=0, lt=1)]
FIRST_STAGE, STAGE_WARMUP = 4, 100  # of progressive training


class TrainConfig(Settings):
    """How long, how fast, how often: what tokenizer and generator training share."""

    steps: int = Field(3000, ge=1, le=10**9, description="optimizer steps of the whole run")
    batch_size: int = Field(32, ge=1, le=10**6, description="images a step")
    accumulate: int = Field(
        1,
        ge=1,
        le=10**6,
        description="forward passes that share a batch, for less memory; the same update but for dropout, drop path and what "
        "looks at several images at once (docs/several-machines.md)",
    )
    lr: float = Field(1e-3, gt=0, le=1000, description="peak learning rate")
    final_lr: float = Field(0.01, ge=0, le=1, description="learning rate at the end / peak")
    warmup: int = Field(100, ge=0, le=10**9, description="steps of linear warm-up")
    first_lr: float | None = Field(
        None, ge=0, le=1, description="learning rate of step 0 / peak; default 1 / (warmup + 1)"
    )
    decay: Literal["cosine", "linear", "exponential", "constant"] = Field(
        "cosine", description="curve from peak to end"
    )
    hold: float = Field(0.0, ge=0, lt=1, description="share of the time after warm-up that stays at the peak")
    knee: float | None = Field(None, gt=0, lt=1, description="of linear decay in two pieces: where the second begins")
    weight_decay: float = Field(0.05, ge=0, le=1000, description="AdamW weight decay of matrices and kernels")
    final_weight_decay: float | None = Field(
        None, ge=0, le=1000, description="weight decay at the end; default: the same"
    )
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="AdamW betas")
    clip: float = Field(2.0, gt=0, le=1e9, description="largest gradient norm")
    ema: float = Field(0.999, ge=0, lt=1, description="decay of the averaged weights (what is saved and shown); 0: off")
    seed: int = Field(0, ge=0, lt=2**62, description="seed of initial weights, data order and every draw")
    shard: bool = Field(
        False, description="several processes: weights, gradients and optimizer state in pieces, one a process (FSDP2)"
    )
    recompute: bool = Field(
        False, description="compute the blocks' activations again in the backward pass: less memory"
    )
    workers: int = Field(0, ge=0, le=1024, description="processes that load images; 0: the main one")
    device: str = Field("cpu", max_length=100, description="cpu, cuda, cuda:1")
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32",
        description="of matrix products and convolutions; weights, losses and codes stay float32. float16 scales the loss",
    )
    compile: bool = Field(
        False,
        description="torch.compile: blocks of the generator, encoder and decoder of the tokenizer; needs a C++ compiler",
    )
    threads: int | None = Field(None, ge=1, le=4096, description="CPU threads of torch; default: torch's own choice")
    peak_tflops: float = Field(
        0.0,
        ge=0,
        le=1e9,
        description="what the devices together can do, in TFLOP/s: logs the share that the model uses (mfu)",
    )
    wandb: str = Field(
        "", max_length=200, description="project of Weights & Biases to log to as well (extra: nextscale[wandb])"
    )
    log_every: int = Field(20, ge=1, le=10**9, description="steps between lines of metrics.jsonl")
    validate_every: int = Field(500, ge=1, le=10**9, description="steps between validations, with pictures")
    save_every: int = Field(250, ge=1, le=10**9, description="steps between checkpoints")
    keep: int = Field(2, ge=1, le=10**6, description="newest checkpoints that stay, beside the best by validation")
    most_skipped: int = Field(
        20,
        ge=0,
        le=10**9,
        description="steps in a row whose loss or gradient is not finite, and which change nothing; then the run stops",
    )

    @model_validator(mode="after")
    def _knee_of_linear_decay(self) -> "TrainConfig":
        if self.knee is not None and self.decay != "linear":
            raise ValueError(f"knee goes with decay linear alone, got {self.decay}")
        return self


class TokenizerLoss(Settings):
    """Weights and starts of the tokenizer's losses, and the measures against collapse. Starts are shares of the run."""

    l1: float = Field(0.2, ge=0, le=1e6, description="weight of the mean absolute error")
    l2: float = Field(1.0, ge=0, le=1e6, description="weight of the mean squared error")
    codebook: float = Field(1.0, ge=0, le=1e6, description="weight of the codebook and commitment terms together")
    beta: float = Field(0.25, ge=0, le=1e6, description="commitment / codebook term")
    entropy: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="weight, in that sum, of a term for codes that are sure and used alike; of bits about 0.001",
    )
    perceptual: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="weight of the perceptual distance: perceptual_lite0 (extra: nextscale[eval]), or LPIPS",
    )
    lpips_vgg: str = Field(
        "", max_length=4096, description="file of VGG16's weights (torchvision's): makes the perceptual distance LPIPS"
    )
    lpips_linear: str = Field(
        "", max_length=4096, description="file of LPIPS's own weights (vgg.pth of lpips 0.1), with --loss.lpips-vgg"
    )
    perceptual_start: float = Field(0.5, ge=0, le=1, description="when the perceptual term starts")
    adversarial: float = Field(0.0, ge=0, le=1e6, description="weight of the discriminator's term")
    adversarial_start: float = Field(0.6, ge=0, le=1, description="when discriminator and its term start")
    adversarial_warmup: float = Field(0.05, ge=0, le=1, description="share of the run over which its weight rises")
    discriminator: Literal["patch", "patch-group", "dino"] = Field(
        "patch",
        description="which; patch-group: with norms of each image instead of each pass; dino: on frozen DINO features",
    )
    discriminator_width: int = Field(32, ge=1, le=4096, description="channels of the patch discriminator's first layer")
    dino_weights: str = Field("", max_length=4096, description="file of DINO's weights (dino_deitsmall16_pretrain.pth)")
    hinge_sum: bool = Field(False, description="add the hinge terms of real and made images, instead of their mean")
    adaptive: Literal["ratio", "root", "off"] = Field(
        "ratio",
        description="scale of the adversarial term: ratio of gradients at the decoder's last layer, its root, or 1",
    )
    adaptive_range: tuple[Weight, Weight] = Field((0.0, 1e4), description="least and most of that scale")
    adaptive_ema: float = Field(0.0, ge=0, lt=1, description="decay of a running mean of that scale; 0: none")
    lecam: float = Field(0.0, ge=0, le=1e6, description="weight of the discriminator's LeCam regulariser")
    consistency: float = Field(0.0, ge=0, le=1e6, description="weight of its consistency under augmentation")
    augment_pairs: bool = Field(False, description="differentiable augmentation of what the discriminator sees")
    quantize_start: float = Field(0.1, ge=0, lt=1, description="when quantizing starts; before, a plain autoencoder")
    init_codes: bool = Field(True, description="set the codes from the residuals of data when quantizing starts")
    drop_scales: float = Field(0.1, ge=0, le=1, description="share of images that lose some scales")
    drop: Literal["prefix", "independent", "single"] = Field(
        "prefix", description="which: all after a random one; each but the last at even odds; or one"
    )
    drop_from: int = Field(1, ge=0, le=1024, description="first scales that are always kept")
    restart_every: int = Field(100, ge=0, le=10**9, description="steps between restarts of dead codes; 0: never")
    restart_until: float = Field(0.6, ge=0, le=1, description="when restarts end")
    alarm: float = Field(
        0.05, ge=0, le=1, description="a scale whose perplexity is below this share of what it could be has collapsed"
    )

    @field_validator("adaptive_range")
    @classmethod
    def _least_first(cls, found: tuple[float, float]) -> tuple[float, float]:
        if found[0] > found[1]:
            raise ValueError(f"expected the least, then the most, got {found[0]:g} and {found[1]:g}; swap them")
        return found


# The losses of published trainers of tokenizers, in our words; starts as shares of a run.
LOSSES: dict[str, TokenizerLoss] = {
    # VAR's authors (github.com/FoundationVision/vaex). Its trainer doubles two weights of its settings; these are doubled.
    "vaex": TokenizerLoss(
        l1=0.2,
        l2=1.0,
        perceptual=1.0,
        perceptual_start=0.0,
        adversarial=0.4,
        adversarial_start=0.2,
        adversarial_warmup=0.02,
        discriminator="dino",
        hinge_sum=True,
        adaptive_range=(0.015, 1e4),
        consistency=8.0,
        augment_pairs=True,
    ),
    # LlamaGen (20,000 of some 400,000 steps before the discriminator starts).
    "llamagen": TokenizerLoss(
        l1=0.0,
        l2=1.0,
        perceptual=1.0,
        perceptual_start=0.0,
        adversarial=0.5,
        adversarial_start=0.05,
        adversarial_warmup=0.0,
        discriminator_width=64,
        adaptive="off",
    ),
    # BitVAE, which trained Infinity's tokenizers (50,000 of 500,000 steps).
    "bitvae": TokenizerLoss(
        l1=1.0,
        l2=0.0,
        codebook=4.0,
        entropy=0.001,
        perceptual=1.0,
        perceptual_start=0.0,
        adversarial=0.3,
        adversarial_start=0.1,
        adversarial_warmup=0.0,
        discriminator_width=128,
        adaptive="off",
        lecam=0.05,
        quantize_start=0.0,
        drop="independent",
        drop_scales=1.0,
        drop_from=0,
    ),
}


class GeneratorLoss(Settings):
    """What all objectives of generators share."""

    drop_condition: float = Field(0.1, ge=0, le=1, description="share of labels that are replaced by the null class")
    drop_parts: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(
        {}, description="share of images that lose a part of the condition on its own, by the part's name"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="mass spread over all codes")
    scale_weights: tuple[Weight, ...] = Field(
        (), max_length=1024, description="factor of the loss at each scale; default: 1 each"
    )
    progressive: float = Field(0.0, ge=0, lt=1, description="train scale by scale until this share of the run; 0: off")
    progressive_from: int = Field(
        FIRST_STAGE, ge=1, le=1024, description="newest scale of the first stage, counted from 0"
    )
    progressive_warmup: int = Field(
        STAGE_WARMUP, ge=1, le=10**9, description="steps over which the weight of a stage's newest scale rises"
    )

    @model_validator(mode="after")
    def _stages_of_progressive_training(self) -> "GeneratorLoss":
        changed = (self.progressive_from, self.progressive_warmup) != (FIRST_STAGE, STAGE_WARMUP)
        if changed and not self.progressive:
            raise ValueError(
                "progressive_from and progressive_warmup do nothing while progressive is 0; set it, to 0.8 say"
            )
        return self

    def check(self, scales: int) -> None:
        """Refuse what does not go with this number of scales."""
        if self.scale_weights and len(self.scale_weights) != scales:
            raise ValueError(
                f"scale_weights: expected one factor for each of {scales} scales, got {len(self.scale_weights)}"
            )
        # The default is for any number of scales: of fewer, the first stage has all.
        if self.progressive and self.progressive_from >= scales and self.progressive_from != FIRST_STAGE:
            raise ValueError(
                f"progressive_from must be less than the number of scales, {scales}, got {self.progressive_from}"
            )
