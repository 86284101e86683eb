"""What sets of images are compared by: FID's distance, Inception Score, precision and recall, kernel distance, SSIM, PSNR.

Everything here takes features, probabilities or pixels as arrays, and computes in float64, a block at a time; which
network the features are of is the caller's business (`networks.py`). The definitions are those of the reference
evaluator (openai/guided-diffusion, `evaluations`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from nextscale.settings import brief, whole_number

Array = Any  # of numpy
SPLIT = 5000  # rows of a chunk of the Inception Score
NEIGHBOUR = 3  # of precision and recall
BLOCK = 1024  # rows that are looked at together: 16 MB of 2,048 features, 8 MB of distances
PEAK = 255.0


# ---- moments and the Frechet distance ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FeatureMoments:
    """Mean [D] and unbiased covariance [D, D] of features, float64; `count`: of how many, None where nobody says."""

    mean: Array
    covariance: Array
    count: int | None = None

    def __post_init__(self) -> None:
        mean, covariance = np.asarray(self.mean, np.float64), np.asarray(self.covariance, np.float64)
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                f"expected a mean [D] and a covariance [D, D], got {list(mean.shape)} and {list(covariance.shape)}"
            )
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError("expected a mean and a covariance of finite numbers, got NaN or inf")
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "covariance", covariance)

    @classmethod
    def of(cls, features: Array) -> FeatureMoments:
        """Those of features [N, D], at least two."""
        running = RunningMoments()
        for rows in _blocks(_features(features, "features"), BLOCK):
            running.add(rows)
        return running.moments()


class RunningMoments:
    """Moments of features that come in batches: any batches give the same, but for rounding in float64.

    Sums are of distances from the first batch's mean, so that a large common value takes no digits.
    """

    def __init__(self) -> None:
        self.count = 0
        self.shift: Array = None
        self.sum: Array = None
        self.products: Array = None

    def add(self, features: Array) -> None:
        """Further features [b, D]."""
        rows = _features(features, "features", least=1).astype(np.float64)
        if self.shift is None:
            self.shift = rows.mean(axis=0)
            self.sum = np.zeros(rows.shape[1])
            self.products = np.zeros((rows.shape[1], rows.shape[1]))
        if rows.shape[1] != len(self.shift):
            raise ValueError(f"expected features of {len(self.shift)} numbers, as before, got {rows.shape[1]}")
        rows = rows - self.shift
        self.count += len(rows)
        self.sum += rows.sum(axis=0)
        self.products += rows.T @ rows

    def moments(self) -> FeatureMoments:
        """Mean and covariance of all so far."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}")
        mean = self.sum / self.count
        covariance = (self.products - self.count * np.outer(mean, mean)) / (self.count - 1)
        return FeatureMoments(self.shift + mean, covariance, self.count)


def frechet_distance(a: FeatureMoments, b: FeatureMoments, method: Literal["eigh", "sqrtm"] = "eigh") -> float:
    """`|m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)`: FID where the features are Inception's (Heusel et al. 2017).

    Biased upwards for small sets, and without full rank below D images. `eigh` takes the root of a symmetric product,
    which has the same trace; `sqrtm` is the reference evaluator's way, with its rules for roots that are not finite or
    not real. Raises ValueError for moments of different widths, and from `sqrtm` for a root that is not real.
    """
    if len(a.mean) != len(b.mean):
        raise ValueError(
            f"expected moments of the same features, got {len(a.mean)} and {len(b.mean)} numbers an image; moments that a file "
            "holds belong to the network that made them (2048: Inception's, 1280: EfficientNet-lite0's)"
        )
    if method not in ("eigh", "sqrtm"):
        raise ValueError(f"method: expected eigh or sqrtm, got {brief(method)}")
    root = _trace_by_eigh(a, b) if method == "eigh" else _trace_by_sqrtm(a.covariance, b.covariance)
    apart = a.mean - b.mean
    return float(apart @ apart + np.trace(a.covariance) + np.trace(b.covariance) - 2 * root)


