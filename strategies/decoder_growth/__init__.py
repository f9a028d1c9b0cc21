"""Decoder growth: one frozen encoder, a new decoder per step, pruning and axial body ranges."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clbench.strategies.decoder_growth.method import DecoderGrowth

__all__ = ["DecoderGrowth"]


def __getattr__(name: str) -> Any:
    """Import the method when it is asked for: `clbench list` must not import torch."""
    if name != "DecoderGrowth":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from clbench.strategies.decoder_growth.method import DecoderGrowth

    return DecoderGrowth
