"""Reading and preprocessing: against MONAI, by hand, in every orientation, and with broken files."""

from __future__ import annotations

import gzip
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.transforms import CropForeground, Orientation, Spacing

from clbench.data.crops import draw_center
from clbench.data.labels import read_case
from clbench.data.layouts import CaseFiles
from clbench.data.volume import Volume, centers, preprocess, resample_linear, resampled_length
from clbench.errors import DataError
from clbench.evaluation.scoring import to_native
from clbench.spec.benchmark import Partial, Preprocessing, Source
from clbench.spec.settings import DataSettings

LITS = Source(name="lits", title="", layout="lits", labels={1: "liver", 2: "liver_tumor"})
PRE = Preprocessing(spacing_mm=(2.0, 2.0, 2.0))


def phantom(
    seed: int = 0, shape: tuple[int, int, int] = (14, 18, 11)
) -> tuple[np.ndarray, np.ndarray]:
    """HU with a body off-center in air, and a liver with a tumor."""
    rng = np.random.default_rng(seed)
    image = np.full(shape, -1000.0)
    image[3:12, 4:15, 2:10] = rng.uniform(-150, 300, (9, 11, 8))
    label = np.zeros(shape, dtype=np.uint8)
    label[5:9, 6:11, 3:8] = 1
    label[6:8, 7:9, 4:6] = 2
    return np.round(image).astype(np.int16), label


def affine(spacing: tuple[float, ...] = (1.3, 1.7, 3.1), turn: float = 0.0) -> np.ndarray:
    out = np.diag([*spacing, 1.0])
    c, s = np.cos(turn), np.sin(turn)
    out[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ out[:3, :3]
    out[:3, 3] = [-20.0, 13.0, 40.0]
    return out


def write(
    folder: Path,
    image: np.ndarray,
    label: np.ndarray,
    place: np.ndarray,
    label_place: np.ndarray | None = None,
) -> CaseFiles:
    folder.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(image, place), folder / "i.nii.gz")
    nib.save(
        nib.Nifti1Image(label, place if label_place is None else label_place), folder / "l.nii.gz"
    )
    return CaseFiles(case="0", image=folder / "i.nii.gz", label=folder / "l.nii.gz")


def volume(files: CaseFiles, source: Source = LITS, pre: Preprocessing = PRE) -> Volume:
    return preprocess(read_case(files, source), source, pre)


@pytest.mark.parametrize("turn", [0.0, 0.2])
def test_preprocessing_equals_monai(turn: float, tmp_path: Path) -> None:
    image, label = phantom()
    place = affine(turn=turn)
    got = volume(write(tmp_path, image, label, place))

    steps: list[tuple[str, np.ndarray]] = [
        ("bilinear", image.astype(np.float32)),
        ("nearest", label),
    ]
    made = []
    for mode, array in steps:
        tensor = MetaTensor(
            torch.from_numpy(array.astype(np.float32))[None], affine=torch.from_numpy(place)
        )
        tensor = Orientation(axcodes="RAS", labels=None)(tensor)
        made.append(Spacing(pixdim=PRE.spacing_mm, mode=mode, diagonal=False)(tensor))
    cut = CropForeground(select_fn=lambda x: x > -175, margin=0)
    box = cut.compute_bounding_box(made[0])
    want_image, want_label = (cut.crop_pad(m, *box) for m in made)
    assert got.image.shape == tuple(want_image.shape[1:])
    np.testing.assert_allclose(got.image, want_image[0].numpy(), atol=0.51)  # rounded to whole HU
    liver, tumor = got.labels(["liver", "liver_tumor"], (slice(None),) * 3)
    agree = (liver + tumor) == want_label[0].numpy()
    assert agree.mean() > 0.995  # MONAI decides ties by float32 rounding
    np.testing.assert_allclose(got.affine, want_image.affine.numpy(), atol=1e-6)


def test_linear_resampling_by_hand() -> None:
    image = np.zeros((3, 1, 1), np.float32)
    image[:, 0, 0] = [0, 10, 40]
    # 2 mm voxels at 0, 2, 4 mm → 1 mm voxels at 0, 1, 2, 3, 4 mm
    got = resample_linear(image, (2, 1, 1), (1, 1, 1))
    assert got[:, 0, 0].tolist() == [0, 5, 10, 25, 40]
    assert [resampled_length(n, 2.0, 1.5) for n in (1, 2, 3, 4)] == [1, 2, 4, 5]


