"""Systems on disk: a folder with `config.json` and safetensors, strict and explicit about every mismatch."""

from __future__ import annotations

import itertools
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nextscale.files import as_path, atomic_write, check_readable, digest, read_json
from nextscale.modules import as_module, inner_state, usual_defaults, without_wrapper
from nextscale.settings import Settings, brief, cut, faults
from nextscale.system import System, check_device, check_dtype, check_system, find_method, find_recipe

# Kinds of numbers that weights may have in a file.
FLOATS = ("F32", "F16", "BF16", "F64")
WHOLE = ("I64", "I32", "U8", "BOOL")
HUB_NAME = r"[\w-]+(\.[\w-]+)*/[\w.-]+"  # owner/name


class ChangeConfig(Settings):
    """A method that changed a system, in `config.json`."""

    recipe: str
    config: dict[str, Any]


class FolderConfig(Settings):
    """The content of `config.json`."""

    format: Literal[1] = 1
    recipe: str
    parts: tuple[str, ...] = Field(description="names of the parts whose weights are beside it, NAME.safetensors")
    config: dict[str, Any]
    changes: tuple[ChangeConfig, ...] = Field((), description="methods that changed the system since, in their order")
    image_size: tuple[int, int] | None = Field(
        None, description="height and width of what it makes, for those who only ask"
    )
    digests: dict[str, str] = Field(
        {}, description="BLAKE2b of the content of the files of weights, by name of the part"
    )


