"""The tree of blocks behind the publish filter: who hangs below whom, how deep, and which blocks are anchors.

Decides places only; it must not know what is worth publishing. A block whose ancestors are not all known has
no place yet (`depth` 0). A block that nobody holds is forgotten; its children keep naming it, so it finds its
place again when it comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from cache_service.core.events import BlocksStored
from cache_service.core.ids import BlockHash


class Node:
    """A block that somebody holds something of; `depth` counts from 1, 0 while an ancestor is unknown."""

    __slots__ = ("depth", "held", "parent", "published", "seen")

    def __init__(self) -> None:
        self.parent: BlockHash | None = None
        self.depth = 0
        self.seen = 0
        #: The filter's bits: what is held, and what of it is published.
        self.held = 0
        self.published = 0


class Tree:
    """Blocks by hash. Every `stride`-th of a chain is an anchor, with stride 1 each, placed or not."""

    def __init__(self, stride: int) -> None:
        self.stride = stride
        self.nodes: dict[BlockHash, Node] = {}
        self._children: dict[BlockHash, list[BlockHash]] = {}

    def known(self, block: BlockHash) -> Node:
        """Return a block's node, made when it is new."""
        node = self.nodes.get(block)
        if node is None:
            node = self.nodes[block] = Node()
        return node

    def children(self, block: BlockHash) -> Iterable[BlockHash]:
        """Return the known blocks below a block."""
        return self._children.get(block, ())

    def is_anchor(self, node: Node) -> bool:
        """Say whether a block is one that vouches for the run above it."""
        return self.stride == 1 or bool(node.depth and node.depth % self.stride == 0)

    def placed(self, node: Node) -> bool:
        """Say whether it is known whether the block is an anchor."""
        return self.stride == 1 or bool(node.depth)

    def link(self, event: BlocksStored) -> list[BlockHash]:
        """Learn who is whose parent; return blocks known before that now have a place, ancestors first."""
        late: list[BlockHash] = []
        parent = event.parent
        for block in event.hashes:
            node = self.nodes.get(block)
            is_new = node is None
            if node is None:
                node = self.nodes[block] = Node()
            if node.parent is None and node.depth != 1 and parent is not None:
                node.parent = parent
                self._children.setdefault(parent, []).append(block)
            if not node.depth and (depth := self._place(block, parent)):
                placed = self._set_depth(block, depth)
                late += placed[1:] if is_new else placed
            parent = block
        return late

    def forget_if_unheld(self, block: BlockHash) -> None:
        """Drop a block that nobody holds anything of."""
        node = self.nodes[block]
        if node.held:
            return
        del self.nodes[block]
        if node.parent is not None:
            siblings = self._children[node.parent]
            siblings.remove(block)
            if not siblings:
                del self._children[node.parent]

    def anchors_from(self, blocks: Iterable[BlockHash]) -> list[BlockHash]:
        """Return the anchors whose runs contain one of `blocks`, each once, ancestors first along a chain."""
        return [b for b in self.segment_from(blocks) if self.is_anchor(self.nodes[b])]

    def segment_from(self, blocks: Iterable[BlockHash]) -> list[BlockHash]:
        """Return the placed blocks from each of `blocks` down to the next anchors, these included."""
        seen: dict[BlockHash, None] = {}
        for first in blocks:
            waiting = [first]
            while waiting:
                block = waiting.pop()
                node = self.nodes.get(block)
                if node is None or block in seen or not self.placed(node):
                    continue
                seen[block] = None
                if not self.is_anchor(node):
                    waiting += self.children(block)
        return list(seen)

    def within(self, blocks: Iterable[BlockHash], levels: int) -> list[BlockHash]:
        """Return the known blocks at most `levels - 1` levels below one of `blocks`."""
        left = {block: levels for block in blocks if block in self.nodes}
        waiting = list(left)
        while waiting:
            block = waiting.pop()
            if (rest := left[block] - 1) < 1:
                continue
            for child in self.children(block):
                if left.get(child, 0) < rest and child in self.nodes:
                    left[child] = rest
                    waiting.append(child)
        return list(left)

    def climb(
        self, block: BlockHash, levels: int, held: Callable[[Node], int]
    ) -> tuple[bool, BlockHash | None]:
        """Say whether `levels` blocks from `block` up are held, and name the one above them, None: the root.

        Fewer are enough where the root is reached.
        """
        at: BlockHash | None = block
        for _ in range(levels):
            node = self.nodes.get(at) if at is not None else None
            if node is None or not held(node):
                return False, None
            at = node.parent
            if at is None:
                return node.depth == 1 or levels == 1, None
        return True, at

    def _place(self, block: BlockHash, parent: BlockHash | None) -> int:
        """Return a block's depth by its parent, or by a child that was placed before this block came back."""
        if parent is None:
            return 1
        above = self.nodes.get(parent)
        if above is not None and above.depth:
            return above.depth + 1
        below = (self.nodes[child].depth for child in self.children(block))
        return max((depth - 1 for depth in below if depth), default=0)

    def _set_depth(self, block: BlockHash, depth: int) -> list[BlockHash]:
        """Place a block and what hangs together with it; return the placed, `block` first."""
        placed = []
        waiting = [(block, depth)]
        while waiting:
            block, depth = waiting.pop()
            node = self.nodes[block]
            if not node.depth:
                node.depth = depth
                placed.append(block)
                waiting += [(child, depth + 1) for child in self.children(block)]
                if node.parent in self.nodes and depth > 1:
                    waiting.append((node.parent, depth - 1))
        return placed
