"""Images, encoded once before the generator trains: tokens or features of several augmented views of each, and all that is
told of them.

A cache is a folder of shards, one safetensors file for some thousand images of one view, and an index that is written last.
Shards that are there are not encoded again, so a process that died goes on, and several processes share the work.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from operator import index
from pathlib import Path
from typing import Any, Literal, Union

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from nextscale.data.dataset import collate, data_digest
from nextscale.data.transforms import AugmentSettings, augment
from nextscale.draws import Draws, generator_for, rows_in, rows_of
from nextscale.files import atomic_write, digest, read_json
from nextscale.modules import as_module, usual_defaults
from nextscale.processes import Team, check_workers
from nextscale.progress import Bar
from nextscale.readers import Given, TensorReader
from nextscale.system import System
from nextscale.tokens import Tokens, each, joined

SHARD = 4096  # images
IN_MEMORY = 2**30  # bytes of content; more is read from the files when it is asked for
INDEX = "index.json"
MOST_INDEX_BYTES = 50_000_000  # it names all shards


@dataclass(frozen=True)
class Choices:
    """What is said of images by class numbers, or by places in a list of texts: any of the n in a row fits the image."""

    numbers: Tensor  # int32 [N, n]; -1 where nothing is said
    texts: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    def values(self, numbers: Tensor) -> list[str | int | None]:
        """What a reader is told for numbers [B]."""
        known = self.texts
        return [None if i < 0 else i if known is None else known[i] for i in numbers.tolist()]


# Of class numbers and texts, or of tensors in memory or in files.
Column = Union[Choices, Given, "EncodedShards"]


class EncodedImages(Dataset[dict[str, Any]]):
    """Images as tokens or features, with all that is told of them by the names of the readers.

    Items have `content` (one image's) and `told`: by name int64 [n], or one image's `Given`. Data in files are read when they
    are asked for.
    """

    def __init__(self, content: Tokens | EncodedShards, told: Mapping[str, Column]) -> None:
        self.content = content  # tokens [N, L] (of bits [N, L, d], or several such tensors) or features [N, C, H, W]
        self.told = dict(told)
        self.digest = ""  # of the data that was encoded; empty where nobody asked

    def __len__(self) -> int:
        return rows_in(self.content)

    def __getitem__(self, index: int) -> dict[str, Any]:
        told = {name: rows_of(_tensors(column), index) for name, column in self.told.items()}
        return {
            "content": _wide(rows_of(self.content, index)),
            "told": {name: _wide(row) for name, row in told.items()},
        }

    def check(self, system: System) -> None:
        """Raise ValueError if the data say what a reader of the system does not know: other classes, for example."""
        for name, column in self.told.items():
            if not isinstance(column, Choices):
                continue
            reader, most = system.readers[name], int(column.numbers.max())
            if reader.choices and column.texts is None and most >= (known := len(reader.choices)):
                raise ValueError(
                    f"the data has class number {most}, but the model knows 0 to {known - 1}; build it with more classes"
                )
            reader.check(column.values(column.numbers.unique()))

    def said(self, which: int = 0) -> dict[str, Said]:
        """What is told of all images, by name, as `system.condition` takes it: the first of those that fit, or another."""
        return {name: Said(column, which) for name, column in self.told.items()}

    def pick(self, told: Mapping[str, Any], draws: Draws) -> dict[str, list[Any]]:
        """What is told of the images of a batch: of its `told`, one of those that fit, at random."""
        picked: dict[str, list[Any]] = {}
        for name, rows in told.items():
            column = self.told[name]
            if isinstance(column, Choices):
                picked[name] = column.values(rows.gather(1, draws.randint(0, rows.shape[1], 1)).squeeze(1))
            else:
                picked[name] = rows.listed()
        return picked

    @staticmethod
    def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A batch: `content` [B, ...], `told` by name."""
        names = items[0]["told"]
        return {
            "content": _stacked([item["content"] for item in items]),
            "told": {name: _stacked([item["told"][name] for item in items]) for name in names},
        }


class Said(Sequence[Any]):
    """What a column says of each image, as its reader takes it; read when it is asked for."""

    def __init__(self, column: Column, which: int = 0) -> None:
        self.column = column
        self.which = which

    def __len__(self) -> int:
        return rows_in(_tensors(self.column))

    def __getitem__(self, index: Any) -> Any:
        rows = index if isinstance(index, slice) else slice(index, index + 1)
        if isinstance(self.column, Choices):
            numbers = self.column.numbers[rows]
            values = self.column.values(numbers[:, min(self.which, numbers.shape[1] - 1)])
        else:
            values = rows_of(self.column, rows).listed()
        return values if isinstance(index, slice) else values[0]


class EncodedShards:
    """Tensors of several files as one; rows are read from their files when they are asked for.

    Args:
        counts: rows in each file.
        name: of the tensor in the files. With `kind`, a named tuple: of several, `name.field`.
    """

    def __init__(
        self, paths: Sequence[Path], counts: Sequence[int], name: str, kind: Callable[..., Tokens] | None = None
    ) -> None:
        self.paths, self.name, self.kind = list(paths), name, kind
        self.ends = list(accumulate(counts))
        self._open: dict[int, Any] = {}  # by process, so that workers do not share a file

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, rows: int | slice) -> Any:
        if not isinstance(rows, slice):
            return rows_of(self[rows : rows + 1], 0)
        first, stop, _ = rows.indices(len(self))
        parts = []
        for shard, end in enumerate(self.ends):
            begin = self.ends[shard - 1] if shard else 0
            if max(first, begin) < min(stop, end):
                parts.append(self._read(shard, slice(max(first, begin) - begin, min(stop, end) - begin)))
        return each(lambda *tensors: torch.cat(tensors), *parts)

    def _read(self, shard: int, rows: slice) -> Any:
        if shard not in self._open:
            self._open[shard] = safe_open(self.paths[shard], framework="pt").__enter__()
        file = self._open[shard]
        if self.kind is None:
            return file.get_slice(self.name)[rows]
        return self.kind(**{part: file.get_slice(f"{self.name}.{part}")[rows] for part in _fields(self.kind)})

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}


