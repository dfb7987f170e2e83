"""Files that are written: complete or not at all, by one process at a time, and checked before the
work.

Only the standard library is imported here, so that every part of the package can use it.
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
    """Raise ValueError if no file can be written to `path`; nothing is left behind."""
    target = real_file(path)
    if target.exists() and not os.access(target, os.W_OK):
        raise ValueError(f"{path} is read-only: name another file, or make it writable")
    _check_writable(target.parent, path)


def check_folder(path: str | os.PathLike[str], empty: bool = False) -> None:
    """Raise ValueError if no files can be written into the folder `path`; nothing is left behind.

    Args:
        path: of a folder that is there or can be made.
        empty: refuse one that holds anything; what a kill left of `new_folder` beside it is
            deleted.
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
    """Raise ValueError for a name that is to be part of a file's name and could lead elsewhere."""
    if not re.fullmatch(r"\w[\w .+=,@-]{0,99}", name) or name.endswith((".", " ")):
        raise ValueError(
            f"{what} is {name!r}, which is no plain name: use letters, digits, dots and dashes"
        )


def is_empty(folder: Path) -> bool:
    """Whether nothing but a lock lies in a folder, or there is no folder."""
    return not folder.exists() or (
        folder.is_dir() and all(entry.name == LOCK for entry in folder.iterdir())
    )


def _real(path: str | os.PathLike[str]) -> Path:
    """Where a path leads through all symbolic links; what it names need not be there."""
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise ValueError(f"{path} is a symbolic link that leads to itself: name another path")
    return target


def real_file(path: str | Path) -> Path:
    """Where a file is written; raises ValueError for what is no regular file."""
    target = _real(path)
    if target.is_dir() or str(path).endswith(os.sep):
        raise ValueError(f"{path} is a folder: name a file in it")
    if target.exists() and not target.is_file():
        raise ValueError(f"{path} is a pipe or a device: name a regular file")
    return target


def _nearest(folder: Path) -> Path:
    """The folder itself, or of those it would be made in the one that is there."""
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def _check_writable(folder: Path, path: str | os.PathLike[str]) -> None:
    """Write a file without a name, which is gone even if this process is killed."""
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
    """Lock a folder, which is made if it is not there, for this process; None if another one has
    it.

    The system unlocks it when the process ends, however that happens, and all to whom it passed the
    file have ended.
    """
    path = folder / LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("a", encoding="utf-8")
        except FileNotFoundError:  # the process that had it has just deleted the folder
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
        folder: made if it is not there.
        wait: seconds to wait for another process that has it; a training may outlive the one that
            launched it.

    Raises:
        ValueError: if the other process has it for longer.
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
    """A byte far behind what is written stands for the file: nobody else can read a locked one."""
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
    """Whether a path still leads to an open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


# --- whole files and folders ---


@contextmanager
def replacing(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file to write that becomes `path` once the block is through; if it fails nothing
    changes.

    Missing folders are made, symbolic links are followed, and a file that is replaced keeps its
    permissions. What a killed process left of the same file is deleted.

    Args:
        path: of a regular file, or of none yet.
        mode: "w" for text in UTF-8, "wb" for bytes. Libraries that want a path take `file.name`.

    Raises:
        ValueError: for a folder, a pipe or a device.
    """
    target = real_file(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _unfinished(target, mode) as file:
        try:
            with suppress(FileNotFoundError):
                os.chmod(file.name, stat.S_IMODE(target.stat().st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())  # a rename may reach the disk before what was written
            if os.name == "nt":
                file.close()
            os.replace(file.name, target)
        except BaseException as error:
            with suppress(OSError):
                os.unlink(file.name)
            if isinstance(error, OSError) and error.errno and error.filename is None:
                error.filename = str(path)  # a full disk says no name
            raise
    _sync(target.parent)


def _unfinished(target: Path, mode: str) -> IO[Any]:
    """A new file beside `target`, locked while it is written; those that a kill left there are
    deleted."""
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
        with suppress(ValueError):  # a disk without locks: then nothing there is deleted either
            lock(file, wait=True)
        if _is_at(file, name):
            return file
        file.close()


@contextmanager
def new_folder(path: str | os.PathLike[str], replace: bool = False) -> Iterator[Path]:
    """A folder to write that becomes `path` once the block is through; if it fails nothing changes.

    Until then it lies beside `path` under a hidden name, and what a killed process left there is
    deleted.

    Args:
        path: of an empty folder, or of none yet.
        replace: delete the folder that is there, once the new one is complete.

    Raises:
        ValueError: if `path` is there already, and no empty folder; if another process is writing
            it.
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
            if not replace and not is_empty(target):  # another process has written it meanwhile
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
    """Where a folder lies until it is complete."""
    return target.with_name(f".{_short(target.name)}.unfinished")


def _delete_left_over(target: Path) -> None:
    """Delete what a killed process left of a new folder; another process may still be writing
    it."""
    if _hidden(target).is_dir():
        with suppress(OSError), claimed(_hidden(target)) as lock:
            if lock is not None:
                shutil.rmtree(_hidden(target), ignore_errors=True)


def _short(name: str) -> str:
    """A file's name, if it is long another one, so that some letters can be added to it."""
    return name if len(name.encode()) < 200 else sha256([name.encode()])


def _sync(path: Path) -> None:
    """Have a file or a folder on the disk, where the system can do that."""
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
    """The first 12 hex digits of the SHA-256 of plain data, the same however its keys are
    ordered."""
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
