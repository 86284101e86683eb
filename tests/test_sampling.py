"""Picks and guidance on hand-made logits."""

import pytest
import torch
from small import small

import nextscale as ns
from nextscale.modules import replaced
from nextscale.recipes.generators import var
from nextscale.sampling.pick import filter_logits
from nextscale.schedule import Schedule

INF = torch.inf


def kept(logits, **filter_by):
    return (filter_logits(torch.tensor([[logits]]), **filter_by)[0, 0] > -INF).tolist()


def test_ties_at_the_top_k_boundary_stay():
    assert kept([3.0, 2.0, 2.0, 1.0], k=2) == [True, True, True, False]
    assert kept([3.0, 2.0, 2.0, 1.0], k=1) == [True, False, False, False]
    assert kept([3.0, 2.0, 1.0], k=0) == kept([3.0, 2.0, 1.0], k=5) == [True] * 3


def test_top_p_keeps_at_least_the_most_likely():
    assert kept([3.0, 2.0, 1.0], p=1e-9) == [True, False, False]
    assert kept([3.0, 2.0, 1.0], p=1.0) == [True] * 3


def test_top_k_comes_before_top_p():
    # probabilities .4 .3 .2 .1: of all four, p = .75 keeps three; of the best two (4/7, 3/7) it keeps two
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().tolist()
    assert kept(logits, p=0.75) == [True, True, True, False]
    assert kept(logits, k=2, p=0.75) == [True, True, False, False]
    assert kept(logits, k=2, p=0.5) == [True, False, False, False]


@pytest.mark.parametrize("k, p", [(0, 0.9), (5, 0.7), (3, 0.0), (5, 1.0), (2, 0.3)])
def test_filter_equals_the_reference_procedure(k, p):
    logits = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(0)).mul(2).round(decimals=1)  # with ties
    expected = logits.clone()
    if k:
        expected[expected < expected.topk(k).values.amin(-1, keepdim=True)] = -INF
    if p:
        values, ids = expected.sort(-1)
        remove = values.softmax(-1).cumsum(-1) <= 1 - p
        remove[..., -1] = False
        expected[remove.scatter(-1, ids, remove)] = -INF
    got = filter_logits(logits, k, p)
    # Of values that tie, either may go: compare what stays as sorted values.
    assert torch.equal(got.sort(-1).values, expected.sort(-1).values)


def test_filters_do_not_change_their_argument():
    logits = torch.randn(1, 4, 8)
    before = logits.clone()
    ns.top_k_top_p(2, 0.5)(logits, [torch.Generator()])
    assert torch.equal(logits, before)


def test_multinomial_follows_the_probabilities():
    logits = torch.tensor([0.7, 0.2, 0.1]).log().expand(1, 20_000, 3)
    drawn = ns.multinomial(logits, [torch.Generator().manual_seed(0)])
    shares = torch.bincount(drawn[0], minlength=3) / 20_000
    # three standard errors of a share at 20,000 draws are below 0.01
    torch.testing.assert_close(shares, torch.tensor([0.7, 0.2, 0.1]), atol=0.01, rtol=0)


def test_one_generator_draws_for_the_whole_batch_at_once():
    logits = torch.randn(2, 5, 7)
    got = ns.multinomial(logits, torch.Generator().manual_seed(1))
    rows = logits.softmax(-1).view(-1, 7)
    expected = torch.multinomial(rows, 1, replacement=True, generator=torch.Generator().manual_seed(1)).view(2, 5)
    assert torch.equal(got, expected)


def test_gumbel_soft_is_a_distribution_on_the_kept_tokens_and_sharpens():
    logits = torch.randn(1, 50, 20, generator=torch.Generator().manual_seed(0))
    schedule = Schedule.squares(1, 2, 3)
    soft = [ns.gumbel_soft(k=5).at(schedule, k)(logits, [torch.Generator().manual_seed(3)]).weights for k in range(3)]
    for weights in soft:
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 50))
        assert ((weights > 0).sum(-1) <= 5).all()
    peak = [weights.amax(-1).mean() for weights in soft]
    assert peak[0] < peak[1] < peak[2]


def test_gumbel_soft_draws_a_token_first():
    generator = torch.Generator().manual_seed(0)
    ns.gumbel_soft().at(Schedule.squares(1), 0)(torch.zeros(1, 3, 8), generator)
    reference = torch.Generator().manual_seed(0)
    torch.multinomial(torch.full((3, 8), 0.125), 1, replacement=True, generator=reference)
    torch.empty(1, 3, 8).exponential_(generator=reference)
    assert torch.equal(generator.get_state(), reference.get_state())


@pytest.mark.parametrize("bad", [(-1, 0.5), (3, 1.5), (3, -0.1)])
def test_bad_filters_are_refused(bad):
    with pytest.raises(ValueError, match="top_k"):
        ns.top_k_top_p(*bad)
    with pytest.raises(ValueError, match="top_k"):
        ns.gumbel_soft(*bad)


def test_ramp_weights():
    schedule = Schedule.squares(1, 2, 3)
    ramp = ns.cfg_ramp(2.5)
    assert [ramp.weights(schedule, k) for k in range(3)] == [(1.0, 0.0), (1.75, -0.75), (2.5, -1.5)]
    assert ns.cfg_ramp(2.5).weights(Schedule.squares(4), 0) == (2.5, -1.5)
    predictions = torch.tensor([[3.0], [1.0]])
    assert ns.cfg(2.0).combine(predictions, (0, 1), schedule, 0).item() == 5.0  # 1 + 2 * (3 - 1)


