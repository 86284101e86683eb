"""The system that most tests build: the recipe's tiny one at half the size, 32x32 pixels, and with few classes."""

import torch

from nextscale.draws import BatchPart, Draws
from nextscale.recipes.generators import var
from nextscale.tokenizer.autoencoder import AutoencoderSettings

AUTOENCODER = AutoencoderSettings(width=16, multipliers=(1, 1), patch=4, blocks=1, groups=8)


def small(**changes: object) -> var.Config:
    """Like `var.tiny`."""
    return var.tiny(**{"autoencoder": AUTOENCODER, "num_classes": 5} | changes)


def parts(batch, seed=0):
    """A whole batch as the one part that a process alone gets, for `task.step`."""
    first = next(iter(batch.values()))
    return [BatchPart(batch, Draws(torch.Generator().manual_seed(seed), len(first)))]
