"""`nextscale info` and `list`: facts about systems, recipes and the installation.

Importing torch takes seconds, so it is not imported for what comes with the package: files say it all.
"""

from __future__ import annotations

import ast
import json
import math
import platform
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import tyro

import nextscale as ns
from nextscale.cli.methods import Methods, applies_to, constant, load_changed, recipe_files, summary

PACKAGE = Path(ns.__file__).parent


def info(
    system: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(metavar="[SYSTEM]", help_behavior_hint="(default: none)")
    ] = "",
    devices: bool = False,
    methods: Methods = (),
) -> None:
    """Describe a system: classes, sizes, sampling, files, licence; without a name, the installation.

    Try: nextscale info emoji-64

    Args:
        system: shipped name, folder (of a system or a training), or hub name
        devices: also name the devices that torch sees here, which takes seconds
    """
    if methods and not system:
        raise ValueError(
            "info --with needs the name of the system that the method changes; try `nextscale info emoji-64`"
        )
    shipped = _shipped()
    if not system:
        facts = _installation_facts(devices)
    elif system in shipped and not methods:
        facts = _shipped_facts(system, shipped[system])
    else:
        facts = _system_facts(system, methods)
    _print_table(facts)


def list_() -> None:
    """List the systems that ship with the package, the recipes, and the published models that `convert` knows."""
    print("systems:")
    shipped = _shipped()
    for name, folder in shipped.items():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (height, width), classes = config["image_size"], config["config"].get("classes")
        count = sum(_parameters(folder, part) for part in config["parts"])
        told = f"{len(classes)} classes" if classes else "prompts"
        print(f"  {name:<14} {height}x{width} px, {_millions(count)} parameters, {told}")
    if not shipped:
        print("  none in this installation")
    changing = {name: kinds for name, path in recipe_files().items() if (kinds := applies_to(path))}
    print("recipes that build systems:")
    for name, path in recipe_files().items():
        if name not in changing:
            print(f"  {name:<14} {summary(path)}")
    print("methods that change systems (nextscale sample --with NAME; --with NAME --help explains its options):")
    for name, kinds in changing.items():
        print(f"  {name:<14} {summary(recipe_files()[name])}")
        print(f"  {'':<14} applies to {kinds}")
    print("published models (nextscale convert NAME --to FOLDER):")
    print(textwrap.fill(", ".join(_published()), 100, initial_indent="  ", subsequent_indent="  "))


# ---- facts -----------------------------------------------------------------------------------------------------------


def _shipped() -> dict[str, Path]:
    """Names and folders of the systems that come along, as `ns.shipped` finds them."""
    return {path.parent.name: path.parent for path in sorted((PACKAGE / "weights").glob("*/config.json"))}


def _published() -> list[str]:
    """Names of the published models, as `published_names` finds them."""
    tables = (constant(path, "OFFICIAL") for path in sorted((PACKAGE / "published").glob("*_layout.py")))
    keys = (key for table in tables if isinstance(table, ast.Dict) for key in table.keys)
    return [ast.literal_eval(key) for key in keys if key is not None]


