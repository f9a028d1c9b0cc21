"""The paper's tables: printed, measured, and side by side with marks."""
