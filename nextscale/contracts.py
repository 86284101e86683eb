"""What parts promise each other. A part is known by its contract, not by a base class or its name; the core asks it for
nothing else. `tests/test_contracts.py` holds every recipe's parts against these, and builds miniatures of other methods.

B images, K scales of l_k tokens, C channels of the feature map, D of the transformer, V codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from nextscale.condition import Condition
from nextscale.draws import BatchPart, Draws
from nextscale.schedule import Schedule, Span
from nextscale.tokens import Tokens

if TYPE_CHECKING:
    from nextscale.sampling.loop import Options
    from nextscale.sampling.state import State
    from nextscale.system import Labels, System
    from nextscale.training.generator_task import Run

# What a part made for itself, and what nobody else looks into.
Opaque = Any
OwnSettings = Any  # settings of the kind that the part is for, `TransformerSettings` mostly
OwnTokens = Any  # tokens of the kind that the part is for
Kind = Literal["ids", "bits", "vectors", "mixed"]
TokenType = Callable[..., Tokens] | None
Corrupt = Callable[[OwnTokens, int], OwnTokens]
Generators = torch.Generator | list[torch.Generator]
Combine = Callable[[Tensor], Tensor]
Pick = Callable[[Tensor, Generators], Tokens]
# `edit(tokens, k)` replaces tokens that were picked. It may have `features(f_hat, k)`, which replaces what is known after
# scale k, and, if it knows images by their rows, `select(rows)`.
Edit = Callable[[OwnTokens, int], OwnTokens]

M = TypeVar("M", bound=nn.Module)

# ---- tokenizer ---------------------------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """What `encode` returns, one entry a scale: tokens [B, l_k, ...]; inputs [B, l_k, C] of every scale but the first;
    f_hats [B, C, H, W] after each scale."""

    tokens: list[Tokens]
    inputs: list[Tensor]
    f_hats: list[Tensor]


class Lesson(NamedTuple):
    """What training the tokenizer needs of a feature map: the tokens of each scale; `residuals`, what they stand for
    [B, l_k, C]; f_hat [B, C, h, w], whose gradient goes to the features; the quantizer's loss, a number."""

    tokens: list[Tokens]
    residuals: list[Tensor]
    f_hat: Tensor
    loss: Tensor


@dataclass(frozen=True)
class Kept:
    """Which scales the images of a batch keep while the tokenizer is trained (scale dropout), bool [total, K].

    rows: the images at hand; all by default. A part of a batch knows the whole, so that what it adds to the update does not
    depend on how the batch is shared.
    """

    whole: Tensor
    rows: slice = field(default_factory=lambda: slice(None))

    @property
    def own(self) -> Tensor:
        """Of the images at hand, bool [B, K]."""
        return self.whole[self.rows]

    @property
    def weights(self) -> Tensor:
        """Weights for a mean over those images of the batch that keep a scale, float [B, K]; 0 at a scale that none keeps.
        The mean over equal parts of the batch is the whole batch's."""
        own = self.own
        counts = self.whole.sum(dim=0) * (len(own) / len(self.whole))
        return own.float() / counts.clamp(min=1e-6)

    def to(self, device: torch.device | str) -> Kept:
        return Kept(self.whole.to(device), self.rows)


@runtime_checkable
class Pyramid(Protocol):
    """How token maps add up to a feature map, and what the next scale sees of it.

    kind: what its tokens are. code_dim: C. codes: values that an id (V) or a bit (2) can take, 0 of vectors.
    token_type: of `mixed` tokens the named tuple that they are, else None.
    """

    kind: Kind
    code_dim: int
    codes: int
    token_type: TokenType

    def start(self, batch: int, schedule: Schedule, device: torch.device | str | None = None) -> Tensor:
        """What is known before the first scale, float32 [B, C, H, W]."""

    def add(self, f_hat: Tensor, tokens: Tokens, k: int, schedule: Schedule) -> Tensor:
        """What is known after scale k."""

    def next_input(self, f_hat: Tensor, k: int, schedule: Schedule) -> Tensor:
        """What the transformer reads at scale k >= 1, [B, l_k, C]."""

    def encode(self, f: Tensor, schedule: Schedule, corrupt: Corrupt | None = None) -> Encoded:
        """Tokens, inputs and sums of a feature map [B, C, H, W]; `corrupt(tokens, k)` may replace those that enter the sum."""

    def choices(self, tokens: Tokens) -> Tensor | None:
        """The ids [B, l] or bits [B, l, d] in tokens, to count how often each occurs; None where there are none."""

    def limit(self, k: int) -> int:
        """How many of its `codes` scale k may use: all, unless a recipe wants fewer."""

    def check_scales(self, schedule: Schedule, trained: Schedule) -> None:
        """Raises ValueError if it was trained with the scales `trained`, and cannot work with those of `schedule`."""


