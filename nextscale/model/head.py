"""What is predicted for each token. A head owns its loss and its way of sampling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.contracts import Combine, Generators, Pick
from nextscale.draws import Draws
from nextscale.model.lean import Linear
from nextscale.model.transformer_settings import TransformerSettings
from nextscale.tokens import Tokens, whole_numbers


class SoftmaxHead(nn.Module):
    """One of V codes for each token."""

    def __init__(self, dim: int, codebook_size: int) -> None:
        super().__init__()
        self.linear = Linear(dim, codebook_size)

    @torch.no_grad()
    def reset_parameters(self, settings: TransformerSettings, generator: torch.Generator) -> None:
        """After the usual weights: scaled down, so that all codes start about as likely."""
        self.linear.weight.mul_(settings.init_head)

    def forward(self, h: Tensor) -> Tensor:
        """Logits float32 [B, l, V] of hidden states [B, l, D]; not rounded under autocast."""
        with torch.autocast(h.device.type, enabled=False):
            return self.linear(h.float()).float()

    def loss(self, h: Tensor, targets: Tensor, draws: Draws, label_smoothing: float = 0.0) -> Tensor:
        """Cross-entropy in nats of each token, [B, l]; targets int64 [B, l]."""
        return self.loss_of(self(h), targets, label_smoothing)

    def judge(self, h: Tensor, targets: Tensor, draws: Draws) -> dict[str, Tensor]:
        """Cross-entropy of each token, and whether the most likely one is right, [B, l] each."""
        logits = self(h)
        right = (logits.argmax(dim=-1) == targets).float()
        return {"cross_entropy": self.loss_of(logits, targets), "accuracy": right}

    def log_prob(self, h: Tensor, tokens: Tensor) -> Tensor:
        """Log-likelihood of each token in nats, [B, l]."""
        return -self.loss_of(self(h), whole_numbers(tokens, "ids"))

    @staticmethod
    def loss_of(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """The loss of given logits."""
        flat = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=label_smoothing
        )
        return flat.view(targets.shape)

    def sample(self, h: Tensor, combine: Combine, pick: Pick, generators: Generators) -> Tokens:
        """Tokens of hidden states [rows, l, D]: logits, branches combined to [B, l, V], one choice a token."""
        return pick(combine(self(h)), generators)
