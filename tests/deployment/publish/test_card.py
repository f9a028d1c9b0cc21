"""What a published model says of itself: numbers of the run, MONAI's metadata, fields to fill in."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from synthetic_runs import Method, make_runs

from clbench.deployment.publish.card import (
    FILL_IN,
    Described,
    model_card,
    monai_metadata,
)
from clbench.spec import registry
from clbench.store.record import RunRecord
from clbench.store.run_folder import read_scores

# MONAI Bundle Specification, "metadata.json File": mandatory keys, and those of a tensor
MANDATORY = {
    "version",
    "changelog",
    "monai_version",
    "pytorch_version",
    "numpy_version",
    "required_packages_version",
    "task",
    "description",
    "authors",
    "copyright",
    "network_data_format",
}
OF_TENSORS = {
    "type",
    "format",
    "modality",
    "num_channels",
    "spatial_shape",
    "dtype",
    "value_range",
    "is_patch_data",
    "channel_def",
}


def described(tmp_path: Path, *, phantom: bool = False, step: int = 2) -> Described:
    """A run of made-up scores on which the liver is forgotten."""
    (run,) = make_runs(
        tmp_path / "results",
        {"universal": Method(kept=-0.1, seeds=(0,))},
        phantom=phantom,
    )
    benchmark = registry.benchmark("tumor_ext")
    record = RunRecord.read(run)
    taught = [name for s in record.course.steps[:step] for name in s.learns]
    return Described(
        folder=run,
        record=record,
        benchmark=benchmark,
        preprocessing=benchmark.preprocessing,
        step=step,
        structures=tuple(taught),
        memory={},
        parameters=1234,
    )


def values(about: Described, step: int, structure: str) -> np.ndarray:
    rows = {
        (r.case): r.value
        for r in read_scores(about.folder / "scores.csv")
        if (r.step, r.structure, r.metric, r.scoring) == (step, structure, "dice", "strict")
        and r.eval_set == "btcv"
    }
    return np.array([v for _, v in sorted(rows.items())])


def test_scores_come_with_the_interval_of_the_t_distribution(tmp_path: Path) -> None:
    about = described(tmp_path)
    card = model_card(about)
    after, before = values(about, 2, "liver"), values(about, 1, "liver")
    n = len(after)
    assert n == 12

    def interval(x: np.ndarray) -> tuple[float, float, float]:
        reach = stats.t.ppf(0.975, n - 1) * x.std(ddof=1) / math.sqrt(n)
        return x.mean(), x.mean() - reach, x.mean() + reach

    scores, forgotten = card.split("## What was forgotten")
    (row,) = re.findall(r"\| liver \|.*\|", scores.split("## Scores")[1])
    mean, low, high = interval(after)
    assert f"| {mean:.3f} [{low:.3f}, {min(high, 1):.3f}] | 12 |" in row
    (row,) = re.findall(r"\| liver \|.*\|", forgotten)
    mean, low, high = interval(after - before)
    assert mean < -0.05
    expected = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}] | {-mean:.3f}".replace("-", "−")
    assert f"| liver | {expected} |" in row


def test_phantom_numbers_are_marked_and_those_of_patients_are_not(tmp_path: Path) -> None:
    phantom = model_card(described(tmp_path / "a", phantom=True))
    tables = [line for line in phantom.splitlines() if line.startswith("**")]
    assert sum("PHANTOM" in line for line in tables) == 3  # steps, scores, forgotten
    assert "every number below is a PHANTOM number" in phantom
    assert "  - phantom" in phantom.split("---")[1]
    assert "PHANTOM" not in model_card(described(tmp_path / "b"))


def test_a_card_names_what_people_have_to_fill_in(tmp_path: Path) -> None:
    card = model_card(described(tmp_path))
    for field in ("license", "Licence of the weights", "Authors and contact", "Intended use"):
        assert f"{field}: {FILL_IN}" in card
    assert "CC BY-NC-ND 4.0" in card  # of the data, as its owner states it


def test_a_model_of_step_1_says_that_nothing_can_be_forgotten_yet(tmp_path: Path) -> None:
    card = model_card(described(tmp_path, step=1))
    assert "liver_tumor" not in card.split("## Training")[0]
    assert "Nothing can be" in card
    assert "2 (not in this model)" in card


def test_metadata_is_what_monai_asks_for(tmp_path: Path) -> None:
    about = described(tmp_path)
    path = tmp_path / "metadata.json"
    path.write_text(json.dumps(monai_metadata(about)))
    content = json.loads(path.read_text())
    assert content.keys() >= MANDATORY
    formats = content["network_data_format"]
    (image,), (pred,) = formats["inputs"].values(), formats["outputs"].values()
    for tensor in (image, pred):
        assert tensor.keys() >= OF_TENSORS
        assert tensor["num_channels"] == len(tensor["channel_def"])
        assert len(tensor["spatial_shape"]) == 3
    assert tuple(pred["channel_def"].values()) == about.structures
    assert (image["format"], pred["format"]) == ("hounsfield", "classes")


def test_monai_finds_every_property_it_requires(tmp_path: Path) -> None:
    bundle = pytest.importorskip("monai.bundle")
    from monai.bundle.properties import MetaProperties

    path = tmp_path / "metadata.json"
    path.write_text(json.dumps(monai_metadata(described(tmp_path))))
    parser = bundle.ConfigParser()
    parser.read_meta(path)
    for name, about in MetaProperties.items():
        assert parser.get(about["id"]) is not None, name
    assert parser.get("_meta_::network_data_format::outputs::pred::channel_def::0") == "spleen"


def test_a_hole_is_a_dash(tmp_path: Path) -> None:
    about = described(tmp_path)
    text = (about.folder / "scores.csv").read_text().splitlines(keepends=True)
    rows = [r for r in text if ",2,btcv,100,liver," not in r]
    assert len(rows) < len(text)
    (about.folder / "scores.csv").write_text("".join(rows))
    card = model_card(dataclasses.replace(about))
    (row,) = re.findall(r"\| liver \|.*\|", card.split("## Scores")[1].split("## What was")[0])
    assert "| – | – |" in row
    assert "–: no mean" in card
    assert monai_metadata(about)["eval_metrics"] == {}


def test_a_structure_without_a_value_stands_after_the_forgotten_ones(tmp_path: Path) -> None:
    about = described(tmp_path)
    scores = about.folder / "scores.csv"
    rows = scores.read_text().splitlines(keepends=True)
    scores.write_text("".join(r for r in rows if ",2,btcv,100,spleen," not in r))
    table = model_card(about).split("most forgotten first")[1].split("| mean of")[0]
    lost = [line.split("|")[3].strip() for line in table.splitlines() if line.startswith("| ")][1:]
    numbers = [float(v.replace("−", "-")) for v in lost if v != "–"]
    assert lost.index("–") == len(numbers) == len(lost) - 1
    assert numbers == sorted(numbers, reverse=True)
