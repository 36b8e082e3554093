"""What is read from answers as they pass, in all the shapes that the engine has."""

from __future__ import annotations

import json

import pytest

from router.answers import Facts, StreamWatch, error_of, facts_of, message_of


@pytest.mark.parametrize(
    ("answer", "facts"),
    [
        ({"usage": {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 8}}}, Facts(9, 8)),
        ({"usage": {"prompt_tokens": 9, "prompt_tokens_details": None}}, Facts(9, None)),
        ({"usage": None, "choices": []}, Facts()),
        ({"text": "x", "meta_info": {"prompt_tokens": 5, "cached_tokens": 0}}, Facts(5, 0)),
        ([{"meta_info": {"prompt_tokens": 5, "cached_tokens": 4}}], Facts(5, 4)),
        ([], Facts()),
        ("text", Facts()),
        ({"usage": "lots"}, Facts()),
    ],
)
def test_facts(answer: object, facts: Facts) -> None:
    """Usage, meta_info, a batch of one, and things that are neither."""
    assert facts_of(json.dumps(answer).encode()) == facts


@pytest.mark.parametrize(
    ("event", "status", "message"),
    [
        ({"error": {"message": "no", "code": 503}}, 503, "no"),
        ({"error": {"message": "no", "code": "odd"}}, 500, "no"),
        ({"error": "no"}, 500, "no"),
        (
            {"meta_info": {"finish_reason": {"type": "abort", "status_code": 400, "message": "bad"}}},
            400,
            "bad",
        ),
        ({"meta_info": {"finish_reason": {"type": "abort", "message": "gone"}}}, 500, "gone"),
    ],
)
def test_errors_in_events(event: object, status: int, message: str) -> None:
    """The engine's three ways to fail inside a stream."""
    error = error_of(json.dumps(event).encode())
    assert error is not None
    assert (error.status, error.message) == (status, message)


@pytest.mark.parametrize(
    "data", [b"[DONE]", b"{}", b'{"error": null}', b'{"meta_info": {"finish_reason": {"type": "stop"}}}']
)
def test_ordinary_events_are_no_errors(data: bytes) -> None:
    """Among them the finish reason of an ordinary end."""
    assert error_of(data) is None


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "a"}}', "a"),
        (b'{"object": "error", "message": "b"}', "b"),
        (b'{"detail": "c"}', "c"),
        (b'{"detail": [{"msg": "d"}]}', "[{'msg': 'd'}]"),
        (b"Internal Server Error", "Internal Server Error"),
        (b"\xff", "\ufffd"),
    ],
)
def test_words_of_an_error_answer(body: bytes, message: str) -> None:
    """Ours, SGLang's, FastAPI's, and plain text."""
    assert message_of(body) == message


def test_the_tail_of_a_stream_holds_the_usage() -> None:
    """The last events are remembered, however long the stream was."""
    watch = StreamWatch()
    for n in range(100):
        watch.feed(b'data: {"choices": [%d]}\n\n' % n)
    watch.feed(b'data: {"usage": {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}}\n\n')
    assert watch.feed(b"data: [DONE]\n\n") == [b"[DONE]"]
    assert watch.facts() == Facts(3, 2)
    assert watch.error() is None
    watch.feed(b'data: {"error": {"message": "late"}}\n\n')
    late = watch.error()
    assert late is not None
    assert late.message == "late"


def test_an_endless_event_blinds_the_watch_only() -> None:
    """Beyond the limit nothing is remembered and nothing raises: the stream goes on."""
    watch = StreamWatch()
    piece = b"x" * (1 << 20)
    for _ in range(9):
        watch.feed(piece)
    assert watch.blind
    assert watch.feed(b"\n\ndata: y\n\n") == []
