"""OpenAI-shaped requests and errors: what the router must understand of a body, and how it says no.

Reads only the fields that routing needs and checks their types; everything else passes to the engine
untouched, so the body stays the client's bytes with a few fields appended (`with_fields`: a JSON object's
last key of a name wins in SGLang's parsers). Field rules follow SGLang 0.5.21
(entrypoints/openai/protocol.py, managers/ io_struct.py). One prompt and one choice for each request: with n
> 1 SGLang gives every copy the same bootstrap room, which prefill-decode disaggregation cannot serve.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import msgspec

from cache_service.core.errors import PrfaasError


class Api(StrEnum):
    """The three request shapes; the value is a metric label."""

    CHAT = "chat"
    COMPLETION = "completion"
    GENERATE = "generate"


class RequestError(PrfaasError):
    """The client's request cannot be served as it is; becomes an OpenAI-style error answer."""

    reason = "bad_request"

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message, reason=code or "bad_request")
        self.status = status
        self.code = code
        self.param = param


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """What the router read from a body.

    Attributes:
        prompt: text, token ids, or None for a chat (then `body` holds the messages).
        listed: the prompt came as a list of one, which the engine treats as a batch (rid must be a list too).
        cache_salt: tenant's salt, "" for none; the engine's KV events are named by it.
        partition: extra key or adapter, "" for none; it separates caches, but events do not carry it.
        body: the decoded object, not to be changed.
    """

    api: Api
    model: str | None
    stream: bool
    prompt: str | list[int] | None
    listed: bool
    cache_salt: str
    partition: str
    body: dict[str, Any]


def error_body(
    message: str, kind: str, *, code: str | None = None, param: str | None = None
) -> dict[str, object]:
    """Return OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_type(status: int) -> str:
    """Return OpenAI's error type for an HTTP status."""
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


