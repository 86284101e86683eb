"""Editing images of any size, variations, and what lies between two images."""

import pytest
import torch
from PIL import Image
from small import small as small_config
from test_recipes import build, cases
from test_recipes import images as images  # a fixture of the system below

import nextscale as ns
from nextscale.pixels import as_mask
from nextscale.recipes.generators import var
from nextscale.sampling.canvas import FITS, Canvas, feathered
from nextscale.sampling.vary import first_scales
from nextscale.schedule import Schedule
from nextscale.tokens import first_tensor


@pytest.fixture(scope="module")
def small():
    return var.build(small_config(), seed=3)


@pytest.fixture(scope="module", params=["var: plain", "flexvar: plain", "infinity: plain"])
def system(request):
    if request.param not in cases():
        pytest.skip("no such case")
    return build(request.param)


@pytest.fixture(scope="module")
def photo():
    """Larger than the system's images and of another shape, [2, 3, 90, 130]."""
    return (
        torch.rand(2, 3, 9, 13, generator=torch.Generator().manual_seed(0))
        .repeat_interleave(10, 2)
        .repeat_interleave(10, 3)
        * 2
        - 1
    )


# --- any size ---


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("kept", ["tokens", "features"])
@pytest.mark.parametrize("blend", [None, 7])
def test_an_image_of_any_size_changes_where_it_is_marked_alone(small, photo, fit, kept, blend):
    mask = torch.zeros(90, 130, dtype=torch.bool)
    mask[20:70, 40:90] = True
    result = ns.inpaint(small, photo, mask, [0, None], fit=fit, kept=kept, blend=blend, seed=5)
    assert result.shape == photo.shape and bool((result.abs() <= 1).all())
    assert torch.equal(torch.where(mask, 0, result), torch.where(mask, 0, photo))
    assert not torch.equal(result, photo)
    alone = ns.inpaint(small, photo[1:], mask, None, fit=fit, kept=kept, blend=blend, seed=6)
    torch.testing.assert_close(alone[0], result[1], atol=1e-5, rtol=0)  # sums of another order


def test_outside_of_what_is_seen_nothing_changes_and_a_warning_says_so(small, photo):
    left = torch.zeros(90, 130, dtype=torch.bool)
    left[:, :30] = True  # of which the middle 90x90 pixels show the columns from 20 on
    with pytest.warns(UserWarning, match="67 % lies outside of the middle 90x90 pixels"):
        result = ns.inpaint(small, photo, left, fit="crop")
    changed = (result != photo).any(dim=1).any(dim=0)
    assert not changed[:, :20].any() and not changed[:, 30:].any() and changed[:, 20:30].any()
    left[:, 20:] = False
    with pytest.raises(ValueError, match=r'100 % lies outside .*give fit="pad" or "stretch"'):
        ns.inpaint(small, photo, left, fit="crop")
    assert not torch.equal(ns.inpaint(small, photo, left, fit="pad"), photo)


def test_blend_alone_edits_in_the_middle_and_sizes_of_their_own_need_a_fit(small, photo):
    box = (0.3, 0.3, 0.7, 0.7)
    assert torch.equal(
        ns.inpaint(small, photo, box=box, blend=3), ns.inpaint(small, photo, box=box, blend=3, fit="crop")
    )
    with pytest.raises(ValueError, match='give fit="crop" for images of any size'):
        ns.inpaint(small, photo, box=box)
    for wrong, words in (
        ({"fit": "zoom"}, "fit: expected crop, pad, stretch"),
        ({"blend": -1}, "blend: expected a whole number"),
        ({"kept": "pixels"}, "kept: expected tokens or features"),
        ({"blend": 1.5}, "blend: expected a whole number"),
    ):
        with pytest.raises(ValueError, match=words):
            ns.inpaint(small, photo, box=box, **wrong)
    with pytest.raises(ValueError, match=r"has shape \[90, 130\] or \[2, 1, 90, 130\], got \[5, 5\]"):
        ns.inpaint(small, photo, torch.ones(5, 5), fit="crop")
    with pytest.raises(ValueError, match="too long to be padded"):
        ns.inpaint(small, torch.zeros(1, 3, 4, 100), box=box, fit="pad")


def test_outpainting_keeps_the_box_to_the_bit(small, photo):
    result = ns.outpaint(small, photo, (0.2, 0.4, 0.8, 0.6), fit="pad", seed=1)
    assert torch.equal(result[:, :, 18:72, 52:78], photo[:, :, 18:72, 52:78])
    assert (result != photo).any(dim=1)[:, :18].float().mean() > 0.9


