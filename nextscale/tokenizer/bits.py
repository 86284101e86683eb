"""The pyramid of bits: multi-scale binary spherical quantization, as in Infinity."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.contracts import Corrupt, Encoded, Kept, Kind, Lesson, TokenType
from nextscale.schedule import Schedule
from nextscale.tokenizer.maps import Step, as_map, as_rows, encoded, straight_through
from nextscale.tokens import Soft, Tokens, whole_numbers


class BitPyramid(nn.Module):
    """A feature map is the sum of K enlarged maps whose values are bits: +-1 / sqrt(d) in each of d channels.

    There is no codebook and no convolution: at each scale the residual, pooled and scaled to unit length, is replaced by
    the nearest corner of a cube, which is its signs (binary spherical quantization). Token maps are uint8 [B, l_k, C] of 0
    and 1, or soft weights of both (`Soft`, [B, l_k, C, 2]).

    Args:
        bits: d, the bits of a vector.
        fold: side of the squares of vectors that make one token. The feature map, the sum and the inputs hold such a
            square in C = d * fold * fold channels (channel, row, column; what `pixel_unshuffle` does), and the pyramid
            works on the unfolded map, which is `fold` times as high and wide as the schedule says.
    """

    kind: Kind = "bits"
    token_type: TokenType = None

    def __init__(self, bits: int, fold: int = 1) -> None:
        super().__init__()
        self.bits, self.fold = bits, fold
        self.code_dim, self.codes = bits * fold * fold, 2

    # ---- sampling, and encoding ----------------------------------------------------------------------------------

    def start(self, batch: int, schedule: Schedule, device: torch.device | str | None = None) -> Tensor:
        """The empty sum, zeros float32 [B, C, H, W] at the size of the last scale; on the CPU if nothing else is said."""
        return torch.zeros(batch, self.code_dim, *schedule[-1], device=device or "cpu")

    def add(self, f_hat: Tensor, tokens: Tokens, k: int, schedule: Schedule) -> Tensor:
        """The sum after scale k: `f_hat` [B, C, H, W] plus the enlarged token map."""
        return f_hat + self.contribution(tokens, k, schedule)

    def next_input(self, f_hat: Tensor, k: int, schedule: Schedule) -> Tensor:
        """What the transformer reads at scale k >= 1: the sum so far, reduced to that scale. [B, l_k, C].

        Reduced linearly, without averaging over what lies between: that is how Infinity was trained and is sampled. (Its
        quantizer returns inputs made by averaging as well, which nothing uses.)
        """
        return as_rows(self._resized(f_hat, schedule[k]))

    def encode(self, f: Tensor, schedule: Schedule, corrupt: Corrupt | None = None) -> Encoded:
        """Tokens, teacher-forcing inputs and running sums of a feature map [B, C, H, W].

        `corrupt(tokens, k)` may replace the tokens that enter the sum; those returned are the true ones of a residual
        that contains all earlier replacements.
        """
        return encoded(self, self.walk(f, schedule, corrupt), schedule)

    def choices(self, tokens: Tokens) -> Tensor:
        """The tokens, which are bits."""
        return whole_numbers(tokens, "bits")

    def limit(self, k: int) -> int:
        """Values of a token's bit at scale k: all two."""
        return self.codes

    def check_scales(self, schedule: Schedule, trained: Schedule) -> None:
        """It works with any scales."""

    # ---- training ------------------------------------------------------------------------------------------------

    def learn(self, f: Tensor, schedule: Schedule, keep: Kept, *, beta: float = 0.25, entropy: float = 0.001) -> Lesson:
        """Quantize `f` for training the tokenizer; `keep` drops scales from sum and residual.

        The loss pulls residuals of unit length to their bits, `beta` times, and `entropy` times wants every bit sure of its
        value and both values used alike. Unlike VAR's, the residual is not detached. All as in BitVAE, which trained
        Infinity's tokenizers; its loss counts four times, 0.1 / 100 is `entropy`. How alike is judged on the images at hand,
        be they a part of a batch.
        """
        self._check(f, schedule)
        kept = keep.own.to(f.device)
        tokens: list[Tokens] = []
        residuals: list[Tensor] = []
        residual, loss = f, f.new_zeros(())
        f_hat = self.start(len(f), schedule, f.device)
        for k in range(len(schedule)):
            folded = self._averaged(residual, schedule[k])
            small = F.pixel_shuffle(folded, self.fold)  # [B, d, fold * h_k, fold * w_k]
            z = F.normalize(small, dim=1)
            bits = (small > 0).to(torch.uint8)
            codes = self.codes_of(bits)
            loss = loss + beta * (codes - z).square().mean() + entropy * self._indecision(z)
            h = self._resized(F.pixel_unshuffle(straight_through(z, codes), self.fold), schedule[-1])
            h = h * kept[:, k].view(-1, 1, 1, 1)
            residual, f_hat = residual - h, f_hat + h
            tokens.append(as_rows(F.pixel_unshuffle(bits, self.fold)))
            residuals.append(as_rows(folded.detach()))
        return Lesson(tokens, residuals, f_hat, loss / len(schedule))

    def upkeep(self) -> None:
        """There are no codes to keep in use."""
        return None

    def _indecision(self, z: Tensor) -> Tensor:
        """Entropy of the bits of a vector minus that of all vectors' mean bits, summed over the d; z [B, d, h, w]."""
        logits = 4 * 100 / math.sqrt(self.bits) * z
        each = F.softplus(logits) - logits * logits.sigmoid()  # the entropy, whose gradient stays finite
        share = logits.sigmoid().mean(dim=(0, 2, 3)).clamp(1e-6, 1 - 1e-6)
        together = torch.special.entr(share) + torch.special.entr(1 - share)
        return each.sum(dim=1).mean() - together.sum()

    # ---- the pieces -----------------------------------------------------------------------------------------------

    def walk(self, f: Tensor, schedule: Schedule, corrupt: Corrupt | None = None) -> Iterator[Step]:
        """Quantize `f` scale by scale (Alg. 1 of VAR, with bits for codes). Nothing carries gradients."""
        self._check(f, schedule)
        residual = f.detach()
        f_hat = self.start(len(f), schedule, f.device)
        for k in range(len(schedule)):
            small = as_rows(self._averaged(residual, schedule[k]))  # [B, l_k, C]
            tokens = (small > 0).to(torch.uint8)  # scaling to unit length would not change a sign; zero is bit 0
            h = self.contribution(tokens if corrupt is None else corrupt(tokens, k), k, schedule)
            residual, f_hat = residual - h, f_hat + h
            yield Step(tokens, f_hat, small)

    def contribution(self, tokens: Tokens, k: int, schedule: Schedule) -> Tensor:
        """What the token map of scale k adds to the sum, [B, C, H, W]."""
        return self._resized(as_map(self.codes_of(tokens), schedule[k]), schedule[-1])

    def codes_of(self, tokens: Tokens) -> Tensor:
        """Bits [..., C] of 0 and 1, or soft weights of both, to values [..., C] of -+1 / sqrt(d)."""
        if isinstance(tokens, Soft):
            signs = tokens.weights[..., 1] - tokens.weights[..., 0]
        else:
            signs = whole_numbers(tokens, "bits").float() * 2 - 1
        return signs / math.sqrt(self.bits)

    def _resized(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Folded maps [B, C, h, w] to another size: linear, half-pixel centres, no antialias."""
        if tuple(x.shape[-2:]) == size:
            return x
        x = F.pixel_shuffle(x, self.fold)  # [B, d, fold * h, fold * w]
        x = F.interpolate(x, size=(size[0] * self.fold, size[1] * self.fold), mode="bilinear")
        return F.pixel_unshuffle(x, self.fold)

    def _averaged(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        if tuple(x.shape[-2:]) == size:
            return x
        x = F.pixel_shuffle(x, self.fold)
        return F.pixel_unshuffle(F.adaptive_avg_pool2d(x, (size[0] * self.fold, size[1] * self.fold)), self.fold)

    def _check(self, f: Tensor, schedule: Schedule) -> None:
        if tuple(f.shape[1:]) != (self.code_dim, *schedule[-1]):
            raise ValueError(
                f"expected a feature map [B, {self.code_dim}, {schedule[-1][0]}, {schedule[-1][1]}], as large as the last "
                f"scale of the schedule, got {list(f.shape)}; use images of the size that fits the schedule"
            )
