"""What is told of images: readers by name, conditions with open parts, their nulls, dropping and guidance."""

import numpy as np
import pytest
import torch
from small import small
from torch import nn

import nextscale as ns
from nextscale.condition import Condition
from nextscale.draws import Draws
from nextscale.model.class_condition import ClassCondition
from nextscale.model.transformer import Transformer
from nextscale.readers import ClassReader, Given, TensorReader
from nextscale.recipes.generators import infinity, var
from nextscale.recipes.guidance.negative import with_negative
from nextscale.sampling.defaults import SamplingDefaults
from nextscale.sampling.guidance import Guidance
from nextscale.system import System
from nextscale.training.config import GeneratorLoss
from nextscale.training.finetune import with_classes
from nextscale.training.objective import dropped

CLASSES = ("cat", "dog", "horse")
STYLES = ("ink", "oil")


class LabelAndStyle(nn.Module):
    """Two parts, each with its own null; `compose` adds them up. A map, if there is one, is averaged to a third."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.label, self.style = (ClassCondition(n, dim, name) for n, name in ((3, "label"), (2, "style")))
        self.mean = nn.Linear(3, dim)
        self.no_map = nn.Parameter(torch.zeros(dim))

    def forward(self, told) -> Condition:
        given = told["map"]
        mean = self.mean(given.values.mean(dim=(2, 3)))
        view = torch.where(given.null[:, None], self.no_map, mean)
        return Condition(label=self.label(told).vec, style=self.style(told).vec, map=view)

    def null(self, condition: Condition) -> Condition:
        label, style = self.label.null(condition).vec, self.style.null(condition).vec
        return Condition(label=label, style=style, map=self.no_map.expand(len(condition), -1))


def compose(condition: Condition) -> Condition:
    vec = condition["label"] + condition["style"] + condition["map"]
    return condition.replace(start=vec.unsqueeze(1), vec=vec)


class Composing(Transformer):
    """As a transformer with `compose`."""

    def prepare(self, condition: Condition):
        return super().prepare(compose(condition))


def several() -> System:
    """A system that is told a label, a style and a map."""
    plain = var.build(small(num_classes=3, classes=CLASSES), seed=1)
    config = plain.config
    model = Composing(
        config.transformer,
        config.pyramid.code_dim,
        LabelAndStyle(config.transformer.dim),
        plain.model.positions,
        plain.model.head,
    )
    model.reset_parameters(torch.Generator().manual_seed(3))
    readers = {
        "label": ClassReader(CLASSES, 3),
        "style": ClassReader(STYLES, 2, field="style"),
        "map": TensorReader("map", (3, 8, 8)),
    }
    return System(
        plain.recipe,
        config,
        plain.schedule,
        plain.tokenizer,
        model,
        CLASSES,
        sampling=plain.sampling,
        objective=plain.objective,
        readers=readers,
    )


def items(count: int = 8) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "image": torch.rand(3, 32, 32, generator=generator) * 2 - 1,
            "label": CLASSES[i % 3],
            "style": None if i % 4 == 3 else i % 2,
            "map": None if i == 2 else torch.rand(3, 8, 8, generator=generator),
            "mirror_ok": True,
        }
        for i in range(count)
    ]


# ---- readers ----------------------------------------------------------------------------------------------------------


def test_classes_are_names_numbers_of_any_kind_or_none():
    read = ClassReader(CLASSES, 3)
    said = ["dog", 0, None, np.int64(2), torch.tensor(1), 3, np.str_("cat")]
    assert read(said).tolist() == [1, 0, 3, 2, 1, 3, 0]
    assert list(read.choices) == list(CLASSES) and list(ClassReader((), 2).choices) == [0, 1]
    for wrong, words in (("dig", "did you mean 'dog'"), (4, "from 0 to 2"), (-1, "from 0 to 2"), (1.5, "got 1.5")):
        with pytest.raises(ValueError, match=words):
            read.check([wrong])


def test_tensors_are_stacked_and_missing_ones_are_marked():
    read = TensorReader("view", (2, 3))
    given = read([torch.ones(2, 3), None, np.full((2, 3), 2.0)])
    assert given.null.tolist() == [False, True, False] and given.values.dtype == torch.float32
    assert given.values.flatten(1).mean(1).tolist() == [1, 0, 2]
    again = given.listed()
    assert again[1] is None and torch.equal(again[2], given.values[2])
    with pytest.raises(ValueError, match=r"view: expected tensors \[2, 3\].* \[3\]"):
        read([torch.ones(3)])
    with pytest.raises(ValueError, match="expected a tensor"):
        read(["a word"])


def test_numbers_of_numpy_and_torch_are_labels_and_seeds():
    system = var.build(small(num_classes=3, classes=CLASSES), seed=1)
    expected = ns.sample(system, [1, 2], seed=3)
    for labels in (np.array([1, 2]), torch.tensor([1, 2]), [np.int64(1), torch.tensor(2)], np.array(["dog", "horse"])):
        for seed in (np.int64(3), torch.tensor(3), [3, 4], np.array([3, 4]), torch.tensor([3, 4])):
            assert torch.equal(ns.sample(system, labels, seed=seed), expected)


def test_what_is_left_out_says_nothing_and_one_value_is_for_all():
    system = several()
    told = system.told({"style": "oil", "label": ["cat", None]})
    assert told == {"label": ["cat", None], "style": ["oil", "oil"], "map": [None, None]}
    assert system.told(["cat", "dog"]) == {"label": ["cat", "dog"], "style": [None] * 2, "map": [None] * 2}
    assert system.told("cat", 3)["label"] == ["cat"] * 3
    with pytest.raises(ValueError, match="told 'label' and 'style' and 'map', got 'colour'"):
        system.told({"colour": "red"})
    with pytest.raises(ValueError, match=r"each of 3 images, got 2 \(label\) and 3 \(style\)"):
        system.told({"label": ["cat", "dog"], "style": [0, 1, 0]})
    with pytest.raises(ValueError, match="unknown label 'dig'"):
        ns.sample(system, {"label": ["dig"]})


def test_a_tensor_alone_is_for_all_rows_too():
    system = several()
    one = torch.rand(3, 8, 8)
    for value in (one, one.numpy(), one.tolist()):
        told = system.told({"label": [0, 1, 2], "map": value})
        assert len(told["map"]) == 3
        assert torch.equal(system.readers["map"](told["map"]).values, one.expand(3, -1, -1, -1))
    rows = [one, None, one]
    for values in (rows, one.expand(3, -1, -1, -1), [one.tolist()] * 3):
        assert len(system.told({"label": "cat", "map": values})["map"]) == 3
    assert system.told({"label": ["cat", "dog"], "map": [None, None]})["map"] == [None, None]
    assert ns.sample(system, {"label": [0, 1, 2], "map": one}).shape == (3, 3, 32, 32)
    with pytest.raises(ValueError, match=r"got 3 \(label\) and 2 \(map\)"):
        system.told({"label": [0, 1, 2], "map": [one, one]})
    for wrong in (torch.tensor(1.0), 1.0, object(), "word"):
        with pytest.raises(ValueError, match="map: expected"):
            system.check_told({"label": "cat", "map": wrong})
    with pytest.raises(ValueError, match="a class is told by its name"):
        system.check_told(object())
    assert system.told(np.array("cat"))["label"] == ["cat"]
    number = TensorReader("speed", (2,))
    system.readers["speed"] = number
    assert system.told({"label": [0, 1, 2], "speed": [0.1, 0.2]})["speed"] == [(0.1, 0.2)] * 3
    assert system.told({"label": "cat", "speed": [None, None]})["speed"] == [None, None]


@pytest.mark.parametrize("nothing", [[], (), np.zeros(0, int), {"label": []}, {"label": "cat", "map": []}])
def test_an_empty_list_is_refused(nothing):
    with pytest.raises(ValueError, match=r"expected one (label|map), or one for each image, got an empty list"):
        ns.sample(several(), nothing)


@pytest.mark.parametrize("seed", [1.5, None, [0.5, 1.5], "one"])
def test_seeds_are_whole_numbers(seed):
    with pytest.raises(ValueError, match="seed: expected a whole number, or one for each image, got"):
        ns.sample(several(), ["cat", "dog"], seed=seed)


def test_tensors_with_a_gradient_or_of_half_precision_are_read():
    read = TensorReader("view", (2,))
    given = read([torch.ones(2, requires_grad=True), torch.full((2,), 2.0, dtype=torch.bfloat16)])
    assert given.values.tolist() == [[1, 1], [2, 2]] and not given.values.requires_grad


# ---- conditions -------------------------------------------------------------------------------------------------------


def test_a_part_and_its_mask_are_one():
    mask = torch.tensor([[True, True], [True, False]])
    condition = Condition({"words": mask}, words=torch.ones(2, 2, 4), vec=torch.ones(2, 3), nothing=None)
    null = Condition({"words": ~mask}, words=torch.zeros(2, 2, 4), vec=torch.zeros(2, 3))
    assert set(condition.parts()) == {"words", "vec"} and "nothing" not in condition and condition.context is None
    rows = torch.tensor([True, False])
    mixed = condition.mix(null, {"words": rows})
    assert torch.equal(mixed.masks["words"], torch.stack([~mask[0], mask[1]]))
    assert mixed["words"].flatten(1).mean(1).tolist() == [0, 1] and torch.equal(mixed.vec, condition.vec)
    assert torch.equal(condition.select(torch.tensor([1, 1, 0])).masks["words"], mask[[1, 1, 0]])
    both = Condition.cat([condition, null])
    assert len(both) == 4 and torch.equal(both.masks["words"], torch.cat([mask, ~mask]))
    fewer = condition.replace(words=None)
    assert set(fewer.parts()) == {"vec"} and not fewer.masks
    with pytest.raises(ValueError, match="no part 'start'; it has words, vec"):
        _ = condition.start
    with pytest.raises(ValueError, match="no part 'style'"):
        condition.mix(null, {"style": rows})
    with pytest.raises(ValueError, match="one shape, and both a mask or none"):
        condition.mix(null.replace(words=torch.zeros(2, 5, 4)), {"words": rows})
    with pytest.raises(ValueError, match="one row an image"):
        Condition(a=torch.ones(2, 1), b=torch.ones(3, 1))


def test_dropping_a_context_takes_the_mask_of_its_null():
    system = infinity.build(infinity.tiny(), seed=1)
    negative = with_negative(system, "a very long text of many words")
    condition = negative.condition(["short", "red apple"])
    null = negative.model.conditioner.null(condition)
    everywhere = torch.ones(2, dtype=torch.bool)
    mixed = condition.mix(null, {"context": everywhere})
    assert torch.equal(mixed.context_mask, null.context_mask)
    assert not torch.equal(mixed.context_mask, condition.context_mask)
    assert torch.equal(mixed.vec, condition.vec) and torch.equal(mixed.context, null.context)


def test_parts_are_dropped_together_or_each_on_its_own():
    system = several()
    condition = system.condition({"label": ["cat"] * 400, "style": "oil", "map": [torch.ones(3, 8, 8)] * 400})
    null = system.model.conditioner.null(condition)

    def lost(**settings):
        draws = Draws(torch.Generator().manual_seed(0), 400)
        found = dropped(condition, system.model.conditioner, GeneratorLoss(**settings), draws)
        return {name: (part == null[name]).all(dim=1) for name, part in found.parts().items() if name != "map"}

    together = lost(drop_condition=0.3)
    assert torch.equal(together["label"], together["style"]) and 80 < together["label"].sum() < 160
    alone = lost(drop_condition=0.3, drop_parts={"style": 0.5})
    assert torch.equal(alone["label"], together["label"])  # the same random numbers
    assert (alone["style"] | ~together["style"]).all() and 220 < alone["style"].sum() < 300
    with pytest.raises(ValueError, match="no part 'colour'"):
        lost(drop_parts={"colour": 0.1})


def test_guidance_of_three_branches_that_lack_different_parts():
    system = several()
    told = {"label": ["cat", "dog"], "style": ["oil", "ink"]}
    drops = ((), ("style",), ("label", "style", "map"))

    def guided(*weights):
        return ns.sample_tokens(system, told, guidance=Guidance(lambda s, k: weights, drops), pick=ns.greedy)

    def plain(told):
        return ns.sample_tokens(system, told, guidance=ns.cfg(1.0), pick=ns.greedy)

    def same(a, b):
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    assert same(guided(1.0, 0.0, 0.0), plain(told))
    assert same(guided(0.0, 1.0, 0.0), plain({"label": ["cat", "dog"]}))
    assert same(guided(0.0, 0.0, 1.0), plain([None, None]))
    assert not same(guided(5.0, -2.0, -2.0), plain(told))


# ---- end to end -------------------------------------------------------------------------------------------------------


def test_labels_styles_and_maps_train_a_system(tmp_path):
    system, data = several(), items()
    before = {name: tensor.clone() for name, tensor in system.model.state_dict().items()}
    config = ns.TrainConfig(steps=3, batch_size=4, log_every=1, validate_every=3, warmup=0)
    loss = GeneratorLoss(drop_parts={"style": 0.2})
    trained = ns.train_model(system, data, config, out=tmp_path, val=data[:4], loss=loss)
    after = trained.model.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert {"conditioner.label.embedding.weight", "conditioner.style.embedding.weight"} <= moved
    assert {"conditioner.mean.weight", "conditioner.no_map"} <= moved
    told = {"label": ["cat", 2], "style": "oil", "map": torch.rand(2, 3, 8, 8)}
    one = ns.sample_tokens(trained, told, seed=1)
    assert ns.decode(trained, one).isfinite().all()
    for name in told:  # each of them is heard
        silent = {other: values for other, values in told.items() if other != name} | {name: [None, None]}
        assert not torch.equal(ns.logits(trained, one, told), ns.logits(trained, one, silent))
    filled = ns.inpaint(trained, torch.zeros(2, 3, 32, 32), box=(0, 0, 0.5, 0.5), labels={"label": "cat", "style": 0})
    assert filled.shape == (2, 3, 32, 32)
    assert isinstance(system.readers["map"]([None]), Given)


# ---- a label or a text, and a style -----------------------------------------------------------------------------------


def styled(recipe=var, **changes) -> System:
    config = recipe.tiny(styles=STYLES, **({"num_classes": 3, "classes": CLASSES} if recipe is var else {}), **changes)
    return recipe.build(config, seed=1)


def test_a_styled_system_listens_to_both_and_to_each_alone():
    for recipe, name in ((var, "label"), (infinity, "caption")):
        system = styled(recipe)
        assert list(system.readers) == [name, "style"]
        said = {name: ["cat", "cat", "dog", None, None], "style": ["ink", "oil", "ink", "ink", None]}
        images = ns.sample(system, said, seed=[0] * 5, guidance=ns.cfg(2))
        assert len({image.numpy().tobytes() for image in images}) == 5
        assert torch.equal(ns.sample(system, "cat", seed=0), ns.sample(system, {name: "cat", "style": None}, seed=0))


def test_parts_of_a_name_are_dropped_together():
    system = styled(infinity)
    conditioner = system.model.conditioner
    condition = system.condition({"caption": ["a cat", "a dog on a bench"], "style": ["ink", "oil"]})
    null = conditioner.null(condition)
    take = torch.tensor([True, False])
    without = condition.mix(null, {"caption": take})
    for part, value in without.parts().items():
        wanted = null if part.startswith("caption.") else condition
        assert torch.equal(value[0], wanted[part][0]) and torch.equal(value[1], condition[part][1])
    assert condition.within("style").parts().keys() == {"start", "vec"}
    assert condition.within("caption").context_mask.shape == condition.masks["caption.context"].shape
    with pytest.raises(ValueError, match="no part 'capt'"):
        condition.mix(null, {"capt": take})
    settings = GeneratorLoss(drop_condition=0.0, drop_parts={"style": 1.0})
    kept = dropped(condition, conditioner, settings, Draws(torch.Generator().manual_seed(0), 2, slice(None)))
    assert torch.equal(kept["style.vec"], null["style.vec"]) and torch.equal(
        kept["caption.vec"], condition["caption.vec"]
    )


def test_a_style_is_added_to_what_is_told_beside_it():
    system = styled()
    both = system.model.compose(system.condition({"label": "cat", "style": "ink"}))
    label, style = (part.embedding.weight for part in system.model.conditioner.conditioners.values())
    assert torch.equal(both.vec[0], label[0] + style[0]) and torch.equal(both.start[0, 0], both.vec[0])


def test_guided_apart_with_one_weight_is_guided_together():
    system = styled()
    told = {"label": ["cat", None], "style": ["ink", "oil"]}
    for ramp, together in ((False, ns.cfg(3)), (True, ns.cfg_ramp(3))):
        apart = ns.apart(3, {"style": 3}, ramp=ramp)
        one, other = (ns.sample(system, told, seed=0, guidance=g) for g in (together, apart))
        assert torch.equal(one, other)
    assert not torch.equal(one, ns.sample(system, told, seed=0, guidance=ns.apart(3, {"style": 1.5})))


def test_guidance_apart_is_the_chain_that_it_says():
    guidance, schedule = ns.apart(4, {"style": 2, "map": 5}), ns.Schedule.squares(1, 2)
    assert guidance.drops == ((), ("map",), ("style", "map"), ("all",))
    nothing, others, styled_too, whole = torch.randn(4, 1, 7).unbind(0)
    got = guidance.combine(torch.cat([whole, styled_too, others, nothing]), (0, 1, 2, 3), schedule, 1)
    wanted = nothing + 4 * (others - nothing) + 2 * (styled_too - others) + 5 * (whole - styled_too)
    torch.testing.assert_close(got, wanted)
    for wrong in ({}, {"style": float("nan")}):
        with pytest.raises(ValueError, match=r"apart|guidance weight"):
            ns.apart(3, wrong)


def test_a_style_of_its_own_weight_is_a_default_of_the_system():
    sampling = SamplingDefaults(guidance=3.0, style_guidance=2.0, top_k=0, top_p=0.0)
    system = styled(sampling=sampling)
    told, pick = {"label": "cat", "style": "oil"}, ns.top_k_top_p(0, 0.0)
    wanted = ns.sample(system, told, seed=2, guidance=ns.apart(3, {"style": 2}, ramp=True), pick=pick)
    assert torch.equal(ns.sample(system, told, seed=2), wanted)
    assert "guidance 3 and 2 for the style" in sampling.words()


def test_negative_prompts_leave_the_style_alone():
    system = styled(infinity)
    negative = with_negative(system, "dog").model.conditioner
    said = system.told({"caption": ["cat"], "style": "ink"})
    condition = negative({name: system.readers[name](values) for name, values in said.items()})
    null, plain = negative.null(condition), system.model.conditioner
    wanted = system.condition({"caption": ["dog"]})
    assert torch.equal(null["style.vec"], plain.null(wanted)["style.vec"])
    torch.testing.assert_close(null["caption.vec"], wanted["caption.vec"])


def test_a_styled_system_is_saved_and_takes_further_classes(tmp_path):
    system = styled()
    again = ns.load(ns.save(system, tmp_path / "s"))
    told = {"label": ["dog", "cat"], "style": ["ink", None]}
    assert torch.equal(ns.sample(system, told, seed=1), ns.sample(again, told, seed=1))
    grown = with_classes(system, ["cat", "cow"])
    assert grown.classes == (*CLASSES, "cow") and list(grown.readers["style"].choices) == list(STYLES)
    assert torch.equal(ns.sample(system, told, seed=1), ns.sample(grown, told, seed=1))


def test_unknown_styles_are_refused():
    with pytest.raises(ValueError, match="unknown style 'ikn'; did you mean 'ink'"):
        ns.sample(styled(), {"label": "cat", "style": "ikn"})
    with pytest.raises(ValueError, match="names of styles must differ"):
        var.tiny(styles=("ink", "ink"))


def test_training_tells_labels_and_styles(tmp_path):
    system = styled()
    said = [None if item["style"] is None else STYLES[item["style"]] for item in items()]
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    plain = [item | {"image": image, "style": style} for item, style in zip(items(), said, strict=True)]
    config = ns.TrainConfig(steps=2, batch_size=4, warmup=1, validate_every=2, save_every=2)
    before = system.model.conditioner.conditioners["style"].embedding.weight.clone()
    loss = GeneratorLoss(drop_parts={"label": 0.2, "style": 0.3})
    ns.train_model(system, plain, config, out=tmp_path / "run", val=plain, loss=loss, views=1)
    assert not torch.equal(before, system.model.conditioner.conditioners["style"].embedding.weight)
    without = [{name: value for name, value in item.items() if name != "style"} for item in plain]
    with pytest.raises(ValueError, match="do not say 'style'"):
        ns.train_model(styled(), without, config, out=tmp_path / "other", loss=loss, views=1)