def test_labels_are_native_overlap_and_partly_unknown(tmp_path: Path) -> None:
    image, label = phantom()
    files = write(tmp_path, image, label, affine((2.0, 2.0, 2.0)))
    got = volume(files)
    liver, tumor, spleen = got.labels(["liver", "liver_tumor", "spleen"], (slice(None),) * 3)
    assert liver.sum() == 4 * 5 * 5  # with its tumor
    assert tumor.sum() == 2 * 2 * 2
    assert (liver[tumor == 1] == 1).all()
    assert (spleen == 255).all()
    partial = replace(LITS, partial=(Partial(cases=("0",), annotates=("liver",)),))
    assert (volume(files, partial).labels(["liver_tumor"], (slice(None),) * 3) == 255).all()


def test_the_window_is_a_clipped_line(tmp_path: Path) -> None:
    image, label = phantom()
    got = volume(write(tmp_path, image, label, affine((2.0, 2.0, 2.0))))
    index = (slice(2, 5), slice(0, 4), slice(1, 3))
    hu = got.image[index].astype(np.float64)
    np.testing.assert_allclose(got.windowed(index), np.clip((hu + 175) / 425, 0, 1), atol=1e-6)
    assert got.windowed(index).dtype == np.float32


@pytest.mark.parametrize(
    "codes",
    [
        "".join(c)
        for p in itertools.permutations(range(3))
        for c in itertools.product(*[("LR", "AP", "IS")[i] for i in p])
    ],
)
def test_every_axis_order_and_flip_is_the_same_volume(codes: str, tmp_path: Path) -> None:
    image, label = phantom()
    place = affine()
    want = volume(write(tmp_path / "ras", image, label, place))
    turn = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(place), nib.orientations.axcodes2ornt(tuple(codes))
    )
    turned = [nib.Nifti1Image(a, place).as_reoriented(turn) for a in (image, label)]
    assert "".join(nib.aff2axcodes(turned[0].affine)) == codes
    got = volume(
        write(tmp_path / codes, *(np.asanyarray(t.dataobj) for t in turned), turned[0].affine)
    )
    np.testing.assert_array_equal(got.image, want.image)
    np.testing.assert_array_equal(got.bits, want.bits)
    np.testing.assert_allclose(got.affine, want.affine, atol=1e-9)
    np.testing.assert_array_equal(got.native_bits(), want.native_bits())


