"""The page in the browser: what it draws is what the library draws, and a visitor's mistakes end in sentences."""

import base64
import io
import shlex
from pathlib import Path

import browser
import numpy as np
import pytest
import torch
from PIL import Image
from small import small

import nextscale as ns
from nextscale import cli
from nextscale.checkpoint import ChangeConfig
from nextscale.pixels import to_uint8
from nextscale.recipes.generators import infinity, var
from nextscale.web.pictures import data_uri, gallery
from nextscale.web.repeat import Repeater
from nextscale.web.studio import MOST_IMAGES, Asked, Studio, marked
from nextscale.web.uploads import MOST_SIDE, read_upload

CLASSES = ("cat", "dog, big", "7", "heart")


@pytest.fixture(scope="module")
def system():
    return var.build(small(num_classes=4, classes=CLASSES, styles=("ink", "oil")), seed=1)


@pytest.fixture(scope="module")
def folder(system, tmp_path_factory):
    return ns.save(system, tmp_path_factory.mktemp("web") / "tiny")


@pytest.fixture(scope="module")
def studio(system):
    return Studio(system)


def photo(tmp_path, width=60, height=40):
    pixels = np.random.default_rng(0).integers(0, 256, (height // 4, width // 4, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


def last(steps):
    steps = list(steps)
    assert [step.last for step in steps] == [False] * (len(steps) - 1) + [True]
    return steps[-1]


def done_again(again, folder, tmp_path, monkeypatch, capsys):
    """The images that the shown command makes, and those of the shown Python, uint8 [B, 3, H, W]."""
    monkeypatch.chdir(tmp_path)
    found = []
    for run in (
        lambda: cli.main(shlex.split(again.command)[1:]),
        lambda: exec(again.python, {}),
    ):
        assert run() in (0, None), capsys.readouterr().err
        paths = sorted(Path("images").glob("*.png"))
        found.append(torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in paths])).permute(0, 3, 1, 2))
        for path in paths:
            path.unlink()
        Path("images").rmdir()
    return found


# --- what is drawn ---


ASKED = [
    Asked(("cat",), count=2),
    Asked(("dog, big", "7", "heart"), style="oil", count=2, seed=5, settings={"guidance": 3.5, "top_k": 3}),
    Asked((), style="ink", count=3, seed=1, settings={"temperature": 0.7, "top_p": 0.9, "smooth": True}),
]


@pytest.mark.parametrize("asked", ASKED)
def test_what_is_generated_is_made_again(studio, folder, asked, tmp_path, monkeypatch, capsys):
    step = last(studio.generate(asked))
    again = Repeater(studio, str(folder)).generate(asked)
    for images in done_again(again, folder, tmp_path, monkeypatch, capsys):
        assert torch.equal(images, step.images)
    assert len(step.texts) == len(step.images) and step.done == step.scales == len(studio.system.schedule)


@pytest.mark.parametrize("asked", ASKED[:1])
@pytest.mark.parametrize("strength", [0.0, 0.4])
def test_variations_are_made_again(studio, folder, asked, strength, tmp_path, monkeypatch, capsys):
    path = photo(tmp_path)
    image = read_upload(str(path), 3, studio.system.image_size)
    step = last(studio.vary(image, strength, asked))
    again = Repeater(studio, str(folder)).vary(asked, strength)
    for images in done_again(again, folder, tmp_path, monkeypatch, capsys):
        assert torch.equal(images, step.images)


@pytest.mark.parametrize(
    "how", [{"fit": "pad", "blend": 4, "kept": "tokens"}, {"fit": "crop", "blend": 0, "kept": "features"}]
)
def test_edits_are_made_again(studio, folder, how, tmp_path, monkeypatch, capsys):
    path, asked = photo(tmp_path), Asked(("cat",), style="ink", count=2, seed=3)
    mask = torch.zeros(40, 60, dtype=torch.bool)
    mask[10:30, 20:40] = True
    Image.fromarray((mask.numpy() * 255).astype(np.uint8)).save(tmp_path / "mask.png")
    image = read_upload(str(path))
    step = last(studio.edit(image, mask, asked, **how))
    assert step.images.shape == (2, 3, 40, 60)
    assert torch.equal(step.images[:, :, ~mask], image[None, :, ~mask].expand(2, -1, -1))
    again = Repeater(studio, str(folder)).edit(asked, how)
    for images in done_again(again, folder, tmp_path, monkeypatch, capsys):
        assert torch.equal(images, step.images)


def test_changed_systems_are_made_again(system, folder, tmp_path, monkeypatch, capsys):
    recipe = ns.find_recipe("fastvar")
    config = recipe.Config(ratios=(0.4, 0.5))
    studio = Studio(recipe.apply(system, config))
    changes = [ChangeConfig(recipe="fastvar", config=config.model_dump(mode="json"))]
    asked = Asked(("cat",), count=2)
    again = Repeater(studio, str(folder), changes).generate(asked)
    assert "--with fastvar --with.ratios 0.4 0.5" in again.command
    step = last(studio.generate(asked))
    for images in done_again(again, folder, tmp_path, monkeypatch, capsys):
        assert torch.equal(images, step.images)


def test_images_come_scale_by_scale(studio):
    steps = list(studio.generate(Asked(("cat",), count=2)))
    assert [step.done for step in steps] == list(range(1, len(studio.system.schedule) + 1))
    assert [step.size for step in steps] == list(studio.system.schedule.sizes)
    seen = []
    ns.sample(
        studio.system, {"label": ["cat"] * 2, "style": [None] * 2}, on_scale=lambda k, images: seen.append(images)
    )
    assert all(torch.equal(to_uint8(a), b.images) for a, b in zip(seen, steps, strict=True))


