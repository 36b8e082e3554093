"""Which held block hangs below which: the edges of the prefix index, both ways."""

from __future__ import annotations

from collections.abc import Collection

from cache_service.core.ids import BlockHash


class Chains:
    """Parents of known blocks, and the known children of any block, known itself or not."""

    def __init__(self) -> None:
        self.parent: dict[BlockHash, BlockHash | None] = {}
        #: The one known child, or a set of two or more (most blocks have one; a set costs 216 bytes).
        self.children: dict[BlockHash, BlockHash | set[BlockHash]] = {}

    def children_of(self, block: BlockHash) -> Collection[BlockHash]:
        """Return the known children of a block."""
        children = self.children.get(block)
        if children is None:
            return ()
        return children if isinstance(children, set) else (children,)

    def is_leaf(self, block: BlockHash) -> bool:
        """Say whether a block is known and has no known child."""
        return block in self.parent and block not in self.children

    def add(self, block: BlockHash, parent: BlockHash | None) -> None:
        """Make an unknown block known below `parent`, None for the root."""
        self.parent[block] = parent
        if parent is None:
            return
        siblings = self.children.get(parent)
        if siblings is None:
            self.children[parent] = block
        elif isinstance(siblings, set):
            siblings.add(block)
        else:
            self.children[parent] = {siblings, block}

    def forget(self, block: BlockHash) -> BlockHash | None:
        """Drop a known block; its children keep naming it. Return its parent, None for the root."""
        parent = self.parent.pop(block)
        if parent is None:
            return None
        siblings = self.children[parent]
        if isinstance(siblings, set):
            siblings.discard(block)
            if len(siblings) == 1:
                self.children[parent] = siblings.pop()
        else:
            del self.children[parent]
        return parent

    def copy(self) -> Chains:
        """Return chains of their own with the same content."""
        other = Chains()
        other.parent = self.parent.copy()
        other.children = self.children.copy()
        other.children.update({p: c.copy() for p, c in self.children.items() if isinstance(c, set)})
        return other
