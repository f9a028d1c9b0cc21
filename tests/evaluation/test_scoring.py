"""Examination: the window equals MONAI's, memory stays bounded, scores equal plain counting."""

from __future__ import annotations

import gc
import itertools
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from locations import GOLDEN_FILES
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.inferers import sliding_window_inference
from monai.inferers.utils import _get_scan_interval
from torch import Tensor, nn

from clbench.errors import SettingError, StoreError, TrainingError
from clbench.evaluation.metrics import overlap
from clbench.evaluation.predictions import read_prediction, refuse_other_grid, write_prediction
from clbench.evaluation.scoring import (
    ScoreContext,
    mean_dice,
    score_case,
    structure_dice,
    to_native,
)
from clbench.evaluation.sliding_window import (
    VolumePredictor,
    importance_map,
    sliding_slabs,
    stretches,
    window_starts,
)
from clbench.nets.output import Output
from clbench.spec import registry

GOLDEN = json.loads((GOLDEN_FILES / "postprocess.json").read_text())


class Net(nn.Module):
    """A small random network whose answer depends on where the window ends (zero padding)."""

    def __init__(self, channels: int = 3, *, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.net = nn.Sequential(
            nn.Conv3d(1, 4, 3, padding=1),
            nn.LeakyReLU(),
            nn.InstanceNorm3d(4),
            nn.Dropout3d(dropout),
            nn.Conv3d(4, channels, 3, padding=1),
        )

    def forward(self, image: Tensor) -> Output:
        return Output(logits=self.net(image))


@dataclass(kw_only=True)
class Case:
    """What examination needs of a volume."""

    image: np.ndarray
    bits: np.ndarray
    names: tuple[str, ...] = ("liver", "liver_tumor")
    annotated: frozenset[str] = frozenset({"liver", "liver_tumor"})
    source: str = "lits"
    case: str = "0"
    native: np.ndarray | None = None
    axes: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def windowed(self, index: tuple[slice, slice, slice]) -> np.ndarray:
        return self.image[index].astype(np.float32)

    def native_axes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if self.axes is not None:
            return self.axes
        d, h, w = self.image.shape
        return np.arange(d), np.arange(h), np.arange(w)

    def native_bits(self) -> np.ndarray:
        return self.bits if self.native is None else self.native


def random_case(shape: tuple[int, int, int] = (13, 11, 9), seed: int = 0, names: int = 2) -> Case:
    rng = np.random.default_rng(seed)
    return Case(
        image=rng.random(shape, dtype=np.float32),
        bits=rng.integers(0, 2**names, shape).astype(np.uint8),
    )


def ours(
    image: np.ndarray,
    forward: Callable[[Tensor], Tensor],
    patch: tuple[int, int, int],
    **more: object,
) -> Tensor:
    slabs = list(
        sliding_slabs(forward, lambda rows: image[rows], image.shape, patch_vox=patch, **more)  # type: ignore[arg-type]
    )
    edges = [s[:2] for s in slabs]
    assert edges[0][0] == 0
    assert edges[-1][1] == image.shape[0]
    assert all(a[1] == b[0] and a[0] < a[1] for a, b in itertools.pairwise(edges))
    assert all(s[2].dtype == torch.float32 and s[2].device.type == "cpu" for s in slabs)
    return torch.cat([s[2] for s in slabs], dim=1)


def monai(
    image: np.ndarray,
    forward: Callable[[Tensor], Tensor],
    patch: tuple[int, int, int],
    overlap: float,
) -> Tensor:
    with torch.no_grad():
        found = sliding_window_inference(
            torch.from_numpy(image)[None, None], patch, 1, forward, overlap, mode="gaussian"
        )
    assert isinstance(found, Tensor)
    return found[0]


# -------------------------------------------------------------------------------- sliding window


@pytest.mark.parametrize("patch", [(96, 96, 96), (56, 40, 16), (32, 48, 16), (7, 5, 1), (1, 1, 1)])
def test_the_importance_map_is_monais_to_the_bit(patch: tuple[int, int, int]) -> None:
    weight = importance_map(patch)
    assert torch.equal(weight, compute_importance_map(patch, mode="gaussian", sigma_scale=0.125))
    z, y, x = (math.exp(-(((size - 1) / 2 / (0.125 * size)) ** 2) / 2) for size in patch)
    assert float(weight[0, 0, 0]) == pytest.approx(max(z * y * x, 1e-3), rel=1e-5)
    assert weight.dtype == torch.float32


@settings(max_examples=200, deadline=None)
@given(
    patch=st.integers(1, 40), more=st.integers(0, 200), overlap=st.floats(0, 0.97, allow_nan=False)
)
def test_window_starts_are_those_of_monais_inferer(patch: int, more: int, overlap: float) -> None:
    size = patch + more
    interval = _get_scan_interval((size,), (patch,), 1, (overlap,))
    starts = window_starts(size, patch, overlap)
    assert starts == [s[0].start for s in dense_patch_slices((size,), (patch,), interval)]
    assert starts[0] == 0
    assert starts[-1] == size - patch
    assert all(0 < after - before <= interval[0] for before, after in itertools.pairwise(starts))


@pytest.mark.parametrize(
    ("shape", "patch"),
    [
        ((31, 23, 19), (8, 10, 6)),
        ((8, 10, 6), (8, 10, 6)),
        ((5, 23, 19), (8, 8, 8)),  # shorter than the patch along the first axis
        ((21, 3, 30), (8, 8, 8)),
        ((3, 4, 1), (8, 9, 10)),  # along all of them, even and odd padding
        ((9, 9, 9), (8, 8, 8)),
    ],
)
@pytest.mark.parametrize("windows", [1, 3, 100])
@pytest.mark.parametrize("overlap", [0.5, 0.3])
def test_equals_monai(
    shape: tuple[int, int, int], patch: tuple[int, int, int], windows: int, overlap: float
) -> None:
    net, image = Net(), np.random.default_rng(1).random(shape, dtype=np.float32)
    found = ours(image, lambda x: net(x).logits, patch, overlap=overlap, windows=windows)
    expected = monai(image, lambda x: net(x).logits, patch, overlap)
    assert found.shape == (3, *shape)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 26), st.integers(1, 12), st.integers(1, 12)),
    patch=st.tuples(st.integers(2, 9), st.integers(2, 9), st.integers(2, 9)),
    overlap=st.sampled_from([0.0, 0.25, 0.5, 0.6, 0.9]),
    windows=st.integers(1, 5),
)
def test_equals_monai_for_any_shape(
    shape: tuple[int, int, int], patch: tuple[int, int, int], overlap: float, windows: int
) -> None:
    net, image = Net(2), np.random.default_rng(2).random(shape, dtype=np.float32)
    found = ours(image, lambda x: net(x).logits, patch, overlap=overlap, windows=windows)
    expected = monai(image, lambda x: net(x).logits, patch, overlap)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def _live_bytes() -> int:
    """Bytes of all torch storages that are alive."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) is Tensor:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _peak(depth: int, run: Callable[[np.ndarray, Callable[[Tensor], Tensor]], object]) -> int:
    """Largest number of live tensor bytes seen inside the network during `run`."""
    image = np.zeros((depth, 12, 12), np.float32)  # not a tensor, so not counted
    weight = torch.ones(6)
    gc.collect()
    gc.freeze()  # what is there already is neither counted nor walked over
    base, seen = _live_bytes(), [0]

    def forward(x: Tensor) -> Tensor:
        seen[0] = max(seen[0], _live_bytes() - base)
        return x * weight.view(1, 6, 1, 1, 1)

    run(image, forward)
    gc.unfreeze()
    return seen[0]


def test_memory_does_not_grow_with_the_length_of_the_volume() -> None:
    def slabs(image: np.ndarray, forward: Callable[[Tensor], Tensor]) -> None:
        for _ in sliding_slabs(
            forward, lambda rows: image[rows], image.shape, patch_vox=(8, 8, 8), windows=4
        ):
            pass

    def whole(image: np.ndarray, forward: Callable[[Tensor], Tensor]) -> None:
        x = torch.from_numpy(image)[None, None]
        sliding_window_inference(x, (8, 8, 8), 4, forward, 0.5, mode="gaussian")

    short, long = _peak(16, slabs), _peak(80, slabs)
    assert short == long
    # accumulators: 6 channels and two planes of weights over one patch of rows; the slab of the
    # image; the last answer; the window's weights, and 4 windows in and 6 channels of them out
    assert long <= 4 * (12 * 12 * (8 * (6 + 2 + 1) + 4 * 6) + 8**3 * (1 + 4 * (1 + 6)))
    # the measurement itself sees growth where there is some
    assert _peak(80, whole) > 3 * _peak(16, whole)


def test_the_image_is_read_a_patch_of_rows_at_a_time() -> None:
    asked: list[slice] = []

    def read(rows: slice) -> np.ndarray:
        asked.append(rows)
        array = np.ones((rows.stop - rows.start, 9, 9), np.float32)
        array.flags.writeable = False  # as a memory map is
        return array

    list(sliding_slabs(lambda x: x, read, (50, 9, 9), patch_vox=(8, 8, 8)))
    assert max(s.stop - s.start for s in asked) == 8
    assert len(asked) == len(window_starts(50, 8, 0.5))


def test_wrong_use_is_refused() -> None:
    with pytest.raises(TrainingError, match="another shape"):
        ours(np.zeros((9, 9, 9), np.float32), lambda x: x[..., ::2], patch=(8, 8, 8))
    with pytest.raises(SettingError, match="reader"):
        list(
            sliding_slabs(
                lambda x: x,
                lambda rows: np.zeros((1, 2, 3), np.float32),
                (9, 9, 9),
                patch_vox=(8, 8, 8),
            )
        )


# ---------------------------------------------------------------------------------------- server


def sigmoid(logits: Tensor, structures: tuple[str, ...]) -> Tensor:
    return torch.sigmoid(logits)


def server(model: nn.Module | None = None, k: int = 2, **more: object) -> VolumePredictor:
    names = tuple(f"s{i}" for i in range(k))
    return VolumePredictor(
        model if model is not None else Net(k),
        **{"decode": sigmoid, "structures": names, "patch_vox": (8, 8, 8), **more},  # type: ignore[arg-type]
    )


def test_logits_are_blended_then_decoded() -> None:
    case, net = random_case((17, 12, 9)), Net(2)
    with torch.no_grad():
        net.net[-1].weight *= 30  # so that the order matters
    found = torch.cat([p for _, _, p in server(net).probabilities(case)], dim=1)  # type: ignore[arg-type]
    blended = monai(case.image, lambda x: net(x).logits, (8, 8, 8), 0.5)
    torch.testing.assert_close(found, torch.sigmoid(blended), rtol=1e-5, atol=1e-5)
    other = monai(case.image, lambda x: torch.sigmoid(net(x).logits), (8, 8, 8), 0.5)
    assert (found - other).abs().max() > 0.05


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.7])
@pytest.mark.parametrize("width", [5, 8, 9, 40, 61])
def test_stretches_of_a_long_volume_give_the_bits_of_the_whole(width: int, overlap: float) -> None:
    """Same windows in the same order for every voxel, whatever the memory allowed.

    Nothing is decoded: torch rounds a sigmoid otherwise at the ends of an array.
    """
    case = random_case((13, 11, width))
    ranges = {"s1": (min(4, width), max(4, width - 3))}
    examined = server(
        Net(2), overlap=overlap, ranges=lambda volume: ranges, decode=lambda logits, names: logits
    )
    whole = examined.predict(case)  # type: ignore[arg-type]
    probabilities = torch.cat([p for _, _, p in examined.probabilities(case)], dim=1)  # type: ignore[arg-type]
    assert whole.any()
    for most_bytes in (0, 40_000, 100_000, 1 << 40):
        seen = torch.full_like(probabilities, -1)

        def put(rows: slice, columns: slice, slab: Tensor, seen: Tensor = seen) -> None:
            assert bool((seen[:, rows, :, columns] == -1).all())
            seen[:, rows, :, columns] = slab

        got = examined.predict(case, watch_slab=put, most_bytes=most_bytes)  # type: ignore[arg-type]
        np.testing.assert_array_equal(got, whole)
        assert torch.equal(seen, probabilities)


def test_a_stretch_looks_at_no_more_columns_than_allowed() -> None:
    for most in range(16, 60):
        parts = stretches([0, 4, 8, 12, 16, 20, 24, 28, 31], 8, 39, most)
        assert [c for _, keep in parts for c in range(keep.start, keep.stop)] == list(range(39))
        for look, keep in parts:
            assert look.stop - look.start <= most
            assert look.start <= keep.start < keep.stop <= look.stop


def test_stretches_are_taken_only_where_they_save_memory() -> None:
    examined = server(k=2)
    per_column = 3 * 4 * 3 * 8 * 11
    assert len(examined._stretches(11, 40, 40 * per_column)) == 1
    assert len(examined._stretches(11, 40, 39 * per_column)) > 1
    assert len(server(k=2, windows=2)._stretches(11, 40, 0)) == 1


@pytest.mark.parametrize(("k", "dtype"), [(2, np.uint8), (11, np.uint16), (33, np.uint64)])
def test_bits_are_probabilities_above_one_half(k: int, dtype: type) -> None:
    case, examined = random_case(), server(k=k)
    bits = examined.predict(case)  # type: ignore[arg-type]
    found = torch.cat([p for _, _, p in examined.probabilities(case)], dim=1)  # type: ignore[arg-type]
    assert bits.dtype == dtype
    assert 0.05 < float((found > 0.5).float().mean()) < 0.95
    for i in range(k):
        np.testing.assert_array_equal((bits >> dtype(i)) & dtype(1), found[i].numpy() > 0.5)


class Constant(nn.Module):
    """Answers given logits everywhere."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.values = torch.tensor(values)

    def forward(self, image: Tensor) -> Output:
        shape = (image.shape[0], len(self.values), *image.shape[2:])
        return Output(logits=self.values.view(1, -1, 1, 1, 1).expand(shape))


