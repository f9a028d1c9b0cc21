"""Files are found by one rule: whatever tree, links and hidden names a folder holds."""

from __future__ import annotations

import os
import tempfile
import unicodedata
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from clbench.data.find_files import ADDED, count_passed_over, entries, nifti_stem, stored_file, walk
from clbench.data.layouts import LAYOUTS
from clbench.errors import SpecError
from clbench.spec.names import need_case
from clbench.spec.toml import expand_ids

NAMES = st.sampled_from(["a", "b", "é", "._a", ".snapshot", "__MACOSX", "@eaDir", "x=1,y"])
FILES = st.sampled_from(["1.nii.gz", "2.NII", "._1.nii.gz", "notes.txt", ".DS_Store"])
TREES = st.lists(
    st.tuples(st.lists(NAMES, max_size=3), FILES | st.integers(0, 3)), min_size=1, max_size=8
)
"""Folders, and in each a file, or a link to one of the folders made so far (which may be above)."""


def build(root: Path, tree: list[tuple[list[str], str | int]]) -> None:
    folders = [root]
    for parts, what in tree:
        folder = root.joinpath(*parts)
        folder.mkdir(parents=True, exist_ok=True)
        folders.append(folder)
        if isinstance(what, str):
            (folder / what).touch()
        elif not (link := folder / f"link{what}").exists():
            link.symlink_to(folders[what % len(folders)], target_is_directory=True)


def visible(name: str) -> bool:
    return not name.startswith(".") and name.casefold() not in ADDED


def reference(folder: Path, above: tuple[str, ...]) -> set[Path]:
    """By real paths, in place of device and inode."""
    reached = set()
    for path in folder.iterdir():
        if not visible(path.name):
            continue
        if not path.is_dir():
            reached.add(path)
        elif (real := os.path.realpath(path)) not in above:
            reached |= reference(path, (*above, real))
    return reached


@settings(max_examples=60)
@given(TREES)
def test_every_visible_file_is_found_once_and_loops_end(
    tree: list[tuple[list[str], str | int]],
) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        build(root, tree)
        reached = list(walk(root))
        assert len(reached) == len(set(reached))
        assert set(reached) == reference(root, (os.path.realpath(root),))
        hidden, loops = count_passed_over(root)
        assert all(
            os.path.realpath(root / loop)
            in (os.path.realpath(root), *map(os.path.realpath, (root / loop).parents))
            for loop in loops
        )
        assert len(hidden) == len(set(hidden))
        for item in hidden:
            assert not visible(Path(item).name)
            assert all(visible(part) for part in Path(item).parent.parts)
            assert (root / item).is_dir() == item.endswith("/")
        assert entries(root) == sorted(p for p in root.iterdir() if visible(p.name))


IDS = st.sets(
    st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,6}", fullmatch=True), min_size=1, max_size=5
)


@settings(max_examples=40)
@given(ids=IDS, data=st.data())
def test_links_and_hidden_companions_change_no_case(ids: set[str], data: st.DataObject) -> None:
    """Half of the files elsewhere, companions of macOS beside them: the same cases."""
    elsewhere = {i: data.draw(st.booleans(), label=i) for i in sorted(ids)}
    layout = LAYOUTS["nnunet"]
    with tempfile.TemporaryDirectory() as name:
        plain, linked, far = (Path(name) / n for n in ("plain", "linked", "far"))
        for case in ids:
            for k, path in enumerate(layout.paths(plain, case)):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
                other = layout.paths(linked, case)[k]
                other.parent.mkdir(parents=True, exist_ok=True)
                (other.parent / f"._{other.name}").touch()
                if elsewhere[case]:
                    far.mkdir(exist_ok=True)
                    (far / f"{k}_{other.name}").touch()
                    other.symlink_to(far / f"{k}_{other.name}")
                else:
                    other.touch()
        assert list(layout.find(linked)) == list(layout.find(plain))
        assert set(layout.find(plain)) == ids


@given(st.text(st.characters(categories=("L", "N", "P", "Zs")), min_size=1, max_size=12))
def test_a_case_id_is_never_read_as_several(text: str) -> None:
    """What `need_case` takes for an id, a list of ids leaves as one."""
    try:
        need_case(text, "test")
    except SpecError:
        return
    assert len(expand_ids([text], "test")) == 1


@given(st.integers(0, 400), st.integers(0, 40), st.integers(0, 5))
def test_a_range_holds_every_id_and_keeps_its_zeros(low: int, more: int, width: int) -> None:
    text = f"{low:0{width}d}..{low + more:0{width}d}"
    ids = expand_ids([text], "test")
    assert [int(i) for i in ids] == list(range(low, low + more + 1))
    padded = len(str(low)) < width
    assert all(len(i) >= width for i in ids) if padded else ids[0] == str(low)


@given(st.from_regex(r"[a-z0-9_.]{1,8}", fullmatch=True), st.sampled_from([".nii", ".nii.gz"]))
def test_endings_ignore_case(stem: str, ending: str) -> None:
    for written in (ending, ending.upper(), ending.title()):
        assert nifti_stem(Path(stem + written)) == stem
    assert nifti_stem(Path(f"{stem}.txt")) is None


def test_a_list_finds_its_files_however_the_disk_spells_and_packs_them(tmp_path: Path) -> None:
    folder = tmp_path / unicodedata.normalize("NFD", "Müller")
    folder.mkdir()
    for name in ("a.NII.GZ", "b.nii", "c.nii", "c.nii.gz", unicodedata.normalize("NFD", "é.nii")):
        (folder / name).touch()
    for asked, name in (
        ("./Müller/a.nii.gz", "a.NII.GZ"),
        ("Müller/b.nii.gz", "b.nii"),
        ("Müller/c.nii", "c.nii"),
        ("Müller/é.nii.gz", unicodedata.normalize("NFD", "é.nii")),
    ):
        assert stored_file(tmp_path, asked) == folder / name
    assert not stored_file(tmp_path, "Müller/absent.nii").exists()
    (folder / "c.nii").rename(folder / "C.nii")
    assert stored_file(tmp_path, "Müller/c.nii") == folder / "c.nii.gz"
    (folder / "d.NII").touch()
    (folder / "d.Nii.gz").touch()
    assert stored_file(tmp_path, "Müller/d.nii") == tmp_path / "Müller/d.nii"  # which is meant?
