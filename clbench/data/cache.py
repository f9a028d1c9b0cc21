"""Cache of preprocessed volumes, keyed by content; safe when two runs start at once.

One folder per entry: `image.npy` and `bits.npy` (memory-mapped, uncompressed: a random
96³ crop costs 4 ms), `where.npz`, `meta.json`. Every file carries a checksum: an entry that is not
whole, or was altered, is made again.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from platformdirs import user_cache_path

from clbench.data.checks.case_notes import LOOKS, VERSION, CaseNote, notes_of
from clbench.data.checks.rounding import Range, range_of_fractions
from clbench.data.labels import (
    RawCase,
    digest_of,
    image_digest,
    read_case,
    read_image,
    values_of,
)
from clbench.data.layouts import CaseFiles
from clbench.data.nifti import content, read_once
from clbench.data.nifti import grid as read_grid
from clbench.data.volume import CENTERS_KEPT, Volume, preprocess
from clbench.errors import DataError, StoreError
from clbench.spec.benchmark import Preprocessing, Source
from clbench.spec.taxonomy import STRUCTURES, ancestors
from clbench.store import files as store_files
from clbench.store.arrays import mapped, read_npz
from clbench.types import triple

FORMAT = 3
"""Raised by any change in what an entry holds."""
_Place = tuple[str, str, int, int, int, int]
"""What is kept of a file; its path, size, times of modification and change, and inode."""
Looks = Literal["values", "images", "notes"]
_HASHES, _VALUES = "hashes", "values"
_FULL = "the cache folder cannot be written"
_WHAT = "a file of the cache folder"
_NEXT_STEP = "free some disk space, or name another folder with --cache or CLBENCH_CACHE"


def default_root() -> Path:
    """Where the cache lies: `CLBENCH_CACHE`, or the user's cache folder."""
    named = os.environ.get("CLBENCH_CACHE")
    return Path(named).expanduser() if named else user_cache_path("clbench")


