"""Loader workers that are not forked know what the course declares, and cut the same crops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from nifti_files import body, packed, put
from torch.utils.data import DataLoader

from clbench.data.labels import read_case
from clbench.data.layouts import CaseFiles
from clbench.data.volume import preprocess
from clbench.spec import taxonomy
from clbench.spec.benchmark import Preprocessing, Source
from clbench.spec.settings import DataSettings
from clbench.spec.taxonomy import Structure, declare
from clbench.strategy.contract import Lesson, Phase
from clbench.training.batches import Crops, Material, collate


def test_declared_structures_reach_spawned_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampling by class asks what kind of structure each is; the worker must know the cyst."""
    monkeypatch.setattr(taxonomy, "DECLARED", {})
    monkeypatch.setattr("clbench.training.batches.DECLARED", taxonomy.DECLARED)
    declare([Structure(name="liver_bleb", prompt="bleb", kind="cyst", parent="liver")])
    source = Source(name="a", title="", layout="lits", labels={1: "liver", 2: "liver_bleb"})
    image, label = body()
    files = CaseFiles(
        case="0", image=put(tmp_path, "i", packed(image)), label=put(tmp_path, "l", packed(label))
    )
    volume = preprocess(read_case(files, source), source, Preprocessing(spacing_mm=(2.0, 3.0, 4.0)))
    crops = Crops(
        Lesson(number=1, learns=source.structures, structures=source.structures, source="a",
               cases=("0",)),
        Phase(),
        Material(
            volumes={(1, "0"): volume}, weights={(1, "0"): 1.0}, pseudo={}, patch_vox=(4, 4, 4),
            data=DataSettings(sampling="class_ratio", class_ratio=(1, 1, 5)),
        ),
        epochs=1, per_epoch=4, seed=3,
    )  # fmt: skip
    (spawned,) = DataLoader(
        crops, batch_size=4, num_workers=1, collate_fn=collate, multiprocessing_context="spawn"
    )
    here = collate([crops[i] for i in range(4)])
    assert torch.equal(spawned["image"], here["image"])
    assert torch.equal(spawned["label"], here["label"])
    assert np.any(here["label"].numpy()[:, 1] == 1)  # the cyst was sampled