def test_golden_threshold_is_strict() -> None:
    golden = GOLDEN["hard_pseudo_threshold"]
    bits = server(Constant(golden["logits"]), k=5).predict(random_case())  # type: ignore[arg-type]
    assert np.unique(bits).tolist() == [sum(m << k for k, m in enumerate(golden["mask"]))]


def test_decode_may_drop_channels_but_must_keep_its_word() -> None:
    def softmax(logits: Tensor, structures: tuple[str, ...]) -> Tensor:
        return torch.softmax(logits, dim=1)[:, 1:]

    case = random_case()
    bits = server(Constant([0.0, 3.0, 1.0]), decode=softmax).predict(case)  # type: ignore[arg-type]
    assert np.unique(bits).tolist() == [1]
    with pytest.raises(TrainingError, match="number of structures"):
        server(Constant([0.0, 3.0, 1.0])).predict(case)  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match="not a number"):
        server(Constant([0.0, math.nan])).predict(case)  # type: ignore[arg-type]


class Noisy(Net):
    """Draws random numbers even in evaluation mode, and drops out in training mode."""

    def __init__(self) -> None:
        super().__init__(2, dropout=0.9)

    def forward(self, image: Tensor) -> Output:
        assert not self.net.training
        assert torch.is_inference_mode_enabled()
        torch.rand(3)
        return super().forward(image)


