"""Fine-tuning: a trained generator learns further classes, with all of its weights or with few (LoRA)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from nextscale.contracts import GrowingConditioner
from nextscale.modules import as_module
from nextscale.system import System, find_recipe

# Every linear layer of a block but those that make the modulation.
LAYERS = ("qkv", "q", "kv", "proj", "fc1", "fc2")


def with_classes(system: System, classes: Sequence[str]) -> System:
    """The system with further classes at the end of its own; those that it has stay as they are.

    A further class begins as the mean of all others, and the model as a copy. Raises ValueError for a system that is told
    texts.
    """
    old, reader = system.need_model(), next(iter(system.readers.values()))
    if not reader.choices or not isinstance(old.conditioner, GrowingConditioner):
        raise ValueError("this system is told texts, not classes, so it needs no further ones")
    names = tuple(str(choice) for choice in reader.choices)
    added = [name for name in dict.fromkeys(classes) if name not in names]
    new = find_recipe(system.recipe).build(system.config.for_classes((*names, *added)))
    weights = as_module(old).state_dict()
    own = {name: tensor for name, tensor in weights.items() if not name.startswith("conditioner.")}
    as_module(new.model).load_state_dict(as_module(new.model).state_dict() | own)
    new.model.conditioner.grow(old.conditioner)
    new.tokenizer = system.tokenizer
    return new


class Relabelled(Dataset[dict[str, Any]]):
    """Items of a data set whose class number i is `numbers[i]` in the system."""

    def __init__(self, data: Any, numbers: Sequence[int]) -> None:
        self.data, self.numbers = data, numbers

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._relabelled(self.data[index])

    def said(self, index: int) -> dict[str, Any]:
        """An item without its image, where the data set can say it."""
        return self._relabelled(getattr(self.data, "said", self.data.__getitem__)(index))

    def _relabelled(self, item: dict[str, Any]) -> dict[str, Any]:
        labels = tuple(self.numbers[label] for label in item["labels"])
        return item | {"label": self.numbers[item["label"]], "labels": labels}


def add_lora(model: nn.Module, rank: int) -> None:
    """Freeze a transformer but for what it is told, and put a LoRA adapter of some rank beside each linear layer of its blocks
    (Hu et al. 2022; by peft). An adapter adds nothing until it is trained."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("LoRA needs the package peft: pip install 'nextscale[lora]'") from error
    blocks: Any = model.get_submodule("blocks")
    names = sorted({name for name, _ in blocks.named_modules() if name.rpartition(".")[2] in LAYERS})
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names)
    inject_adapter_in_model(config, blocks)  # freezes what is in the blocks
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or name.startswith("conditioner."))


def merge_lora(model: nn.Module) -> None:
    """Add what the adapters learned to the weights beside them, and take the adapters out: the model is a plain one again."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, module.get_base_layer())
    model.requires_grad_(True)
