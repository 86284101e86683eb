"""What keeps a training step lean: inner values that are cheap to have are computed again in the backward pass instead of
being kept, and gradients of slices are summed in one place. Values and gradients are those of the plain way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


def again(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """`function(*inputs)`, which draws nothing at random; of all its values only the inputs are kept for the backward pass.

    A product of matrices at its end is not computed again: once the last value that is needed is there, computing stops.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class Unit(torch.autograd.Function):
    """Vectors x [..., l, d] scaled to length 1, then by a factor [..., 1, 1] or None: `F.normalize(x, dim=-1) * factor`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor | None) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)
        ctx.save_for_backward(x, norm, factor)
        return x / norm if factor is None else x / norm * factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, norm, factor = ctx.saved_tensors
        unit = x / norm
        inner = (grad * unit).sum(dim=-1, keepdim=True)
        per_length = norm.reciprocal() if factor is None else factor / norm
        grad_x = torch.addcmul(grad, unit, inner, value=-1).mul(per_length)
        return grad_x.to(x.dtype), None if factor is None else inner.sum_to_size(factor.shape).to(factor.dtype)


class Prefixes(torch.autograd.Function):
    """The first tokens of x [B, N, l, d], up to each of some ends; the last end is l."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ends: Sequence[int]) -> tuple[Tensor, ...]:
        return tuple(x[:, :, :end] for end in ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[-1].clone()
        for grad in grads[:-1]:
            total[:, :, : grad.shape[2]] += grad
        return total, None
