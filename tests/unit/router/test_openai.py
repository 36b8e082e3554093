"""Request validation: what is refused, with which words, and what passes untouched."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.openai import (
    Api,
    RequestError,
    check_length,
    check_model,
    error_body,
    error_type,
    parse,
    with_fields,
)

HELLO = {"messages": [{"role": "user", "content": "hi"}]}


def refuse(api: Api, body: object) -> RequestError:
    with pytest.raises(RequestError) as error:
        parse(api, json.dumps(body).encode())
    return error.value


@pytest.mark.parametrize(
    "raw", [b"", b"{", b'{"a":1}x', b"\xff", b'{"a":"\xff"}', b"[1]", b"null", b"[" * 5000]
)
def test_malformed_json_is_400(raw: bytes) -> None:
    """Truncated, trailing, not UTF-8, not an object, nested without end."""
    with pytest.raises(RequestError) as error:
        parse(Api.CHAT, raw)
    assert (error.value.status, error.value.code) == (400, "invalid_json")


@pytest.mark.parametrize(
    ("api", "body", "param"),
    [
        (Api.CHAT, {}, "messages"),
        (Api.CHAT, {"messages": "hi"}, "messages"),
        (Api.CHAT, {"messages": []}, "messages"),
        (Api.CHAT, HELLO | {"stream": "yes"}, "stream"),
        (Api.CHAT, HELLO | {"stream": 1}, "stream"),
        (Api.CHAT, HELLO | {"model": 7}, "model"),
        (Api.CHAT, HELLO | {"n": 2}, "n"),
        (Api.CHAT, HELLO | {"n": True}, "n"),
        (Api.CHAT, HELLO | {"input_ids": [1, "x"]}, "input_ids"),
        (Api.CHAT, HELLO | {"cache_salt": 3}, "cache_salt"),
        (Api.COMPLETION, {}, "prompt"),
        (Api.COMPLETION, {"prompt": ""}, "prompt"),
        (Api.COMPLETION, {"prompt": []}, "prompt"),
        (Api.COMPLETION, {"prompt": {"a": 1}}, "prompt"),
        (Api.COMPLETION, {"prompt": ["a", "b"]}, "prompt"),
        (Api.COMPLETION, {"prompt": [[1], [2]]}, "prompt"),
        (Api.COMPLETION, {"prompt": [1, -2]}, "prompt"),
        (Api.COMPLETION, {"prompt": [1, 2.5]}, "prompt"),
        (Api.COMPLETION, {"prompt": [True]}, "prompt"),
        (Api.COMPLETION, {"prompt": [""]}, "prompt[0]"),
        (Api.COMPLETION, {"prompt": "a", "best_of": 3}, "best_of"),
        (Api.GENERATE, {}, "text"),
        (Api.GENERATE, {"text": "a", "input_ids": [1]}, "text"),
        (Api.GENERATE, {"text": [1, 2]}, "text"),
        (Api.GENERATE, {"input_ids": "abc"}, "input_ids"),
        (Api.GENERATE, {"text": "a", "sampling_params": 3}, "sampling_params"),
        (Api.GENERATE, {"text": "a", "sampling_params": {"n": 4}}, "sampling_params.n"),
        (Api.GENERATE, {"text": "a", "image_data": "x.png"}, "image_data"),
    ],
)
def test_wrong_fields_are_named(api: Api, body: dict[str, Any], param: str) -> None:
    """400, the parameter, and its name in the message."""
    error = refuse(api, body)
    assert (error.status, error.param) == (400, param)
    assert param.split("[")[0].split(".")[0] in str(error)


@pytest.mark.parametrize(
    ("api", "body", "prompt", "listed"),
    [
        (Api.CHAT, HELLO, None, False),
        (Api.CHAT, HELLO | {"input_ids": [5, 6]}, [5, 6], False),
        (Api.COMPLETION, {"prompt": "a"}, "a", False),
        (Api.COMPLETION, {"prompt": ["a"]}, "a", True),
        (Api.COMPLETION, {"prompt": [1, 2]}, [1, 2], False),
        (Api.COMPLETION, {"prompt": [[1, 2]], "n": 1, "best_of": None}, [1, 2], True),
        (Api.GENERATE, {"text": "a", "sampling_params": {"n": 1}}, "a", False),
        (Api.GENERATE, {"text": ["a"], "sampling_params": [{}]}, "a", True),
        (Api.GENERATE, {"input_ids": [[7]], "stream": True}, [7], True),
    ],
)
def test_prompts_in_every_form(api: Api, body: dict[str, Any], prompt: object, listed: bool) -> None:
    """Text, ids, and a list with one of either."""
    request = parse(api, json.dumps(body).encode())
    assert (request.prompt, request.listed, request.stream) == (prompt, listed, body.get("stream", False))


def test_tenants_and_adapters_have_their_own_namespace() -> None:
    """Salt, extra key and adapter come from any of SGLang's fields."""
    body = HELLO | {"cache_salt": "s", "extra_key": ["k"], "model": "m:ada"}
    request = parse(Api.CHAT, json.dumps(body).encode())
    assert (request.cache_salt, request.partition) == ("s", "k/ada")
    assert parse(Api.CHAT, json.dumps(body | {"lora_path": "x"}).encode()).partition == "k/x"


@pytest.mark.parametrize(
    ("model", "known"), [(None, True), ("m", True), ("m:ada", True), ("default", True), ("o", False)]
)
def test_model_name(model: str | None, known: bool) -> None:
    """Unknown names are OpenAI's model_not_found."""
    request = parse(Api.CHAT, json.dumps(HELLO | {"model": model}).encode())
    if known:
        check_model(request, "m")
        return
    with pytest.raises(RequestError) as error:
        check_model(request, "m")
    assert (error.value.status, error.value.code, error.value.param) == (404, "model_not_found", "model")


def test_context_length_message_has_both_numbers() -> None:
    """The engine needs room for one token: a prompt as long as the context is too long."""
    check_length(4095, 4096)
    with pytest.raises(RequestError) as error:
        check_length(4096, 4096)
    assert error.value.code == "context_length_exceeded"
    assert "is 4096 tokens" in str(error.value)
    assert "has 4096 tokens" in str(error.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text() | st.just("rid"), JSON, max_size=5), st.sampled_from(["", " ", "\r\n\t"]))
def test_fields_are_appended_and_nothing_else_changes(body: dict[str, Any], tail: str) -> None:
    """The client's bytes stay in front, ours win when the client sent the same name."""
    raw = (json.dumps(body, ensure_ascii=False) + tail).encode("utf-8", "surrogatepass")
    fields = {"bootstrap_room": (1 << 63) - 1, "rid": "r"}
    result = with_fields(raw, empty=not body, fields=fields)
    assert result.startswith(raw.rstrip()[:-1])
    assert json.loads(result) == body | fields


def test_error_shape() -> None:
    """OpenAI's object, and its type for each status."""
    assert error_body("m", "t", code="c", param="p") == {
        "error": {"message": "m", "type": "t", "param": "p", "code": "c"}
    }
    assert [error_type(s) for s in (400, 429, 503)] == [
        "invalid_request_error",
        "rate_limit_error",
        "server_error",
    ]
