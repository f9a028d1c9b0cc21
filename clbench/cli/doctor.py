"""`clbench doctor`: diagnosis of the environment, and what would stop a run.

Torch and every plugin are tried in a process of their own, so that even one
that crashes the interpreter is named.
"""

from __future__ import annotations

import json
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement

import clbench
from clbench.errors import ClbenchError
from clbench.nets.conv3d_faults import conv3d_faults
from clbench.spec import registry
from clbench.store import files, run_folder

NEED_BYTES = 1 << 30
"""Free space below which a run is not started: checkpoints and predictions of a small course."""
UNTOUCHED_S = 3600
"""What was being written and has not been touched for so long belongs to no process any more."""
MOST_NAMED = 5
"""So many leftovers are named at a time."""
PROBE_S = 120
"""Seconds a plugin may take to import."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One line of the report."""

    section: str
    """What was looked at."""
    level: Literal["ok", "note", "STOP"]
    """`STOP`: a run would fail."""
    text: str
    """What was found, and what to do."""


def examine(
    *,
    bench: str,
    data: str | None,
    results: Path,
    cache: Path | None,
    splits: Sequence[str] = (),
) -> list[Finding]:
    """Look at everything a run needs.

    Args:
        bench: benchmark whose data is looked for.
        data: what would stand after `--data`; None: the phantom.
        results: what would stand after `--out`.
        cache: what would stand after `--cache`.
        splits: what would stand after each `--split`.
    """
    findings: list[Finding] = []
    probed = _probe()
    for section, look in (
        ("Python", _python),
        ("Packages", _packages),
        ("Devices", lambda: _devices(probed)),
        ("Plugins", lambda: _plugins(probed)),
        ("Data", lambda: _data(bench, data, splits)),
        ("Cache", lambda: _cache(cache)),
        ("Runs", lambda: _runs(results)),
        ("Disk", lambda: _disk(results, cache)),
    ):
        findings += _looked(section, look)
    return findings


_Said = Iterator[tuple[Literal["ok", "note", "STOP"], str]]


def _looked(section: str, look: Callable[[], _Said]) -> list[Finding]:
    """The findings of one section; one that fails is a finding itself."""
    findings = []
    try:
        for level, text in look():
            # one by one: what was found up to a failure stays
            findings.append(Finding(section=section, level=level, text=text))
    except Exception as err:  # a check that fails is a finding, and the other checks go on
        text = str(err) if isinstance(err, ClbenchError) else f"{type(err).__name__}: {err}"
        findings.append(Finding(section=section, level="STOP", text=text))
    return findings


def _python() -> _Said:
    wants = str(metadata.metadata("clbench")["Requires-Python"] or "")
    good = not wants or Requirement(f"python{wants}").specifier.contains(
        platform.python_version(), prereleases=True
    )
    text = f"{platform.python_version()} at {sys.executable}, clbench {clbench.__version__} at "
    text += str(Path(clbench.__file__).parent)
    yield (
        ("ok", text) if good else ("STOP", f"{text}; needs {wants}: install clbench into another")
    )


def _packages() -> _Said:
    for word in metadata.requires("clbench") or []:
        need = Requirement(word)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        asked = f'"{need.name}{need.specifier}"'
        try:
            have = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            yield "STOP", f"{need.name} is not installed: python -m pip install {asked}"
            continue
        if not need.specifier.contains(have, prereleases=True):
            yield "STOP", f"{need.name} {have} does not fit: python -m pip install {asked}"
        else:
            yield "ok", f"{need.name} {have}"


