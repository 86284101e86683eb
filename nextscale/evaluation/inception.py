"""The network that published FID, sFID and Inception Scores are of: Inception as Google exported it on 2015-12-05.

It is not torchvision's Inception v3, whose numbers do not compare. The user gives the file of its weights (`load_inception`);
nothing is downloaded.

Sources of the facts, none of the code: mseitzer/pytorch-fid, `inception.py` (how the 2015 graph differs), pytorch/vision,
`models/inception.py` (names and shapes), tensorflow, `kernels/resize_bilinear_op.cc` and `image_resizer_state.h` (the resize),
openai/guided-diffusion, `evaluations` (which outputs are used).
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.files import as_path, brief_path, cache_dir, check_readable
from nextscale.settings import brief
from nextscale.tokenizer.lpips import read_weights

FILE = "pt_inception-2015-12-05-6726825d.pth"  # ends with the first digits of its sha256
FILE_HASH = "6726825d"
EXPECTED = f"{FILE}, which the project pytorch-fid publishes (its sha256 starts with 6726825d)"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
MAX_BYTES = 250_000_000  # the published file has 96 MB; twice that in float64
SIDE = 299
CLASSES = 1008
SPATIAL_CHANNELS = 7
IGNORED = re.compile(r"(^AuxLogits\.|\.num_batches_tracked$)")  # no part of what is computed

# ---- the resize ----------------------------------------------------------------------------------------------------------


def tf1_resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize as TensorFlow 1 did it by default: neither half-pixel centres nor antialiasing.

    Output pixel i is read at `i * in / out`, in float32 throughout, first along x, then along y; past the last pixel that
    pixel is repeated. Floats [B, C, H, W] to float32 [B, C, h, w]. Raises ValueError for other inputs.
    """
    if images.ndim != 4 or not images.is_floating_point() or 0 in images.shape[2:]:
        raise ValueError(
            f"tf1_resize: expected floats [B, C, H, W] with pixels, got {images.dtype} of shape {tuple(images.shape)}"
        )
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"tf1_resize: expected a size (h, w) of at least (1, 1), got {size}")
    images = images.float()
    # Three steps each, as TensorFlow's kernel does: torch.lerp rounds in another way.
    left, right, weight = _places(images.shape[3], size[1], images.device)
    first, second = images[..., left], images[..., right]
    rows = first + (second - first) * weight  # [B, C, H, w]
    upper, lower, weight = _places(images.shape[2], size[0], images.device)
    first, second = rows[:, :, upper], rows[:, :, lower]
    return first + (second - first) * weight[:, None]


