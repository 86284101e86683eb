"""Files of weights that others wrote, read safely: `.pth` files and folders of shards; and such files written.

A `.pth` file is a pickle, which could run code when it is read. It is read here with `weights_only=True` (tensors and plain
containers, nothing else) and memory-mapped: weights come from the file when they are first needed, and exist once.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NoReturn, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nextscale.files import atomic_write, parse_json
from nextscale.progress import Bar

MAX_PICKLE_BYTES = (
    50_000_000  # the part of a .pth that is no tensor: some 50 kB, a few hundred with an optimizer's state
)
MAX_INDEX_BYTES = 10_000_000
CHUNK = 1 << 20
SHARD_BYTES = 5_000_000_000
SAFE_INDEX = "model.safetensors.index.json"
INDICES = (SAFE_INDEX, "pytorch_model.bin.index.json")


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
        with Bar(total=total, desc=f"checking {path.name}", unit="B", unit_scale=True, silent=total < 1e8) as bar:
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


def write_pth(state: Mapping[str, Tensor], path: Path, within: str = "") -> None:
    """Write a state dict as `torch.save` does, atomically; `within`: inside a dict, under that key."""
    own = _own_storage(state)
    total = sum(tensor.nbytes for tensor in own.values())
    with (
        atomic_write(path) as temporary,
        open(temporary, "wb") as file,
        Bar(total=total, desc=f"writing {path.name}", unit="B", unit_scale=True, silent=total < 1e8) as bar,
    ):
        torch.save({within: own} if within else own, cast(IO[bytes], _Counted(file, bar)))


def _own_storage(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # A tensor's whole storage is written, and all tensors of a mapped file share one; through numpy each has its own.
    return {name: torch.from_numpy(tensor.cpu().contiguous().numpy()) for name, tensor in state.items()}


# ---- folders of shards -------------------------------------------------------------------------------------------------


def read_shards(folder: Path, *, verify: bool = True) -> dict[str, Tensor]:
    """The state dict in a folder of several files and an index of them, as the library transformers writes it.

    The index says which file each entry is in; the files are of safetensors or of `torch.save` (read as `read_pth` does).
    Raises ValueError for a folder without one index, and for every entry that is not where the index says.
    """
    indices = [folder / name for name in INDICES if (folder / name).is_file()]
    if len(indices) != 1:
        raise ValueError(
            f"{folder} holds {'both' if indices else 'none'} of {' and '.join(INDICES)}; expected one, which says what each "
            "of the other files holds: copy or download the whole folder again"
        )
    places = _read_index(indices[0])
    files = sorted(set(places.values()))
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise ValueError(f"{folder} lacks {', '.join(missing)}; copy or download the whole folder again")
    whole: dict[str, Tensor] = {}
    for name in files:
        shard = _read_shard(folder / name, verify)
        expected = {entry for entry, place in places.items() if place == name}
        if wrong := sorted(set(shard) ^ expected):
            raise ValueError(
                f"{folder / name} does not hold what {indices[0].name} says ({len(wrong)} entries differ, {wrong[0]} for "
                "example); copy or download the whole folder again"
            )
        whole |= shard
    return {entry: whole[entry] for entry in places}


def _read_index(path: Path) -> dict[str, str]:
    """Entries and the files that they are in."""
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise ValueError(f"{path} is larger than {MAX_INDEX_BYTES} bytes; that is no index of shards")
    content = parse_json(path.read_bytes(), str(path))
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{path} has no weight_map of entries and files; copy or download it again")
    if outside := sorted({name for name in places.values() if Path(name).name != name}):
        raise ValueError(f"{path} names files outside of its folder: {', '.join(outside[:5])}; it cannot be trusted")
    return places


def _read_shard(path: Path, verify: bool) -> dict[str, Tensor]:
    if path.suffix != ".safetensors":
        return state_dict(read_pth(path, verify=verify), path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); copy or download it again") from error


def write_shards(state: Mapping[str, Tensor], folder: Path, most_bytes: int = SHARD_BYTES) -> None:
    """Write a state dict as a folder of safetensors files of at most so many bytes (or one entry), and their index."""
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in _own_storage(state).items():
        if shards[-1] and sum(other.nbytes for other in shards[-1].values()) + tensor.nbytes > most_bytes:
            shards.append({})
        shards[-1][name] = tensor
    places: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        with atomic_write(folder / file) as temporary:
            save_file(shard, temporary, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in state.values())},
        "weight_map": {name: places[name] for name in state},
    }
    with atomic_write(folder / SAFE_INDEX) as temporary:  # last: a folder with an index is complete
        temporary.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


# ---- state dicts -------------------------------------------------------------------------------------------------------


def state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """What was read from a file, if it is a plain state dict; else ValueError."""
    plain = isinstance(content, Mapping) and all(
        isinstance(name, str)
        and isinstance(tensor, Tensor)
        and tensor.layout == torch.strided
        and not tensor.is_quantized
        for name, tensor in content.items()
    )
    if not plain:
        raise ValueError(
            f"{path} holds no state dict (names and tensors); expected a published file or a training checkpoint"
        )
    return dict(content)
