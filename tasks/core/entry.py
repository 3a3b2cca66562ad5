"""How a stage meets the shell."""

import sys
from collections.abc import Callable

from compression.core.errors import Problem


def run_stage(main: Callable[[], None]) -> None:
    """Runs a stage's main; a Problem ends it with its message and exit code 1, without a traceback."""
    try:
        main()
    except Problem as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(1)
