"""`like`, `sweep` and `seeds`: what a written entry becomes, and how a wrong one is refused."""

from __future__ import annotations

from typing import Any

import pytest

from cotree.base.errors import UsageError
from cotree.experiment.recipe import Recipe, build_recipe

BASE: dict[str, Any] = {
    "name": "x",
    "models": {"small": {"weights": "smollm2-135m-instruct"}, "far": {"url": "http://127.0.0.1:1", "mode": "chat"}},
    "trees": {"train": {"questions": {"letters": 2}, "roles": {"thinker": "small"}}},
    "datasets": {
        "chains": {"trees": "train", "rows": "sft"},
        "pairs": {"trees": "train", "rows": "dpo"},
    },
    "students": {
        "sft": {"from": "small", "method": "sft", "data": "chains"},
        "dpo": {"from": "sft", "method": "dpo", "data": "pairs", "beta": 0.2},
    },
    "evaluations": {"test": {"models": ["small", "dpo"], "questions": {"letters": 2}}},
}


def recipe(**entries: Any) -> Recipe:
    """The base recipe with entries added or replaced: students__mine={...}."""
    written = {key: dict(value) if isinstance(value, dict) else value for key, value in BASE.items()}
    for name, entry in entries.items():
        kind, _, key = name.partition("__")
        written[kind] = written[kind] | {key: entry}
    return build_recipe(written)


def students(found: Recipe) -> list[str]:
    return [node.name for node in found.of_kind("students")]


def test_like_copies_settings_and_makes_no_edge() -> None:
    found = recipe(students__other={"like": "dpo", "alpha": 0.5})
    node = found.nodes["students/other"]
    assert (node.settings.training.beta, node.settings.training.alpha, node.like) == (0.2, 0.5, "dpo")
    assert node.reads == ("students/sft", "datasets/pairs")


def test_null_takes_the_default_again() -> None:
    found = recipe(students__other={"like": "dpo", "beta": None})
    assert found.nodes["students/other"].settings.training.beta == 0.1


def test_a_sweep_makes_one_node_a_value_in_written_order() -> None:
    found = recipe(students__s={"like": "dpo", "sweep": {"alpha": [1.5, 0.5], "data": ["pairs"]}})
    assert students(found)[2:] == ['s@alpha=1.5,data="pairs"', 's@alpha=0.5,data="pairs"']
    deeper = recipe(students__s={"like": "sft", "sweep": {"lora.rank": [4, 8]}})
    assert [n.settings.training.lora.rank for n in deeper.of_kind("students") if n.entry == "s"] == [4, 8]


def test_seeds_go_down_to_children() -> None:
    found = recipe(
        students__sft={"from": "small", "method": "sft", "data": "chains", "seeds": [0, 3]},
        evaluations__test={"models": ["small", "dpo"], "questions": {"letters": 2}},
    )
    assert students(found) == ["sft@seed=0", "sft@seed=3", "dpo@seed=0", "dpo@seed=3"]
    child = found.nodes["students/dpo@seed=3"]
    assert child.settings.parent == "sft@seed=3" and child.seed == 3
    assert found.nodes["evaluations/test"].settings.models == ("small", "dpo@seed=0", "dpo@seed=3")


def test_a_sweep_of_seeded_students_has_both() -> None:
    found = recipe(students__s={"like": "sft", "seeds": [1, 2], "sweep": {"epochs": [1, 2]}})
    names = [node.name for node in found.of_kind("students") if node.entry == "s"]
    assert names == ["s@epochs=1,seed=1", "s@epochs=1,seed=2", "s@epochs=2,seed=1", "s@epochs=2,seed=2"]
    child = recipe(
        students__s={"like": "sft", "seeds": [1, 2], "sweep": {"epochs": [1, 2]}},
        students__c={"like": "dpo", "from": "s@epochs=2"},
    )
    assert [n.settings.parent for n in child.of_kind("students") if n.entry == "c"] == names[2:]


