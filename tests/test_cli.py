"""The command line: what each command writes and prints; a mistake ends in one line and leaves nothing behind."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from small import small

import nextscale as ns
from nextscale import cli
from nextscale.cli import about, draw
from nextscale.cli.options import Picking
from nextscale.data.attribution import SETS
from nextscale.extras import EXTRAS
from nextscale.pixels import to_uint8
from nextscale.progress import Bar
from nextscale.recipes.generators import infinity, var


@pytest.fixture(scope="module")
def system(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("system") / "tiny"
    return ns.save(var.build(small(num_classes=3, classes=("cat", "dog", "7"))), folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return ns.save(var.build(small(num_classes=0)), tmp_path_factory.mktemp("system") / "tokenizer")


@pytest.fixture
def nextscale(capsys, monkeypatch, tmp_path):
    """Run a command line inside an empty folder; returns the exit status and the lines of both streams."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*words: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["nextscale", *map(str, words)])
        capsys.readouterr()
        try:
            code = cli.main()
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out.splitlines(), err=err.splitlines())

    return run


@pytest.fixture
def refused(nextscale, tmp_path):
    """Run a command line that must fail at the door: the line of the error."""

    def run(*words: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        result = nextscale(*words)
        assert result.code == 2 and not result.out
        assert len(result.err) == 1 and result.err[0].startswith("error: "), result.err
        assert sorted(tmp_path.rglob("*")) == before
        return result.err[0]

    return run


def size(path: str | Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def drawing(path: Path) -> Path:
    Image.linear_gradient("L").convert("RGB").save(path)
    return path


# --- help ---


def test_help_names_every_command_in_one_line_each(nextscale):
    result = nextscale("--help")
    assert result.code == 0 and nextscale().out == result.out
    for name in cli.COMMANDS:
        assert sum(line.startswith(f"  {name} ") for line in result.out) == 1
    assert max(map(len, result.out)) <= 120
    assert nextscale("--version").out == [f"nextscale {ns.__version__}"]


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_each_command_explains_itself(nextscale, command):
    result = nextscale(command, "--help")
    assert result.code == 0 and result.out[0].startswith(f"usage: nextscale {command}")


def test_train_without_a_kind_shows_its_help(nextscale):
    result = nextscale("train")
    assert result.code == 0 and "tokenizer" in "\n".join(result.out)


@pytest.mark.parametrize("kind", ["tokenizer", "generator", "encode"])
def test_torchrun_hands_every_option_on(nextscale, kind):
    """Its parser takes offence at words that begin several of its own options, even those behind the module's name."""
    from torch.distributed.run import parse_args

    text = "\n".join(nextscale("train", kind, "--help").out)
    options = sorted(set(re.findall(r"--[a-z][\w.-]*", text)))
    assert len(options) > 10
    words = ["nextscale", "train", kind, *options]
    parsed = parse_args(["--nproc-per-node", "2", "-m", *words])
    assert [parsed.training_script, *parsed.training_script_args] == words


def test_help_does_not_import_torch():
    script = """
import sys
from nextscale.cli import COMMANDS, main
for words in [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS if name not in ("train", "scaling"))]:
    try:
        main(words)
    except SystemExit as stop:
        assert not stop.code
loaded = {"torch", "numpy", "PIL", "tqdm"} & set(sys.modules)
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL, timeout=60)


# --- the commands ---


def test_sample_draws_a_grid_of_the_labels(nextscale, system):
    result = nextscale("sample", "--system", system, "--labels", "cat, 1,none", "--count", 2, "--out", "new/grid.png")
    assert result.code == 0 and result.out[-1] == "new/grid.png"
    assert not result.err  # short work without a terminal
    width, height = size("new/grid.png")
    assert 2 * 128 < width < 3 * 128 and 3 * 128 < height < 5 * 128  # a row for each label


def test_sample_without_labels_takes_the_first_classes(nextscale, system):
    assert nextscale("sample", "--system", system, "--count", 1, "--columns", 3).out == ["grid.png"]
    assert 3 * 128 < size("grid.png")[0] < 4 * 128


def test_sample_writes_the_scales_too(nextscale, system):
    result = nextscale("sample", "--system", system, "--labels", "dog", "--count", 2, "--scales", "scales.png")
    assert result.out == ["scales.png", "grid.png"]
    width, height = size("scales.png")
    assert 4 * 128 < width < 5 * 128 and 2 * 128 < height < 3 * 128  # four scales, two images


def test_same_seed_same_bytes(nextscale, system):
    def draw(*words):
        assert nextscale("sample", "--system", system, "--count", 2, "--out", "a.png", *words).code == 0
        return Path("a.png").read_bytes()

    first = draw("--seed", 3)
    assert draw("--seed", 3) == first
    assert draw("--seed", 3, "--scales", "b.png") == first
    assert draw("--seed", 4) != first
    assert draw("--seed", 3, "--guidance", 1) != first
    assert draw("--seed", 3, "--top-k", 2) != first
    assert draw("--seed", 3, "--smooth") != first
    # the title of the picture names the seed, so greedy pictures of two seeds are not compared byte for byte
    assert draw("--seed", 3, "--greedy") == draw("--seed", 3, "--greedy")


def test_images_are_those_of_the_library_whatever_the_batch(system, monkeypatch):
    loaded = ns.load(system)
    options, _ = Picking(guidance=2.0, top_k=5).resolve(loaded)
    labels = ["cat", "dog", None, 2, 0]
    expected = ns.sample(loaded, labels, seed=5, guidance=ns.cfg_ramp(2.0), pick=ns.top_k_top_p(5, 0.96))
    monkeypatch.setattr(draw, "BATCH", 2)
    frames = draw.generate(loaded, labels, 5, options, every_scale=True)
    assert len(frames) == len(loaded.schedule)
    torch.testing.assert_close(frames[-1].images, expected, atol=1e-4, rtol=0)


def test_prompts_draw_with_systems_that_read_them(nextscale, system, tmp_path, refused):
    recipe = ns.find_recipe("infinity")
    folder = ns.save(recipe.build(recipe.tiny(), seed=1), tmp_path / "reads")
    words = ["sample", "--system", folder, "--count", 2, "--seed", 3, "--out", "p.png", "--scales", "s.png"]
    result = nextscale(*words, "--prompt", "a red apple, sliced", "a cat")
    assert result.out[-1] == "p.png"
    first = Path("p.png").read_bytes()
    assert (
        nextscale(*words, "--prompt", "a red apple, sliced", "a dog").code == 0 and Path("p.png").read_bytes() != first
    )
    assert nextscale("sample", "--system", folder, "--temperature", 0.5, "--prompt", "a", "--out", "t.png").code == 0
    box = ["--box", "0,0,0.5,1", "--count", 1, "--out", "i.png"]
    assert nextscale("inpaint", drawing(tmp_path / "d.png"), "--system", folder, "--prompt", "a cat", *box).code == 0
    assert "prompts (HashWords)" in " ".join(nextscale("info", folder).out)
    assert "told what to draw by --prompt, not by --labels" in refused(*words, "--labels", "cat")
    assert "told what to draw by --labels, not by --prompt" in refused("sample", "--system", system, "--prompt", "cat")
    assert "the recipe infinity has 2b-script" in refused(*words, "--prompt", "a", "--preset", "paper-256")


def test_prompts_are_for_readers_of_texts_whatever_their_field(system):
    reads, told = infinity.build(infinity.tiny()), ns.load(system)
    reads.readers["caption"].field = "prompt"
    assert (reads.texts, told.texts) == (["caption"], [])
    assert draw.read_labels(reads, (), ["a cat"]) == ["a cat"]
    with pytest.raises(ValueError, match="told what to draw by --labels"):
        draw.read_labels(told, (), ["a cat"])


def test_a_class_may_be_called_like_a_number(system):
    loaded = ns.load(system)
    assert draw.read_labels(loaded, ["7, 2,NONE"]) == ["7", 2, None]
    assert [draw.caption(loaded, label) for label in ("7", 2, None, 3)] == ["7", "7", "no class", "class 3"]


def test_reconstruct_shows_every_scale_and_says_how_good_it_is(nextscale, tokenizer, tmp_path):
    one, two = drawing(tmp_path / "one.png"), drawing(tmp_path / "two.webp")
    result = nextscale("reconstruct", one, two, "--system", tokenizer, "--out", "r.png")
    loaded = ns.load(tokenizer)
    images = ns.read_images([one, two], loaded.image_size)
    scores = ns.psnr(ns.decode(loaded, ns.encode(loaded, images)), images).tolist()
    assert result.out == [f"{one}  {scores[0]:.2f} dB", f"{two}  {scores[1]:.2f} dB", "r.png"]
    width, height = size("r.png")
    assert 5 * 128 < width < 6 * 128 and 2 * 128 < height < 3 * 128


@pytest.mark.parametrize(
    ("command", "words"),
    [("inpaint", []), ("outpaint", ["--labels", "cat"]), ("edit", ["--labels", "cat,none"])],
)
def test_editing_writes_the_image_and_shows_what_was_seen(nextscale, system, tmp_path, command, words):
    image = drawing(tmp_path / "a.png")
    words = [command, image, "--system", system, "--count", 2, "--out", "new/e.png", "--overview", "new/o.png", *words]
    result = nextscale(*words, "--box", "0,0,0.5,1")
    assert result.code == 0 and result.out == [str(Path("new/o.png")), str(Path("new/e.png"))], result.err
    width, height = size("new/o.png")
    rows = 2 if command == "edit" else 1
    assert 5 * 128 < width < 6 * 128 and rows * 128 < height < (rows + 1) * 128
    first = Path("new/e.png").read_bytes()
    # the same region as a mask: the upper half is generated, or with outpaint the lower one
    half = tuple(side // 2 for side in Image.open(image).size)
    mask = Image.new("RGBA", Image.open(image).size, "black")
    mask.paste("white", (0, half[1], *mask.size) if command == "outpaint" else (0, 0, mask.width, half[1]))
    mask.save("mask.png")
    assert nextscale(*words, "--mask", "mask.png").code == 0 and Path("new/e.png").read_bytes() == first
    assert nextscale(*words, "--box", "0,0,1,0.5").code == 0 and Path("new/e.png").read_bytes() != first


@pytest.mark.parametrize(
    ("command", "verb", "label"), [("inpaint", "inpaint", ""), ("outpaint", "outpaint", "7"), ("edit", "inpaint", "7")]
)
@pytest.mark.parametrize("ending", ["png", "webp", "jpg"])
def test_edited_images_are_those_of_the_library(nextscale, system, tmp_path, command, verb, label, ending):
    noise = torch.rand(8, 13, 3, generator=torch.Generator().manual_seed(0)).mul(255).byte().numpy()
    Image.fromarray(noise).resize((130, 80), Image.Resampling.BICUBIC).save(
        f"photo.{ending}", lossless=True, quality=95
    )
    labels = ["--labels", label] if label else []
    words = [command, f"photo.{ending}", "--system", system, "--box", "0.25, 0,1,0.5", "--seed", 4, "--greedy", *labels]
    result = nextscale(*words, "--fit", "stretch", "--out", "one.png")
    assert result.code == 0, result.err
    loaded, pixels = ns.load(system), np.array(Image.open(f"photo.{ending}").convert("RGB"))
    options = {"box": (0.25, 0, 1, 0.5), "labels": label or None, "pick": ns.greedy, "seed": 4}
    expected = (
        to_uint8(getattr(ns, verb)(loaded, pixels, fit="stretch", blend=4, **options))[0].permute(1, 2, 0).numpy()
    )
    one = np.array(Image.open("one.png"))
    assert one.shape == pixels.shape == (80, 130, 3) and (np.abs(one.astype(int) - expected) <= 1).all()
    inside = np.zeros((80, 130), dtype=bool)
    inside[20:, :65] = True
    changed = (one != pixels).any(-1)
    assert not changed[~inside if verb == "inpaint" else inside].any() and changed.mean() > 0.2
    assert nextscale(*words, "--fit", "stretch", "--out", "several", "--count", 2).code == 0
    several = np.array(Image.open("several/00000.png")).astype(int)
    assert (np.abs(several - one) <= 1).all()  # sums of another order
    assert nextscale(*words, "--out", f"again.{ending}").code == 0 and Image.open(f"again.{ending}").size == (130, 80)


def test_variations_make_a_row_for_each_strength(nextscale, system, tmp_path):
    image = drawing(tmp_path / "a.png")
    words = ["vary", image, "--system", system, "--greedy", "--seed", 3]
    assert nextscale(*words, "--strength", 0, 1, "--count", 3, "--out", "v.png").code == 0
    width, height = size("v.png")
    assert 4 * 128 < width < 5 * 128 and 2 * 128 < height < 3 * 128
    assert nextscale(*words, "--keep", 2, "--count", 2, "--labels", "dog", "--out", "v").code == 0
    loaded = ns.load(system)
    x = ns.read_images(image, loaded.image_size).expand(2, -1, -1, -1)
    expected = to_uint8(ns.vary(loaded, x, labels="dog", keep=2, pick=ns.greedy, seed=3))
    found = [np.array(Image.open(f"v/0000{i}.png")).transpose(2, 0, 1).astype(int) for i in (0, 1)]
    assert (np.abs(np.stack(found) - expected.numpy()) <= 1).all()


def test_variations_that_cannot_be(refused, system, tmp_path):
    words = ["vary", drawing(tmp_path / "a.png"), "--system", system]
    assert "strength" in refused(*words, "--strength", 1.5)
    assert "keep: expected a whole number from 0 to 4" in refused(*words, "--keep", 5)
    assert "one label or prompt" in refused(*words, "--labels", "cat,dog")


def test_sampling_shows_its_progress(nextscale, refused, system):
    words = ["sample", "--system", system, "--labels", "cat,dog", "--count", 2]
    result = nextscale(*words, "--progress", "frames", "--gif", "a.gif", "--out", "g.png")
    assert result.code == 0 and result.out == [*(str(Path(f"frames/0{k}.png")) for k in range(4)), "a.gif", "g.png"]
    assert Path("frames/03.png").read_bytes() == Path("g.png").read_bytes() != Path("frames/02.png").read_bytes()
    with Image.open("a.gif") as animation:
        assert animation.n_frames == 4 and animation.size == Image.open("g.png").size and animation.info["loop"] == 0
    assert nextscale(*words, "--gif", "a.webp", "--out", "singles").code == 0 and Image.open("a.webp").n_frames == 4
    assert "--gif writes .gif or .webp" in refused(*words, "--gif", "a.png")


def test_demo_writes_both_pictures(nextscale, system):
    result = nextscale("demo", "--system", system, "--out", "d")
    assert result.code == 0 and result.out[-1] == str(Path("d/grid.png"))
    assert sorted(os.listdir("d")) == ["grid.png", "scales.png"]


def test_info_describes_a_system(nextscale, system, tokenizer):
    text = "\n".join(nextscale("info", system).out)
    for words in ("var: VAR", "32x32", "1 2 3 4", "classes (3)", "cat, dog, 7", "top-k 900", "model.safetensors"):
        assert words in text
    assert "train generator" in "\n".join(nextscale("info", tokenizer).out)


def test_info_lists_all_classes_in_whole_words(nextscale, tmp_path):
    names = tuple(f"some-long-class-name-{i}" for i in range(60))
    ns.save(var.build(small(num_classes=60, classes=names)), tmp_path / "many")
    result = nextscale("info", "many")
    assert set(names) <= set(" ".join(result.out).replace(",", "").split())
    assert max(map(len, result.out)) <= 100


def test_info_describes_the_installation(nextscale):
    text = " ".join(" ".join(nextscale("info").out).split())
    for words in (ns.__version__, torch.__version__.split("+")[0], "cpu", "CC BY-SA 4.0", "extra data"):
        assert words in text


def test_shipped_systems_carry_their_attribution(nextscale, system, monkeypatch):
    monkeypatch.setattr(about, "_shipped", lambda: {"emoji-64": Path(system)})
    text = " ".join(" ".join(nextscale("info", "emoji-64").out).split())
    assert "OpenMoji (https://openmoji.org), CC BY-SA 4.0" in text and str(system) in text


def test_extras_are_those_of_the_project_file():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    path = Path(__file__).parent.parent / "pyproject.toml"
    extras = tomllib.loads(path.read_text())["project"]["optional-dependencies"]
    named = {name: {text.split("=")[0].rstrip(">") for text in wanted} for name, wanted in extras.items()}
    assert {name: {package.name for package in packages} for name, packages in EXTRAS.items()} == {
        name: wanted for name, wanted in named.items() if name != "dev"
    }


def test_list_gives_recipes_with_their_first_line(nextscale):
    lines = nextscale("list").out
    assert any(line.split()[0] == "var" and "Visual Autoregressive" in line for line in lines)
    assert all(any(line.split()[0] == name for line in lines) for name in ns.shipped())
    methods = lines[next(i for i, line in enumerate(lines) if "methods that change systems" in line) :]
    assert "applies to any system that samples scale by scale" in "\n".join(methods)
    assert not any(line.split()[0] in ("var", "infinity") for line in methods)


# --- methods ---

FAST = ["--with", "fastvar", "--with.ratios", "0.25,1"]
INSIDE = ["--with", "inside", "--with.block", "-2"]


@pytest.fixture
def pictures(monkeypatch):
    """Tiles and titles of pictures in place of files."""
    saved = {}
    monkeypatch.setattr(
        "nextscale.data.images.save_images", lambda tiles, path, **kw: saved.update({str(path): (tiles, kw)}) or path
    )
    return saved


@pytest.fixture(scope="module")
def styled(tmp_path_factory) -> Path:
    config = small(num_classes=3, classes=("cat", "dog", "7"), styles=("ink", "oil"))
    return ns.save(var.build(config), tmp_path_factory.mktemp("system") / "styled")


def test_each_style_makes_a_row(nextscale, styled, pictures):
    words = ["--labels", "cat,dog", "--style", "oil, any", "--count", 2, "--seed", 3, "--style-guidance", 2]
    assert nextscale("sample", "--system", styled, *words).code == 0
    tiles, how = pictures["grid.png"]
    told = {"label": ["cat", "cat", "dog", "dog"] * 2, "style": ["oil"] * 4 + [None] * 4}
    wanted = ns.sample(ns.load(styled), told, seed=3, guidance=ns.apart(2.5, {"style": 2}, ramp=True))
    torch.testing.assert_close(tiles, wanted, atol=1e-4, rtol=0)
    assert how["columns"] == 4 and how["labels"] == ["cat, oil"] * 2 + ["dog, oil"] * 2 + ["cat"] * 2 + ["dog"] * 2
    assert "guidance 2.5 and 2 for the style" in how["title"]


def test_the_demo_has_a_row_for_each_style(nextscale, styled, pictures):
    assert nextscale("demo", "--system", styled).code == 0
    how = pictures[str(Path("out/grid.png"))][1]
    assert how["columns"] == 3 and how["labels"] == [f"{c}, {s}" for s in ("ink", "oil") for c in ("cat", "dog", "7")]
    assert len(pictures[str(Path("out/scales.png"))][0]) == 4 * 3


def test_edits_and_sets_take_a_style(nextscale, styled, pictures, tmp_path):
    image, box = drawing(tmp_path / "i.png"), ["--box", "0,0,1,0.5"]
    words = ["inpaint", image, *box, "--system", styled, "--style", "ink,oil", "--overview", "o.png"]
    assert nextscale(*words).code == 0
    assert (
        pictures["o.png"][1]["labels"][3::4]
        == pictures["inpainted.png"][1]["labels"]
        == ["no class, ink", "no class, oil"]
    )
    assert nextscale("sample-set", "--system", styled, "--style", "oil", "--each", 2, "--out", "s.npz").code == 0
    told = {"label": ["cat", "dog", "7"] * 2, "style": "oil"}
    wanted = to_uint8(ns.sample(ns.load(styled), told, seed=0)).permute(0, 2, 3, 1).numpy()
    assert (np.abs(np.load("s.npz")["arr_0"].astype(int) - wanted) <= 1).all()  # blocks of 8, each on one thread
    assert json.loads(Path("s.json").read_text())["beside"] == {"style": "oil"}


def test_wrong_styles(refused, system, styled):
    assert "told no style" in refused("sample", "--system", system, "--style", "oil")
    assert "unknown style 'oli'; did you mean 'oil'" in refused("sample", "--system", styled, "--style", "oli")
    assert "a set is of one style" in refused("sample-set", "--system", styled, "--style", "oil,ink", "--out", "s.npz")


def test_info_names_the_styles(nextscale, styled):
    assert "styles (2)" in (text := "\n".join(nextscale("info", styled).out)) and "ink, oil" in text


@pytest.mark.parametrize("words", [FAST, INSIDE, [*FAST, *INSIDE], [*INSIDE, *FAST]], ids=["f", "i", "fi", "if"])
def test_methods_draw_what_the_library_draws(nextscale, system, pictures, monkeypatch, words):
    changed = ns.load(system)
    for name in [word for word in words if word in ("fastvar", "inside")]:
        recipe = ns.find_recipe(name)
        config = recipe.Config(ratios=(0.25, 1)) if name == "fastvar" else recipe.Config(block=-2)
        changed = recipe.apply(changed, config)
    frames = {}
    expected = ns.sample(
        changed,
        ["cat", None, "cat"],
        seed=3,
        guidance=ns.cfg_ramp(3.0),
        on_scale=lambda k, images: frames.update({k: images}),
    )
    monkeypatch.setattr(draw, "BATCH", 2)
    monkeypatch.setattr(Bar, "EVERY", 0)
    common = ["--labels", "cat,none,cat", "--count", 1, "--seed", 3, "--guidance", 3, "--scales", "s.png"]
    result = nextscale("sample", "--system", system, *words, *common)
    assert result.code == 0 and f"sampling: scale {2 * len(frames)}/" in result.err[-1], result.err
    tiles, how = pictures["grid.png"]
    torch.testing.assert_close(tiles, expected, atol=1e-4, rtol=0)
    named = " and ".join(change.recipe for change in changed.changes)
    assert how["title"].startswith(f"tiny with {named}, seed 3")
    tiles, how = pictures["s.png"]
    assert how["columns"] == len(frames) == (3 if FAST[1] in words else 4)
    assert how["labels"][: len(frames)] == [*("1x1", "2x2", "3x3", "4x4")[: len(frames) - 1], how["labels"][-1]]
    torch.testing.assert_close(tiles.unflatten(0, (3, -1)), torch.stack([*frames.values()], 1), atol=1e-4, rtol=0)


def test_every_command_that_loads_a_system_takes_methods(nextscale, system, tmp_path):
    image, box = drawing(tmp_path / "a.png"), ["--box", "0,0,0.5,1", "--count", 1]
    for command in (
        ["demo", "--system", system, *FAST],
        ["reconstruct", image, "--system", system, *FAST],
        ["inpaint", image, "--system", system, *FAST, *box],
        ["outpaint", image, "--system", system, *INSIDE, *FAST, *box],
        ["edit", image, "--system", system, *FAST, *box, "--labels", "cat"],
    ):
        assert nextscale(*command).code == 0, command
    text = " ".join(nextscale("info", system, *FAST, *INSIDE).out)
    assert "fastvar: ratios [0.25, 1.0], dense_first 0" in text and "inside: block -2" in text


def test_evaluate_judges_a_changed_system(nextscale, system, monkeypatch):
    judged = []
    monkeypatch.setattr("nextscale.evaluation.report.evaluate", lambda loaded, *_, **__: judged.append(loaded))
    assert nextscale("evaluate", system, *FAST, "--data", "openmoji", "--out", "e").code == 0
    assert [change.recipe for change in judged[0].changes] == ["fastvar"]
    assert judged[0].model.embed_input.weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_evaluate_judges_in_half_precision_as_others_draw(nextscale, system, monkeypatch, dtype):
    judged = []
    monkeypatch.setattr("nextscale.evaluation.report.evaluate", lambda loaded, *_, **__: judged.append(loaded))
    assert nextscale("evaluate", system, "--dtype", dtype, "--data", "openmoji", "--out", "e").code == 0
    model = judged[0].model
    assert (model.embed_input.weight.dtype, model.head.linear.weight.dtype) == (getattr(torch, dtype), torch.float32)


def test_a_changed_system_is_saved_used_by_name_and_changed_again(nextscale, refused, system, pictures):
    assert nextscale("save", system, *FAST, "--to", "fast").out == ["fast"]
    assert nextscale("sample", "--system", "fast", "--count", 1, *INSIDE).code == 0
    tiles, how = pictures["grid.png"]
    assert how["title"].startswith("fast with fastvar and inside, ")
    assert nextscale("sample", "--system", system, "--count", 1, *FAST, *INSIDE).code == 0
    assert torch.equal(pictures["grid.png"][0], tiles)
    assert "fastvar: ratios [0.25, 1.0]" in " ".join(nextscale("info", "fast").out)
    assert "pruned already" in refused("sample", "--system", "fast", *FAST)
    assert "needs --to" in refused("save", system, *FAST)


def test_what_is_saved_again_keeps_its_model_card(nextscale, system):
    """It says the licence of the weights, and what was done to them since."""
    card = (ns.shipped()["emoji-64"] / "README.md").read_text()
    assert nextscale("save", "emoji-64", "--to", "copy").code == 0
    assert Path("copy/README.md").read_text() == card and "license: cc-by-sa-4.0" in card
    assert nextscale("save", "copy", *FAST, *INSIDE, "--to", "fast").code == 0
    changed = Path("fast/README.md").read_text()
    assert changed.startswith(card) and "copy, with its weights, was changed by these methods" in changed
    assert "* fastvar: ratios [0.25, 1.0], dense_first 0" in changed and "* inside: block -2" in changed
    assert str(Path("fast/README.md")) in " ".join(nextscale("info", "fast").out)
    assert nextscale("save", system, "--to", "none").code == 0 and not Path("none/README.md").exists()


def test_texts_of_a_method_may_hold_commas(nextscale, tmp_path):
    recipe = ns.find_recipe("infinity")
    folder = ns.save(recipe.build(recipe.tiny(), seed=1), tmp_path / "reads")
    words = ["save", folder, "--with", "negative", "--with.prompts", "blurred, ugly", "dark", "--to", "n"]
    assert nextscale(*words).code == 0 and ns.load("n").changes[0].config.prompts == ("blurred, ugly", "dark")


def test_a_method_explains_its_options(nextscale):
    for words in (["sample", "--with", "fastvar", "--help"], ["info", "--help", "--with=fastvar", "--with=inside"]):
        result = nextscale(*words)
        text = " ".join("\n".join(result.out).split())
        assert result.code == 0 and result.out[0].startswith(f"usage: nextscale {words[0]} --with fastvar")
        assert "--with.ratios [FLOAT" in text and "--with.dense-first INT" in text
        assert ("--with.block INT" in text) == ("--with=inside" in words)
    assert "--with NAME" in "\n".join(nextscale("sample", "--help").out)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--with nope", "unknown method 'nope'; there are fastvar, inside, negative"),
        ("--with var", "--with var: this recipe builds systems and changes none; there are fastvar"),
        ("--with", "--with needs the name of a method; there are fastvar"),
        ("--with.ratios 0.5 --with fastvar", "--with.ratios belongs to a method; name it before"),
        (
            "--with fastvar --with.ratio 0.5",
            "unknown option --with.ratio of fastvar; there are --with.ratios, --with.d",
        ),
        ("--with fastvar --with inside --with.ratios 0.5", "unknown option --with.ratios of inside"),
        ("--with fastvar --with.ratios", "--with.ratios of fastvar needs a value"),
        ("--with fastvar --with.ratios 0.5 1.5", "--with.ratios.1 must be at most 1, got '1.5'"),
        ("--with fastvar --with.ratios 0.5,half", "--with.ratios.1 must be a number, got 'half'"),
        ("--with fastvar --with.dense-first=-1", "--with.dense-first must be at least 0, got '-1'"),
        ("--with fastvar --with.fill air", "--with.fill must be 'cache' or 'zeros', got 'air'"),
        ("--with inside --with.block 9", "this model has blocks 0 to 1"),
        ("--with negative", "told classes, not texts"),
    ],
)
def test_methods_that_make_no_sense(refused, system, words, expected):
    assert expected in refused("sample", "--system", system, *words.split())


def test_evaluate_hands_over_to_the_report(nextscale, tokenizer, tmp_path):
    for i in range(30):
        folder = tmp_path / "data" / f"class {i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (8 * i, 20, 200)).save(folder / f"{i}.png")
    result = nextscale("evaluate", tokenizer, "--out", "e", "--data", "data")
    assert result.code == 0 and result.out[-1] == str(Path("e/report.md")), result.err
    assert Path("e/report.json").exists() and Path("e/report.md").exists()


@pytest.fixture
def run_folder(tmp_path) -> Path:
    (tmp_path / "run").mkdir()
    rows = [{"step": step, "train/loss": 1 / step} for step in (10, 20)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Path("run")


def test_curves_draws_a_row_for_each_run(nextscale, run_folder):
    assert nextscale("curves", run_folder).out == ["curves.png"]
    result = nextscale("curves", run_folder, run_folder / "metrics.jsonl", "--out", "new/c.png")
    assert result.code == 0 and result.out == [str(Path("new/c.png"))], result.err
    width, height = size("curves.png")
    assert size("new/c.png") == (width, 2 * height)


def test_train_then_train_on_it(nextscale, tmp_path):
    for i in range(8):
        (tmp_path / "data" / f"class {i % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (30 * i, 20, 200)).save(tmp_path / "data" / f"class {i % 2}" / f"{i}.png")
    common = ["--data", "data", "--preset", "tiny", "--steps", 2, "--batch-size", 2, "--augmentation.hue", 0]
    result = nextscale("train", "tokenizer", "--out", "t", *common, "--loss.l1", 0.1)
    assert result.code == 0 and result.out[-1] == str(Path("t/system")), result.err
    result = nextscale("train", "generator", "--out", "g", "--tokenizer", "t", *common, "--views", 1)
    assert result.code == 0 and result.out[-1] == str(Path("g/system")), result.err
    assert ns.load("g/system").classes == ("class 0", "class 1")
    # Encoded on their own, the seven images that are not held out serve a generator with the same settings, and no other.
    words = ["--tokenizer", "t", "--data", "data", "--cache", "c", "--augmentation.hue", 0, "--views"]
    result = nextscale("train", "encode", *words, 2)
    assert result.code == 0 and result.out[-1] == "14 images as tokens in c", result.err
    shards = {path: path.stat().st_mtime_ns for path in Path("c").iterdir()}
    result = nextscale("train", "generator", "--out", "h", "--tokenizer", "t", *common, "--views", 2, "--cache", "c")
    assert result.code == 0 and {path: path.stat().st_mtime_ns for path in Path("c").iterdir()} == shards
    assert "encoded with another views" in nextscale("train", "encode", *words, 3).err[-1]
    # A trained generator goes on with images of a class that it has and of one that it has not.
    for folder in ("class 1", "robots"):
        (tmp_path / "more" / folder).mkdir(parents=True)
        Image.new("RGB", (90, 90), "red").save(tmp_path / "more" / folder / "a.png")
    words = ["train", "generator", "--out", "n", "--init-from", "g", *common[2:], "--data", "more", "--views", 1]
    result = nextscale(*words)
    assert result.code == 0 and ns.load("n/system").classes == ("class 0", "class 1", "robots"), result.err
    assert "leave out --tokenizer" in nextscale(*words, "--tokenizer", "t").err[-1]
    assert "leave out" in nextscale(*words, "--transformer.depth", 3).err[-1]
    assert (
        "--lora needs --init-from"
        in nextscale("train", "generator", "--out", "m", "--tokenizer", "t", "--lora", 2).err[-1]
    )
    assert nextscale("curves", "t", "g").code == 0


def test_an_autoencoder_gets_another_quantizer(nextscale, refused, tmp_path):
    """Other scales, or the bits of another recipe, around a trained encoder and decoder."""
    drawing(tmp_path / "a.png")
    around = ["--system.autoencoder.around", 0, "--system.autoencoder.no-attention"]
    common = ["--data", tmp_path, "--val", tmp_path, "--steps", 1, "--batch-size", 1, "--warmup", 0, "--preset", "tiny"]
    assert nextscale("train", "tokenizer", "--out", "t", *common, *around, "--augmentation.crop", 1).code == 0
    trained = ns.load("t").tokenizer
    words = ["--autoencoder-from", "t", "--lr", 1e-12, "--augmentation.crop", 1]
    for recipe, more in (("var", around), ("infinity", [])):
        out = ["--recipe", recipe, "--out", recipe, "--system.sizes", 1, 2, 4]
        result = nextscale("train", "tokenizer", *out, *words, *common, *more)
        assert result.code == 0, result.err
        system = ns.load(recipe)
        assert str(system.schedule) == "1 2 4" and system.recipe == recipe
        for part in ("encoder", "decoder"):
            theirs = getattr(trained, part).state_dict()
            for name, weight in getattr(system.tokenizer, part).state_dict().items():
                torch.testing.assert_close(weight, theirs[name], atol=1e-6, rtol=0)
    other = ["--system.autoencoder.width", 32, *around]
    assert "the encoder of t has another shape" in refused("train", "tokenizer", "--out", "o", *words, *common, *other)
    assert "leave out --autoencoder-from" in refused(
        "train", "tokenizer", "--out", "o", *words, *common, "--init-from", "t"
    )


def test_train_on_emoji_of_five_sets(nextscale, tmp_path):
    """Data in several styles make a system that is told one."""
    common = [
        "--data",
        "emoji",
        "--oversample",
        1,
        "--steps",
        2,
        "--batch-size",
        4,
        "--warmup",
        1,
        "--validate-every",
        2,
    ]
    shape = ["--preset", "tiny", "--system.sizes", 1, 2, "--system.autoencoder.multipliers", 1, 1]  # 16 pixels
    assert nextscale("train", "tokenizer", "--out", "t", *common, *shape).code == 0
    words = ["--views", 1, "--loss.drop-parts", "label", 0.2, "style", 0.3]
    result = nextscale("train", "generator", "--tokenizer", "t", "--out", "g", "--preset", "tiny", *common, *words)
    assert result.code == 0, result.err
    system = ns.load("g")
    assert system.config.styles == tuple(system.readers["style"].choices) == tuple(SETS)
    assert nextscale("sample", "--system", "g", "--labels", "cat-face", "--style", "noto,any", "--count", 1).code == 0
    photos = ["--data", "photos", "--steps", 1, "--batch-size", 2, "--warmup", 1, "--views", 1]
    for i in range(4):
        Path("photos/a").mkdir(parents=True, exist_ok=True)
        drawing(Path(f"photos/a/{i}.png"))
    assert nextscale("train", "generator", "--init-from", "g", "--out", "more", *photos).code == 0  # without styles
    assert ns.load("more").config.styles == tuple(SETS)


def test_a_tokenizer_goes_on_from_a_changed_system(nextscale, tmp_path):
    """What comes of it is a tokenizer alone: the generator that the methods changed knows other tokens."""
    for i in range(4):
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.new("RGB", (64, 64), (30 * i, 20, 200)).save(tmp_path / "data" / f"{i}.png")
    before = ns.save(var.build(var.tiny(num_classes=3)), tmp_path / "plain")
    assert nextscale("save", before, *FAST, *INSIDE, "--to", "changed").code == 0
    words = ["--init-from", "changed", "--data", "data", "--steps", 1, "--batch-size", 2, "--augmentation.hue", 0]
    result = nextscale("train", "tokenizer", "--out", "t", *words, "--preset", "tiny")
    assert result.code == 0, result.err
    after = ns.load("t/system")
    assert after.model is None and not after.changes and not Path("t/system/model.safetensors").exists()
    weight = after.tokenizer.last_weight
    assert not torch.equal(weight, ns.load(before).tokenizer.last_weight)


@pytest.mark.parametrize(
    ("channels", "multipliers", "stride"), [(1, (1, 1, 1), 4), (4, (1, 1, 1, 1), 8), (3, (1,) * 5, 16)]
)
def test_train_on_other_channels_and_strides_with_fewer_scales_later(
    nextscale, tmp_path, channels, multipliers, stride
):
    for i in range(6):
        (tmp_path / "data" / f"class {i % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (80, 90), (30 * i, 20, 200, 255 - 20 * i)).save(
            tmp_path / "data" / f"class {i % 2}" / f"{i}.png"
        )
    common = ["--data", "data", "--preset", "tiny", "--steps", 2, "--batch-size", 2, "--augmentation.mirror", 0.5]
    shape = ["--system.sizes", 1, 2, 3, 4, "--system.autoencoder.image-channels", channels]
    shape += ["--system.autoencoder.patch", 1, "--system.autoencoder.multipliers", *multipliers]
    result = nextscale("train", "tokenizer", "--out", "t", *common, *shape)
    assert result.code == 0, result.err
    words = ["train", "generator", "--out", "g", "--tokenizer", "t", *common, "--views", 1]
    assert "must end with that of the feature map, 4" in nextscale(*words, "--sizes", 1, 2, 3).err[-1]
    assert nextscale(*words, "--sizes", 1, 2, 4).code == 0
    system = ns.load("g/system")
    assert system.schedule.sizes == ((1, 1), (2, 2), (4, 4))
    assert ns.sample(system, [0, 1], seed=0).shape == (2, channels, 4 * stride, 4 * stride)
    assert nextscale("sample", "--labels", "class 0", "--system", "g/system", "--out", "a.png").code == 0


@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_train_explains_its_options(nextscale, kind):
    result = nextscale("train", kind, "--help", "--preset", "tiny")
    text = " ".join("\n".join(result.out).split())
    assert result.code == 0 and result.out[0].startswith(f"usage: nextscale train {kind}")
    for words in ("--out PATH", "folder of the run (required)", "--batch-size INT", "--augmentation.hue FLOAT"):
        assert words in text
    assert ("--tokenizer STR" if kind == "generator" else "--system.sizes") in text


# --- mistakes ---


def test_unknown_label_names_the_closest(refused, system):
    message = refused("sample", "--system", system, "--labels", "cat,dgo")
    assert "'dgo'" in message and "did you mean 'dog'" in message
    assert "from 0 to 2" in refused("sample", "--system", system, "--labels", "4")
    assert "from 0 to 2" in refused("sample", "--system", system, "--labels", "-1")
    assert "--labels" in refused("sample", "--system", system, "--labels", " , ")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--count", "0"], "--count must be at least 1"),
        (["--columns", "-2"], "--columns must be at least 1"),
        (["--count", "5000"], "at most 4096"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**64)], "--seed"),
        (["--guidance", "-1"], "guidance"),
        (["--guidance", "nan"], "guidance"),
        (["--guidance", "inf"], "guidance"),
        (["--top-p", "1.5"], "--top-p must be at most 1"),
        (["--top-k", "-1"], "--top-k must be at least 0"),
        (["--greedy", "--smooth"], "--greedy"),
        (["--greedy", "--top-k", "5"], "--greedy"),
        (["--device", "abacus"], "--device abacus"),
        (["--device", "meta"], "--device meta"),
        (["--device", "cuda:99"], "--device cuda:99"),
    ],
)
def test_numbers_out_of_range(refused, system, words, expected):
    assert expected in refused("sample", "--system", system, "--labels", "cat", *words)


def test_wrong_options_are_told_and_nothing_runs(nextscale, tmp_path):
    for words in (["sample", "--cuont", 3], ["sample", "--count", "many"], ["demo", "extra"], ["info", "a", "b"]):
        result = nextscale(*words)
        assert result.code == 2 and result.err and "Traceback" not in "\n".join(result.err)
    assert not list(tmp_path.iterdir())


def test_unknown_command(refused):
    assert "did you mean sample" in refused("smaple")


@pytest.mark.parametrize("command", ["sample", "demo", "reconstruct", "inpaint", "info", "evaluate"])
def test_missing_system(refused, command, tmp_path):
    image = [drawing(tmp_path / "a.png")] if command in ("reconstruct", "inpaint") else []
    image += ["--box", "0,0,1,1"] if command == "inpaint" else []
    name = ["nowhere"] if command in ("info", "evaluate") else ["--system", "nowhere"]
    assert "no system 'nowhere'" in refused(command, *image, *name)


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("sample", "--out"),
        ("sample", "--scales"),
        ("reconstruct", "--out"),
        ("inpaint", "--out"),
        ("outpaint", "--out"),
        ("demo", "--out"),
    ],
)
def test_where_nothing_can_be_written_nothing_is_computed(refused, monkeypatch, tmp_path, command, option):
    monkeypatch.setattr("nextscale.checkpoint.load", lambda *a, **k: pytest.fail("loaded before the check"))
    monkeypatch.delitem(ns.__dict__, "load", raising=False)
    image = [drawing(tmp_path / "a.png")] if command not in ("sample", "demo") else []
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "folder.png").mkdir()
    try:
        assert "is a file" in refused(command, *image, option, "file/sub/a.png")
        if command != "demo":
            assert "it is a folder" in refused(command, *image, option, "folder.png")
            assert "extension '.txt'" in refused(command, *image, option, "a.txt")
            # there a name without an extension is a folder of single images
            if option != "--out" or command == "reconstruct":
                assert "extension ''" in refused(command, *image, option, "a")
    finally:
        ns.__dict__.pop("load", None)


def test_a_folder_without_permission(refused, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    assert "no permission" in refused("demo", "--out", "locked/d")


def test_two_pictures_of_one_name(refused, system):
    assert "different names" in refused("sample", "--system", system, "--out", "a.png", "--scales", "./a.png")


def test_reconstruct_says_which_file_is_no_image(refused, tokenizer, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    whole = drawing(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes(whole.read_bytes()[:100])
    for name in ("text.png", "half.png"):
        assert f"{name} cannot be read as an image" in refused("reconstruct", whole, name, "--system", tokenizer)
    assert "no such image file: missing.png" in refused("reconstruct", "missing.png", "--system", tokenizer)
    assert "folder" in refused("reconstruct", tmp_path, "--system", tokenizer)
    assert "at least one" in refused("reconstruct", "--system", tokenizer)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "either --box Y0,X0,Y1,X1 or --mask FILE, got neither"),
        (["--box", "0,0,1,1", "--mask", "a.png"], "got both"),
        (["--box", "0,0,1"], "0 <= y0 < y1 <= 1"),
        (["--box", "0.5,0,0.25,1"], "0 <= y0 < y1 <= 1"),
        (["--box", "0,0,1,nan"], "0 <= y0 < y1 <= 1"),
        (["--box", "top left"], "four numbers with commas between, got 'top left'"),
        (["--box", "0,0,0.001,1"], "holds no pixel"),
        (["--mask", "missing.png"], "no such image file: missing.png"),
        (["--mask", "text.png"], "text.png cannot be read as an image"),
        (["--mask", "black.png"], "--mask marks nothing"),
        (["--box", "0,0,1,1", "--labels", "dgo"], "did you mean 'dog'"),
        (["--box", "0,0,1,1", "--labels", " "], "--labels"),
        (["--box", "0,0,1,1", "--count", "0"], "--count must be at least 1"),
        (["--box", "0,0,1,1", "--count", "5000"], "at most 4096"),
        (["--box", "0,0,1,1", "--seed", "-1"], "--seed"),
        (["--box", "0,0,1,1", "--greedy", "--smooth"], "--greedy"),
        (["--box", "0,0,1,1", "--guidance", "nan"], "guidance"),
        (["--box", "0,0,1,1", "--device", "abacus"], "--device abacus"),
    ],
)
def test_editing_refuses_what_does_not_fit(refused, system, tmp_path, words, expected):
    (tmp_path / "text.png").write_text("no image")
    Image.new("L", (32, 32)).save(tmp_path / "black.png")
    labels = [] if "--labels" in words else ["--labels", "dog"]
    assert expected in refused("edit", drawing(tmp_path / "a.png"), "--system", system, *labels, *words)


def test_editing_needs_an_image_and_a_generator(nextscale, refused, system, tokenizer, tmp_path):
    box = ["--box", "0,0,1,1"]
    assert "no such image file" in refused("inpaint", "missing.png", *box, "--system", system)
    for command in ("inpaint", "outpaint"):
        assert "train generator" in refused(command, drawing(tmp_path / "a.png"), *box, "--system", tokenizer)
    for words in (["inpaint", *box], ["edit", "a.png", *box]):  # no image, no labels
        result = nextscale(*words)
        assert result.code == 2 and result.err and "Traceback" not in "\n".join(result.err)


def test_curves_refuses_what_it_cannot_draw(refused, run_folder, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.png").mkdir()
    assert "at least one run" in refused("curves")
    assert "nowhere is missing; expected the metrics.jsonl" in refused("curves", run_folder, "nowhere")
    assert "metrics.jsonl" in refused("curves", "empty")
    assert "ends in .png" in refused("curves", run_folder, "--out", "c.jpg")
    assert "is a file" in refused("curves", run_folder, "--out", "file/c.png")
    assert "it is a folder" in refused("curves", run_folder, "--out", "folder.png")


@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_train_refuses_at_the_door(refused, tokenizer, tmp_path, kind):
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "empty").mkdir()
    words = ["train", kind, "--preset", "tiny", *(["--tokenizer", tokenizer] if kind == "generator" else [])]
    assert "needs --out" in refused(*words)
    assert "is a file" in refused(*words, "--out", "file")
    assert "is a file" in refused(*words, "--out", "file/run")
    assert "no such folder: nowhere" in refused(*words, "--out", "o", "--data", "nowhere")
    assert "got the file file" in refused(*words, "--out", "o", "--data", "file")
    assert "expected images" in refused(*words, "--out", "o", "--data", "empty")
    assert "steps" in refused(*words, "--out", "o", "--steps", 0)
    assert "--oversample" in refused(*words, "--out", "o", "--oversample", 0)
    assert "--device abacus" in refused(*words, "--out", "o", "--device", "abacus")
    assert "there are emoji-64, tiny" in refused(*words, "--out", "o", "--preset", "tinny")


def test_train_generator_needs_a_tokenizer(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "needs --tokenizer" in refused("train", "generator", "--out", "o")
    assert "no system 'nowhere'" in refused("train", "generator", "--out", "o", "--tokenizer", "nowhere")
    assert "no config.json" in refused("train", "generator", "--out", "o", "--tokenizer", "empty")


def test_sampling_needs_a_generator(refused, tokenizer):
    assert "train generator" in refused("sample", "--system", tokenizer)


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "foreign", "config", "no config"])
def test_damaged_systems(nextscale, system, tmp_path, damage):
    folder = Path(shutil.copytree(system, tmp_path / "copy"))
    weights, config = folder / "model.safetensors", folder / "config.json"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "empty":
        weights.write_bytes(b"")
    elif damage == "missing":
        weights.unlink()
    elif damage == "foreign":
        shutil.copy(folder / "tokenizer.safetensors", weights)
    elif damage == "config":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"config": {"sizes": "many"}}))
    else:
        config.unlink()
    result = nextscale("sample", "--system", folder, "--out", "grid.png")
    name = "config.json" if "config" in damage else "model.safetensors"
    assert result.code == 2 and result.err[0].startswith("error: ") and name in result.err[0]
    assert "Traceback" not in "\n".join(result.err) and not Path("grid.png").exists()
    assert len(result.err) == 1 and len(result.err[0]) < 650
    if damage == "foreign":  # the first keys that do not fit are listed
        assert "; missing " in result.err[0]


def test_debug_shows_the_traceback(nextscale, monkeypatch):
    monkeypatch.setenv("NEXTSCALE_DEBUG", "1")
    result = nextscale("info", "nowhere")
    assert result.code == 2 and result.err[0].startswith("Traceback") and result.err[-1].startswith("error: ")


def test_interrupt_is_one_line(nextscale, system, monkeypatch):
    def stop(*words, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(draw, "generate", stop)
    result = nextscale("sample", "--system", system)
    assert (result.code, result.err, os.listdir()) == (130, ["interrupted"], [])


def test_failed_write_leaves_nothing(nextscale, system, monkeypatch):
    def full(image, path, **options):
        Path(path).write_bytes(b"half a pic")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Image.Image, "save", full)
    result = nextscale("sample", "--system", system, "--count", 1)
    assert result.code == 2 and result.err[-1].startswith("error: no space left to write grid.png; free some space")
    assert os.listdir() == []


def test_module_and_closed_pipe():
    """`python -m nextscale` is the same program, and says nothing when its reader goes away."""
    process = subprocess.Popen(
        [sys.executable, "-m", "nextscale", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) in (0, 141)
    process.stderr.close()


@pytest.mark.parametrize("words", [["list"], ["info"], ["info", "emoji-64"], ["--help"], ["sample", "--help"]])
def test_what_only_tells_does_not_import_torch(words):
    """Which takes seconds. A process of its own, since this one has imported it."""
    code = "import sys; from nextscale.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, *words], check=True, stdout=subprocess.DEVNULL)


def test_shipped_facts_are_those_of_the_system(nextscale):
    from nextscale.cli.about import _published
    from nextscale.published.convert import published_names

    assert sorted(_published()) == sorted(published_names())
    for name in ns.shipped():
        system, told = ns.load(name), "\n".join(nextscale("info", name).out)
        count = sum(parameter.numel() for parameter in system.model.parameters())
        assert f"{count / 1e6:.1f} M parameters" in told and f"{system.schedule} (" in told
        assert f"{system.image_size[0]}x{system.image_size[1]} pixels" in told
