"""The phantom: procedural abdominal CTs, written as NIfTI in the layout of each source."""
