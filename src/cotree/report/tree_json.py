"""Serialize one tree with its dataset rows to the JSON that the viewer and the report draw."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any

from cotree.report.tree_view import TreeView
from cotree.search.settings import Trees
from cotree.search.store import StoredNode

COLUMNS = ("id", "parent", "type", "text", "prefix", "model", "pattern", "visits", "value", "ucb", "verdict", "detail",
           "answer", "tokens", "finish", "seed", "seconds", "forced", "looped", "order")  # fmt: skip
_EXPLORATION = float(Trees.model_fields["exploration"].default)
_LEAVES = {"leaf_id": "chain", "chosen_leaf": "chosen", "rejected_leaf": "rejected"}


def tree_json(view: TreeView, looping: Collection[int]) -> dict[str, Any]:
    """A tree as plain data: its question, its thoughts as rows of `columns` (parents before children), and the dataset
    rows of its chains.

    looping: leaf ids of chains that repeat themselves (`search.index.looping_leaves`).
    """
    tree = view.tree
    chosen: dict[str, list[dict[str, Any]]] = {}
    for row in view.rows:
        leaves = {column: row.columns[column] for column in _LEAVES if column in row.columns}
        for column, leaf in leaves.items():
            other = next((leaves[name] for name in leaves if name != column), None)
            use = {"leaf": leaf, "as": _LEAVES[column], "other": other, "row": row.number}
            chosen.setdefault(f"datasets/{row.dataset}", []).append(use)
    return {
        "tree": tree.tree_id,
        "question": view.name,
        "task": tree.task,
        "messages": tree.messages,
        "gold": tree.gold or None,
        "settings": {**view.settings, "rollouts taken": tree.rollouts, "stopped": tree.stopped},
        "columns": COLUMNS,
        "thoughts": list(_thoughts(view, looping)),
        "chosen": chosen,
    }


def _thoughts(view: TreeView, looping: Collection[int]) -> Iterator[list[Any]]:
    """The rows of a tree's thoughts, in the order of `COLUMNS`."""
    exploration, nodes = float(view.settings.get("exploration", _EXPLORATION)), view.tree.nodes
    for node in nodes:
        above = None if node.parent_id is None else nodes[node.parent_id]
        yield [
            node.node_id,
            node.parent_id,
            node.type,
            node.text,
            node.prefix,
            node.model,
            view.tree.pattern,
            node.visits,
            node.value,
            _ucb(node, above, exploration),
            node.verdict,
            node.detail,
            node.answer,
            node.tokens,
            node.finish_reason,
            node.seed,
            node.seconds,
            node.is_forced,
            node.node_id in looping,
            node.node_id,
        ]


def _ucb(node: StoredNode, above: StoredNode | None, exploration: float) -> float | None:
    """A node's UCB, v/n + C sqrt(ln N / n), at the end of the search; None for the root and nodes without visits."""
    if above is None or not node.visits:
        return None
    return node.value / node.visits + exploration * math.sqrt(math.log(max(above.visits, 1)) / node.visits)
