"""Models published by others: `load_official`, and conversion to our folders and back.

Which models there are, and how their files are laid out, is said by the recipes that have `OFFICIAL` and `LAYOUT`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nextscale.checkpoint import find_folder, load, save
from nextscale.files import atomic_write
from nextscale.progress import say
from nextscale.published.layout import Layout, Published, from_states, to_states
from nextscale.published.weight_files import read_pth, read_shards, state_dict, write_pth, write_shards
from nextscale.system import System, check_device, find_recipe, recipe_names

EXTRA = "official.safetensors"  # beside a converted system: what the official files hold and a system has no use for


@dataclass(frozen=True)
class PublishedSource:
    """A published model: its name, the recipe that knows it, and what it is."""

    name: str
    recipe: Any
    published: Published

    @property
    def layout(self) -> Layout:
        return self.recipe.LAYOUT


@dataclass(frozen=True)
class KeptEntries:
    """What a conversion keeps beside a system: entries without a use, and the name of the model if it was published."""

    entries: Mapping[str, Tensor]
    name: str = ""


def published_names() -> list[str]:
    """Names of all published models that some recipe can bring over."""
    return [name for recipe in _recipes() for name in recipe.OFFICIAL]


def load_official(
    name: str,
    folder: str | os.PathLike[str] | None = None,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    own_tokenizer: bool = False,
    device: str = "cpu",
    verify: bool = True,
) -> System:
    """A published model by its name: `var-d16`, `flexvar-d24` or `infinity-2b`, for example (`published_names()`).

    Args:
        folder: where the published files are, under their published names, or a folder that `nextscale convert` wrote; None:
            the files are fetched from the hub repository of the method.
        checkpoint: a training checkpoint of the official code or another state dict instead of the generator's file.
            Published files in that form are understood as well.
        own_tokenizer: take the tokenizer that a training checkpoint carries instead of the published file.
        verify: compare the files with the checksums inside them, and look for numbers that are not finite. It reads every
            byte, at about 1 GB/s; `nextscale convert` does it once for all.

    On the CPU the weights stay mapped to the files, so leave these in place while the system is in use.

    Raises FileNotFoundError with the names of missing files and where they are published; ValueError for files that are
    damaged, are no state dicts, or do not have exactly the official layout (every mismatch is listed).
    """
    check_device(device)
    source = _find(name)
    if folder is not None and (Path(folder) / "config.json").is_file():
        if checkpoint is not None or own_tokenizer:
            raise ValueError(f"{folder} is converted already; give the folder of the official files with a checkpoint")
        return _load_converted(source, Path(folder), device)
    system, _ = _read_system(source, folder, checkpoint, own_tokenizer, verify)
    return system.to(device)


def convert_official(
    name: str,
    folder: str | os.PathLike[str] | None,
    target: str | os.PathLike[str],
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    own_tokenizer: bool = False,
) -> Path:
    """Write a published model as a folder that `ns.load` reads, every float32 as it is; the other arguments are those of
    `load_official`. `export_official` is the way back."""
    source = _find(name)
    target = Path(target)
    if folder is not None and (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder} is converted already: `ns.load` and --system read it as it is")
    if (target / "config.json").exists():
        raise ValueError(f"{target} holds a system already; choose another folder, or delete that one first")
    system, kept = _read_system(source, folder, checkpoint, own_tokenizer, verify=True)
    say(f"writing {target}")
    _write_kept(target / EXTRA, kept)
    with atomic_write(target / "README.md") as path:
        path.write_text(_card(source), encoding="utf-8")
    return save(system, target)


def export_official(system: str | os.PathLike[str], target: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write a system as the official code's two files: state dicts with its names, shapes and order.

    Returns their paths: the published names for a system that was converted, else names that say its shape. What was
    converted from official files comes back to the bit. Raises ValueError for a system that the official classes cannot
    express, or that methods changed.
    """
    folder, target = find_folder(system), Path(target)
    loaded = load(folder)
    layout = _layout(loaded.recipe)
    kept = _read_kept(folder / EXTRA, layout)
    if kept.name:
        published = _find(kept.name).published
        names, given = published.files, published.constructor[1]
    else:
        names, given = layout.files(loaded.config), dict(layout.given(loaded.config))
    states = to_states(layout, loaded, kept.entries, given)
    paths = (target / names[0], target / names[1])
    if there := [str(path) for path in paths if path.exists()]:
        raise ValueError(f"{' and '.join(there)} would be overwritten; choose another folder, or delete that first")
    for path, state, within in zip(paths, states, layout.within, strict=True):
        if path.suffix:
            write_pth(state, path, within)
        else:
            write_shards(state, path)
    return paths


