"""Freed memory is kept for the next update on a CPU, where there is enough: glibc's `mallopt`.

By default glibc takes every large tensor from the kernel anew and gives it back when it is freed;
each of its pages then costs a fault and is cleared, in every update. Kept, the memory is
fragmented, and the peak is higher (`tests/perf/allocator.py` measures both; `tests/README.md` has
what it recorded). So it is kept only where twice the peak so far is at most `SHARE` of what the
machine has left; looked at in every phase.

It changes no number. Elsewhere than with glibc, where the user chose an allocator or set one up,
and with `CLBENCH_KEEP_MEMORY=0` nothing is done.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import resource
import sys
from pathlib import Path

from clbench.errors import SettingError

SWITCH = "CLBENCH_KEEP_MEMORY"
"""Environment variable; `0`: do as glibc does by itself."""
GROWTH = 2.0
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


def why_not() -> str | None:
    """Why freed memory is never kept in this process; None: it may be.

    Raises:
        SettingError: the switch holds what it does not know.
    """
    if (switch := os.environ.get(SWITCH, "")) not in ("", "0", "1"):
        raise SettingError(
            "an environment variable holds what nothing reads",
            where=SWITCH,
            expected="0: freed memory is never kept; 1 or unset: where there is room",
            got=switch,
            next_step=f"export {SWITCH}=0, or unset it",
        )
    if switch == "0":
        return f"{SWITCH}=0"
    if not (allocator := in_use()).startswith("glibc"):
        return f"{allocator}, not glibc"
    own = [name for name in SET_UP_BY if name in os.environ]
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        own.append("GLIBC_TUNABLES")
    return f"set up by {', '.join(own)}" if own else None


def described() -> str:
    """A line for `clbench doctor`."""
    reason = why_not()
    if reason is not None:
        return f"memory allocator: {in_use()}; freed memory is not kept ({reason})"
    return (
        f"memory allocator: {in_use()}; on a CPU freed memory is kept for the next update where "
        f"{GROWTH:g} times the peak is at most {SHARE:.0%} of the free memory ({SWITCH}=0: never)"
    )


def enough(peak_bytes: int, resident_bytes: int, free_bytes: int) -> bool:
    """Whether freed memory can be kept.

    Args:
        peak_bytes: largest resident size of this process so far.
        resident_bytes: its size now.
        free_bytes: what all processes could still get.
    """
    return GROWTH * peak_bytes <= SHARE * (resident_bytes + free_bytes)


class FreedMemory:
    """What glibc does with freed memory in this process; `settle` decides, as often as asked."""

    def __init__(self) -> None:
        self.kept = False
        self._never = why_not() is not None

    def settle(self) -> None:
        """Keep freed memory if there is room for it now, else give it back to the system."""
        if self._never:
            return
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        plain = int(peak / GROWTH) if self.kept else peak  # kept memory is part of the peak
        keep = enough(plain, *_room())
        if keep == self.kept:
            return
        libc = ctypes.CDLL(None)
        if keep:
            self.kept = bool(libc.mallopt(MMAP_MAX, 0) and libc.mallopt(TRIM_THRESHOLD, -1))
        else:
            libc.mallopt(MMAP_MAX, MMAPS)
            libc.mallopt(TRIM_THRESHOLD, TRIM_BYTES)
            libc.malloc_trim(0)
            self.kept = False


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
