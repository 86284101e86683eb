"""How well a tokenizer gives images back, scale by scale, and how much of its codebook each scale uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nextscale.schedule import Schedule
from nextscale.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenizerReport:
    """One entry a scale, after decoding the scales up to and including it."""

    psnr: list[float]  # dB, mean over images of the PSNR of each
    perplexity: list[float]  # exp of the entropy of the codes' shares at the scale (of bits: of their mean entropy)
    attainable: list[int]  # the largest perplexity possible: min(codes of the scale, its tokens in the data)
    used: list[float]  # share of the codebook that occurs at the scale
    mse: list[float]  # mean over images, of values in [-1, 1]

    @property
    def psnr_of_mean(self) -> list[float]:
        """PSNR in dB of the mean square error over all images; at most the mean PSNR, for bad images weigh more."""
        return _decibel(torch.tensor(self.mse, dtype=torch.double)).tolist()

    def metrics(self) -> dict[str, float]:
        """Flat names for the log."""
        lists = {"psnr": self.psnr, "perplexity": self.perplexity, "used": self.used}
        return {"psnr": self.psnr[-1]} | {f"{n}/{k}": v for n, values in lists.items() for k, v in enumerate(values)}


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image; both [B, 3, H, W] in [-1, 1] (peak 2). Returns [B]."""
    return _decibel(_mse(images, references))


def _mse(images: Tensor, references: Tensor) -> Tensor:
    return (images.clamp(-1, 1) - references).square().flatten(1).mean(dim=1)


def _decibel(mse: Tensor) -> Tensor:
    return 10 * torch.log10(4 / mse.clamp(min=1e-10))


@torch.no_grad()
def evaluate_tokenizer(
    tokenizer: Tokenizer, data: Dataset, schedule: Schedule, device: torch.device | str = "cpu", batch_size: int = 64
) -> TokenizerReport:
    """PSNR after each scale, and the use of the codebook by each, over a whole data set."""
    codes = tokenizer.pyramid.codes
    errors: list[list[Tensor]] = [[] for _ in schedule.sizes]
    counts: list[Tensor] | None = None
    images_seen = 0
    for batch in DataLoader(data, batch_size=batch_size, collate_fn=lambda items: [item["image"] for item in items]):
        images = torch.stack(batch).to(device)
        encoded = tokenizer.encode(images, schedule)
        images_seen += len(images)
        for k, f_hat in enumerate(encoded.f_hats):
            errors[k].append(_mse(at_size(tokenizer.decode(f_hat), images.shape[-2:]), images).cpu())
        found = code_counts(encoded.tokens, codes)
        counts = found if counts is None else [a + b for a, b in zip(counts, found, strict=True)]
    if counts is None:
        raise ValueError("the data has no images; nothing can be judged")
    shares = [count / count.sum(dim=1, keepdim=True) for count in counts]
    return TokenizerReport(
        psnr=[float(_decibel(torch.cat(values)).mean()) for values in errors],
        perplexity=[float(torch.special.entr(share).sum(dim=1).mean().exp()) for share in shares],
        attainable=[min(tokenizer.pyramid.limit(k), images_seen * n) for k, n in enumerate(schedule.lengths)],
        used=[float((count > 0).float().mean()) for count in counts],
        mse=[float(torch.cat(values).mean()) for values in errors],
    )


def code_counts(tokens: list[Tensor], codes: int) -> list[Tensor]:
    """How often each code occurs in the token maps of each scale, float64 [1, V]; of bits [B, l, d] each bit on its own,
    [d, 2]."""
    counts = []
    for token_map in tokens:
        columns = token_map.flatten(0, 1).long().cpu().view(token_map.shape[0] * token_map.shape[1], -1)  # [n, 1 or d]
        places = columns + codes * torch.arange(columns.shape[1])
        count = torch.bincount(places.flatten(), minlength=codes * columns.shape[1])
        counts.append(count.double().view(columns.shape[1], codes))
    return counts


def at_size(decoded: Tensor, size: Sequence[int]) -> Tensor:
    """Decoded images at the size (h, w): pyramids without a running sum decode a coarse scale to a small image."""
    if tuple(decoded.shape[-2:]) == tuple(size):
        return decoded
    return F.interpolate(decoded.clamp(-1, 1), size=tuple(size), mode="bicubic", antialias=True)