# ---- published models by name ------------------------------------------------------------------------------------------


def _recipes() -> list[ModuleType]:
    """All recipes that know published models and how these are laid out."""
    recipes = [find_recipe(name) for name in recipe_names()]
    return [recipe for recipe in recipes if hasattr(recipe, "OFFICIAL") and hasattr(recipe, "LAYOUT")]


def _find(name: str) -> PublishedSource:
    for recipe in _recipes():
        if name in recipe.OFFICIAL:
            return PublishedSource(name, recipe, recipe.OFFICIAL[name])
    raise ValueError(f"no published model {name!r}; there are {', '.join(published_names())}")


def _layout(recipe: str) -> Layout:
    module = find_recipe(recipe)
    if not hasattr(module, "LAYOUT"):
        known = ", ".join(found.__name__.rpartition(".")[2] for found in _recipes())
        raise ValueError(f"only systems of the recipes {known} have an official layout, got {recipe!r}")
    return module.LAYOUT


# ---- from files to a system --------------------------------------------------------------------------------------------


def _load_converted(source: PublishedSource, folder: Path, device: str) -> System:
    system = load(folder, device=device)
    expected, users = source.published.config(), {"classes", "sampling"}
    same = type(expected) is type(system.config)
    if not same or expected.model_dump(exclude=users) != system.config.model_dump(exclude=users):
        raise ValueError(
            f"{folder} holds another system than {source.name}; load it by `ns.load`, or give another folder"
        )
    return system


def _read_system(
    source: PublishedSource,
    folder: str | os.PathLike[str] | None,
    checkpoint: str | os.PathLike[str] | None,
    own_tokenizer: bool,
    verify: bool,
) -> tuple[System, KeptEntries]:
    """The system, and what its files hold besides."""
    layout = source.layout
    vae_path, model_path = _find_files(source, folder, checkpoint, own_tokenizer)
    content = _read(model_path, verify)
    model_state = _state(content, model_path, layout, 1)
    if own_tokenizer:
        if not _is_training_checkpoint(content):
            raise ValueError(
                f"{model_path} is no training checkpoint, so it carries no tokenizer; give the tokenizer's file"
            )
        vae_path = model_path
    else:
        content = _read(vae_path, verify)
    vae_state = _state(content, vae_path, layout, 0)
    try:
        system = from_states(
            layout,
            source.recipe.build,
            source.published.named_config(),
            (vae_state, model_state),
            given=source.published.constructor[1],
            sources=(str(vae_path), str(model_path)),
            complete=layout.complete,
        )
    except ValueError as error:
        raise ValueError(f"{error}{_hint(source, vae_state, model_state)}") from error
    if verify:
        bad = [key for key, tensor in system.state_dict().items() if not tensor.isfinite().all()]
        if bad:
            raise ValueError(
                f"the files of {source.name} hold numbers that are not finite, in {', '.join(bad[:5])}; get them again"
            )
    entries = {name: state[name] for state in (vae_state, model_state) for name in layout.unread if name in state}
    return system, KeptEntries(entries, source.name)


