"""How well a generator predicts held-out tokens, scale by scale, beside what a table of frequencies would reach."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union

import numpy as np
import torch
from torch import Tensor

from nextscale.draws import Draws, generator_for, rows_in, rows_of
from nextscale.evaluation.reconstruction import code_counts
from nextscale.settings import brief
from nextscale.system import Labels, System, check_system
from nextscale.tokenizer.pyramid import teacher_inputs
from nextscale.tokens import Tokens, each, split

if TYPE_CHECKING:
    from nextscale.encoded import EncodedShards
    from nextscale.evaluation.image_sets import ImageSet

Rows = Union[Tokens, "EncodedShards"]  # [N, ...], in memory or in files


@dataclass(frozen=True)
class LikelihoodReport:
    """The head's measures by name, one entry a scale. Of softmax and bits: `cross_entropy` in nats a token, and `accuracy` of
    the most likely token, or bit, 0 to 1."""

    measures: dict[str, list[float]]
    lengths: tuple[int, ...]

    def __getitem__(self, name: str) -> list[float]:
        return self.measures[name]

    @property
    def mean(self) -> float:
        """The first measure, the loss, over all tokens."""
        loss = next(iter(self.measures.values()))
        return sum(value * n for value, n in zip(loss, self.lengths, strict=True)) / sum(self.lengths)

    def metrics(self) -> dict[str, float]:
        """Flat names for the log."""
        named = self.measures.items()
        return {"loss": self.mean} | {f"{n}/{k}": v for n, values in named for k, v in enumerate(values)}


@torch.no_grad()
def evaluate_likelihood(
    system: System, tokens: Rows, labels: Labels, batch_size: int = 64, *, seed: int = 0
) -> LikelihoodReport:
    """Teacher-forced measures of tokens [N, L] (of bits [N, L, d]) under what is told of them, N labels or prompts, or several
    such lists by name. Heads that need random numbers draw them from the seed: the same ones each time."""
    check_system(system)
    if isinstance(tokens, str | list) or not hasattr(tokens, "__len__") or not len(tokens):
        raise ValueError(f"expected tokens of one image or more, [N, L], got {brief(tokens)}")
    if isinstance(tokens, Tensor) and (tokens.is_meta or tokens.ndim < 2 or tokens.shape[1] != system.schedule.length):
        raise ValueError(f"expected tokens [N, {system.schedule.length}], got a tensor {list(tokens.shape)}")
    scored = [_score(system, *batch, seed) for batch in _batches(system, tokens, labels, batch_size)]
    measures = {name: torch.cat([part[name] for part in scored]).double().mean(dim=0).tolist() for name in scored[0]}
    return LikelihoodReport(measures, system.schedule.lengths)


@dataclass(frozen=True)
class ConditionGain:
    """What the right label or caption is worth: how much more of the loss (nats a token) another image's costs, at each scale
    and over all.

    The mean of all tokens comes with its standard error over groups of images (variants of one drawing count as one).
    """

    scales: list[float]
    mean: float
    standard_error: float
    groups: int


@torch.no_grad()
def condition_gain(
    system: System,
    tokens: Rows,
    labels: Labels,
    groups: Tensor,
    *,
    seed: int = 0,
    batch_size: int = 64,
) -> ConditionGain:
    """Compare held-out tokens [N, L] under their own labels or captions with those of another image, drawn at random from
    another of the `groups` int64 [N]. A model that does not listen gains 0.

    Raises ValueError if all images are of one group.
    """
    other = _derangement(groups, torch.Generator().manual_seed(seed)).tolist()
    named = _named(system, labels)
    wrong = {name: [values[i] for i in other] for name, values in named.items()}

    def losses(told: Labels) -> Tensor:
        scored = [_score(system, *batch, seed) for batch in _batches(system, tokens, told, batch_size)]
        return torch.cat([next(iter(measures.values())) for measures in scored]).double()  # [N, K]

    right_losses, wrong_losses = losses(named), losses(wrong)
    gain = wrong_losses - right_losses  # [N, K]
    share = torch.tensor(system.schedule.lengths, dtype=torch.double) / system.schedule.length
    _, place = groups.unique(return_inverse=True)
    sizes = torch.bincount(place).double()
    each = torch.zeros_like(sizes).index_add_(0, place, gain @ share) / sizes  # one number a group
    return ConditionGain(
        scales=gain.mean(dim=0).tolist(),
        mean=float(each.mean()),
        standard_error=float(each.std() / len(each) ** 0.5),
        groups=len(each),
    )


def _derangement(groups: Tensor, generator: torch.Generator) -> Tensor:
    """For each image another one, of another group; each is taken about once."""
    if len(groups.unique()) < 2:
        raise ValueError(
            "the images are all of one group, so none can be told what another one shows; give more images"
        )
    other = torch.randperm(len(groups), generator=generator)
    while len(same := (groups[other] == groups).nonzero().squeeze(1)):
        other[same] = torch.randint(len(groups), (len(same),), generator=generator)
    return other


def _named(system: System, labels: Labels) -> Mapping[str, Sequence[Any]]:
    """What is told by name; a mapping as it is, since it may be read from files row by row."""
    return labels if isinstance(labels, Mapping) else system.told(labels)


def _batches(
    system: System, tokens: Rows, labels: Labels, batch_size: int
) -> Iterator[tuple[Tokens, dict[str, Sequence[Any]], int]]:
    """Tokens, what is told of them, and the number of the first one."""
    named = _named(system, labels)
    for first in range(0, rows_in(tokens), batch_size):
        rows = slice(first, first + batch_size)
        yield rows_of(tokens, rows), {name: values[rows] for name, values in named.items()}, first


def _score(
    system: System, tokens: Tokens, told: Mapping[str, Sequence[Any]], first: int, seed: int
) -> dict[str, Tensor]:
    """The measures of each image at each scale, [B, K] each, the loss first."""
    schedule, model = system.schedule, system.need_model()
    targets: Any = each(lambda t: t.to(system.device, torch.int64 if t.dtype == torch.int32 else t.dtype), tokens)
    inputs = teacher_inputs(system.tokenizer.pyramid, split(targets, schedule.lengths), schedule)
    draws = Draws(generator_for(seed, first, "validation"), rows_in(targets))
    h = model.hidden(inputs, model.prepare(system.condition(told)), schedule.span())
    return {
        name: torch.stack([part.mean(dim=1) for part in schedule.split(values.cpu())], dim=1)
        for name, values in model.head.judge(h, targets, draws).items()
    }


def scale_counts(system: System, tokens: Rows, batch_size: int = 4096) -> list[Tensor]:
    """How often each code occurs at each scale of tokens [N, L], float64 [1, V]; of bits [N, L, d] each bit on its own,
    [d, 2]. Of several tensors, those that the pyramid counts."""
    pyramid, totals = system.tokenizer.pyramid, None
    for first in range(0, rows_in(tokens), batch_size):
        some = rows_of(tokens, slice(first, first + batch_size))
        chosen = [pyramid.choices(token_map) for token_map in system.schedule.split(some)]
        counts = code_counts([ids for ids in chosen if ids is not None], pyramid.codes)
        totals = counts if totals is None else [a + b for a, b in zip(totals, counts, strict=True)]
    if totals is None:
        raise ValueError("there are no tokens; nothing can be counted")
    return totals


def unigram_entropy(counts: Sequence[Tensor]) -> list[float]:
    """Entropy in nats of the codes' frequencies at each scale (see `scale_counts`); of bits the mean over the d.

    The frequencies are those of the very tokens that are judged, so no table can do better on them: this is the lowest
    cross-entropy of any predictor that knows the scale alone.
    """
    shares = [count / count.sum(dim=1, keepdim=True) for count in counts]
    return [float(torch.special.entr(share).sum(dim=1).mean()) for share in shares]


def frequency_cross_entropy(known: Sequence[Tensor], judged: Sequence[Tensor]) -> list[float]:
    """Cross-entropy in nats of tokens under the codes' frequencies at each scale in `known` ones, of the counts of both.

    What a table learned from the training tokens reaches on held-out ones; one is added to every count, since a code
    may not have occurred.
    """
    entropies = []
    for counts, seen in zip(known, judged, strict=True):
        logs = ((counts + 1) / (counts + 1).sum(dim=1, keepdim=True)).log()
        entropies.append(float(-(logs * seen).sum() / seen.sum()))
    return entropies


def frequency_accuracy(known: Sequence[Tensor], judged: Sequence[Tensor]) -> list[float]:
    """How often the most frequent code of each scale in `known` tokens is right for others, 0 to 1, of the counts of both; of
    bits the mean over them."""
    hits = [
        seen.gather(1, counts.argmax(dim=1, keepdim=True)).sum() for counts, seen in zip(known, judged, strict=True)
    ]
    return [float(hit / seen.sum()) for hit, seen in zip(hits, judged, strict=True)]


def residual_bits(reconstructions: ImageSet, images: ImageSet, batch: int = 256) -> float:
    """Bits for each number of an image (pixels x channels) that its reconstruction leaves to be told: the cross-entropy of
    the bytes under a Laplace distribution around it, of the one width that fits all best.

    With the bits that the tokens cost this is the length of a code for the pixels, so a bound on their likelihood: systems with
    other tokenizers can be compared by it.
    """
    counts = np.zeros((256, 256))  # [reconstructed, original]
    for ours, theirs in zip(reconstructions.batches(batch), images.batches(batch), strict=True):
        pairs = ours.astype(np.int64) * 256 + theirs
        counts += np.bincount(pairs.ravel(), minlength=65_536).reshape(256, 256)
    places = np.arange(256)

    def bits(log_width: float) -> float:
        return float((counts * _laplace_bits(places[:, None], places[None], np.exp(log_width))).sum() / counts.sum())

    from scipy import optimize

    return float(optimize.minimize_scalar(bits, bounds=(-4, 6), method="bounded").fun)


def _laplace_bits(centre: Any, value: Any, width: float) -> Any:
    """-log2 of the mass of a Laplace distribution between value - 1/2 and value + 1/2; the ends have the tails."""
    distance = np.abs(value - centre)
    inside = np.where(
        distance > 0,
        0.5 * np.exp(-(distance - 0.5) / width) * -np.expm1(-1 / width),
        -np.expm1(-0.5 / width),
    )
    tail = np.where(distance > 0, 0.5 * np.exp(-(distance - 0.5) / width), 1 - 0.5 * np.exp(-0.5 / width))
    at_end = ((value == 0) & (centre >= value)) | ((value == 255) & (centre <= value))
    return -np.log2(np.maximum(np.where(at_end, tail, inside), 1e-300))
