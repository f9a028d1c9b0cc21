"""Post-processing of predicted masks by anatomy: largest pieces, veins, tumors inside their organs.

The rules of the authors' pseudo-label code, each by name, each can be
left out. All voxel counts and the 5³ margins are the authors' and assume 1.5 mm voxels; on another
grid they mean other volumes. Examination applies none of them unless told to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import cc3d
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from clbench.data.anatomy.midline import midline, split_left_right
from clbench.data.nifti import spacing_of
from clbench.data.volume import Volume, bounding_box
from clbench.errors import unknown_name
from clbench.spec.taxonomy import structure

if TYPE_CHECKING:
    from torch import Tensor

Mask = NDArray[np.bool_]
Masks = MutableMapping[str, Mask]
"""Structure → (D, H, W) mask, RAS, 1.5 mm: axis 0 grows to the patient's right, axis 2 upwards."""

LESIONS: dict[str, tuple[int, int]] = {
    "kidney_tumor": (5, 80),
    "liver_tumor": (20, 20),
    "pancreas_tumor": (1, 100),
    "hepatic_vessel_tumor": (10, 80),
    "lung_tumor": (10, 30),
    "colon_tumor": (3, 100),
    "kidney_cyst": (20, 20),
}
"""Lesion → (most pieces kept, size in voxels of 1.5 mm that a kept piece must exceed)."""

HOSTS: dict[str, tuple[str, ...]] = {
    "kidney_tumor": ("right_kidney", "left_kidney"),
    "liver_tumor": ("liver",),
}
"""Lesion → organs it may lie in; the authors restrict these two only."""

MARGIN = 2
"""Reach in voxels of the 5³ closing and dilation around the host organs."""

# ------------------------------------------------------------------------------- pieces of masks


def largest_components(mask: Mask, k: int, *, above_vox: int = 0) -> Mask:
    """The k largest 26-connected pieces of `mask` that hold more than `above_vox` voxels.

    Of equally large pieces the one that comes first in C order is kept.

    Args:
        mask: (D, H, W) bool.
        k: how many pieces to keep at most.
        above_vox: a piece must hold more voxels than this.

    Source: paper, section 4.1.2, as the authors' pseudo-label code does it.
    """
    largest = np.zeros(mask.shape, dtype=bool)
    if (box := bounding_box(mask)) is None:
        return largest
    labels, order = _ranked(mask[box])
    keep = [label for label, vox in order[:k] if vox > above_vox]
    largest[box] = np.isin(labels, keep) if len(keep) > 1 else labels == (keep[0] if keep else -1)
    return largest


def host_region(hosts: Sequence[Mask]) -> Mask:
    """Where a lesion of these organs may lie: their largest pieces, closed and widened by 5³.

    As many pieces of the union are kept as there are organs.

    Source: the authors' pseudo-label code (binary closing 5³, then dilation 5³; outside the volume
        counts as empty in both).
    """
    union = hosts[0].copy()
    for host in hosts[1:]:
        union |= host
    organs = largest_components(union, len(hosts))
    region = np.zeros(union.shape, dtype=bool)
    if (box := bounding_box(organs)) is None:
        return region
    # nothing grows by more than dilation + dilation; the margin keeps cropping without effect
    wide = tuple(
        slice(max(0, s.start - 3 * MARGIN), min(n, s.stop + 3 * MARGIN))
        for s, n in zip(box, union.shape, strict=True)
    )
    closed = _filtered(ndimage.minimum_filter, _filtered(ndimage.maximum_filter, organs[wide]))
    region[wide] = _filtered(ndimage.maximum_filter, closed)
    return region


def _filtered(extreme: Callable[..., NDArray[Any]], mask: Mask) -> Mask:
    cube = extreme(mask.astype(np.uint8), 2 * MARGIN + 1, mode="constant", cval=0)
    return cube.astype(bool)


def _ranked(mask: Mask) -> tuple[NDArray[Any], list[tuple[int, int]]]:
    """The 26-connected pieces, numbered, and (number, voxels): largest first, then C order."""
    labels = np.asarray(cc3d.connected_components(np.ascontiguousarray(mask), connectivity=26))
    inside = labels[mask]
    values, first, voxels = np.unique(inside, return_index=True, return_counts=True)
    rank = np.lexsort((first, -voxels))
    return labels, [(int(values[i]), int(voxels[i])) for i in rank]


# ------------------------------------------------------------------------------------- the rules


def lesions_in_hosts(masks: Masks) -> None:
    """Remove voxels of kidney and liver tumors outside the region of their organs.

    A lesion whose organs are not all among the masks is left alone; an organ that is there but
    empty leaves no region, hence no lesion.
    """
    for lesion, hosts in HOSTS.items():
        if lesion in masks and all(host in masks for host in hosts):
            tumor = masks[lesion]
            if tumor.any():
                masks[lesion] = tumor & host_region([masks[host] for host in hosts])


def largest_lesions(masks: Masks) -> None:
    """Keep the largest pieces of each lesion, those above its least size (`LESIONS`)."""
    for lesion, (k, least) in LESIONS.items():
        if lesion in masks:
            masks[lesion] = largest_components(masks[lesion], k, above_vox=least)


