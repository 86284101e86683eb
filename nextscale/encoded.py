"""Images, encoded once before the generator trains: tokens or features of several augmented views of each.

A cache is a folder of shards, one safetensors file for some thousand images of one view, and an index that is written last.
EncodedShards that are there are not encoded again, so a process that died goes on, and several processes share the work.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from nextscale.data.dataset import collate
from nextscale.data.transforms import AugmentSettings, augment
from nextscale.draws import Draws, generator_for
from nextscale.files import atomic_write
from nextscale.processes import Team
from nextscale.system import System

SHARD = 4096  # images
IN_MEMORY = 2**30  # bytes of content; more is read from the files when it is asked for
INDEX = "index.json"


class EncodedImages(Dataset[dict[str, Any]]):
    """Images as tokens or features: items have `content` and `labels` int64 [n], those that fit the image.

    Labels are class numbers or, where there are `texts`, places in that list.
    """

    def __init__(self, content: Tensor | EncodedShards, labels: Tensor, texts: list[str] | None = None) -> None:
        self.content: Any = content  # tokens [N, L] (of bits [N, L, d]) or features [N, C, H, W]
        self.labels = labels  # int32 [N, n]
        self.texts = texts

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        content = self.content[index]
        return {
            "content": content.long() if content.dtype == torch.int32 else content,
            "labels": self.labels[index].long(),
        }

    def values(self, labels: Tensor) -> Tensor | list[str]:
        """Class numbers as they are, places as texts; [B]."""
        return labels if self.texts is None else [self.texts[i] for i in labels.tolist()]

    @staticmethod
    def collate(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch: `content` [B, ...], `labels` [B, n]."""
        return {name: torch.stack([item[name] for item in items]) for name in ("content", "labels")}


class EncodedShards:
    """The content of several files as one; a row is read from its file when it is asked for."""

    def __init__(self, paths: Sequence[Path], counts: Sequence[int]) -> None:
        self.paths = list(paths)
        self.ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        self._open: dict[int, Any] = {}  # by process, so that workers do not share a file

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Tensor:
        shard = bisect.bisect_right(self.ends, index)
        first = self.ends[shard - 1] if shard else 0
        if shard not in self._open:
            self._open[shard] = safe_open(self.paths[shard], framework="pt").__enter__()
        return self._open[shard].get_slice("content")[index - first]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}


def fingerprint(system: System) -> str:
    """A hash of everything that tokens depend on: the tokenizer's weights and the schedule."""
    digest = hashlib.blake2b(str(system.schedule).encode(), digest_size=16)
    for name, tensor in sorted(system.tokenizer.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


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
    strict: bool = False,
    team: Team = Team(),
) -> EncodedImages:
    """Encode a data set, `views` augmented versions of each image, into a cache (None: memory only).

    What a cache already holds of the same tokenizer, data and settings is not encoded again. A cache of others is replaced,
    or with `strict` refused by ValueError. The processes of `team` share the work.
    """
    count = len(data)  # type: ignore[arg-type]
    field = "label" if system.reader is None else system.reader.field
    settings = augmentation or AugmentSettings()
    pieces = [(view, first) for view in range(views) for first in range(0, count, SHARD)]

    def encode(view: int, first: int, bar: Any) -> dict[str, Any]:
        rows = range(first, min(first + SHARD, count))
        loader = DataLoader(Subset(data, rows), batch_size=batch_size, collate_fn=collate)
        parts, values = [], []
        numbers = Draws(generator_for(seed, view, "augment"), count, slice(first, rows.stop)).rand(settings.numbers)
        for batch, drawn in zip(loader, numbers.split(batch_size), strict=True):
            images = batch["image"]
            if augmentation is not None:
                images = augment(images, system.image_size, batch["mirror_ok"], drawn, augmentation)
            with torch.inference_mode():
                parts.append(_encoded(system, images.to(system.device), kind))
            values += [_several(item) for item in batch.get(field + "s", batch[field])]
            bar.update(len(images))
        texts = None
        if isinstance(values[0][0], str):
            texts = sorted({text for several in values for text in several})
            place = {text: i for i, text in enumerate(texts)}
            values = [[place[text] for text in several] for several in values]
        return {"content": torch.cat(parts), "labels": torch.tensor(values, dtype=torch.int32), "texts": texts}

    def progress(images: int) -> Any:
        silent = not team.leads
        return tqdm(total=images, desc="encoding", unit="img", dynamic_ncols=True, disable=silent)

    if folder is None:
        with progress(views * count) as bar:
            return _joined([encode(view, first, bar) for view, first in pieces])
    key = {
        "tokenizer": fingerprint(system),
        "images": f"{count} {_digest(data)}",
        "views": views,
        "augmentation": None if augmentation is None else augmentation.model_dump(mode="json"),
        "seed": seed,
        "kind": kind,
        "field": field,
    }
    if team.leads:
        _refuse(folder, key, strict)
    team.wait()
    paths = [folder / f"shard-{i:05}.safetensors" for i in range(len(pieces))]
    missing = [i for i, path in enumerate(paths) if not _holds(path, key)]
    team.wait()  # all have looked before anyone writes
    mine = missing[team.rank :: team.size]
    if missing:
        with progress(sum(min(SHARD, count - pieces[i][1]) for i in mine)) as bar:
            for i in mine:
                shard = encode(*pieces[i], bar)
                texts = json.dumps(shard.pop("texts"))
                with atomic_write(paths[i]) as temporary:
                    save_file(shard, temporary, metadata={"key": json.dumps(key), "texts": texts})
        team.wait()
    if team.leads and missing:
        with atomic_write(folder / INDEX) as temporary:
            names = [path.name for path in paths]
            temporary.write_text(json.dumps({"key": key, "shards": names}, indent=2) + "\n", encoding="utf-8")
    return _joined(list(_read(paths)), paths)


