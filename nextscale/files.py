"""Where files go and how they get there: the cache folder, and writes that are whole or absent."""

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


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
    target = path.resolve()
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
