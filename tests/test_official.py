"""Published checkpoints: the official layout of all of them, conversion to the bit, and files that must be refused."""

import json
import pickle
import random
import shutil
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

import nextscale as ns
from nextscale import cli
from nextscale.cli import draw
from nextscale.published import convert
from nextscale.published.imagenet import imagenet_classes
from nextscale.published.layout import from_states
from nextscale.published.var_layout import LAYOUT, USAGE, VAR, VQVAE, PublishedVAR
from nextscale.published.weight_files import read_pth
from nextscale.recipes.generators import flexvar, var
from nextscale.sampling.defaults import SamplingDefaults
from nextscale.training.rates import learning_rate, weight_decay

SCHEMA = Path(__file__).parent / "data" / "golden" / "schema.json"
LINK = "https://huggingface.co/FoundationVision/var/resolve/main/"


@cache
def schema() -> dict:
    return json.loads(SCHEMA.read_text())


def entries(name: str) -> tuple[dict, dict]:
    """What the schema says of a published model: tokenizer, generator."""
    published = var.OFFICIAL[name]
    side = 16 * published.sizes[-1]
    models = schema()["models"]
    return models[f"vqvae_{side}"], models[f"var_d{published.depth}_{side}"]


def states(name: str, device: str) -> tuple[dict, dict]:
    """Full-size state dicts in the layout of the schema, not filled, so that they cost no memory."""
    both = []
    for part in entries(name):
        both.append(
            {k: torch.empty(s, dtype=getattr(torch, d), device=device) for k, (s, d) in part["state_dict"].items()}
        )
    return both[0], both[1]


class Tiny(PublishedVAR):
    """A model of the official classes that tests can write in no time."""

    @property
    def constructor(self) -> tuple[dict, dict]:
        vae, transformer = super().constructor
        return vae | {"ch": 32, "vocab_size": 48, "z_channels": 8}, transformer | {"embed_dim": 32, "num_classes": 5}

    @property
    def classes(self) -> tuple[str, ...]:
        return imagenet_classes()[:5]


@pytest.fixture(scope="session", autouse=True)
def _tiny() -> None:
    training = var.OFFICIAL["var-d16"].training
    var.OFFICIAL |= {
        "var-tiny": Tiny(depth=2, sizes=(1, 2, 3), training=training, fid=1, paper_fid=1, paper_is=1),
        "var-tiny-shared": Tiny(
            depth=4, sizes=(1, 3, 4), shared_adaln=True, training=training, fid=1, paper_fid=1, paper_is=1
        ),
    }
    yield
    del var.OFFICIAL["var-tiny"], var.OFFICIAL["var-tiny-shared"]


@cache
def tiny_states(name: str = "var-tiny", usage_rows: int = 3) -> tuple[dict, dict]:
    usage = torch.rand(usage_rows, 48, generator=torch.Generator().manual_seed(1))
    return var.to_official(var.build(var.OFFICIAL[name].config()), usage)


def write(folder: Path, name: str = "var-tiny", **changes: object) -> Path:
    """The published files of a tiny model in `folder`."""
    folder.mkdir(exist_ok=True)
    for file, state in zip(var.OFFICIAL[name].files, tiny_states(name, **changes), strict=True):
        torch.save(state, folder / file)
    return folder


@pytest.fixture
def files(tmp_path) -> Path:
    return write(tmp_path / "files")


def same_bits(a: dict, b: dict) -> bool:
    return list(a) == list(b) and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and a[k].numpy().tobytes() == b[k].numpy().tobytes()
        for k in a
    )


PUBLISHED = ["var-d16", "var-d20", "var-d24", "var-d30", "var-d36"]


# ---- the layout of all published models ------------------------------------------------------------------------------


def test_all_published_models_are_listed():
    assert list(var.OFFICIAL)[:5] == PUBLISHED
    assert var.OFFICIAL["var-d36"].files == ("vae_ch160v4096z32.pth", "var_d36.pth")
    assert [var.OFFICIAL[name].fid for name in PUBLISHED] == [3.55, 2.95, 2.33, 1.97, 2.63]


