"""NIfTI headers that claim what cannot be: refused by name, before memory is taken."""

from __future__ import annotations

import gzip
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nifti_files import CODES, LITS, PLACE, body, packed, put

from clbench.data.cache import VolumeCache
from clbench.data.labels import read_case, values_of
from clbench.data.layouts import CaseFiles
from clbench.data.nifti import content, grid, header_notes, load, row_major, voxels
from clbench.data.volume import Volume, preprocess
from clbench.errors import DataError
from clbench.spec.benchmark import Preprocessing
from clbench.store.arrays import MAX_VOXELS

MEMORY = 32 << 20
"""Bytes no refusal may take."""


def changed(place: int, form: str, *values: float) -> Callable[[], bytes]:
    """The body's image with header fields written over."""

    def made() -> bytes:
        raw = packed(body()[0])
        raw[place : place + struct.calcsize("<" + form)] = struct.pack("<" + form, *values)
        return bytes(raw)

    return made


def placed(**rows: list[float]) -> Callable[[], bytes]:
    """The image with rows of its sform (x, y, z) replaced, and no qform."""

    def made() -> bytes:
        raw = packed(body()[0])
        raw[252:254] = struct.pack("<h", 0)
        for i, name in enumerate("xyz"):
            if name in rows:
                raw[280 + 16 * i : 296 + 16 * i] = struct.pack("<4f", *rows[name])
        return bytes(raw)

    return made


def by_qform(*pixdim: float) -> Callable[[], bytes]:
    """The image placed by its qform alone, with these voxel sizes."""

    def made() -> bytes:
        raw = packed(body()[0])
        raw[254:256] = struct.pack("<h", 0)
        raw[80:92] = struct.pack("<3f", *pixdim)
        return bytes(raw)

    return made


def unplaced() -> bytes:
    raw = packed(body()[0])
    raw[252:256] = bytes(4)
    return bytes(raw)


def told_twice() -> bytes:
    raw = packed(body()[0])
    raw[280:284] = struct.pack("<f", -2.0)
    return bytes(raw)


def moved(**mm: float) -> np.ndarray:
    place = PLACE.copy()
    place[:3, 3] += [mm.get(axis, 0.0) for axis in "xyz"]
    return place


def two_forms(qform: np.ndarray) -> Callable[[], bytes]:
    """The image with a qform of its own beside the sform."""

    def made() -> bytes:
        file = nib.Nifti1Image(body()[0], PLACE)
        file.set_sform(PLACE, 1)
        file.set_qform(qform, 1)
        return bytes(file.to_bytes())

    return made


def of_kind(kind: object) -> Callable[[], bytes]:
    return lambda: nib.Nifti1Image(np.ones((7, 9, 8), dtype=kind), PLACE).to_bytes()  # type: ignore[call-overload]


