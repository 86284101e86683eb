"""A trained generator learns a further class: the old ones stay, adapters start as nothing and end in plain weights."""

import copy
import json
from dataclasses import dataclass

import pytest
import torch
from small import small
from test_training import CONFIG, Squares, weights

import nextscale as ns
from nextscale.data.dataset import Relabelled
from nextscale.model.block import AdaLNBlock
from nextscale.recipes.decoding import fastvar
from nextscale.recipes.generators import infinity, var
from nextscale.recipes.guidance import inside
from nextscale.sampling.loop import ScaleByScale
from nextscale.system import Part, System
from nextscale.training.config import GeneratorLoss
from nextscale.training.finetune import add_lora, merge_lora, with_classes


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


@dataclass(frozen=True)
class Marked(ScaleByScale):
    """A loop of one's own, with a part of one's own."""

    def finish(self, system, state):
        return super().finish(system, state) + system.parts["mark"](state.f_hat.mean()[None]).squeeze()


def test_all_but_the_classes_goes_with_a_system(tmp_path):
    parts = {"mark": Part(torch.nn.Linear(1, 1))}
    plain = var.build(small(num_classes=3, classes=("a", "b", "c")), seed=1)
    system = System(
        plain.recipe,
        plain.config,
        plain.schedule,
        plain.tokenizer,
        plain.model,
        plain.classes,
        sampling=plain.sampling,
        objective=plain.objective,
        readers=plain.readers,
        stepper=Marked(),
        parts=parts,
    )
    longer = with_classes(system, ["d"])
    assert longer.stepper == Marked() and longer.parts["mark"] is parts["mark"].module and longer.classes[-1] == "d"
    assert torch.equal(ns.sample(longer, ["a", None], seed=3), ns.sample(system, ["a", None], seed=3))
    # a recipe that no package has
    system.recipe = "elsewhere"
    assert with_classes(system, ["d"], {"elsewhere": var}).classes == longer.classes


CHANGES = {
    "fastvar": lambda system: fastvar.apply(system, fastvar.Config(ratios=(0.5,))),
    "inside": lambda system: inside.apply(system, inside.Config(block=0)),
}


@pytest.mark.parametrize("names", [["fastvar"], ["inside"], ["inside", "fastvar"]])
def test_changes_go_with_a_system_and_stay_while_it_is_trained(tmp_path, names):
    system = var.build(small(num_classes=3, classes=("a", "b", "c")), seed=1)
    for name in names:
        system = CHANGES[name](system)
    longer = with_classes(system, ["d"])
    assert [(c.recipe, c.config) for c in longer.changes] == [(c.recipe, c.config) for c in system.changes]
    assert torch.equal(ns.sample(longer, ["a", None], seed=3), ns.sample(system, ["a", None], seed=3))
    assert system.classes == ("a", "b", "c") and longer.base.classes == ("a", "b", "c", "d")
    before = weights(longer).clone()
    trained = ns.train_model(longer, Relabelled(Squares(), [3, 1, 2]), CONFIG, out=tmp_path)
    assert not torch.equal(weights(trained), before)
    again = ns.load(tmp_path / "system")
    assert [change.recipe for change in again.changes] == names
    assert torch.equal(ns.sample(again, ["d", "a"], seed=3), ns.sample(trained, ["d", "a"], seed=3))


def test_a_system_of_half_precision_grows_in_it_and_is_not_trained(tmp_path):
    system = var.build(small(num_classes=3, classes=("a", "b", "c")), seed=1).half_(torch.bfloat16)
    expected = ns.sample(system, ["a", None], seed=3)
    longer = with_classes(system, ["d"])
    assert torch.equal(ns.sample(longer, ["a", None], seed=3), expected)
    assert torch.equal(ns.sample(system, ["a", None], seed=3), expected)
    for name, tensor in system.model.state_dict().items():
        assert longer.model.state_dict()[name].dtype == tensor.dtype
    with pytest.raises(ValueError, match="needs weights in float32, got bfloat16; load the system without `dtype`"):
        ns.train_model(longer, Squares(), CONFIG, out=tmp_path)
    with pytest.raises(ValueError, match="needs weights in float32, got bfloat16"):
        ns.train_tokenizer(longer, Squares(), CONFIG, out=tmp_path)
    assert not list(tmp_path.iterdir())


class Scanned(AdaLNBlock):
    """A block with a linear layer of its own, by a name that nobody knows."""

    def __init__(self, settings, drop_path=0.0):
        super().__init__(settings, drop_path)
        self.scan = torch.nn.Linear(settings.dim, settings.dim)

    def forward(self, h, prepared, span, cache=None):
        return super().forward(h + self.scan(h), prepared, span, cache)


def test_adapters_are_beside_every_linear_layer_but_those_of_the_modulation(tmp_path):
    pytest.importorskip("peft", reason="needs the extra nextscale[lora]")
    system = var.build(small(num_classes=3), seed=1)
    settings = system.config.transformer
    system.model = system.model.with_blocks([Scanned(settings) for _ in system.model.blocks])
    before = {name: tensor.clone() for name, tensor in system.model.state_dict().items()}
    other = copy.deepcopy(system.model)
    add_lora(other, 2)
    adapted = {name.partition(".lora_A")[0] for name, _ in other.named_parameters() if ".lora_A" in name}
    linear = {name for name, module in system.model.blocks.named_modules() if isinstance(module, torch.nn.Linear)}
    assert adapted == {f"blocks.{name}" for name in linear if "modulation" not in name}
    assert any(name.endswith(".scan") for name in adapted) and any("modulation" in name for name in linear)
    ns.train_model(system, Squares(), CONFIG, out=tmp_path, lora=2)
    after = system.model.state_dict()
    assert not torch.equal(after["blocks.0.scan.weight"], before["blocks.0.scan.weight"])


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
