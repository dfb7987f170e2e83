"""Files that are written: whole or not at all, one process at a time, links and permissions
kept."""

import csv
import errno
import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pumer import _files, _rows
from pumer._files import (
    check_file,
    check_folder,
    check_name,
    check_space,
    claimed,
    lock,
    locked,
    new_folder,
    replacing,
)
from pumer._rows import RowFile, append_rows, finished_rows, mend_rows

SRC = str(Path(__file__).parents[1] / "src")


def listed(folder):
    return sorted(path.name for path in folder.iterdir())


def write(path, text="new"):
    with replacing(path) as file:
        file.write(text)


# --- whole files ---


def test_a_file_keeps_its_permissions_and_links(tmp_path):
    target = tmp_path / "far/target.json"
    target.parent.mkdir()
    target.write_text("old")
    target.chmod(0o664)
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "dangling").symlink_to(tmp_path / "far/fresh.json")
    write(tmp_path / "link")
    write(tmp_path / "dangling")
    write(tmp_path / "deep/er/file")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "dangling").is_symlink()
    assert target.read_text() == (tmp_path / "far/fresh.json").read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o664
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "deep/er/file").stat().st_mode) == 0o666 & ~mask
    assert listed(tmp_path / "far") == ["fresh.json", "target.json"]


def test_what_fails_changes_nothing(tmp_path):
    (tmp_path / "file").write_text("old")

    def fill():
        with replacing(tmp_path / "file") as file:
            file.write("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left") as failed:
        fill()
    assert failed.value.filename == str(tmp_path / "file")  # which the system does not say
    assert (tmp_path / "file").read_text() == "old"
    assert listed(tmp_path) == ["file"]