def _probe() -> dict[str, dict[str, Any]]:
    """Thing tried → what became of it, from a process that may die of it."""
    things, outcomes = [], {}
    for kind in registry.GROUPS:
        try:
            things += [(kind, name) for name in registry.entries(kind)]
        except ClbenchError as err:
            outcomes[f"{kind} names"] = {"failed": str(err)}
    while True:
        command = [sys.executable, "-m", "clbench.cli.probe", json.dumps(things)]
        try:
            done = subprocess.run(  # noqa: S603  # our own program
                command, capture_output=True, text=True, check=False, timeout=PROBE_S
            )
            out, end = done.stdout, f"the process died with status {done.returncode}"
        except subprocess.TimeoutExpired as err:
            out = err.stdout.decode() if isinstance(err.stdout, bytes) else err.stdout or ""
            end = f"did not import within {PROBE_S} s"
        trying = ""
        for line in out.splitlines():
            try:
                said = json.loads(line)
            except ValueError:
                continue  # a plugin that prints
            trying = said.get("trying", "")
            if "name" in said:
                outcomes[said["name"]] = said
        if not trying:
            return outcomes
        outcomes[trying] = {"failed": end}
        things = [(k, n) for k, n in things if f"{k} {n}" not in outcomes]
        if trying == "torch" or not things:
            return outcomes


def _devices(probed: dict[str, dict[str, Any]]) -> _Said:
    torch = probed.get("torch", {"failed": "not tried"})
    if "failed" in torch:
        yield "STOP", f"torch cannot be imported ({torch['failed']}): install it again"
        return
    from clbench.evaluation.cost.allocator import described

    for line in torch["ok"]:
        yield "ok", line
    yield "ok", described()
    if len(torch["ok"]) == 1:
        yield "note", "no GPU is visible; runs use the CPU (profile quick: minutes; paper: weeks)"
    else:
        versions = probed.get("cudnn", {}).get("ok", ("0", None))
        yield from (("note", text) for text in conv3d_faults(*versions))


def _plugins(probed: dict[str, dict[str, Any]]) -> _Said:
    torch_works = "ok" in probed.get("torch", {})
    for kind in registry.GROUPS:
        if (clash := probed.get(f"{kind} names")) is not None:
            yield "STOP", clash["failed"]
            continue
        good: dict[str, list[str]] = {}
        for name, entry in registry.entries(kind).items():
            owner = "unknown package"
            if entry.dist is not None:
                owner = f"{entry.dist.name} {entry.dist.version}"
            said = probed.get(f"{kind} {name}")
            if said is not None and "failed" in said:
                why = str(said["failed"]).splitlines()[0]
                yield (
                    "STOP",
                    f"{kind} {name!r} of {owner} is broken ({why}): repair or uninstall {owner}",
                )
            elif said is None:
                reason = "not tried" if torch_works else "not tried, because torch is broken"
                yield "note", f"{kind} {name!r} of {owner}: {reason}"
            else:
                good.setdefault(owner, []).append(name)
        for owner, names in good.items():
            yield "ok", f"{kind}: {', '.join(names)} ({owner})"


def _data(bench: str, data: str | None, splits: Sequence[str]) -> _Said:
    """By names alone; `clbench data check` reads."""
    from clbench.cli.options import parse_splits
    from clbench.data.checks.course_splits import chosen, course_problems, settle
    from clbench.data.layouts import find_cases, resolve_data

    course = registry.benchmark(bench)
    named = chosen(course, parse_splits(list(splits)))
    if data is None:
        yield "ok", f"{bench}: no --data given; the embedded phantom would be used, not patients"
        return
    used = dict.fromkeys(step.source for step in course.with_cases)
    files, folders = {}, {}
    for name, folder in resolve_data(data, [course.source(n) for n in used]).items():
        try:
            files[name] = find_cases(folder, course.reads(name))
        except ClbenchError as err:
            yield "STOP", f"{name} at {folder}: {err}"
            continue
        folders[name] = folder
        layout = course.source(name).layout
        yield "ok", f"{name} at {folder}: {len(files[name])} case(s) in the layout {layout!r}"
    asked = zip(course.with_cases, named, strict=True)
    steps = [(step, split or step.split) for step, split in asked if step.source in files]
    settled, problems = settle(steps, course, files, folders, holds=None)
    problems += course_problems(settled, course, files, patients=True)
    for problem in problems:
        yield "STOP", str(problem)
    if not problems:
        options = [w for split in splits for w in ("--split", split)]
        command = shlex.join(["clbench", "data", "check", data, "--bench", bench, *options])
        yield "ok", f"every case of the splits is here; read every voxel with `{command}`"


