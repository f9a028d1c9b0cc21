"""The embedded phantom: procedural abdominal CTs, written as NIfTI in the layout of each source.

It stands in for patients where no data is named: a benchmark's sources become folders of CTs that
the ordinary readers read. The bodies come from `clbench.data.phantom.body`; here they become
images (phase, partial volume, noise) and label maps, once, under a name that holds everything they
depend on.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from clbench.data.layouts import find_layout
from clbench.data.phantom import body
from clbench.data.phantom.anatomy import ORDER, SHAPES_DIGEST, shapes_digest, tissues
from clbench.data.phantom.body import Canvas, RandomStream, Subject, draw_subject, fill
from clbench.errors import DataError, StoreError
from clbench.spec.benchmark import Source
from clbench.spec.settings import PhantomSettings
from clbench.spec.taxonomy import ancestors, with_descendants
from clbench.store.files import atomic_folder, locked, remove_parts, sha256
from clbench.types import Floats, triple

PHANTOM_VERSION = 3
"""Of the phantom that runs take by default. Any change that moves a voxel is a version of its own
in `DOMAINS`; phantoms of two versions never share a folder.

All versions there can be made (`PhantomSettings.version`), so that a recorded run can be verified
and scored again on the images it saw. Their bodies are drawn by the same code from other random
numbers.
"""

FIELD_MM = (346.0, 244.0, 250.0)
"""Field of view where a domain has none of its own: width, depth, height."""
SUPERSAMPLE_FROM_MM = 3.5
"""From this spacing on each voxel is the mean of 2 x 2 x 2 points, finer ones are one point."""
TUMOR_CONTRAST_HU = (28.0, 42.0)
"""How far a tumor lies below its liver, drawn per case."""
TUMOR_FREE = (3, 20)
"""That many of so many cases of a source with tumors hold none."""
BLUR = 0.06
"""Share of the noise that each in-plane neighbour lends: the scanner's texture."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Domain:
    """How the scanner and protocol of one source differ from another's."""

    spacing_mm: tuple[float, float, float]
    """Voxel size at `PhantomSettings.spacing_mm` = 5: width, depth, slice."""
    enhancement: float
    """1 = portal venous phase, 0 = no contrast medium: every HU lies that far between the two."""
    noise_hu: float
    """Standard deviation of the noise."""
    orientations: tuple[str, ...]
    """Axis codes the files are stored with, one drawn per case."""
    arterial_hu: float = 0.0
    """What arteries gain and veins lose in the arterial phase."""
    field_mm: tuple[float, float, float] | None = None
    """Field of view: width, depth, height. None: `FIELD_MM`."""
    body_size: tuple[float, float, float] | None = None
    """Mean size of the bodies over that of the standard torso: width, depth, height."""
    fat: float | None = None
    """Thickness of the fat under the skin over that of other sources."""


_BTCV = Domain(spacing_mm=(4.5, 4.5, 5.0), enhancement=1.0, noise_hu=9.0, orientations=("LAS",))
_LITS = Domain(
    spacing_mm=(5.0, 5.0, 4.0), enhancement=0.7, noise_hu=13.0, orientations=("RAS", "LPS")
)
_JHH = Domain(
    spacing_mm=(4.6, 4.6, 5.6),
    enhancement=0.85,
    noise_hu=11.0,
    orientations=("LPS",),
    arterial_hu=70.0,
)
DOMAINS: Mapping[int, Mapping[str, Domain]] = {
    2: {"btcv": _BTCV, "lits": _LITS, "jhh": _JHH},
    3: {
        "btcv": _BTCV,
        # another hospital: late arterial phase, fewer photons, thicker slices, a smaller field of
        # view, smaller bodies with more fat. Meant to cost a model of BTCV's organs 0.05 to 0.09
        # Dice, as other hospitals cost published models (0.03 to 0.12); version 2 costs it 0.02.
        "lits": replace(
            _LITS,
            spacing_mm=(5.2, 5.2, 6.5),
            enhancement=0.55,
            noise_hu=18.0,
            arterial_hu=30.0,
            field_mm=(330.0, 236.0, 236.0),
            body_size=(0.97, 0.95, 0.97),
            fat=1.3,
        ),
        "jhh": _JHH,
    },
}
"""Per version and layout; a source of any other layout draws its own."""
ARTERIES = (
    "aorta", "celiac_trunk", "superior_mesenteric_artery", "left_iliac_artery",
    "right_iliac_artery",
)  # fmt: skip
VEINS = ("postcava", "portal_and_splenic_vein")