def test_model_and_random_state_stay_as_they_were() -> None:
    net, case = Noisy(), random_case((40, 9, 9))
    net.train()
    net.net[0].eval()  # a frozen part stays frozen
    modes = [m.training for m in net.modules()]
    state = torch.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()  # noqa: NPY002  # the legacy state is what is watched
    server(net).predict(case)  # type: ignore[arg-type]
    walk = server(net).probabilities(case)  # type: ignore[arg-type]
    _, _, slab = next(walk)  # a walk left standing
    assert [m.training for m in net.modules()] == modes
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002
    (slab * torch.ones(1, requires_grad=True)).sum().backward()  # a plain tensor came out
    assert all(p.grad is None for p in net.parameters())
    assert all(p.requires_grad for p in net.parameters())


def test_the_model_comes_back_after_an_error() -> None:
    class Broken(Net):
        def forward(self, image: Tensor) -> Output:
            raise RuntimeError("no memory")

    net = Broken()
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no memory"):
        server(net).predict(random_case())  # type: ignore[arg-type]
    assert all(m.training for m in net.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_outside_its_axial_range_a_structure_is_empty() -> None:
    case = random_case()
    free = server(Net(2)).predict(case)  # type: ignore[arg-type]
    asked = []

    def ranges(volume: object) -> dict[str, tuple[int, int]]:
        asked.append(volume)
        return {"s1": (2, 5)}

    limited = server(Net(2), ranges=ranges).predict(case)  # type: ignore[arg-type]
    assert asked == [case]  # once a volume, not once a slab
    first, second = np.uint8(1), np.uint8(2)
    np.testing.assert_array_equal(limited & first, free & first)
    np.testing.assert_array_equal(limited[..., 2:5], free[..., 2:5])
    assert (free & second)[..., 5:].any()
    assert not (limited & second)[..., :2].any()
    assert not (limited & second)[..., 5:].any()


@pytest.mark.parametrize("bad", [{"spleen": (0, 1)}, {"s0": (5, 2)}, {"s0": (0, 99)}])
def test_an_axial_range_that_cannot_be_is_refused(bad: dict[str, tuple[int, int]]) -> None:
    with pytest.raises(TrainingError, match="axial range"):
        server(Net(2), ranges=lambda volume: bad).predict(random_case())  # type: ignore[arg-type]


def test_mean_dice_over_cases_then_structures() -> None:
    class Told(VolumePredictor):
        def __init__(self, answers: list[np.ndarray]) -> None:
            self.structures, self.answers = ("liver", "liver_tumor"), iter(answers)

        def predict(self, volume: object, *, postprocess: bool = False) -> np.ndarray:
            return next(self.answers)

    cases = [
        Case(image=line(0, 0, 0, 0), bits=line(1, 1, 3, 0)),
        Case(image=line(0, 0, 0, 0), bits=line(0, 1, 1, 0)),  # no tumor: says nothing about it
        Case(image=line(0, 0, 0, 0), bits=line(3, 3, 3, 3), annotated=frozenset({"liver"})),
    ]
    answers = [line(1, 1, 1, 0), line(0, 1, 0, 2), line(0, 0, 0, 0)]
    every = ("liver", "liver_tumor")
    # liver: 1, 2/3, 0; tumor: missed in the only case that counts

    found = mean_dice(structure_dice(Told(answers), cases, every))  # type: ignore[arg-type]
    assert found == pytest.approx((5 / 9 + 0) / 2)
    liver = structure_dice(Told(answers), cases, every[:1])  # type: ignore[arg-type]
    assert mean_dice(liver) == pytest.approx(5 / 9)
    none = structure_dice(Told(answers[1:2]), cases[1:2], every[1:])  # type: ignore[arg-type]
    assert math.isnan(mean_dice(none))


def test_postprocessing_is_off_unless_asked_for() -> None:
    class Threshold(nn.Module):
        def forward(self, image: Tensor) -> Output:
            return Output(logits=(image - 0.5) * 20)

    image = np.zeros((20, 9, 9), np.float32)
    image[2:6, 2:6, 2:6] = image[12, 4, 4] = 1
    case = Case(image=image, bits=np.zeros(image.shape, np.uint8))
    examined = VolumePredictor(
        Threshold(), sigmoid, ("liver",), patch_vox=(8, 8, 8), overlap=0.5, windows=1
    )
    plain, cleaned = examined.predict(case), examined.predict(case, postprocess=True)  # type: ignore[arg-type]
    assert plain.sum() == 65
    assert cleaned.sum() == 64


# --------------------------------------------------------------------------------------- scoring

TUMOR_EXT = registry.benchmark("tumor_ext")


def context() -> ScoreContext:
    return ScoreContext(benchmark=TUMOR_EXT, strategy="universal", seed=3, step=2)


def scores(bits: np.ndarray, structures: tuple[str, ...], case: Case) -> dict:
    rows = score_case(bits, structures, case, context())  # type: ignore[arg-type]
    found = {(r.scoring, r.metric, r.structure): r for r in rows}
    assert len(found) == len(rows)
    return found


def line(*values: int) -> np.ndarray:
    return np.array(values, np.uint8).reshape(-1, 1, 1)


def test_a_case_worked_by_hand() -> None:
    # truth: liver in voxels 0-3, tumor in 3; prediction: liver (bit 1) in 1-4, tumor (bit 2) in 3-4
    truth = line(1, 1, 1, 3, 0, 0)
    pred = line(0, 2, 2, 6, 6, 1)  # bit 0: a spleen the case does not annotate
    case = Case(image=truth.astype(np.float32), bits=truth)
    found = scores(pred, ("spleen", "liver", "liver_tumor"), case)
    liver, tumor = found["strict", "dice", "liver"], found["strict", "dice", "liver_tumor"]
    assert (liver.value, liver.gt_vox, liver.pred_vox, liver.status) == (0.75, 4, 4, "ok")
    assert (tumor.value, tumor.gt_vox, tumor.pred_vox) == (2 / 3, 1, 2)
    assert found["paper", "dice", "liver"].value == 6 / 9
    assert found["paper", "dice", "liver_tumor"].value == 2 / 4
    assert found["strict", "dice_ceiling", "liver"].value == 1.0
    assert (liver.bench, liver.bench_version, liver.strategy, liver.seed, liver.step) == (
        "tumor_ext", 1, "universal", 3, 2)  # fmt: skip
    assert (liver.eval_set, liver.case, liver.learned_at, tumor.learned_at) == ("lits", "0", 1, 2)
    for key in (("strict", "dice"), ("paper", "dice"), ("strict", "dice_ceiling")):
        spleen = found[(*key, "spleen")]
        assert spleen.status == "not_annotated"
        assert math.isnan(spleen.value)
    assert len(found) == 9


@pytest.mark.parametrize(
    ("truth", "pred", "status", "strict", "paper"),
    [
        (line(0, 0), line(0, 0), "both_empty", math.nan, math.nan),
        (line(0, 0), line(1, 0), "fp_only", math.nan, math.nan),
        (line(1, 0), line(0, 0), "fn_only", 0.0, 0.0),
        (line(1, 0), line(0, 1), "ok", 0.0, 0.0),
        (line(1, 0), line(1, 0), "ok", 1.0, 2 / 3),
    ],
)
def test_empty_masks_are_named_cases(
    truth: np.ndarray, pred: np.ndarray, status: str, strict: float, paper: float
) -> None:
    found = scores(pred, ("liver",), Case(image=truth.astype(np.float32), bits=truth))
    for scoring, value in (("strict", strict), ("paper", paper)):
        row = found[scoring, "dice", "liver"]
        assert row.status == status
        assert row.value == value or (math.isnan(row.value) and math.isnan(value))
        assert (row.gt_vox, row.pred_vox) == (int((truth & 1).sum()), int((pred & 1).sum()))


def test_bits_of_unannotated_structures_are_never_scored() -> None:
    truth = line(3, 3, 1, 0)  # the file holds tumor bits, but the case does not annotate them
    case = Case(image=truth.astype(np.float32), bits=truth, annotated=frozenset({"liver"}))
    found = scores(line(3, 1, 2, 0), ("liver", "liver_tumor"), case)
    assert found["strict", "dice", "liver"].value == 2 * 2 / (3 + 2)
    for scoring in ("strict", "paper"):
        tumor = found[scoring, "dice", "liver_tumor"]
        assert tumor.status == "not_annotated"
        assert tumor.gt_vox is None
        assert tumor.pred_vox is None
    # nor is a structure scored that the source never names
    odd = Case(image=case.image, bits=truth, annotated=frozenset({"liver", "spleen"}))
    assert scores(line(0, 0, 0, 0), ("spleen",), odd)["strict", "dice", "spleen"].status == (
        "not_annotated"
    )


def test_strict_lives_on_the_native_grid() -> None:
    # native grid: twice as fine along axis 0, two slices beyond the cropped model grid
    case = Case(
        image=np.zeros((2, 1, 1), np.float32),
        bits=line(1, 0),
        native=line(1, 1, 1, 0, 0, 1),
        axes=(np.array([-1, 0, 0, 1, 1, -1]), np.array([0]), np.array([0])),
    )
    found = scores(line(1, 1), ("liver",), case)
    row = found["strict", "dice", "liver"]
    assert (row.gt_vox, row.pred_vox, row.value) == (4, 4, 2 * 2 / 8)
    ceiling = found["strict", "dice_ceiling", "liver"]
    assert (ceiling.gt_vox, ceiling.pred_vox, ceiling.value) == (4, 2, 2 * 2 / 6)
    paper = found["paper", "dice", "liver"]
    assert (paper.gt_vox, paper.pred_vox, paper.value) == (1, 2, 2 / 4)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), slab=st.sampled_from([1, 50, 1 << 24]))