def _encoded(system: System, images: Tensor, kind: str) -> Tensor:
    if kind == "features":
        return system.tokenizer.features(images).to("cpu", copy=True)
    tokens = torch.cat(system.tokenizer.encode(images, system.schedule).tokens, dim=1)
    return tokens.to("cpu", torch.int32 if tokens.dtype == torch.int64 else tokens.dtype, copy=True)


def _several(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _digest(data: Any) -> str:
    """A hash of sixteen images, evenly spaced: other data of the same length are told apart."""
    digest = hashlib.blake2b(digest_size=16)
    for i in sorted({round(j * (len(data) - 1) / 15) for j in range(16)}):
        digest.update(data[i]["image"].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _refuse(folder: Path, key: dict[str, Any], strict: bool) -> None:
    """Remove, or with `strict` refuse, a cache that was made with something else."""
    try:
        known = json.loads((folder / INDEX).read_text(encoding="utf-8"))["key"]
    except FileNotFoundError:
        return  # none, or one that was not finished: its shards say what they are
    except (OSError, ValueError, KeyError, TypeError):
        known = {}
    different = [name for name in key if known.get(name) != key[name]]
    if not different:
        return
    if strict:
        raise ValueError(
            f"{folder} holds images that were encoded with another {', another '.join(different)}; give the one it was made "
            "with, or another folder"
        )
    for path in [folder / INDEX, *folder.glob("shard-*.safetensors")]:
        with suppress(FileNotFoundError):
            path.unlink()


def _holds(path: Path, key: dict[str, Any]) -> bool:
    """Whether a shard is whole and was made with the same."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {}).get("key", "null")) == key and "labels" in file.keys()  # noqa: SIM118
    except (OSError, SafetensorError, ValueError):
        return False


def _read(paths: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Labels, texts and sizes of shards; contents too, if all of them fit into memory."""
    small = sum(path.stat().st_size for path in paths) <= IN_MEMORY
    for path in paths:
        with safe_open(path, framework="pt") as file:
            content = file.get_tensor("content") if small else None
            texts = json.loads(file.metadata()["texts"])
            yield {"content": content, "labels": file.get_tensor("labels"), "texts": texts}


def _joined(shards: list[dict[str, Any]], paths: Sequence[Path] = ()) -> EncodedImages:
    """All shards as one; their lists of texts become one list."""
    texts, labels = None, [shard["labels"] for shard in shards]
    if shards[0]["texts"] is not None:
        texts = sorted({text for shard in shards for text in shard["texts"]})
        place = {text: i for i, text in enumerate(texts)}
        moved = [torch.tensor([place[text] for text in shard["texts"]], dtype=torch.int32) for shard in shards]
        labels = [table[part.long()] for table, part in zip(moved, labels, strict=True)]
    content: Tensor | EncodedShards
    if shards[0]["content"] is None:
        content = EncodedShards(paths, [len(part) for part in labels])
    else:
        content = torch.cat([shard["content"] for shard in shards])
    return EncodedImages(content, torch.cat(labels), texts)
