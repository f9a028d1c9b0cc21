"""What a published run says of the machine it was made on: no folder of it."""

from __future__ import annotations

import json
import re

import pytest
from locations import ROOT

from clbench.store import run_folder
from clbench.store.publish import _last_parts, _without_absolute, without_folders
from clbench.store.record import RunRecord

RUNS = run_folder.find_runs(ROOT / "results" / "reference")
WITH_FOLDERS = re.compile(r"(?<![\w.:/)])(?:~|[A-Za-z]:)?[/\\]\w")


def test_a_record_names_no_folder_of_the_machine() -> None:
    record = RunRecord.read(RUNS[0])
    record.settings |= {
        "bench": "/home/me/mine.toml",
        "data": "a=/home/me/a,b=/home/me/b",
        "out": "/home/me/out",
        "cache": "/home/me/cache",
        "overrides": ["backbone.weights=/home/me/w.pt", "text.template=CT/MR of {}"],
    }
    record.command = ["clbench", "run", "--data", "a=/home/me/a"]
    record.command += ["--set", "text.template=CT/MR of {}"]
    record.extends = {"run": "/home/me/out/tumor_ext/universal/0123456789ab", "step": 2}
    record.predictions = {"2": {"folder": "/home/me/masks", "labels": {"a": {"1": "liver"}}}}
    assert record.with_defaults is not None
    record.with_defaults["profile"]["backbone"]["weights"] = "/home/me/w.pt"
    record.warnings = [
        {"step": 0, "message": "no mask beside /home/me/a/img/1.nii.gz, org/name"},
        {"step": 0, "message": "/home/me/a/of John Smith/1.nii.gz is odd"},
    ]
    before = json.dumps(record.to_json(), default=str)
    copy = without_folders(record)
    assert "/home" not in json.dumps(copy.to_json(), default=str)
    assert json.dumps(record.to_json(), default=str) == before
    assert (copy.settings["bench"], copy.settings["data"]) == ("mine.toml", "a=a,b=b")
    assert (copy.settings["out"], copy.settings["cache"]) == ("out", None)
    assert copy.settings["overrides"] == ["backbone.weights=w.pt", "text.template=CT/MR of {}"]
    assert copy.command == ["clbench", "run", "--data", "a=a", "--set", "text.template=CT/MR of {}"]
    assert copy.extends == {"run": "0123456789ab", "step": 2}
    assert copy.predictions == {"2": {"folder": "masks", "labels": {"a": {"1": "liver"}}}}
    assert copy.warnings == [
        {"step": 0, "message": "no mask beside a/img/1.nii.gz, org/name"},
        {"step": 0, "message": "a/of John Smith/1.nii.gz is odd"},
    ]
    assert copy.identity == record.identity  # the run id is made from it


def test_folders_are_cut_from_what_was_typed() -> None:
    assert _last_parts("btcv=/data/x/BTCV,lits=~/LiTS") == "btcv=BTCV,lits=LiTS"
    assert _last_parts(r"C:\Users\me\course.toml") == "course.toml"
    assert _last_parts("../out/") == "out/"
    for word in ("--out", "module:Class", "train.lr=0.1", "clbench", "a,b"):
        assert _last_parts(word) == word


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/home/me/w.pt", "w.pt"),
        ("~/w.pt and C:\\Users\\me\\w.pt", "w.pt and w.pt"),
        ("in '/data/a b', (/data/c): 3 of 4", "in 'a b', (c): 3 of 4"),
        ("sentence-transformers/all-MiniLM", "sentence-transformers/all-MiniLM"),
        ("3/4 of the cases / of the steps", "3/4 of the cases / of the steps"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("[/home/me/x] and /home/me/.hidden", "[x] and .hidden"),
        ("//server/share/x, file:///home/me/x, ~me/x/y", "x, x, y"),
        ("text.template=A CT/MR of a {}", "text.template=A CT/MR of a {}"),
    ],
)
def test_of_a_sentence_only_absolute_paths_are_cut(text: str, left: str) -> None:
    assert _without_absolute(text) == left


def test_the_runs_kept_here_name_no_folder_of_the_machine() -> None:
    kept = [path.parent for path in (ROOT / "results").rglob("run.json")]
    assert len(kept) > len(RUNS) > 50
    for run in kept:
        record = run_folder.read_record(run)
        said = [*record["command"], *map(str, record["settings"].values())]
        assert not [word for word in said if WITH_FOLDERS.search(word)], run
