"""Lazy import of Avalanche: when it is needed, and past a torchvision that cannot load.

Importing Avalanche takes seconds and hundreds of megabytes, so nobody who does not use
it pays for it. Avalanche imports torchvision; the torchvision of PyPI is compiled for CUDA, and
beside a CPU-only torch its compiled part cannot load: its import then ends with "operator
torchvision::nms does not exist", although nothing here needs that operator.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clbench.errors import AvalancheError

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
"""What torchvision describes to torch at import without asking whether it could load them."""

_declared: list[Any] = []  # torch forgets a declaration when its library object goes


def load(module: str) -> Any:
    """A module of Avalanche.

    Args:
        module: its full name, such as `avalanche.training.plugins`.

    Raises:
        AvalancheError: it cannot be imported; says why.
    """
    if module in sys.modules:
        return sys.modules[module]
    try:
        make_torchvision_importable()
        with warnings.catch_warnings(), _as_one_process():
            # GEM alone needs a QP solver, and fails with a word of its own where there is none
            warnings.filterwarnings("ignore", message="no QP solver found")
            return importlib.import_module(module)
    except Exception as err:  # an import can end in any exception of any package below it
        raise AvalancheError(
            f"Avalanche cannot be imported: {err}",
            where=module,
            expected="avalanche-lib 0.6.0, with torchvision and torch of matching releases",
            next_step="pip install avalanche-lib==0.6.0, in the environment of clbench; "
            "`clbench doctor` names its packages",
        ) from err


@contextmanager
def _as_one_process() -> Iterator[None]:
    """In this block torch knows of no process group: Avalanche makes a logger at import.

    It refuses one in every process of a run but the first.
    """
    from torch import distributed

    told = distributed.is_initialized
    distributed.is_initialized = lambda: False
    try:
        yield
    finally:
        distributed.is_initialized = told


def make_torchvision_importable() -> bool:
    """Declare the operators of torchvision where its compiled part cannot load.

    They stay without an implementation: whoever calls one is told so. Where the compiled part
    loads, or torchvision is imported already, nothing is done.

    Returns:
        Whether operators had to be declared.
    """
    if _declared or "torchvision" in sys.modules or compiled_part_loads():
        return False
    import torch

    # a library of its own: torchvision's own declarations would clash with a second "DEF"
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch
    for schema in OPERATORS:
        library.define(schema)  # type: ignore[no-untyped-call]  # torch
    _declared.append(library)
    return True


def compiled_part_loads() -> bool:
    """Whether torchvision's compiled part and this torch fit; true where there is no torchvision.

    Asked of the file itself, as torchvision asks it at import.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True  # the import itself says best what is missing
    import torch

    compiled = [p for p in Path(spec.origin).parent.glob("_C*") if p.suffix in (".so", ".pyd")]
    try:
        for path in compiled:
            torch.ops.load_library(path)  # type: ignore[no-untyped-call]  # torch
    except (ImportError, OSError):
        return False
    return bool(compiled)
