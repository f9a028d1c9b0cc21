"""Try torch and every plugin in a process of its own, for `clbench doctor`; it may die of it.

`python -m clbench.cli.probe '[["strategy", "ewc"]]'` prints a line of JSON before and after each.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any


def _say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def _try(name: str, work: Callable[[], Any]) -> bool:
    _say(trying=name)
    try:
        _say(name=name, ok=work())
    except BaseException as err:  # whatever a plugin raises, also SystemExit
        _say(name=name, failed=f"{type(err).__name__}: {err}")
        return False
    return True


def _devices() -> list[str]:
    import torch

    from clbench.reproducibility import bf16_instructions

    bf16 = ", ".join(bf16_instructions()) or "no instructions, emulated: slow"
    lines = [f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}; bfloat16: {bf16}"]
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        lines.append(f"cuda:{i} {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB")
    return lines


def _conv3d() -> list[Any]:
    """Torch's version, and cuDNN's as torch numbers it (9.10.2 is 91002; None: torch has none)."""
    import torch

    return [torch.__version__, torch.backends.cudnn.version()]  # type: ignore[no-untyped-call]  # torch


def _load(kind: str, name: str) -> None:
    from clbench.spec import registry

    if kind == "benchmark":
        registry.benchmark(name)
    else:
        registry.load(kind, name)


if __name__ == "__main__":
    things: list[tuple[str, str]] = json.loads(sys.argv[1])
    if _try("torch", _devices):  # without it no plugin can be told good or bad
        _try("cudnn", _conv3d)
        for kind, name in things:
            _try(f"{kind} {name}", lambda k=kind, n=name: _load(k, n))  # type: ignore[misc]  # bound here
