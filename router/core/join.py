"""Joins the first token that prefill streams with decode's stream behind it: what passes, what is left out.

The prefill worker samples the first token and answers as soon as its KV is in staging memory; decode's answer
begins with the same token, a KV transfer later. The client gets prefill's, and then decode's stream less what
it has: what it sees is decode's own stream, cut differently. Where that cannot be known beforehand nothing is
sent early (core/hold.py, `FirstToken.reason`).

Rests on the streams of SGLang 0.5.21: prefill ends after one token with finish reason "length" whatever the
request says and does not look at stop conditions; chat begins with a role event; /generate's text and ids are
cumulative. Pure: events in, events out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from router.core.hold import CHAT, GENERATE

_DONE = b"[DONE]"
#: In an event's head, before anything that a model wrote; in a string its quotes would be escaped.
_CREATED = re.compile(rb'"created":\s*\d+')
#: What decode's detokenizer holds back until the character is whole.
_INCOMPLETE = "\ufffd"


class Mismatch(Exception):
    """Decode's stream does not begin with what the client already has."""


def _may_stop(text: str, stops: Sequence[str]) -> bool:
    """True when `text` contains a stop string or ends with the beginning of one."""
    return any(
        stop in text or any(text.endswith(stop[:n]) for n in range(1, min(len(stop), len(text) + 1)))
        for stop in stops
    )


