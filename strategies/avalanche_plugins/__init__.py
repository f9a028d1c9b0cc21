"""Avalanche's plugins on top of fine-tuning, by name or as `module:Class`."""
