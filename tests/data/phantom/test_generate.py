"""The phantom: the same on every machine, anatomically placed, nested, varied, and written whole."""

from __future__ import annotations

import hashlib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from locations import ROOT

from clbench.data.catalog import build_catalog
from clbench.data.checks.course_splits import phantom_split
from clbench.data.labels import read_case
from clbench.data.layouts import LAYOUTS, find_cases
from clbench.data.phantom import anatomy
from clbench.data.phantom import generate as room
from clbench.data.phantom.anatomy import tissues
from clbench.data.phantom.generate import (
    domain_of,
    fingerprint,
    known_structures,
    label_values,
    make_case,
    make_phantom,
    tumor_free,
    version_of,
    with_all_organs,
)
from clbench.data.volume import Volume, preprocess
from clbench.errors import DataError, StoreError
from clbench.run.record import phantom_of
from clbench.spec import registry
from clbench.spec.benchmark import Benchmark, Preprocessing, Rescale, Source
from clbench.spec.settings import PhantomSettings, load_profile
from clbench.store import run_folder
from clbench.store.record import RunRecord

BENCH = registry.benchmark("tumor_ext")
BTCV, LITS = BENCH.sources
COARSE = PhantomSettings(spacing_mm=6.0)
CASES = {"btcv": ("1", "61", "2", "3"), "lits": ("0", "1", "2")}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("phantom")


@pytest.fixture(scope="module")
def folders(root: Path) -> dict[str, Path]:
    return make_phantom(root, BENCH.sources, CASES, COARSE)


@pytest.fixture(scope="module")
def volumes(folders: dict[str, Path]) -> list[Volume]:
    pre = Preprocessing(spacing_mm=(6.0, 6.0, 6.0))
    return [
        preprocess(read_case(files, source), source, pre)
        for source in BENCH.sources
        for files in LAYOUTS[source.layout].find(folders[source.name]).values()
    ]


def center(volume: Volume, name: str) -> np.ndarray:
    """(3,) in RAS mm."""
    (mask,) = volume.labels([name], (slice(None),) * 3)
    voxels = np.argwhere(mask == 1).mean(0)
    return np.asarray(volume.affine[:3, :3] @ voxels + volume.affine[:3, 3])


def test_every_annotated_structure_is_there_and_others_are_not(volumes: list[Volume]) -> None:
    for v in volumes:
        every = (slice(None),) * 3
        for name in BENCH.structures(2):
            (mask,) = v.labels([name], every)
            if name not in v.annotated:
                assert (mask == 255).all()
            elif name == "liver_tumor":
                assert bool((mask == 1).any()) is not tumor_free(v.case)
            elif name != "gall_bladder":  # a few bodies have none, as among patients
                assert (mask == 1).sum() > 2, (v.case, name)


def test_volumes_are_those_of_bodies(volumes: list[Volume]) -> None:
    for v in volumes:
        ml = 0.001 * abs(float(np.linalg.det(v.affine[:3, :3])))
        for name in v.annotated - {"liver_tumor"}:
            low, high = tissues()[name].vol_ml
            (mask,) = v.labels([name], (slice(None),) * 3)
            volume = float((mask == 1).sum()) * ml
            if name == "gall_bladder" and not volume:
                continue
            # coarse voxels lose or gain a rim of thin structures
            assert 0.4 * low <= volume <= 1.6 * high, (v.case, name, volume)


def test_the_body_lies_as_patients_do(volumes: list[Volume]) -> None:
    for v in volumes:
        if v.source != "btcv":
            continue
        liver, spleen = center(v, "liver"), center(v, "spleen")
        assert (
            liver[0] > spleen[0]
        )  # RAS: x grows to the patient's right here means the liver is right
        assert center(v, "stomach")[1] > center(v, "left_kidney")[1]  # front of the kidney
        assert center(v, "esophagus")[2] > center(v, "left_kidney")[2]
        if "right_kidney" in v.annotated:
            assert center(v, "right_kidney")[0] > center(v, "left_kidney")[0]
            assert center(v, "postcava")[0] > center(v, "aorta")[0]
            assert center(v, "right_adrenal_gland")[2] > center(v, "right_kidney")[2]


