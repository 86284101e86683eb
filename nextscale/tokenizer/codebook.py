"""The codebook: V code vectors, the search for the nearest one, and the way back."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.tokens import Soft, Tokens, whole_numbers


class Codebook(nn.Module):
    """V learned vectors of C channels.

    The search is Euclidean, or by cosine; either way the vector that is looked up is the raw one, as in VAR.
    """

    def __init__(self, codebook_size: int, code_dim: int, cosine: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(codebook_size, code_dim))
        self.cosine = cosine
        nn.init.uniform_(self.weight, -1 / codebook_size, 1 / codebook_size)

    @torch.no_grad()
    def nearest(self, x: Tensor, first: int | None = None) -> Tensor:
        """Ids of the nearest codes, or of the nearest among the `first` ones: [..., C] -> int64 [...] (Eq. 3 of VAR)."""
        # float32 whatever the caller's autocast: a rounded distance is another token
        with torch.autocast(x.device.type, enabled=False):
            rows, codes = x.reshape(-1, x.shape[-1]).float(), self.weight[:first].float()
            if self.cosine:
                ids = (F.normalize(rows, dim=-1) @ F.normalize(codes, dim=-1).T).argmax(dim=1)
            else:  # |x|^2 is the same for all codes and left out
                ids = torch.addmm(codes.square().sum(dim=1), rows, codes.T, alpha=-2).argmin(dim=1)
        return ids.view(x.shape[:-1])

    def embed(self, tokens: Tokens) -> Tensor:
        """Vectors [B, l, C] of ids [B, l], or of soft weights over the codebook."""
        return embed(tokens, self.weight)


def embed(tokens: Tokens, table: Tensor) -> Tensor:
    """Rows [B, l, C] of a table [V, C] for ids [B, l], or for soft weights over it."""
    if isinstance(tokens, Soft):
        return tokens.weights.to(table.dtype) @ table
    return F.embedding(whole_numbers(tokens, "ids"), table)


def indecision(rows: Tensor, codes: Tensor, temperature: float = 0.01) -> Tensor:
    """Entropy of a row's soft choice of codes, minus that of all rows' mean choice: a loss that wants every row sure of its
    code and all codes used alike (as in LlamaGen). rows [n, C], codes [V, C]."""
    logs = ((2 * rows @ codes.T - codes.square().sum(dim=1)) / temperature).log_softmax(dim=-1)
    shares = logs.exp()
    mean = shares.mean(dim=0)
    return (mean * (mean + 1e-5).log()).sum() - (shares * logs).sum(dim=-1).mean()
