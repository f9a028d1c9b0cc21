"""What the masks look like: CT, truth and each strategy, for the median and the worst case.

Room: row 5 (matplotlib; no torch). Images come from the cache of preprocessed volumes, predictions
from the run folders. Which cases and which slice are shown follows a rule, printed below.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from clbench.errors import StoreError
from clbench.report.evidence import Evidence, Method
from clbench.report.figures import Study, style
from clbench.taxonomy import STRUCTURES

if TYPE_CHECKING:
    from clbench.data.volumes import Volume

Masks = dict[str, NDArray[np.bool_]]
ACROSS = 5
"""Pictures side by side."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """One row of the strip."""

    eval_set: str
    """Source of the case."""
    case: str
    """Case id."""
    word: str
    """`median` or `worst`."""
    score: float
    """The reference's mean Dice of the structures of this case."""


def choose(e: Evidence, step: int) -> list[Shown]:
    """Per eval set the case in which the reference's mean Dice is the median, and the lowest.

    The mean is over the structures taught from this set so far that the case holds, seeds averaged;
    of an even number of cases the lower middle one is the median; a tie goes to the first.
    """
    found = []
    for name in dict.fromkeys(e.sources[:step]):
        values = _per_case(e, e.reference, name, step)
        order = sorted((v, i, p) for i, (p, v) in enumerate(values.items()) if not math.isnan(v))
        if not order:
            continue
        picks = {"median": order[(len(order) - 1) // 2], "worst": order[0]}
        for word, (value, _, case) in picks.items():
            if word == "worst" and case == picks["median"][2]:
                continue
            found.append(Shown(eval_set=name, case=case, word=word, score=value))
    return found


def _per_case(e: Evidence, method: Method, eval_set: str, step: int) -> dict[str, float]:
    """Patient → mean Dice over its structures and the seeds."""
    stack = [
        cells.values.mean(axis=0)
        for c, s in e.learned_at.items()
        if s <= step and e.home(c) == eval_set
        and (cells := method.cells.get((step, eval_set, c))) is not None and not cells.hole
    ]  # fmt: skip
    if not stack:
        return {}
    table = np.array(stack)
    have = (~np.isnan(table)).sum(axis=0)
    total = np.nan_to_num(table).sum(axis=0)
    means = np.divide(total, have, out=np.full(have.shape, np.nan), where=have > 0)
    return dict(zip(e.patients[eval_set], (float(m) for m in means), strict=True))


def case_of(record: Mapping[str, Any], eval_set: str, patient: str) -> str:
    """The first test case of a patient: its own name, or a scan whose name holds the patient's."""
    tests = dict.fromkeys(
        named.removeprefix(f"{eval_set}/")
        for step, cases in zip(record["course"]["steps"], record["course"]["test"], strict=True)
        if step["source"] == eval_set
        for named in cases
    )
    return patient if patient in tests else next(c for c in tests if patient in c)


def best_slice(masks: Mapping[str, NDArray[np.bool_]], newest: Sequence[str]) -> int:
    """Axial slice with the most structures; of these, with most of the newest, then most of all.

    Args:
        masks: structure → (D, H, W), slices along the last axis.
        newest: the structures taught last.
    """
    area = {c: m.sum(axis=(0, 1)) for c, m in masks.items()}
    count = sum((a > 0).astype(int) for a in area.values())
    new = sum((area[c] for c in newest if c in area), np.zeros(len(count), dtype=int))
    everything = sum(area.values())
    return max(range(len(count)), key=lambda z: (count[z], new[z], everything[z], -z))


def axial(array: NDArray[Any], z: int) -> NDArray[Any]:
    """A slice as a radiologist looks at it: front up, the patient's right on the left.

    Args:
        array: (D, H, W), axis 0 to the patient's right, 1 to the front, 2 up.
        z: index along axis 2.
    """
    turned: NDArray[Any] = array[::-1, ::-1, z].T
    return turned


def open_volumes(study: Study, record: Mapping[str, Any], shown: Sequence[Shown]) -> list[Volume]:
    """The cases as the run saw them.

    Raises:
        StoreError: the data at hand are not those of the run.
    """
    from clbench import registry
    from clbench.data.cache import default_root
    from clbench.data.catalog import build_catalog
    from clbench.settings import apply_overrides, load_profile, split_overrides
    from clbench.spec import Split

    settings = record["settings"]
    benchmark = registry.benchmark(settings["bench"])
    profile = apply_overrides(
        load_profile(record["identity"]["profile"]["name"]),
        split_overrides(list(settings["overrides"])),
    )
    recorded = record["identity"]["splits"]
    splits = {
        step.name: Split(
            name=s["name"],
            train=tuple(s["train"]),
            validation=tuple(s["validation"]),
            test=tuple(s["test"]),
        )
        for step, s in zip(
            benchmark.steps,
            recorded.values() if isinstance(recorded, Mapping) else recorded,
            strict=True,
        )
    }
    named = study.cache or settings["cache"]
    catalog = build_catalog(
        benchmark,
        profile.preprocessing(benchmark.preprocessing),
        data=study.data or settings["data"],
        cache_root=default_root() if named is None else type(study.results)(named),
        phantom=profile.phantom,
        splits=splits,
    )
    if catalog.fingerprint != record["data_fingerprint"]:
        raise StoreError(
            "the images at hand are not those of the run",
            where=study.results / study.bench,
            expected=record["data_fingerprint"],
            got=catalog.fingerprint,
            next_step="name the data the runs used with --data, and their cache with --cache",
        )
    return [
        catalog.cache.get(
            catalog.files[s.eval_set][s.case], benchmark.source(s.eval_set), catalog.preprocessing
        )
        for s in shown
    ]


def masks_of(
    bits: NDArray[Any], names: Sequence[str], wanted: Sequence[str]
) -> dict[str, NDArray[np.bool_]]:
    """Structure → mask, of those that are in the patterns."""
    one = bits.dtype.type(1)
    return {
        c: ((bits >> bits.dtype.type(list(names).index(c))) & one).astype(bool)
        for c in wanted
        if c in names
    }


def strip(study: Study) -> Figure:
    """CT, truth and the prediction of each strategy, a row per case.

    Source: the form of the paper's Fig. 6, with cases chosen by rule.
    """
    from clbench.predictions import read_prediction
    from clbench.report.runs import collect

    e = study.evidence
    step = study.step or e.last
    study.need(1 <= step <= e.last, f"there is no step {step}", f"choose 1 to {e.last}")
    shown = choose(e, step)
    study.need(shown, "the reference has no scored case", "finish its runs")
    groups = {g.label: g for g in collect(study.results, bench=study.bench, scoring=study.scoring)}
    record = groups[e.reference.label].runs[0].record
    shown = [replace(s, case=case_of(record, s.eval_set, s.case)) for s in shown]
    seeds = set.intersection(*(set(m.seeds) for m in e.methods))
    study.need(seeds, "the strategies have no seed in common", "run all with one seed")
    seed = min(seeds)
    stored = {
        (m.label, one): next(r for r in groups[m.label].runs if r.seed == seed).folder
        / "predictions" / f"step{step}" / f"{one.eval_set}_{one.case}.npz"
        for m in e.methods
        for one in shown
    }  # fmt: skip
    study.need(
        any(path.exists() for path in stored.values()),
        "no strategy has stored its predictions",
        "run again with --keep-predictions test",
    )
    volumes = open_volumes(study, record, shown)
    known = [c for c, s in e.learned_at.items() if s <= step]
    colors = _palette(known)
    heads = ["CT", "truth", *(m.label for m in e.methods)]
    across = min(ACROSS, len(heads))
    lines = math.ceil(len(heads) / across)
    tall = max(_aspect(v) for v in volumes)
    side = style.PAGE_IN / across
    figure = style.new(style.PAGE_IN, 0.35 + len(shown) * lines * (side * tall + 0.17))
    axes = figure.subplots(len(shown) * lines, across, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    drawn: set[str] = set()
    for i, (one, volume) in enumerate(zip(shown, volumes, strict=True)):
        wanted = [c for c in known if c in volume.annotated]
        truth = masks_of(volume.bits, volume.names, wanted)
        newest = [c for c in wanted if e.learned_at[c] == step]
        z = best_slice(truth, newest)
        drawn |= {c for c, m in truth.items() if m[:, :, z].any()}
        panels: list[tuple[str, Masks | None]] = [("CT", {}), ("truth", truth)]
        for m in e.methods:
            path = stored[m.label, one]
            if path.exists():
                kept = read_prediction(path)
                panels.append((m.label, masks_of(kept.bits, kept.structures, wanted)))
            else:
                panels.append((m.label, None))
        image = axial(volume.image, z)
        for j, (head, masks) in enumerate(panels):
            ax = axes[i * lines + j // across, j % across]
            dice = None if j < 2 or not masks else _slice_dice(masks, truth, z)
            _panel(ax, image, volume, masks, z, colors, dice)
            if head == "CT":
                head = f"{one.eval_set} {one.case}: {one.word} ({one.score:.2f})"
            ax.set_title(head, fontsize=6.5, pad=2)
    key = [
        Patch(facecolor=colors[c], edgecolor="black", linewidth=0.4,
              label=f"{known.index(c) + 1} {style.name_of(c)}")
        for c in known if c in drawn
    ]  # fmt: skip
    style.frame(
        figure,
        e,
        f"{e.bench}: masks after step {step}, seed {seed}",
        f"Cases: per data set the median (lower middle) and the worst by the mean Dice of "
        f"{e.reference.label} (in brackets). Slice: most structures in the truth, then most of the "
        "newest. Numbers: the structure; below: mean Dice within the slice. Front is up, the "
        f"patient's right on the left; window {volumes[0].window_hu[0]:g} to "
        f"{volumes[0].window_hu[1]:g} HU.",
        key,
    )
    return figure


def _palette(structures: Sequence[str]) -> dict[str, Any]:
    """Colors far apart in hue and lightness, tumors and cysts in yellow.

    The numbers in the masks carry the meaning.
    """
    table = mpl.colormaps["tab20"]
    order = [0, 2, 4, 6, 8, 10, 18, 12, 1, 3, 5, 7, 9, 11, 19, 13, 14, 15]
    rest = [c for c in structures if STRUCTURES[c].kind not in ("tumor", "cyst")]
    found = {c: table(order[i % len(order)]) for i, c in enumerate(rest)}
    return {c: found.get(c, to_rgba("#FFE100")) for c in structures}


def _aspect(volume: Volume) -> float:
    """Height over width of an axial slice in mm."""
    mm = np.abs(np.linalg.norm(volume.affine[:3, :3], axis=0))
    return float(volume.image.shape[1] * mm[1] / (volume.image.shape[0] * mm[0]))


def _slice_dice(
    masks: Mapping[str, NDArray[np.bool_]], truth: Mapping[str, NDArray[np.bool_]], z: int
) -> float:
    """Mean Dice within the slice over the structures either mask holds there."""
    values = []
    for c, t in truth.items():
        p = masks[c][:, :, z] if c in masks else np.zeros_like(t[:, :, z])
        both = int(p.sum()) + int(t[:, :, z].sum())
        if both:
            values.append(2 * int((p & t[:, :, z]).sum()) / both)
    return float(np.mean(values)) if values else math.nan


def _panel(
    ax: Axes,
    image: NDArray[Any],
    volume: Volume,
    masks: Mapping[str, NDArray[np.bool_]] | None,
    z: int,
    colors: Mapping[str, Any],
    dice: float | None,
) -> None:
    mm = np.abs(np.linalg.norm(volume.affine[:3, :3], axis=0))
    low, high = volume.window_hu
    aspect = mm[1] / mm[0]
    if masks is None:
        _picture(ax, np.ones((*image.shape, 3)), aspect)
        ax.text(0.5, 0.5, "hole:\nno prediction stored", transform=ax.transAxes, ha="center",
                va="center", fontsize=6, color=style.GRAY)  # fmt: skip
        return
    gray = np.clip((image.astype(np.float64) - low) / (high - low), 0, 1)
    picture = np.repeat(gray[..., None], 3, axis=2)
    number = {c: i + 1 for i, c in enumerate(colors)}
    flats = {c: axial(mask, z) for c, mask in masks.items()}
    flats = {c: flat for c, flat in flats.items() if flat.any()}
    for c, flat in flats.items():
        picture[flat] = 0.45 * picture[flat] + 0.55 * np.array(colors[c][:3])
    _picture(ax, picture, aspect)
    for c, flat in flats.items():
        ax.add_collection(
            LineCollection(outline(flat), colors=[colors[c]], linewidths=0.6, clip_on=False),
            autolim=False,
        )
        rows, columns = np.nonzero(flat)
        middle = int(np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2))
        ax.text(columns[middle], rows[middle], str(number[c]), fontsize=4.2, color="white",
                ha="center", va="center_baseline",
                path_effects=[_halo()])  # fmt: skip
    if dice is not None:
        ax.text(0.98, 0.02, f"{dice:.2f}", transform=ax.transAxes, ha="right", va="bottom",
                fontsize=6, color="white", path_effects=[_halo()])  # fmt: skip


def _picture(ax: Axes, picture: NDArray[Any], aspect: float) -> None:
    """One picture without clipping: clip paths get new names in every SVG."""
    ax.imshow(picture, aspect=aspect, interpolation="none").set_clip_path(None)


def outline(flat: NDArray[np.bool_]) -> list[list[tuple[float, float]]]:
    """The voxel edges around a mask, as ((x, y), (x, y)) segments; nothing is smoothed.

    Args:
        flat: (rows, columns).
    """
    padded = np.pad(flat, 1)
    found: list[list[tuple[float, float]]] = []
    for y, x in zip(*np.nonzero(padded[1:, 1:-1] != padded[:-1, 1:-1]), strict=True):
        found.append([(x - 0.5, y - 0.5), (x + 0.5, y - 0.5)])
    for y, x in zip(*np.nonzero(padded[1:-1, 1:] != padded[1:-1, :-1]), strict=True):
        found.append([(x - 0.5, y - 0.5), (x - 0.5, y + 0.5)])
    return found


def _halo() -> Any:
    from matplotlib.patheffects import withStroke

    return withStroke(linewidth=1.0, foreground="black")
