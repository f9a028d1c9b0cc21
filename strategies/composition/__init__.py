"""Strategies put together by name: a head, and the methods that work on it (`universal+plop`)."""
