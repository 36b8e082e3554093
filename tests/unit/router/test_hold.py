"""Which streams may have their first token from prefill, by the request and by the workers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from router.core.hold import Traits, hold_reason, ignores_end, stop_strings, worker_reason
from router.openai import Api

ROOM = 1000
PLAIN = Traits(
    max_total_num_tokens=4096,
    page_size=64,
    incremental_streaming_output=False,
    reasoning_parser=None,
    preferred_sampling_params=None,
    chat_template=None,
)


@pytest.mark.parametrize(
    ("api", "body", "reason"),
    [
        (Api.CHAT, {}, "not_streamed"),
        (Api.CHAT, {"stream": True}, ""),
        (Api.CHAT, {"stream": True, "n": 2}, "several_answers"),
        (Api.CHAT, {"stream": True, "tools": [{}]}, "tools"),
        (Api.CHAT, {"stream": True, "tools": [{}], "tool_choice": "none"}, ""),
        (Api.COMPLETION, {"stream": True, "stop_token_ids": [3]}, "stop_condition"),
        (Api.COMPLETION, {"stream": True, "skip_special_tokens": False}, "special_tokens"),
        (Api.GENERATE, {"stream": True}, "several_answers"),
        (Api.GENERATE, {"stream": True, "sampling_params": {"stop_regex": "a+"}}, "stop_condition"),
        (Api.GENERATE, {"stream": True, "sampling_params": {}}, ""),
    ],
)
def test_requests_whose_first_token_is_decodes(api: str, body: dict[str, Any], reason: str) -> None:
    """What the request asks for decides before anything is sent."""
    assert hold_reason(api, body, ROOM) == reason


def test_stop_strings_of_both_shapes() -> None:
    """A string, a list, or native sampling parameters; nonsense is left to the worker."""
    assert stop_strings(Api.CHAT, {"stop": "a"}) == ["a"]
    assert stop_strings(Api.COMPLETION, {"stop": ["a", "", 3]}) == ["a"]
    assert stop_strings(Api.GENERATE, {"sampling_params": {"stop": ["b"]}}) == ["b"]
    assert stop_strings(Api.GENERATE, {"sampling_params": [1]}) == []
    assert stop_strings(Api.CHAT, {"stop": 5}) == []


@pytest.mark.parametrize(
    ("api", "body", "reason"),
    [
        (Api.CHAT, {"messages": [{"role": "system", "tools": [{}]}]}, "tools"),
        (Api.CHAT, {"max_completion_tokens": 0}, "no_room"),
        (Api.GENERATE, {"sampling_params": {"max_new_tokens": 0}}, "no_room"),
        (Api.CHAT, {"response_format": {"type": "json_object"}}, "grammar"),
        (Api.CHAT, {"response_format": {"type": "text"}}, ""),
        (Api.COMPLETION, {"response_format": "json"}, "grammar"),
        (Api.COMPLETION, {"regex": "a+"}, "field"),
        (Api.GENERATE, {"sampling_params": {"json_schema": "{}"}}, "field"),
        (Api.GENERATE, {"sampling_params": {}, "return_hidden_states": True}, "field"),
        (Api.GENERATE, {"sampling_params": {}, "return_hidden_states": False, "token_ids_logprob": None}, ""),
        (Api.GENERATE, {"sampling_params": {}, "token_ids_logprob": [3]}, "field"),
        (Api.GENERATE, {"sampling_params": {}, "top_logprobs_num": 129}, "logprobs"),
        (Api.COMPLETION, {"echo": True, "logprobs": 0}, "logprobs"),
        (Api.COMPLETION, {"echo": True, "temperature": 0, "return_token_ids": True}, ""),
        (Api.CHAT, {"a_field_of_tomorrow": 1}, "field"),
    ],
)
def test_what_decode_treats_differently_is_held(api: str, body: dict[str, Any], reason: str) -> None:
    """Grammars, logprobs that only prefill has, and every field that nobody has looked at."""
    assert hold_reason(api, {"stream": True, **body}, ROOM) == reason


def test_a_prompt_that_fills_the_context_is_held() -> None:
    """There decode may clip the answer to nothing."""
    assert hold_reason(Api.COMPLETION, {"stream": True}, 15) == "no_room"
    assert hold_reason(Api.COMPLETION, {"stream": True}, 16) == ""


@pytest.mark.parametrize(
    ("api", "body", "change", "reason"),
    [
        (Api.CHAT, {}, {}, ""),
        (Api.CHAT, {}, {"reasoning_parser": "qwen3"}, "reasoning_parser"),
        (Api.CHAT, {"separate_reasoning": False}, {"reasoning_parser": "qwen3"}, ""),
        (Api.COMPLETION, {}, {"reasoning_parser": "qwen3"}, ""),
        (Api.CHAT, {}, {"chat_template": "llama-2"}, "server_defaults"),
        (Api.CHAT, {}, {"chat_template": "/models/chat.jinja"}, ""),
        (Api.COMPLETION, {}, {"preferred_sampling_params": {"stop": ["x"]}}, "server_defaults"),
        (Api.GENERATE, {}, {"incremental_streaming_output": True}, "incremental"),
        (Api.COMPLETION, {}, {"incremental_streaming_output": True}, ""),
        (Api.COMPLETION, {}, {"max_total_num_tokens": 200}, "no_room"),
    ],
)
def test_what_the_workers_tell_of_themselves(
    api: str, body: dict[str, Any], change: dict[str, Any], reason: str
) -> None:
    """Either worker's flags can hold the token back."""
    other = replace(PLAIN, **change)
    assert worker_reason(api, body, 100, other, other) == reason
    if reason != "no_room":  # which is decode's alone
        assert worker_reason(api, body, 100, other, PLAIN) == reason
    assert worker_reason(api, body, 100, PLAIN, other) == reason
    assert worker_reason(api, body, 100, None, PLAIN) == "worker_unknown"
    assert worker_reason(api, body, 100, PLAIN, None) == "worker_unknown"


def test_who_ignores_the_end() -> None:
    """Only an outright true counts."""
    assert ignores_end(Api.CHAT, {"ignore_eos": True})
    assert ignores_end(Api.GENERATE, {"sampling_params": {"ignore_eos": True}})
    assert not ignores_end(Api.GENERATE, {"ignore_eos": True, "sampling_params": {}})
    assert not ignores_end(Api.GENERATE, {"sampling_params": None})
    assert not ignores_end(Api.CHAT, {"ignore_eos": 1})