@settings(max_examples=40, deadline=None)
@given(
    spacing=st.tuples(*[st.floats(1.0, 4.0)] * 3),
    model=st.tuples(*[st.floats(0.7, 4.0)] * 3),
    shape=st.tuples(*[st.integers(10, 20)] * 3),
)
def test_the_way_back_is_the_nearest_model_voxel(
    spacing: tuple[float, ...], model: tuple[float, float, float], shape: tuple[int, int, int],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    image = np.full(shape, -1000, np.int16)
    image[2:-2, 1:-2, 2:-1] = 50
    place = affine(spacing)
    files = write(tmp_path_factory.mktemp("v"), image, np.zeros(shape, np.uint8), place)
    got = volume(files, pre=Preprocessing(spacing_mm=model))
    axes = got.native_axes()
    assert tuple(len(a) for a in axes) == got.native_shape
    for axis in range(3):
        native = np.arange(shape[axis]) * spacing[axis] + place[axis, 3]
        centers_mm = got.affine[axis, 3] + np.arange(got.image.shape[axis]) * model[axis]
        for mm, index in zip(native, axes[axis], strict=True):
            gap = np.abs(centers_mm - mm)
            if index >= 0:
                assert gap[index] <= gap.min() + 1e-4
                assert gap[index] <= model[axis] / 2 + 1e-4
            else:
                assert gap.min() >= model[axis] / 2 - 1e-4  # outside the cropped grid


def test_a_mask_survives_the_way_there_and_back(tmp_path: Path) -> None:
    image, label = phantom()
    got = volume(write(tmp_path, image, label, affine((2.0, 2.0, 2.0))))
    back = to_native(got.bits, got.native_axes())
    np.testing.assert_array_equal(back, got.native_bits())  # the grids coincide


def test_native_truth_is_the_file(tmp_path: Path) -> None:
    image, label = phantom()
    truth = volume(write(tmp_path, image, label, affine())).native_bits()
    np.testing.assert_array_equal((truth >> 1) & 1, label == 2)
    np.testing.assert_array_equal(truth & 1, label > 0)


def test_binary_masks_per_structure(tmp_path: Path) -> None:
    image, label = phantom()
    whole = write(tmp_path, image, label, affine())
    for name, mask in (("liver", label > 0), ("liver_tumor", label == 2)):
        nib.save(nib.Nifti1Image(mask.astype(np.uint8), affine()), tmp_path / f"{name}.nii.gz")
    split = replace(
        whole, label=tuple((n, tmp_path / f"{n}.nii.gz") for n in ("liver", "liver_tumor"))
    )
    np.testing.assert_array_equal(volume(split).bits, volume(whole).bits)


PAIR = Source(
    name="jhh", title="", layout="jhh", labels={1: "liver"}, ignored=(3,),
    sides={2: ("left_kidney", "right_kidney")},
)  # fmt: skip


def paired() -> np.ndarray:
    """Kidneys under one value; in RAS the left one has the smaller first index."""
    _, label = phantom()
    label[:] = 0
    label[2:4, 5:8, 3:6] = 2
    label[10:13, 6:9, 3:6] = 2
    label[6:8, 6:9, 3:6] = 1
    label[0, 0, 0] = 3
    return label


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "SRA"])
def test_a_pair_under_one_value_is_split_by_side(codes: str, tmp_path: Path) -> None:
    image, label = phantom()[0], paired()
    place = affine()
    turn = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(place), nib.orientations.axcodes2ornt(tuple(codes))
    )
    turned = [nib.Nifti1Image(a, place).as_reoriented(turn) for a in (image, label)]
    files = write(tmp_path, *(np.asanyarray(t.dataobj) for t in turned), turned[0].affine)
    raw = read_case(files, PAIR)
    index = np.indices(label.shape)[0]
    for name, want in (("left_kidney", (label == 2) & (index < 5)), ("liver", label == 1),
                       ("right_kidney", (label == 2) & (index > 5))):  # fmt: skip
        bit = raw.bits.dtype.type(1 << PAIR.structures.index(name))
        np.testing.assert_array_equal((raw.bits & bit) != 0, want, name)
    assert not raw.bits[0, 0, 0]  # an ignored value is background


def test_a_pair_across_the_midline_is_refused_unless_the_case_annotates_neither(
    tmp_path: Path,
) -> None:
    label = paired()
    label[2:13, 6:8, 4] = 2  # a horseshoe
    files = write(tmp_path, phantom()[0], label, affine())
    with pytest.raises(DataError, match="left and right under one label value") as err:
        read_case(files, PAIR)
    for part in (
        "l.nii.gz, value 2 (left_kidney and right_kidney)",
        "across the midline",
        "[[source.partial]] of 'jhh'",
    ):
        assert part in str(err.value)
    spared = replace(PAIR, partial=(Partial(cases=("0",), annotates=("liver",)),))
    assert (volume(files, spared).labels(["left_kidney"], (slice(None),) * 3) == 255).all()
    label[label == 2] = 0  # no kidney at all is a finding, not a fault
    got = volume(write(tmp_path, phantom()[0], label, affine()), PAIR)
    assert (got.labels(["left_kidney", "right_kidney"], (slice(None),) * 3) == 0).all()


def test_a_case_shows_a_part_of_its_annotation(tmp_path: Path) -> None:
    image, label = phantom()
    whole = volume(write(tmp_path, image, label, affine((2.0, 2.0, 2.0))))
    assert whole.showing(["liver", "liver_tumor", "spleen"]) is whole
    part = whole.showing(["liver_tumor"])
    liver, tumor = part.labels(["liver", "liver_tumor"], (slice(None),) * 3)
    assert (liver == 255).all()
    assert int(tumor.sum()) == 8
    assert part.counts == {0: whole.counts[0] + whole.counts[1], 2: 8}  # sampling hides it too
    assert len(part.where[0]) == part.counts[0]
    np.testing.assert_array_equal(part.native_bits(), whole.native_bits())


