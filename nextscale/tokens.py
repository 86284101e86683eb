"""Tokens of one scale or of several: a tensor, or a named tuple of tensors that go together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

# [B, l] ids, [B, l, d] bits, [B, l, C] vectors, or a named tuple of such tensors, one row an image and one entry a token.
Tokens = Tensor | tuple[Tensor, ...]
T = TypeVar("T", bound=Tokens)


class Soft(NamedTuple):
    """Soft choices instead of ids (or bits): weights float [B, l, V] (of bits [B, l, d, 2]) that sum to 1."""

    weights: Tensor


def whole_numbers(tokens: Tokens, what: str) -> Tensor:
    """The tokens, which must be ids or bits. Raises ValueError for all else; `what`: their name in it."""
    if isinstance(tokens, Tensor) and not tokens.is_floating_point():
        return tokens
    got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
    raise ValueError(
        f"expected {what} of an integer dtype, got {got}; soft weights over the choices are ns.Soft(weights)"
    )


def each(function: Callable[..., Tensor], *tokens: T) -> T:
    """`function` of each tensor of tokens (of several: of those in the same place), as tokens of the same kind."""
    first = tokens[0]
    if isinstance(first, Tensor):
        return function(*tokens)  # type: ignore[return-value]
    return type(first)(*(function(*parts) for parts in zip(*tokens, strict=True)))


def first_tensor(tokens: Tokens) -> Tensor:
    """One of their tensors, for what all have in common: batch, length, device."""
    return tokens if isinstance(tokens, Tensor) else tokens[0]


def joined(maps: Sequence[T]) -> T:
    """The token maps of several scales behind each other, [B, l_0 + l_1 + ..., ...]."""
    return each(lambda *parts: torch.cat(parts, dim=1), *maps)


def joined_rows(parts: Sequence[T]) -> T:
    """The token maps of several parts of a batch, one below the other, [B_0 + B_1 + ..., l, ...]."""
    return each(lambda *some: torch.cat(some), *parts)


def split(tokens: T, lengths: Sequence[int]) -> list[T]:
    """The other way: one token map a scale."""
    if isinstance(tokens, Tensor):
        return list(tokens.split(list(lengths), dim=1))
    parts = [tensor.split(list(lengths), dim=1) for tensor in tokens]
    return [type(tokens)(*some) for some in zip(*parts, strict=True)]