def _places(before: int, after: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of each output pixel: the two input pixels it lies between, and how far it is from the first, [after] each."""
    scale = torch.tensor(before, dtype=torch.float32) / torch.tensor(after, dtype=torch.float32)
    source = (torch.arange(after, dtype=torch.float32) * scale).to(device)
    floor = source.floor()
    return floor.long().clamp(max=before - 1), source.ceil().long().clamp(max=before - 1), source - floor


# ---- the network ---------------------------------------------------------------------------------------------------------

# A chain: kernels, and channels of each; of two kernels both read the same map, and their outputs are joined.
Chain = Sequence[tuple[str, int]]
Pool = Literal["average", "maximum", "halve"]


class ConvNormRelu(nn.Module):
    """Convolution without bias, BatchNorm, ReLU; `same`: zeros around the map, so that it keeps its size."""

    def __init__(self, channels: int, out: int, kernel: str = "1x1", stride: int = 1, same: bool = True) -> None:
        super().__init__()
        height, width = (int(side) for side in kernel.split("x"))
        padding = (height // 2, width // 2) if same else 0
        self.conv = nn.Conv2d(channels, out, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Chains of convolutions side by side and a pooled map, joined over the channels.

    Args:
        channels: of the input.
        chains: by name; the modules are `name`, or `name_1`, `name_2`, ..., of two kernels `name_2a` and `name_2b`.
        pool: 3x3: "average" leaves what lies outside of the map uncounted; "halve" is a maximum of stride 2, without a
            convolution, and then the last convolution of every chain has stride 2 too.
        pooled: channels of the convolution after the pool.
    """

    def __init__(self, channels: int, chains: Mapping[str, Chain], pool: Pool, pooled: int = 0) -> None:
        super().__init__()
        self.pool = pool
        self.chains: list[list[list[str]]] = []  # the names of the modules
        self.channels = 0  # of the output
        for name, chain in chains.items():
            self.chains.append([])
            width = channels
            for i, (kernels, out) in enumerate(chain, start=1):
                place = f"{name}_{i}" if len(chain) > 1 else name
                halve = pool == "halve" and i == len(chain)
                several = kernels.split()
                names = [place + letter for letter in "ab"] if len(several) > 1 else [place]
                for own, kernel in zip(names, several, strict=True):
                    self.add_module(own, ConvNormRelu(width, out, kernel, stride=2 if halve else 1, same=not halve))
                self.chains[-1].append(names)
                width = out * len(several)
            self.channels += width
        if pool != "halve":
            self.branch_pool = ConvNormRelu(channels, pooled)
        self.channels += channels if pool == "halve" else pooled

    def forward(self, x: Tensor) -> Tensor:
        maps = []
        for chain in self.chains:
            h = x
            for names in chain:
                h = torch.cat([self.get_submodule(name)(h) for name in names], dim=1)
            maps.append(h)
        if self.pool == "halve":
            maps.append(F.max_pool2d(x, 3, stride=2))
        else:
            maps.append(self.branch_pool(self.pooled(x)))
        return torch.cat(maps, dim=1)

    def pooled(self, x: Tensor) -> Tensor:
        """The pooled map that `branch_pool` sees: of the size of the input."""
        if self.pool == "maximum":
            return F.max_pool2d(x, 3, stride=1, padding=1)
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _mixed_35(channels: int, pooled: int) -> Mixed:
    chains = {
        "branch1x1": [("1x1", 64)],
        "branch5x5": [("1x1", 48), ("5x5", 64)],
        "branch3x3dbl": [("1x1", 64), ("3x3", 96), ("3x3", 96)],
    }
    return Mixed(channels, chains, "average", pooled)


def _mixed_17(channels: int, inner: int) -> Mixed:
    chains = {
        "branch1x1": [("1x1", 192)],
        "branch7x7": [("1x1", inner), ("1x7", inner), ("7x1", 192)],
        "branch7x7dbl": [("1x1", inner), ("7x1", inner), ("1x7", inner), ("7x1", inner), ("1x7", 192)],
    }
    return Mixed(channels, chains, "average", 192)


def _mixed_8(channels: int, pool: Pool) -> Mixed:
    chains = {
        "branch1x1": [("1x1", 320)],
        "branch3x3": [("1x1", 384), ("1x3 3x1", 384)],
        "branch3x3dbl": [("1x1", 448), ("3x3", 384), ("1x3 3x1", 384)],
    }
    return Mixed(channels, chains, pool, 192)


class InceptionFeatures(NamedTuple):
    """What scores are computed from, float32."""

    pooled: Tensor  # [B, 2048]: `pool_3` of the graph; FID, Inception Score, precision and recall
    spatial: Tensor  # [B, 2023]: seven channels of `mixed_6/conv`, flattened from [17, 17, 7]; sFID


class Inception2015(nn.Module):
    """The 2015-12-05 graph, under the names of the community port's file: uint8 [B, 3, H, W] to `InceptionFeatures`.

    It is frozen and always in eval mode. It differs from torchvision's in its 1008 classes, in average pools that leave out
    what lies outside of the map, and in the pool of its last block, a maximum. New ones have random weights: use
    `load_inception`.
    """

    name = "inception-2015-12-05"

    def __init__(self) -> None:
        super().__init__()
        self.digest = ""  # sha256 of the file of weights, in hex
        self.Conv2d_1a_3x3 = ConvNormRelu(3, 32, "3x3", stride=2, same=False)
        self.Conv2d_2a_3x3 = ConvNormRelu(32, 32, "3x3", same=False)
        self.Conv2d_2b_3x3 = ConvNormRelu(32, 64, "3x3")
        self.Conv2d_3b_1x1 = ConvNormRelu(64, 80)
        self.Conv2d_4a_3x3 = ConvNormRelu(80, 192, "3x3", same=False)
        self.Mixed_5b = _mixed_35(192, 32)
        self.Mixed_5c = _mixed_35(256, 64)
        self.Mixed_5d = _mixed_35(288, 64)
        halving = {"branch3x3": [("3x3", 384)], "branch3x3dbl": [("1x1", 64), ("3x3", 96), ("3x3", 96)]}
        self.Mixed_6a = Mixed(288, halving, "halve")
        self.Mixed_6b = _mixed_17(768, 128)
        self.Mixed_6c = _mixed_17(768, 160)
        self.Mixed_6d = _mixed_17(768, 160)
        self.Mixed_6e = _mixed_17(768, 192)
        halving = {
            "branch3x3": [("1x1", 192), ("3x3", 320)],
            "branch7x7x3": [("1x1", 192), ("1x7", 192), ("7x1", 192), ("3x3", 192)],
        }
        self.Mixed_7a = Mixed(768, halving, "halve")
        self.Mixed_7b = _mixed_8(1280, "average")
        self.Mixed_7c = _mixed_8(2048, "maximum")
        self.fc = nn.Linear(2048, CLASSES)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Inception2015:
        """Stays in eval mode whatever the owner's mode is."""
        return super().train(False)

    @property
    def softmax_weight(self) -> Tensor:
        """[2048, 1008]: the Inception Score takes `softmax(pooled @ softmax_weight)`, without the bias."""
        return self.fc.weight.T

    def features(self, images: Tensor) -> InceptionFeatures:
        """As calling it."""
        features: InceptionFeatures = self(images)
        return features

    @torch.no_grad()
    def forward(self, images: Tensor) -> InceptionFeatures:
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8 or 0 in images.shape[2:]:
            raise ValueError(
                f"{self.name}: expected images [B, 3, H, W] of uint8 (0 to 255), got {images.dtype} of shape "
                f"{tuple(images.shape)}; round to whole numbers first"
            )
        with torch.autocast(images.device.type, enabled=False):
            x = (tf1_resize(images.float(), (SIDE, SIDE)) - 128) / 128
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # [B, 64, 147, 147]
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))  # [B, 192, 71, 71]
            x = F.max_pool2d(x, 3, stride=2)
            x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # [B, 288, 35, 35]
            x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # [B, 768, 17, 17]
            # `mixed_6` of the graph is Mixed_6d, and its `conv` the chain branch1x1: the first of the joined channels.
            spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))  # [B, 2048, 8, 8]
            return InceptionFeatures(x.mean(dim=(2, 3)), spatial)