@pytest.mark.parametrize("as_masks", [False, True])
def test_what_a_case_does_not_annotate_is_hidden_though_its_file_holds_it(
    as_masks: bool, tmp_path: Path
) -> None:
    """All that the case annotates is shown, and crops are centered on nothing else."""
    image, label = phantom()
    label[9:11, 12:14, 3:5] = 3
    files = write(tmp_path, image, label, affine())
    part = (Partial(cases=(files.case,), annotates=("spleen",)),)
    source = replace(LITS, labels={**LITS.labels, 3: "spleen"}, partial=part)
    if as_masks:
        names = {"liver": (label > 0) & (label < 3), "spleen": label == 3}
        files = _masks(files, **{n: m.astype(np.uint8) for n, m in names.items()})
        source = Source(name="lits", title="", layout="totalsegmentator",
                        masks={n: n for n in names}, partial=part)  # fmt: skip
    whole = volume(files, source)
    assert whole.annotated == {"spleen"}
    shown = whole.showing(["spleen"])
    spleen = 1 << whole.names.index("spleen")
    assert set(whole.counts) > set(shown.counts) == {0, spleen}
    rng = np.random.default_rng(0)
    only = DataSettings(posneg=(1, 0))
    bits = {int(whole.bits[draw_center(shown, only, rng)]) for _ in range(50)}
    assert bits == {spleen}


def test_centers_count_every_pattern() -> None:
    bits = np.zeros((50, 50, 50), np.uint8)
    bits[:40] = 1
    bits[:2] = 3
    tissue = np.ones(bits.shape, bool)
    tissue[45:] = False
    where, counts = centers(bits, tissue)
    assert counts == {0: 5 * 2500, 1: 38 * 2500, 3: 2 * 2500}
    assert len(where[1]) == 50_000  # a subsample
    assert (bits.ravel()[where[1]] == 1).all()
    assert np.array_equal(where[1], centers(bits, tissue)[0][1])  # the same one every time


# ---------------------------------------------------------------------------------- broken files

Break = Callable[[Path, np.ndarray, np.ndarray], CaseFiles]


def _nan(folder: Path, image: np.ndarray, label: np.ndarray) -> CaseFiles:
    bad = image.astype(np.float32)
    bad[4, 4, 4] = np.nan
    return write(folder, bad, label, affine())


def _infinite(folder: Path, image: np.ndarray, label: np.ndarray) -> CaseFiles:
    bad = image.astype(np.float32)
    bad[4, 4, 3:5] = np.inf, -np.inf
    return write(folder, bad, label, affine())


def _nan_label(folder: Path, image: np.ndarray, label: np.ndarray) -> CaseFiles:
    bad = label.astype(np.float32)
    bad[4, 4, 4] = np.nan
    return write(folder, image, bad, affine())


def _flat_label(folder: Path, image: np.ndarray, label: np.ndarray) -> CaseFiles:
    return write(folder, image, np.stack([label, label], -1), affine())


def _masks(files: CaseFiles, **names: np.ndarray) -> CaseFiles:
    """The same case with a mask per structure."""
    folder = files.image.parent
    for name, mask in names.items():
        nib.save(nib.Nifti1Image(mask, affine()), folder / f"{name}.nii.gz")
    return replace(files, label=tuple((n, folder / f"{n}.nii.gz") for n in names))


def _mask_shape(folder: Path, image: np.ndarray, label: np.ndarray) -> CaseFiles:
    files = write(folder, image, label, affine())
    return _masks(files, liver=np.sign(label), liver_tumor=label[:-1])


def _mask_cut(folder: Path, image: np.ndarray, label: np.ndarray) -> CaseFiles:
    files = _masks(write(folder, image, label, affine()), liver=label)
    path = folder / "liver.nii.gz"
    path.write_bytes(path.read_bytes()[:-30])
    return files


def _mask_fraction(folder: Path, image: np.ndarray, label: np.ndarray) -> CaseFiles:
    return _masks(write(folder, image, label, affine()), liver=label * np.float32(0.3))


def _fractions(folder: Path, image: np.ndarray, label: np.ndarray) -> CaseFiles:
    return write(folder, image, label + np.float32(0.25), affine())


def _unknown(folder: Path, image: np.ndarray, label: np.ndarray) -> CaseFiles:
    label = label.copy()
    label[0, 0, :3] = 7
    return write(folder, image, label, affine())


def _negative(folder: Path, image: np.ndarray, label: np.ndarray) -> CaseFiles:
    return write(folder, image, label.astype(np.int16) - 1, affine())


