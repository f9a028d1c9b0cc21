"""How a run ends that was told to stop; every job of a cluster loads it, so it imports little."""

from __future__ import annotations

from clbench.training.launch import ASKED


def stopped(status: int) -> bool:
    """Whether a run ended because it was told to, with all saved that it had done.

    A run that still imports does not listen yet: the signal itself ends it, and nothing is lost.

    Args:
        status: exit status of its process; -n: ended by signal n.
    """
    return status in ASKED
