"""Atomic writes: full disks, kills half way, several writers at once, errors that are not hidden."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from filelock import FileLock, SoftFileLock

from clbench.errors import StoreError
from clbench.store.files import (
    atomic_folder,
    atomic_write,
    is_locked,
    locked,
    make_folder,
    remove_parts,
    sha256,
    stand_in,
    sweep,
    write_bytes,
)

DEAD = 2**22 + 1
"""No process has this id: it is above the largest that Linux gives."""


def write_text(path: Path, text: str) -> None:
    atomic_write(path, lambda file: file.write(text.encode()), what="a text", next_step="do this")


def write_two_files(path: Path, text: str) -> None:
    def fill(folder: Path) -> None:
        (folder / "deep").mkdir()
        for name in ("a", "deep/b"):
            (folder / name).write_text(text)

    atomic_folder(path, fill, what="a folder", next_step="do this")


def content(path: Path) -> str:
    """The text of what either writer wrote; fails where a folder's files differ."""
    if path.is_file():
        return path.read_text()
    first, second = (path / "a").read_text(), (path / "deep" / "b").read_text()
    assert first == second
    return first


WRITERS = pytest.mark.parametrize("write", [write_text, write_two_files])
Writer = Callable[[Path, str], None]


def refuse(*args: object, **kwargs: object) -> None:
    raise OSError(28, "No space left on device")


@WRITERS
def test_what_is_written_is_there_and_nothing_else(write: Writer, tmp_path: Path) -> None:
    path = tmp_path / "made" / "on the way" / "x"
    write(path, "one")
    assert content(path) == "one"
    write(path, "two")
    assert content(path) == "two"
    assert [p.name for p in path.parent.iterdir()] == ["x"]


