"""Files that would run code, or fill the memory, when they are opened: refused wherever they lie."""

from __future__ import annotations

import io
import json
import os
import pickle
import socket
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nifti_files import LITS, body, packed, put
from numpy.lib import format as npy

from clbench.data.cache import VolumeCache, _sealed
from clbench.data.layouts import CaseFiles
from clbench.data.pseudo_labels import PseudoMap, write_pseudo
from clbench.errors import SettingError, StoreError
from clbench.evaluation.predictions import read_prediction, write_prediction
from clbench.nets.backbones import small_unet
from clbench.nets.pretrained import load_weights
from clbench.nets.text_encodings import clip
from clbench.spec.benchmark import Preprocessing
from clbench.store import checkpoint, run_folder
from clbench.store.arrays import read_npy, read_npz
from clbench.store.files import sha256

MEMORY = 64 << 20


class Hostile:
    """A pickle that makes a folder when it is opened: harmless, but code that runs."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.mark),)


def by_torch(mark: Path) -> bytes:
    out = io.BytesIO()
    torch.save({"schema": 1, "state_dict": Hostile(mark)}, out)
    return out.getvalue()


def by_old_torch(mark: Path) -> bytes:
    out = io.BytesIO()
    torch.save({"state_dict": Hostile(mark)}, out, _use_new_zipfile_serialization=False)
    return out.getvalue()


def by_pickle(mark: Path) -> bytes:
    return pickle.dumps({"liver": Hostile(mark)})


def by_numpy(mark: Path) -> bytes:
    out = io.BytesIO()
    np.save(out, np.array([Hostile(mark)], dtype=object), allow_pickle=True)
    return out.getvalue()


def by_npz(mark: Path) -> bytes:
    out = io.BytesIO()
    np.savez(out, allow_pickle=True, **{"0": np.array([Hostile(mark)], dtype=object)})
    return out.getvalue()


def a_checkpoint(folder: Path, raw: bytes) -> None:
    (folder / "step1.pt").write_bytes(raw)
    checkpoint.load(folder / "step1.pt")


def backbone_weights(ending: str) -> Callable[[Path, bytes], None]:
    def load(folder: Path, raw: bytes) -> None:
        (folder / f"w{ending}").write_bytes(raw)
        load_weights(small_unet(8), folder / f"w{ending}")

    return load


def text_vectors(ending: str) -> Callable[[Path, bytes], None]:
    def load(folder: Path, raw: bytes) -> None:
        (folder / f"v{ending}").write_bytes(raw)
        clip(["liver"], prompt="v3", path=str(folder / f"v{ending}"))

    return load


def a_prediction(folder: Path, raw: bytes) -> None:
    (folder / "p.npz").write_bytes(raw)
    read_prediction(folder / "p.npz")


def a_pseudo_label(folder: Path, raw: bytes) -> None:
    write_pseudo(folder / "7", ["liver"], np.zeros((1, 2, 2, 2), np.uint8))
    (folder / "7" / "map.npy").write_bytes(raw)
    PseudoMap.open(folder / "7")


PATHS: dict[str, Callable[[Path, bytes], None]] = {
    "checkpoint": a_checkpoint,
    **{f"backbone.weights {e}": backbone_weights(e) for e in (".pt", ".pth", ".safetensors")},
    **{f"text.path {e}": text_vectors(e) for e in (".pth", ".npy", ".safetensors")},
    "prediction": a_prediction,
    "pseudo label": a_pseudo_label,
}


@pytest.mark.parametrize("make", [by_torch, by_old_torch, by_pickle, by_numpy, by_npz])
@pytest.mark.parametrize("path", PATHS)
def test_a_hostile_pickle_is_refused_and_runs_nothing(
    path: str, make: Callable[[Path], bytes], tmp_path: Path
) -> None:
    mark = tmp_path / "harm"
    with pytest.raises((StoreError, SettingError)) as err:
        PATHS[path](tmp_path, make(mark))
    assert not mark.exists()
    assert str(tmp_path) in str(err.value)
    assert err.value.next_step


def test_the_pickles_of_these_tests_would_run(tmp_path: Path) -> None:
    for number, make in enumerate((by_torch, by_old_torch)):
        torch.load(io.BytesIO(make(tmp_path / f"t{number}")), weights_only=False)
    pickle.loads(by_pickle(tmp_path / "p"))  # noqa: S301  # to see that it is armed
    np.load(io.BytesIO(by_numpy(tmp_path / "n")), allow_pickle=True)
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("name", ["image.npy", "bits.npy", "where.npz", "meta.json"])
def test_a_hostile_cache_entry_with_valid_checksums_is_made_again(
    name: str, tmp_path: Path
) -> None:
    image, label = body()
    files = CaseFiles(
        case="0", image=put(tmp_path, "i", packed(image)), label=put(tmp_path, "l", packed(label))
    )
    cache, pre = VolumeCache(tmp_path / "c"), Preprocessing(spacing_mm=(2.0, 3.0, 4.0))
    want = cache.get(files, LITS, pre).bits.copy()
    (entry,) = [p for p in (tmp_path / "c").iterdir() if (p / "meta.json").exists()]
    mark = tmp_path / "harm"
    made = {"where.npz": by_npz, "meta.json": by_pickle}.get(name, by_numpy)(mark)
    (entry / name).write_bytes(made)
    if name != "meta.json":
        meta = json.loads((entry / "meta.json").read_text().split("\n")[0])
        meta["sha256"][name] = sha256(entry / name)
        (entry / "meta.json").write_text(_sealed(meta))
    got = VolumeCache(tmp_path / "c").get(files, LITS, pre)
    np.testing.assert_array_equal(got.bits, want)
    assert not mark.exists()


def header(shape: tuple[int, ...], kind: str = "|u1") -> bytes:
    """An array in numpy's format without its data."""
    out = io.BytesIO()
    npy.write_array_header_1_0(out, {"shape": shape, "fortran_order": False, "descr": kind})
    return out.getvalue()


