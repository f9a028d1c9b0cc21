"""Multiply-add counter (MACs, FLOPs) of a forward pass, at the level of torch's operators.

Below the modules: functional convolutions, products inside an autograd
function and attention count like layers do. What is neither counted nor known to be no product is
an error.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from importlib import resources
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from clbench.errors import ClbenchError, CostError

aten = torch.ops.aten
Formula = Callable[..., int]
"""(operator's arguments, `out_val` = its result) → operations."""
Scope = nn.Module | tuple[nn.Module, str]
"""A module, or a method of one by name: what runs inside belongs to it."""
OTHER = "other"
"""The scope of what runs in none."""
_CPU_ATTENTION = ("_scaled_dot_product_flash_attention_for_cpu",)
_PORTABLE_ATTENTION = ("_scaled_dot_product_fused_attention_overrideable",)


def _half(flops: Formula) -> Formula:
    """Torch's formulas count two operations per multiply-add."""

    @wraps(flops)
    def macs(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        twice: int = flops(*args, **kwargs, out_val=out_val)
        return twice // 2

    return macs


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    flops: Any = sdpa_flop_count  # untyped in torch
    return int(flops(query.shape, key.shape, value.shape)) // 2


MACS: dict[Any, Formula] = {
    **{op: _half(formula) for op, formula in flop_registry.items()},
    **{getattr(aten, n): _attention for n in (*_CPU_ATTENTION, *_PORTABLE_ATTENTION)},
    aten.mv: lambda matrix, vector, **_: matrix.numel(),
    aten.dot: lambda a, b, **_: a.numel(),
    aten.vdot: lambda a, b, **_: a.numel(),
    aten.addmv: lambda bias, matrix, vector, **_: matrix.numel(),
    aten.addbmm: lambda bias, a, b, **_: a.numel() * b.shape[-1],
}
"""Operator → multiply-adds: convolutions (transposed ones at the resolution of their input, where
their products are formed), matrix products, attention.

Differs: padding is multiplied like any voxel, and a bias is no multiply-add, as in the closed
formula `output voxels x kernel x channels in / groups x channels out`.
"""

_LIST = resources.files("clbench.evaluation.cost") / "no_product_operators.txt"
_ZERO = re.sub("#.*", "", _LIST.read_text(encoding="utf-8"))
NO_PRODUCT = frozenset(getattr(aten, n) for n in _ZERO.split() if hasattr(aten, n))
"""Operators that count zero; `no_product_operators.txt` says why. Views count zero unlisted."""


class MacCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch
    """Adds up operations by scope while it is entered; use it under `torch.no_grad()`.

    Args:
        formulas: operator → operations.
    """

    def __init__(self, formulas: Mapping[Any, Formula] = MACS) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch
        self.formulas = formulas
        self.by_scope: Counter[str] = Counter()
        self.stack: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # fmt: skip
        """One operator.

        Raises:
            CostError: it has no formula, and is not known to be no product.
        """
        kwargs = kwargs or {}
        packet = getattr(func, "_overloadpacket", func)
        formula = self.formulas.get(packet)
        if formula is None and packet not in NO_PRODUCT and not getattr(func, "is_view", False):
            with self:  # a composite operator is counted by its parts
                parts = func.decompose(*args, **kwargs) if hasattr(func, "decompose") else None
            if parts is not None and parts is not NotImplemented:
                return parts
            raise CostError(
                f"the operator {packet} cannot be counted",
                where=f"a forward pass, in {self.stack[-1] if self.stack else OTHER}",
                expected="an operator of clbench.evaluation.cost.multiply_adds: MACS or NO_PRODUCT",
                got=func,
                next_step="enter its formula in MACS, or its name in NO_PRODUCT if it forms no "
                "products of tensors; a zero by default would be a wrong number",
            )
        out = func(*args, **kwargs)
        if formula is not None:
            here = self.stack[-1] if self.stack else OTHER
            self.by_scope[here] += formula(*args, **kwargs, out_val=out)
        return out


def count(
    model: nn.Module,
    inputs: Sequence[Any],
    scopes: Callable[[nn.Module], Mapping[str, Sequence[Scope]]] = lambda model: {},
    *,
    formulas: Mapping[Any, Formula] = MACS,
) -> dict[str, int]:
    """Operations of one forward pass in evaluation mode: scope → number, `other` for the rest.

    Nothing is computed: a copy of the model runs on tensors without values. A model that looks at
    values runs once on the CPU instead.

    Args:
        model: any module; it stays as it is.
        inputs: shapes of the tensors it takes.
        scopes: model → name → modules and methods; the innermost one counts.
        formulas: operator → operations.

    Raises:
        CostError: an operator cannot be counted, or the model cannot be run.
    """
    failed: Exception | None = None
    for device in ("meta", "cpu"):
        twin = copy.deepcopy(model).eval().to(device)
        counter = MacCounter(formulas)
        try:
            with torch.no_grad(), _marked(counter, scopes(twin)), counter:
                twin(*(torch.zeros(*shape, device=device) for shape in inputs))
        except ClbenchError:
            raise
        except Exception as err:  # whatever a network does without values; it is in the error below
            failed = err
            continue
        return dict(counter.by_scope)
    raise CostError(
        "the model could not be run once to count its operations",
        where=type(model).__name__,
        got=failed,
        next_step="try the patch size: --set data.patch_vox=…",
    ) from failed


@contextmanager
def _marked(counter: MacCounter, scopes: Mapping[str, Sequence[Scope]]) -> Iterator[None]:
    """Tell the counter which scope runs."""
    hooks, methods = [], []

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: counter.stack.append(name)

    def leave(*_: Any) -> None:
        counter.stack.pop()

    def wrapped(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counter.stack.append(name)
            try:
                return method(*args, **kwargs)
            finally:
                counter.stack.pop()

        return call

    try:
        for name, members in scopes.items():
            for member in members:
                if isinstance(member, tuple):
                    owner, method = member
                    setattr(owner, method, wrapped(name, getattr(owner, method)))
                    methods.append(member)
                else:
                    hooks.append(member.register_forward_pre_hook(enter(name)))
                    hooks.append(member.register_forward_hook(leave, always_call=True))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for owner, method in methods:
            delattr(owner, method)
