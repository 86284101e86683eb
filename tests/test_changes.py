"""A changed system is a system: methods stack, are saved with it and loaded again, and keep what was set before."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import small
from test_contracts import PrefixCondition, built, probe_model, probe_system

import nextscale as ns
from nextscale.condition import Condition
from nextscale.model.text_encoders import HashWords
from nextscale.modules import replaced
from nextscale.readers import ClassReader, TensorReader
from nextscale.recipes.decoding import fastvar
from nextscale.recipes.generators import infinity, var
from nextscale.recipes.guidance import inside, negative
from nextscale.sampling.loop import stepper_of
from nextscale.system import Part, System

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


# ---- negative prompts ------------------------------------------------------------------------------------------------


class Several(PrefixCondition):
    """A text before the image; a map and a class beside it, each a part with a null of its own."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__(channels, dim)
        self.depth, self.label = torch.nn.Linear(16, dim), torch.nn.Embedding(4, dim)

    def forward(self, told):
        words, depth = super().forward(told), told["depth"]
        mapped = self.depth(depth.values.flatten(1)) * ~depth.null.view(-1, 1)
        return words.replace(depth=mapped, label=self.label(told["label"]))

    def null(self, condition):
        nothing = self.label.weight[3].expand(len(condition), -1)
        return super().null(condition).replace(depth=torch.zeros_like(condition["depth"]), label=nothing)


def several(field: str = "caption") -> System:
    """A system that is told all three; the items' `field` is the text."""
    words = HashWords(8, 6)
    words.field = field

    def composed(condition: Condition) -> Condition:
        vec = condition.vec + condition["depth"] + condition["label"]
        return condition.replace(vec=vec, start=vec.unsqueeze(1), depth=None, label=None)

    def make() -> System:
        readers = {"caption": words, "depth": TensorReader("depth", (1, 4, 4)), "label": ClassReader((), 3)}
        return probe_system(model=probe_model(conditioner=Several(8, 16), compose=composed), readers=readers)

    return built(make)


@pytest.mark.parametrize("field", ["caption", "prompt"])
def test_a_negative_prompt_leaves_the_nulls_of_all_else(field):
    system = several(field)
    told = {"caption": ["red apple", None], "depth": [torch.ones(1, 4, 4), None], "label": [1, 2]}
    changed = negative.with_negative(system, "the flag of a far away land")
    condition = changed.condition(told)
    null, plain = changed.model.conditioner.null(condition), system.model.conditioner.null(condition)
    other = system.condition({"caption": ["the flag of a far away land"] * 2})
    assert torch.equal(null["prefix"], other["prefix"]) and not torch.equal(null["prefix"], plain["prefix"])
    assert torch.equal(null.masks["prefix"], other.masks["prefix"])
    for name in ("depth", "label", "vec", "start"):
        assert torch.equal(null[name], plain[name]), name
    seen = []
    record = lambda logits, generators: (seen.append(logits), ns.greedy(logits, generators))[1]  # noqa: E731
    for guided in (system, changed):
        ns.sample(guided, told, pick=record)
    torch.testing.assert_close(
        seen[0], seen[3], atol=1e-6, rtol=0
    )  # a null of another length rounds otherwise on some CPUs
    assert (seen[2] - seen[5]).abs().max() > 1e-3  # the guidance is a ramp
    images = ns.sample(changed, told, seed=[4, 5])
    for i in range(2):  # law 5
        alone = {name: values[i : i + 1] for name, values in told.items()}
        torch.testing.assert_close(ns.sample(changed, alone, seed=4 + i), images[i : i + 1], atol=1e-4, rtol=0)


def test_negative_prompts_are_one_or_one_for_each_image(plain):
    each = negative.with_negative(plain, ["blurred, ugly", "", "dark"])
    images = draw(each)
    for prompts in (["a", "b"], ["a", "b", "c", "d"]):
        with pytest.raises(ValueError, match=f"one negative prompt, or one for each of 3 images, got {len(prompts)}"):
            draw(negative.with_negative(plain, prompts))
    with pytest.raises(ValueError, match="one for each of 1 images, got 3"):
        draw(each, ["a red apple"])
    for i, prompt in enumerate(("blurred, ugly", "", "dark")):
        one = ns.sample(negative.with_negative(plain, prompt), TOLD[i : i + 1], seed=3 + i, guidance=ns.cfg(3.0))
        torch.testing.assert_close(one, images[i : i + 1], atol=1e-4, rtol=0)
    assert torch.equal(draw(negative.with_negative(plain, "")), draw(plain))  # no text


def test_who_is_told_no_texts_has_no_use_for_a_negative_prompt(classes):
    maps = {"depth": TensorReader("depth", (1, 4, 4))}
    for system in (classes, built(lambda: probe_system(readers=maps))):
        with pytest.raises(ValueError, match="no use for a negative prompt"):
            negative.with_negative(system, "dark")


# ---- what is saved -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pruned", "inside"])
def test_parts_that_were_exchanged_after_a_change_are_not_saved_as_if_they_were_not(classes, tmp_path, name):
    other = var.build(small(), seed=2)
    systems = {}
    for part in ("tokenizer", "model"):
        systems[part] = METHODS[name](classes)
        setattr(systems[part], part, getattr(other, part))
    without = METHODS[name](classes)
    without.model = None
    base = METHODS[name](copied := classes.with_model(classes.model))  # here the system before gets another one
    copied.tokenizer = other.tokenizer
    head = METHODS["pruned"](classes)
    head.model.head = other.model.head
    given = METHODS[name](classes).with_model(other.model)
    for part, system in (*systems.items(), ("model", without), ("tokenizer", base), ("model", head), ("model", given)):
        with pytest.raises(ValueError, match=f"the {part} of this system is not the one that .* changed"):
            ns.save(system, tmp_path / "s")
    assert not (tmp_path / "s").exists()
    right = METHODS[name](copied)
    assert torch.equal(draw(ns.load(ns.save(right, tmp_path / "s")), [0, 1]), draw(right, [0, 1]))


def test_methods_may_leave_out_weights_or_bring_some(classes, tmp_path):
    shorter = classes.changed("inside", inside.Config(), model=classes.model.with_blocks(classes.model.blocks[:1]))
    wider = classes.changed("inside", inside.Config(), model=replaced(classes.model, more=torch.nn.Linear(2, 2)))
    for system in (shorter, wider, METHODS["pruned"](classes).half_(torch.float32).to("cpu")):
        ns.save(system, tmp_path / "s")


@pytest.mark.parametrize("name", ["model", "tokenizer", "Model", "my-teacher", "a.b", "", "../up", "items"])
def test_names_of_parts_that_make_no_file_of_their_own(name):
    with pytest.raises(ValueError, match="a part needs a name of its own"):
        probe_system(parts={name: Part(torch.nn.Linear(2, 2))})
    with pytest.raises(ValueError, match="'Teacher'"):
        probe_system(parts={"teacher": Part(torch.nn.Linear(2, 2)), "Teacher": Part(torch.nn.Linear(2, 2))})


def test_parts_are_modules_with_a_role():
    with pytest.raises(ValueError, match="one of trained, frozen, external, got 'froze"):
        Part(torch.nn.Linear(2, 2), "frozens")
    with pytest.raises(ValueError, match="expected a torch module"):
        Part(len)


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
        config = json.loads((shipped / "config.json").read_text())
        assert "changes" not in config and set(config["digests"]) == set(config["parts"])


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
