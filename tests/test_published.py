"""Published models of every recipe: tables there and back, files of each method's own form, and what must be refused."""

import ast
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_official import Evil, same_bits

import nextscale as ns
from nextscale import cli
from nextscale.published import convert, flexvar_layout, infinity_layout
from nextscale.published.arguments import Argument, Constructor, fixed, settings_of
from nextscale.published.imagenet import imagenet_classes
from nextscale.published.weight_files import INDICES, SAFE_INDEX, read_shards, write_shards
from nextscale.recipes.generators import flexvar, infinity
from nextscale.settings import Settings
from nextscale.system_settings import SystemSettings

RECIPES = [ns.find_recipe(name) for name in ("flexvar", "infinity", "var")]
MODELS = [(recipe, name) for recipe in RECIPES for name in recipe.OFFICIAL]


class TinyFlexVAR(flexvar_layout.PublishedFlexVAR):
    """A model of the official classes that tests can write in no time."""

    @property
    def constructor(self) -> tuple[dict, dict]:
        vae, model = super().constructor
        vae |= {"codebook_size": 24, "codebook_embed_dim": 8, "z_channels": 12, "ch": 32}
        return vae, model | {"embed_dim": 32, "num_heads": 2, "num_classes": 5, "patch_nums": (1, 2, 3)}

    @property
    def classes(self) -> tuple[str, ...]:
        return imagenet_classes()[:5]


class TinyInfinity(infinity_layout.PublishedInfinity):
    """The same, its blocks in two chunks."""

    @property
    def constructor(self) -> tuple[dict, dict]:
        vae, model = super().constructor
        small = {"text_channels": 128, "text_maxlen": 6, "depth": 4, "embed_dim": 32, "num_heads": 2, "block_chunks": 2}
        return vae | {"base_ch": 32}, model | small | {"pn": "0.06M"}


