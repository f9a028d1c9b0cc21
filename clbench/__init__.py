"""clbench: continual-learning benchmarks for 3-D medical segmentation."""

__version__ = "0.1.0"
NUMERICS = 4
"""Raised by any change that moves a number; part of every run id."""
NUMERICS_BF16 = 5
"""The same, of runs with `train.amp=bf16`: raised alone when CPUs began to obey it."""
