"""One body of the phantom: draws a subject and fills a grid with its tissues.

The same tissues on every machine: random bits come from PCG64 alone, and shapes use nothing but
elementwise float64 addition, multiplication, division and square root, which IEEE 754 defines to
the last bit. So no exp, no sine, no power, no matrix product and no sum over an axis here.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from clbench.data.phantom.anatomy import ORDER, RECIPES, Ball, Recipe, Tube, tissues
from clbench.types import Floats, triple

Box: TypeAlias = tuple[slice, slice, slice]
Axes: TypeAlias = tuple[Floats, Floats, Floats]
Point: TypeAlias = tuple[float, float, float]

VARIATION = 0.5
"""Scales every difference between subjects in place and size (1 = the table's).

Half, because 16 training cases and a few hundred updates do not cover the whole range: with 1.0
the smallest organs stay unlearned in the minutes the quick profile has.
"""
WARP_MM = 5.0
"""Largest smooth displacement that bends the whole body."""
WARP_LATTICE_MM = 75.0
"""Distance over which that displacement changes."""
ROUGH_LATTICE_MM = 26.0
"""Distance over which the surface of an organ changes."""
GALL_BLADDER_ABSENT = 0.04
"""Fraction of subjects without a gall bladder."""
TUMOR_DIAMETER_MM = 30.0
"""Median diameter of a liver tumor (log-normal)."""
TUMOR_DIAMETER_SPREAD = 1.45
"""Upper quartile of the diameter over its median."""
TUMOR_DIAMETER_LIMITS_MM = (12.0, 70.0)
"""Diameters are clipped to this range."""
TUMOR_COUNTS = (1, 1, 2, 2, 3, 3, 3, 4, 5, 6)
"""Numbers of tumors in a liver that has any; each entry equally likely."""

CAVITY_MM = (133.0, 84.0)
"""Half width and half depth of the space inside the muscular wall."""

# Quantiles of the normal distribution at 5 %, 10 %, …, 95 %, as units of the quartile (0.6745 sd):
# a table, because exp and erf may differ in the last bit between machines.
_DEVIATES = np.array(
    [-2.44, -1.90, -1.54, -1.25, -1.0, -0.78, -0.57, -0.38, -0.19, 0.0,
     0.19, 0.38, 0.57, 0.78, 1.0, 1.25, 1.54, 1.90, 2.44]
)  # fmt: skip


class RandomStream:
    """Random numbers for one purpose, the same on every machine and numpy version.

    Args:
        key: names the purpose; equal keys give equal numbers.
    """

    def __init__(self, *key: object) -> None:
        digest = hashlib.sha256("/".join(str(part) for part in key).encode()).digest()
        self._bits = np.random.PCG64(np.random.SeedSequence(int.from_bytes(digest[:16], "little")))

    def raw(self, size: int) -> npt.NDArray[np.uint64]:
        """`size` times 64 random bits."""
        return np.asarray(self._bits.random_raw(size), dtype=np.uint64)

    def uniforms(self, low: float, high: float, size: int) -> Floats:
        """`size` numbers, evenly from `low` to `high`.

        Args:
            low: smallest number.
            high: upper limit, never reached.
            size: how many.
        """
        unit = (self.raw(size) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return low + (high - low) * unit

    def uniform(self, low: float, high: float) -> float:
        """One number, evenly from `low` to `high`."""
        return float(self.uniforms(low, high, 1)[0])

    def normal(self) -> float:
        """One number of mean 0 and sd 1, never beyond 3: a sum of three uniform ones."""
        a, b, c = (float(u) for u in self.uniforms(0.0, 1.0, 3))
        return 2.0 * (a + b + c - 1.5)


@dataclass(frozen=True, kw_only=True, slots=True)
class Lesion:
    """One liver tumor."""

    at: Point
    """Centre in the standard torso, mm."""
    semi: Point
    """Semi-axes in mm."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What makes one body differ from the next."""

    key: str
    """Seeds every draw."""
    scale: Point
    """Body size over the standard torso's, per axis."""
    place_mm: Point
    """Position in the scanner."""
    fat_mm: Point
    """Subcutaneous fat at the sides, in front, behind."""
    domes_mm: tuple[float, float]
    """Height of the right and left dome of the diaphragm."""
    recipes: Mapping[str, Recipe]
    """The structures, moved and scaled for this subject."""
    rough: Mapping[str, tuple[float, float]]
    """Per structure, how two roughness fields shape its surface, in mm."""
    gas: float
    """Fraction of the stomach filled with gas."""
    lesions: tuple[Lesion, ...]
    """Tumors of the liver."""


# ----------------------------------------------------------------------------- drawing a subject


def draw_subject(key: str, *, tumors: bool) -> Subject:
    """The subject behind `key`.

    Args:
        key: any text; names source and case.
        tumors: whether the liver holds tumors.
    """
    stream = RandomStream(key, "body")
    scale = triple(1.0 + VARIATION * d for d in stream.uniforms(-0.035, 0.035, 3).tolist())
    place = triple(stream.uniforms(-4.0, 4.0, 3).tolist())
    fat = (stream.uniform(6, 20), stream.uniform(5, 17), stream.uniform(6, 14))
    right, left = stream.normal(), stream.normal()
    domes = (240.0 + 4.0 * VARIATION * right, 228.0 + 4.0 * VARIATION * left)
    gas = stream.uniform(0.05, 0.13)
    table = tissues()
    shifts: dict[str, Point] = {}

    def shift(name: str) -> Point:
        if name not in shifts:
            row, own = table[name], RandomStream(key, "place", name)
            base = shift(row.follows) if row.follows else (0.0, 0.0, 0.0)
            shifts[name] = triple(
                b + VARIATION * sd * own.normal() for b, sd in zip(base, row.sd_mm, strict=True)
            )
        return shifts[name]

    recipes, rough = {}, {}
    for name, recipe in RECIPES.items():
        row, own = table[name], RandomStream(key, "shape", name)
        size = 1.0 + VARIATION * row.size_sd * own.normal()
        weights = own.uniforms(-row.rough_mm, row.rough_mm, 2).tolist()
        rough[name] = (2.0 * weights[0], 2.0 * weights[1])
        recipes[name] = _moved(recipe, row.centre_mm, shift(name), size)
    if stream.uniform(0.0, 1.0) < GALL_BLADDER_ABSENT:
        del recipes["gall_bladder"]
    return Subject(
        key=key,
        scale=scale,
        place_mm=place,
        fat_mm=fat,
        domes_mm=domes,
        recipes=recipes,
        rough=rough,
        gas=gas,
        lesions=_draw_lesions(key, recipes["liver"], domes) if tumors else (),
    )


def _moved(recipe: Recipe, centre: Point, shift: Point, size: float) -> Recipe:
    def at(*p: float) -> Point:
        return triple(c + s + size * (v - c) for v, c, s in zip(p, centre, shift, strict=True))

    parts: list[Ball | Tube] = []
    for part in recipe.parts:
        if isinstance(part, Ball):
            semi = triple(size * s for s in part.semi)
            parts.append(Ball(at(*part.at), semi, part.turn, part.cut))
        else:
            points = tuple((*at(x, y, z), size * r) for x, y, z, r in part.points)
            parts.append(Tube(points, part.flat))
    return replace(recipe, parts=tuple(parts))


def _draw_lesions(key: str, liver: Recipe, domes: tuple[float, float]) -> tuple[Lesion, ...]:
    stream = RandomStream(key, "tumors")
    count = TUMOR_COUNTS[int(stream.uniform(0, len(TUMOR_COUNTS)))]
    low, high = TUMOR_DIAMETER_LIMITS_MM
    diameters = []
    for _ in range(count):
        position = stream.uniform(0, len(_DEVIATES) - 1)
        i = int(position)
        deviate = float(_DEVIATES[i] + (position - i) * (_DEVIATES[i + 1] - _DEVIATES[i]))
        diameters.append(
            min(max(TUMOR_DIAMETER_MM * _power(TUMOR_DIAMETER_SPREAD, deviate), low), high)
        )
    lesions: list[Lesion] = []
    for diameter in sorted(diameters, reverse=True):
        radius = 0.5 * diameter
        x = stream.uniforms(-150, 75, 400)
        y = stream.uniforms(-90, 95, 400)
        z = stream.uniforms(60, 245, 400)
        depth = np.maximum(_field(liver, (x, y, z)), diaphragm(x, y, z, domes) + 3.0)
        depth = np.maximum(depth, wall(x, y, z, CAVITY_MM) + 2.0)
        free = depth < -0.75 * radius
        for other in lesions:
            dx, dy, dz = x - other.at[0], y - other.at[1], z - other.at[2]
            gap = radius + max(other.semi) + 4.0
            free &= dx * dx + dy * dy + dz * dz > gap * gap
        a, b = stream.uniforms(0.85, 1.18, 2).tolist()
        hits = np.flatnonzero(free)
        if hits.size:
            i = int(hits[0])
            at = (float(x[i]), float(y[i]), float(z[i]))
            lesions.append(Lesion(at=at, semi=(radius * a, radius * b, radius / (a * b))))
    return tuple(lesions)


def _power(base: float, exponent: float) -> float:
    """`base` to the `exponent` by multiplication and square roots alone, to 10 bits."""
    inverse, rest = exponent < 0, abs(exponent)
    value, root = 1.0, base
    while rest >= 1.0:
        value, rest = value * base, rest - 1.0
    for _ in range(10):
        root, rest = float(np.sqrt(root)), rest * 2.0
        if rest >= 1.0:
            value, rest = value * root, rest - 1.0
    return 1.0 / value if inverse else value


# --------------------------------------------------------------------------------- shapes in space


def _spline(
    axis: Floats, step: float, start: float, count: int
) -> tuple[npt.NDArray[np.intp], Axes]:
    t = (axis - start) / step
    cell = np.clip(np.floor(t), 0, count - 3)
    f = t - cell
    g = 1.0 - f
    return cell.astype(np.intp), (0.5 * g * g, 0.5 + f * g, 0.5 * f * f)


def smooth_field(stream: RandomStream, axes: Axes, step: float) -> Floats:
    """A random field between −1 and 1 that changes over about `step` mm (quadratic B-spline).

    Args:
        stream: random numbers; the field does not depend on the grid it is sampled on.
        axes: coordinates along x, y, z in mm.
        step: distance of the lattice points in mm.
    """
    start = (-200.0, -150.0, -40.0)
    counts = [int(size / step) + 4 for size in (400.0, 300.0, 340.0)]
    field = stream.uniforms(-1.0, 1.0, counts[0] * counts[1] * counts[2]).reshape(counts)
    for dim in range(3):
        cell, weights = _spline(axes[dim], step, start[dim], counts[dim])
        shape = [1, 1, 1]
        shape[dim] = -1
        total = field.take(cell, axis=dim) * weights[0].reshape(shape)
        for k in (1, 2):
            total += field.take(cell + k, axis=dim) * weights[k].reshape(shape)
        field = total
    return field


def wall(x: Floats, y: Floats, z: Floats, half: tuple[float, float], y0: float = 0.0) -> Floats:
    """About the distance in mm beyond a rounded, slightly waisted cylinder; negative inside.

    Args:
        x: left-right position in mm, 0 in the middle.
        y: front-back position in mm.
        z: height in mm; the waist lies at 150.
        half: half-axes of the cross-section in mm, left-right and front-back.
        y0: middle of the cross-section in mm.
    """
    qx = x / half[0]
    qy = (y - y0) / half[1]
    qx, qy = qx * qx, qy * qy
    q = qx + qy - 0.35 * qx * qy
    zz = (z - 150.0) / 150.0
    return (q * (1.0 + 0.09 * zz * zz) - 1.0) * (0.5 * half[1])


def diaphragm(x: Floats, y: Floats, z: Floats, domes: tuple[float, float]) -> Floats:
    """Height in mm above the two domes of the diaphragm; negative below.

    Args:
        x: left-right position in mm, 0 in the middle.
        y: front-back position in mm.
        z: height in mm.
        domes: height of the right and of the left dome in mm.
    """
    back, front = np.maximum(y, 0.0), np.minimum(y, 0.0)
    fall = back * back / 90.0 + front * front / 260.0
    right, left = x + 66.0, x - 70.0
    right = domes[0] - right * right / np.where(right < 0, 94.0, 250.0)
    left = domes[1] - left * left / np.where(left > 0, 94.0, 250.0)
    return z - (np.maximum(right, left) - fall)


def _ball(ball: Ball, x: Floats, y: Floats, z: Floats) -> Floats:
    dx, dy, dz = _turned(ball.turn, x - ball.at[0], y - ball.at[1], z - ball.at[2])
    a, b, c = (1.0 / (semi * semi) for semi in ball.semi)
    dx, dy, dz = dx * dx * a, dy * dy * b, dz * dz * c
    level = np.sqrt(dx + dy + dz)
    slope = np.sqrt(dx * a + dy * b + dz * c)
    distance: Floats = level * (level - 1.0) / np.maximum(slope, 1e-6)
    return distance


def _turned(turn: Point, x: Any, y: Any, z: Any) -> tuple[Any, Any, Any]:
    """From the body's axes to those of a turned ball; numbers or arrays."""
    xz, yz, xy = turn
    if xz:
        c, s = _cos_sin(xz)
        x, z = c * x - s * z, s * x + c * z
    if yz:
        c, s = _cos_sin(yz)
        y, z = c * y - s * z, s * y + c * z
    if xy:
        c, s = _cos_sin(xy)
        x, y = c * x + s * y, c * y - s * x
    return x, y, z


def _reach(ball: Ball) -> list[float]:
    """Half the size of the box around a turned ball."""
    reach = []
    for unit in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)):
        a, b, c = (p * s for p, s in zip(_turned(ball.turn, *unit), ball.semi, strict=True))
        reach.append(float(np.sqrt(a * a + b * b + c * c)))
    return reach


