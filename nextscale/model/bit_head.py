"""The head that predicts bits: two logits for each instead of one for each of 2^d codes (Infinity)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.contracts import Combine, Generators, Pick
from nextscale.draws import Draws
from nextscale.model.transformer_settings import TransformerSettings
from nextscale.tokens import Soft, Tokens, each, whole_numbers


class BitHead(nn.Module):
    """`bits` independent choices between 0 and 1 for each token.

    The loss of a token is the mean over its bits, or their sum: the negative log-likelihood.
    """

    def __init__(self, dim: int, bits: int, reduce: Literal["mean", "sum"] = "mean") -> None:
        super().__init__()
        self.bits, self.reduce = bits, reduce
        self.linear = nn.Linear(dim, 2 * bits)

    @torch.no_grad()
    def reset_parameters(self, settings: TransformerSettings, generator: torch.Generator) -> None:
        """After the usual weights: scaled down, so that both values of a bit start about as likely."""
        self.linear.weight.mul_(settings.init_head)

    def forward(self, h: Tensor) -> Tensor:
        """Logits float32 [B, l, d, 2] of hidden states [B, l, D]."""
        with torch.autocast(h.device.type, enabled=False):
            return self.linear(h.float()).float().unflatten(-1, (self.bits, 2))

    def loss(self, h: Tensor, targets: Tensor, draws: Draws, label_smoothing: float = 0.0) -> Tensor:
        """Cross-entropy in nats of each token, [B, l]; targets of 0 and 1 [B, l, d]."""
        return self.loss_of(self(h), targets, label_smoothing)

    def judge(self, h: Tensor, targets: Tensor, draws: Draws) -> dict[str, Tensor]:
        """The loss of each token, and which share of its bits is right, [B, l] each."""
        logits = self(h)
        right = (logits.argmax(dim=-1) == targets).float().mean(dim=-1)
        return {"cross_entropy": self.loss_of(logits, targets), "accuracy": right}

    def log_prob(self, h: Tensor, tokens: Tensor) -> Tensor:
        """Log-likelihood of each token in nats, the sum over its bits, [B, l]."""
        return -self._each_bit(self(h), whole_numbers(tokens, "bits")).sum(dim=-1)

    def loss_of(self, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """The loss of given logits."""
        losses = self._each_bit(logits, targets, label_smoothing)
        return losses.mean(dim=-1) if self.reduce == "mean" else losses.sum(dim=-1)

    @staticmethod
    def _each_bit(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Cross-entropy in nats of each bit, [B, l, d]."""
        flat = F.cross_entropy(
            logits.flatten(0, -2), targets.flatten().long(), reduction="none", label_smoothing=label_smoothing
        )
        return flat.view(targets.shape)

    def sample(self, h: Tensor, combine: Combine, pick: Pick, generators: Generators) -> Tokens:
        """Bits uint8 [B, l, d] (or soft weights of both values) of hidden states [rows, l, D]: one choice a bit."""
        logits = combine(self(h))  # [B, l, d, 2]
        picked = pick(logits.flatten(1, 2), generators)
        by_bit = each(lambda choice: choice.unflatten(1, logits.shape[1:3]), picked)
        return by_bit if isinstance(by_bit, Soft) else each(lambda bits: bits.to(torch.uint8), by_bit)
