"""LPIPS (Zhang et al., CVPR 2018) on VGG16, with weights that the user supplies: nothing is downloaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.tokenizer.frozen import Frozen

# Output channels of VGG16's convolutions; 0 is a 2x2 maximum. A map is read before each 0 and at the end.
LAYERS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)
READ = (64, 128, 256, 512, 512)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Vgg16(nn.Module):
    """The convolutions of VGG16 up to relu5_3, under torchvision's names (`features.0.weight`, ...)."""

    def __init__(self) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        channels = 3
        for out in LAYERS:
            modules += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU()] if out else [nn.MaxPool2d(2)]
            channels = out or channels
        self.features = nn.Sequential(*modules)

    def forward(self, images: Tensor) -> list[Tensor]:
        """relu1_2, relu2_2, relu3_3, relu4_3, relu5_3."""
        maps, h = [], images
        for module in self.features:
            if isinstance(module, nn.MaxPool2d):
                maps.append(h)
            h = module(h)
        return [*maps, h]


class Lpips(nn.Module):
    """Distance of two images in VGG16's features, with learned weights for the channels: two [B, 3, H, W] in [-1, 1] to
    float32 [B].

    Maps are scaled to unit length over the channels; squared differences are weighted, averaged over positions and added
    up over the five maps. The weights are no parameters of this module and no part of its state (`Frozen`).

    Args:
        vgg: torchvision's `vgg16-397923af.pth`, or any file with its `features.*` entries.
        linear: `vgg.pth` of the package lpips, version 0.1 (`lin0.model.1.weight` [1, 64, 1, 1], ...).

    Raises FileNotFoundError or ValueError for files that are missing or do not fit. Pickles are read with
    `weights_only=True`: nothing in them is executed.
    """

    name = "lpips"

    def __init__(self, vgg: str | os.PathLike[str], linear: str | os.PathLike[str]) -> None:
        super().__init__()
        network = Vgg16()
        state = {name: tensor for name, tensor in read_weights(vgg).items() if name.startswith("features.")}
        load_exactly(network, state, vgg)
        weights = read_weights(linear)
        expected = {f"lin{i}.model.1.weight": (1, channels, 1, 1) for i, channels in enumerate(READ)}
        for name, shape in expected.items():
            if name not in weights or tuple(weights[name].shape) != shape:
                got = tuple(weights[name].shape) if name in weights else "nothing"
                raise ValueError(f"{linear}: expected {name} of shape {shape}, got {got}; use vgg.pth of lpips 0.1")
        self.network = Frozen(network)
        self.linear = nn.Module()
        for i, name in enumerate(expected):
            self.linear.register_buffer(str(i), weights[name].float(), persistent=False)
        self.shift: Tensor
        self.scale: Tensor
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        if images.shape != targets.shape or images.shape[1] != 3:
            raise ValueError(
                f"LPIPS: expected two equal shapes [B, 3, H, W], got {tuple(images.shape)}, {tuple(targets.shape)}"
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
