"""Self-attention over scales: block-causal, with or without a cache, and never with a dense mask."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.model.lean import Linear, Prefixes, QKNorm, linear
from nextscale.schedule import Span


class LayerCache:
    """Keys and values of one layer, in memory that is allocated once. Owns its length; a view is returned, not a copy."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory  # [2, rows, N, L, head_dim]
        self.length = 0
        self.outputs: dict[int, Tensor] = {}  # [rows, ...] of the branches, for methods that use them again

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values [rows, N, l, head_dim]; returns all so far, [rows, N, length, head_dim]."""
        end = self.length + k.shape[2]
        self.memory[0, :, :, self.length : end] = k
        self.memory[1, :, :, self.length : end] = v
        self.length = end
        return self.memory[0, :, :, :end], self.memory[1, :, :, :end]


class Cache:
    """Keys and values of all layers; made by the caller for one run of the scale loop."""

    def __init__(self, layers: int, rows: int, heads: int, length: int, head_dim: int, like: Tensor) -> None:
        self.layers = [LayerCache(like.new_empty(2, rows, heads, length, head_dim)) for _ in range(layers)]

    def __getitem__(self, layer: int) -> LayerCache:
        return self.layers[layer]

    def select(self, rows: Tensor) -> None:
        """Keep, re-order or copy rows (int64 [rows'])."""
        for layer in self.layers:
            layer.memory = layer.memory[:, rows]
            layer.outputs = {place: output[rows] for place, output in layer.outputs.items()}

    @property
    def nbytes(self) -> int:
        """Memory of all keys and values in bytes."""
        return sum(layer.memory.nbytes for layer in self.layers)


def attend(q: Tensor, k: Tensor, v: Tensor, span: Span, scale: float, cache: LayerCache | None = None) -> Tensor:
    """Block-causal attention of the tokens of `span`, [B, N, l, head_dim].

    Each scale attends to itself and to all coarser scales: one call a scale on a slice of keys and values. There is no
    mask, nothing is computed in vain, and fused kernels apply. With a cache, keys and values of earlier scales come
    from there; without one the span must begin at the first scale.
    """
    if cache is not None:
        k, v = cache.append(k, v)
    if trains_in_half_on_cpu(v):
        return by_products(q, k, v, span.mask(q.device), scale)
    if len(span) == 1:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    ends = [end for _, end in span.bounds()]
    parts = zip(q.split(span.lengths, dim=2), Prefixes.apply(k, ends), Prefixes.apply(v, ends), strict=True)
    out = [F.scaled_dot_product_attention(*part, scale=scale) for part in parts]
    return torch.cat([part.transpose(1, 2) for part in out], dim=1).transpose(1, 2)


def trains_in_half_on_cpu(v: Tensor) -> bool:
    """Whether matrix products beat torch's fused kernel, whose backward pass takes three times as long there."""
    return v.device.type == "cpu" and v.dtype == torch.bfloat16 and v.requires_grad


def by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Softmax attention [B, N, l, head_dim] written out, in the precision of `v`; `mask` bool [..., l or 1, t]."""
    bias = torch.zeros(mask.shape, dtype=v.dtype, device=v.device).masked_fill_(~mask, -math.inf)
    bias = bias.expand(*q.shape[:3], -1).flatten(0, 1)  # [B * N, l, t]
    rows = q.shape[:2]
    q, k, v = (x.flatten(0, 1).to(v.dtype) for x in (q, k, v))
    weights = torch.baddbmm(bias, q, k.mT, alpha=scale).softmax(dim=-1)
    return torch.bmm(weights, v).unflatten(0, rows)


class Projection(Linear):
    """A linear layer whose bias comes with its input. It is called, not taken apart, so that adapters find it."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__(dim, out, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        return linear(x, self.weight, bias)


class SelfAttention(nn.Module):
    """VAR's attention: fused projection, biases on q and v only, unit-norm q and k with a learned scale a head.

    Without `unit_norm` the softmax scale is the reference's 0.25 / sqrt(head_dim).
    """

    def __init__(self, dim: int, num_heads: int, unit_norm: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Projection(dim, 3 * dim)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.log_scale = nn.Parameter(torch.full((num_heads,), math.log(4))) if unit_norm else None
        self.proj = Linear(dim, dim)

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values of inputs [B, l, D], [B, l, 3 D]."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return self.qkv(x, bias)

    def forward(self, qkv: Tensor, span: Span, cache: LayerCache | None = None) -> Tensor:
        """What the tokens tell each other, [B, l, D]."""
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, N, l, head_dim]
        if self.log_scale is None:
            scale = 0.25 / math.sqrt(q.shape[-1])
        else:
            scale = 1.0
            sharpness = self.log_scale.clamp(max=math.log(100)).exp().view(-1, 1, 1)
            q, k = QKNorm.apply(q, sharpness), QKNorm.apply(k, None)
        q, k = self.place(q, k, span)
        return self.proj(attend(q, k, v, span, scale, cache).transpose(1, 2).flatten(2))

    def place(self, q: Tensor, k: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """Queries and keys [B, N, l, head_dim] that know where their tokens are; here positions are in the inputs."""
        return q, k
