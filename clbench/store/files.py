"""Atomic writes and checksums: files and folders appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import resource
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from clbench.errors import StoreError

NEXT_STEP = (
    "free some disk space, or choose another folder with --out; run the same command again and it "
    "goes on where it stopped"
)
"""What to do when a file of a run could not be written."""
MEND_LINK = "make what the link leads to, or take the link away"
"""What to do about a symbolic link in the place of a folder."""
OTHER_OUT = "choose another folder with --out, or change its permissions"
"""What to do when results have no place."""
COPY_RUN = "copy the whole folder of the run to where you may write, and name the copy"
"""What to do when something is to be added to a finished run that may only be read."""

# ----------------------------------------------------------------------------------------- writing


def make_folder(folder: Path, *, next_step: str = OTHER_OUT) -> None:
    """Create a folder that must be writable.

    Args:
        folder: which; folders above it are made, too.
        next_step: ends the error.

    Raises:
        StoreError: it cannot be.
    """
    probe = folder / f".probe.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as err:
        got = err.strerror or str(err)
        if (link := dead_link(folder)) is not None:
            got, next_step = f"{link} is a link to {link.readlink()}, which is not there", MEND_LINK
        raise StoreError(
            "the results folder cannot be written", where=folder, got=got, next_step=next_step
        ) from err


def dead_link(path: Path) -> Path | None:
    """The symbolic link on the way to a path that leads nowhere; None: there is none."""
    return next((p for p in (path, *path.parents) if p.is_symlink() and not p.exists()), None)


_NO_LOCKS = (errno.ENOLCK, errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
"""What a file system without locks (NFS without its daemon, some FUSE mounts) answers."""


MOST_FILES = 1 << 16
"""Files that a process may have open at a time, where the system lets it."""
HELD = ".held"
LOOK_S = 0.2
"""Seconds for which a lock may be held by somebody who only looks whether it is (`is_locked`)."""


@contextlib.contextmanager
def locked(
    path: Path,
    *,
    what: str = "the results folder cannot be written",
    next_step: str = NEXT_STEP,
    waiting: Callable[[], object] | None = None,
) -> Iterator[None]:
    """Hold a lock that one process at a time can hold.

    Where the file system has no locks, a file `<path>.held` stands for it, which names its holder;
    one that was killed on this machine holds it no longer.

    Args:
        path: the lock file; it stays.
        what: begins the error where it cannot be made.
        next_step: ends that error.
        waiting: called every second while another process holds it; None: that is an error.

    Raises:
        StoreError: it cannot be made, or another process holds it.
    """
    lock: BaseFileLock = FileLock(path)
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=LOOK_S if waiting is None else 1)
            break
        except Timeout:
            if waiting is None:
                held = f"; if none runs any more, remove {lock.lock_file}"
                raise StoreError(
                    "another process is working on this very run",
                    where=path.parent,
                    next_step="wait for it to end; nothing was changed"
                    + (held if isinstance(lock, SoftFileLock) else ""),
                ) from None
            waiting()
        except (OSError, NotImplementedError) as err:
            number = errno.ENOTSUP if isinstance(err, NotImplementedError) else err.errno
            if number in _NO_LOCKS and not isinstance(lock, SoftFileLock):
                lock = SoftFileLock(path.with_name(f"{path.name}{HELD}"))
                continue
            got = getattr(err, "strerror", None) or str(err)
            raise StoreError(what, where=path.parent, got=got, next_step=next_step) from err
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # what the block raised must not be hidden
            lock.release()


def is_locked(path: Path) -> bool:
    """Whether another process holds the lock of `locked`; nothing is made where none ever did.

    Args:
        path: the lock file.
    """
    if (held := stand_in(path)) is None:
        return _seen_locked(path)
    lock = SoftFileLock(held)
    try:
        lock.acquire(timeout=LOOK_S)  # by then another one that only looks is done
    except Timeout:
        return True
    except (OSError, NotImplementedError):  # a place that can only be read
        return False
    lock.release()
    return False


def stand_in(path: Path) -> Path | None:
    """The file that stands for a held lock where the file system has no locks; None: there is none.

    One that was killed on another machine leaves it, and nobody can tell.

    Args:
        path: the lock file.
    """
    held = path.with_name(f"{path.name}{HELD}")
    return held if held.exists() else None


def _seen_locked(path: Path) -> bool:
    """Whether a process holds a lock; the look is shared, so that two that look see no holder."""
    try:
        opened = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(opened)
    return False


def sync_folder(folder: Path) -> None:
    """Let a rename in the folder outlast a power cut, where the file system can do that."""
    with contextlib.suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def sweep(folder: Path) -> None:
    """Remove what a killed process was writing; call it only while the folder is held alone."""
    for part in folder.rglob(".*.part"):
        _remove(part)


def remove_parts(path: Path) -> None:
    """Remove what killed processes were writing of one path; call it only while that is locked."""
    for part in path.parent.glob(f".{glob.escape(_stem(path))}.*.part"):
        _remove(part)


def atomic_write(
    path: Path,
    write: Callable[[BinaryIO], object],
    *,
    what: str = "a file of the run",
    next_step: str = NEXT_STEP,
    previous: Path | None = None,
) -> None:
    """Write a file whole or not at all: temporary name, fsync, rename.

    Of several writers at once, in one process or in many, the last to end wins; their contents
    never mix.

    Args:
        path: target; its folder is made when it is not there.
        write: writes the content into a binary file, opened for writing.
        what: begins the error.
        next_step: ends the error.
        previous: where the old file goes once the new one is whole; None: it is replaced.

    Raises:
        StoreError: the disk is full, or the folder cannot be written; the old file is unharmed.
            What else `write` raises is passed on, and leaves nothing behind either.
    """
    with _replacement(path, what, next_step) as part:
        with part.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            path.replace(previous)
        part.replace(path)


def atomic_folder(
    path: Path,
    fill: Callable[[Path], object],
    *,
    what: str = "a folder of the run",
    next_step: str = NEXT_STEP,
    in_use: bool = False,
) -> None:
    """Write a folder whole or not at all: temporary name, fsync of every file, rename.

    Args:
        path: target; the folder around it is made when it is not there. A folder that lies there
            already is replaced once the new one is whole.
        fill: writes the content into an empty folder.
        what: begins the error.
        next_step: ends the error.
        in_use: other processes may be reading files of the old folder by name: each is replaced by
            itself, so that none is missing in between. The reader must be able to tell old from
            new; files that only the old folder holds stay.

    Raises:
        StoreError: the disk is full, or the folder cannot be written; the old folder is unharmed.
            What else `fill` raises is passed on, and leaves nothing behind either.
    """
    with _replacement(path, what, next_step) as part:
        part.mkdir()
        fill(part)
        content = sorted(part.rglob("*"))
        for inner in content:
            if inner.is_file():
                with inner.open("rb+") as file:
                    os.fsync(file.fileno())
        for folder in (part, *(p for p in content if p.is_dir())):
            sync_folder(folder)
        if not (in_use and path.is_dir()):
            _replace_folder(part, path)
            return
        for inner in content:
            target = path / inner.relative_to(part)
            if inner.is_dir():
                target.mkdir(exist_ok=True)
            else:
                inner.replace(target)


@contextlib.contextmanager
def _replacement(path: Path, what: str, next_step: str) -> Iterator[Path]:
    """A name beside `path` to write under; what is left of it afterwards is removed."""
    part = _part(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        sync_folder(path.parent)
    except OSError as err:
        raise StoreError(
            f"{what} could not be written",
            where=path,
            got=err.strerror or str(err),
            next_step=next_step,
        ) from err
    finally:
        _remove(part)


def _replace_folder(part: Path, path: Path) -> None:
    """Rename `part` to `path`; a folder that lies there already is moved aside, then removed."""
    aside: Path | None = None
    while True:
        try:
            part.replace(path)
            break
        except OSError as err:
            if err.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                if aside is not None:
                    with contextlib.suppress(OSError):
                        aside.replace(path)
                raise
        if aside is not None:  # another writer was faster
            _remove(aside)
        aside = _part(path)
        with contextlib.suppress(FileNotFoundError):  # another writer moved it aside
            path.replace(aside)
    if aside is not None:
        _remove(aside)


def _stem(path: Path) -> str:
    """The path's name, or a short one of its own where an ending would make it too long a name."""
    name = os.fsencode(path.name)
    return path.name if len(name) <= 200 else hashlib.sha256(name).hexdigest()[:16]


