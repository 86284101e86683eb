"""Captions of image files: texts beside them, or a table of the folder, as image folders of the Hugging Face hub have it."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Sequence
from pathlib import Path

from nextscale.files import brief_path, check_readable, parse_json
from nextscale.settings import brief, cut

TABLES = ("metadata.jsonl", "metadata.csv")
MOST_TABLE_BYTES = 2_000_000_000
MOST_CAPTION_BYTES = 100_000


def captions_of(paths: Sequence[Path], root: Path) -> tuple[list[str], str]:
    """A caption for each image file below `root`, and where they are from.

    `1.txt` beside `1.png` is its caption; else a row of `metadata.jsonl` or `metadata.csv` in its folder or one above, with
    `file_name` and `text` (or `caption`). Where there is neither for any image, the files' names are. Where there is one for
    some, the others say nothing: an empty caption. Raises ValueError for tables and texts that cannot be understood.
    """
    tables: dict[Path, dict[str, str]] = {}
    named: set[Path] = set()
    captions: list[str | None] = []
    sources = set()
    for path in paths:
        text = path.with_suffix(".txt")
        if text.is_file():
            captions.append(_read(text))
            sources.add(".txt beside the images")
            continue
        found = None
        for folder in path.parents:
            if folder not in tables:
                tables[folder] = _table(folder)
            if (found := tables[folder].get(path.relative_to(folder).as_posix())) is not None:
                sources.add("metadata")
                named.add(path)
                break
            if folder == root:
                break
        captions.append(found)
    for folder, table in tables.items():
        if lost := [name for name in table if folder / name not in named and not (folder / name).is_file()]:
            shown = cut(", ".join(lost[:3]), 200)
            warnings.warn(f"{len(lost)} lines of the metadata in {folder} name no file there: {shown}", stacklevel=3)
        outside = [name for name in table if ".." in Path(name).parts or Path(name).is_absolute()]
        if outside:
            raise ValueError(f"the metadata in {folder} names {brief(outside[0])}, which is not below it; take it out")
    if not sources:
        return [path.stem for path in paths], "the files' names"
    return [caption or "" for caption in captions], " and ".join(sorted(sources))


def _read(path: Path) -> str:
    if path.stat().st_size > MOST_CAPTION_BYTES:
        raise ValueError(
            f"{brief_path(path)} is larger than a caption may be, {MOST_CAPTION_BYTES:,} bytes; shorten it"
        )
    try:
        return path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{brief_path(path)} is not UTF-8 (at byte {error.start}); save the caption as UTF-8"
        ) from None


def _table(folder: Path) -> dict[str, str]:
    """Captions by the paths of files below a folder, as its table says."""
    path = next((folder / name for name in TABLES if (folder / name).is_file()), None)
    if path is None:
        return {}
    check_readable(path)
    if path.stat().st_size > MOST_TABLE_BYTES:
        raise ValueError(f"{brief_path(path)} is larger than {MOST_TABLE_BYTES:,} bytes; split it over folders")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{brief_path(path)} is not UTF-8 (at byte {error.start}); save it as UTF-8") from None
    found = {}
    if path.suffix == ".csv":
        try:
            reader = csv.DictReader(io.StringIO(text))
            if "file_name" not in (reader.fieldnames or ()):
                raise ValueError(
                    f"the first line of {brief_path(path)} must name the columns, file_name and text, got "
                    f"{brief(','.join(reader.fieldnames or ()))}"
                )
            rows = list(enumerate(reader, start=2))
        except csv.Error as error:
            raise ValueError(f"{brief_path(path)} is no table of commas: {error}") from None
    else:
        rows = [
            (number, parse_json(line, f"line {number} of {brief_path(path)}"))
            for number, line in enumerate(text.splitlines(), start=1)
            if line.strip()
        ]
    for number, row in rows:
        name = row.get("file_name") if isinstance(row, dict) else None
        caption = next((row[key] for key in ("text", "caption") if key in row), None) if isinstance(row, dict) else None
        if not isinstance(name, str) or not (caption is None or isinstance(caption, str)):
            raise ValueError(
                f"line {number} of {brief_path(path)} needs file_name and text (or caption), both texts, got {brief(row)}"
            )
        if caption is not None:
            found[name.removeprefix("./")] = caption.strip()
    if rows and not found:
        warnings.warn(f"{brief_path(path)} has no text (or caption) in any of its {len(rows)} lines", stacklevel=4)
    return found
