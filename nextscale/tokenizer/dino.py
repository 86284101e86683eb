"""The discriminator on frozen DINO features (StyleGAN-T, Sauer et al. 2023; the one of VAR's authors in vaex).

A ViT-S/16 that DINO trained looks at real and made images; small trainable heads judge its tokens at five depths. Its
weights are supplied by the user (`dino_deitsmall16_pretrain.pth`); they are no part of the discriminator's state.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from nextscale.tokenizer.frozen import Frozen
from nextscale.tokenizer.lpips import load_exactly, read_weights

SIDE, PATCH = 224, 16
READ = (2, 5, 8, 11)  # after these blocks, and before the first
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


class _Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _Block(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = _Attention(dim, num_heads), _Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _Patches(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, PATCH, PATCH)


class DinoViT(nn.Module):
    """ViT-S/16 for 224 px under DINO's own names; `forward` gives tokens before the first block and after four others.

    Each is patches plus class token, [B, dim, 196].
    """

    def __init__(self, dim: int = 384, depth: int = 12, num_heads: int = 6) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, (SIDE // PATCH) ** 2 + 1, dim))
        self.patch_embed = _Patches(dim)
        self.blocks = nn.ModuleList(_Block(dim, num_heads) for _ in range(depth))

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.patch_embed.proj(images).flatten(2).mT  # [B, 196, D]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        found = [self._readout(x)]
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in READ:
                found.append(self._readout(x))
        return found

    @staticmethod
    def _readout(x: Tensor) -> Tensor:
        return (x[:, 1:] + x[:, :1]).mT


class _Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.inner(x)) / math.sqrt(2)


def _layer(channels: int, out: int, kernel: int) -> nn.Module:
    conv = nn.Conv1d(channels, out, kernel, padding=kernel // 2, padding_mode="circular")
    nn.init.trunc_normal_(conv.weight, std=0.02)
    return spectral_norm(conv)


def _head(dim: int) -> nn.Module:
    """Logits of tokens, [B, D, 196] -> [B, 1, 196]; a norm of each image, so that small batches do no harm."""

    def unit(kernel: int) -> nn.Module:
        return nn.Sequential(_layer(dim, dim, kernel), nn.GroupNorm(min(32, dim), dim, eps=1e-6), nn.LeakyReLU(0.2))

    return nn.Sequential(unit(1), _Residual(unit(9)), _layer(dim, 1, 1))


class DinoDiscriminator(nn.Module):
    """Says real (high) or made (low) of an image's tokens at five depths: [B, 3, H, W] in [-1, 1] -> [B, 5 * 196].

    Images are resized to 224 px, or cropped at random half of the time if they are larger (while training). Unlike vaex,
    heads have group norms instead of batch norms.

    Args:
        weights: `dino_deitsmall16_pretrain.pth`; None: random ones, for tests.
        dim, depth, num_heads: of the network, those of ViT-S by default.
    """

    def __init__(
        self, weights: str | os.PathLike[str] | None, dim: int = 384, depth: int = 12, num_heads: int = 6
    ) -> None:
        super().__init__()
        network = DinoViT(dim, depth, num_heads)
        if weights is not None:
            state = read_weights(weights)
            load_exactly(network, {k: v for k, v in state.items() if not k.startswith("norm.")}, weights)
            with torch.no_grad():  # key biases change no attention; vaex sets them to zero
                blocks: Any = network.blocks
                for block in blocks:
                    block.attn.qkv.bias[dim : 2 * dim] = 0
        self.network = Frozen(network)
        self.heads = nn.ModuleList(_head(dim) for _ in range(1 + sum(i < depth for i in READ)))
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"DinoDiscriminator: expected images [B, 3, H, W] in [-1, 1], got {list(images.shape)}")
        x = (self._sized(images) * 0.5 + 0.5 - self.mean) / self.std
        return torch.cat([head(h) for head, h in zip(self.heads, self.network(x), strict=True)], dim=-1).flatten(1)

    def _sized(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        if (height, width) == (SIDE, SIDE):
            return images
        if min(height, width) > SIDE and self.training and torch.rand(()) < 0.5:
            y, x = (int(torch.randint(side - SIDE + 1, ())) for side in (height, width))
            return images[:, :, y : y + SIDE, x : x + SIDE]
        mode = "area" if max(height, width) > SIDE else "bicubic"
        return F.interpolate(images, size=(SIDE, SIDE), mode=mode)