def test_spine_behind_and_lungs_above(volumes: list[Volume]) -> None:
    v = volumes[0]
    bone = v.image > 200
    air = v.image < -600
    assert np.argwhere(bone)[:, 1].mean() < 0.45 * v.image.shape[1]  # y grows to the front
    inside = air[10:-10, 8:-8]
    levels = inside.any(axis=(0, 1))
    assert levels[-3:].all()  # lung bases at the top
    assert inside[:, :, -3:].sum() > 5 * inside[:, :, :3].sum()


def test_tumors_lie_in_the_liver_and_are_darker(volumes: list[Volume]) -> None:
    for v in volumes:
        if v.source != "lits" or tumor_free(v.case):
            continue
        liver, tumor = v.labels(["liver", "liver_tumor"], (slice(None),) * 3)
        assert (liver[tumor == 1] == 1).all()
        healthy = v.image[(liver == 1) & (tumor == 0)].mean()
        assert 10 < healthy - v.image[tumor == 1].mean() < 50


def test_about_one_in_seven_has_no_tumor() -> None:
    free = [tumor_free(str(i)) for i in range(200)]
    assert sum(free) == 30
    split = BENCH.steps[1].phantom_split
    for part in (split.train, split.test):
        assert 0 < sum(tumor_free(c) for c in part) < len(part) / 2


@pytest.mark.parametrize("name", ["body_ext", "body_ext_totalseg"])
def test_the_courses_of_the_body_find_all_they_teach(name: str, root: Path) -> None:
    """Vessels of a few voxels included, in every case, at the grid `quick` trains on."""
    spacing_mm = load_profile("quick").data.spacing_mm
    assert spacing_mm is not None
    bench = registry.benchmark(name)
    source = bench.reads(bench.sources[0].name)
    cases = {source.name: ("1", "2", "3") if name == "body_ext" else ("s0001", "s0002", "s0003")}
    pre = Preprocessing(spacing_mm=spacing_mm)
    made = make_phantom(root, [source], cases, PhantomSettings())
    taught = bench.structures(3)
    thick = set()
    for files in find_cases(made[source.name], source).values():
        volume = preprocess(read_case(files, source), source, pre)
        label = volume.labels(taught, (slice(None),) * 3)
        counts = dict(zip(taught, (label == 1).sum(axis=(1, 2, 3)).tolist(), strict=True))
        counts.pop("gall_bladder")  # a few bodies have none, as among patients
        assert min(counts.values()) > 0, counts
        axes = np.linalg.norm(volume.native_affine[:3, :3], axis=0)
        thick.add(round(float(axes.max()), 1))
        if name == "body_ext":  # arterial: the aorta outshines the vein beside it
            aorta, vein = (volume.image[label[taught.index(n)] == 1].mean()
                           for n in ("aorta", "postcava"))  # fmt: skip
            assert aorta > vein + 30
    if name == "body_ext":
        assert 5.2 < min(thick) < 6.1  # the others have slices of 5 and 6.5 mm


def test_subjects_and_sources_differ(volumes: list[Volume]) -> None:
    btcv = [v for v in volumes if v.source == "btcv"]
    livers = [center(v, "liver") for v in btcv]
    assert np.std([c[2] for c in livers]) > 0.5
    noise = {}
    for v in volumes:
        (liver,) = v.labels(["liver"], (slice(None),) * 3)
        noise.setdefault(v.source, []).append(float(v.image[liver == 1].mean()))
    assert abs(np.mean(noise["btcv"]) - np.mean(noise["lits"])) > 5  # another phase
    spacings = {
        v.source: tuple(np.linalg.norm(v.native_affine[:3, :3], axis=0).round(1)) for v in volumes
    }
    assert spacings["btcv"] != spacings["lits"]


def test_neighbors_touch(volumes: list[Volume]) -> None:
    """Liver and right kidney come within a voxel or two of each other in some body."""
    from scipy.ndimage import binary_dilation

    met = []
    for v in volumes:
        if {"liver", "right_kidney"} <= v.annotated:
            liver, kidney = v.labels(["liver", "right_kidney"], (slice(None),) * 3)
            met.append(bool((binary_dilation(liver == 1, iterations=2) & (kidney == 1)).any()))
    assert any(met)