def _tensors(column: Column) -> Any:
    return column.numbers if isinstance(column, Choices) else column


def _wide(tokens: Any) -> Any:
    """Ids as int64, as models take them; they are kept as int32."""
    return each(lambda t: t.long() if t.dtype == torch.int32 else t, tokens)


def _stacked(rows: Sequence[Any]) -> Any:
    return each(lambda *tensors: torch.stack(tensors), *rows)


def _fields(kind: Any) -> tuple[str, ...]:
    return kind._fields


def fingerprint(system: System) -> str:
    """A hash of everything that tokens depend on: the tokenizer's weights and the schedule."""
    digest = hashlib.blake2b(str(system.schedule).encode(), digest_size=16)
    hash_weights(digest, as_module(system.tokenizer))
    return digest.hexdigest()


def hash_weights(digest: hashlib.blake2b, network: nn.Module) -> None:
    """Put the names and the weights of a network into a hash."""
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(bytes_of(tensor))


def bytes_of(tensor: Tensor) -> bytes:
    """The numbers of a tensor of any dtype, on any device, as they lie in memory."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


@usual_defaults()
def encode_images(
    system: System,
    data: Dataset,
    folder: Path | None = None,
    *,
    kind: Literal["tokens", "features"] = "tokens",
    views: int = 1,
    augmentation: AugmentSettings | None = None,
    seed: int = 0,
    batch_size: int = 64,
    workers: int = 0,
    strict: bool = False,
    team: Team = Team(),
) -> EncodedImages:
    """Encode a data set, `views` augmented versions of each image, into a cache (None: memory only).

    What a cache already holds of the same tokenizer, data and settings is not encoded again. A cache of others is replaced,
    or with `strict` refused by ValueError. Data are the same if they say the same of every image, and `data_digest` is the
    same: a data set that has `said(index)` tells what it says without decoding images; of others every item is read. A shard
    that is not what was written is encoded again, with a warning. `workers` processes load images. The processes of `team`
    share the work.
    """
    check_workers(workers)
    count = len(data)  # type: ignore[arg-type]
    settings = augmentation or AugmentSettings()
    pieces = [(view, first) for view in range(views) for first in range(0, count, SHARD)]
    _check_told(system, data, augmentation)
    asked = {name: (reader.field, reader.shape) for name, reader in system.readers.items()}

    def encode(view: int, first: int, bar: Any) -> _Shard:
        rows = range(first, min(first + SHARD, count))
        gather = partial(_collate, asked, system.output.field)
        loader = DataLoader(Subset(data, rows), batch_size=batch_size, num_workers=workers, collate_fn=gather)
        parts: list[Any] = []
        said: dict[str, list[Any]] = {name: [] for name in asked}
        numbers = Draws(generator_for(seed, view, "augment"), count, slice(first, rows.stop)).rand(settings.numbers)
        for batch, drawn in zip(loader, numbers.split(batch_size), strict=True):
            images = batch[system.output.field]
            if augmentation is not None:
                images = augment(images, system.image_size, batch["mirror_ok"], drawn, augmentation)
            with torch.inference_mode():
                parts.append(_encoded(system, images.to(system.device), kind))
            for name, values in batch["said"].items():
                said[name] += values
            bar.update(len(images))
        told = {name: _column(said[name], *asked[name]) for name in asked}
        return _Shard(each(lambda *tensors: torch.cat(tensors), *parts), told)

    def progress(images: int) -> Any:
        return Bar(total=images, desc="encoding", unit="image", silent=not team.leads)

    if folder is None:
        with progress(views * count) as bar:
            return _joined([encode(view, first, bar) for view, first in pieces])
    key = {
        "tokenizer": fingerprint(system),
        "images": f"{count} {data_digest(data, system.output.field)}",
        "told": _told_digest(data, asked, team),
        "views": views,
        "augmentation": None if augmentation is None else augmentation.model_dump(mode="json"),
        "seed": seed,
        "kind": kind,
    }
    if team.leads:
        _refuse(folder, key, strict)
    team.wait()
    paths = [folder / f"shard-{i:05}.safetensors" for i in range(len(pieces))]
    rows = [min(SHARD, count - first) for _, first in pieces]
    own = range(len(paths))[team.rank :: team.size]
    lacking = [i for some in team.gather([i for i in own if not _holds(paths[i], key, rows[i])]) for i in some]
    missing = sorted(lacking)
    if team.leads and (bad := [paths[i].name for i in missing if paths[i].exists()]):
        warnings.warn(
            f"{len(bad)} files in {folder} are not what was written ({bad[0]} ...); they are encoded again",
            stacklevel=3,
        )
    team.wait()  # all have looked before anyone writes
    mine = missing[team.rank :: team.size]
    if missing:
        with progress(sum(min(SHARD, count - pieces[i][1]) for i in mine)) as bar:
            for i in mine:
                view, first = pieces[i]
                encode(view, first, bar).write(paths[i], key)
        team.wait()
    if team.leads and missing:
        with atomic_write(folder / INDEX) as temporary:
            names = [path.name for path in paths]
            temporary.write_text(json.dumps({"key": key, "shards": names}, indent=2) + "\n", encoding="utf-8")
    shapes = {name: shape for name, (_, shape) in asked.items()}
    token_type = system.tokenizer.pyramid.token_type if kind == "tokens" else None
    small = sum(path.stat().st_size for path in paths) <= IN_MEMORY
    found = _joined([_Shard.read(path, shapes, token_type, small) for path in paths], paths)
    found.digest = f"{key['images']} {key['told']}"
    return found


def _encoded(system: System, images: Tensor, kind: str) -> Tokens:
    if kind == "features":
        return system.tokenizer.features(images).to("cpu", copy=True)
    tokens = joined(system.tokenizer.encode(images, system.schedule).tokens)
    return each(lambda t: t.to("cpu", torch.int32 if t.dtype == torch.int64 else t.dtype, copy=True), tokens)


# ---- what items say ---------------------------------------------------------------------------------------------------

Asked = Mapping[str, tuple[str, tuple[int, ...] | None]]  # by a reader's name: its field and its shape


def said_by(item: Mapping[str, Any], field: str, shape: tuple[int, ...] | None) -> Any:
    """What an item says for a reader: a tensor or None (with a shape), or a list of what fits the image."""
    if shape is not None:
        return item.get(field)
    value = item.get(field + "s", item.get(field))
    if getattr(value, "ndim", 0):  # numbers of numpy and torch are taken, too
        value = value.tolist()
    return list(value) if isinstance(value, list | tuple) else [value]


def told_of(system: System, data: Any, rows: Sequence[int], which: int = 0) -> dict[str, list[Any]]:
    """What is said of some images of a data set, by the names of a system's readers; of several labels or captions of an image
    one, -1 for the last."""
    say = getattr(data, "said", data.__getitem__)
    items = [say(row) for row in rows]
    found: dict[str, list[Any]] = {}
    for name, reader in system.readers.items():
        values = [said_by(item, reader.field, reader.shape) for item in items]
        found[name] = values if reader.shape is not None else [several[which] for several in values]
    return found


def _collate(asked: Asked, content: str, items: list[dict[str, Any]]) -> dict[str, Any]:
    """Content and flags of items, and `said`, by the readers' names."""
    batch = collate([{name: item[name] for name in (content, "mirror_ok") if name in item} for item in items])
    return batch | {"said": {name: [said_by(item, *what) for item in items] for name, what in asked.items()}}


