"""Statistics: arrays in, numbers out; no files and no torch."""