# ---- the file of weights -------------------------------------------------------------------------------------------------


def load_inception(path: str | os.PathLike[str]) -> Inception2015:
    """The network with the weights of a file of the user's, on the CPU; `digest` is the file's sha256.

    The file is `pt_inception-2015-12-05-6726825d.pth` of the project pytorch-fid, or one with the same entries (.pth or
    .safetensors). Nothing in it is executed. A file whose name ends with digits that are not those of its sha256 gives a
    warning. Raises FileNotFoundError, PermissionError, or ValueError for a file that is damaged or holds other entries.
    """
    path = as_path(path, EXPECTED)
    check_readable(path, EXPECTED)
    state = {str(name): tensor for name, tensor in _read(path).items() if not IGNORED.search(str(name))}
    network = Inception2015()
    own = {name: tensor for name, tensor in network.state_dict().items() if not IGNORED.search(name)}
    if faults := _faults(state, own):
        raise ValueError(f"{brief_path(path)} does not hold the 2015 Inception ({faults}); expected {EXPECTED}")
    network.load_state_dict(state, strict=False)  # all that is left out is what IGNORED names
    network.digest = _sha256(path)
    said = re.search(r"-([0-9a-f]{8})\.[^.]+$", path.name)
    if said and not network.digest.startswith(said[1]):
        warnings.warn(
            f"the sha256 of {brief_path(path)} starts with {network.digest[:8]}, and its name says {said[1]}: scores compare "
            "with published ones only if the weights are the same, so download it again unless you saved it anew",
            stacklevel=2,
        )
    return network


def _read(path: Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(
            f"{brief_path(path)} has {size:,} bytes, more than the {MAX_BYTES:,} allowed; expected {EXPECTED}"
        )
    try:
        if zipfile.is_zipfile(path):
            # The published file may be older than PyTorch's zip format, so files of both are read.
            with zipfile.ZipFile(path) as archive:
                records = archive.infolist()
            if sum(record.file_size for record in records) > MAX_BYTES or any(
                record.compress_type for record in records
            ):
                raise ValueError("its records are compressed or too large")
        return read_weights(path)
    except MemoryError:
        raise
    except Exception as error:  # damaged files raise anything
        raise ValueError(
            f"{brief_path(path)} is no whole file of tensors alone, and nothing in it was executed; expected {EXPECTED}"
        ) from error


def _faults(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """What is missing, not expected, of another shape or no finite number, in words; empty if the state fits."""
    both = [name for name in own if name in state]
    faults = {
        "missing": [name for name in own if name not in state],
        "not expected": [brief(name) for name in state if name not in own],
        "of another shape": [
            f"{name} {list(state[name].shape)} instead of {list(own[name].shape)}"
            for name in both
            if state[name].shape != own[name].shape
        ],
        "not of finite numbers": [name for name in both if not _finite(state[name])],
    }
    return "; ".join(
        f"{what}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for what, names in faults.items()
        if names
    )


def _finite(tensor: Tensor) -> bool:
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.is_floating_point()
    return plain and bool(tensor.isfinite().all())


def _sha256(path: Path) -> str:
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            hashed.update(block)
    return hashed.hexdigest()


def fetch_inception() -> Path:
    """The file of the weights in the user's cache, downloaded from pytorch-fid's releases if it is not there; called only
    where the user asked for it. A file with another checksum than its name says is refused."""
    place = cache_dir() / FILE
    if not place.is_file():
        place.parent.mkdir(parents=True, exist_ok=True)
        try:  # whole or absent
            torch.hub.download_url_to_file(URL, str(place), hash_prefix=FILE_HASH)
        except (OSError, RuntimeError) as error:
            raise OSError(
                f"{FILE} could not be downloaded from {URL} ({error}); download it yourself, and give --weights"
            ) from error
    return place
