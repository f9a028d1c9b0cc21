"""Readers and label maps under fire: whatever a file says, a clear error or the right volume.

A few hundred inputs here; `tests/perf/fuzz_readers.py` tries many more, and leaves their number for
the README.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import struct
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from nifti_files import CODES, LITS, PLACE, body, packed

from clbench.data.cache import VolumeCache
from clbench.data.labels import read_case
from clbench.data.layouts import CaseFiles
from clbench.data.nifti import content, spacing_of, voxels
from clbench.data.volume import Volume, preprocess
from clbench.errors import DataError
from clbench.spec.benchmark import Preprocessing

INPUTS = int(os.environ.get("CLBENCH_FUZZ", "25"))
PRE = Preprocessing(spacing_mm=(2.0, 3.0, 4.0))
IMAGE, LABEL = body()
tried: dict[str, Counter[str]] = {}
"""Property → accepted and refused inputs; `tests/perf/fuzz_readers.py` reads it."""

fuzzed = settings(
    max_examples=INPUTS,
    deadline=None,
    derandomize="CLBENCH_FUZZ" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def put(folder: Path, image: bytes, label: bytes, suffix: str = ".nii") -> CaseFiles:
    files = CaseFiles(case="0", image=folder / f"i{suffix}", label=folder / f"l{suffix}")
    for path, raw in zip(files.files, (image, label), strict=True):
        path.write_bytes(gzip.compress(raw, 1) if suffix.endswith(".gz") else raw)
    return files


def read(what: str, files: CaseFiles) -> Volume | None:
    """The volume, or None where a clear error named the file. Anything else fails the test."""
    count = tried.setdefault(what, Counter())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nibabel's remarks on odd headers
            volume = preprocess(read_case(files, LITS), LITS, PRE)
    except DataError as err:
        refusal = err
    else:
        refusal = None
    if refusal is not None:
        assert any(str(p) in str(refusal) for p in files.files), refusal
        assert len(refusal.fields()) >= 3, refusal
        count["refused"] += 1
        return None
    count["accepted"] += 1
    assert volume.image.dtype == np.int16
    assert volume.bits.max(initial=0) <= 3
    assert not ((volume.bits & 2) & ~((volume.bits & 1) << 1)).any()  # a tumor lies in the liver
    assert np.isfinite(volume.affine).all()
    axes = volume.affine[:3, :3] / spacing_of(volume.affine)
    assert (np.diag(axes) > 0.5).all(), "not RAS"
    return volume


def both(what: str) -> None:
    """Neither answer is rare: a reader that refused everything would pass every test here."""
    total = sum(tried[what].values())
    assert min(tried[what]["accepted"], tried[what]["refused"]) >= max(1, 0.05 * total), tried[what]


FIELDS: dict[str, tuple[int, str]] = {
    "sizeof_hdr": (0, "i"), "dim0": (40, "h"), "dim1": (42, "h"), "dim2": (44, "h"),
    "dim3": (46, "h"), "dim4": (48, "h"), "dim5": (50, "h"), "intent": (68, "h"),
    "datatype": (70, "h"), "bitpix": (72, "h"), "pixdim0": (76, "f"), "pixdim1": (80, "f"),
    "pixdim3": (88, "f"), "vox_offset": (108, "f"), "scl_slope": (112, "f"),
    "scl_inter": (116, "f"), "xyzt_units": (123, "B"), "qform_code": (252, "h"),
    "sform_code": (254, "h"), "quatern_b": (256, "f"), "quatern_d": (264, "f"),
    "qoffset_x": (268, "f"), "srow_x0": (280, "f"), "srow_x1": (284, "f"),
    "srow_y1": (300, "f"), "srow_z3": (324, "f"), "magic": (344, "i"), "extension": (348, "i"),
}  # fmt: skip
RANGES = {"h": 1 << 15, "i": 1 << 31, "B": 256}


@st.composite
def broken(draw: st.DrawFn) -> tuple[str, bytes]:
    """A field of a NIfTI header, and bytes for it."""
    name = draw(st.sampled_from(sorted(FIELDS)))
    kind = FIELDS[name][1]
    if kind == "f":
        odd = st.sampled_from([0.0, -1.0, 0.5, 1e-30, 1e30, np.inf, -np.inf, np.nan, 352.0, 1e9])
        return name, struct.pack("<f", draw(odd | st.floats(width=32)))
    low = 0 if kind == "B" else -RANGES[kind]
    top = RANGES[kind] - 1
    near = [low, -1 if low else 0, 0, 1, 2, 3, 4, 7, 8, 16, 64, 128, min(512, top), top]
    return name, struct.pack(f"<{kind}", draw(st.sampled_from(near) | st.integers(low, top)))


@fuzzed
@given(
    st.lists(broken(), min_size=1, max_size=3), st.booleans(), st.sampled_from([".nii", ".nii.gz"])
)
@example([("vox_offset", struct.pack("<f", 1e9))], True, ".nii.gz")
@example([("datatype", struct.pack("<h", 128))], True, ".nii")  # RGB
def malformed_headers(
    tmp_path: Path, harm: list[tuple[str, bytes]], image: bool, suffix: str
) -> None:
    contents = [packed(IMAGE), packed(LABEL)]
    for name, raw in harm:
        place = FIELDS[name][0]
        contents[0 if image else 1][place : place + len(raw)] = raw
    read("malformed headers", put(tmp_path, bytes(contents[0]), bytes(contents[1]), suffix))


@fuzzed
@given(st.data())
def damaged_files(tmp_path: Path, data: st.DataObject) -> None:
    """Cut short or not, and some bytes replaced, before or after compression."""
    suffix = data.draw(st.sampled_from([".nii", ".nii.gz"]))
    files = put(tmp_path, bytes(packed(IMAGE)), bytes(packed(LABEL)), suffix)
    raw = bytearray(files.image.read_bytes())
    for _ in range(data.draw(st.integers(0, 2))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw)))]
    files.image.write_bytes(raw)
    read("damaged files", files)
    with contextlib.suppress(DataError):  # nothing else
        VolumeCache(tmp_path / "cache").content_hash(files)


@fuzzed
@given(st.sampled_from(CODES), st.permutations((2.0, 3.0, 4.0)), st.floats(-0.5, 0.5))
def orientations(tmp_path: Path, codes: str, spacing: list[float], turn: float) -> None:
    """Stored in any of the 48 orientations, oblique or not: the same RAS voxels."""
    affine = np.diag([*spacing, 1.0])
    c, s = np.cos(turn), np.sin(turn)
    affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ affine[:3, :3]
    affine[:3, 3] = [-30.0, 12.0, 7.0]
    want = read("orientations", put(tmp_path, *(bytes(packed(a, affine)) for a in (IMAGE, LABEL))))
    assert want is not None
    turned = ornt_transform(io_orientation(affine), axcodes2ornt(tuple(codes)))
    stored = []
    for array in (IMAGE, LABEL):
        file = nib.Nifti1Image(array, affine).as_reoriented(turned)
        stored.append(bytes(packed(np.asanyarray(file.dataobj), file.affine)))
        assert "".join(nib.aff2axcodes(file.affine)) == codes
    got = read("orientations", put(tmp_path, stored[0], stored[1]))
    assert got is not None
    np.testing.assert_array_equal(got.image, want.image)
    np.testing.assert_array_equal(got.bits, want.bits)
    np.testing.assert_allclose(got.affine, want.affine, atol=1e-4)


numbers = st.floats(-5, 5) | st.floats(allow_nan=True, allow_infinity=True, width=32)


@st.composite
def affines(draw: st.DrawFn) -> np.ndarray:
    """Rotations and flips of a plausible grid, some sheared, some with numbers of any kind."""
    affine = np.diag([2.0, 3.0, 4.0])[:, draw(st.permutations(range(3)))]
    affine = affine * draw(st.tuples(*[st.sampled_from([1.0, -1.0])] * 3))
    for i, j in ((0, 1), (1, 2), (0, 2)):
        angle = draw(st.floats(-0.7, 0.7))
        turn = np.eye(3)
        turn[[i, i, j, j], [i, j, i, j]] = [
            np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle),
        ]  # fmt: skip
        affine = turn @ affine
    whole = np.column_stack([affine, draw(st.tuples(*[st.floats(-500, 500)] * 3))])
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        whole[draw(st.integers(0, 2)), draw(st.integers(0, 3))] = draw(numbers)
    return whole


@fuzzed
@given(affines(), st.sampled_from([True, True, True, False]))
def odd_affines(tmp_path: Path, rows: np.ndarray, same: bool) -> None:
    """Oblique, sheared, singular, huge or no number: refused, or turned to RAS as it says."""
    image, label = packed(IMAGE), packed(LABEL)
    for raw in (image, label) if same else (label,):
        raw[252:254] = struct.pack("<h", 0)  # no qform
        raw[280:328] = struct.pack("<12f", *np.float32(rows).ravel())
    volume = read("odd affines", put(tmp_path, bytes(image), bytes(label)))
    if volume is None:
        return
    # the tumor keeps its place in the world to within a voxel; it is one voxel wide, and may fall
    # between the samples of a coarser axis: then the liver does
    stored = np.float32(rows).astype(float) if same else PLACE[:3]
    pairs = [(LABEL == 2, volume.bits & 2), (LABEL > 0, volume.bits & 1)]
    inside, found = next(p for p in pairs if p[1].any())
    want = stored @ np.append(np.argwhere(inside).mean(0), 1)
    at = volume.affine[:3] @ np.append(np.argwhere(found).mean(0), 1)
    assert np.abs(at - want).max() < 4.5


@fuzzed
@given(
    st.sampled_from([np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64,
                     np.float32, np.float64]),
    st.sampled_from([0, 1, 2, 3, 254, 255, 0.5, 1.0000001, -1, 1e18, 2**40, np.nan, np.inf]),
    st.sampled_from([(1, 0), (0, 0), (np.nan, 0), (2, 0), (0.5, 0), (1, 1), (-1, 2), (1e-8, 1),
                     (1e20, 0)]) | st.tuples(numbers, numbers),
)  # fmt: skip
def label_values(tmp_path: Path, kind: Any, value: float, scale: tuple[float, float]) -> None:
    """A label is read as slope · value + intercept says, or refused; no voxel changes its name."""
    with np.errstate(all="ignore"):
        label = LABEL.astype(kind)
        label[3, 5, 4] = np.array(value).astype(kind)
        slope, inter = np.float32(scale[0]), np.float32(scale[1])
    raw = packed(label)
    raw[112:120] = struct.pack("<ff", slope, inter)
    volume = read("label values", put(tmp_path, bytes(packed(IMAGE)), bytes(raw)))
    plain = np.isnan(slope) or slope == 0 or (slope == 1 and inter == 0)
    truth = label.astype(np.float64)
    if not plain:
        truth = truth * float(slope) + float(inter)
    if volume is None:  # a label that means what the source defines is never refused
        assert not (plain and np.isin(truth, (0, 1, 2)).all())
        return
    whole = np.rint(truth)  # off it by no more than 32-bit arithmetic, else the file is refused
    assert not plain or np.abs(truth - whole).max() < 1e-5
    want = (whole == 1).astype(int) + 3 * (whole == 2).astype(int)
    box = tuple(slice(a, a + n) for a, n in zip(volume.start, volume.bits.shape, strict=True))
    np.testing.assert_array_equal(volume.bits, want[box])


@fuzzed
@given(st.tuples(*[st.floats(4.0, 8.0) | st.floats(1e-4, 1e6)] * 3))
def spacings(tmp_path: Path, spacing: tuple[float, float, float]) -> None:
    """A kilometer per voxel asks for no memory; what a scanner makes is read."""
    affine = np.diag([*spacing, 1.0])
    long = max(n * s for n, s in zip(IMAGE.shape, spacing, strict=True))
    if 100 < long <= 4000:  # readable, and slow
        return
    volume = read("spacings", put(tmp_path, *(bytes(packed(a, affine)) for a in (IMAGE, LABEL))))
    if long > 4000 or min(spacing) < 1e-3:
        assert volume is None
    elif min(spacing) >= 4:  # finer ones may fall between the voxels of the model's grid
        assert volume is not None


@fuzzed
@given(
    st.tuples(*[st.sampled_from([2, 100, 3000, 32767])] * 3),
    st.sampled_from([2, 16, 64, 768]),
    st.sampled_from([".nii", ".nii.gz"]),
)
def claims_of_size(tmp_path: Path, shape: tuple[int, int, int], kind: int, suffix: str) -> None:
    """A small file whose header claims up to terabytes, plain or packed."""
    raw = packed(IMAGE)
    raw[42:48] = struct.pack("<3h", *shape)
    raw[70:74] = struct.pack("<hh", kind, {2: 8, 16: 32, 64: 64, 768: 32}[kind])
    files = put(tmp_path, bytes(raw), bytes(packed(LABEL)), suffix)
    need = float(np.prod(shape, dtype=float)) * {2: 1, 16: 4, 64: 8, 768: 4}[kind]
    asks: tuple[Callable[[Path], Any], ...] = (voxels, lambda p: list(content(p)))
    for ask in asks if need > 5200 else ():  # the file holds a tenth, and may have a tail
        with pytest.raises(DataError, match=r"claims|damaged"):
            ask(files.image)
    assert read("claims of size", files) is None


PROPERTIES: tuple[Callable[..., None], ...] = (
    malformed_headers, damaged_files, orientations, odd_affines, label_values, spacings,
    claims_of_size,
)  # fmt: skip


@pytest.mark.parametrize("check", PROPERTIES, ids=lambda p: p.__name__)
def test_a_clear_error_or_the_right_volume(check: Callable[..., None], tmp_path: Path) -> None:
    check(tmp_path)
    what = check.__name__.replace("_", " ")
    if check is orientations:
        assert tried[what]["refused"] == 0
    elif check is not claims_of_size:  # all of which lie
        both(what)