def _part(path: Path) -> Path:
    """A temporary name beside `path`, of this writer alone even where machines share the folder."""
    return path.with_name(f".{_stem(path)}.{os.getpid()}.{secrets.token_hex(4)}.part")


def _remove(part: Path) -> None:
    """Remove a temporary file or folder; that this fails must not hide why the writing failed."""
    with contextlib.suppress(OSError):
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file of a run whole or not at all, see `atomic_write`.

    Raises:
        StoreError: the disk is full, or the folder cannot be written; the old file is unharmed.
    """
    atomic_write(path, lambda file: file.write(content))


def link_or_copy(source: Path, target: Path) -> None:
    """Let `target` be the file `source`: a second name of it, or a copy where links cannot be made.

    Both are files that are replaced, never changed in place, so neither sees what becomes of the
    other.

    Args:
        source: the file.
        target: its second name; a file there is replaced.

    Raises:
        StoreError: the disk is full, or the folder cannot be written; the old file is unharmed.
    """
    with _replacement(target, "a file of the run", NEXT_STEP) as part:
        try:
            part.hardlink_to(source)
        except (OSError, NotImplementedError):  # another disk, or a file system without links
            shutil.copyfile(source, part)
            with part.open("rb+") as file:
                os.fsync(file.fileno())
        part.replace(target)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a mapping as sorted, indented JSON."""
    text = json.dumps(content, indent=1, sort_keys=True, default=str)
    write_bytes(path, text.encode() + b"\n")


# ----------------------------------------------------------------------------------------- reading


def most_files() -> int:
    """How many files this process may have open at a time."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def allow_many_files() -> None:
    """Let this process have as many files open as the system allows it, at most `MOST_FILES`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):  # then the limit stays as it is
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes as 64 hexadecimal digits, read in pieces.

    Raises:
        StoreError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as err:
        raise StoreError(
            "a file cannot be read",
            where=path,
            got=err.strerror,
            next_step="check that it is there and that you may read it",
        ) from err


def read_json(path: Path, *, next_step: str = "run again with --fresh") -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: the file.
        next_step: what to do where it cannot be read.

    Raises:
        StoreError: missing, or not a JSON object.
    """
    refused = partial(StoreError, where=path, next_step=next_step)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise refused("a file of the run is missing") from None
    except (OSError, ValueError, RecursionError) as err:
        what, expected = "a file of the run cannot be read", "JSON written by clbench"
        raise refused(what, expected=expected, got=err) from err
    if not isinstance(content, dict):
        raise refused("a file of the run is not a JSON object")
    return content
