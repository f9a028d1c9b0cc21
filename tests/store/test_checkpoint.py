"""Checkpoints: atomic, tensors and primitives only, hostile files refused."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from clbench.errors import StoreError
from clbench.store import checkpoint

CONTENT = {"model": {"w": torch.arange(3.0)}, "memory": {"n": 1, "names": ["a"], "x": 0.5}}


def test_round_trip_is_exact(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "step1.pt"
    checkpoint.save(path, CONTENT)
    back = checkpoint.load(path)
    assert torch.equal(back["model"]["w"], CONTENT["model"]["w"])  # type: ignore[index]
    assert back["memory"] == CONTENT["memory"]
    assert [p.name for p in path.parent.iterdir()] == ["step1.pt"]


def test_objects_are_refused_when_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"checkpoint\.memory\.where"):
        checkpoint.save(tmp_path / "a.pt", {"memory": {"where": Path("x")}})
    assert not list(tmp_path.iterdir())


class Hostile:
    """A pickle that would make a folder when opened."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.target),)


def test_a_hostile_file_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    bad, mark = tmp_path / "bad.pt", tmp_path / "harm"
    torch.save({"model": Hostile(mark)}, bad)
    with pytest.raises(StoreError, match="not opened"):
        checkpoint.load(bad)
    bad.write_bytes(pickle.dumps(Hostile(mark)))
    with pytest.raises(StoreError):
        checkpoint.load(bad)
    assert not mark.exists()


def test_damaged_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "step1.pt"
    with pytest.raises(StoreError) as err:
        checkpoint.load(path)
    assert "missing" in err.value.what  # the path has the word, too
    checkpoint.save(path, CONTENT)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(StoreError) as err:
        checkpoint.load(path)
    assert "step1.pt" in str(err.value)
    torch.save({"schema": 99}, path)
    with pytest.raises(StoreError, match="another clbench"):
        checkpoint.load(path)


def test_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "step1.pt"
    checkpoint.save(path, CONTENT)
    before = path.read_bytes()

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="could not be written") as err:
        checkpoint.save(path, {"model": {}})
    assert "intact" in str(err.value)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["step1.pt"]