def _column(values: Sequence[Any], field: str, shape: tuple[int, ...] | None) -> Choices | Given:
    """What was said of some images, as one."""
    if shape is not None:
        return TensorReader(field, shape)(values)
    if len({len(several) for several in values}) > 1:
        raise ValueError(f"every item must have as many {field}s as the others; repeat some")
    flat = [value for several in values for value in several if value is not None]
    texts = sorted(set(flat)) if any(isinstance(value, str) for value in flat) else None
    place = None if texts is None else {text: i for i, text in enumerate(texts)}
    numbers = [[-1 if v is None else index(v) if place is None else place[v] for v in several] for several in values]
    return Choices(torch.tensor(numbers, dtype=torch.int32), texts)


def _check_told(system: System, data: Any, augmentation: AugmentSettings | None) -> None:
    """Raise ValueError for data of which no item says what the system is told, and for tensors that augmentation would leave
    behind."""
    item, say = data[0], getattr(data, "said", data.__getitem__)
    moves = augmentation and (augmentation.mirror or augmentation.shift or augmentation.scale or augmentation.crop > 1)
    for reader in system.readers.values():
        fields = {reader.field, reader.field + "s"}
        if not fields & item.keys() and not any(fields & say(i).keys() for i in range(len(data))):
            raise ValueError(not_said(reader.field, item))
        if moves and reader.aligned:
            raise ValueError(
                f"augmentation moves the pixels of images, but not those of {reader.field!r}, which are aligned with them; "
                "turn mirror, shift, scale and crop off, or give its reader `aligned=False` if they are not"
            )


