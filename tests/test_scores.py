"""Scores against definitions written out: loops, brute force, closed forms (the checks of the evaluation's specification)."""

import math
import time

import numpy as np
import pytest
from scipy import linalg

from nextscale.evaluation import scores
from nextscale.evaluation.scores import (
    FeatureMoments,
    RunningMoments,
    frechet_distance,
    inception_score,
    kernel_distance,
    kernel_distance_of_subsets,
    precision_recall,
    psnr_bytes,
    score_of_probabilities,
    ssim,
)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def correlated(seed: int, n: int, d: int) -> np.ndarray:
    """Features with a covariance that is no multiple of the identity, and a mean."""
    return normal(seed, n, d) @ (normal(seed + 100, d, d) / d**0.5) + normal(seed + 200, d)


def reference_fid(a: np.ndarray, b: np.ndarray) -> float:
    """The formula written down with scipy, in float64."""
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(first @ second).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root))


# ---- the Frechet distance ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["eigh", "sqrtm"])
def test_fid_is_the_formula_and_0_of_a_set_with_itself(method):
    a, b = correlated(1, 500, 64), correlated(2, 700, 64)
    found = frechet_distance(FeatureMoments.of(a), FeatureMoments.of(b), method)
    assert abs(found - reference_fid(a, b)) < 1e-4
    assert abs(frechet_distance(FeatureMoments.of(a), FeatureMoments.of(a), method)) < 1e-6
    order = np.random.default_rng(0).permutation(len(a))
    assert frechet_distance(FeatureMoments.of(a[order]), FeatureMoments.of(b), method) == pytest.approx(found, rel=1e-9)


@pytest.mark.parametrize("n", [40, 500, 2000])  # fewer than dimensions: the covariance has no full rank
def test_both_roots_agree(n):
    a, b = FeatureMoments.of(correlated(3, n, 64)), FeatureMoments.of(correlated(4, n, 64))
    eigh, sqrtm = (frechet_distance(a, b, method) for method in ("eigh", "sqrtm"))
    assert eigh == pytest.approx(sqrtm, rel=1e-6)


def test_fid_of_two_clouds_is_the_closed_form():
    rng = np.random.default_rng(5)
    means, deviations = rng.normal(0, 2, (2, 16)), rng.uniform(0.5, 2, (2, 16))
    a, b = (means[i] + deviations[i] * normal(6 + i, 20_000, 16) for i in range(2))
    exact = ((means[0] - means[1]) ** 2).sum() + ((deviations[0] - deviations[1]) ** 2).sum()
    assert frechet_distance(FeatureMoments.of(a), FeatureMoments.of(b)) == pytest.approx(exact, rel=0.02)


def test_a_root_that_is_not_finite_is_tried_with_an_offset(monkeypatch):
    calls = []
    original = linalg.sqrtm

    def once_broken(matrix):
        calls.append(matrix)
        return np.full_like(matrix, np.nan) if len(calls) == 1 else original(matrix)

    monkeypatch.setattr(linalg, "sqrtm", once_broken)
    a, b = FeatureMoments.of(correlated(1, 100, 8)), FeatureMoments.of(correlated(2, 100, 8))
    assert frechet_distance(a, b, "sqrtm") == pytest.approx(frechet_distance(a, b), abs=1e-3)
    offset = np.eye(8) * 1e-6
    assert np.allclose(calls[1], (a.covariance + offset) @ (b.covariance + offset))
    monkeypatch.setattr(linalg, "sqrtm", lambda matrix: matrix.astype(complex) + 0.1j * np.eye(8))
    with pytest.raises(ValueError, match="expected a real root"):
        frechet_distance(a, b, "sqrtm")


@pytest.mark.parametrize("batch", [1, 7, 100, 1000])
def test_moments_do_not_depend_on_the_batches(batch):
    rows = correlated(7, 1000, 12) + 1000.0  # a large common value
    running = RunningMoments()
    for first in range(0, len(rows), batch):
        running.add(rows[first : first + batch])
    found = running.moments()
    np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(rows, rowvar=False), rtol=1e-10, atol=1e-10)
    assert found.count == 1000


@pytest.mark.slow
def test_fid_of_50_000_features_takes_less_than_a_minute():
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((n, 2048), dtype=np.float32) for n in (50_000, 10_000))
    known = FeatureMoments.of(b)
    start = time.perf_counter()
    frechet_distance(FeatureMoments.of(a), known)
    assert time.perf_counter() - start < 60


# ---- the Inception Score -------------------------------------------------------------------------------------------------


def loop_score(rows: np.ndarray, split: int) -> float:
    """The definition, a number at a time."""
    found = []
    for first in range(0, len(rows), split):
        part = rows[first : first + split]
        mean = [sum(row[c] for row in part) / len(part) for c in range(rows.shape[1])]
        total = 0.0
        for row in part:
            total += sum(p * (math.log(p) - math.log(m)) for p, m in zip(row, mean, strict=True) if p > 0)
        found.append(math.exp(total / len(part)))
    return sum(found) / len(found)


