"""Loaded by the process whose forks make runs, and by nothing else: a signal to all is not its own.

It goes on until the last of its forks has saved and ended, whose exit statuses it tells.
"""

from __future__ import annotations

import signal

from clbench.signals import SIGNALS

for number in SIGNALS:
    signal.signal(number, signal.SIG_IGN)
