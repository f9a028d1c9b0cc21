"""Training one step: the loop, its batches, resuming, monitoring, and access to past data."""
