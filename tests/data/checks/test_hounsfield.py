"""Images that are no CT in HU are noted; heads, crops, padded scans and metal are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from clbench.data.checks.hounsfield import hounsfield_notes

Array = NDArray[np.float32]


@pytest.fixture(scope="module")
def body() -> Array:
    """An abdomen: air, a rim of fat, soft tissue, a spine and a filled vessel."""
    rng = np.random.default_rng(0)
    x, y, _ = np.indices((60, 50, 30))
    r = np.hypot((x - 30) / 26, (y - 25) / 21)
    image = np.where(r < 0.8, rng.normal(50, 15, r.shape), rng.normal(-100, 15, r.shape))
    image[np.hypot(x - 30, y - 12) < 4] = 900
    image[np.hypot(x - 30, y - 22) < 3] = 320
    image[r >= 1] = rng.normal(-1000, 10, int((r >= 1).sum()))
    return image.astype(np.float32)


@pytest.fixture(scope="module")
def head() -> Array:
    """A head alone: brain, a skull of a fifth of its volume, scalp, air."""
    rng = np.random.default_rng(0)
    x, y, z = np.indices((60, 60, 50))
    r = np.sqrt((x - 30) ** 2 + (y - 30) ** 2 + (z - 25) ** 2)
    image = np.where(r < 20, rng.normal(35, 8, r.shape), rng.normal(1000, 150, r.shape))
    image = np.where(r >= 22, rng.normal(-80, 20, r.shape), image)
    return np.where(r >= 24, -1000, image).astype(np.float32)


def metal(a: Array) -> Array:
    a = a.copy()
    a[30:33, 20:23, 5:10] = 30_000
    return a


CT: dict[str, Callable[[Array], Array]] = {
    "as it is": lambda a: a,
    "cut to 12 bit": lambda a: a.clip(-1024, 3071),
    "cropped within the body": lambda a: a[15:45, 8:42],
    "cropped, padded with -2000": lambda a: np.pad(a[15:45, 8:42], 12, constant_values=-2000),
    "cropped, padded with 0": lambda a: np.pad(a[15:45, 8:42], 12, constant_values=0),
    "outside the scanner's field: -3024": lambda a: np.pad(a, 20, constant_values=-3024),
    "soft tissue alone, like water": lambda a: (
        np.random.default_rng(0).uniform(-20, 20, (22, 20, 12))
        + np.where(np.indices((22, 20, 12))[0] > 12, 60 * (np.indices((22, 20, 12))[1] > 8), 0)
    ),
    "little fat": lambda a: np.random.default_rng(0).normal(40, 20, (30, 22, 24)),
    "a few slices": lambda a: a[:, :, 10:13],
    "clipped to the window": lambda a: a.clip(-175, 250),
    "metal": metal,
}
NO_CT: dict[str, Callable[[Array], Array]] = {
    "unsigned, 1024 added": lambda a: (a + 1024).clip(0),
    "1024 added, padding left at -1000": lambda a: np.pad(a + 1024, 9, constant_values=-1000),
    "unsigned, wrapped around": lambda a: a.astype(np.int16).astype(np.uint16).astype(np.float32),
    "0 to 1": lambda a: (a.clip(-175, 250) + 175) / 425,
    "0 to 255": lambda a: ((a.clip(-175, 250) + 175) / 425 * 255).round(),
    "0 to 1, padded": lambda a: np.pad((a.clip(-175, 250) + 175) / 425, 6, constant_values=-1000),
    "0 to 255, padded": lambda a: np.pad(
        ((a.clip(-175, 250) + 175) / 425 * 255).round(), 6, constant_values=-1024
    ),
    "-1 to 1": lambda a: a.clip(-1000, 1000) / 1000,
    "mean 0, sd 1": lambda a: (a - a.mean()) / a.std(),
    "divided by 10": lambda a: (a / 10).round(),
    "divided by 10, with one corner in the body": lambda a: (a[8:, 8:] / 10).round(),
    "constant 0": lambda a: np.zeros_like(a),
    "air alone": lambda a: a * 0 - 1000 + np.arange(a.shape[2]),
}


def mr(a: Array) -> Array:
    """Background near 0, fat bright, soft tissue between: what an MR scanner stores."""
    rng = np.random.default_rng(1)
    signal = np.where(a < -50, 900, 400) + rng.normal(0, 20, a.shape)
    return np.abs(np.where(a < -500, rng.normal(0, 10, a.shape), signal)).astype(np.float32)


@pytest.mark.parametrize("how", CT)
def test_a_ct_is_not_noted(how: str, body: Array) -> None:
    assert hounsfield_notes(CT[how](body)) == ()


@pytest.mark.parametrize("how", NO_CT)
def test_what_is_no_ct_is_noted_once(how: str, body: Array) -> None:
    (said,) = hounsfield_notes(NO_CT[how](body))
    assert said.startswith("no CT in HU: ")
    assert "values from" in said or "every voxel is" in said


def test_an_mr_is_noted(body: Array) -> None:
    assert hounsfield_notes(mr(body))
    noise = np.random.default_rng(2).normal(0, 8, body.shape)
    zero_mean = np.where(body < -500, noise, mr(body)).astype(np.float32)
    assert hounsfield_notes(zero_mean)
    assert hounsfield_notes(zero_mean - 60)


def test_a_head_is_a_ct(head: Array) -> None:
    assert hounsfield_notes(head) == ()
    assert hounsfield_notes(head[8:52, 8:52, 5:45]) == ()
    assert hounsfield_notes(head + 1024)


def test_the_advice_makes_a_ct_of_it(body: Array) -> None:
    stored = (body + 1024).clip(0)
    (said,) = hounsfield_notes(stored)
    assert "rescale = {intercept = -1024}" in said
    assert hounsfield_notes(stored - 1024) == ()
    (padded,) = hounsfield_notes(np.pad(stored, 9, constant_values=-2000))
    assert "rescale = {intercept = -1024}" in padded
    (scaled,) = hounsfield_notes((body.clip(-175, 250) + 175) / 425)
    assert "rescale" not in scaled


def test_a_reversed_sign_is_noted_with_the_way_back(body: Array) -> None:
    (said,) = hounsfield_notes(-body)
    assert said.startswith("no CT in HU")
    assert "rescale = {slope = -1}" in said


def test_the_two_real_cts_in_whole_and_in_part(real_ct: Path) -> None:
    for case in ("case_A", "case_C"):
        image: Any = nib.load(real_ct / case / "ct.nii.gz")
        values = np.asarray(image.dataobj, dtype=np.float32)
        third = tuple(slice(n // 3, 2 * n // 3) for n in values.shape)
        for part in (values, values[third], values[:, :, -20:], values[:, :, :20]):
            assert hounsfield_notes(part) == ()
            assert hounsfield_notes(np.pad(part, 8, constant_values=-2048)) == ()
        assert hounsfield_notes(values.clip(-1024) + 1024)
        assert hounsfield_notes((values / 10).round())
        if case == "case_A":  # the other one's field of view holds hardly any air
            assert hounsfield_notes(-values)
        assert hounsfield_notes((values.clip(-175, 250) + 175) / 425)
