"""Scripts that measure start: what they import is where they look for it."""

from __future__ import annotations

import json
import subprocess
import sys

from locations import ROOT

IMPORTS = """
import importlib, sys
from pathlib import Path
folder = Path(sys.argv[1])
sys.path[:0] = [str(folder), str(folder.parent)]
for name in sys.argv[2:]:
    importlib.import_module(name)
"""


def test_every_script_that_measures_imports_what_there_is() -> None:
    folder = ROOT / "tests" / "perf"
    names = sorted(path.stem for path in folder.glob("*.py"))
    assert len(names) > 15
    done = subprocess.run(  # this interpreter
        [sys.executable, "-c", IMPORTS, str(folder), *names],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_scripts_of_make_perf_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (names,) = [
        line.split("=")[1].split() for line in makefile.splitlines() if line[:6] == "PERF ="
    ]
    assert names
    for name in names:
        assert (ROOT / "tests" / "perf" / f"{name}.py").is_file()


def test_the_measurement_beside_monai_comes_to_its_end() -> None:
    """It takes turns with updates, and waits for ever where one side says more than those."""
    script = ROOT / "tests" / "perf" / "update.py"
    small = ["--classes", "2", "--size", "12", "--updates", "2"]  # 64 is the least edge
    done = subprocess.run(
        [sys.executable, str(script), "monai", *small],
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["ratio"] > 0
    assert measured["memory_ratio"] > 0
