"""Which pages of which layers are final while a batch is still computed. Pure: no engine, clock or threads.

A layer's KV of a batch is final when the attention backend has returned for that layer, if it is called once
for each layer with all of the batch's tokens. That is watched, not assumed: nothing may be sent before one
batch was seen whole, and nothing any more after a layer was computed twice in one batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


def final_pages(begin: int, end: int, prompt_tokens: int, page_size: int) -> range:
    """Return the prompt pages that are final when a batch has computed the prompt's tokens up to `end`.

    Args:
        begin: prompt tokens whose pages were offered or belong to an earlier batch.
        end: prompt tokens that are computed after the batch.
        prompt_tokens: length of the prompt; only its last batch makes a partial page final.
        page_size: tokens per page.
    """
    end = min(end, prompt_tokens)
    stop = -(-end // page_size) if end == prompt_tokens else end // page_size
    return range(min(begin // page_size, stop), stop)


def tensors_by_layer(
    tensors: list[int], buffers: Mapping[int, tuple[int, ...]]
) -> dict[int, tuple[int, ...]] | None:
    """Return the KV tensors that each layer writes, None when one of them belongs to no layer or to several.

    Args:
        tensors: address of each KV tensor of the layout.
        buffers: addresses of each layer's K and V.
    """
    found: dict[int, tuple[int, ...]] = {}
    for layer, addresses in buffers.items():
        mine = tuple(i for i, address in enumerate(tensors) if address in addresses)
        if mine:
            found[layer] = mine
    every = sorted(i for mine in found.values() for i in mine)
    return found if every and every == list(range(len(tensors))) else None


@dataclass(slots=True)
class Watch:
    """Sees which layers report in each batch.

    Attributes:
        layers: layers that write KV tensors.
        trusted: one batch was seen whole.
        broken: why nothing is sent ahead any more, "" while it may be.
    """

    layers: frozenset[int]
    trusted: bool = False
    broken: str = ""
    _seen: set[int] = field(default_factory=set)

    def begin(self) -> None:
        """A batch begins."""
        self._seen.clear()

    def seen(self, layer: int, *, whole: bool) -> bool:
        """A layer has been computed; True when its KV may be sent.

        Args:
            whole: for all of the batch's requests and tokens.
        """
        if layer not in self.layers or self.broken:
            return False
        if not whole:
            self.broken = f"layer {layer} was computed for a part of a batch"
        elif layer in self._seen:
            self.broken = f"layer {layer} was computed twice in one batch"
        self._seen.add(layer)
        return self.trusted and not self.broken

    def end(self) -> str:
        """The batch has been computed; return what is wrong with it, "" for nothing."""
        if self.broken:
            return self.broken
        missing = len(self.layers) - len(self._seen)
        if missing:
            return f"{missing} of {len(self.layers)} layers did not report"
        self.trusted = True
        return ""
