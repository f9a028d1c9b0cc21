"""The report's page: one HTML file without network, and its summary in Markdown."""