def test_reconstruction_tells_every_scale(studio, tmp_path):
    image = read_upload(str(photo(tmp_path)), 3, studio.system.image_size)
    found = studio.reconstruct(image)
    assert len(found) == len(studio.system.schedule)
    tokens = ns.encode(studio.system, image[None])
    expected = to_uint8(ns.decode(studio.system, tokens))[0]
    assert torch.equal(found[-1][0], expected)


def test_prompts_are_drawn_again(tmp_path, monkeypatch, capsys):
    studio = Studio(infinity.build(infinity.tiny(), seed=1))
    folder = ns.save(studio.system, tmp_path / "tiny")
    assert studio.reads_texts and studio.said == "caption" and not studio.choices
    asked = Asked(prompts=("a red apple", "it's blue"), count=2, seed=7)
    step = last(studio.generate(asked))
    again = Repeater(studio, str(folder)).generate(asked)
    for images in done_again(again, folder, tmp_path, monkeypatch, capsys):
        assert torch.equal(images, step.images)


# --- what goes wrong ---


def test_too_much_is_refused(studio):
    with pytest.raises(ValueError, match="more than the 16"):
        Asked(("cat", "7"), count=MOST_IMAGES)
    with pytest.raises(ValueError, match="seed"):
        Asked(seed=-1)
    with pytest.raises(ValueError, match="longer than"):
        Asked(prompts=("a" * 2000,))
    with pytest.raises(ValueError, match="longer than 0 s"):
        list(Studio(studio.system, seconds=0).generate(Asked(("cat",))))
    with pytest.raises(ValueError, match="did you mean"):
        list(studio.generate(Asked(("cut",))))


def test_marks_that_are_none_are_refused(studio, tmp_path):
    image = read_upload(str(photo(tmp_path)))
    with pytest.raises(ValueError, match="nothing is marked"):
        list(studio.edit(image, torch.zeros(40, 60, dtype=torch.bool), Asked(), fit="pad"))
    corner = torch.zeros(40, 60, dtype=torch.bool)
    corner[:2, :2] = True
    with pytest.raises(ValueError, match="lies outside"):
        list(studio.edit(image, corner, Asked(), fit="crop"))


def test_uploads_are_reduced_and_bounded(tmp_path):
    Image.new("RGB", (5000, 100), "red").save(tmp_path / "long.png")
    assert read_upload(str(tmp_path / "long.png")).shape == (3, 41, MOST_SIDE)
    Image.new("1", (10_000, 10_000)).save(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match="too large"):
        read_upload(str(tmp_path / "bomb.png"))
    with pytest.raises(ValueError, match="cannot be read as an image"):
        read_upload(b"no image")
    content = io.BytesIO()
    Image.new("CMYK", (8, 6)).save(content, "JPEG")
    assert read_upload(content.getvalue(), 4).shape == (4, 6, 8)


def test_strokes_mark(tmp_path):
    layer = torch.zeros(4, 20, 30, dtype=torch.uint8)
    layer[0, 5:10] = 255  # red, and opaque
    layer[3, 5:10] = 255
    mask = marked([layer, torch.zeros(4, 20, 30, dtype=torch.uint8)], (20, 30))
    assert mask[5:10].all() and int(mask.sum()) == 5 * 30
    assert not marked([], (20, 30)).any()


def test_pictures_are_escaped_and_exact():
    image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    page = gallery([image], ["<script>"], 'a "status" & more')
    assert "<script>" not in page and "&lt;script&gt;" in page and "a &quot;status&quot; &amp; more" in page
    content = base64.b64decode(data_uri(image, exact=True).split(",")[1])
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), image.permute(1, 2, 0).numpy())


def test_mistakes_on_the_command_line(capsys):
    assert cli.main(["web", "--port", "0"]) == 2
    assert "--port" in capsys.readouterr().err


# --- the page ---


@pytest.fixture(scope="module")
def client(folder, tmp_path_factory):
    pytest.importorskip("gradio", reason="the extra web is not installed")
    from gradio_client import Client

    with browser.served("--system", str(folder)) as address:
        yield Client(address, verbose=False, download_files=str(tmp_path_factory.mktemp("downloads")))


def test_the_page_draws(client):
    pictures, again = client.predict(["cat"], "ink", 2, 4, 2.5, 1.0, 900, 0.96, False, None, api_name="/generate")
    assert pictures.count("data:image/png") == 2 * 2  # seen, and to download
    assert "--labels cat --style ink --count 2 --seed 4" in again


def test_the_page_says_what_is_wrong(client, tmp_path):
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    broken = tmp_path / "broken.png"
    broken.write_bytes(photo(tmp_path).read_bytes()[:60])
    with pytest.raises(AppError, match="cannot be read as an image"):
        client.predict(handle_file(str(broken)), 1, api_name="/reconstruct")
    with pytest.raises(AppError, match="upload an image first"):
        client.predict(None, 0.5, "cat", "any", 2, 0, 2.5, 1.0, 900, 0.96, False, None, api_name="/vary")
    with pytest.raises(AppError, match="more than the 16"):
        client.predict(list(CLASSES), "any", 8, 0, 2.5, 1.0, 900, 0.96, False, None, api_name="/generate")
    pictures, _ = client.predict(handle_file(str(photo(tmp_path))), 2, api_name="/reconstruct")
    assert "2 of" in pictures


@pytest.mark.skipif(bool(browser.missing()), reason=browser.missing())
@pytest.mark.timeout(600)
def test_a_visitor_with_a_browser(tmp_path, capsys):
    with browser.served() as address:
        took = browser.tour(address, tmp_path)
    with capsys.disabled():
        print("".join(f"\n{name}: {seconds:.2f} s" for name, seconds in took.items()))
    assert len(list(tmp_path.glob("web-*.png"))) == 3
