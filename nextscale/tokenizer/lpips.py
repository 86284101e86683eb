"""LPIPS (Zhang et al., CVPR 2018) on VGG16 or AlexNet, with weights that the user supplies: nothing is downloaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.settings import brief
from nextscale.tokenizer.frozen import Frozen

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Backbone(nn.Module):
    """The convolutions of an ImageNet network, each with a ReLU, under torchvision's names (`features.0.weight`, ...)."""

    layers: ClassVar[
        tuple[tuple[int, ...], ...]
    ]  # (channels, kernel, stride, padding), or of a maximum (kernel, stride)
    read: ClassVar[dict[int, int]]  # the places in `features` whose outputs are read, and their channels
    smallest: ClassVar[int]  # side of an image that leaves a pixel in the last map
    weights: ClassVar[str]  # torchvision's file
    linear: ClassVar[str]  # the file of lpips 0.1

    def __init__(self) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        channels = 3
        for first, *others in self.layers:
            if len(others) == 1:
                modules.append(nn.MaxPool2d(first, others[0]))
            else:
                kernel, stride, padding = others
                modules += [nn.Conv2d(channels, first, kernel, stride, padding), nn.ReLU()]
                channels = first
        self.features = nn.Sequential(*modules)

    def forward(self, images: Tensor) -> list[Tensor]:
        """The five maps of `read`."""
        maps, h = [], images
        for place, module in enumerate(self.features):
            h = module(h)
            if place in self.read:
                maps.append(h)
        return maps


class Vgg16(Backbone):
    """VGG16 up to relu5_3; read are relu1_2, relu2_2, relu3_3, relu4_3, relu5_3."""

    layers = tuple(
        (channels, 3, 1, 1) if channels else (2, 2)
        for channels in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)
    )
    read: ClassVar = {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}
    smallest = 16
    weights, linear = "vgg16-397923af.pth", "vgg.pth"


class AlexNet(Backbone):
    """AlexNet (the one-tower form of torchvision) up to its fifth convolution; read is every ReLU."""

    layers = ((64, 11, 4, 2), (3, 2), (192, 5, 1, 2), (3, 2), (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1))
    read: ClassVar = {1: 64, 4: 192, 7: 384, 9: 256, 11: 256}
    smallest = 31
    weights, linear = "alexnet-owt-7be5be79.pth", "alex.pth"


BACKBONES: dict[str, type[Backbone]] = {"vgg": Vgg16, "alex": AlexNet}


class Lpips(nn.Module):
    """Distance of two images in a network's features, with learned weights for the channels: two [B, 3, H, W] in [-1, 1] to
    float32 [B].

    Maps are scaled to unit length over the channels; squared differences are weighted, averaged over positions and added
    up over the five maps. The weights are no parameters of this module and no part of its state (`Frozen`).

    Args:
        weights: torchvision's `vgg16-397923af.pth` or `alexnet-owt-7be5be79.pth`, or any file with its `features.*` entries.
        linear: `vgg.pth` or `alex.pth` of the package lpips, version 0.1 (`lin0.model.1.weight` [1, 64, 1, 1], ...).
        backbone: "vgg", as losses use, or "alex", as published distances do; the numbers of the two do not compare.

    Raises FileNotFoundError or ValueError for files that are missing or do not fit. Pickles are read with
    `weights_only=True`: nothing in them is executed.
    """

    name = "lpips"

    def __init__(self, weights: str | os.PathLike[str], linear: str | os.PathLike[str], backbone: str = "vgg") -> None:
        super().__init__()
        if backbone not in BACKBONES:
            raise ValueError(f"backbone: expected one of {', '.join(BACKBONES)}, got {brief(backbone)}")
        self.backbone = backbone
        network = BACKBONES[backbone]()
        state = {name: tensor for name, tensor in read_weights(weights).items() if name.startswith("features.")}
        load_exactly(network, state, weights)
        learned = read_weights(linear)
        expected = {f"lin{i}.model.1.weight": (1, channels, 1, 1) for i, channels in enumerate(network.read.values())}
        for name, shape in expected.items():
            if name not in learned or tuple(learned[name].shape) != shape:
                got = tuple(learned[name].shape) if name in learned else "nothing"
                raise ValueError(
                    f"{linear}: expected {name} of shape {shape}, got {got}; use {network.linear} of lpips 0.1"
                )
        self.network = Frozen(network)
        self.linear = nn.Module()
        for i, name in enumerate(expected):
            self.linear.register_buffer(str(i), learned[name].float(), persistent=False)
        self.shift: Tensor
        self.scale: Tensor
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        if images.shape != targets.shape or images.shape[1] != 3:
            raise ValueError(
                f"LPIPS: expected two equal shapes [B, 3, H, W], got {tuple(images.shape)}, {tuple(targets.shape)}"
            )
        smallest = BACKBONES[self.backbone].smallest
        if min(images.shape[2:]) < smallest:
            raise ValueError(
                f"LPIPS on {self.backbone}: expected sides of at least {smallest} px, got {tuple(images.shape[2:])}; "
                "enlarge the images"
            )
        with torch.autocast(images.device.type, enabled=False):
            with torch.no_grad():
                wanted = self.network((targets.float() - self.shift) / self.scale)
            found = self.network((images.float() - self.shift) / self.scale)
            parts = [
                (F.normalize(a, eps=1e-10) - F.normalize(b, eps=1e-10)).square().mul(weight).sum(dim=1).mean(dim=(1, 2))
                for a, b, weight in zip(found, wanted, self.linear.buffers(), strict=True)
            ]
            return torch.stack(parts).sum(dim=0)


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a .pth or .safetensors file, on the CPU; nothing in it is executed."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; give the file of weights, which nextscale does not download")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickles fail in many ways, all of which mean the same
        raise ValueError(f"{path} is no file of weights that can be read safely: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: expected a state dict of tensors, got {type(state).__name__} of other things")
    return state


def load_exactly(module: nn.Module, state: dict[str, Tensor], source: Any) -> None:
    """Fill a module; every key and shape must fit, else ValueError lists what does not."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"the weights in {source} do not fit: {error}") from error
