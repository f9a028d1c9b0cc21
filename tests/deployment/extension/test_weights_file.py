"""Files of weights from elsewhere: tensors and plain values, and nothing is executed."""

from __future__ import annotations

import codecs
import io
import os
import pickle
import random
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clbench.deployment.extension.weights_file import PassedOver, read_settings, read_weights
from clbench.errors import SettingError

EXECUTES = (
    "exec", "compile", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen",
    "pickle.find_class", "ctypes.dlopen", "socket.connect", "os.remove", "os.rename", "os.mkdir",
    "shutil.rmtree", "code.__new__",
)  # fmt: skip
"""What Python tells of when it runs code, starts a program or changes a file."""
HEARD: list[str] = []
LISTENING: list[bool] = []


def hear(event: str, args: tuple[Any, ...]) -> None:
    if not LISTENING:
        return
    writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if writes or event in EXECUTES:
        HEARD.append(f"{event} {args!r}")


@pytest.fixture(scope="module")
def heard() -> Iterator[list[str]]:
    codecs.lookup("latin-1")  # pickled bytes name it, and Python imports a codec at first use
    sys.addaudithook(hear)  # stays for the life of the process, and is silent afterwards
    HEARD.clear()
    yield HEARD
    LISTENING.clear()


class Trap:
    """Unpickled, it would run a program."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


def checkpoint() -> dict[str, Any]:
    """What nnU-Net leaves: weights, numbers of numpy, settings."""
    return {
        "network_weights": {"a.weight": torch.arange(6.0).reshape(2, 3)},
        "logging": {"ema_fg_dice": [np.float64(0.5), np.float32(0.25)], "epochs": [np.int64(3)]},
        "init_args": {"fold": 0, "configuration": "3d_fullres", "device": torch.device("cpu")},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_numbers_of_numpy_are_passed_over(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_final.pth"
    torch.save(checkpoint(), path, _use_new_zipfile_serialization=zipped)
    got = read_weights(path)
    assert torch.equal(got["network_weights"]["a.weight"], torch.arange(6.0).reshape(2, 3))
    assert got["inference_allowed_mirroring_axes"] == (0, 1, 2)
    assert isinstance(got["logging"]["ema_fg_dice"][0], PassedOver)
    with pytest.raises(pickle.UnpicklingError):  # the allowance ends with the reading
        torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (Trap(), "posix.system"),
        ({"a": np.zeros(2)}, "numpy"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    ],
)
def test_code_is_refused_and_named(
    made: Any, says: str, tmp_path: Path, heard: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"network_weights": made}, "w.pth")
    with pytest.raises(SettingError, match="more than tensors and plain values") as err:
        read_weights(Path("w.pth"))
    assert says in str(err.value)
    assert "safe_globals" not in str(err.value)
    assert not Path("executed").exists()


def test_a_thousand_mutated_files_execute_nothing(
    tmp_path: Path, heard: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    draw = random.Random(5)
    seeds = []
    for content in (checkpoint(), {"state_dict": {"a": torch.ones(3)}, "trap": Trap()}):
        for zipped in (True, False):
            buffer = io.BytesIO()
            torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
            seeds.append(buffer.getvalue())
    path = Path("w.pth")
    answers = {"read": 0, "refused": 0}
    for number in range(1000):
        path.write_bytes(mutated(seeds[number % len(seeds)], draw))
        if number == 0:
            read_quietly(path)  # what torch imports at its first reading is no file's doing
        LISTENING.append(True)
        answers[read_quietly(path)] += 1
        LISTENING.clear()
    assert heard == []
    assert not Path("executed").exists()
    assert sum(answers.values()) == 1000
    assert answers["refused"] > 500
    assert answers["read"] > 20  # most of what is altered is noticed, some is not


def read_quietly(path: Path) -> str:
    try:
        read_weights(path)
    except SettingError:
        return "refused"
    return "read"


def mutated(raw: bytes, draw: random.Random) -> bytes:
    """Bytes of the pickle, or of the whole file, altered, cut or doubled."""
    if zipfile.is_zipfile(io.BytesIO(raw)) and draw.random() < 0.7:
        out = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(out, "w") as new:
            for name in old.namelist():
                part = old.read(name)
                new.writestr(name, altered(part, draw) if name.endswith(".pkl") else part)
        return out.getvalue()
    return altered(raw, draw)


def altered(raw: bytes, draw: random.Random) -> bytes:
    data = bytearray(raw)
    for _ in range(draw.choice([1, 1, 2, 8])):
        at = draw.randrange(len(data))
        match draw.randrange(4):
            case 0:
                data[at] = draw.randrange(256)
            case 1:
                del data[at : at + draw.randrange(1, 20)]
            case 2:
                data[at:at] = data[: draw.randrange(1, 20)]
            case _:
                data[at:at] = draw.choice(
                    [b"cos\nsystem\n", b"cbuiltins\neval\n", b"R", b"b", b"."]
                )
    return bytes(data) or b"."


def test_lists_beside_weights_must_be_json_objects(tmp_path: Path) -> None:
    path = tmp_path / "plans.json"
    with pytest.raises(SettingError, match="missing"):
        read_settings(path)
    for text, says in (
        ("{", "no.* JSON|not JSON"),
        ("[1]", "no settings"),
        ("[" * 99999, "not JSON"),
    ):
        path.write_text(text)
        with pytest.raises(SettingError, match=says):
            read_settings(path)
