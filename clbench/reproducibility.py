"""Reproducibility: seeds, threads, deterministic operators, and facts of the host."""

from __future__ import annotations

import hashlib
import os
import platform
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clbench.errors import SettingError


def reseed(*parts: object) -> None:
    """Set torch's, numpy's and Python's global random states to a function of the parts.

    So dropout and anything else that draws from them repeats, wherever the step was stopped.
    """
    seed = derive_seed(*parts)
    if torch.cuda.is_available():
        torch.manual_seed(seed)
    else:  # it would note where in the code each seed of a GPU to come was set: 0.3 ms and more
        torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  # a plugin may draw from it


@contextmanager
def seeded(*parts: object, device: torch.device | str = "cpu") -> Iterator[None]:
    """Inside, global random states follow from the parts; afterwards they are as before.

    Args:
        *parts: see `reseed`.
        device: a GPU whose random state is put back, too.
    """
    states = random.getstate(), np.random.get_state()  # noqa: NPY002  # a plugin may use it
    gpus = [device] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        reseed(*parts)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002


# ------------------------------------------------------------------------------------ where it runs


def deterministic() -> None:
    """Let CUDA use operators that repeat to the bit, for the rest of the process.

    Where torch has none for an operator it warns, names it, and goes on. On the CPU the operators
    used here repeat anyway.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS starts
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False


def host(device: torch.device) -> dict[str, str | int]:
    """What equal bits depend on besides the settings."""
    return {
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "cpu": _cpu(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
    }


def _cpu() -> str:
    return next(_cpu_facts("model name"), platform.processor() or platform.machine())


def _cpu_facts(*names: str) -> Iterator[str]:
    """What Linux says of the first cores under any of the names; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        if line.startswith(names):
            yield line.partition(":")[2].strip()


def bf16_instructions() -> tuple[str, ...]:
    """Instructions of this CPU that compute in bfloat16; empty: torch emulates it, slowly."""
    flags = set(next(_cpu_facts("flags", "Features"), "").split())
    return tuple(name for name in ("amx_bf16", "avx512_bf16", "bf16") if name in flags)


def refuse_fp16_on_cpu(amp: str, device: torch.device) -> None:
    """Refuse float16 where there is no GPU.

    Args:
        amp: `train.amp`.
        device: where to compute.

    Raises:
        SettingError: a CPU cannot.
    """
    if amp == "fp16" and device.type == "cpu":
        raise SettingError(
            "float16 needs a GPU",
            where="train.amp, on a CPU",
            expected="off or bf16",
            got=amp,
            next_step="--set train.amp=off, or --device cuda where there is one",
        )


def slow_bf16(amp: str, device: torch.device) -> str | None:
    """A warning where bfloat16 is asked for and emulated; else None.

    Args:
        amp: `train.amp`.
        device: where to compute.
    """
    if amp != "bf16" or device.type != "cpu" or bf16_instructions():
        return None
    return (
        "train.amp=bf16: this CPU has no bfloat16 instructions (avx512_bf16, amx_bf16), so torch "
        "emulates them, and an update is slower than in float32; next: --set train.amp=off "
        "(another run, with an id of its own), or a CPU that has them"
    )


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Fact → [then, now], of the facts of `host` that differ."""
    return {k: [then.get(k), now.get(k)] for k in now if then.get(k) != now.get(k)}


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """This many CPU threads in the block; None: as they are."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that depends on the parts alone, on every machine."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def gpus() -> int:
    """How many GPUs this torch can compute on here."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def cores() -> int:
    """CPU cores that this process may use: a SLURM job has fewer than its machine."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
