"""A recipe is checked before anything is spent, and errors name the fault and the fix."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.experiment.test_entries import BASE
from tests.experiment.test_fingerprints import prints_of

from cotree.base.errors import UsageError
from cotree.experiment.recipe import build_recipe, load_recipe, recipe_yaml, write_starter

RECIPES = Path(__file__).parents[2] / "recipes"
LAPTOP = RECIPES / "laptop.yaml"


@pytest.mark.parametrize(
    "path", [*sorted(RECIPES.glob("*.yaml")), *sorted(RECIPES.glob("paper/*.yaml"))], ids=lambda p: p.name
)
def test_shipped_recipes_load(path: Path) -> None:
    assert load_recipe(path).name == path.stem


def test_the_laptop_recipe_stays_small() -> None:
    lines = [line for line in LAPTOP.read_text().splitlines() if line.strip() and not line.strip().startswith("#")]
    assert len(lines) < 45


def test_the_starter_is_a_recipe(tmp_path: Path) -> None:
    assert "cotree plan" in write_starter(tmp_path / "mine.yaml")
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert recipe.name == "mine" and list(recipe.nodes)[-1] == "evaluations/test"
    # What it shows in comments is right as well.
    shown = [line.replace("  # ", "  ", 1) for line in (tmp_path / "mine.yaml").read_text().splitlines()]
    arms = [line for line in shown if line.startswith(("  plain:", "  beta:"))]
    written = yaml.safe_load((tmp_path / "mine.yaml").read_text())
    written["students"] |= yaml.safe_load("\n".join(arms))
    assert [n.name for n in build_recipe(written).of_kind("students")][2:] == [
        "plain",
        "beta@beta=0.05",
        "beta@beta=0.3",
    ]
    with pytest.raises(UsageError, match="is there already"):
        write_starter(tmp_path / "mine.yaml")


def test_what_the_run_folder_keeps_is_the_same_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(LAPTOP, ["trees.train.rollouts=3", "name=x", "students.dpo.beta=0.3"])
    assert recipe.nodes["trees/train"].settings.rollouts == recipe.nodes["trees/sampled"].settings.rollouts == 3
    assert recipe.nodes["students/plain_dpo"].settings.training.beta == 0.3, "entries that are like it follow"
    (tmp_path / "r.yaml").write_text(recipe_yaml(recipe))
    again = load_recipe(tmp_path / "r.yaml")
    assert again.name == "x"
    assert prints_of(recipe) == prints_of(again)


def test_paths_are_relative_to_the_recipes_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "experiments"
    folder.mkdir()
    for name in ("rows.jsonl", "own.yaml", "tiny.gguf", "reward.py"):
        (folder / name).touch()
    written = {
        "name": "x",
        "models": {"m": {"weights": "tiny.gguf"}, "far": {"url": "http://x", "tokenizer": "Qwen/Qwen2.5-7B"}},
        "trees": {
            "t": {"questions": {"own.yaml": 1}, "roles": {"thinker": "m"}, "reward": {"function": "reward.py:f"}}
        },
        "datasets": {"d": {"file": "rows.jsonl", "rows": "sft", "tokenizer": "m"}},
    }
    (folder / "r.yaml").write_text(yaml.safe_dump(written))
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(folder / "r.yaml")
    assert recipe.models["m"].weights == str(folder / "tiny.gguf")
    assert recipe.models["far"].tokenizer == "Qwen/Qwen2.5-7B"
    assert list(recipe.nodes["trees/t"].settings.questions) == [str(folder / "own.yaml")]
    assert recipe.nodes["trees/t"].settings.reward.function == f"{folder / 'reward.py'}:f"
    assert recipe.nodes["datasets/d"].settings.file == str(folder / "rows.jsonl")
    (tmp_path / "here.jsonl").touch()
    given = load_recipe(folder / "r.yaml", ["datasets.d.file=here.jsonl"])
    assert given.nodes["datasets/d"].settings.file == str(tmp_path / "here.jsonl"), "a typed path is the shell's"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trees.train.rolouts=3", r"`trees.train`: unknown key `rolouts`; did you mean `rollouts`\?"),
        ("models.smollm2.weihts=x", r"`models.smollm2`: unknown key `weihts`; did you mean `weights`\?"),
        ("tree.train.rollouts=3", r"unknown key `tree`; did you mean `trees`\?"),
        ("trees.train.roles.thinker=smollm", r"unknown model or student `smollm`; did you mean `smollm2`\?"),
        ("trees.train.roles={}", "`thinker` is missing"),
        ("trees.train.questions.leters=3", r"unknown task `leters`; did you mean `letters`\?"),
        ("trees.train.patterns=[plane]", r"unknown pattern `plane`; did you mean `plain`\?"),
        ("students.dpoo.beta=0.3", r"unknown students entry `dpoo`; did you mean `dpo`\?"),
        ("trees.train.rollouts=0", "`trees.train.rollouts`: must be greater than or equal to 1$"),
        ("students.sft.micro_batch_size=2", "`students.sft`: unknown key `micro_batch_size`"),
        ("models.smollm2.url=http://x", "exactly one of `weights`"),
        ("trees.train.thoughts={answer: {prefixes: ['So:']}}", r"`So:` opens no box; end it with \\boxed\{"),
        ("trees.train.thoughts={plan: {}}", "own type `plan` needs `prefixes`"),
        ("trees.train.thoughts={plan: {prefixes: [P], role: plnner}}", r"unknown role `plnner`"),
        ("trees.train.patterns={mine: {root: {thinking: 1}}}", "from `thinking` no answer can be reached"),
        ("name=a/b", "`name` is missing, or has other signs"),
        ("seed=x", "`seed` must be a whole number"),
        ("{search: 3}", "is no setting"),
        ("trees=3", "`trees` must be a section of named entries"),
        ("trees.train=3", "trees.train: must be a section of keys, like {}$"),
        ("trees.train.rollouts=2.5", "`trees.train.rollouts`: must be a whole number$"),
        ("datasets.sft.verified=maybe", "`datasets.sft.verified`: must be true or false$"),
        (
            "trees.train.questions={}",
            "`trees.train`: `questions` is missing; give {task: how many}, or a `file` of rollouts$",
        ),
        ("evaluations.test.gguf=Q4", "`evaluations.test.gguf`: must be 'F32', 'F16' or 'Q8_0'$"),
        ("students.sft.learning_rate=.inf", "finite number"),
        ("trees.train.rollouts", "is no setting"),
        ("name.x.y=1", "is a value, not a section"),
        ("search.rollouts=4", r"recipe of an older form \(`search`\).*docs/migration.md"),
        ("thoughts={}", "unknown key `thoughts`; it is a setting of an entry of `trees`"),
    ],
)
def test_faults_are_named(override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_recipe(LAPTOP, [override])


def test_a_folder_is_no_recipe_but_a_run_is(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is a folder without a recipe\.yaml"):
        load_recipe(tmp_path)
    (tmp_path / "recipe.yaml").write_text(LAPTOP.read_text())
    assert load_recipe(tmp_path).home is None
    (tmp_path / ".lock").touch()
    assert load_recipe(tmp_path).home == load_recipe(tmp_path / "recipe.yaml").home == tmp_path
    assert load_recipe(tmp_path, ["name=new"]).home is None


@pytest.mark.parametrize("text", ["{", "- a\n- b", "just words", "\x00", "name: x"])
def test_files_that_are_no_recipe(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"r\.yaml"):
        load_recipe(tmp_path / "r.yaml")


def test_own_thought_types_need_no_source(tmp_path: Path) -> None:
    pattern = "{mine: {root: {plan: 1}, plan: {thinking: 2}, thinking: {answer: 1}, reflection: {thinking: 1}}}"
    recipe = load_recipe(
        LAPTOP,
        [
            "trees.train.thoughts={plan: {prefixes: ['My plan:'], role: planner}}",
            f"trees.train.patterns={pattern}",
            "trees.train.roles.planner=smollm2",
        ],
    )
    assert list(recipe.nodes["trees/train"].settings.patterns) == ["mine"]


def test_a_swept_value_that_is_no_folders_name_is_refused() -> None:
    sweep = f"{{like: dpo, sweep: {{data: [{'pairs' * 39}]}}}}"
    with pytest.raises(UsageError, match=r"students\.long: its name with the swept values is too long"):
        load_recipe(LAPTOP, [f"students.long={sweep}", f"datasets.{'pairs' * 39}={{like: pairs}}"])


def with_everything() -> dict[str, Any]:
    """A recipe in which every kind of section and reference is."""
    raw = copy.deepcopy(BASE)
    raw["models"]["near"] = {"url": ["http://x"], "tokenizer": "a/b", "price": {"prompt": 1}}
    raw["trees"]["own"] = {
        "questions": {"letters": 1}, "roles": {"thinker": ["small", {"model": "small", "temperature": 1}]},
        "reward": {"judge": "far"}, "thoughts": {"plan": {"prefixes": ["Plan:"], "role": "thinker"}},
        "patterns": {"plain": None}, "stop": {"correct": 1},
    }  # fmt: skip
    raw["trees"]["sampled"] = {"like": "train", "method": "sampling", "tokens_of": "train"}
    raw["datasets"]["file"] = {"file": "rows.jsonl", "rows": "sft", "tokenizer": "small", "gates": {"loops": False}}
    raw["datasets"]["two"] = {"trees": ["train", "own"], "rows": "sft", "size_of": "chains", "length": {"longest": 1}}
    raw["students"]["swept"] = {"like": "dpo", "sweep": {"alpha": [1, 2]}, "seeds": [0, 1], "lora": {"rank": 2}}
    search = {"models": ["small"], "questions": {"letters": 2}, "strategy": "vote", "temperature": 1}
    raw["evaluations"] |= {"vote": search | {"budget_tokens": 3}, "equal": search | {"tokens_of": "vote"}}
    return raw


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in plain data, as the keys and indices that lead there."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*at, key)
        yield from places(value[key], (*at, key))


WHOLE = with_everything()
odd = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 3) | st.floats() | st.sampled_from(["", "~x", "\0", "x" * 5000, "é\n"])
    | st.sampled_from(["small", "sft", "train", "chains", "swept@alpha=1", "swept@seed=0", "letters", "thinker"]),
    lambda inner: st.lists(inner, max_size=2)
    | st.dictionaries(st.none() | st.integers(0, 2) | st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)  # fmt: skip


@given(place=st.sampled_from([*places(WHOLE)]), value=odd, as_key=st.booleans())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_fault_is_one_line(tmp_path: Path, place: tuple[Any, ...], value: Any, as_key: bool) -> None:
    raw = copy.deepcopy(WHOLE)
    *before, last = place
    section: Any = raw
    for key in before:
        section = section[key]
    if as_key and isinstance(section, dict) and not isinstance(value, list | dict):
        section[value] = section.pop(last)
    else:
        section[last] = value
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(raw, sort_keys=False, allow_unicode=True))
    try:
        recipe = load_recipe(tmp_path / "r.yaml")
        assert all(set(node.reads) <= set(recipe.nodes) for node in recipe.nodes.values())
        load_recipe(
            tmp_path / "r.yaml", [f"{'.'.join(map(str, place))}={yaml.safe_dump(value, default_flow_style=True)}"]
        )
    except UsageError as error:
        fault = str(error)
        assert "\n" not in fault and fault.startswith(str(tmp_path / "r.yaml"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trees.train.questions": {"nowhere.yaml": 2}}, "trees.train.questions: no task file at .*nowhere.yaml"),
        ({"models.tny.gguf": "F16"}, "unknown models entry `tny`"),
    ],
)
def test_what_is_not_here_is_named_when_the_recipe_is_read(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    with pytest.raises(UsageError, match=message):
        load_recipe(LAPTOP, overrides)


def test_only_names_the_node_of_a_bare_name() -> None:
    with pytest.raises(UsageError, match="did you mean `students/dpo`"):
        load_recipe(LAPTOP).with_needed(["dpo"])


def test_a_run_of_an_older_cotree_and_a_node_for_a_setting_are_named(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").touch()
    with pytest.raises(UsageError, match=r"a run of an older cotree.*docs/migration\.md"):
        load_recipe(tmp_path)
    for word in ("students/dpo", "trees"):
        with pytest.raises(UsageError, match=f"`{word}` is a node or a kind, no setting; .* --only {word}"):
            load_recipe(LAPTOP, [word])
