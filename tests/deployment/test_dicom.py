"""DICOM series: read in the right order and place, or refused by name."""

from __future__ import annotations

import copy
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom", reason='pip install "clbench[dicom]"')
from dicom_series import SPACING_MM, body, changed, series, write  # noqa: E402
from hypothesis import Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from pydicom.dataset import Dataset  # noqa: E402
from pydicom.uid import (  # noqa: E402
    UID,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from clbench.deployment.inputs import InputCase, find_inputs  # noqa: E402
from clbench.deployment.scan import Scan  # noqa: E402
from clbench.errors import ClbenchError, DataError, SettingError  # noqa: E402


def only(folder: Path, **more: str) -> InputCase:
    (case,) = find_inputs(folder, out=folder.parent / "out", **more)
    return case


def read(folder: Path, **more: str) -> Scan:
    return only(folder, **more).read()


def expected() -> np.ndarray:
    return body().transpose(2, 1, 0)  # columns, rows, slices


def test_a_series_is_put_in_order_and_place(tmp_path: Path) -> None:
    """Any order of names and slices; HU, not stored values; LPS becomes RAS."""
    for turned in (False, True):
        slices = series()[::-1] if turned else series()
        case = only(write(tmp_path / f"ct{turned}", slices))
        assert case.name == f"ct{turned}"
        scan = case.read()
        np.testing.assert_array_equal(scan.stored, expected())
        assert scan.stored.dtype == np.int16
        assert scan.grid.axes == "LPS"
        np.testing.assert_allclose(
            scan.grid.affine @ [1, 2, 3, 1],
            [9 - SPACING_MM[1], 14 - 2 * SPACING_MM[0], 50 + 3 * SPACING_MM[2], 1],
        )


def test_an_archive_is_read_like_its_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "ct", series())
    with zipfile.ZipFile(tmp_path / "p7.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in folder.iterdir():
            archive.write(path, f"study/ct/{path.name}")
        archive.writestr("__MACOSX/study/._IM003.dcm", b"resource fork")
    case, other = only(tmp_path / "p7.zip"), only(folder)
    assert case.name == "p7"
    np.testing.assert_array_equal(case.read().stored, other.read().stored)
    np.testing.assert_array_equal(case.read().grid.affine, other.read().grid.affine)
    assert case.checksum() == other.checksum()
    with zipfile.ZipFile(tmp_path / "p7.zip", "a", zipfile.ZIP_DEFLATED) as archive:
        for path in write(tmp_path / "second", series(number=2)).iterdir():
            archive.write(path, f"study/second/{path.name}")
    names = [c.name for c in find_inputs(tmp_path / "p7.zip", out=tmp_path / "o")]
    assert names == ["p7/study/ct", "p7/study/second"]


@pytest.mark.parametrize("name", ["/victim/a.dcm", "ct/../../a.dcm", "C:/a.dcm", "ct//a.dcm"])
def test_an_archive_that_leads_out_of_itself_is_refused(name: str, tmp_path: Path) -> None:
    """Cases are named after folders of the archive, and files are written under these names."""
    home = tmp_path / "cts"
    (first, *_) = write(home / "good", series()).iterdir()
    with zipfile.ZipFile(home / "evil.zip", "w") as archive:
        archive.write(first, "ct/a.dcm")
        archive.writestr(zipfile.ZipInfo(name), first.read_bytes())
    good, evil = sorted(find_inputs(home, out=tmp_path / "o"), key=lambda case: case.name != "good")
    assert (good.name, evil.name) == ("good", "evil")
    with pytest.raises(DataError, match="outside of itself"):
        evil.read()
    with pytest.raises(DataError, match="outside of itself"):
        find_inputs(home / "evil.zip", out=tmp_path / "o")


def test_series_and_nifti_files_are_found_together(tmp_path: Path) -> None:
    import nibabel as nib

    write(tmp_path / "in" / "p1" / "ct", series())
    write(tmp_path / "in" / "p2", series(number=2), ending="")
    (tmp_path / "in" / "p2" / "notes.txt").write_text("no slice")
    nib.save(nib.Nifti1Image(expected(), np.diag([2, 2.5, 3, 1])), tmp_path / "in" / "p3.nii.gz")
    cases = find_inputs(tmp_path / "in", out=tmp_path / "out")
    assert [c.name for c in cases] == ["p1/ct", "p2", "p3"]
    for case in cases:
        np.testing.assert_array_equal(case.read().stored, expected())


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEGLosslessSV1, JPEG2000Lossless])
def test_compressed_pixels_are_unpacked(syntax: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "ct", series())
    for path in folder.iterdir():
        _compress(path, syntax)
        assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == syntax
    np.testing.assert_array_equal(read(folder).stored, expected())


