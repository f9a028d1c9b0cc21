"""Pseudo labels on disk: exact, small when hard, whole or absent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from clbench.data.pseudo_labels import PseudoMap, write_pseudo
from clbench.errors import StoreError

NAMES = ["spleen", "liver", "aorta"]
WHOLE = (slice(None),) * 3


def maps(hard: bool) -> np.ndarray:
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 255, (3, 4, 5, 6)).astype(np.uint8)
    return ((raw > 127) * 254).astype(np.uint8) if hard else raw


@pytest.mark.parametrize("hard", [True, False])
def test_what_is_written_is_read(hard: bool, tmp_path: Path) -> None:
    array = maps(hard)
    write_pseudo(tmp_path / "step2" / "7", NAMES, array)
    found = PseudoMap.open(tmp_path / "step2" / "7")
    assert found.hard is hard
    assert found.nbytes == array[0].size * (1 if hard else 3)  # a byte holds up to 8 hard ones
    index = (slice(1, 3), slice(0, 5), slice(2, 6))
    got = found.read(["aorta", "liver_tumor", "spleen"], index)
    np.testing.assert_array_equal(got[0], array[2][index])
    assert (got[1] == 255).all()
    np.testing.assert_array_equal(got[2], array[0][index])


def test_writing_again_replaces(tmp_path: Path) -> None:
    write_pseudo(tmp_path / "7", NAMES, maps(True))
    write_pseudo(tmp_path / "7", NAMES, maps(False))
    np.testing.assert_array_equal(PseudoMap.open(tmp_path / "7").read(NAMES, WHOLE), maps(False))


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StoreError, match="could not be written"):
        write_pseudo(tmp_path / "7", NAMES, maps(True))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_map_is_named(tmp_path: Path) -> None:
    write_pseudo(tmp_path / "7", NAMES, maps(True))
    (tmp_path / "7" / "map.npy").write_bytes(b"")
    with pytest.raises(StoreError, match="cannot be read") as err:
        PseudoMap.open(tmp_path / "7")
    assert str(tmp_path / "7") in str(err.value)
