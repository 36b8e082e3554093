"""One streamed chat request, and what the demo wants to know of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from cache_service.core.errors import WorkerUnavailable

TIMEOUT = aiohttp.ClientTimeout(total=300)
#: A worker records a transfer when decode confirms it, which is before the answer ends.
TELEMETRY_WAIT_S = 5.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for one request.

    Attributes:
        text: the assistant's message.
        output_ids: its token ids.
        headers: the router's x-prfaas-* headers, names without the prefix.
        prompt_tokens, hit_tokens: as the engine reports them.
        ttft_s: from sending to the first token.
    """

    text: str
    output_ids: tuple[int, ...]
    headers: Mapping[str, str]
    prompt_tokens: int
    hit_tokens: int
    ttft_s: float


async def chat(
    session: aiohttp.ClientSession,
    url: str,
    model: str,
    messages: Sequence[Mapping[str, str]],
    *,
    max_tokens: int,
) -> Answer:
    """Ask greedily for exactly `max_tokens` tokens. Raises WorkerUnavailable with the server's message."""
    body = {
        "model": model,
        "messages": list(messages),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_output_ids_in_sglext": True,
    }
    started = time.perf_counter()
    first: float | None = None
    text: list[str] = []
    ids: list[int] = []
    usage: dict[str, Any] = {}
    async with _asked(session, url, body) as response:
        if response.status != 200:
            raise WorkerUnavailable(f"{url} answered {response.status}: {(await response.text())[:500]}")
        headers = {
            k.lower().removeprefix("x-prfaas-"): v
            for k, v in response.headers.items()
            if k.lower().startswith("x-prfaas-")
        }
        async for line in response.content:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise WorkerUnavailable(f"{url} failed: {event['error']}")
            for choice in event.get("choices", []):
                piece = choice.get("delta", {}).get("content")
                if piece:
                    first = first if first is not None else time.perf_counter()
                    text.append(piece)
            usage = event.get("usage") or usage
            for part in (event.get("sglext") or {}).get("output_ids") or []:
                ids = list(part)
    details = usage.get("prompt_tokens_details") or {}
    return Answer(
        "".join(text),
        tuple(ids),
        headers,
        int(usage.get("prompt_tokens", 0)),
        int(details.get("cached_tokens") or 0),
        (first if first is not None else time.perf_counter()) - started,
    )


@contextlib.asynccontextmanager
async def _asked(
    session: aiohttp.ClientSession, url: str, body: Mapping[str, Any]
) -> AsyncIterator[aiohttp.ClientResponse]:
    """Post a chat request. Raises WorkerUnavailable for a connection that fails or is cut."""
    try:
        async with session.post(f"{url}/v1/chat/completions", json=body, timeout=TIMEOUT) as response:
            yield response
    except (aiohttp.ClientError, TimeoutError) as error:
        raise WorkerUnavailable(f"{url} cannot be reached: {error!r}") from error


async def transfer_bytes(session: aiohttp.ClientSession, telemetry_url: str, room: int) -> int | None:
    """Return the bytes that a prefill worker sent for a room, None when it does not tell in time."""
    deadline = time.monotonic() + TELEMETRY_WAIT_S
    while time.monotonic() < deadline:
        try:
            async with session.get(f"{telemetry_url}/transfers?room={room}", timeout=TIMEOUT) as response:
                records = (await response.json())["transfers"] if response.status == 200 else []
        except (aiohttp.ClientError, TimeoutError) as error:
            raise WorkerUnavailable(f"{telemetry_url} cannot be reached: {error!r}") from error
        if records:
            return int(records[-1]["bytes"])
        await asyncio.sleep(0.02)
    return None