@pytest.mark.parametrize("source", [BTCV, LITS], ids=lambda s: s.name)
def test_a_case_depends_on_its_name_alone(source: Source) -> None:
    one, again = (make_case(source, "5", 10.0) for _ in range(2))
    other = make_case(source, "6", 10.0)
    np.testing.assert_array_equal(one.image, again.image)
    np.testing.assert_array_equal(one.label, again.label)
    assert one.label.shape != other.label.shape or (one.label != other.label).any()


@pytest.mark.parametrize("version", [2, 3])
def test_labels_are_these_on_every_machine(version: int) -> None:
    """A change here moves every phantom number: raise PHANTOM_VERSION."""
    marks = {}
    for source, case in ((BTCV, "1"), (LITS, "0")):
        made = make_case(source, case, 10.0, version)
        marks[source.name] = hashlib.sha256(
            np.array(made.label.shape).tobytes() + np.ascontiguousarray(made.label).tobytes()
        ).hexdigest()[:16]
    assert marks == MARKS[version]


def test_versions_that_can_be_made_are_named() -> None:
    assert PhantomSettings().version == room.PHANTOM_VERSION
    assert {PhantomSettings(version=version).version for version in room.DOMAINS} == {2, 3}
    with pytest.raises(DataError, match="cannot be made any more") as err:
        version_of("phantom-1-0123456789abcdef")
    assert "version 2, 3" in str(err.value)


def test_the_second_source_is_another_hospital() -> None:
    """Every way in which scanners, protocols and patients differ, and some of each in the image."""
    near, far = (domain_of(source, 3) for source in (BTCV, LITS))
    alike = [f.name for f in fields(near) if getattr(near, f.name) == getattr(far, f.name)]
    assert alike == []
    one, other = (make_case(source, "1", 12.0, 3) for source in (BTCV, LITS))
    size_mm = [
        np.array(made.image.shape) * np.abs(np.diag(made.affine)[:3]) for made in (one, other)
    ]
    assert (size_mm[1] < size_mm[0]).all()


def test_what_is_written_is_what_was_made(folders: dict[str, Path]) -> None:
    codes = set()
    for source in BENCH.sources:
        for files in LAYOUTS[source.layout].find(folders[source.name]).values():
            made = make_case(source, files.case, COARSE.spacing_mm)
            raw = read_case(files, source)
            want = nib.as_closest_canonical(nib.Nifti1Image(made.image, made.affine))
            np.testing.assert_array_equal(raw.image, np.asanyarray(want.dataobj))
            np.testing.assert_allclose(raw.affine, want.affine, atol=1e-4)
            codes.add(raw.file_axes)
    assert len(codes) > 1  # the readers meet more than one orientation


