"""The laws, for every recipe: this file finds the files of `recipes/` and takes each tiny system through them.

A recipe builds a system (`build`) or changes one (`apply`), as faster decoding does; such a one is tried on VAR's tiny system,
without the laws that only exact decoding keeps.
"""

from dataclasses import replace

import pytest
import torch

import nextscale as ns
from nextscale.condition import Condition
from nextscale.model.positions import LearnedPositions
from nextscale.recipes.generators import var
from nextscale.sampling.loop import ScaleByScale
from nextscale.schedule import Schedule
from nextscale.settings import Settings
from nextscale.system import System, recipe_names, teacher_logits
from nextscale.tokenizer.pyramid import teacher_inputs
from nextscale.tokens import first_tensor

VAR_VARIANTS = {
    "plain": {},
    "one scale": {"sizes": (4,)},
    "rectangles": {"sizes": ((1, 1), (1, 2), (2, 3), (3, 5))},
    "repeated sizes": {"sizes": (1, 2, 2, 4)},
    "wide first scale": {"sizes": (2, 3, 4)},
    "shared adaln": {
        "transformer": var.TransformerSettings(
            depth=2, dim=32, num_heads=2, shared_adaln=True, qk_norm=False, init_head=1.0, init_gate=1.0
        )
    },
    "no adaln": {"transformer": var.TransformerSettings(depth=2, dim=32, num_heads=2, adaln=False, init_head=1.0)},
    "phi of each scale, cosine": {
        "pyramid": var.PyramidSettings(codebook_size=32, code_dim=8, phi="each", cosine=True)
    },
    "standardized residuals": {"pyramid": var.PyramidSettings(codebook_size=32, code_dim=8, standardize=True)},
    "limited scales": {"pyramid": var.PyramidSettings(codebook_size=32, code_dim=8, limits=(2, 8, 32, 32))},
    "two maps at the full size": {"sizes": (1, 2, 4, 4)},
    "no phi": {"pyramid": var.PyramidSettings(codebook_size=32, code_dim=8, phi_ratio=0)},
}

# Rounding of float32 sums in another order: logits here are of size 1, images pass through some twenty layers more.
LOGITS = {"atol": 1e-4, "rtol": 0}
IMAGES = {"atol": 1e-4, "rtol": 0}


def build(case: str) -> System:
    recipe_name, variant = case.split(": ")
    recipe = ns.find_recipe(recipe_name)
    if hasattr(recipe, "apply"):
        return recipe.apply(build(f"{getattr(recipe, 'EXAMPLE', 'var')}: plain"), recipe.tiny())
    config = recipe.tiny(**VAR_VARIANTS[variant]) if recipe_name == "var" else recipe.tiny()
    system = recipe.build(config, seed=1)
    with torch.no_grad():  # random codes far enough apart that no token is decided by rounding
        pyramid = system.tokenizer.pyramid
        if pyramid.kind == "ids":
            pyramid.codebook.weight.normal_(generator=torch.Generator().manual_seed(2))
        if getattr(pyramid, "std", None) is not None:
            pyramid.mean.normal_(0, 0.2, generator=torch.Generator().manual_seed(3))
            pyramid.std.uniform_(0.3, 1, generator=torch.Generator().manual_seed(4))
    return system


def cases() -> list:
    names = [f"{name}: {v}" for name in sorted(recipe_names()) for v in (VAR_VARIANTS if name == "var" else ["plain"])]
    shipped = [f"shipped: {name}" for name in ns.shipped()]
    return names + shipped


