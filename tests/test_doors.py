"""The doors of Python and of drawing: whatever has one sure meaning is taken, all else ends in one sentence."""

import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small import AUTOENCODER, small

import nextscale as ns
from nextscale import cli
from nextscale.data.images import check_grid, image_grid
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
    "list of bytes and floats": [BYTES, X],
    "float16 HWC": X.permute(1, 2, 0).numpy().astype(np.float16),
    "of another byte order": X.numpy().astype(">f4"),
    "longdouble": X.numpy().astype(np.longdouble),
    "backwards": X.flip(1).numpy()[:, ::-1],
    "bfloat16": X.bfloat16(),
}


@pytest.mark.parametrize("name", TAKEN)
def test_images_of_any_sure_meaning_are_taken(name, system):
    taken = as_images(TAKEN[name], 3)
    assert taken.dtype == torch.float32 and torch.allclose(taken, X[None].expand_as(taken), atol=1 / 127.5)
    tokens = ns.encode(system, TAKEN[name])
    assert [len(token_map) for token_map in tokens] == [len(taken)] * len(system.schedule)


def test_floats_of_a_byte_are_taken(system):
    assert torch.allclose(as_images(X.to(torch.float8_e4m3fn))[0], X, atol=0.1)


def test_half_is_taken_and_floats_pass_as_they_are():
    assert torch.allclose(as_images(X.half(), 3)[0], X, atol=1e-3)
    assert as_images(X[None], 3).data_ptr() == X.data_ptr()


def closed():
    image = Image.new("RGB", (32, 32))
    image.close()
    return image


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
    "whole numbers in an array": (BYTES.long().numpy(), "int64; convert"),
    "truth values": (X > 0, "torch.bool"),
    "complex": (X.to(torch.complex64), "complex64"),
    "sparse": (X.to_sparse(), "to_dense"),
    "two dimensions": (X[0], r"got \[32, 32\]"),
    "a number": (5, "got int"),
    "nothing": (None, "got NoneType"),
    "a table": ({"image": X}, "got dict"),
    "a list of lists": ([[X]], "a list of lists"),
    "more than there is memory for": (X[:, :1, :1].expand(3, 10**6, 10**6), "more than 8,589,934,592 numbers"),
    "a closed Pillow image": (closed(), "open its file again"),
    "Pillow of floats": (Image.new("F", (32, 32)), "floats of unknown range"),
    "Pillow of another size": (Image.new("RGB", (48, 48)), r"\[1, 3, 48, 48\]"),
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
    ("images", "said"),
    [((X + 1) / 2, "all in [0, 1]"), (X * 2.5, "from -2.5 to 2.5"), (X, ""), (X * 1.1, ""), ((X + 3) / 4, "")],
)
def test_images_of_another_range_are_noticed(images, said, system, recwarn):
    ns.encode(system, images)
    ns.psnr(images, images)
    assert [said in str(each.message) for each in recwarn] == ([True, True] if said else [])
    assert all(each.filename == __file__ for each in recwarn)


@pytest.mark.parametrize(
    "labels",
    [np.int64(3), np.array([3, 3]), torch.tensor(3), torch.tensor([3, 3]), [np.int32(3), 3], [torch.tensor(3)] * 2],
)
def test_numbers_of_any_kind_are_labels(labels, system):
    count = 2 if getattr(labels, "ndim", 0) or isinstance(labels, list) else 1
    assert torch.equal(ns.sample(system, labels, seed=5), ns.sample(system, [3] * count, seed=5))


@pytest.mark.parametrize(
    "seed", [np.int64(7), torch.tensor(7), [7], np.array([7]), torch.tensor([7]), (7,), range(7, 8)]
)
def test_numbers_of_any_kind_are_seeds(seed, system):
    assert torch.equal(ns.sample(system, [1], seed=seed), ns.sample(system, [1], seed=7))


NAN, INF = float("nan"), float("inf")


def tokens_of(system, rows=2):
    return ns.encode(system, X[None].expand(rows, -1, -1, -1))


def unequal(system):
    return [token_map[: 1 + (k > 0)] for k, token_map in enumerate(tokens_of(system))]


def guided(*weights):
    return ns.Guidance(lambda schedule, k: weights)


