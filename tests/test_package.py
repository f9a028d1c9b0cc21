"""The package itself: layers, packages, entry points, light imports, a wheel that works anywhere."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from clbench import registry
from clbench.errors import ClbenchError, DataError, UnknownName

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# Room → row; an import may only point down or stay in its row. The longest prefix counts.
ROWS = {
    "clbench": 0,
    "clbench.errors": 0, "clbench.names": 0, "clbench.spec": 0, "clbench.splits": 0, "clbench.coursefile": 0, "clbench.taxonomy": 0, "clbench.stats": 0,
    "clbench.settings": 0, "clbench.bootstrap": 0, "clbench.equivalence": 0, "clbench.families": 0,
    "clbench.intervals": 0, "clbench.effects": 0, "clbench.macro": 0, "clbench.ranks": 0,
    "clbench.store": 1, "clbench.seal": 1, "clbench.excerpt": 1, "clbench.__main__": 6, "clbench.registry": 1, "clbench.metrics.transfer": 1,
    "clbench.metrics.continual": 1, "clbench.metrics.trace": 1,
    "clbench.published": 1, "clbench.calibration": 1, "clbench.profiles": 1, "clbench.benchmarks": 1,
    "clbench.strategy": 2, "clbench.session": 2, "clbench.losses": 2, "clbench.one_of_k": 2, "clbench.distillation": 2, "clbench.nets": 2,
    "clbench.data": 2, "clbench.metrics": 2, "clbench.checkpoint": 2, "clbench.postprocess": 2,
    "clbench.predictions": 2, "clbench.archive": 2, "clbench.sliding": 2, "clbench.pooling": 2, "clbench.pruning": 2, "clbench.lottery": 2, "clbench.extent": 2,
    "clbench.train": 3, "clbench.examine": 3, "clbench.watches": 3, "clbench.headroom": 3, "clbench.opened": 3, "clbench.past": 3, "clbench.tracing": 3,
    "clbench.resume": 3, "clbench.prepare": 3, "clbench.stop": 0,
    "clbench.plan": 4, "clbench.costfile": 4, "clbench.run": 4, "clbench.models": 4, "clbench.teaching": 4, "clbench.examination": 4, "clbench.score": 4, "clbench.verify": 4, "clbench.outside": 4,
    "clbench.launch": 5, "clbench.doctor": 5, "clbench.report": 5, "clbench.testing": 5, "clbench.trial": 5, "clbench.avalanche": 5,
    "clbench.strategies": 5,
    "clbench.cli": 6,
}  # fmt: skip
# Heavy or foreign libraries, and the only rooms that may import them anywhere in the file.
FOREIGN = {
    "torch": ("clbench.strategy", "clbench.session", "clbench.losses", "clbench.one_of_k", "clbench.distillation",
              "clbench.pooling", "clbench.pruning", "clbench.lottery", "clbench.extent", "clbench.trial", "clbench.nets",
              "clbench.data", "clbench.checkpoint", "clbench.postprocess", "clbench.sliding",
              "clbench.train", "clbench.examine", "clbench.watches", "clbench.headroom", "clbench.resume",
              "clbench.prepare", "clbench.plan", "clbench.run", "clbench.models", "clbench.teaching", "clbench.examination",
              "clbench.strategies", "clbench.metrics.overlap", "clbench.metrics.counting",
              "clbench.metrics.cost", "clbench.metrics.meter", "clbench.metrics.course_cost", "clbench.metrics.printed_flops",
              "clbench.costfile", "clbench.avalanche",
              "clbench.testing"),
    "monai": ("clbench.data", "clbench.nets", "clbench.examine", "clbench.sliding"),
    "avalanche": ("clbench.avalanche",),
    "torchvision": ("clbench.avalanche",),
    "matplotlib": ("clbench.report.figures",),
    "nibabel": ("clbench.data",),
}  # fmt: skip


def modules() -> dict[str, Path]:
    """Every module of the package by its installed name."""
    tool = PROJECT["tool"]["setuptools"]
    found = {}
    for package in tool["packages"]:
        where = tool["package-dir"].get(package, package.replace(".", "/"))
        for path in (ROOT / where).glob("*.py"):
            found[package if path.stem == "__init__" else f"{package}.{path.stem}"] = path
    return found


def row(module: str) -> int:
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        if (name := ".".join(parts[:end])) in ROWS:
            return ROWS[name]
    raise AssertionError(f"{module} has no row: place it in ROWS and in the README's table")


def imports(path: Path, module: str) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module if path.stem == "__init__" else module.rpartition(".")[0]
                base = f"{package}.{base}".rstrip(".")
            found |= {f"{base}.{a.name}" for a in node.names} | {base}
    return found


def test_imports_point_down_only() -> None:
    known = modules()
    wrong = [
        f"{module} (row {row(module)}) imports {target} (row {row(target)})"
        for module, path in known.items()
        for target in imports(path, module)
        if target in known and row(target) > row(module)
    ]
    assert not wrong, "\n".join(wrong)


def test_core_knows_no_method() -> None:
    wrong = [
        f"{module} imports {target}"
        for module, path in modules().items()
        if not module.startswith("clbench.strategies")
        for target in imports(path, module)
        if target.startswith("clbench.strategies")
    ]
    assert not wrong


@pytest.mark.parametrize("library", sorted(FOREIGN))
def test_foreign_libraries_stay_in_their_rooms(library: str) -> None:
    wrong = [
        f"{module} imports {target}"
        for module, path in modules().items()
        for target in imports(path, module)
        if (target == library or target.startswith(library + "."))
        and not any(module == r or module.startswith(r + ".") for r in FOREIGN[library])
    ]
    assert not wrong


def test_packages_are_listed_by_hand_and_completely() -> None:
    tool = PROJECT["tool"]["setuptools"]
    listed = set(tool["packages"])
    home = {v: k for k, v in tool["package-dir"].items()}
    folders = set()
    for top in ("clbench", "strategies", "benchmarks", "results/published", "results/calibration"):
        for init in (ROOT / top).rglob("__init__.py"):
            folder = init.parent.relative_to(ROOT).as_posix()
            folders.add(home.get(folder) or folder.replace("/", "."))
    assert listed == folders


@pytest.mark.parametrize("kind", sorted(registry.GROUPS))
def test_every_entry_point_loads_and_has_a_line(kind: str) -> None:
    names = registry.entries(kind)
    assert names
    for name in names:
        line = registry.summary(kind, name)
        assert line, name
        assert not line.startswith("broken")
        if kind == "benchmark":
            assert registry.benchmark(name).name == name
        else:
            assert callable(registry.load(kind, name))


def test_a_strategy_stays_small() -> None:
    for path in (ROOT / "strategies").glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 120, path.name


def test_every_loss_names_its_source() -> None:
    from clbench import distillation, losses, one_of_k, pooling

    made = [registry.load("strategy", name) for name in registry.entries("strategy")]
    shared = (
        losses.dice, losses.bce, one_of_k.marginal_ce, one_of_k.sigmoid_dice, pooling.local_pod,
        pooling.pod, *(getattr(distillation, n) for n in
        ("kd_softmax", "kd_unbiased", "kd_sigmoid", "feature_mse", "gated_ce")),
    )  # fmt: skip
    for loss in (*(kind.losses for kind in made if kind.__module__.startswith("clbench")), *shared):
        assert "Source: " in (loss.__doc__ or ""), f"{loss.__module__}.{loss.__qualname__}"


def test_the_folders_refuse_to_load_under_a_second_name() -> None:
    for folder in ("strategies", "benchmarks"):
        done = subprocess.run(
            [sys.executable, "-c", f"import {folder}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert f"clbench.{folder}" in done.stderr


@pytest.mark.parametrize(
    "words", [["list"], ["table", "10", "--source", "printed", "--format", "csv"], ["--help"]]
)
def test_light_commands_import_neither_torch_nor_scipy(words: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from clbench.cli import app\n"
        f"app({words!r}, standalone_mode=False)\n"
        "heavy = {'torch', 'scipy', 'pandas', 'monai', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_unknown_names_are_helped() -> None:
    with pytest.raises(UnknownName) as err:
        registry.load("strategy", "univarsal")
    assert "did you mean 'universal'?" in str(err.value)
    with pytest.raises(UnknownName) as err:
        registry.benchmark("tumour_ext")
    assert "did you mean 'tumor_ext'?" in str(err.value)


class _Entry:
    """An entry point of a package that is broken or in the way."""

    def __init__(self, name: str, value: str) -> None:
        self.name, self.value, self.dist = name, value, None

    def load(self) -> object:
        raise ImportError("no module named 'gone'")


def test_a_broken_plugin_is_named_and_two_owners_of_a_name_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metadata, "entry_points", lambda group: [_Entry("x", "gone:X")])
    with pytest.raises(ClbenchError, match="cannot be loaded"):
        registry.load("strategy", "x")
    assert registry.summary("strategy", "x").startswith("broken")
    monkeypatch.setattr(
        metadata, "entry_points", lambda group: [_Entry("x", "a:X"), _Entry("x", "b:X")]
    )
    with pytest.raises(ClbenchError, match="two packages register"):
        registry.entries("strategy")


def test_errors_survive_pickling_and_show_all_their_parts() -> None:
    import pickle

    err = DataError("bad", where=Path("a"), expected=1, got=2, next_step="mend it")
    again = pickle.loads(pickle.dumps(err))  # noqa: S301  # our own bytes
    assert str(again) == str(err)
    for part in ("bad", "where:", "expected:", "got:", "next step: mend it"):
        assert part in str(err)


def test_a_wheel_works_from_any_folder(tmp_path: Path, cache_root: Path) -> None:
    """Built from the checkout, installed alone, asked from elsewhere."""
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "tests", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignore)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    done = subprocess.run([*build, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        names = set(content.namelist())
        content.extractall(tmp_path / "site")  # our own file
    tops = {n.split("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"clbench"}  # nothing else lands
    for needed in (
        "clbench/strategies/universal.py", "clbench/benchmarks/tumor_ext.toml",
        "clbench/benchmarks/splits/btcv.toml", "clbench/published/table10.csv",
        "clbench/profiles/quick.toml", "clbench/nets/minilm.safetensors",
        "clbench/data/anatomy.csv", "clbench/py.typed",
    ):  # fmt: skip
        assert needed in names
    run = ["run", "--bench", "tumor_ext", "--strategy", "universal", "--profile", "smoke",
           "--cache", str(cache_root), "--set", "train.epochs=1", "--set", "train.iterations=1",
           "--keep-predictions", "none"]  # fmt: skip
    for words in (["list"], ["table", "10", "--source", "printed"], run):
        code = (
            "import clbench, clbench.strategies as s; from clbench.cli import app\n"
            f"assert clbench.__file__.startswith({str(tmp_path)!r}), clbench.__file__\n"
            f"assert s.__file__.startswith({str(tmp_path)!r}), s.__file__\n"
            f"app({words!r}, standalone_mode=False)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "universal" in done.stdout or "0.466" in done.stdout
    assert len(list(tmp_path.glob("results/tumor_ext/universal/*/scores.csv"))) == 1
