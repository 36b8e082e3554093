"""What every test run shares."""

import os

# As `python -m cache_service` has it, before gRPC is loaded (cache_service/snapshot.py).
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

# Its plugin imports it lazily, at the latest for the summary: then what grpc left behind is collected in the
# middle of the import, which CPython 3.11 answers with a SystemError now and then.
import hypothesis as hypothesis
