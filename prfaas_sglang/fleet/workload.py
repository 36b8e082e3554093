"""The demo's requests: agents that share a long system prompt and talk for several turns, and short ones.

Pure and always the same. Sizes are in words; with the tiny tokenizer a word is about one token.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from prfaas_sglang.cpu.models import WORDS


@dataclass(frozen=True, slots=True)
class Agent:
    """One conversation.

    Attributes:
        name: shown in the report.
        system: system prompt.
        questions: user messages, one a turn.
        max_tokens: length of each answer.
    """

    name: str
    system: str
    questions: tuple[str, ...]
    max_tokens: int


def prose(words: int, seed: int) -> str:
    """Return text of `words` words."""
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(words))


def agents() -> list[Agent]:
    """Return the demo's agents: four long ones over one system prompt, three short ones over another."""
    long_system = prose(620, seed=1)
    short_system = prose(60, seed=2)
    long = [
        Agent(f"research-{i}", long_system, tuple(prose(50, seed=100 + 10 * i + t) for t in range(3)), 24)
        for i in range(4)
    ]
    short = [
        Agent(f"helpdesk-{i}", short_system, tuple(prose(25, seed=200 + 10 * i + t) for t in range(3)), 24)
        for i in range(3)
    ]
    return long + short
