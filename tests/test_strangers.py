"""Systems from anywhere: what is saved can be loaded, and a folder of a stranger takes neither memory nor time."""

import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import small

import nextscale as ns
from nextscale import cli
from nextscale.recipes.generators import var


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return ns.save(var.build(small(), seed=1), tmp_path_factory.mktemp("systems") / "small")


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def edit(folder, **settings):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name, value in settings.items():
        *parts, last = name.split("__")
        place = config
        for part in parts:
            place = place[part]
        place[last] = value
    path.write_text(json.dumps(config))


CONFIGS = [
    ({"config__transformer__depth": 10**9}, "transformer.depth must be at most 1024, got 1000000000"),
    ({"config__transformer__depth": 200}, "do not fit"),
    ({"config__transformer__depth": 2**63}, "transformer.depth"),
    ({"config__transformer__depth": 10**400}, "transformer.depth"),
    ({"config__transformer__dim": -1}, "transformer.dim must be at least 1, got -1"),
    ({"config__transformer__dim": 65_536}, "do not fit|cannot be built|divisible|num_heads"),
    ({"config__transformer__dim": 1.5}, "transformer.dim must be a whole number, got 1.5"),
    ({"config__transformer__dim": [[[1]]]}, r"transformer.dim must be a whole number, got \[\[\[1\]\]\]"),
    ({"config__transformer__dim": None}, "transformer.dim must be a whole number, got None"),
    ({"config__transformer__num_heads": 3}, "heads"),
    ({"config__transformer__mlp_ratio": float("inf")}, "Infinity"),
    ({"config__transformer__mlp_ratio": float("nan")}, "NaN"),
    ({"config__sizes": [4096] * 1000}, "tokens together"),
    ({"config__sizes": []}, "sizes needs 1"),
    ({"config__sizes": [0]}, "sizes.0"),
    ({"config__sizes": [10**9]}, "sizes.0 must be at most 4096"),
    ({"config__sizes": "1 2 3"}, "sizes must be a list"),
    ({"config__autoencoder__multipliers": [1] * 40}, "autoencoder.multipliers takes at most 10 values"),
    ({"config__autoencoder__multipliers": [1] * 10}, "do not fit|cannot be built"),
    ({"config__pyramid__codebook_size": 2**24}, "do not fit"),
    ({"config__num_classes": 10**6}, "do not fit"),
    ({"config__num_classes": 10**12}, "num_classes must be at most"),
    ({"config__nonsense": 1}, "nonsense is not known here"),
    ({"recipe": "nonsense"}, "nonsense"),
    ({"recipe": 7}, "recipe must be a text"),
    ({"recipe": "../../etc"}, "etc"),
    ({"parts": ["tokenizer", "model", "../x"]}, "plain names"),
    ({"format": 2}, "format must be 1, got 2"),
    ({"changes": [{"recipe": "fastvar", "config": {"ratios": [2]}}]}, "ratios.0 must be at most 1"),
]


@pytest.mark.parametrize("number", range(len(CONFIGS)))
def test_a_config_of_a_stranger_is_refused_before_it_costs_anything(number, copy, capsys):
    settings, said = CONFIGS[number]
    edit(copy, **settings)
    started = time.process_time()
    with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
        ns.load(copy)
    assert time.process_time() - started < 20 and len(str(error.value)) < 5000
    assert cli.main(["info", str(copy)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and len(line) < 650


def retyped(state, dtype):
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def first_nan(state):
    return {name: tensor * float("nan") if not i else tensor for i, (name, tensor) in enumerate(state.items())}


WEIGHTS = {
    "int8": (lambda state: retyped(state, torch.int8), "as I8, expected F32"),
    "bool": (lambda state: retyped(state, torch.bool), "as BOOL, expected F32"),
    "not finite": (first_nan, "not finite"),
    "one is missing": (lambda state: dict(list(state.items())[1:]), "missing "),
    "one too many": (lambda state: state | {"more": torch.zeros(1)}, "unexpected  more"),
    "another shape": (lambda state: {name: tensor[None] for name, tensor in state.items()}, "wrong shape"),
    "none": (lambda state: {}, "missing "),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_a_stranger_are_refused(name, copy):
    change, said = WEIGHTS[name]
    path = copy / "model.safetensors"
    save_file(change(load_file(path)), path)
    edit(copy, digests={})
    with pytest.raises(ValueError, match=said):
        ns.load(copy)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_of_wrapped_weights_are_understood(prefix, copy, folder):
    path = copy / "model.safetensors"
    save_file({prefix + name: tensor for name, tensor in load_file(path).items()}, path)
    edit(copy, digests={})
    assert torch.equal(ns.sample(ns.load(copy), [1], seed=2), ns.sample(ns.load(folder), [1], seed=2))


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel])
def test_wrapped_parts_are_saved_under_their_own_names(wrap, folder, tmp_path):
    system, plain = ns.load(folder), load_file(folder / "model.safetensors")
    system.model.blocks[1] = wrap(system.model.blocks[1])
    system.register_module("model", wrap(system.model))
    saved = load_file(ns.save(system, tmp_path / "again") / "model.safetensors")
    assert saved.keys() == plain.keys() and all(torch.equal(saved[name], plain[name]) for name in plain)
    ns.load(tmp_path / "again")


def test_weights_that_are_not_finite_are_never_written(folder, tmp_path):
    system = ns.load(folder)
    with torch.no_grad():
        next(iter(system.model.parameters())).view(-1)[0] = float("nan")
    with pytest.raises(FloatingPointError, match="nothing was written"):
        ns.save(system, tmp_path / "bad")
    assert not (tmp_path / "bad" / "config.json").exists()


def test_a_programs_default_dtype_changes_nothing(folder):
    before = ns.sample(ns.load(folder), [1], seed=2)
    torch.set_default_dtype(torch.float64)
    try:
        system = ns.load(folder)
        images = ns.sample(system, [1], seed=2)
        logits = ns.logits(system, ns.encode(system, images), [1])
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert images.dtype == logits.dtype == torch.float32 and torch.equal(images, before)


def test_a_runs_folder_is_a_system(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "run" / "system")
    assert ns.load(tmp_path / "run").config == ns.load(folder).config
    assert cli.main(["info", str(tmp_path / "run")]) == 0


def test_a_flipped_byte_of_shipped_weights_is_found(tmp_path):
    copy = shutil.copytree(ns.shipped()["emoji-64"], tmp_path / "emoji-64")
    path = copy / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        ns.load(copy)


@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_weights_that_no_number_can_hold_are_named(part, copy):
    path = copy / f"{part}.safetensors"
    save_file({name: torch.full_like(tensor, 1e38) for name, tensor in load_file(path).items()}, path)
    edit(copy, digests={})
    with pytest.raises((FloatingPointError, ValueError), match=r"not finite|NaN"):
        ns.sample(ns.load(copy), [1])
