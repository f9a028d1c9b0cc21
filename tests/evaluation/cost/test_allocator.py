"""Freed memory on a CPU: when it is kept, and that it then needs no new pages."""

from __future__ import annotations

import subprocess
import sys

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
print(freed.kept, faults_of_a_tensor())
"""
"""Page faults of filling a fresh tensor of 64 MiB, with freed memory kept and given back."""


def test_twice_the_peak_must_fit_into_half_of_what_there_is() -> None:
    assert allocator.enough(2 * GIB, 1 * GIB, 7 * GIB)
    assert not allocator.enough(2 * GIB, 1 * GIB, 6 * GIB)


@pytest.mark.skipif(allocator.why_not() is not None, reason="this process does not use plain glibc")
def test_memory_is_kept_where_there_is_room_and_given_back_elsewhere() -> None:
    # in a process of its own: one that ran other tests may have a large free block left
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    kept, given_back = (line.split() for line in done.stdout.splitlines())
    assert kept[0] == "True"
    assert int(kept[1]) < 100
    assert given_back[0] == "False"
    assert int(given_back[1]) > 10_000


def test_a_user_turns_it_off_or_sets_glibc_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "in_use", lambda: "glibc 2.36")
    for name in (allocator.SWITCH, *allocator.SET_UP_BY, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
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
    assert allocator.why_not() == "jemalloc, not glibc"
