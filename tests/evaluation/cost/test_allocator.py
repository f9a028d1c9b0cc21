"""Freed memory on a CPU: when it is kept, and that it then needs no new pages."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from clbench.errors import SettingError
from clbench.evaluation.cost import allocator

GIB = 2**30


PROBE = """
import resource
import torch
from clbench.evaluation.cost import allocator

def faults_of_a_tensor():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

freed = allocator.FreedMemory()
allocator._room = lambda: (2**30, 2**50)
freed.settle()
torch.ones(40 * 2**20)  # larger, for an aligned tensor needs more than its own size
print(freed.kept, faults_of_a_tensor())
allocator._room = lambda: (1, 1)
freed.settle()
print(freed.kept, faults_of_a_tensor(), allocator.in_use())
"""
"""Page faults of filling a fresh tensor of 64 MiB, with freed memory kept and given back."""


@pytest.fixture(autouse=True)
def nothing_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    own = (allocator.SWITCH, allocator.PRELOAD, allocator.CONF, *allocator.SET_UP_BY)
    for name in (*own, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)


def jemalloc() -> dict[str, str]:
    """The variables that load it; skips where it is not installed."""
    if not (more := allocator.environment(os.environ)):
        pytest.skip("jemalloc is not installed")
    return more


def test_a_multiple_of_the_peak_must_fit_into_half_of_what_there_is() -> None:
    assert allocator.enough(2, 2 * GIB, 1 * GIB, 7 * GIB)
    assert not allocator.enough(2, 2 * GIB, 1 * GIB, 6 * GIB)
    assert allocator.enough(1.5, 2 * GIB, 1 * GIB, 5 * GIB)


@pytest.mark.parametrize("kind", ["glibc", "jemalloc"])
def test_memory_is_kept_where_there_is_room_and_given_back_elsewhere(kind: str) -> None:
    if kind == "glibc" and allocator.why_not() is not None:
        pytest.skip("this process does not use plain glibc")
    more = jemalloc() if kind == "jemalloc" else {}
    # in a process of its own: one that ran other tests may have a large free block left
    done = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, check=True,
        env={**os.environ, **more},
    )  # fmt: skip
    kept, given_back = (line.split() for line in done.stdout.splitlines())
    assert kept[0] == "True"
    assert int(kept[1]) < 100
    assert given_back[0] == "False"
    assert int(given_back[1]) > 10_000
    assert given_back[2].startswith(kind)


STARTED = """
import os, sys
from clbench.evaluation.cost.allocator import in_use, start_with_jemalloc
os.environ["STARTS"] = os.environ.get("STARTS", "") + "x"
start_with_jemalloc(sys.argv[1:])
print(in_use(), os.environ["STARTS"], os.getpid(), sys.argv[1:])
"""


def test_a_command_that_trains_starts_anew_with_it_once() -> None:
    jemalloc()
    plain = dict(os.environ)
    words = ["run", "--strategy", "a b"]
    for command, environ, starts in (
        (words, plain, "xx"),
        (["list"], plain, "x"),
        (words, {**plain, "CLBENCH_KEEP_MEMORY": "0"}, "x"),
    ):
        process = subprocess.Popen(
            [sys.executable, "-c", STARTED, *command],
            stdout=subprocess.PIPE, text=True, env=environ,
        )  # fmt: skip
        said, _ = process.communicate()
        kind, *rest = said.split(maxsplit=1 if starts == "xx" else 2)
        assert kind == ("jemalloc" if starts == "xx" else "glibc")
        assert rest[-1] == f"{starts} {process.pid} {command}\n"


def test_the_program_begins_there(monkeypatch: pytest.MonkeyPatch) -> None:
    (script,) = entry_points(group="console_scripts", name="clbench")
    monkeypatch.setattr("sys.argv", ["clbench", "run", "--seed", "1"])
    called: list[object] = []
    monkeypatch.setattr("clbench.__main__.start_with_jemalloc", called.append)
    monkeypatch.setattr("clbench.cli.main", lambda: called.append("main"))
    script.load()()
    assert called == [["run", "--seed", "1"], "main"]


def installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in the place of this environment's jemalloc, on a machine with none but that."""
    library = folder / "lib" / "libjemalloc.so.2"
    library.parent.mkdir()
    library.write_bytes(b"not a library")
    for name in ("prefix", "base_prefix"):
        monkeypatch.setattr(f"sys.{name}", str(folder))
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    monkeypatch.setattr(allocator, "in_use", lambda: "glibc 2.36")
    return library


def test_what_the_user_chose_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = installed(tmp_path, monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr(allocator, "loads", lambda more, environ: True)
        ours = {"LD_PRELOAD": str(library), "MALLOC_CONF": allocator.OURS}
        assert allocator.environment({}) == ours
        assert allocator.environment({"LD_PRELOAD": "", "MALLOC_CONF": ""}) == ours
        for own in (
            {"LD_PRELOAD": "/lib/libtcmalloc.so"},
            {"MALLOC_CONF": "narenas:1"},
            {"MALLOC_MMAP_MAX_": "0"},
            {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=0"},
            {"CLBENCH_KEEP_MEMORY": "0"},
        ):
            assert allocator.environment(own) == {}
        with pytest.raises(SettingError, match="nothing reads"):
            allocator.environment({"CLBENCH_KEEP_MEMORY": "off"})
        patched.setattr(allocator, "in_use", lambda: "mimalloc")
        assert allocator.environment({}) == {}
    assert allocator.environment({}) == {}, "the file is no library"


def test_the_doctor_says_what_stands_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = installed(tmp_path, monkeypatch)
    assert allocator.described().endswith(f"it does not load: {library}")
    monkeypatch.setenv("LD_PRELOAD", "libm.so.6")
    assert allocator.described().endswith("not loaded beside LD_PRELOAD")
    monkeypatch.delenv("LD_PRELOAD")
    library.unlink()
    assert "Debian: libjemalloc2" in allocator.described()
    monkeypatch.setenv("CLBENCH_KEEP_MEMORY", "off")
    with pytest.raises(SettingError, match="nothing reads"):
        allocator.described()
    monkeypatch.delenv("CLBENCH_KEEP_MEMORY")
    monkeypatch.setattr(allocator, "in_use", lambda: "other")
    assert allocator.described().endswith("(neither glibc nor jemalloc)")


def test_a_jemalloc_that_cannot_be_told_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert not allocator._tell_jemalloc(True)


def test_a_user_turns_it_off_or_sets_glibc_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "in_use", lambda: "glibc 2.36")
    assert allocator.why_not() is None
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    assert allocator.why_not() == "set up by MALLOC_TRIM_THRESHOLD_"
    monkeypatch.setenv(allocator.SWITCH, "off")
    with pytest.raises(SettingError, match="nothing reads"):
        allocator.why_not()
    monkeypatch.setenv(allocator.SWITCH, "0")
    assert "not kept (CLBENCH_KEEP_MEMORY=0)" in allocator.described()
    monkeypatch.undo()
    monkeypatch.setattr(allocator, "in_use", lambda: "jemalloc")
    assert allocator.why_not() == "jemalloc, chosen by the user"
    monkeypatch.setenv("MALLOC_CONF", allocator.OURS)
    assert allocator.why_not() is None
