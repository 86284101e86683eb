"""The next-scale transformer: `hidden` serves training (all scales at once) and sampling (one scale, cached) alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from nextscale.condition import Condition
from nextscale.contracts import Block, Conditioner, Head, Positions
from nextscale.model.attention import ModelCache
from nextscale.model.block import AdaLNBlock, FixedModulation, OwnModulation, plain_norm
from nextscale.model.init import var_normal_
from nextscale.model.transformer_settings import TransformerSettings
from nextscale.modules import as_module, module_list, replaced
from nextscale.schedule import Schedule, Span


@dataclass(frozen=True)
class PreparedCondition:
    """What depends on the condition alone, computed once an image: start tokens, each block's and the head's part, and the
    tokens before the image."""

    start: Tensor  # [B, n, D]
    blocks: tuple[Any, ...]  # what each block's `prepare` returned: tensors [B, ...], in nested tuples
    head: Tensor  # [B, 2, 1, D]
    prefix: Tensor | None = None  # [B, P, D]
    real: Tensor | None = None  # bool [B, P], False = padding; None: all are real

    def __len__(self) -> int:
        return len(self.start)

    def select(self, rows: Tensor) -> PreparedCondition:
        """Keep, re-order or copy rows (int64 [rows'])."""
        return PreparedCondition(*(_select(getattr(self, part.name), rows) for part in fields(self)))

    def seen_by(self, span: Span) -> Span:
        """The span behind the prefix."""
        return span if self.prefix is None else replace(span, prefix=self.prefix.shape[1], real=self.real)


def _placed(h: Tensor, positions: Tensor, leading: int) -> Tensor:
    """Positions added to the tokens of the image; those of a prefix bring their own."""
    return torch.cat([h[:, :leading], h[:, leading:] + positions], dim=1) if leading else h + positions


def _select(part: Any, rows: Tensor) -> Any:
    if isinstance(part, tuple):
        return tuple(_select(inner, rows) for inner in part)
    return None if part is None else part[rows]


class Transformer(nn.Module):
    """Blocks between an input embedding and a head; conditions, positions, blocks and head are passed in.

    Args:
        positions_before: the blocks before which positions are added to the residual stream.
        compose: makes the parts that the transformer reads (`start`, `vec`, `context`, `prefix`) of what the conditioner gave,
            where several of its parts go into one, each of which can be dropped on its own.
    """

    def __init__(
        self,
        settings: TransformerSettings,
        code_dim: int,
        conditioner: Conditioner,
        positions: Positions,
        head: Head,
        block: Callable[[TransformerSettings, float], Block] = AdaLNBlock,
        positions_before: tuple[int, ...] = (0,),
        compose: Callable[[Condition], Condition] | None = None,
    ) -> None:
        super().__init__()
        dim, depth = settings.dim, settings.depth
        self.settings = settings
        # Parts are known by their contracts, not by a base class.
        self.conditioner: Conditioner
        self.positions: Positions
        self.register_module("conditioner", as_module(conditioner))
        self.register_module("positions", as_module(positions))
        self.embed_input = nn.Linear(code_dim, dim)
        self.shared_modulation = OwnModulation(dim, parts=6) if settings.shared_adaln else None
        rates = [settings.drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks: Sequence[Block]
        self.register_module("blocks", module_list(block(settings, rate) for rate in rates))
        self.positions_before, self.compose = positions_before, compose
        self.norm = plain_norm(settings)
        self.head_modulation = (OwnModulation if settings.adaln else FixedModulation)(dim, parts=2)
        self.head: Head
        self.register_module("head", as_module(head))

    def prepare(self, condition: Condition) -> PreparedCondition:
        """Everything that depends on the condition alone; call it once an image, not once a scale."""
        if self.compose is not None:
            condition = self.compose(condition)
        head = self.head_modulation(condition.vec)
        if self.shared_modulation is not None:
            condition = condition.replace(vec=self.shared_modulation(condition.vec))
        blocks = tuple(block.prepare(condition) for block in self.blocks)
        return PreparedCondition(condition.start, blocks, head, condition.prefix, condition.masks.get("prefix"))

    def embed(self, inputs: Tensor | None, prepared: PreparedCondition, span: Span) -> Tensor:
        """Prefix, start tokens and inputs, [B, prefix + l, D].

        `inputs` [B, l', C] are the pyramid's inputs of the span's scales. The first scale has none: start tokens open it.
        """
        parts = []
        if span.leading and prepared.prefix is not None:
            parts.append(prepared.prefix)
        if span.first == 0:
            parts.append((prepared.start + self.positions.start).expand(-1, span.lengths[0], -1))
        if inputs is not None:
            parts.append(self.embed_input(inputs.to(self.embed_input.weight.dtype)))
        return torch.cat(parts, dim=1)

    def hidden(
        self,
        inputs: Tensor | None,
        prepared: PreparedCondition,
        span: Span,
        cache: ModelCache | None = None,
        *,
        commit: bool = True,
    ) -> Tensor:
        """Hidden states for the head, float32 [B, l, D].

        Without a cache the span begins at the first scale, and attention sees its scales as the span says (block-causal by
        default). With a cache earlier scales are read from it, and what the span leaves for later ones is added to it; with
        `commit=False` it stays as it is.
        """
        span = prepared.seen_by(span)
        if cache is not None and not commit:
            cache = cache.fork(commit=False)
        positions, h = self.positions(span), self.embed(inputs, prepared, span)
        for i, block in enumerate(self.blocks):
            if i in self.positions_before:
                h = _placed(h, positions, span.leading)
            h = block(h, prepared.blocks[i], span, None if cache is None else cache[i])
        scale, shift = prepared.head.unbind(1)
        return torch.addcmul(shift, self.norm(h[:, span.leading :]), 1 + scale).float()

    def new_cache(self, prepared: PreparedCondition, schedule: Schedule) -> ModelCache:
        """An empty cache for the rows of `prepared` and all scales of a schedule."""
        length = schedule.length + (0 if prepared.prefix is None else prepared.prefix.shape[1])
        like = self.embed_input.weight
        return ModelCache([block.new_cache(len(prepared), length, like) for block in self.blocks])

    def flop(self, schedule: Schedule) -> float:
        """Floating-point operations of a forward pass for one image, estimated: those of the matrix products in branches,
        input embedding, head and attention."""
        branches = [branch for block in self.blocks for branch in block.branches]
        modules = [module for part in (self.embed_input, self.head, *branches) for module in as_module(part).modules()]
        weights = sum(module.weight.numel() for module in modules if isinstance(module, nn.Linear))
        pairs = sum(n * end for n, end in zip(schedule.lengths, schedule.ends, strict=True))  # of queries and keys
        return 2.0 * weights * schedule.length + 4 * pairs * self.settings.dim * len(self.blocks)

    def with_blocks(self, blocks: Iterable[Block]) -> Transformer:
        """A transformer that shares all weights with this one but has these blocks: how methods wrap blocks from outside."""
        return replaced(self, blocks=module_list(blocks))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """VAR's initialisation: normal of variance 1 / (3 D) cut at +-2; blocks start close to the identity.

        What is neither a linear layer nor an embedding belongs to its part, which sets it.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                var_normal_(module.weight, self.settings.dim, generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        self.positions.reset_parameters(self.settings, generator)
        for block in self.blocks:
            block.reset_parameters(self.settings, generator)
        self.head.reset_parameters(self.settings, generator)
        if isinstance(self.head_modulation, OwnModulation):
            self.head_modulation.linear.weight.mul_(self.settings.init_adaln)
