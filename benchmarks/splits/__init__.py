"""Splits: which cases train, validate and test."""
