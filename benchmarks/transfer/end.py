"""One end of a transfer as a process: `python -m benchmarks.transfer.end KIND`, commands as JSON lines.

Reads {"op": name, **arguments} from standard input, answers {"ok": value} or {"error": text} on what was
standard output; libraries that print go to standard error. End of input ends the process at once.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback


def main() -> None:
    """Serve the operations (methods `op_*`) of the module `end_KIND`'s class End."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    end = importlib.import_module(f"benchmarks.transfer.end_{sys.argv[1]}").End()
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = {"ok": getattr(end, "op_" + command.pop("op"))(**command)}
        except Exception as error:  # noqa: BLE001 - whatever it was, the controller must hear of it
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
