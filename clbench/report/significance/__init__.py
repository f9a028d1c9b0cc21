"""Significance: endpoints, tests between strategies, rankings, and the sentences they allow."""
