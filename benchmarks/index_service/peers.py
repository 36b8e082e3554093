"""The peer: Dynamo's standalone indexer, installed on first use below .cache/peers."""

from __future__ import annotations

from benchmarks.transfer.peers import command, environment

#: Without the runtime's other requirements: the standalone indexer imports only these.
PACKAGES = ("ai-dynamo-runtime==1.6.1", "ai-dynamo==1.6.1", "uvloop==0.22.1")
WITH_REQUIREMENTS = ("pydantic<=2.13.5,>=2.10.6",)


def dynamo() -> list[str]:
    """Return the command of Dynamo's standalone indexer. Raises Missing."""
    python = str(environment("dynamo", PACKAGES, WITH_REQUIREMENTS))
    command(python, "-m", "dynamo.indexer", "--help")
    return [python, "-m", "dynamo.indexer"]