class VolumeCache:
    """Preprocessed cases below a folder.

    Args:
        root: the folder; made when first needed.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        store_files.allow_many_files()  # an opened case keeps two
        self._known: dict[_Place, str] = {}
        self.written = 0
        """Entries that were written by this object."""

    # ------------------------------------------------------------------------------- identity

    def content_hash(self, files: CaseFiles) -> str:
        """SHA-256 over image and labels; names and places do not enter."""
        whole = hashlib.sha256()
        for path in files.files:
            whole.update(self._file_hash(path).encode())
        return whole.hexdigest()

    def image_hash(self, files: CaseFiles, source: Source) -> str:
        """SHA-256 of the image's voxels in HU, see `image_digest`."""
        return self._remember(
            _images(source), files.image, lambda: image_digest(files.image, source.rescale)
        )

    def _file_hash(self, path: Path) -> str:
        """Hash of an (unpacked) file."""
        return self._remember(_HASHES, path, lambda: _unpacked_sha256(path))

    def holds(self, files: CaseFiles, source: Source) -> frozenset[str]:
        """The structures of which a case holds a voxel; a paired value counts for both sides."""
        if isinstance(files.label, Path):
            return structures_of(self._values(files.label), source)
        return with_ancestors(name for name, path in files.label if self._values(path))

    def unannotated(self, files: CaseFiles, source: Source) -> frozenset[str]:
        """The source's structures of which a case holds a voxel, though it does not annotate them.

        No file is read of a case that annotates all.
        """
        annotated = set(files.annotated(source))
        if annotated.issuperset(source.structures):
            return frozenset()
        # a pair of which the case annotates no side is not told apart, and no voxel is either
        told = {v: pair for v, pair in source.sides.items() if annotated & set(pair)}
        held = self.holds(files, replace(source, sides=told))
        return held & frozenset(source.structures) - annotated

    def range_of_fractions(self, files: CaseFiles, source: Source) -> Range:
        """Smallest and largest value of an image, in HU as its source says; None: whole numbers."""

        def found() -> str:
            image = read_image(files.image, read_grid(files.image), source.rescale)
            return json.dumps(range_of_fractions(image))

        values = json.loads(self._remember(f"fractions_of_{_images(source)}", files.image, found))
        return None if values is None else (values[0], values[1])

    def _values(self, path: Path) -> list[int]:
        """The values above 0 of a label file or mask."""
        text = self._remember(_VALUES, path, lambda: json.dumps(values_of(path)))
        return [int(v) for v in json.loads(text) if v]

    def notes(
        self, files: CaseFiles, source: Source, read: Callable[[], RawCase] | None = None
    ) -> list[CaseNote]:
        """What is odd about a case, see `clbench.data.checks.case_notes`.

        Args:
            files: image and annotation of the case.
            source: the data set it belongs to.
            read: gives the case where it has to be read; None: by `read_case`.

        Raises:
            DataError: the files cannot be used.
        """
        key = self._notes_key(files, source)
        texts = self._kept(
            self.root / "notes" / key,
            lambda: json.dumps(
                notes_of(read_case(files, source) if read is None else read(), source)
            ),
        )
        return [
            CaseNote(source=source.name, case=files.case, kind=kind, text=text)
            for kind, text in json.loads(texts)
        ]

    def _notes_key(self, files: CaseFiles, source: Source) -> str:
        labels = [name for name, _ in files.label] if isinstance(files.label, tuple) else None
        parts = [
            VERSION,
            sorted(LOOKS),
            self.content_hash(files),
            labels,
            repr(source),
            repr(files.image),
        ]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    def look(self, files: CaseFiles, source: Source, what: Looks) -> None:
        """Read a case once, and keep what is asked of it before it is preprocessed.

        `content_hash`, `holds`, `image_hash` and `notes` then read no file again. What cannot be
        read is left to them, who are asked in an order of their own.

        Args:
            files: image and annotation of the case.
            source: the data set it belongs to.
            what: `values` alone are those of labels, for `holds`; `images` adds hashes of files and
                image, and `notes` what is odd.
        """
        with contextlib.suppress(DataError), self._unchanged(files), read_once():
            if what == "values":
                self.holds(files, source)
                return
            self.content_hash(files)
            read = functools.cache(lambda: read_case(files, source))
            if what == "notes":
                self.notes(files, source, read)
                self.holds(files, source)
            self._remember(_images(source), files.image, lambda: digest_of(read().image))

    @contextlib.contextmanager
    def _unchanged(self, files: CaseFiles) -> Iterator[None]:
        """Forget what is found out of a file in this block, where it changes meanwhile."""
        before = {path: self._place("", path) for path in files.files}
        try:
            yield
        finally:
            changed = {str(p.resolve()) for p in before if self._place("", p) != before[p]}
            for known in [known for known in self._known if known[1] in changed]:
                self._note(known).unlink(missing_ok=True)
                del self._known[known]

    def has_looked(self, files: CaseFiles, source: Source, what: Looks) -> bool:
        """Whether what `look` would keep is kept; no file is read.

        Args:
            files: image and annotation of the case.
            source: the data set it belongs to.
            what: see `look`.
        """
        labels = [files.label] if isinstance(files.label, Path) else [p for _, p in files.label]
        try:
            if what == "values":
                return all(self._is_kept(_VALUES, path) for path in labels)
            known = all(self._is_kept(_HASHES, path) for path in files.files)
            known = known and self._is_kept(_images(source), files.image)
            if known and what == "notes":
                return (self.root / "notes" / self._notes_key(files, source)).exists()
            return known
        except DataError:  # a file that is gone: said by who asks for it
            return True

    def _is_kept(self, what: str, path: Path) -> bool:
        known = self._place(what, path)
        return known in self._known or self._note(known).exists()

    def _remember(self, what: str, path: Path, make: Callable[[], str]) -> str:
        """A text about a file's content, kept by path, size, place on disk and times of change."""
        known = self._place(what, path)
        if known not in self._known:
            self._known[known] = self._kept(self._note(known), make)
        return self._known[known]

    def _place(self, what: str, path: Path) -> _Place:
        try:
            stat = path.stat()
        except OSError as err:
            raise DataError(
                "the file cannot be read", where=path, got=err.strerror, next_step="check --data"
            ) from err
        # a copy may keep size and time of modification; the time of the change is the system's
        when = stat.st_mtime_ns, stat.st_ctime_ns
        return what, str(path.resolve()), stat.st_size, *when, stat.st_ino

    def _note(self, known: _Place) -> Path:
        what, *key = known
        return self.root / what / hashlib.sha256(repr(tuple(key)).encode()).hexdigest()[:32]

    def _kept(self, note: Path, make: Callable[[], str]) -> str:
        """The text of a sealed file of the cache, made where it is absent or altered."""
        try:
            return str(_unsealed(note.read_text()))
        except (OSError, ValueError):
            text = make()
            sealed = _sealed(text).encode()
            with contextlib.suppress(StoreError):  # a read-only cache costs the time again
                store_files.atomic_write(
                    note, lambda file: file.write(sealed), what=_WHAT, next_step=_NEXT_STEP
                )
            return text

    def _key(self, files: CaseFiles, source: Source, pre: Preprocessing) -> str:
        return _digest([FORMAT, *self._parts(files, source, pre)])[:32]

    def volume_digest(self, files: CaseFiles, source: Source, pre: Preprocessing) -> str:
        """16 hexadecimal digits of all that decides the voxels of a preprocessed case.

        That is the content of its files, how the source's labels are read, and the grid; nothing
        is preprocessed.

        Args:
            files: image and annotation of the case.
            source: the data set it belongs to: its structures and label values.
            pre: spacing in mm and HU window.

        Raises:
            DataError: a file cannot be read.
        """
        return _digest(self._parts(files, source, pre))[:16]

    def _parts(self, files: CaseFiles, source: Source, pre: Preprocessing) -> list[Any]:
        """What decides the voxels of a preprocessed case."""
        parts: list[Any] = [
            files.case,
            self.content_hash(files),
            # with masks, a structure without file takes a bit all the same
            [source.structures, [name for name, _ in files.label]]
            if isinstance(files.label, tuple)
            else None,
            source.name,
            sorted(source.labels.items()),
            sorted(source.sides.items()),
            files.annotated(source),
            pre.orientation,
            pre.spacing_mm,
            pre.window_hu,  # decides the crop
        ]
        if source.rescale is not None:
            parts.append([source.rescale.slope, source.rescale.intercept])
        # a voxel is one of what contains its structure, too; clbench's own never move house
        containing = [[n, *ancestors(n)] for n in source.structures if n not in STRUCTURES]
        if inside := sorted(names for names in containing if len(names) > 1):
            parts.append({"inside": inside})
        return parts

    # -------------------------------------------------------------------------------- entries

    def get(self, files: CaseFiles, source: Source, pre: Preprocessing) -> Volume:
        """The preprocessed case, made when it is not there yet.

        Args:
            files: image and annotation of the case.
            source: the data set it belongs to: its structures and label values.
            pre: spacing in mm, HU window and patch size in voxels.

        Raises:
            DataError: the files cannot be used.
            StoreError: the cache folder cannot be written.
        """
        entry = self.root / self._key(files, source, pre)
        volume = self._open(entry, files, source, pre)
        if volume is not None:
            return volume
        with store_files.locked(
            entry.with_suffix(".lock"), what=_FULL, next_step=_NEXT_STEP, waiting=lambda: None
        ):
            volume = self._open(entry, files, source, pre)  # another process may have made it
            if volume is not None:
                return volume
            self._write(entry, preprocess(read_case(files, source), source, pre))
        volume = self._open(entry, files, source, pre, just_written=True)
        if volume is None:
            raise StoreError(
                "a preprocessed volume vanished while it was used",
                where=entry,
                next_step="use a cache folder no other program cleans (--cache or CLBENCH_CACHE)",
            )
        return volume

    def is_prepared(self, files: CaseFiles, source: Source, pre: Preprocessing) -> bool:
        """Whether `get` would find the case; whether its entry is whole, `get` alone looks.

        Args:
            files: image and annotation of the case.
            source: the data set it belongs to: its structures and label values.
            pre: spacing in mm and HU window.

        Raises:
            DataError: a file cannot be read.
        """
        return (self.root / self._key(files, source, pre) / "meta.json").exists()

    def _write(self, entry: Path, volume: Volume) -> None:
        """Write an entry; call it only while the entry is locked."""

        def fill(folder: Path) -> None:
            np.save(folder / "image.npy", volume.image)
            np.save(folder / "bits.npy", volume.bits)
            arrays: dict[str, Any] = {str(k): v for k, v in volume.where.items()}
            np.savez(folder / "where.npz", **arrays)
            meta = {
                "affine": volume.affine.tolist(),
                "native_affine": volume.native_affine.tolist(),
                "native_shape": volume.native_shape,
                "start": volume.start,
                "shape": volume.image.shape,
                "bits": str(volume.bits.dtype),
                "counts": {str(k): v for k, v in volume.counts.items()},
                "sha256": {p.name: store_files.sha256(p) for p in sorted(folder.iterdir())},
            }
            (folder / "meta.json").write_text(_sealed(meta))

        store_files.remove_parts(entry)
        store_files.atomic_folder(entry, fill, what=_WHAT, next_step=_NEXT_STEP)
        self.written += 1

    def _open(
        self,
        entry: Path,
        files: CaseFiles,
        source: Source,
        pre: Preprocessing,
        *,
        just_written: bool = False,
    ) -> Volume | None:
        """The entry, or None where it is absent, not whole, or altered since it was written."""
        try:
            meta = _unsealed((entry / "meta.json").read_text())
            for name, digest in meta["sha256"].items():
                if not just_written and store_files.sha256(entry / name) != digest:
                    return None
            where = {int(k): v for k, v in read_npz(entry / "where.npz", 8 * CENTERS_KEPT).items()}
            image = _mapped(entry / "image.npy", meta["shape"], "int16")
            bits = _mapped(entry / "bits.npy", meta["shape"], meta["bits"])
            return Volume(
                source=source.name,
                case=files.case,
                image=image,
                bits=bits,
                names=source.structures,
                annotated=frozenset(files.annotated(source)),
                affine=np.array(meta["affine"]),
                native_affine=np.array(meta["native_affine"]),
                native_shape=triple(map(int, meta["native_shape"])),
                start=triple(map(int, meta["start"])),
                window_hu=pre.window_hu,
                files=files,
                table=source,
                where=where,
                counts={int(k): int(v) for k, v in meta["counts"].items()},
            )
        except (StoreError, OSError, ValueError, KeyError, TypeError, EOFError) as err:
            cause = err.__cause__ if isinstance(err, StoreError) else err
            if isinstance(cause, OSError) and cause.errno in (errno.EMFILE, errno.ENFILE):
                raise StoreError(
                    "too many files are open",
                    where=entry,
                    expected="room for two files per case of the course",
                    got=f"{cause.strerror}, at most {store_files.most_files()} in a process",
                    next_step="have the limit raised (`ulimit -Hn` shows it; limits.conf, "
                    "LimitNOFILE of systemd, `nofile` of docker) and repeat the command",
                ) from err
            return None


