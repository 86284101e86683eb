"""Editing: the reference's numbers; what is kept is exact; what is drawn does not know of the mask; mistakes at the door."""

import pytest
import torch
import torch.nn.functional as F
from small import small as small_config
from test_golden import FEATURES, IMAGES, by_scale, numbers, part, tensors
from test_golden import system as official
from test_recipes import build, cases
from test_recipes import images as images  # a fixture of the system below

import nextscale as ns
from nextscale.recipes.generators import var
from nextscale.sampling.edit import generated_tokens, keep_masks, keep_tokens
from nextscale.schedule import Schedule
from nextscale.tokens import first_tensor

LABELS = [0, 2, None]
PICKS = {"drawn": ns.top_k_top_p(20, 0.9), "greedy": ns.greedy, "soft": ns.gumbel_soft(20, 0.9)}


class Watch:
    """A pick that remembers what it drew and how far the generators went."""

    def __init__(self, pick, schedule):
        self.pick, self.schedule, self.tokens, self.states = pick, schedule, [], []

    def at(self, schedule, k):
        pick = self.pick.at(schedule, k) if hasattr(self.pick, "at") else self.pick

        def watched(logits, generators):
            self.tokens.append(pick(logits, generators))
            self.states.append([g.get_state() for g in generators])
            return self.tokens[-1]

        return watched


# --- the reference's numbers ---


@pytest.mark.parametrize("mode", ["in", "out"])
def test_editing_of_the_reference(mode):
    io, s = part("tiny_var_io", f"A.edit_{mode}."), official("A")
    x, labels = tensors("tiny_var_io")["image"], tensors("tiny_var_io")["A.edit_labels"]
    box, name = numbers("tiny_var")["edit_boxes_y0x0y1x1"][mode], f"A.edit_{mode}"
    generate = generated_tokens(s, 2, box=box, inside=mode == "in")
    assert torch.equal(~generate[0], io["mask"].bool())
    keep = keep_masks(~generate, s.schedule)
    for k, mask in enumerate(by_scale("tiny_var_io", f"{name}.keep")):
        assert torch.equal(keep[k], mask.bool().view(1, -1))

    pick = Watch(ns.greedy, s.schedule)
    source = by_scale("tiny_var_io", "idx")
    options = {"guidance": ns.cfg_ramp(4), "pick": pick}
    tokens = ns.sample_tokens(s, labels, edit=ns.keep_tokens(source, keep), **options)
    for k in range(4):
        assert torch.equal(pick.tokens[k], io[f"idx.{k}"])
        h = s.tokenizer.pyramid.codebook.embed(tokens[k]).mT.unflatten(-1, s.schedule[k])
        assert torch.equal(h, io[f"h.{k}"])
    with torch.no_grad():
        torch.testing.assert_close(s.tokenizer.f_hat(tokens, s.schedule), io["f_hat_last"], **FEATURES)

    verb = {"in": ns.inpaint, "out": ns.outpaint}[mode]
    edited = verb(s, x, labels=labels, box=box, **options)
    torch.testing.assert_close((edited + 1) / 2, io["image"], **IMAGES)
    assert torch.equal(verb(s, x, labels=labels, mask=generate[0], **options), edited)
    pixels = F.interpolate(generate[:, None].float(), size=s.image_size).bool()
    assert torch.equal(ns.class_edit(s, x, pixels.expand(2, -1, -1, -1), labels, **options), edited)