def _parameters(folder: Path, part: str) -> int:
    """Numbers in a file of weights, as its header says."""
    with (folder / f"{part}.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def _shipped_facts(name: str, folder: Path) -> Iterable[tuple[str, str]]:
    from nextscale.data.attribution import SHARE_AS, attribution
    from nextscale.sampling.defaults import SamplingDefaults

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings = config["config"]
    sizes = [(size, size) if isinstance(size, int) else tuple(size) for size in settings["sizes"]]
    shown = " ".join(str(h) if h == w else f"{h}x{w}" for h, w in sizes)
    yield "system", name
    yield "recipe", f"{config['recipe']}: {summary(recipe_files()[config['recipe']])}"
    yield "image size", "{}x{} pixels".format(*config["image_size"])
    yield "schedule", f"{shown} ({len(sizes)} scales, {sum(h * w for h, w in sizes)} tokens)"
    for part in config["parts"]:
        yield part, f"{_millions(_parameters(folder, part))} parameters"
    yield "sampling", SamplingDefaults.model_validate(settings["sampling"]).words()
    if classes := settings.get("classes"):
        yield f"classes ({len(classes)})", ", ".join(classes)
    else:
        yield "told by", f"prompts: nextscale sample --system {name} --prompt TEXT"
    if styles := settings.get("styles"):
        yield f"styles ({len(styles)})", ", ".join(styles)
    yield from _files(folder)
    yield "data", attribution(settings.get("styles", ()))
    yield "weights", f"trained on these; share them under {SHARE_AS}, with this attribution"
    yield "versions", _versions()


def _files(folder: Path) -> Iterable[tuple[str, str]]:
    yield "folder", str(folder)
    yield "files", ", ".join(f"{path.name} {_size(path)}" for path in sorted(folder.iterdir()) if path.is_file())
    card = folder / "README.md"
    yield "model card", str(card) if card.exists() else "none in the folder"


def _system_facts(name: str, methods: Sequence[str]) -> Iterable[tuple[str, str]]:
    from nextscale.checkpoint import find_folder

    system = load_changed(name, "cpu", methods)
    shipped = _shipped()
    folder = find_folder(name)
    recipe = Path(ns.find_recipe(system.recipe).__file__)
    schedule, (height, width) = system.schedule, system.image_size
    yield "system", name
    yield "recipe", f"{system.recipe}: {summary(recipe)}"
    for change in system.changes:
        settings = ", ".join(f"{key} {value}" for key, value in change.config.model_dump(mode="json").items())
        yield "changed by", f"{change.recipe}: {settings}"
    yield "image size", f"{height}x{width} pixels"
    yield "schedule", f"{schedule} ({len(schedule)} scales, {schedule.length} tokens)"
    yield "tokenizer", f"{_millions(_count(system.tokenizer))} parameters"
    if system.model is None:
        yield "model", "none; train one with `nextscale train generator`"
    else:
        yield "model", f"{_millions(_count(system.model))} parameters"
        yield "sampling", system.sampling.words()
        for said, reader in system.readers.items():
            if said in system.texts:
                yield "told by", f"prompts ({type(reader).__name__}): nextscale sample --system {name} --prompt TEXT"
            elif count := len(reader.choices):
                named = all(isinstance(name, str) for name in reader.choices)
                names = ", ".join(map(str, reader.choices)) if named else f"without names: 0 to {count - 1}"
                yield f"{'classes' if said == 'label' else said + 's'} ({count})", names
            else:
                yield "told by", f"{said} ({type(reader).__name__})"
    yield from _files(folder)
    if name in shipped:
        from nextscale.data.attribution import SHARE_AS, attribution

        yield "data", attribution(system.config.styles)
        yield "weights", f"trained on these; share them under {SHARE_AS}, with this attribution"
    else:
        yield "licence", "not recorded in the weights; the model card, or who trained them, says it"
    yield "versions", _versions()


def _installation_facts(devices: bool) -> Iterable[tuple[str, str]]:
    from nextscale.data.attribution import SETS, SHARE_AS, attribution
    from nextscale.extras import EXTRAS
    from nextscale.files import cache_dir

    yield "versions", _versions()
    yield "devices", ", ".join(_devices()) if devices else "`nextscale info --devices` asks torch"
    yield "package", str(PACKAGE)
    yield "cache", f"{cache_dir()} ({'there' if cache_dir().is_dir() else 'not made yet'}; NEXTSCALE_CACHE moves it)"
    for extra, packages in EXTRAS.items():
        found = {package.name: _version(package.name) for package in packages}
        missing = [package for package, version in found.items() if version is None]
        state = ", ".join(f"{package} {version}" for package, version in found.items() if version)
        if missing:
            state = f"missing {', '.join(missing)}: pip install 'nextscale[{extra}]'"
        yield f"extra {extra}", state
    yield "systems", ", ".join(_shipped()) or "none in this installation"
    yield "licences", f"code MIT; shipped weights {SHARE_AS}; drawings: {attribution(SETS)}"


def _print_table(facts: Iterable[tuple[str, str]]) -> None:
    rows = list(facts)
    indent = max(len(name) for name, _ in rows) + 2
    width = max(40 + indent, min(120, shutil.get_terminal_size((100, 24)).columns))
    for name, value in rows:
        # Words stay whole: names with hyphens, and paths.
        lines = textwrap.wrap(value, width - indent, break_long_words=False, break_on_hyphens=False) or [""]
        print(f"{name:<{indent}}" + f"\n{'':<{indent}}".join(lines))


def _versions() -> str:
    others = (f"{package} {_version(package)}" for package in ("torch", "numpy", "pillow", "safetensors", "pydantic"))
    return ", ".join([f"nextscale {ns.__version__}", f"python {platform.python_version()}", *others])


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    import torch

    gpus = [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    return ["cpu", *gpus]


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"


def _size(path: Path) -> str:
    size = path.stat().st_size
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
