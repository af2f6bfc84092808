"""`python server.py`: settings -> engine -> app -> uvicorn.

Every worker process imports this file again (multiprocessing's spawn), so everything heavy is imported inside `main`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run the server, or `doctor`. The exit status: 0, or 2 when it cannot start, with one sentence on stderr why."""
    from core.settings import Settings

    if argv[:1] == ["doctor"]:
        from api import checks
        from engine import doctor

        return doctor.run(Settings.load(argv[1:]), checks.CHECKS)

    from api.serve import serve

    return serve(Settings.load(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
