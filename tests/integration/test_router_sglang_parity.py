"""Token ids of chats: the router against SGLang's own request model, template code and tokenizer loader.

SGLang is imported, no server is started. The templates cover the ways real ones differ: plain strings,
content parts, tools, thinking switches, a BOS token, refusals.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from router.openai import Api, RequestError, parse
from router.tokenize import PromptTokenizer
from tests.integration.router_support import CHAT, write_model

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

#: In the manner of Qwen's templates: tools as JSON, tool calls, reasoning, a generation block.
TOOLS = """
{%- if tools %}
{{- '<s>system\\n# Tools\\n' }}{% for tool in tools %}{{- tool | tojson }}
{% endfor %}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'assistant' and m.tool_calls %}
{{- '<s>assistant\\n' + m.content }}
        {%- for call in m.tool_calls %}
{{- '<call>' + call.function.name + ' ' + (call.function.arguments | tojson) + '</call>' }}
        {%- endfor %}
    {%- elif m.role == 'system' and not loop.first %}{{ raise_exception('system must come first') }}
    {%- else %}{% generation %}
{{- '<s>' + m.role + (' ' + m.name if m.name is defined else '') + '\\n' + m.content }}
    {% endgeneration %}{%- endif %}
    {%- if m.reasoning_content is defined %}{{ '[' ~ m.reasoning_content ~ ']' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<s>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think></think>' }}{% endif %}
{%- if reasoning_effort is defined %}{{ 'effort ' ~ reasoning_effort }}{% endif %}{% endif %}
"""
#: Content stays a list of parts when the template loops over it.
PARTS = """{{ bos_token }}{% for message in messages %}{{ message['role'] }}:
{%- if message['content'] is string %} {{ message['content'] }} {%- else %}{% for part in message['content']
| list %} [{{ part['type'] }}] {{ part.get('text', part) }}{% endfor %}{% endif %}
{% endfor %}"""
#: Wants tools without the OpenAI wrapper.
FLAT = """{% for t in tools or [] %}{{ t.name.upper() }}{% endfor %}
{% for m in messages %}{{ m.content }}{% endfor %}"""

USER = {"role": "user", "content": "H\u00e9llo, \u4e16\u754c <s>"}
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}},
}
OTHER = {"type": "function", "function": {"name": "sub", "description": "minus <b>", "strict": True}}
CALLS = [
    {
        "id": "c1",
        "type": "function",
        "function": {"name": "add", "arguments": '{"b": 1, "a": [2.50, "\u00e9"]}'},
    }
]
CHATS: dict[str, dict[str, Any]] = {
    "plain": {"messages": [USER]},
    "system": {"messages": [{"role": "SYSTEM", "content": "be brief"}, USER]},
    "text parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
        ]
    },
    "null content": {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": CALLS}, USER]},
    "tool result": {
        "messages": [
            USER,
            {"role": "assistant", "content": "", "tool_calls": CALLS},
            {
                "role": "tool",
                "tool_call_id": "c1",
                "content": [{"type": "text", "text": "3"}, {"type": "text", "text": "4"}],
            },
        ],
        "tools": [TOOL, OTHER],
    },
    "tools unused": {"messages": [USER], "tools": [TOOL], "tool_choice": "none"},
    "one tool chosen": {
        "messages": [USER],
        "tools": [TOOL, OTHER],
        "tool_choice": {"type": "function", "function": {"name": "sub"}},
    },
    "assistant last": {"messages": [USER, {"role": "assistant", "content": "I think"}]},
    "continued": {
        "messages": [USER, {"role": "assistant", "content": "I think"}],
        "continue_final_message": True,
    },
    "named": {"messages": [{"role": "system", "content": "x", "name": "bob"}, USER | {"name": "dropped"}]},
    "reasoning": {
        "messages": [USER, {"role": "assistant", "content": "a", "reasoning_content": "why"}, USER]
    },
    "effort none": {"messages": [USER], "reasoning_effort": "none"},
    "effort low": {"messages": [USER], "reasoning_effort": "low"},
    "reasoning object": {"messages": [USER], "reasoning": {"effort": "high"}},
    "switch": {"messages": [USER], "chat_template_kwargs": {"enable_thinking": False}},
    "given ids": {"messages": [USER], "input_ids": [1, 2, 3]},
    "refused": {"messages": [USER, {"role": "system", "content": "late"}]},
    "bad arguments": {
        "messages": [
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
            USER,
        ]
    },
}
TEMPLATES = {"chat": CHAT, "tools": TOOLS, "parts": PARTS, "flat": FLAT}


@pytest.fixture(scope="module", params=[*TEMPLATES, "chat with bos"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A model directory with one of the templates, and SGLang's chat server object on it (no engine)."""
    from prfaas_sglang.cpu.environment import make_torchvision_importable

    make_torchvision_importable()
    from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
    from sglang.srt.parser.template_manager import TemplateManager
    from sglang.srt.utils.hf_transformers.tokenizer import get_tokenizer

    path = write_model(tmp_path_factory.mktemp("model") / "tiny")
    config = json.loads((path / "tokenizer_config.json").read_text())
    config["chat_template"] = TEMPLATES[request.param.partition(" ")[0]]
    if request.param.endswith("bos"):
        config["tokenizer_class"] = "LlamaTokenizerFast"
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = get_tokenizer(str(path))
    manager = SimpleNamespace(tokenizer=tokenizer, processor=None, served_model_name="tiny")
    templates = TemplateManager()
    templates.load_chat_template(manager, None, str(path))
    chat = OpenAIServingChat.__new__(OpenAIServingChat)
    for name, value in {
        "tokenizer_manager": manager,
        "template_manager": templates,
        "tool_call_parser": None,
        "reasoning_parser": None,
        "default_chat_template_kwargs": {},
        "_reasoning_detector": None,
        "is_gpt_oss": False,
        "is_gemma4": False,
        "chat_encoding_spec": None,
        "_tokenizer_auto_adds_specials": len(tokenizer.encode("")) > 0,
        "_prompt_text_round_trip_is_lossy": False,
        "_chat_template_cache": {},
    }.items():
        setattr(chat, name, value)
    return path, chat


@pytest.mark.parametrize("name", CHATS)
def test_chat_ids_equal_sglang(models: tuple[Path, Any], name: str) -> None:
    """The same ids, or both refuse."""
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

    path, chat = models
    body = CHATS[name] | {"model": "tiny"}
    ours: list[int] | None
    try:
        ours = PromptTokenizer(path).encode(parse(Api.CHAT, json.dumps(body).encode()))
    except RequestError:
        ours = None
    try:
        theirs = chat._process_messages(
            ChatCompletionRequest(**json.loads(json.dumps(body))), False
        ).prompt_ids
    except ValueError:
        theirs = None
    assert ours == theirs


@pytest.mark.parametrize("text", ["plain", "<s> in the text", "\u4e16\u754c\n\n  x ", "a" * 1000])
def test_completion_ids_equal_sglang(models: tuple[Path, Any], text: str) -> None:
    """Plain prompts are encoded with the tokenizer's special tokens, in both."""
    path, chat = models
    request = parse(Api.COMPLETION, json.dumps({"prompt": text}).encode())
    assert PromptTokenizer(path).encode(request) == chat.tokenizer_manager.tokenizer([text])["input_ids"][0]
