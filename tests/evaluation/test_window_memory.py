"""Windows that do not fit into memory are halved, with one warning and the same answer."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from clbench.evaluation.sliding_window import sliding_slabs
from clbench.evaluation.window_memory import MOST_ON_GPU, WindowCount, is_out_of_memory


def full() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(("room", "passes"), [(8, [8, 1]), (3, [8, 4, 2, 2, 2, 2, 1])])
def test_windows_are_halved_until_they_fit(room: int, passes: list[int]) -> None:
    """Of nine windows in one row; a GPU that holds `room` of them answers as one that holds all."""
    image = np.random.default_rng(0).random((4, 8, 8), np.float32)
    asked: list[int] = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        asked.append(len(x))
        if len(x) > room:
            raise full()
        return x * torch.tensor([1.0, -2.0]).view(1, 2, 1, 1, 1)

    def answer(windows: int | WindowCount) -> torch.Tensor:
        slabs = sliding_slabs(
            forward, lambda rows: image[rows], image.shape, patch_vox=(4, 4, 4), windows=windows
        )
        return torch.cat([logits for _, _, logits in slabs], dim=1)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = WindowCount(8, "cpu")
        found = answer(count)
        assert asked == passes
        again = answer(count)  # remembers what fits
        assert max(asked[len(passes) :]) <= room
    assert len(caught) == (room < 8)
    assert all("8 windows at once do not fit" in str(w.message) for w in caught)
    one_by_one = answer(1)
    assert torch.equal(found, one_by_one)
    assert torch.equal(again, one_by_one)


def test_one_window_that_does_not_fit_and_other_errors_are_raised() -> None:
    image = np.zeros((4, 4, 4), np.float32)
    for error in (full(), RuntimeError("shapes differ")):

        def forward(x: torch.Tensor, error: RuntimeError = error) -> torch.Tensor:
            raise error

        with pytest.raises(type(error), match=str(error)[:6]):
            list(sliding_slabs(forward, lambda rows: image[rows], (4, 4, 4), patch_vox=(4, 4, 4)))


def test_where_nothing_is_asked_a_gpu_shares_passes_and_a_cpu_does_not() -> None:
    assert WindowCount(None, "cuda").now == MOST_ON_GPU
    assert WindowCount(None, "cpu").now == 1
    assert WindowCount(3, torch.device("cpu")).now == 3
    assert not is_out_of_memory(RuntimeError("no"))
