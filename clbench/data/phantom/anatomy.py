"""Anatomy of the phantom: a table of facts per structure, and shapes to build a body from.

Numbers that describe a structure (place, spread, volume, HU, neighbours) stand in `anatomy.csv`;
the shapes below are balls and tubes in a standard torso. A further structure needs a row there, a
recipe here and a place in `ORDER`.

Coordinates are millimetres in the standard torso: x grows to the patient's left, y to the back, z
up; x = y = 0 is the middle of the body, z = 0 the level of L4/L5.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

TORSO_MM = (324.0, 224.0, 250.0)
"""Size of the standard torso that the fractions cx, cy, cz of the table refer to."""

ORDER = (
    "small_intestine", "colon", "liver", "spleen", "stomach", "duodenum", "pancreas", "psoas",
    "paraspinal", "crus", "right_kidney", "left_kidney", "bone", "right_adrenal_gland",
    "left_adrenal_gland", "gall_bladder", "esophagus", "postcava", "portal_and_splenic_vein",
    "celiac_trunk", "superior_mesenteric_artery", "left_iliac_artery", "right_iliac_artery",
    "aorta",
)  # fmt: skip
"""Painting order: where two structures meet, the later one has the voxel."""


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


RECIPES: Mapping[str, Recipe] = {
    "liver": Recipe(
        parts=(
            Ball((-74, 4, 152), (72, 84, 84), (-0.05, 0.05, 0.0)),
            Ball((-2, -46, 180), (72, 38, 40), (0.0, 0.0, -0.04)),
            Ball((-22, 40, 100), (34, 48, 62), cut=True),
            Ball((-40, -40, 78), (44, 40, 36), cut=True),
        ),
        abdominal=True,
    ),
    "spleen": Recipe(
        parts=(
            Ball((101, 40, 150), (33, 48, 56), (-0.08, 0.10, -0.1)),
            Ball((62, 12, 152), (36, 42, 70), (0.0, 0.0, 0.0), cut=True),
        ),
        abdominal=True,
    ),
    "stomach": Recipe(
        parts=(
            Tube(
                (
                    (60, 12, 190, 33), (66, -12, 162, 31), (58, -42, 132, 27), (28, -56, 112, 22),
                    (-4, -50, 110, 17), (-24, -42, 116, 12),
                )
            ),
        ),
        abdominal=True,
        rind_mm=3.0,
        rind="stomach_wall",
    ),
    "right_kidney": Recipe(
        parts=(
            Ball((-62, 30, 76), (26, 31, 57), (0.14, 0.07, -0.3)),
            Ball((-40, 15, 76), (17, 13, 19), cut=True),
        ),
        rind_mm=9.0,
        core="right_kidney_medulla",
    ),
    "left_kidney": Recipe(
        parts=(
            Ball((70, 33, 86), (26, 31, 57), (-0.13, 0.07, 0.3)),
            Ball((48, 18, 86), (17, 13, 19), cut=True),
        ),
        rind_mm=9.0,
        core="left_kidney_medulla",
    ),
    "gall_bladder": Recipe(
        parts=(Tube(((-48, -30, 126, 7), (-60, -44, 108, 15), (-66, -52, 96, 15))),)
    ),
    "esophagus": Recipe(
        parts=(Tube(((4, 4, 262, 9.5), (5, 2, 215, 9.5), (16, 2, 199, 9.5), (36, 4, 190, 10))),)
    ),
    "aorta": Recipe(parts=(Tube(((15, 22, 262, 12), (12, 15, 150, 11.5), (8, 10, 40, 10))),)),
    "celiac_trunk": Recipe(
        parts=(
            Tube(((12, 12, 134, 5.5), (13, -14, 135, 5.5), (36, -16, 140, 5))),
            Tube(((13, -14, 135, 5.5), (-12, -20, 139, 5))),
        )
    ),
    "superior_mesenteric_artery": Recipe(
        parts=(Tube(((11, 8, 114, 5.5), (10, -8, 110, 5.5), (8, -14, 84, 5.5), (2, -22, 44, 5))),)
    ),
    "left_iliac_artery": Recipe(
        parts=(Tube(((10, 9, 40, 7), (26, 10, 14, 6.5), (42, 16, -24, 6.5))),)
    ),
    "right_iliac_artery": Recipe(
        parts=(Tube(((6, 8, 40, 7), (-10, -4, 18, 6.5), (-32, -6, -24, 6.5))),)
    ),
    "postcava": Recipe(
        parts=(
            Tube(
                ((-20, 12, -10, 13), (-22, 8, 120, 13.5), (-25, 2, 180, 13), (-17, -6, 214, 13),
                 (-14, -10, 240, 13)),
                flat=0.75,
            ),
        )
    ),
    "portal_and_splenic_vein": Recipe(
        parts=(
            Tube(
                ((84, 22, 142, 5.5), (60, 14, 134, 6), (28, -6, 122, 6.5), (-2, -12, 112, 8),
                 (-24, -16, 132, 8), (-46, -14, 150, 8), (-72, -6, 158, 6))
            ),
            Tube(((-2, -12, 112, 7), (2, -16, 84, 6))),
            Tube(((-46, -14, 150, 6), (-28, -38, 172, 5.5))),
        )
    ),
    "pancreas": Recipe(
        parts=(
            Ball((-22, -20, 94), (19, 15, 25)),
            Tube(
                ((-16, -24, 106, 13), (4, -30, 116, 11.5), (30, -20, 124, 13), (56, 0, 134, 13),
                 (78, 16, 144, 11))
            ),
        )
    ),
    "right_adrenal_gland": Recipe(
        parts=(
            Ball((-30.5, 24, 121), (4.0, 13, 17), (0.0, 0.05, 0.10)),
            Ball((-38, 23, 119), (4.0, 12, 15), (0.0, 0.05, -0.28)),
        ),
        halo_mm=3.0,
    ),
    "left_adrenal_gland": Recipe(
        parts=(
            Ball((34, 17, 117), (4.0, 14, 17), (0.0, 0.05, -0.13)),
            Ball((43, 16, 117), (4.0, 13, 16), (0.0, 0.05, 0.3)),
        ),
        halo_mm=3.0,
    ),
    "duodenum": Recipe(
        parts=(
            Tube(
                ((-24, -42, 117, 12), (-42, -34, 116, 13), (-50, -20, 98, 12.5),
                 (-48, -14, 76, 12.5), (-32, -10, 62, 12), (2, -11, 60, 11), (26, -14, 72, 11))
            ),
        )
    ),
    "colon": Recipe(
        parts=(
            Tube(
                ((-112, 10, -30, 23), (-110, 2, 40, 23), (-98, -22, 66, 21), (-55, -58, 52, 19),
                 (0, -62, 40, 19), (55, -58, 58, 19), (98, -14, 98, 19), (112, 18, 90, 18),
                 (114, 24, 40, 18), (108, 18, -30, 18))
            ),
        ),
        abdominal=True,
    ),
    "small_intestine": Recipe(
        parts=(
            Tube(((-80, -30, 10, 13), (-50, -50, 20, 13), (-20, -34, 8, 14), (10, -52, 12, 13),
                  (40, -34, 20, 13), (76, -40, 12, 13))),
            Tube(((80, -10, 36, 13), (50, -34, 44, 13), (24, -24, 36, 13), (-10, -40, 30, 12),
                  (-50, -26, 34, 13), (-78, -8, 30, 13))),
            Tube(((60, 4, 14, 13), (44, -10, 2, 14), (-40, -12, 2, 14), (-66, 2, 8, 13))),
        ),
        abdominal=True,
    ),
    "psoas": Recipe(
        parts=(
            Tube(((-30, 40, 150, 6), (-36, 42, 60, 17), (-44, 38, -20, 23))),
            Tube(((30, 40, 150, 6), (36, 42, 60, 17), (44, 38, -20, 23))),
        )
    ),
    "paraspinal": Recipe(
        parts=(
            Tube(((-36, 76, 270, 22), (-38, 74, -20, 25)), flat=0.85),
            Tube(((36, 76, 270, 22), (38, 74, -20, 25)), flat=0.85),
        )
    ),
    "crus": Recipe(
        parts=(
            Tube(((-12, 20, 80, 4), (-13, 14, 150, 6.5), (-9, 6, 200, 4))),
            Tube(((24, 24, 90, 3.5), (25, 18, 150, 5), (22, 8, 200, 4))),
        )
    ),
    "bone": Recipe(
        parts=(
            Tube(((0, 38, 270, 19), (0, 38, -20, 22)), flat=0.85),
            Tube(((0, 62, 270, 7), (0, 62, -20, 8))),
            Tube(((0, 84, 270, 4.5), (0, 84, -20, 4.5)), flat=2.6),
        )
    ),
    "heart": Recipe(parts=(Ball((26, -36, 258), (60, 42, 44), (0.1, 0.0, 0.0)),)),
}  # fmt: skip


@cache
def tissues() -> dict[str, Tissue]:
    """The table: name → row, in the order of the file."""
    text = (
        resources.files("clbench.data.phantom").joinpath("anatomy.csv").read_text(encoding="utf-8")
    )
    table = {}
    for row in csv.DictReader(text.splitlines()):
        number = {
            key: float(value) if value else 0.0 for key, value in row.items() if key in _NUMBERS
        }
        fractions = (row["cx"] or "0.5", row["cy"] or "0.5", row["cz"] or "0.5")
        cx, cy, cz = (float(value) for value in fractions)
        table[row["name"]] = Tissue(
            name=row["name"],
            part_of=row["part_of"],
            follows=row["follows"],
            centre_mm=((cx - 0.5) * TORSO_MM[0], (cy - 0.5) * TORSO_MM[1], cz * TORSO_MM[2]),
            sd_mm=(number["sd_x_mm"], number["sd_y_mm"], number["sd_z_mm"]),
            size_sd=number["size_sd"],
            rough_mm=number["rough_mm"],
            vol_ml=(number["vol_ml_low"], number["vol_ml_high"]),
            hu_pv=number["hu_pv"],
            hu_native=number["hu_native"],
            hu_sd=number["hu_sd"],
            texture_hu=number["texture_hu"],
            touches=tuple(row["touches"].split(";")) if row["touches"] else (),
        )
    return table


_NUMBERS = frozenset(
    [
        "sd_x_mm",
        "sd_y_mm",
        "sd_z_mm",
        "size_sd",
        "rough_mm",
        "vol_ml_low",
        "vol_ml_high",
        "hu_pv",
        "hu_native",
        "hu_sd",
        "texture_hu",
    ]
)
