"""Where the tests find files of the project."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
GOLDEN_FILES = TESTS / "golden"
SHARED = ROOT.parent / "shared"
"""Material that lies beside a checkout on some machines; tests skip without it."""