def _compress(path: Path, syntax: str) -> None:
    if syntax == RLELossless:
        data = pydicom.dcmread(path)
        data.compress(syntax, generate_instance_uid=False)
        data.save_as(path)
        return
    gdcm = pytest.importorskip("gdcm", reason='pip install "clbench[dicom]"')
    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    kinds = {
        JPEGLosslessSV1: gdcm.TransferSyntax.JPEGLosslessProcess14_1,
        JPEG2000Lossless: gdcm.TransferSyntax.JPEG2000Lossless,
        JPEGLSLossless: gdcm.TransferSyntax.JPEGLSLossless,
    }
    change.SetTransferSyntax(gdcm.TransferSyntax(kinds[syntax]))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()


def test_slices_that_are_there_twice_count_once(tmp_path: Path) -> None:
    slices = series()
    scan = read(write(tmp_path / "ct", [*slices, copy.deepcopy(slices[2])]))
    np.testing.assert_array_equal(scan.stored, expected())
    assert scan.notes == ("left out: 1 slices that are there twice",)


def test_what_is_no_slice_is_left_out_and_said(tmp_path: Path) -> None:
    scout = changed(
        series(number=3), None, lambda d: setattr(d, "ImageType", ["X", "Y", "LOCALIZER"])
    )

    def contours(data: Dataset) -> None:
        data.SOPClassUID, data.Modality = "1.2.840.10008.5.1.4.1.1.481.3", "RTSTRUCT"

    others = [scout[0], changed(series(number=4), 0, contours)[0]]
    scan = read(write(tmp_path / "ct", [*series(), *others]))
    np.testing.assert_array_equal(scan.stored, expected())
    assert scan.notes == ("left out: 1 of RTSTRUCT", "left out: 1 of localizer")


def test_what_media_and_vendors_add_is_left_out_and_said(tmp_path: Path) -> None:
    """A DICOMDIR lists what lies on a disk; a private object has a class that no table has."""
    folder = write(tmp_path / "ct", series())
    (listing,) = series(body(1), number=3)
    for place in (folder, folder.parent):
        listing.save_as(place / "DICOMDIR", enforce_file_format=True)
    assert [case.name for case in find_inputs(tmp_path, out=tmp_path / "o")] == ["ct"]

    def private(data: Dataset) -> None:
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = UID("1.3.12.2.1107.5.9.1")

    write(folder / "csa", changed(series(body(1), number=4), None, private), ending="")
    (csa,) = (folder / "csa").iterdir()
    csa.rename(folder / "csa.dcm")
    scan = read(folder)
    np.testing.assert_array_equal(scan.stored, expected())
    assert scan.notes == ("left out: 1 of private object 1.3.12.2.1107.5.9.1",)

    damaged = write(tmp_path / "other", series())
    victim = max(damaged.iterdir())
    before, uid, after = victim.read_bytes().rpartition(b"1.2.840.10008.5.1.4.1.1.2")
    assert before.count(uid) == 1  # of the preamble, which stays as it was
    victim.write_bytes(before + b"1.3.840.10008.5.1.4.1.1.2" + after)
    with pytest.raises(DataError, match="cannot be read"):
        read(damaged)


def test_a_damaged_archive_keeps_nothing_else_from_being_predicted(tmp_path: Path) -> None:
    write(tmp_path / "cts" / "p1", series())
    (tmp_path / "cts" / "bad.zip").write_bytes(b"PK no archive")
    bad, good = find_inputs(tmp_path / "cts", out=tmp_path / "o")
    assert (bad.name, good.name) == ("bad", "p1")
    np.testing.assert_array_equal(good.read().stored, expected())
    for ask in (bad.checksum, bad.read):
        with pytest.raises(DataError, match="archive cannot be read"):
            ask()


def test_whatever_byte_of_an_archive_is_damaged_no_other_error_escapes(tmp_path: Path) -> None:
    """zipfile raises half a dozen other errors than its own."""
    (tmp_path / "cts").mkdir()
    path = tmp_path / "cts" / "ct.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("p/a.txt", b"x" * 40)
        archive.writestr("p/b.txt", b"y" * 40)
    whole = path.read_bytes()
    for place in range(len(whole)):
        for value in (0, 255):
            path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            try:
                for case in find_inputs(tmp_path / "cts", out=tmp_path / "o"):
                    case.checksum()
            except DataError:
                continue


