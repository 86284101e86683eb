"""Fine-tuning: a trained generator learns further classes, with all of its weights or with few (LoRA)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from nextscale.contracts import GrowingConditioner
from nextscale.extras import need
from nextscale.modules import as_module, replaced
from nextscale.system import System, find_method, find_recipe


def with_classes(system: System, classes: Sequence[str], recipes: Mapping[str, Any] | None = None) -> System:
    """The system with further classes at the end of its own; those that it has stay as they are, and so does all else: the
    tokenizer, further parts and the loop are shared, and methods that changed it change the new one.

    A further class begins as the mean of all others, and the model as a copy. `recipes`: as for `ns.load`. Raises ValueError
    for a system that is told texts.
    """
    base, recipes = system.base, recipes or {}
    old, (primary, reader) = base.need_model(), next(iter(base.readers.items()))
    if not reader.choices or not isinstance(old.conditioner, GrowingConditioner):
        raise ValueError("this system is told texts, not classes, so it needs no further ones")
    names = tuple(str(choice) for choice in reader.choices)
    added = [name for name in dict.fromkeys(classes) if name not in names]
    builder = recipes.get(base.recipe) or find_recipe(base.recipe)
    built = builder.build(base.config.for_classes((*names, *added)))
    model = as_module(built.model)
    _move_like(model, as_module(old))
    weights = as_module(old).state_dict()
    own = {name: tensor for name, tensor in weights.items() if not name.startswith("conditioner.")}
    model.load_state_dict(model.state_dict() | own)
    built.model.conditioner.grow(old.conditioner)
    new: System = replaced(base, model=model.train(as_module(old).training))
    new.config, new.classes = built.config, built.classes
    new.readers = {**base.readers, primary: built.readers[primary]}
    for change in system.changes:
        new = (recipes.get(change.recipe) or find_method(change.recipe)).apply(new, change.config)
    return new


def take_autoencoder(tokenizer: Any, other: Any, name: str = "the other tokenizer") -> None:
    """Copy the encoder and the decoder of a trained tokenizer into one of another quantizer, with the convolutions around it
    where both have such. Raises ValueError if their shapes differ."""
    for part in ("encoder", "decoder", "quant_conv", "post_quant_conv"):
        mine, theirs = getattr(tokenizer, part, nn.Identity()), getattr(other, part, nn.Identity())
        shapes = [{key: tuple(value.shape) for key, value in one.state_dict().items()} for one in (mine, theirs)]
        if shapes[0] != shapes[1] and (part in ("encoder", "decoder") or all(shapes)):
            raise ValueError(
                f"the {part.replace('_', ' ')} of {name} has another shape; give this tokenizer its settings of the autoencoder"
            )
        if shapes[0] == shapes[1]:
            mine.load_state_dict(theirs.state_dict())


def _move_like(module: nn.Module, other: nn.Module) -> None:
    """Give each tensor of a module the device and the dtype that the one of this name has in another."""
    places = dict(itertools.chain(other.named_parameters(), other.named_buffers()))
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        if name in places:
            tensor.data = tensor.data.to(places[name])


def add_lora(model: nn.Module, rank: int) -> None:
    """Freeze a transformer but for what it is told, and put a LoRA adapter of some rank beside each linear layer of its blocks
    but those of their modulation (Hu et al. 2022; by peft). An adapter adds nothing until it is trained."""
    need("lora", "training adapters (LoRA)")
    from peft import LoraConfig, inject_adapter_in_model

    blocks: Any = model.get_submodule("blocks")
    names = sorted(
        name
        for name, module in blocks.named_modules()
        if isinstance(module, nn.Linear) and "modulation" not in name.split(".")
    )
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
