"""Asks a service one of its calls about the whole index, over and over, and does nothing with the answers.

`python -m benchmarks.index_service.caller ADDRESS METHOD`: a process of its own, so that what it reads costs
nobody else; one line per call on stdout, the seconds it took.
"""

from __future__ import annotations

import sys
import time

import grpc

from benchmarks.index_service.services import NAMESPACE
from cache_service.core.ids import BlockHash
from cache_service.wire import api_codec, codec

METHODS = ("Explain", "Dump", "Check")


def main(address: str, method: str) -> None:
    """Ask until killed."""
    requests = {
        "Explain": codec.encode_query(
            NAMESPACE, [BlockHash(at) for at in range(64)], 64 * NAMESPACE.page_size
        ),
        "Dump": api_codec.encode_dump_request(NAMESPACE, 0),
        "Check": api_codec.encode_check_request(NAMESPACE),
    }
    request = requests[method].SerializeToString()
    with grpc.insecure_channel(address) as channel:
        path = f"/prfaas.cache.v1.PrefixIndex/{method}"
        call = channel.unary_stream(path) if method == "Dump" else channel.unary_unary(path)
        while True:
            started_s = time.perf_counter()
            answer = call(request)
            if method == "Dump":
                for _ in answer:
                    pass
            print(time.perf_counter() - started_s, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
