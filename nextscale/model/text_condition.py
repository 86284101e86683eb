"""Text as Infinity reads it: pooled to a vector that modulates, projected to a context that every block attends to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.condition import Condition
from nextscale.contracts import Conditioner, LayerCache, Opaque
from nextscale.model.attention import Projection, by_products, trains_in_half_on_cpu
from nextscale.model.block import BranchedBlock, FeedForward, ResidualBranch
from nextscale.model.lean import Linear
from nextscale.model.rotary import Rotary, RotaryAttention
from nextscale.model.transformer_settings import TransformerSettings
from nextscale.modules import as_module
from nextscale.schedule import Span


@dataclass(frozen=True)
class Text:
    """Encoded texts, one row each, padded to the longest."""

    features: Tensor  # [B, T, E]: hidden states of a frozen text encoder
    mask: Tensor  # bool [B, T], True = a real token
    null: Tensor  # bool [B], True = says nothing: only its length counts

    @classmethod
    def of(cls, rows: Sequence[Tensor], null: Sequence[bool] | None = None) -> Text:
        """Pad hidden states [t, E] of different lengths."""
        lengths = torch.tensor([len(row) for row in rows])
        features = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        mask = torch.arange(features.shape[1]) < lengths[:, None]
        return cls(features, mask, torch.tensor(null if null is not None else [False] * len(rows)))

    def to(self, device: torch.device | str) -> Text:
        return Text(self.features.to(device), self.mask.to(device), self.null.to(device))


class TextCondition(nn.Module):
    """Text features -> start token, vector and context; with a learned table for images without a text.

    The null condition is no single vector: it is the first rows of the table, as many as the text would have had, and takes
    the same way through norm, pooling and projection.

    Args:
        text_dim: E, channels of the text features.
        dim: D, of the transformer.
        length: rows of the table, the longest text in tokens.
        pool_heads: heads of the pooling.
        eps: of the norm.
        name: what its reader is called.
    """

    def __init__(
        self, text_dim: int, dim: int, length: int, pool_heads: int, eps: float = 1e-6, name: str = "caption"
    ) -> None:
        super().__init__()
        self.name = name
        # The published table: normal of standard deviation 1.2, cut at +-2, over sqrt(E); always the same numbers.
        table = torch.empty(length, text_dim)
        nn.init.trunc_normal_(table, std=1.2, generator=torch.Generator("cpu").manual_seed(0))
        self.null_text = nn.Parameter(table / math.sqrt(text_dim))
        self.norm = nn.RMSNorm(text_dim, eps)
        self.pool = AttentionPool(text_dim, dim, pool_heads)
        self.project = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))

    def forward(self, told: Mapping[str, Text]) -> Condition:
        text = told[self.name]
        length, channels = text.features.shape[1:]
        if channels != self.null_text.shape[1] or length > len(self.null_text):
            raise ValueError(
                f"this model reads texts of up to {len(self.null_text)} tokens with {self.null_text.shape[1]} channels, got "
                f"{length} with {channels}; use the text encoder that the model was trained with"
            )
        features = text.features.to(self.null_text)
        features = torch.where(text.null.view(-1, 1, 1).to(features.device), self.null_text[:length], features)
        return self._condition(features, text.mask.to(features.device))

    def null(self, condition: Condition) -> Condition:
        """The condition that says nothing, in the lengths of the given one."""
        mask = condition.context_mask
        assert mask is not None
        return self._condition(self.null_text[: mask.shape[1]].expand(len(mask), -1, -1), mask)

    def _condition(self, features: Tensor, mask: Tensor) -> Condition:
        features = self.norm(features)
        vec = self.pool(features, mask)  # [B, D]
        return Condition({"context": mask}, start=vec.unsqueeze(1), vec=vec, context=self.project(features))


class AttentionPool(nn.Module):
    """Learned queries, one a head, that attend to all tokens of a text: [B, T, E] -> [B, D]."""

    def __init__(self, text_dim: int, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of the heads of the text pooling, got {dim} and {num_heads}")
        self.query = nn.Parameter(torch.empty(num_heads, dim // num_heads))
        self.kv = Projection(text_dim, 2 * dim)
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)
        nn.init.trunc_normal_(self.query, std=math.sqrt(1 / dim / 3))

    def forward(self, text: Tensor, mask: Tensor) -> Tensor:
        k, v = keys_values(text, self.kv, self.v_bias, len(self.query))
        q = self.query[:, None].expand(len(text), -1, -1, -1).to(k.dtype)  # [B, N, 1, head_dim]
        return self.proj(cross_attention(q, k, v, mask[:, None, None]).flatten(1))


class CrossAttention(nn.Module):
    """The image's tokens attend to those of a context: no qk-norm, no positions, biases on queries and values only."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = Linear(dim, dim)
        self.kv = Projection(dim, 2 * dim)
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = Linear(dim, dim)

    @property
    def last(self) -> nn.Linear:
        return self.proj

    def forward(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:  # [B, l, D]
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, N, l, head_dim]
        return self.proj(cross_attention(q, k, v, mask).transpose(1, 2).flatten(2))