def _cos_sin(tangent: float) -> tuple[float, float]:
    square = tangent * tangent
    return (1.0 - square) / (1.0 + square), 2.0 * tangent / (1.0 + square)


def _cone(
    p: Sequence[float], q: Sequence[float], flat: float, x: Floats, y: Floats, z: Floats
) -> Floats:
    ux, uy, uz = q[0] - p[0], (q[1] - p[1]) / flat, q[2] - p[2]
    dx, dy, dz = x - p[0], (y - p[1]) / flat, z - p[2]
    t = (dx * ux + dy * uy + dz * uz) / (ux * ux + uy * uy + uz * uz)
    t = np.minimum(np.maximum(t, 0.0), 1.0)
    dx, dy, dz = dx - t * ux, dy - t * uy, dz - t * uz
    return np.sqrt(dx * dx + dy * dy + dz * dz) - (p[3] + t * (q[3] - p[3]))


Bounds: TypeAlias = tuple[Point, Point]
Piece: TypeAlias = tuple[Bounds, bool, Callable[[Floats, Floats, Floats], Floats]]


def _pieces(recipe: Recipe) -> list[Piece]:
    pieces: list[Piece] = []
    for part in recipe.parts:
        if isinstance(part, Ball):
            pieces.append((_around(part.at, _reach(part)), part.cut, partial(_ball, part)))
        else:
            for p, q in itertools.pairwise(part.points):
                r = max(p[3], q[3])
                low = triple(min(a, b) - r for a, b in zip(p[:3], q[:3], strict=True))
                high = triple(max(a, b) + r for a, b in zip(p[:3], q[:3], strict=True))
                pieces.append(((low, high), False, partial(_cone, p, q, part.flat)))
    return pieces


