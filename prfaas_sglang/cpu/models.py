"""Tiny checkpoints of the supported model families: random weights, a real tokenizer, no network.

Made for exactness tests, so greedy output must be varied and must depend on the whole prompt: weights are
drawn wide enough that the network mixes instead of averaging, and the head is scaled so that the best token
stands clear of float32 noise. Everything follows from (family, seed), byte for byte, with the locked library
versions.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cache_service.core.errors import ConfigError
from prfaas_sglang.cpu.environment import make_torchvision_importable

VOCABULARY = 2048
MAX_POSITIONS = 8192
#: Changes when a builder changes, so that cached checkpoints are built again.
BUILDER_VERSION = 1

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": MAX_POSITIONS,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "float32",
}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
}


def _dense() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**_SHAPE, num_hidden_layers=4, tie_word_embeddings=False))


def _gdn() -> Any:
    from transformers.models.qwen3_5 import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    return Qwen3_5ForCausalLM(
        Qwen3_5TextConfig(**_SHAPE, **_LINEAR, num_hidden_layers=8, tie_word_embeddings=False)
    )


def _gdn_moe() -> Any:
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    return Qwen3NextForCausalLM(
        Qwen3NextConfig(
            **_SHAPE,
            **_LINEAR,
            num_hidden_layers=4,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            shared_expert_intermediate_size=64,
            partial_rotary_factor=0.5,
            tie_word_embeddings=False,
        )
    )


def _swa() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    shape = {**_SHAPE, "num_attention_heads": 4}
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            **shape,
            num_hidden_layers=6,
            sliding_window=64,
            query_pre_attn_scalar=32,
            tie_word_embeddings=True,
        )
    )


#: Family -> (what it is, builder).
FAMILIES: dict[str, tuple[str, Callable[[], Any]]] = {
    "dense": ("Qwen3, 4 full-attention layers", _dense),
    "gdn": ("Qwen3.5 text, 6 gated-delta-net and 2 full-attention layers", _gdn),
    "gdn-moe": ("Qwen3-Next, 3 gated-delta-net and 1 full-attention layers, 8 experts", _gdn_moe),
    "swa": ("Gemma 3 text, 5 sliding-window and 1 full-attention layers", _swa),
}


def build(family: str, out: Path, *, seed: int = 0) -> Path:
    """Write a checkpoint of `family` with its tokenizer into the folder `out`; return `out`.

    Raises ConfigError for an unknown family, OSError when the folder cannot be written.
    """
    if family not in FAMILIES:
        raise ConfigError(f"family: {family!r} is unknown; accepted: {', '.join(FAMILIES)}")
    make_torchvision_importable()
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    out.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FAMILIES[family][1]().float().eval()
        with torch.no_grad():
            _sharpen(model)
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    model.save_pretrained(out)
    tokenizer().save_pretrained(out)
    path = out / "config.json"
    config = json.loads(path.read_text())
    config.update(bos_token_id=0, eos_token_id=2, pad_token_id=0)
    if family in ("gdn", "gdn-moe"):
        config["full_attention_interval"] = 4  # SGLang 0.5.21 reads the key that came before layer_types
    path.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    return out


def cached(family: str, root: Path, *, seed: int = 0) -> Path:
    """Return the folder under `root` that holds the checkpoint, building it when it is not there.

    The folder's name says what it depends on: family, seed, builder and library versions.
    Raises ConfigError for an unknown family, or when `root` cannot be written.
    """
    versions = "-".join(importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers"))
    path = root / f"{family}-seed{seed}-b{BUILDER_VERSION}-{versions}"
    if (path / "config.json").is_file():
        return path
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=f".{family}-") as scratch:
            built = build(family, Path(scratch) / "model", seed=seed)
            with contextlib.suppress(OSError):  # another process was faster: its checkpoint is the same
                built.rename(path)
    except OSError as error:
        raise ConfigError(
            f"cannot keep tiny checkpoints in {root}: {error.strerror}; "
            "set PRFAAS_CACHE_DIR to a folder that can be written"
        ) from error
    return path


def _sharpen(model: Any) -> None:
    """Spread what random initialisation leaves flat, in place."""
    import torch

    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            # sharper attention: the softmax picks tokens instead of averaging over all
            parameter.add_(1.0)
        elif name.endswith("A_log"):
            # decay rates from 0.001 to 0.1 a token: states remember tens to hundreds of tokens
            parameter.copy_(torch.linspace(-7.0, -2.3, parameter.numel()))
    if model.config.tie_word_embeddings:
        # Gemma scales embeddings up; tied, the best next token would always be the last one
        model.get_input_embeddings().weight.mul_(0.1)
    else:
        model.lm_head.weight.mul_(3.0)


def tokenizer() -> Any:
    """Return a byte-level BPE tokenizer with a chat template, trained on generated text."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=END_OF_TEXT,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
    )


WORDS = (
    "the of and to in is for that with on as are it by be this from at or an have has not was will can all "
    "which when then than into over under between each other more most some such only same new old one two "
    "three first last next long short high low fast slow large small open close read write send receive "
    "system user agent assistant tool function call answer question task step plan check report error value "
    "name list file folder path line word page block prefix cache hit miss router worker site link queue "
    "request response token prompt prefill decode layer state window model attention linear hybrid cluster "
    "datacenter network bandwidth latency throughput transfer memory bytes packet stream index tree node key "
    "must should may could would please return given before after while until because however therefore "
    "search find compute build test deploy monitor measure compare explain summarise translate review"
).split()


def corpus(sentences: int = 3000) -> list[str]:
    """Return generated sentences to train a tokenizer on; always the same ones."""
    rng = random.Random(0)
    text = []
    for _ in range(sentences):
        words = [rng.choice(WORDS) for _ in range(rng.randint(6, 18))]
        words[0] = words[0].capitalize()
        if rng.random() < 0.3:
            words.insert(rng.randrange(len(words)), str(rng.randrange(10_000)))
        text.append(" ".join(words) + rng.choice([". ", "! ", "? ", ".\n", ": "]))
    return text