def test_no_file_is_put_where_something_else_is(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in ("pipe", "folder", "loop", "/dev/null", f"{tmp_path}/new/"):
        where = path if path.endswith("/") else tmp_path / path
        for attempt in (check_file, write, lambda path: append_rows(path, [{"a": 1}])):
            with pytest.raises(
                ValueError, match=r"(pipe or a device|is a folder|leads to itself): name"
            ):
                attempt(where)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert listed(tmp_path) == ["folder", "loop", "pipe"]


def test_what_a_kill_left_is_deleted_and_what_is_being_written_is_not(tmp_path):
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    code = (
        f"from pumer._files import *\nwith replacing({str(tmp_path / 'file')!r}) as file: "
        f"file.write('x'); {kill}"
    )
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": SRC}, check=False)
    (left_over,) = listed(tmp_path)
    with replacing(tmp_path / "other"), replacing(tmp_path / "file") as first:
        assert left_over not in listed(tmp_path)
        write(tmp_path / "file", "second")
        assert Path(first.name).exists()
        first.write("first")
    assert (tmp_path / "file").read_text() == "first"
    assert listed(tmp_path) == ["file", "other"]


def test_names_may_be_as_long_as_they_can(tmp_path):
    write(tmp_path / ("n" * 250))
    with new_folder(tmp_path / ("f" * 250)) as folder:
        (folder / "file").touch()
    assert listed(tmp_path) == ["f" * 250, "n" * 250]


# --- folders ---


def test_a_folder_is_there_when_it_is_complete(tmp_path):
    out = tmp_path / "a/out"

    def stop():
        with new_folder(out) as folder:
            (folder / "file").touch()
            raise RuntimeError("half")

    with pytest.raises(RuntimeError, match="half"):
        stop()
    assert listed(tmp_path / "a") == []
    with new_folder(out) as folder:
        (folder / "sub").mkdir()
        (folder / "sub/file").touch()
        assert not out.exists()
    assert listed(tmp_path / "a") == ["out"]
    with pytest.raises(ValueError, match="not an empty folder"), new_folder(out):
        pass
    with new_folder(out, replace=True) as folder:
        (folder / "other").touch()
        assert listed(out) == ["sub"]
    assert listed(out) == ["other"]


def test_two_processes_do_not_write_one_folder(tmp_path):
    out = tmp_path / "out"
    with new_folder(out) as folder:
        (folder / "file").touch()
        with pytest.raises(ValueError, match=r"another process is writing .*out"), new_folder(out):
            pass
        assert (folder / "file").exists()
    assert listed(tmp_path) == ["out"]


def test_a_folder_that_a_kill_left_is_no_hindrance(tmp_path):
    code = f"""
import os, signal
from pumer._files import new_folder
with new_folder({str(tmp_path / "out")!r}) as folder:
    (folder / "file").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": SRC}, check=False)
    assert listed(tmp_path) == [".out.unfinished"]
    check_folder(tmp_path / "out", empty=True)
    assert listed(tmp_path) == []
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": SRC}, check=False)
    with new_folder(tmp_path / "out") as folder:
        assert listed(folder) == []
    assert listed(tmp_path) == ["out"]


def test_a_lock_is_given_up_and_another_ones_is_left(tmp_path):
    with claimed(tmp_path) as holder:
        assert holder is not None
        with claimed(tmp_path) as other:
            assert other is None
        with (
            pytest.raises(ValueError, match=r"another process works in"),
            locked(tmp_path, wait=0.0),
        ):
            pass
        (tmp_path / "lock").unlink()
        (tmp_path / "lock").write_text("of somebody who came since")
    assert (tmp_path / "lock").exists()
    with locked(tmp_path, wait=0.0):  # a file that nobody locks is no lock
        pass
    assert listed(tmp_path) == []


def test_a_lock_on_windows_is_of_a_byte_behind_the_file(tmp_path, monkeypatch):
    held = {}

    def locking(descriptor, mode, length):
        key = os.fstat(descriptor).st_ino, os.lseek(descriptor, 0, os.SEEK_CUR)
        assert (mode, length) == ("LK_NBLCK", 1)
        if held.setdefault(key, descriptor) != descriptor:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(
        sys.modules, "msvcrt", SimpleNamespace(LK_NBLCK="LK_NBLCK", locking=locking)
    )
    with (tmp_path / "a").open("w") as first, (tmp_path / "a").open("a") as second:
        assert lock(first)
        assert not lock(second)
        first.write("text")
    assert (tmp_path / "a").read_text() == "text"
    assert [position for _, position in held] == [2**30]


# --- checks ---


def test_checks_leave_nothing(tmp_path, monkeypatch):
    check_file(tmp_path / "a/b/file")
    check_folder(tmp_path / "a/b", empty=True)
    check_space(tmp_path / "a/b", 1)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file: name another path"):
        check_file(tmp_path / "file/out")
    with pytest.raises(ValueError, match="is a file: name a folder"):
        check_folder(tmp_path / "file")
    with pytest.raises(ValueError, match="not an empty folder"):
        check_folder(tmp_path, empty=True)
    with pytest.raises(ValueError, match="cannot be written"):
        check_file("/proc/nowhere/out")
    with pytest.raises(ValueError, match=r"needs 1000000.00 GB, its disk has .* GB free"):
        check_space(tmp_path, 10**15)
    monkeypatch.setattr(os, "access", lambda *arguments: False)
    with pytest.raises(ValueError, match="is read-only"):
        check_file(tmp_path / "file")
    assert listed(tmp_path) == ["file"]


def test_names_lead_nowhere_else():
    for name in ("tiny", "val2014", "a.b-c_d 1", "größe"):
        check_name(name, "name")
    for name in ("", ".", "..", "../x", "a/b", "a\\b", "-x", "a\nb", "a\x1b[2J", "a.", "x" * 101):
        with pytest.raises(ValueError, match="no plain name"):
            check_name(name, "name")


# --- rows ---


@pytest.mark.parametrize("cut", ["3", "3,", '3,"a\nb', '"3'])
def test_a_row_that_was_cut_off_is_not_glued_to_the_next(tmp_path, cut):
    path = tmp_path / "rows.csv"
    append_rows(path, [{"a": 1, "b": "x\ny", "c": 2}])
    whole = path.read_bytes()
    path.write_bytes(whole + cut.encode())
    append_rows(path, [{"a": 5, "b": "z", "c": 6}])
    with path.open(newline="") as file:
        assert [row["a"] for row in csv.DictReader(file)] == ["1", "5"]
    path.write_bytes(whole + cut.encode())
    mend_rows(path)
    assert path.read_bytes() == whole
    path.write_bytes(whole[:-1])  # an editor took the last end of a line
    append_rows(path, [{"a": 5, "b": "z", "c": 6}])
    assert path.read_bytes() == whole + b"5,z,6\n"
    assert finished_rows("a,b") == ""


def test_a_full_disk_adds_no_row(tmp_path, monkeypatch):
    path = tmp_path / "rows.csv"
    append_rows(path, [{"a": 1, "b": 2}])
    before = path.read_bytes()

    class Full(_rows.FileIO):
        def write(self, content):
            if len(content) < 4:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(content[:2])

    monkeypatch.setattr(_rows, "FileIO", Full)
    with pytest.raises(OSError, match="No space left") as failed:
        append_rows(path, [{"a": 3, "b": 4}])
    assert failed.value.filename == str(path)
    assert path.read_bytes() == before


def test_columns_are_compared_before_the_work(tmp_path):
    path = tmp_path / "rows.csv"
    RowFile(path, ["a", "b"]).append([{"a": 1, "b": 2}])
    with pytest.raises(ValueError, match=r"other columns \(differing in b, c\): name a new file"):
        RowFile(path, ["a", "c"])
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="no table of rows"):
        RowFile(path, ["a", "c"])
    RowFile(None, ["a"]).append([{"a": 1}])


def test_digests_are_those_that_files_were_named_by(tmp_path):
    assert (
        _files.digest({"b": 1, "a": [2, "ü"]})
        == _files.digest({"a": [2, "ü"], "b": 1})
        == "c72cc8b84920"
    )
    assert _files.sha256([b"a", b"bc"]) == _files.sha256([b"abc"])
