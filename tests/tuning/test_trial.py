"""What a trial leaves of the steps it taught or shared."""

from __future__ import annotations

from pathlib import Path

from clbench.store import files
from clbench.store.shared_steps import run_name
from clbench.tuning.trial import remove_steps


def test_a_trial_removes_the_later_steps_that_it_taught_and_no_others(tmp_path: Path) -> None:
    home = tmp_path / "finetune" / "trial_001"
    shared = {number: tmp_path / "_shared" / f"id{number}" for number in range(1, 6)}
    taught_by = {1: home, 2: home, 3: tmp_path / "finetune" / "another", 4: home}
    for number, run in taught_by.items():
        for folder in (home, shared[number]):
            files.write_bytes(folder / f"step{number}.pt", b"weights")
            note = {"origin": {"identity": f"id{number}", "run": run_name(run), "before": None}}
            files.write_json(folder / f"step{number}.json", note)
    files.write_bytes(shared[5] / "resume" / "newest.pt", b"diverged here, so it has no note")

    with files.locked(shared[4] / ".lock"):
        remove_steps(home, shared.__getitem__, 5)

    assert [number for number, folder in shared.items() if folder.exists()] == [1, 3, 4]
    assert (shared[3] / "step3.pt").read_bytes() == b"weights"
    assert sorted(p.name for p in home.iterdir()) == [f"step{n}.json" for n in taught_by]
