"""Which files are opened while something goes on, and whether the catalog opened them.

Room: row 3. Python tells of every file it opens (audit events), so a hook that reads past the
catalog is heard as well.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from clbench.data.catalog import Catalog
from clbench.examine import score_case

_LISTENERS: list[Callable[[str], None]] = []
_HOOKED: list[bool] = []


def _hear(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and _LISTENERS and isinstance(args[0], str | os.PathLike):
        for listener in tuple(_LISTENERS):
            listener(os.fspath(args[0]))


@contextmanager
def files_heard(listener: Callable[[str], None]) -> Iterator[None]:
    """Call `listener` with the path of every file that Python opens inside.

    The audit hook itself stays for the life of the process (Python offers no way back); with no
    listener it does nothing.
    """
    if not _HOOKED:
        sys.addaudithook(_hear)
        _HOOKED.append(True)
    _LISTENERS.append(listener)
    try:
        yield
    finally:
        _LISTENERS.remove(listener)


class Opened:
    """Which cases were opened by whom; the catalog's own reading is told from everybody else's."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self.cases: dict[str, tuple[str, str]] = {
            str(path): (source, case)
            for source, files in catalog.files.items()
            for case, found in files.items()
            for path in found.files
        }
        self.strangers: list[tuple[int, str, str]] = []
        """(step, source, case) read past the catalog."""

    def __call__(self, path: str) -> None:
        """One file was opened: by the catalog, by the examination, or by a hook."""
        frame: Any = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            if code is Catalog.open.__code__:
                if path.endswith(".npy"):  # the case as the cache holds it
                    name = self.catalog.source(frame.f_locals["step"]).name
                    self.cases.setdefault(path, (name, frame.f_locals["case"]))
                return
            if code is score_case.__code__:
                return
            frame = frame.f_back
        if path in self.cases:
            self.strangers.append((self.catalog.step, *self.cases[path]))
