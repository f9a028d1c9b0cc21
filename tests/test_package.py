"""The package itself: layers, packages, entry points, light imports, a wheel that works anywhere."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from locations import ROOT

from clbench.errors import ClbenchError, DataError, UnknownName
from clbench.spec import registry

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# Folders of each floor, lowest first; a folder may import only what lies on a lower floor.
FLOORS = (
    {"errors", "published", "calibration", "benchmarks"},
    {"signals", "reproducibility", "types"},
    {"spec", "statistics"},
    {"store"},
    {"data", "nets"},
    {"strategy"},
    {"evaluation"},
    {"training"},
    {"run"},
    {"report"},
    {"testing", "avalanche", "deployment", "grid", "tracking", "tuning"},
    {"diagnosis"},
    {"strategies", "cli"},
    {"__main__"},
)
FLOOR = {folder: floor for floor, folders in enumerate(FLOORS) for folder in folders}
# Heavy libraries, and the only folders that may import them anywhere in a file.
FOREIGN = {
    "torch": (
        "reproducibility", "store.checkpoint", "data", "nets", "strategy", "training",
        "evaluation", "run", "testing", "avalanche", "strategies", "deployment", "diagnosis",
        "cli.probe", "tracking.trackers", "tuning",
    ),
    "monai": ("nets",),
    "avalanche": ("avalanche",),
    "torchvision": ("avalanche",),
    "matplotlib": ("report.figures",),
    "nibabel": ("data", "deployment"),
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


def folder_of(module: str) -> str:
    """The folder under clbench/ that a module belongs to."""
    return module.split(".")[1]


@cache
def syntax_tree(path: Path) -> ast.Module:
    """A file, parsed once for all tests."""
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path, module: str) -> set[str]:
    """Everything a module imports anywhere in its file."""
    found: set[str] = set()
    for node in ast.walk(syntax_tree(path)):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module if path.stem == "__init__" else module.rpartition(".")[0]
                base = f"{package}.{base}".rstrip(".")
            found |= {f"{base}.{a.name}" for a in node.names} | {base}
    return found


def test_imports_point_down_floors() -> None:
    known = modules()
    wrong = [
        f"{module} imports {target}"
        for module, path in known.items()
        for target in imports(path, module)
        if module != "clbench" != target
        and target in known
        and folder_of(target) != folder_of(module)
        and FLOOR[folder_of(target)] >= FLOOR[folder_of(module)]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_through_others() -> None:
    """Not inside a folder either, and not by an import in a function or for types."""
    known = modules()
    edges = {m: {t for t in imports(p, m) if t in known and t != m} for m, p in known.items()}
    edges = {  # a package's face is not in the way of its own modules
        m: {t for t in targets if not m.startswith(t + ".")} for m, targets in edges.items()
    }
    TopologicalSorter(edges).prepare()  # raises CycleError with the circle


def test_the_tree_stays_small() -> None:
    loose = [p.stem for p in (ROOT / "clbench").glob("*.py") if not p.stem.startswith("__")]
    assert len(loose) <= 6, loose
    for init in [*(ROOT / "clbench").rglob("__init__.py"), ROOT / "strategies" / "__init__.py"]:
        files = [p.name for p in init.parent.glob("*.py") if p.stem != "__init__"]
        assert len(files) <= 12, f"{init.parent}: {len(files)} files"
        docstring = ast.get_docstring(syntax_tree(init))
        assert docstring, init
        assert docstring.splitlines()[0].endswith("."), init


def test_core_knows_no_method() -> None:
    wrong = [
        f"{module} imports {target}"
        for module, path in modules().items()
        if not module.startswith("clbench.strategies")
        for target in imports(path, module)
        if target.startswith("clbench.strategies")
    ]
    assert not wrong


def test_the_truth_that_nobody_annotates_is_read_by_diagnosis_alone() -> None:
    """The phantom knows all organs of every case; no training, strategy or run may ask it."""
    allowed = ("clbench.diagnosis.", "clbench.data.phantom.")
    asking = [
        module
        for module, path in modules().items()
        if "with_all_organs" in path.read_text(encoding="utf-8") and not module.startswith(allowed)
    ]
    assert not asking


@pytest.mark.parametrize("library", sorted(FOREIGN))
def test_foreign_libraries_stay_in_their_folders(library: str) -> None:
    wrong = [
        f"{module} imports {target}"
        for module, path in modules().items()
        for target in imports(path, module)
        if (target == library or target.startswith(library + "."))
        and not any(f"{module}.".startswith(f"clbench.{f}.") for f in FOREIGN[library])
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


def test_every_loss_names_its_source() -> None:
    from clbench.strategy import distillation, losses, partial_labels

    made = [registry.load("strategy", name) for name in registry.entries("strategy")]
    shared = (
        losses.dice, losses.bce, partial_labels.marginal_ce, partial_labels.sigmoid_dice, distillation.local_pod,
        distillation.pod, *(getattr(distillation, n) for n in
        ("kd_softmax", "kd_unbiased", "kd_sigmoid", "feature_mse", "gated_ce")),
    )  # fmt: skip
    for loss in (*(kind.losses for kind in made if kind.__module__.startswith("clbench")), *shared):
        assert "Source: " in (loss.__doc__ or ""), f"{loss.__module__}.{loss.__qualname__}"


def public_functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Name → public function of a module, or public method of a public class of it."""
    for node in tree.body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        owner = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for member in members:
            if isinstance(member, ast.FunctionDef):
                name = owner + member.name
                if not any(part.startswith("_") for part in name.split(".")):
                    yield name, member


