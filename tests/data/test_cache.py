"""The cache: equal content is one entry, changed content is not, and a damaged entry is made again."""

from __future__ import annotations

import errno
import gzip
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from clbench.data import cache as cache_module
from clbench.data import volume
from clbench.data.cache import VolumeCache, default_root
from clbench.data.layouts import CaseFiles, find_cases
from clbench.data.volume import Volume
from clbench.errors import DataError, StoreError
from clbench.spec.benchmark import Partial, Preprocessing, Rescale, Source
from clbench.spec.taxonomy import DECLARED, Structure

SOURCE = Source(name="lits", title="", layout="lits", labels={1: "liver", 2: "liver_tumor"})
PRE = Preprocessing(spacing_mm=(2.0, 2.0, 2.0))


@pytest.fixture
def files(tmp_path: Path) -> CaseFiles:
    image = np.full((12, 12, 12), -1000, np.int16)
    image[2:9, 2:9, 2:9] = np.random.default_rng(0).integers(-100, 200, (7, 7, 7))
    label = np.zeros(image.shape, np.uint8)
    label[4:6, 4:6, 4:6] = 1
    for name, array in (("i", image), ("l", label)):
        nib.save(nib.Nifti1Image(array, np.diag([2.0, 2.0, 2.0, 1.0])), tmp_path / f"{name}.nii.gz")
    return CaseFiles(case="0", image=tmp_path / "i.nii.gz", label=tmp_path / "l.nii.gz")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Cases that were really preprocessed."""
    calls: list[str] = []
    real = volume.preprocess

    def counted(raw: Any, source: Any, pre: Any) -> Volume:
        calls.append(raw.files.case)
        return real(raw, source, pre)

    monkeypatch.setattr(cache_module, "preprocess", counted)
    return calls


def entries(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if (p / "meta.json").exists())


def test_too_many_open_files_are_no_missing_entry(
    files: CaseFiles, made: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be prepared again, and could not be written either."""
    cache = VolumeCache(tmp_path / "cache")
    cache.get(files, SOURCE, PRE)

    def full(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(cache_module, "mapped", full)
    with pytest.raises(StoreError, match="too many files are open") as err:
        cache.get(files, SOURCE, PRE)
    assert "ulimit -Hn" in str(err.value.next_step)
    assert made == ["0"]


def test_a_second_look_reads_the_entry(files: CaseFiles, made: list[str], tmp_path: Path) -> None:
    first = VolumeCache(tmp_path / "c").get(files, SOURCE, PRE)
    again = VolumeCache(tmp_path / "c").get(files, SOURCE, PRE)
    assert made == ["0"]
    assert isinstance(again.image, np.memmap)
    assert not again.image.flags.writeable
    assert again.image.dtype == np.int16
    np.testing.assert_array_equal(again.image, first.image)
    np.testing.assert_array_equal(again.bits, first.bits)
    assert again.counts == first.counts
    assert again.native_shape == first.native_shape
    np.testing.assert_array_equal(again.affine, first.affine)


@pytest.mark.parametrize(
    ("source", "pre", "new"),
    [
        (SOURCE, PRE, False),
        (SOURCE, replace(PRE, patch_vox=(64, 64, 64)), False),  # cut later
        (SOURCE, replace(PRE, spacing_mm=(3.0, 2.0, 2.0)), True),
        (SOURCE, replace(PRE, window_hu=(-100.0, 250.0)), True),  # decides the foreground
        (replace(SOURCE, labels={1: "liver_tumor", 2: "liver"}), PRE, True),
        (replace(SOURCE, licence="other"), PRE, False),
    ],
)
def test_the_key_is_what_the_voxels_depend_on(
    source: Source, pre: Preprocessing, new: bool, files: CaseFiles, made: list[str], tmp_path: Path
) -> None:
    cache = VolumeCache(tmp_path / "c")
    cache.get(files, SOURCE, PRE)
    cache.get(files, source, pre)
    assert len(made) == 1 + new


def test_masks_of_another_list_are_another_entry(lay_out: Any, tmp_path: Path) -> None:
    label = np.zeros((8, 8, 8), np.uint8)
    label[2:4, 2:4, 2:4], label[5:7, 5:7, 5:7] = 1, 2
    masks = {"liver": (1,), "spleen": (2,)}
    lay_out(
        tmp_path / "d", "totalsegmentator", "s1", label.astype(np.int16) * 40, label, masks=masks
    )
    for names in (["liver", "spleen"], ["spleen", "liver"], ["liver", "colon", "spleen"]):
        source = Source(name="t", title="", layout="totalsegmentator", masks={n: n for n in names})
        files = find_cases(tmp_path / "d", source)["s1"]
        pre = Preprocessing(spacing_mm=(3.0, 3.0, 3.0))
        got = VolumeCache(tmp_path / "cache").get(files, source, pre)
        one, two = got.labels(["liver", "spleen"], (slice(None),) * 3)
        assert (int(one.sum()), int(two.sum())) == (8, 8)
        assert one.argmax() < two.argmax()  # the liver lies below the spleen here


def test_changed_content_is_another_entry_and_a_moved_file_is_not(
    files: CaseFiles, made: list[str], tmp_path: Path
) -> None:
    cache = VolumeCache(tmp_path / "c")
    cache.get(files, SOURCE, PRE)
    moved = files.image.rename(tmp_path / "moved.nii.gz")
    cache.get(replace(files, image=moved), SOURCE, PRE)
    assert len(made) == 1
    array = np.asanyarray(nib.load(moved).dataobj).copy()
    array[4, 4, 4] += 1
    nib.save(nib.Nifti1Image(array, np.diag([2.0, 2.0, 2.0, 1.0])), moved)
    cache.get(replace(files, image=moved), SOURCE, PRE)
    assert len(made) == 2


def test_compressing_again_does_not_change_the_image_hash(files: CaseFiles, tmp_path: Path) -> None:
    cache = VolumeCache(tmp_path / "c")
    plain = tmp_path / "plain.nii"
    plain.write_bytes(gzip.decompress(files.image.read_bytes()))
    packed = cache.image_hash(files, SOURCE)
    assert packed == cache.image_hash(replace(files, image=plain), SOURCE)
    assert cache.content_hash(files) != cache.content_hash(replace(files, label=files.image))


def test_an_offset_of_a_source_does_not_change_the_image_hash(
    files: CaseFiles, tmp_path: Path
) -> None:
    """One image in two sources, stored as HU in one and with 1024 added in the other."""
    image = nib.load(files.image)
    stored = np.asanyarray(image.dataobj).astype(np.int32) + 1024
    nib.save(nib.Nifti1Image(stored, image.affine), tmp_path / "stored.nii.gz")
    other = replace(SOURCE, rescale=Rescale(slope=1.0, intercept=-1024.0))
    same = replace(files, image=tmp_path / "stored.nii.gz")
    cache = VolumeCache(tmp_path / "c")
    assert cache.image_hash(same, other) == cache.image_hash(files, SOURCE)
    assert cache.image_hash(same, SOURCE) != cache.image_hash(files, SOURCE)


def test_a_declared_structure_that_moves_into_another_one_is_another_volume(
    files: CaseFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A voxel is one of what contains its structure, too."""
    label = np.zeros((12, 12, 12), np.uint8)
    label[4:8, 4:8, 4:8] = 1
    label[5:7, 5:7, 5:7] = 2
    nib.save(nib.Nifti1Image(label, np.diag([2.0, 2.0, 2.0, 1.0])), files.label)
    cache, inside, digests = VolumeCache(tmp_path / "c"), [], []
    for parent in (None, "spleen", None):
        cyst = Structure(name="spleen_cyst", prompt="cyst", kind="cyst", parent=parent)
        monkeypatch.setitem(DECLARED, "spleen_cyst", cyst)
        source = replace(SOURCE, labels={1: "spleen", 2: "spleen_cyst"})
        volume = cache.get(files, source, PRE)
        bits = int(volume.bits[tuple(s // 2 for s in volume.bits.shape)])
        inside.append([name for i, name in enumerate(volume.names) if bits >> i & 1])
        digests.append(cache.volume_digest(files, source, PRE))
    assert inside == [["spleen_cyst"], ["spleen", "spleen_cyst"], ["spleen_cyst"]]
    assert digests[0] == digests[2] != digests[1]


def test_a_hash_is_remembered_until_the_file_changes(
    files: CaseFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = VolumeCache(tmp_path / "c").content_hash(files)
    monkeypatch.setattr(cache_module, "_unpacked_sha256", lambda path: "x" * 64)
    assert VolumeCache(tmp_path / "c").content_hash(files) == before
    monkeypatch.undo()
    for note in (tmp_path / "c" / "hashes").iterdir():  # an altered note is not believed
        note.write_text(note.read_text()[:-1] + "x")
    assert VolumeCache(tmp_path / "c").content_hash(files) == before
    monkeypatch.setattr(cache_module, "_unpacked_sha256", lambda path: "x" * 64)
    os.utime(files.image, ns=(1, 1))
    assert VolumeCache(tmp_path / "c").content_hash(files) != before


def test_a_file_put_in_place_with_the_size_and_time_of_another_one_is_another(
    files: CaseFiles, tmp_path: Path
) -> None:
    plain = tmp_path / "plain.nii"
    plain.write_bytes(gzip.decompress(files.image.read_bytes()))
    files = replace(files, image=plain)
    before = VolumeCache(tmp_path / "c").content_hash(files)
    then, content = plain.stat(), plain.read_bytes()
    for how in ("written over", "moved in"):
        content = content[:-1] + bytes([content[-1] ^ 1 if how == "written over" else 7])
        other = plain if how == "written over" else tmp_path / "other.nii"
        other.write_bytes(content)
        os.utime(other, ns=(then.st_atime_ns, then.st_mtime_ns))
        other.replace(plain)
        while (now := plain.stat()).st_ctime_ns == then.st_ctime_ns:  # a tick of the clock
            os.utime(plain, ns=(then.st_atime_ns, then.st_mtime_ns))
        assert (now.st_size, now.st_mtime_ns) == (then.st_size, then.st_mtime_ns)
        after = VolumeCache(tmp_path / "c").content_hash(files)
        assert after != before, how
        before = after


def test_a_file_replaced_while_it_is_looked_at_is_read_again(
    files: CaseFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, other = cache_module.read_case, tmp_path / "other.nii.gz"
    nib.save(nib.Nifti1Image(np.full((12, 12, 12), 7, np.int16), np.eye(4)), other)

    def replaced(*case: Any) -> Any:
        read = real(*case)
        if other.exists():
            other.replace(files.image)
        return read

    monkeypatch.setattr(cache_module, "read_case", replaced)
    looked = VolumeCache(tmp_path / "c")
    looked.look(files, SOURCE, "notes")
    assert not other.exists()
    for cache in (looked, VolumeCache(tmp_path / "c")):  # in this process and a later one
        assert not cache.has_looked(files, SOURCE, "images")
    afresh = VolumeCache(tmp_path / "d")
    assert looked.image_hash(files, SOURCE) == afresh.image_hash(files, SOURCE)
    assert looked.content_hash(files) == afresh.content_hash(files)


def test_structures_that_a_case_holds_and_does_not_annotate(
    files: CaseFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = VolumeCache(tmp_path / "c")
    kidneys = ("left_kidney", "right_kidney")
    source = replace(SOURCE, labels={2: "liver_tumor", 3: "liver"}, sides={1: kidneys})
    image = nib.load(files.label)
    label = np.asarray(image.dataobj).copy()
    label[0, 0, 0] = 2
    nib.save(nib.Nifti1Image(label, image.affine), files.label)

    def found(*annotates: str) -> set[str]:
        part = Partial(cases=("0",), annotates=annotates)
        return set(cache.unannotated(files, replace(source, partial=(part,))))

    assert found() == {"liver", "liver_tumor"}  # kidneys are not told apart where none is annotated
    assert found("liver_tumor") == {"liver"}
    assert found("left_kidney", "liver") == {"right_kidney", "liver_tumor"}
    assert found("liver", "liver_tumor") == set()
    monkeypatch.setattr(cache_module, "values_of", None)
    assert not VolumeCache(tmp_path / "d").unannotated(files, source)  # no file is read


@pytest.mark.parametrize(
    "harm", ["cut", "gone", "garbled", "other type", "one voxel", "one number"]
)
def test_a_damaged_entry_is_made_again(
    harm: str, files: CaseFiles, made: list[str], tmp_path: Path
) -> None:
    want = VolumeCache(tmp_path / "c").get(files, SOURCE, PRE).image.copy()
    (entry,) = entries(tmp_path / "c")
    if harm == "cut":
        (entry / "image.npy").write_bytes((entry / "image.npy").read_bytes()[:-10])
    elif harm == "gone":
        (entry / "bits.npy").unlink()
    elif harm == "garbled":
        (entry / "meta.json").write_text("{")
    elif harm == "one voxel":
        content = bytearray((entry / "bits.npy").read_bytes())
        content[-1] ^= 1
        (entry / "bits.npy").write_bytes(content)
    elif harm == "one number":
        text = (entry / "meta.json").read_text()
        (entry / "meta.json").write_text(text.replace('"start": [', '"start": [1', 1))
    else:
        np.save(entry / "bits.npy", np.load(entry / "bits.npy").astype(np.int8))
    got = VolumeCache(tmp_path / "c").get(files, SOURCE, PRE)
    assert made == ["0", "0"]
    np.testing.assert_array_equal(got.image, want)


def test_two_at_once_make_it_once(files: CaseFiles, made: list[str], tmp_path: Path) -> None:
    found: list[Volume] = []
    barrier = threading.Barrier(4)

    def work() -> None:
        barrier.wait()
        found.append(VolumeCache(tmp_path / "c").get(files, SOURCE, PRE))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert made == ["0"]
    assert len(found) == 4


def test_a_full_disk_leaves_nothing(
    files: CaseFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StoreError, match="cache folder") as err:
        VolumeCache(tmp_path / "c").get(files, SOURCE, PRE)
    assert "disk space" in str(err.value)
    assert not entries(tmp_path / "c")
    assert not list((tmp_path / "c").glob("*.part"))


def test_a_read_only_cache_is_read_and_hashes_are_made_anew(
    files: CaseFiles, made: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    VolumeCache(tmp_path / "cache").get(files, SOURCE, PRE)
    shutil.rmtree(tmp_path / "cache" / "hashes")

    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", read_only)
    monkeypatch.setattr(os, "fsync", read_only)
    cache = VolumeCache(tmp_path / "cache")
    assert cache.get(files, SOURCE, PRE).case == files.case
    assert made == [files.case]  # preprocessed once, by the writer


def test_what_a_killed_process_left_is_removed(files: CaseFiles, tmp_path: Path) -> None:
    root = tmp_path / "c"
    VolumeCache(root).get(files, SOURCE, PRE)
    (entry,) = entries(root)
    (entry / "bits.npy").unlink()
    for name in (entry.name, "another"):
        (root / f".{name}.99.0a1b2c3d.part").mkdir()
    VolumeCache(root).get(files, SOURCE, PRE)
    assert [p.name for p in root.glob(".*")] == [".another.99.0a1b2c3d.part"]


def test_a_truncated_file_is_named(files: CaseFiles, tmp_path: Path) -> None:
    files.image.write_bytes(files.image.read_bytes()[:-50])
    with pytest.raises(DataError) as err:
        VolumeCache(tmp_path / "c").get(files, SOURCE, PRE)
    assert "i.nii.gz" in str(err.value)


def test_the_default_folder_can_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CLBENCH_CACHE", str(tmp_path))
    assert default_root() == tmp_path
    monkeypatch.delenv("CLBENCH_CACHE")
    assert default_root().name == "clbench"
