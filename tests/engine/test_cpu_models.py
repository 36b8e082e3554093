"""The tiny checkpoints: the same bytes for the same seed, and outputs that an exactness test can rely on."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cache_service.core.errors import ConfigError
from prfaas_sglang.cpu import models
from prfaas_sglang.cpu.environment import worker_environment
from tests.engine.conftest import FAMILIES, ROOT

pytestmark = pytest.mark.engine

#: Prompt positions that are changed, as shares of the prompt's length, and how far the outputs are compared.
CHANGED_AT = (0.0, 0.5)
PROMPT_TOKENS = 400

#: A process of its own, because transformers and torch take seconds to import and warn on import.
SCRIPT = f"""
import json, sys
from pathlib import Path
import torch
from prfaas_sglang.cpu import models
from tests.engine import reference
folder, found = Path(sys.argv[1]), {{}}
for family in sys.argv[2:]:
    for copy in ("a", "b"):
        models.build(family, folder / copy / family)
    models.build(family, folder / "seed1" / family, seed=1)
    model, ids = reference.load(folder / "a" / family)
    n = {PROMPT_TOKENS}
    prompts = [ids[0:n], ids[500 : 500 + n], ids[1500 : 1500 + n]]
    outputs, margins = zip(*(reference.greedy(model, prompt, 64) for prompt in prompts))
    changed = []
    for share in {CHANGED_AT}:
        prompt = list(prompts[0])
        prompt[int(share * n)] = (prompt[int(share * n)] + 7) % 2000
        changed.append(reference.greedy(model, prompt, 64)[0])
    entry = {{"outputs": outputs, "margins": margins, "changed": changed}}
    if family.startswith("gdn"):
        # silence the full-attention layers: what is left reaches the output through the linear state alone
        for layer in model.model.layers:
            if hasattr(layer, "self_attn"):
                layer.self_attn.o_proj.weight.data.zero_()
        entry["state_only"] = [reference.greedy(model, p, 32)[0] for p in (prompts[0], prompt)]
    found[family] = entry
print("RESULT " + json.dumps(found))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), *FAMILIES],
        cwd=ROOT,
        env={**os.environ, **worker_environment()},
        capture_output=True,
        text=True,
        timeout=240,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    return folder, json.loads(lines[-1].removeprefix("RESULT "))


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("family", FAMILIES)
def test_same_seed_same_bytes(family: str, built: tuple[Path, dict[str, Any]]) -> None:
    """Every file of two builds is identical; another seed gives other weights and the same tokenizer."""
    folder, _ = built
    first = digests(folder / "a" / family)
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(first)
    assert first == digests(folder / "b" / family)
    other = digests(folder / "seed1" / family)
    assert other["model.safetensors"] != first["model.safetensors"]
    assert other["tokenizer.json"] == first["tokenizer.json"]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_output_is_varied(family: str, built: tuple[Path, dict[str, Any]]) -> None:
    """64 tokens hold at least 32 different ones, prompts differ in output, and the choices are clear."""
    entry = built[1][family]
    for output in entry["outputs"]:
        assert len(set(output)) >= 32
    assert len({tuple(output) for output in entry["outputs"]}) == len(entry["outputs"])
    # float32 rounding moves a logit by about 3e-6 of their standard deviation: one near-tie in 50,000 tokens
    assert statistics.mean(itertools.chain(*entry["margins"])) > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_output_depends_on_the_whole_prompt(family: str, built: tuple[Path, dict[str, Any]]) -> None:
    """Another first token, or another one 200 tokens back, changes the output."""
    entry = built[1][family]
    for changed in entry["changed"]:
        assert changed != entry["outputs"][0]


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.startswith("gdn")])
def test_output_depends_on_the_linear_state(family: str, built: tuple[Path, dict[str, Any]]) -> None:
    """With full attention silenced, a token 200 back still changes the output: the state carries it."""
    original, changed = built[1][family]["state_only"]
    assert original != changed


def test_chat_template_and_limits(built: tuple[Path, dict[str, Any]]) -> None:
    """The tokenizer renders turns, ends at the end-of-turn token, and the model takes 8192 positions."""
    folder, _ = built
    config = json.loads((folder / "a" / "gdn" / "config.json").read_text())
    assert config["max_position_embeddings"] == 8192
    tokenizer = json.loads((folder / "a" / "gdn" / "tokenizer_config.json").read_text())
    assert tokenizer["eos_token"] == models.TURN_END
    assert "add_generation_prompt" in (folder / "a" / "gdn" / "chat_template.jinja").read_text()


def test_unknown_family_is_refused(tmp_path: Path) -> None:
    """The error names the field and what is accepted."""
    with pytest.raises(ConfigError, match="family: 'mamba' is unknown; accepted: dense, gdn, gdn-moe, swa"):
        models.build("mamba", tmp_path)