def domain_of(source: Source, version: int = PHANTOM_VERSION) -> Domain:
    """The acquisition that a source's cases share."""
    if source.layout in DOMAINS[version]:
        return DOMAINS[version][source.layout]
    stream = RandomStream(version, source.name, "domain")
    plane = stream.uniform(4.2, 5.0)
    return Domain(
        spacing_mm=(plane, plane, stream.uniform(3.5, 5.0)),
        enhancement=stream.uniform(0.6, 1.0),
        noise_hu=stream.uniform(8.0, 14.0),
        orientations=("RAS", "LPS"),
        arterial_hu=stream.uniform(0.0, 60.0),
    )


def tumor_free(case: str) -> bool:
    """Whether a case of a source with tumors holds none: exactly 3 of any 20 numbered cases."""
    few, many = TUMOR_FREE
    number = int(case) if case.isdecimal() else int(RandomStream("tumor-free", case).raw(1)[0] >> 8)
    return (7 * number + 5) % many < few


@dataclass(frozen=True, kw_only=True, slots=True)
class PhantomCase:
    """One CT in memory; arrays are indexed to the patient's left, to the back, up (LPS)."""

    image: npt.NDArray[np.int16]
    """HU, shape (X, Y, Z)."""
    label: npt.NDArray[np.unsignedinteger[Any]]
    """Label values of the source, shape (X, Y, Z); 8 bits where all values fit."""
    affine: Floats
    """Voxel → RAS mm, shape (4, 4)."""


def make_case(
    source: Source, case: str, spacing_mm: float, version: int = PHANTOM_VERSION
) -> PhantomCase:
    """One case of a source; it depends on nothing but these arguments and the version.

    Args:
        source: decides domain, label values and which structures the case annotates.
        case: case id.
        spacing_mm: see `PhantomSettings.spacing_mm`.
        version: see `PHANTOM_VERSION`.
    """
    key = f"{version}/{source.name}/{case}"
    domain, stream = domain_of(source, version), RandomStream(key, "grid")
    field_mm = domain.field_mm or FIELD_MM
    plane, slices = stream.uniforms(0.96, 1.04, 2).tolist()
    spacing = [
        base * jitter * spacing_mm / 5.0
        for base, jitter in zip(domain.spacing_mm, (plane, plane, slices), strict=True)
    ]
    factor = 2 if spacing_mm >= SUPERSAMPLE_FROM_MM else 1
    axes, counts = [], []
    for size, step, start in zip(
        field_mm, spacing, (-0.5 * field_mm[0], -0.5 * field_mm[1], 0.0), strict=True
    ):
        count = int(size / step)
        slack = 0.5 * (size - count * step)
        fine = np.arange(count * factor, dtype=np.float64)
        axes.append(start + slack + (fine + 0.5) * (step / factor))
        counts.append(count)
    has_tumors = "liver_tumor" in source.structures and not tumor_free(case)
    subject = _of_population(draw_subject(key, tumors=has_tumors), domain)
    canvas = fill(subject, triple(axes))
    image = _image(canvas, key, domain, factor)
    label = _label(canvas, source, case, factor)
    origin = [axis[0] + 0.5 * (factor - 1) * (axis[1] - axis[0]) for axis in axes]
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    affine[:3, 3] = [-origin[0], -origin[1], origin[2]]
    return PhantomCase(image=image, label=label, affine=affine)


def _of_population(subject: Subject, domain: Domain) -> Subject:
    """The subject as one of the domain's patients: of their size, with their fat."""
    size, fat = domain.body_size or (1.0, 1.0, 1.0), domain.fat or 1.0
    return replace(
        subject,
        scale=triple(a * b for a, b in zip(subject.scale, size, strict=True)),
        fat_mm=triple(fat * mm for mm in subject.fat_mm),
    )


def _blocks(fine: npt.NDArray[Any], factor: int) -> list[npt.NDArray[Any]]:
    """The points of each voxel: `factor`³ arrays of the voxel grid's shape."""
    steps = range(factor)
    return [fine[i::factor, j::factor, k::factor] for i in steps for j in steps for k in steps]


