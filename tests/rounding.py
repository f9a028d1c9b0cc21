"""How far the logits of networks of different shapes may lie apart, in tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LOGITS_ULP = 16
"""Largest difference, in float32 steps of the largest logit.

Equal bits are promised for equal shapes, on one machine and with one thread count only. One more
output channel, one more structure or another batch size lets oneDNN and MKL choose another kernel,
which adds up the same products in another order; which one depends on the processor. Of the sums in
an output layer (8 to 32 products) a few steps are lost; weights that were touched show thousands.
"""


def assert_same_to_rounding(found: Tensor, expected: Tensor) -> None:
    """Logits of equal weights in networks of different shapes are equal up to `LOGITS_ULP`."""
    step = torch.finfo(torch.float32).eps * float(expected.detach().abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=LOGITS_ULP * step)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer by name."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_untouched(module: nn.Module, before: dict[str, Tensor]) -> None:
    """Every tensor of `before` is still there, to the bit; new ones may have come."""
    now = module.state_dict()
    assert before
    assert [n for n, v in before.items() if n not in now or not torch.equal(now[n], v)] == []