class Held:
    """Data that nobody reads, since what is asked of them is refused."""

    train = val = classes = ()


BOX = (0, 0, 0.5, 1)
NO_PICK = "expected ns.greedy"
MISTAKES = {
    # labels
    "label True": (lambda s: ns.sample(s, [True]), "got True"),
    "label of numpy's True": (lambda s: ns.sample(s, [np.bool_(True)]), "True"),
    "labels of truth values": (lambda s: ns.sample(s, torch.tensor([True])), "got True"),
    "label 1.0": (lambda s: ns.sample(s, [1.0]), "got 1.0"),
    "labels 1.0": (lambda s: ns.sample(s, np.array([1.0])), "got 1.0"),
    "label nan": (lambda s: ns.sample(s, NAN), "got nan"),
    "label -1": (lambda s: ns.sample(s, [-1]), "0 to 4"),
    "labels without numbers": (lambda s: ns.sample(s, torch.zeros(1, device="meta")), "on the device meta"),
    "label 2^70": (lambda s: ns.sample(s, [2**70]), "0 to 4"),
    "labels in a table": (lambda s: ns.sample(s, torch.tensor([[1], [2]])), "got tensor"),
    "labels in lists": (lambda s: ns.sample(s, [[1], [2]]), r"got \[1\]"),
    "labels in a set": (lambda s: ns.sample(s, {1, 2}), r"a list .* got \{1, 2\}"),
    "label of bytes": (lambda s: ns.sample(s, b"cat"), "a list .* got b'cat'"),
    "label of 100,000 letters": (lambda s: ns.sample(s, "x" * 100_000), "no class names, got 'xxx"),
    "no labels": (lambda s: ns.sample(s, np.array([], dtype=int)), "empty list"),
    # seeds
    "seed True": (lambda s: ns.sample(s, [1], seed=True), "got True"),
    "seed tensor of True": (lambda s: ns.sample(s, [1], seed=torch.tensor(True)), "True"),
    "seed 1.5": (lambda s: ns.sample(s, [1], seed=1.5), "got 1.5"),
    "seed text": (lambda s: ns.sample(s, [1], seed="7"), "got '7'"),
    "seed None": (lambda s: ns.sample(s, [1], seed=None), "got None"),
    "seed -1": (lambda s: ns.sample(s, [1], seed=-1), "got -1"),
    "seed 2^64": (lambda s: ns.sample(s, [1], seed=2**64), "2\\^63"),
    "two seeds for one": (lambda s: ns.sample(s, [1], seed=[1, 2]), "got 2"),
    "seeds in a table": (lambda s: ns.sample(s, [1], seed=np.array([[1]])), "whole number"),
    # guidance
    "guidance inf": (lambda s: ns.cfg(INF), "finite"),
    "guidance nan": (lambda s: ns.cfg_ramp(NAN), "finite"),
    "guidance 1e308": (lambda s: ns.cfg(1e308), "-1000 to 1000"),
    "guidance text": (lambda s: ns.cfg("2"), "got '2'"),
    "guidance None": (lambda s: ns.cfg(None), "got None"),
    "guidance True": (lambda s: ns.cfg_ramp(True), "got True"),
    "ramp of a list": (lambda s: ns.cfg_ramp([1, 2]), r"got \[1, 2\]"),
    "guidance with a nan": (lambda s: ns.cfg([1.0, NAN]), "got nan"),
    "guidance of too few": (lambda s: ns.sample(s, [1], guidance=ns.cfg([1.0, 2.0])), "4 scales, got 2"),
    "guidance of none": (lambda s: ns.cfg([]), "one number, or one for each scale, got none"),
    "guidance a number": (lambda s: ns.sample(s, [1], guidance=2.5), r"ns.cfg\(2.5\).* got 2.5"),
    "guidance 0": (lambda s: ns.sample(s, [1], guidance=0), "got 0"),
    "own guidance nan": (lambda s: ns.sample(s, [1], guidance=guided(NAN, NAN)), "2 finite weights"),
    "own guidance of one": (lambda s: ns.sample(s, [1], guidance=guided(1.0)), "2 finite weights"),
    # picks
    "temperature inf": (lambda s: tempered(ns.multinomial, INF), "finite"),
    "temperature nan": (lambda s: tempered(ns.multinomial, [1.0, NAN]), "finite"),
    "temperature 0": (lambda s: tempered(ns.multinomial, 0.0), "above 0"),
    "temperature -1": (lambda s: tempered(ns.multinomial, -1), "above 0"),
    "temperature 1e-300": (lambda s: tempered(ns.multinomial, 1e-300), "got 1e-300"),
    "temperature text": (lambda s: tempered(ns.multinomial, "1"), "got '1'"),
    "temperature first": (lambda s: tempered(1.5, ns.multinomial), f"{NO_PICK}.* got 1.5"),
    "top_k 1.5": (lambda s: ns.top_k_top_p(1.5, 0.5), "whole k"),
    "top_k inf": (lambda s: ns.top_k_top_p(INF), "whole k"),
    "top_k text": (lambda s: ns.top_k_top_p("5"), "whole k .* k='5'"),
    "top_k True": (lambda s: ns.gumbel_soft(True), "whole k"),
    "top_p nan": (lambda s: ns.top_k_top_p(0, NAN), "p=nan"),
    "top_p text": (lambda s: ns.gumbel_soft(0, "0.5"), "p='0.5'"),
    "pick of a name": (lambda s: ns.sample(s, [1], pick="greedy"), f"{NO_PICK}.* got 'greedy'"),
    "pick a number": (lambda s: ns.sample(s, [1], pick=0.5), f"{NO_PICK}.* got 0.5"),
    "pick that is not made": (lambda s: ns.sample(s, [1], pick=ns.top_k_top_p), NO_PICK),
    "soft pick that is not made": (lambda s: ns.sample(s, [1], pick=ns.gumbel_soft), NO_PICK),
    # what else sampling takes
    "generator 5": (lambda s: ns.sample(s, [1], generator=5), "torch.Generator.* got 5"),
    "schedule of a list": (lambda s: ns.sample(s, [1], schedule=[1, 2]), r"ns.Schedule.* got \[1, 2\]"),
    "schedule of 10^10 tokens": (lambda s: ns.Schedule(((10**5, 10**5),)), "got one of 10000000000"),
    "on_scale of a name": (lambda s: ns.sample(s, [1], on_scale="x"), "function of .* got 'x'"),
    "edit of a name": (lambda s: ns.sample(s, [1], edit="x"), "function of .* got 'x'"),
    "one step too many": (lambda s: ns.step(s, ns.run(s, ns.start(s, [1]))), "all of its steps"),
    "rows that there are not": (lambda s: ns.start(s, [1]).select(torch.tensor([5])), "from 0 to 0, got"),
    # tokens
    "unequal batches": (lambda s: ns.decode(s, unequal(s)), r"as many images at every scale, got \[1, 2, 2, 2\]"),
    "unequal batches of logits": (lambda s: ns.logits(s, unequal(s), 1), "as many images at every scale"),
    "no tokens": (lambda s: ns.decode(s, []), r"\[1, 4, 9, 16\] tokens, or the first of them, got \[\]"),
    "no images": (lambda s: ns.decode(s, [t[:0] for t in tokens_of(s)]), "as many images"),
    "None as tokens": (lambda s: ns.decode(s, None), "a list of token maps .* got None"),
    "a tensor as tokens": (lambda s: ns.decode(s, torch.zeros(1, 30).long()), r"a list .* got a tensor \[1, 30\]"),
    "an image as tokens": (lambda s: ns.decode(s, X), "a list of token maps"),
    "None as a token map": (lambda s: ns.decode(s, [None]), "NoneType"),
    "tokens of one dimension": (lambda s: ns.decode(s, [torch.zeros(1).long()]), r"\[B, l\]"),
    "tokens of three dimensions": (lambda s: ns.decode(s, [torch.zeros(1, 1, 1).long()]), r"\[B, l\].* \[1, 1, 1\]"),
    "tokens as lists": (lambda s: ns.decode(s, [[0]]), "token maps"),
    "tokens backwards": (lambda s: ns.decode(s, tokens_of(s)[::-1]), r"got \[16, 9, 4, 1\]"),
    "floats as tokens": (lambda s: ns.decode(s, [torch.zeros(1, 1)]), "float32"),
    "truth values as tokens": (lambda s: ns.decode(s, [torch.zeros(1, 1).bool()]), "torch.bool"),
    "token -1": (lambda s: ns.decode(s, [torch.full((1, 1), -1)]), "0 to 31, got -1"),
    "token 10^6": (lambda s: ns.decode(s, [torch.full((1, 1), 10**6)]), "0 to 31, got 1000000"),
    "token 10^6 in logits": (lambda s: ns.logits(s, [torch.full((1, 1), 10**6)], 1), "0 to 31, got 1000000"),
    "soft nan": (lambda s: ns.decode(s, [ns.Soft(torch.full((1, 1, 32), NAN))]), "not finite"),
    "soft of 7 codes": (lambda s: ns.decode(s, [ns.Soft(torch.ones(1, 1, 7) / 7)]), r"\[B, l, 32\].* \[1, 1, 7\]"),
    "soft below 0": (
        lambda s: ns.decode(s, [ns.Soft(torch.eye(32)[:1, None] * 3 - 1 / 16)]),
        "at least 0 and sum to 1",
    ),
    "texts as a token map": (lambda s: ns.decode(s, [np.array(["a"])]), "a list of token maps"),
    "soft of another sum": (lambda s: ns.decode(s, [ns.Soft(torch.ones(1, 1, 32))]), "sum to 1"),
    "soft whole numbers": (lambda s: ns.decode(s, [ns.Soft(torch.ones(1, 1, 32).long())]), "int64"),
    "three labels for two": (lambda s: ns.logits(s, tokens_of(s), [1, 2, 3]), "each of 2 images, got 3"),
    "schedule of a list in decode": (lambda s: ns.decode(s, tokens_of(s), [1, 2]), "ns.Schedule"),
    # what a system is
    "a name as system": (lambda s: ns.sample("emoji-64", [1]), "a system first, got 'emoji-64'; load one"),
    "a name in encode": (lambda s: ns.encode("emoji-64", X), "a system first"),
    "a name in decode": (lambda s: ns.decode("emoji-64", tokens_of(s)), "a system first"),
    "a name in logits": (lambda s: ns.logits("emoji-64", tokens_of(s), 1), "a system first"),
    "a name in inpaint": (lambda s: ns.inpaint("emoji-64", X, box=BOX), "a system first"),
    "a name in evaluate": (lambda s: ns.evaluate("emoji-64", None, "out"), "a system first"),
    "a name in save": (lambda s: ns.save("emoji-64", "out"), "a system first"),
    "a list in find_recipe": (lambda s: ns.find_recipe(["var"]), r"unknown recipe \['var'\]"),
    "a number in load": (lambda s: ns.load(5), "the name of a system, got 5"),
    "data of a name": (lambda s: ns.evaluate(s, "folder", "out"), "ns.image_folder"),
    "names in evaluate_tokenizer": (lambda s: ns.evaluate_tokenizer(s.tokenizer, ["a"], s.schedule), "must be dicts"),
    "NaN in evaluate_tokenizer": (
        lambda s: ns.evaluate_tokenizer(s.tokenizer, [{"image": X * NAN}], s.schedule),
        "finite",
    ),
    "batches in evaluate_tokenizer": (
        lambda s: ns.evaluate_tokenizer(s.tokenizer, [{"image": X[None]}], s.schedule),
        r"\[C, H, W\], got some of \[1, 3, 32, 32\]",
    ),
    "two sizes in evaluate_tokenizer": (
        lambda s: ns.evaluate_tokenizer(s.tokenizer, [{"image": X}, {"image": X[:, :16]}], s.schedule),
        "in one size",
    ),
    "a system in evaluate_tokenizer": (lambda s: ns.evaluate_tokenizer(s, [], s.schedule), "system.tokenizer"),
    "samples True": (lambda s: ns.evaluate(s, Held(), "out", samples=True), "at least 2"),
    "samples 10^12": (lambda s: ns.evaluate(s, Held(), "out", samples=10**12), "2 to 1000000, got 1000000000000"),
    "weights of int8": (lambda s: ns.save(s, "out", dtype=torch.int8), "got torch.int8"),
    "a folder of None": (lambda s: ns.save(s, None), "path of a folder to write, got None"),
    "a device of a name": (lambda s: ns.load("emoji-64", device="xyz"), "cannot compute on device xyz; expected cpu"),
    "a source of a name": (lambda s: ns.open_images("photos", 32), r"ns.DataSource.* got 'photos'"),
    "images of a number": (lambda s: ns.image_folder(5, 32), "path of a folder of images, got 5"),
    "a share of text": (lambda s: ns.image_folder("a", 32, validation="x"), r"share in \[0, 1\), got 'x'"),
    "shards of None": (lambda s: ns.web_shards(None, 32), "path of a shard, got None"),
    "a dataset of None": (lambda s: ns.hub_images(None, 32), "package datasets, .* got None"),
    "drawings of 10^9": (lambda s: ns.openmoji(10**9), "1 to 2048, got 1000000000"),
    # scores and files
    "psnr of two shapes": (lambda s: ns.psnr(X, X[:, :16]), "one shape"),
    "psnr of two and one": (lambda s: ns.psnr(X.expand(2, -1, -1, -1), X), "one shape"),
    "psnr of NaN": (lambda s: ns.psnr(X * NAN, X), "not finite"),
    "psnr of 0 to 255": (lambda s: ns.psnr(X, BYTES.float()), "floats up to 255"),
    "psnr of whole numbers": (lambda s: ns.psnr(BYTES.long(), X), "int64"),
    "psnr of names": (lambda s: ns.psnr("a.png", "b.png"), "ns.read_images"),
    "psnr of two dimensions": (lambda s: ns.psnr(X[0], X[0]), r"1, 3 or 4 channels, got \[32, 32\]"),
    "psnr of none": (lambda s: ns.psnr(X[None][:0], X[None][:0]), r"\[0, 3, 32, 32\]"),
    "size 1e9": (lambda s: ns.read_images("a.png", 10**9), "16384"),
    "size 0": (lambda s: ns.read_images("a.png", 0), "got 0"),
    "size True": (lambda s: ns.read_images("a.png", True), "got True"),
    "size None": (lambda s: ns.read_images("a.png", None), "got None"),
    "size of three": (lambda s: ns.read_images("a.png", (1, 2, 3)), r"got \(1, 2, 3\)"),
    "channels 2": (lambda s: ns.read_images(__file__, 32, 2), "got 2"),
    "channels True": (lambda s: ns.read_images(__file__, 32, True), "got True"),
    "a number as path": (lambda s: ns.read_images([5], 32), "path of an image file, got 5"),
    "a picture as path": (lambda s: ns.read_images(Image.new("L", (8, 8)), 32), "path of an image file"),
    "a path of 5,000 letters": (lambda s: ns.read_images("a" * 5000, 32), "no file can have the name 'aaa"),
    "a path with NUL": (lambda s: ns.read_images("a\0.png", 32), r"no file can have the name 'a\\x00.png'"),
    "scale 1e9": (lambda s: image_grid(X, scale=10**9), "1 to 1024"),
    "scale 1.5": (lambda s: image_grid(X, scale=1.5), "got 1.5"),
    "columns 0": (lambda s: image_grid(X, columns=0), "got 0"),
    "columns True": (lambda s: image_grid(X, columns=True), "got True"),
    "border -1": (lambda s: image_grid(X, border=-1), "got -1"),
    "captions in a table": (lambda s: image_grid(X, labels={"a": 1}), "one label for each of 1 images, got {'a': 1}"),
    "a label of a number": (lambda s: image_grid(X, labels=[5]), "labels and title are texts, got 5"),
    "labels 5": (lambda s: image_grid(X, labels=5), "one label for each of 1 images, got 5"),
    "save inf": (lambda s: ns.save_images(X / 0, "a.png"), "not finite"),
    "save 0 to 255": (lambda s: ns.save_images(BYTES.float(), "a.png"), "floats up to 255"),
    "save none": (lambda s: ns.save_images(X[None][:0], "a.png"), r"\[0, 3, 32, 32\]"),
    "save nothing": (lambda s: ns.save_images(None, "a.png"), "got NoneType"),
    "save nowhere": (lambda s: ns.save_images(X, ""), "path of a file to write, got ''"),
    "save to a number": (lambda s: ns.save_images(X, 5), "path of a file to write, got 5"),
    "labels in an array": (lambda s: ns.save_images(X, "a.npz", labels=["a"]), "as they are, got labels="),
    "columns in a folder": (lambda s: ns.save_images(X, "folder", columns=2), "as they are, got columns="),
    "a format without colours": (lambda s: ns.save_images(X, "a.xbm"), "unknown image extension"),
    "a format that is not installed": (lambda s: ns.save_images(X, "a.h5"), "unknown image extension"),
    # edits
    "a box without numbers": (lambda s: ns.inpaint(s, X, box=torch.zeros(4, device="meta")), "a box is"),
    "a name of 5,000 letters to save": (lambda s: ns.save(s, "a" * 5000), "no file can have the name 'aaa"),
    "sizes in a set": (lambda s: ns.read_images("a.png", {1, 2}), r"size: expected .* got \{1, 2\}"),
    "a title of a table": (lambda s: image_grid(X, title={}), "labels and title are texts"),
    "a schedule of 10^400": (lambda s: ns.Schedule.squares(10**400), "got one of "),
    "tokens of two for likelihood": (lambda s: ns.evaluate_likelihood(s, torch.zeros(2, 2).long(), 1), r"\[N, 30\]"),
    "names for likelihood": (lambda s: ns.evaluate_likelihood(s, ["a"], 1), "expected tokens"),
    "no target class": (lambda s: ns.class_edit(s, X, box=(0, 0, 1, 1)), "needs the target class"),
    "box 5": (lambda s: ns.inpaint(s, X, box=5), "a box is .* got 5"),
    "box of text": (lambda s: ns.inpaint(s, X, box="0,0,1,1"), "a box is .* got '0,0,1,1'"),
    "box with None": (lambda s: ns.inpaint(s, X, box=(0, 0, None, 1)), "got .*None"),
    "box of 100,000": (lambda s: ns.inpaint(s, X, box=[0.0] * 100_000), "a box is"),
    "mask of a name": (lambda s: ns.inpaint(s, X, "m.png"), "PIL.Image.open"),
    "mask of objects": (lambda s: ns.inpaint(s, X, np.array([None])), "a mask is a tensor"),
    "mask nan": (lambda s: ns.inpaint(s, X, torch.full((32, 32), NAN)), "got values from nan"),
    "mask of another size": (lambda s: ns.inpaint(s, X, Image.new("L", (64, 64), 255)), r"got \[64, 64\]"),
    "kept of names": (lambda s: ns.keep_tokens(["a"], ["b"]), "keep_tokens needs .* got \\['a'\\]"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_in_one_sentence(name, system):
    call, said = MISTAKES[name]
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=said) as error:
        call(system)
    assert "\n" not in str(error.value) and len(str(error.value)) < 450
    raised = traceback.extract_tb(error.value.__traceback__)[-1]  # by a line of ours, not by Python's luck
    assert "nextscale" in raised.filename and "raise" in "".join(raised.line.split()[:1])


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.int8, "numpy"])
def test_tokens_of_any_whole_number_are_taken(kind, system):
    tokens = tokens_of(system)
    other = [t.numpy() if kind == "numpy" else t.to(kind) for t in tokens]
    assert torch.equal(ns.decode(system, other), ns.decode(system, tokens))
    assert torch.equal(ns.logits(system, other, 1), ns.logits(system, tokens, [1, 1]))


