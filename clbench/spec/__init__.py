"""What is taught, and with which numbers: benchmarks, structures, splits, settings; no torch."""

from clbench.spec.benchmark import MAX_LABEL, Benchmark, Partial, Preprocessing, Source, Step
from clbench.spec.splits import Draw, Split
from clbench.spec.taxonomy import Structure

__all__ = [
    "MAX_LABEL",
    "Benchmark",
    "Draw",
    "Partial",
    "Preprocessing",
    "Source",
    "Split",
    "Step",
    "Structure",
]