@pytest.mark.parametrize("name", PUBLISHED)
def test_layout_is_the_official_one_and_loads_strictly(name):
    config = var.OFFICIAL[name].config()
    vae, transformer = states(name, "meta")
    system = from_states(LAYOUT, var.build, config, (vae, transformer), complete=True)
    side = 512 if name == "var-d36" else 256
    assert system.image_size == (side, side) and system.schedule.sizes[-1] == (side // 16, side // 16)
    for module, state, part in zip(
        (system.tokenizer, system.model), var.to_official(system), entries(name), strict=True
    ):
        expected = part["state_dict"]
        assert list(state) == list(expected)  # the order too
        assert {k: [list(t.shape), str(t.dtype).removeprefix("torch.")] for k, t in state.items()} == expected
        assert sum(p.numel() for p in module.parameters()) == part["n_params"]
    rates = [block.branches[0].drop_path.rate for block in system.model.blocks]
    assert rates == pytest.approx(entries(name)[1]["drop_path_per_block"])


def test_nothing_may_be_missing():
    config = var.OFFICIAL["var-d16"].config()
    vae, transformer = states("var-d16", "meta")
    del transformer["lvl_1L"]
    from_states(LAYOUT, var.build, config, (vae, transformer))  # it follows from the settings
    with pytest.raises(ValueError, match=r"missing     lvl_1L \(1, 680\)"):
        from_states(LAYOUT, var.build, config, (vae, transformer), complete=True)
    del vae["quant_conv.bias"]
    with pytest.raises(ValueError, match=r"missing     quant_conv.bias \(32,\)"):
        from_states(LAYOUT, var.build, config, (vae, transformer))


@pytest.mark.parametrize("name", PUBLISHED)
def test_constructor_and_training_are_the_published_ones(name):
    vae, transformer = entries(name)
    published = var.OFFICIAL[name]
    got_vae, got_var = published.constructor
    assert VQVAE.defaults | got_vae == {
        k: tuple(v) if isinstance(v, list) else v for k, v in vae["constructor"].items()
    }
    expected = {k: tuple(v) if isinstance(v, list) else v for k, v in transformer["constructor"].items()}
    expected |= {"flash_if_available": True, "fused_if_available": True}
    assert expected.pop("head_dim") == 64
    got_var = VAR.defaults | got_var
    assert got_var.pop("drop_path_rate") == pytest.approx(expected.pop("drop_path_rate"))
    assert got_var == expected
    args, training = transformer["published_training_args"], published.training
    iterations = -(-1_281_167 // args["bs"])
    ours = (training.epochs, training.batch_size, training.final_lr, training.weight_decay, training.final_weight_decay)
    assert ours == (args["ep"], args["bs"], args["wpe"], args["twd"], args["twde"])
    assert training.lr == pytest.approx(args["tlr"]) and training.init_gate == args["alng"]
    assert (training.steps, training.warmup) == (args["ep"] * iterations, args["wp_epochs"] * iterations)
    config = training.config(device="cuda")
    assert (config.clip, config.betas, config.first_lr) == (args["tclip"], tuple(args["betas"]), args["wp0"])
    assert [learning_rate(config, step) for step in (0, training.warmup, training.steps - 1)] == pytest.approx(
        [args["tlr"] * args["wp0"], args["tlr"], args["tlr"] * args["wpe"]]
    )
    assert weight_decay(config, training.steps - 1) == pytest.approx(args["twde"])
    preset = var.PRESETS[name.removeprefix("var-")]()
    assert preset == published.config() and preset.transformer.init_gate == args["alng"]


def test_d16_weights_are_taken_over_not_copied():
    config = var.OFFICIAL["var-d16"].config()
    vae, transformer = states("var-d16", "cpu")
    with torch.device("meta"):
        empty = var.build(config)
    layout = var.to_official(empty)[1]
    transformer |= {name: tensor for name, tensor in layout.items() if not tensor.is_meta}
    system = from_states(LAYOUT, var.build, config, (vae, transformer), complete=True)
    again = var.to_official(system, vae[USAGE])
    for before, after in zip((vae, transformer), again, strict=True):
        copied = [k for k in before if before[k].data_ptr() != after[k].data_ptr()]
        assert all("zero_k_bias" in k or k in ("lvl_1L", "attn_bias_for_masking") for k in copied)


# ---- loading ---------------------------------------------------------------------------------------------------------


def test_classes_have_their_names(files):
    names = imagenet_classes()
    assert len(names) == len(set(names)) == 1000
    assert (names[207], names[980]) == ("golden retriever", "volcano")
    assert var.OFFICIAL["var-d16"].classes == flexvar.OFFICIAL["flexvar-d16"].classes == names
    system = ns.load_official("var-tiny", files)
    assert torch.equal(ns.sample(system, ["tench, Tinca tinca"], seed=1), ns.sample(system, [0], seed=1))


def test_load_official_is_from_official(files):
    system = ns.load_official("var-tiny", files)
    vae, transformer = tiny_states()
    other = var.from_official(vae, transformer, *var.OFFICIAL["var-tiny"].constructor)
    assert all(torch.equal(a, b) for a, b in zip(system.parameters(), other.parameters(), strict=True))
    assert system.sampling == ns.load_official("var-tiny", files, verify=False).sampling
    assert torch.equal(ns.sample(system, [1, 2], seed=3), ns.sample(other, [1, 2], seed=3))


@pytest.mark.parametrize("rows", [10, 14])
def test_usage_of_another_schedule_does_not_stop_loading(tmp_path, rows):
    ns.load_official("var-tiny-shared", write(tmp_path / "files", "var-tiny-shared", usage_rows=rows))


def test_training_checkpoints(files, tmp_path):
    vae, transformer = tiny_states()
    trained = {k: t + 1 if k == "decoder.conv_in.bias" else t for k, t in vae.items()}
    content = {
        "epoch": 3,
        "trainer": {
            "config": {"patch_nums": (1, 2, 3)},
            "var_wo_ddp": transformer,
            "vae_local": trained,
            "var_opt": {},
        },
        "args": {"bs": 768, "fp16": 1},
    }
    checkpoint = tmp_path / "ar-ckpt-last.pth"
    torch.save(content, checkpoint)
    published = ns.load_official("var-tiny", files, checkpoint=checkpoint)
    own = ns.load_official("var-tiny", checkpoint=checkpoint, own_tokenizer=True)
    assert torch.equal(own.tokenizer.decoder.conv_in.bias, published.tokenizer.decoder.conv_in.bias + 1)
    (files / "var_d2.pth").unlink()
    checkpoint.rename(files / "var_d2.pth")  # in place of the published file
    ns.load_official("var-tiny", files)
    torch.save({"trainer": {"vae_local": vae}}, checkpoint)
    with pytest.raises(ValueError, match="without trainer/var_wo_ddp"):
        ns.load_official("var-tiny", files, checkpoint=checkpoint)
    torch.save(transformer, checkpoint)
    with pytest.raises(ValueError, match="no training checkpoint, so it carries no tokenizer"):
        ns.load_official("var-tiny", files, checkpoint=checkpoint, own_tokenizer=True)


def test_half_precision_files_become_float32(files):
    transformer = tiny_states()[1]
    torch.save({k: t.bfloat16() if "weight" in k else t for k, t in transformer.items()}, files / "var_d2.pth")
    system = ns.load_official("var-tiny", files)
    assert torch.equal(system.model.head.linear.weight, transformer["head.weight"].bfloat16().float())
    assert all(p.dtype == torch.float32 for p in system.parameters())


def test_missing_files_are_named_with_their_address(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no folder") as error:
        ns.load_official("var-d16", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError) as error:
        ns.load_official("var-d16", tmp_path)
    for words in (
        "vae_ch160v4096z32.pth and var_d16.pth missing",
        LINK + "vae_ch160v4096z32.pth",
        LINK + "var_d16.pth",
    ):
        assert words in str(error.value)
    (tmp_path / "vae_ch160v4096z32.pth").touch()
    with pytest.raises(FileNotFoundError) as error:
        ns.load_official("var-d36", tmp_path)
    assert str(error.value).startswith("var_d36.pth missing in") and LINK + "var_d36.pth" in str(error.value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match=r"could not fetch var_d16.pth|could not fetch vae_ch160v4096z32.pth"):
        ns.load_official("var-d16")
    with pytest.raises(ValueError, match=r"no published model 'var-d17'; there are flexvar-d16, .*, var-d16, var-d20"):
        ns.load_official("var-d17", tmp_path)


# ---- conversion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, rows", [("var-tiny", 3), ("var-tiny-shared", 7)])
def test_round_trip_keeps_every_bit(tmp_path, capsys, name, rows):
    files = write(tmp_path / "files", name, usage_rows=rows)
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert cli.main(["convert", name, "--from", str(files), "--to", str(ours)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(ours)
    assert cli.main(["convert", str(ours), "--to-official", str(back)]) == 0
    for file, state in zip(var.OFFICIAL[name].files, tiny_states(name, usage_rows=rows), strict=True):
        written = next(path for path in back.iterdir() if path.name.startswith(file[:3]))
        assert same_bits(torch.load(written, weights_only=True), state)
        assert written.stat().st_size < (files / file).stat().st_size + 20_000  # each tensor once, and nothing else
    system = ns.load(ours)
    images = ns.sample(system, [0, 4], seed=1)
    assert torch.equal(images, ns.sample(ns.load_official(name, files), [0, 4], seed=1))
    assert torch.equal(images, ns.sample(ns.load_official(name, ours), [0, 4], seed=1))
    assert "MIT" in (ours / "README.md").read_text()


def test_own_systems_can_be_taken_to_the_reference(tmp_path):
    system = var.build(var.OFFICIAL["var-tiny"].config(), seed=5)
    paths = convert.export_official(ns.save(system, tmp_path / "own"), tmp_path / "official")
    vae, transformer = (torch.load(path, weights_only=True) for path in paths)
    assert vae[USAGE].shape == (3, 48) and not vae[USAGE].any()
    again = var.from_official(vae, transformer, *LAYOUT.arguments(system.config))
    assert all(torch.equal(a, b) for a, b in zip(system.parameters(), again.parameters(), strict=True))


def test_conversion_refuses_at_the_door(files, tmp_path, capsys):
    ours = convert.convert_official("var-tiny", files, tmp_path / "ours")

    def refused(*words: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert cli.main(["convert", *map(str, words)]) == 2
        assert sorted(tmp_path.rglob("*")) == before
        return capsys.readouterr().err

    assert "give either --to" in refused("var-tiny", "--from", files)
    assert "holds a system already" in refused("var-tiny", "--from", files, "--to", ours)
    assert "is converted already" in refused("var-tiny", "--from", ours, "--to", tmp_path / "new")
    assert "would be overwritten" in refused(
        ours, "--to-official", files.rename(tmp_path / "vae_only") and official_like(ours)
    )
    assert "go with --to" in refused(ours, "--to-official", tmp_path / "new", "--own-tokenizer")
    assert "no published model" in refused("var-d99", "--from", tmp_path, "--to", tmp_path / "new")
    with pytest.raises(ValueError, match="holds another system than var-d16"):
        ns.load_official("var-d16", ours)
    (ours / convert.EXTRA).write_bytes(b"no safetensors")
    assert "official.safetensors is damaged" in refused(ours, "--to-official", tmp_path / "new")


def official_like(system: Path) -> Path:
    """A folder that holds a file of the name that an export would write."""
    folder = system.parent / "vae_only"
    (folder / "var_d2.pth").touch()
    return folder


def test_what_the_reference_cannot_express_is_named():
    with pytest.raises(ValueError, match=r"cannot express autoencoder.patch=4.*pyramid.standardize=True"):
        LAYOUT.arguments(var.emoji_64())
    config = var.OFFICIAL["var-tiny"].config()
    with pytest.raises(ValueError, match=r"cannot express sizes=1 2x1"):
        LAYOUT.arguments(config.model_copy(update={"sizes": (1, (2, 1))}))
    vae, transformer = LAYOUT.arguments(config)
    assert var.official_config(vae, transformer).pyramid == config.pyramid


# ---- files that must be refused --------------------------------------------------------------------------------------


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("form", ["zip", "plain pickle", "inside a checkpoint", "beside the weights"])
def test_malicious_pickles_run_nothing(files, tmp_path, form):
    marker, target = tmp_path / "marker", files / "var_d2.pth"
    evil = Evil(marker)
    pickle.loads(pickle.dumps(evil))
    assert marker.exists()  # it works
    marker.unlink()
    if form == "plain pickle":
        target.write_bytes(pickle.dumps(evil))
    elif form == "zip":
        torch.save(evil, target)
    elif form == "inside a checkpoint":
        torch.save({"trainer": {"var_wo_ddp": tiny_states()[1]}, "args": evil}, target)
    else:
        torch.save(tiny_states()[1] | {"evil": evil}, target)
    for verify in (True, False):
        with pytest.raises(ValueError, match=r"var_d2.pth .*(nothing of it was executed|no file of torch.save)"):
            ns.load_official("var-tiny", files, verify=verify)
    with pytest.raises(ValueError):
        convert.convert_official("var-tiny", files, tmp_path / "ours")
    assert not marker.exists() and not (tmp_path / "ours").exists()


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "cut off":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "flipped":
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    elif how == "pointer":
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    elif how == "picture":
        ns.save_images(torch.zeros(1, 3, 8, 8), path.with_suffix(".png"))
        path.with_suffix(".png").rename(path)
    elif how == "other zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "hello")
    elif how == "script":
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("var_d2/constants.pkl", pickle.dumps(()))
    elif how == "compressed":
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(path.with_suffix(".z"), "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
        path.with_suffix(".z").rename(path)
    elif how == "list":
        torch.save([torch.zeros(1)], path)
    elif how == "numbers":
        torch.save({"pos_start": 1.0}, path)
    elif how == "sparse":
        torch.save(tiny_states()[1] | {"head.weight": torch.eye(3).to_sparse()}, path)
    elif how == "not finite":
        state = dict(tiny_states()[1])
        torch.save(state | {"head.bias": torch.full_like(state["head.bias"], torch.nan)}, path)
    elif how == "integers":
        state = dict(tiny_states()[1])
        torch.save(state | {"head.bias": state["head.bias"].long()}, path)
    elif how == "changed code":
        state = dict(tiny_states()[1])
        key = "blocks.1.attn.zero_k_bias"
        torch.save(state | {key: state[key] + 1}, path)


@pytest.mark.parametrize(
    "how, words",
    [
        ("cut off", r"is cut off or damaged.*download it again"),
        ("empty", r"\(0 bytes\) is no file of torch.save .*download it again"),
        ("flipped", r"var_d2.pth is cut off or damaged.*Bad CRC-32.*download it again"),
        ("pointer", r"is a Git LFS pointer, not the file itself; download it again"),
        ("picture", r"is no file of torch.save"),
        ("other zip", r"is cut off or damaged, or no file of torch.save"),
        ("script", r"not laid out as torch.save does it"),
        ("compressed", r"not laid out as torch.save does it"),
        ("list", r"holds no state dict"),
        ("numbers", r"holds no state dict"),
        ("sparse", r"holds no state dict"),
        ("not finite", r"numbers that are not finite, in model.head.linear.bias"),
        ("integers", r"head.bias in .* must hold floating-point numbers, got torch.int64"),
        ("changed code", r"blocks.1.attn.zero_k_bias in .* does not hold what follows from the model's settings"),
    ],
)
def test_files_that_are_not_what_they_should_be(files, how, words):
    damage(files / "var_d2.pth", how)
    with pytest.raises(ValueError, match=words):
        ns.load_official("var-tiny", files)


def test_every_flipped_byte_is_found_or_does_not_matter(tmp_path):
    path = tmp_path / "small.pth"
    state = {"a": torch.arange(32.0), "b": torch.arange(4)}
    torch.save(state, path)
    data, draw = path.read_bytes(), random.Random(0)
    for _ in range(150):
        place, bit = draw.randrange(len(data)), 1 << draw.randrange(8)
        path.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
        try:
            got = read_pth(path)
        except ValueError as error:
            assert "small.pth" in str(error)
        else:
            assert same_bits(got, state)


def test_wrong_and_swapped_models_list_every_mismatch(files, tmp_path):
    write(tmp_path / "shared", "var-tiny-shared")
    (tmp_path / "shared" / "var_d4.pth").rename(files / "var_d2.pth")
    with pytest.raises(ValueError) as error:
        ns.load_official("var-tiny", files)
    text = str(error.value)
    assert "wrong shape pos_1LC: expected (1, 14, 32), got (1, 26, 32)" in text and "more" not in text
    for key in tiny_states("var-tiny-shared")[1]:
        if "blocks.2" in key or "blocks.3" in key or "ada_gss" in key:
            assert f"  unexpected  {key} " in text
    for key in tiny_states()[1]:
        if "ada_lin" in key and "blocks" in key:
            assert f"  missing     {key} " in text
    (files / "vae_ch160v4096z32.pth").rename(files / "var_d2.pth")
    torch.save(tiny_states()[1], files / "vae_ch160v4096z32.pth")
    with pytest.raises(ValueError, match="look swapped"):
        ns.load_official("var-tiny", files)


def test_a_published_file_of_another_size_is_recognised(tmp_path):
    vae, transformer = states("var-d20", "meta")
    assert (
        convert._hint(convert._find("var-d16"), vae, transformer) == "\n(the generator's width 1280 is that of var-d20)"
    )


# ---- presets ---------------------------------------------------------------------------------------------------------


def test_presets_say_the_reference_settings_in_our_words(files):
    paper = {
        "guidance": 2.5,
        "style_guidance": None,
        "ramp": True,
        "top_k": 900,
        "top_p": 0.96,
        "temperature": 1.0,
        "smooth": False,
    }
    assert var.SAMPLING["paper-256"].model_dump() == paper
    assert ns.load_official("var-tiny", files).sampling.model_dump() == paper
    schedule = ns.Schedule.squares(*var.SIZES_256)
    for preset in var.SAMPLING.values():
        weights = preset.options()["guidance"].weights
        assert weights(schedule, 0) == (1, 0) and weights(schedule, 9)[0] == preset.guidance
    with pytest.raises(ValidationError):
        SamplingDefaults(guidance=-1)


def test_sample_takes_a_preset(files, tmp_path, capsys, monkeypatch):
    convert.convert_official("var-tiny", files, tmp_path / "ours")
    monkeypatch.chdir(tmp_path)
    words = ["sample", "--system", "ours", "--labels", "1", "--count", "2"]
    system = ns.load("ours")
    seen = []
    real = draw.generate
    monkeypatch.setattr(draw, "generate", lambda *a, **k: seen.append(real(*a, **k)) or seen[-1])
    for options in ([], ["--smooth"], ["--guidance", "1"]):
        assert cli.main([*words, "--preset", "demo", *options]) == 0
    preset = var.SAMPLING["demo"]
    for images, change in zip(seen, ({}, {"smooth": True}, {"guidance": 1}), strict=True):
        expected = ns.sample(system, [1, 1], seed=0, **preset.model_copy(update=change).options())
        torch.testing.assert_close(images[-1].images, expected)
    assert cli.main([*words, "--preset", "papier"]) == 2
    assert "unknown --preset 'papier'; the recipe var has paper-256, paper-512, demo" in capsys.readouterr().err


# ---- d16 for real ----------------------------------------------------------------------------------------------------

LOAD = """
import sys, time
import nextscale as ns
def peak(): return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
ns.load_official, ns.sample
before, start = peak(), time.perf_counter()
system = ns.load_official("var-d16", sys.argv[1])
print(before, peak(), sum(p.nbytes for p in system.parameters()), time.perf_counter() - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_d16_for_real(tmp_path):
    files, ours, back = tmp_path / "files", tmp_path / "ours", tmp_path / "back"
    files.mkdir()
    system = var.build(var.OFFICIAL["var-d16"].config(), seed=1)
    with torch.no_grad():  # biases and offsets are zeros at first
        for i, p in enumerate(system.parameters()):
            p.add_(0.01 * torch.randn(1, generator=torch.Generator().manual_seed(i)))
    both = var.to_official(system, torch.rand(10, 4096))
    for file, state in zip(var.OFFICIAL["var-d16"].files, both, strict=True):
        torch.save(state, files / file)
    for folder in (files, ours):
        if folder is ours:
            convert.convert_official("var-d16", files, ours)
        out = subprocess.run([sys.executable, "-c", LOAD, folder], capture_output=True, text=True, check=True).stdout
        before, peak, weights, seconds = map(float, out.split())
        print(f"{folder.name}: peak {peak / weights:.2f} x weights, {before / 1e6:.0f} MB before, {seconds:.1f} s")
        assert peak < 1.3 * weights
    convert.export_official(ours, back)
    for file, state in zip(var.OFFICIAL["var-d16"].files, both, strict=True):
        assert same_bits(torch.load(back / file, weights_only=True, mmap=True), state)
    for folder in (files, ours, back):  # 5 GB, which pytest would keep
        shutil.rmtree(folder)
