"""The doors of Python and of drawing: whatever has one sure meaning is taken, all else ends in one sentence."""

import numpy as np
import pytest
import torch
from PIL import Image
from small import AUTOENCODER, small

import nextscale as ns
from nextscale import cli
from nextscale.data.images import check_grid, image_grid, picture_size
from nextscale.model.text_encoders import HashWords
from nextscale.pixels import as_images
from nextscale.readers import ClassReader
from nextscale.recipes.generators import var
from nextscale.sampling.pick import tempered


@pytest.fixture(scope="module")
def system():
    return var.build(small(), seed=1)


@pytest.fixture(scope="module", params=[1, 4])
def other(request, tmp_path_factory):
    """A system of grey images or of such with opacity, and its folder."""
    settings = AUTOENCODER.model_copy(update={"image_channels": request.param})
    built = var.build(small(autoencoder=settings), seed=2)
    return built, ns.save(built, tmp_path_factory.mktemp("systems") / f"c{request.param}")


X = torch.linspace(-1, 1, 3 * 32 * 32).view(3, 32, 32)
BYTES = ((X + 1) * 127.5).round().to(torch.uint8)
TAKEN = {
    "float tensor": X[None],
    "one image": X,
    "double": X.double(),
    "bytes": BYTES,
    "array CHW": X.numpy(),
    "array HWC": X.permute(1, 2, 0).numpy(),
    "array of bytes BHWC": BYTES.permute(1, 2, 0)[None].numpy(),
    "Pillow": Image.fromarray(BYTES.permute(1, 2, 0).numpy()),
    "list of Pillow": [Image.fromarray(BYTES.permute(1, 2, 0).numpy())],
    "list of tensors": [X],
}


@pytest.mark.parametrize("name", TAKEN)
def test_images_of_any_sure_meaning_are_taken(name, system):
    taken = as_images(TAKEN[name], 3)
    assert taken.dtype == torch.float32 and torch.allclose(taken, X[None], atol=1 / 127.5)
    tokens = ns.encode(system, TAKEN[name])
    assert [len(token_map) for token_map in tokens] == [1] * len(system.schedule)


def test_half_is_taken_and_floats_pass_as_they_are():
    assert torch.allclose(as_images(X.half(), 3)[0], X, atol=1e-3)
    assert as_images(X[None], 3).data_ptr() == X.data_ptr()