def _around(at: Point, half: Sequence[float]) -> Bounds:
    low, high = (triple(a + sign * h for a, h in zip(at, half, strict=True)) for sign in (-1, 1))
    return low, high


def _field(recipe: Recipe, xyz: Axes) -> Floats:
    """About the signed distance in mm to the surface of a recipe, at any points."""
    total = np.full(xyz[0].shape, np.inf)
    for _, cut, evaluate in _pieces(recipe):
        value = evaluate(*xyz)
        total = np.maximum(total, -value) if cut else np.minimum(total, value)
    return total


# --------------------------------------------------------------------------------- filling a grid


class Canvas:
    """A grid of tissues.

    Args:
        subject: whose body.
        axes_mm: voxel centres along x (to the left), y (to the back), z (up), in mm; x = y = 0 is
            the middle of the scanner, z = 0 its lowest level.
    """

    def __init__(self, subject: Subject, axes_mm: Axes) -> None:
        self.subject = subject
        self.names: list[str] = ["air", *(name for name in tissues() if name != "air")]
        x, y, z = (
            (axis - place) / scale
            for axis, place, scale in zip(axes_mm, subject.place_mm, subject.scale, strict=True)
        )
        self.straight: Axes = (x, y, z)
        self.tissue = np.zeros((x.size, y.size, z.size), dtype=np.uint8)
        shaped = (x[:, None, None], y[None, :, None], z[None, None, :])
        self.warped: list[Floats] = []
        for dim in range(3):
            field = smooth_field(
                RandomStream(subject.key, "warp", dim), self.straight, WARP_LATTICE_MM
            )
            field *= WARP_MM * VARIATION
            field += shaped[dim]
            self.warped.append(field)
        self.rough = [
            smooth_field(RandomStream(subject.key, "rough", i), self.straight, ROUGH_LATTICE_MM)
            for i in range(2)
        ]
        self._shaped: Axes = shaped

    def code(self, name: str) -> int:
        """The value that stands for a tissue."""
        return self.names.index(name)

    def box(self, bounds: Bounds, margin: float) -> Box:
        """The part of the grid that can hold what lies within `bounds` of the standard torso."""
        margin += WARP_MM * VARIATION
        return triple(
            slice(
                int(np.searchsorted(axis, low - margin)), int(np.searchsorted(axis, high + margin))
            )
            for axis, low, high in zip(self.straight, *bounds, strict=True)
        )

    def field(self, name: str) -> tuple[Box, Floats]:
        """The surface field of a structure and the box it was computed in."""
        recipe = self.subject.recipes[name]
        weights = self.subject.rough[name]
        margin = abs(weights[0]) + abs(weights[1]) + recipe.halo_mm + 1.0
        pieces = _pieces(recipe)
        low = triple(min(p[0][0][d] for p in pieces if not p[1]) for d in range(3))
        high = triple(max(p[0][1][d] for p in pieces if not p[1]) for d in range(3))
        outer = self.box((low, high), margin)
        total = np.full([s.stop - s.start for s in outer], 1e3)
        for bounds, cut, evaluate in pieces:
            box = self.box(bounds, margin)
            box = triple(
                slice(max(b.start, o.start), min(b.stop, o.stop))
                for b, o in zip(box, outer, strict=True)
            )
            if any(b.stop <= b.start for b in box):
                continue
            inner = triple(
                slice(b.start - o.start, b.stop - o.start) for b, o in zip(box, outer, strict=True)
            )
            value = evaluate(*(axis[box] for axis in self.warped))
            if cut:
                np.maximum(total[inner], -value, out=total[inner])
            else:
                np.minimum(total[inner], value, out=total[inner])
        for weight, rough in zip(weights, self.rough, strict=True):
            if weight:
                total += weight * rough[outer]
        if recipe.abdominal:
            x, y, z = (a[s] for a, s in zip(self.straight, outer, strict=True))
            x, y, z = x[:, None, None], y[None, :, None], z[None, None, :]
            np.maximum(total, diaphragm(x, y, z, self.subject.domes_mm) + 3.0, out=total)
            np.maximum(total, wall(x, y, z, CAVITY_MM) + 1.0, out=total)
        return outer, total

    def paint(self, name: str, box: Box, mask: npt.NDArray[np.bool_]) -> None:
        """Give the voxels of `mask` inside `box` to a tissue.

        Args:
            name: the tissue.
            box: slices of the volume to paint in.
            mask: bool, the shape of the box.
        """
        self.tissue[box][mask] = self.code(name)