@pytest.mark.parametrize("weights", [2.0, torch.tensor(2.0), [2.0] * 4, np.full(4, 2.0), torch.full((4,), 2.0)])
def test_weights_of_any_kind_are_taken(weights, system):
    expected = ns.sample(system, [1], guidance=ns.cfg(2), pick=tempered(ns.multinomial, 2))
    made = ns.sample(system, [1], guidance=ns.cfg(weights), pick=tempered(ns.multinomial, weights))
    assert torch.equal(made, expected)


MARKED = torch.zeros(32, 32, dtype=torch.bool)
MARKED[:16] = True
MASKS = {
    "array": MARKED.numpy(),
    "list": MARKED.tolist(),
    "ones": MARKED.long(),
    "bytes": MARKED.to(torch.uint8) * 255,
    "[1, H, W]": MARKED[None],
    "Pillow": Image.fromarray(MARKED.numpy()),
    "Pillow of greys": Image.fromarray((MARKED.to(torch.uint8) * 255).numpy()),
    "white on transparent": Image.fromarray((MARKED.to(torch.uint8) * 255)[..., None].expand(-1, -1, 4).numpy()),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_any_sure_meaning_are_taken(name, system):
    expected = ns.inpaint(system, X, MARKED, seed=2)
    assert torch.equal(ns.inpaint(system, X, MASKS[name], seed=2), expected)
    assert torch.equal(ns.inpaint(system, X, box=BOX, seed=2), expected)


@pytest.mark.parametrize(("empty", "said"), [([0, 1], "nothing is generated"), ([1], "mask 1 marks nothing")])
def test_masks_that_mark_nothing_are_noticed(empty, said, system):
    masks = MARKED.expand(2, 1, -1, -1).clone()
    masks[empty] = False
    with pytest.warns(UserWarning, match=said):
        ns.inpaint(system, X.expand(2, -1, -1, -1), masks)


def test_psnr_takes_one_image_and_bytes():
    y = (X + 0.1).clamp(-1, 1)
    assert torch.equal(ns.psnr(X, y), ns.psnr(X[None], y[None])) and ns.psnr(BYTES, BYTES) > 90
    torch.testing.assert_close(ns.psnr(X, -X), ns.psnr(TAKEN["Pillow"], -X.numpy()), atol=0.1, rtol=0)
    assert torch.equal(ns.psnr(X, y), ns.psnr(X, y[None]))


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
    with pytest.raises(ValueError, match="Unicode"):
        reader(["a\udcff"])
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


@pytest.mark.parametrize("ending", [".npz", ".NPZ"])
def test_an_array_is_written_under_its_name(ending, tmp_path):
    path = ns.save_images([X, -X], tmp_path / f"a{ending}")
    assert [file.name for file in tmp_path.iterdir()] == [path.name] and len(np.load(path)["arr_0"]) == 2


def test_single_images_are_not_mixed_with_others(tmp_path):
    ns.save_images([X] * 3, tmp_path / "a")
    ns.save_images([-X] * 3, tmp_path / "a")  # the same again
    with pytest.raises(ValueError, match=r"other files than the 2 images to write \('00002.png'"):
        ns.save_images([X] * 2, tmp_path / "a")


@pytest.mark.parametrize("name", ["x.webp", "x.jpg"])
def test_a_grid_that_no_file_can_hold_is_refused_at_the_door(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sample", "--labels", "flags", "--count", "600", "--columns", "600", "--out", name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "600 images in 600 columns" in line and "--columns" in line and not list(tmp_path.iterdir())


REFUSED_WORDS = {
    "10^12 images": (["--count", "1000000000000"], "--count must be at most 1,000,000"),
    "a folder of too many": (["--count", "100001", "--out", "folder"], "100000"),
    "a picture within the folder": (["--out", "a", "--scales", "a/00000.png"], "two pictures would go to a"),
    "a name that is too long": (["--out", "y" * 300 + ".png"], "no file can have the name 'yyy"),
    "a name with NUL": (["--out", "a\0.png"], r"no file can have the name 'a\x00.png'"),
    "temperature inf": (["--temperature", "inf"], "--temperature must be finite, got inf"),
    "temperature nan": (["--temperature", "nan"], "--temperature must be finite, got nan"),
    "temperature 0": (["--temperature", "0"], "--temperature must be at least 1e-06, got 0"),
    "guidance nan": (["--guidance", "nan"], "--guidance must be finite, got nan"),
    "top-k -1": (["--top-k", "-1"], "--top-k must be at least 0, got -1"),
    "top-p 2": (["--top-p", "2"], "--top-p must be at most 1, got 2"),
    "device hpu": (["--device", "hpu"], "cannot compute on --device hpu"),
    "quotes": (["--labels", '"a'], "quotes do not close"),
    "no prompt": (["--prompt"], "--prompt needs a value"),
    "a link in a circle": (
        ["--out", "loop.png"],
        "the name 'loop.png': Too many levels of symbolic links",
    ),
    "a folder in a circle": (["--out", "loop/a.png"], "no file can have the name 'loop/a.png'"),
}


@pytest.mark.parametrize("name", REFUSED_WORDS)
def test_the_command_line_refuses_before_it_works(name, tmp_path, monkeypatch, capsys):
    words, said = REFUSED_WORDS[name]
    monkeypatch.chdir(tmp_path)
    links = [Path("loop.png"), Path("loop")]
    for link in links:
        link.symlink_to(link)
    assert cli.main(["sample", *([] if "--labels" in words else ["--labels", "flags"]), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line.startswith("error: ")
        and said in line
        and sorted(tmp_path.iterdir()) == sorted(tmp_path / link for link in links)
    )


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
    assert (ink("\uff21") == ink("A")).all() and (ink("中") == ink("?")).all()  # near letters instead of boxes


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
    ("strokes", "status", "words_of_mistake"),
    [([(16, 0, 32, 32)], 0, "error"), ([(0, 0, 8, 32)], 2, "100 % lies outside"), ([], 2, "marks nothing")],
    ids=["inside", "outside the crop", "empty"],
)
def test_masks_mark_what_is_white_and_not_transparent(
    mode, strokes, status, words_of_mistake, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    folder = ns.save(var.build(small(), seed=1), tmp_path / "s")
    Image.effect_noise((64, 32), 80).convert("RGB").save("dog.png")
    mask_of(*strokes, mode=mode).save("mask.png")
    words = ["inpaint", "dog.png", "--mask", "mask.png", "--count", "1", "--system", str(folder), "--out", "out.png"]
    assert cli.main(words) == status
    assert (words_of_mistake in capsys.readouterr().err) == (status == 2)


def test_a_mask_of_another_shape_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = ns.save(var.build(small(), seed=1), tmp_path / "s")
    Image.effect_noise((64, 32), 80).convert("RGB").save("dog.png")
    for size, status in (((32, 32), 2), ((128, 64), 0)):  # one of twice its size is of its shape
        mask_of((32, 0, 64, 32), size=size).save("mask.png")
        assert cli.main(["inpaint", "dog.png", "--mask", "mask.png", "--count", "1", "--system", str(folder)]) == status
    assert "--mask mask.png is of 32x32 pixels and dog.png of 32x64" in capsys.readouterr().err


def test_numbers_that_are_names_are_names(tmp_path, capsys, monkeypatch):
    """Folders 5, 7 and 9: `--labels 7` is the class of that name, and 2 is none, although a class has that number."""
    monkeypatch.chdir(tmp_path)
    ns.save(var.build(small(num_classes=3, classes=("5", "7", "9")), seed=1), "s")
    asked = ["sample", "--system", "s", "--count", "1", "--labels"]
    assert cli.main([*asked, "7"]) == 0
    assert "warning: --labels 7 is the class of that name, whose number is 1" in capsys.readouterr().err
    assert cli.main([*asked, "2"]) == 2
    assert "no class is called 2; these classes have numbers as names: 5, 7, 9" in capsys.readouterr().err


TRAINS = {
    "tuples": ([(torch.zeros(3, 64, 64), 1)], "items must be dicts"),
    "bytes": ([{"image": torch.zeros(3, 64, 64, dtype=torch.uint8)}], "tensor of floats, got torch.uint8"),
    "pictures": ([{"image": Image.new("RGB", (64, 64))}], "tensor of floats, got Image"),
    "no images": ([{"label": 1}], "the data have none"),
    "nothing": ([], "one item or more"),
    "None": (None, "one item or more"),
    "two sizes": ([{"image": torch.zeros(3, 64, side)} for side in (64, 32)], r"in one size, got \[\(3, 64, 32\), "),
}


@pytest.mark.parametrize("name", TRAINS)
def test_data_that_nothing_trains_on_are_refused(name, tmp_path):
    data, said = TRAINS[name]
    config = ns.TrainConfig(steps=1, batch_size=2, warmup=0)
    with pytest.raises(ValueError, match=said):
        ns.train_tokenizer(var.build(small(sizes=(1, 2, 8)), seed=1, model=False), data, config, out=tmp_path)


@pytest.mark.parametrize(("changes", "said"), [({"config": 3}, "TrainConfig"), ({"loss": 3}, "GeneratorLoss")])
def test_settings_of_another_kind_are_refused(changes, said, tmp_path):
    with pytest.raises(TypeError, match=rf"expected ns.{said}\(...\), got 3"):
        ns.train_model(var.build(small(), seed=1), [], **{"config": ns.TrainConfig(), "out": tmp_path} | changes)