def tissue_hu(key: str, domain: Domain) -> dict[str, float]:
    """Mean HU of every tissue of one subject."""
    mean_hu = {}
    for name, row in tissues().items():
        mean = row.hu_native + domain.enhancement * (row.hu_pv - row.hu_native)
        mean_hu[name] = mean + body.VARIATION * row.hu_sd * RandomStream(key, "hu", name).normal()
    for name in ARTERIES[1:]:
        mean_hu[name] = mean_hu["aorta"]  # arteries hold the same blood
    for names, sign in ((ARTERIES, 1.0), (VEINS, -0.5)):
        for name in names:
            mean_hu[name] += sign * domain.arterial_hu
    for inner, outer in (("right_kidney", "left_kidney"), ("right_lung", "left_lung")):
        mean_hu[outer] = mean_hu[inner]  # both sides of one body enhance alike
    mean_hu["left_kidney_medulla"] = mean_hu["right_kidney_medulla"]
    contrast = RandomStream(key, "contrast").uniform(*TUMOR_CONTRAST_HU)
    mean_hu["liver_tumor"] = mean_hu["liver"] - contrast
    return mean_hu


def _image(canvas: Canvas, key: str, domain: Domain, factor: int) -> npt.NDArray[np.int16]:
    means = tissue_hu(key, domain)
    hu = np.array([means[name] for name in canvas.names])[canvas.tissue]
    texture = np.array([tissues()[name].texture_hu for name in canvas.names])[canvas.tissue]
    hu += texture * canvas.rough[1]
    parts = _blocks(hu, factor)
    mean = np.zeros(parts[0].shape)
    for part in parts:
        mean += part
    mean /= len(parts)
    mean += domain.noise_hu * _noise(RandomStream(key, "noise"), mean.shape)
    np.maximum(mean, -1024.0, out=mean)
    return np.rint(mean).astype(np.int16)


def _noise(stream: RandomStream, shape: tuple[int, ...]) -> Floats:
    """White noise, slightly blurred in plane, of sd 1: each deviate is four 16-bit uniform ones."""
    quarters = stream.raw(int(np.prod(shape))).view(np.uint16).reshape(-1, 4)
    total = quarters[:, 0].astype(np.float64)
    for i in (1, 2, 3):
        total += quarters[:, i]
    white = (total.reshape(shape) / 65536.0 - 2.0) * np.sqrt(3.0)
    for axis in (0, 1):
        white = (1.0 - 2.0 * BLUR) * white + BLUR * (
            np.roll(white, 1, axis) + np.roll(white, -1, axis)
        )
    out: Floats = white / ((1.0 - 2.0 * BLUR) * (1.0 - 2.0 * BLUR) + 2.0 * BLUR * BLUR)
    return out


def label_values(source: Source) -> dict[str, int]:
    """Structure → value in a label map; for sources with masks, numbers of our own."""
    if source.masks:
        return {name: i for i, name in enumerate(source.structures, 1)}
    # of several values for one structure the first
    both = [(name, value) for value, pair in sorted(source.sides.items())[::-1] for name in pair]
    return dict(both + [(name, value) for value, name in sorted(source.labels.items())[::-1]])