def test_slope_and_intercept_may_differ_from_slice_to_slice(tmp_path: Path) -> None:
    def shifted(data: Dataset) -> None:
        data.RescaleIntercept = -2048
        stored = np.frombuffer(data.PixelData, "<u2") + 1024
        data.PixelData = stored.astype("<u2").tobytes()

    np.testing.assert_array_equal(
        read(write(tmp_path / "ct", changed(series(), 1, shifted))).stored, expected()
    )

    def halves(data: Dataset) -> None:
        data.RescaleSlope = 0.5

    scan = read(write(tmp_path / "half", changed(series(), None, halves)))
    np.testing.assert_allclose(scan.stored, (expected() + 1024) / 2 - 1024)


def _tilt(data: Dataset) -> None:
    x, y, z = data.ImagePositionPatient
    data.ImagePositionPatient = [x, y + 0.2 * (z - 50), z]


def _aside(data: Dataset) -> None:
    x, y, z = data.ImagePositionPatient
    data.ImagePositionPatient = [x + 20, y, z]


def _set(**tags: object) -> Callable[[Dataset], None]:
    def change(data: Dataset) -> None:
        for name, value in tags.items():
            if value is None:
                delattr(data, name)
            else:
                setattr(data, name, value)

    return change


def _other_pixels(data: Dataset) -> None:
    data.SOPInstanceUID += ".9"
    data.PixelData = bytes(len(data.PixelData))