def parse(api: Api, raw: bytes) -> ParsedRequest:
    """Read a request body. Raises RequestError (400) naming the field. O(body)."""
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(400, f"the body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(body, dict):
        raise RequestError(400, f"the body must be a JSON object, not {_kind(body)}", code="invalid_json")
    stream = _typed(body, "stream", bool, "a boolean") or False
    model = _typed(body, "model", str, "a string")
    prompt, listed = _READERS[api](body)
    adapter = _name(body, "lora_path") or (model or "").partition(":")[2]
    return ParsedRequest(
        api=api,
        model=model,
        stream=stream,
        prompt=prompt,
        listed=listed,
        cache_salt=_name(body, "cache_salt"),
        partition="/".join(filter(None, (_name(body, "extra_key"), adapter))),
        body=body,
    )


def check_model(request: ParsedRequest, served: str) -> None:
    """Raise RequestError (404) unless the request is for the served model ("name" or "name:adapter")."""
    if request.model is None or request.model in (served, "default"):
        return
    if request.model.partition(":")[0] != served:
        raise RequestError(
            404,
            f"The model {request.model!r} does not exist; this router serves {served!r}",
            code="model_not_found",
            param="model",
        )


def check_length(prompt_tokens: int, context_length: int) -> None:
    """Raise RequestError (400) when the prompt leaves no room for a token, as the engine would."""
    if prompt_tokens >= context_length:
        raise RequestError(
            400,
            f"This model's maximum context length is {context_length} tokens, but the prompt has "
            f"{prompt_tokens} tokens; at most {context_length - 1} leave room for one more.",
            code="context_length_exceeded",
            param="messages",
        )


def with_fields(raw: bytes, *, empty: bool, fields: Mapping[str, object]) -> bytes:
    """Append `fields` to the JSON object `raw`, which must have been parsed; no other byte changes."""
    head = raw.rstrip(b" \t\r\n")[:-1]
    return head + (b"" if empty else b",") + msgspec.json.encode(fields)[1:]


def _kind(value: object) -> str:
    names = {bool: "a boolean", str: "a string", list: "an array", dict: "an object", type(None): "null"}
    return names.get(type(value), "a number")


def _wrong(path: str, expected: str, value: object) -> RequestError:
    return RequestError(400, f"{path}: expected {expected}, got {_kind(value)}", param=path)


def _typed(body: Mapping[str, Any], key: str, kind: type, expected: str, path: str = "") -> Any:
    """Return the value, None when absent or null; a boolean is not a number."""
    value = body.get(key)
    if value is None:
        return None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise _wrong(path + key, expected, value)
    return value


def _name(body: Mapping[str, Any], key: str) -> str:
    """Return a string field that may also come as a list of one."""
    value = body.get(key)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is not None and not isinstance(value, str):
        raise _wrong(key, "a string", value)
    return value or ""


def _one_choice(body: Mapping[str, Any], key: str, path: str = "") -> None:
    value = _typed(body, key, int, "an integer", path)
    if value is not None and value != 1:
        raise RequestError(
            400,
            f"{path}{key}: only 1 is served with separate prefill and decode workers, got {value}; "
            "send the request again for each further choice",
            param=path + key,
        )


def _token_ids(value: list[Any], path: str) -> list[int]:
    for index, token in enumerate(value):
        if type(token) is not int or not 0 <= token < 1 << 31:
            raise RequestError(400, f"{path}[{index}]: expected a token id, got {token!r:.40}", param=path)
    return value


def stop_token_ids(body: dict[str, Any]) -> tuple[list[int], str]:
    """Return a body's stop token ids and the field they are in. Raises RequestError for a wrong type."""
    sampling = body.get("sampling_params")
    if isinstance(sampling, dict) and sampling.get("stop_token_ids") is not None:
        value, path = sampling["stop_token_ids"], "sampling_params.stop_token_ids"
    else:
        value, path = body.get("stop_token_ids"), "stop_token_ids"
    if value is None:
        return [], path
    if not isinstance(value, list):
        raise _wrong(path, "an array of token ids", value)
    return _token_ids(value, path), path


def _single_prompt(value: object, path: str) -> tuple[str | list[int], bool]:
    """Return (prompt, came as a list of one) from text, token ids, or a list with one of either."""
    listed = False
    if isinstance(value, list) and value and isinstance(value[0], (str, list)):
        if len(value) != 1:
            raise RequestError(
                400, f"{path}: {len(value)} prompts in one request; send one request for each", param=path
            )
        value, listed = value[0], True
        path = f"{path}[0]"
    if not isinstance(value, (str, list)):
        raise _wrong(path, "a string or an array of token ids", value)
    if not value:
        raise RequestError(400, f"{path}: is empty", param=path)
    return (value if isinstance(value, str) else _token_ids(value, path)), listed


def _read_chat(body: dict[str, Any]) -> tuple[str | list[int] | None, bool]:
    _one_choice(body, "n")
    messages = body.get("messages")
    if not isinstance(messages, list):
        raise _wrong("messages", "an array of messages", messages)
    if not messages:
        raise RequestError(400, "messages: is empty", param="messages")
    ids = _typed(body, "input_ids", list, "an array of token ids")
    return (None if ids is None else _token_ids(ids, "input_ids")), False


def _read_completion(body: dict[str, Any]) -> tuple[str | list[int] | None, bool]:
    _one_choice(body, "n")
    _one_choice(body, "best_of")
    return _single_prompt(body.get("prompt"), "prompt")


def _read_generate(body: dict[str, Any]) -> tuple[str | list[int] | None, bool]:
    for field in ("image_data", "video_data", "audio_data", "input_embeds"):
        if body.get(field):
            raise RequestError(400, f"{field}: this router serves text prompts only", param=field)
    sampling = body.get("sampling_params")
    for params in sampling if isinstance(sampling, list) else [sampling]:
        if params is None:
            continue
        if not isinstance(params, dict):
            raise _wrong("sampling_params", "an object", params)
        _one_choice(params, "n", "sampling_params.")
    text, ids = body.get("text"), body.get("input_ids")
    if (text is None) == (ids is None):
        raise RequestError(400, "exactly one of text and input_ids must be given", param="text")
    prompt, listed = _single_prompt(ids, "input_ids") if text is None else _single_prompt(text, "text")
    if isinstance(prompt, str) == (text is None):
        raise _wrong("input_ids" if text is None else "text", "the other kind of prompt", prompt)
    return prompt, listed


_READERS = {Api.CHAT: _read_chat, Api.COMPLETION: _read_completion, Api.GENERATE: _read_generate}
