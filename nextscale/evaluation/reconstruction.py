"""How well a tokenizer gives content back, scale by scale, and how much of its codes each scale uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nextscale.contracts import Output, Tokenizer
from nextscale.data.dataset import collate, first_item, one_size
from nextscale.evaluation.scores import CodeUsage, code_usage
from nextscale.output import Images, decibel
from nextscale.schedule import Schedule


@dataclass(frozen=True)
class TokenizerReport:
    """One entry a scale, after decoding the scales up to and including it. Without ids or bits the last three are empty."""

    measures: dict[str, list[float]]  # means over the data of what the output measures; the first one is the score
    perplexity: list[float]  # exp of the entropy of the codes' shares at the scale (of bits: of their mean entropy)
    attainable: list[int]  # the largest perplexity possible: min(codes of the scale, its tokens in the data)
    used: list[float]  # share of the codebook that occurs at the scale
    overall: CodeUsage | None = None  # of ids: how all scales together use the codes

    @property
    def psnr(self) -> list[float]:
        """Of images: dB, mean over images of the PSNR of each."""
        return self.measures["psnr"]

    @property
    def mse(self) -> list[float]:
        """Of images: mean over images, of values in [-1, 1]."""
        return self.measures["mse"]

    @property
    def psnr_of_mean(self) -> list[float]:
        """PSNR in dB of the mean square error over all images; at most the mean PSNR, for bad images weigh more."""
        return decibel(torch.tensor(self.mse, dtype=torch.double)).tolist()

    def metrics(self) -> dict[str, float]:
        """Flat names for the log; the first one is the score after the last scale."""
        score = next(iter(self.measures))
        lists = self.measures | {"perplexity": self.perplexity, "used": self.used}
        flat = {f"{name}/{k}": value for name, values in lists.items() for k, value in enumerate(values)}
        return {score: self.measures[score][-1]} | flat


@torch.no_grad()
def evaluate_tokenizer(
    tokenizer: Tokenizer,
    data: Dataset,
    schedule: Schedule,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    output: Output = Images(),
    decoded: Sequence[int] | None = None,
) -> TokenizerReport:
    """Measures after each scale, and the use of the codes by each, over a whole data set; `output`: what its content is.

    `decoded`: the scales that are decoded and measured; default: all, whose codes are counted in any case.
    """
    if not hasattr(tokenizer, "pyramid"):
        raise TypeError(f"expected a tokenizer, got {type(tokenizer).__name__}; a system's is system.tokenizer")
    field = output.field
    content = first_item(data, field)[field]
    if field == "image" and content.ndim != 3:
        raise ValueError(f"expected images [C, H, W], got some of {list(content.shape)}")
    pyramid = tokenizer.pyramid
    measured = range(len(schedule)) if decoded is None else decoded
    found: list[dict[str, list[Tensor]]] = [{} for _ in measured]
    counts: list[Tensor] = []
    seen = 0
    for batch in DataLoader(
        data, batch_size=batch_size, collate_fn=lambda items: collate([{field: item[field]} for item in items])
    ):
        content = one_size(batch[field], field).to(device)
        if not content.isfinite().all():
            raise ValueError(f"the data have {field}s that are not finite (NaN or inf); take them out")
        encoded = tokenizer.encode(content, schedule)
        seen += len(content)
        for place, k in enumerate(measured):
            result = output.finish(output.fit(tokenizer.decode(encoded.f_hats[k]), content))
            for name, values in output.measure(result, content).items():
                found[place].setdefault(name, []).append(values.cpu())
        choices = [pyramid.choices(token_map) for token_map in encoded.tokens]
        new = code_counts([choice for choice in choices if choice is not None], pyramid.codes)
        counts = [a + b for a, b in zip(counts, new, strict=True)] if counts else new
    if not seen:
        raise ValueError("the data has no images; nothing can be judged")
    shares = [count / count.sum(dim=1, keepdim=True) for count in counts]
    return TokenizerReport(
        measures={name: [float(torch.cat(of_scale[name]).mean()) for of_scale in found] for name in found[0]},
        perplexity=[float(torch.special.entr(share).sum(dim=1).mean().exp()) for share in shares],
        attainable=[min(pyramid.limit(k), seen * n) for k, n in enumerate(schedule.lengths)] if counts else [],
        used=[float((count > 0).float().mean()) for count in counts],
        overall=code_usage(torch.cat(counts).numpy()) if counts and all(len(count) == 1 for count in counts) else None,
    )


def code_counts(choices: Sequence[Tensor], codes: int) -> list[Tensor]:
    """How often each code occurs in the token maps of each scale, float64 [1, V]; of bits [B, l, d] each bit on its own,
    [d, 2]."""
    counts = []
    for chosen in choices:
        columns = chosen.flatten(0, 1).long().cpu().view(chosen.shape[0] * chosen.shape[1], -1)  # [n, 1 or d]
        places = columns + codes * torch.arange(columns.shape[1])
        count = torch.bincount(places.flatten(), minlength=codes * columns.shape[1])
        counts.append(count.double().view(columns.shape[1], codes))
    return counts
