"""Time and peak memory of one phase of a run, on the device that did the work.

On a GPU peak memory is what torch's allocator held; on the CPU it is resident
memory of this process (loader processes not counted).
"""

from __future__ import annotations

import contextlib
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


class Meter:
    """Counts from its making on, so that a phase does not inherit the peak of the one before.

    Args:
        device: where the model computes.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.laps_s: list[float] = []
        forget_peak()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def timed(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a function that leaves its answer on the CPU, and keep its seconds.

        Args:
            function: what to call.
            *args: its positional arguments.
            **kwargs: its named arguments.
        """
        start = time.monotonic()
        answer = function(*args, **kwargs)
        self.laps_s.append(time.monotonic() - start)
        return answer

    def peaks(self, of: str = "") -> dict[str, int]:
        """`peak_rss_bytes`, and on a GPU `peak_cuda_bytes`; `of` goes in front of the names."""
        peaks_bytes = {f"{of}peak_rss_bytes": _peak_rss_bytes()}
        if self.device.type == "cuda":
            peaks_bytes[f"{of}peak_cuda_bytes"] = torch.cuda.max_memory_allocated(self.device)
        return peaks_bytes

    def inference(self) -> dict[str, float]:
        """What was timed: seconds in all, the median of a case, and peak memory.

        The first case warms up and leaves the median, unless it is the only one.
        """
        laps = self.laps_s[1:] or self.laps_s
        median = {"predict_case_s": statistics.median(laps)} if laps else {}
        return {"predict_s": sum(self.laps_s), **median, **self.peaks("examine_")}


def forget_peak() -> bool:
    """Start the peak of resident memory anew; False where it stays that of the whole process."""
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return True


def _peak_rss_bytes() -> int:
    with contextlib.suppress(OSError, StopIteration):
        lines = _STATUS.read_text().splitlines()
        return 1024 * int(next(x for x in lines if x.startswith("VmHWM")).split()[1])
    # kibibytes, but bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
