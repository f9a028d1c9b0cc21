"""The doctor: names what would stop a run, and whose it is, and survives a broken torch."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from clbench.cli import doctor
from clbench.cli.doctor import Finding
from clbench.cli.options import app
from clbench.spec import registry

HEALTHY: dict[str, Any] = {"torch": {"ok": ["CPU, 2 threads, torch 2"]}}


def plugin(folder: Path, name: str, code: str) -> None:
    """An installed distribution with one strategy."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[clbench.strategies]\n{name} = {name}:X\n")


def look(tmp_path: Path, **more: Any) -> list[Finding]:
    words = {"bench": "tumor_ext", "data": None, "results": tmp_path / "r", "cache": tmp_path / "c"}
    return doctor.examine(**{**words, **more})


def stops(found: list[Finding]) -> list[str]:
    return [f"{f.section}: {f.text}" for f in found if f.level == "STOP"]


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_probe", lambda: HEALTHY)


def test_broken_plugins_are_named_with_their_distribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that fails, one that ends the interpreter, one that prints; and everything else works."""
    plugin(tmp_path, "fails", "raise ImportError('no module named gone')")
    plugin(tmp_path, "dies", "import os; os._exit(7)")
    plugin(tmp_path, "talks", "print('hello {'); X = 1")
    (tmp_path / "torch").mkdir()  # a light one: this test is about plugins
    (tmp_path / "torch" / "__init__.py").write_text(
        "__version__ = '2.x'\nget_num_threads = lambda: 1\n"
        "class cuda:\n    device_count = staticmethod(lambda: 0)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    every = registry.entries
    monkeypatch.setattr(
        registry,
        "entries",
        lambda kind: (
            {k: v for k, v in every(kind).items() if v.dist.name != "clbench"}
            if kind != "benchmark"
            else every(kind)
        ),
    )
    done = CliRunner().invoke(
        app, ["doctor", "--out", str(tmp_path / "r"), "--cache", str(tmp_path / "c")]
    )
    assert done.exit_code == 1, done.output
    stop = [line.strip() for line in done.output.splitlines() if line.startswith("  STOP")]
    assert len(stop) == 2, done.output
    assert "'dies' of dies 1.0 is broken (the process died with status 7)" in stop[0]
    assert "'fails' of fails 1.0" in stop[1]
    assert "no module named gone" in stop[1]
    assert "strategy: talks (talks 1.0)" in done.output
    assert "torch 2." in done.output


def test_a_broken_torch_is_told_not_suffered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libtorch.so: not found')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert stops(look(tmp_path)) == [
        "Devices: torch cannot be imported (OSError: libtorch.so: not found): install it again"
    ]


def test_a_healthy_machine_passes(healthy: None, tmp_path: Path) -> None:
    found = look(tmp_path)
    assert not stops(found)
    assert {f.section for f in found} >= {"Python", "Packages", "Devices", "Data", "Runs", "Disk"}
    assert list(doctor.lines(found))[-1] == "nothing stops a run"


def test_packages_are_held_against_what_is_asked(
    healthy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["numpy>=99", "not-on-this-machine>=2", 'other; extra == "dev"', "filelock"]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: asked)
    found = look(tmp_path)
    old, absent = stops(found)
    assert 'pip install "numpy>=99"' in old
    assert 'not-on-this-machine is not installed: python -m pip install "not-on' in absent


def test_data_that_is_not_there(healthy: None, tmp_path: Path) -> None:
    folder = tmp_path / "lits"
    folder.mkdir()
    for name in ("volume-0.nii", "segmentation-0.nii"):
        (folder / name).touch()
    (tmp_path / "btcv").mkdir()
    empty, some = stops(look(tmp_path, data=str(tmp_path)))
    assert "btcv" in empty
    assert "the split names 130 cases" in some
    assert "in the folder: 0" in some
    assert "--split lits=FILE.toml" in some
    assert "does not exist" in stops(look(tmp_path, data=str(tmp_path / "absent")))[0]


def test_unfinished_and_damaged_runs_and_leftovers_are_told(healthy: None, tmp_path: Path) -> None:
    for name, text in (
        ("a", json.dumps({"schema": 1, "status": "finished", "steps_done": 2})),
        ("b", json.dumps({"schema": 1, "status": "unfinished", "steps_done": 1,
                          "command": ["clbench", "run", "--seed", "3"],
                          "course": {"steps": [1, 2]}})),
        ("c", "{"),
    ):  # fmt: skip
        folder = tmp_path / "r" / "tumor_ext" / "universal" / name
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(text)
    volumes = tmp_path / "c" / "volumes"
    for name in ("x.12.part", "y.13.part", "now.14.part"):
        (volumes / name).mkdir(parents=True)
        (volumes / name / "image.npy").touch()
    for name in ("x.12.part", "y.13.part"):
        for path in (volumes / name / "image.npy", volumes / name):
            os.utime(path, (0, 0))
    found = look(tmp_path)
    (stop,) = stops(found)
    assert "damaged run" in stop
    notes = [f.text for f in found if f.level == "note"]
    assert any("1 of 2 steps" in n and "clbench run --seed 3" in n for n in notes)
    (left,) = [n for n in notes if ".part" in n]  # what is being written is left alone
    assert left == f"2 item(s) of a killed process: rm -r {volumes}/x.12.part {volumes}/y.13.part"
    assert any(f.text.endswith("3 run(s), 1 finished") for f in found)


def test_a_full_disk_and_a_folder_in_the_way(
    healthy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9, 9, 1 << 20))
    (tmp_path / "file").touch()
    full = stops(look(tmp_path))
    assert len(full) == 2
    assert "1.0 MiB free; a run needs 1.0 GiB" in full[0]
    blocked = stops(look(tmp_path, results=tmp_path / "file" / "r"))
    assert any("cannot be written: name another with --out" in s for s in blocked)
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    (linked,) = stops(look(tmp_path, results=tmp_path / "link"))[:1]
    assert linked.endswith(f"is a link to {tmp_path / 'absent'}, which is not there")


def test_the_command_that_goes_on_is_quoted_and_does_not_begin_anew() -> None:
    command = ["__main__.py", "run", "--out", "my results", "--fresh", "--seed", "3"]
    assert doctor.again(command) == "clbench run --out 'my results' --seed 3"
    assert doctor.again([]) == ""


@pytest.mark.parametrize(
    ("torch", "cudnn", "says"),
    [
        ("2.8.0+cu128", 91002, "cuDNN 9.10.2: 3-D convolutions in bfloat16 may be silently wrong"),
        ("2.8.0", 91300, None),
        ("2.8.0", 90701, None),
        ("2.9.1+cu128", 91002, "avoid cuDNN"),
        ("2.9.1+cu128", 91500, None),
        ("2.13.0+cu130", 91501, None),
        ("2.9.1+cpu", None, None),
    ],
)
def test_versions_whose_bf16_convolutions_are_wrong_or_slow_are_named(
    torch: str, cudnn: int | None, says: str | None
) -> None:
    devices = [f"CPU, 2 threads, torch {torch}", "cuda:0 X, 80 GiB"]
    probed = {"torch": {"ok": devices}, "cudnn": {"ok": [torch, cudnn]}}
    notes = [text for level, text in doctor._devices(probed) if level == "note"]
    assert len(notes) == (says is not None)
    assert all(says in note and "9.15" in note for note in notes if says)
    on_cpu = {**probed, "torch": {"ok": devices[:1]}}
    assert [n for level, n in doctor._devices(on_cpu) if level == "note"] == [
        "no GPU is visible; runs use the CPU (profile quick: minutes; paper: weeks)"
    ]
