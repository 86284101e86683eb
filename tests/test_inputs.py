"""Data as users have it: every file is used, or counted and named; one order of classes; captions where people write them."""

import io
import json
import tarfile
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image
from small import small
from test_shards import Rows

import nextscale as ns
from nextscale import cli
from nextscale.cli.options import Source
from nextscale.cli.run import images_of
from nextscale.data.images import decode_image, examine_image
from nextscale.data.left_out import LeftOut
from nextscale.data.source import DataSource, open_images, remember, remembered
from nextscale.recipes.generators import var

pytestmark = pytest.mark.filterwarnings("ignore:.*are smaller than:UserWarning", "ignore:.*left out:UserWarning")


def png(seed=0, size=(16, 16)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def tree(root, files):
    """Files by their paths below a folder; None is an image of its own."""
    for i, (name, content) in enumerate(files.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i) if content is None else content.encode() if isinstance(content, str) else content)
    return root


def shard(path, members):
    with tarfile.open(path, "w") as tar:
        for i, (name, content) in enumerate(members.items()):
            content = png(i) if content is None else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_what_a_folder_holds_is_used_or_counted(tmp_path):
    files = {"a/1.png": None, "a/2.heic": "x", "b/3.CR2": "x", "b/4.png": None, "b/deep/5.png": None, "6.png": None}
    files |= {"__MACOSX/a/._1.png": "x", "a/.DS_Store": "x", "a/Thumbs.db": "x", "b/bad.png": "x"}
    root = tree(tmp_path / "root", files)
    (root / "b" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    tree(tmp_path / "elsewhere", {"7.png": None})
    (root / "a" / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "loop").symlink_to(root / "a")
    data = ns.image_folder(root, 16)
    assert data.classes == ("a", "b") and len(data.train) == 4
    assert data.left_out.counts == {
        "beside the folders of the classes": 1,
        "in a format that is not read, .heic": 1,
        "in a format that is not read, .cr2": 1,
        "that are no files, or links to nothing": 1,
        "that cannot be read": 1,
        "hidden, or left behind by a system": 1,
    }
    assert data.left_out.total == 10 and "left out 6 of 10: " in data.left_out.summary()


def test_what_is_read_in_part_is_said(tmp_path):
    root = tree(tmp_path / "root", {"a/1.png": None})
    frames = [Image.new("RGB", (16, 16), (shade, 0, 0)) for shade in (0, 100)]
    frames[0].save(root / "a" / "2.gif", save_all=True, append_images=frames[1:])
    Image.new("L", (16, 400)).save(root / "a" / "3.png")
    with pytest.warns(UserWarning) as said:
        ns.image_folder(root, 16)
        ns.read_images([root / "a" / "2.gif", root / "a" / "3.png"], 16)
    texts = [str(warning.message) for warning in said]
    assert any("1 of 3 images in" in text and "several frames" in text and "a/2.gif" in text for text in texts)
    assert any(
        "1 of 3 images in" in text and "16 times as long as wide" in text and "a/3.png" in text for text in texts
    )
    assert any(text.endswith("a/2.gif has several frames; the first is used") for text in texts)
    assert any("a/3.png is more than 16 times as long as wide" in text for text in texts)


def test_a_root_with_val_alone_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has val but no folder train"):
        ns.image_folder(tree(tmp_path, {"val/a/1.png": None}), 16)


def test_a_link_to_the_root_adds_nothing(tmp_path):
    root = tree(tmp_path, {"a/1.png": None, "b/2.png": None})
    (root / "b" / "up").symlink_to(root)
    assert len(ns.image_folder(root, 16).train) == 2


def test_what_is_left_out_is_warned_of_once(tmp_path):
    root = tree(tmp_path, {"a/1.png": None, "a/2.heic": "x"})
    with pytest.warns(UserWarning, match=r"left out 1 of 2: 1 in a format that is not read, .heic \(a/2.heic\)"):
        ns.image_folder(root, 16)
    assert not LeftOut() and LeftOut().summary() == ""


@pytest.mark.parametrize("val", ["val", "valid", "validation", "test", "Val"])
def test_train_and_val_are_a_split(val, tmp_path):
    files = {"train/cats/1.png": None, "train/dogs/2.png": None, f"{val}/dogs/3.png": None, f"{val}/birds/4.png": None}
    data = ns.image_folder(tree(tmp_path, files), 16, validation=0.1)
    assert data.classes == ("cats", "dogs") and len(data.train) == 2
    assert [data.val.said(i)["label"] for i in range(len(data.val))] == [1]
    assert data.left_out.counts == {"of classes that only the validation split has": 1}


def test_a_split_without_classes_is_one_class(tmp_path):
    data = ns.image_folder(tree(tmp_path, {"train/1.png": None, "val/2.png": None}), 16)
    assert (len(data.train), len(data.val), len(data.classes)) == (1, 1, 1)


def test_a_test_split_beside_both_is_counted(tmp_path):
    files = {"train/a/1.png": None, "val/a/2.png": None, "test/a/3.png": None, "test/a/4.png": None}
    assert ns.image_folder(tree(tmp_path, files), 16).left_out.counts == {"in the test split": 2}


def test_numbers_are_ordered_as_numbers(tmp_path):
    data = ns.image_folder(tree(tmp_path, {f"{i}/{i}.png": None for i in range(12)}), 16)
    assert data.classes == tuple(map(str, range(12)))
    assert [data.train.said(i)["path"].endswith(f"{data.train.said(i)['label']}.png") for i in range(12)] == [True] * 12
    system = var.build(small(num_classes=12, classes=data.classes), seed=1)
    read = next(iter(system.readers.values()))
    assert read(cli.draw.read_labels(system, ["2"])).tolist() == read([2]).tolist() == [2]


def test_a_name_that_is_not_utf8_is_found_at_the_start(tmp_path):
    import os

    tree(tmp_path, {"a/1.png": None})
    os.makedirs(os.fsencode(tmp_path) + b"/caf\xe9")
    with pytest.raises(ValueError, match="is not UTF-8; rename it"):
        ns.image_folder(tmp_path, 16)


# ---- captions --------------------------------------------------------------------------------------------------------

CAPTIONS = {
    "texts beside": ({"a/1.txt": "a red cat\n", "a/2.txt": "a dog"}, ["a red cat", "a dog"]),
    "jsonl": (
        {
            "metadata.jsonl": '{"file_name": "a/1.png", "text": "a red cat"}\n\n{"file_name": "./a/2.png", "caption": "a dog"}'
        },
        ["a red cat", "a dog"],
    ),
    "csv": ({"a/metadata.csv": '\ufefffile_name,text\n1.png,"a red, cat"\n2.png,a dog\n'}, ["a red, cat", "a dog"]),
    "names": ({}, ["1", "2"]),
    "some": ({"a/2.txt": "a dog"}, ["", "a dog"]),
}


@pytest.mark.filterwarnings("ignore:.*have no caption:UserWarning")
@pytest.mark.parametrize("name", CAPTIONS)
def test_captions_are_where_people_write_them(name, tmp_path):
    files, captions = CAPTIONS[name]
    data = ns.image_folder(tree(tmp_path, {"a/1.png": None, "a/2.png": None} | files), 16)
    assert [data.train[i]["caption"] for i in range(2)] == captions
    assert not data.left_out and (data.captions_from == "the files' names") == (name == "names")


BAD_CAPTIONS = {
    "not UTF-8": ("a/1.txt", b"caf\xe9", "1.txt is not UTF-8 \\(at byte 3\\)"),
    "no JSON": ("metadata.jsonl", b'{"file_name": "a/1.png"\n', "line 1 of .*metadata.jsonl is not JSON"),
    "no file name": ("metadata.jsonl", b'{"text": "a"}\n', "line 1 of .* needs file_name and text"),
    "a number": ("metadata.jsonl", b'{"file_name": "a/1.png", "text": 7}\n', "needs file_name and text"),
    "another place": ("metadata.jsonl", b'{"file_name": "../a/1.png", "text": "a"}\n', "is not below it; take it out"),
    "a table without names": ("metadata.csv", b"a,b\n1,2\n", "the first line of .* must name the columns"),
    "large": ("a/1.txt", b"a" * 200_000, "larger than a caption may be"),
}


@pytest.mark.parametrize("name", BAD_CAPTIONS)
def test_captions_that_cannot_be_understood(name, tmp_path):
    file, content, said = BAD_CAPTIONS[name]
    with pytest.raises(ValueError, match=said):
        ns.image_folder(tree(tmp_path, {"a/1.png": None, file: content}), 16)


# ---- shards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [b"1.5", b"1.", b"-.5", b"1.0"])
def test_labels_that_are_fractions_are_refused(label, tmp_path):
    with pytest.raises(ValueError, match="expected a whole number or a name"):
        ns.web_shards(shard(tmp_path / "a.tar", {"a.png": None, "a.cls": label}), 16)


def test_every_sample_of_a_shard_is_used_or_counted(tmp_path):
    members = {
        "a.png": None,
        "a.cls": b"cat",
        "b.15.png": None,
        "b.15.cls": b"dog",
        "c.16.png": None,
        "c.cls": b"cat\n",
    }
    members |= {
        "d.png": None,
        "e.heic": b"x",
        "e.cls": b"cat",
        "f.png": None,
        "f.json": b'{"label": null, "caption": "x"}',
    }
    members |= {"__MACOSX/._a.png": b"x", "a.txt": b"a cat"}
    data = ns.web_shards(shard(tmp_path / "a.tar", members), 16)
    assert data.classes == ("cat", "dog")
    assert [(data.train[i]["name"], data.train[i]["label"]) for i in range(3)] == [("a", 0), ("b.15", 1), ("c.16", 0)]
    assert data.left_out.counts == {
        "in a format that is not read, .heic": 1,
        "without a label": 2,
        "hidden, or left behind by a system": 1,
    }
    assert data.train[0]["caption"] == "a cat"


def test_shards_without_labels_are_one_class(tmp_path):
    with pytest.warns(UserWarning, match="has a label"):
        data = ns.web_shards(shard(tmp_path / "a.tar", {"a.png": None, "b.png": None}), 16)
    assert data.classes == ("0",) and len(data.train) == 2


BAD_LABELS = {
    "negative": ({"a.cls": b"-1"}, "label of a is -1; expected a name, or a number from 0"),
    "two": ({"a.cls": b"1", "a.json": b'{"label": 0}'}, "a has two labels, 1 and 0; keep one"),
    "huge": ({"a.cls": b"1000000000"}, "label of a is 1000000000"),
    "huge in JSON": ({"a.json": b'{"label": 1e9}'}, "label of a is 1000000000.0"),
    "a fraction": ({"a.json": b'{"label": 1.5}'}, "label of a is 1.5"),
    "a list": ({"a.json": b'{"label": [1]}'}, r"label of a is \[1\]"),
    "true": ({"a.json": b'{"label": true}'}, "label of a is True"),
    "two kinds": (
        {"a.cls": b"1", "b.cls": b"cat", "b.png": None},
        r"numbers in some places \(a\) and names in others \(b\)",
    ),
    "no JSON": ({"a.json": b"{"}, "a.tar: a.json is not JSON"),
    "not UTF-8": ({"a.cls": b"\xff"}, "a.tar: a.cls is not UTF-8"),
}


@pytest.mark.parametrize("name", BAD_LABELS)
def test_labels_that_are_none(name, tmp_path):
    members, said = BAD_LABELS[name]
    with pytest.raises(ValueError, match=said):
        ns.web_shards(shard(tmp_path / "a.tar", {"a.png": None} | members), 16)


@pytest.mark.parametrize("pattern", ["a-{0..99999999999}.tar", "a-{9..1}.tar", "a-{0..9999}{0..9999}{0..9999}.tar"])
def test_ranges_of_shards_are_bounded(pattern):
    with pytest.raises(ValueError, match="shards"):
        ns.web_shards(pattern)


# ---- images that cost, or mean something else ------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1)])
def test_memory_follows_the_wanted_size(size):
    image = Image.new("RGB", size)
    tracemalloc.start()
    pixels = decode_image(image, 72, "a", whole=True)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sorted(pixels.shape[1:]) == [72, 72 * 16] and most < 20e6


def test_long_images_are_named(tmp_path):
    with pytest.warns(UserWarning, match=r"1 of 2 images .* more than 16 times as long as wide.*long.png"):
        ns.image_folder(tree(tmp_path, {"a/long.png": png(1, (400, 16)), "a/1.png": png(2, (32, 32))}), 16)


@pytest.mark.parametrize(
    ("most", "dtype", "said"),
    [(4095, np.uint16, "warn"), (65_535, np.uint16, None), (4095, np.int32, "refuse"), (10**6, np.int32, "refuse")],
)
def test_greys_of_unknown_range_are_never_black_without_a_word(most, dtype, said, tmp_path):
    Image.fromarray(np.linspace(0, most, 256).reshape(16, 16).astype(dtype)).save(tmp_path / "a.tiff")
    if said == "refuse":
        with pytest.raises(ValueError, match="unknown range"):
            decode_image(tmp_path / "a.tiff", 16, "a")
        with pytest.raises(ValueError, match="unknown range"):
            examine_image(tmp_path / "a.tiff", "a")
    elif said == "warn":
        with pytest.warns(UserWarning, match="up to 4095 only are nearly black"):
            decode_image(tmp_path / "a.tiff", 16, "a")
    else:
        assert decode_image(tmp_path / "a.tiff", 16, "a").max() == 255


# ---- sources ---------------------------------------------------------------------------------------------------------


def test_a_validation_set_of_ones_own(tmp_path):
    root = tree(tmp_path / "data", {"a/1.png": None, "b/2.png": None, "c/3.png": None})
    val = tree(tmp_path / "val", {"c/4.png": None, "b/5.png": None})
    images = open_images(DataSource(str(root), str(val)), 16)
    assert len(images.train) == 3 and sorted(images.val.said(i)["label"] for i in range(2)) == [1, 2]
    with pytest.warns(UserWarning, match="is none, so none is held out.*--val"):  # of so few
        assert not len(open_images(DataSource(str(root)), 16).val)
    tree(val, {"d/6.png": None})
    with pytest.raises(ValueError, match="has the class 'd', which"):
        open_images(DataSource(str(root), str(val)), 16)


def test_a_folder_named_like_the_drawings_is_not_mistaken_silently(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree(tmp_path, {"openmoji/a/1.png": None, "openmoji/a/2.png": None})
    with pytest.warns(UserWarning, match="write ./openmoji for it"):
        assert len(open_images(DataSource(), 16).train) > 1000
    assert len(open_images(DataSource("./openmoji", "./openmoji"), 16).train) == 2


def test_columns_belong_to_datasets(tmp_path):
    with pytest.raises(ValueError, match="leave out --label-column"):
        open_images(DataSource(str(tree(tmp_path, {f"a/{i}.png": None for i in range(9)})), label="x"), 16)


def test_a_system_remembers_its_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree(tmp_path, {f"photos/{c}/{i}.png": None for i in range(20) for c in "ab"})
    system = var.build(small(num_classes=2, classes=("a", "b")), seed=1)
    ns.save(system, tmp_path / "run" / "system")
    with pytest.raises(ValueError, match="nothing says what run was trained on; give --data"):
        images_of("run", Source(), system)
    remember(DataSource("photos"), tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    for name in ("../run", "system"):
        images = images_of(name, Source(), system)
        assert len(images.train) + len(images.val) == 40 and len(images.val) > 0
    (tmp_path / "photos").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="was trained on it: give --data"):
        images_of("system", Source(), system)
    assert images_of("system", Source(data=str(tmp_path / "moved")), system).classes == ("a", "b")


@pytest.mark.parametrize("content", ["{}", "[]", '{"data": 1}', "x", json.dumps(vars(DataSource()) | {"val": None})])
def test_what_a_run_remembers_may_be_edited_by_anybody(content, tmp_path):
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(ValueError, match=r"data\.json"):
        remembered(tmp_path)


# ---- the library `datasets` ------------------------------------------------------------------------------------------


def rows(**columns):
    """A table as that library has it, whose image column has another name than usual."""
    count = len(next(iter(columns.values())))
    images = [Image.fromarray(np.full((16, 16, 3), i, np.uint8)) for i in range(count)]
    table = Rows(
        [{"img": image} | {name: column[i] for name, column in columns.items()} for i, image in enumerate(images)]
    )
    table.features = {"img": type("Image", (), {})()} | dict.fromkeys(columns)
    return table


def test_columns_of_other_names_and_words_as_labels():
    data = ns.hub_images(rows(kind=["cat", "dog", "cat"], text=["x", "y", "z"]), 16, label="kind")
    assert data.classes == ("cat", "dog") and [data.train[i]["label"] for i in range(3)] == [0, 1, 0]
    assert data.train[1]["caption"] == "y"
    assert ns.hub_images(rows(kind=["cat"]), 16).classes == ("0",)


def test_a_missing_label_is_refused_at_the_door():
    with pytest.raises(ValueError, match=r"1 of 2 rows have no label .*--label-column none"):
        ns.hub_images(rows(label=[0, -1]), 16)
    assert len(ns.hub_images(rows(label=[0, -1]), 16, label=None).train) == 2


def test_other_data_of_the_same_count_have_other_stamps(tmp_path):
    one = ns.image_folder(tree(tmp_path / "a", {"x/1.png": png(1), "x/2.png": png(2)}), 16).train
    two = ns.image_folder(tree(tmp_path / "b", {"x/1.png": png(1), "x/2.png": png(3)}), 16).train
    assert one.stamps[0] == two.stamps[0] and one.stamps[1] != two.stamps[1]
    assert torch.equal(one[0]["image"], two[0]["image"])
