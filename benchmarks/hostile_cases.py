"""The hostile inputs of hostile.py: flags, folders of strangers, runs, data, Python calls and prompts.

A case runs in a folder that has links to a tiny untrained system (`system`), two short runs (`tokenizer`, `generator`), 12
images of two classes (`images`), and an image (`dog.png`); `build` may put more there.
"""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import nextscale as ns
from nextscale import cli
from nextscale.recipes.generators import var

Build = Callable[[Path], None]
LINKS = ("system", "tokenizer", "generator", "images", "dog.png")


@dataclass(frozen=True)
class Case:
    """A hostile input, and what is right.

    wanted: refuse in one sentence; work; warn (work, but say that something was dropped); either of refuse and work.
    says: regular expression that what is said must match. outputs: beginnings of the names of files that may change.
    """

    kind: str
    name: str
    words: tuple[str, ...] = ()
    make: Build = lambda home: None
    call: Callable[[Path], Any] | None = None
    wanted: Literal["refuse", "work", "warn", "either"] = "refuse"
    says: str = ""
    outputs: tuple[str, ...] = ()

    def build(self, parts: Path, home: Path) -> None:
        """Make the files of the case."""
        for name in LINKS:
            (home / name).symlink_to(parts / name)
        self.make(home)


def make_parts(folder: Path) -> Path:
    """What the cases share."""
    generator = np.random.default_rng(0)
    for number in range(12):
        path = folder / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(generator, 80, 80).save(path)
    picture(generator).save(folder / "dog.png")
    ns.save(var.build(var.tiny(), seed=1), folder / "system")
    with chdir(folder), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        for words in (GO_ON, (*GENERATOR[:-5], "generator", *GO_ON[-8:], "--views", "1")):
            if status := cli.main(words):
                raise RuntimeError(f"the runs that cases share cannot be made: status {status}")
    return folder