def _cache(named: Path | None) -> _Said:
    from clbench.data.cache import default_root

    root = named or default_root()
    if not root.is_dir():
        yield "ok", f"{root}: not there yet; made when first needed"
        return
    volumes = root / "volumes"
    entries = [p for p in volumes.glob("*") if (p / "meta.json").is_file()]
    size = sum(f.stat().st_size for p in entries for f in p.iterdir())
    phantoms = [p for p in (root / "phantom").glob("phantom-*") if p.is_dir()]
    yield (
        "ok",
        f"{root}: {len(entries)} prepared volume(s), {_size(size)}; {len(phantoms)} phantom(s)",
    )
    if parts := sorted(p for p in root.rglob("*") if _is_left_over(p)):
        remove = shlex.join(["rm", "-r", *map(str, parts[:MOST_NAMED])])
        first = f", the first {MOST_NAMED}" if len(parts) > MOST_NAMED else ""
        yield "note", f"{len(parts)} item(s) of a killed process{first}: {remove}"


def _is_left_over(part: Path) -> bool:
    """Whether a process that was killed was writing here: for an hour nobody has been at it."""
    if not part.name.endswith((".part", ".partial")):
        return False
    try:
        touched = max(p.stat().st_mtime for p in (part, *part.rglob("*")))
    except FileNotFoundError:  # it was put in its place meanwhile
        return False
    return time.time() - touched > UNTOUCHED_S


def _runs(results: Path) -> _Said:
    if not results.is_dir():
        yield "ok", f"{results}: no results folder yet"
        return
    folders, finished = run_folder.find_runs(results), 0
    for folder in folders:
        try:
            record = run_folder.read_record(folder)
        except ClbenchError as err:
            # it stops every table, and the run itself
            yield "STOP", f"damaged run: {err}"
            continue
        if record["status"] == "finished":
            finished += 1
            continue
        command = again(record.get("command", [])) or "the same command"
        steps = len(record.get("course", {}).get("steps", [])) or "?"
        yield (
            "note",
            f"unfinished, {record['steps_done']} of {steps} steps: {folder}; go on with: {command}",
        )
    yield "ok", f"{results}: {len(folders)} run(s), {finished} finished"


def again(command: Sequence[object]) -> str:
    """What to type to go on with a run: its command without `--fresh`, quoted for a shell."""
    arguments = [str(word) for word in command[1:] if word != "--fresh"]
    return shlex.join(["clbench", *arguments]) if arguments else ""


def _disk(results: Path, cache: Path | None) -> _Said:
    from clbench.data.cache import default_root

    for what, option, folder in (
        ("results", "--out", results),
        ("cache", "--cache", cache or default_root()),
    ):
        place = folder.absolute()
        if (link := files.dead_link(place)) is not None:
            yield "STOP", f"{link} is a link to {link.readlink()}, which is not there"
            continue
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        text = f"{what} at {folder}: {_size(free)} free"
        try:
            if place.is_dir():
                files.make_folder(place)
            else:
                raise NotADirectoryError(place)
        except (ClbenchError, OSError):
            yield "STOP", f"{text}, but {place} cannot be written: name another with {option}"
            continue
        if free < NEED_BYTES:
            yield "STOP", f"{text}; a run needs {_size(NEED_BYTES)}: free some, or use {option}"
        else:
            yield "ok", text


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 1 << 29 else f"{count / 2**20:.1f} MiB"


def lines(findings: list[Finding]) -> Iterator[str]:
    """The report for a terminal: section by section, and a verdict."""
    section = ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            yield section
        first, *rest = finding.text.splitlines()
        yield f"  {finding.level:<5} {first}"
        yield from (f"        {line}" for line in rest)
    stops = sum(f.level == "STOP" for f in findings)
    yield f"{stops} thing(s) would stop a run" if stops else "nothing stops a run"
