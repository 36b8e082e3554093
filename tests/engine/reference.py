"""Greedy reference outputs of the tiny models, by transformers in float32: what SGLang must reproduce.

A process of its own (`python -m tests.engine.reference FOLDER FAMILY...`), so that torch is imported beside
the fork server instead of inside pytest. Writes FOLDER/FAMILY/ (the checkpoint) and FOLDER/FAMILY.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

NEW_TOKENS = 32
#: Prompt lengths in tokens: inside one 64-token page, on a page boundary, over many pages, over two chunks.
LENGTHS = (40, 128, 300, 700, 900)
#: The last two prompts share this many leading tokens.
SHARED = 448
#: Smallest accepted distance of the best two logits, as a share of the logits' standard deviation. Rounding
#: in another order moves logits by about 3e-6 of it (root mean square); a closer call proves nothing.
MIN_MARGIN = 3e-4


def candidates(ids: list[int]) -> list[list[list[int]]]:
    """Return several sets of prompts cut from `ids`; the first without a near-tie is taken."""
    sets = []
    for start in range(0, 4000, 400):
        prompts = [ids[start + 37 * i : start + 37 * i + n] for i, n in enumerate(LENGTHS[:-1])]
        tail = ids[start + 3000 : start + 3000 + LENGTHS[-1] - SHARED]
        sets.append([*prompts, prompts[-1][:SHARED] + tail])
    return sets


def greedy(model: Any, prompt: list[int], new_tokens: int = NEW_TOKENS) -> tuple[list[int], list[float]]:
    """Return the continuation and each token's margin over the runner-up, in standard deviations."""
    import torch

    x = torch.tensor([prompt])
    with torch.no_grad():
        done = model.generate(
            x,
            attention_mask=torch.ones_like(x),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    logits = torch.cat(done.logits)
    best = logits.topk(2).values
    margins = (best[:, 0] - best[:, 1]) / logits.std()
    return done.sequences[0, len(prompt) :].tolist(), margins.tolist()


def load(folder: Path) -> tuple[Any, list[int]]:
    """Return the model in float32 and a long text's token ids."""
    import torch

    from prfaas_sglang.cpu import models

    models.make_torchvision_importable()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ids = AutoTokenizer.from_pretrained(folder)("".join(models.corpus(600)))["input_ids"]
    return model.eval(), ids


def make(folder: Path, family: str) -> None:
    """Build the checkpoint and its reference file."""
    from prfaas_sglang.cpu import models

    model, ids = load(models.build(family, folder / family))
    for prompts in candidates(ids):
        answers = [greedy(model, prompt) for prompt in prompts]
        if min(min(margins) for _, margins in answers) >= MIN_MARGIN:
            break
    else:
        sys.exit(f"{family}: every set of prompts has a near-tie")
    cases = [{"prompt": p, "output": o} for p, (o, _) in zip(prompts, answers, strict=True)]
    part = folder / f"{family}.part"
    part.write_text(json.dumps(cases))
    part.rename(folder / f"{family}.json")


if __name__ == "__main__":
    for name in sys.argv[2:]:
        make(Path(sys.argv[1]), name)
