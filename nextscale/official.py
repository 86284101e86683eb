"""The published checkpoints of the reference VAR code: `load_official`, and conversion to our folders and back.

A `.pth` file is a pickle, which could run code when it is read. It is read here with `weights_only=True` (tensors and plain
containers, nothing else) and memory-mapped: weights come from the file when they are first needed, and exist once.
"""

from __future__ import annotations

import os
import pickle
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NoReturn, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from nextscale.checkpoint import find_folder, load, save
from nextscale.files import atomic_write
from nextscale.keymap import USAGE
from nextscale.recipes.generators import var
from nextscale.system import System, refuse_mps

HUB = "FoundationVision/var"
EXTRA = "official.safetensors"  # beside a converted system: what the official files hold and a system has no use for
MAX_PICKLE_BYTES = (
    50_000_000  # the part of a .pth that is no tensor: some 50 kB, a few hundred with an optimizer's state
)
CHUNK = 1 << 20


def load_official(
    name: str,
    folder: str | os.PathLike[str] | None = None,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    own_tokenizer: bool = False,
    device: str | torch.device = "cpu",
    verify: bool = True,
) -> System:
    """A published VAR model: `var-d16`, `var-d20`, `var-d24`, `var-d30` (256 px) or `var-d36` (512 px).

    Args:
        folder: where the published files are (`vae_ch160v4096z32.pth` and `var_d16.pth` to `var_d36.pth`), or a folder
            that `nextscale convert` wrote; None: the files are fetched from the hub repository FoundationVision/var.
        checkpoint: a training checkpoint of the reference (`ar-ckpt-*.pth`) or another state dict instead of
            `var_d*.pth`. Published files in that form are understood as well.
        own_tokenizer: take the tokenizer that a training checkpoint carries instead of the published file.
        verify: compare the files with the checksums inside them, and look for numbers that are not finite. It reads every
            byte, at about 1 GB/s; `nextscale convert` does it once for all.

    On the CPU the weights stay mapped to the files, so leave these in place while the system is in use.

    Raises FileNotFoundError with the names of missing files and where they are published; ValueError for files that are
    damaged, are no state dicts, or do not have exactly the official layout (every mismatch is listed).
    """
    refuse_mps(device)
    _published(name)
    if folder is not None and (Path(folder) / "config.json").is_file():
        if checkpoint is not None or own_tokenizer:
            raise ValueError(f"{folder} is converted already; give the folder of the .pth files with a checkpoint")
        return _load_converted(name, Path(folder), device)
    system, _ = _read_system(name, folder, checkpoint, own_tokenizer, verify)
    return system.to(device)


def convert_official(
    name: str,
    source: str | os.PathLike[str] | None,
    target: str | os.PathLike[str],
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    own_tokenizer: bool = False,
) -> Path:
    """Write a published model as a folder that `ns.load` reads, every float32 as it is; the other arguments are those of
    `load_official`. `export_official` is the way back."""
    _published(name)
    target = Path(target)
    if source is not None and (Path(source) / "config.json").is_file():
        raise ValueError(f"{source} is converted already: `ns.load` and --system read it as it is")
    if (target / "config.json").exists():
        raise ValueError(f"{target} holds a system already; choose another folder, or delete that one first")
    system, usage = _read_system(name, source, checkpoint, own_tokenizer, verify=True)
    tqdm.write(f"writing {target}", file=sys.stderr)
    with atomic_write(target / EXTRA) as path:
        save_file({USAGE: usage.contiguous()}, path)
    with atomic_write(target / "README.md") as path:
        path.write_text(_card(name), encoding="utf-8")
    return save(system, target)