def _event(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return b"data: " + text.encode("utf-8", "surrogatepass") + b"\n\n"


def _object(data: bytes) -> dict[str, Any] | None:
    if data == _DONE:
        return None
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _choice(value: Mapping[str, Any]) -> dict[str, Any] | None:
    choices = value.get("choices")
    if isinstance(choices, list) and len(choices) == 1 and isinstance(choices[0], dict):
        return choices[0]
    return None


@dataclass(slots=True)
class FirstToken:
    """Reads prefill's stream for the first token.

    Attributes:
        api, stops: of the request.
        ends: texts of the tokens that end an answer, None: not known.
        text: the token's text (behind the prompt when it is echoed), "" until it is known.
        ident, created: the stream's id and time stamp, which later events then carry too.
        reason: why it cannot be sent, "" while it may.
    """

    api: str
    stops: Sequence[str] = ()
    ends: Collection[str] | None = ()
    text: str = ""
    ident: str | None = None
    created: int | None = None
    reason: str = ""
    _role: dict[str, Any] | None = None

    def feed(self, data: bytes) -> bytes:
        """Take an event of prefill's stream; return what the client gets now, b"" for nothing yet."""
        value = _object(data)
        if value is None or self.reason or self.text:
            return b""
        if self.api == GENERATE:
            return self._generated(value)
        choice = _choice(value)
        if choice is None:
            return self._held("shape")
        return self._chatted(value, choice) if self.api == CHAT else self._completed(value, choice)

    def _held(self, reason: str) -> bytes:
        self.reason = reason
        return b""

    def _judge(self, text: object, ids: object = None) -> bool:
        """True when the token may go; sets text or reason."""
        if not isinstance(text, str) or not text:
            self.reason = "no_text"  # the end of the answer, or half a character
        elif text.endswith(_INCOMPLETE):
            self.reason = "half_character"
        elif _may_stop(text, self.stops):
            self.reason = "stop_string"
        elif self.ends is None or any(text.rstrip(" ").endswith(end.strip(" ")) for end in self.ends):
            self.reason = "stop_token"  # alone, a token may lose the space that it has in the text
        elif ids is not None and (not isinstance(ids, list) or len(ids) != 1):
            self.reason = "shape"
        else:
            self.text = text
            return True
        return False

    def _stamp(self, value: Mapping[str, Any]) -> None:
        ident, created = value.get("id"), value.get("created")
        self.ident = ident if isinstance(ident, str) else None
        self.created = created if type(created) is int else None

    def _generated(self, value: dict[str, Any]) -> bytes:
        meta = value.get("meta_info")
        if not isinstance(meta, dict) or not _is_length(meta.get("finish_reason")):
            return self._held("finished")
        if not self._judge(value.get("text"), value.get("output_ids", [0])):
            return b""
        self.ident = meta.get("id")
        meta = {**meta, "finish_reason": None}
        for key in ("e2e_latency", "weight_versions"):
            meta.pop(key, None)  # of a whole answer
        for key in meta:
            if key.startswith("input_") and isinstance(meta[key], list):
                meta[key] = []  # decode never has the prompt's logprobs
        return _event({**value, "meta_info": meta})

    def _completed(self, value: dict[str, Any], choice: dict[str, Any]) -> bytes:
        if choice.get("finish_reason") not in (None, "length"):
            return self._held("finished")
        if not self._judge(choice.get("text")):
            return b""
        self._stamp(value)
        return _event({**value, "choices": [{**choice, "finish_reason": None}]})

    def _chatted(self, value: dict[str, Any], choice: dict[str, Any]) -> bytes:
        delta = choice.get("delta")
        if not isinstance(delta, dict) or choice.get("finish_reason") is not None:
            return self._held("finished")
        if delta.get("reasoning_content") or delta.get("tool_calls"):
            return self._held("parsed")
        if delta.get("role") and not delta.get("content"):
            self._role = value
            return b""
        if not self._judge(delta.get("content")):
            return b""
        self._stamp(value)
        if self._role is None:
            return _event(value)
        same = {} if self.created is None else {"created": self.created}
        return _event({**self._role, **same}) + _event(value)


def _is_length(reason: object) -> bool:
    return isinstance(reason, dict) and reason.get("type") == "length"


@dataclass(slots=True)
class Rest:
    """Decode's stream behind a first token that the client has.

    Attributes:
        api: of the request.
        left: what of the token's text decode has not repeated yet.
        ident, created: id and time stamp for decode's events, None to leave theirs.
    """

    api: str
    left: str
    ident: str | None = None
    created: int | None = None
    _text: str = field(init=False)
    _logprob_dropped: bool = False
    _ids_dropped: bool = False
    _role_dropped: bool = False
    _same_ident: bool = True
    _through: bool = False

    def __post_init__(self) -> None:
        self._text = self.left

    def feed(self, data: bytes) -> bytes:
        """Return what the client gets of an event of decode's stream, b"" for nothing.

        Raises Mismatch when decode's text is not a continuation of what the client has.
        """
        if self._through and data != _DONE:
            return b"data: " + self._stamped(data) + b"\n\n"
        value = _object(data)
        if value is None:
            if data == _DONE and self.left:
                raise Mismatch("decode's stream ended before its first token")
            return b"data: " + data + b"\n\n"
        out = self._strip(value)
        self._through = not self.left and self._same_ident and (self._role_dropped or self.api != CHAT)
        return out

    def _stamped(self, data: bytes) -> bytes:
        """Return an event with our time stamp: chat has the time of each event in it."""
        if self.created is None:
            return data
        return _CREATED.sub(b'"created":%d' % self.created, data, count=1)

    def _strip(self, value: dict[str, Any]) -> bytes:
        if self.api == GENERATE:
            return self._generated(value)
        if self.ident is not None and value.get("id", self.ident) != self.ident:
            value["id"], self._same_ident = self.ident, False
        if self.created is not None and "created" in value:
            value["created"] = self.created
        choice = _choice(value)
        if choice is None or not (self.left or self._at_role(choice)):
            return _event(value)
        return self._chatted(value, choice) if self.api == CHAT else self._completed(value, choice)

    def _at_role(self, choice: dict[str, Any]) -> bool:
        return self.api == CHAT and not self._role_dropped and bool(choice.get("delta", {}).get("role"))

    def _generated(self, value: dict[str, Any]) -> bytes:
        meta = value.get("meta_info")
        text = value.get("text")
        if not isinstance(meta, dict) or not isinstance(text, str):
            return _event(value)  # an error
        if not text.startswith(self._text):
            raise Mismatch("decode's first token is another one")
        self.left = ""
        if self.ident is not None and meta.get("id") != self.ident:
            value["meta_info"], self._same_ident = {**meta, "id": self.ident}, False
        if text == self._text and meta.get("finish_reason") is None:
            return b""
        return _event(value)

    def _advance(self, text: object) -> str:
        """Return what of `text` is new."""
        if not isinstance(text, str):
            return ""
        if text.startswith(self.left):
            new, self.left = text[len(self.left) :], ""
            return new
        if self.left.startswith(text):
            self.left = self.left[len(text) :]
            return ""
        raise Mismatch("decode's first token is another one")

    def _completed(self, value: dict[str, Any], choice: dict[str, Any]) -> bytes:
        new = self._advance(choice.get("text"))
        finished = choice.get("finish_reason") is not None
        if finished and self.left:
            raise Mismatch("decode ended before its first token")
        changed = {**choice, "text": new}
        logprobs = choice.get("logprobs")
        if isinstance(logprobs, dict) and not self._logprob_dropped:
            self._logprob_dropped = True
            changed["logprobs"] = {k: v[1:] if isinstance(v, list) else v for k, v in logprobs.items()}
        if isinstance(ids := choice.get("token_ids"), list) and not self._ids_dropped:
            self._ids_dropped = True
            changed |= {"token_ids": ids[1:], "prompt_token_ids": None}
        if not new and not finished:
            return b""
        return _event({**value, "choices": [changed]})

    def _chatted(self, value: dict[str, Any], choice: dict[str, Any]) -> bytes:
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            return _event(value)
        if delta.get("role") and not self._role_dropped:
            self._role_dropped = True
            if not delta.get("content"):
                return b""
            delta = {k: v for k, v in delta.items() if k != "role"}
        if choice.get("finish_reason") is not None and self.left and not delta.get("content"):
            raise Mismatch("decode ended before its first token")
        if not delta.get("content"):
            return _event(value)
        new = self._advance(delta["content"])
        logprobs = choice.get("logprobs")
        if (
            isinstance(logprobs, dict)
            and isinstance(logprobs.get("content"), list)
            and not self._logprob_dropped
        ):
            self._logprob_dropped = True
            logprobs = {**logprobs, "content": logprobs["content"][1:]}
        if not new and choice.get("finish_reason") is None:
            return b""
        changed = {**choice, "delta": {**delta, "content": new}, "logprobs": logprobs}
        return _event({**value, "choices": [changed]})