def _label(
    canvas: Canvas, source: Source, case: str, factor: int
) -> npt.NDArray[np.unsignedinteger[Any]]:
    """Label values: the structure that fills most of a voxel, if structures fill half of it."""
    annotated = source.annotated(case)
    values = label_values(source)
    shape = tuple(n // factor for n in canvas.tissue.shape)
    best, filled = np.zeros(shape, dtype=np.uint8), np.zeros(shape, dtype=np.uint8)
    label = np.zeros(shape, dtype=np.min_scalar_type(max(values.values())))
    parts: dict[str, list[int]] = {}
    for code, name in enumerate(canvas.names):
        if name in tissues() and tissues()[name].part_of:
            parts.setdefault(tissues()[name].part_of, []).append(code)
    tissue = _blocks(canvas.tissue, factor)
    for structure in [name for name in parts if name in (*ORDER, "liver_tumor")]:
        member = np.zeros(len(canvas.names), dtype=np.uint8)
        member[parts[structure]] = 1
        count = np.zeros(shape, dtype=np.uint8)
        for block in tissue:
            count += member[block]
        filled += count
        wins = count > best
        best[wins] = count[wins]
        shown = next((n for n in (structure, *ancestors(structure)) if n in annotated), None)
        label[wins] = values[shown] if shown else 0
    label[2 * filled.astype(np.int64) < factor**3] = 0
    return label


def with_all_organs(source: Source) -> Source:
    """The source as if its cases annotated every structure of the phantom.

    The bodies, images and grids are those of `source`: `make_case` draws them from the source's
    name and the case alone. Structures are numbered anew. Liver tumors stay a matter of sources
    that have them, for a body without is another body. Made for what looks at a run afterwards;
    `clbench.data.catalog` opens the source itself, so no training sees these labels.
    """
    names = [
        name
        for name in dict.fromkeys(row.part_of for row in tissues().values())
        if name in known_structures() and (name in source.structures or name != "liver_tumor")
    ]
    if source.masks:
        return replace(source, masks={name: name for name in names}, partial=())
    labels = dict(enumerate(names, 1))
    return replace(source, labels=labels, sides={}, ignored=(), partial=())


# ----------------------------------------------------------------------------------------- on disk


def fingerprint(
    sources: Sequence[Source], cases: Mapping[str, Sequence[str]], settings: PhantomSettings
) -> str:
    """A text that changes with version, settings, table, shapes, sources or cases.

    Args:
        sources: the data sets to generate.
        cases: source → ids of its subjects.
        settings: size, spacing and numbers of subjects.
    """
    table = {name: asdict(row) for name, row in tissues().items()}
    knobs = {
        "phantom.ORDER": ORDER,
        "phantom.PHANTOM_VERSION": settings.version,
        "phantom.FIELD_MM": FIELD_MM,
        "phantom.SUPERSAMPLE_FROM_MM": SUPERSAMPLE_FROM_MM,
        "phantom.TUMOR_CONTRAST_HU": TUMOR_CONTRAST_HU,
        "phantom.TUMOR_FREE": TUMOR_FREE,
        "phantom.BLUR": BLUR,
        "phantom.ARTERIES": ARTERIES,
        "phantom.VEINS": VEINS,
        "body.ORDER": ORDER,
        "body.VARIATION": body.VARIATION,
        "body.WARP_MM": body.WARP_MM,
        "body.WARP_LATTICE_MM": body.WARP_LATTICE_MM,
        "body.ROUGH_LATTICE_MM": body.ROUGH_LATTICE_MM,
        "body.GALL_BLADDER_ABSENT": body.GALL_BLADDER_ABSENT,
        "body.TUMOR_DIAMETER_MM": body.TUMOR_DIAMETER_MM,
        "body.TUMOR_DIAMETER_SPREAD": body.TUMOR_DIAMETER_SPREAD,
        "body.TUMOR_DIAMETER_LIMITS_MM": body.TUMOR_DIAMETER_LIMITS_MM,
        "body.TUMOR_COUNTS": body.TUMOR_COUNTS,
        "body.CAVITY_MM": body.CAVITY_MM,
    }
    content = {
        "version": settings.version,
        "spacing_mm": settings.spacing_mm,
        "knobs": knobs,
        "domains": {
            name: {field: value for field, value in asdict(domain).items() if value is not None}
            for name, domain in DOMAINS[settings.version].items()
        },
        "table": table,
        "sources": [
            {
                "name": source.name,
                "layout": source.layout,
                "labels": sorted(label_values(source).items()),
                "masks": sorted(source.masks.items()),
                "cases": [[case, source.annotated(case)] for case in cases.get(source.name, ())],
            }
            for source in sources
        ],
    }
    if (shapes := shapes_digest()) != SHAPES_DIGEST:  # not in the marks of recorded runs
        content["shapes"] = shapes
    text = json.dumps(content, sort_keys=True)
    return f"phantom-{settings.version}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def version_of(mark: str) -> int:
    """The version of the phantom that a fingerprint names.

    Raises:
        DataError: this clbench cannot make it.
    """
    version = mark.removeprefix("phantom-").partition("-")[0]
    if not version.isdecimal() or int(version) not in DOMAINS:
        raise DataError(
            "the phantom of this version cannot be made any more",
            expected=f"version {', '.join(map(str, DOMAINS))}",
            got=mark,
            next_step="use the clbench that made the run, or run it again",
        )
    return int(version)


CHECKSUMS = "checksums.json"
"""Beside the sources: file → SHA-256."""
_NEXT_STEP = "free some space or choose another cache folder"


def make_phantom(
    root: Path,
    sources: Sequence[Source],
    cases: Mapping[str, Sequence[str]],
    settings: PhantomSettings,
    needed: Sequence[str] = (),
) -> dict[str, Path]:
    """Write the phantom of a benchmark once and say where it lies.

    Two processes may ask at the same time: one writes, the other waits. A folder appears under its
    final name only when it is complete; one that was damaged or altered since is written again,
    file by file, since other processes may be reading in it.

    Args:
        root: where phantoms are kept; this one lies in `root / fingerprint(…)`.
        sources: the sources of the benchmark.
        cases: source → case ids to make. A case does not depend on which others are made.
        settings: voxel size.
        needed: structures that a course teaches; others a source names may be absent here.

    Returns:
        Source → folder in that source's layout.

    Raises:
        DataError: the phantom does not have a needed structure.
        StoreError: the folder cannot be written.
    """
    wanted = [source for source in sources if cases.get(source.name)]
    _check(needed)
    target = root / fingerprint(sources, cases, settings)
    folders = {source.name: target / source.name for source in wanted}
    if _whole(target):
        return folders

    def fill(folder: Path) -> None:
        jobs = [(source, case) for source in wanted for case in cases[source.name]]
        with ThreadPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
            list(pool.map(lambda job: _write(folder, job[0], job[1], settings), jobs))
        for source in wanted:
            index = find_layout(source.layout).index(cases[source.name])
            for name, text in index.items():
                _put(folder / source.name / name, text.encode())
        _seal(folder)

    lock = root / f"{target.name}.lock"
    with locked(
        lock, what="the phantom cannot be written", next_step=_NEXT_STEP, waiting=lambda: None
    ):
        if not _whole(target):  # another process may have made it while this one waited
            remove_parts(target)
            atomic_folder(target, fill, what="the phantom", next_step=_NEXT_STEP, in_use=True)
    return folders


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS)