def test_scores_equal_plain_counting(seed: int, slab: int) -> None:
    rng = np.random.default_rng(seed)
    model = tuple(int(n) for n in rng.integers(1, 6, 3))
    axes = tuple(np.sort(rng.integers(-1, n, rng.integers(1, 8))) for n in model)
    axes = tuple(np.concatenate([a[a >= 0], a[a < 0]]) for a in axes)
    native = tuple(len(a) for a in axes)
    case = Case(
        image=np.zeros(model, np.float32),
        bits=rng.integers(0, 4, model).astype(np.uint8),
        native=rng.integers(0, 4, native).astype(np.uint8),
        axes=axes,  # type: ignore[arg-type]
    )
    pred = rng.integers(0, 8, model).astype(np.uint16)
    order = ("liver_tumor", "spleen", "liver")  # not the order of the truth
    before, overlap._SLAB_VOX = overlap._SLAB_VOX, slab
    try:
        found = scores(pred, order, case)
    finally:
        overlap._SLAB_VOX = before
    back = np.zeros(native, np.uint16)
    for i in np.ndindex(native):
        where = tuple(int(a[n]) for a, n in zip(axes, i, strict=True))
        back[i] = pred[where] if min(where) >= 0 else 0
    np.testing.assert_array_equal(to_native(pred, axes), back)  # type: ignore[arg-type]
    for name, p_bit, t_bit in (("liver_tumor", 0, 1), ("liver", 2, 0)):
        for scoring, p, t, one in (("strict", back, case.native, 0), ("paper", pred, case.bits, 1)):
            mine, true = p >> p_bit & 1 > 0, t >> t_bit & 1 > 0
            row = found[scoring, "dice", name]
            assert (row.pred_vox, row.gt_vox) == (mine.sum(), true.sum())
            if true.any():
                assert row.value == 2 * (mine & true).sum() / (mine.sum() + true.sum() + one)
            else:
                assert math.isnan(row.value)


