"""Model directories that can and cannot be served, and what a text model refuses in a chat."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders

from cache_service.core.blocks import block_hashes, event_namespace_seed
from cache_service.core.errors import ConfigError
from router.openai import Api, ParsedRequest, RequestError, parse
from router.template import ChatTemplate
from router.tokenize import PromptTokenizer, TokenizerPool
from tests.integration.router_support import write_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def configure(model: Path, **values: object) -> Path:
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return model


def encode(model: Path, api: Api, body: dict[str, Any]) -> list[int]:
    return PromptTokenizer(model).encode(parse(api, json.dumps(body).encode()))


def test_byte_tokens(model: Path) -> None:
    """One token for each byte; ids pass through; the chat is rendered first."""
    assert len(encode(model, Api.COMPLETION, {"prompt": "h\u00e9"})) == 3
    assert encode(model, Api.GENERATE, {"input_ids": [9, 8]}) == [9, 8]
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    assert len(encode(model, Api.CHAT, chat)) == len("user: hi\n") + len("assistant: ") + 2


def test_missing_tokenizer_file_is_said(tmp_path: Path) -> None:
    """A directory without tokenizer.json, no directory, a broken file."""
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json; only models with a fast tokenizer"):
        PromptTokenizer(tmp_path)
    with pytest.raises(ConfigError, match="is not a directory"):
        PromptTokenizer(tmp_path / "absent")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        PromptTokenizer(tmp_path)


def test_broken_side_files_are_said(model: Path) -> None:
    """A configuration that is no JSON object, a template that does not compile."""
    with pytest.raises(ConfigError, match="chat template does not compile"):
        PromptTokenizer(configure(model, chat_template="{% for %}"))
    for text in ("[]", "{"):
        (model / "tokenizer_config.json").write_text(text)
        with pytest.raises(ConfigError, match=r"tokenizer_config\.json"):
            PromptTokenizer(model)


def test_template_file_comes_first_and_default_of_several(model: Path) -> None:
    """chat_template.jinja wins over the configuration; of named templates "default" is used."""
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    named = [{"name": "rag", "template": "12345"}, {"name": "default", "template": "123"}]
    assert len(encode(configure(model, chat_template=named), Api.CHAT, chat)) == 3
    (model / "chat_template.jinja").write_text("1")
    assert len(encode(model, Api.CHAT, chat)) == 1


def test_model_without_template_refuses_chats_only(model: Path) -> None:
    """400 with the way out; plain prompts and given ids are served."""
    configure(model, chat_template=None)
    with pytest.raises(RequestError, match="no chat template"):
        encode(model, Api.CHAT, {"messages": [{"role": "user", "content": "hi"}]})
    assert encode(model, Api.CHAT, {"messages": [{}], "input_ids": [4]}) == [4]
    assert len(encode(model, Api.COMPLETION, {"prompt": "hi"})) == 2


@pytest.mark.parametrize(("flag", "added"), [(None, 1), (True, 1), (False, 0)])
def test_bos_follows_the_flag_for_llama(model: Path, flag: bool | None, added: int) -> None:
    """Plain prompts get one BOS unless switched off; chats never get a second one."""
    configure(model, tokenizer_class="LlamaTokenizerFast", add_bos_token=flag)
    assert len(encode(model, Api.COMPLETION, {"prompt": "hi"})) == 2 + added
    chat = {"messages": [{"role": "user", "content": "x"}], "continue_final_message": True}
    plain = len(encode(model, Api.CHAT, chat))
    chat["messages"] = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "ab"}]
    assert len(encode(model, Api.CHAT, chat)) == plain + 2


def test_tokens_named_only_in_the_configuration_are_added(model: Path) -> None:
    """Extra tokens and special tokens that tokenizer.json lacks."""
    extra = {"300": {"content": "<x>", "special": True}, "299": {"content": "<y>"}}
    configure(model, added_tokens_decoder=extra, eos_token={"content": "<e>"})
    assert len(encode(model, Api.COMPLETION, {"prompt": "<x><y><e>"})) == 3


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("hi", "messages[0]"),
        ({"role": "robot", "content": "x"}, "messages[0].role"),
        ({"content": "x"}, "messages[0].role"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages[0].content[0]",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0]"),
        ({"role": "user", "content": ["x"]}, "messages[0].content[0]"),
        ({"role": "assistant", "tool_calls": {}}, "messages[0].tool_calls"),
        ({"role": "assistant", "tool_calls": ["x"]}, "messages[0].tool_calls"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        ({"role": "system", "content": "x", "tools": 3}, "messages[0].tools"),
    ],
)
def test_messages_that_a_text_model_refuses(model: Path, message: object, param: str) -> None:
    """400 naming the place."""
    with pytest.raises(RequestError) as error:
        encode(model, Api.CHAT, {"messages": [message]})
    assert (error.value.status, error.value.param) == (400, param)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", "x"),
        ("tools", [{"function": {}}]),
        ("chat_template_kwargs", []),
        ("chat_template_kwargs", {"chat_template": "evil"}),
        ("chat_template_kwargs", {"messages": []}),
    ],
)
def test_template_arguments_that_are_refused(model: Path, field: str, value: object) -> None:
    """Wrong types, and a template from the request."""
    with pytest.raises(RequestError):
        encode(model, Api.CHAT, {"messages": [{"role": "user", "content": "x"}], field: value})


def test_templates_run_in_a_sandbox() -> None:
    """No way from a template to Python's internals, and no changes to its input."""
    body = {"messages": [{"role": "user", "content": "x"}]}
    for source in (
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no') }}",
    ):
        with pytest.raises(RequestError, match="chat template refused"):
            ChatTemplate(source, {}).render(body)
    year, _ = ChatTemplate("{{ strftime_now('%Y') }}", {}).render(body)
    assert year.isdigit()


