"""`nextscale push`: a system on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

import nextscale as ns
from nextscale.cli.methods import Methods, load_changed


def push(
    system: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SYSTEM")],
    repo: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OWNER/NAME")],
    report: Path | None = None,
    license: str = "",
    private: bool = False,
    revision: Annotated[str, tyro.conf.arg(help_behavior_hint="(default: the main branch)")] = "",
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    methods: Methods = (),
) -> None:
    """Push a system to the Hugging Face hub, with a model card.

    Try: nextscale push runs/generator me/my-emoji --report runs/report --license cc-by-4.0

    Then, anywhere: nextscale sample --system me/my-emoji

    The card is that of the system's folder, or, with --report or --license or where there is none, one made of what the
    training and the report left. `hf auth login` keeps the hub's token; HF_TOKEN is another way. The last line is the address.

    Args:
        system: shipped name, folder (of a system or a training), or hub name
        repo: the repository, which is made if it is not there
        report: folder of `nextscale evaluate`, whose scores the card shows
        license: of the weights, as the hub names it (cc-by-4.0, mit)
        private: of a repository that is made
        revision: branch to push to
        dtype: number format of the files
    """
    import torch

    from nextscale.checkpoint import find_folder
    from nextscale.sharing import card_of_folder

    loaded = load_changed(system, "cpu", methods)
    card = card_of_folder(loaded, find_folder(system), repo, report=report, licence=license)
    kind = None if dtype == "float32" else getattr(torch, dtype)
    print(ns.push_to_hub(loaded, repo, card=card, private=private or None, revision=revision or None, dtype=kind))