def test_a_branch_is_left_behind_when_no_later_scale_needs_it():
    system = var.build(small())
    early = ns.Guidance(lambda schedule, k: (2.0, -1.0) if k < 2 else (1.0, 0.0))
    rows = []
    model = system.model
    handle = model.blocks[0].register_forward_hook(lambda module, args, out: rows.append(len(out)))
    tokens = ns.sample_tokens(system, [0, 1, 2], guidance=early, seed=0)
    handle.remove()
    assert rows == [6, 6, 3, 3]
    # and the result is as if it had run to the end
    never = ns.Guidance(lambda schedule, k: (2.0, -1.0) if k < 2 else (1.0 + 1e-12, -1e-12))
    for got, expected in zip(tokens, ns.sample_tokens(system, [0, 1, 2], guidance=never, seed=0), strict=True):
        assert torch.equal(got, expected)


def test_modulation_is_computed_once_an_image_and_the_cache_is_static():
    system = var.build(small())
    calls = []
    for module in system.model.modules():
        if type(module).__name__ == "OwnModulation":
            module.register_forward_hook(lambda *_: calls.append(1))
    state = ns.start(system, [0, 1], guidance=ns.cfg(2.0))
    memory = [layer.memory.room.data_ptr() for layer in state.cache.layers]
    s = system.model.settings
    assert state.cache.nbytes == 2 * s.depth * 4 * system.schedule.length * s.dim * 4  # K and V, 4 rows, float32
    state = ns.run(system, state)
    assert len(calls) == s.depth + 1
    assert [layer.memory.room.data_ptr() for layer in state.cache.layers] == memory


def test_labels():
    system = var.build(small(num_classes=3, classes=("cat", "dog", "horse")))
    read = system.readers["label"]
    assert read(system.told(["dog", 0, None, 3])["label"]).tolist() == [1, 0, 3, 3]
    assert read(system.told(None)["label"]).tolist() == [3]
    with pytest.raises(ValueError, match="did you mean 'dog'"):
        system.condition(["dig"])
    with pytest.raises(ValueError, match="0 to 2"):
        system.condition([4])


def test_a_tokenizer_alone_says_that_it_cannot_sample():
    with pytest.raises(ValueError, match="train generator"):
        ns.sample(var.build(small(num_classes=0)), [0])


def test_seeds_must_match_the_batch():
    with pytest.raises(ValueError, match="2 images, got 3"):
        ns.sample(var.build(small()), [0, 1], seed=[1, 2, 3])


def test_a_weight_and_a_temperature_for_each_scale():
    schedule = Schedule.squares(1, 2, 3)
    guidance = ns.cfg([1.0, 2.0, 1.0])
    assert [guidance.weights(schedule, k) for k in range(3)] == [(1.0, 0.0), (2.0, -1.0), (1.0, 0.0)]
    assert guidance.alive(schedule, 1) == (0, 1) and guidance.alive(schedule, 2) == (0,)
    with pytest.raises(ValueError, match="one for each of 3 scales, got 2"):
        ns.cfg([1.0, 2.0]).weights(schedule, 0)
    seen = []

    def pick(logits, generators):
        seen.append(logits)
        return logits.argmax(-1)

    logits = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0))
    tempered = ns.tempered(pick, [1.0, 0.5, 2.0])
    for k in range(3):
        tempered.at(schedule, k)(logits, [])
    assert torch.equal(seen[0], logits) and torch.equal(seen[1], logits * 2) and torch.equal(seen[2], logits / 2)
    with pytest.raises(ValueError, match="above 0"):
        ns.tempered(ns.multinomial, 0.0).at(schedule, 0)


def test_wrapped_models_share_weights_and_leave_the_first_alone():
    system = var.build(small(), seed=1)
    blocks = [
        replaced(block, branches=torch.nn.ModuleList(reversed(list(block.branches)))) for block in system.model.blocks
    ]
    other = system.model.with_blocks(blocks)
    assert {id(p) for p in other.parameters()} == {id(p) for p in system.model.parameters()}
    assert other.blocks[0].branches[0] is system.model.blocks[0].branches[1]
    assert [type(b.layer).__name__ for b in system.model.blocks[0].branches] == ["SelfAttention", "FeedForward"]


def test_steps_mix_with_runs_in_any_mode():
    """States made inside and outside of `inference_mode` go on in the other, and what was sampled can be trained on."""
    system = var.build(small())
    expected = ns.sample(system, [0, 1], seed=3)
    with torch.inference_mode():
        state = ns.start(system, [0, 1], seed=3)
    state = ns.step(system, state)
    with torch.inference_mode():
        state = ns.step(system, state)
    state = ns.run(system, state)
    assert torch.equal(ns.finish(system, state), expected) and not expected.is_inference()
    assert not any(tensor.is_inference() or tensor.requires_grad for tensor in (state.f_hat, *state.tokens))


def test_tables_first_asked_for_in_inference_mode_can_be_trained_with():
    schedule = ns.Schedule(((1, 1), (3, 5), (7, 11)))  # which no other test uses
    with torch.inference_mode():
        index, coords, mask = schedule.span().scale_index(), schedule.span().coords(), schedule.span().mask()
    assert not schedule.span().scale_index().is_inference() and not schedule.span().coords().is_inference()
    table = torch.zeros(3, 2, requires_grad=True)
    (table[schedule.span().scale_index()] * schedule.span().coords()).sum().backward()
    assert table.grad is not None and len(index) == len(coords) == len(mask)


@pytest.mark.parametrize("sizes", [((2.9, 2.9),), ((1, "2"),), (2, 3), ((True, 1.0),)])
def test_sizes_are_whole_numbers(sizes):
    with pytest.raises(ValueError, match="whole numbers"):
        ns.Schedule(sizes)
