"""Tables of measured runs, and how a table is written in each format."""