def fill(subject: Subject, axes_mm: Axes) -> Canvas:
    """All tissues of a subject on a grid."""
    canvas = Canvas(subject, axes_mm)
    _trunk(canvas)
    for name in ORDER:
        if name not in subject.recipes:
            continue
        box, field = canvas.field(name)
        recipe = subject.recipes[name]
        if recipe.halo_mm:
            canvas.paint("fat", box, field < recipe.halo_mm)
        canvas.paint(name, box, field < 0)
        if recipe.rind:
            canvas.paint(recipe.rind, box, (field < 0) & (field >= -recipe.rind_mm))
        if recipe.core:
            canvas.paint(recipe.core, box, field < -recipe.rind_mm)
        if name == "stomach":
            _gas(canvas, box, field < -recipe.rind_mm)
        if name == "colon":
            pockets = canvas.rough[0][box] + 0.3 * canvas.rough[1][box] > 0.2
            canvas.paint("colon_gas", box, (field < -4.0) & pockets)
        if name == "bone":
            _discs(canvas, box)
    _lesions(canvas)
    return canvas


def _trunk(canvas: Canvas) -> None:
    """Skin, fat, muscular wall with ribs, lungs, heart."""
    subject, whole = canvas.subject, (slice(None), slice(None), slice(None))
    x, y, z = canvas._shaped
    side, front, back = subject.fat_mm
    muscle_x = CAVITY_MM[0] + 10.0
    muscle_front, muscle_back = CAVITY_MM[1] + 8.0, CAVITY_MM[1] + 12.0
    depth, middle = 0.5 * (muscle_front + muscle_back), 0.5 * (muscle_back - muscle_front)
    skin_depth = depth + 0.5 * (front + back)
    skin_middle = middle + 0.5 * (back - front)
    inside = wall(x, y, z, CAVITY_MM)
    muscle = wall(x, y, z, (muscle_x, depth), middle)
    canvas.paint("fat", whole, wall(x, y, z, (muscle_x + side, skin_depth), skin_middle) < 0)
    canvas.paint("muscle", whole, muscle < 0)
    level = (z + 0.55 * y) / 27.0
    rib = np.abs(level - np.floor(level) - 0.5) < 0.17
    shell = (inside > 2.0) & (muscle < -1.5) & (z > 80.0 + 0.25 * y) & rib
    canvas.paint("bone", whole, shell & (np.abs(x) > 35.0))
    canvas.paint("fat", whole, inside < 0)
    above = np.broadcast_to(diaphragm(x, y, z, subject.domes_mm), inside.shape)
    cavity = inside < -1.0
    canvas.paint("muscle", whole, cavity & (above > -3.0) & (above < 1.0))
    lung = cavity & (above >= 1.0)
    canvas.paint("right_lung", whole, lung & (x < -24.0))
    canvas.paint("left_lung", whole, lung & (x > 30.0))
    box, field = canvas.field("heart")
    canvas.paint("heart", box, (field < 0) & (above[box] >= 1.0) & cavity[box])


