"""SGLang's entry point (group `sglang.srt.plugins`, name `prfaas`).

SGLang logs and swallows any exception of a plugin and then serves without it, so every doubt ends the process
here with SystemExit. Import-light, and inert unless PRFAAS_CONFIG or PRFAAS_CPU_ENGINE is set.
"""

from __future__ import annotations

import os

CPU_ENGINE_VARIABLE = "PRFAAS_CPU_ENGINE"


def register() -> None:
    """Install what the environment asks for; raises SystemExit when that is not possible."""
    wants_cpu = os.environ.get(CPU_ENGINE_VARIABLE, "") not in ("", "0")
    wants_transfer = bool(os.environ.get("PRFAAS_CONFIG", "").strip())
    if not (wants_cpu or wants_transfer):
        return
    try:
        from prfaas_sglang.engine.compat import require_supported_engine

        require_supported_engine()
        if wants_cpu:
            from prfaas_sglang.cpu import hooks

            hooks.install()
        if wants_transfer:
            from prfaas_sglang.engine import install

            install.install()
    except Exception as error:
        raise SystemExit(f"prfaas_sglang: {type(error).__name__}: {error}") from error
