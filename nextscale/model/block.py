"""The transformer block: residual branches whose input and output a condition modulates (AdaLN)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.condition import Condition
from nextscale.contracts import Block, Branch, Layer, LayerCache, Opaque
from nextscale.model.attention import KVCache, SelfAttention
from nextscale.model.lean import Linear, checkpointed
from nextscale.model.transformer_settings import TransformerSettings
from nextscale.modules import as_module, module_list, replaced
from nextscale.schedule import Span

if TYPE_CHECKING:
    from typing_extensions import Self


class FeedForward(nn.Module):
    """Two linear layers around a tanh-GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    @property
    def last(self) -> nn.Linear:
        return self.fc2

    def project(self, x: Tensor) -> Tensor:  # [B, l, D] -> [B, l, hidden]
        return self.fc1(x)

    def forward(self, projected: Tensor, span: Span, cache: LayerCache | None = None) -> Tensor:
        return checkpointed(self._activate, projected)

    def _activate(self, projected: Tensor) -> Tensor:
        return self.fc2(F.gelu(projected, approximate="tanh"))


class ResidualBranch(nn.Module):
    """One residual branch: norm, modulate, layer, gate. What is added to the residual stream, not the stream itself.

    A layer works in two steps, `project(x)` and `forward(projected, span, cache)`, so that what lies before the first
    product of matrices need not be kept for the backward pass.
    """

    def __init__(self, layer: Layer, settings: TransformerSettings, drop_path: float) -> None:
        super().__init__()
        self.norm = plain_norm(settings)
        self.layer: Layer
        self.register_module("layer", as_module(layer))
        self.dropout = nn.Dropout(settings.dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, h: Tensor, modulation: Tensor, span: Span, cache: LayerCache | None = None) -> Tensor:
        """h [B, l, D]; modulation [B, 3, 1, D]: gate, scale, shift."""
        gate, scale, shift = modulation.unbind(1)
        projected = checkpointed(self._project, h, scale, shift)
        return self.drop_path(gate * self.dropout(self.layer(projected, span, cache)))

    def _project(self, h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.layer.project(torch.addcmul(shift, self.norm(h), 1 + scale))


class DropPath(nn.Module):
    """Leaves a branch out for some images while training, and scales it up for the others."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, update: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return update
        keep = torch.rand(len(update), 1, 1, device=update.device) >= self.rate
        return update * (keep / (1 - self.rate))


class OwnModulation(nn.Module):
    """Per-block AdaLN: a linear layer of the block's own on the condition vector."""

    def __init__(self, dim: int, parts: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, parts * dim)
        self.parts = parts

    def forward(self, vec: Tensor) -> Tensor:  # [B, D] -> [B, parts, 1, D]
        return self.linear(F.silu(vec)).unflatten(-1, (self.parts, 1, -1))

    @torch.no_grad()
    def reset_parameters(self, settings: TransformerSettings, generator: torch.Generator) -> None:
        """After the usual weights: those of the gates, the first third, and of the rest are scaled down."""
        gates = len(self.linear.weight) // 3
        self.linear.weight[:gates].mul_(settings.init_gate)
        self.linear.weight[gates:].mul_(settings.init_adaln)


class SharedModulation(nn.Module):
    """Shared AdaLN: the model computes one modulation for all blocks, and each block adds an offset of its own."""

    def __init__(self, dim: int, parts: int) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(parts, 1, dim))

    def forward(self, shared: Tensor) -> Tensor:  # [B, parts, 1, D]
        return shared + self.offset

    @torch.no_grad()
    def reset_parameters(self, settings: TransformerSettings, generator: torch.Generator) -> None:
        """Normal, with gates (the first third), scales and shifts scaled down."""
        gates = len(self.offset) // 3
        self.offset.normal_(std=settings.dim**-0.5, generator=generator)
        self.offset[:gates].mul_(settings.init_gate)
        self.offset[gates:].mul_(settings.init_adaln)