NAN, INF = float("nan"), float("inf")
REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "terabytes": (changed(42, "3h", 30000, 30000, 3000), "absurd size"),
    "gigabytes": (changed(42, "3h", 1000, 1000, 1000), "more voxels than the file can hold"),
    "no voxels": (changed(42, "3h", 0, 9, 8), "absurd size"),
    "negative voxels": (changed(42, "3h", -7, 9, 8), "absurd size|damaged"),
    "shorter": (lambda: bytes(packed(body()[0]))[:-10], "more voxels than the file can hold"),
    "longer": (lambda: bytes(packed(body()[0])) + bytes(5000), "holds more than its header says"),
    "half the type": (lambda: bytes(packed(np.zeros((20, 20, 20), np.int16)))[:70]
                      + struct.pack("<hh", 2, 8)
                      + bytes(packed(np.zeros((20, 20, 20), np.int16)))[74:], "holds more"),
    "extensions": (changed(108, "f", 1e9), "absurd size"),
    "shear 0.9": (placed(x=[2, 0.9 * 3, 0, 0]), "axes at right angles"),
    "axes of no name": (
        placed(
            x=[1.0951, -2.0677, -1.8980, 0], y=[0.7776, 2.1351, -2.3404, 0],
            z=[1.4819, 0.4077, 2.6306, 0],
        ),
        "an axis 62 degrees away",
    ),
    "shear 2 degrees": (placed(x=[2, 0.035 * 3, 0, 0]), "axes at right angles"),
    "no orientation": (unplaced, "which side of the patient"),
    "two orientations": (told_twice, "in two ways"),
    "7.2 m": (placed(z=[0, 0, 900, 0]), "at most 4000 mm"),
    "zero spacing": (placed(y=[0, 0, 0, 0]), "voxels of 0.05 to 50 mm"),
    "far away": (placed(x=[2, 0, 0, 1e9]), "an affine of millimeters"),
    "nan affine": (placed(x=[2, NAN, 0, 0]), "an affine of millimeters"),
    "infinite affine": (placed(x=[2, 0, 0, INF]), "an affine of millimeters"),
    "zero pixdim": (by_qform(2, 0, 4), "no usable voxel size"),
    "negative pixdim": (by_qform(2, -3, 4), "no usable voxel size|damaged"),
    "nan pixdim": (by_qform(NAN, 3, 4), "no usable voxel size|damaged"),
    "1.5 mm in unnamed meters": (
        placed(x=[0.0015, 0, 0, 0], y=[0, 0.0015, 0, 0], z=[0, 0, 0.003, 0]), "meters",
    ),
    "1.5 mm in unnamed micrometers": (
        placed(x=[1500, 0, 0, 0], y=[0, 1500, 0, 0], z=[0, 0, 3000, 0]), "wrong by a factor",
    ),
    "other spacing": (two_forms(np.diag([2.0, 3.0, 5.0, 1.0])), "two ways where its voxels lie"),
    "other origin": (two_forms(moved(z=30.0)), "two ways where its voxels lie"),
    "origin of one voxel": (two_forms(moved(x=2.0)), "1.0 voxels apart"),
    "meters": (changed(123, "B", 1), "millimeters"),
    "microns": (changed(123, "B", 3), "millimeters"),
    "rgb": (of_kind([("R", "u1"), ("G", "u1"), ("B", "u1")]), "plain numbers"),
    "complex": (of_kind(np.complex64), "plain numbers"),
    "float128": (changed(70, "2h", 1536, 128), "plain numbers|damaged"),
    "slope infinite": (changed(112, "2f", INF, 0), "scl_slope is no number"),
    "intercept nan": (changed(112, "2f", 2, NAN), "damaged"),
    "slope tiny": (changed(112, "2f", 1e-30, 0), "leaves nothing"),
    "slope huge": (changed(112, "2f", 1e30, 0), "NaN or infinite|no HU"),
    "slope 10000": (changed(112, "2f", 1e4, 0), "no HU"),
    "empty": (lambda: b"", "damaged"),
    "text": (lambda: b"no image" * 100, "damaged"),
    "a pair's header": (lambda: bytes(packed(body()[0]))[:344] + b"ni1\0" + bytes(500), "damaged|more"),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("harm", REFUSED)
