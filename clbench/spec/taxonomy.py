"""Every structure clbench can name: its prompt name, printed aliases, kind and family ties.

The 32 classes are those of the paper's Table 2 in its order (`template_id`
1 to 32); 33 to 38 are the further JHH structures of the authors' template; the iliac arteries serve
the public stand-in of the body extension. Benchmarks refer to structures by `name` only. A
benchmark's file may declare further ones (`declare`), which live as long as the process; a run
records them (`declare_recorded`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from clbench.errors import SpecError, unknown_name
from clbench.spec.validation import Names, checked, from_toml

Kind = Literal["organ", "vessel", "duct", "device", "tumor", "cyst"]


@checked(SpecError)
class Structure:
    """One structure of the body.

    A structure contains the structures below it: a voxel of `liver_tumor` is a voxel of `liver`.
    """

    name: str
    """Canonical name, snake case, American spelling."""
    prompt: str
    """The words that stand for [CLS] in a text prompt."""
    kind: Kind
    """What it is; decides sampling class and post-processing."""
    template_id: int | None = None
    """Number in the paper's Table 2 (1 to 32) or the authors' extension (33 to 38)."""
    aliases: Names = ()
    """Names printed in the paper's tables and used by public data sets."""
    parent: str | None = None
    """The structure that contains this one."""
    mirror: str | None = None
    """The partner on the other side of the body."""
    single_component: bool = False
    """True where a healthy body holds it in one piece (largest component may be kept)."""

    @property
    def tolerance_mm(self) -> float:
        """Tolerance of its surface Dice: 1 mm where it is thin all over, otherwise 2 mm.

        Metrics Reloaded takes the tolerance from how far raters differ; there are no second raters
        for most of these data sets, so it is stated instead and can be swept.
        """
        thin = self.kind in ("vessel", "duct", "device") or self.name.endswith("adrenal_gland")
        return 1.0 if thin else 2.0


def _s(
    name: str, prompt: str, kind: Kind, tid: int | None, *aliases: str, **more: object
) -> Structure:
    return Structure(
        name=name,
        prompt=prompt,
        kind=kind,
        template_id=tid,
        aliases=aliases,
        **more,  # type: ignore[arg-type]  # keyword arguments are checked by the dataclass
    )


_ALL = (
    _s("spleen", "spleen", "organ", 1, "Spleen", single_component=True),
    _s("right_kidney", "right kidney", "organ", 2, "R kidney", "Right Kidney", "kidney_right",
       mirror="left_kidney", single_component=True),
    _s("left_kidney", "left kidney", "organ", 3, "L kidney", "Left Kidney", "kidney_left",
       mirror="right_kidney", single_component=True),
    _s("gall_bladder", "gall bladder", "organ", 4, "Gall bladder", "Gall Bladder", "gallbladder",
       single_component=True),
    _s("esophagus", "esophagus", "organ", 5, "Esophagus", single_component=True),
    _s("liver", "liver", "organ", 6, "Liver", single_component=True),
    _s("stomach", "stomach", "organ", 7, "Stomach", single_component=True),
    _s("aorta", "aorta", "vessel", 8, "Aorta", single_component=True),
    _s("postcava", "postcava", "vessel", 9, "Postcava", "vC", "inferior_vena_cava",
       single_component=True),
    _s("portal_and_splenic_vein", "portal vein and splenic vein", "vessel", 10,
       "Portal & splenic vein", "Veins", "portal_vein_and_splenic_vein"),
    _s("pancreas", "pancreas", "organ", 11, "Pancreas", single_component=True),
    _s("right_adrenal_gland", "right adrenal gland", "organ", 12, "R adrenal gland", "R gland",
       "adrenal_gland_right", mirror="left_adrenal_gland", single_component=True),
    _s("left_adrenal_gland", "left adrenal gland", "organ", 13, "L adrenal gland", "L gland",
       "adrenal_gland_left", mirror="right_adrenal_gland", single_component=True),
    _s("duodenum", "duodenum", "organ", 14, "Duodenum", single_component=True),
    _s("hepatic_vessel", "hepatic vessel", "vessel", 15, "Hepatic vessel", parent="liver"),
    _s("right_lung", "right lung", "organ", 16, "Right lung", mirror="left_lung"),
    _s("left_lung", "left lung", "organ", 17, "Left lung", mirror="right_lung"),
    _s("colon", "colon", "organ", 18, "Colon", single_component=True),
    _s("small_intestine", "intestine", "organ", 19, "Intestine", "small_bowel",
       single_component=True),
    _s("rectum", "rectum", "organ", 20, "Rectum", single_component=True),
    _s("bladder", "bladder", "organ", 21, "Bladder", "urinary_bladder", single_component=True),
    _s("prostate", "prostate", "organ", 22, "Prostate/uterus", single_component=True),
    _s("left_femur_head", "left head of femur", "organ", 23, "Left head of femur",
       mirror="right_femur_head", single_component=True),
    _s("right_femur_head", "right head of femur", "organ", 24, "Right head of femur",
       mirror="left_femur_head", single_component=True),
    _s("celiac_trunk", "celiac trunk", "vessel", 25, "Celiac truck", "Celiac trunk",
       single_component=True),
    _s("kidney_tumor", "kidney tumor", "tumor", 26, "Kidney tumor"),
    _s("liver_tumor", "liver tumor", "tumor", 27, "Liver tumor", "Liver Tumor", parent="liver"),
    _s("pancreas_tumor", "pancreas tumor", "tumor", 28, "Pancreas tumor", parent="pancreas"),
    _s("hepatic_vessel_tumor", "hepatic vessel tumor", "tumor", 29, "Hepatic vessel tumor",
       parent="liver"),
    _s("lung_tumor", "lung tumor", "tumor", 30, "Lung tumor"),
    _s("colon_tumor", "colon tumor", "tumor", 31, "Colon tumor", parent="colon"),
    _s("kidney_cyst", "kidney cyst", "cyst", 32, "Kidney cyst"),
    _s("common_bile_duct", "common bile duct", "duct", 33, "CBD"),
    _s("pancreatic_duct", "pancreatic duct", "duct", 34, "Pancreatic duct"),
    _s("superior_mesenteric_artery", "superior mesenteric artery", "vessel", 35, "SMA",
       single_component=True),
    _s("left_renal_vein", "left renal vein", "vessel", 36, "Kidney_LtRV",
       mirror="right_renal_vein"),
    _s("right_renal_vein", "right renal vein", "vessel", 37, "Kidney_RtRV",
       mirror="left_renal_vein"),
    _s("bile_duct_stent", "common bile duct stent", "device", 38, "CBD stent"),
    _s("left_iliac_artery", "left iliac artery", "vessel", None, "iliac_artery_left",
       mirror="right_iliac_artery", single_component=True),
    _s("right_iliac_artery", "right iliac artery", "vessel", None, "iliac_artery_right",
       mirror="left_iliac_artery", single_component=True),
)  # fmt: skip

