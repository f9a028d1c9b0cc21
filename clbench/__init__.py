"""clbench: continual-learning benchmarks for 3-D medical segmentation."""

__version__ = "0.1.0"
NUMERICS = 4
"""Raised by any change that moves a number; part of every run id."""