def save(system: System, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> Path:
    """Write a system into `folder`: `config.json`, `tokenizer.safetensors`, `model.safetensors` if it has a model, and one
    file for each further part that is not somebody else's. Of a changed system the weights before all changes are written, and
    what the changes were.

    `dtype` (torch.float16) stores floating weights in that type; they are float32 again once loaded.

    Raises ValueError for a changed system that got another tokenizer or model since: those before the changes are not its own.
    """
    check_system(system)
    folder = as_path(folder, "a folder to write")
    if dtype is not None:
        check_dtype(dtype)
    saved = saved_parts(system.base)
    _check_changed(system, saved)
    digests = {}
    for name, module in saved.items():
        path = folder / f"{name}.safetensors"
        save_weights(module, path, dtype)
        digests[name] = digest(path)
    config = FolderConfig(
        recipe=system.recipe,
        parts=tuple(saved),
        config=system.config.model_dump(mode="json"),
        image_size=system.image_size,
        changes=tuple(
            ChangeConfig(recipe=change.recipe, config=change.config.model_dump(mode="json"))
            for change in system.changes
        ),
        digests=digests,
    )
    # Last: a folder with a config is complete.
    with atomic_write(folder / "config.json") as path:
        path.write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return folder


@usual_defaults()
def load(
    name: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    recipes: Mapping[str, Any] | None = None,
    revision: str | None = None,
) -> System:
    """A system by name: one that ships with the package (`emoji-64`), a folder, or a repository of the Hugging Face hub.

    Args:
        device: where it computes.
        dtype: torch.bfloat16 or float16: of weights and activations, for sampling; what decides tokens stays float32
            (`system.FLOAT32`). Default: float32.
        recipes: modules of recipes by name, for those that neither come with nextscale nor are an entry point of a package.
        revision: branch, tag or commit of a hub repository; default: its main branch.

    Raises FileNotFoundError or ValueError with what is missing or wrong; a folder that does not fit loads nothing.
    """
    check_device(device)
    folder = find_folder(name, revision)
    config = _read_config(folder / "config.json")
    recipes = recipes or {}
    builder = recipes.get(config.recipe) or find_recipe(config.recipe)
    settings = _settings(builder.Config, config.config, folder, f"a {config.recipe} system")
    try:
        system = _built(lambda: builder.build(settings, model="model" in config.parts), config, folder)
    except (RuntimeError, MemoryError, OverflowError, TypeError) as error:
        said = cut((str(error).splitlines() or [type(error).__name__])[0], 200)
        raise ValueError(f"{folder / 'config.json'} describes a system that cannot be built: {said}") from error
    if config.image_size not in (None, tuple(system.image_size)):
        raise ValueError(
            f"{folder / 'config.json'} says images of {brief(config.image_size)}, but its system makes "
            f"{brief(tuple(system.image_size))}; copy or download the folder again"
        )
    own = saved_parts(system)
    for part, module in own.items():
        path = folder / f"{part}.safetensors"
        load_weights(module, path)
        if config.digests.get(part, found := digest(path)) != found:
            raise ValueError(f"{path} is damaged: its content is not what was saved; copy or download it again")
    for part, module in own.items():
        if part in system.roles and system.roles[part] != "trained":
            module.requires_grad_(False)
    system = system.to(device).eval()
    if dtype is not None:
        system.half_(dtype)
    for change in config.changes:
        method = recipes.get(change.recipe) or find_method(change.recipe)
        system = method.apply(system, _settings(method.Config, change.config, folder, f"the change {change.recipe}"))
    return system


def recipe_of(name: str | os.PathLike[str]) -> str:
    """The name of the recipe that a system is of, without loading it; `name` as for `load`."""
    return _read_config(find_folder(name) / "config.json").recipe


def saved_parts(system: System) -> dict[str, nn.Module]:
    """The parts whose weights belong to a system, by name: tokenizer, model, and all others that are not external."""
    parts = {"tokenizer": system.tokenizer, "model": system.model}
    own = {name: as_module(part) for name, part in parts.items() if part is not None}
    return own | {name: module for name, module in system.parts.items() if system.roles[name] != "external"}


def _check_changed(system: System, saved: Mapping[str, nn.Module]) -> None:
    """Raise ValueError if a part, or a weight of it, is not that of the system before its changes: it was put there since. A
    method may leave out weights, add some, or hold some in another form (quantized), since it will be applied again."""
    own = saved_parts(system)
    for name in sorted(own.keys() | saved.keys()):
        mine, base = (
            {id(t): (type(t), t.dtype, t.shape) for t in inner_state(parts[name]).values()} if name in parts else {}
            for parts in (own, saved)
        )
        new = {kind for t, kind in mine.items() if t not in base}
        lost = {kind for t, kind in base.items() if t not in mine}
        if bool(mine) != bool(base) or new & lost or (base and mine.keys().isdisjoint(base)):
            methods = " and ".join(change.recipe for change in system.changes)
            raise ValueError(
                f"the {name} of this system is not the one that {methods} changed, whose weights would be saved; save "
                "`system.base` with the parts that it should have, or apply the methods to that"
            )


def _settings(kind: type[Settings], values: dict[str, Any], folder: Path, what: str) -> Any:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{folder / 'config.json'} does not describe {what}: {faults(error, kind=kind)}") from error


def _built(build: Callable[[], System], config: FolderConfig, folder: Path) -> System:
    """A system to be filled from files: without memory and random numbers for what these replace, if that is all it has. Else
    (external parts, tables in buffers that are not saved) an ordinary one. Before anything takes memory the files are asked
    whether they have its weights."""
    with torch.device("meta"):
        system = build()
    own = saved_parts(system)
    if set(config.parts) != set(own):
        raise ValueError(
            f"{folder / 'config.json'} names the parts {sorted(config.parts)}, but a {config.recipe} system has {sorted(own)}; "
            "copy or download the folder again"
        )
    for part, module in own.items():
        with _weights(folder / f"{part}.safetensors") as file:
            _check_header(file, module, folder / f"{part}.safetensors")
    replaced = {id(tensor) for part in saved_parts(system).values() for tensor in inner_state(part).values()}
    tensors = itertools.chain(system.parameters(), system.buffers())
    return build() if any(tensor.is_meta and id(tensor) not in replaced for tensor in tensors) else system


def shipped() -> dict[str, Path]:
    """Names and folders of the systems that come with the package."""
    root = Path(__file__).parent / "weights"
    return {path.parent.name: path.parent for path in sorted(root.glob("*/config.json"))}


def save_weights(module: nn.Module, path: Path, dtype: torch.dtype | None = None) -> None:
    """Write a module's state dict as safetensors, atomically."""
    state = {
        name: (tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor).detach().cpu().contiguous()
        for name, tensor in inner_state(module).items()
    }
    if bad := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise FloatingPointError(
            f"nothing was written to {path}: the weights hold numbers that are not finite, in {', '.join(bad[:5])}"
        )
    with atomic_write(path) as temporary:
        save_file(state, temporary)


def load_weights(module: nn.Module, path: Path) -> None:
    """Fill a module from a safetensors file; floating weights become float32.

    Every key and shape must fit; otherwise ValueError lists missing, unexpected and wrong-shaped keys.
    """
    with _weights(path) as file:
        names = _check_header(file, module, path)
        state = {ours: _as_float32(file.get_tensor(theirs)) for ours, theirs in names.items()}
    if bad := [key for key, tensor in state.items() if not tensor.isfinite().all()]:
        raise ValueError(
            f"{path} holds numbers that are not finite, in {', '.join(bad[:5])}; copy or download it again"
        )
    module.load_state_dict(state, assign=True)
    for parameter in module.parameters():
        parameter.requires_grad_(True)


@contextmanager
def _weights(path: Path) -> Iterator[Any]:
    """A safetensors file to read from."""
    check_readable(path, "the weights beside config.json: copy the whole folder again")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); copy or download it again") from error