def not_said(field: str, item: Mapping[str, Any]) -> str:
    """The sentence that refuses data which lack a field that the system is told; `item`: one of them."""
    return (
        f"the data do not say {field!r}, which this system is told; items have {', '.join(item)}. Give every item "
        f"{field!r}, None where there is nothing to say"
    )


def _told_digest(data: Any, asked: Asked, team: Team) -> str:
    """A hash of what is said of every image; the processes share the work."""
    say = getattr(data, "said", data.__getitem__)

    def digest(first: int) -> str:
        found = hashlib.blake2b(digest_size=16)
        for i in range(first, min(first + SHARD, len(data))):
            item = say(i)
            for what in asked.values():
                value = said_by(item, *what)
                if what[1] is None:
                    found.update(repr([v if v is None or isinstance(v, str) else index(v) for v in value]).encode())
                else:
                    found.update(b"" if value is None else bytes_of(torch.as_tensor(value)))
                found.update(b"|")
        return found.hexdigest()

    firsts = range(0, len(data), SHARD)
    shares = team.gather({first: digest(first) for first in firsts[team.rank :: team.size]})
    parts = {first: part for share in shares for first, part in share.items()}
    names = json.dumps({name: field for name, (field, _) in asked.items()})
    return hashlib.blake2b("".join([names, *(parts[first] for first in firsts)]).encode(), digest_size=16).hexdigest()


# ---- files ------------------------------------------------------------------------------------------------------------


def _refuse(folder: Path, key: dict[str, Any], strict: bool) -> None:
    """Remove, or with `strict` refuse, a cache that was made with something else."""
    try:
        known = read_json(folder / INDEX, most=MOST_INDEX_BYTES)["key"]
    except FileNotFoundError:
        return  # none, or one that was not finished: its shards say what they are
    except (OSError, ValueError, KeyError, TypeError):
        known = {}
    known = known if isinstance(known, dict) else {}
    different = [name for name in key if known.get(name) != key[name]]
    if not different:
        return
    if strict:
        raise ValueError(
            f"{folder} holds images that were encoded with another {', another '.join(different)}; give the one it was made "
            "with, or another folder"
        )
    for path in [folder / INDEX, *folder.glob("shard-*.safetensors"), *folder.glob("shard-*.blake2b")]:
        with suppress(FileNotFoundError):
            path.unlink()


