"""One HTML file that shows a test case: image, truth, prediction after each step, slice by slice.

The page needs no network and no server. It holds whole volumes on the model's grid, on which
predictions are stored: gray levels as differences along axis 2, and per mask volume one number a
voxel that names its combination of structures; both packed by gzip, which browsers unpack
themselves (`DecompressionStream`).
"""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from clbench.data.catalog import Catalog, exam_cases
from clbench.data.nifti import spacing_of
from clbench.data.volume import Volume
from clbench.deployment.masks import paint_order
from clbench.errors import StoreError, unknown_name
from clbench.evaluation.predictions import Prediction, read_prediction, refuse_other_grid
from clbench.report.figures.slices import areas, best_slice, palette
from clbench.report.figures.style import name_of
from clbench.report.scores import title_of
from clbench.report.template import filled
from clbench.run.record import catalog_of
from clbench.store import files
from clbench.store.record import RunRecord
from clbench.store.run_folder import case_name, prediction_path, read_scores
from clbench.types import Bits

LARGEST_BYTES = 20_000_000
"""Of a page; gray levels are given up before it is exceeded."""
GRAY_LEVELS = (256, 128, 64, 32)
"""Numbers of gray levels of the window, the first that fits is taken."""
_PACKING = 6
"""Level of gzip."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """A picture of the page beside the bare image: truth, or the prediction after a step."""

    title: str
    """Above the picture."""
    packed: bytes
    """gzip of (D, H, W) numbers, uint8 or little-endian uint16: rows of `patterns`."""
    wide: bool
    """uint16."""
    patterns: list[list[int]]
    """Combinations of structures that occur, as positions in the course, inner ones last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CasePage:
    """A page written to disk."""

    path: Path
    """The file."""
    size_bytes: int
    """Of the file."""
    notes: tuple[str, ...]
    """What is not shown, and why."""


def write_case_page(
    run: Path,
    case: str,
    out: Path,
    *,
    data: str | None = None,
    cache: Path | None = None,
) -> CasePage:
    """Write the page of a test case of a run.

    Args:
        run: the run; it need not be finished.
        case: `source/case`, or the case id alone where one source has it.
        out: the file to write.
        data: where the data lies now, as in `clbench run --data`; None: where the run found it.
        cache: where preprocessed volumes and the phantom are kept; None: where the run kept them.

    Raises:
        UnknownName: no such test case; names the nearest, and all.
        StoreError: no stored predictions of the case, or of another grid; other data than the
            run's; the file cannot be written.
        DataError: the data cannot be read.
    """
    record = RunRecord.read(run)
    source, case_id = find_case(record, case)
    stored = stored_predictions(run, record, source, case_id)
    catalog = catalog_of(record, data=data, cache=cache)
    volume = _opened(catalog, source, case_id)
    for path, prediction in stored.values():
        refuse_other_grid(path, prediction, volume)
    steps = range(1, record.steps_done + 1)
    missing = [t for t in steps if t not in stored]
    notes = [f"no prediction is stored after step {t}" for t in missing]
    known = catalog.benchmark.structures(max(stored))
    if absent := [name for name in known if name not in volume.annotated]:
        notes.append(f"not annotated in this case: {', '.join(map(name_of, absent))}")
    panels = [_panel("truth", volume.bits, volume.names, known)]
    for step, (_, prediction) in stored.items():
        panels.append(_panel(f"after step {step}", prediction.bits, prediction.structures, known))
    html, levels = _fitting_page(run, record, volume, known, panels, notes, tuple(stored))
    content = html.encode()
    if levels < GRAY_LEVELS[0]:
        notes.append(f"{levels} gray levels, so that the page stays small")
    if len(content) > LARGEST_BYTES:
        notes.append("the volume is large: the page is beyond what some browsers open at once")
    files.atomic_write(
        out,
        lambda file: file.write(content),
        what="the page",
        next_step="free some disk space, or choose another file with --out",
    )
    return CasePage(path=out, size_bytes=len(content), notes=tuple(notes))


def find_case(record: RunRecord, case: str) -> tuple[str, str]:
    """(source, case id) of a test case.

    Args:
        record: of the run.
        case: `source/case`, or the case id alone.

    Raises:
        UnknownName: no test case of the run, or several sources have the id.
    """
    known = record.course.test_cases
    matches = [name for name in known if case in (name, name.partition("/")[2])]
    if len(matches) == 1:
        source, _, case_id = matches[0].partition("/")
        return source, case_id
    if matches:
        raise unknown_name("single test case", case, matches, "CASE")
    raise unknown_name("test case", case, known, "CASE")


