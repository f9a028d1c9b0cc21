"""Metrics: arrays or score tables in, numbers out."""