def export_official(system: str | os.PathLike[str], target: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write a VAR system as the two files of the reference: state dicts with its names, shapes and order.

    Returns their paths, `vae_ch160v4096z32.pth` and `var_d16.pth` for the shape of that model. What was converted from
    official files comes back to the bit. Raises ValueError for a system that the reference's classes cannot express.
    """
    folder, target = find_folder(system), Path(target)
    loaded = load(folder)
    if loaded.recipe != "var":
        raise ValueError(f"only systems of the recipe var have an official layout, got {loaded.recipe!r}")
    vae, transformer = var.to_official(loaded, _kept_usage(folder))
    config = loaded.config
    names = (
        f"vae_ch{config.autoencoder.width}v{config.pyramid.codebook_size}z{config.pyramid.code_dim}.pth",
        f"var_d{config.transformer.depth}.pth",
    )
    paths = (target / names[0], target / names[1])
    if there := [str(path) for path in paths if path.exists()]:
        raise ValueError(f"{' and '.join(there)} would be overwritten; choose another folder, or delete that first")
    for path, state in zip(paths, (vae, transformer), strict=True):
        _write_pth(state, path)
    return paths


# ---- from files to a system ------------------------------------------------------------------------------------------


def _published(name: str) -> var.Published:
    if name not in var.OFFICIAL:
        raise ValueError(f"no published model {name!r}; there are {', '.join(var.OFFICIAL)}")
    return var.OFFICIAL[name]


def _load_converted(name: str, folder: Path, device: str | torch.device) -> System:
    system = load(folder, device=device)
    expected, got = var.OFFICIAL[name].config(), system.config
    parts = ("sizes", "num_classes", "autoencoder", "pyramid", "transformer")
    if system.recipe != "var" or any(getattr(expected, part) != getattr(got, part) for part in parts):
        raise ValueError(f"{folder} holds another system than {name}; load it by `ns.load`, or give another folder")
    return system


def _read_system(
    name: str,
    folder: str | os.PathLike[str] | None,
    checkpoint: str | os.PathLike[str] | None,
    own_tokenizer: bool,
    verify: bool,
) -> tuple[System, Tensor]:
    """The system, and the usage statistic of its codes."""
    vae_path, var_path = _find_files(name, folder, checkpoint, own_tokenizer)
    content = read_pth(var_path, verify=verify)
    var_state = _state(content, "var_wo_ddp", var_path)
    if own_tokenizer:
        vae_path = var_path
        vae_state = _state(content, "vae_local", var_path, bare=False)
    else:
        vae_state = _state(read_pth(vae_path, verify=verify), "vae_local", vae_path)
    config = var.OFFICIAL[name].config()
    try:
        sources = (str(vae_path), str(var_path))
        system = var.from_states(config, vae_state, var_state, sources=sources, complete=True)
    except ValueError as error:
        raise ValueError(f"{error}{_hint(name, vae_state, var_state)}") from error
    if verify:
        bad = [key for key, tensor in system.state_dict().items() if not tensor.isfinite().all()]
        if bad:
            raise ValueError(
                f"the files of {name} hold numbers that are not finite, in {', '.join(bad[:5])}; get them again"
            )
    return system, vae_state[USAGE]


def _find_files(
    name: str, folder: str | os.PathLike[str] | None, checkpoint: str | os.PathLike[str] | None, own_tokenizer: bool
) -> tuple[Path, Path]:
    wanted = dict(zip(("vae", "var"), var.OFFICIAL[name].files, strict=True))
    found: dict[str, Path] = {}
    if checkpoint is not None:
        found["var"] = Path(checkpoint)
        if not found["var"].is_file():
            raise FileNotFoundError(f"{checkpoint} is missing or no file; expected a checkpoint of the reference")
    if folder is not None and not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder} is no folder; expected the one with {' and '.join(wanted.values())}")
    need = [part for part in wanted if part not in found and not (part == "vae" and own_tokenizer)]
    for part in need:
        found[part] = _fetch(wanted[part]) if folder is None else Path(folder) / wanted[part]
    if missing := [path.name for path in found.values() if not path.is_file()]:
        links = "".join(f"\n  https://huggingface.co/{HUB}/resolve/main/{file}" for file in missing)
        raise FileNotFoundError(
            f"{' and '.join(missing)} missing in {folder}; {name} needs {' and '.join(wanted.values())}, published in the "
            f"hub repository {HUB}. Put them there:{links}\nor leave the folder out to fetch them"
        )
    return found.get("vae", found["var"]), found["var"]


def _fetch(file: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(HUB, file))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"could not fetch {file} from the hub repository {HUB} ({type(error).__name__}); check the network, or get "
            f"https://huggingface.co/{HUB}/resolve/main/{file} by other means and give its folder"
        ) from error


def _state(content: Any, key: str, path: Path, bare: bool = True) -> dict[str, Tensor]:
    """The state dict in the content of a file: `trainer/<key>` of a training checkpoint, or (`bare`) the whole."""
    state = content
    if isinstance(content, Mapping) and isinstance(content.get("trainer"), Mapping):
        state = content["trainer"].get(key)
        if state is None:
            raise ValueError(f"{path} is a training checkpoint without trainer/{key}; expected one of the reference's")
    elif not bare:
        raise ValueError(f"{path} is no training checkpoint, so it carries no tokenizer; give the tokenizer's file")
    plain = isinstance(state, Mapping) and all(
        isinstance(name, str)
        and isinstance(tensor, Tensor)
        and tensor.layout == torch.strided
        and not tensor.is_quantized
        for name, tensor in state.items()
    )
    if not plain:
        raise ValueError(
            f"{path} holds no state dict (names and tensors); expected a published file or a training checkpoint"
        )
    return dict(state)


def _hint(name: str, vae: Mapping[str, Tensor], transformer: Mapping[str, Tensor]) -> str:
    """What a file that does not fit may be instead."""
    if "encoder.conv_in.weight" in transformer or "pos_start" in vae:
        return "\n(tokenizer and generator look swapped: was a file renamed?)"
    width = transformer["pos_start"].shape[-1] if "pos_start" in transformer else 0
    likely = [other for other, published in var.OFFICIAL.items() if 64 * published.depth == width and other != name]
    return f"\n(the generator's width {width} is that of {likely[0]})" if likely else ""


# ---- .pth files ------------------------------------------------------------------------------------------------------


def read_pth(path: Path, *, verify: bool = True) -> Any:
    """The content of a file that `torch.save` wrote, memory-mapped; nothing in it is executed.

    `verify` compares every byte with the checksums that the file carries. Raises ValueError for everything that is not a
    whole file of tensors and plain containers.
    """
    with open(path, "rb") as file:
        start = file.read(24)
    if not start.startswith(b"PK"):
        pointer = start.startswith(b"version https://git-lfs")
        what = "a Git LFS pointer, not the file itself" if pointer else "no file of torch.save (PyTorch 1.6 or later)"
        raise ValueError(f"{path} ({path.stat().st_size} bytes) is {what}; download it again")
    try:
        _check_zip(path, verify)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors and plain containers, or is damaged; nothing of it was executed. Do not load "
            f"it by other means unless you trust it ({_first_sentence(error)})"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        _damaged(path, error)


def _check_zip(path: Path, verify: bool) -> None:
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        pickles = [record for record in records if record.filename.endswith(".pkl")]
        # One pickle: with `constants.pkl` it would be TorchScript, which is code, and PyTorch before 2.6 runs it even so.
        # Not compressed: what is mapped is used as it lies there.
        if (
            len(pickles) != 1
            or pickles[0].file_size > MAX_PICKLE_BYTES
            or any(record.compress_type != zipfile.ZIP_STORED for record in records)
        ):
            raise ValueError("not laid out as torch.save does it")
        if not verify:
            return
        total = sum(record.file_size for record in records)
        with tqdm(total=total, desc=f"checking {path.name}", unit="B", unit_scale=True, disable=total < 1e8) as bar:
            for record in records:
                with archive.open(record) as file:  # raises BadZipFile at the end if the checksum differs
                    while chunk := file.read(CHUNK):
                        bar.update(len(chunk))


def _damaged(path: Path, error: Exception) -> NoReturn:
    raise ValueError(
        f"{path} is cut off or damaged, or no file of torch.save ({_first_sentence(error)}); download it again"
    ) from error


def _first_sentence(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].partition(". ")[0] or type(error).__name__


class _Counted:
    """A file that moves a progress bar."""

    def __init__(self, file: IO[bytes], bar: Any) -> None:
        self.file, self.bar = file, bar

    def write(self, data: Any) -> int:
        self.bar.update(len(data))
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _write_pth(state: Mapping[str, Tensor], path: Path) -> None:
    # A tensor's whole storage is written, and all tensors of a mapped file share one; through numpy each has its own.
    own = {name: torch.from_numpy(tensor.cpu().contiguous().numpy()) for name, tensor in state.items()}
    total = sum(tensor.nbytes for tensor in own.values())
    with (
        atomic_write(path) as temporary,
        open(temporary, "wb") as file,
        tqdm(total=total, desc=f"writing {path.name}", unit="B", unit_scale=True, disable=total < 1e8) as bar,
    ):
        torch.save(own, cast(IO[bytes], _Counted(file, bar)))


# ---- what goes along with a converted system -------------------------------------------------------------------------


def _kept_usage(folder: Path) -> Tensor | None:
    path = folder / EXTRA
    if not path.is_file():
        return None
    try:
        kept = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged ({error}); copy it again, or delete it to start the statistic at 0"
        ) from error
    if set(kept) != {USAGE}:
        raise ValueError(f"{path} must hold {USAGE} alone, got {sorted(kept)}; delete it to start the statistic at 0")
    return kept[USAGE]


def _card(name: str) -> str:
    published = _published(name)
    side = 16 * published.sizes[-1]
    return f"""# {name}

VAR (arXiv 2404.02905), {side}x{side} pixels, ImageNet classes 0 to 999, converted without change from
{" and ".join(published.files)} of https://huggingface.co/{HUB}. Licence: MIT (FoundationVision/VAR).

FID {published.fid} in the README of that repository, with guidance 2.5 (its cfg=1.5), top-k 900, top-p 0.96. The paper's final
table has FID {published.paper_fid}, IS {published.paper_is}. Not measured by us.
"""