def largest_component(masks: Masks) -> None:
    """Keep the largest piece of every structure that a body holds in one piece.

    Source: the authors' list of classes. Differs: the taxonomy's `single_component` adds the
        superior mesenteric artery and the iliac arteries.
    """
    for name in list(masks):
        if structure(name).single_component:
            masks[name] = largest_components(masks[name], 1)


def veins_above_pancreas(masks: Masks) -> None:
    """Remove portal and splenic vein below the lowest slice of the pancreas.

    Differs: the authors' code fails on an empty pancreas; here the vein is then left alone.
    """
    name = "portal_and_splenic_vein"
    if name not in masks or "pancreas" not in masks:
        return
    levels = np.flatnonzero(masks["pancreas"].any(axis=(0, 1)))
    if levels.size:
        vein = masks[name].copy()
        vein[:, :, : levels[0]] = False
        masks[name] = vein


def left_right(masks: Masks, plane: float | None = None) -> None:
    """Give each piece of a mirrored pair to the side it lies on; a prediction loses nothing.

    Not part of the default: the authors apply it to labels, not to predictions.

    Args:
        masks: the predictions of a case.
        plane: index along axis 0 of the body's midline; None where the image does not show it,
            and the sides stay as predicted.
    """
    if plane is None:
        return
    for name in list(masks):
        partner = structure(name).mirror
        if name.startswith("left_") and partner is not None and partner in masks:
            masks[name], masks[partner] = split_left_right(masks[name] | masks[partner], plane)


RULES: dict[str, Callable[[Masks], None]] = {
    "left_right": left_right,
    "lesions_in_hosts": lesions_in_hosts,
    "largest_lesions": largest_lesions,
    "largest_component": largest_component,
    "veins_above_pancreas": veins_above_pancreas,
}
"""Every rule, in order of application: lesions see organs as predicted, veins a clean pancreas."""

DEFAULT_RULES = (
    "lesions_in_hosts",
    "largest_lesions",
    "largest_component",
    "veins_above_pancreas",
)
"""What the authors' pseudo-label code applies."""


def known(rules: Sequence[str], where: object = None) -> None:
    """Refuse a rule nobody knows.

    Raises:
        UnknownName: with the closest known name.
    """
    for rule in rules:
        if rule not in RULES:
            raise unknown_name("post-processing rule", rule, RULES, where)


def apply_rules(
    masks: Masks, rules: Sequence[str] = DEFAULT_RULES, *, plane: float | None = None
) -> None:
    """Apply the named rules to `masks`, replacing entries; the order is that of `RULES`.

    Args:
        masks: structure → (D, H, W) mask.
        rules: names of rules.
        plane: index along axis 0 of the body's midline, for `left_right`.

    Raises:
        UnknownName: a rule nobody knows.
    """
    known(rules)
    for name, rule in RULES.items():
        if name in rules:
            partial(rule, plane=plane)(masks) if rule is left_right else rule(masks)


class BitMasks(MutableMapping[str, Mask]):
    """A bit pattern array seen as one mask per structure; only one mask exists at a time."""

    def __init__(self, bits: NDArray[Any], structures: Sequence[str]) -> None:
        self.bits = bits
        self.structures = tuple(structures)

    def _flag(self, name: str) -> Any:
        if name not in self.structures:
            raise KeyError(name)
        return self.bits.dtype.type(1 << self.structures.index(name))

    def __getitem__(self, name: str) -> Mask:
        mask: Mask = (self.bits & self._flag(name)) != 0
        return mask

    def __setitem__(self, name: str, mask: Mask) -> None:
        flag = self._flag(name)
        self.bits &= ~flag
        self.bits |= np.where(mask, flag, self.bits.dtype.type(0))

    def __delitem__(self, name: str) -> None:
        raise TypeError("a bit pattern keeps its structures")

    def __iter__(self) -> Iterator[str]:
        return iter(self.structures)

    def __len__(self) -> int:
        return len(self.structures)


def clean_bits(
    bits: NDArray[Any], structures: Sequence[str], rules: Sequence[str] = DEFAULT_RULES
) -> NDArray[Any]:
    """A cleaned copy of a bit pattern array: (D, H, W), bit k = structures[k].

    Args:
        bits: (D, H, W) unsigned, bit k = structures[k].
        structures: canonical names, in bit order.
        rules: names of rules, applied in the order of `RULES`.
    """
    view = BitMasks(bits.copy(), structures)
    apply_rules(view, rules)
    return view.bits


def clean(
    masks: Tensor,
    structures: Sequence[str],
    rules: Sequence[str] = DEFAULT_RULES,
    volume: Volume | None = None,
) -> Tensor:
    """A cleaned copy of (K, D, H, W) bool masks on the CPU; channel k = structures[k].

    Args:
        masks: (K, D, H, W) bool, on the CPU; not changed.
        structures: the K canonical names.
        rules: names of rules, applied in the order of `RULES`.
        volume: the case the masks are of; `left_right` needs it.
    """
    plane = None
    if volume is not None and "left_right" in rules:
        plane = midline(volume.image, spacing_of(volume.affine))
    out = masks.clone()
    arrays: dict[str, Mask] = dict(zip(structures, out.numpy(), strict=True))
    apply_rules(arrays, rules, plane=plane)
    for k, name in enumerate(structures):
        out.numpy()[k] = arrays[name]
    return out
