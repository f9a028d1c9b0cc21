"""Anatomy of the phantom: a table of facts per structure, and shapes to build a body from.

Numbers that describe a structure (place, spread, volume, HU, neighbours) stand in `anatomy.csv`;
their shapes, balls and tubes in a standard torso, stand in `shapes.toml` in painting order. A
further structure needs a row in the one and a table in the other.

Coordinates are millimetres in the standard torso: x grows to the patient's left, y to the back, z
up; x = y = 0 is the middle of the body, z = 0 the level of L4/L5.
"""

from __future__ import annotations

import csv
import hashlib
import json
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources

from pydantic import TypeAdapter

TORSO_MM = (324.0, 224.0, 250.0)
"""Size of the standard torso that the fractions cx, cy, cz of the table refer to."""

_TEXT_COLUMNS = ("name", "part_of", "follows", "touches", "source")
_ONE_NUMBER = ("size_sd", "rough_mm", "hu_pv", "hu_native", "hu_sd", "texture_hu")


def _text(name: str) -> str:
    """Return the text of a file that lies beside this module."""
    return resources.files("clbench.data.phantom").joinpath(name).read_text(encoding="utf-8")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tissue:
    """One row of the table: something with its own HU, most often a structure."""

    name: str
    """Name of the row."""
    part_of: str
    """The structure whose label it carries; empty for tissue nobody labels."""
    follows: str
    """The structure whose displacement it shares, so that neighbours stay neighbours."""
    centre_mm: tuple[float, float, float]
    """Centre in the standard torso."""
    sd_mm: tuple[float, float, float]
    """Own displacement between subjects, beyond that of `follows`."""
    size_sd: float
    """Spread of the linear size, as a fraction."""
    rough_mm: float
    """How far the surface departs from its recipe."""
    vol_ml: tuple[float, float]
    """Volumes one meets; (0, 0) where unknown."""
    hu_pv: float
    """Mean HU in the portal venous phase."""
    hu_native: float
    """Mean HU without contrast medium."""
    hu_sd: float
    """Spread of the mean between subjects."""
    texture_hu: float
    """Slow variation of HU inside one subject."""
    touches: tuple[str, ...]
    """Structures it is in contact with."""


@dataclass(frozen=True, slots=True)
class Ball:
    """An ellipsoid."""

    at: tuple[float, float, float]
    """Centre in mm."""
    semi: tuple[float, float, float]
    """Semi-axes in mm."""
    turn: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Tangents of half the turning angles: top to the left, top to the back, left to the back."""
    cut: bool = False
    """True: taken away from what the recipe has built so far."""


@dataclass(frozen=True, slots=True)
class Tube:
    """A bent tube: cones between neighbouring points."""

    points: tuple[tuple[float, float, float, float], ...]
    """(x, y, z, radius) in mm."""
    flat: float = 1.0
    """Depth (y) over width (x) of the cross-section."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How one structure is built."""

    parts: tuple[Ball | Tube, ...]
    """Union of the parts, in order; a cut takes away."""
    abdominal: bool = False
    """True: ends at the diaphragm and at the wall of the abdomen."""
    halo_mm: float = 0.0
    """Fat kept around it."""
    rind_mm: float = 0.0
    """Depth of the outer layer, where inside and outside differ."""
    rind: str = ""
    """Tissue of the outer layer; the structure's own where empty."""
    core: str = ""
    """Tissue within; the structure's own where empty."""


_SHAPES = tomllib.loads(_text("shapes.toml"))
SHAPES_DIGEST = "a4c332d95a528000e1a85c48ac4bc84385e735584db02a522eb2f889eef42bd8"
"""`shapes_digest` of the shapes that all versions of the phantom are drawn from."""
RECIPES = TypeAdapter(dict[str, Recipe]).validate_python(_SHAPES)
"""Structure → how it is built, in painting order: where two meet, the later one has the voxel."""
ORDER = tuple(name for name in RECIPES if name != "heart")
"""Structures that are painted one after the other; the heart belongs to the chest."""


def shapes_digest() -> str:
    """SHA-256 of what `shapes.toml` says, in its order; remarks and blanks do not count."""
    return hashlib.sha256(json.dumps(_SHAPES).encode()).hexdigest()


@cache
def tissues() -> dict[str, Tissue]:
    """The table: name → row, in the order of the file."""
    table = {}
    for row in csv.DictReader(_text("anatomy.csv").splitlines()):
        cx, cy, cz = (float(row[key] or 0.5) for key in ("cx", "cy", "cz"))
        number = {key: float(row[key] or 0.0) for key in row if key not in _TEXT_COLUMNS}
        table[row["name"]] = Tissue(
            name=row["name"],
            part_of=row["part_of"],
            follows=row["follows"],
            centre_mm=((cx - 0.5) * TORSO_MM[0], (cy - 0.5) * TORSO_MM[1], cz * TORSO_MM[2]),
            sd_mm=(number["sd_x_mm"], number["sd_y_mm"], number["sd_z_mm"]),
            vol_ml=(number["vol_ml_low"], number["vol_ml_high"]),
            touches=tuple(row["touches"].split(";")) if row["touches"] else (),
            **{name: number[name] for name in _ONE_NUMBER},
        )
    return table