TINY = {
    "flexvar-tiny": TinyFlexVAR(depth=2, epochs=4, init_gate=1e-3, fid=1, inception_score=1),
    "infinity-tiny": TinyInfinity(
        shape="2b", tokenizer_file="vae.pth", generator_file="tiny.pth", bits=8, sampling="2b-script"
    ),
    "infinity-tiny-shards": TinyInfinity(
        shape="8b", tokenizer_file="vae.pth", generator_file="weights", bits=8, patchify=True, sampling="8b-notebook"
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _tiny() -> None:
    flexvar.OFFICIAL["flexvar-tiny"] = TINY["flexvar-tiny"]
    infinity.OFFICIAL |= {name: TINY[name] for name in TINY if name.startswith("infinity")}
    yield
    for recipe in (flexvar, infinity):
        for name in set(recipe.OFFICIAL) & set(TINY):
            del recipe.OFFICIAL[name]


def recipe_of(name: str):
    return flexvar if name.startswith("flexvar") else infinity


def states(name: str, seed: int = 0) -> tuple[dict, dict]:
    """Official state dicts with numbers in every entry that may hold any."""
    recipe, published = recipe_of(name), TINY[name]
    system = recipe.build(published.config(), seed=seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in system.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    if recipe is infinity:
        return infinity.to_official(system, chunks=2)
    vae, model = flexvar.to_official(system)
    vae[flexvar_layout.USAGE] = torch.rand(65_536, generator=draw)
    model[flexvar_layout.MASK] = torch.zeros(1, 1, 7, 7)  # that of another schedule
    return vae, model


def write(folder: Path, name: str) -> Path:
    """The published files of a tiny model, in the form that its method publishes."""
    folder.mkdir(exist_ok=True)
    vae, model = states(name)
    vae_file, model_file = (folder / file for file in TINY[name].files)
    torch.save({"model": vae} if recipe_of(name) is flexvar else {"vae": vae, "ema": {}}, vae_file)
    if model_file.suffix:
        torch.save(model, model_file)
    else:
        write_shards(model, model_file, most_bytes=100_000)
    return folder


def read(folder: Path, name: str) -> tuple[dict, dict]:
    vae_file, model_file = (folder / file for file in TINY[name].files)
    vae = torch.load(vae_file, weights_only=True)["model" if recipe_of(name) is flexvar else "vae"]
    return vae, torch.load(model_file, weights_only=True) if model_file.suffix else read_shards(model_file)


# ---- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe, name", MODELS)
def test_tables_lead_back(recipe, name):
    published = recipe.OFFICIAL[name]
    given, found = published.constructor, recipe.LAYOUT.arguments(published.config(), published.constructor[1])
    for constructor, said, again in zip(recipe.LAYOUT.constructors, given, found, strict=True):
        both = set(said) & set(again)
        assert {key: again[key] for key in both} == {key: said[key] for key in both}
        assert set(said) - set(again) <= {"pn"}  # a budget is told as sizes, when a model is called
        assert constructor.complete(again) | said == constructor.complete(said)
    assert published.card and all(published.files)


def test_a_row_says_default_setting_way_back_and_refusal():
    class Config(SystemSettings):
        sizes: tuple[int, ...] = (1, 2)
        transformer: Settings = Settings()
        sampling: Settings = Settings()

    one = Constructor("official One", (Argument("pn", (1, 2), "sizes", ours=lambda n, _: n), fixed("moe", False)))
    two = Constructor("official Two", (Argument("patch_nums", (1, 2), "sizes"),))
    assert settings_of(Config, [(one, {"pn": [1, 3]}), (two, {"patch_nums": (1, 3)})]) == Config(sizes=(1, 3))
    assert one.arguments(Config(sizes=(1, 4)), {"moe": False, "pn": (9,)}) == {"pn": (1, 4), "moe": False}
    with pytest.raises(ValueError, match=r"pn and patch_nums must be the same, got \(1, 3\) and \(1, 2\)"):
        settings_of(Config, [(one, {"pn": (1, 3)}), (two, {})])
    with pytest.raises(ValueError, match=r"no published official One: moe=True \(only False\)"):
        one.complete({"moe": True})
    with pytest.raises(ValueError, match=r"unknown arguments of the official One: \['pm'\]; it has \['moe', 'pn'\]"):
        one.complete({"pm": 1})


@pytest.mark.parametrize(
    "config, words",
    [
        (flexvar.emoji_64(num_classes=3), "autoencoder.patch=4, .*position_side=16"),
        (infinity.emoji_64_text(), "autoencoder.patch=4, .*text.encoder='minilm', text.pool_heads=4"),
        (
            infinity.Config(rotary={"base": 100.0}, bits=8),
            r"rotary.base=100.0; only systems of their own shapes convert",
        ),
    ],
)
def test_what_official_classes_cannot_express_is_named(config, words):
    recipe = flexvar if isinstance(config, flexvar.Config) else infinity
    with pytest.raises(ValueError, match=f"cannot express {words}"):
        recipe.LAYOUT.arguments(config)


def test_the_core_imports_no_recipe():
    package = Path(ns.__file__).parent
    for path in package.rglob("*.py"):
        if "recipes" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            assert not any(module.startswith("nextscale.recipes.") for module in modules), path


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_there_and_back_keeps_every_bit(tmp_path, capsys, name):
    files, ours, back = write(tmp_path / "files", name), tmp_path / "ours", tmp_path / "back"
    assert cli.main(["convert", name, "--from", str(files), "--to", str(ours)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(ours)
    assert "MIT" in (ours / "README.md").read_text() and name in (ours / "README.md").read_text()
    system = ns.load(ours)
    assert system.config == TINY[name].named_config() and system.recipe == recipe_of(name).__name__.rpartition(".")[2]
    for other in (ns.load_official(name, files), ns.load_official(name, ours)):
        assert same_bits(system.state_dict(), other.state_dict())
    expected = recipe_of(name).from_official(*read(files, name), *TINY[name].constructor)
    assert same_bits(system.state_dict(), expected.state_dict())
    assert cli.main(["convert", str(ours), "--to-official", str(back)]) == 0
    assert sorted(p.name for p in back.iterdir()) == sorted(TINY[name].files)
    for before, after in zip(read(files, name), read(back, name), strict=True):
        assert same_bits(before, after)
    assert cli.main(["convert", str(ours), "--to-official", str(back)]) == 2
    assert "would be overwritten" in capsys.readouterr().err


def test_loaded_flexvar_samples(tmp_path):
    system = ns.load_official("flexvar-tiny", write(tmp_path / "files", "flexvar-tiny"))
    images = ns.sample(system, [1, 4], seed=0)
    assert images.shape == (2, 3, 48, 48) and images.isfinite().all()


@pytest.mark.parametrize("name", ["flexvar-tiny", "infinity-tiny"])
def test_own_systems_of_official_shape_are_written(tmp_path, name):
    recipe = recipe_of(name)
    system = recipe.build(TINY[name].config(), seed=3)
    paths = convert.export_official(ns.save(system, tmp_path / "own"), tmp_path / "official")
    assert [path.name for path in paths] == {
        "flexvar-tiny": ["FlexVAE.pth", "FlexVARd2.pth"],
        "infinity-tiny": ["infinity_vae_d8.pth", "infinity_4x32.pth"],
    }[name]
    content, model = (torch.load(path, weights_only=True) for path in paths)
    vae_args, model_args = recipe.LAYOUT.arguments(system.config, recipe.LAYOUT.given(system.config))
    again = recipe.from_official(*content.values(), model, vae_args, model_args)
    assert same_bits(again.state_dict(), system.state_dict())
    with pytest.raises(ValueError, match="only systems of the recipes flexvar, infinity, var have an official layout"):
        convert._layout("fastvar")


@pytest.mark.parametrize("method", ["fastvar", "inside"])
@pytest.mark.parametrize("name", TINY)
def test_what_methods_changed_has_no_official_form(tmp_path, capsys, name, method):
    recipe, changing = recipe_of(name), ns.find_recipe(method)
    changed = changing.apply(recipe.build(TINY[name].config(), seed=3), changing.tiny())
    folder, official = ns.save(changed, tmp_path / "changed"), tmp_path / "official"
    assert cli.main(["convert", str(folder), "--to-official", str(official)]) == 2
    assert f"the official code does not know {method}" in capsys.readouterr().err and not official.exists()
    with pytest.raises(ValueError, match=f"does not know {method}; take the system before it"):
        recipe.to_official(changed)
    assert len(recipe.to_official(changed.base)) == 2


@pytest.mark.parametrize("name", TINY)
def test_systems_of_half_precision_become_float32(name):
    recipe = recipe_of(name)
    system = recipe.build(TINY[name].config(), seed=3)
    dtypes = [{name: tensor.dtype for name, tensor in state.items()} for state in recipe.to_official(system)]
    states = recipe.to_official(system.half_(torch.bfloat16))
    assert [{name: tensor.dtype for name, tensor in state.items()} for state in states] == dtypes
    assert torch.bfloat16 not in {dtype for state in dtypes for dtype in state.values()}


def test_training_checkpoints(tmp_path):
    checkpoint = tmp_path / "ar-ckpt-last.pth"
    files = write(tmp_path / "files", "flexvar-tiny")
    vae, model = states("flexvar-tiny", seed=1)
    torch.save({"trainer": {"var_wo_ddp": model, "vae_local": vae, "config": {}}, "epoch": 1}, checkpoint)
    own = ns.load_official("flexvar-tiny", checkpoint=checkpoint, own_tokenizer=True)
    published = ns.load_official("flexvar-tiny", files, checkpoint=checkpoint)
    assert same_bits(own.model.state_dict(), published.model.state_dict())
    assert torch.equal(own.tokenizer.quant_conv.bias, vae["quant_conv.bias"])
    assert not torch.equal(own.tokenizer.quant_conv.bias, published.tokenizer.quant_conv.bias)

    files = write(tmp_path / "infinity", "infinity-tiny")
    torch.save({"trainer": {"gpt_fsdp": states("infinity-tiny", seed=1)[1]}}, checkpoint)
    system = ns.load_official("infinity-tiny", files, checkpoint=checkpoint)
    assert torch.equal(system.model.head.linear.weight, states("infinity-tiny", seed=1)[1]["head.weight"])
    with pytest.raises(ValueError, match="not known whether and where it holds a tokenizer; give the tokenizer's file"):
        ns.load_official("infinity-tiny", files, checkpoint=checkpoint, own_tokenizer=True)
    torch.save({"trainer": {"gpt_ema_fsdp": {}}}, checkpoint)
    with pytest.raises(ValueError, match="without trainer/gpt_fsdp"):
        ns.load_official("infinity-tiny", files, checkpoint=checkpoint)


@pytest.mark.parametrize("name", TINY)
def test_every_mismatch_is_listed_and_nothing_is_left(tmp_path, capsys, name):
    files = write(tmp_path / "files", name)
    model = files / TINY[name].files[1]
    if model.is_dir():
        state = read_shards(model)
        write_shards({k: t for k, t in state.items() if k != "head.bias"} | {"extra": torch.zeros(2)}, model)
    else:
        state = torch.load(model, weights_only=True)
        torch.save({k: t for k, t in state.items() if k != "head.bias"} | {"extra": torch.zeros(2)}, model)
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["convert", name, "--from", str(files), "--to", str(tmp_path / "ours")]) == 2
    error = capsys.readouterr().err
    assert "missing     head.bias" in error and "unexpected  extra (2,)" in error
    assert sorted(tmp_path.rglob("*")) == before
    (files / TINY[name].files[0]).unlink()
    hub = recipe_of(name).LAYOUT.hub
    with pytest.raises(FileNotFoundError, match=f"published in the hub repository {hub}"):
        ns.load_official(name, files)


def test_entries_that_follow_are_checked_but_may_be_missing(tmp_path):
    files = write(tmp_path / "files", "infinity-tiny")
    model = files / "tiny.pth"
    state = torch.load(model, weights_only=True)
    torch.save({k: t for k, t in state.items() if not k.endswith("zero_k_bias")}, model)
    ns.load_official("infinity-tiny", files)
    torch.save(state | {"text_proj_for_sos.ca.zero_k_bias": torch.ones(32)}, model)
    with pytest.raises(ValueError, match=r"text_proj_for_sos.ca.zero_k_bias in .* does not hold what follows"):
        ns.load_official("infinity-tiny", files)


# ---- folders of shards -------------------------------------------------------------------------------------------------


def as_pickles(folder: Path) -> None:
    """The same shards in the other form of the library transformers."""
    index = json.loads((folder / SAFE_INDEX).read_text())
    for file in set(index["weight_map"].values()):
        torch.save(load_file(folder / file), folder / file.replace(".safetensors", ".bin"))
        (folder / file).unlink()
    index["weight_map"] = {k: file.replace(".safetensors", ".bin") for k, file in index["weight_map"].items()}
    (folder / SAFE_INDEX).unlink()
    (folder / INDICES[1]).write_text(json.dumps(index))


def test_shards_of_both_kinds(tmp_path):
    name = "infinity-tiny-shards"
    files = write(tmp_path / "files", name)
    shards = files / "weights"
    assert len(list(shards.glob("*.safetensors"))) > 2
    system = ns.load_official(name, files)
    as_pickles(shards)
    assert same_bits(ns.load_official(name, files).state_dict(), system.state_dict())
    evil = sorted(shards.glob("*.bin"))[0]
    evil.write_bytes(pickle.dumps(Evil(tmp_path / "marker")))
    with pytest.raises(ValueError, match=r"no file of torch.save"):
        ns.load_official(name, files)
    torch.save(Evil(tmp_path / "marker"), evil)
    with pytest.raises(ValueError, match=r"nothing of it was executed"):
        ns.load_official(name, files)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "how, words",
    [
        ("no index", "holds none of model.safetensors.index.json and pytorch_model.bin.index.json"),
        ("two indices", "holds both of"),
        ("no json", "is not JSON"),
        ("no map", "has no weight_map"),
        ("outside", "names files outside of its folder: ../a.safetensors; it cannot be trusted"),
        ("lost", "lacks model-00002-of-"),
        ("cut off", "is not a whole safetensors file"),
        ("other", "does not hold what model.safetensors.index.json says"),
    ],
)
def test_shards_that_are_refused(tmp_path, how, words):
    write_shards({f"w{i}": torch.full((100,), i) for i in range(6)}, tmp_path, most_bytes=1000)
    index, shard = tmp_path / SAFE_INDEX, sorted(tmp_path.glob("*-00002-*"))[0]
    if how == "no index":
        index.unlink()
    elif how == "two indices":
        (tmp_path / INDICES[1]).write_bytes(index.read_bytes())
    elif how == "no json":
        index.write_text("{")
    elif how == "no map":
        index.write_text("{}")
    elif how == "outside":
        index.write_text(json.dumps({"weight_map": {"w0": "../a.safetensors"}}))
    elif how == "lost":
        shard.unlink()
    elif how == "cut off":
        shard.write_bytes(shard.read_bytes()[:50])
    else:
        save_file({"w9": torch.zeros(1)}, shard)
    with pytest.raises(ValueError, match=words):
        read_shards(tmp_path)