def _discs(canvas: Canvas, box: Box) -> None:
    """Discs between the vertebral bodies."""
    level = canvas.warped[2][box] / 37.0
    gap = (level - np.floor(level) < 0.2) & (canvas.warped[1][box] < 57.0)
    canvas.paint("disc", box, gap & (canvas.tissue[box] == canvas.code("bone")))


def _gas(canvas: Canvas, box: Box, lumen: npt.NDArray[np.bool_]) -> None:
    """Gas in front of a flat fluid level: the patient lies on the back."""
    rows = np.count_nonzero(lumen, axis=(0, 2))
    wanted = canvas.subject.gas * float(np.count_nonzero(lumen))
    level = int(np.searchsorted(np.cumsum(rows), wanted))
    gas = lumen.copy()
    gas[:, level:] = False
    canvas.paint("stomach_gas", box, gas)


def _lesions(canvas: Canvas) -> None:
    """Tumors, wherever the liver still has the voxel."""
    liver = canvas.code("liver")
    for lesion in canvas.subject.lesions:
        box = canvas.box(_around(lesion.at, lesion.semi), 4.0)
        field = _ball(Ball(lesion.at, lesion.semi), *(axis[box] for axis in canvas.warped))
        field += 0.25 * min(lesion.semi) * canvas.rough[0][box]
        canvas.paint("liver_tumor", box, (field < 0) & (canvas.tissue[box] == liver))