def _seal(folder: Path) -> None:
    sums = {p.relative_to(folder).as_posix(): sha256(p) for p in _files(folder)}
    _put(folder / CHECKSUMS, json.dumps(sums, indent=1).encode())


def _whole(folder: Path) -> bool:
    """Whether every file of a phantom is there and as it was written."""
    try:
        listed = json.loads((folder / CHECKSUMS).read_text())
        return bool(listed) and all(sha256(folder / n) == d for n, d in listed.items())
    except (StoreError, OSError, ValueError, AttributeError):
        return False


def known_structures() -> frozenset[str]:
    """Every structure the phantom has."""
    return frozenset(
        row.part_of for row in tissues().values() if row.part_of in (*ORDER, "liver_tumor")
    )


def _check(needed: Sequence[str]) -> None:
    for name in needed:
        if name not in known_structures():
            raise DataError(
                f"the phantom has no {name!r}",
                expected=f"structures among {', '.join(sorted(known_structures()))}",
                got=name,
                next_step="give real data with --data, or draw it in data/phantom/shapes.toml",
            )


def _write(folder: Path, source: Source, case: str, settings: PhantomSettings) -> None:
    phantom_case = make_case(source, case, settings.spacing_mm, settings.version)
    codes = domain_of(source, settings.version).orientations
    stream = RandomStream(settings.version, source.name, case, "orientation")
    stored = codes[int(stream.uniform(0, len(codes)))]
    image, label = find_layout(source.layout).paths(folder / source.name, case)
    arrays: dict[Path, npt.NDArray[Any]] = {image: phantom_case.image}
    if label.suffix:
        arrays[label] = phantom_case.label
    else:  # a folder of masks; of two names for one structure the first
        stems = {name: stem for stem, name in reversed(list(source.masks.items()))}
        values = label_values(source)
        for name in source.annotated(case):
            inside = [values[n] for n in with_descendants(name, source.structures)]
            if name in known_structures():
                mask = np.isin(phantom_case.label, inside).astype(np.uint8)
                arrays[label / f"{stems[name]}.nii.gz"] = mask
    for path, array in arrays.items():
        file = _oriented(nib.Nifti1Image(array, phantom_case.affine), stored)
        file.header.set_xyzt_units("mm")
        file.set_sform(file.affine, 1)
        file.set_qform(file.affine, 1)
        content = file.to_bytes()
        if path.suffix == ".gz":
            content = gzip.compress(content, compresslevel=1, mtime=0)
        _put(path, content)


def _put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _oriented(image: nib.Nifti1Image, codes: str) -> nib.Nifti1Image:
    orientation = nib.orientations
    now = orientation.io_orientation(image.affine)
    return image.as_reoriented(
        orientation.ornt_transform(now, orientation.axcodes2ornt(tuple(codes)))
    )