def stored_predictions(
    run: Path, record: RunRecord, source: str, case: str
) -> dict[int, tuple[Path, Prediction]]:
    """Step → the file and content of the stored prediction of a case.

    Args:
        run: the run.
        record: its record.
        source: of the case.
        case: its id.

    Raises:
        StoreError: there is none, or one is damaged.
    """
    paths = {t: prediction_path(run, t, source, case) for t in range(1, record.steps_done + 1)}
    there = {t: path for t, path in paths.items() if path.is_file()}
    if not there:
        raise StoreError(
            "the run keeps no prediction of this case",
            where=run / "predictions",
            expected=f"stepN/{case_name(source, case)}.npz",
            got="predictions made elsewhere, which are not copied"
            if record.external
            else "no such file (published and imported runs hold none)",
            next_step="use the run's own folder, or repeat its command with --fresh "
            "--keep-predictions test",
        )
    return {t: (path, read_prediction(path)) for t, path in there.items()}


def _opened(catalog: Catalog, source: str, case: str) -> Volume:
    number = next(n for n, s, c in exam_cases(catalog) if (s, c) == (source, case))
    return catalog.cache.get(
        catalog.files[source][case], catalog.source(number), catalog.preprocessing
    )


# ------------------------------------------------------------------------------------ what is shown


def _panel(title: str, bits: Bits, names: Sequence[str], known: Sequence[str]) -> Panel:
    """A mask volume, packed.

    Args:
        title: of the picture.
        bits: (D, H, W), bit k = names[k].
        names: of the bits.
        known: structures of the page; bits of others are not shown.
    """
    values, index = np.unique(bits, return_inverse=True)
    wide = len(values) > 256
    numbers = index.reshape(bits.shape).astype("<u2" if wide else np.uint8)
    drawn = paint_order([name for name in known if name in names])  # inner ones last, on top
    place = {list(names).index(name): known.index(name) for name in drawn}
    patterns = [[p for k, p in place.items() if int(value) >> k & 1] for value in values]
    return Panel(title=title, packed=_packed(numbers), wide=wide, patterns=patterns)


def packed_image(image: NDArray[np.int16], window_hu: tuple[float, float], levels: int) -> bytes:
    """Gray levels of a CT, packed.

    Args:
        image: (D, H, W) HU.
        window_hu: HU of black and of white.
        levels: how many there are, at most 256.

    Returns:
        gzip of (D, H, W) uint8: each level minus the one before it along axis 2, modulo 256.
    """
    low, high = window_hu
    hu = np.arange(-32768, 32768, dtype=np.float64)  # every value an image can hold
    table = np.round(np.clip((hu - low) / (high - low), 0, 1) * (levels - 1)).astype(np.uint8)
    gray = table[image.astype(np.int32) + 32768]
    gray[..., 1:] = np.diff(gray, axis=2)  # wraps around
    return _packed(gray)


def _packed(array: NDArray[Any]) -> bytes:
    return gzip.compress(np.ascontiguousarray(array).tobytes(), _PACKING, mtime=0)


def _fitting_page(
    run: Path,
    record: RunRecord,
    volume: Volume,
    known: Sequence[str],
    panels: Sequence[Panel],
    notes: Sequence[str],
    steps: Sequence[int],
) -> tuple[str, int]:
    """The page with as many gray levels as fit, and how many these are."""
    newest = [c for c in known if c in record.course.steps[max(steps) - 1].learns]
    start = best_slice(areas(volume.bits, volume.names, known), newest)
    dice = _dice(run, volume, known, steps)
    others = sum(len(p.packed) for p in panels)
    for levels in GRAY_LEVELS:
        image = packed_image(volume.image, volume.window_hu, levels)
        if 4 / 3 * (others + len(image)) + 100_000 < LARGEST_BYTES:
            break
    facts = {
        "shape": volume.image.shape,
        "mm": [float(v) for v in spacing_of(volume.affine)],
        "start": [volume.image.shape[0] // 2, volume.image.shape[1] // 2, start],
        "levels": levels,
        "window": volume.window_hu,
        "structures": [
            {
                "name": name_of(name),
                "color": [round(255 * v) for v in palette(known)[name][:3]],
                "annotated": name in volume.annotated,
                "dice": [dice.get((t, name)) for t in steps],
            }
            for name in known
        ],
        "panels": [{"title": p.title, "wide": p.wide, "patterns": p.patterns} for p in panels],
    }
    html = filled(
        "clbench.deployment.view",
        "case_page.html.j2",
        title=f"{title_of(record)}: {volume.source} {volume.case}",
        phantom=not record.patients,
        run=f"{record.strategy}, seed {record.seed}, run {record.run_id}",
        steps=list(steps),
        notes=list(notes),
        facts=Markup(json.dumps(facts).replace("<", "\\u003c")),  # noqa: S704  # no tag can begin
        blobs=[base64.b64encode(b).decode() for b in (image, *(p.packed for p in panels))],
    )
    return html, levels


def _dice(
    run: Path, volume: Volume, known: Sequence[str], steps: Sequence[int]
) -> Mapping[tuple[int, str], float | None]:
    """(step, structure) → Dice of the case by `scores.csv`; None where it is not defined."""
    return {
        (row.step, row.structure): None if math.isnan(row.value) else row.value
        for row in read_scores(run / "scores.csv")
        if (row.eval_set, row.case) == (volume.source, volume.case)
        and (row.metric, row.scoring) == ("dice", "strict")
        and row.step in steps
        and row.structure in known
    }
