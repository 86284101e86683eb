"""WebDataset shards and Hugging Face datasets: the same items as from files, and clear words for what is damaged."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import nextscale as ns
from nextscale.evaluation.networks import Features


def picture(seed: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    return Image.fromarray(values)


def png(seed: int) -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, "png")
    return file.getvalue()


def write(path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path):
    for shard in range(2):
        members = {}
        for i in range(4):
            number = 4 * shard + i
            members |= {f"a/{number:03}.png": png(number), f"a/{number:03}.cls": str(number % 3).encode()}
            members[f"a/{number:03}.txt"] = f"picture {number}\n".encode()
        write(tmp_path / f"s-{shard:02}.tar", members)
    return tmp_path


def test_items_are_those_of_the_files(shards, tmp_path):
    data = ns.web_shards(str(shards / "s-{00..01}.tar"), 16)
    assert len(data.train) == 8 and not len(data.val) and data.classes == ("0", "1", "2")
    picture(5).save(tmp_path / "five.png")
    item = data.train[5]
    assert torch.equal(item["image"], ns.read_images(tmp_path / "five.png", 16)[0])
    assert item["label"] == 2 and item["caption"] == "picture 5" and item["name"] == "a/005"
    loader = torch.utils.data.DataLoader(data.train, batch_size=4, num_workers=2)
    images = torch.cat([batch["image"] for batch in loader])
    assert torch.equal(images, torch.stack([data.train[i]["image"] for i in range(8)]))
    again = ns.web_shards([shards / "s-00.tar", shards / "s-01.tar"], 16, validation=0.4)
    names = [{place.name for place in part.places} for part in (again.train, again.val)]
    assert names[1] and not names[0] & names[1] and len(names[0] | names[1]) == 8
    assert len(ns.web_shards(str(shards / "s-*.tar"), 16).train) == 8


def test_labels_may_be_names(tmp_path):
    members = {"1.png": png(1), "1.json": json.dumps({"label": "dog", "caption": "a dog"}).encode()}
    members |= {"2.png": png(2), "2.json": json.dumps({"label": "cat", "more": 1}).encode()}
    write(tmp_path / "n.tar", members)
    data = ns.web_shards(tmp_path / "n.tar", 8)
    assert data.classes == ("cat", "dog") and [data.train[i]["label"] for i in range(2)] == [1, 0]
    members["2.json"] = b'{"label": 3}'
    write(tmp_path / "mixed.tar", members)
    with pytest.raises(ValueError, match="one kind"):
        ns.web_shards(tmp_path / "mixed.tar", 8)


def test_missing_and_damaged_shards_are_named(shards, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"1 of 3 shards are missing, the first is .*s-02\.tar"):
        ns.web_shards(str(shards / "s-{00..02}.tar"))
    with pytest.raises(FileNotFoundError, match="no shard matches"):
        ns.web_shards(str(shards / "t-*.tar"))
    (tmp_path / "text.tar").write_bytes(b"hello" * 500)
    with pytest.raises(ValueError, match=r"text\.tar cannot be read"):
        ns.web_shards(tmp_path / "text.tar")
    whole = (shards / "s-00.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: 512 + 700])
    with pytest.raises(ValueError, match=r"cut\.tar"):
        ns.web_shards(tmp_path / "cut.tar")
    write(tmp_path / "empty.tar", {"1.cls": b"0"})
    with pytest.raises(ValueError, match="holds no image"):
        ns.web_shards(tmp_path / "empty.tar")
    write(tmp_path / "broken.tar", {"1.png": b"no picture", "1.cls": b"0"})
    with pytest.raises(ValueError, match="none of its 1 image files can be read"):
        ns.web_shards(tmp_path / "broken.tar", 8)
    members = {"1.png": png(1), "1.cls": b"0", "2.png": png(2)[:-30], "2.cls": b"1", "3.png": png(3), "3.cls": b"2"}
    write(tmp_path / "cut.tar", members)
    with pytest.warns(UserWarning, match=r"(?s)1 of 3 image files .* cannot be read, and are skipped.*2 in .*cut\.tar"):
        data = ns.web_shards(tmp_path / "cut.tar", 8)
    assert [data.train[i]["name"] for i in range(2)] == ["1", "3"] and len(data.classes) == 3
    with pytest.raises(ValueError, match='pass broken="skip"'):
        ns.web_shards(tmp_path / "cut.tar", 8, broken="refuse")


class Rows:
    """What is used of a `datasets.Dataset`, where that package is not installed."""

    def __init__(self, rows, names=("cat", "dog")):
        self.rows = rows
        self.features = {"image": None, "label": type("ClassLabel", (), {"names": list(names)})(), "text": None}

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        return self.rows[key] if isinstance(key, int) else [row[key] for row in self.rows]

    def select(self, places):
        return Rows([self.rows[i] for i in places])

    def remove_columns(self, names):
        return Rows([{name: value for name, value in row.items() if name not in names} for row in self.rows])


class Means:
    """Features of a network that needs no weights: the mean colours."""

    name, digest, suffix, classifier = "means", "0" * 64, "_means", None

    def __call__(self, images):
        return Features(images.float().mean(dim=(2, 3)).numpy())


class L1:
    """A distance of pairs."""

    name = "l1"

    def __call__(self, images, targets):
        return (images - targets).abs().mean(dim=(1, 2, 3))


def test_a_system_is_judged_on_shards_and_on_rows_of_the_hub(tmp_path):
    """Images are read when they are asked for; what they say needs none."""
    from small import small

    from nextscale.data.dataset import Pictures, pictures
    from nextscale.evaluation import report
    from nextscale.recipes.generators import var

    members = {}
    for i in range(12):
        members |= {f"{i:03}.png": png(i), f"{i:03}.cls": str(i % 2).encode()}
    write(tmp_path / "s.tar", members)
    rows = Rows([{"image": picture(i), "label": i % 2, "text": f"row {i}"} for i in range(12)])
    sources = {
        "shards": ns.web_shards(str(tmp_path / "s.tar"), 32, validation=0.4),
        "hub": ns.hub_images({"train": rows, "test": rows.select(range(4))}, 32, caption="text"),
    }
    for name, data in sources.items():
        assert len(data.val) > 1 and isinstance(pictures(data.train), Pictures)
        item = data.train[1]
        assert data.train.said(1) == {key: value for key, value in item.items() if key != "image"}
        system = var.build(small(num_classes=2, classes=data.classes), seed=1)
        found = report.evaluate(
            system, data, tmp_path / name, samples=3, network=Means(), distances=[L1()], progress=False
        )
        assert found["samples"]["distance"]["validation"]["count"] == len(data.val)
        assert {"kid_means", "l1", "rfd_means"} <= set(found["scores"])
        assert (tmp_path / name / "report.md").is_file()


def test_rows_of_the_hub(tmp_path):
    rows = Rows([{"image": picture(i), "label": i % 2, "text": f"row {i}"} for i in range(4)])
    data = ns.hub_images({"train": rows, "test": rows.select([1])}, 16, caption="text")
    assert data.classes == ("cat", "dog") and len(data.train) == 4 and len(data.val) == 1
    picture(3).save(tmp_path / "three.png")
    item = data.train[3]
    assert torch.equal(item["image"], ns.read_images(tmp_path / "three.png", 16)[0])
    assert item["label"] == 1 and item["caption"] == "row 3"
    with pytest.raises(ValueError, match="no column name; it has image, label, text"):
        ns.hub_images(rows, 16, caption="name")
    with pytest.raises(ValueError, match="a split named train"):
        ns.hub_images({"test": rows}, 16)


def test_a_folder_of_the_datasets_library(tmp_path):
    datasets = pytest.importorskip("datasets")
    for i in range(10):
        folder = tmp_path / "files" / ("cat", "dog")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture(i).save(folder / f"{i}.png")
    loaded = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "files"), cache_dir=str(tmp_path / "cache"))
    loaded.save_to_disk(str(tmp_path / "saved"))
    data = ns.hub_images(tmp_path / "saved", 16, validation=0.2)
    assert (len(data.train), len(data.val), data.classes) == (8, 2, ("cat", "dog"))
    assert data.train[0]["image"].shape == (3, 16, 16)
    every = ns.hub_images(loaded, 16)
    assert torch.equal(every.train[0]["image"], ns.read_images(tmp_path / "files" / "cat" / "0.png", 16)[0])
    file = tmp_path / "files" / "dog" / "3.png"
    file.write_bytes(file.read_bytes()[:60])
    broken = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "files"), cache_dir=str(tmp_path / "again"))
    with pytest.warns(UserWarning, match=r"(?s)1 of 10 image files in the data cannot be read.*row \d cannot be read"):
        assert len(ns.hub_images(broken, 16).train) == 9


def test_a_shard_that_says_of_a_file_that_it_is_larger(shards):
    path = shards / "s-00.tar"
    content = bytearray(path.read_bytes())
    content[124:136] = b"\x80" + (2**60).to_bytes(11, "big")
    content[148:156] = b" " * 8  # the checksum
    content[148:156] = f"{sum(content[:512]):06o}\0 ".encode()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"s-00\.tar: it ends in the middle of a file"):
        ns.web_shards(path, 16)


def test_names_in_a_shard_may_be_of_any_bytes(tmp_path):
    write(tmp_path / "a.tar", {"caf\udce9.png": png(1), "caf\udce9.cls": b"1"})
    data = ns.web_shards(tmp_path / "a.tar", 16, validation=0.1)
    assert data.train[0]["label"] == 1


@pytest.mark.parametrize("name", ["x" * 5000 + ".tar", "a\0.tar", "\x1b[31m.tar"])
def test_names_that_no_shard_has_are_cut_short(name):
    for read in (lambda: ns.web_shards(name, 16), lambda: ns.open_images(ns.DataSource(name), 16)):
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            read()
        assert len(str(error.value)) < 400 and str(error.value).isprintable()
