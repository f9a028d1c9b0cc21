"""Access control for past data, at every level a strategy may declare."""

from __future__ import annotations

import contextlib
import contextvars
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest

from clbench.data.catalog import case_being_read, reading
from clbench.errors import TrainingError
from clbench.report.past_images import past_card
from clbench.run.course import run_plan
from clbench.run.plan import RunSettings, resolve
from clbench.store import run_folder
from clbench.store.record import Identity, RecordedCourse, RunRecord
from clbench.strategies.finetune import Finetune
from clbench.strategy.contract import DrawBatches, Lesson, Memory, Strategy
from clbench.training.past_data import (
    FileAccessMonitor,
    listening_to_opens,
    refuse_lost_cases,
    refuse_undeclared,
)


@dataclass(frozen=True, kw_only=True)
class Cheat(Finetune):
    """Step 1 is everybody's, so that it need not be taught again."""

    def first_step(self) -> Strategy:
        return Finetune()


@dataclass(frozen=True, kw_only=True)
class OldWeights(Cheat):
    """Declares nothing, and starts from the old model."""

    past: ClassVar[Any] = "nothing"


@dataclass(frozen=True, kw_only=True)
class OldImage(Cheat):
    """Asks for an image of step 1."""

    def extra_cases(self, step: Lesson, memory: Memory) -> Mapping[tuple[int, str], float]:
        return {(1, step.past[1][0]): 1.0} if step.number == 2 else {}


class OldImageNothing(OldImage):
    """The same, declaring nothing."""

    past: ClassVar[Any] = "nothing"
    starts_from: ClassVar[Any] = "scratch"


class OldImageWeights(OldImage):
    """The same, declaring weights."""

    past: ClassVar[Any] = "weights"


class OldImagePredictions(OldImage):
    """The same, declaring predictions."""

    past: ClassVar[Any] = "predictions"


@dataclass(frozen=True, kw_only=True)
class Burglar(Cheat):
    """Reads an image of step 1 from its file, past the catalog, and swallows every error."""

    def finish(self, step: Lesson, model: Any, draws: DrawBatches, memory: Memory) -> None:
        if step.number == 2:
            with contextlib.suppress(Exception):
                Path(WANTED[0]).read_bytes()


@dataclass(frozen=True, kw_only=True)
class RelativeBurglar(Cheat):
    """The same, by a relative path."""

    def finish(self, step: Lesson, model: Any, draws: DrawBatches, memory: Memory) -> None:
        if step.number == 2:
            with contextlib.suppress(Exception):
                Path(os.path.relpath(WANTED[0])).read_bytes()


@dataclass(frozen=True, kw_only=True)
class Peeper(Cheat):
    """Reads the label of a test case from its file while it is examined, and swallows every error."""

    def axial_ranges(
        self, image_hu: Any, spacing_mm: Any, structures: tuple[str, ...], memory: Memory
    ) -> Mapping[str, tuple[int, int]]:
        with contextlib.suppress(Exception):
            Path(WANTED[0]).read_bytes()
        return super().axial_ranges(image_hu, spacing_mm, structures, memory)


WANTED: list[str] = []


@pytest.fixture
def out(smoke_run: Path, tmp_path: Path) -> Path:
    """A results folder in which step 1 is taught already."""
    first = run_folder.read_record(smoke_run)["step_origins"]["1"]["identity"]
    shutil.copytree(smoke_run.parents[2] / "_shared" / first, tmp_path / "_shared" / first)
    return tmp_path


def planned(out: Path, cache: Path, strategy: Strategy) -> Any:
    settings = RunSettings(
        bench="tumor_ext", strategy="cheat", profile="smoke", out=out, cache=cache
    )
    return resolve(settings, strategy=strategy)


