"""Images, encoded once before the generator trains: tokens or features of several augmented views of each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from nextscale.data.transforms import NUMBERS, AugmentSettings, augment
from nextscale.files import atomic_write
from nextscale.system import System
from nextscale.training.draws import generator_for
from nextscale.training.loop import collate


class EncodedImages(Dataset[dict[str, Any]]):
    """Images as tokens or features: items have `content` and `labels` int64 [n], those that fit the image.

    Labels are class numbers or, where there are `texts`, places in that list.
    """

    def __init__(self, content: Tensor, labels: Tensor, texts: list[str] | None = None) -> None:
        self.content = content  # tokens [N, L] (of bits [N, L, d]) or features [N, C, H, W]
        self.labels = labels  # int32 [N, n]
        self.texts = texts

    def __len__(self) -> int:
        return len(self.content)

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
    path: Path | None = None,
    *,
    kind: Literal["tokens", "features"] = "tokens",
    views: int = 1,
    augmentation: AugmentSettings | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> EncodedImages:
    """Encode a data set, `views` augmented versions of each image, into the file `path` (None: memory only).

    A file that holds the same tokenizer's work on the same data and settings is read instead; any other is encoded anew.
    """
    field = "label" if system.reader is None else system.reader.field
    key = {
        "tokenizer": fingerprint(system),
        "images": str(len(data)),  # type: ignore[arg-type]
        "views": str(views),
        "augmentation": "none" if augmentation is None else augmentation.model_dump_json(),
        "seed": str(seed),
        "kind": kind,
        "field": field,
    }
    if path is not None and (known := _read(path, key)):
        return known
    parts, values = [], []
    size = system.image_size
    with tqdm(total=views * len(data), desc="encoding", unit="img", dynamic_ncols=True) as bar:  # type: ignore[arg-type]
        for view in range(views):
            generator = generator_for(seed, view, "augment")
            for batch in DataLoader(data, batch_size=batch_size, collate_fn=collate):
                images = batch["image"]
                if augmentation is not None:
                    numbers = torch.rand(len(images), NUMBERS, generator=generator)
                    images = augment(images, size, batch["mirror_ok"], numbers, augmentation)
                with torch.inference_mode():
                    parts.append(_encoded(system, images.to(system.device), kind))
                values += [_several(item) for item in batch.get(field + "s", batch[field])]
                bar.update(len(images))
    texts = None
    if isinstance(values[0][0], str):
        texts = sorted({text for several in values for text in several})
        place = {text: i for i, text in enumerate(texts)}
        values = [[place[text] for text in several] for several in values]
    encoded = EncodedImages(torch.cat(parts), torch.tensor(values, dtype=torch.int32), texts)
    if path is not None:
        with atomic_write(path) as temporary:
            content = {"content": encoded.content, "labels": encoded.labels}
            save_file(content, temporary, metadata={"key": json.dumps(key), "texts": json.dumps(texts)})
    return encoded


def _encoded(system: System, images: Tensor, kind: str) -> Tensor:
    if kind == "features":
        return system.tokenizer.features(images).to("cpu", copy=True)
    tokens = torch.cat(system.tokenizer.encode(images, system.schedule).tokens, dim=1)
    return tokens.to("cpu", torch.int32 if tokens.dtype == torch.int64 else tokens.dtype, copy=True)


def _several(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _read(path: Path, key: dict[str, str]) -> EncodedImages | None:
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if json.loads(metadata.get("key", "null")) != key:
                return None
            return EncodedImages(file.get_tensor("content"), file.get_tensor("labels"), json.loads(metadata["texts"]))
    except (SafetensorError, json.JSONDecodeError):
        return None
