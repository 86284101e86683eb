"""A trained generator learns a further class: the old ones stay, adapters start as nothing and end in plain weights."""

import json

import pytest
import torch
from small import small
from test_training import CONFIG, Squares, weights

import nextscale as ns
from nextscale.recipes.generators import infinity, var
from nextscale.training.config import GeneratorLoss
from nextscale.training.finetune import Relabelled, add_lora, merge_lora, with_classes


def test_further_classes_leave_the_others_as_they_are():
    system = var.build(small(num_classes=3, classes=("a", "b", "c")), seed=1)
    longer = with_classes(system, ["b", "d", "d", "e"])
    assert longer.classes == ("a", "b", "c", "d", "e") and longer.config.num_classes == 5
    assert torch.equal(ns.sample(longer, ["a", "b", None], seed=3), ns.sample(system, ["a", "b", None], seed=3))
    table = longer.model.conditioner.embedding.weight
    assert torch.equal(table[3], table[4]) and torch.allclose(table[3], table[:3].mean(dim=0))
    assert system.config.num_classes == 3 and system.model is not longer.model
    with pytest.raises(ValueError, match="told texts"):
        with_classes(infinity.build(infinity.tiny()), ["cat"])


def test_relabelled_items_have_the_numbers_of_the_system():
    data = Relabelled(Squares(4), [5, 7, 9])
    assert [data[i]["label"] for i in range(4)] == [5, 7, 9, 5] and data[1]["labels"] == (7,)


@pytest.mark.parametrize("recipe", [var, infinity])
def test_adapters_start_as_nothing_train_alone_and_are_merged(recipe):
    pytest.importorskip("peft", reason="needs the extra nextscale[lora]")
    system = recipe.build(recipe.tiny(), seed=1)
    labels = ["cat", "dog"] if "caption" in system.readers else [0, 1]
    tokens = ns.encode(system, torch.randn(2, 3, *system.image_size).clamp(-1, 1))
    plain, names = ns.logits(system, tokens, labels), set(system.model.state_dict())
    add_lora(system.model, 2)
    torch.testing.assert_close(ns.logits(system, tokens, labels), plain)
    trained = {name for name, parameter in system.model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name or name.startswith("conditioner.") for name in trained)
    for layer in ("qkv", "proj", "fc1", "fc2"):
        assert any(f".{layer}.lora_" in name for name in trained)
    with torch.no_grad():
        for name, parameter in system.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    adapted = ns.logits(system, tokens, labels)
    assert (adapted - plain).abs().max() > 0.01
    merge_lora(system.model)
    assert set(system.model.state_dict()) == names
    assert all(parameter.requires_grad for parameter in system.model.parameters())
    torch.testing.assert_close(ns.logits(system, tokens, labels), adapted, atol=1e-4, rtol=1e-4)


def test_a_run_with_adapters_resumes_and_saves_a_plain_system(tmp_path):
    pytest.importorskip("peft", reason="needs the extra nextscale[lora]")
    system = var.build(small(num_classes=3), seed=1)
    before = system.model.blocks[0].branches[0].layer.proj.bias.clone()
    config = CONFIG.model_copy(update={"lr": 1e-2})
    trained = ns.train_model(system, Squares(), config, out=tmp_path, lora=2)
    assert torch.equal(trained.model.blocks[0].branches[0].layer.proj.bias, before)  # frozen
    assert torch.equal(weights(ns.load(tmp_path / "system")), weights(trained))
    again = ns.train_model(var.build(small(num_classes=3), seed=1), Squares(), config, out=tmp_path, lora=2)
    torch.testing.assert_close(weights(again), weights(trained), atol=1e-6, rtol=0)


@pytest.mark.slow
def test_a_new_class_is_learned_from_eight_images(tmp_path):
    """Of emoji-64, with adapters of rank 8: the class's own loss halves, those of the others stay."""
    pytest.importorskip("peft", reason="needs the extra nextscale[lora]")
    system = ns.load("emoji-64")
    drawings = Squares(8, size=64)  # nothing that OpenMoji has: coloured squares, here all of one class
    system = with_classes(system, ["square"])
    number = system.classes.index("square")
    data = Relabelled(drawings, [number] * 3)
    config = CONFIG.model_copy(
        update={"steps": 40, "batch_size": 8, "lr": 3e-3, "validate_every": 40, "save_every": 40}
    )
    images = torch.stack([item["image"] for item in drawings.items])
    tokens, labels = ns.encode(system, images), [number] * 8

    def loss(system):
        logits = ns.logits(system, tokens, labels)
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.cat(tokens, 1).flatten()))

    before = loss(system)
    trained = ns.train_model(system, data, config, out=tmp_path, lora=8, loss=GeneratorLoss(drop_condition=0.1))
    assert loss(trained) < 0.5 * before
    assert json.loads((tmp_path / "run.json").read_text())["kind"] == "generator"