STRUCTURES: dict[str, Structure] = {s.name: s for s in _ALL}
"""Canonical name → structure, in the paper's order."""

DECLARED: dict[str, Structure] = {}
"""Structures that benchmark files have added, see `declare`."""

_BY_ALIAS = {alias: s.name for s in _ALL for alias in (s.name, *s.aliases)}


def structure(name: str, where: object = None) -> Structure:
    """The structure called `name`.

    Raises:
        UnknownName: with the closest known name.
    """
    found = STRUCTURES.get(name) or DECLARED.get(name)
    if found is None:
        raise unknown_name("structure", name, [*STRUCTURES, *DECLARED], where)
    return found


def declare(structures: Sequence[Structure], where: object = None) -> None:
    """Add structures the taxonomy does not have; the same ones again change nothing.

    Raises:
        SpecError: a name that is taken, is no name, or family ties that do not hold.
    """
    added = {s.name: s for s in structures}
    if len(added) < len(structures):
        raise SpecError("a structure is declared twice", where=where, got=[*added])
    for new in structures:
        if new.name in STRUCTURES or DECLARED.get(new.name, new) != new:
            raise SpecError(
                f"the name {new.name!r} is taken",
                where=where,
                expected="a structure clbench does not have yet",
                next_step="use clbench's own without declaring it"
                if new.name in STRUCTURES
                else "another file of this session declares it differently: choose another name",
            )
        if not re.fullmatch(r"[a-z][a-z0-9_]*", new.name):
            raise SpecError(
                "a declared structure needs a name in snake case",
                where=where,
                expected="a small letter first, then small letters, digits and _",
                got=repr(new.name),
            )
        for tie in (new.parent, new.mirror):
            if tie is not None and tie not in added:
                structure(tie, f"{where}, structure {new.name!r}")
        if new.mirror is not None and (
            new.mirror not in added or added[new.mirror].mirror != new.name
        ):
            raise SpecError(
                f"the mirror of {new.name!r} does not point back",
                where=where,
                expected=f"{new.mirror!r} declared with mirror = {new.name!r}",
            )
        seen, parent = {new.name}, new.parent
        while parent in added:
            if parent in seen:
                raise SpecError(f"{new.name!r} contains itself", where=where)
            seen.add(parent)
            parent = added[parent].parent
    DECLARED.update(added)


def declare_recorded(structures: Iterable[Mapping[str, Any]]) -> None:
    """Add the structures that a run's record holds, so that its names can be looked up.

    What clbench has by itself stays; of two records that differ, the later one counts.
    """
    for fields in structures:
        if fields["name"] not in STRUCTURES:
            DECLARED[fields["name"]] = from_toml(
                Structure, fields, raised=SpecError, where="the record of a run"
            )


def canonical(alias: str) -> str:
    """The canonical name behind a printed header or a public data set's name."""
    declared = {a: s.name for s in DECLARED.values() for a in (s.name, *s.aliases)}
    found = _BY_ALIAS.get(alias) or declared.get(alias)
    if found is None:
        raise unknown_name("structure", alias, [*_BY_ALIAS, *declared])
    return found


def ancestors(name: str) -> tuple[str, ...]:
    """What contains `name`, nearest first: `liver_tumor` → (`liver`,)."""
    found: list[str] = []
    parent = structure(name).parent
    while parent is not None:
        found.append(parent)
        parent = structure(parent).parent
    return tuple(found)


def depth(name: str) -> int:
    """How many structures contain `name`."""
    return len(ancestors(name))


def with_descendants(name: str, among: Iterable[str]) -> tuple[str, ...]:
    """`name` and whatever of `among` lies inside it, in the order of `among`."""
    return tuple(other for other in among if other == name or name in ancestors(other))