@pytest.fixture(scope="module", params=cases())
def case(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def system(case: str) -> System:
    return ns.load(case.removeprefix("shipped: ")) if case.startswith("shipped: ") else build(case)


@pytest.fixture
def exact(case: str) -> None:
    """For laws that methods which change a system may break, as they approximate or are not saved with it."""
    recipe = case.split(": ")[0]
    if recipe in recipe_names() and hasattr(ns.find_recipe(recipe), "apply"):
        pytest.skip(f"{recipe} changes a system")


@pytest.fixture(scope="module")
def labels(system: System) -> list:
    """Two things to show, and nothing."""
    return [0, 2, None] if "label" in system.readers else ["a red apple", "the flag of Chad", None]


@pytest.fixture(scope="module")
def images(system: System) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(3, 3, 4, 4, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=system.image_size, mode="bilinear").clamp(-1, 1)


class Recorder:
    """A pick that remembers the logits it saw."""

    def __init__(self) -> None:
        self.logits: list[torch.Tensor] = []

    def __call__(self, logits, generators):
        self.logits.append(logits.clone())
        return ns.multinomial(logits, generators)


@pytest.mark.parametrize("guided", [False, True])
def test_law_1_cached_steps_equal_the_masked_pass(system, guided, labels, exact):
    record = Recorder()
    weight = 3.0 if guided else 1.0
    if (
        system.stepper is not None
    ):  # the law is the model's; a stepper of its own may pick more or less often than once a scale
        system = system.changed("plain", Settings(), stepper=ScaleByScale())
    tokens = ns.sample_tokens(system, labels, guidance=ns.cfg(weight), pick=record, seed=5)
    cond = ns.logits(system, tokens, labels)
    with torch.no_grad():  # not that of no prompts: a null may be as long as the prompt
        null = system.model.conditioner.null(system.condition(labels))
        uncond = teacher_logits(system, tokens, null, system.schedule)
    expected = uncond + weight * (cond - uncond)
    torch.testing.assert_close(torch.cat(record.logits, dim=1), expected.flatten(1, -2), **LOGITS)


def test_law_1_attention_by_scale_equals_the_dense_mask(system, images, labels):
    """The masked pass itself never builds a mask; one with the span's dense mask must agree."""
    from nextscale.model import attention

    def dense(q, k, v, span, scale, cache=None):
        assert cache is None
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=span.mask(), scale=scale)

    tokens = ns.encode(system, images)
    expected = ns.logits(system, tokens, labels)
    original, attention.attend = attention.attend, dense
    try:
        torch.testing.assert_close(ns.logits(system, tokens, labels), expected, **LOGITS)
    finally:
        attention.attend = original


def test_law_1_attention_that_trains_in_bfloat16_equals_the_fused_one():
    """On a CPU it is written out by matrix products, which must give the fused kernel's outputs and gradients."""
    from nextscale.model.attention import attend

    span = Schedule.squares(1, 2, 3, 4).span()
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, 2, 4, span.end, 16, generator=generator)
    weight = torch.randn(2, 4, span.end, 16, generator=generator)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        leaf = qkv.to(dtype).float().requires_grad_()  # the same numbers for both
        out = attend(*leaf.to(dtype), span, 0.5)
        (gradient,) = torch.autograd.grad((out.float() * weight).sum(), leaf)
        found[dtype] = out.float(), gradient
    for fused, products in zip(found[torch.float32], found[torch.bfloat16], strict=True):
        # 8 bits of mantissa in scores, weights and outputs
        torch.testing.assert_close(products, fused, atol=0.03 * float(fused.detach().abs().max()), rtol=0)


def test_law_2_forced_tokens_give_the_reconstruction(system, images, labels):
    tokens = ns.encode(system, images)
    forced = ns.sample(system, labels, edit=lambda drawn, k: tokens[k], guidance=ns.cfg_ramp(3.0), seed=1)
    torch.testing.assert_close(forced, ns.decode(system, tokens), **IMAGES)
    # and not because every token map gives the same image
    assert (forced - ns.sample(system, labels, seed=1)).abs().max() > 1e-3


