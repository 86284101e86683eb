"""The convolutional autoencoder: images to feature maps and back, with the structure of VAR's tokenizer."""

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from nextscale.settings import Settings


class AutoencoderSettings(Settings):
    """Shape of encoder and decoder. The defaults are VAR's published tokenizer (stride 16)."""

    image_channels: int = Field(3, ge=1, le=1024, description="channels of an image")
    patch: int = Field(
        1, ge=1, le=256, description="side of the squares that are folded into channels before any convolution"
    )
    width: int = Field(160, ge=1, le=16_384, description="channels at the highest resolution")
    multipliers: tuple[Annotated[int, Field(ge=1, le=256)], ...] = Field(
        (1, 1, 2, 2, 4), min_length=1, max_length=10, description="width of each level / `width`"
    )
    blocks: int = Field(2, ge=1, le=256, description="residual blocks a level in the encoder; the decoder has one more")
    attention: bool = Field(True, description="self-attention at the lowest resolution")
    groups: int = Field(32, ge=1, le=16_384, description="groups of the group norms")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout inside residual blocks while training")
    latent: int | None = Field(
        None, ge=1, le=16_384, description="channels between autoencoder and pyramid; default: those of a code"
    )
    around: int = Field(
        3, ge=0, le=63, description="kernel of the convolutions just before and after the pyramid; 0: none"
    )

    @property
    def stride(self) -> int:
        """Pixels for each side of a cell of the feature map."""
        return self.patch * 2 ** (len(self.multipliers) - 1)


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice, around a shortcut."""

    def __init__(self, c_in: int, c_out: int, settings: AutoencoderSettings) -> None:
        super().__init__()
        self.norm1 = _norm(c_in, settings)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = _norm(c_out, settings)
        self.dropout = nn.Dropout(settings.dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # [B, C_in, H, W] -> [B, C_out, H, W]
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.shortcut(x) + h


class SpatialAttention(nn.Module):
    """Self-attention with one head over all positions of a feature map."""

    def __init__(self, channels: int, settings: AutoencoderSettings) -> None:
        super().__init__()
        self.norm = _norm(channels, settings)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        qkv = self.qkv(self.norm(x)).flatten(2).mT.contiguous()  # [B, H*W, 3C]
        q, k, v = qkv.unsqueeze(1).chunk(3, dim=-1)
        h = F.scaled_dot_product_attention(q, k, v).squeeze(1)  # [B, H*W, C]; softmax scale C^-0.5
        return x + self.proj(h.mT.reshape(x.shape))


class Downsample(nn.Module):
    """Half the resolution: a 3x3 convolution of stride 2 that pads at the right and at the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the resolution: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Encoder(nn.Module):
    """Images [B, 3, H, W] to feature maps [B, latent, H / stride, W / stride]."""

    def __init__(self, settings: AutoencoderSettings, latent: int) -> None:
        super().__init__()
        widths = [settings.width * m for m in settings.multipliers]
        self.patch = settings.patch
        self.conv_in = nn.Conv2d(settings.image_channels * settings.patch**2, settings.width, 3, padding=1)
        levels = []
        c_in = settings.width
        for i, c in enumerate(widths):
            lowest = i == len(widths) - 1
            layers = _level(c_in, c, settings.blocks, lowest, settings)
            levels.append(nn.Sequential(*layers) if lowest else nn.Sequential(*layers, Downsample(c)))
            c_in = c
        self.levels = nn.ModuleList(levels)
        self.middle = _middle(c_in, settings)
        self.norm_out = _norm(c_in, settings)
        self.conv_out = nn.Conv2d(c_in, latent, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        h = self.conv_in(F.pixel_unshuffle(images, self.patch))
        for level in self.levels:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.middle(h))))


class Decoder(nn.Module):
    """Feature maps [B, latent, h, w] to images [B, 3, h * stride, w * stride], not clamped."""

    def __init__(self, settings: AutoencoderSettings, latent: int) -> None:
        super().__init__()
        widths = [settings.width * m for m in reversed(settings.multipliers)]
        self.patch = settings.patch
        self.conv_in = nn.Conv2d(latent, widths[0], 3, padding=1)
        self.middle = _middle(widths[0], settings)
        levels = []
        c_in = widths[0]
        for i, c in enumerate(widths):  # lowest resolution first, the order of processing
            highest = i == len(widths) - 1
            layers = _level(c_in, c, settings.blocks + 1, i == 0, settings)
            levels.append(nn.Sequential(*layers) if highest else nn.Sequential(*layers, Upsample(c)))
            c_in = c
        self.levels = nn.ModuleList(levels)
        self.norm_out = _norm(c_in, settings)
        self.conv_out = nn.Conv2d(c_in, settings.image_channels * settings.patch**2, 3, padding=1)

    def forward(self, f: Tensor) -> Tensor:
        h = self.middle(self.conv_in(f))
        for level in self.levels:
            h = level(h)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), self.patch)


def _norm(channels: int, settings: AutoencoderSettings) -> nn.GroupNorm:
    return nn.GroupNorm(settings.groups, channels, eps=1e-6)


def _level(c_in: int, c: int, blocks: int, lowest: bool, settings: AutoencoderSettings) -> list[nn.Module]:
    """Residual blocks, each followed by attention at the lowest resolution."""
    layers: list[nn.Module] = []
    for _ in range(blocks):
        layers.append(ResidualBlock(c_in, c, settings))
        if lowest and settings.attention:
            layers.append(SpatialAttention(c, settings))
        c_in = c
    return layers


def _middle(channels: int, settings: AutoencoderSettings) -> nn.Sequential:
    attention = [SpatialAttention(channels, settings)] if settings.attention else []
    return nn.Sequential(
        ResidualBlock(channels, channels, settings), *attention, ResidualBlock(channels, channels, settings)
    )
