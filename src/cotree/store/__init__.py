"""Where trees are kept."""

from cotree.store.tree_store import Call, StoredNode, StoredTree, TreeStore

__all__ = ["Call", "StoredNode", "StoredTree", "TreeStore"]
