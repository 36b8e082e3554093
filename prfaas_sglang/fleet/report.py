"""What the demo found: rows, verdict, table. Pure but for printing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table


@dataclass(frozen=True, slots=True)
class Row:
    """One request.

    Attributes:
        agent, turn: which.
        prompt_tokens: prompt length.
        matched_tokens: what the index claimed of the chosen worker.
        hit_tokens: what the engine reused.
        route: local or remote.
        prefill_worker, prefill_site: who computed the prompt.
        link_bytes: KV bytes that crossed to another site, None when the backend does not tell.
        site_bytes: KV bytes that stayed inside the site, likewise.
        ttft_s: time to the first token.
        identical: output ids equal those of the single server.
    """

    agent: str
    turn: int
    prompt_tokens: int
    matched_tokens: int
    hit_tokens: int
    route: str
    prefill_worker: str
    prefill_site: str
    link_bytes: int | None
    site_bytes: int | None
    ttft_s: float
    identical: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """The demo's findings; `ok` decides the exit status."""

    rows: tuple[Row, ...]
    sites: tuple[str, ...]

    @property
    def identical(self) -> int:
        """Rows whose output equals the single server's."""
        return sum(row.identical for row in self.rows)

    def problems(self) -> list[str]:
        """Return what was expected and not seen, [] when all was."""
        found = []
        if self.identical != len(self.rows):
            found.append(f"{len(self.rows) - self.identical} outputs differ from the single server's")
        for route in ("remote", "local"):
            if not any(row.route == route for row in self.rows):
                found.append(f"no request took a {route} route")
        found += [
            f"no cached-prefix hit in site {site}"
            for site in self.sites
            if not any(row.prefill_site == site and row.hit_tokens for row in self.rows)
        ]
        return found

    @property
    def ok(self) -> bool:
        """True when nothing is missing."""
        return not self.problems()

    def to_json(self) -> dict[str, Any]:
        """Return rows and verdict as JSON values."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "requests": len(self.rows),
            "identical": self.identical,
            "problems": self.problems(),
            "ok": self.ok,
        }


def table(rows: tuple[Row, ...]) -> Table:
    """Return the table that a person reads; it fits 80 columns."""
    result = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("agent, turn", "prompt", "matched", "hit", "route", "worker", "KV moved", "TTFT", ""):
        left = name in ("agent, turn", "route", "worker", "")
        result.add_column(name, justify="left" if left else "right", no_wrap=True)
    for row in rows:
        link = row.route == "remote"
        result.add_row(
            f"{row.agent} #{row.turn}",
            str(row.prompt_tokens),
            str(row.matched_tokens),
            str(row.hit_tokens),
            row.route,
            row.prefill_worker,
            f"{size(row.link_bytes if link else row.site_bytes)} {'link' if link else 'site'}",
            f"{row.ttft_s * 1000:.0f} ms",
            "same" if row.identical else "DIFFERS",
        )
    return result


def size(count: int | None) -> str:
    """Return bytes for people, "-" when unknown."""
    if count is None:
        return "-"
    return f"{count / 1024:.0f} KiB" if count < 1 << 20 else f"{count / (1 << 20):.2f} MiB"