def test_what_a_header_may_not_say(harm: str, suffix: str, tmp_path: Path) -> None:
    made, says = REFUSED[harm]
    image = put(tmp_path, "i", made(), suffix)
    files = CaseFiles(case="0", image=image, label=put(tmp_path, "l", packed(body()[1]), suffix))
    if suffix == ".nii.gz":  # what a plain file's size tells, a stream tells when it is read
        says += {"shorter": "|damaged", "gigabytes": "|damaged"}.get(harm, "")
    tracemalloc.start()
    with pytest.raises(DataError, match=says) as err:
        read_case(files, LITS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MEMORY
    assert err.value.where == image
    assert {"expected", "got", "next_step"} <= set(err.value.fields())


@pytest.mark.parametrize("shape", [(30000, 30000, 3000), (1000, 1000, 1000)])
def test_a_claim_of_size_costs_no_memory_in_any_reader(
    shape: tuple[int, int, int], tmp_path: Path
) -> None:
    raw = changed(42, "3h", *shape)()
    for suffix in (".nii", ".nii.gz"):
        path = put(tmp_path, "i", raw, suffix)
        readers: tuple[Callable[[Path], object], ...] = (
            load, voxels, grid, values_of, lambda p: list(content(p)),
            VolumeCache(tmp_path)._file_hash,
        )  # fmt: skip
        for reader in readers:
            tracemalloc.start()
            with pytest.raises(DataError, match=r"claims|damaged"):
                reader(path)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < MEMORY, reader


def test_a_stream_that_unpacks_to_more_than_its_header_says_is_left(tmp_path: Path) -> None:
    """80 MB of zeros behind a small header, in 400 kB."""
    path = tmp_path / "bomb.nii.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(packed(body()[0]))
        for _ in range(20):
            file.write(bytes(4 << 20))
    assert path.stat().st_size < 1 << 20
    for reader in (voxels, VolumeCache(tmp_path)._file_hash):
        tracemalloc.start()
        with pytest.raises(DataError, match="holds more than its header says"):
            reader(path)
        assert tracemalloc.get_traced_memory()[1] < MEMORY
        tracemalloc.stop()


def test_a_volume_larger_than_the_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(tmp_path, "i", packed(body()[0]))
    monkeypatch.setattr("clbench.data.nifti.memory_bytes", lambda: 1000)
    with pytest.raises(DataError, match="this machine's memory"):
        load(path)


def test_a_model_grid_of_absurd_size_is_refused(tmp_path: Path) -> None:
    image, label = body()
    place = np.diag([50.0, 50.0, 50.0, 1.0])
    files = CaseFiles(
        case="0",
        image=put(tmp_path, "i", packed(image, place)),
        label=put(tmp_path, "l", packed(label, place)),
    )
    fine = Preprocessing(spacing_mm=(0.05, 0.05, 0.05))
    with pytest.raises(DataError, match=f"at most {MAX_VOXELS} voxels"):
        preprocess(read_case(files, LITS), LITS, fine)


def test_a_flipped_bit_of_a_packed_file_is_seen(tmp_path: Path) -> None:
    """The checksum of a gzip stream stands behind the last voxel; a reader must go there."""
    path = tmp_path / "i.nii.gz"
    raw = bytearray(gzip.compress(packed(body()[0]), 0))  # stored: any byte may be changed
    raw[-20] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match="damaged"):
        voxels(path)


@pytest.mark.parametrize(
    ("slope", "inter", "factor", "offset"),
    [(0, 7, 1, 0), (NAN, 7, 1, 0), (NAN, NAN, 1, 0), (1, 0, 1, 0), (0.5, -24, 0.5, -24),
     (-1, 0, -1, 0), (2, 1024, 2, 1024)],
)  # fmt: skip
def test_slope_and_intercept_are_applied_as_the_standard_says(
    slope: float, inter: float, factor: float, offset: float, tmp_path: Path
) -> None:
    path = put(tmp_path, "i", changed(112, "2f", slope, inter)())
    np.testing.assert_array_equal(voxels(path), body()[0] * factor + offset)


