"""What a GPU's batches are made of, on a CPU: the same crops, in the same order, moved ahead."""

from __future__ import annotations

import runpy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clbench.data.pseudo_labels import PseudoMap
from clbench.strategies.finetune import Finetune
from clbench.strategy.contract import Batch, Phase
from clbench.testing.fixtures import same
from clbench.testing.harness import StrategyHarness
from clbench.training import device_batches
from clbench.training.batches import Crops, Material, collate
from clbench.training.device_batches import loader_workers, moved_ahead, to_batch

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory, cache_root: Path) -> tuple[Any, Material]:
    """Two steps' cases of the tiny course, one with pseudo labels, every crop turned and shifted."""
    folder = tmp_path_factory.mktemp("rig")
    harness = StrategyHarness(Finetune(), name="finetune", folder=folder, cache=cache_root)
    harness.plan.catalog.past = "images"
    harness.plan.catalog.step = 2
    lesson = harness.lesson(2)
    keys = [(n, c) for n in (1, 2) for c in harness.plan.lesson(n).cases]
    volumes = {key: harness.plan.catalog.open(*key, "train") for key in keys}
    first = volumes[keys[0]]
    drawn = np.random.default_rng(0).integers(0, 255, (1, *first.image.shape), np.uint8)
    data = replace(harness.plan.profile.data, rotate90=1.0, shift_intensity=0.8)
    return lesson, Material(
        volumes=volumes,
        weights=dict.fromkeys(keys, 1.0),
        pseudo={keys[0]: PseudoMap(lesson.structures[:1], False, drawn)},
        patch_vox=(12, 12, 40),  # longer than some axes: padded
        data=data,
    )


def batch_of(material: tuple[Any, Material], *, cut_only: bool, patch: Any = None) -> Batch:
    lesson, held = material
    if patch is not None:
        held = replace(held, patch_vox=patch)
    crops = Crops(lesson, Phase(), held, epochs=1, per_epoch=12, seed=5, cut_only=cut_only)
    return to_batch(collate([crops[i] for i in range(12)]), lesson, CPU)


@pytest.mark.parametrize("patch", [(12, 12, 40), (8, 12, 10)])
def test_crops_augmented_in_one_batch_have_the_bits_of_crops_augmented_one_by_one(
    patch: tuple[int, int, int], material: tuple[Any, Material]
) -> None:
    whole = batch_of(material, cut_only=True, patch=patch)
    single = batch_of(material, cut_only=False, patch=patch)
    for part in fields(Batch):
        assert same(getattr(whole, part.name), getattr(single, part.name)), part.name
    assert (whole.image.dtype, whole.label.dtype) == (torch.float32, torch.uint8)
    assert set(whole.label.unique().tolist()) == {0, 1, 255}
    assert len({case.partition("/")[0] for case in whole.cases}) == 2
    assert whole.pseudo is not None
    assert int((whole.pseudo != 255).sum()) > 0


def test_patterns_of_every_width_are_unpacked(material: tuple[Any, Material]) -> None:
    """Sources of more than eight structures have wider patterns, up to the sign bit of 64."""
    lesson, held = material
    crops = Crops(lesson, Phase(), held, epochs=1, per_epoch=2, seed=5, cut_only=True)
    for size in (1, 2, 4, 8):
        item = crops[0]
        top = 8 * size - 1
        bits = np.zeros_like(item["bits"], dtype=f"u{size}")
        bits.flat[0], bits.flat[1] = 1 << top, 1
        wide = {
            **item, "bits": bits, "planes": np.array([0, top, -1]), "turns": 0, "pseudo": None,
            "pad": ((0, 0),) * 3,
        }  # fmt: skip
        narrow = {**wide, "bits": (bits == 1).astype("u1")}  # of another source
        narrow["planes"] = np.array([0, -1, -1])
        label = to_batch(collate([wide, narrow]), lesson, CPU).label
        assert [int((label[0, k] == 1).sum()) for k in range(3)] == [1, 1, 0]
        assert bool((label[0, 1].ravel()[0] == 1) and (label[0, 2] == 255).all())
        assert [int((label[1, k] == 1).sum()) for k in range(3)] == [1, 0, 0]


def test_each_batch_is_moved_before_the_one_before_it_is_handed_out() -> None:
    """By the streams of a CPU, which do nothing; that a GPU copies meanwhile is tested nowhere."""
    log: list[str] = []
    made = {
        n: Batch(
            image=torch.full((1, 1, 2, 2, 2), float(n)), label=torch.zeros(1, 1, 2, 2, 2),
            pseudo=None, structures=("liver",), new=(True,), cases=(str(n),),
        )
        for n in range(3)
    }  # fmt: skip

    def move(raw: dict[str, Any]) -> Batch:
        log.append(f"move {raw['number']}")
        return made[raw["number"]]

    for batch in moved_ahead(({"number": n} for n in range(3)), move, CPU):
        log.append(f"use {batch.cases[0]}")
        assert batch is made[int(batch.cases[0])]
    assert log == ["move 0", "move 1", "use 0", "move 2", "use 1", "use 2"]
    assert list(moved_ahead([], move, CPU)) == []


def test_loader_workers_by_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    for cores, processes, workers in ((16, 1, 4), (4, 1, 3), (8, 4, 1), (1, 1, 1)):
        monkeypatch.setattr(device_batches, "cores", lambda cores=cores: cores)
        assert loader_workers(None, gpu, processes) == workers
        assert loader_workers(None, CPU, processes) == 0
        assert loader_workers(7, CPU) == loader_workers(7, gpu) == 7


def test_the_script_for_gpus_runs_to_its_end_without_one(
    cache_root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code that measures a GPU, with a tiny network; its numbers here say nothing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code = runpy.run_path(str(Path(__file__).parents[1] / "perf" / "gpu.py"))
    assert code["main"](["--cache", str(cache_root)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("no GPU is visible: nothing is measured; a dry run")
    for line in (
        "throughput of clbench against plain MONAI",
        "peak memory against plain MONAI",
        "channels-last against contiguous",
        "sliding windows, 1 at once",
    ):
        assert line in said