def test_law_3_inputs_of_encode_are_next_input_replayed(system, images):
    pyramid, schedule = system.tokenizer.pyramid, system.schedule
    with torch.no_grad():
        encoded = system.tokenizer.encode(images, schedule)
        f_hat = pyramid.start(len(images), schedule)
        for k, tokens in enumerate(encoded.tokens):
            if k:
                assert torch.equal(pyramid.next_input(f_hat, k, schedule), encoded.inputs[k - 1])
            f_hat = pyramid.add(f_hat, tokens, k, schedule)
            assert torch.equal(f_hat, encoded.f_hats[k])
    assert len(encoded.inputs) == len(schedule) - 1
    replayed = teacher_inputs(pyramid, encoded.tokens, schedule)
    if len(schedule) > 1:
        assert torch.equal(replayed, torch.cat(encoded.inputs, dim=1))
    else:
        assert replayed is None


def test_law_4_guidance_weight_1_is_no_guidance(system, labels):
    alone = ns.sample_tokens(system, labels, guidance=ns.cfg(1.0), seed=3)
    ramp = ns.sample_tokens(system, labels, guidance=ns.cfg_ramp(1.0), seed=3)
    single = ns.Guidance(lambda schedule, k: (1.0,), drops=((),))
    no_branch = ns.sample_tokens(system, labels, guidance=single, seed=3)
    for a, b, c in zip(alone, ramp, no_branch, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    # weight 1 does not even run the second branch
    assert ns.start(system, labels, guidance=ns.cfg(1.0)).branches == (0,)


def test_law_5_a_row_equals_the_image_alone(system, labels):
    together = ns.sample(system, labels, seed=[11, 12, 13])
    for i, label in enumerate(labels):
        alone = ns.sample(system, [label], seed=11 + i)
        torch.testing.assert_close(together[i : i + 1], alone, **IMAGES)
    turned = ns.sample(system, labels[::-1], seed=[13, 12, 11])
    torch.testing.assert_close(turned.flip(0), together, **IMAGES)


def test_law_5_holds_for_soft_tokens(system, labels):
    if system.tokenizer.pyramid.kind != "ids":
        pytest.skip("soft weights are over a codebook")
    pick = ns.gumbel_soft(20, 0.9)
    together = ns.sample(system, labels, seed=4, pick=pick)
    # 2 * logits / 0.0135 at the last scale: rounding of 1e-6 in the logits becomes 1.5e-4 in the weights of tokens.
    torch.testing.assert_close(together[2:], ns.sample(system, [None], seed=6, pick=pick), atol=1e-3, rtol=0)


def test_law_6_shapes(system, labels):
    """Schedules of one scale and rectangles are among the systems; here their shapes."""
    tokens = ns.sample_tokens(system, labels)
    assert [t.shape[:2] for t in tokens] == [(3, n) for n in system.schedule.lengths]
    assert ns.decode(system, tokens).shape == (3, 3, *system.image_size)
    assert ns.decode(system, tokens[:1]).shape[:2] == (3, 3)
    assert ns.logits(system, tokens[:1], labels).shape[1] == system.schedule.lengths[0]


def test_law_7_save_load_sample(system, tmp_path, labels):
    before = ns.sample(system, labels, seed=9)
    again = ns.load(ns.save(system, tmp_path / "saved"))
    assert torch.equal(ns.sample(again, labels, seed=9), before)
    assert again.classes == system.classes and again.schedule == system.schedule
    assert again.config == system.config


def continued(system: System, state: ns.State) -> list[torch.Tensor]:
    """The tokens of all scales, from a state on."""
    return [first_tensor(tokens) for tokens in ns.run(system, state).tokens]


def test_law_8_a_state_is_a_value(system, labels):
    """Two children of one state, in any order and interleaved, give what the parent would have given alone."""
    begun = ns.start(system, labels, seed=[1, 2, 3], guidance=ns.cfg(2.0))
    expected = [first_tensor(t) for t in ns.sample_tokens(system, labels, seed=[1, 2, 3], guidance=ns.cfg(2.0))]
    state, others = begun, []
    for k in range(len(expected)):
        others.append(ns.step(system, replace(state, pick=ns.greedy, noise=begun.noise)))  # another child, first
        following = ns.step(system, state)
        for got, right in zip(continued(system, state)[k:], expected[k:], strict=True):  # and a third one, to the end
            assert torch.equal(got, right)
        state = following
    for got, right in zip(state.tokens, expected, strict=True):
        assert torch.equal(first_tensor(got), right)
    greedy = [first_tensor(t) for t in ns.sample_tokens(system, labels, pick=ns.greedy, guidance=ns.cfg(2.0))]
    for got, right in zip(continued(system, others[0]), greedy, strict=True):
        assert torch.equal(got, right)


def test_law_8_a_step_can_be_tried_again(system, labels):
    """A step that fails half-way, in the last block, leaves no trace."""
    if len(system.schedule) < 2:
        pytest.skip("one scale")
    expected = ns.sample(system, labels, seed=4)
    state = ns.step(system, ns.start(system, labels, seed=4))

    def fail(*_):
        raise RuntimeError("out of memory")

    handle = system.model.norm.register_forward_hook(fail)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            ns.step(system, state)
    handle.remove()
    assert torch.equal(ns.finish(system, ns.run(system, state)), expected)


def test_law_8_with_one_generator_for_all(system, labels):
    """The caller's generator moves on with the last step taken, and a step taken again draws the same."""
    generator = torch.Generator().manual_seed(5)
    state = ns.start(system, labels, generator=generator)
    first, again = ns.step(system, state), ns.step(system, state)
    assert torch.equal(first_tensor(first.tokens[0]), first_tensor(again.tokens[0]))
    ns.run(system, first)
    moved = generator.get_state()
    generator.manual_seed(5)
    ns.sample(system, labels, generator=generator)
    assert torch.equal(generator.get_state(), moved)


def test_parts_of_a_condition_have_their_own_null(system, labels):
    conditioner = system.model.conditioner
    condition = system.condition(labels[:2])
    null = conditioner.null(condition)
    for name, part in condition.parts().items():
        mixed = condition.mix(null, {name: torch.tensor([True, False])}).parts()
        assert torch.equal(mixed[name][0], null.parts()[name][0]) and torch.equal(mixed[name][1], part[1])
        for other in set(condition.parts()) - {name}:
            assert torch.equal(mixed[other], condition.parts()[other])
    assert isinstance(condition, Condition)


def test_state_select_reorders_and_copies(system, labels):
    with torch.inference_mode():
        state = ns.start(system, labels, seed=[1, 2, 3], guidance=ns.cfg(2.0))
        if len(system.schedule) > 1:
            state = ns.step(system, state)
        chosen = ns.run(system, state.select(torch.tensor([2, 0, 0])))
    plain = ns.sample_tokens(system, labels, seed=[1, 2, 3], guidance=ns.cfg(2.0))
    for got, expected in zip(chosen.tokens, plain, strict=True):
        assert torch.equal(got, expected[[2, 0, 0]])


def test_callback_gets_every_scale(system, labels):
    seen = {}
    final = ns.sample(system, labels, seed=2, on_scale=lambda k, images: seen.update({k: images.clone()}))
    assert list(seen) == list(range(len(system.schedule)))
    assert torch.equal(seen[len(system.schedule) - 1], final)


def test_interrupted_sampling_leaves_nothing_behind(system, labels):
    before = ns.sample(system, labels, seed=2)

    def stop(k, images):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ns.sample(system, labels, seed=2, on_scale=stop)
    assert torch.equal(ns.sample(system, labels, seed=2), before)


def test_another_schedule_is_refused_or_works(system, labels):
    other = Schedule(((1, 1), *system.schedule.sizes))
    if isinstance(system.model.positions, LearnedPositions):
        with pytest.raises(ValueError, match="scales"):
            ns.sample(system, labels, schedule=other)
    else:
        assert ns.sample(system, labels, schedule=other).isfinite().all()
