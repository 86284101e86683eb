"""A changed system is a system: methods stack, are saved with it and loaded again, and keep what was set before."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import small

import nextscale as ns
from nextscale.recipes.decoding import fastvar
from nextscale.recipes.generators import infinity, var
from nextscale.recipes.guidance import inside, negative
from nextscale.sampling.loop import stepper_of
from nextscale.system import System

TOLD = ["a red apple", "a cat", None]
METHODS: dict[str, Callable[[System], System]] = {
    "pruned": lambda system: fastvar.apply(system, fastvar.Config(ratios=(0.5,))),
    "shorter": lambda system: fastvar.apply(system, fastvar.Config(ratios=(0.25, 1.0))),
    "inside": lambda system: inside.apply(system, inside.Config(block=0)),
    "negative": lambda system: negative.apply(system, negative.Config(prompts=("blurred, ugly",))),
}
STACKS = [
    *([name] for name in METHODS),
    *([a, b] for a in METHODS for b in METHODS if a != b and {a, b} != {"pruned", "shorter"}),
    ["negative", "shorter", "inside"],
    ["inside", "negative", "pruned"],
]


@pytest.fixture(scope="module")
def plain() -> System:
    return infinity.build(infinity.tiny(), seed=1)


@pytest.fixture(scope="module")
def classes() -> System:
    return var.build(small(), seed=1)


def stacked(system: System, names: list[str]) -> System:
    for name in names:
        system = METHODS[name](system)
    return system


def draw(system: System, told: list = TOLD) -> torch.Tensor:
    return ns.sample(system, told, seed=3, guidance=ns.cfg(3.0))


@pytest.mark.parametrize("names", STACKS, ids="+".join)
def test_a_saved_stack_draws_the_same_to_the_bit(plain, names, tmp_path):
    system = stacked(plain, names)
    again = ns.load(ns.save(system, tmp_path / "s"))
    assert torch.equal(draw(again), draw(system))
    assert [(change.recipe, change.config) for change in again.changes] == [
        (change.recipe, change.config) for change in system.changes
    ]
    assert torch.equal(draw(again.base), draw(plain)) and system.base is plain
    assert not torch.equal(draw(system), draw(plain))


@pytest.mark.parametrize("names", [names for names in STACKS if len(names) > 1], ids="+".join)
def test_the_order_of_methods_that_do_not_meet_does_not_matter(plain, names):
    """One acts on branches, one on the loop, one on the condition."""
    images = draw(stacked(plain, names))
    assert torch.equal(images, draw(stacked(plain, names[::-1])))
    for name in names:  # and each of them counts
        assert not torch.equal(images, draw(stacked(plain, [other for other in names if other != name])))


def test_what_was_loaded_can_be_changed_again(plain, tmp_path):
    loaded = ns.load(ns.save(METHODS["pruned"](plain), tmp_path / "once"))
    twice = ns.load(ns.save(METHODS["inside"](loaded), tmp_path / "twice"))
    assert torch.equal(draw(twice), draw(stacked(plain, ["pruned", "inside"])))


def test_a_method_that_knows_one_place_is_applied_once(plain):
    for name, message in {"pruned": "pruned already", "inside": "inside this system already"}.items():
        with pytest.raises(ValueError, match=message):
            stacked(plain, [name, "negative", name])
    other = negative.with_negative(METHODS["negative"](plain), "dark")  # the last one counts
    assert torch.equal(draw(other), draw(negative.with_negative(plain, "dark")))


@pytest.mark.parametrize("names", [["shorter", "inside"], ["inside", "shorter"], ["shorter", "negative"]], ids="+".join)
def test_a_left_out_scale_stays_left_out(plain, names):
    system, tokens = stacked(plain, names), []
    images = ns.sample(system, TOLD, seed=3, on_scale=lambda k, _: tokens.append(k))
    assert len(tokens) == len(plain.schedule) - 1
    state = ns.run(system, ns.start(system, TOLD, seed=3))
    assert stepper_of(system).done(system, state) and torch.equal(ns.finish(system, state), images)


def test_a_change_leaves_the_system_as_it_was(plain):
    before = draw(plain)
    for name in METHODS:
        changed = METHODS[name](plain)
        changed.model = None  # as training does for another tokenizer
        assert plain.model is not None and plain.stepper is None and not plain.changes
    assert torch.equal(draw(plain), before)


@pytest.mark.parametrize("training", [True, False])
def test_modes_are_kept(plain, training):
    plain.model.train(training)
    try:
        for names in STACKS:
            changed = stacked(plain, names)
            assert {module.training for module in changed.model.modules()} == {training}
            assert not any(module.training for module in changed.tokenizer.modules()) and not changed.training
    finally:
        plain.eval()


def test_weights_are_shared(classes):
    changed = stacked(classes, ["pruned", "inside"])
    ours = {p.data_ptr() for p in changed.parameters()}
    assert ours == {p.data_ptr() for p in classes.parameters()}
    with torch.no_grad():
        weight = classes.model.blocks[0].branches[1].layer.fc1.weight
        before, kept = draw(changed, [0, 1]), weight.clone()
        weight.mul_(1.5)
        assert not torch.equal(draw(changed, [0, 1]), before)
        weight.copy_(kept)


# ---- folders ---------------------------------------------------------------------------------------------------------


def edited(folder: Path, **values: object) -> Path:
    """The folder, with other values in its config (None: without them)."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return folder


def test_folders_of_before_load(classes, tmp_path):
    folder = edited(ns.save(classes, tmp_path / "old"), changes=None, digests=None)
    assert torch.equal(draw(ns.load(folder), [0, None]), draw(classes, [0, None]))
    for shipped in ns.shipped().values():
        assert not {"changes", "digests"} & set(json.loads((shipped / "config.json").read_text()))


@pytest.mark.parametrize("part", ["tokenizer", "model"])
def test_weights_that_are_not_those_saved_are_refused(classes, tmp_path, part):
    folder = ns.save(METHODS["pruned"](classes), tmp_path / "s")
    path = folder / f"{part}.safetensors"
    weights = load_file(path)
    name = next(iter(weights))
    weights[name].view(-1)[0] += 1  # every key and shape still fits
    save_file(weights, path)
    with pytest.raises(ValueError, match=f"{part}.safetensors is damaged"):
        ns.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": "fastvar", "config": {"ratios": [2.0]}}, "does not describe the change fastvar"),
        ({"recipe": "nothing", "config": {}}, "unknown recipe 'nothing'"),
        ({"recipe": "var", "config": {}}, "builds systems"),
        ({"recipe": "fastvar"}, "is not the config of a system"),
        ({"recipe": "inside", "config": {"block": 9}}, "blocks 0 to 1"),
    ],
)
def test_changes_that_make_no_sense_are_refused(classes, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        ns.load(edited(ns.save(classes, tmp_path / "s"), changes=[change]))