def _trace_by_eigh(a: FeatureMoments, b: FeatureMoments) -> float:
    """tr (S1 S2)^(1/2) = the sum of the roots of the eigenvalues of R S2 R, R = S1^(1/2)."""
    from scipy import linalg

    values, vectors = linalg.eigh(a.covariance, driver="evd")
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    inner = root @ b.covariance @ root
    return float(np.sqrt(linalg.eigvalsh((inner + inner.T) / 2, driver="evd").clip(min=0)).sum())


def _trace_by_sqrtm(a: Array, b: Array) -> float:
    from scipy import linalg

    root = linalg.sqrtm(a @ b)
    if not np.isfinite(root).all():
        offset = np.eye(len(a)) * 1e-6
        root = linalg.sqrtm((a + offset) @ (b + offset))
    if np.iscomplexobj(root):
        largest = float(np.abs(np.diagonal(root).imag).max())
        if largest > 1e-3:
            raise ValueError(
                f"expected a real root of the covariances, got imaginary parts up to {largest:.3g}; take more images, or "
                "the method eigh"
            )
        root = root.real
    return float(np.trace(root))


# ---- the Inception Score -------------------------------------------------------------------------------------------------


def inception_score(pooled: Array, weight: Array, split: int = SPLIT) -> float:
    """The score of pooled features [N, D] by the classifier's weights [D, C], whose bias is not added: the reference's
    definition. `split`: rows of a chunk, see `score_of_probabilities`."""
    from scipy import special

    pooled, weight = _features(pooled, "pooled features", least=1), _features(weight, "weight", least=1)
    if pooled.shape[1] != len(weight):
        raise ValueError(f"weight: expected [{pooled.shape[1]}, C] for these features, got {list(weight.shape)}")
    whole_number("split", split, 1, 2**31)
    weight = weight.astype(np.float64)
    parts = (special.softmax(rows.astype(np.float64) @ weight, axis=1) for rows in _blocks(pooled, split))
    return float(np.mean([score_of_probabilities(part, split) for part in parts]))


def score_of_probabilities(probabilities: Array, split: int = SPLIT) -> float:
    """exp of the mean divergence of a row [C] from the mean row, the mean over chunks of `split` rows in their order; a
    short last chunk is a chunk. A set that is sorted by class scores lower. 0 log 0 is 0, and no epsilon is added."""
    from scipy import special

    rows = _features(probabilities, "probabilities", least=1)
    whole_number("split", split, 1, 2**31)
    if (rows < 0).any() or np.abs(rows.sum(axis=1, dtype=np.float64) - 1).max() > 1e-3:
        raise ValueError("expected probabilities [N, C] that sum to 1 for each image, got others")
    scores = []
    for part in _blocks(rows, split):
        part = part.astype(np.float64)
        scores.append(np.exp(special.rel_entr(part, part.mean(axis=0)).sum(axis=1).mean()))
    return float(np.mean(scores))


# ---- precision and recall ------------------------------------------------------------------------------------------------


class PrecisionRecall(NamedTuple):
    """Shares, 0 to 1: of samples that lie in the reference's region, and of the reference that lies in the samples'."""

    precision: float
    recall: float