def test_axes_may_have_gaps_or_miss_the_grid() -> None:
    bits = np.arange(1, 4, dtype=np.uint8).reshape(3, 1, 1)
    one = np.array([0])
    assert to_native(bits, (np.array([2, -1, 0]), one, one)).ravel().tolist() == [3, 0, 1]
    assert to_native(bits, (np.array([-1, -1]), one, one)).ravel().tolist() == [0, 0]


def test_every_case_is_scored_in_both_ways() -> None:
    case = Case(image=np.zeros((2, 1, 1), np.float32), bits=line(1, 0))
    expected = [("strict", "dice"), ("strict", "dice_ceiling"), ("paper", "dice")]
    assert [k[:2] for k in scores(line(1, 0), ("liver",), case)] == expected
    with pytest.raises(SettingError, match="grid"):
        scores(line(1, 0, 0), ("liver",), case)


# --------------------------------------------------------------------------- predictions on disk


@pytest.fixture
def kept(tmp_path: Path) -> tuple[Path, np.ndarray, tuple[str, ...], np.ndarray]:
    names = tuple(f"s{i}" for i in range(11))
    bits = np.random.default_rng(0).integers(0, 2**11, (5, 7, 3)).astype(np.uint16)
    affine = np.diag([1.5, 1.5, 1.5, 1.0])
    path = tmp_path / "step1" / "lits_0.npz"
    write_prediction(path, bits, names, affine, source="lits", case="0")
    return path, bits, names, affine


