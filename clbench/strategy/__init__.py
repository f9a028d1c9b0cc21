"""The contract of a continual-learning method, and the building blocks that methods share."""

from clbench.nets.output import Output
from clbench.reproducibility import derive_seed
from clbench.strategy.contract import (
    UNKNOWN,
    Batch,
    Declaration,
    Desk,
    Group,
    Kit,
    Lesson,
    Memory,
    Phase,
    PhaseResult,
    Predictor,
    Session,
    Strategy,
)
from clbench.strategy.teacher_labels import labelled_on_line, pseudo_labels

__all__ = [
    "UNKNOWN",
    "Batch",
    "Declaration",
    "Desk",
    "Group",
    "Kit",
    "Lesson",
    "Memory",
    "Output",
    "Phase",
    "PhaseResult",
    "Predictor",
    "Session",
    "Strategy",
    "derive_seed",
    "labelled_on_line",
    "pseudo_labels",
]