@runtime_checkable
class Upkeep(Protocol):
    """What keeps codes in use while a tokenizer is trained. codes: the table [V, C], which no weight decay touches.

    Several processes make the same changes: `average` is the mean over them of a tensor, `gather` their rows behind each
    other.
    """

    codes: nn.Parameter

    def first_codes(self, f: Tensor, schedule: Schedule, generator: torch.Generator) -> None:
        """Set the codes from feature maps [B, C, H, W] of real images."""

    def follow(self, residuals: Sequence[Tensor], average: Callable[[Tensor], Tensor]) -> None:
        """Adapt to the residuals [B, l_k, C] of a step, scale by scale."""

    def restart(
        self,
        usage: Tensor,
        residuals: Sequence[Tensor],
        schedule: Schedule,
        generator: torch.Generator,
        gather: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Move codes that are not in use to where residuals are; returns their ids. `usage`: the share of tokens that each
        code has at each scale [K, V], in which moved codes get a period of grace."""


@runtime_checkable
class TrainablePyramid(Pyramid, Protocol):
    """A pyramid that `train_tokenizer` can train."""

    def learn(self, f: Tensor, schedule: Schedule, keep: Kept, *, beta: float = 0.25, entropy: float = 0.0) -> Lesson:
        """Quantize `f` [B, C, H, W] with a gradient. beta, entropy: weights of what its loss may consist of: features follow
        codes, and tokens that are sure and used alike."""

    def upkeep(self) -> Upkeep | None:
        """What keeps its codes in use; None where nothing needs it."""


@runtime_checkable
class Tokenizer(Protocol):
    """Content to feature maps and back, around a pyramid. channels: of the content. stride: extent of the content for each
    cell of the feature map."""

    channels: int
    stride: int

    @property
    def pyramid(self) -> Pyramid: ...

    def features(self, content: Tensor) -> Tensor:
        """The feature map that is quantized, float32 [B, C, H, W]."""

    def encode(self, content: Tensor, schedule: Schedule) -> Encoded:
        """Tokens, inputs and running sums."""

    def decode(self, f_hat: Tensor) -> Tensor:
        """Content of a feature map; not clamped."""

    def f_hat(self, tokens: Sequence[Tokens], schedule: Schedule) -> Tensor:
        """The sum of the token maps of the first scales."""


@runtime_checkable
class TrainableTokenizer(Tokenizer, Protocol):
    """A tokenizer that `train_tokenizer` can train. networks: those that `compile` compiles. last_weight: of the decoder's
    last layer, where gradients of losses are compared."""

    @property
    def pyramid(self) -> TrainablePyramid: ...

    @property
    def networks(self) -> Sequence[nn.Module]: ...

    @property
    def last_weight(self) -> Tensor: ...


# ---- what the model is told --------------------------------------------------------------------------------------------


@runtime_checkable
class Reader(Protocol):
    """Turns what users or data items say under one name into what the conditioner takes.

    field: the key of a data item that says it, `label` or `caption` for example. `field + "s"` may hold several that fit.
    shape: of the tensors that it reads; None where it reads numbers or texts.
    aligned: whether its places are those of the image, as of a depth map: then neither may move without the other.
    choices: all that can be said, where that is a list (class names, or their numbers); else empty.
    """

    field: str
    shape: tuple[int, ...] | None
    aligned: bool

    @property
    def choices(self) -> Sequence[str | int]: ...

    def __call__(self, values: Sequence[Any]) -> Any:
        """One entry a row; None says nothing. The result has `.to(device)`. Raises ValueError for what it cannot read."""

    def check(self, values: Sequence[Any]) -> None:
        """Raise ValueError for what it cannot read; cheap."""


@runtime_checkable
class Conditioner(Protocol):
    """Makes the named parts of a condition, and their nulls. What it is told is float32 or whole numbers; it casts floats to
    the dtype of its own weights."""

    def __call__(self, told: Mapping[str, Any]) -> Condition:
        """`told`: what the readers made of it, by their names."""

    def null(self, condition: Condition) -> Condition:
        """The condition that says nothing, with the same parts, for as many rows as the given one."""


@runtime_checkable
class GrowingConditioner(Conditioner, Protocol):
    """A conditioner of classes, whose number may grow when a system is trained further."""

    def grow(self, smaller: Conditioner) -> None:
        """Take over the weights of one with the first of its classes."""


# ---- model -------------------------------------------------------------------------------------------------------------


@runtime_checkable
class LayerCache(Protocol):
    """What one block keeps from scale to scale of one sampling. It is a value: what a fork adds, its parent never sees.

    outputs: what methods keep of the block's branches to use it again, [rows, ...] by a number of their own.
    """

    outputs: dict[int, Tensor]

    @property
    def nbytes(self) -> int:
        """Memory that it holds."""

    def fork(self, commit: bool = True) -> LayerCache:
        """One that goes on from here. Without `commit` it is for looking ahead: what it is given is thrown away, and the next
        one uses the same memory. Going on with one whose memory was used by another since raises RuntimeError."""

    def select(self, rows: Tensor) -> LayerCache:
        """Chosen rows (int64 [rows']), re-ordered or copied."""


@runtime_checkable
class KeyCache(LayerCache, Protocol):
    """A cache of keys and values. Attention goes through it, so it may keep, score and drop keys head by head."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, span: Span, scale: float) -> Tensor:
        """Add keys and values [rows, N, l, head_dim] of the span's tokens, and let these attend: [rows, N, l, head_dim]."""


@runtime_checkable
class Block(Protocol):
    """One layer of the transformer. branches: parts of it that methods may wrap."""

    @property
    def branches(self) -> Sequence[Branch]: ...

    def with_branches(self, branches: Iterable[Branch]) -> Block:
        """The same block with these branches; nothing is copied. One around another block hands them on to it."""

    def reset_parameters(self, settings: OwnSettings, generator: torch.Generator) -> None:
        """Its initial weights, after linear layers and embeddings have the usual ones; `settings`: the transformer's."""

    def prepare(self, condition: Condition) -> Opaque:
        """What depends on the condition alone: tensors [B, ...] in nested tuples, one entry a branch."""

    def __call__(self, h: Tensor, prepared: Opaque, span: Span, cache: LayerCache | None = None) -> Tensor:
        """[B, l, D] to [B, l, D]."""

    def new_cache(self, rows: int, length: int, like: Tensor) -> LayerCache:
        """An empty cache for `rows` sequences of up to `length` tokens, of the dtype and on the device of `like`."""


@runtime_checkable
class Branch(Protocol):
    """One residual branch of a block."""

    def __call__(self, h: Tensor, prepared: Opaque, span: Span, cache: LayerCache | None = None) -> Tensor:
        """What is added to the residual stream [B, l, D]."""


@runtime_checkable
class Layer(Protocol):
    """What a modulated branch computes, in two steps, so that what lies before the first product of matrices need not be kept
    for the backward pass."""

    def project(self, x: Tensor) -> Tensor:
        """The first product of matrices, of inputs [B, l, D]."""

    def __call__(self, projected: Tensor, span: Span, cache: LayerCache | None = None) -> Tensor:
        """The rest, [B, l, D]."""

    @property
    def last(self) -> nn.Linear:
        """The layer that its result comes from; initial weights of deep transformers shrink it."""


@runtime_checkable
class Positions(Protocol):
    """Where tokens are. start: [1 or l_0, D], added to the start tokens."""

    @property
    def start(self) -> Tensor: ...

    def __call__(self, span: Span) -> Tensor:
        """What is added to the residual stream of the tokens at hand, [l, D] (of kept tokens [B, kept, D])."""

    def reset_parameters(self, settings: OwnSettings, generator: torch.Generator) -> None:
        """Its initial weights, after linear layers and embeddings have the usual ones."""


@runtime_checkable
class Prepared(Protocol):
    """What a model made of a condition, once an image."""

    def select(self, rows: Tensor) -> Prepared:
        """Chosen rows (int64 [rows']), re-ordered or copied."""


@runtime_checkable
class Cache(Protocol):
    """What a model keeps from scale to scale: one layer cache a block. A value, as they are."""

    @property
    def nbytes(self) -> int: ...

    def fork(self, commit: bool = True) -> Cache: ...

    def select(self, rows: Tensor) -> Cache: ...


@runtime_checkable
class Model(Protocol):
    """The generator: training (all scales at once) and sampling (one scale, cached) call the same `hidden`."""

    conditioner: Conditioner
    head: Head
    blocks: Sequence[Block]

    def prepare(self, condition: Condition) -> Opaque:
        """Everything that depends on the condition alone (`Prepared`)."""

    def hidden(
        self, inputs: Tensor | None, prepared: Opaque, span: Span, cache: Opaque = None, *, commit: bool = True
    ) -> Tensor:
        """Hidden states for the head, float32 [B, l, D]. With `commit=False` the cache stays as it is."""

    def new_cache(self, prepared: Opaque, schedule: Schedule) -> Opaque:
        """An empty cache (`Cache`) for the rows of `prepared` and all scales of a schedule."""

    def with_blocks(self, blocks: Iterable[Block]) -> Model:
        """The same model with these blocks; nothing is copied."""

    def flop(self, schedule: Schedule) -> float:
        """Floating-point operations of a forward pass for one image, estimated."""


@runtime_checkable
class Head(Protocol):
    """What is predicted for each token: its loss, its likelihood, its sampling."""

    def reset_parameters(self, settings: OwnSettings, generator: torch.Generator) -> None:
        """Its initial weights, after linear layers and embeddings have the usual ones; `settings`: the transformer's."""

    def __call__(self, h: Tensor) -> Tensor:
        """What guidance combines: logits float32 [B, l, V] or [B, l, d, 2]; a head without any raises ValueError."""

    def loss(self, h: Tensor, targets: OwnTokens, draws: Draws, label_smoothing: float = 0.0) -> Tensor:
        """Loss of each token, [B, l]; `draws`: the images' random numbers, for heads that need some."""

    def judge(self, h: Tensor, targets: OwnTokens, draws: Draws) -> dict[str, Tensor]:
        """Measures of each token by name, [B, l] each; the first one is the loss that validation reports."""

    def log_prob(self, h: Tensor, tokens: OwnTokens) -> Tensor:
        """Log-likelihood of each token in nats, [B, l]; a head without one raises ValueError."""

    def sample(self, h: Tensor, combine: Combine, pick: Pick, generators: Generators) -> Tokens:
        """Tokens of hidden states [rows, l, D]: rows are branches x images, which `combine` makes one prediction of."""


# ---- training ----------------------------------------------------------------------------------------------------------


@runtime_checkable
class Objective(Protocol):
    """What a generator is trained for.

    wants: `tokens` or `features` (encoded once, before training), `items` (of the data, as they are: images, pairs), or
    `nothing` (it draws its own).
    """

    @property
    def wants(self) -> Literal["tokens", "features", "items", "nothing"]: ...

    def frozen(self, run: Run) -> dict[str, nn.Module]:
        """Networks that it needs and does not train, made of the weights from which training starts (also of a run that goes
        on); they are kept as `run.frozen`."""

    def loss(self, run: Run, part: BatchPart, step: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The loss of a part of a batch, and what to log; `run`: the training (`training.generator_task.Run`). It may draw
        samples. All random numbers come from `part.draws`."""

    def judge(self, run: Run, data: Any) -> dict[str, float]:
        """Metrics on held-out data, `loss` among them: tokens (`EncodedImages`), or items where it wants items; None: there
        are no data, so none but what it draws itself."""

    def score(self, metrics: Mapping[str, float]) -> float | None:
        """How good these metrics are; higher is better."""


# ---- output, loop, system ----------------------------------------------------------------------------------------------


@runtime_checkable
class Output(Protocol):
    """What the decoder makes: images, or something else."""

    @property
    def field(self) -> str:
        """The key of a data item that holds it."""

    def shape(self, schedule: Schedule, stride: int) -> tuple[int, ...]:
        """Shape of one, without the batch."""

    def fit(self, content: Tensor, like: Tensor) -> Tensor:
        """Content at the size of other content: a pyramid without a running sum decodes a coarse scale to less."""

    def finish(self, decoded: Tensor) -> Tensor:
        """What a user gets of what a decoder made: clamped, for example."""

    def pictures(self, content: Tensor) -> Tensor | None:
        """Something to look at, float [B, 3 or 1 or 4, H, W] in [-1, 1], with the content's gradient; None where there is
        nothing. Perceptual distances and discriminators look at it too."""

    def measure(self, content: Tensor, reference: Tensor) -> dict[str, Tensor]:
        """How near to the reference each is, by name, [B] each; the first one is the score, higher is better."""


@runtime_checkable
class Stepper(Protocol):
    """The loop: VAR's is `sampling.loop.ScaleByScale`; a recipe may bring its own. All verbs go through it."""

    def start(self, system: System, told: Labels, options: Options) -> State:
        """The state before the first step."""

    def step(self, system: System, state: State) -> State:
        """The state after one more step; the given one stays as it is."""

    def done(self, system: System, state: State) -> bool:
        """Whether no step is left."""

    def skipping(self, scales: int) -> Stepper:
        """The same loop without its last scales (as many as it leaves out already, at least); ValueError if it cannot."""

    def finish(self, system: System, state: State) -> Tensor:
        """What the user gets of a state, [B, ...]: after the last step, or earlier as a preview."""


@runtime_checkable
class Sampling(Protocol):
    """How a system samples when the caller says nothing."""

    def options(self) -> dict[str, Any]:
        """Arguments of `ns.sample`."""

    def words(self) -> str:
        """The same for a title."""