def test_the_score_equals_a_loop_with_a_short_last_chunk():
    logits = normal(1, 130, 7) * 2
    rows = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for split in (50, 64, 1000):
        assert score_of_probabilities(rows, split) == pytest.approx(loop_score(rows, split), rel=1e-12)
    pooled, weight = normal(2, 130, 5), normal(3, 5, 7)
    exp = np.exp(pooled @ weight)
    expected = loop_score(exp / exp.sum(1, keepdims=True), 50)
    assert inception_score(pooled, weight, 50) == pytest.approx(expected, rel=1e-12)


def test_the_score_of_sure_and_of_constant_predictions():
    classes = 10
    interleaved = np.eye(classes)[np.arange(1000) % classes]
    assert score_of_probabilities(interleaved, 500) == pytest.approx(classes)
    assert score_of_probabilities(np.full((1000, classes), 0.1)) == pytest.approx(1)
    ordered = np.eye(classes)[np.arange(1000) * classes // 1000]
    assert score_of_probabilities(ordered, 500) == pytest.approx(classes / 2)


# ---- precision and recall ------------------------------------------------------------------------------------------------


def brute_force(samples: np.ndarray, reference: np.ndarray, k: int) -> tuple[float, float]:
    """From differences, without the product formula."""

    def squares(a, b):
        return ((a[:, None] - b[None]) ** 2).sum(-1)

    def radii(x):
        return np.sort(squares(x, x), axis=1)[:, k]

    across = squares(samples, reference)
    precision = (across <= radii(reference)[None]).any(1).mean()
    return precision, (across <= radii(samples)[:, None]).any(0).mean()


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("block", [1024, 64, 50, 3])  # with and without a short last one; as few rows as k
def test_precision_and_recall_equal_brute_force(k, block):
    for seed in range(2 if block > 3 else 1):
        samples, reference = normal(seed, 150, 6) * 0.9 + 0.2, normal(seed + 10, 210, 6)
        assert precision_recall(samples, reference, k, block) == brute_force(samples, reference, k)


@pytest.mark.parametrize("far", [0, 50, 1e6])  # from the origin, where the product formula has few digits
def test_duplicates_and_edges_count_exactly(far):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        drawings = rng.normal(0, 3, (30, 5)) + far
        reference = drawings[rng.integers(0, 30, 80)]  # many have a radius of 0
        samples = np.concatenate([drawings[rng.integers(0, 30, 60)], drawings[:10] + rng.normal(0, 1e-9, (10, 5))])
        for k in (1, 3):
            assert precision_recall(samples, reference, k, 32) == brute_force(samples, reference, k)
    grid = np.random.default_rng(0).integers(0, 3, (90, 3))  # distances that are equal: `<=`
    for k in (1, 2, 3):
        assert precision_recall(grid[:40], grid[40:] + 1, k, 16) == brute_force(grid[:40], grid[40:] + 1, k)
    same = np.full((1100, 8), far + 0.1)
    assert precision_recall(same, same) == (1, 1) and precision_recall(same + 1, same) == (0, 0)


def test_precision_and_recall_at_their_ends():
    a = normal(1, 300, 8)
    assert precision_recall(a, a) == (1, 1)
    assert precision_recall(a.astype(np.float32), a.astype(np.float32)) == (1, 1)
    assert precision_recall(a + 100, a) == (0, 0)
    modes = np.random.default_rng(2).normal(0, 200, (10, 2))
    reference = modes[np.arange(4000) % 10] + normal(3, 4000, 2)
    samples = modes[np.arange(4000) % 5] + normal(4, 4000, 2)
    precision, recall = precision_recall(samples, reference)
    assert precision > 0.95 and abs(recall - 0.5) < 0.05


# ---- kernel distance -----------------------------------------------------------------------------------------------------


def test_the_kernel_distance_equals_brute_force_and_is_unbiased(monkeypatch):
    a, b = normal(1, 40, 6), normal(2, 30, 6) + 0.3

    def kernel(x, y):
        return (x @ y / 6 + 1) ** 3

    within = [
        sum(kernel(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j) / (len(s) * (len(s) - 1))
        for s in (a, b)
    ]
    expected = sum(within) - 2 * np.mean([kernel(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-10)
    monkeypatch.setattr(scores, "BLOCK", 7)
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-10)
    found = [kernel_distance(normal(i, 50, 6), normal(i + 1000, 50, 6)) for i in range(200)]
    assert abs(np.mean(found)) < 3 * np.std(found) / 200**0.5 and min(found) < 0
    spread = kernel_distance_of_subsets(normal(5, 500, 6), normal(6, 500, 6) + 1, subsets=10, size=100)
    assert spread == kernel_distance_of_subsets(normal(5, 500, 6), normal(6, 500, 6) + 1, subsets=10, size=100)
    assert spread.mean == pytest.approx(kernel_distance(normal(5, 500, 6), normal(6, 500, 6) + 1), rel=0.3)


# ---- pixels --------------------------------------------------------------------------------------------------------------


def test_ssim_equals_a_loop():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (1, 13, 14, 2), dtype=np.uint8)
    y = (x + rng.integers(-20, 20, x.shape)).clip(0, 255).astype(np.uint8)
    weights = np.array([[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / 4.5) for j in range(11)] for i in range(11)])
    weights /= weights.sum()
    values = []
    for c in range(2):
        for top in range(3):
            for left in range(4):
                p, q = (image[0, top : top + 11, left : left + 11, c].astype(float) for image in (x, y))
                mp, mq = (weights * p).sum(), (weights * q).sum()
                vp, vq = (weights * (p - mp) ** 2).sum(), (weights * (q - mq) ** 2).sum()
                shared = (weights * (p - mp) * (q - mq)).sum()
                a, b = (0.01 * 255) ** 2, (0.03 * 255) ** 2
                values.append((2 * mp * mq + a) * (2 * shared + b) / ((mp**2 + mq**2 + a) * (vp + vq + b)))
    assert ssim(x, y)[0] == pytest.approx(np.mean(values), rel=1e-9)
    assert ssim(x, x)[0] == pytest.approx(1) and ssim(x, 255 - x)[0] < 0


def test_psnr_of_bytes_and_of_luma():
    x = np.full((2, 4, 4, 3), 100, np.uint8)
    y = x.copy()
    y[0] += 5
    assert psnr_bytes(x, y) == pytest.approx([20 * math.log10(255 / 5), 100])
    assert scores.luma(np.full((1, 1, 1, 3), 255, np.uint8))[0, 0, 0, 0] == pytest.approx(235)
    assert psnr_bytes(scores.luma(x), scores.luma(y))[0] > psnr_bytes(x, y)[0]  # the range of Y is smaller


def test_code_usage():
    found = scores.code_usage([[4, 0, 0, 0], [1, 1, 1, 1]])
    assert found.used == [0.25, 1] and found.used_overall == 1
    assert found.perplexity == pytest.approx([1, 4])
    shares = np.array([5, 1, 1, 1]) / 8
    assert found.perplexity_overall == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


# ---- what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FeatureMoments.of(np.zeros((1, 4))), "at least 2 images"),
        (lambda: FeatureMoments.of(np.array([[1.0, np.nan], [0, 1]])), "finite"),
        (lambda: FeatureMoments.of("features"), "expected numbers"),
        (lambda: FeatureMoments(np.zeros(3), np.zeros((2, 2))), r"\[D, D\]"),
        (
            lambda: frechet_distance(FeatureMoments.of(normal(1, 9, 3)), FeatureMoments.of(normal(1, 9, 4))),
            "same features",
        ),
        (
            lambda: frechet_distance(FeatureMoments.of(normal(1, 9, 3)), FeatureMoments.of(normal(1, 9, 3)), "svd"),
            "eigh or sqrtm",
        ),
        (lambda: score_of_probabilities(np.ones((4, 4))), "sum to 1"),
        (lambda: inception_score(normal(1, 9, 4), normal(1, 5, 3)), r"weight: expected \[4, C\]"),
        (lambda: inception_score(normal(1, 9, 4), np.full((4, 3), np.inf)), "weight: expected finite"),
        (lambda: inception_score(normal(1, 9, 4), normal(1, 4, 3), 0), "split"),
        (lambda: precision_recall(normal(1, 3, 2), normal(1, 3, 2)), "k"),
        (lambda: precision_recall(normal(1, 9, 2), normal(1, 9, 2), 3, 0), "block"),
        (lambda: precision_recall(normal(1, 9, 2), normal(1, 9, 3)), "one network"),
        (lambda: kernel_distance(normal(1, 9, 2), normal(1, 9, 3)), "one network"),
        (lambda: ssim(np.zeros((1, 8, 8, 3), np.uint8), np.zeros((1, 8, 8, 3), np.uint8)), "11x11"),
        (lambda: psnr_bytes(np.zeros((1, 8, 8, 3), np.uint8), np.zeros((2, 8, 8, 3), np.uint8)), "one shape"),
        (lambda: psnr_bytes(np.full((1, 8, 8, 1), np.nan), np.zeros((1, 8, 8, 1))), "finite pixels"),
        (lambda: ssim(np.zeros((1, 12, 12, 1)), np.full((1, 12, 12, 1), np.inf)), "finite pixels"),
        (lambda: kernel_distance_of_subsets(normal(1, 9, 2), normal(1, 9, 3)), "one network"),
        (lambda: scores.luma(np.zeros((1, 8, 8))), "bytes"),
        (lambda: scores.code_usage([[0, 0]]), "no tokens"),
    ],
)
def test_what_cannot_be_scored_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