def _holds(path: Path, key: dict[str, Any], rows: int) -> bool:
    """Whether a shard has so many rows, was made with the same, and is to the bit what was written."""
    try:
        with safe_open(path, framework="pt") as file:
            if json.loads((file.metadata() or {}).get("key", "null")) != key:
                return False
        return _count(path) == rows and _digest_path(path).read_text(encoding="utf-8").strip() == digest(path)
    except (OSError, SafetensorError, ValueError, KeyError, IndexError, RecursionError):
        return False


def _digest_path(path: Path) -> Path:
    """Where the digest of a shard is kept."""
    return path.with_suffix(".blake2b")


@dataclass(frozen=True)
class _Shard:
    """One file: the content of some images, None if it stays there, and what is told of them."""

    content: Any
    told: dict[str, Any]

    def write(self, path: Path, key: dict[str, Any]) -> None:
        tensors, texts = _named("content", self.content), {}
        for name, column in self.told.items():
            tensors |= _named(f"told.{name}", _tensors(column))
            texts[name] = column.texts if isinstance(column, Choices) else None
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata={"key": json.dumps(key), "texts": json.dumps(texts)})
        with atomic_write(_digest_path(path)) as temporary:
            temporary.write_text(digest(path) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path, shapes: Mapping[str, Any], token_type: Any, small: bool) -> _Shard:
        """With `small` all of it; else class numbers and texts alone, and of the others (columns, kinds) how to read them."""
        with safe_open(path, framework="pt") as file:
            texts = json.loads(file.metadata()["texts"])
            whole = "content" in file.keys()  # noqa: SIM118 - no dict

            def tensors(name: str, kind: Any) -> Any:
                if not small:
                    return _InFile(kind)
                if kind is None:
                    return file.get_tensor(name)
                return kind(**{part: file.get_tensor(f"{name}.{part}") for part in _fields(kind)})

            told = {
                name: Choices(file.get_tensor(f"told.{name}"), texts[name])
                if shape is None
                else tensors(f"told.{name}", Given)
                for name, shape in shapes.items()
            }
            return cls(tensors("content", None if whole else token_type), told)


@dataclass(frozen=True)
class _InFile:
    """Stands for tensors that were not read."""

    kind: Any


def _named(name: str, tensors: Any) -> dict[str, Tensor]:
    """Tensors by the names that they have in files."""
    if isinstance(tensors, Tensor):
        return {name: tensors.contiguous()}
    return {f"{name}.{part}": tensor.contiguous() for part, tensor in tensors._asdict().items()}


def _joined(shards: Sequence[_Shard], paths: Sequence[Path] = ()) -> EncodedImages:
    """All shards as one; their lists of texts become one list."""
    counts = [_count(path) for path in paths]

    def all_of(name: str, parts: Sequence[Any]) -> Any:
        if isinstance(parts[0], _InFile):
            return EncodedShards(paths, counts, name, parts[0].kind)
        return each(lambda *tensors: torch.cat(tensors), *parts)

    told: dict[str, Column] = {}
    for name, first in shards[0].told.items():
        columns = [shard.told[name] for shard in shards]
        told[name] = _merged(columns) if isinstance(first, Choices) else all_of(f"told.{name}", columns)
    return EncodedImages(all_of("content", [shard.content for shard in shards]), told)


def _count(path: Path) -> int:
    """Rows in a file."""
    with safe_open(path, framework="pt") as file:
        name = min(name for name in file.keys() if name.startswith("content"))  # noqa: SIM118 - no dict
        return file.get_slice(name).get_shape()[0]


def _merged(columns: Sequence[Choices]) -> Choices:
    """Columns behind each other, with one list of texts."""
    numbers, known = [column.numbers for column in columns], [column.texts for column in columns]
    if all(texts is None for texts in known):
        return Choices(torch.cat(numbers))
    texts = sorted({text for some in known for text in some or ()})
    place = {text: i for i, text in enumerate(texts)}
    # The last entry is where -1 points: nothing is said.
    tables = [torch.tensor([*(place[text] for text in some or ()), -1], dtype=torch.int32) for some in known]
    return Choices(torch.cat([table[part.long()] for table, part in zip(tables, numbers, strict=True)]), texts)