REFUSED = {
    "missing slice": (lambda s: s[:2] + s[3:], "slices are missing", "6 mm between"),
    "tilted gantry": (lambda s: changed(s, None, _tilt), "gantry was tilted", "11.3 degrees"),
    "shifted slice": (
        lambda s: changed(s, 3, _aside), "beside the line of the others", "at most 1 mm",
    ),
    "shifted last slice": (
        lambda s: changed(s, 5, _aside), "beside the line of the others", "20 mm sideways",
    ),
    "long cosines": (
        lambda s: changed(s, None, _set(ImageOrientationPatient=[2, 0, 0, 0, 2, 0])),
        "no two directions at right angles",
        "length 1",
    ),
    "slanted cosines": (
        lambda s: changed(s, None, _set(ImageOrientationPatient=[1, 0, 0, 0.6, 0.8, 0])),
        "no two directions at right angles",
        "[0.6, 0.8, 0",
    ),
    "two series": (lambda s: s + series(number=2), "more than one CT series", "abdomen 2"),
    "two phases": (
        lambda s: [*s, changed(s, 3, _other_pixels)[3]],
        "two slices at one place",
        "other pixels",
    ),
    "two sizes": (
        lambda s: changed(s, 2, _set(Rows=10, Columns=12)), "differ in Rows", "IM0",
    ),
    "two angles": (
        lambda s: changed(s, 2, _set(ImageOrientationPatient=[1, 0, 0, 0, 0, 1])),
        "differ in ImageOrientationPatient",
        "mixes several scans",
    ),
    "one slice": (lambda s: s[:1], "one slice", "whole series"),
    "no place": (
        lambda s: changed(s, 1, _set(ImagePositionPatient=None)),
        "does not say its ImagePositionPatient",
        "nothing",
    ),
    "no HU": (
        lambda s: changed(s, 1, _set(RescaleIntercept=None)), "RescaleIntercept", "PACS",
    ),
    "no spacing": (
        lambda s: changed(s, None, _set(PixelSpacing=[0, 1])), "usable PixelSpacing", "above 0",
    ),
    "color": (
        lambda s: changed(s, 1, _set(PhotometricInterpretation="MONOCHROME1")),
        "cannot be read",
        "MONOCHROME1",
    ),
    "MR": (
        lambda s: changed(s, None, _set(SOPClassUID="1.2.840.10008.5.1.4.1.1.4", Modality="MR")),
        "no CT series was found",
        "6 of MR",
    ),
    "many slices in a file": (
        lambda s: changed(s, None, _set(SOPClassUID="1.2.840.10008.5.1.4.1.1.2.1")),
        "many slices in one file",
        "dcm2niix",
    ),
    "cut pixels": (
        lambda s: changed(s, 1, lambda d: setattr(d, "PixelData", d.PixelData[:50])),
        "cannot be read",
        "IM0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_volume_is_refused_by_name(name: str, tmp_path: Path) -> None:
    change, what, detail = REFUSED[name]
    folder = write(tmp_path / "ct", change(series()))
    with pytest.raises(DataError, match=what) as err:
        read(folder)
    assert detail in str(err.value)
    assert err.value.next_step


def test_one_of_two_series_can_be_named(tmp_path: Path) -> None:
    both = series() + series(body() + 5, number=2)
    folder = write(tmp_path / "ct", both)
    scan = read(folder, uid=str(both[0].SeriesInstanceUID))
    np.testing.assert_array_equal(scan.stored, expected())
    with pytest.raises(DataError, match="series asked for is not here"):
        read(folder, uid="1.2.3")


@pytest.mark.parametrize(
    "odd",
    [
        {"ImageOrientationPatient": None},
        {"SOPClassUID": UID("1.2.840.10008.5.1.4.1.1.2.1")},
        {"SOPClassUID": UID("1.2.840.10008.9")},
    ],
    ids=["screen save", "many slices in a file", "unknown class"],
)
def test_what_is_odd_in_another_series_does_not_matter(
    odd: dict[str, object], tmp_path: Path
) -> None:
    wanted, other = series(), changed(series(body(1), number=2), None, _set(**odd))
    folder = write(tmp_path / "ct", [*wanted, *other])
    scan = read(folder, uid=str(wanted[0].SeriesInstanceUID))
    np.testing.assert_array_equal(scan.stored, expected())
    assert scan.notes == ("left out: 1 of other series",)
    if odd != {"SOPClassUID": UID("1.2.840.10008.9")}:
        with pytest.raises(DataError, match="more than one CT series") as err:
            read(folder)
        assert "--series" in str(err.value)


def test_a_file_that_should_be_a_slice_is_not_passed_over(tmp_path: Path) -> None:
    folder = write(tmp_path / "ct", series())
    (folder / "IM999.dcm").write_bytes(b"cut short")
    with pytest.raises(DataError, match="cannot be read") as err:
        read(folder)
    assert "IM999" in str(err.value)


def test_an_interrupted_copy_is_no_shorter_body(tmp_path: Path) -> None:
    """The last slices are empty files, or links to nowhere: no gap would tell."""
    folder = write(tmp_path / "ct", series())
    last = max(folder.iterdir(), key=lambda p: pydicom.dcmread(p).ImagePositionPatient[2])
    (folder / "notes").touch()  # empty, and not called a slice
    (folder / "latest").symlink_to(tmp_path / "nowhere")
    assert read(folder).stored.shape == expected().shape
    last.write_bytes(b"")
    with pytest.raises(DataError, match="cannot be read") as err:
        read(folder)
    assert last.name in str(err.value)
    last.unlink()
    last.symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match="cannot be read") as err:
        read(folder)
    assert last.name in str(err.value)


def test_slightly_uneven_slices_are_still_one_volume(tmp_path: Path) -> None:
    """Rounded positions and cosines, as scanners write them."""

    def rounded(data: Dataset) -> None:
        x, y, z = data.ImagePositionPatient
        data.ImagePositionPatient = [x + 0.9 * (z == 56), y, z]
        data.ImageOrientationPatient = [0.866, 0.5, 0, -0.5, 0.866, 0]

    scan = read(write(tmp_path / "ct", changed(series(), None, rounded)))
    np.testing.assert_array_equal(scan.stored, expected())


@settings(max_examples=15, phases=[Phase.generate])  # a slice takes a while to read
@given(st.data())
def test_a_damaged_file_ends_in_an_error_or_leaves_the_volume_whole(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = write(tmp_path_factory.mktemp("fuzz") / "ct", series())
    victim = sorted(folder.iterdir())[data.draw(st.integers(0, 5))]
    raw = bytearray(victim.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    victim.write_bytes(raw[: data.draw(st.integers(1, len(raw)))])
    try:
        scan = read(folder)
    except ClbenchError:
        return
    assert scan.grid.shape == expected().shape


def test_without_the_library_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "ct", series())
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(SettingError, match="not installed") as err:
        read(folder)
    assert 'pip install "clbench[dicom]"' in str(err.value)


def test_an_archive_that_is_damaged_or_encrypted_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ct.zip"
    path.write_bytes(b"PK no archive")
    with pytest.raises(DataError, match="archive cannot be read"):
        only(path)
