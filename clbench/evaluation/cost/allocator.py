"""Freed memory is kept for the next update on a CPU, where there is enough: jemalloc, or glibc.

By default glibc takes every large tensor from the kernel anew and gives it back when it is freed;
each of its pages then costs a fault and is cleared, in every update. jemalloc, told to keep what is
freed, saves all of that at nearly the same peak; so a command that trains starts anew with it where
it is installed, as `torch.backends.xeon.run_cpu` does. glibc itself can keep memory too
(`mallopt`), at a higher peak, for it fragments it. `tests/perf/allocator.py` measures them all;
`tests/README.md` has what it recorded.

Memory is kept only where a multiple of the peak so far is at most `SHARE` of what the machine has
left; looked at in every phase. It changes no number. Where the user chose another allocator or set
one up, and with `CLBENCH_KEEP_MEMORY=0`, nothing is done.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import functools
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from clbench.errors import SettingError

SWITCH = "CLBENCH_KEEP_MEMORY"
"""Environment variable; `0`: do as glibc does by itself."""
GROWTH = {"jemalloc": 1.5, "glibc": 2.0}
"""Room left for the peak of kept memory, in peaks without: a margin, not a measured bound."""
SHARE = 0.5
"""Of the memory that this process has or could get."""
TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""Parameters of `mallopt`, from glibc's malloc.h."""
TRIM_BYTES, MMAPS = 128 * 1024, 65536
"""glibc's defaults of the two."""
REPLACEMENTS = ("jemalloc", "mimalloc", "tcmalloc")
SET_UP_BY = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
"""glibc reads these when the process starts: the user's own set-up, which is left alone."""
PRELOAD, CONF = "LD_PRELOAD", "MALLOC_CONF"
OURS = "oversize_threshold:0"
"""What jemalloc reads when it starts: large tensors are kept like all others, and not given back
at once from an arena of their own."""
DECAY_MS, NEVER = 10_000, -1
"""jemalloc's default of how long it keeps what is freed, and: for ever."""
TRAINING = ("run", "extend", "tune", "plan", "predict")
"""Commands that start anew with jemalloc; those that start others leave it to these."""


def in_use() -> str:
    """The allocator of this process: a library loaded before glibc's, glibc itself, or `other`."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        maps = ""
    replaced = next((name for name in REPLACEMENTS if f"lib{name}" in maps), None)
    if replaced is not None:
        return replaced
    name, version = platform.libc_ver()
    return f"{name} {version}" if name == "glibc" and sys.platform == "linux" else "other"


def start_with_jemalloc(words: Sequence[str]) -> None:
    """Start this program anew with jemalloc in front of glibc, where `environment` says so.

    The process keeps its number. Nothing is done for a command that does not train, under a
    debugger, and where standard input is the program.

    Args:
        words: of the command line, without the program.
    """
    command = next((word for word in words if not word.startswith("-")), None)
    if command not in TRAINING or sys.gettrace() is not None or "-" in sys.orig_argv:
        return
    more = environment(os.environ)
    if more:
        with contextlib.suppress(OSError, ValueError):  # then this process goes on with glibc
            os.execve(  # noqa: S606  # this very command
                sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **more}
            )


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that load jemalloc and tell it to keep large tensors too.

    Args:
        environ: as it is.

    Returns:
        Empty where jemalloc is not installed or does not load, where this process has not glibc's
        own allocator, and where the user set one up or wants none.

    Raises:
        SettingError: the switch holds what it does not know.
    """
    if _switched_off(environ) or _set_up(environ, (PRELOAD, CONF, *SET_UP_BY)):
        return {}
    if not in_use().startswith("glibc"):
        return {}
    return next(
        (more for library in libraries() if loads(more := {PRELOAD: library, CONF: OURS}, environ)),
        {},
    )


