"""Tuning: settings chosen by validation cases, at an equal budget for every strategy."""