def test_pillow_images_and_masks(small):
    picture = Image.new("RGB", (60, 40), "orange")
    mask = Image.new("RGBA", (60, 40), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (20, 10, 40, 30))
    result = ns.class_edit(small, picture, mask, 1, fit="crop")
    assert result.shape == (1, 3, 40, 60)
    orange = torch.tensor([255, 165, 0]).view(3, 1, 1) / 127.5 - 1
    assert torch.equal(result[0, :, :10], orange.expand(3, 10, 60)) and not torch.equal(
        result[0], orange.expand(3, 40, 60)
    )


def test_masks_are_white_or_strokes_on_nothing():
    marked = torch.zeros(8, 10, dtype=torch.bool)
    marked[2:4, 3:6] = True
    for background, stroke in (
        ("black", "white"),
        ((0, 0, 0, 0), "white"),
        ((0, 0, 0, 0), "black"),
        ((9, 9, 9, 0), "red"),
    ):
        picture = Image.new("RGBA", (10, 8), background)
        picture.paste(stroke, (3, 2, 6, 4))
        assert torch.equal(as_mask(picture), marked)
    assert not as_mask(Image.new("RGBA", (10, 8), (0, 0, 0, 0))).any() and not as_mask(Image.new("L", (10, 8))).any()


def test_previews_are_whole_images(small, photo):
    seen = []
    result = ns.inpaint(
        small, photo, box=(0, 0, 1, 0.5), fit="stretch", on_scale=lambda k, images: seen.append((k, images))
    )
    assert [k for k, _ in seen] == list(range(len(small.schedule))) and torch.equal(seen[-1][1], result)
    assert all(torch.equal(images[..., 65:], photo[..., 65:]) for _, images in seen)


@pytest.mark.parametrize("image", [(90, 130), (130, 90), (64, 64), (7, 301), (3, 3)])
@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_windows_have_the_shape_of_the_canvas(image, size):
    for fit in FITS if max(image) < 300 else ("crop", "stretch"):
        canvas = Canvas.of(image, size, fit)
        top, left, bottom, right = canvas.window
        x = torch.rand(1, 3, *image)
        assert canvas.fit(x).shape == (1, 3, *size)
        assert torch.equal(canvas.put_back(canvas.fit(x), x, torch.zeros(1, 1, *image)), x)
        if fit != "stretch" and min(image) > 10:
            assert (bottom - top) / (right - left) == pytest.approx(size[0] / size[1], rel=0.05)
        assert canvas.seen[0].stop > canvas.seen[0].start and canvas.seen[1].stop > canvas.seen[1].start


def test_a_mask_fades_in_from_its_border():
    mask = torch.zeros(2, 1, 20, 30, dtype=torch.bool)
    mask[0, :, 5:15, 10:] = True
    mask[1, :, 5:7] = True  # two pixels deep, less than the width
    opacity = feathered(mask, 4)
    assert opacity[0, 0, 10, 8:16].tolist() == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert opacity[0, 0, 10, 29] == 1  # the border of the image is none
    assert opacity[1, 0, 4:8, 3].tolist() == [0, 1, 1, 0]
    assert torch.equal(opacity > 0, mask) and torch.equal(feathered(mask, 0), mask.float())
    assert torch.equal(feathered(mask, 1), mask.float())


