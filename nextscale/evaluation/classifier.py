"""Classifiers on features of EfficientNet-lite0, which judge what an image shows: its own of ImageNet, or one fitted to a
data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.data.dataset import pictures
from nextscale.evaluation.networks import lite0_features
from nextscale.features import Lite0, load_lite0
from nextscale.pixels import on_white, to_float
from nextscale.settings import brief

STEPS, DECAY = 40, 1e-3


class Probe:
    """Linear classifiers, one for each class, on pooled features: an image may be of several classes, as a drawing is of
    its group and of its subgroup.

    weight [1280, C], bias [C]; mean and deviation [1280] of the features that it was fitted to. classes: names.
    """

    name = "linear probe on efficientnet-lite0"

    def __init__(self, weight: Tensor, bias: Tensor, mean: Tensor, deviation: Tensor, classes: Sequence[str]) -> None:
        self.weight, self.bias, self.mean, self.deviation = weight, bias, mean, deviation
        self.classes = tuple(classes)
        self.network = Lite0()

    def probabilities(self, images: Tensor) -> Tensor:
        """Of bytes or floats [b, C, H, W]: [b, classes], each on its own."""
        return self.of_features(lite0_features(images, self.network))

    def of_features(self, features: Tensor) -> Tensor:
        """The same of pooled features [b, 1280]."""
        return torch.sigmoid((features - self.mean) / self.deviation @ self.weight + self.bias)

    def __call__(self, images: Tensor, told: Sequence[Any]) -> Tensor:
        """The probability [b] that each image shows what it was told (`sample_set.Judge`)."""
        return self.probabilities(images).gather(1, class_numbers(told, self.classes)[:, None]).squeeze(1)


@torch.enable_grad()
def fit_probe(data: Any, classes: Sequence[str]) -> Probe:
    """A probe for the classes of a data set, whose items say `labels`; logistic regression with weight decay, on one
    thread, so that the same data give the same weights."""
    said = getattr(data, "said", data.__getitem__)
    targets = torch.zeros(len(data), len(classes))
    for i in range(len(data)):
        item = said(i)
        targets[i, list(item.get("labels") or (item["label"],))] = 1
    features = lite0_features(pictures(data)).detach()
    mean, deviation = features.mean(dim=0), features.std(dim=0) + 1e-3
    inputs = (features - mean) / deviation
    weight = torch.zeros(inputs.shape[1], len(classes), requires_grad=True)
    bias = torch.logit(targets.mean(dim=0).clamp(1e-4, 1 - 1e-4)).requires_grad_()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.binary_cross_entropy_with_logits(inputs @ weight + bias, targets, reduction="sum") / len(inputs)
            value = value + DECAY * weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
    finally:
        torch.set_num_threads(threads)
    return Probe(weight.detach(), bias.detach(), mean, deviation, classes)


class ImageNetClassifier:
    """EfficientNet-lite0's own 1,000 classes of ImageNet, in the usual order: for systems whose class numbers are these."""

    name = "efficientnet-lite0, ImageNet"

    def __init__(self) -> None:
        whole: Any = load_lite0()
        self.head: nn.Linear = whole._fc
        self.network = Lite0()

    @torch.no_grad()
    def __call__(self, images: Tensor, told: Sequence[Any]) -> Tensor:
        """The probability [b] of each image's class (`sample_set.Judge`). Small images are enlarged to 224 pixels."""
        x = F.interpolate(on_white(to_float(images)), size=(224, 224), mode="bicubic", antialias=True).clamp(-1, 1)
        shares = self.head(self.network.pooled(x)).softmax(dim=-1)
        return shares.gather(1, class_numbers(told, tuple(map(str, range(1000))))[:, None]).squeeze(1)


def class_numbers(told: Sequence[Any], classes: Sequence[str]) -> Tensor:
    """int64 [b] of names or numbers."""
    numbers = [one if isinstance(one, int) else classes.index(one) if one in classes else -1 for one in told]
    if wrong := [one for one, number in zip(told, numbers, strict=True) if not 0 <= number < len(classes)]:
        raise ValueError(
            f"the classifier does not know {brief(wrong[0])}; it judges class names or numbers below {len(classes)}"
        )
    return torch.tensor(numbers)