def precision_recall(samples: Array, reference: Array, k: int = NEIGHBOUR, block: int = BLOCK) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019) of features [N, D] and [M, D], `block` rows at a time.

    The region of a set: balls around its points up to the k-th nearest other one, edges included; no radius is clamped.
    The reference evaluator begins in float16, so its third digit may differ. Recall depends on both numbers: compare sets
    of the same sizes. Exact: the same answer as from differences in float64, duplicates included; where very many
    distances are equal and not 0, as of one-hot rows, that takes long.
    """
    samples, reference = _features(samples, "samples"), _features(reference, "reference")
    _same_width(samples, reference)
    whole_number("k", k, 1, min(len(samples), len(reference)) - 1, "; the k-th neighbour of a point is another one")
    whole_number("block", block, 1, 2**31)
    # Near the origin the product formula of distances loses fewer digits.
    centre = reference.mean(axis=0, dtype=np.float64)
    of_reference, of_samples = (_radii(points, k, centre, block) for points in (reference, samples))
    inside_reference = np.zeros(len(samples), bool)
    inside_samples = np.zeros(len(reference), bool)
    for near in _nearness(samples, reference, centre, block):
        _look_inside(near, of_reference, inside_reference)
        _look_inside(near.turned(), of_samples, inside_samples)
    return PrecisionRecall(float(inside_reference.mean()), float(inside_samples.mean()))


class _Near(NamedTuple):
    """Squared distances of points [n, D], the `rows` of all, to others [m, D], the `columns`: each lies from `low` to `high`
    [n, m]. The product formula gives no more; what such a range leaves open is measured."""

    rows: slice
    columns: slice
    points: Array
    others: Array
    low: Array
    high: Array

    def turned(self) -> _Near:
        return _Near(self.columns, self.rows, self.others, self.points, self.low.T, self.high.T)

    def measured(self, which: Array) -> tuple[Array, Array, Array]:
        """Rows and columns of the pairs that a mask [n, m] holds, and their distances from differences."""
        row, column = np.nonzero(which)
        found = np.empty(len(row))
        step = max(1, 2**20 // self.points.shape[1])
        for first in range(0, len(row), step):
            pairs = slice(first, first + step)
            apart = self.points[row[pairs]].astype(np.float64) - self.others[column[pairs]].astype(np.float64)
            found[pairs] = np.square(apart).sum(axis=1)
        return row, column, found


def _nearness(a: Array, b: Array, centre: Array, block: int) -> Iterator[_Near]:
    """All pairs, a block by a block at a time: the blocks of one row of them follow each other."""
    # The rounding of the centre, of both norms, of the product and of the differences, all of D numbers, with room.
    error = 4 * (a.shape[1] + 8) * np.finfo(np.float64).eps
    for top in range(0, len(a), block):
        points = a[top : top + block]
        x = points - centre
        of_x = np.square(x).sum(axis=1)[:, None]
        for left in range(0, len(b), block):
            others = b[left : left + block]
            y = others - centre
            norms = of_x + np.square(y).sum(axis=1)
            squares = norms - 2 * (x @ y.T)
            norms *= error
            rows, columns = slice(top, top + len(x)), slice(left, left + len(y))
            yield _Near(rows, columns, points, others, np.maximum(squares - norms, 0), squares + norms)


def _radii(points: Array, k: int, centre: Array, block: int) -> Array:
    """Squared distance of each point to its k-th nearest other one [N]: rank k, where rank 0 is the point itself."""
    nearest = np.full((len(points), k), np.inf)  # of each point, measured, so far
    for near in _nearness(points, points, centre, block):
        if near.rows == near.columns:
            np.fill_diagonal(near.low, np.inf)  # a point is no other one
        best = nearest[near.rows]
        first = np.zeros(near.low.shape, bool)
        few = min(k, near.low.shape[1])
        np.put_along_axis(first, near.low.argpartition(few - 1, axis=1)[:, :few], True, axis=1)
        # The likely ones first: they leave few others that may still be nearer.
        best = _nearer(near, first & (near.low < best.max(axis=1)[:, None]), best)
        nearest[near.rows] = _nearer(near, ~first & (near.low < best.max(axis=1)[:, None]), best)
    return nearest.max(axis=1)


def _nearer(near: _Near, which: Array, best: Array) -> Array:
    """The k smallest of those known [n, k] and the pairs that a mask [n, m] holds, measured."""
    if not which.any():
        return best
    row, column, found = near.measured(which)
    squares = np.full(which.shape, np.inf)
    squares[row, column] = found
    k = best.shape[1]
    return np.partition(np.concatenate([best, squares], axis=1), k - 1, axis=1)[:, :k]


def _look_inside(near: _Near, radii: Array, inside: Array) -> None:
    """Mark the points that lie in a ball around any of the others."""
    balls = radii[near.columns]
    found = inside[near.rows]  # a view
    found |= (near.high <= balls).any(axis=1)
    is_open = (near.low <= balls) & ~found[:, None]
    likely = np.zeros_like(is_open)
    likely[np.arange(len(is_open)), np.where(is_open, near.low, np.inf).argmin(axis=1)] = True
    # The nearest alone decides most points, all of them where features are equal.
    for which in (likely, ~likely):
        row, column, squares = near.measured(which & is_open & ~found[:, None])
        found[row[squares <= balls[column]]] = True


# ---- kernel distance -----------------------------------------------------------------------------------------------------


class Spread(NamedTuple):
    """Mean and standard deviation over subsets."""

    mean: float
    deviation: float


def kernel_distance(a: Array, b: Array) -> float:
    """Squared maximum mean discrepancy of features [N, D] and [M, D] with the kernel `(x y / D + 1)^3`, unbiased: around
    0, even below, for sets of one kind. KID where the features are Inception's (Binkowski et al. 2018)."""
    a, b = _features(a, "a"), _features(b, "b")
    _same_width(a, b)
    within = [(_kernel_sum(x, x) - _kernel_of_selves(x)) / (len(x) * (len(x) - 1)) for x in (a, b)]
    return float(sum(within) - 2 * _kernel_sum(a, b) / (len(a) * len(b)))