def _check_header(file: Any, module: nn.Module, path: Path) -> dict[str, str]:
    """The names of a file's weights by the module's. Raises ValueError unless names, shapes and kinds of numbers are those of
    the module; what stands in the header is all that is read."""
    prefix = without_wrapper(file.keys())
    slices = {key.removeprefix(prefix): file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - no dict
    expected = inner_state(module)
    shapes = {name: tuple(found.get_shape()) for name, found in slices.items()}
    explain_mismatch(shapes, {name: tuple(tensor.shape) for name, tensor in expected.items()}, path)
    for name, found in slices.items():
        kind, floats = found.get_dtype(), expected[name].is_floating_point()
        if (kind in FLOATS) != floats or (not floats and kind not in WHOLE):
            wanted = " or ".join(FLOATS if floats else WHOLE)
            raise ValueError(f"{path} holds {name} as {kind}, expected {wanted}; save the system again with `ns.save`")
    return {name: prefix + name for name in slices}


def explain_mismatch(
    got: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], source: Any, most: int | None = 40
) -> None:
    """Raise ValueError with every missing, unexpected and wrong-shaped key (the first `most`), if there is any."""
    lines = [f"  missing     {key} {expected[key]}" for key in expected if key not in got]
    lines += [f"  unexpected  {key} {got[key]}" for key in got if key not in expected]
    lines += [
        f"  wrong shape {key}: expected {expected[key]}, got {got[key]}"
        for key in expected
        if key in got and got[key] != expected[key]
    ]
    if lines:
        hidden = lines[most:] if most is not None else []
        shown = "\n".join(lines[:most]) + (f"\n  ... and {len(hidden)} more" if hidden else "")
        raise ValueError(f"the weights in {source} do not fit the model; nothing was loaded:\n{shown}")


def find_folder(name: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder of a system by name; one of the hub is fetched, at a revision (default: the main branch)."""
    if not isinstance(name, str | os.PathLike) or not os.fspath(name):
        raise ValueError(f"expected the name of a system, got {brief(name)}; {', '.join(shipped())} are some")
    systems, folder = shipped(), Path(name)
    if revision is not None and (str(name) in systems or folder.exists()):
        raise ValueError(f"revision is of a hub repository, and {name} is here; leave it out")
    if str(name) in systems:
        if Path(name).is_dir():
            warnings.warn(
                f"{name} is the system that comes along, not the folder of that name; write ./{name}", stacklevel=3
            )
        return systems[str(name)]
    if folder.is_dir():
        return _system_in(folder)
    if folder.exists():
        raise ValueError(f"{folder} is a file; expected the folder of a system (config.json and its weights)")
    # owner/name is a hub name, unless there is a folder of the owner's name here: then it is a mistyped path.
    if re.fullmatch(HUB_NAME, str(name)) and not folder.parent.exists():
        return _download(str(name), revision)
    raise FileNotFoundError(
        f"no system {str(name)!r}: it is neither shipped ({', '.join(systems) or 'none'}) nor a folder nor a hub name "
        "(owner/name)"
    )


def _system_in(folder: Path) -> Path:
    """The folder itself, or that of the system in a training's folder."""
    for place in (folder, folder / "system"):
        if (place / "config.json").is_file():
            return place
    if (folder / "state.json").is_file() or any(folder.glob("checkpoints/*/state.json")):
        kind = "a checkpoint" if (folder / "state.json").is_file() else "a training that has not ended"
        raise FileNotFoundError(
            f"{folder} is the folder of {kind}; make a system of it first: nextscale save {folder} --to FOLDER"
        )
    raise FileNotFoundError(f"{folder} has no config.json; expected a folder that `ns.save` or a training wrote")


def _download(repo: str, revision: str | None) -> Path:
    """The folder of a system of the hub, downloaded into the hub's own cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=["config.json", "*.safetensors", "README.md"],
                library_name="nextscale",
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        at = f" at {revision!r}" if revision else ""
        raise FileNotFoundError(
            f"no folder {repo!r} here, and the hub did not give a repository of that name{at} ({type(error).__name__}); "
            "check the name and the network, or give a folder"
        ) from error


def _read_config(path: Path) -> FolderConfig:
    values = read_json(path, expected="the config of a system")
    try:
        config = FolderConfig.model_validate(values)
    except ValidationError as error:
        said = faults(error, kind=FolderConfig)
        raise ValueError(f"{path} is not the config of a system: {said}; copy or download the folder again") from error
    if len(set(config.parts)) < len(config.parts):
        raise ValueError(f"{path} names a part twice: {brief(list(config.parts))}; copy or download the folder again")
    if "tokenizer" not in config.parts or not all(re.fullmatch(r"\w+", part) for part in config.parts):
        raise ValueError(f"{path}: a system needs a tokenizer, and parts have plain names, got {list(config.parts)}")
    return config


def _as_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