@WRITERS
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_content(
    write: Writer, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    write(path, "old")
    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(StoreError) as err:
        write(path, "new")
    assert "could not be written" in err.value.what
    assert err.value.where == path
    assert err.value.got == "No space left on device"
    assert err.value.next_step == "do this"
    assert content(path) == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_folder_that_cannot_take_its_place_gives_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_two_files(tmp_path / "x", "old")
    real, calls = os.replace, []

    def fail_third(source: Path, target: Path) -> None:
        calls.append(source)  # 1: the place is taken; 2: old one aside; 3: new one to its place
        refuse() if len(calls) == 3 else real(source, target)

    monkeypatch.setattr(os, "replace", fail_third)
    with pytest.raises(StoreError, match="No space left"):
        write_two_files(tmp_path / "x", "new")
    assert content(tmp_path / "x") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@WRITERS
def test_the_first_error_is_the_one_that_is_told(
    write: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the folder is gone or a file is in its place, cleaning up fails too."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="could not be written"):
        write(tmp_path / "file" / "x", "new")

    def no_removal(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(os, "unlink", no_removal)
    with pytest.raises(StoreError, match="No space left"):
        write(tmp_path / "x", "new")


def test_what_is_no_matter_of_the_disk_is_passed_on(tmp_path: Path) -> None:
    def broken(target: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "x", broken)
    with pytest.raises(KeyboardInterrupt):
        atomic_folder(tmp_path / "x", broken)
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
from pathlib import Path
from clbench.store.files import atomic_folder, atomic_write
path = Path(sys.argv[1])
def die(target):
    if isinstance(target, Path):
        (target / "half").write_text("half")
    else:
        target.write(b"half")
        target.flush()
    os.kill(os.getpid(), signal.SIGKILL)
{"file": atomic_write, "folder": atomic_folder}[sys.argv[2]](path, die)
"""


@pytest.mark.parametrize(("kind", "write"), [("file", write_text), ("folder", write_two_files)])
def test_a_kill_half_way_leaves_the_old_content_and_a_part_that_is_swept(
    kind: str, write: Writer, tmp_path: Path
) -> None:
    path = tmp_path / "deep" / "x"
    write(path, "old")
    for clean in (lambda: remove_parts(path), lambda: sweep(tmp_path)):
        subprocess.run([sys.executable, "-c", KILLED, str(path), kind], check=False)
        assert len(list(path.parent.iterdir())) == 2
        assert content(path) == "old"
        remove_parts(path.with_name("y"))  # not its own
        assert len(list(path.parent.iterdir())) == 2
        clean()
        assert list(path.parent.iterdir()) == [path]
    write(path, "new")
    assert content(path) == "new"


@WRITERS
def test_two_writers_at_once_never_mix(write: Writer, tmp_path: Path) -> None:
    path, errors = tmp_path / "x", []
    barrier = threading.Barrier(4)

    def work(text: str) -> None:
        try:
            barrier.wait()
            for _ in range(20):
                write(path, text * 1000)
        except Exception as err:
            errors.append(err)

    threads = [threading.Thread(target=work, args=(t,)) for t in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert content(path) in {t * 1000 for t in "abcd"}
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_in_use_is_replaced_file_by_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_two_files(path, "old")
    (path / "more").write_text("stays")
    inode = path.stat().st_ino

    def fill(folder: Path) -> None:
        (folder / "new").mkdir()
        (folder / "new" / "c").write_text("new")
        (folder / "a").write_text("new")

    atomic_folder(path, fill, in_use=True)
    assert path.stat().st_ino == inode  # a reader's path never led nowhere
    texts = {p.relative_to(path).as_posix(): p.read_text() for p in path.rglob("*") if p.is_file()}
    assert texts == {"a": "new", "new/c": "new", "deep/b": "old", "more": "stays"}
    assert list(tmp_path.iterdir()) == [path]


def test_the_longest_names_a_file_system_takes(tmp_path: Path) -> None:
    for name in ("x" * 255, "\u00e4" * 127):
        write_text(tmp_path / name, "long")
        write_text(tmp_path / name, "longer")
        assert (tmp_path / name).read_text() == "longer"
    assert len(list(tmp_path.iterdir())) == 2


def test_the_file_before_is_kept_where_that_is_asked(tmp_path: Path) -> None:
    def write(file: BinaryIO) -> None:
        file.write(b"2")

    write_bytes(tmp_path / "x", b"1")
    atomic_write(tmp_path / "x", write, previous=tmp_path / "before")
    assert (tmp_path / "x").read_bytes() == b"2"
    assert (tmp_path / "before").read_bytes() == b"1"


def test_sha256_of_a_file(tmp_path: Path) -> None:
    write_bytes(tmp_path / "x", b"abc")
    assert sha256(tmp_path / "x") == hashlib.sha256(b"abc").hexdigest()
    with pytest.raises(StoreError, match="cannot be read") as err:
        sha256(tmp_path / "y")
    assert err.value.where == tmp_path / "y"
    assert err.value.next_step


@pytest.mark.parametrize("name", ["ENOLCK", "EPERM", "EOPNOTSUPP"])
def test_without_locks_of_the_file_system_a_file_stands_for_the_lock(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        number = getattr(errno, name)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    path = tmp_path / ".lock"
    with locked(path):
        assert (tmp_path / ".lock.held").exists()
        with pytest.raises(StoreError, match="another process") as err, locked(path):
            pass
        assert f"remove {tmp_path / '.lock.held'}" in str(err.value)
    with locked(path):  # it was given back
        pass
    held = tmp_path / ".lock.held"
    held.write_text(f"{DEAD}\n{socket.gethostname()}\n")  # of a process that was killed
    with locked(path, waiting=lambda: None):
        pass


def test_one_process_holds_a_lock_and_another_waits_or_is_told(tmp_path: Path) -> None:
    path, waited = tmp_path / ".lock", []
    with locked(path), pytest.raises(StoreError, match="another process"), locked(path):
        pass

    class Enough(Exception):
        pass

    def waiting() -> None:
        waited.append(1)
        raise Enough

    with locked(path), pytest.raises(Enough), locked(path, waiting=waiting):
        pass
    assert waited == [1]


def test_a_lock_that_may_only_be_read_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a colleague sees it, who may read the folder."""
    path, opened = tmp_path / ".lock", os.open

    def no_writing(name: Any, flags: int, *more: Any, **words: Any) -> int:
        if flags & (os.O_RDWR | os.O_WRONLY):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return opened(name, flags, *more, **words)

    with locked(path):
        monkeypatch.setattr(os, "open", no_writing)
        assert is_locked(path)
        monkeypatch.undo()
    path.touch()
    monkeypatch.setattr(os, "open", no_writing)
    assert not is_locked(path)


def test_a_process_may_open_as_many_files_as_the_system_lets_it() -> None:
    """In a process of its own: the limit stays."""
    script = (
        "import resource as r\n"
        "from clbench.store.files import MOST_FILES, allow_many_files\n"
        "hard = r.getrlimit(r.RLIMIT_NOFILE)[1]\n"
        "r.setrlimit(r.RLIMIT_NOFILE, (64, hard))\n"
        "allow_many_files()\n"
        "most = MOST_FILES if hard == r.RLIM_INFINITY else min(hard, MOST_FILES)\n"
        "assert r.getrlimit(r.RLIMIT_NOFILE) == (most, hard)\n"
        "r.setrlimit(r.RLIMIT_NOFILE, (64, 64))\n"
        "allow_many_files()\n"
        "assert r.getrlimit(r.RLIMIT_NOFILE) == (64, 64)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_two_that_look_at_a_lock_see_no_holder(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    path.touch()
    looking = os.open(path, os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH | fcntl.LOCK_NB)
    assert not is_locked(path)
    os.close(looking)


def test_a_file_in_the_place_of_a_lock_is_named(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    assert stand_in(path) is None
    with SoftFileLock(path.with_name(".lock.held")):
        assert stand_in(path) == tmp_path / ".lock.held"
        assert is_locked(path)
    assert not is_locked(path)


def test_a_link_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    with pytest.raises(StoreError, match="cannot be written") as err:
        make_folder(tmp_path / "link")
    assert "absent, which is not there" in str(err.value)
    with pytest.raises(StoreError) as deep:
        make_folder(tmp_path / "link" / "tumor_ext" / "universal")
    assert "absent, which is not there" in str(deep.value)
    assert "take the link away" in str(err.value)


def test_a_lock_that_cannot_be_made_is_an_error_with_a_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: object, **__: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", read_only)
    with (
        pytest.raises(StoreError, match="the cache folder cannot be written") as err,
        locked(tmp_path / ".lock", what="the cache folder cannot be written", next_step="do this"),
    ):
        pass
    assert "Read-only file system" in str(err.value)
    assert "do this" in str(err.value)


def test_a_lock_that_cannot_be_given_back_hides_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(FileLock, "release", gone)
    with pytest.raises(KeyError), locked(tmp_path / ".lock"):
        raise KeyError
