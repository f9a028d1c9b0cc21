"""The door to Avalanche: closed until it is needed, and open past a torchvision that cannot load."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

import clbench.avalanche
from clbench.avalanche import lazy_import
from clbench.errors import AvalancheError


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A process in which nobody imported torchvision, and a torchvision of its own to look at."""
    for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(lazy_import, "_declared", [])
    spec = ModuleSpec("torchvision", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    (tmp_path / "_C.so").write_bytes(b"")
    return tmp_path


def test_a_matching_torchvision_is_left_alone(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch.ops, "load_library", lambda path: asked.append(str(path)))
    assert not lazy_import.make_torchvision_importable()
    assert asked == [str(fresh / "_C.so")]
    assert not lazy_import._declared


def test_one_that_is_imported_already_is_not_even_asked(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", sys)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail("asked"))
    assert not lazy_import.make_torchvision_importable()


def test_operators_are_declared_where_the_compiled_part_cannot_load(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Library:
        def __init__(self, *names: str) -> None:
            self.names, self.schemas = names, []

        def define(self, schema: str) -> None:
            self.schemas.append(schema.split("(")[0])

    monkeypatch.setattr(torch.library, "Library", Library)
    assert lazy_import.make_torchvision_importable()  # an empty file is no library
    (made,) = lazy_import._declared
    assert made.names == ("torchvision", "FRAGMENT")
    assert made.schemas == ["nms", "qnms"]
    assert not lazy_import.make_torchvision_importable()  # once is enough


def test_without_a_compiled_part_operators_are_declared_too(fresh: Path) -> None:
    (fresh / "_C.so").unlink()
    assert not lazy_import.compiled_part_loads()


def test_without_torchvision_the_import_itself_says_so(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not lazy_import.make_torchvision_importable()


def test_a_missing_module_is_explained() -> None:
    with pytest.raises(AvalancheError, match=r"No module named 'avalanche_gone'") as err:
        lazy_import.load("avalanche_gone.plugins")
    assert "avalanche-lib==0.6.0" in str(err.value)


def test_the_package_offers_what_it_names_and_nothing_else() -> None:
    for name in clbench.avalanche.OFFERS:
        assert name in dir(clbench.avalanche)
        assert callable(getattr(clbench.avalanche, name))
    with pytest.raises(AttributeError, match="has no attribute 'scenaro'"):
        _ = clbench.avalanche.scenaro


def test_nothing_imports_avalanche_before_it_is_needed() -> None:
    """In a process of its own; there, torchvision imports behind the door whatever it does before it."""
    code = """
import sys
import clbench, clbench.avalanche
assert not {"torch", "torchvision", "avalanche"} & set(sys.modules)
import clbench.cli, clbench.run.course, clbench.testing
from clbench.spec import registry
for name in registry.entries("strategy"):
    registry.load("strategy", name)()
assert "torch" in sys.modules
assert not {"torchvision", "avalanche"} & set(sys.modules)
from clbench.avalanche import lazy_import
fits = lazy_import.compiled_part_loads()
try:
    import torchvision
except RuntimeError as err:
    assert not fits, err
    assert "torchvision::nms does not exist" in str(err)
else:
    assert fits
assert lazy_import.load("torchvision").__version__
assert bool(lazy_import._declared) == (not fits)
assert lazy_import.load("torchvision.ops").nms
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
