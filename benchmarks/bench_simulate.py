"""The simulator and the policies in it: `python -m benchmarks.bench_simulate [--trace FILE]`.

trace    one site, against NVIDIA Dynamo's offline replay of the same trace in the same run: hit ratio, TTFT,
         speed; `--trace conversation_trace.jsonl`, else a made-up one; and round robin in both, which shows
         that the engine models agree
goodput  `ttft` against `prfaas` on the paper's fleet, bursty, with and without shared prefixes, the link
         steady or fluctuating; paired seeds, 95 % intervals
agents   coding agents over four sites against `cache_aware` inside each
scale    16 sites of 64 workers, a million requests (minutes)
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from benchmarks import harness
from benchmarks.simulate import cases


def main() -> None:
    """Take --trace off the command line; the rest is every benchmark's."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--trace", type=Path)
    arguments, sys.argv[1:] = parser.parse_known_args()
    measures = {
        "trace": partial(cases.trace, path=arguments.trace),
        "goodput": cases.goodput,
        "agents": cases.agents,
        "scale": cases.scale,
    }
    harness.run("simulate", measures, (__doc__ or "").split("\n")[0] + " --trace FILE: Mooncake's JSONL.")


if __name__ == "__main__":
    main()
