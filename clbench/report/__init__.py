"""Report: tables, significance, figures, page."""
