"""`python -m clbench` is `clbench`."""

import sys

from clbench.evaluation.cost.allocator import start_with_jemalloc


def start() -> None:
    """Entry point of the program; `clbench.cli.main` in a process that is meant for it."""
    start_with_jemalloc(sys.argv[1:])
    from clbench.cli import main  # what starts anew imports it once

    main()


if __name__ == "__main__":
    start()