def test_predictions_come_back_exactly(
    kept: tuple[Path, np.ndarray, tuple[str, ...], np.ndarray],
) -> None:
    path, bits, names, affine = kept
    found = read_prediction(path)
    assert found.bits.dtype == bits.dtype
    np.testing.assert_array_equal(found.bits, bits)
    np.testing.assert_array_equal(found.affine, affine)
    assert (found.structures, found.source, found.case) == (names, "lits", "0")
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    again = path.with_name("again.npz")
    write_prediction(again, bits, names, affine, source="lits", case="0")
    assert again.read_bytes() == path.read_bytes()


def test_a_prediction_of_another_case_on_the_same_grid_is_refused(
    kept: tuple[Path, np.ndarray, tuple[str, ...], np.ndarray],
) -> None:
    path, bits, names, affine = kept
    own = SimpleNamespace(source="lits", case="0", bits=bits, affine=affine)
    other = SimpleNamespace(source="lits", case="1", bits=bits, affine=affine)
    refuse_other_grid(path, read_prediction(path), own)  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="not of this case") as err:
        refuse_other_grid(path, read_prediction(path), other)  # type: ignore[arg-type]
    assert (err.value.expected, err.value.got) == ("lits/1", "lits/0")
    write_prediction(path, bits, names, affine)  # does not say of which case
    refuse_other_grid(path, read_prediction(path), other)  # type: ignore[arg-type]


def test_a_full_disk_leaves_the_old_prediction(
    kept: tuple[Path, np.ndarray, tuple[str, ...], np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, bits, names, affine = kept
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        write_prediction(path, bits ^ bits.dtype.type(1), names, affine)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_damaged_predictions_are_refused(
    kept: tuple[Path, np.ndarray, tuple[str, ...], np.ndarray], tmp_path: Path
) -> None:
    path = kept[0]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(StoreError, match="cannot be read"):
        read_prediction(path)
    with pytest.raises(StoreError, match="missing"):
        read_prediction(tmp_path / "none.npz")
    np.savez(path, shape=np.array([{"an": "object"}], dtype=object))
    with pytest.raises(StoreError, match="cannot be read"):
        read_prediction(path)