def described(docstring: str) -> set[str]:
    """Arguments named in the section `Args:` of a docstring."""
    section = re.search(r"^Args:\n((?:[ ]+.*\n|\n)*)", docstring + "\n", re.MULTILINE)
    return set(re.findall(r"^    \*{0,2}(\w+): \S", section[1], re.MULTILINE)) if section else set()


def test_public_functions_of_three_parameters_describe_each() -> None:
    """Not the commands, whose options say it; not the hooks of `Strategy`, described as a group."""
    lacking = []
    for path in sorted((ROOT / "clbench").rglob("*.py")):
        for name, function in public_functions(syntax_tree(path)):
            given = function.args
            parameters = {
                a.arg
                for a in (
                    *given.posonlyargs,
                    *given.args,
                    *given.kwonlyargs,
                    given.vararg,
                    given.kwarg,
                )
                if a is not None and a.arg not in ("self", "cls")
            }
            command = any(".command(" in ast.unparse(d) for d in function.decorator_list)
            if len(parameters) < 3 or command or name.startswith("Strategy."):
                continue
            if absent := parameters - described(ast.get_docstring(function) or ""):
                lacking.append(f"{path.relative_to(ROOT)} {name}: {', '.join(sorted(absent))}")
    assert not lacking, "\n".join(lacking)


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


def test_a_small_network_predicts_without_monai(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np, torch\n"
        "from clbench.evaluation.sliding_window import sliding_slabs\n"
        "from clbench.nets.backbones import new_backbone\n"
        "from clbench.run import course\n"
        "from clbench.spec.settings import BackboneSettings\n"
        "new_backbone(BackboneSettings(name='small_unet'))\n"
        "image = np.zeros((9, 9, 9), np.float32)\n"
        "[*sliding_slabs(torch.sigmoid, lambda rows: image[rows], (9, 9, 9), patch_vox=(8, 8, 8))]\n"
        "late = {'monai', 'matplotlib'} & set(sys.modules)\n"  # seconds, and counted as predicting
        "assert not late, late"
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
    def installed(*registered: _Entry) -> None:
        monkeypatch.setattr(registry, "_installed", lambda group, path: registered)

    installed(_Entry("x", "gone:X"))
    with pytest.raises(ClbenchError, match="cannot be loaded"):
        registry.load("strategy", "x")
    assert registry.summary("strategy", "x").startswith("broken")
    installed(_Entry("x", "a:X"), _Entry("x", "b:X"))
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
        "clbench/testing/kit.toml", "clbench/evaluation/cost/no_product_operators.txt",
        "clbench/data/layouts.toml", "clbench/spec/profiles/quick.toml", "clbench/spec/structures.csv",
        "clbench/nets/minilm.safetensors",
        "clbench/data/phantom/anatomy.csv", "clbench/data/phantom/shapes.toml", "clbench/py.typed",
    ):  # fmt: skip
        assert needed in names
    run = ["run", "--bench", "tumor_ext", "--strategy", "universal", "--profile", "smoke",
           "--cache", str(cache_root), "--set", "train.epochs=1", "--set", "train.iterations=1",
           "--set", "backbone.size=8", "--set", "phantom.spacing_mm=16", "--set", "phantom.train=1",
           "--set", "phantom.test=1", "--set", "data.spacing_mm=22,22,22",
           "--set", "data.patch_vox=16,16,16", "--keep-predictions", "none"]  # fmt: skip
    commands = (["list"], ["table", "10", "--source", "printed"], run)
    code = (
        "import clbench, clbench.strategies as s; from clbench.cli import app\n"
        f"assert clbench.__file__.startswith({str(tmp_path)!r}), clbench.__file__\n"
        f"assert s.__file__.startswith({str(tmp_path)!r}), s.__file__\n"
        f"for words in {commands!r}:\n"
        "    app(words, standalone_mode=False)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "universal" in done.stdout
    assert "0.466" in done.stdout
    assert len(list(tmp_path.glob("results/tumor_ext/universal/*/scores.csv"))) == 1
