"""What `prfaas plan` does: read, plan, print."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from cache_service.core.errors import ConfigError
from router.plan import config, planner, plots, report

EXAMPLE = Path(__file__).with_name("example.yaml")


def run(file: Path, *, json_file: Path | None = None, plot_folder: Path | None = None) -> int:
    """Print the plan of a file; return 0, whatever it says.

    Raises ConfigError.
    """
    question = config.load(file)
    answer = planner.plan(question)
    changed = planner.sensitivity(question)
    sys.stdout.write(report.text(answer, changed))
    if json_file is not None:
        try:
            json_file.write_text(json.dumps(report.as_json(answer, changed), indent=1) + "\n")
        except OSError as error:
            raise ConfigError(f"--json: {json_file}: cannot be written: {error.strerror}") from error
    if plot_folder is not None:
        for path in plots.draw(answer, changed, plot_folder):
            sys.stdout.write(f"{path}\n")
    return 0
