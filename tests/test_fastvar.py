"""FastVAR: what is pruned, what fills it in, and that nothing changes where nothing is pruned."""

import pytest
import torch
import torch.nn.functional as F
from test_contracts import AllTheRestAtOnce, PrefixCondition, built, probe_model, probe_system

import nextscale as ns
from nextscale.model.attention import KVCache
from nextscale.model.block import BlockWrapper
from nextscale.model.text_encoders import HashWords
from nextscale.recipes.decoding import fastvar
from nextscale.recipes.generators import infinity, var
from nextscale.recipes.guidance import inside
from nextscale.schedule import Schedule

LABELS = [0, 1, None]


@pytest.fixture(scope="module")
def system():
    built = var.build(var.tiny(), seed=1)
    with torch.no_grad():
        built.tokenizer.pyramid.codebook.weight.normal_(generator=torch.Generator().manual_seed(2))
    return built


def test_ratio_zero_is_dense_to_the_bit(system):
    same = fastvar.apply(system, fastvar.Config(ratios=(0.0, 0.0)))
    assert torch.equal(ns.sample(same, LABELS, seed=3), ns.sample(system, LABELS, seed=3))


def logits(system, told=LABELS):
    """What is predicted at each scale, greedily."""
    seen = []

    def pick(logits, generators):
        seen.append(logits)
        return ns.greedy(logits, generators)

    ns.sample(system, told, pick=pick)
    return seen


def test_pruning_changes_the_last_scales_only_and_leaves_the_system_alone(system):
    before, pruned = logits(system), logits(fastvar.apply(system, fastvar.Config(ratios=(0.5,))))
    assert all(torch.equal(a, b) for a, b in zip(before[:-1], pruned[:-1], strict=True))
    assert not torch.equal(before[-1], pruned[-1])
    assert all(torch.equal(a, b) for a, b in zip(before, logits(system), strict=True))


def test_text_and_rotary_positions_go_with_the_kept_tokens():
    text = infinity.build(infinity.tiny(), seed=1)
    prompts = ["a red apple", "a cat", None]
    dense = ns.sample(text, prompts, seed=3)
    assert torch.equal(ns.sample(fastvar.apply(text, fastvar.Config(ratios=(0.0,))), prompts, seed=3), dense)
    with torch.inference_mode():
        faster = fastvar.apply(text, fastvar.Config(ratios=(0.5,)))
        state = ns.run(faster, ns.start(faster, prompts, seed=3))
    assert [layer.length for layer in state.cache.layers] == [14 + 8] * 2


@pytest.mark.parametrize("ratio", [0.25, 0.4, 0.75])
def test_tokens_that_are_computed_and_cached(system, ratio):
    """The last scale of 16 tokens: linear layers and the cache of pruned blocks see 16 - int(16 ratio) of them."""
    faster = fastvar.apply(system, fastvar.Config(ratios=(ratio,), dense_first=1))
    seen = []
    for block in (system.model.blocks[0], system.model.blocks[1]):
        fc1 = block.branches[1].layer.fc1
        seen.append([])
        fc1.register_forward_hook(lambda module, args, out, counts=seen[-1]: counts.append(args[0].shape[1]))
    with torch.inference_mode():
        state = ns.run(faster, ns.start(faster, LABELS))
    for block in (system.model.blocks[0], system.model.blocks[1]):
        block.branches[1].layer.fc1._forward_hooks.clear()
    kept = 16 - int(16 * ratio)
    assert seen == [[1, 4, 9, 16], [1, 4, 9, kept]]
    assert [layer.length for layer in state.cache.layers] == [30, 14 + kept]


class Zeros(torch.nn.Module):
    """A branch that adds nothing."""

    def forward(self, h, prepared, span, cache=None):
        return torch.zeros_like(h)


def test_left_out_tokens_get_the_resized_output_of_the_last_dense_scale():
    branch = fastvar.PrunedBranch(Zeros(), 0, fastvar.Config(ratios=(0.5,)))
    cache = KVCache(2, 1, 20, 1, torch.zeros(()))
    generator = torch.Generator().manual_seed(0)
    cache.outputs[0] = torch.randn(2, 3, 2, 2, generator=generator)
    h = torch.randn(2, 16, 3, generator=generator)
    schedule = Schedule.squares(2, 4)
    update = branch(h, None, schedule.span(1, 2), cache)
    filled = F.interpolate(cache.outputs[0], size=(4, 4), mode="area").flatten(2).mT
    kept = torch.zeros(2, 16, dtype=torch.bool).scatter(1, fastvar.pivotal(h, 8), True)
    assert (update[kept] == 0).all() and torch.equal(update[~kept], filled[~kept])


def test_pivotal_tokens_are_those_that_differ():
    h = torch.zeros(1, 64, 5)
    inside = torch.tensor([9, 10, 17, 18])
    h[:, inside] = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)) + 2
    assert set(fastvar.pivotal(h, 4)[0].tolist()) == set(inside.tolist())


def test_scales_can_be_left_out(system):
    faster = fastvar.apply(system, fastvar.Config(ratios=(0.25, 1.0)))
    tokens = ns.sample_tokens(faster, LABELS, seed=1)
    assert [token_map.shape[1] for token_map in tokens] == [1, 4, 9]
    assert torch.equal(ns.sample(faster, LABELS, seed=1), ns.decode(system, tokens))