class FixedModulation(nn.Module):
    """No AdaLN: learned gates, scales and shifts, the same whatever the condition, as of an ordinary transformer."""

    def __init__(self, dim: int, parts: int) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(parts, 1, dim))

    def forward(self, vec: Tensor) -> Tensor:  # [B, D] -> [B, parts, 1, D]
        return self.offset.expand(len(vec), -1, -1, -1)

    @torch.no_grad()
    def reset_parameters(self, settings: TransformerSettings, generator: torch.Generator) -> None:
        """Gates (the first third) are open, and scales and shifts change nothing."""
        self.offset.zero_()
        self.offset[: len(self.offset) // 3] = 1.0


def modulation(settings: TransformerSettings, parts: int = 6) -> OwnModulation | SharedModulation | FixedModulation:
    """A block's modulation, as the settings want it."""
    if not settings.adaln:
        return FixedModulation(settings.dim, parts)
    return (SharedModulation if settings.shared_adaln else OwnModulation)(settings.dim, parts)


class BranchedBlock(nn.Module):
    """Residual branches one after the other, and what makes their modulation.

    What the transformer and those who wrap its branches rely on: `prepare` of a subclass computes once an image what depends on
    the condition alone, one entry a branch; every branch is called as `branch(h, prepared[i], span, cache)` and returns what is
    added to the residual stream.
    """

    def __init__(self, settings: TransformerSettings, branches: Iterable[Branch]) -> None:
        super().__init__()
        self.num_heads, self.head_dim = settings.num_heads, settings.dim // settings.num_heads
        self.branches: Sequence[Branch]
        self.register_module("branches", module_list(branches))
        self.modulation = modulation(settings)

    def with_branches(self, branches: Iterable[Branch]) -> Self:
        """A block that shares all weights with this one but has these branches."""
        return replaced(self, branches=module_list(branches))

    def new_cache(self, rows: int, length: int, like: Tensor) -> LayerCache:
        """An empty cache for `rows` sequences of up to `length` tokens, of the dtype and on the device of `like`."""
        return KVCache(rows, self.num_heads, length, self.head_dim, like)

    def forward(
        self, h: Tensor, prepared: tuple[Opaque, ...], span: Span, cache: LayerCache | None = None
    ) -> Tensor:  # [B, l, D]
        for branch, own in zip(self.branches, prepared, strict=True):
            h = h + branch(h, own, span, cache)
        return h

    @torch.no_grad()
    def reset_parameters(self, settings: TransformerSettings, generator: torch.Generator) -> None:
        """After the usual weights: a branch's last layer shrinks with depth, and gates start almost closed."""
        for branch in self.branches:
            layer = cast("ResidualBranch", branch).layer  # or another one around a layer
            layer.last.weight.div_(math.sqrt(2 * settings.depth))
        self.modulation.reset_parameters(settings, generator)


class AdaLNBlock(BranchedBlock):
    """Attention and feed-forward branches, each modulated by the condition."""

    def __init__(self, settings: TransformerSettings, drop_path: float = 0.0) -> None:
        s = settings
        layers = (SelfAttention(s.dim, s.num_heads, s.qk_norm), FeedForward(s.dim, round(s.dim * s.mlp_ratio)))
        super().__init__(s, [ResidualBranch(layer, s, drop_path) for layer in layers])

    def prepare(self, condition: Condition) -> tuple[Tensor, ...]:
        """Gate, scale and shift of each branch, [B, 3, 1, D]."""
        parts = self.modulation(condition.vec)  # [B, 6, 1, D] in the order gate 1, 2, scale 1, 2, shift 1, 2
        return parts.unflatten(1, (3, -1)).unbind(2)


class BlockWrapper(nn.Module):
    """A block around another one: what it does not change is the inner block's."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block: Block
        self.register_module("block", as_module(block))

    @property
    def branches(self) -> Sequence[Branch]:
        return self.block.branches

    def with_branches(self, branches: Iterable[Branch]) -> BlockWrapper:
        """The same around the inner block with these branches."""
        return replaced(self, block=as_module(self.block.with_branches(branches)))

    def prepare(self, condition: Condition) -> Opaque:
        """The inner block's own."""
        return self.block.prepare(condition)

    def reset_parameters(self, settings: TransformerSettings, generator: torch.Generator) -> None:
        """The inner block's own."""
        self.block.reset_parameters(settings, generator)

    def new_cache(self, rows: int, length: int, like: Tensor) -> LayerCache:
        """The inner block's own."""
        return self.block.new_cache(rows, length, like)

    def forward(self, h: Tensor, prepared: Opaque, span: Span, cache: LayerCache | None = None) -> Tensor:
        """[B, l, D] to [B, l, D]."""
        return self.block(h, prepared, span, cache)


def plain_norm(settings: TransformerSettings) -> nn.Module:
    """The norm without weights of its own that is modulated afterwards."""
    norm = nn.LayerNorm if settings.norm == "layer" else nn.RMSNorm
    return norm(settings.dim, settings.eps, elementwise_affine=False)
