"""The first token from prefill and the rest from decode make the stream that decode alone would have sent."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.core.join import FirstToken, Mismatch, Rest
from router.core.sse import SseParser
from router.openai import Api

APIS = list(Api)
TOKENS = st.lists(st.text(st.sampled_from('abc é\n"{}漢'), min_size=1, max_size=4), min_size=1, max_size=8)


def logprobs(api: str, tokens: list[str]) -> dict[str, Any]:
    if api == "chat":
        return {"content": [{"token": t, "logprob": -len(t)} for t in tokens]}
    return {"tokens": tokens, "token_logprobs": [-len(t) for t in tokens], "text_offset": [-1] * len(tokens)}


def stream(
    api: str, groups: list[list[str]], *, ident: str, created: int, finish: str, with_logprobs: bool
) -> list[bytes]:
    """Return the events of a stream that emits `groups` of tokens, as SGLang does."""
    events: list[Any] = []
    head = {"id": ident, "object": "x", "created": created, "model": "m"}
    told: list[str] = []
    if api == "chat":
        delta = {"role": "assistant", "content": ""}
        events.append(
            {**head, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}]}
        )
    for i, group in enumerate(groups):
        last = i + 1 == len(groups)
        told += group
        probs = logprobs(api, group) if with_logprobs else None
        text = "".join(group)
        if api == "generate":
            meta = {
                "id": ident,
                "finish_reason": {"type": finish} if last else None,
                "completion_tokens": len(told),
            }
            events.append({"text": "".join(told), "output_ids": list(range(len(told))), "meta_info": meta})
        elif api == "chat":
            choice = {"index": 0, "delta": {"content": text}, "logprobs": probs, "finish_reason": None}
            events.append({**head, "choices": [choice]})
        else:
            choice = {"index": 0, "text": text, "logprobs": probs, "finish_reason": finish if last else None}
            if with_logprobs:
                choice["token_ids"] = [ord(t[0]) for t in group]
                choice["prompt_token_ids"] = [1, 2] if i == 0 else None
            events.append({**head, "choices": [choice], "usage": None})
    if api == "chat":
        events.append(
            {**head, "choices": [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": finish}]}
        )
    if api != "generate":
        events.append({**head, "choices": [], "usage": {"completion_tokens": len(told)}})
    if api == "chat":  # stamped one by one, and the clock goes on
        events = [event | {"created": created + i} for i, event in enumerate(events)]
    return [*(json.dumps(e).encode() for e in events), b"[DONE]"]


def seen(api: str, events: list[bytes]) -> tuple[dict[str, Any], set[Any]]:
    """Return what a client makes of a stream, and the ids and time stamps of its events."""
    text, probs, finish, roles, usage, heads = "", [], None, 0, None, set()
    ids: list[int] = []
    prompts = 0
    assert events[-1] == b"[DONE]"
    for event in events[:-1]:
        value = json.loads(event)
        if api == "generate":
            assert value["text"].startswith(text)
            text, finish = value["text"], value["meta_info"]["finish_reason"]
            usage = value["meta_info"]["completion_tokens"]
            heads.add(value["meta_info"]["id"])
            continue
        heads.add((value["id"], value["created"]))
        if not value["choices"]:
            usage = value["usage"]
            continue
        (choice,) = value["choices"]
        finish = choice["finish_reason"] or finish
        roles += "role" in choice.get("delta", {})
        text += (choice["delta"].get("content") or "") if api == "chat" else choice["text"]
        ids += choice.get("token_ids") or []
        prompts += choice.get("prompt_token_ids") is not None
        if choice["logprobs"]:
            probs += choice["logprobs"]["content"] if api == "chat" else choice["logprobs"]["tokens"]
    return {
        "text": text,
        "logprobs": probs,
        "ids": (ids, prompts),
        "finish": finish,
        "roles": roles,
        "usage": usage,
    }, heads


@settings(max_examples=300)
@given(st.sampled_from(APIS), TOKENS, st.integers(0, 1 << 30), st.booleans(), st.booleans())
def test_the_client_sees_decodes_stream(
    api: str, tokens: list[str], seed: int, with_logprobs: bool, other_attempt: bool
) -> None:
    """However decode groups its tokens: same text, logprobs, usage, end; one role, one id."""
    rng = random.Random(seed)
    groups, rest = [], tokens[:]
    while rest:
        size = rng.randint(1, len(rest))
        groups.append(rest[:size])
        rest = rest[size:]
    prefill = stream(api, [tokens[:1]], ident="r", created=5, finish="length", with_logprobs=with_logprobs)
    decode = stream(
        api,
        groups,
        ident="s" if other_attempt else "r",
        created=5 + rng.randint(0, 1),
        finish=rng.choice(["length", "stop"]),
        with_logprobs=with_logprobs,
    )
    first = FirstToken(api)
    early = b"".join(first.feed(event) for event in prefill)
    assert early
    assert first.text == tokens[0]
    after = Rest(api, first.text, first.ident, first.created)
    joined = SseParser().feed(early + b"".join(after.feed(event) for event in decode))
    found, heads = seen(api, joined)
    assert found == seen(api, decode)[0]
    assert len(heads) == 1


def test_what_a_model_writes_is_no_time_stamp() -> None:
    """Only the event's own stamp is replaced."""
    text = 'a{"created": 7}'
    rest = Rest("chat", "a", "r", 5)
    events = stream("chat", [["a"], [text]], ident="r", created=9, finish="stop", with_logprobs=False)
    joined = SseParser().feed(b"".join(map(rest.feed, events)))
    found, heads = seen("chat", joined)
    assert found["text"] == text
    assert heads == {("r", 5)}