def loads(more: Mapping[str, str], environ: Mapping[str, str]) -> bool:
    """Whether a program starts under the variables without a word.

    A library of another architecture, or one whose path holds a space, is passed over with a
    message, and one that was built for other pages of memory ends the program.
    """
    try:
        done = subprocess.run(
            ["/bin/true"], env={**environ, **more}, capture_output=True, check=False, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0 and not done.stderr


def libraries() -> list[str]:
    """The jemalloc of this environment and of the one it was made from, then the system's."""
    folders = dict.fromkeys((sys.prefix, sys.base_prefix))
    own = [
        Path(folder, "lib", name)
        for folder in folders
        for name in ("libjemalloc.so.2", "libjemalloc.so")
    ]
    system = ctypes.util.find_library("jemalloc")
    return [str(path) for path in own if path.is_file()] + ([system] if system else [])


def _switched_off(environ: Mapping[str, str]) -> bool:
    switch = environ.get(SWITCH, "")
    if switch not in ("", "0", "1"):
        raise SettingError(
            "an environment variable holds what nothing reads",
            where=SWITCH,
            expected="0: freed memory is never kept; 1 or unset: where there is room",
            got=switch,
            next_step=f"export {SWITCH}=0, or unset it",
        )
    return switch == "0"


def _set_up(environ: Mapping[str, str], names: Sequence[str]) -> list[str]:
    """Variables by which a user chose or set up an allocator."""
    own = [name for name in names if environ.get(name)]
    tuned = "glibc.malloc" in environ.get("GLIBC_TUNABLES", "")
    return [*own, "GLIBC_TUNABLES"] if tuned else own


def why_not() -> str | None:
    """Why freed memory is never kept in this process; None: it may be.

    Raises:
        SettingError: the switch holds what it does not know.
    """
    if _switched_off(os.environ):
        return f"{SWITCH}=0"
    allocator = in_use()
    if allocator == "jemalloc" and os.environ.get(CONF) == OURS:
        return None
    if not allocator.startswith("glibc"):
        chosen = allocator in REPLACEMENTS
        return f"{allocator}, chosen by the user" if chosen else "neither glibc nor jemalloc"
    own = _set_up(os.environ, SET_UP_BY)
    return f"set up by {', '.join(own)}" if own else None


def described() -> str:
    """A line for `clbench doctor`.

    Raises:
        SettingError: see `why_not`.
    """
    more = environment(os.environ)
    name = f"jemalloc ({more[PRELOAD]})" if more else in_use()
    if not more and (reason := why_not()) is not None:
        return f"memory allocator: {name}; freed memory is not kept ({reason})"
    hint = ""
    if name.startswith("glibc"):
        hint = ". With jemalloc (Debian: libjemalloc2) the peak is lower"
        if own := _set_up(os.environ, (PRELOAD, CONF)):
            hint = f". jemalloc is not loaded beside {', '.join(own)}"
        elif found := libraries():
            hint = f". jemalloc is not used, for it does not load: {', '.join(found)}"
    return (
        f"memory allocator of runs: {name}; on a CPU freed memory is kept for the next update "
        f"where {GROWTH[_kind(name)]:g} times the peak is at most {SHARE:.0%} of the free memory "
        f"({SWITCH}=0: never){hint}"
    )


def _kind(allocator: str) -> str:
    return next(kind for kind in GROWTH if allocator.startswith(kind))


def enough(growth: float, peak_bytes: int, resident_bytes: int, free_bytes: int) -> bool:
    """Whether freed memory can be kept.

    Args:
        growth: room that is left for the peak, in peaks.
        peak_bytes: largest resident size of this process so far.
        resident_bytes: its size now.
        free_bytes: what all processes could still get.
    """
    return growth * peak_bytes <= SHARE * (resident_bytes + free_bytes)


class FreedMemory:
    """What happens to freed memory in this process; `settle` decides, as often as asked."""

    def __init__(self) -> None:
        self.kept = False
        self._never = why_not() is not None
        self._kind = "glibc" if self._never else _kind(in_use())

    def settle(self) -> None:
        """Keep freed memory if there is room for it now, else give it back to the system."""
        if self._never:
            return
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        growth = GROWTH[self._kind]
        plain = int(peak / growth) if self.kept else peak  # kept memory is part of the peak
        keep = enough(growth, plain, *_room())
        if keep == self.kept:
            return
        tell = _tell_jemalloc if self._kind == "jemalloc" else _tell_glibc
        self.kept = tell(keep) and keep


def _tell_glibc(keep: bool) -> bool:
    """Whether it did as told."""
    libc = ctypes.CDLL(None)
    if keep:
        return bool(libc.mallopt(MMAP_MAX, 0) and libc.mallopt(TRIM_THRESHOLD, -1))
    libc.mallopt(MMAP_MAX, MMAPS)
    libc.mallopt(TRIM_THRESHOLD, TRIM_BYTES)
    libc.malloc_trim(0)
    return True


def _tell_jemalloc(keep: bool) -> bool:
    """Whether it did as told: arenas that threads have already, and those to come."""
    mallctl = getattr(ctypes.CDLL(None), "mallctl", None)
    if mallctl is None:  # built with names of its own, which no program asks for
        return False
    count, size = ctypes.c_uint(), ctypes.c_size_t(ctypes.sizeof(ctypes.c_uint))
    failed = mallctl(b"arenas.narenas", ctypes.byref(count), ctypes.byref(size), None, 0)
    decay = ctypes.c_ssize_t(NEVER if keep else DECAY_MS)
    new = (None, None, ctypes.byref(decay), ctypes.c_size_t(ctypes.sizeof(decay)))
    failed = failed or mallctl(b"arenas.dirty_decay_ms", *new)
    for arena in range(count.value):
        # fails for an arena that no thread has used, which takes the value above when it is used
        mallctl(f"arena.{arena}.dirty_decay_ms".encode(), *new)
        if not keep:
            mallctl(f"arena.{arena}.purge".encode(), None, None, None, ctypes.c_size_t(0))
    return not failed


@functools.cache
def freed_memory() -> FreedMemory:
    """What this process does with it."""
    return FreedMemory()


def _room() -> tuple[int, int]:
    """Resident bytes of this process, and bytes that it could still get."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    free = 0
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    return pages * resource.getpagesize(), min(free, left_in_group())


def left_in_group() -> int:
    """Bytes left of the limit that a container or a SLURM job has (cgroup v2)."""
    try:
        name = Path("/proc/self/cgroup").read_text(encoding="utf-8").strip().rpartition("::")[2]
        group = Path("/sys/fs/cgroup") / name.lstrip("/")
        left = []
        for folder in (group, *group.parents):
            limit = folder / "memory.max"
            if limit.is_file() and (most := limit.read_text(encoding="utf-8").strip()) != "max":
                used = int((folder / "memory.current").read_text(encoding="utf-8"))
                left.append(int(most) - used)
    except (OSError, ValueError):
        return sys.maxsize
    return max(0, min(left, default=sys.maxsize))