def kernel_distance_of_subsets(a: Array, b: Array, subsets: int = 100, size: int = 1000, seed: int = 0) -> Spread:
    """The same over random subsets of each, as KID is mostly published; a set with fewer than `size` images is taken whole.
    No image is twice in a subset. `deviation` is of the subsets found, divided by their number."""
    a, b = _features(a, "a"), _features(b, "b")
    _same_width(a, b)
    whole_number("subsets", subsets, 1, 10**6)
    whole_number("size", size, 2, 10**6)
    draws = np.random.default_rng(seed)

    def some(x: Array) -> Array:
        return x[draws.permutation(len(x))[:size]]

    found = [kernel_distance(some(a), some(b)) for _ in range(subsets)]
    return Spread(float(np.mean(found)), float(np.std(found)))


def _kernel_sum(a: Array, b: Array) -> float:
    """Over all pairs."""
    total = 0.0
    for x in _blocks(a, BLOCK):
        x = x.astype(np.float64) / a.shape[1]
        total += sum(float(((x @ y.astype(np.float64).T + 1) ** 3).sum()) for y in _blocks(b, BLOCK))
    return total


def _kernel_of_selves(a: Array) -> float:
    squares = (np.square(x.astype(np.float64)).sum(axis=1) for x in _blocks(a, BLOCK))
    return sum(float(((x / a.shape[1] + 1) ** 3).sum()) for x in squares)


# ---- pixels --------------------------------------------------------------------------------------------------------------


def psnr_bytes(images: Array, references: Array, most: float = 100.0) -> Array:
    """Peak signal-to-noise ratio in dB of each image, float64 [N]; bytes, or `luma` of them, [N, H, W, C] of 0 to 255.
    No image gets more than `most`: equal ones would get inf, which has no mean."""
    images, references = _pixels(images, references)
    error = np.array([np.square(_floats(x) - _floats(y)).mean() for x, y in zip(images, references, strict=True)])
    return 10 * np.log10(PEAK**2 / np.maximum(error, PEAK**2 / 10 ** (most / 10)))


def ssim(images: Array, references: Array) -> Array:
    """Structural similarity of each image, -1 to 1, float64 [N] (Wang et al. 2004): a Gaussian window of 11x11, sigma 1.5,
    where it lies whole in the image; K1 = 0.01, K2 = 0.03; variances of the population; the mean over places and channels.
    Pixels as for `psnr_bytes`."""
    images, references = _pixels(images, references)
    if min(images.shape[1:3]) < 11:
        raise ValueError(f"a window of 11x11 needs images of at least that size, got {list(images.shape)}")
    from scipy import ndimage

    place = np.arange(-5, 6)
    window = np.exp(-(place**2) / (2 * 1.5**2))
    window /= window.sum()
    small1, small2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2

    def blurred(x: Array) -> Array:
        x = ndimage.correlate1d(ndimage.correlate1d(x, window, axis=0), window, axis=1)
        return x[5:-5, 5:-5]

    found = np.empty(len(images))
    for i, (x, y) in enumerate(zip(images, references, strict=True)):
        x, y = _floats(x), _floats(y)
        mean_x, mean_y = blurred(x), blurred(y)
        var_x, var_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
        shared = blurred(x * y) - mean_x * mean_y
        above = (2 * mean_x * mean_y + small1) * (2 * shared + small2)
        found[i] = (above / ((mean_x**2 + mean_y**2 + small1) * (var_x + var_y + small2))).mean()
    return found


