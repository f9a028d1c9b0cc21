"""How many windows share a forward pass: as many as fit into the memory of the device."""

from __future__ import annotations

import warnings

import torch

MOST_ON_GPU = 8
"""Windows per forward pass on a GPU where no number is asked for; more of 96 voxels a side keep no
GPU busier, and their logits take room."""


def is_out_of_memory(err: RuntimeError) -> bool:
    """Whether a GPU has no room; `torch.OutOfMemoryError` is a RuntimeError, cuBLAS's is plain."""
    text = str(err)
    return (
        isinstance(err, torch.OutOfMemoryError)
        or "CUDA out of memory" in text
        or "ALLOC_FAILED" in text
    )


class WindowCount:
    """How many windows share a forward pass; halved where they do not fit, with one warning.

    Args:
        windows: at first; None: `MOST_ON_GPU` on a GPU, one on a CPU, where more gain nothing.
        device: where the network computes.
    """

    def __init__(self, windows: int | None, device: torch.device | str) -> None:
        self.now = windows or (MOST_ON_GPU if torch.device(device).type == "cuda" else 1)
        self._warned = False

    def halve(self, tried: int) -> None:
        """Take half as many from now on.

        Args:
            tried: windows that did not fit; more than one.
        """
        self.now = max(1, tried // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if not self._warned:
            self._warned = True
            text = f"{tried} windows at once do not fit into the memory of the GPU: going on with "
            text += f"{self.now}, or fewer where those do not fit (--set examine.windows=N)"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
