"""Preprocessing ahead of use: the entries of a run, each made once, and a bad case named."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import psutil
import pytest
from joblib.externals.loky import process_executor
from typer.testing import CliRunner

from clbench import signals
from clbench.cli.options import app
from clbench.data import nifti
from clbench.data.cache import VolumeCache
from clbench.data.layouts import find_cases
from clbench.errors import DataError, StoreError
from clbench.run import prepare as prepare_module
from clbench.run.prepare import look, prepare, processes, unprepared, voxels
from clbench.spec.benchmark import Preprocessing, Source

SOURCE = Source(name="lits", title="", layout="lits", labels={1: "liver", 2: "liver_tumor"})
PRE = Preprocessing(spacing_mm=(2.0, 2.0, 2.0))
COUNT = 3


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        image = np.full((12, 12, 12), -1000, np.int16)
        image[2:9, 2:9, 2:9] = rng.integers(-100, 200, (7, 7, 7))
        label = np.zeros(image.shape, np.uint8)
        label[4:6, 4:6, 4:6] = 1
        for kind, array in (("volume", image), ("segmentation", label)):
            place = np.diag([2.0, 2.0, 4.0, 1.0])
            nib.save(nib.Nifti1Image(array, place), folder / f"{kind}-{i}.nii")
    return folder


def catalog(data: Path, cache: Path) -> Any:
    """What `prepare` asks of a catalog: a case of each kind, one of them in two splits."""
    files = {"lits": find_cases(data, SOURCE)}
    a, b, c = files["lits"]
    return SimpleNamespace(
        cache=VolumeCache(cache),
        preprocessing=PRE,
        files=files,
        splits=(SimpleNamespace(train=(a,), validation=(b,), test=()),),
        external_splits=(SimpleNamespace(train=(), validation=(), test=(c, a)),),
        source=lambda number: SOURCE,
    )


def seen(cache: VolumeCache, data: Path) -> list[object]:
    """All that is asked of cases before they are preprocessed."""
    return [
        ask(files, SOURCE)
        for files in find_cases(data, SOURCE).values()
        for ask in (
            lambda files, _: cache.content_hash(files),
            cache.holds,
            cache.image_hash,
            cache.notes,
        )
    ]


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """File → how often it was read from the disk."""
    count: Counter[str] = Counter()
    stream = nifti._stream

    def counting(path: Path) -> Any:
        count[path.name] += 1
        return stream(path)

    monkeypatch.setattr(nifti, "_stream", counting)
    return count


def content(root: Path) -> dict[str, bytes]:
    return {
        p.relative_to(root).as_posix(): p.read_bytes()
        for p in root.rglob("*")
        if p.parent.joinpath("meta.json").exists()
    }


def test_several_processes_make_the_entries_that_one_makes(data: Path, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    one, two = catalog(data, tmp_path / "one"), catalog(data, tmp_path / "two")
    assert len(unprepared(two)) == COUNT
    assert prepare(one, 1) == COUNT
    assert prepare(two, 2, events.append) == COUNT
    assert content(tmp_path / "one") == content(tmp_path / "two") != {}
    assert [(e["event"], e["done"], e["of"]) for e in events] == [
        ("prepared", i, COUNT) for i in range(1, COUNT + 1)
    ]
    assert sorted(e["case"] for e in events) == sorted(two.files["lits"])
    assert unprepared(two) == []
    assert prepare(two, 2) == 0


def cases_of(data: Path) -> list[Any]:
    return [(1, SOURCE, files) for files in find_cases(data, SOURCE).values()]


def test_a_case_is_unpacked_once_to_be_looked_at(
    data: Path, tmp_path: Path, unpacked: Counter[str]
) -> None:
    expected = seen(VolumeCache(tmp_path / "each"), data)
    assert set(unpacked.values()) != {1}  # without looking ahead
    unpacked.clear()
    cache = VolumeCache(tmp_path / "once")
    look(cache, cases_of(data), "notes")
    assert seen(cache, data) == expected
    assert set(unpacked.values()) == {1}
    assert len(unpacked) == 2 * COUNT


def test_looking_at_labels_reads_no_image(
    data: Path, tmp_path: Path, unpacked: Counter[str]
) -> None:
    cache = VolumeCache(tmp_path / "c")
    look(cache, cases_of(data), "values")
    assert unpacked == {f"segmentation-{i}.nii": 1 for i in range(COUNT)}
    assert all(cache.holds(files, SOURCE) == {"liver"} for *_, files in cases_of(data))
    assert sum(unpacked.values()) == COUNT


def test_several_processes_see_what_one_sees_and_end(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "IDLE_S", 0.2)
    events: list[dict[str, Any]] = []
    one, two = VolumeCache(tmp_path / "one"), VolumeCache(tmp_path / "two")
    before = set(psutil.Process().children(recursive=True))
    look(one, cases_of(data), "notes", jobs=1)
    look(two, cases_of(data), "notes", jobs=2, watch=events.append)
    kept = [
        {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        for root in (one.root, two.root)
    ]
    assert kept[0] == kept[1] != {}
    assert [(e["event"], e["done"], e["of"]) for e in events] == [
        ("looked at", i, COUNT) for i in range(1, COUNT + 1)
    ]
    look(two, cases_of(data), "notes", watch=events.append)
    assert len(events) == COUNT  # nothing twice

    def of_loky(process: psutil.Process) -> bool:
        try:
            return "popen_loky" in " ".join(process.cmdline())
        except psutil.Error:  # it has just ended
            return False

    def workers() -> list[psutil.Process]:
        left = set(psutil.Process().children(recursive=True)) - before
        return [*filter(of_loky, left)]

    pause = threading.Event()
    for _ in range(600):
        if not workers():
            break
        pause.wait(0.1)
    assert not workers()


def test_a_file_that_cannot_be_read_is_left_to_who_asks(data: Path, tmp_path: Path) -> None:
    (data / "volume-1.nii").write_bytes((data / "volume-1.nii").read_bytes()[:-100])
    cache = VolumeCache(tmp_path / "c")
    look(cache, cases_of(data), "notes")
    first, bad, last = (files for *_, files in cases_of(data))
    assert cache.has_looked(first, SOURCE, "notes")
    assert cache.has_looked(last, SOURCE, "notes")
    with pytest.raises(DataError, match=r"volume-1\.nii"):
        cache.content_hash(bad)


@pytest.mark.filterwarnings("error")
def test_asked_to_stop_it_waits_for_no_process_and_says_so_once(data: Path, tmp_path: Path) -> None:
    course = catalog(data, tmp_path / "c")
    with signals.listening(), pytest.raises(signals.Stopped, match=r"case \d prepared"):
        prepare(course, 2, lambda event: signals.ask("SIGTERM"))
    assert len(unprepared(course)) < COUNT


def test_asked_to_stop_it_keeps_what_was_seen(data: Path, tmp_path: Path) -> None:
    cache = VolumeCache(tmp_path / "c")
    with signals.listening(), pytest.raises(signals.Stopped, match="SIGTERM"):
        look(cache, cases_of(data), "notes", watch=lambda event: signals.ask("SIGTERM"))
    assert [cache.has_looked(files, SOURCE, "notes") for *_, files in cases_of(data)] == [
        True, False, False,
    ]  # fmt: skip


def test_arrays_that_share_what_was_read_may_not_be_written_to(data: Path) -> None:
    path = data / "volume-0.nii"
    with nifti.read_once():
        one, two = nifti.voxels(path), nifti.voxels(path)
        assert np.shares_memory(one, two)
        with pytest.raises(ValueError, match="read-only"):
            one[0, 0, 0] = 1
    nifti.voxels(path)[0, 0, 0] = 1


def test_a_process_that_keeps_its_memory_is_not_taken_for_one_that_leaks(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """joblib ends a process that has grown by 300 MB, which one with a large case has."""
    handlers = {number: signal.getsignal(number) for number in signals.SIGNALS}
    monkeypatch.setattr(
        process_executor, "_MAX_MEMORY_LEAK_SIZE", process_executor._MAX_MEMORY_LEAK_SIZE
    )
    try:
        prepare_module._look(tmp_path, cases_of(data)[0], "notes", parent=0)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    limit = process_executor._MAX_MEMORY_LEAK_SIZE
    assert limit == sys.maxsize


def test_freed_memory_is_kept_from_case_to_case(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settled: list[None] = []
    freed = SimpleNamespace(settle=lambda: settled.append(None))
    monkeypatch.setattr(prepare_module, "freed_memory", lambda: freed)
    assert prepare(catalog(data, tmp_path / "cache"), 1) == COUNT
    assert len(settled) == COUNT


def test_what_another_process_prepared_is_not_counted(data: Path, tmp_path: Path) -> None:
    here, there = catalog(data, tmp_path / "c"), catalog(data, tmp_path / "c")
    left = unprepared(here)
    assert prepare(there, 1) == COUNT
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clbench.run.prepare.unprepared", lambda catalog: left)  # as seen before
        assert prepare(here, 1) == 0


def test_a_case_that_cannot_be_used_is_named_and_the_others_are_ready(
    data: Path, tmp_path: Path
) -> None:
    air = np.full((12, 12, 12), -1024, np.int16)
    nib.save(nib.Nifti1Image(air, np.diag([2.0, 2.0, 4.0, 1.0])), data / "volume-1.nii")
    course = catalog(data, tmp_path / "c")
    with pytest.raises(DataError, match=r"volume-1\.nii"):
        prepare(course, 1)
    assert [files.case for *_, files in unprepared(course)] == ["1"]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_cache_that_cannot_be_written_ends_the_work_at_the_first_case(
    data: Path, tmp_path: Path, jobs: int
) -> None:
    (tmp_path / "file").touch()
    course = catalog(data, tmp_path / "file" / "c")
    events: list[dict[str, Any]] = []
    with pytest.raises(StoreError, match="cannot be written"):
        prepare(course, jobs, events.append)
    assert not events


def test_a_process_that_is_killed_is_an_error_with_a_way_out(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*case: object) -> None:  # within the test: processes cannot import its module
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(prepare_module, "_prepare_case", killed)
    with pytest.raises(StoreError, match="memory runs out") as err:
        prepare(catalog(data, tmp_path / "c"), 2)
    assert "clbench data prepare --jobs 1" in str(err.value)
    assert "SIGKILL" in str(err.value.__cause__)


def test_a_process_that_a_signal_to_all_has_killed_is_a_stop(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(root: Path, case: object, pre: object, parent: int) -> None:
        os.kill(parent, signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(prepare_module, "_prepare_case", ended)
    with signals.listening(), pytest.raises(signals.Stopped, match="SIGUSR1"):
        prepare(catalog(data, tmp_path / "c"), 2)


def test_a_process_that_prepares_ignores_signals_to_all(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (case, *_) = unprepared(course := catalog(data, tmp_path / "c"))
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    try:
        prepare_module._prepare_case(course.cache.root, case, course.preprocessing, parent=0)
        assert {signal.getsignal(number) for number in signals.SIGNALS} == {signal.SIG_IGN}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_asked_to_stop_it_keeps_what_is_ready(data: Path, tmp_path: Path) -> None:
    course = catalog(data, tmp_path / "c")
    with signals.listening(), pytest.raises(signals.Stopped, match="SIGTERM"):
        prepare(course, 1, lambda event: signals.ask("SIGTERM"))
    assert len(unprepared(course)) == COUNT - 1


def test_little_work_is_left_to_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    course = catalog(data, tmp_path / "c")
    assert prepare(course) == 0
    monkeypatch.setattr(prepare_module, "WORTH_VOXELS", 100)
    monkeypatch.setattr(prepare_module, "processes", lambda cases, pre: 1)
    assert prepare(course) == COUNT


def test_memory_and_cores_bound_the_processes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = unprepared(catalog(data, tmp_path / "c"))
    # 12 voxels of 4 mm are 24 of 2 mm; a coarser grid than the file's does not make the file smaller
    assert voxels(left[0], PRE) == 12 * 12 * 24
    assert voxels(left[0], Preprocessing(spacing_mm=(8.0, 8.0, 8.0))) == 12**3
    case = 12 * 12 * 24 * prepare_module.PEAK_BYTES_PER_VOXEL

    def free(count: float) -> None:
        memory = SimpleNamespace(available=int(count * case))
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)

    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(8), raising=False)
    for cases, expected in ((2.5, 2), (0.5, 1), (100, COUNT)):
        free(cases)
        assert processes(left, PRE) == expected
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(2), raising=False)
    assert processes(left, PRE) == 2


@pytest.mark.usefixtures("smoke_run")
def test_the_command_prepares_what_is_not_ready(cache_root: Path, tmp_path: Path) -> None:
    (tmp_path / "phantom").symlink_to(cache_root / "phantom")  # images, and no volume of them
    words = ["data", "prepare", "--profile", "smoke", "--cache", str(tmp_path), "--jobs", "1"]
    for count in (r"[1-9]\d*", "0"):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
        assert re.search(rf"^{count} cases prepared, 1 at a time", done.output, re.MULTILINE)