@pytest.mark.parametrize("kind", ["<i2", ">i2", "<u2", ">f4", "<f8", "|u1", "<i8"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_voxels_are_those_of_nibabel(kind: str, suffix: str, tmp_path: Path) -> None:
    array = np.random.default_rng(1).integers(0, 200, (3, 4, 5, 1)).astype(kind)
    for form in (nib.Nifti1Image, nib.Nifti2Image):
        path = put(tmp_path, "i", packed(array, kind=form), suffix)
        got = voxels(path)
        np.testing.assert_array_equal(got, np.asanyarray(nib.load(path).dataobj))
        assert got.dtype.isnative
        got[0] = 0  # nobody else's memory
    assert grid(path)[0] == (3, 4, 5)


def test_every_axis_order_and_flip_ends_in_the_same_volume(tmp_path: Path) -> None:
    """All 48, of an oblique grid: the same voxels, bits and places."""
    image, label = body()
    turn = 0.3
    c, s = np.cos(turn), np.sin(turn)
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ affine[:3, :3]
    affine[:3, 3] = [-30, 12, 7]
    pre = Preprocessing(spacing_mm=(2.0, 3.0, 4.0))

    def read(stored: list[bytearray]) -> Volume:
        paths = [put(tmp_path, n, raw) for n, raw in zip("il", stored, strict=True)]
        return preprocess(
            read_case(CaseFiles(case="0", image=paths[0], label=paths[1]), LITS), LITS, pre
        )

    want = read([packed(image, affine), packed(label, affine)])
    assert len(CODES) == 48
    for codes in CODES:
        turned = nib.orientations.ornt_transform(
            nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt(tuple(codes))
        )
        stored = []
        for array in (image, label):
            file = nib.Nifti1Image(array, affine).as_reoriented(turned)
            assert "".join(nib.aff2axcodes(file.affine)) == codes
            stored.append(packed(np.asanyarray(file.dataobj), file.affine))
        got = read(stored)
        np.testing.assert_array_equal(got.image, want.image)
        np.testing.assert_array_equal(got.bits, want.bits)
        np.testing.assert_allclose(got.affine, want.affine, atol=1e-4)


@pytest.mark.parametrize("shape", [(33, 70, 2), (32, 64, 31), (1, 1, 1), (0, 5, 5)])
def test_any_order_in_memory_is_copied_to_rows(shape: tuple[int, int, int]) -> None:
    array = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    for stored in (array, np.asfortranarray(array), np.asfortranarray(array)[::-1, :, ::-1]):
        got = row_major(stored)
        np.testing.assert_array_equal(got, stored)
        assert got.flags.c_contiguous
        assert got.dtype == np.int16


def test_the_advice_about_two_places_leads_to_the_place_that_is_right(tmp_path: Path) -> None:
    label = put(tmp_path, "l", packed(body()[1]))
    expected = read_case(
        CaseFiles(case="0", image=put(tmp_path, "w", packed(body()[0])), label=label), LITS
    )
    for wrong in (np.diag([2.0, 3.0, 5.0, 1.0]), moved(y=12.0)):
        for which in ("sform", "qform"):  # is the right one
            path = tmp_path / "i.nii"
            path.write_bytes(two_forms(wrong)())
            if which == "qform":
                swapped = nib.load(path)
                swapped.set_sform(wrong, 1)
                swapped.set_qform(PLACE, 1)
                nib.save(swapped, path)
            files = CaseFiles(case="0", image=path, label=label)
            with pytest.raises(DataError, match="in two ways") as err:
                read_case(files, LITS)
            file = nib.load(path)
            copy = {
                "sform": "image.set_qform(image.get_sform())",
                "qform": "image.set_sform(image.get_qform())",
            }[which]
            assert copy in str(err.value.next_step)
            if which == "sform":
                file.set_qform(file.get_sform())
            else:
                file.set_sform(file.get_qform())
            nib.save(file, path)
            got = read_case(files, LITS)
            np.testing.assert_array_equal(got.bits, expected.bits)
            np.testing.assert_allclose(got.affine, expected.affine, atol=1e-5)
            assert header_notes(path) == []


def test_forms_that_differ_by_rounding_or_by_a_shear_that_no_qform_can_say_are_read(
    tmp_path: Path,
) -> None:
    sheared = PLACE.copy()
    sheared[0, 2] = 0.015 * 4
    file = nib.Nifti1Image(np.zeros((60, 60, 60), np.int16), sheared)
    file.set_sform(sheared, 1)
    file.set_qform(sheared, 1)
    nib.save(file, tmp_path / "i.nii")
    grid(tmp_path / "i.nii")
    grid(put(tmp_path, "r", two_forms(moved(x=0.004))()))


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda: bytes(packed(body()[0], np.eye(4))), "the affine is the identity"),
        (lambda: bytes(packed(body()[0], np.diag([-1.0, -1.0, 1.0, 1.0]))), "the identity"),
        (placed(x=[4, 0, 0, 0]), "pixdim"),
        (lambda: bytes(packed(body()[0])), None),
        (by_qform(2, 3, 4), None),
        (two_forms(moved(x=0.6)), "0.30 voxels apart"),
    ],
)
def test_what_is_odd_about_a_header_is_noted(
    made: Callable[[], bytes], says: str | None, tmp_path: Path
) -> None:
    notes = header_notes(put(tmp_path, "i", made()))
    assert len(notes) == (says is not None)
    assert says is None or says in notes[0]
