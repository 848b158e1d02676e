"""Grow a tree of thoughts for four questions with a 135M model in this process, and walk through one."""

from pathlib import Path

import cotree

recipe = cotree.build_recipe(
    {
        "name": "example",
        "models": {"small": {"weights": "smollm2-135m-instruct", "max_in_flight": 8}},
        "trees": {
            "train": {
                "questions": {"arithmetic": 4},
                "roles": {"thinker": "small"},
                "rollouts": 6,
                "temperature": 1.0,
                "ends": "line",
                "max_thought_tokens": 32,
            }
        },
    }
)
run = cotree.open_run(cotree.run(recipe, Path("runs")).path)
for tree in run.trees("train"):
    answers = [node.verdict for node in tree.nodes if node.type == "answer"]
    print(tree.question_id, "correct:", answers.count("correct"), "wrong:", answers.count("wrong"))

best = max(run.trees("train"), key=lambda tree: len(tree.nodes))
for node in best.nodes[1:]:
    print("  " * node.depth, node.type, repr(node.text), node.verdict or f"v/n {node.value:g}/{node.visits}")
