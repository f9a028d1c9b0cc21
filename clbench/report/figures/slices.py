"""One axial slice with masks on it: which slice, how it is turned, colors, numbers, outlines."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba
from matplotlib.patches import Patch
from numpy.typing import NDArray

from clbench.report.figures import style
from clbench.spec.taxonomy import structure
from clbench.types import mask_of

if TYPE_CHECKING:
    from clbench.data.volume import Volume


def best_slice(area: Mapping[str, NDArray[np.int64]], newest: Sequence[str]) -> int:
    """Axial slice with the most structures; of these, with most of the newest, then most of all.

    Args:
        area: structure → (W,) its voxels in each slice; what `areas` returns.
        newest: the structures taught last.
    """
    voxels = np.array(list(area.values()))
    count = (voxels > 0).sum(axis=0)
    everything = voxels.sum(axis=0)
    new = sum((area[c] for c in newest if c in area), np.zeros_like(everything))
    return max(range(len(count)), key=lambda z: (count[z], new[z], everything[z], -z))


def areas(
    bits: NDArray[Any], names: Sequence[str], wanted: Sequence[str]
) -> dict[str, NDArray[np.int64]]:
    """Structure → (W,) its voxels in each axial slice, of those that are in the patterns.

    One mask at a time is in memory: a CT on its own grid may hold 10⁸ voxels.

    Args:
        bits: (D, H, W) unsigned, bit k = names[k].
        names: canonical names, in bit order.
        wanted: structures to count.
    """
    return {
        c: np.count_nonzero(mask, axis=(0, 1)).astype(np.int64)
        for c in wanted
        for mask in masks_of(bits, names, [c]).values()
    }


def axial(flat: NDArray[Any]) -> NDArray[Any]:
    """A slice as a radiologist looks at it: front up, the patient's right on the left.

    Args:
        flat: (D, H), axis 0 to the patient's right, 1 to the front.
    """
    turned: NDArray[Any] = flat[::-1, ::-1].T
    return turned


def masks_of(
    bits: NDArray[Any], names: Sequence[str], wanted: Sequence[str]
) -> dict[str, NDArray[np.bool_]]:
    """Structure → mask, of those that are in the patterns.

    Args:
        bits: a volume or a slice, unsigned, bit k = names[k].
        names: canonical names, in bit order.
        wanted: structures to unpack.
    """
    return {c: mask_of(bits, names.index(c)) for c in wanted if c in names}


def palette(structures: Sequence[str]) -> dict[str, Any]:
    """Colors far apart in hue and lightness, tumors and cysts in yellow.

    The numbers in the masks carry the meaning.
    """
    table = mpl.colormaps["tab20"]
    order = [0, 2, 4, 6, 8, 10, 18, 12, 1, 3, 5, 7, 9, 11, 19, 13, 14, 15]
    rest = [c for c in structures if structure(c).kind not in ("tumor", "cyst")]
    by_structure = {c: table(order[i % len(order)]) for i, c in enumerate(rest)}
    return {c: by_structure.get(c, to_rgba("#FFE100")) for c in structures}


def _file_mm(volume: Volume) -> NDArray[np.float64]:
    from clbench.data.nifti import spacing_of  # brings nibabel; a report need not draw slices

    return spacing_of(volume.native_affine)


def aspect(volume: Volume) -> float:
    """Height over width in mm of an axial slice of the file."""
    mm = _file_mm(volume)
    return float(volume.native_shape[1] * mm[1] / (volume.native_shape[0] * mm[0]))


def slice_dice(
    masks: Mapping[str, NDArray[np.bool_]], truth: Mapping[str, NDArray[np.bool_]]
) -> float:
    """Mean Dice within the slice over the structures either mask holds there.

    Args:
        masks: structure → (D, H) bool, predicted; an absent structure is empty.
        truth: structure → (D, H) bool.
    """
    values = []
    for c, t in truth.items():
        p = masks.get(c, np.zeros_like(t))
        both = int(p.sum()) + int(t.sum())
        if both:
            values.append(2 * int((p & t).sum()) / both)
    return float(np.mean(values)) if values else math.nan


def legend(colors: Mapping[str, Any], drawn: Container[str]) -> list[Patch]:
    """Entries for the structures that are drawn, with their numbers.

    Args:
        colors: of `palette`.
        drawn: structures that have a voxel in some picture.
    """
    return [
        Patch(facecolor=color, edgecolor="black", linewidth=0.4, label=f"{i} {style.name_of(c)}")
        for i, (c, color) in enumerate(colors.items(), 1)
        if c in drawn
    ]


def panel(
    ax: Axes,
    image: NDArray[Any],
    volume: Volume,
    masks: Mapping[str, NDArray[np.bool_]] | None,
    colors: Mapping[str, Any],
    dice: float | None,
) -> None:
    """Draw a slice: the CT, masks blended over it, their outlines and numbers.

    Args:
        ax: where.
        image: (rows, columns) HU, turned by `axial`.
        volume: for the voxel size of its file, and the window.
        masks: structure → (D, H); None: a hole.
        colors: structure → color; the order numbers the structures.
        dice: shown in the corner, if any.
    """
    mm = _file_mm(volume)
    low, high = volume.window_hu
    stretch = mm[1] / mm[0]
    if masks is None:
        _picture(ax, np.ones((*image.shape, 3)), stretch)
        ax.text(0.5, 0.5, "hole:\nno prediction stored", transform=ax.transAxes, ha="center",
                va="center", fontsize=6, color=style.GRAY)  # fmt: skip
        return
    gray = np.clip((image.astype(np.float64) - low) / (high - low), 0, 1)
    picture = np.repeat(gray[..., None], 3, axis=2)
    number = {c: i + 1 for i, c in enumerate(colors)}
    flats = {c: axial(mask) for c, mask in masks.items()}
    flats = {c: flat for c, flat in flats.items() if flat.any()}
    for c, flat in flats.items():
        picture[flat] = 0.45 * picture[flat] + 0.55 * np.array(colors[c][:3])
    _picture(ax, picture, stretch)
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
    segments: list[list[tuple[float, float]]] = []
    for y, x in zip(*np.nonzero(padded[1:, 1:-1] != padded[:-1, 1:-1]), strict=True):
        segments.append([(x - 0.5, y - 0.5), (x + 0.5, y - 0.5)])
    for y, x in zip(*np.nonzero(padded[1:-1, 1:] != padded[1:-1, :-1]), strict=True):
        segments.append([(x - 0.5, y - 0.5), (x - 0.5, y + 0.5)])
    return segments


def _halo() -> Any:
    from matplotlib.patheffects import withStroke

    return withStroke(linewidth=1.0, foreground="black")
