"""Adversarial training of the tokenizer: the patch discriminator, losses, regularisers, augmentation, the weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Average = Callable[[Tensor], Tensor]


class SharedBatchNorm(nn.BatchNorm2d):
    """Batch norm over the images of several processes: `average` is a tensor's mean over them, with a gradient, and each has
    as many images. `nn.SyncBatchNorm` does so on GPUs alone."""

    def __init__(self, channels: int, average: Average) -> None:
        super().__init__(channels)
        self.average = average

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.running_mean is None or self.running_var is None:
            return super().forward(x)
        mean = self.average(x.mean(dim=(0, 2, 3)))
        centred = x - mean[:, None, None]
        variance = self.average(centred.square().mean(dim=(0, 2, 3)))
        with torch.no_grad():  # for evaluating, which no training does
            self.running_mean.lerp_(mean, 0.1)
            self.running_var.lerp_(variance, 0.1)
        scale = self.weight * (variance + self.eps).rsqrt()
        return centred * scale[:, None, None] + self.bias[:, None, None]


def _norm(kind: str, channels: int, average: Average | None) -> nn.Module:
    if kind == "group":
        return nn.GroupNorm(math.gcd(32, channels), channels)
    norm = nn.BatchNorm2d(channels) if average is None else SharedBatchNorm(channels, average)
    nn.init.normal_(norm.weight, 1.0, 0.02)
    return norm


class PatchDiscriminator(nn.Module):
    """PatchGAN: says real (high) or made (low) of each patch of an image, [B, C, H, W] -> [B, 1, h, w].

    4x4 convolutions: `layers` of stride 2, then two of stride 1; widths double from `width` up to 8 times. With the
    defaults a logit sees 70 pixels and 64 px give 6x6 logits. norm: "batch" is the published one, and its statistics
    are those of the batch in hand, so real and made images should go in together; "group" treats each image alone,
    for small batches. average: of a tensor over the processes that share a batch (`SharedBatchNorm`); None: there is one.
    """

    def __init__(
        self,
        in_channels: int = 3,
        width: int = 64,
        layers: int = 3,
        norm: Literal["batch", "group"] = "batch",
        average: Average | None = None,
    ) -> None:
        super().__init__()
        if norm not in ("batch", "group"):
            raise ValueError(f'norm: expected "batch" or "group", got {norm!r}')
        if layers < 1:
            raise ValueError(f"layers: expected at least 1, got {layers}")
        self.min_size = 3 * 2**layers  # the last two convolutions take one row and one column each
        widths = [width * min(2**i, 8) for i in range(layers + 1)]
        modules: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            stride = 2 if i < layers else 1
            conv = nn.Conv2d(widths[i - 1], widths[i], 4, stride, padding=1, bias=False)  # the norm has the bias
            modules += [conv, _norm(norm, widths[i], average), nn.LeakyReLU(0.2)]
        modules.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.net = nn.Sequential(*modules)
        for module in self.net:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        if min(images.shape[2:]) < self.min_size:
            raise ValueError(
                f"PatchDiscriminator: expected images of at least {self.min_size} px, got {tuple(images.shape)}; "
                "use fewer layers"
            )
        return self.net(images)


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor, summed: bool = False) -> Tensor:
    """Hinge loss of the discriminator: the mean of its real and its fake term, or with `summed` their sum.

    Published trainers differ here by this factor 2, which acts on the discriminator like a learning rate.
    """
    loss = F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()
    return loss if summed else 0.5 * loss


def generator_adversarial_loss(fake_logits: Tensor) -> Tensor:
    """What the decoder minimises: minus the mean logit of its images."""
    return -fake_logits.mean()


def adaptive_weight(
    reconstruction_loss: Tensor,
    adversarial_loss: Tensor,
    last_layer_weight: Tensor,
    low: float = 0.0,
    high: float = 1e4,
    eps: float = 1e-6,
    root: bool = False,
    average: Average | None = None,
) -> Tensor:
    """Weight that gives both losses equal gradients at the decoder's last convolution (VQGAN, Eq. 7), clamped; with `root`
    its square root.

    reconstruction_loss includes the perceptual term. No gradient flows through the result; the graphs of both losses
    are kept for the step's own backward pass. `average`: of a gradient over the processes that share a batch; None: there is
    one.
    """
    (wanted,) = torch.autograd.grad(reconstruction_loss, last_layer_weight, retain_graph=True)
    (given,) = torch.autograd.grad(adversarial_loss, last_layer_weight, retain_graph=True)
    if average is not None:
        wanted, given = average(wanted), average(given)
    ratio = wanted.norm() / (given.norm() + eps)
    return (ratio.sqrt() if root else ratio).clamp(low, high).detach()


def lecam(
    real_logits: Tensor, fake_logits: Tensor, averages: Tensor, decay: float = 0.999, average: Average | None = None
) -> Tensor:
    """LeCam regulariser (Tseng et al., CVPR 2021): real logits must not pass the running mean of made ones by much, nor the
    running mean of real ones the made. `averages` [2] (real, made) is updated in place, with the mean over processes
    (`average`) if several share a batch."""
    with torch.no_grad():
        means = torch.stack([real_logits.mean(), fake_logits.mean()]).to(averages)
        averages.lerp_(means if average is None else average(means), 1 - decay)
    real, fake = averages.clone()
    return F.relu(real_logits - fake).square().mean() + F.relu(real - fake_logits).square().mean()


def differentiable_augmentation(
    images: Tensor, numbers: Tensor, *, colour: bool = True, shift: float = 0.125, cutout: float = 0.2
) -> Tensor:
    """DiffAugment (Zhao et al., NeurIPS 2020) on images [B, C, H, W] in [-1, 1], each on its own, with gradients.

    Brightness +-0.5, saturation x0 to 2, contrast x0.5 to 1.5; a shift by up to `shift` of the sides, filled with zeros; a
    square of `cutout` of the sides set to zero. `numbers`: uniform in [0, 1), [B, 7].
    """
    brightness, saturation, contrast, *places = numbers.to(images).view(len(images), 7, 1, 1, 1).unbind(1)
    if colour:
        images = images + (brightness - 0.5)
        grey = images.mean(dim=1, keepdim=True)
        images = (images - grey) * (saturation * 2) + grey
        mean = images.mean(dim=(1, 2, 3), keepdim=True)
        images = (images - mean) * (contrast + 0.5) + mean
    height, width = images.shape[2:]
    y, x = (torch.arange(side, device=images.device) for side in (height, width))
    down, right, top, left = (place.view(-1, 1) for place in places)
    if shift:
        moved_y = y - _whole((2 * down - 1) * shift * height)  # [B, H]: where each row comes from
        moved_x = x - _whole((2 * right - 1) * shift * width)
        images = images.gather(2, moved_y.clamp(0, height - 1)[:, None, :, None].expand_as(images))
        images = images.gather(3, moved_x.clamp(0, width - 1)[:, None, None, :].expand_as(images))
        inside_y, inside_x = (moved_y >= 0) & (moved_y < height), (moved_x >= 0) & (moved_x < width)
        images = images * (inside_y[:, None, :, None] & inside_x[:, None, None, :])
    if cutout:
        hole_y = (y - _whole(top * height)).abs() < cutout * height / 2
        hole_x = (x - _whole(left * width)).abs() < cutout * width / 2
        images = images * ~(hole_y[:, None, :, None] & hole_x[:, None, None, :])
    return images


def _whole(x: Tensor) -> Tensor:
    return x.round().long()
