"""What the router reads in a worker's answer as it passes: errors, cache hits, prompt length.

Decides nothing and changes no byte. Rests on the answer shapes of SGLang 0.5.21: OpenAI `usage`, native
`meta_info`, and errors as `{"error": {...}}`, as `{"message": ...}` or as FastAPI's `{"detail": ...}`; a
stream reports an error of the scheduler as an event with a `finish_reason` of type `abort`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import msgspec

from cache_service.core.errors import RemoteProtocolError
from router.core.sse import SseParser

#: A final chunk with the usage, the [DONE] mark and what may stand between them.
_TAIL_EVENTS = 4
_MESSAGE_CHARACTERS = 2000


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Meta(msgspec.Struct):
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: dict[str, Any] | str | None = None


class _Answer(msgspec.Struct):
    usage: _Usage | None = None
    meta_info: _Meta | None = None
    error: dict[str, Any] | str | None = None


_DECODER: msgspec.json.Decoder[_Answer | list[_Answer]] = msgspec.json.Decoder(_Answer | list[_Answer])


@dataclass(frozen=True, slots=True)
class Facts:
    """What an answer says about its prompt; None where it does not."""

    prompt_tokens: int | None = None
    hit_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class AnswerError:
    """An error inside a stream: HTTP-like status and the worker's words."""

    status: int
    message: str


def _decode(data: bytes) -> _Answer | None:
    try:
        answer: _Answer | list[_Answer] = _DECODER.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None  # [DONE], or something that is not ours to judge
    if isinstance(answer, list):
        return answer[0] if answer else None
    return answer


def facts_of(data: bytes) -> Facts:
    """Read prompt length and hit from one JSON answer or event."""
    answer = _decode(data)
    if answer is None:
        return Facts()
    if answer.meta_info is not None:
        return Facts(answer.meta_info.prompt_tokens, answer.meta_info.cached_tokens)
    if answer.usage is not None:
        details = answer.usage.prompt_tokens_details
        return Facts(answer.usage.prompt_tokens, details.cached_tokens if details else None)
    return Facts()


def error_of(data: bytes) -> AnswerError | None:
    """Return the error that a stream event carries, None for any other event."""
    answer = _decode(data)
    if answer is None:
        return None
    if answer.error is not None:
        fields = answer.error if isinstance(answer.error, dict) else {"message": answer.error}
        return AnswerError(_status(fields.get("code")), str(fields.get("message"))[:_MESSAGE_CHARACTERS])
    reason = answer.meta_info.finish_reason if answer.meta_info else None
    if isinstance(reason, dict) and reason.get("type") == "abort":
        return AnswerError(
            _status(reason.get("status_code")), str(reason.get("message"))[:_MESSAGE_CHARACTERS]
        )
    return None


def message_of(body: bytes) -> str:
    """Return the words of an error answer, whatever its shape; its beginning when it is not JSON."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return body[:200].decode(errors="replace")
    for key in ("error", "message", "detail"):
        if isinstance(value, dict) and value.get(key) is not None:
            value = value[key]
    return (value if isinstance(value, str) else str(value))[:_MESSAGE_CHARACTERS]


def _status(code: object) -> int:
    return code if isinstance(code, int) and 400 <= code <= 599 else 500


class StreamWatch:
    """Follows a stream's events and remembers the last few, which hold the usage and a late error.

    `blind` turns true on an event longer than the parser's limit; the stream itself goes on.
    """

    def __init__(self) -> None:
        self._parser = SseParser()
        self.blind = False
        self._tail: deque[bytes] = deque(maxlen=_TAIL_EVENTS)

    def feed(self, chunk: bytes) -> list[bytes]:
        """Return the events that `chunk` completes; none once blind."""
        if self.blind:
            return []
        try:
            events = self._parser.feed(chunk)
        except RemoteProtocolError:
            self.blind = True
            return []
        self._tail.extend(events)
        return events

    def facts(self) -> Facts:
        """Return what the last events said."""
        found = [facts_of(data) for data in self._tail]
        prompt = [f.prompt_tokens for f in found if f.prompt_tokens is not None]
        hit = [f.hit_tokens for f in found if f.hit_tokens is not None]
        return Facts(prompt[-1] if prompt else None, hit[-1] if hit else None)

    def error(self) -> AnswerError | None:
        """Return an error among the last events."""
        return next((e for e in map(error_of, self._tail) if e is not None), None)