def test_kept_positions_of_each_scale():
    """The box 0.25 to 0.75 on 16x16 tokens: 4 to 11 are inside."""
    inside = torch.zeros(1, 16, 16, dtype=torch.bool)
    inside[:, 4:12, 4:12] = True
    schedule = Schedule.squares(1, 2, 3, 4, 5, 16)

    def rows(masks):
        return [mask.view(size).int().tolist() for mask, size in zip(masks, schedule.sizes, strict=True)]

    around = rows(keep_masks(~inside, schedule))  # in-painting
    assert around[:2] == [[[1]], [[1, 1], [1, 1]]]  # the four of 2x2 have 0.75 each
    assert around[2] == [[1, 1, 1], [1, 0, 1], [1, 1, 1]]
    assert around[3] == [[1, 1, 1, 1], [1, 0, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1]]
    assert around[4] == [[1, 1, 1, 1, 1], *[[1, 0, 0, 0, 1]] * 3, [1, 1, 1, 1, 1]]
    centre = rows(keep_masks(inside, schedule))  # out-painting
    assert centre[:2] == [[[1]], [[0, 0], [0, 0]]]  # the four of 2x2 have 0.25 each
    assert centre[2] == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert centre[3] == [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert centre[4] == [[0, 0, 0, 0, 0], *[[0, 1, 1, 1, 0]] * 3, [0, 0, 0, 0, 0]]
    assert rows(keep_masks(inside, schedule, keep_coarsest=False))[0] == [[1]]  # its centre lies inside
    assert rows(keep_masks(~inside, schedule, keep_coarsest=False))[0] == [[0]]


def test_half_is_not_kept_and_small_scales_are_whole():
    schedule = Schedule(((1, 1), (1, 3), (2, 2), (2, 4)))
    left = torch.zeros(1, 2, 4, dtype=torch.bool)
    left[:, :, :1] = True  # of 2x2, the left column is half kept
    masks = keep_masks(left, schedule)
    assert [mask.int().tolist() for mask in masks] == [[[1]], [[1, 1, 1]], [[0] * 4], [[1, 0, 0, 0] * 2]]


# --- the laws of editing, for every recipe and its variants ---


@pytest.fixture(scope="module", params=[name for name in cases() if not name.startswith("shipped")])
def system(request):
    built = build(request.param)
    if "caption" in built.readers:
        pytest.skip("told by prompts: see test_edits_of_bits")
    return built


def test_edits_of_bits():
    tokens, source = torch.zeros(2, 3, 4, dtype=torch.uint8), torch.ones(2, 3, 4, dtype=torch.uint8)
    keep = torch.tensor([[True, False, True]])
    edited = keep_tokens([source], [keep])(tokens, 0)
    assert edited.tolist() == [[[1] * 4, [0] * 4, [1] * 4]] * 2


@pytest.mark.parametrize("pick", PICKS)
@pytest.mark.parametrize("weight, seed", [(1.0, 0), (4.0, 7)])
def test_all_kept_is_the_reconstruction(system, images, pick, weight, seed):
    nothing = torch.zeros(system.image_size, dtype=torch.bool)
    guidance = ns.cfg_ramp(weight)
    kept = ns.inpaint(system, images, nothing, LABELS, pick=PICKS[pick], guidance=guidance, seed=seed)
    expected = ns.decode(system, ns.encode(system, images))
    # the weights of a soft token are exactly 1 and 0, so this is exact too
    torch.testing.assert_close(kept, expected, atol=1e-5, rtol=0)
    whole = ns.outpaint(system, images, (0, 0, 1, 1), LABELS, pick=PICKS[pick], guidance=guidance, seed=seed)
    assert torch.equal(whole, kept)


@pytest.mark.parametrize("pick", PICKS)
def test_nothing_kept_is_plain_sampling_but_for_the_smallest_scales(system, images, pick):
    options = {"pick": PICKS[pick], "seed": 5, "guidance": ns.cfg_ramp(3.0)}
    everything = torch.ones(system.schedule[-1], dtype=torch.bool)
    free = ns.inpaint(system, images, everything, LABELS, keep_coarsest=False, **options)
    assert torch.equal(free, ns.sample(system, LABELS, **options))
    source = ns.encode(system, images)
    whole = [n <= 3 for n in system.schedule.lengths]
    soft = pick == "soft"

    def first(tokens, k):
        forced = ns.Soft(F.one_hot(source[k], tokens.weights.shape[-1]).float()) if soft else source[k]
        return forced if whole[k] else tokens

    anchored = ns.inpaint(system, images, everything, LABELS, **options)
    assert torch.equal(anchored, ns.sample(system, LABELS, edit=first, **options))
    assert torch.equal(anchored, free) == (not any(whole))


@pytest.mark.parametrize("pick", PICKS)
def test_kept_tokens_are_exact_and_random_numbers_those_of_plain_sampling(system, images, pick):
    source = ns.encode(system, images)
    height, width = system.schedule[-1]
    keep = torch.rand(3, height, width, generator=torch.Generator().manual_seed(1)) < 0.6
    masks = keep_masks(keep, system.schedule)
    edited, plain = Watch(PICKS[pick], system.schedule), Watch(PICKS[pick], system.schedule)
    tokens = ns.sample_tokens(system, LABELS, pick=edited, edit=keep_tokens(source, masks), seed=3)
    ns.sample_tokens(system, LABELS, pick=plain, seed=3)
    codebook = system.tokenizer.pyramid.codebook
    for k, mask in enumerate(masks):
        assert torch.equal(codebook.embed(tokens[k])[mask], codebook.weight[source[k]][mask])
        assert torch.equal(first_tensor(tokens[k])[~mask], first_tensor(edited.tokens[k])[~mask])
        for a, b in zip(edited.states[k], plain.states[k], strict=True):
            assert torch.equal(a, b)


def test_rows_are_independent_and_a_state_can_be_reordered(system, images):
    height, width = system.schedule[-1]
    mask = torch.rand(3, 1, height, width, generator=torch.Generator().manual_seed(2)) < 0.6
    together = ns.inpaint(system, images, mask, LABELS, seed=[4, 5, 6])
    alone = ns.inpaint(system, images[2:], mask[2:], LABELS[2], seed=6)
    torch.testing.assert_close(together[2:], alone, atol=1e-4, rtol=0)
    edit = keep_tokens(ns.encode(system, images), keep_masks(~mask[:, 0], system.schedule))
    with torch.inference_mode():
        state = ns.start(system, LABELS, seed=[4, 5, 6], edit=edit)
        state = ns.step(system, state)
        if state.k < len(system.schedule):
            chosen = ns.run(system, state.select(torch.tensor([2, 0, 0])))
            expected = ns.sample_tokens(system, LABELS, seed=[4, 5, 6], edit=edit)
            for got, plain in zip(chosen.tokens, expected, strict=True):
                assert torch.equal(got, plain[[2, 0, 0]])


# --- the verbs ---


@pytest.fixture(scope="module")
def small():
    return var.build(small_config(num_classes=3, classes=("cat", "dog", "horse")))


@pytest.fixture(scope="module")
def x(small):
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_options_are_those_of_sample(small, x):
    def fill(**options):
        return ns.inpaint(small, x, box=(0, 0, 1, 0.5), **options)

    seen = {}
    first = fill(on_scale=lambda k, frames: seen.update({k: frames.clone()}))
    assert list(seen) == [0, 1, 2, 3] and torch.equal(seen[3], first) and first.shape == x.shape
    assert torch.equal(fill(labels=[None, None]), first) and torch.equal(fill(labels=3), first)
    assert torch.equal(fill(labels="dog"), fill(labels=torch.tensor([1, 1])))
    assert torch.equal(fill(seed=[0, 1]), first) and not torch.equal(fill(seed=1), first)
    assert not torch.equal(fill(labels="dog"), first)
    assert not torch.equal(fill(labels="dog", guidance=ns.cfg(9.0)), fill(labels="dog"))
    one = fill(generator=torch.Generator().manual_seed(1))
    assert torch.equal(one, fill(generator=torch.Generator().manual_seed(1)))
    before = x.clone()
    assert torch.equal(ns.class_edit(small, x, None, "dog", box=(0, 0, 1, 0.5)), fill(labels="dog"))
    assert torch.equal(x, before)


def test_a_pixel_mask_keeps_tokens_of_which_more_than_half_is_kept(small):
    mask = torch.zeros(32, 32, dtype=torch.bool)  # tokens are 8x8 pixels
    mask[:4, :8] = True  # half of the first token
    mask[:3, 8:16] = True  # less of the second
    expected = torch.zeros(1, 4, 4, dtype=torch.bool)
    expected[0, 0, 0] = True
    for kind in (torch.bool, torch.uint8, torch.float32):
        assert torch.equal(generated_tokens(small, 2, mask.to(kind)), expected)
    assert torch.equal(generated_tokens(small, 2, mask.numpy()), expected)


def test_boxes_round_as_the_reference(small):
    def rows(y0, y1):
        return generated_tokens(small, 1, box=(y0, 0, y1, 1))[0, :, 0].int().tolist()

    assert rows(0.125, 1) == [1, 1, 1, 1]  # 0.5 rounds to the even 0
    assert rows(0.375, 1) == [0, 0, 1, 1]  # and 1.5 to 2
    assert rows(0.2, 0.7) == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(2, 3, 32, 40)}, ["[B, 3, 32, 32]", "[2, 3, 32, 40]", "read_images"]),
        ({"x": torch.zeros(2, 1, 32, 32)}, ["[B, 3, H, W]", "[2, 1, 32, 32]"]),
        ({"x": torch.zeros(2, 3, 32, 32, dtype=torch.int64)}, ["float in [-1, 1] or uint8", "int64"]),
        ({"box": None}, ["either a mask or a box", "neither"]),
        ({"mask": torch.zeros(4, 4)}, ["either a mask or a box", "both"]),
        ({"box": (0.5, 0, 0.2, 1)}, ["0 <= y0 < y1 <= 1", "(0.5, 0, 0.2, 1)"]),
        ({"box": (0, 0.3, 1, 0.3)}, ["x0 < x1", "0.3"]),
        ({"box": (-0.1, 0, 1, 1)}, ["0 <= y0", "-0.1"]),
        ({"box": (0, 0, 1, 1.5)}, ["x1 <= 1", "1.5"]),
        ({"box": (0, 0, 1, float("nan"))}, ["x1 <= 1", "nan"]),
        ({"box": (0, 0, 1)}, ["(y0, x0, y1, x1)", "(0, 0, 1)"]),
        ({"box": (0, 0, 0.1, 1)}, ["no token", "4x4", "larger"]),
        ({"box": torch.zeros(4, 4)}, ["(y0, x0, y1, x1)", "mask="]),
        ({"box": None, "mask": torch.zeros(5, 5)}, ["[32, 32]", "[4, 4]", "[5, 5]"]),
        ({"box": None, "mask": torch.zeros(3, 1, 32, 32)}, ["[2, 1, 32, 32]", "[3, 1, 32, 32]"]),
        ({"box": None, "mask": torch.zeros(2, 32, 32)}, ["[2, 1, 32, 32]", "[2, 32, 32]"]),
        ({"box": None, "mask": torch.full((4, 4), 255)}, ["True (1)", "255", "threshold"]),
        ({"box": None, "mask": torch.eye(32)}, ["half of any token", "8x8", "wider"]),
        ({"labels": ["cat", "dog", "cat"]}, ["2 images", "got 3", "repeat"]),
        ({"labels": "dig"}, ["did you mean 'dog'"]),
        ({"seed": [1, 2, 3]}, ["2 images", "got 3"]),
    ],
)
@pytest.mark.parametrize("verb", ["inpaint", "outpaint"])
def test_mistakes_are_told_at_the_door(small, x, verb, change, words):
    options = {"x": x, "box": (0, 0, 1, 0.5)} | change
    with pytest.raises(ValueError) as error:
        getattr(ns, verb)(small, **options)
    for word in words:
        assert word in str(error.value)


def test_class_edit_needs_a_class_and_all_need_a_generator(small, x):
    with pytest.raises(ValueError, match="target class"):
        ns.class_edit(small, x, torch.ones(4, 4), None)
    with pytest.raises(ValueError, match="train generator"):
        ns.inpaint(var.build(small_config(num_classes=0)), x, torch.ones(4, 4))


def test_keep_tokens_wants_a_bool_mask_for_each_map(small, x):
    source = ns.encode(small, x)
    masks = keep_masks(torch.ones(1, 4, 4, dtype=torch.bool), small.schedule)
    for bad in (masks[:2], [mask.float() for mask in masks], masks[::-1], [m.expand(3, -1) for m in masks]):
        with pytest.raises(ValueError, match="each scale"):
            ns.keep_tokens(source, bad)
