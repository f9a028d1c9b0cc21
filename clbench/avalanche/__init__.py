"""The bridge to Avalanche, both ways; importing it imports neither torch nor Avalanche.

Avalanche is imported by `lazy_import` alone, when it is needed. `scenario_streams`, `network` and
`metrics` offer a course to Avalanche's own strategies; `supported`, `plugin_session` and
`plugin_state` run Avalanche's plugins in our loop. No module has the name of a function it holds:
once imported, it would stand in the function's place.
"""

from __future__ import annotations

import importlib
from typing import Any

OFFERS: dict[str, str] = {
    "scenario": "scenario_streams",
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
