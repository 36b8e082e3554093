"""Prompt to token ids with the model's own tokenizer: the only importer of `tokenizers`.

Computes the ids that SGLang 0.5.21 will compute from the same body: chat prompts are rendered, then encoded
without special tokens (serving_chat.py); plain prompts are encoded with them (tokenizer_manager.py). Follows
SGLang's loader for tokenizer.json models (utils/hf_transformers/tokenizer.py): the file's own post-processor,
except that the Llama and Gemma families take BOS from tokenizer_config.json. A difference costs a wrong cache
match, never a wrong answer: the engine tokenises the body again, and the router compares the lengths.

Must not block the event loop: long prompts are worked on in a small thread pool (the tokenizer releases the
GIL).
"""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors  # type: ignore[import-untyped]

from cache_service.core.blocks import block_hashes, event_namespace_seed
from cache_service.core.errors import ConfigError
from cache_service.core.ids import BlockHash
from router.openai import Api, ParsedRequest, RequestError, stop_token_ids
from router.template import ChatTemplate

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
#: Tokens that SGLang takes for the end although no configuration says so (utils/hf_transformers/common.py).
_MORE_ENDS = ("<|eom_id|>", "<|content_model_end_sampling|>", "<|ifm|im_end|>")
#: Classes whose BOS comes from tokenizer_config.json in SGLang (default: added).
_BOS_BY_FLAG = (
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "CodeLlamaTokenizer",
    "CodeLlamaTokenizerFast",
    "GemmaTokenizer",
    "GemmaTokenizerFast",
    "CohereTokenizerFast",
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A tokenised prompt: its length and the chained hashes of its full pages."""

    total_tokens: int
    hashes: list[BlockHash]


class PromptTokenizer:
    """The model's tokenizer and chat template; safe to use from several threads."""

    def __init__(self, model_path: Path) -> None:
        """Load from a model directory. Raises ConfigError saying which file is missing or unusable."""
        if not model_path.is_dir():
            raise ConfigError(f"model.path: {model_path} is not a directory")
        file = model_path / "tokenizer.json"
        if not file.is_file():
            raise ConfigError(
                f"model.path: {model_path} has no tokenizer.json; only models with a fast tokenizer in that "
                "format are served (convert it with transformers' save_pretrained)"
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:
            raise ConfigError(f"model.path: {file} cannot be loaded: {error}") from error
        config = _read_json(model_path / "tokenizer_config.json")
        special = _special_tokens(config) or _special_tokens(
            _read_json(model_path / "special_tokens_map.json")
        )
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        _add_missing_tokens(self._tokenizer, config, special)
        self._bos_id = self._tokenizer.token_to_id(special["bos_token"]) if "bos_token" in special else None
        if config.get("tokenizer_class") in _BOS_BY_FLAG:
            self._set_bos(special.get("bos_token"), config.get("add_bos_token"))
        source = _template_source(model_path, config)
        self._template = ChatTemplate(source, special) if source else None
        self._vocabulary = _vocabulary_size(model_path)
        #: Texts of the tokens that end an answer, less those that are special and never shown; None: unknown.
        self.ends = _end_texts(self._tokenizer, model_path, special)

    def _known(self, ids: list[int], field: str) -> list[int]:
        """Return `ids` if the model has embeddings for all of them; an unknown one can end a worker."""
        largest = max(ids, default=0)
        if self._vocabulary is not None and largest >= self._vocabulary:
            raise RequestError(
                400,
                f"{field}: token id {largest} is not in 0..{self._vocabulary - 1}, the model's vocabulary",
                param=field,
            )
        return ids

    def encode(self, request: ParsedRequest) -> list[int]:
        """Return the token ids of a request's prompt. Raises RequestError. Blocks; linear in the prompt."""
        stops, where = stop_token_ids(request.body)
        self._known(stops, where)
        if isinstance(request.prompt, list):
            field = "prompt" if request.api is Api.COMPLETION else "input_ids"
            return self._known(request.prompt, field)
        if isinstance(request.prompt, str):
            return self._ids(request.prompt, special_tokens=True)
        if self._template is None:
            raise RequestError(
                400,
                "messages: this model has no chat template; use /v1/completions or give input_ids",
                param="messages",
            )
        text, prefix = self._template.render(request.body)
        ids = self._ids(text, special_tokens=False)
        if prefix:
            continued = self._ids(prefix, special_tokens=True)
            if continued and continued[0] == self._bos_id:
                continued = continued[1:]
            ids = ids + continued
        return ids

    def _ids(self, text: str, *, special_tokens: bool) -> list[int]:
        """Encode as a batch of one: unlike `encode`, the binding's batch calls release the GIL."""
        [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def _set_bos(self, bos: str | None, wanted: bool | None) -> None:
        """Add BOS (or nothing) to plain prompts, as SGLang restores it for the Llama and Gemma families."""
        if bos is None or self._bos_id is None or wanted is False:
            self._tokenizer.post_processor = processors.TemplateProcessing(single="$A:0", special_tokens=[])
        else:
            self._tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{bos}:0 $A:0", special_tokens=[(bos, self._bos_id)]
            )


class TokenizerPool:
    """Runs tokenising and hashing on a few threads."""

    def __init__(self, tokenizer: PromptTokenizer, page_size: int, threads: int) -> None:
        self._tokenizer = tokenizer
        self._page_size = page_size
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="tokenize")

    @property
    def ends(self) -> frozenset[str] | None:
        """Texts of the tokens that end an answer and are not special; None when they are not known."""
        return self._tokenizer.ends

    async def prompt(self, request: ParsedRequest) -> Prompt:
        """Tokenise and hash. Raises RequestError for what the tokenizer or the template refuses."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._work, request)

    def _work(self, request: ParsedRequest) -> Prompt:
        ids = self._tokenizer.encode(request)
        if not ids:
            raise RequestError(400, "the prompt is empty: it has no tokens", param="prompt")
        seed = event_namespace_seed(request.cache_salt or None)
        return Prompt(len(ids), block_hashes(ids, self._page_size, seed=seed))

    def close(self) -> None:
        """Stop the threads after their current work."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path: {path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"model.path: {path} does not hold a JSON object")
    return value


def _vocabulary_size(model_path: Path) -> int | None:
    """The number of embeddings that config.json tells, None when it does not."""
    config = _read_json(model_path / "config.json")
    text = config.get("text_config")
    size = (text if isinstance(text, dict) else config).get("vocab_size")
    return size if type(size) is int and size > 0 else None


def _end_texts(tokenizer: Tokenizer, model_path: Path, special: dict[str, str]) -> frozenset[str] | None:
    """Return what the engine's stop tokens look like where they are not special (schedule_batch.py).

    None when config.json does not say: then transformers has a default for each model class.
    """
    config = _read_json(model_path / "config.json")
    text = config.get("text_config")
    sources = [config, text if isinstance(text, dict) else {}]
    if not any("eos_token_id" in source for source in sources):
        return None
    ids: set[object] = {tokenizer.token_to_id(t) for t in (special.get("eos_token"), *_MORE_ENDS) if t}
    for source in (*sources, _read_json(model_path / "generation_config.json")):
        value = source.get("eos_token_id")
        ids.update(value if isinstance(value, list) else [value])
    texts = {tokenizer.decode([i], skip_special_tokens=True) for i in ids if type(i) is int and i >= 0}
    if any("\ufffd" in t for t in texts):
        return None  # part of a character looks different behind another part
    return frozenset(texts - {""})


def _text(token: object) -> str | None:
    """A special token is written as a string or as an object with its content."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    found = {name: _text(config.get(name)) for name in _SPECIAL_NAMES}
    return {name: text for name, text in found.items() if text is not None}


def _add_missing_tokens(tokenizer: Tokenizer, config: dict[str, Any], special: dict[str, str]) -> None:
    """Add tokens that tokenizer_config.json names and tokenizer.json lacks, as transformers does."""
    decoder = config.get("added_tokens_decoder") or {}
    listed = [decoder[key] for key in sorted(decoder, key=int)]
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for entry in listed:
        if isinstance(entry, dict) and entry.get("content") not in known:
            options = {k: entry[k] for k in ("single_word", "lstrip", "rstrip", "normalized") if k in entry}
            tokenizer.add_tokens(
                [AddedToken(entry["content"], special=bool(entry.get("special")), **options)]
            )
            known.add(entry["content"])
    for text in special.values():
        if text not in known:
            tokenizer.add_special_tokens([AddedToken(text, special=True)])
            known.add(text)


def _template_source(model_path: Path, config: dict[str, Any]) -> str | None:
    """Return the chat template: its own file first, then tokenizer_config.json ("default" of several)."""
    file = model_path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default") or next(iter(named.values()), None)
    return template if isinstance(template, str) else None