def zipped(members: dict[str, bytes], packing: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", packing) as file:
        for name, raw in members.items():
            file.writestr(name, raw)
    return out.getvalue()


def a_claim() -> bytes:
    return zipped({"shape.npy": header((10**12,), "<i8") + bytes(24)})


def a_bomb() -> bytes:
    """100 MB of zeros in 100 kB."""
    return zipped({"archive/data.pkl": bytes(100 << 20), "archive/version": b"3"})


def a_shape_of_terabytes() -> bytes:
    def whole(array: Any) -> bytes:
        out = io.BytesIO()
        np.save(out, np.asarray(array))
        return out.getvalue()

    return zipped({
        "shape.npy": whole(np.array([30000, 30000, 3000])), "affine.npy": whole(np.eye(4)),
        "structures.npy": whole(np.array(["liver"])), "source.npy": whole("a"),
        "case.npy": whole("1"), "mask_liver.npy": whole(np.zeros(10, np.uint8)),
    })  # fmt: skip


@pytest.mark.parametrize(
    ("path", "make"),
    [
        *[(p, m) for p in PATHS for m in (a_claim, a_bomb)],
        ("prediction", a_shape_of_terabytes),
        *[(p, lambda: header((10**12,))) for p in ("text.path .npy", "pseudo label")],
    ],
)
def test_a_claim_of_size_takes_no_memory(
    path: str, make: Callable[[], bytes], tmp_path: Path
) -> None:
    raw = make()
    tracemalloc.start()
    with pytest.raises((StoreError, SettingError)):
        PATHS[path](tmp_path, raw)
    assert tracemalloc.get_traced_memory()[1] < MEMORY
    tracemalloc.stop()


def test_a_tensor_that_repeats_its_memory_is_refused(tmp_path: Path) -> None:
    torch.save({"liver": torch.zeros(1).expand(10**11)}, tmp_path / "v.pth")
    with pytest.raises(SettingError, match="not whole"):
        clip(["liver"], prompt="v3", path=str(tmp_path / "v.pth"))


def test_arrays_are_read_as_numpy_reads_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.random((2, 3, 4)), "b": np.asfortranarray(rng.random((3, 5)).astype(">f4")),
        "c": np.array("text"), "d": np.zeros((0, 3), np.uint8), "e": np.array(["x", "yz"]),
    }  # fmt: skip
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", **arrays)
        got = read_npz(tmp_path / "x.npz", 10_000)
        assert list(got) == list(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(got[name], array)
        with pytest.raises(ValueError, match="claims"):
            read_npz(tmp_path / "x.npz", -(1 << 16))
    np.save(tmp_path / "y.npy", arrays["b"])
    np.testing.assert_array_equal(read_npy(tmp_path / "y.npy"), arrays["b"])


def test_any_damage_of_a_prediction_is_told(tmp_path: Path) -> None:
    """Cut short or altered anywhere: an error of our own, or the very same masks."""
    path, rng = tmp_path / "p.npz", np.random.default_rng(3)
    bits = rng.integers(0, 4, (3, 4, 5)).astype(np.uint8)
    write_prediction(path, bits, ["liver", "spleen"], np.eye(4), source="a", case="1")
    whole, refused = path.read_bytes(), 0
    for _ in range(300):
        raw = bytearray(whole)
        raw[rng.integers(len(raw))] ^= 1 << rng.integers(8)
        path.write_bytes(raw[: rng.integers(len(raw))] if rng.random() < 0.3 else raw)
        try:
            np.testing.assert_array_equal(read_prediction(path).bits, bits)
        except StoreError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("text", ["[" * 100_000, "{" * 5000, '{"names": 3}', "[]", "3", "\0"])
def test_json_that_is_no_record(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(StoreError):
        run_folder.read_record(tmp_path)
    write_pseudo(tmp_path / "7", ["liver"], np.zeros((1, 2, 2, 2), np.uint8))
    (tmp_path / "7" / "meta.json").write_text(text)
    with pytest.raises(StoreError):
        PseudoMap.open(tmp_path / "7")


def test_nothing_of_a_run_asked_for_the_network(smoke_run: Path, refused_calls: list[str]) -> None:
    """From course to table on the phantom; the whole suite runs behind this door."""
    from typer.testing import CliRunner

    from clbench.cli.options import app

    assert (smoke_run / "scores.csv").exists()
    for words in (["list"], ["table", "10", "--source", "printed"]):
        assert CliRunner().invoke(app, words).exit_code == 0
    assert refused_calls == []
    with pytest.raises(OSError, match="no network"), socket.socket() as door:
        door.connect(("192.0.2.1", 80))
    with pytest.raises(OSError, match="no network"):
        socket.getaddrinfo("example.org", 80)
    assert len(refused_calls) == 2
    refused_calls.clear()


def test_clip_from_the_network_must_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that would download is not even imported where no command names it."""
    import sys
    import types

    called = []
    fake = types.SimpleNamespace(
        create_model_and_transforms=lambda *a, **k: (
            called.append(a) or (_ for _ in ()).throw(OSError)
        )
    )
    monkeypatch.setitem(sys.modules, "open_clip", fake)
    with pytest.raises(SettingError, match="not shipped"):
        clip(["liver"], prompt="v3", path=None)
    assert not called
    with pytest.raises(SettingError, match="no ViT-B-32 weights"):
        clip(["liver"], prompt="v3", path="open_clip")
    assert called