@contextmanager
def chdir(folder: Path) -> Iterator[None]:
    """Work in another folder (`contextlib.chdir` of Python 3.11)."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def picture(generator: np.random.Generator | None = None, width: int = 80, height: int = 80) -> Image.Image:
    """Noise."""
    pixels = (generator or np.random.default_rng(1)).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def own(home: Path, name: str) -> Path:
    """A copy of a linked part instead of the link."""
    link = home / name
    source = link.resolve()
    link.unlink()
    return Path(shutil.copytree(source, link) if source.is_dir() else shutil.copy(source, link))


def cases() -> list[Case]:
    """All cases; their names are unique within a kind."""
    makers = (flags, pairs, configs, weights, shards_of_systems, runs, folders, shards, calls, prompts, files, sets)
    found = [case for maker in makers for case in maker()]
    names = [f"{case.kind}: {case.name}" for case in found]
    assert len(set(names)) == len(names), [name for name in names if names.count(name) > 1]
    return found


# ---- flags ------------------------------------------------------------------------------------------------------------

NOT_NUMBERS = ["nan", "inf", "-inf", "1e999", "x", "", "--", "1,5", "0x10", "½"]
NO_COUNT = ["0", "-1", "1e12", "9223372036854775808", "1.5", "9" * 5000, "1000000000000", *NOT_NUMBERS]
NO_SEED = ["-1", "9223372036854775808", "1.5", "9" * 5000, "x", "", "nan"]
NO_SHARE = ["-0.1", "1.1", "1e300", *NOT_NUMBERS]
NO_POSITIVE = ["0", "-1", *NOT_NUMBERS]
NO_WEIGHT = ["-1", "1e300", *NOT_NUMBERS]
NO_DEVICE = ["hpu", "mps", "abacus", "cuda:99", "cuda:-1", "meta", "", "cpu:x", "x" * 5000, "\x1b[31mred"]
NO_WORD = ["", "nosuch", "x" * 5000, "\x1b[31mred", "../../etc/passwd", "/proc/self/mem"]
NO_PICTURE = ["a.xyz", "/proc/a.png", "a" * 300 + ".png", "dog.png/a.png", "a\x00b.png", "images"]
NO_BOX = [
    "0,0,0,0",
    "1,1,0,0",
    "0.5,0,0.2,1",
    "nan,0,1,1",
    "0,0,2,2",
    "-1,0,1,1",
    "0,0,1",
    "0,0,1,1,1",
    "x",
    "inf,inf,inf,inf",
]

SAMPLE = ("sample", "--system", "system", "--labels", "1", "--count", "1", "--out", "a.png")
INPAINT = ("inpaint", "dog.png", "--system", "system", "--count", "1", "--out", "a.png")
TOKENIZER = (
    "train",
    "tokenizer",
    "--preset",
    "tiny",
    "--data",
    "images",
    "--out",
    "run",
    "--steps",
    "1",
    "--batch-size",
    "2",
)
GENERATOR = ("train", "generator", "--tokenizer", "system", "--preset", "tiny", "--data", "images", "--out", "run")
GENERATOR += ("--steps", "1", "--batch-size", "2")

GO_ON = ("train", "tokenizer", "--preset", "tiny", "--data", "images", "--out", "tokenizer")
GO_ON += ("--batch-size", "2", "--warmup", "0", "--steps", "2", "--save-every", "1")

# Verb, a command that works, then options with values that must be refused.
FLAGS: list[tuple[tuple[str, ...], dict[str, list[str]]]] = [
    (
        SAMPLE,
        {
            "count": NO_COUNT,
            "columns": NO_COUNT[:6],
            "seed": NO_SEED,
            "guidance": ["1e300", *NOT_NUMBERS],
            "temperature": NO_POSITIVE,
            "top-p": NO_SHARE,
            "top-k": ["-1", "1.5", "x", "", "9" * 5000],
            "device": NO_DEVICE,
            "dtype": ["int8", "float64", "", "x" * 5000],
            "labels": ["nosuch", "-1", "999", '"a', "1e9", "x" * 200_000, "\x1b[31m", "1.0", "9" * 5000],
            "out": NO_PICTURE,
            "scales": NO_PICTURE[:4],
            "with": [*NO_WORD[:4], "var"],
            "preset": NO_WORD[1:3],
            "system": NO_WORD,
        },
    ),
    (INPAINT, {"box": NO_BOX, "mask": ["nowhere.png", "images", ""], "seed": ["-1"], "count": ["0", "1000000000000"]}),
    (("outpaint", *INPAINT[1:]), {"box": NO_BOX[:6]}),
    (("edit", *INPAINT[1:], "--box", "0,0,1,1"), {"labels": ["nosuch", "", "999"], "prompt": ["x"]}),
    (("reconstruct", "dog.png", "--system", "system"), {"out": NO_PICTURE, "device": NO_DEVICE[:4], "dtype": ["int8"]}),
    (
        TOKENIZER,
        {
            "steps": NO_COUNT,
            "batch-size": [*NO_COUNT[:6], "1000000"],
            "oversample": ["0", "1000", "1000000", "-1", "1000000000000", "x", "nan"],
            "threads": ["0", "-1", "1000000000000", "x"],
            "workers": ["-1", "1000000000000", "x", "1024"],
            "accumulate": ["0", "-1", "1000000000000"],
            "seed": NO_SEED,
            "lr": NO_POSITIVE,
            "ema": ["1", "-0.1", "nan", "x"],
            "clip": NO_POSITIVE,
            "warmup": ["-1", "nan", "1e12"],
            "keep": ["0", "-1"],
            "log-every": ["0"],
            "save-every": ["0", "nan"],
            "decay": NO_WORD[:3],
            "precision": ["int8", "float64", ""],
            "device": NO_DEVICE[:5],
            "data": [
                "nowhere",
                "dog.png",
                "",
                "/proc/self/mem",
                "x" * 5000,
                "{0..99999999999}.tar",
                "a-{000000..999999999999}.tar",
            ],
            "val": ["nowhere", "dog.png"],
            "recipe": NO_WORD[:4],
            "losses": NO_WORD[1:3],
            "init-from": NO_WORD[1:5],
            "out": ["dog.png", "dog.png/run", "/proc/run", "a" * 300],
            "loss.l1": NO_WEIGHT,
            "loss.beta": NO_WEIGHT[:4],
            "loss.perceptual-start": NO_SHARE[:5],
            "loss.restart-every": ["-1", "nan"],
            "loss.drop": ["all", ""],
            "augmentation.crop": ["0.5", "3", "nan", "inf"],
            "augmentation.shift": ["-1", "2", "nan"],
            "system.autoencoder.width": ["4096", "0", "-1", "1000000000", "x", "7"],
            "system.autoencoder.image-channels": ["0", "-1", "1000000000"],
            "system.pyramid.codebook-size": ["0", "-1", "1000000000000"],
            "system.pyramid.code-dim": ["0", "1000000000000"],
        },
    ),
    (
        GENERATOR,
        {
            "views": [*NO_COUNT[:6], "1000000"],
            "lora": ["-1", "4", "x"],
            "tokenizer": [*NO_WORD, "images", "dog.png"],
            "loss.drop-condition": NO_SHARE[:5],
            "loss.label-smoothing": ["1", "-1", "nan"],
            "loss.progressive": ["1", "-1", "nan"],
            "loss.progressive-from": ["0", "99", "-1"],
            "transformer.depth": NO_COUNT[:6],
            "transformer.dim": ["0", "-1", "1000000000", "33", "x"],
            "transformer.num-heads": ["0", "3", "1000000000"],
            "transformer.mlp-ratio": ["0", "-1", "nan", "1e300"],
            "sampling.guidance": ["nan", "inf"],
            "sampling.top-p": ["2", "-1", "nan"],
            "cache": ["dog.png", "/proc/cache"],
        },
    ),
    (
        ("evaluate", "system", "--data", "images", "--out", "e"),
        {"samples": ["0", "1", *NO_COUNT[1:6]], "seed": NO_SEED[:4]},
    ),
    (
        ("bench", "train", "--shape", "tiny"),
        {"batch": NO_COUNT[:6], "steps": ["0", "-1"], "threads": ["0", "1000000000"]},
    ),
    (("save", "system"), {"to": ["dog.png", "/proc/save", "a" * 300, "system"], "with": ["nosuch"]}),
    (("curves", "tokenizer"), {"out": ["c.xyz", "/proc/c.png", "dog.png/c.png", "a" * 300 + ".png"]}),
    (("check-run", "tokenizer"), {"preset": NO_WORD[1:3]}),
    (("info",), {"sytem": ["x"], "with": ["nosuch"]}),
    (("convert",), {"from": ["nowhere"], "to": ["x"]}),
]


def flags() -> Iterator[Case]:
    """One option with a value that cannot be meant."""
    for words, options in FLAGS:
        verb = " ".join(words[: 2 if words[0] in ("train", "bench") else 1])
        for option, values in options.items():
            for value in values:
                shown = repr(value if len(value) < 40 else f"{value[:8]} x {len(value)}")
                rest = _without(words, f"--{option}")
                yield Case("flags", f"{verb} --{option} {shown}", (*rest, f"--{option}", value))


def _without(words: tuple[str, ...], option: str) -> tuple[str, ...]:
    if option not in words:
        return words
    at = words.index(option)
    return words[:at] + words[at + 2 :]


def pairs() -> Iterator[Case]:
    """Several words that do not go together, or are none."""
    for words in [
        (*SAMPLE, "--scales", "a.png"),
        (*SAMPLE, "--scales", "./a.png"),
        (*SAMPLE[:-2], "--out", "a", "--scales", "a/00000.png"),
        (*SAMPLE, "--greedy", "--smooth"),
        (*SAMPLE, "--greedy", "--top-k", "3"),
        (*SAMPLE, "--prompt", "a cat"),
        (*SAMPLE, "--count", "5000", "--out", "x.jpg"),
        (*SAMPLE, "--with", "fastvar", "--with.ratios", "2"),
        (*SAMPLE, "--with.ratios", "0.5"),
        (*SAMPLE, "--with", "fastvar", "--with.nosuch", "2"),
        (*SAMPLE, "cat.png"),
        (*SAMPLE, "--cuont", "3"),
        (*INPAINT,),
        (*INPAINT, "--box", "0,0,1,1", "--mask", "dog.png"),
        ("inpaint", "dog.png", "--box", "0,0,1,1", "--system", "system", "--out", "dog.png"),
        ("reconstruct", "dog.png", "--system", "system", "--out", "dog.png"),
        ("reconstruct", "--system", "system"),
        ("reconstruct", "nowhere.png", "--system", "system"),
        ("reconstruct", "images", "--system", "system"),
        ("edit", "dog.png", "--system", "system", "--box", "0,0,1,1"),
        (*TOKENIZER, "--loss.adaptive-range", "5", "1"),
        (*TOKENIZER, "--betas", "0.9"),
        (*TOKENIZER, "--betas", "2", "3"),
        (*TOKENIZER, "--knee", "0.5"),
        (*TOKENIZER, "--system.sizes"),
        (*TOKENIZER, "--system.sizes", "0"),
        (*TOKENIZER, "--system.sizes", "1", "4096", "4096"),
        (*TOKENIZER, "--system.sizes", *["4096"] * 900),
        (*TOKENIZER[:-2], "--batch-size", "64", "--system.sizes", "1", "1000"),
        (*TOKENIZER, "--system.autoencoder.multipliers", *["1"] * 30),
        (*TOKENIZER, "--system.autoencoder.multipliers", "256", "256", "256"),
        (*TOKENIZER, "--shard"),
        (*TOKENIZER, "--accumulate", "3"),
        (*TOKENIZER, "--loss.dino-weights", "nowhere.pth", "--loss.discriminator", "dino", "--loss.adversarial", "1"),
        (*TOKENIZER, "--loss.lpips-vgg", "dog.png", "--loss.perceptual", "1"),
        (*GENERATOR, "--sizes", "1", "2"),
        (*GENERATOR, "--sizes", "4", "1"),
        (*GENERATOR, "--loss.scale-weights", "1", "2"),
        (*GENERATOR, "--loss.scale-weights", "nan"),
        (*GENERATOR, "--init-from", "system"),
        (*GENERATOR, "--shard", "--lora", "2"),
        (*GENERATOR, "--transformer.depth", "1000", "--transformer.dim", "4096", "--transformer.num-heads", "4"),
        ("train", "nothing"),
        ("train", "tokenizer"),
        ("train", "generator", "--out", "run"),
        ("train", "encode"),
        ("bench", "nothing"),
        ("sampel",),
        ("x" * 5000,),
        ("sample", "--labels"),
        ("save", "system"),
        ("curves",),
        ("curves", "nowhere"),
        ("curves", "dog.png"),
        ("check-run", "nowhere"),
        ("check-run", "dog.png"),
        ("evaluate", "system", "--out", "e"),
        ("evaluate", "tokenizer", "--data", "nowhere"),
        ("info", "nosuch"),
        ("info", "images"),
        ("info", "dog.png"),
        ("info", "a", "b"),
        ("list", "x"),
        ("convert", "nosuch"),
    ]:
        shown = " ".join(word if len(word) < 40 else f"{word[:8]} x {len(word)}" for word in words)
        yield Case("pairs", shown if len(shown) < 200 else f"{shown[:200]} ...", words)


# ---- folders of strangers ---------------------------------------------------------------------------------------------

READERS: list[tuple[str, ...]] = [
    ("sample", "--system", "system", "--count", "1", "--labels", "1", "--out", "a.png"),
    ("info", "system"),
    ("reconstruct", "dog.png", "--system", "system", "--out", "r.png"),
    ("save", "system", "--to", "copy"),
]
DEEP = "[" * 10_000 + "]" * 10_000

# A path in config.json and a value that is no setting; `None` at the end of a path takes the key away.
BAD_CONFIG: list[tuple[str, Any]] = [
    *[
        ("config.transformer.depth", value)
        for value in (0, -1, 10**9, 2**63, 10**400, 1.5, "x", None, [], {}, [[1]], True)
    ],
    *[("config.transformer.dim", value) for value in (0, -1, 10**9, 2**63, 33, "32", [[[1]]])],
    *[("config.transformer.num_heads", value) for value in (0, 3, 10**9)],
    *[("config.transformer.mlp_ratio", value) for value in (0, -1, 1e300, float("inf"), float("nan"))],
    *[("config.transformer.eps", value) for value in (-1, float("nan"))],
    *[("config.transformer.norm", value) for value in ("nosuch", 3, None)],
    *[
        ("config.sizes", value)
        for value in ([], [0], [-1], [10**9], [4096] * 1000, "1 2 3", [[1, 2], 3], [1, 2, 3, 4] * 300, None)
    ],
    *[("config.sampling.guidance", value) for value in (float("inf"), float("nan"), "x", 10**400)],
    *[("config.sampling.top_p", value) for value in (2, -1)],
    *[("config.sampling.temperature", value) for value in (0, -1, float("inf"))],
    *[("config.classes", value) for value in ("abc", [1, 2], ["a"] * 10**5, ["a", "a"], [["a"]])],
    *[("config.num_classes", value) for value in (-1, 10**12, 2**63, "x")],
    *[("config.autoencoder.image_channels", value) for value in (0, -1, 10**9, 1)],
    *[("config.autoencoder.width", value) for value in (0, 10**9, 17)],
    *[("config.autoencoder.multipliers", value) for value in ([], [0], [1] * 40, [10**9], "1")],
    *[("config.autoencoder.patch", value) for value in (0, 10**9)],
    *[("config.pyramid.codebook_size", value) for value in (0, 10**12, 2**24)],
    *[("config.pyramid.code_dim", value) for value in (0, 10**9)],
    *[("config.pyramid.phi", value) for value in (-1, 10**9)],
    *[("config.pyramid.limits", value) for value in ([0], "x", [10**30])],
    *[("recipe", value) for value in ("nosuch", "../../x", "os", 3, None, "x" * 5000, "var\x1b[31m")],
    *[("parts", value) for value in ([], ["nosuch"], ["../../dog"], "tokenizer", 3, ["tokenizer"] * 1000)],
    *[
        ("changes", value)
        for value in ([{}], [3], "x", [{"recipe": "os"}], [{"recipe": "fastvar", "config": {"ratios": [9]}}])
    ],
    *[("config", value) for value in (None, 3, [], {}, "x")],
    *[("format", value) for value in (99, "x", None)],
    *[("digests", value) for value in ({"model": "0" * 64}, 3, {"model": 3})],
    *[("image_size", value) for value in ([10**9, 10**9], "x", [1], [-1, 64])],
    ("config.nosuch", 1),
    ("config.transformer.nosuch", 1),
]
TAKES = [("config.transformer.dim", "32"), ("config.transformer.depth", True)]  # that mean what some may call a number

RAW_CONFIG: dict[str, bytes] = {
    "empty": b"",
    "a space": b" ",
    "no JSON": b"hello",
    "cut off": b'{"format": 1, "recipe": "var", ',
    "UTF-16": '{"format": 1}'.encode("utf-16"),
    "not UTF-8": b'{"recipe": "\xff\xfe"}',
    "deep": DEEP.encode(),
    "deep in an object": b'{"config":' * 5000 + b"1" + b"}" * 5000,
    "a list": b"[1, 2]",
    "a number": b"3",
    "null": b"null",
    "twelve megabytes": b'{"a": "' + b"x" * 12_000_000 + b'"}',
    "two of a key": b'{"format": 1, "format": 99, "recipe": "var"}',
    "zeros": b"\0" * 1000,
    "a pickle": pickle.dumps({"format": 1}),
    "a number of 10,000 digits": b'{"format": ' + b"9" * 10_000 + b"}",
}


def edited(home: Path, name: str, path: str, value: Any) -> None:
    """Change a JSON file of a part."""
    set_in(own(home, name.partition("/")[0]) / name.partition("/")[2], path, value)


def set_in(file: Path, path: str, value: Any) -> None:
    """Another value at a path (`a.b`) in a JSON file."""
    content = json.loads(file.read_text())
    *folders, last = path.split(".")
    place = content
    for part in folders:
        place = place[part]
    place[last] = value
    file.write_text(json.dumps(content))


def overwritten(home: Path, name: str, content: bytes) -> None:
    """Other bytes in a file of a part."""
    (own(home, name.partition("/")[0]) / name.partition("/")[2]).write_bytes(content)


def configs() -> Iterator[Case]:
    """A config.json of a stranger."""
    for number, (path, value) in enumerate(BAD_CONFIG):
        shown = repr(value)[:40]
        words = READERS[number % len(READERS)]
        make = partial(edited, name="system/config.json", path=path, value=value)
        wanted: Any = "either" if (path, value) in TAKES else "refuse"
        yield Case("config", f"{path} = {shown}", words, make, wanted=wanted)
    for number, (name, content) in enumerate(RAW_CONFIG.items()):
        for words in (READERS[number % len(READERS)], READERS[(number + 1) % len(READERS)]):
            yield Case(
                "config", f"{name}, {words[0]}", words, partial(overwritten, name="system/config.json", content=content)
            )


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ('touch "$HOSTILE_CANARY"',)


def changed_weights(home: Path, part: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Other tensors in a weights file of the system."""
    path = own(home, "system") / f"{part}.safetensors"
    config = json.loads((path.parent / "config.json").read_text())
    (path.parent / "config.json").write_text(json.dumps(config | {"digests": {}}))  # which would tell at once
    tensors = load_file(path)
    save_file({k: v.contiguous() for k, v in (change(tensors) or tensors).items()}, path)


