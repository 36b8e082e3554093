"""The peer's end, run by its own interpreter: NVIDIA Dynamo's offline replay; prints one JSON line.

python dynamo_end.py TRACE WORKERS BLOCKS round_robin|kv_router
"""

from __future__ import annotations

import json
import sys
import time

from dynamo.replay.api import run_trace_replay


def main() -> None:
    """Replay once."""
    trace, workers, blocks, mode = sys.argv[1:]
    engine = {"backend": "vllm", "num_gpu_blocks": int(blocks), "block_size": 512}
    engine["timing_model"] = {"type": "polynomial"}
    wall, cpu = time.perf_counter(), time.process_time()
    report = run_trace_replay(
        [trace],
        extra_engine_args={"engine": engine},
        num_workers=int(workers),
        router_mode=mode,
        trace_block_size=512,
    )
    summary = report.to_dict()["summary"] if hasattr(report, "to_dict") else report
    kept = ("completed_requests", "num_requests", "prefix_cache_reused_ratio", "mean_ttft_ms", "p99_ttft_ms")
    found = {key: summary[key] for key in kept}
    found |= {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
