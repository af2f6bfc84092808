"""Does the server answer what its description promises? schemathesis, for long: every operation, without and with keys.

    python -m bench.conformance [--seeds 3] [--examples 300]

No model runs, so that all the time goes into the door and the dialects. Ends with 1 when an answer broke a promise;
each is told with the request that does it again. What was asked and answered goes to bench/results/conformance.json.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import structlog

from bench.common import machine_facts, write_result
from tests.process.openapi_kit import live, run


def one(keys: bool, seed: int, examples: int) -> tuple[list[str], dict[str, Any]]:
    """What is wrong, and the row of the result, of one run of all phases."""
    began = time.monotonic()
    drawn = {"enabled": True, "generation": {"max-examples": examples}}
    with tempfile.TemporaryDirectory() as folder, live(Path(folder), keys=keys) as server:
        wrong, told = run(server, seed, coverage={"enabled": True}, fuzzing=drawn, stateful=drawn)
    statuses = sum((Counter(counts) for counts in told.values()), Counter())
    row = {
        "keys": keys, "seed": seed, "operations": len(told), "requests": statuses.total(),
        "statuses": dict(sorted(statuses.items())), "broken": len(wrong), "seconds": round(time.monotonic() - began),
    }  # fmt: skip
    return wrong, row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=300)
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    given = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    rows, broken = [], []
    for seed in range(given.first, given.first + given.seeds):
        for keys in (False, True):
            wrong, row = one(keys, seed, given.examples)
            print(row, *wrong, sep="\n", flush=True)
            rows.append(row)
            broken += wrong
    facts = machine_facts(("schemathesis", "hypothesis", "fastapi", "starlette"))
    write_result("conformance", facts, {"examples": given.examples, "rows": rows})
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