def _moved(folder: Path, image: np.ndarray, label: np.ndarray) -> CaseFiles:
    place = affine()
    place[0, 3] += 0.2 * 1.3
    return write(folder, image, label, affine(), place)


def _shape(folder: Path, image: np.ndarray, label: np.ndarray) -> CaseFiles:
    return write(folder, image, label[:-1], affine())


def _flat(folder: Path, image: np.ndarray, label: np.ndarray) -> CaseFiles:
    return write(folder, image[:, :, 0], label[:, :, 0], affine())


def _four(folder: Path, image: np.ndarray, label: np.ndarray) -> CaseFiles:
    return write(folder, np.stack([image, image], -1), label, affine())


def _air(folder: Path, image: np.ndarray, label: np.ndarray) -> CaseFiles:
    return write(folder, np.full_like(image, -1000), label, affine())


def _cut(folder: Path, image: np.ndarray, label: np.ndarray) -> CaseFiles:
    files = write(folder, image, label, affine())
    files.image.write_bytes(files.image.read_bytes()[:-200])
    return files


def _garbled(folder: Path, image: np.ndarray, label: np.ndarray) -> CaseFiles:
    files = write(folder, image, label, affine())
    assert isinstance(files.label, Path)
    files.label.write_bytes(gzip.compress(b"this is no image" * 100))
    return files


def _absent(folder: Path, image: np.ndarray, label: np.ndarray) -> CaseFiles:
    files = write(folder, image, label, affine())
    files.image.unlink()
    return files


@pytest.mark.parametrize(
    ("harm", "file", "says"),
    [
        (_nan, "i.nii.gz", ["NaN or infinite", "1 such voxels"]),
        (_infinite, "i.nii.gz", ["NaN or infinite", "2 such voxels"]),
        (_nan_label, "l.nii.gz", ["not whole numbers", "nan"]),
        (_flat_label, "l.nii.gz", ["not one 3-D volume"]),
        (_mask_shape, "liver_tumor.nii.gz", ["different shapes"]),
        (_mask_cut, "liver.nii.gz", ["damaged"]),
        (_mask_fraction, "liver.nii.gz", ["not whole numbers", "0.3"]),
        (_fractions, "l.nii.gz", ["not whole numbers", "0.25"]),
        (_unknown, "l.nii.gz", ["7 (3 voxels)", "1 liver, 2 liver_tumor"]),
        (_negative, "l.nii.gz", ["negative", "-1"]),
        (_moved, "l.nii.gz", ["different places", "0.20 voxels"]),
        (_shape, "l.nii.gz", ["different shapes", "(13, 18, 11)"]),
        (_flat, "i.nii.gz", ["not one 3-D volume"]),
        (_four, "i.nii.gz", ["not one 3-D volume", "(14, 18, 11, 2)"]),
        (_air, "i.nii.gz", ["no voxel above -175 HU"]),
        (_cut, "i.nii.gz", ["damaged"]),
        (_garbled, "l.nii.gz", ["damaged or is not NIfTI"]),
        (_absent, "i.nii.gz", ["does not exist"]),
    ],
)
def test_broken_files_are_named(harm: Break, file: str, says: list[str], tmp_path: Path) -> None:
    files = harm(tmp_path, *phantom())
    with pytest.raises(DataError) as err:
        volume(files)
    for words in [file, *says]:
        assert words in str(err.value)


@pytest.mark.parametrize("kind", [np.float32, np.int32, np.uint16])
def test_whole_numbers_of_any_type_are_read(kind: Any, tmp_path: Path) -> None:
    image, label = phantom()
    want = volume(write(tmp_path / "a", image, label, affine()))
    got = volume(write(tmp_path / "b", image, label.astype(kind), affine()))
    np.testing.assert_array_equal(got.bits, want.bits)


def test_an_affine_off_by_less_than_a_tenth_of_a_voxel_is_accepted(tmp_path: Path) -> None:
    place = affine()
    place[0, 3] += 0.09 * 1.3
    volume(write(tmp_path, *phantom(), affine(), place))


def test_a_label_without_structures_is_a_valid_case(tmp_path: Path) -> None:
    image, label = phantom()
    got = volume(write(tmp_path, image, np.zeros_like(label), affine()))
    assert (got.labels(["liver", "liver_tumor"], (slice(None),) * 3) == 0).all()
    assert set(got.counts) == {0}