def _digest(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _images(source: Source) -> str:
    """Where digests of a source's images are kept."""
    rescale = source.rescale
    return "images" if rescale is None else f"images_{rescale.slope}_{rescale.intercept}"


def structures_of(values: Iterable[int], source: Source) -> frozenset[str]:
    """The structures that label values stand for; a paired value counts for both sides."""
    pairs = [source.sides.get(v, (source.labels.get(v, ""),)) for v in values]
    return with_ancestors(name for pair in pairs for name in pair if name)


def with_ancestors(names: Iterable[str]) -> frozenset[str]:
    """Structures, and those that contain them: a case with a liver tumor holds a liver."""
    return frozenset(n for name in names for n in (name, *ancestors(name)))


def _sealed(content: Mapping[str, Any] | str) -> str:
    """JSON on one line, and below it its checksum."""
    text = json.dumps(content)
    return f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}"


def _unsealed(text: str) -> Any:
    """What `_sealed` wrote.

    Raises:
        ValueError: it was altered.
    """
    content, _, digest = text.partition("\n")
    if hashlib.sha256(content.encode()).hexdigest() != digest:
        raise ValueError("the checksum does not fit")
    return json.loads(content)


def _mapped(path: Path, shape: list[int], dtype: str) -> NDArray[Any]:
    array = mapped(path)
    if list(array.shape) != list(shape) or array.dtype != np.dtype(dtype):
        raise ValueError(f"{path} is not what its entry says")
    return array


def _unpacked_sha256(path: Path) -> str:
    """SHA-256 of a file, unpacked where it ends in .gz, to as far as its header reaches.

    Raises:
        DataError: damaged, or a stream that unpacks to more than its header says.
    """
    whole = hashlib.sha256()
    for chunk in content(path):
        whole.update(chunk)
    return whole.hexdigest()
