"""What keeps a training step lean: inner values that are cheap to have are computed again in the backward pass instead of
being kept, and gradients of slices are summed in one place. Values and gradients are those of the plain way."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


def checkpointed(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """`function(*inputs)`, which draws nothing at random; of all its values only the inputs are kept for the backward pass.

    A product of matrices at its end is not computed again: once the last value that is needed is there, computing stops.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class Linear(nn.Linear):
    """A linear layer that trains at twice the speed where torch's own is slow: float32 on AMD processors with AVX-512.

    There torch's products of matrices (MKL) use half of the vector width, its convolutions (oneDNN) all of it, and a linear
    layer is a 1x1 convolution over rows. Same weights, same numbers up to rounding.
    """

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` of x [..., K], or the same as a convolution."""
    rows = x.numel() // max(1, x.shape[-1])
    if (
        rows < FEW
        or x.device.type != "cpu"
        or not (x.dtype == weight.dtype == torch.float32)
        or not torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or not convolutions_are_faster()
    ):
        return F.linear(x, weight, bias)
    image = x.reshape(1, rows, 1, -1).permute(0, 3, 1, 2)  # [1, K, rows, 1], channels last in memory: a view
    out = F.conv2d(image, weight[:, :, None, None], bias)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


FEW = 256  # rows below which setting up a convolution costs more than it saves


@lru_cache(maxsize=1)
def convolutions_are_faster() -> bool:
    """Whether this processor is one on which torch's products of matrices are slow; never guessed from timings, which would
    change from run to run."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return "AuthenticAMD" in platform.processor()


class QKNorm(torch.autograd.Function):
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