class ContextBranch(nn.Module):
    """The residual branch of cross-attention: a norm of its own, no gate; `scale`: initial value of a learned factor for
    each channel (None: there is none)."""

    def __init__(self, settings: TransformerSettings, scale: float | None) -> None:
        super().__init__()
        norm = nn.LayerNorm if settings.norm == "layer" else nn.RMSNorm
        self.norm = norm(settings.dim, settings.eps)
        self.layer = CrossAttention(settings.dim, settings.num_heads)
        self.scale = None if scale is None else nn.Parameter(torch.full((settings.dim,), float(scale)))

    def prepare(self, condition: Condition) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values [B, N, T, head_dim] of the context, and its mask [B, 1, 1, T]."""
        assert condition.context is not None and condition.context_mask is not None
        k, v = keys_values(condition.context, self.layer.kv, self.layer.v_bias, self.layer.num_heads)
        return k, v, condition.context_mask[:, None, None]

    def forward(
        self, h: Tensor, context: tuple[Tensor, Tensor, Tensor], span: Span, cache: LayerCache | None = None
    ) -> Tensor:
        if not span.sight.context:
            return torch.zeros_like(h)
        update = self.layer(self.norm(h), *context)
        return update if self.scale is None else update * self.scale


class TextBlock(BranchedBlock):
    """Self-attention, cross-attention, feed-forward; the first and the last are modulated by the condition's vector.

    Args:
        rotary: positions of the self-attention.
        context_scale: as `scale` of `ContextBranch`.
        round_to: the feed-forward's hidden width is a multiple of it (at least one; halves to even).
    """

    def __init__(
        self,
        settings: TransformerSettings,
        drop_path: float,
        rotary: Rotary,
        context_scale: float | None = None,
        round_to: int = 1,
    ) -> None:
        s = settings
        hidden = round_to * max(1, round(s.dim * s.mlp_ratio / round_to))
        attention = RotaryAttention(s.dim, s.num_heads, rotary, s.qk_norm)
        first, context = ResidualBranch(attention, s, drop_path), ContextBranch(s, context_scale)
        super().__init__(s, (first, context, ResidualBranch(FeedForward(s.dim, hidden), s, drop_path)))

    def prepare(self, condition: Condition) -> tuple[Opaque, ...]:
        """What each branch needs of the condition: modulation [B, 3, 1, D], keys and values of the text, modulation."""
        parts = self.modulation(condition.vec)  # [B, 6, 1, D] in the order gate 1, 2, scale 1, 2, shift 1, 2
        first, last = parts.unflatten(1, (3, 2)).unbind(2)
        return first, cast("ContextBranch", self.branches[1]).prepare(condition), last


def keys_values(context: Tensor, linear: nn.Module, v_bias: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Keys and values [B, N, T, head_dim] of a context [B, T, E]; keys have no bias."""
    bias = torch.cat([torch.zeros_like(v_bias), v_bias])
    kv = linear(context, bias).unflatten(-1, (2, num_heads, -1))
    k, v = kv.permute(2, 0, 3, 1, 4)
    return k, v


def cross_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention of scale 1 / sqrt(head_dim) over the real tokens of a text, [B, N, l, head_dim]."""
    if trains_in_half_on_cpu(v):
        return by_products(q, k, v, mask, 1 / math.sqrt(q.shape[-1]))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class NegativeText(nn.Module):
    """A conditioner whose null says another text: the negative prompt (of each row, or one for all). What is said beside the
    text keeps its own null.

    `told`: what the readers made of the negative prompts and of nothing else, by their names.
    """

    def __init__(self, conditioner: Conditioner, told: Mapping[str, Any]) -> None:
        super().__init__()
        self.conditioner: Conditioner
        self.register_module("conditioner", as_module(conditioner))
        self.told = dict(told)

    def forward(self, told: Mapping[str, Any]) -> Condition:
        condition = self.conditioner(told)
        return _padded(condition, self._negative(condition.device))

    def null(self, condition: Condition) -> Condition:
        negative = self._negative(condition.device)
        if len(negative) not in (1, len(condition)):
            raise ValueError(
                f"expected one negative prompt, or one for each of {len(condition)} images, got {len(negative)}"
            )
        # The text's are those parts in which it differs from no text; an empty one has none.
        silent = self.conditioner.null(negative).parts()
        says = {name: (part != silent[name]).flatten(1).any(dim=1) for name, part in negative.parts().items()}
        row = torch.arange(len(condition), device=condition.device) % len(negative)
        return self.conditioner.null(condition).mix(
            _padded(negative, condition).select(row), {name: rows[row] for name, rows in says.items() if rows.any()}
        )

    def _negative(self, device: torch.device) -> Condition:
        return self.conditioner({name: values.to(device) for name, values in self.told.items()})


def _padded(condition: Condition, other: Condition) -> Condition:
    """A condition whose masked parts [B, T, ...] are at least as long as those of another one."""
    parts, masks = {}, {}
    for name, mask in condition.masks.items():
        more = max(0, other.masks[name].shape[1] - mask.shape[1])
        parts[name] = F.pad(condition[name], (0, 0) * (condition[name].ndim - 2) + (0, more))
        masks[name] = F.pad(mask, (0, more))
    return condition.replace(masks, **parts)
