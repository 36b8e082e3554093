"""Render a chat request to the prompt text that the engine would compute from the same body.

Decides how messages, tools and template arguments reach the model's chat template. The engine renders it
again from the client's body; a difference costs a wrong cache match, never a wrong answer. Rests on SGLang
0.5.21 (entrypoints/openai/serving_chat.py `_process_messages`, `_apply_jinja_template`;
parser/jinja_template_utils.py) and on transformers' chat template environment
(utils/chat_template_utils.py): an immutable sandbox with trim_blocks, lstrip_blocks, loop controls, a
`generation` block, `tojson`, `raise_exception`, `strftime_now`.

Must not run code from a request: templates come from the model directory only, and a request's own
`chat_template` is refused.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from cache_service.core.errors import ConfigError
from router.openai import RequestError

_GENERIC_ROLES = ("system", "assistant", "tool", "function", "developer", "latest_reminder")
_GENERIC_FIELDS = ("tool_call_id", "name", "phase", "reasoning_content")
_TEXT_PARTS = ("text", "input_text")
_LOOPED_NAMES = ("message", "msg", "m")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: marks assistant text for training; renders its body."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it as an instance attribute

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def tojson(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


class ChatTemplate:
    """The model's chat template, compiled once; `render` may be called from several threads."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        """Compile `source`; `special_tokens` (bos_token, eos_token, ...) are visible to it.

        Raises ConfigError when the template cannot be compiled.
        """
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            tree = environment.parse(source)
        except jinja2.exceptions.TemplateError as error:
            raise ConfigError(f"model.path: the chat template does not compile: {error}") from error
        self._special_tokens = special_tokens
        self._parts_kept = _wants_parts(source, tree)

    def render(self, body: dict[str, Any]) -> tuple[str, str]:
        """Return (prompt text, assistant prefix to continue or "") of a chat body.

        Raises RequestError (400) naming the field when the messages are not what a text model accepts, or
        with the template's own words when it refuses them.
        """
        messages = [
            self._message(message, f"messages[{index}]") for index, message in enumerate(body["messages"])
        ]
        prefix = ""
        if messages[-1]["role"] == "assistant" and isinstance(messages[-1]["content"], str):
            if body.get("continue_final_message"):
                prefix = messages.pop()["content"]
            else:  # SGLang asks again with the assistant's words as the user's
                messages[-1] = {"role": "user", "content": messages[-1]["content"]}
        arguments = _template_arguments(body)
        tools = _tools(body)
        try:
            return self._fill(messages, tools, arguments), prefix
        except Exception as error:
            if not tools:
                raise _refused(error) from error
        try:
            return self._fill(messages, [tool["function"] for tool in tools], arguments), prefix
        except Exception as error:
            raise _refused(error) from error

    def _fill(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, arguments: dict[str, Any]
    ) -> str:
        fixed = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": True}
        clash = fixed.keys() & arguments.keys() - {"documents"}
        if clash:
            raise TypeError(f"chat_template_kwargs must not set {', '.join(sorted(clash))}")
        return self._template.render({**fixed, **self._special_tokens, **arguments})

    def _message(self, message: object, path: str) -> dict[str, Any]:
        """Return one message as SGLang hands it to the template: known fields only, in its order."""
        if not isinstance(message, dict):
            raise RequestError(400, f"{path}: expected an object", param=path)
        role = message.get("role")
        if role != "user":
            role = role.lower() if isinstance(role, str) else role
            if role not in _GENERIC_ROLES:
                raise RequestError(
                    400,
                    f"{path}.role: expected one of user, {', '.join(_GENERIC_ROLES)}, got {role!r:.40}",
                    param=f"{path}.role",
                )
        content = self._content(message.get("content"), f"{path}.content")
        if role == "tool" and isinstance(content, list) and all(p.get("type") == "text" for p in content):
            content = " ".join(part["text"] for part in content)
        result: dict[str, Any] = {"role": role, "content": content}
        if role == "user":
            return result
        result |= {key: message[key] for key in _GENERIC_FIELDS if message.get(key) is not None}
        if message.get("tool_calls") is not None:
            result["tool_calls"] = _tool_calls(message["tool_calls"], role, f"{path}.tool_calls")
        if message.get("tools") is not None:
            result["tools"] = _tool_list(message["tools"], f"{path}.tools")
        return result

    def _content(self, content: object, path: str) -> str | list[dict[str, Any]]:
        if content is None:
            return ""
        if isinstance(content, str):
            return content
        if not isinstance(content, list):
            raise RequestError(400, f"{path}: expected a string or an array of text parts", param=path)
        parts: list[dict[str, Any]] = []
        for index, part in enumerate(content):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
                parts.append({"type": "text", "text": part["text"]})
            elif kind == "tool_reference":
                parts.append(part)
            elif kind != "thinking":  # which SGLang drops
                raise RequestError(
                    400,
                    f"{path}[{index}]: this model takes text only; expected "
                    '{"type": "text", "text": "..."}, got type ' + f"{kind!r:.40}",
                    param=f"{path}[{index}]",
                )
        if self._parts_kept:
            return parts
        return " ".join(part["text"] for part in parts if part["type"] == "text")


def _refused(error: Exception) -> RequestError:
    return RequestError(400, f"messages: the model's chat template refused them: {error}", param="messages")


def _tool_calls(calls: object, role: str, path: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise RequestError(400, f"{path}: expected an array", param=path)
    result = []
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise RequestError(400, f"{path}[{index}].function: expected an object", param=path)
        arguments = function.get("arguments")
        if role == "assistant" and isinstance(arguments, str):
            arguments = _json_object(arguments, f"{path}[{index}].function.arguments")
        result.append(
            {
                "id": call.get("id"),
                "index": call.get("index"),
                "type": "function",
                "function": {"name": function.get("name"), "arguments": arguments},
            }
        )
    return result


def _json_object(text: str, path: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise RequestError(400, f"{path}: is not valid JSON: {error}", param=path) from error
    if not isinstance(value, dict):
        raise RequestError(400, f"{path}: must hold a JSON object", param=path)
    return value


def _tool_list(tools: object, path: str) -> list[dict[str, Any]]:
    """Return tools as SGLang's `Tool.model_dump()` does: its fields, its order, its defaults."""
    if not isinstance(tools, list):
        raise RequestError(400, f"{path}: expected an array", param=path)
    result = []
    for index, tool in enumerate(tools):
        given = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(given, dict) or not isinstance(given.get("name"), str):
            raise RequestError(400, f"{path}[{index}].function.name: expected a string", param=path)
        deferred = tool.get("defer_loading")
        function = {
            "description": given.get("description"),
            "name": given["name"],
            "parameters": given.get("parameters"),
            "strict": given.get("strict", False),
        }
        own = given.get("defer_loading")
        if own is not None or deferred is not None:
            function["defer_loading"] = deferred if own is None else own
        result.append({"type": tool.get("type", "function"), "function": function, "defer_loading": deferred})
    return result


