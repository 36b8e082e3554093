"""How the prefix index searches a chain of hashes, all holders at once as bitsets.

Decides depths (the longest contiguous prefix of each holder) and usable boundaries. It must not know where
the bitsets are kept: a probe maps a block to the bitset of its holders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from cache_service.core.ids import BlockHash
from cache_service.core.index_types import Needs

#: A block to the bitset of its holders, in one tier of one group.
Held = dict[BlockHash, int]

#: A block to the bitset of its holders, None for nobody.
Probe = Callable[[BlockHash], int | None]


def bits(mask: int) -> Iterator[int]:
    """Yield the positions of the set bits, lowest first."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def discard(held: Held, block: BlockHash, bit: int) -> bool:
    """Take a holder's bit from a block; say whether it was there."""
    mask = held.get(block, 0)
    if not mask & bit:
        return False
    if mask == bit:
        del held[block]
    else:
        held[block] = mask ^ bit
    return True


def probe_any(tables: Sequence[Held]) -> Probe:
    """Return a probe of the holders in any of `tables`."""
    if len(tables) == 1:
        return tables[0].get

    def holders(block: BlockHash) -> int:
        mask = 0
        for held in tables:
            mask |= held.get(block, 0)
        return mask

    return holders


def walk(hashes: Sequence[BlockHash], probe: Probe, alive: int, depths: dict[int, int]) -> None:
    """Add to `depths` how deep each of `alive` holds `hashes`, block by block. O(depth)."""
    for depth, block in enumerate(hashes):
        rest = (probe(block) or 0) & alive
        if rest != alive:
            depths[depth] = depths.get(depth, 0) | alive & ~rest
            if not rest:
                return
            alive = rest
    depths[len(hashes)] = depths.get(len(hashes), 0) | alive


def bisect(hashes: Sequence[BlockHash], probe: Probe, alive: int, depths: dict[int, int]) -> None:
    """Add to `depths` how deep each of `alive` holds `hashes`; all hold the first, and none has a hole.

    O(k log n) for k different depths.
    """
    last = len(hashes) - 1
    at_last = (probe(hashes[last]) or 0) & alive
    if at_last:
        depths[last + 1] = depths.get(last + 1, 0) | at_last
    if at_last == alive:
        return
    spans = [(0, last, alive, at_last)]
    while spans:
        low, high, at_low, at_high = spans.pop()
        while high - low > 1:
            middle = (low + high) >> 1
            at_middle = (probe(hashes[middle]) or 0) & at_low
            if at_middle == at_high:
                high = middle
                continue
            if at_middle != at_low:
                spans.append((low, middle, at_low, at_middle))
            low, at_low = middle, at_middle
        depths[high] = depths.get(high, 0) | at_low & ~at_high


def usable_by_slot(
    hashes: Sequence[BlockHash],
    limit: int,
    depths: Mapping[int, int],
    who: tuple[Needs, int, int],
    state: Probe,
    window: Probe,
) -> dict[int, int]:
    """Return the usable blocks, by slot, of the holders with some needs.

    `who` is those needs, the holders that have them, and those of them that hold anything of a group.
    """
    needs, members, able = who
    found: dict[int, int] = {}
    wanted: dict[int, int] = {}
    for depth, mask in depths.items():
        found.update((slot, 0) for slot in bits(mask & members))
        if mask & able:
            at = min(depth, limit)
            wanted[at] = wanted.get(at, 0) | mask & able
    for boundary, mask in usable_boundaries(hashes, wanted, needs, state, window):
        found.update((slot, boundary) for slot in bits(mask))
    return found


def usable_boundaries(
    hashes: Sequence[BlockHash], depths: Mapping[int, int], needs: Needs, state: Probe, window: Probe
) -> Iterator[tuple[int, int]]:
    """Yield (boundary, holders) for the holders that have one; the others' usable prefix is empty.

    `depths` maps a boundary to the holders that may use at most that much. A boundary b counts when there is
    a state snapshot at it (behind block b - 1) and window KV of the last min(w, b) blocks before it.

    One pass from the deepest boundary up. A holder seeks a boundary with a state; from there its window is
    checked block by block. Where block i is missing, every boundary above i within the window would want it
    too, so the holder goes on seeking at i: no block is looked at twice for it.
    """
    arrivals = sorted(depths)
    seeking = 0
    checking: list[tuple[int, int]] = []
    boundary = 0
    while seeking or checking or arrivals:
        if not seeking and not checking:
            boundary = arrivals[-1]
        if boundary < 1:
            return
        if arrivals and arrivals[-1] == boundary:
            seeking |= depths[arrivals.pop()]
        block = hashes[boundary - 1]
        if seeking:
            found = seeking & (state(block) or 0) if needs.state else seeking
            if found:
                seeking ^= found
                if needs.window_blocks:
                    checking.append((boundary, found))
                else:
                    yield boundary, found
        boundary -= 1
        if checking:
            have = window(block) or 0
            still = []
            for start, holders in checking:
                seeking |= holders & ~have
                whole = holders & have
                if whole and start - boundary >= min(needs.window_blocks, start):
                    yield start, whole
                elif whole:
                    still.append((start, whole))
            checking = still
