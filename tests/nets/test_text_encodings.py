"""Text vectors: shipped, from a file, or made; all of one length and scale, with their origin."""

from __future__ import annotations

import hashlib
import json
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from make_minilm import tokens
from safetensors.numpy import save_file

from clbench.errors import SettingError
from clbench.nets import text_encodings
from clbench.nets.text_encodings import (
    CLIP_NORM,
    PROMPTS,
    Vectors,
    clip,
    encoded,
    fit,
    minilm,
    onehot,
    random,
)
from clbench.spec.settings import TextSettings
from clbench.spec.taxonomy import STRUCTURES, Structure, declare

ALL = tuple(STRUCTURES)


def scaled(vectors: Vectors) -> None:
    assert vectors.array.dtype == np.float32
    assert vectors.array.shape == (len(vectors.names), 512)
    assert np.linalg.norm(vectors.array, axis=1).mean() == pytest.approx(CLIP_NORM, rel=1e-5)
    assert {"encoding", "length", "padded_to", "mean_norm", "scaled_to_norm"} <= set(vectors.record)


@pytest.mark.parametrize("prompt", list(PROMPTS))
def test_the_shipped_vectors_cover_the_taxonomy(prompt: str) -> None:
    found = minilm(ALL, prompt=prompt, path=None)
    scaled(found)
    assert found.record["length"] == 384
    assert (found.array[:, 384:] == 0).all()
    assert found.record["licence"] == "Apache-2.0"
    unit = found.array / np.linalg.norm(found.array, axis=1, keepdims=True)
    like = dict(zip(ALL, unit, strict=True))
    assert like["right_kidney"] @ like["left_kidney"] > like["right_kidney"] @ like["spleen"]
    assert like["liver"] @ like["liver_tumor"] > like["liver"] @ like["spleen"]
    assert len(np.unique(unit.round(5), axis=0)) == len(ALL)


def test_prompts_differ() -> None:
    a, b = (minilm(["liver"], prompt=p, path=None).array for p in ("v1", "v3"))
    assert not np.allclose(a, b)


def test_rows_follow_the_names_asked_for() -> None:
    a = minilm(["liver", "spleen"], prompt="v3", path=None)
    b = minilm(["spleen", "liver"], prompt="v3", path=None)
    np.testing.assert_array_equal(a.array, b.array[::-1])
    assert a.names == ("liver", "spleen")


def test_the_record_beside_the_vectors_is_true() -> None:
    folder = resources.files("clbench.nets")
    record = json.loads((folder / "minilm.json").read_text())
    content = (folder / "minilm.safetensors").read_bytes()
    assert record["vectors_sha256"] == hashlib.sha256(content).hexdigest()
    assert record["structures"] == list(ALL)
    assert record["prompts"] == PROMPTS
    assert record["weights_sha256"].startswith("53aa51172d142c89")


def test_word_pieces() -> None:
    words = ["[CLS]", "[SEP]", "[UNK]", "adrenal", "tomo", "##graph", "##y", "liver", "-"]
    vocabulary = {w: i for i, w in enumerate(words)}
    assert tokens("Liver tomography, zebra", vocabulary) == [0, 7, 4, 5, 6, 2, 2, 1]


def test_one_hot_vectors_are_orthogonal_and_random_ones_fixed() -> None:
    hot = onehot(["liver", "spleen"], prompt="v3", path=None)
    scaled(hot)
    assert hot.array[0] @ hot.array[1] == 0
    drawn = random(["liver", "spleen"], prompt="v3", path=None)
    scaled(drawn)
    alone = random(["spleen"], prompt="v3", path=None)
    direction = drawn.array[1] / np.linalg.norm(drawn.array[1])
    np.testing.assert_allclose(
        direction, alone.array[0] / np.linalg.norm(alone.array[0]), rtol=1e-5
    )


@pytest.mark.parametrize("suffix", [".pth", ".npy"])
@pytest.mark.parametrize("rows", [32, 38])
def test_a_clip_file_in_the_papers_order(suffix: str, rows: int, tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(rows, 512)).astype(np.float32)
    path = tmp_path / f"txt{suffix}"
    if suffix == ".npy":
        np.save(path, array)
    else:
        torch.save(torch.from_numpy(array).half(), path)
    found = clip(["liver_tumor", "spleen"], prompt="v3", path=str(path))
    scaled(found)
    for row, at in zip(found.array, (26, 0), strict=True):
        assert row @ array[at] / np.linalg.norm(row) / np.linalg.norm(array[at]) > 0.9999