@pytest.mark.parametrize("api", APIS)
def test_another_first_token_is_noticed(api: str) -> None:
    """A sampled retry that begins differently, or ends at once, is not glued to what was sent."""
    for groups in ([["b"], ["c"]], [[""]]):
        rest = Rest(api, "a")
        events = stream(api, groups, ident="r", created=1, finish="stop", with_logprobs=False)
        with pytest.raises(Mismatch):
            b"".join(map(rest.feed, events))


@pytest.mark.parametrize(
    ("text", "stops", "reason"),
    [
        ("", [], "no_text"),
        ("ab\ufffd", [], "half_character"),
        ("xabc", ["ab"], "stop_string"),
        ("xa", ["ab"], "stop_string"),
        ("x", ["ab", "xyz"], "stop_string"),
        ("xb", ["ab"], ""),
        ("a b", ["ab"], ""),
    ],
)
@pytest.mark.parametrize("api", APIS)
def test_a_token_that_decode_might_not_emit_is_held(
    api: str, text: str, stops: list[str], reason: str
) -> None:
    """The end of the answer, half a character, and whatever may belong to a stop string."""
    first = FirstToken(api, stops)
    events = stream(api, [[text]], ident="r", created=1, finish="length", with_logprobs=False)
    assert bool(b"".join(first.feed(event) for event in events)) == (not reason)
    assert first.reason.replace("finished", "no_text") == reason


@given(st.sampled_from(APIS), st.binary(max_size=60), st.text(max_size=3))
def test_garbage_from_a_worker_never_breaks_the_join(api: str, data: bytes, left: str) -> None:
    """Bytes that are no event of ours pass, or are refused by name."""
    assert FirstToken(api).feed(data) == b""
    try:
        Rest(api, left).feed(data)
    except Mismatch:
        assert left


@pytest.mark.parametrize(
    ("text", "ends", "echo", "held"),
    [
        ("</s>", ["</s>"], "", True),
        (" end", ["end"], "", True),  # alone, the token has no space
        ("x", ["end"], "prompt ", False),
        ("end", ["end"], "prompt ", True),
        ("x", None, "", True),
        ("x", [], "", False),
    ],
)
def test_a_token_that_may_end_the_answer_is_held(
    text: str, ends: list[str] | None, echo: str, held: bool
) -> None:
    """Decode trims it, prefill does not."""
    first = FirstToken("completion", (), ends)
    events = stream("completion", [[echo + text]], ident="r", created=1, finish="length", with_logprobs=False)
    assert bool(b"".join(map(first.feed, events))) != held
    assert first.reason == ("stop_token" if held else "")


def test_the_prompts_logprobs_are_not_told_early() -> None:
    """Prefill has them, decode's stream does not."""
    meta = {"id": "r", "finish_reason": {"type": "length"}, "input_token_logprobs": [[-1.0, 3, None]]}
    event = {"text": "a", "output_ids": [1], "meta_info": meta}
    sent = FirstToken("generate").feed(json.dumps(event).encode())
    assert json.loads(sent[6:])["meta_info"]["input_token_logprobs"] == []