def test_nodes_come_after_what_they_read() -> None:
    found = recipe(
        trees__second={"like": "train", "roles": {"thinker": "dpo"}},
        datasets__more={"trees": ["train", "second"], "rows": "sft"},
    )
    order = list(found.nodes)
    assert all(order.index(read) < order.index(node.id) for node in found.nodes.values() for read in node.reads)
    assert found.nodes["trees/second"].reads == ("students/dpo",)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"students__a": {"like": "dpp"}}, "students.a.like: unknown students entry `dpp`; did you mean `dpo`?"),
        ({"students__a": {"like": "b"}, "students__b": {"like": "a"}}, "students: a is like b is like a: a circle"),
        ({"students__a": {"like": "sft", "from": "b"}, "students__b": {"like": "sft", "from": "a"}}, "is a circle"),
        ({"students__a": {"like": "sft", "from": "smal"}}, "unknown model or student `smal`; did you mean `small`?"),
        ({"students__a": {"like": "sft", "from": "far"}}, "`far` is a server; a student's weights must be here"),
        ({"students__small": {"like": "sft"}}, "`small` is a model and a student"),
        ({"students__a": {"like": "sft", "data": "pairs"}}, "sft trains on sft rows, `pairs` has dpo"),
        ({"students__a": {"like": "sft", "data": "chain"}}, "unknown datasets entry `chain`; did you mean `chains`?"),
        ({"students__a": {"like": "sft", "method": "dppo"}}, "unknown method `dppo`; did you mean `dpo`?"),
        ({"students__a.b": {"like": "sft"}}, "a name has letters, digits"),
        ({"students__a": {"like": "sft", "epoch": 2}}, "`students.a`: unknown key `epoch`; did you mean `epochs`?"),
        ({"students__a": {"like": "sft", "seeds": [1, 1]}}, "`seeds` is a list of different whole numbers"),
        ({"trees__a": {"like": "train", "seeds": [1]}}, "`seeds` is for students"),
        ({"students__a": {"like": "sft", "sweep": {"alpha": 1}}}, "must be {key: [values]}"),
        ({"students__a": {"like": "dpo", "sweep": {"beta": [2], "alpha": [1, 0.5, 1.0]}}}, "`alpha` has a value twice"),
        ({"students__a": {"like": "dpo", "sweep": {"data": ["pairs", "pairs"]}}}, "`data` has a value twice"),
        (
            {"students__a": {"like": "dpo", "sweep": {"beta": [1, 2]}}, "students__b": {"like": "dpo", "from": "a"}},
            "is a sweep of several students; name one of a@beta=1, a@beta=2",
        ),
        (
            {"students__a": {"like": "sft", "seeds": [0, 1]}, "trees__b": {"like": "train", "roles": {"thinker": "a"}}},
            "trees.b.roles: `a` means several; name one of a@seed=0, a@seed=1",
        ),
        ({"trees__a": {"like": "train", "roles": {"thinkr": "small"}}}, "`thinker` is missing"),
        ({"trees__a": {"like": "train", "questions": {"leters": 2}}}, "unknown task `leters`; did you mean `letters`?"),
        ({"trees__a": {"like": "train", "tokens_of": "train"}}, "`tokens_of` is for `method: sampling`"),
        (
            {"datasets__a": {"like": "chains", "length": {"longer": 1}}},
            "`datasets.a.length`: unknown length `longer`; did you mean `longest`?",
        ),
        ({"datasets__a": {"like": "chains", "length": "shorter"}}, "`shorter`; did you mean `shortest`?"),
        ({"datasets__a": {"like": "chains", "length": [1]}}, "unknown length `[1]`; known: longest, medium, shortest"),
        ({"datasets__a": {"like": "chains", "length": {"longest": 0.5}}}, "a weight is a whole number of at least 1"),
        ({"datasets__a": {"like": "chains", "rejected": "wrong"}}, "`rejected` is for rows: dpo, not sft"),
        (
            {"datasets__a": {"file": "x.jsonl", "rows": "sft", "length": "longest"}},
            "the rows of a file are taken as they are",
        ),
        ({"evaluations__a": {"like": "test", "samples": 4}}, "several samples need a temperature"),
        ({"evaluations__a": {"like": "test", "models": ["smal"]}}, "unknown model or student `smal`"),
    ],
)
def test_faults_name_the_entry_and_the_fix(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        recipe(**entries)
    assert message in str(raised.value) and "\n" not in str(raised.value)