def test_text_that_is_not_unicode_is_refused(model: Path) -> None:
    """A lone surrogate cannot be encoded: the client's mistake, not ours."""
    raw = b'{"prompt": "\\ud800"}'
    with pytest.raises(RequestError):
        PromptTokenizer(model).encode(parse(Api.COMPLETION, raw))


async def test_pool_works_beside_the_loop(model: Path) -> None:
    """While a prompt is worked on, the loop runs; pages are hashed behind the salt if there is one."""
    loop_ran = threading.Event()

    class Slow(PromptTokenizer):
        def encode(self, request: ParsedRequest) -> list[int]:
            assert loop_ran.wait(20), "the event loop was blocked"
            return super().encode(request)

    pool = TokenizerPool(Slow(model), 2, 1)
    task = asyncio.create_task(pool.prompt(parse(Api.COMPLETION, b'{"prompt": "hello"}')))
    asyncio.get_running_loop().call_soon(loop_ran.set)
    prompt = await task
    ids = encode(model, Api.COMPLETION, {"prompt": "hello"})
    assert (prompt.total_tokens, prompt.hashes) == (5, block_hashes(ids, 2))
    salted = await pool.prompt(parse(Api.COMPLETION, b'{"prompt": "hello", "cache_salt": "s"}'))
    assert salted.hashes == block_hashes(ids, 2, seed=event_namespace_seed("s"))
    pool.close()


def test_an_unknown_token_id_is_refused_by_name(model: Path) -> None:
    """An id past the embeddings would end a worker: 400 with the field and the range."""
    (model / "config.json").write_text('{"vocab_size": 300}')
    tokenizer = PromptTokenizer(model)
    for api, field in ((Api.COMPLETION, "prompt"), (Api.GENERATE, "input_ids")):
        body = {"model": "tiny", field: [1, 299]}
        assert tokenizer.encode(parse(api, json.dumps(body).encode())) == [1, 299]
        body[field] = [1, 300]
        with pytest.raises(RequestError, match=rf"{field}: token id 300 is not in 0\.\.299"):
            tokenizer.encode(parse(api, json.dumps(body).encode()))


@pytest.mark.parametrize("nested", [False, True])
def test_unknown_stop_token_ids_are_refused(model: Path, nested: bool) -> None:
    """The engine indexes its penalty rows with them: out of range would end a worker."""
    (model / "config.json").write_text('{"vocab_size": 300}')
    tokenizer = PromptTokenizer(model)

    def body(ids: object) -> bytes:
        where = {"sampling_params": {"stop_token_ids": ids}} if nested else {"stop_token_ids": ids}
        return json.dumps({"model": "tiny", "input_ids" if nested else "prompt": [1], **where}).encode()

    api = Api.GENERATE if nested else Api.COMPLETION
    assert tokenizer.encode(parse(api, body([299]))) == [1]
    for ids, message in (([300], r"stop_token_ids: token id 300"), (7, "stop_token_ids: expected an array")):
        with pytest.raises(RequestError, match=message):
            tokenizer.encode(parse(api, body(ids)))


def half_a_character(model: Path) -> int:
    """Return a token that is one byte of a longer character, for a tokenizer that decodes bytes."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(model / "tokenizer.json"))
    return next(i for i in range(256) if "\ufffd" in tokenizer.decode([i]))


def test_what_ends_an_answer(model: Path) -> None:
    """Stop tokens that are shown as text; special ones are not, and without a configuration nobody knows."""
    (model / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": [65, 256]}}))
    (model / "generation_config.json").write_text('{"eos_token_id": 66}')
    letters = PromptTokenizer(model)
    expected = {letters._tokenizer.decode([65]), letters._tokenizer.decode([66])}
    assert letters.ends == expected
    assert "<s>" not in expected
    (model / "config.json").write_text('{"vocab_size": 300}')
    assert PromptTokenizer(model).ends is None  # the model class may have a default
    (model / "config.json").write_text('{"eos_token_id": null}')
    (model / "generation_config.json").unlink()
    assert PromptTokenizer(model).ends == frozenset()
    (model / "config.json").write_text(f'{{"eos_token_id": {half_a_character(model)}}}')
    assert PromptTokenizer(model).ends is None
