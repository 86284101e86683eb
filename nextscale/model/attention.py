"""Self-attention over scales, with or without a cache, and never with a dense mask."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.contracts import KeyCache, LayerCache
from nextscale.model.lean import Linear, Prefixes, QKNorm, linear
from nextscale.schedule import Span


class Memory:
    """Room for keys and values, [2, rows, N, length, head_dim], which the forks of a cache share.

    used: tokens of it that are somebody's for good. guest: the mark of what looks ahead behind them.
    """

    def __init__(self, room: Tensor) -> None:
        self.room, self.used = room, 0
        self.keys, self.values = room.unbind()
        self.guest: object = None


class KVCache:
    """Keys and values of one layer, in memory that is allocated once (`contracts.KeyCache`).

    A cache is a value. Forks share memory as long as one of them goes on; a second one that adds tokens where the first has
    done so takes a copy. So sampling in a row copies nothing, and a tree of states copies once a branch.

    outputs: what methods keep of the block's branches to use it again, [rows, ...] by a number of their own.
    """

    def __init__(self, rows: int, heads: int, length: int, head_dim: int, like: Tensor) -> None:
        self.memory = Memory(like.new_empty(2, rows, heads, length, head_dim))
        self.length = 0
        self.segments: tuple[tuple[int, int], ...] = ()  # (scale, end) of what was added; scale -1 is the prefix
        self.committed = True
        self.mark: object = None  # that of its tokens which are not committed
        self.outputs: dict[int, Tensor] = {}

    def fork(self, commit: bool = True) -> KVCache:
        """See `contracts.LayerCache`."""
        other = KVCache.__new__(type(self))  # as `copy.copy`, in a tenth of its time: each step forks every layer
        other.__dict__.update(self.__dict__)
        other.outputs, other.committed = dict(self.outputs), commit
        return other

    def select(self, rows: Tensor) -> KVCache:
        """Chosen rows (int64 [rows'])."""
        self._check()
        other = self.fork(self.committed)
        room = self.memory.room
        other.memory = Memory(room.new_empty(2, len(rows), *room.shape[2:]))
        other.memory.room[:, :, :, : self.length] = room[:, rows, :, : self.length]
        other.memory.used = self.length
        other.outputs = {place: output[rows] for place, output in self.outputs.items()}
        return other

    @property
    def nbytes(self) -> int:
        """Memory of keys and values in bytes."""
        return self.memory.room.nbytes

    def append(self, k: Tensor, v: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """Store the span's keys and values [rows, N, l, head_dim]; returns views of all so far, [rows, N, length, head_dim]."""
        self._check()
        end = self.length + k.shape[2]
        if self.memory.used > self.length:  # another fork went on from here
            room = self.memory.room
            self.memory = Memory(torch.empty_like(room))
            self.memory.room[:, :, :, : self.length] = room[:, :, :, : self.length]
            self.memory.used = self.length
        keys, values = self.memory.keys, self.memory.values
        keys.narrow(2, self.length, k.shape[2]).copy_(k)
        values.narrow(2, self.length, k.shape[2]).copy_(v)
        if self.committed:
            self.memory.used, self.memory.guest = end, None
        else:
            self.memory.guest = self.mark = object()
        self.segments, self.length = (*self.segments, *_segments(span, self.length)), end
        return keys.narrow(2, 0, end), values.narrow(2, 0, end)

    def _check(self) -> None:
        """Raise RuntimeError if others have used the memory since this one looked ahead."""
        if self.length > self.memory.used and self.memory.guest is not self.mark:
            raise RuntimeError(
                "this cache looked ahead (commit=False), and its memory was used by another one since; look ahead one after "
                "the other, or fork with commit=True"
            )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, span: Span, scale: float) -> Tensor:
        """See `contracts.KeyCache`."""
        k, v = self.append(k, v, span)
        return attend_by_scale(q, k, v, span, self.segments, scale)


class ModelCache:
    """The caches of all layers; made for one run of the scale loop. A value, as they are."""

    def __init__(self, layers: Sequence[LayerCache]) -> None:
        self.layers = list(layers)

    def __getitem__(self, layer: int) -> LayerCache:
        return self.layers[layer]

    def fork(self, commit: bool = True) -> ModelCache:
        """One that goes on from here; this one stays as it is."""
        return ModelCache([layer.fork(commit) for layer in self.layers])

    def select(self, rows: Tensor) -> ModelCache:
        """Chosen rows (int64 [rows']), re-ordered or copied."""
        return ModelCache([layer.select(rows) for layer in self.layers])

    @property
    def nbytes(self) -> int:
        """Memory of all layers in bytes."""
        return sum(layer.nbytes for layer in self.layers)


def attend(q: Tensor, k: Tensor, v: Tensor, span: Span, scale: float, cache: KeyCache | None = None) -> Tensor:
    """Attention of the tokens of `span`, [B, N, l, head_dim], to what its sight shows them.

    With a cache, keys and values of earlier scales come from there; without one the span must begin at the first scale.
    """
    if cache is not None:
        return cache.attend(q, k, v, span, scale)
    if trains_in_half_on_cpu(v):
        mask = span.mask(q.device)
        return by_products(q, k, v, mask if mask.ndim == 2 else mask[:, None], scale)
    return attend_by_scale(q, k, v, span, _segments(span, 0), scale)


def attend_by_scale(
    q: Tensor, k: Tensor, v: Tensor, span: Span, segments: Sequence[tuple[int, int]], scale: float
) -> Tensor:
    """One call for each scale of the span (and one for the prefix), on a slice of keys and values: there is no mask, nothing
    is computed in vain, and fused kernels apply. A mask is needed where a prefix is padded.

    segments: (scale, end) of the keys at hand, in their order; scale -1 is the prefix.
    """
    prefix = [-1] if span.leading else []
    scales, lengths = [*prefix, *range(span.first, span.stop)], [span.leading] * len(prefix) + list(span.lengths)
    seen = [_ranges(span, k, segments) for k in scales]
    mask = None if span.real is None else span.real[:, None, None]  # [B, 1, 1, prefix]
    if len(scales) == 1:
        return _sdpa(q, _cut(k, seen[0]), _cut(v, seen[0]), seen[0], mask, scale)
    if all(len(ranges) == 1 and ranges[0][0] == 0 for ranges in seen):
        ends = [ranges[0][1] for ranges in seen]
        if mask is None and ends == list(
            range(1, q.shape[2] + 1)
        ):  # one token a scale, all in sight: ordinary causal attention
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        keys, values = Prefixes.apply(k, ends), Prefixes.apply(v, ends)
    else:
        keys, values = [_cut(k, ranges) for ranges in seen], [_cut(v, ranges) for ranges in seen]
    parts = zip(q.split(lengths, dim=2), keys, values, seen, strict=True)
    out = [_sdpa(*part, mask, scale) for part in parts]
    return torch.cat([part.transpose(1, 2) for part in out], dim=1).transpose(1, 2)


Ranges = list[tuple[int, int]]


def _segments(span: Span, begin: int) -> list[tuple[int, int]]:
    """(scale, end) of the span's tokens, behind `begin` others."""
    prefix = [(-1, span.leading)] if span.leading else []
    pieces = [*prefix, *zip(range(span.first, span.stop), span.lengths, strict=True)]
    ends = itertools.accumulate((length for _, length in pieces), initial=begin)
    return [(k, end) for (k, _), end in zip(pieces, itertools.islice(ends, 1, None), strict=True)]


def _ranges(span: Span, k: int, segments: Sequence[tuple[int, int]]) -> Ranges:
    """Which keys scale k (-1: the prefix) sees, as few `(begin, end)` as possible."""
    first = 0 if k < 0 else span.sight.first(k)
    ranges: Ranges = []
    begin = 0
    for scale, end in segments:
        seen = first <= scale <= k if scale >= 0 else k < 0 or span.sight.prefix
        if seen and ranges and ranges[-1][1] == begin:
            ranges[-1] = (ranges[-1][0], end)
        elif seen:
            ranges.append((begin, end))
        begin = end
    return ranges


def _cut(x: Tensor, ranges: Ranges) -> Tensor:
    if ranges == [(0, x.shape[2])]:
        return x
    pieces = [x[:, :, begin:end] for begin, end in ranges]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, ranges: Ranges, real: Tensor | None, scale: float) -> Tensor:
    mask = None
    if real is not None and ranges[0][0] == 0:  # the prefix comes first
        mask = F.pad(real, (0, k.shape[2] - real.shape[-1]), value=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


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
    """VAR's attention: fused projection, biases on q and v only, qk-norm with a learned scale a head.

    Without `qk_norm` the softmax scale is the reference's 0.25 / sqrt(head_dim).
    """

    def __init__(self, dim: int, num_heads: int, qk_norm: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Projection(dim, 3 * dim)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.log_scale = nn.Parameter(torch.full((num_heads,), math.log(4))) if qk_norm else None
        self.proj = Linear(dim, dim)

    @property
    def last(self) -> nn.Linear:
        return self.proj

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values of inputs [B, l, D], [B, l, 3 D]."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return self.qkv(x, bias)

    def forward(self, qkv: Tensor, span: Span, cache: KeyCache | None = None) -> Tensor:
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
