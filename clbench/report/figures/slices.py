"""One axial slice with masks on it: which slice, how it is turned, colors, numbers, outlines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba
from numpy.typing import NDArray

from clbench.report.figures import style
from clbench.spec.taxonomy import structure

if TYPE_CHECKING:
    from clbench.data.volume import Volume


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


def masks_of(
    bits: NDArray[Any], names: Sequence[str], wanted: Sequence[str]
) -> dict[str, NDArray[np.bool_]]:
    """Structure → mask, of those that are in the patterns.

    Args:
        bits: (D, H, W) unsigned, bit k = names[k].
        names: canonical names, in bit order.
        wanted: structures to unpack.
    """
    one = bits.dtype.type(1)
    return {
        c: ((bits >> bits.dtype.type(list(names).index(c))) & one).astype(bool)
        for c in wanted
        if c in names
    }


def palette(structures: Sequence[str]) -> dict[str, Any]:
    """Colors far apart in hue and lightness, tumors and cysts in yellow.

    The numbers in the masks carry the meaning.
    """
    table = mpl.colormaps["tab20"]
    order = [0, 2, 4, 6, 8, 10, 18, 12, 1, 3, 5, 7, 9, 11, 19, 13, 14, 15]
    rest = [c for c in structures if structure(c).kind not in ("tumor", "cyst")]
    found = {c: table(order[i % len(order)]) for i, c in enumerate(rest)}
    return {c: found.get(c, to_rgba("#FFE100")) for c in structures}


def aspect(volume: Volume) -> float:
    """Height over width of an axial slice in mm."""
    mm = np.abs(np.linalg.norm(volume.affine[:3, :3], axis=0))
    return float(volume.image.shape[1] * mm[1] / (volume.image.shape[0] * mm[0]))


def slice_dice(
    masks: Mapping[str, NDArray[np.bool_]], truth: Mapping[str, NDArray[np.bool_]], z: int
) -> float:
    """Mean Dice within the slice over the structures either mask holds there.

    Args:
        masks: structure → (X, Y, Z) bool, predicted; an absent structure is empty.
        truth: structure → (X, Y, Z) bool.
        z: which slice along the last axis.
    """
    values = []
    for c, t in truth.items():
        p = masks[c][:, :, z] if c in masks else np.zeros_like(t[:, :, z])
        both = int(p.sum()) + int(t[:, :, z].sum())
        if both:
            values.append(2 * int((p & t[:, :, z]).sum()) / both)
    return float(np.mean(values)) if values else math.nan


def panel(
    ax: Axes,
    image: NDArray[Any],
    volume: Volume,
    masks: Mapping[str, NDArray[np.bool_]] | None,
    z: int,
    colors: Mapping[str, Any],
    dice: float | None,
) -> None:
    """Draw a slice: the CT, masks blended over it, their outlines and numbers.

    Args:
        ax: where.
        image: (rows, columns) HU, turned by `axial`.
        volume: for voxel size and window.
        masks: structure → (D, H, W); None: a hole.
        z: slice.
        colors: structure → color; the order numbers the structures.
        dice: shown in the corner, if any.
    """
    mm = np.abs(np.linalg.norm(volume.affine[:3, :3], axis=0))
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
    flats = {c: axial(mask, z) for c, mask in masks.items()}
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
    found: list[list[tuple[float, float]]] = []
    for y, x in zip(*np.nonzero(padded[1:, 1:-1] != padded[:-1, 1:-1]), strict=True):
        found.append([(x - 0.5, y - 0.5), (x + 0.5, y - 0.5)])
    for y, x in zip(*np.nonzero(padded[1:-1, 1:] != padded[1:-1, :-1]), strict=True):
        found.append([(x - 0.5, y - 0.5), (x - 0.5, y + 0.5)])
    return found


def _halo() -> Any:
    from matplotlib.patheffects import withStroke

    return withStroke(linewidth=1.0, foreground="black")
