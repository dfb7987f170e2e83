"""Atomic writes, file locks and checks of output paths.

Imports only the standard library, so that every part of the package can use it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

LOCK = "lock"
"""File in a folder that is locked while a process works there."""
_MODELS = (".json", ".txt", ".jinja", ".safetensors", ".bin", ".pt", ".ckpt")
_MARGIN = 2**20  # bytes that stay free on a disk

# --- checks before the work ---


def check_file(path: str | Path) -> None:
    """Raise ValueError if `path` cannot be written; leaves nothing behind."""
    target = real_file(path)
    if target.exists() and not os.access(target, os.W_OK):
        raise ValueError(f"{path} is read-only: name another file, or make it writable")
    _check_writable(target.parent, path)


def check_folder(path: str | os.PathLike[str], empty: bool = False) -> None:
    """Raise ValueError if no files can be written into the folder `path`; leaves nothing behind.

    Args:
        path: of a folder that exists or can be created.
        empty: refuse a folder that is not empty; leftovers of a killed `new_folder` are deleted.
    """
    target = _real(path)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{path} is a file: name a folder")
    if empty:
        _delete_left_over(target)
    if empty and not is_empty(target):
        raise ValueError(f"{path} is not an empty folder: name another one, or delete it first")
    _check_writable(target, path)


def check_space(path: str | Path, size: int) -> None:
    """Raise ValueError if the disk of `path` has less than `size` bytes free."""
    free = shutil.disk_usage(_nearest(_real(path))).free
    if free < size + _MARGIN:
        raise ValueError(
            f"{path} needs {size / 1e9:.2f} GB, its disk has {free / 1e9:.2f} GB free: make room, "
            "or name another disk"
        )


def check_name(name: str, what: str) -> None:
    """Raise ValueError for a name that is not safe as part of a file name."""
    if not re.fullmatch(r"\w[\w .+=,@-]{0,99}", name) or name.endswith((".", " ")):
        raise ValueError(
            f"{what} is {name!r}, which is no plain name: use letters, digits, dots and dashes"
        )


def is_empty(folder: Path) -> bool:
    """Whether a folder does not exist, or contains at most a lock."""
    return not folder.exists() or (
        folder.is_dir() and all(entry.name == LOCK for entry in folder.iterdir())
    )


def _real(path: str | os.PathLike[str]) -> Path:
    """Resolve all symbolic links; the target need not exist."""
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise ValueError(f"{path} is a symbolic link that leads to itself: name another path")
    return target


def real_file(path: str | Path) -> Path:
    """The resolved path of a file to write; raises ValueError for anything but a regular file."""
    target = _real(path)
    if target.is_dir() or str(path).endswith(os.sep):
        raise ValueError(f"{path} is a folder: name a file in it")
    if target.exists() and not target.is_file():
        raise ValueError(f"{path} is a pipe or a device: name a regular file")
    return target


def _nearest(folder: Path) -> Path:
    """The folder itself, or its nearest existing parent."""
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def _check_writable(folder: Path, path: str | os.PathLike[str]) -> None:
    """Try to write an unnamed temporary file, which vanishes even if this process is killed."""
    try:
        parent = _nearest(folder)
        if not parent.is_dir():
            raise ValueError(f"{path} cannot be written, {parent} is a file: name another path")
        with tempfile.TemporaryFile(dir=parent) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written ({error.strerror}): name another path"
        ) from error


# --- locks ---


@contextmanager
def claimed(folder: Path) -> Iterator[IO[str] | None]:
    """Lock a folder for this process, creating it if needed; yields None if another process has it.

    The system unlocks it when this process and all that inherited the file have ended, however that
    happens.
    """
    path = folder / LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("a", encoding="utf-8")
        except FileNotFoundError:  # its owner has just deleted the folder
            continue
        with file:
            if not lock(file):
                yield None
                return
            if not _is_at(file, path):  # deleted between opening and locking
                continue
            try:
                yield file
            finally:
                if _is_at(file, path):
                    path.unlink()
            return


@contextmanager
def locked(folder: Path, wait: float = 60.0) -> Iterator[IO[str]]:
    """Lock a folder for this process.

    Args:
        folder: created if it does not exist.
        wait: seconds to wait for another process; a training may outlive the one that launched it.

    Raises:
        ValueError: if another process holds the lock for longer.
    """
    end = time.monotonic() + wait
    while True:
        with claimed(folder) as lock:
            if lock is not None:
                yield lock
                return
        if time.monotonic() > end:
            raise ValueError(
                f"another process works in {folder}: wait until it has ended, or name another "
                "folder"
            )
        time.sleep(0.2)


_FAR = 2**30
"""Position of the byte that Windows locks."""


def lock(file: IO[Any], wait: bool = False) -> bool:
    """Lock an open file; False if another process has it."""
    try:
        import fcntl
    except ModuleNotFoundError:
        return _lock_on_windows(file, wait)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        raise ValueError(
            f"{file.name} cannot be locked ({error.strerror}): use a disk of this machine"
        ) from error
    return True


def _lock_on_windows(file: IO[Any], wait: bool) -> bool:
    """Lock a byte far behind the content, because others cannot read locked bytes."""
    import msvcrt

    windows: Any = msvcrt
    position = os.lseek(file.fileno(), 0, os.SEEK_CUR)
    os.lseek(file.fileno(), _FAR, os.SEEK_SET)
    try:
        while True:
            try:
                windows.locking(file.fileno(), windows.LK_NBLCK, 1)
                return True
            except OSError:
                if not wait:
                    return False
                time.sleep(0.05)
    finally:
        os.lseek(file.fileno(), position, os.SEEK_SET)


def _is_at(file: IO[Any], path: str | Path) -> bool:
    """Whether a path still points to an open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


