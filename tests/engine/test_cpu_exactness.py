"""Every family on real SGLang equals transformers in float32, token for token.

With nothing cached and with cached prefixes, one request at a time and several at once.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.conftest import FAMILIES, PAGE, References, Serve
from tests.engine.reference import SHARED

pytestmark = pytest.mark.engine

FLAGS: dict[str, dict[str, Any]] = {
    "dense": {},
    "gdn": {"mamba_radix_cache_strategy": "extra_buffer"},
    "gdn-moe": {"mamba_radix_cache_strategy": "extra_buffer"},
    "swa": {},
}


def page_floor(tokens: int) -> int:
    return tokens // PAGE * PAGE


def reused_tokens(family: str, prompt_tokens: int) -> int:
    """Tokens that SGLang reuses when one prompt comes a second time; the last token is always computed.

    A linear-attention family keeps one state snapshot, at the prompt's last page boundary. Where that is the
    prompt's very end it comes a token too late, and nothing is reused.
    """
    if family.startswith("gdn") and prompt_tokens % PAGE == 0:
        return 0
    return page_floor(prompt_tokens - 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_equal_transformers(family: str, serve: Serve, references: References) -> None:
    """One by one, then again with cached prefixes, then all at once on an empty cache, and again."""
    model, cases = references.get(family)
    assert all(len(set(case.output)) >= 16 for case in cases), "constant output would prove nothing"
    assert len({tuple(case.output) for case in cases}) == len(cases), "outputs do not depend on the prompt"
    prompts = [case.prompt for case in cases]
    want = [case.output for case in cases]
    with serve(model, **FLAGS[family]) as server:
        cold = [server.generate(prompt) for prompt in prompts]
        assert [answer.output for answer in cold] == want
        # only the last prompt shares a beginning with an earlier one, which has no snapshot there
        shared = 0 if family.startswith("gdn") else SHARED
        assert [answer.cached_tokens for answer in cold] == [*[0] * (len(cases) - 1), shared]

        warm = [server.generate(prompt) for prompt in prompts]
        assert [answer.output for answer in warm] == want
        assert [answer.cached_tokens for answer in warm] == [reused_tokens(family, len(p)) for p in prompts]

        server.flush()
        together = server.generate_together(prompts)
        assert [answer.output for answer in together] == want
        again = server.generate_together(prompts[::-1])[::-1]
        assert [answer.output for answer in again] == want
        # prompts that meet on the way may leave their snapshots where they part instead of at their ends
        for prompt, answer in zip(prompts, again, strict=True):
            assert answer.cached_tokens % PAGE == 0
            assert answer.cached_tokens <= page_floor(len(prompt) - 1)
        assert again[2].cached_tokens == reused_tokens(family, len(prompts[2]))
        assert again[3].cached_tokens > 0
