"""clbench: continual-learning benchmarks for 3-D medical segmentation."""

__version__ = "0.2.0.dev0"
NUMERICS = 5
"""Raised by any change that moves a number; part of every run id."""
NUMERICS_BF16 = 6
"""The same, of runs with `train.amp=bf16`: raised alone when CPUs began to obey it."""
