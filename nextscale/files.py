"""Files: the cache folder, writes that are whole or absent, and JSON that anybody may have written."""

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nextscale.settings import brief

MAX_JSON_BYTES = 10_000_000  # settings and records are of a few kB; more is not ours
MOST_NESTED = 100


def cache_dir() -> Path:
    """The user's cache folder: `$NEXTSCALE_CACHE`, else `$XDG_CACHE_HOME/nextscale`, else `~/.cache/nextscale`.

    The folder is not created here.
    """
    if own := os.environ.get("NEXTSCALE_CACHE"):
        return Path(own).expanduser()
    # The XDG specification says that a relative path is to be ignored.
    shared = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(shared) if Path(shared).is_absolute() else Path.home() / ".cache"
    return base / "nextscale"


def disk_full(error: BaseException) -> bool:
    """Whether a write failed for want of space (or of what the user may take of it)."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    # The writer of safetensors says it in words alone.
    return getattr(error, "errno", None) in numbers or any(f"(os error {n})" in str(error) for n in numbers)


def check_name(path: Path) -> None:
    """Refuse a name that no file can have, and links that lead in a circle; whether there is a file is another question."""
    try:
        path.stat()  # only those who ask for the file learn what is wrong with its name
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError) as error:
        raise ValueError(f"no file can have the name {brief(str(path))}: {_reason(error)}; give another") from None


def target_of(path: Path) -> Path:
    """The path that links lead to, of a file that may not be there yet. Raises ValueError as `check_name`."""
    check_name(path)
    return path.resolve()


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary file beside `path`; when the block ends well it replaces `path`, else it is removed.

    Readers see the old file or the new one, never a half; two writers at once leave one of their files, whole.
    Parent folders are created. The temporary name keeps the suffix of `path`, so writers that go by it work.
    Raises PermissionError if the folder cannot be written, ValueError if `path` is a folder or its parent is a file, OSError
    (ENOSPC) if the disk is full.

        with atomic_write("a/grid.png") as temporary:
            image.save(temporary)
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder; expected the name of a file, so add one to the path")
    # Replace what a symbolic link points to, not the link itself.
    target = target_of(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.stem[:80]}-", suffix=target.suffix, dir=target.parent)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(
            f"cannot write {path}: {error.filename} is a file, expected a folder; choose another path or move that file"
        ) from error
    except PermissionError as error:
        raise PermissionError(
            error.errno,
            f"cannot write {path}: no permission for folder {target.parent}; choose another",
            str(path),
        ) from error
    except OSError as error:
        # Read-only file systems answer EROFS, which Python does not map to PermissionError.
        raise type(error)(error.errno, f"cannot write {path}: {error.strerror}; choose another", str(path)) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        _apply_default_mode(temporary, target)
        os.replace(temporary, target)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if disk_full(error):
            message = f"no space left to write {path}; free some space and give the same command again"
            raise OSError(errno.ENOSPC, message, str(path)) from error
        raise
    sync_folder(target.parent)


def _apply_default_mode(temporary: Path, target: Path) -> None:
    """Give the file the mode that a plain `open` would have: mkstemp makes it private to the user."""
    if os.name == "nt":
        return
    if target.exists():
        mode = target.stat().st_mode & 0o777
    else:
        mask = os.umask(0)
        os.umask(mask)
        mode = 0o666 & ~mask
    os.chmod(temporary, mode)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable, where the system lets a folder be opened."""
    if os.name == "nt":
        return
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def digest(path: Path) -> str:
    """BLAKE2b of the content of a file; empty without one."""
    hashed = hashlib.blake2b(digest_size=32)
    try:
        with path.open("rb") as file:
            while block := file.read(2**22):
                hashed.update(block)
    except FileNotFoundError:
        return ""
    return hashed.hexdigest()


def check_readable(path: Path, expected: str = "a file") -> None:
    """Raise FileNotFoundError or PermissionError, with what was expected, unless there is a file that can be read."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{brief_path(path)} is missing; expected {expected}") from None
    except PermissionError as error:
        raise PermissionError(f"no permission to look at {brief_path(path)}; expected {expected}") from error
    except (OSError, ValueError) as error:  # a name that is too long, a null byte
        raise FileNotFoundError(
            f"{brief_path(path)} is no name of a file ({_reason(error)}); expected {expected}"
        ) from None
    if path.is_dir():
        raise IsADirectoryError(f"{brief_path(path)} is a folder; expected {expected}")
    if not path.is_file():
        raise ValueError(f"{brief_path(path)} is no ordinary file; expected {expected}")
    if found.st_size and not os.access(path, os.R_OK):
        raise PermissionError(f"no permission to read {brief_path(path)}; expected {expected}")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def as_path(path: Any, expected: str) -> Path:
    """A path of a user's, or ValueError for what is none, or no file can have; `expected` says what it is of."""
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise ValueError(f"expected the path of {expected}, got {brief(path)}")
    check_name(Path(path))
    return Path(path)


def brief_path(path: str | os.PathLike[str]) -> str:
    """A path as a message shows it: on one line, and of a long one the end."""
    text = os.fspath(path)
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text[-200:])
    return shown if len(shown) <= 160 else "..." + shown[-157:]


def read_json(path: Path, *, most: int = MAX_JSON_BYTES, expected: str = "a JSON file") -> Any:
    """The value in a JSON file that anybody may have written.

    Raises FileNotFoundError or PermissionError; ValueError for what is larger than `most` bytes, not UTF-8, not JSON, not
    finite, nested deeper than `MOST_NESTED`, or names one key twice.
    """
    check_readable(path, expected)
    size = path.stat().st_size
    if size > most:
        raise ValueError(f"{brief_path(path)} has {size:,} bytes, more than the {most:,} that {expected} may have")
    return parse_json(path.read_bytes(), brief_path(path))


def parse_json(content: str | bytes, name: str) -> Any:
    """The value that a JSON text says; `name` says in messages where it stood. Raises ValueError, as `read_json`."""
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 (at byte {error.start}), so it is no JSON") from None
    except RecursionError:
        raise ValueError(f"{name} is nested too deep; expected at most {MOST_NESTED} levels") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not JSON: {error.msg} in line {error.lineno}, column {error.colno}") from None
    except ValueError as error:
        raise ValueError(f"{name} is not JSON as it should be: {error}") from None
    if _deeper(value, MOST_NESTED):
        raise ValueError(f"{name} is nested too deep; expected at most {MOST_NESTED} levels")
    return value


def _deeper(value: Any, levels: int) -> bool:
    """Whether a value is nested deeper than some levels."""
    layer = [value]
    for _ in range(levels):
        layer = [
            inner
            for outer in layer
            if isinstance(outer, (list, dict))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (list, dict))
        ]
        if not layer:
            return False
    return True


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"it holds {name}, which no number may be")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it names {brief(twice)} twice")
    return table
