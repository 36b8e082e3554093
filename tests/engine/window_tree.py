"""Run by test_state_events: SGLang's own tree and sliding-window pools, with our recorder on them.

No tiny model makes SGLang keep a window pool on CPU, but its cache needs no model: random prompts are
matched, stored with windows freed behind them as its scheduler frees them, and evicted. After every step each
known prompt is asked of the tree and of an index that was told our events only. Prints one line of JSON.
"""

from __future__ import annotations

import json
import random
import sys
from typing import Any

from prfaas_sglang.cpu import environment

environment.activate()
from prfaas_sglang.cpu import hooks  # noqa: E402

hooks.install()

import torch  # noqa: E402
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator  # noqa: E402
from sglang.srt.mem_cache.base_prefix_cache import (  # noqa: E402
    EvictParams,
    InsertParams,
    MatchPrefixParams,
)
from sglang.srt.mem_cache.cache_init_params import CacheInitParams  # noqa: E402
from sglang.srt.mem_cache.radix_cache import RadixKey  # noqa: E402
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool  # noqa: E402
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType  # noqa: E402
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache  # noqa: E402

from cache_service.core.blocks import block_hashes, event_namespace_seed  # noqa: E402
from cache_service.core.ids import SourceId, WorkerId  # noqa: E402
from cache_service.core.index import PrefixIndex  # noqa: E402
from prfaas_sglang.core.worker_view import WorkerView  # noqa: E402
from prfaas_sglang.engine import state_events  # noqa: E402

PAGE, WINDOW = 4, 10
FULL_TOKENS, WINDOW_TOKENS = 800, 280
SOURCE = SourceId(WorkerId("w"))


class Followed:
    """A tree, the events said of it, and the index that they make."""

    def __init__(self, core: str) -> None:
        pool = SWAKVPool(
            size=FULL_TOKENS,
            size_swa=WINDOW_TOKENS,
            page_size=PAGE,
            dtype=torch.float32,
            head_num=1,
            head_dim=4,
            swa_attention_layer_ids=[0],
            full_attention_layer_ids=[1],
            device="cpu",
            enable_memory_saver=False,
        )
        self.slots = SWATokenToKVPoolAllocator(
            FULL_TOKENS, WINDOW_TOKENS, PAGE, torch.float32, "cpu", pool, False
        )
        parameters = CacheInitParams(
            disable=False,
            req_to_token_pool=None,
            token_to_kv_pool_allocator=self.slots,
            page_size=PAGE,
            enable_kv_cache_events=True,
            sliding_window_size=WINDOW,
            tree_components=(ComponentType.FULL, ComponentType.SWA),
            tree_core_backend=core,
        )
        self.tree: Any = UnifiedRadixCache(parameters)
        self.needs = state_events.needs_of(self.tree)
        self.view, self.index = WorkerView(), PrefixIndex()
        self.index.add(SOURCE)
        self.index.declare(SOURCE, self.needs.state, self.needs.window_blocks)
        self.group_events = 0
        state_events._Recorder(self.tree, self.needs, self.take)

    def take(self, step: Any) -> None:
        for event in self.view.step(*step()):
            self.index.apply(SOURCE, event)
            self.group_events += hasattr(event, "group")

    def matched(self, tokens: list[int], salt: str | None) -> int:
        key = RadixKey(array_of(tokens), None, cache_salt=salt).page_aligned(PAGE)
        return len(self.tree.match_prefix(MatchPrefixParams(key=key)).device_indices)

    def claimed(self, tokens: list[int], salt: str | None) -> tuple[int, int]:
        found = self.index.match(block_hashes(tokens, PAGE, seed=event_namespace_seed(salt)))
        return (found[0].matched * PAGE, found[0].usable * PAGE) if found else (0, 0)

    def store(self, tokens: list[int], salt: str | None, keep_window: bool) -> None:
        """Do what a request does: reuse, allocate the rest, free windows behind it, insert."""
        key = RadixKey(array_of(tokens), None, cache_salt=salt).page_aligned(PAGE)
        match = self.tree.match_prefix(MatchPrefixParams(key=key))
        reused = match.device_indices
        lock = self.tree.inc_lock_ref(match.last_device_node)
        rest = len(key) - len(reused)
        if rest:
            self.slots.evict_to_free_tokens(self.tree, rest + PAGE)
            fresh = self.slots.alloc_extend(
                torch.tensor([len(reused)]),
                torch.tensor([len(reused)]),
                torch.tensor([len(key)]),
                torch.tensor([len(key)]),
                reused[-1:] if len(reused) else torch.tensor([-1]),
                rest,
            )
            if fresh is not None:
                params = InsertParams(key=key, value=torch.cat([reused, fresh]), prev_prefix_len=len(reused))
                freed_to = max(len(reused), (len(key) - max(WINDOW, PAGE)) // PAGE * PAGE)
                if not keep_window and freed_to > len(reused):
                    self.slots.free_swa(fresh[: freed_to - len(reused)])
                    params.set_evicted_seqlen(ComponentType.SWA, freed_to)
                self.tree.insert(params)
        self.tree.dec_lock_ref(match.last_device_node, lock.to_dec_params())


def array_of(tokens: list[int]) -> Any:
    from array import array

    return array("q", tokens)


def main(core: str, steps: int) -> None:
    chance = random.Random(17)
    followed = Followed(core)
    prompts: list[tuple[list[int], str | None]] = []
    asked = over = under = blocks_over = 0
    for _ in range(steps):
        base, salt = [], chance.choice([None, None, "red"])
        if prompts and chance.random() < 0.7:
            base, salt = chance.choice(prompts[-12:])
            base = base[: chance.randrange(len(base))]
        if len(base) > 160:
            base = base[:160]
        tokens = base + [chance.randrange(100) for _ in range(chance.randrange(8, 90))]
        if chance.random() < 0.02:
            followed.tree.reset()
            followed.slots.clear()
        followed.store(tokens, salt, keep_window=chance.random() < 0.3)
        if chance.random() < 0.3:
            followed.tree.evict(EvictParams(swa_num_tokens=chance.randrange(80)))
        followed.tree.take_events()
        prompts = [*prompts[-30:], (tokens, salt)]
        for prompt, its_salt in prompts:
            cut = prompt[: chance.randrange(1, len(prompt) + 1)]
            matched, usable = followed.claimed(cut, its_salt)
            truth = followed.matched(cut, its_salt)
            asked, over, under = asked + 1, over + (usable > truth), under + (usable < truth)
            blocks_over += matched > truth
    dumped = PrefixIndex()
    dumped.add(SOURCE)
    for event in followed.view.dump():
        dumped.apply(SOURCE, event)
    print(
        json.dumps(
            {
                "asked": asked,
                "over": over,
                "under": under,
                "blocks_over": blocks_over,
                "window_blocks": followed.needs.window_blocks,
                "group_events": followed.group_events,
                "dump_differs": dumped.counts() != followed.index.counts(),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