def _tools(body: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Return the tools that the template sees, None for none (`tool_choice` decides)."""
    if body.get("tools") is None:
        return None
    tools, choice = _tool_list(body["tools"], "tools"), body.get("tool_choice")
    if choice == "none" or not tools:
        return None
    if isinstance(choice, dict):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        return [tool for tool in tools if tool["function"]["name"] == name] or None
    return tools


def _template_arguments(body: dict[str, Any]) -> dict[str, Any]:
    """Return what SGLang passes to the template beside messages and tools."""
    given = body.get("chat_template_kwargs")
    if given is not None and not isinstance(given, dict):
        raise RequestError(400, "chat_template_kwargs: expected an object", param="chat_template_kwargs")
    given = dict(given or {})
    if "chat_template" in given:
        raise RequestError(
            400, "chat_template_kwargs.chat_template: is not accepted", param="chat_template_kwargs"
        )
    effort, thinking = body.get("reasoning_effort"), None
    reasoning = body.get("reasoning")
    if isinstance(reasoning, dict):
        wanted = reasoning.get("effort", reasoning.get("reasoning_effort"))
        effort = effort if wanted is None else wanted
        enabled = reasoning.get("enabled", reasoning.get("enable", False))
        if isinstance(enabled, str):
            enabled = enabled.strip().lower() in ("1", "true", "yes", "y", "on")
        thinking = True if enabled else None
    if effort is not None:
        thinking = effort != "none"
    if thinking is not None:
        given.setdefault("thinking", thinking)
        given.setdefault("enable_thinking", thinking)
    return ({} if effort is None else {"reasoning_effort": effort}) | given


def _wants_parts(source: str, tree: jinja2.nodes.Template) -> bool:
    """Say whether content lists stay lists: the template loops over a message's content, or is multimodal."""
    if any(word in source for word in ("image", "audio", "video", "vision")):
        return True
    return any(_is_content(loop.iter) for loop in tree.find_all(jinja2.nodes.For))


def _is_content(node: jinja2.nodes.Node) -> bool:
    """`message.content`, `message['content']`, with filters, tests or slices around it."""
    if isinstance(node, (jinja2.nodes.Filter, jinja2.nodes.Test)):
        return node.node is not None and _is_content(node.node)
    if isinstance(node, jinja2.nodes.Getattr):
        return _is_message(node.node) and node.attr == "content"
    if isinstance(node, jinja2.nodes.Getitem):
        if isinstance(node.arg, jinja2.nodes.Slice):
            return _is_content(node.node)
        return (
            _is_message(node.node)
            and isinstance(node.arg, jinja2.nodes.Const)
            and node.arg.value == "content"
        )
    return False


def _is_message(node: jinja2.nodes.Node) -> bool:
    return isinstance(node, jinja2.nodes.Name) and node.name in _LOOPED_NAMES
