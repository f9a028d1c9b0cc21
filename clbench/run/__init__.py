"""A whole course: planned, taught step by step, examined, recorded, rescored and verified."""