def _find_files(
    source: PublishedSource,
    folder: str | os.PathLike[str] | None,
    checkpoint: str | os.PathLike[str] | None,
    own_tokenizer: bool,
) -> tuple[Path, Path]:
    wanted = dict(zip(("tokenizer", "generator"), source.published.files, strict=True))
    found: dict[str, Path] = {}
    if checkpoint is not None:
        found["generator"] = Path(checkpoint)
        if not found["generator"].exists():
            raise FileNotFoundError(f"{checkpoint} is missing; expected a checkpoint of the official code")
    if folder is not None and not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder} is no folder; expected the one with {' and '.join(wanted.values())}")
    hub = source.layout.hub
    need = [part for part in wanted if part not in found and not (part == "tokenizer" and own_tokenizer)]
    for part in need:
        found[part] = _fetch(hub, wanted[part]) if folder is None else Path(folder) / wanted[part]
    if missing := [path.name for path in found.values() if not path.exists()]:
        links = "".join(f"\n  {_link(hub, file)}" for file in missing)
        raise FileNotFoundError(
            f"{' and '.join(missing)} missing in {folder}; {source.name} needs {' and '.join(wanted.values())}, published in "
            f"the hub repository {hub}. Put them there:{links}\nor leave the folder out to fetch them"
        )
    return found.get("tokenizer", found["generator"]), found["generator"]


def _link(hub: str, file: str) -> str:
    return f"https://huggingface.co/{hub}/{'resolve' if Path(file).suffix else 'tree'}/main/{file}"


def _fetch(hub: str, file: str) -> Path:
    """A file of a hub repository, or a folder of shards, which has no ending."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        if Path(file).suffix:
            return Path(hf_hub_download(hub, file))
        return Path(snapshot_download(hub, allow_patterns=[f"{file}/*"])) / file
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"could not fetch {file} from the hub repository {hub} ({type(error).__name__}); check the network, or get "
            f"{_link(hub, file)} by other means and give its folder"
        ) from error


def _read(path: Path, verify: bool) -> Any:
    return read_shards(path, verify=verify) if path.is_dir() else read_pth(path, verify=verify)


def _is_training_checkpoint(content: Any) -> bool:
    return isinstance(content, Mapping) and isinstance(content.get("trainer"), Mapping)


def _state(content: Any, path: Path, layout: Layout, part: int) -> dict[str, Tensor]:
    """The state dict of the tokenizer (part 0) or the generator (1) in what a file holds."""
    if _is_training_checkpoint(content):
        key = layout.trained[part]
        if not key:
            raise ValueError(
                f"{path} is a training checkpoint, of which it is not known whether and where it holds a tokenizer; give "
                "the tokenizer's file"
            )
        content = content["trainer"].get(key)
        if content is None:
            raise ValueError(f"{path} is a training checkpoint without trainer/{key}; expected one of the reference's")
    elif layout.within[part] and isinstance(content, Mapping) and layout.within[part] in content:
        content = content[layout.within[part]]
    return state_dict(content, path)


def _hint(source: PublishedSource, vae: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> str:
    """What a file that does not fit may be instead."""
    if any(name.startswith("encoder.") for name in model) or "pos_start" in vae:
        return "\n(tokenizer and generator look swapped: was a file renamed?)"
    if "pos_start" not in model:
        return ""
    widths = {name: other.constructor[1].get("embed_dim") for name, other in source.recipe.OFFICIAL.items()}
    width = model["pos_start"].shape[-1]
    if width == widths[source.name] or width not in widths.values():
        return ""
    likely = next(name for name in widths if widths[name] == width)
    return f"\n(the generator's width {width} is that of {likely})"


# ---- what goes along with a converted system ---------------------------------------------------------------------------


def _write_kept(path: Path, kept: KeptEntries) -> None:
    own = {name: tensor.detach().clone().contiguous() for name, tensor in kept.entries.items()}
    with atomic_write(path) as temporary:
        save_file(own, temporary, metadata={"published": json.dumps(kept.name)})


def _read_kept(path: Path, layout: Layout) -> KeptEntries:
    if not path.is_file():
        return KeptEntries({})
    try:
        with safe_open(path, framework="pt") as file:
            entries = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
            name = json.loads((file.metadata() or {}).get("published", '""'))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); copy it again, or delete it to start its entries anew"
        ) from error
    if unknown := sorted(set(entries) - set(layout.unread)):
        raise ValueError(
            f"{path} must hold {' and '.join(layout.unread) or 'no entries'} alone, got {unknown}; delete it to start them anew"
        )
    return KeptEntries(entries, name)


def _card(source: PublishedSource) -> str:
    return f"""# {source.name}

{source.published.card}

Converted without change from {" and ".join(source.published.files)} of https://huggingface.co/{source.layout.hub}.
"""
