"""What decoders make: images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nextscale.schedule import Schedule


@dataclass(frozen=True)
class Images:
    """Images [B, channels, H, W] in [-1, 1] (`contracts.Output`)."""

    channels: int = 3
    field: str = "image"

    def shape(self, schedule: Schedule, stride: int) -> tuple[int, ...]:
        h, w = schedule[-1]
        return self.channels, h * stride, w * stride

    def finish(self, decoded: Tensor) -> Tensor:
        return decoded.float().clamp(-1, 1)

    def pictures(self, content: Tensor) -> Tensor | None:
        return content

    def measure(self, content: Tensor, reference: Tensor) -> dict[str, Tensor]:
        mse = (content.clamp(-1, 1) - reference).square().flatten(1).mean(dim=1)
        return {"psnr": 10 * torch.log10(4 / mse.clamp(min=1e-10))}