# --- whole files and folders ---


@contextmanager
def replacing(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file that replaces `path` when the block ends; on failure nothing changes.

    Missing folders are created, symbolic links followed, and permissions of a replaced file kept.
    Leftovers of a killed process are deleted.

    Args:
        path: of a regular file, existing or not.
        mode: "w" for text in UTF-8, "wb" for bytes. Libraries that take a path get `file.name`.

    Raises:
        ValueError: for a folder, a pipe or a device.

    >>> path = Path(tempfile.mkdtemp()) / "new.txt"
    >>> with replacing(path) as file:
    ...     _ = file.write("all or nothing")
    >>> path.read_text()
    'all or nothing'
    """
    target = real_file(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _unfinished(target, mode) as file:
        try:
            with suppress(FileNotFoundError):
                os.chmod(file.name, stat.S_IMODE(target.stat().st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())  # a rename may reach the disk before the content
            if os.name == "nt":
                file.close()
            os.replace(file.name, target)
        except BaseException as error:
            with suppress(OSError):
                os.unlink(file.name)
            if isinstance(error, OSError) and error.errno and error.filename is None:
                error.filename = str(path)  # errors of a full disk have no file name
            raise
    _sync(target.parent)


def _unfinished(target: Path, mode: str) -> IO[Any]:
    """A new file beside `target`, locked while it is written; deletes leftovers of killed
    processes."""
    prefix = f".{_short(target.name)}."
    ours = re.compile(re.escape(prefix) + r"[0-9a-f]{8}\.tmp")
    for entry in target.parent.iterdir():
        if ours.fullmatch(entry.name) and entry.is_file():
            with suppress(OSError, ValueError), entry.open("rb+") as left_over:
                if lock(left_over):
                    entry.unlink()
    while True:
        name = target.with_name(f"{prefix}{uuid.uuid4().hex[:8]}.tmp")
        file = name.open(mode.replace("w", "x"), encoding=None if "b" in mode else "utf-8")
        with suppress(ValueError):  # no locks on this disk: delete nothing
            lock(file, wait=True)
        if _is_at(file, name):
            return file
        file.close()


@contextmanager
def new_folder(path: str | os.PathLike[str], replace: bool = False) -> Iterator[Path]:
    """A folder that becomes `path` when the block ends; on failure nothing changes.

    Until then it has a hidden name beside `path`; leftovers of killed processes are deleted.

    Args:
        path: of an empty folder, or one that does not exist.
        replace: replace an existing folder once the new one is complete.

    Raises:
        ValueError: if `path` exists and is not an empty folder, or another process is writing it.
    """
    target = _real(path)
    check_folder(path, empty=not replace)
    hidden = _hidden(target)
    with claimed(hidden) as lock:
        if lock is None:
            raise ValueError(
                f"another process is writing {path}: wait until it has ended, or name another "
                "folder"
            )
        try:
            if not replace and not is_empty(target):  # written by another process meanwhile
                check_folder(path, empty=True)
            folder = hidden / target.name
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            yield folder
            for parent, _, names in os.walk(folder):
                for name in names:
                    _sync(Path(parent, name))
            if replace:
                shutil.rmtree(target, ignore_errors=True)
            elif target.exists():
                (target / LOCK).unlink(missing_ok=True)
                target.rmdir()
            folder.rename(target)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
    _sync(target.parent)


def _hidden(target: Path) -> Path:
    """The name of a folder until it is complete."""
    return target.with_name(f".{_short(target.name)}.unfinished")


def _delete_left_over(target: Path) -> None:
    """Delete leftovers of a killed `new_folder`, unless another process is still writing."""
    if _hidden(target).is_dir():
        with suppress(OSError), claimed(_hidden(target)) as lock:
            if lock is not None:
                shutil.rmtree(_hidden(target), ignore_errors=True)


def _short(name: str) -> str:
    """A file's name, shortened if necessary so that a suffix fits."""
    return name if len(name.encode()) < 200 else sha256([name.encode()])


def _sync(path: Path) -> None:
    """Flush a file or folder to disk, where the system can."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# --- digests ---


def sha256(parts: Iterable[bytes]) -> str:
    """The SHA-256 of all parts together, in hex."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return total.hexdigest()


def digest(data: Any) -> str:
    """The first 12 hex digits of the SHA-256 of plain data, independent of the order of keys.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    return sha256([json.dumps(data, sort_keys=True).encode()])[:12]


def file_digest(path: Path) -> bytes:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def fingerprint(model: Path) -> str:
    """A digest of a model folder's weights, settings, tokenizer and image transform, or of a
    checkpoint's one file."""
    files = sorted(model.iterdir()) if model.is_dir() else [model]
    return sha256(
        path.name.encode() + file_digest(path) for path in files if path.suffix in _MODELS
    )
