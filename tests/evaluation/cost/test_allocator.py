"""Freed memory on a CPU: when it is kept, and that it then needs no new pages."""

from __future__ import annotations

import resource

import pytest
import torch

from clbench.evaluation.cost import allocator

GIB = 2**30


def faults_of_a_tensor() -> int:
    """Page faults of filling a fresh tensor of 64 MiB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_twice_the_peak_must_fit_into_half_of_what_there_is() -> None:
    assert allocator.enough(2 * GIB, 1 * GIB, 7 * GIB)
    assert not allocator.enough(2 * GIB, 1 * GIB, 6 * GIB)


@pytest.mark.skipif(allocator.why_not() is not None, reason="this process does not use plain glibc")
def test_memory_is_kept_where_there_is_room_and_given_back_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    freed = allocator.FreedMemory()
    try:
        monkeypatch.setattr(allocator, "_room", lambda: (GIB, 2**50))
        freed.settle()
        assert freed.kept
        torch.ones(40 * 2**20)  # larger, for an aligned tensor needs more than its own size
        assert faults_of_a_tensor() < 100
    finally:
        monkeypatch.setattr(allocator, "_room", lambda: (1, 1))
        freed.settle()
    assert not freed.kept
    assert faults_of_a_tensor() > 10_000


def test_a_user_turns_it_off_or_sets_glibc_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "in_use", lambda: "glibc 2.36")
    for name in (allocator.SWITCH, *allocator.SET_UP_BY, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    assert allocator.why_not() is None
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    assert allocator.why_not() == "set up by MALLOC_TRIM_THRESHOLD_"
    monkeypatch.setenv(allocator.SWITCH, "0")
    assert "not kept (CLBENCH_KEEP_MEMORY=0)" in allocator.described()
    monkeypatch.undo()
    monkeypatch.setattr(allocator, "in_use", lambda: "jemalloc")
    assert allocator.why_not() == "jemalloc, not glibc"
