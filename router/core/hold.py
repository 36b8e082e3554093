"""Whether the first token of a stream may come from prefill: what the request and the workers say about it.

Sent early is only what decode's own stream is sure to begin with. A field of the request that this file does
not know holds the token back, so does anything unusual about the workers. Rests on SGLang 0.5.21: prefill
answers one token with finish reason "length" and looks neither at stop conditions nor at a grammar; decode
applies both to the same token (Req.update_finish_state), trims the stop token from the text, and holds text
back that a stop string may begin with. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: Request shapes (the values of openai.Api).
CHAT, COMPLETION, GENERATE = "chat", "completion", "generate"
#: Decode clips max_new_tokens to what is left, in the end to 0: then it drops the token that prefill sampled.
ROOM_TOKENS = 16
#: Alternatives for one token that the engine's metadata buffer carries from prefill to decode.
_MAX_ALTERNATIVES = 128

_SAMPLING = frozenset(
    "temperature top_p top_k min_p frequency_penalty presence_penalty repetition_penalty logit_bias n "
    "min_tokens min_new_tokens max_tokens max_completion_tokens max_new_tokens seed sampling_seed stop "
    "ignore_eos skip_special_tokens spaces_between_special_tokens stream_interval".split()
)
_COMMON = frozenset(
    "model stream stream_options user metadata rid lora_path extra_key cache_salt priority session_id "
    "return_cached_tokens_details custom_logit_processor response_format".split()
)
_OF_API = {
    CHAT: frozenset(
        "messages input_ids tools tool_choice parallel_tool_calls logprobs top_logprobs reasoning_effort "
        "separate_reasoning stream_reasoning chat_template_kwargs continue_final_message store service_tier "
        "return_input_ids_in_sglext return_output_ids_in_sglext".split()
    )
    | _SAMPLING,
    COMPLETION: frozenset("prompt echo best_of logprobs return_token_ids".split()) | _SAMPLING,
    GENERATE: frozenset(
        "text input_ids sampling_params return_logprob logprob_start_len top_logprobs_num "
        "return_text_in_logprobs return_prompt_token_ids log_metrics".split()
    ),
}


@dataclass(frozen=True, slots=True)
class Traits:
    """What a worker tells of itself (GET /server_info), as far as it shapes a stream.

    Attributes:
        max_total_num_tokens: KV that fits, tokens.
        page_size: tokens per page.
        preferred_sampling_params: the server's own defaults, where a stop condition may be.
        chat_template: name or file; one of SGLang's own names brings stop strings with it.
    """

    max_total_num_tokens: int
    page_size: int
    incremental_streaming_output: bool
    reasoning_parser: str | None
    preferred_sampling_params: Any
    chat_template: str | None


def hold_reason(api: str, body: Mapping[str, Any], room_tokens: int) -> str:
    """Return why this request's first token must come from decode, "" when it need not.

    Args:
        room_tokens: context length less the prompt.
    """
    if not body.get("stream"):
        return "not_streamed"
    sampling = body.get("sampling_params") if api == GENERATE else body
    if not isinstance(sampling, dict) or sampling.get("n") not in (None, 1):
        return "several_answers"
    if sampling.get("stop_token_ids") or sampling.get("stop_regex") or sampling.get("no_stop_trim"):
        return "stop_condition"
    if sampling.get("skip_special_tokens") is False:
        return "special_tokens"
    if body.get("tools") and body.get("tool_choice") != "none":
        return "tools"  # text is held back by the tool parser
    if api == CHAT and any(isinstance(m, dict) and m.get("tools") for m in body.get("messages") or ()):
        return "tools"  # SGLang reads them there too
    if any(sampling.get(k) == 0 for k in ("max_tokens", "max_completion_tokens", "max_new_tokens")):
        return "no_room"
    if room_tokens < ROOM_TOKENS:
        return "no_room"
    if not _plain_format(body.get("response_format")):
        return "grammar"
    if _alternatives(body) > _MAX_ALTERNATIVES or (body.get("echo") and body.get("logprobs") is not None):
        return "logprobs"  # what prefill has and decode does not
    known = _OF_API[api] | _COMMON
    if api == GENERATE and not _asked(sampling) <= _SAMPLING:
        return "field"
    return "" if _asked(body) <= known else "field"


def _asked(fields: Mapping[str, Any]) -> set[str]:
    """Return the fields that ask for something."""
    return {key for key, value in fields.items() if value is not None and value is not False}


def _plain_format(value: object) -> bool:
    return value is None or (isinstance(value, dict) and value.get("type") == "text")


def _alternatives(body: Mapping[str, Any]) -> int:
    asked = [body.get(key) for key in ("logprobs", "top_logprobs", "top_logprobs_num")]
    return max((n for n in asked if type(n) is int), default=0)


def worker_reason(
    api: str, body: Mapping[str, Any], prompt_tokens: int, prefill: Traits | None, decode: Traits | None
) -> str:
    """Return why these workers' first token must come from decode, "" when it need not; None: not known."""
    if prefill is None or decode is None:
        return "worker_unknown"
    both = (prefill, decode)
    if any(t.preferred_sampling_params for t in both):
        return "server_defaults"
    # the template's own stop strings; a file's are in the template's text
    if api == CHAT and any(t.chat_template and "." not in t.chat_template for t in both):
        return "server_defaults"
    # what begins like a marker is held back by decode, and flushed at the end of prefill's one token
    if api == CHAT and body.get("separate_reasoning") is not False and any(t.reasoning_parser for t in both):
        return "reasoning_parser"
    if api == GENERATE and any(t.incremental_streaming_output for t in both):
        return "incremental"  # a first event of several tokens cannot be told from a cumulative one
    pages = -(-prompt_tokens // decode.page_size) + 1
    if decode.max_total_num_tokens - pages * decode.page_size < ROOM_TOKENS:
        return "no_room"
    return ""


def stop_strings(api: str, body: Mapping[str, Any]) -> list[str]:
    """Return the request's stop strings."""
    sampling = body.get("sampling_params") if api == GENERATE else body
    stop = sampling.get("stop") if isinstance(sampling, dict) else None
    found = [stop] if isinstance(stop, str) else stop if isinstance(stop, list) else []
    return [s for s in found if isinstance(s, str) and s]


def ignores_end(api: str, body: Mapping[str, Any]) -> bool:
    """True when no token ends the answer."""
    sampling = body.get("sampling_params") if api == GENERATE else body
    return isinstance(sampling, dict) and sampling.get("ignore_eos") is True
