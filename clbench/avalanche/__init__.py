"""The bridge to Avalanche, both ways; importing it imports neither torch nor Avalanche.

Room: row 5. `importing` is the one door through which Avalanche comes in, when it is needed. Out:
`streams`, `network` and `metrics`, a course for Avalanche's own strategies. In: `plugins`,
`session` and `keeping`, Avalanche's plugins in our loop. No module has the name of a function it
holds: once imported, it would stand in the function's place.
"""

from __future__ import annotations

import importlib
from typing import Any

OFFERS: dict[str, str] = {
    "scenario": "streams",
    "model": "network",
    "Criterion": "network",
    "criterion": "network",
    "dice_metrics": "metrics",
    "surface_dice_metrics": "metrics",
    "forgetting_metrics": "metrics",
    "bwt_metrics": "metrics",
}
"""Public name → module of this package that holds it, imported when the name is first used."""


def __getattr__(name: str) -> Any:
    """Import what is asked for, and nothing before."""
    if name not in OFFERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{OFFERS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *OFFERS})
