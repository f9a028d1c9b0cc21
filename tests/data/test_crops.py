"""Crops: pure, padded with the unknown, centered by the stated odds, augmented as stated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from clbench.data.crops import crop, draw_center
from clbench.data.layouts import CaseFiles
from clbench.data.pseudo_labels import PseudoMap
from clbench.data.volume import Volume, centers
from clbench.evaluation.sliding_window import VolumePredictor
from clbench.nets.heads import ConvHead, Segmenter
from clbench.spec.benchmark import Source
from clbench.spec.settings import DataSettings
from clbench.strategy.contract import Batch, Lesson, Phase
from clbench.strategy.teacher_labels import labelled_on_line, pseudo_labels
from clbench.testing.fixtures import tiny_backbone
from clbench.training.batches import Material, draw_from

PLAIN = DataSettings(rotate90=0.0, shift_intensity=0.0)
LITS = Source(name="lits", title="", layout="lits", labels={1: "liver", 2: "liver_tumor"})


def volume(shape: tuple[int, int, int] = (20, 24, 16)) -> Volume:
    rng = np.random.default_rng(3)
    image = rng.integers(-300, 400, shape).astype(np.int16)
    bits = np.zeros(shape, np.uint8)
    bits[5:15, 6:18, 4:12] = 1
    bits[8:10, 8:10, 6:8] = 3
    where, counts = centers(bits, image > -175)
    return Volume(
        source="lits", case="0", image=image, bits=bits, names=LITS.structures,
        annotated=frozenset(LITS.structures), affine=np.eye(4), native_affine=np.eye(4),
        native_shape=shape, start=(0, 0, 0), window_hu=(-175.0, 250.0),
        files=CaseFiles(case="0", image=Path("i"), label=Path("l")), table=LITS,
        where=where, counts=counts,
    )  # fmt: skip


def test_a_crop_is_a_pure_function_of_its_seed() -> None:
    v, data = volume(), DataSettings(rotate90=0.5, shift_intensity=0.5)
    state = np.random.get_state()[1].copy()  # type: ignore[index,union-attr]  # noqa: NPY002
    one, two, other = (
        crop(v, ["liver", "spleen"], patch_vox=(8, 8, 8), data=data, seed=s) for s in (1, 1, 2)
    )
    assert all(np.array_equal(a, b) for a, b in zip(one[:2], two[:2], strict=True))
    assert not np.array_equal(one[0], other[0])
    assert np.array_equal(state, np.random.get_state()[1])  # noqa: NPY002


def test_shapes_types_and_values() -> None:
    image, label, pseudo = crop(
        volume(), ["liver", "liver_tumor", "spleen"], patch_vox=(8, 10, 6), data=PLAIN, seed=0
    )
    assert image.shape == (1, 8, 10, 6)
    assert image.dtype == np.float32
    assert label.shape == (3, 8, 10, 6)
    assert label.dtype == np.uint8
    assert pseudo is None
    assert 0 <= image.min() <= image.max() <= 1
    assert set(np.unique(label[:2])) <= {0, 1}
    assert (label[2] == 255).all()


def test_padding_is_air_and_unknown_to_all() -> None:
    v = volume((20, 24, 7))
    soft = PseudoMap(["spleen"], False, np.full((1, 20, 24, 7), 100, np.uint8))
    image, label, pseudo = crop(
        v, ["liver", "spleen"], patch_vox=(20, 32, 16), data=PLAIN, seed=0, pseudo=soft
    )
    inside = np.zeros((20, 32, 16), bool)
    inside[:, 4:28, 4:11] = True  # as much before as after
    assert (image[0][~inside] == 0).all()
    assert (label[:, ~inside] == 255).all()
    assert pseudo is not None
    assert (pseudo[:, ~inside] == 255).all()
    np.testing.assert_array_equal(image[0][inside], v.windowed((slice(None),) * 3).ravel())
    assert (pseudo[1][inside] == 100).all()
    assert (pseudo[0] == 255).all()  # no prediction for the liver
    assert (label[0][inside] != 255).all()


def test_image_label_and_pseudo_stay_together() -> None:
    v = volume()
    marker = replace(v, image=np.where(v.bits & 1, 250, -175).astype(np.int16))
    hard = PseudoMap(["liver"], True, v.bits & 1)
    data = replace(PLAIN, rotate90=1.0)
    for seed in range(12):
        image, label, pseudo = crop(
            marker, ["liver"], patch_vox=(8, 8, 6), data=data, seed=seed, pseudo=hard
        )
        assert pseudo is not None
        np.testing.assert_array_equal(image[0], label[0])
        np.testing.assert_array_equal(pseudo[0], label[0] * 254)


@pytest.mark.parametrize(
    ("ratio", "share"), [((2.0, 1.0), 2 / 3), ((1.0, 1.0), 1 / 2), ((1.0, 0.0), 1.0)]
)
def test_positive_to_negative_centers(ratio: tuple[float, float], share: float) -> None:
    v, data = volume(), replace(PLAIN, posneg=ratio)
    rng = np.random.default_rng(0)
    hits = [v.bits[draw_center(v, data, rng)] > 0 for _ in range(3000)]
    assert np.mean(hits) == pytest.approx(share, abs=0.03)


def test_negative_centers_are_never_air() -> None:
    v, data = volume(), replace(PLAIN, posneg=(0.0, 1.0))
    rng = np.random.default_rng(0)
    assert all(v.image[draw_center(v, data, rng)] > -175 for _ in range(300))


def test_within_a_class_every_voxel_is_equally_likely() -> None:
    v, data = volume(), replace(PLAIN, posneg=(1.0, 0.0))
    rng = np.random.default_rng(0)
    tumor = np.mean([v.bits[draw_center(v, data, rng)] == 3 for _ in range(6000)])
    assert tumor == pytest.approx(8 / 960, abs=0.004)


def test_class_ratio_gives_tumors_their_share() -> None:
    v, data = volume(), replace(PLAIN, sampling="class_ratio")
    rng = np.random.default_rng(0)
    found = [int(v.bits[draw_center(v, data, rng)]) for _ in range(4000)]
    shares = [found.count(b) / 4000 for b in (0, 1, 3)]
    np.testing.assert_allclose(shares, [1 / 7, 1 / 7, 5 / 7], atol=0.03)
    healthy = replace(
        v,
        bits=v.bits & 1,
        **dict(zip(("where", "counts"), centers(v.bits & 1, v.image > -175), strict=True)),
    )
    found = [int(healthy.bits[draw_center(healthy, data, rng)]) for _ in range(4000)]
    assert found.count(1) / 4000 == pytest.approx(1 / 2, abs=0.03)  # background : organ stay 1 : 1


def test_an_empty_case_gives_its_middle() -> None:
    v = replace(volume(), where={}, counts={})
    assert draw_center(v, PLAIN, np.random.default_rng(0)) == (10, 12, 8)


def test_the_patch_is_centered_where_the_volume_allows() -> None:
    v = volume()
    only = replace(
        v, where={1: np.array([np.ravel_multi_index((10, 12, 8), v.image.shape)])}, counts={1: 1}
    )
    image, _, _ = crop(only, ["liver"], patch_vox=(6, 6, 6), data=PLAIN, seed=0)
    np.testing.assert_array_equal(image[0], v.windowed((slice(7, 13), slice(9, 15), slice(5, 11))))
    edge = replace(v, where={1: np.array([0])}, counts={1: 1})
    image, _, _ = crop(edge, ["liver"], patch_vox=(6, 6, 6), data=PLAIN, seed=0)
    np.testing.assert_array_equal(image[0], v.windowed((slice(0, 6),) * 3))


def test_rotation_keeps_up_and_mirrors_nothing() -> None:
    v = volume((8, 8, 8))
    whole = v.windowed((slice(None),) * 3)
    turns = [np.rot90(whole, k, axes=(0, 1)) for k in range(4)]
    seen = set()
    for seed in range(60):
        image, _, _ = crop(
            v, ["liver"], patch_vox=(8, 8, 8), data=replace(PLAIN, rotate90=0.6), seed=seed
        )
        match = [k for k in range(4) if np.array_equal(image[0], turns[k])]
        assert len(match) == 1  # nothing but a rotation in the axial plane
        seen.add(match[0])
    assert seen == {0, 1, 2, 3}


def test_a_patch_that_is_not_square_turns_by_half_only() -> None:
    v = volume()
    for seed in range(20):
        image, _, _ = crop(
            v, ["liver"], patch_vox=(20, 24, 16), data=replace(PLAIN, rotate90=1.0), seed=seed
        )
        np.testing.assert_array_equal(image[0], np.rot90(v.windowed((slice(None),) * 3), 2))


def test_voxels_that_are_not_square_turn_by_half_only() -> None:
    """A quarter turn would show a body stretched by what the spacings differ."""
    v = replace(volume((20, 20, 16)), affine=np.diag([0.8, 1.6, 3.0, 1.0]))
    for seed in range(20):
        image, _, _ = crop(
            v, ["liver"], patch_vox=(20, 20, 16), data=replace(PLAIN, rotate90=1.0), seed=seed
        )
        np.testing.assert_array_equal(image[0], np.rot90(v.windowed((slice(None),) * 3), 2))


def test_the_shift_is_one_number_within_its_range() -> None:
    v = volume()
    shifts = []
    for seed in range(200):
        a, _, _ = crop(v, ["liver"], patch_vox=(20, 24, 16), data=PLAIN, seed=seed)
        b, _, _ = crop(
            v,
            ["liver"],
            patch_vox=(20, 24, 16),
            data=replace(PLAIN, shift_intensity=0.2),
            seed=seed,
        )
        delta = b - a
        assert np.ptp(delta) < 1e-6
        shifts.append(float(delta.flat[0]))
    assert np.mean(np.array(shifts) != 0) == pytest.approx(0.2, abs=0.08)
    assert max(map(abs, shifts)) <= 0.1


def test_labels_made_on_line_equal_those_stored() -> None:
    """One window holds the volume and nothing is augmented: the same but for one rounding."""
    torch.manual_seed(0)
    v, names = volume((12, 16, 16)), ("spleen", "aorta")
    backbone = tiny_backbone()
    model = Segmenter(backbone, ConvHead(backbone.final_channels, background=False))
    model.add(names)
    model.eval().requires_grad_(False)
    server = VolumePredictor(
        model, lambda logits, _: logits.sigmoid(), names, patch_vox=(16, 16, 16)
    )
    stored = PseudoMap(names, False, pseudo_labels(server, v, hard=False).numpy())
    structures = (*names, "liver_tumor")
    image, label, pseudo = crop(
        v, structures, patch_vox=(16, 16, 16), data=PLAIN, seed=0, pseudo=stored
    )
    batch = Batch(
        image=torch.from_numpy(image)[None], label=torch.from_numpy(label)[None], pseudo=None,
        structures=structures, new=(False, False, True), cases=("2/0",),
    )  # fmt: skip
    found = labelled_on_line(batch, model(batch.image).logits.sigmoid()).pseudo
    assert found is not None
    assert pseudo is not None
    assert np.ptp(pseudo[:2, 2:14]) > 10  # it has something to say
    assert np.abs(found[0].numpy().astype(int) - pseudo.astype(int)).max() <= 1
    assert (found[0, :, :2] == 255).all()  # padding
    assert (found[0, 2] == 255).all()


def test_what_lies_beside_a_case_is_cut_and_turned_with_its_crop() -> None:
    v = volume((20, 24, 6))  # lower than the patch: padded along axis 2
    data = DataSettings(rotate90=1.0, shift_intensity=0.5, shift_range=0.1)
    material = Material(
        volumes={(1, "0"): v}, weights={}, pseudo={}, patch_vox=(8, 8, 8), data=data
    )
    lesson = Lesson(number=2, learns=("spleen",), structures=("liver", "spleen"), source="lits")
    draw = draw_from(lesson, Phase(), material, seed=0)
    liver = torch.from_numpy(v.labels(["liver"], np.index_exp[:, :, :])).half()  # type: ignore[arg-type]
    for number in range(6):
        image, label, beside = draw((1, "0"), ("der", number), torch.cat([liver, liver + 2]))
        inside = label[:1] != 255
        assert inside.any()
        assert not inside.all()
        assert torch.equal(beside[:1][inside].byte(), label[:1][inside])
        assert torch.equal(beside[1:][inside].byte(), label[:1][inside] + 2)
        assert (beside[:1][~inside] == 0).all()
        plain = draw((1, "0"), ("der", number))
        assert torch.equal(plain[0], image)
        assert torch.equal(plain[1], label)