def _first(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.ndim > 1)


def _with(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors | {_first(tensors): change(tensors[_first(tensors)])}


CHANGES: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "a NaN": _with(lambda t: t * float("nan")),
    "an inf": _with(lambda t: t / 0),
    "another shape": _with(lambda t: t.repeat_interleave(2, 0)),
    "no rows": _with(lambda t: t[:0]),
    "transposed": _with(lambda t: t.flatten()[None]),
    "int8": lambda tensors: {name: tensor.to(torch.int8) for name, tensor in tensors.items()},
    "bool": lambda tensors: {name: tensor.to(torch.bool) for name, tensor in tensors.items()},
    "complex": _with(lambda t: t.to(torch.complex64)),
    "float8": lambda tensors: {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()},
    "one int64": _with(lambda t: t.long()),
    "module.": lambda tensors: {f"module.{name}": tensor for name, tensor in tensors.items()},
    "_orig_mod.": lambda tensors: {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()},
    "none": lambda tensors: {"x": torch.zeros(1)},
    "one missing": lambda tensors: {name: tensors[name] for name in list(tensors)[1:]},
    "one more": lambda tensors: tensors | {"extra.weight": torch.zeros(3)},
    "many more": lambda tensors: tensors | {f"extra.{i}": torch.zeros(1) for i in range(20_000)},
    "a name of 100,000 letters": lambda tensors: tensors | {"x" * 100_000: torch.zeros(1)},
    "all zeros": lambda tensors: {name: tensor * 0 for name, tensor in tensors.items()},
}
MAY_LOAD = ("all zeros", "module.", "_orig_mod.")
HEADER = struct.pack("<Q", 2**40)
RAW_WEIGHTS: dict[str, bytes] = {
    "empty": b"",
    "eight bytes": b"12345678",
    "a header of a terabyte": HEADER + b"{}",
    "a negative header": struct.pack("<q", -1) + b"{}",
    "a header that is no JSON": struct.pack("<Q", 4) + b"abcd",
    "a header that is deep": struct.pack("<Q", len(DEEP)) + DEEP.encode(),
    "offsets outside": struct.pack("<Q", 58) + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,999999]}}'[:58],
    "a shape of 2^62": struct.pack("<Q", 73)
    + b'{"a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,4]}} '
    + b"abcd",
    "a pickle": pickle.dumps(Bomb()),
    "a PNG": b"\x89PNG\r\n\x1a\n" + b"\0" * 100,
    "zeros": b"\0" * 10_000,
}


def torch_file(home: Path, part: str) -> None:
    """A pickle of torch.save, under the name of safetensors."""
    torch.save({"x": Bomb()}, own(home, "system") / f"{part}.safetensors")


