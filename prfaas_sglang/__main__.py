"""`python -m prfaas_sglang` is `prfaas`."""

from __future__ import annotations

import sys

from prfaas_sglang.cli import main

if __name__ == "__main__":
    sys.exit(main())