def luma(images: Array) -> Array:
    """The Y channel of BT.601, float64 [N, H, W, 1], of bytes [N, H, W, 3]: what papers on restoration measure."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"expected bytes [N, H, W, 3], got {images.dtype} {list(images.shape)}")
    return 16 + (images / PEAK) @ np.array([[65.481], [128.553], [24.966]])


# ---- codes ---------------------------------------------------------------------------------------------------------------


class CodeUsage(NamedTuple):
    """Of each scale [K], and of all together: the share of the codes that occur, and exp of the entropy of their shares."""

    used: list[float]
    perplexity: list[float]
    used_overall: float
    perplexity_overall: float


def code_usage(counts: Array) -> CodeUsage:
    """How codes are used, of how often each occurs at each scale [K, V]. Overall is of the sums over scales."""
    from scipy import special

    counts = np.asarray(counts, np.float64)
    if counts.ndim != 2 or 0 in counts.shape or not np.isfinite(counts).all() or (counts < 0).any():
        raise ValueError(f"expected counts [K, V] of at least 0, got {list(counts.shape)}")
    if (counts.sum(axis=1) == 0).any():
        raise ValueError("a scale has no tokens; nothing can be counted")
    rows = np.concatenate([counts, counts.sum(axis=0, keepdims=True)])
    shares = rows / rows.sum(axis=1, keepdims=True)
    *perplexity, overall = np.exp(special.entr(shares).sum(axis=1)).tolist()
    *used, used_overall = (rows > 0).mean(axis=1).tolist()
    return CodeUsage(used, perplexity, used_overall, overall)


# ---- checks --------------------------------------------------------------------------------------------------------------


def _features(features: Any, name: str, least: int = 2) -> Array:
    found = np.asarray(features)
    if found.ndim != 2 or len(found) < least or not found.shape[1] or found.dtype.kind not in "fiu":
        raise ValueError(
            f"{name}: expected numbers [N, D] of at least {least} image{'s' * (least > 1)}, got {found.dtype} "
            f"{list(found.shape)}"
        )
    if found.dtype.kind == "f" and not all(np.isfinite(rows).all() for rows in _blocks(found, BLOCK)):
        raise ValueError(f"{name}: expected finite numbers, got NaN or inf; look at what made them")
    return found


def _same_width(a: Array, b: Array) -> None:
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"expected features of one network, got {a.shape[1]} and {b.shape[1]} numbers an image")


def _blocks(rows: Array, step: int) -> Iterator[Array]:
    return (rows[first : first + step] for first in range(0, len(rows), step))


def _pixels(images: Any, references: Any) -> tuple[Array, Array]:
    found = np.asarray(images), np.asarray(references)
    for one in found:
        if one.ndim != 4 or 0 in one.shape or (one.dtype != np.uint8 and one.dtype.kind != "f"):
            raise ValueError(f"expected bytes [N, H, W, C], got {one.dtype} {list(one.shape)}")
    if found[0].shape != found[1].shape:
        raise ValueError(
            f"expected two sets of one shape [N, H, W, C], got {list(found[0].shape)} and {list(found[1].shape)}"
        )
    if any(one.dtype.kind == "f" and not np.isfinite(x).all() for one in found for x in one):
        raise ValueError("expected finite pixels, got NaN or inf; look at what made them")
    return found


def _floats(pixels: Array) -> Array:
    return pixels.astype(np.float64)  # of one image at a time: a whole set may not fit into memory