REFUSED = {
    "NaN": (X * float("nan"), "not finite"),
    "inf": (X / 0, "not finite"),
    "floats to 255": (X * 127.5 + 127.5, "floats up to 255"),
    "six channels": (torch.zeros(1, 6, 32, 32), r"\[1, 6, 32, 32\]"),
    "channels last": (torch.zeros(1, 32, 32, 3), r"permute\(0, 3, 1, 2\)"),
    "five dimensions": (X[None, None], r"\[1, 1, 3, 32, 32\]"),
    "none": (X[None][:0], r"\[0, 3, 32, 32\]"),
    "an empty list": ([], "empty list"),
    "whole numbers": (BYTES.long(), "int64"),
    "objects": (np.array([None]), "array of object"),
    "a path": ("a.png", "got str; read files"),
    "two sizes": ([X, X[:, :16]], "one size"),
    "another size": (torch.zeros(1, 3, 48, 48), "read_images"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_image_is_refused(name, system):
    value, said = REFUSED[name]
    for verb in (lambda: ns.encode(system, value), lambda: ns.inpaint(system, value, box=(0, 0, 0.5, 1))):
        with pytest.raises(ValueError, match=said) as error:
            verb()
        assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    "labels",
    [np.int64(3), np.array([3, 3]), torch.tensor(3), torch.tensor([3, 3]), [np.int32(3), 3], [torch.tensor(3)] * 2],
)
def test_numbers_of_any_kind_are_labels(labels, system):
    count = 2 if getattr(labels, "ndim", 0) or isinstance(labels, list) else 1
    assert torch.equal(ns.sample(system, labels, seed=5), ns.sample(system, [3] * count, seed=5))


@pytest.mark.parametrize("seed", [np.int64(7), torch.tensor(7), [7], np.array([7]), torch.tensor([7]), (7,)])
def test_numbers_of_any_kind_are_seeds(seed, system):
    assert torch.equal(ns.sample(system, [1], seed=seed), ns.sample(system, [1], seed=7))


TENS = lambda system: ns.encode(system, X[None].expand(2, -1, -1, -1))  # noqa: E731
MISTAKES = {
    "label True": (lambda s: ns.sample(s, [True]), "got True"),
    "label 1.0": (lambda s: ns.sample(s, [1.0]), "got 1.0"),
    "label -1": (lambda s: ns.sample(s, [-1]), "0 to 4"),
    "label 2^70": (lambda s: ns.sample(s, [2**70]), "0 to 4"),
    "seed True": (lambda s: ns.sample(s, [1], seed=True), "got True"),
    "seed 1.5": (lambda s: ns.sample(s, [1], seed=1.5), "got 1.5"),
    "seed text": (lambda s: ns.sample(s, [1], seed="7"), "got '7'"),
    "seed -1": (lambda s: ns.sample(s, [1], seed=-1), "got -1"),
    "seed 2^64": (lambda s: ns.sample(s, [1], seed=2**64), "2\\^63"),
    "two seeds for one": (lambda s: ns.sample(s, [1], seed=[1, 2]), "got 2"),
    "guidance inf": (lambda s: ns.sample(s, [1], guidance=ns.cfg(float("inf"))), "finite"),
    "guidance nan": (lambda s: ns.sample(s, [1], guidance=ns.cfg_ramp(float("nan"))), "finite"),
    "temperature inf": (lambda s: ns.sample(s, [1], pick=tempered(ns.multinomial, float("inf"))), "finite"),
    "temperature 0": (lambda s: ns.sample(s, [1], pick=tempered(ns.multinomial, 0.0)), "above 0"),
    "top_k 1.5": (lambda s: ns.top_k_top_p(1.5, 0.5), "whole k"),
    "top_p nan": (lambda s: ns.top_k_top_p(0, float("nan")), "p=nan"),
    "unequal batches": (lambda s: ns.decode(s, [t[: 1 + (k > 0)] for k, t in enumerate(TENS(s))]), "as many images"),
    "unequal batches of logits": (
        lambda s: ns.logits(s, [t[: 1 + (k > 0)] for k, t in enumerate(TENS(s))], 1),
        "as many",
    ),
    "no tokens": (lambda s: ns.decode(s, []), "token maps"),
    "tokens of one dimension": (lambda s: ns.decode(s, [torch.zeros(1).long()]), "token maps"),
    "tokens as lists": (lambda s: ns.decode(s, [[0]]), "token maps"),
    "floats as tokens": (lambda s: ns.decode(s, [torch.zeros(1, 1)]), "float32"),
    "token -1": (lambda s: ns.decode(s, [torch.full((1, 1), -1)]), "0 to 31"),
    "token 10^6": (lambda s: ns.decode(s, [torch.full((1, 1), 10**6)]), "0 to 31"),
    "token 10^6 in logits": (lambda s: ns.logits(s, [torch.full((1, 1), 10**6)], 1), "0 to 31"),
    "psnr of two shapes": (lambda s: ns.psnr(X, X[:, :16]), "one shape"),
    "size 1e9": (lambda s: ns.read_images("a.png", 10**9), "16384"),
    "size 0": (lambda s: ns.read_images("a.png", 0), "got 0"),
    "size True": (lambda s: ns.read_images("a.png", True), "got True"),
    "size None": (lambda s: ns.read_images("a.png", None), "got None"),
    "scale 1e9": (lambda s: image_grid(X, scale=10**9), "1 to 1024"),
    "scale 1.5": (lambda s: image_grid(X, scale=1.5), "got 1.5"),
    "columns 0": (lambda s: image_grid(X, columns=0), "got 0"),
    "border -1": (lambda s: image_grid(X, border=-1), "got -1"),
    "no target class": (lambda s: ns.class_edit(s, X, box=(0, 0, 1, 1)), "needs the target class"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_in_one_sentence(name, system):
    call, said = MISTAKES[name]
    with pytest.raises(ValueError, match=said) as error:
        call(system)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_psnr_takes_one_image_and_bytes():
    y = (X + 0.1).clamp(-1, 1)
    assert torch.equal(ns.psnr(X, y), ns.psnr(X[None], y[None])) and ns.psnr(BYTES, BYTES) > 90


def test_the_verbs_of_editing_take_the_same_arguments(system):
    box = (0, 0, 0.5, 1)
    first = ns.inpaint(system, X, labels=2, box=box, seed=3)
    assert torch.equal(first, ns.class_edit(system, X, labels=2, box=box, seed=3))
    assert torch.equal(first, ns.outpaint(system, X, labels=2, box=(0.5, 0, 1, 1), seed=3))


# ---- labels ----------------------------------------------------------------------------------------------------------


NAMES = ("tench, Tinca tinca", "crane, bird", "crane, machine", "café", "CAT", "7")
READ = [
    ("tench, Tinca tinca", 0),
    ("tench", 0),
    ("TINCA TINCA", 0),
    ("cafe\u0301", 3),
    ("Cat", 4),
    ("7", 5),
    (5, 5),
]


@pytest.mark.parametrize(("label", "number"), READ)
def test_names_are_compared_as_people_read_them(label, number):
    assert ClassReader(NAMES, len(NAMES))([label]).tolist() == [number]


@pytest.mark.parametrize(
    ("label", "said"), [("crane", "several classes: 1 .* or 2"), ("tenc", "did you mean 'tench, Tinca")]
)
def test_names_that_are_not_sure_are_refused(label, said):
    with pytest.raises(ValueError, match=said):
        ClassReader(NAMES, len(NAMES))([label])


@pytest.mark.parametrize(
    ("words", "labels"),
    [
        (["tench, Tinca tinca"], ["tench, Tinca tinca"]),
        (['"tench, Tinca tinca",CAT'], ["tench, Tinca tinca", "CAT"]),
        (["tench, Tinca tinca", "CAT"], ["tench, Tinca tinca", "CAT"]),
        (["CAT, none, 0,7"], ["CAT", None, 0, "7"]),
        (["cafe\u0301"], ["cafe\u0301"]),
    ],
)
def test_labels_of_the_command_line(words, labels):
    named = var.build(small(num_classes=len(NAMES), classes=NAMES), seed=1)
    assert cli.draw.read_labels(named, words) == labels


def test_what_a_prompt_loses_is_said():
    reader = HashWords(8, length=4)
    with pytest.warns(UserWarning, match="left out: 'four five'"):
        reader(["one two three four five"])
    with pytest.raises(ValueError, match="20,000 characters, got one of 200,000"):
        reader(["a" * 200_000])


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_one_image_is_written_as_it_is(channels, tmp_path):
    pixels = torch.randint(0, 256, (channels, 32, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    for name, images in (("a.png", pixels), ("b.png", pixels[None]), ("c.webp", pixels[:3])):
        ns.save_images(images, tmp_path / name)
    again = [ns.read_images(tmp_path / name, (32, 24), channels) for name in ("a.png", "b.png")]
    assert all(torch.equal(((x[0] + 1) * 127.5).round().byte(), pixels) for x in again)
    assert Image.open(tmp_path / "a.png").mode == {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    ns.save_images(pixels, tmp_path / "d.jpg")
    assert Image.open(tmp_path / "d.jpg").size == (24, 32)


def test_many_images_are_written_for_scores(tmp_path):
    images = torch.stack([X, -X])
    ns.save_images(images, tmp_path / "folder")
    ns.save_images(images, tmp_path / "all.npz")
    files = sorted((tmp_path / "folder").iterdir())
    assert [file.name for file in files] == ["00000.png", "00001.png"]
    array = np.load(tmp_path / "all.npz")["arr_0"]
    assert array.shape == (2, 32, 32, 3) and array.dtype == np.uint8
    assert all((np.asarray(Image.open(file)) == one).all() for file, one in zip(files, array, strict=True))
    assert image_grid(images).size == (2 * 132 + 4, 132 + 4)  # a grid to look at is as it was


@pytest.mark.parametrize("name", ["x.webp", "x.jpg"])
def test_a_grid_that_no_file_can_hold_is_refused_at_the_door(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sample", "--labels", "flags", "--count", "600", "--columns", "600", "--out", name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "600 images in 600 columns" in line and "--columns" in line and not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [1, 8, 20, 600, 4000])
def test_the_usual_columns_fit_every_format(count):
    columns = cli.draw._columns(count, count)
    assert columns <= max(16, count**0.5 + 1)
    check_grid("x.webp" if count < 4000 else "x.png", count, (64, 64), columns)


def test_texts_with_accents_are_drawn():
    def ink(text):
        return np.asarray(image_grid(X, labels=[text]).convert("L"))[134:].astype(int)

    letters = [ink(text) for text in ("é", "ß", "ø", "ł", "ñ", "Ж")]
    assert all((a != b).any() for i, a in enumerate(letters) for b in letters[:i])  # no two are the same box


# ---- channels --------------------------------------------------------------------------------------------------------


def test_every_verb_keeps_to_the_channels_of_the_system(other, tmp_path, monkeypatch, capsys):
    system, folder = other
    channels = system.tokenizer.channels
    monkeypatch.chdir(tmp_path)
    mode = {1: "L", 4: "RGBA"}[channels]
    Image.effect_noise((48, 40), 80).convert(mode).save("dog.png")
    x = ns.read_images("dog.png", 32, channels)
    assert ns.decode(system, ns.encode(system, x)).shape == x.shape == (1, channels, 32, 32)
    assert ns.inpaint(system, x, box=(0, 0, 0.5, 1), labels=1).shape == x.shape
    box = ["--box", "0,0,0.5,1", "--count", "1", "--system", str(folder)]
    for words in (
        ["reconstruct", "dog.png", "--system", str(folder)],
        ["inpaint", "dog.png", *box],
        ["outpaint", "dog.png", *box],
        ["edit", "dog.png", "--labels", "1", *box],
        ["sample", "--labels", "1", "--count", "2", "--system", str(folder), "--out", "samples"],
    ):
        assert cli.main(words) == 0, capsys.readouterr().err
    assert Image.open("samples/00001.png").mode == mode and Image.open("samples/00001.png").size == (32, 32)


# ---- masks and boxes on pictures that are not square -----------------------------------------------------------------


def mask_of(*strokes, size=(64, 32), mode="L"):
    """An image (w, h) with white rectangles (x0, y0, x1, y1); what is not white is black, or of RGBA transparent."""
    image = Image.new(mode, size, 0 if mode == "L" else (0, 0, 0, 0))
    for stroke in strokes:
        image.paste(255 if mode == "L" else (255, 255, 255, 255), stroke)
    return image


@pytest.mark.parametrize("mode", ["L", "RGBA"])
@pytest.mark.parametrize(
    ("strokes", "status"),
    [([(16, 0, 32, 32)], 0), ([(0, 0, 8, 32)], 2), ([], 2)],
    ids=["inside", "outside the crop", "empty"],
)
def test_masks_mark_what_is_white_and_not_transparent(mode, strokes, status, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = ns.save(var.build(small(), seed=1), tmp_path / "s")
    Image.effect_noise((64, 32), 80).convert("RGB").save("dog.png")
    mask_of(*strokes, mode=mode).save("mask.png")
    words = ["inpaint", "dog.png", "--mask", "mask.png", "--count", "1", "--system", str(folder), "--out", "out.png"]
    assert cli.main(words) == status
    assert ("marks nothing" in capsys.readouterr().err) == (status == 2)


def test_a_box_is_a_fraction_of_the_image(tmp_path):
    Image.new("RGB", (64, 32)).save(tmp_path / "a.png")
    assert picture_size(tmp_path / "a.png") == (32, 64)
    crop = lambda *box: cli.change.box_in_crop(box, tmp_path / "a.png", (32, 32))  # noqa: E731
    assert crop(0, 0.25, 1, 0.5) == (0, 0, 1, 0.5)  # the left half of the middle square
    assert crop(0, 0, 0.5, 1) == (0, 0, 0.5, 1)
    with pytest.raises(ValueError, match=r"outside of the part .* that is used: of its 32x64 pixels the middle 32x32"):
        crop(0, 0, 1, 0.2)