def cut_off(home: Path, name: str, share: float) -> None:
    """The beginning of a file of a part."""
    path = own(home, name.partition("/")[0]) / name.partition("/")[2]
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def flipped(home: Path, name: str, at: float = 0.5) -> None:
    """A file of a part with one bit turned."""
    found = next(own(home, name.partition("/")[0]).glob(name.partition("/")[2]))
    content = bytearray(found.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1
    found.write_bytes(bytes(content))


def weights() -> Iterator[Case]:
    """Weights of a stranger."""
    for number, (name, change) in enumerate(CHANGES.items()):
        for part in ("tokenizer", "model"):
            words = READERS[0 if part == "model" else 2] if number % 2 else READERS[3]
            make = partial(changed_weights, part=part, change=change)
            yield Case("weights", f"{name} in {part}", words, make, wanted="either" if name in MAY_LOAD else "refuse")
    for name, content in RAW_WEIGHTS.items():
        for part in ("tokenizer", "model"):
            make = partial(overwritten, name=f"system/{part}.safetensors", content=content)
            yield Case("weights", f"{name} as {part}", READERS[0], make)
    for part in ("tokenizer", "model"):
        yield Case("weights", f"torch.save as {part}", READERS[0], partial(torch_file, part=part))
        for share in (0.0, 0.3, 0.99):
            make = partial(cut_off, name=f"system/{part}.safetensors", share=share)
            yield Case("weights", f"{share} of {part}", READERS[0], make)
        yield Case(
            "weights", f"a flipped bit in {part}", READERS[0], partial(flipped, name=f"system/{part}.safetensors")
        )


def shards_of_systems() -> Iterator[Case]:
    """Things that stand where a system should."""

    def replaced(home: Path, name: str, how: str) -> None:
        path = own(home, "system") / name
        path.unlink()
        if how == "a folder":
            path.mkdir()
        elif how == "a fifo":
            os.mkfifo(path)
        elif how == "a link to itself":
            path.symlink_to(path)
        elif how == "a link into nothing":
            path.symlink_to("nowhere")
        elif how == "an endless device":
            path.symlink_to("/dev/zero")

    for name in ("config.json", "model.safetensors", "tokenizer.safetensors"):
        for how in ("nothing", "a folder", "a fifo", "a link to itself", "a link into nothing", "an endless device"):
            yield Case("places", f"{how} as {name}", READERS[0], partial(replaced, name=name, how=how))


# ---- runs -------------------------------------------------------------------------------------------------------------

STATES: list[tuple[str, Any]] = [
    ("step", -1),
    ("step", 2**63),
    ("step", "x"),
    ("step", None),
    ("step", 1.5),
    ("score", "x"),
    ("score", [1]),
    ("files", {}),
    ("files", 3),
    ("files", {"../../dog.png": "0"}),
    ("files", {"/etc/passwd": "0"}),
    ("facts", None),
    ("facts", 3),
    ("facts", {}),
    ("facts.settings", 3),
]
RUN_JSON: list[tuple[str, Any]] = [
    ("kind", 3),
    ("kind", "nosuch"),
    ("config", 3),
    ("config.steps", -1),
    ("system", None),
    ("data", 3),
]


def runs() -> Iterator[Case]:
    """What was edited in the folder of a run."""
    last = "tokenizer/checkpoints/00000002"
    run = partial(Case, "runs", wanted="either", outputs=("tokenizer/", "generator/"))
    readers = (("info", "tokenizer"), ("curves", "tokenizer"), ("check-run", "tokenizer"), GO_ON)
    save = ("save", last, "--to", "s")

    def states(home: Path, path: str, value: Any) -> None:
        own(home, "tokenizer")
        for file in (home / "tokenizer" / "checkpoints").glob("*/state.json"):
            set_in(file, path, value)

    for path, value in STATES:
        for words in (GO_ON, save):
            yield run(f"state.json: {path} = {value!r}, {words[0]}", words, partial(states, path=path, value=value))
    for number, (path, value) in enumerate(RUN_JSON):
        make = partial(edited, name="tokenizer/run.json", path=path, value=value)
        yield run(f"run.json: {path} = {value!r}, {readers[number % 4][0]}", readers[number % 4], make)
        yield run(f"run.json: {path} = {value!r}, goes on", GO_ON, make)
    for number, (name, content) in enumerate(RAW_CONFIG.items()):
        for file in ("run.json", "metrics.jsonl", "checkpoints/00000002/state.json", "data.json"):
            make = partial(overwritten, name=f"tokenizer/{file}", content=content)
            yield run(f"{name} as {file}, {readers[number % 4][0]}", readers[number % 4], make)
            yield run(f"{name} as {file}, goes on", GO_ON, make)
    for share in (0.0, 0.5):
        make = partial(cut_all, folder=last, share=share)
        yield run(f"{share} of a checkpoint, goes on", GO_ON, make)
        yield run(f"{share} of a checkpoint, saved", save, make, wanted="refuse")
    linked = partial(Case, "runs", outputs=("tokenizer/.lock", "generator/.lock"))
    yield linked(
        "another kind of run in the folder", (*GO_ON[:7], "generator", *GO_ON[8:]), partial(own, name="generator")
    )
    yield linked("other settings in the folder", (*GO_ON, "--lr", "0.5"), partial(own, name="tokenizer"))
    yield run("more steps in the folder", (*GO_ON, "--steps", "3"), partial(own, name="tokenizer"))
    yield linked(
        "a cache of others", (*GENERATOR, "--cache", "generator/encoded", "--seed", "9"), partial(own, name="generator")
    )


def cut_all(home: Path, folder: str, share: float) -> None:
    """All weights of a folder, cut off."""
    own(home, folder.partition("/")[0])
    for path in (home / folder).glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


# ---- data -------------------------------------------------------------------------------------------------------------


def png(width: int, height: int, depth: int = 8, colour: int = 0, rows: bytes = b"") -> bytes:
    """A PNG of any size in few bytes."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def grey(width: int, height: int) -> bytes:
    """A grey PNG that is whole."""
    return png(width, height, rows=(b"\0" + b"\x80" * width) * height)


def jpeg(mode: str, **options: Any) -> bytes:
    """A JPEG of some mode."""
    file = io.BytesIO()
    picture().convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def tiff(array: np.ndarray) -> bytes:
    """A TIFF of numbers of any type."""
    file = io.BytesIO()
    Image.fromarray(array).save(file, "TIFF")
    return file.getvalue()


def animation() -> bytes:
    """A GIF of three pictures."""
    file = io.BytesIO()
    frames = [picture(np.random.default_rng(seed)) for seed in range(3)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


def with_mode(mode: str) -> bytes:
    """A PNG of some mode."""
    file = io.BytesIO()
    picture().convert(mode).save(file, "PNG")
    return file.getvalue()


Wanted = Literal["refuse", "work", "warn", "either"]
# A file beside twelve good images.
STRANGE: dict[str, tuple[str, bytes, Wanted]] = {
    "empty": ("a/x.png", b"", "either"),
    "a text": ("a/x.png", b"hello", "either"),
    "cut off": ("a/x.png", grey(80, 80)[:60], "either"),
    "1 x 20,000": ("a/x.png", grey(1, 20_000), "either"),
    "20,000 x 1": ("a/x.png", grey(20_000, 1), "either"),
    "1 x 1": ("a/x.png", grey(1, 1), "either"),
    "a bomb": ("a/x.png", png(100_000, 100_000), "either"),
    "2^31 wide": ("a/x.png", png(2**31 - 1, 1), "either"),
    "no width": ("a/x.png", png(0, 0), "either"),
    "grey": ("a/x.png", grey(80, 80), "work"),
    "palette": ("a/x.png", with_mode("P"), "work"),
    "opacity": ("a/x.png", with_mode("RGBA"), "work"),
    "one bit": ("a/x.png", with_mode("1"), "work"),
    "CMYK": ("a/x.jpg", jpeg("CMYK"), "work"),
    "a GIF that moves": ("a/x.gif", animation(), "warn"),
    "float TIFF": ("a/x.tiff", tiff(np.full((64, 64), np.nan, np.float32)), "either"),
    "int32 TIFF": ("a/x.tiff", tiff(np.full((64, 64), 70_000, np.int32)), "either"),
    "12 bits of 16": ("a/x.png", png(64, 64, 16, 0, (b"\0" + b"\x0f\xff" * 64) * 64), "either"),
    "HEIC": ("a/x.heic", b"\0\0\0\x18ftypheic" + b"\0" * 50, "warn"),
    "raw": ("a/x.CR2", b"II*\0" + b"\0" * 50, "warn"),
    "WebP in name": ("a/x.webp", b"RIFF\0\0\0\0WEBP", "either"),
    "__MACOSX": ("__MACOSX/a/._0.png", b"\0\5\x16\7", "either"),
    "hidden": (".hidden/x.png", grey(80, 80), "either"),
    "Thumbs.db": ("a/Thumbs.db", b"x", "either"),
    "a class of another name": ("c\x1b[31m\n/x.png", grey(80, 80), "either"),
    "a name of 250 letters": ("a/" + "x" * 246 + ".png", grey(80, 80), "work"),
    "an extension in capitals": ("a/x.PNG", grey(80, 80), "work"),
    "an image in the root": ("x.png", grey(80, 80), "either"),
    "a pickle": ("a/x.png", pickle.dumps(Bomb()), "either"),
    "a PNG of that name that is a JPEG": ("a/x.png", jpeg("RGB"), "either"),
    "captions without an end": ("a/x.txt", b"x" * 300_000, "either"),
    "a caption that is not UTF-8": ("a/0.txt", b"\xff\xfe\x00", "either"),
    "an empty caption": ("a/0.txt", b"", "either"),
    "metadata without names": ("metadata.jsonl", b'{"text": "a"}\n', "refuse"),
    "metadata cut off": ("metadata.jsonl", b'{"file_name": "a/0.png", "te', "refuse"),
    "metadata of files that are not there": (
        "metadata.jsonl",
        b'{"file_name": "a/nowhere.png", "text": "a"}\n',
        "either",
    ),
    "metadata that leaves the folder": ("metadata.jsonl", b'{"file_name": "../dog.png", "text": "a"}\n', "either"),
    "metadata that is deep": ("metadata.jsonl", DEEP.encode(), "refuse"),
    "metadata as CSV": ("metadata.csv", b'file_name,text\na/0.png,"a\nb"\n', "either"),
    "metadata as CSV that does not close": ("metadata.csv", b'file_name,text\na/0.png,"a', "either"),
    "metadata as CSV without head": ("metadata.csv", b"a/0.png,a\n", "refuse"),
    "metadata of null bytes": ("metadata.csv", b"\0" * 100, "refuse"),
}
TRAIN = (*TOKENIZER[:5], "data", *TOKENIZER[6:])


def folders() -> Iterator[Case]:
    """Folders of images as people have them."""

    def beside(home: Path, name: str, content: bytes) -> None:
        shutil.copytree(home / "images", home / "data")
        (home / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (home / "data" / name).write_bytes(content)

    for name, (file, content, wanted) in STRANGE.items():
        yield Case("folders", name, TRAIN, partial(beside, name=file, content=content), wanted=wanted)

    def alone(home: Path, content: bytes, count: int = 12) -> None:
        for number in range(count):
            path = home / "data" / "a" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    many: dict[str, tuple[bytes, Wanted]] = {
        "all empty": (b"", "refuse"),
        "all text": (b"hello", "refuse"),
        "all bombs": (png(100_000, 100_000), "refuse"),
        "all 1 x 20,000": (grey(1, 20_000), "either"),
        "all the same": (grey(80, 80), "either"),
        "all 1 x 1": (grey(1, 1), "either"),
    }
    for name, (content, wanted) in many.items():
        yield Case("folders", name, TRAIN, partial(alone, content=content), wanted=wanted)
    yield Case("folders", "one image", TRAIN, partial(alone, content=grey(80, 80), count=1), wanted="either")
    yield Case("folders", "no images", TRAIN, lambda home: (home / "data").mkdir())
    yield Case("folders", "no folder", TRAIN)

    def split(home: Path, names: tuple[str, ...]) -> None:
        for name in names:
            shutil.copytree(home / "images", home / "data" / name)

    yield Case("folders", "train and val", TRAIN, partial(split, names=("train", "val")), wanted="work")
    yield Case("folders", "train alone", TRAIN, partial(split, names=("train",)), wanted="either")
    yield Case("folders", "val alone", TRAIN, partial(split, names=("val",)), wanted="either")
    yield Case("folders", "Train and TEST", TRAIN, partial(split, names=("Train", "TEST")), wanted="either")
    yield Case(
        "folders", "numbers as classes", TRAIN, partial(split, names=tuple(str(n) for n in range(12))), wanted="work"
    )

    def loop(home: Path) -> None:
        shutil.copytree(home / "images", home / "data")
        (home / "data" / "loop").symlink_to(home / "data")

    def fifo(home: Path) -> None:
        shutil.copytree(home / "images", home / "data")
        os.mkfifo(home / "data" / "a" / "x.png")

    def not_utf8(home: Path) -> None:
        shutil.copytree(home / "images", home / "data")
        shutil.copytree(home / "images" / "a", os.fsdecode(os.fsencode(home / "data") + b"/\xff\xfe"))

    def linked(home: Path) -> None:
        (home / "data").mkdir()
        (home / "data" / "a").symlink_to(home / "images" / "a")
        (home / "data" / "b").symlink_to(home / "images" / "b")

    yield Case("folders", "a link to itself", TRAIN, loop, wanted="either")
    yield Case("folders", "a fifo", TRAIN, fifo, wanted="either")
    yield Case("folders", "a class that is not UTF-8", TRAIN, not_utf8, wanted="either")
    yield Case("folders", "linked classes", TRAIN, linked, wanted="work")


def members(content: dict[str, bytes], **options: Any) -> bytes:
    """A tar of files."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in options.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def samples(count: int = 12, **more: bytes | Callable[[int], bytes]) -> dict[str, bytes]:
    """Members of a shard: images with what else they have."""
    found: dict[str, bytes] = {}
    for number in range(count):
        found[f"{number:04}.png"] = grey(80, 80 + number)
        for name, content in more.items():
            found[f"{number:04}.{name}"] = content(number) if callable(content) else content
    return found


CACHE = ("generator/encoded/",)
SHARDS: dict[str, tuple[bytes, Wanted]] = {
    "whole": (members(samples(cls=lambda n: str(n % 2).encode())), "work"),
    "words": (members(samples(cls=lambda n: [b"cat", b"dog"][n % 2])), "work"),
    "no labels": (members(samples()), "work"),
    "a label is missing": (members({k: v for k, v in samples(cls=b"1").items() if k != "0003.cls"}), "either"),
    "labels of 1e9": (members(samples(cls=b"1000000000")), "refuse"),
    "labels of 1.5": (members(samples(cls=b"1.5")), "either"),
    "labels of -1": (members(samples(cls=b"-1")), "refuse"),
    "labels of nothing": (members(samples(cls=b"")), "warn"),
    "labels that are not UTF-8": (members(samples(cls=b"\xff\xfe")), "refuse"),
    "labels of 2^63": (members(samples(cls=b"9223372036854775808")), "refuse"),
    "labels of 5,000 digits": (members(samples(cls=b"9" * 5000)), "warn"),
    "labels of 200,000 letters": (members(samples(cls=b"x" * 200_000)), "warn"),
    "words and numbers": (members(samples(cls=lambda n: [b"cat", b"1"][n % 2])), "either"),
    "JSON label null": (members(samples(json=b'{"label": null}')), "either"),
    "JSON label 1.5": (members(samples(json=b'{"label": 1.5}')), "refuse"),
    "JSON label 1e9": (members(samples(json=b'{"label": 1000000000}')), "refuse"),
    "JSON label list": (members(samples(json=b'{"label": [1]}')), "refuse"),
    "JSON label true": (members(samples(json=b'{"label": true}')), "either"),
    "JSON deep": (members(samples(json=DEEP.encode())), "refuse"),
    "JSON broken": (members(samples(json=b'{"label": ')), "refuse"),
    "JSON caption 3": (members(samples(json=b'{"caption": 3}')), "either"),
    "keys with dots": (members({f"a.b.{n}.png": grey(80, 80 + n) for n in range(12)}), "work"),
    "names that leave the folder": (members({f"../../{n}.png": grey(80, 80 + n) for n in range(12)}), "either"),
    "absolute names": (members({f"/etc/{n}.png": grey(80, 80 + n) for n in range(12)}), "either"),
    "links": (
        members(dict.fromkeys((f"{n}.png" for n in range(12)), b""), type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        "refuse",
    ),
    "devices": (members(dict.fromkeys((f"{n}.png" for n in range(12)), b""), type=tarfile.CHRTYPE), "refuse"),
    "no images": (members({"a.txt": b"x"}), "refuse"),
    "empty": (b"", "refuse"),
    "no tar": (b"hello" * 1000, "refuse"),
    "cut off": (members(samples())[:3000], "refuse"),
    "cut off in a member": (members(samples())[:5000], "either"),
    "a pickle": (pickle.dumps(Bomb()), "refuse"),
    "pickles inside": (members(samples(pyd=pickle.dumps(Bomb()))), "either"),
    "broken images": (members({f"{n}.png": b"hello" for n in range(12)}), "refuse"),
    "bombs": (members({f"{n}.png": png(100_000, 100_000) for n in range(12)}), "refuse"),
    "a size of a petabyte": (members({"0.png": b""}).replace(b"00000000000\0", b"77777777777\0", 1), "refuse"),
    "two of a name": (members({"0.png": grey(80, 80), "0.jpg": jpeg("RGB"), **samples(6)}), "either"),
    "compressed": (zlib.compress(members(samples())), "refuse"),
}


def shards() -> Iterator[Case]:
    """WebDataset tars, and shards of our own."""
    words = (*TRAIN[:5], "data.tar", *TRAIN[6:])
    for name, (content, wanted) in SHARDS.items():
        yield Case(
            "shards",
            name,
            words,
            lambda home, content=content: (home / "data.tar").write_bytes(content) and None,
            wanted=wanted,
        )
    for pattern in (
        "data-{0..9}.tar",
        "{",
        "data-{a..b}.tar",
        "data-{9..0}.tar",
        "{1..2}{1..99999}{1..99999}.tar",
        "data-{000..}.tar",
    ):
        yield Case("shards", f"the pattern {pattern}", (*TRAIN[:5], pattern, *TRAIN[6:]))

    def encoded(home: Path, name: str, change: Callable[[Path], Any]) -> None:
        folder = own(home, "generator") / "encoded"
        change(next(folder.glob(name)))

    def bit(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[-3] ^= 4
        path.write_bytes(bytes(content))

    def fewer(path: Path) -> None:
        save_file({name: tensor[:1].contiguous() for name, tensor in load_file(path).items()}, path)

    def other(path: Path) -> None:
        save_file({name: tensor.float() for name, tensor in load_file(path).items()}, path)

    again = ("train", "generator", "--tokenizer", "system", "--preset", "tiny", "--data", "images", "--steps", "2")
    again += (
        "--batch-size",
        "2",
        "--warmup",
        "0",
        "--save-every",
        "1",
        "--cache",
        "generator/encoded",
        "--out",
        "run",
        "--views",
        "1",
    )
    for name, change in {
        "a flipped bit": bit,
        "fewer rows": fewer,
        "another type": other,
        "no file": Path.unlink,
    }.items():
        yield Case(
            "shards",
            f"our own: {name}",
            again,
            partial(encoded, name="*.safetensors", change=change),
            wanted="either",
            outputs=CACHE,
        )
    for name, content in RAW_CONFIG.items():
        make = partial(encoded, name="index.json", change=lambda path, content=content: path.write_bytes(content))
        yield Case("shards", f"our own: index.json is {name}", again, make, wanted="either", outputs=CACHE)


# ---- Python -----------------------------------------------------------------------------------------------------------


def _system(home: Path) -> Any:
    return ns.load(home / "system")


def _images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


class Odd:
    """What no verb expects."""


CALLS: dict[str, tuple[Callable[[Any, Path], Any], Wanted]] = {
    "numpy label": (lambda s, h: ns.sample(s, [np.int64(1)]), "work"),
    "torch label": (lambda s, h: ns.sample(s, torch.tensor([1])), "work"),
    "torch label 0-d": (lambda s, h: ns.sample(s, [torch.tensor(1)]), "work"),
    "numpy labels": (lambda s, h: ns.sample(s, np.array([1, 2])), "work"),
    "numpy seed": (lambda s, h: ns.sample(s, [1], seed=np.int64(3)), "work"),
    "torch seed": (lambda s, h: ns.sample(s, [1], seed=torch.tensor(3)), "work"),
    "numpy seeds": (lambda s, h: ns.sample(s, [1, 2], seed=np.array([3, 4])), "work"),
    "label True": (lambda s, h: ns.sample(s, [True]), "refuse"),
    "label 1.5": (lambda s, h: ns.sample(s, [1.5]), "refuse"),
    "label -1": (lambda s, h: ns.sample(s, [-1]), "refuse"),
    "label 10^30": (lambda s, h: ns.sample(s, [10**30]), "refuse"),
    "label float tensor": (lambda s, h: ns.sample(s, torch.tensor([1.0])), "refuse"),
    "label of an object": (lambda s, h: ns.sample(s, [Odd()]), "refuse"),
    "label of a list": (lambda s, h: ns.sample(s, [[1]]), "refuse"),
    "no labels": (lambda s, h: ns.sample(s, []), "refuse"),
    "labels 3": (lambda s, h: ns.sample(s, 3), "work"),
    "labels None": (lambda s, h: ns.sample(s, None), "work"),
    "labels a word": (lambda s, h: ns.sample(s, "cat"), "refuse"),
    "labels a dict": (lambda s, h: ns.sample(s, {"nosuch": [1]}), "refuse"),
    "labels an empty dict": (lambda s, h: ns.sample(s, {}), "work"),
    "seed -1": (lambda s, h: ns.sample(s, [1], seed=-1), "refuse"),
    "seed 2^70": (lambda s, h: ns.sample(s, [1], seed=2**70), "refuse"),
    "seed a word": (lambda s, h: ns.sample(s, [1], seed="x"), "refuse"),
    "seed 1.5": (lambda s, h: ns.sample(s, [1], seed=1.5), "refuse"),
    "too few seeds": (lambda s, h: ns.sample(s, [1, 2], seed=[1]), "refuse"),
    "guidance 3": (lambda s, h: ns.sample(s, [1], guidance=3), "refuse"),
    "guidance nan": (lambda s, h: ns.sample(s, [1], guidance=ns.cfg(float("nan"))), "refuse"),
    "guidance inf": (lambda s, h: ns.sample(s, [1], guidance=ns.cfg_ramp(float("inf"))), "refuse"),
    "guidance of too few": (lambda s, h: ns.sample(s, [1], guidance=ns.cfg([1.0, 2.0])), "refuse"),
    "pick 3": (lambda s, h: ns.sample(s, [1], pick=3), "refuse"),
    "top-k -1": (lambda s, h: ns.top_k_top_p(-1), "refuse"),
    "top-p nan": (lambda s, h: ns.top_k_top_p(0, float("nan")), "refuse"),
    "temperature inf": (lambda s, h: ns.tempered(ns.multinomial, float("inf")), "refuse"),
    "temperature 0": (lambda s, h: ns.tempered(ns.multinomial, 0), "refuse"),
    "schedule of words": (lambda s, h: ns.Schedule.squares("x"), "refuse"),
    "schedule of 0": (lambda s, h: ns.Schedule.squares(0), "refuse"),
    "schedule of 10^9": (lambda s, h: ns.sample(s, [1], schedule=ns.Schedule.squares(1, 10**9)), "refuse"),
    "schedule of nothing": (lambda s, h: ns.Schedule.squares(), "refuse"),
    "schedule of True": (lambda s, h: ns.Schedule.squares(True, 2), "refuse"),
    "schedule a list": (lambda s, h: ns.sample(s, [1], schedule=[1, 2]), "refuse"),
    "generator 3": (lambda s, h: ns.sample(s, [1], generator=3), "refuse"),
    "system None": (lambda s, h: ns.sample(None, [1]), "refuse"),
    "system a path": (lambda s, h: ns.sample("system", [1]), "refuse"),
    "encode": (lambda s, h: ns.encode(s, _images(1, 3, 64, 64)), "work"),
    "encode half": (lambda s, h: ns.encode(s, _images(1, 3, 64, 64).half()), "work"),
    "encode double": (lambda s, h: ns.encode(s, _images(1, 3, 64, 64).double()), "work"),
    "encode uint8": (lambda s, h: ns.encode(s, torch.zeros(1, 3, 64, 64, dtype=torch.uint8)), "work"),
    "encode an array": (lambda s, h: ns.encode(s, np.zeros((64, 64, 3), np.uint8)), "work"),
    "encode PIL": (lambda s, h: ns.encode(s, picture(None, 64, 64)), "work"),
    "encode PIL images": (lambda s, h: ns.encode(s, [picture(None, 64, 64)] * 2), "work"),
    "encode NaN": (lambda s, h: ns.encode(s, _images(1, 3, 64, 64) * float("nan")), "refuse"),
    "encode 6 channels": (lambda s, h: ns.encode(s, _images(1, 6, 64, 64)), "refuse"),
    "encode two dimensions": (lambda s, h: ns.encode(s, _images(64, 64)), "refuse"),
    "encode 5 dimensions": (lambda s, h: ns.encode(s, _images(1, 1, 3, 64, 64)), "refuse"),
    "encode 63 pixels": (lambda s, h: ns.encode(s, _images(1, 3, 63, 63)), "refuse"),
    "encode nothing": (lambda s, h: ns.encode(s, _images(0, 3, 64, 64)), "either"),
    "encode complex": (lambda s, h: ns.encode(s, _images(1, 3, 64, 64).to(torch.complex64)), "refuse"),
    "encode int64 of 300": (lambda s, h: ns.encode(s, torch.full((1, 3, 64, 64), 300)), "refuse"),
    "encode out of range": (lambda s, h: ns.encode(s, _images(1, 3, 64, 64) * 100), "refuse"),
    "encode a word": (lambda s, h: ns.encode(s, "dog.png"), "either"),
    "encode None": (lambda s, h: ns.encode(s, None), "refuse"),
    "encode a bool tensor": (lambda s, h: ns.encode(s, torch.ones(1, 3, 64, 64, dtype=torch.bool)), "either"),
    "encode meta": (lambda s, h: ns.encode(s, torch.zeros(1, 3, 64, 64, device="meta")), "refuse"),
    "decode nothing": (lambda s, h: ns.decode(s, []), "refuse"),
    "decode unequal batches": (
        lambda s, h: ns.decode(s, [torch.zeros(b, n, dtype=torch.long) for b, n in ((1, 1), (2, 4), (1, 9), (1, 16))]),
        "refuse",
    ),
    "decode too few scales": (lambda s, h: ns.decode(s, [torch.zeros(1, 1, dtype=torch.long)]), "work"),
    "decode floats": (lambda s, h: ns.decode(s, [torch.zeros(1, n) for n in (1, 4, 9, 16)]), "refuse"),
    "decode ids too large": (lambda s, h: ns.decode(s, [torch.full((1, n), 99999) for n in (1, 4, 9, 16)]), "refuse"),
    "decode ids below 0": (lambda s, h: ns.decode(s, [torch.full((1, n), -1) for n in (1, 4, 9, 16)]), "refuse"),
    "decode other lengths": (
        lambda s, h: ns.decode(s, [torch.zeros(1, n, dtype=torch.long) for n in (1, 4, 9, 15)]),
        "refuse",
    ),
    "decode a word": (lambda s, h: ns.decode(s, "abcd"), "refuse"),
    "decode int32": (
        lambda s, h: ns.decode(s, [torch.zeros(1, n, dtype=torch.int32) for n in (1, 4, 9, 16)]),
        "either",
    ),
    "logits unequal": (
        lambda s, h: ns.logits(
            s, [torch.zeros(b, n, dtype=torch.long) for b, n in ((1, 1), (2, 4), (1, 9), (1, 16))], [1]
        ),
        "refuse",
    ),
    "logits of other labels": (
        lambda s, h: ns.logits(s, [torch.zeros(1, n, dtype=torch.long) for n in (1, 4, 9, 16)], [1, 2]),
        "refuse",
    ),
    "psnr 3-D": (lambda s, h: ns.psnr(_images(3, 64, 64), _images(3, 64, 64)), "either"),
    "psnr of other shapes": (lambda s, h: ns.psnr(_images(1, 3, 64, 64), _images(1, 3, 32, 32)), "refuse"),
    "psnr of words": (lambda s, h: ns.psnr("a", "b"), "refuse"),
    "psnr of NaN": (lambda s, h: ns.psnr(_images(1, 3, 4, 4) * float("nan"), _images(1, 3, 4, 4)), "refuse"),
    "inpaint nothing": (lambda s, h: ns.inpaint(s, _images(1, 3, 64, 64), torch.zeros(64, 64), [1]), "warn"),
    "inpaint without a mask": (lambda s, h: ns.inpaint(s, _images(1, 3, 64, 64), labels=[1]), "refuse"),
    "inpaint mask and box": (
        lambda s, h: ns.inpaint(s, _images(1, 3, 64, 64), torch.ones(64, 64), [1], box=(0, 0, 1, 1)),
        "refuse",
    ),
    "inpaint a mask of another size": (
        lambda s, h: ns.inpaint(s, _images(1, 3, 64, 64), torch.ones(9, 9), [1]),
        "refuse",
    ),
    "inpaint a mask of NaN": (
        lambda s, h: ns.inpaint(s, _images(1, 3, 64, 64), torch.full((64, 64), float("nan")), [1]),
        "refuse",
    ),
    "inpaint a box of NaN": (
        lambda s, h: ns.inpaint(s, _images(1, 3, 64, 64), labels=[1], box=(float("nan"), 0, 1, 1)),
        "refuse",
    ),
    "inpaint a box of three": (lambda s, h: ns.inpaint(s, _images(1, 3, 64, 64), labels=[1], box=(0, 0, 1)), "refuse"),
    "inpaint PIL": (lambda s, h: ns.inpaint(s, picture(None, 64, 64), labels=[1], box=(0, 0, 0.5, 1)), "work"),
    "outpaint everything": (lambda s, h: ns.outpaint(s, _images(1, 3, 64, 64), (0, 0, 1, 1), [1]), "warn"),
    "edit of too many labels": (
        lambda s, h: ns.class_edit(s, _images(1, 3, 64, 64), labels=[1, 2, 3], box=(0, 0, 1, 1)),
        "either",
    ),
    "keep of too few": (
        lambda s, h: ns.sample(s, [1], edit=ns.keep_tokens([torch.zeros(1, 1, dtype=torch.long)], [torch.ones(1, 1)])),
        "refuse",
    ),
    "edit 3": (lambda s, h: ns.sample(s, [1], edit=3), "refuse"),
    "save_images": (lambda s, h: ns.save_images(_images(1, 3, 64, 64), h / "a.png"), "work"),
    "save_images NaN": (lambda s, h: ns.save_images(_images(1, 3, 64, 64) * float("nan"), h / "a.png"), "refuse"),
    "save_images nothing": (lambda s, h: ns.save_images(_images(0, 3, 64, 64), h / "a.png"), "refuse"),
    "save_images columns 0": (lambda s, h: ns.save_images(_images(2, 3, 64, 64), h / "a.png", columns=0), "refuse"),
    "save_images columns 10^12": (
        lambda s, h: ns.save_images(_images(2, 3, 64, 64), h / "a.png", columns=10**12),
        "either",
    ),
    "save_images scale 10^9": (lambda s, h: ns.save_images(_images(2, 3, 64, 64), h / "a.png", scale=10**9), "refuse"),
    "save_images border -1": (lambda s, h: ns.save_images(_images(2, 3, 64, 64), h / "a.png", border=-1), "refuse"),
    "save_images border 10^9": (
        lambda s, h: ns.save_images(_images(2, 3, 64, 64), h / "a.png", border=10**9),
        "refuse",
    ),
    "save_images labels too few": (
        lambda s, h: ns.save_images(_images(2, 3, 64, 64), h / "a.png", labels=["a"]),
        "refuse",
    ),
    "save_images no format": (lambda s, h: ns.save_images(_images(2, 3, 64, 64), h / "a.xyz"), "refuse"),
    "save_images to None": (lambda s, h: ns.save_images(_images(2, 3, 64, 64), None), "refuse"),
    "save_images of words": (lambda s, h: ns.save_images("abc", h / "a.png"), "refuse"),
    "read_images size 10^9": (lambda s, h: ns.read_images(h / "dog.png", 10**9), "refuse"),
    "read_images size 0": (lambda s, h: ns.read_images(h / "dog.png", 0), "refuse"),
    "image_folder size -1": (lambda s, h: ns.image_folder(h / "images", -1), "refuse"),
    "image_folder None": (lambda s, h: ns.image_folder(None, 64), "refuse"),
    "web_shards nowhere": (lambda s, h: ns.web_shards(str(h / "nowhere.tar"), 64), "refuse"),
    "load None": (lambda s, h: ns.load(None), "refuse"),
    "load 3": (lambda s, h: ns.load(3), "refuse"),
    "load a null byte": (lambda s, h: ns.load("a\0b"), "refuse"),
    "load device": (lambda s, h: ns.load(h / "system", device="hpu"), "refuse"),
    "load dtype": (lambda s, h: ns.load(h / "system", dtype=torch.int8), "refuse"),
    "load dtype a word": (lambda s, h: ns.load(h / "system", dtype="float32"), "refuse"),
    "save to a file": (lambda s, h: ns.save(s, h / "dog.png"), "refuse"),
    "save None": (lambda s, h: ns.save(None, h / "x"), "refuse"),
    "save wrapped": (lambda s, h: _saved_wrapped(s, h), "either"),
    "float64 by default": (lambda s, h: _in_double(h), "work"),
    "train without data": (lambda s, h: ns.train_tokenizer(s, [], ns.TrainConfig(steps=1), out=h / "run"), "refuse"),
    "train on None": (lambda s, h: ns.train_tokenizer(s, None, ns.TrainConfig(steps=1), out=h / "run"), "refuse"),
    "train on NaN": (lambda s, h: _trained_on(s, h, float("nan")), "either"),
    "train on 1e30": (lambda s, h: _trained_on(s, h, 1e30), "either"),
    "evaluate 10^12": (
        lambda s, h: ns.evaluate(s, ns.image_folder(h / "images", 64), h / "e", samples=10**12),
        "refuse",
    ),
    "evaluate None": (lambda s, h: ns.evaluate(s, None, h / "e"), "refuse"),
    "step of None": (lambda s, h: ns.step(s, None), "refuse"),
    "step after the end": (lambda s, h: _past_the_end(s), "refuse"),
    "finish of None": (lambda s, h: ns.finish(s, None), "refuse"),
    "open_images of None": (lambda s, h: ns.open_images(None, 64), "refuse"),
    "open_images nowhere": (lambda s, h: ns.open_images(ns.DataSource("nowhere"), 64), "refuse"),
    "find_recipe": (lambda s, h: ns.find_recipe("os"), "refuse"),
    "find_recipe a path": (lambda s, h: ns.find_recipe("../x"), "refuse"),
    "load_official": (lambda s, h: ns.load_official("nosuch"), "refuse"),
}


def _saved_wrapped(system: Any, home: Path) -> None:
    system.model = torch.nn.DataParallel(system.model)
    ns.save(system, home / "x")
    ns.sample(ns.load(home / "x"), [1])


def _in_double(home: Path) -> None:
    torch.set_default_dtype(torch.float64)
    ns.sample(ns.load(home / "system"), [1])


def _trained_on(system: Any, home: Path, number: float) -> None:
    items = [{"image": torch.full((3, 64, 64), number)} for _ in range(4)]
    ns.train_tokenizer(system, items, ns.TrainConfig(steps=2, batch_size=2, most_skipped=0), out=home / "run")


def _past_the_end(system: Any) -> None:
    state = ns.start(system, [1])
    for _ in range(99):
        state = ns.step(system, state)


def calls() -> Iterator[Case]:
    """Calls of the library."""
    for name, (call, wanted) in CALLS.items():
        yield Case("python", name, call=lambda home, call=call: call(_system(home), home), wanted=wanted)


# ---- prompts and single files -----------------------------------------------------------------------------------------


def prompts() -> Iterator[Case]:
    """Words of people."""
    base = ("sample", "--count", "1", "--out", "a.png", "--prompt")
    said: dict[str, tuple[str, Wanted]] = {
        "200,000 letters": ("x" * 200_000, "either"),
        "200,000 words": ("cat " * 50_000, "either"),
        "too long": ("a red cat " * 60, "warn"),
        "empty": ("", "warn"),
        "spaces": ("   ", "warn"),
        "control characters": ("\x1b[31mred\x07", "either"),
        "a lone surrogate": ("\udcff", "either"),
        "null bytes": ("a\0b", "either"),
        "emoji": ("🐈 cat", "work"),
        "right to left": ("قطة", "work"),
        "decomposed": ("cafe\u0301", "work"),
        "newlines": ("a\nb", "either"),
        "options": ("--count 3", "either"),
        "quotes": ('"; touch canary; "', "work"),
    }
    for name, (text, wanted) in said.items():
        yield Case("prompts", name, (*base, text), wanted=wanted)
    for name, text in {"café composed": "caf\u00e9", "not a class": "café", "CAPITALS": "NOSUCH"}.items():
        yield Case("prompts", f"label: {name}", (*SAMPLE[:3], "--labels", text, "--out", "a.png"))


def files() -> Iterator[Case]:
    """Single images and masks."""

    def written(home: Path, name: str, content: bytes) -> None:
        (home / name).write_bytes(content)

    for name, (_, content, _) in STRANGE.items():
        if content[:1] not in (b"{", b"f", b"a"):
            make = partial(written, name="x.png", content=content)
            yield Case(
                "files",
                f"reconstruct: {name}",
                ("reconstruct", "x.png", "--system", "system", "--out", "r.png"),
                make,
                wanted="either",
            )

    def mask(home: Path, mode: str, value: Any, size: tuple[int, int] = (64, 64), box: Any = None) -> None:
        image = Image.new(mode, size, 0)
        if box:
            image.paste(value, box)
        image.save(home / "m.png")

    masks: dict[str, tuple[Callable[[Path], None], Wanted]] = {
        "nothing": (partial(mask, mode="L", value=255), "refuse"),
        "all": (partial(mask, mode="L", value=255, box=(0, 0, 64, 64)), "work"),
        "a part": (partial(mask, mode="L", value=255, box=(0, 0, 32, 64)), "work"),
        "strokes on transparency": (partial(mask, mode="RGBA", value=(255, 255, 255, 255), box=(0, 0, 20, 20)), "work"),
        "transparent white": (partial(mask, mode="RGBA", value=(255, 255, 255, 0), box=(0, 0, 20, 20)), "refuse"),
        "another shape": (partial(mask, mode="L", value=255, size=(10, 100), box=(0, 0, 10, 50)), "refuse"),
        "a corner": (partial(mask, mode="L", value=255, box=(0, 0, 1, 1)), "either"),
        "grey": (partial(mask, mode="L", value=100, box=(0, 0, 32, 64)), "either"),
        "no image": (partial(written, name="m.png", content=b"hello"), "refuse"),
        "a bomb": (partial(written, name="m.png", content=png(100_000, 100_000)), "refuse"),
    }
    for name, (make, wanted) in masks.items():
        for verb in ("inpaint", "outpaint"):
            words = (verb, *INPAINT[1:], "--mask", "m.png")
            if verb == "outpaint" and name == "another shape":
                continue
            yield Case(
                "files", f"{verb} with a mask: {name}", words, make, wanted="either" if verb == "outpaint" else wanted
            )

    def table(home: Path, rows: list[list[str]]) -> None:
        with open(home / "labels.csv", "w", newline="") as file:
            csv.writer(file).writerows(rows)

    for name, rows in {
        "a table of labels": [["1"], ["2"]],
        "an empty table": [],
        "a table of nonsense": [["x" * 99]],
    }.items():
        words = (*SAMPLE[:3], "--labels", "labels.csv", "--count", "1", "--out", "a.png")
        yield Case("files", name, words, partial(table, rows=rows), wanted="either")


# ---- sets of images ---------------------------------------------------------------------------------------------------


def array_file(shape: tuple[int, ...], content: bytes, descr: str = "|u1", columns: bool = False) -> bytes:
    """A .npy that says this shape, whatever it holds."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": columns, "shape": shape})
    return file.getvalue() + content


def sets() -> Iterator[Case]:
    """Containers to be scored, sets that were begun, and reports to be compared."""
    images = np.zeros((4, 64, 64, 3), np.uint8)

    def written(home: Path, **arrays: Any) -> None:
        np.savez(home / "x.npz", **arrays)

    def raw(home: Path, **members: bytes) -> None:
        with zipfile.ZipFile(home / "x.npz", "w") as archive:
            for name, content in members.items():
                archive.writestr(f"{name}.npy", content)

    def alone(home: Path, content: bytes) -> None:
        (home / "x.npz").write_bytes(content)

    def cut(home: Path) -> None:
        written(home, arr_0=images)
        (home / "x.npz").write_bytes((home / "x.npz").read_bytes()[:-700])

    strange: dict[str, tuple[Callable[[Path], None], Wanted]] = {
        "bytes": (partial(written, arr_0=images), "warn"),
        "compressed": (lambda home: np.savez_compressed(home / "x.npz", images), "warn"),
        "columns first": (partial(written, arr_0=np.asfortranarray(images)), "refuse"),
        "floats": (partial(written, arr_0=images.astype(np.float32)), "refuse"),
        "three dimensions": (partial(written, arr_0=images[0]), "refuse"),
        "one channel": (partial(written, arr_0=images[..., :1]), "refuse"),
        "no images": (partial(written, arr_0=images[:0]), "refuse"),
        "another size": (partial(written, arr_0=images[:, :32]), "refuse"),
        "another name": (partial(written, images=images), "refuse"),
        "Python objects": (partial(written, arr_0=np.array([print], dtype=object)), "refuse"),
        "more than there is": (partial(raw, arr_0=array_file((10**12, 64, 64, 3), bytes(100))), "refuse"),
        "less than nothing": (partial(raw, arr_0=array_file((-4, 64, 64, 3), bytes(100))), "refuse"),
        "no header": (partial(raw, arr_0=b"\x93NUMPY"), "refuse"),
        "moments of another network": (partial(written, arr_0=images, mu=np.zeros(9), sigma=np.eye(9)), "refuse"),
        "moments that do not fit": (partial(written, arr_0=images, mu=np.zeros(9), sigma=np.eye(8)), "refuse"),
        "moments that are not finite": (partial(written, mu=np.full(1280, np.nan), sigma=np.eye(1280)), "refuse"),
        "text": (partial(alone, content=b"images"), "refuse"),
        "nothing": (partial(alone, content=b""), "refuse"),
        "cut off": (cut, "refuse"),
    }
    score = ("score", "x.npz", "--reference", "images", "--size", "64", "--out", "scored")
    for name, (make, wanted) in strange.items():
        moments = name.startswith("moments")
        words = ("score", "images", "--reference", "x.npz", "--size", "64", "--out", "scored") if moments else score
        yield Case("sets", f"score: {name}", words, make, wanted=wanted, outputs=("scored",))

    def begun(home: Path, content: bytes, name: str = "set.json") -> None:
        (home / "drawn").mkdir()
        (home / "drawn" / name).write_bytes(content)

    draw = ("sample-set", "--system", "system", "--each", "1", "--labels", "0,1", "--out", "drawn")
    for name, content in {
        "text": b"set",
        "a list": b"[]",
        "another": b"{}",
        "nested": b"[" * 500,
        "NaN": b'{"seed": NaN}',
    }.items():
        yield Case("sets", f"begun: {name}", draw, partial(begun, content=content), outputs=("drawn",))
    yield Case("sets", "others' files", draw, partial(begun, content=b"mine", name="mine.txt"))

    def report(home: Path, content: bytes) -> None:
        (home / "r.json").write_bytes(content)

    together = ("compare", "r.json", "r.json", "--out", "compared", "--names", "a", "b")
    for name, content in {
        "text": b"report",
        "a list": b"[1]",
        "nothing": b"{}",
        "scores of text": b'{"scores": {"fid": "low"}}',
        "scores that are a list": b'{"scores": [1, 2]}',
        "infinite scores": b'{"scores": {"fid": 1e999}}',
        "nested": b"[" * 5000,
        "a tokenizer of nothing": b'{"tokenizer": []}',
        "a protocol of text": b'{"scores": {"fid": 3}, "protocol": "mine"}',
    }.items():
        yield Case("sets", f"compare: {name}", together, partial(report, content=content), outputs=("compared",))