def test_it_is_made_once(
    folders: dict[str, Path], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_write", lambda *a: pytest.fail("made again"))
    assert make_phantom(root, BENCH.sources, CASES, COARSE) == folders


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = room._write

    def fail(folder: Path, source: Source, case: str, spacing: float) -> None:
        if case == "61":
            raise OSError(28, "No space left on device")
        real(folder, source, case, spacing)

    monkeypatch.setattr(room, "_write", fail)
    with pytest.raises(StoreError, match="No space left"):
        make_phantom(
            tmp_path, BENCH.sources, {"btcv": ("1", "61")}, replace(COARSE, spacing_mm=12.0)
        )
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    settings = PhantomSettings(train=1, validation=0, test=1, spacing_mm=20.0)
    name = fingerprint([LITS], {"lits": ["0"]}, settings)
    for other in (name, "phantom-3-another"):
        (tmp_path / f".{other}.99.0a1b2c3d.part" / "lits").mkdir(parents=True)
    make_phantom(tmp_path, [LITS], {"lits": ["0"]}, settings)
    assert [p.name for p in tmp_path.glob(".*")] == [".phantom-3-another.99.0a1b2c3d.part"]


@pytest.mark.parametrize(
    ("cases", "settings", "same"),
    [
        (CASES, COARSE, True),
        (CASES, replace(COARSE, spacing_mm=5.0), False),
        ({**CASES, "btcv": ("1",)}, COARSE, False),
        (CASES, replace(COARSE, train=3), True),  # the cases say what is made
    ],
)
def test_the_fingerprint(cases: Any, settings: PhantomSettings, same: bool) -> None:
    one = fingerprint(BENCH.sources, CASES, COARSE)
    assert (fingerprint(BENCH.sources, cases, settings) == one) is same
    assert one.startswith("phantom-3-")


def fingerprint_of(bench: str, settings: PhantomSettings) -> str:
    benchmark = registry.benchmark(bench)
    cases: dict[str, list[str]] = {source.name: [] for source in benchmark.sources}
    for number, step in enumerate(benchmark.steps, 1):
        cases[step.source] += phantom_split(step, number, settings).cases
    unique = {name: list(dict.fromkeys(ids)) for name, ids in cases.items()}
    return fingerprint(benchmark.sources, unique, settings)


@pytest.mark.parametrize(
    ("bench", "two", "three"),
    [
        ("tumor_ext", "phantom-2-31fd4c33ba730872", "phantom-3-8ac2d227ad746ee7"),
        ("body_ext", "phantom-2-9ad6ff4da9d94ca6", "phantom-3-897b1c685b5b43b9"),
    ],
)
def test_the_fingerprint_is_that_of_recorded_runs(
    bench: str, two: str, three: str, phantom_2_runs: Path
) -> None:
    """It is part of every run's id: one that moves would orphan all runs on the phantom."""
    assert fingerprint_of(bench, load_profile("quick").phantom) == three
    assert fingerprint_of(bench, PhantomSettings(version=2, test=8)) == two
    for folder in (phantom_2_runs / "reference", ROOT / "results" / "reference"):
        records = [RunRecord.read(run) for run in run_folder.find_runs(folder, bench=bench)]
        assert records
        for record in records:  # what a run is verified on is what it saw
            assert record.data_fingerprint == {2: two, 3: three}[phantom_of(record).version]


def test_the_fingerprint_follows_the_version() -> None:
    one, two = (fingerprint(BENCH.sources, CASES, replace(COARSE, version=v)) for v in (2, 3))
    assert one != two
    assert (version_of(one), version_of(two)) == (2, 3)


def test_shapes_of_ones_own_are_another_phantom(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = fingerprint(BENCH.sources, CASES, COARSE)
    assert anatomy.shapes_digest() == anatomy.SHAPES_DIGEST, (
        "shapes.toml moves voxels: it takes a version of its own, see PHANTOM_VERSION"
    )
    drawn = {**anatomy._SHAPES, "appendix": anatomy._SHAPES["colon"]}
    monkeypatch.setattr(anatomy, "_SHAPES", drawn)
    own = fingerprint(BENCH.sources, CASES, COARSE)
    thinner = {**drawn, "appendix": drawn["aorta"]}
    monkeypatch.setattr(anatomy, "_SHAPES", thinner)
    assert len({shipped, own, fingerprint(BENCH.sources, CASES, COARSE)}) == 3


@pytest.mark.parametrize("value", [255, 256, 500, 65535])
def test_label_values_of_any_size_can_be_written(value: int, tmp_path: Path) -> None:
    source = replace(BTCV, labels={1: "spleen", value: "liver"}, partial=(), ignored=())
    settings = replace(COARSE, spacing_mm=20.0)
    folder = make_phantom(tmp_path, [source], {"btcv": ("1",)}, settings)["btcv"]
    (files,) = find_cases(folder, source).values()
    label = np.asanyarray(nib.load(files.label).dataobj)
    assert set(np.unique(label).tolist()) == {0, 1, value}
    assert (label.dtype == np.uint8) is (value == 255)
    (liver,) = preprocess(
        read_case(files, source), source, Preprocessing(spacing_mm=(20.0, 20.0, 20.0))
    ).labels(["liver"], (slice(None),) * 3)
    assert (liver == 1).any()


@pytest.mark.parametrize("rescale", [Rescale(intercept=-1024), Rescale(slope=0.1)])
def test_the_phantom_is_read_in_hu_whatever_its_source_holds(
    rescale: Rescale, cache_root: Path
) -> None:
    """Its files are written in HU; the course's `rescale` is that of the hospital's images."""
    smoke = load_profile("smoke")
    told = replace(BENCH, sources=tuple(replace(s, rescale=rescale) for s in BENCH.sources))

    def image(bench: Benchmark) -> Any:
        made = build_catalog(
            bench,
            smoke.preprocessing(bench.preprocessing),
            data=None,
            cache_root=cache_root,
            phantom=smoke.phantom,
        )
        assert made.source(1).rescale is None
        return made.open(1, made.splits[0].train[0], "train").image

    np.testing.assert_array_equal(image(told), image(BENCH))


def test_what_it_does_not_have_is_refused(tmp_path: Path) -> None:
    rectum = replace(BTCV, labels={1: "rectum"}, partial=())
    with pytest.raises(DataError, match="no 'rectum'") as err:
        make_phantom(tmp_path, [rectum], {"btcv": ("1",)}, COARSE, needed=("rectum",))
    assert "--data" in str(err.value)


def test_as_many_test_patients_as_the_paper() -> None:
    tests = {"btcv": 12, "lits": 20}
    for step in BENCH.steps:
        split, paper = step.phantom_split, step.split
        assert (len(split.train), len(split.validation)) == (16, 4)
        assert len(split.test) == len(paper.test) == tests[step.source]
    organs = [len(BTCV.annotated(c)) for c in BENCH.steps[0].phantom_split.test]
    assert (organs.count(13), organs.count(8)) == (8, 4)  # as in the authors' list
    body = registry.benchmark("body_ext")
    for number, step in enumerate(body.steps, 1):
        assert len(phantom_split(step, number, PhantomSettings(test=None)).test) == 20
    eight = [c for c in BENCH.steps[0].phantom_split.cases if len(BTCV.annotated(c)) == 8]
    assert 4 <= len(eight) <= 12


MARKS = {
    2: {"btcv": "a2e18b40fc17aa19", "lits": "8c1c162555b69423"},
    3: {"btcv": "adedf54adb4e6a70", "lits": "ba84d21f3d678bfc"},
}
"""Version → SHA-256 of a label map's shape and voxels."""


@pytest.mark.parametrize("harm", ["cut", "gone", "altered"])
def test_a_damaged_phantom_is_mended(harm: str, tmp_path: Path) -> None:
    settings = PhantomSettings(train=1, validation=0, test=1, spacing_mm=20.0)
    source = registry.benchmark("tumor_ext").source("lits")
    where = make_phantom(tmp_path, [source], {"lits": ["0"]}, settings)["lits"]
    file = next(p for p in sorted(where.rglob("*.nii*")))
    whole = file.read_bytes()
    if harm == "cut":
        file.write_bytes(whole[:-7])
    elif harm == "gone":
        file.unlink()
    else:
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    make_phantom(tmp_path, [source], {"lits": ["0"]}, settings)
    assert file.read_bytes() == whole
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["lits", "jhh"])
def test_every_organ_is_known_where_the_source_does_not_annotate_it(name: str) -> None:
    """The same body, image and grid; what the source does annotate is annotated alike."""
    benches = [BENCH, registry.benchmark("body_ext")]
    source = next(s for bench in benches for s in bench.sources if s.name == name)
    complete = with_all_organs(source)
    known = set(known_structures()) - ({"liver_tumor"} - set(source.structures))
    assert set(complete.structures) == known
    plain, full = (make_case(s, "2", 12.0) for s in (source, complete))
    assert np.array_equal(plain.image, full.image)
    assert np.array_equal(plain.affine, full.affine)
    own, every = label_values(source), label_values(complete)
    for structure in set(own) & set(every) - {"liver"}:  # a tumor's voxels carry its own value
        pair = [every[n] for n, value in own.items() if value == own[structure]]
        one, same = plain.label == own[structure], np.isin(full.label, pair)
        assert np.array_equal(one, same), structure
    if name == "lits":
        assert (full.label == every["spleen"]).any()
        assert not with_all_organs(complete).partial