@pytest.mark.parametrize(
    ("cheat", "says"),
    [
        (OldWeights(), "asks for the past without declaring it"),
        (OldImageNothing(), "opened an image of an earlier step without declaring it"),
        (OldImageWeights(), "opened an image of an earlier step without declaring it"),
        (OldImagePredictions(), "opened an image of an earlier step without declaring it"),
        (Burglar(), "was read past the catalog"),
        (RelativeBurglar(), "was read past the catalog"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Strategy) else "",
)
def test_a_cheat_is_stopped_in_the_step_it_cheats_in(
    cheat: Strategy, says: str, out: Path, cache_root: Path
) -> None:
    plan = planned(out, cache_root, cheat)
    first = plan.catalog.files["btcv"][plan.catalog.splits[0].train[0]]
    WANTED[:] = [str(first.files[0])]
    events: list[str] = []
    with pytest.raises(TrainingError, match=says) as err:
        run_plan(plan, lambda event: events.append(event["event"]))
    assert "step 2" in str(err.value)
    assert "shared" in events  # step 1 itself was fine
    assert run_folder.read_record(plan.folder)["steps_done"] == 1
    assert not (plan.folder / "step2.pt").exists()


def test_a_peep_at_a_test_label_in_the_examination_is_stopped(out: Path, cache_root: Path) -> None:
    plan = planned(out, cache_root, Peeper())
    test = plan.catalog.files["btcv"][plan.catalog.splits[0].test[0]]
    WANTED[:] = [str(test.files[-1])]
    with pytest.raises(TrainingError, match="was read past the catalog") as err:
        run_plan(plan)
    assert f"step 1, btcv case {plan.catalog.splits[0].test[0]}" in str(err.value)
    assert run_folder.read_record(plan.folder)["steps_done"] == 0
    assert not (plan.folder / "scores.csv").exists()


def test_a_thread_without_the_context_is_not_trusted(tmp_path: Path) -> None:
    image = tmp_path / "image.nii.gz"
    image.write_bytes(b"voxels")
    files = {"x": {"1": SimpleNamespace(files=(image,))}}
    catalog = SimpleNamespace(files=files, step=2, source=lambda step: SimpleNamespace(name="x"))
    opened = FileAccessMonitor(cast("Any", catalog))

    def run_thread(read: Any) -> None:
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()

    with listening_to_opens(opened):
        with reading(1, "1"):
            image.read_bytes()
            context = contextvars.copy_context()  # as a pool of the benchmark's own would hand on
            run_thread(lambda: context.run(image.read_bytes))
            assert not opened.unrecorded_reads
            run_thread(image.read_bytes)
            assert opened.unrecorded_reads == [(2, "x", "1")]
        assert case_being_read() is None
        image.read_bytes()
    assert opened.unrecorded_reads == [(2, "x", "1")] * 2


def relative(path: Path) -> Any:
    return os.path.relpath(path)


def linked(path: Path) -> Any:
    link = path.with_name("link")
    link.symlink_to(path)
    return str(link)


def through_a_linked_folder(path: Path) -> Any:
    folder = path.parent.with_name(f"{path.parent.name}_link")
    folder.symlink_to(path.parent, target_is_directory=True)
    return f"{folder}/../{folder.name}/{path.name}"


@pytest.mark.parametrize(
    "spell",
    [str, Path, os.fsencode, relative, linked, through_a_linked_folder],
    ids=["text", "path", "bytes", "relative", "link", "linked-folder"],
)
@pytest.mark.parametrize("named", ["", "linked"])
def test_a_file_is_heard_however_its_path_is_spelled(
    spell: Any, named: str, tmp_path: Path
) -> None:
    image = tmp_path / "image.nii.gz"
    image.write_bytes(b"voxels")
    place = tmp_path
    if named:  # data that the user named by a link
        place = tmp_path.with_name(f"{tmp_path.name}_data")
        place.symlink_to(tmp_path, target_is_directory=True)
    files = {"x": {"1": SimpleNamespace(files=(place / image.name,))}}
    catalog = SimpleNamespace(files=files, step=2, source=lambda step: SimpleNamespace(name="x"))
    opened = FileAccessMonitor(cast("Any", catalog))
    path = spell(image)
    with listening_to_opens(opened):
        with open(path, "rb"):  # noqa: PTH123  # bytes are no Path
            pass
        os.close(os.open(path, os.O_RDONLY))
    assert opened.unrecorded_reads == [(2, "x", "1")] * 2


def shell(path: Path) -> None:
    subprocess.run(f"cat '{path}' > /dev/null", shell=True, check=True)  # noqa: S602


@pytest.mark.skipif(sys.platform == "win32", reason="programs of a POSIX system")
@pytest.mark.parametrize(
    "read",
    [
        lambda path: os.link(path, path.with_name("second")),
        lambda path: path.rename(path.with_name("second")),
        lambda path: subprocess.run(["cat", path], check=True, stdout=subprocess.DEVNULL),
        lambda path: subprocess.run(["cat", str(path)], check=True, stdout=subprocess.DEVNULL),
        shell,
        lambda path: os.system(f"cat {path} > /dev/null"),  # noqa: S605
        lambda path: os.system(f"cat<{path}>/dev/null;true"),  # noqa: S605
        lambda path: subprocess.run(
            ["cat", path.name], cwd=path.parent, check=True, stdout=subprocess.DEVNULL
        ),
        lambda path: subprocess.run(["true", f"--in={path}"], check=True),
        lambda path: subprocess.run([sys.executable, "-c", f"open({str(path)!r})"], check=True),
        lambda path: os.waitpid(os.posix_spawn("/bin/true", ["true", str(path)], {}), 0),
    ],
    ids=[
        "hard-link", "rename", "program", "program-text", "shell", "system", "redirected",
        "its-folder", "option", "code", "spawn",
    ],
)  # fmt: skip
def test_a_second_name_and_a_program_told_the_file_are_heard(read: Any, tmp_path: Path) -> None:
    image, other = tmp_path / "image.nii.gz", tmp_path / "other"
    for path in (image, other):
        path.write_bytes(b"voxels")
    files = {"x": {"1": SimpleNamespace(files=(image,))}}
    catalog = SimpleNamespace(files=files, step=2, source=lambda step: SimpleNamespace(name="x"))
    opened = FileAccessMonitor(cast("Any", catalog))
    with listening_to_opens(opened):
        subprocess.run(["cat", other], check=True, stdout=subprocess.DEVNULL)
        assert not opened.unrecorded_reads
        read(image)
    assert set(opened.unrecorded_reads) == {(2, "x", "1")}


def test_a_hard_link_made_before_is_the_case_it_links(tmp_path: Path) -> None:
    image, link, other = (tmp_path / name for name in ("image.nii.gz", "link", "other"))
    image.write_bytes(b"voxels")
    link.hardlink_to(image)
    other.write_bytes(b"text")
    (tmp_path / "of other").hardlink_to(other)
    cached = tmp_path / "volume.npy"
    cached.write_bytes(b"voxels")
    files = {"x": {"1": SimpleNamespace(files=(image,))}}
    catalog = SimpleNamespace(files=files, step=2, source=lambda step: SimpleNamespace(name="x"))
    opened = FileAccessMonitor(cast("Any", catalog))
    with listening_to_opens(opened):
        other.read_bytes()
        assert not opened.unrecorded_reads
        link.read_bytes()
        assert opened.unrecorded_reads == [(2, "x", "1")]
        with reading(1, "2"):
            cached.read_bytes()
    (tmp_path / "of cached").hardlink_to(cached)
    with listening_to_opens(opened):
        (tmp_path / "of cached").read_bytes()
    assert opened.unrecorded_reads == [(2, "x", "1"), (2, "x", "2")]
    image.unlink()
    image.write_bytes(b"another file")  # what was linked is no longer the case
    with listening_to_opens(opened):
        (tmp_path / "second").hardlink_to(link)
        link.read_bytes()
    assert len(opened.unrecorded_reads) == 2


def test_the_cached_volume_is_heard_by_a_relative_path(tmp_path: Path) -> None:
    cached = tmp_path / "volume.npy"
    cached.write_bytes(b"voxels")
    catalog = SimpleNamespace(files={}, step=2, source=lambda step: SimpleNamespace(name="x"))
    opened = FileAccessMonitor(cast("Any", catalog))
    with listening_to_opens(opened):
        with reading(1, "1"):
            cached.read_bytes()
        Path(os.path.relpath(cached)).read_bytes()
    assert opened.unrecorded_reads == [(2, "x", "1")]


def test_listening_changes_nothing_for_paths_that_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = SimpleNamespace(files={}, step=2, source=lambda step: SimpleNamespace(name="x"))
    opened = FileAccessMonitor(cast("Any", catalog))
    lost = tmp_path / "lost"
    lost.mkdir()
    monkeypatch.chdir(lost)
    lost.rmdir()
    with listening_to_opens(opened):
        with pytest.raises(ValueError, match="null"):
            Path("a\0b").read_bytes()
        with pytest.raises(FileNotFoundError):
            Path("relative to nothing").read_bytes()
        opened("a\0b")
    assert not opened.unrecorded_reads


def test_the_context_ends_where_reading_fails() -> None:
    missing = Path("no such file")
    with pytest.raises(FileNotFoundError), reading(1, "a"), reading(2, "b"):
        missing.read_bytes()
    assert case_being_read() is None


LESSON = Lesson(number=2, learns=("b",), structures=("a", "b"), source="two")


class Asks(Strategy):
    """Declares nothing; starts from scratch, and may ask the old model all the same."""

    past: ClassVar[Any] = "nothing"
    starts_from: ClassVar[Any] = "scratch"


class AsksTeacher(Asks):
    """For its output on every batch."""

    def takes_teacher(self, step: Lesson) -> bool:
        return True


class AsksPredictions(Asks):
    """For pseudo labels."""

    def prepares(self, step: Lesson) -> bool:
        return True


def test_nothing_means_no_old_model_and_no_memory() -> None:
    for cheat, words in ((AsksTeacher(), "takes_teacher"), (AsksPredictions(), "prepares")):
        with pytest.raises(TrainingError, match="without declaring") as err:
            refuse_undeclared(cheat, LESSON, {})
        assert words in str(err.value)
    memory: Memory = {"kept": 1}
    refuse_undeclared(
        Asks(), Lesson(number=1, learns=("a",), structures=("a",), source="one"), memory
    )
    assert memory
    refuse_undeclared(Finetune(), LESSON, memory)
    assert memory
    refuse_undeclared(Asks(), LESSON, memory)
    assert not memory


def test_a_stored_case_that_was_let_go_does_not_come_back() -> None:
    catalog = SimpleNamespace(
        past="cases", source=lambda step: SimpleNamespace(name=("x", "y", "z")[step - 1])
    )
    third = Lesson(number=3, learns=("c",), structures=("a", "b", "c"), source="z")
    ledger = {"1": {"train": ["x/1", "x/2"]}, "2": {"train": ["x/1", "y/5"]}}

    def ask(*cases: tuple[int, str]) -> None:
        refuse_lost_cases(cast("Any", catalog), third, cases, ledger)

    ask((1, "1"), (2, "5"), (2, "6"))  # any case of the step before may still be stored
    with pytest.raises(TrainingError, match="had not stored") as err:
        ask((1, "2"))
    assert "x/2 of step 1" in str(err.value)
    catalog.past = "images"
    ask((1, "2"))


def test_the_card_says_what_was_opened() -> None:
    record = RunRecord(
        status="finished",
        steps_done=2,
        run_id="x",
        strategy="x",
        identity=Identity(
            bench="x",
            bench_version=1,
            strategy={},
            profile={},
            data_fingerprint="x",
            splits=(),
            vectors=None,
            weights=None,
            seed=0,
            numerics=1,
        ),
        patients=False,
        data_fingerprint="x",
        course=RecordedCourse(steps=(), groups={}, train=[["x/1", "x/2"], ["y/5"]], test=()),
        ledger={
            "1": {"train": ["x/1", "x/2"]},
            "2": {"train": ["y/5"], "trace": ["x/9"], "validation": ["y/8"], "test": ["x/3"]},
        },
    )
    assert past_card(record) == "none (enforced)"
    record.ledger["2"]["train"] = ["x/2", "y/5"]
    record.past = "cases"
    assert past_card(record) == "stored cases: 1 of 2 (x/2)"
    record.past = "images"
    assert past_card(record) == "1 of 2 (x/2)"
    record.ledger["2"]["train"] = ["x/1", "x/2", "y/5"]
    assert past_card(record) == "all 2"
    assert "not known" in past_card(replace(record, external=True))