def test_features_that_are_kept_are_exact(small):
    x = torch.rand(2, 3, *small.image_size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mask = torch.zeros(small.image_size, dtype=torch.bool)
    mask[: small.image_size[0] // 2] = True
    encoded = small.tokenizer.encode(x, small.schedule)
    keep = torch.ones(1, *small.schedule[-1], dtype=torch.bool)
    keep[:, : small.schedule[-1][0] // 2] = False
    edit = ns.keep_features(encoded.f_hats, keep)
    state = ns.run(small, ns.start(small, [0, None], edit=edit, seed=3))
    held = keep[0].expand_as(state.f_hat)
    assert torch.equal(state.f_hat[held], encoded.f_hats[-1][held]) and not torch.equal(state.f_hat, encoded.f_hats[-1])
    assert torch.equal(ns.finish(small, state), ns.inpaint(small, x, mask, [0, None], kept="features", seed=3))
    plain = ns.run(small, ns.start(small, [0, None], seed=3))
    assert torch.equal(state.tokens[0], plain.tokens[0])  # the first map knows nothing of it
    swapped = ns.start(small, [0, None], edit=edit, seed=3).select(torch.tensor([1, 0]))
    torch.testing.assert_close(
        ns.finish(small, ns.run(small, swapped))[1], ns.finish(small, state)[0], atol=1e-5, rtol=0
    )


# --- variations ---


def test_variations_go_from_the_image_to_plain_sampling(system, images):
    labels = dict.fromkeys(system.readers)
    reconstruction = ns.decode(system, ns.encode(system, images))
    torch.testing.assert_close(ns.vary(system, images, 0.0, labels), reconstruction, atol=1e-5, rtol=0)
    plain = ns.sample(system, system.told(labels, len(images)), seed=4)
    assert torch.equal(ns.vary(system, images, 1.0, labels, seed=4), plain)
    # what is kept is exact, and what is drawn is that of any batch
    source, seen = ns.encode(system, images), []
    some = ns.vary(system, images, labels=labels, keep=2, seed=4, on_scale=lambda k, x: seen.append(x))
    first = ns.decode(system, source[:2])
    torch.testing.assert_close(seen[1], first, atol=1e-5, rtol=0)
    alone = ns.vary(system, images[1:2], labels=labels, keep=2, seed=5)
    torch.testing.assert_close(alone[0], some[1], atol=1e-5, rtol=0)
    other = ns.vary(system, images, labels=labels, keep=2, seed=40)
    assert not torch.equal(other, some)


def test_part_of_a_scale_stays_evenly_spread():
    schedule = Schedule.squares(1, 2, 4)
    assert [int(mask.sum()) for mask in first_scales(schedule, 1.5)] == [1, 2, 0]
    assert [int(mask.sum()) for mask in first_scales(schedule, 2.25)] == [1, 4, 4]
    spread = first_scales(schedule, 2.25)[2].view(4, 4).int()
    assert spread.sum(0).max() <= 2 and spread.sum(1).max() <= 2
    more = first_scales(schedule, 2.5)[2]
    assert bool((more | ~first_scales(schedule, 2.25)[2]).all())  # with less strength the same and more stay


def test_wrong_variations(small):
    x = torch.zeros(1, 3, *small.image_size)
    for wrong, words in (
        ({"strength": 1.5}, "strength"),
        ({"keep": 9}, "keep: expected a whole number"),
        ({"strength": "much"}, "strength"),
    ):
        with pytest.raises(ValueError, match=words):
            ns.vary(small, x, **wrong)
    with pytest.raises(ValueError, match="this system encodes images"):
        ns.vary(small, x[..., 1:])


# --- between two images ---


@pytest.mark.parametrize("order", ["coarse", "fine", "together"])
def test_between_two_images_lie_their_reconstructions_at_the_ends(system, images, order):
    a, b = images[:1], images[1:2]
    path = ns.interpolate(system, a, b, torch.linspace(0, 1, 5), order=order)
    ends = [ns.decode(system, ns.encode(system, x)) for x in (a, b)]
    torch.testing.assert_close(path[:1], ends[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(path[-1:], ends[1], atol=1e-5, rtol=0)
    back = ns.interpolate(system, b, a, 0.25, order={"coarse": "fine", "fine": "coarse"}.get(order, order))
    torch.testing.assert_close(back, path[3:4], atol=1e-5, rtol=0)  # the same way from the other end


def test_the_layout_goes_first(small):
    x = torch.rand(2, 3, *small.image_size, generator=torch.Generator().manual_seed(2)) * 2 - 1
    tokens, scales = ns.encode(small, x), len(small.schedule)
    mixed = [first_tensor(maps)[[1 if k < 2 else 0]] for k, maps in enumerate(tokens)]
    torch.testing.assert_close(
        ns.interpolate(small, x[:1], x[1:], 2 / scales), ns.decode(small, mixed), atol=1e-5, rtol=0
    )


def test_wrong_ways_between_images(small):
    x = torch.zeros(3, 3, *small.image_size)
    for weight in (-0.1, float("nan"), "half", [[0.5]], []):
        with pytest.raises(ValueError, match="weight: expected a number from 0 to 1"):
            ns.interpolate(small, x, x, weight)
    with pytest.raises(ValueError, match="order: expected coarse"):
        ns.interpolate(small, x, x, 0.5, order="best")
    with pytest.raises(ValueError, match=r"or one for all, got \[1, 2, 3\]"):
        ns.interpolate(small, x, x[:1], [0.1, 0.9])
