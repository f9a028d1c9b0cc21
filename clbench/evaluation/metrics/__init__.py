"""Metrics: of one case, and of a whole course."""