@pytest.mark.parametrize("select", ["pivotal", "random"])
def test_a_batch_equals_the_single_image_and_rows_can_be_selected(system, select):
    faster = fastvar.apply(system, fastvar.Config(ratios=(0.5,), select=select))
    together = ns.sample(faster, LABELS, seed=[4, 5, 6])
    for i, label in enumerate(LABELS):
        torch.testing.assert_close(ns.sample(faster, [label], seed=4 + i), together[i : i + 1], atol=1e-4, rtol=0)
    with torch.inference_mode():
        state = ns.start(faster, LABELS, seed=[4, 5, 6])
        for _ in range(3):  # the next scale fills in what the third one left
            state = ns.step(faster, state)
        chosen = ns.run(faster, state.select(torch.tensor([2, 0])))
    plain = ns.sample_tokens(faster, LABELS, seed=[4, 5, 6])
    assert all(torch.equal(a, b[[2, 0]]) for a, b in zip(chosen.tokens, plain, strict=True))


@pytest.mark.parametrize("recipe", [var, infinity], ids=["AdaLNBlock", "TextBlock"])
def test_blocks_that_are_wrapped_are_pruned_as_well(recipe):
    """In whatever order: the branches are the inner block's."""
    plain, told = recipe.build(recipe.tiny(), seed=1), {var: LABELS, infinity: ["a red apple", "a cat", None]}[recipe]
    wrapped = plain.with_model(plain.model.with_blocks([BlockWrapper(BlockWrapper(b)) for b in plain.model.blocks]))
    config = fastvar.Config(ratios=(0.5,))
    expected = ns.sample(fastvar.apply(plain, config), told, seed=3)
    assert not torch.equal(expected, ns.sample(plain, told, seed=3))
    assert torch.equal(ns.sample(fastvar.apply(wrapped, config), told, seed=3), expected)
    for block, own in zip(wrapped.model.blocks, plain.model.blocks, strict=True):
        other = block.with_branches(list(block.branches)[::-1])
        assert list(other.branches) == list(own.branches)[::-1] and list(block.branches) == list(own.branches)
        assert {p.data_ptr() for p in other.parameters()} == {p.data_ptr() for p in own.parameters()}


# ---- systems and schedules of other kinds ------------------------------------------------------------------------------


def test_a_prefix_is_no_part_of_the_kept_scale():
    """Of three scales the first one, behind the words, is the dense one that fills in."""

    def make():
        conditioner = PrefixCondition(8, 16)
        return probe_system(model=probe_model(conditioner=conditioner), readers={"caption": HashWords(8, 6)})

    system, told = built(make), ["red apple", "the flag of Chad", None]
    faster = fastvar.apply(system, fastvar.Config(ratios=(0.5, 0.75)))
    images = ns.sample(faster, told, seed=[4, 5, 6])
    before, pruned = logits(system, told), logits(faster, told)
    assert torch.equal(before[0], pruned[0]) and not torch.equal(before[1], pruned[1])
    for i, words in enumerate(told):
        torch.testing.assert_close(ns.sample(faster, [words], seed=4 + i), images[i : i + 1], atol=1e-4, rtol=0)
    state = ns.step(faster, ns.start(faster, told))
    seen = [*state.cache[0].outputs.values()]
    assert [output.shape[2:] for output in seen] == [(1, 1)] * 2


def test_steps_over_several_scales_are_refused():
    system = built(lambda: probe_system(stepper=AllTheRestAtOnce()))
    for ratios in ((0.5,), (1.0,)):
        faster = fastvar.apply(system, fastvar.Config(ratios=ratios))
        with pytest.raises(ValueError, match=r"over scales 1 to 2.*samples scale by scale"):
            ns.sample(faster, [0, 1])
    same = fastvar.apply(system, fastvar.Config(ratios=(0.0,)))
    assert torch.equal(ns.sample(same, [0, 1]), ns.sample(system, [0, 1]))


@pytest.mark.parametrize("ratios, sides", [((0.2, 0.4, 0.5), (1, 4)), ((1.0,), (4,)), ((0.5,), (4,))])
def test_a_schedule_of_the_caller_needs_a_dense_scale(system, ratios, sides):
    faster, short = fastvar.apply(system, fastvar.Config(ratios=ratios)), ns.Schedule.squares(*sides)
    with pytest.raises(ValueError, match=f"{len(ratios)} ratios leave none of {len(sides)} scales dense"):
        ns.sample(faster, [0], schedule=short)
    twice = inside.apply(faster, inside.Config(block=0))  # whatever is around it
    with pytest.raises(ValueError, match="scales dense"):
        ns.sample(twice, [0], schedule=short)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ratios": (0.5, 0.5, 0.5, 0.5)}, "leave none of 4 scales dense"),
        ({"ratios": (0.5,), "dense_first": 1, "dense_last": 1}, "leave none of 2 blocks"),
        ({"ratios": (1.0, 0.5)}, "only the last scales"),
        ({"ratios": (1.5,)}, "less than or equal to 1"),
    ],
)
def test_settings_that_make_no_sense(system, options, message):
    with pytest.raises(ValueError, match=message):
        fastvar.apply(system, fastvar.Config(**options))