def test_a_file_with_names(tmp_path: Path) -> None:
    save_file({"liver": np.eye(1, 300, 4, dtype=np.float32)[0]}, tmp_path / "v.safetensors")
    found = clip(["liver"], prompt="v3", path=str(tmp_path / "v.safetensors"))
    assert found.record["length"] == 300
    assert found.array[0].argmax() == 4
    with pytest.raises(SettingError, match="no vector for some") as err:
        clip(["liver", "aorta"], prompt="v3", path=str(tmp_path / "v.safetensors"))
    assert "missing: aorta" in str(err.value)


def test_without_a_file_clip_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(SettingError) as err:
        clip(["liver"], prompt="v3", path=None)
    for words in ("txt_encoding.pth", "--set text.path=", "licence"):
        assert words in str(err.value)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("absent.pth", None, "does not exist"),
        ("v.pth", b"nothing", "cannot be read safely"),
        ("v.npy", b"nothing", "cannot be read safely"),
        ("v.safetensors", b"nothing", "cannot be read safely"),
    ],
)
def test_broken_files(name: str, content: bytes | None, says: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SettingError, match=says) as err:
        clip(["liver"], prompt="v3", path=str(tmp_path / name))
    assert name in str(err.value)


def test_vectors_that_are_too_long_or_zero_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.ones((32, 768), np.float32))
    with pytest.raises(SettingError, match="cannot be used") as err:
        clip(["liver"], prompt="v3", path=str(tmp_path / "v.npy"))
    assert "768" in str(err.value)
    with pytest.raises(SettingError, match="zero"):
        fit(np.zeros((1, 4)), ["liver"], {}, "here")


def test_vectors_in_every_kind_of_real_number_are_read(tmp_path: Path) -> None:
    wanted = {"liver": torch.arange(1.0, 9.0), "spleen": torch.ones(8)}
    found = []
    for kind in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn):
        path = tmp_path / f"{kind}.safetensors"
        safetensors.torch.save_file({k: v.to(kind) for k, v in wanted.items()}, path)
        found.append(clip(["liver", "spleen"], prompt="v3", path=str(path)).array)
    torch.save({k: v.clone().requires_grad_() for k, v in wanted.items()}, tmp_path / "v.pt")
    found.append(clip(["liver", "spleen"], prompt="v3", path=str(tmp_path / "v.pt")).array)
    assert all(np.array_equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (np.array([["a"] * 4] * 32), "cannot be read safely"),
        (np.ones((32, 4), complex), "complex"),
        (np.full((32, 16), 1e25), "a mean length of inf"),
        (np.eye(32, 4), "zero: "),
        ({"liver": torch.empty(8, device="meta")}, "cannot be read safely"),
        ({"liver": torch.ones(8, dtype=torch.cfloat)}, "complex"),
    ],
    ids=["text", "complex", "too-large", "zero-rows", "meta", "complex-tensor"],
)
def test_vectors_that_hold_no_finite_real_numbers_are_refused(
    content: Any, says: str, tmp_path: Path
) -> None:
    path = tmp_path / ("v.pt" if isinstance(content, dict) else "v.npy")
    torch.save(content, path) if isinstance(content, dict) else np.save(path, content)
    names = ["liver"] if isinstance(content, dict) else ["liver_tumor", "spleen"]
    with pytest.raises(SettingError, match=says):
        clip(names, prompt="v3", path=str(path))


@pytest.mark.parametrize("make", [minilm, onehot, random])
def test_encodings_that_read_no_file_say_so(make: object) -> None:
    with pytest.raises(SettingError, match="reads no file"):
        make(["liver"], prompt="v3", path="x.npy")  # type: ignore[operator]


def test_no_network_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    text_encodings.minilm(["liver"], prompt="v3", path=None)


def test_a_declared_structure_gets_a_drawn_vector_and_moves_no_other() -> None:
    declare([Structure(name="odd_pouch", prompt="odd pouch", kind="organ")])
    names = ("liver", "odd_pouch", "spleen")
    with pytest.raises(SettingError, match="ships no text vector"):
        encoded(names, TextSettings())
    got = encoded(names, TextSettings(declared="random"))
    scaled(got)
    assert (got.names, got.record["random"]) == (names, ["odd_pouch"])
    assert got.record["encoding"] == "minilm"
    plain = encoded(("liver", "spleen"), TextSettings())
    np.testing.assert_array_equal(got.array[[0, 2]], plain.array)
    drawn = random(("odd_pouch",), prompt="v3", path=None)
    np.testing.assert_array_equal(got.array[1], drawn.array[0])
    assert encoded(("liver",), TextSettings(declared="random")).record == dict(
        minilm(("liver",), prompt="v3", path=None).record
    )
