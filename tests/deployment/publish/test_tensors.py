"""A checkpoint's content in safetensors: equal to the bit when read back, refused when altered."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from clbench.deployment.publish.tensors import HEADER, read_tensors, write_tensors
from clbench.errors import StoreError
from clbench.store import checkpoint


def content() -> dict[str, Any]:
    """Every kind of thing a checkpoint may hold."""
    torch.manual_seed(3)
    weight = torch.randn(4, 5)
    return {
        "schema": 1,
        "model": {
            "a.weight": weight,
            "a.tied": weight,  # one memory, two names
            "a.turned": weight.T,
            "a.half": weight.to(torch.bfloat16),
            "count": torch.tensor(7),
            "flags": torch.tensor([True, False]),
            "nothing": torch.empty(0, 3),
            "odd": torch.tensor([math.nan, -0.0, math.inf]),
        },
        "memory": {
            "ema/x": torch.arange(3),
            "ema": {"x": torch.arange(4)},  # the same path
            "heights": [1.5, [2, None, True]],
            "pair": (1, "two", torch.ones(2, dtype=torch.uint8)),
            "by_step": {1: 0.1, 2: math.nan},
            "small": 5e-324,
        },
        "structures": ["spleen"],
    }


def written(path: Path, what: dict[str, Any]) -> Path:
    with path.open("wb") as file:
        write_tensors(file, what)
    return path


def test_everything_comes_back_equal_to_the_bit(tmp_path: Path) -> None:
    before = content()
    after = read_tensors(written(tmp_path / "a.safetensors", before))
    assert checkpoint.checksum(after) == checkpoint.checksum(before)
    assert list(after["model"]) == list(before["model"])
    assert isinstance(after["memory"]["pair"], tuple)
    assert list(after["memory"]["by_step"]) == [1, 2]
    assert math.copysign(1, after["model"]["odd"][1]) == -1
    for name, tensor in before["model"].items():
        assert after["model"][name].dtype == tensor.dtype, name
        # equal bits, NaN included
        assert torch.equal(
            after["model"][name].contiguous().view(torch.uint8)
            if tensor.ndim
            else after["model"][name],
            tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor,
        ), name


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    one, two = (written(tmp_path / name, content()).read_bytes() for name in ("a", "b"))
    assert one == two


def test_a_tensor_that_safetensors_does_not_know_is_refused(tmp_path: Path) -> None:
    sparse = {"memory": {"rare": torch.eye(3).to_sparse()}}
    with (tmp_path / "a").open("wb") as file, pytest.raises(StoreError, match="cannot"):
        write_tensors(file, sparse)


def test_every_altered_byte_of_the_tensors_is_found(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", content())
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little") + 8
    for at in range(header, len(whole), 17):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(StoreError) as err:
            read_tensors(path)
        assert "altered" in err.value.what  # the path has the word, too


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    good = written(path, content()).read_bytes()
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[HEADER])
    headers = {
        "no header": {},
        "no JSON": {HEADER: "{"},
        "deep": {HEADER: "[" * 100_000},
        "unknown kind": {HEADER: json.dumps({**header, "content": {"eval": "1"}})},
        "no such tensor": {HEADER: json.dumps({**header, "content": {"tensor": "b"}})},
        "left over": {HEADER: json.dumps({**header, "content": {"dict": []}})},
    }
    for name, metadata in headers.items():
        save_file({"a": torch.ones(2)}, path, metadata=metadata)
        with pytest.raises(StoreError, match="cannot be read"):
            read_tensors(path)
        assert path.exists(), name
    for bad in (b"", b"\0" * 8, good[:100], good[:-1], b"\xff" * 64):
        path.write_bytes(bad)
        with pytest.raises(StoreError, match="cannot be read"):
            read_tensors(path)
