"""Steps that runs share: what a run takes of one, and what it takes back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from clbench.errors import StoreError
from clbench.store import checkpoint, files, shared_steps
from clbench.store.shared_steps import continues, take_back, take_step


def shared(home: Path, number: int) -> Path:
    """A taught step with all that lies beside it; its trace has two lines."""
    home.mkdir(parents=True)
    path = home / f"step{number}.pt"
    checkpoint.save(path, {"model": {"w": torch.zeros(3)}, "memory": {}})
    files.write_json(path.with_suffix(".json"), {"number": number})
    (home / "events.jsonl").write_text(json.dumps({"step": number, "of": "shared"}) + "\n")
    (home / "trace.csv").write_text(f"step,update\n{number},0\n{number},1\n")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's folder with what an attempt of its own left of steps 2 and 3."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "trace.csv").write_text("step,update\n2,0\n2,7\n3,0\n")
    lines = [{"step": step, "of": "own"} for step in (1, 2, 3)]
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_taken_step_replaces_what_the_run_had_of_it_and_of_later_ones(
    folder: Path, tmp_path: Path
) -> None:
    path = shared(tmp_path / "shared", 3)
    take_step(path, folder)
    assert (folder / "trace.csv").read_text() == "step,update\n2,0\n2,7\n3,0\n3,1\n"
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [(e["step"], e["of"]) for e in events] == [(1, "own"), (2, "own"), (3, "shared")]
    assert (folder / "step3.pt").samefile(path)
    assert (folder / "step3.json").samefile(path.with_suffix(".json"))


def test_a_step_taken_again_leaves_what_is_told_of_later_ones_that_the_run_has(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "step3.pt").touch()
    take_step(shared(tmp_path / "shared", 2), folder)
    assert (folder / "trace.csv").read_text() == "step,update\n2,0\n2,1\n3,0\n"
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [(e["step"], e["of"]) for e in events] == [(1, "own"), (2, "shared"), (3, "own")]


def test_a_step_whose_folder_was_removed_while_it_was_taught_is_not_taken(
    folder: Path, tmp_path: Path
) -> None:
    path = shared(tmp_path / "shared", 2)
    files.write_json(path.with_suffix(".json"), {"origin": {"before": "abc"}})
    assert continues(path, "abc")
    (path.parent / "events.jsonl").unlink()
    assert not continues(path, "abc")
    before = (folder / "events.jsonl").read_bytes()
    with pytest.raises(StoreError, match="log of a step") as err:
        take_step(path, folder)
    assert "taught anew" in str(err.value.next_step)
    assert (folder / "events.jsonl").read_bytes() == before
    assert not (folder / "step2.pt").exists()


def test_the_checkpoint_comes_last(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, link = shared(tmp_path / "shared", 2), files.link_or_copy

    def full(source: Path, target: Path) -> None:
        if source.suffix == ".json":
            raise StoreError("the disk is full")
        link(source, target)

    monkeypatch.setattr(shared_steps.files, "link_or_copy", full)
    with pytest.raises(StoreError, match="full"):
        take_step(path, folder)
    assert not (folder / "step2.pt").exists()


def test_a_step_that_was_taught_anew_is_not_taken_back(folder: Path, tmp_path: Path) -> None:
    """Its scores would stand beside a model that they are not of."""
    path = shared(tmp_path / "shared", 2)
    assert not take_back(path, folder)  # the run never had it
    take_step(path, folder)
    (folder / "step2.pt").unlink()
    assert take_back(path, folder)
    assert (folder / "step2.pt").samefile(path)
    (folder / "step2.pt").unlink()
    files.write_json(path.with_suffix(".json"), {"number": 2, "taught": "anew"})
    assert not take_back(path, folder)
    assert not (folder / "step2.pt").exists()
