"""Where trees are kept."""

from cotree.store.tree_store import StoredNode, StoredTree, TreeStore

__all__ = ["StoredNode", "StoredTree", "TreeStore"]
