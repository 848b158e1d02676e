"""What decides a node's content changes its fingerprint and those of all that reads it; nothing else changes any."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cotree.base.run_folder import KINDS
from cotree.base.settings import NOT_CONTENT, Section
from cotree.data.settings import Dataset, Gates
from cotree.eval.settings import Evaluation
from cotree.experiment.fingerprints import Fingerprints
from cotree.experiment.recipe import Recipe, build_recipe
from cotree.models.settings import Model
from cotree.search.settings import Reward, Stop, Thought, Trees, Writer
from cotree.train.settings import DPO, SFT, LoRA, Probe

Prints = dict[str, str]
PATTERN = {"root": {"sub_task": 1}, "sub_task": {"thinking": 2, "hypothesis": 1}, "hypothesis": {"answer": 1},
           "thinking": {"answer": 1}, "reflection": {"thinking": 1}}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the recipe names: weights (any bytes will do, as none is loaded), rows, a reward."""
    folder = tmp_path_factory.mktemp("inputs")
    for name in ("tiny.gguf", "other.gguf", "rows.jsonl", "more.jsonl", "trees.parquet"):
        (folder / name).write_text(f"GGUF of {name}")
    for name in ("reward.py", "other.py"):
        (folder / name).write_text(f"def f(question, text, verdict):\n    return 0.5  # {name}\ng = f\n")
    return folder


def written(folder: Path) -> dict[str, Any]:
    """A recipe with edges of every kind: a chain of three students, a second round, sampling, a judge, a corpus."""
    questions = {"arithmetic": 2, "letters": 2}
    return {
        "name": "x",
        "seed": 0,
        "models": {
            "far": {"url": "http://127.0.0.1:1", "model": "large", "mode": "chat"},
            "near": {"url": ["http://127.0.0.1:2"], "model": "near", "tokenizer": "some/tokenizer"},
            "tiny": {"weights": str(folder / "tiny.gguf")},
        },
        "trees": {
            "train": {
                "questions": questions, "roles": {"thinker": "far", "reflector": [{"model": "near"}]},
                "patterns": {"plain": None, "mine": copy.deepcopy(PATTERN)},
                "thoughts": {"double_check": {"prefixes": ["Check:"]}}, "stop": {"correct": 3},
                "reward": {"judge": "near"},
            },
            "sampled": {
                "questions": questions, "roles": {"thinker": "far"}, "method": "sampling", "tokens_of": "train",
            },
            "second": {"questions": questions, "roles": {"thinker": "sft"}, "patterns": ["plain"]},
        },
        "datasets": {
            "chains": {"trees": "train", "rows": "sft"},
            "control": {"trees": "train", "rows": "sft", "verified": False, "size_of": "chains"},
            "pairs": {"trees": ["train", "second"], "rows": "dpo", "questions_of": "chains"},
            "steps": {"trees": "sampled", "rows": "step_pairs"},
            "corpus": {"file": str(folder / "rows.jsonl"), "rows": "sft"},
        },
        "students": {
            "sft": {"from": "tiny", "method": "sft", "data": "chains"},
            "control": {"from": "tiny", "method": "sft", "data": "control"},
            "dpo": {"from": "sft", "method": "dpo", "data": "pairs", "lora": {"rank": 4}, "probe": {"every": 9}},
            "last": {"from": "dpo", "method": "sft", "data": "corpus"},
        },
        "evaluations": {
            "test": {"models": ["far", "tiny", "sft", "dpo"], "questions": questions},
            "search": {
                "models": ["sft"], "questions": questions, "strategy": "vote", "temperature": 0.7, "budget_tokens": 9,
            },
            "equal": {
                "models": ["sft"], "questions": questions, "strategy": "mcts", "temperature": 0.7,
                "tokens_of": "search",
            },
        },
    }  # fmt: skip


def prints_of(recipe: Recipe) -> Prints:
    """The fingerprint of every node, and of evaluations of every cell, by name."""
    prints = Fingerprints(recipe)
    found: Prints = {}
    for node in recipe.nodes.values():
        if node.kind == "evaluations":
            found |= {f"{node.id}/{model}": prints.of(node.id, model).of for model in node.settings.models}
        else:
            found[node.id] = prints.of(node.id).of
    return found


def depending(recipe: Recipe, changed: set[str]) -> set[str]:
    """The changed nodes and cells, and all that reads one of them, at once or through others."""
    found = set(changed)
    for node in recipe.nodes.values():  # each comes after those that it reads
        if node.kind != "evaluations" and found & {*node.reads}:
            found.add(node.id)
        for model in node.settings.models if node.kind == "evaluations" else ():
            other = node.settings.tokens_of
            if f"students/{model}" in found or f"evaluations/{other}/{model}" in found:
                found.add(f"{node.id}/{model}")
    return found


def changed_by(raw: dict[str, Any], before: Prints, *changes: tuple[str, Any]) -> set[str]:
    """The names whose fingerprint is another when `a.b.c` values of the written recipe are changed."""
    raw = copy.deepcopy(raw)
    for path, value in changes:
        *sections, last = path.split(".")
        place = raw
        for section in sections:
            place = place.setdefault(section, {}) if isinstance(place, dict) else place[int(section)]
        place[last] = value
    now = prints_of(build_recipe(raw))
    assert now.keys() == before.keys()
    return {name for name, of in now.items() if of != before[name]}


# For every setting of every section another value than the one above, at an entry that has it; None: what the test
# below gives it. A setting that is missing here fails `test_every_setting_is_in_the_table`.
SETTINGS: Mapping[type[Section], tuple[str, Mapping[str, Any]]] = {
    Model: ("models.far", {
        "weights": None, "gguf": None, "engine": None, "engine_args": None,
        "tokenizer": "other/tokenizer", "mode": None, "model": "larger",
        "url": "http://elsewhere:9", "api_key_env": "KEY", "max_in_flight": 3, "timeout": 60.0,
        "price": {"completion": 2.0},
        "omit": ["seed"], "rename": {"max_tokens": "max_completion_tokens"},
    }),
    Trees: ("trees.train", {
        "rollouts": 3, "leaves_per_round": 1, "exploration": 0.5, "widen": True, "seek": "pairs",
        "ends": "line", "examples": 1,
        "patterns": ["plain"], "thoughts": {},
        "temperature": 0.3, "top_p": 0.5, "max_thought_tokens": 9, "max_chain_tokens": 9,
        "max_depth": 7, "max_reflections": 1, "stop": {},
        "adaptive": True, "reward": None, "trees_in_flight": 1, "questions": {"arithmetic": 2, "letters": 3},
        "split": "dev", "roles": {"thinker": "near"}, "method": "sampling", "tokens_of": None,
        "file": None, "tokenizer": None, "task": None, "correct_at": None,  # test_imported.py
        "parquet": None,
    }),
    Writer: ("trees.train.roles.reflector.0", {"model": "far", "temperature": 0.1, "top_p": 0.2}),
    Thought: ("trees.train.thoughts.double_check", {
        "text": None, "prefixes": ["Once more:"], "role": "thinker", "max_tokens": 5, "ends": "paragraph",
        "thought_tokens": None,
    }),
    Stop: ("trees.train.stop", {"correct": 2, "wrong": 1, "easy": 2, "hopeless": 2, "tokens": 99, "seconds": 9.0}),
    Reward: ("trees.train.reward", {
        "function": None, "judge": "far", "samples": 2, "process": None, "separator": "<s>", "combine": "last",
    }),
    Dataset: ("datasets.chains", {
        "trees": ["train", "sampled"], "file": None, "hub": None, "rows": None, "length": "medium", "select": "random",
        "verified": False, "per_tree": 2, "rejected": None, "unanswered": None, "forced": False,
        "solve_rate": [0.1, 0.9], "questions_of": "corpus",
        "size_of": "corpus", "size_in": None, "min_gap": None, "min_visits": None,
        "label_above": None, "annotations": "drop_rejected", "text": "think",
        "leave_out": ["sub_task"], "reflections": "cut", "max_tokens": 99,
        "gates": {"loops": False}, "tokenizer": "near", "license": "mit",
    }),
    Gates: ("datasets.chains.gates", {
        "contamination": False, "loops": False, "language": False, "duplicates": False, "rows_per_question": 2,
        "balance": ["task"], "at_most": 2.0,
    }),
    SFT: ("students.sft", {
        "learning_rate": 1e-5, "epochs": 2, "batch_size": 2, "max_tokens": 99, "pack_tokens": 99, "warmup_ratio": 0.2,
        "weight_decay": 0.1, "max_grad_norm": 2.0, "save_steps": 3, "precision": "bf16", "gradient_checkpointing": True,
        "compile": True, "lora": {"rank": 2}, "report_to": ["tensorboard"], "probe": {"every": 2}, "sft_scope": "dedup",
        "save_dtype": "bf16", "gpus": 2, "shard": True,
    }),
    DPO: ("students.dpo", {
        "learning_rate": 1e-5, "epochs": 2, "batch_size": 2, "max_tokens": 99, "pack_tokens": 99, "warmup_ratio": 0.2,
        "weight_decay": 0.1, "max_grad_norm": 2.0, "save_steps": 3, "precision": "bf16", "gradient_checkpointing": True,
        "compile": True, "lora": {}, "report_to": ["tensorboard"], "probe": {}, "loss": "simpo", "beta": 0.2,
        "label_smoothing": 0.2, "simpo_gamma": 0.1, "ld_alpha": 0.1, "reference_free": True, "alpha": 0.5,
        "mask_prefix": False, "sft_norm": "pair", "sft_scope": "full", "save_dtype": "bf16", "gpus": 2, "shard": True,
    }),
    LoRA: ("students.dpo.lora", {"rank": 2, "alpha": 2}),
    Probe: ("students.dpo.probe", {"every": 2, "questions": 2, "max_tokens": 9, "stop_rise": 0.5, "keep": "best"}),
    Evaluation: ("evaluations.search", {
        "max_tokens": 9, "samples": 2, "temperature": 0.2, "top_p": 0.2, "seed": 3, "examples": True,
        "strategy": "beam", "value": "likelihood", "budget_tokens": 7, "gguf": "F16", "questions": {"letters": 2},
        "split": None, "tokens_of": None, "models": None,
    }),
}  # fmt: skip
# What a changed model decides: itself where it is asked, and what is made of its weights.
MODELS = {"models.far": {"trees/train", "trees/sampled", "evaluations/test/far"}}


# Of the evaluations above, the cells of weights.
CELLS = ("test/tiny", "test/sft", "test/dpo", "search/sft", "equal/sft")


def sources(place: str) -> set[str]:
    """The nodes whose own content a setting at `a.b.c` belongs to."""
    kind, name = place.split(".")[:2]
    cells = {"search": {"evaluations/search/sft"}}
    return MODELS.get(place) or (cells[name] if kind == "evaluations" else {f"{kind}/{name}"})


def changes(*, marked: bool) -> Iterator[tuple[str, Any]]:
    """The rows of the table whose settings are marked NOT_CONTENT, or the others."""
    for section, (place, values) in SETTINGS.items():
        for name, value in values.items():
            field = next(f for key, f in section.model_fields.items() if (f.alias or key) == name)
            if value is not None and (NOT_CONTENT in field.metadata) == marked:
                yield f"{place}.{name}", value


CONTENT, SPEED = dict(changes(marked=False)), dict(changes(marked=True))


@pytest.mark.parametrize("section", SETTINGS, ids=lambda section: section.__name__)
def test_every_setting_is_in_the_table(section: type[Section]) -> None:
    assert {field.alias or name for name, field in section.model_fields.items()} == set(SETTINGS[section][1])


def test_what_changes_speed_or_place_only_is_in_no_fingerprint(folder: Path) -> None:
    raw = written(folder)
    assert {path.rpartition(".")[2] for path in SPEED} == {
        "url", "rename", "api_key_env", "max_in_flight", "timeout", "price", "trees_in_flight", "license",
        "pack_tokens",
        "save_steps", "gradient_checkpointing", "compile", "gpus", "shard", "report_to",
    }  # fmt: skip
    before = prints_of(build_recipe(raw))
    for path, value in SPEED.items():
        assert changed_by(raw, before, (path, value)) == set(), path
    assert changed_by(raw, before, *SPEED.items()) == set()


def test_what_decides_content_changes_a_node_and_what_reads_it(folder: Path) -> None:
    raw = written(folder)
    recipe = build_recipe(raw)
    before = prints_of(recipe)
    for path, value in CONTENT.items():
        place = path.rpartition(".")[0]
        assert changed_by(raw, before, (path, value)) == depending(recipe, sources(place)), path


# Changes of one entry that go together with any of another.
_TOGETHER = [path for path in (*CONTENT, *SPEED) if path.count(".") == 2 and path.split(".")[0] != "datasets"]


@given(chosen=st.sets(st.sampled_from([*_TOGETHER, "datasets.pairs.length", "datasets.corpus.max_tokens"]), max_size=5))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_changes_together_change_what_each_would(folder: Path, chosen: set[str]) -> None:
    values = CONTENT | SPEED | {"datasets.pairs.length": "medium", "datasets.corpus.max_tokens": 99}
    places = {path.rpartition(".")[0] for path in chosen if path not in SPEED}
    kinds = [path.split(".")[1] for path in chosen]
    if len(kinds) > len(set(kinds)):  # settings of one entry may exclude each other
        chosen, places = set(), set()
    raw = written(folder)
    recipe = build_recipe(raw)
    found = changed_by(raw, prints_of(recipe), *((path, values[path]) for path in sorted(chosen)))
    assert found == depending(recipe, set().union(*map(sources, places)))


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        (("seed", 1), {"trees/train", "trees/second", "datasets/corpus", "students/sft", "students/control"}),
        (("models.near.model", "other"), {"trees/train"}),
        (("models.near.mode", "chat"), {"trees/train"}),
        (("models.tiny.gguf", "F16"), {"trees/second"}),  # at which a student writes; evaluations have their own
        (("models.tiny.weights", "other.gguf"), {"datasets/chains", "datasets/control", "datasets/pairs",
                                                 "datasets/steps", "datasets/corpus", "evaluations/test/tiny"}),
        (("trees.train.reward", {"function": "reward.py:f"}), {"trees/train"}),
        (("trees.sampled.rollouts", 3), {"trees/sampled"}),
        (("trees.train.parquet", "trees.parquet"), {"trees/train"}),
        (("datasets.corpus.file", "more.jsonl"), {"datasets/corpus"}),
        (("datasets.steps.rows", "stepwise"), {"datasets/steps"}),
        (("students.last.from", "sft"), {"students/last"}),
        (("students.last.data", "control"), {"students/last"}),
        (("datasets.pairs.rejected", "longer_correct"), {"datasets/pairs"}),
        (("datasets.pairs.unanswered", True), {"datasets/pairs"}),
        (("datasets.steps.min_gap", 0.1), {"datasets/steps"}),
        (("datasets.steps.min_visits", 3), {"datasets/steps"}),
        (("datasets.control.size_in", "tokens"), {"datasets/control"}),
        (("evaluations.equal.seed", 2), {"evaluations/equal/sft"}),
        (("evaluations.search.split", "dev"), {"evaluations/search/sft", "datasets/corpus"}),
        (("evaluations.test.questions", {"arithmetic": 2, "letters": 3}),
         {"evaluations/test/far", "evaluations/test/tiny", "evaluations/test/sft", "evaluations/test/dpo",
          "datasets/corpus"}),  # of a file every row is compared with every question that is asked
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)  # fmt: skip
def test_inputs_and_edges_count(folder: Path, change: tuple[str, Any], changed: set[str]) -> None:
    path, value = change
    raw = written(folder)
    recipe = build_recipe(raw)
    if isinstance(value, str) and (folder / value).exists():
        value = str(folder / value)
    if path.endswith("reward"):
        value = {"function": f"{folder / 'reward.py'}:f"}
    assert changed_by(raw, prints_of(recipe), (path, value)) == depending(recipe, changed)


def test_the_engine_of_weights_counts_where_they_write_and_its_speed_does_not(folder: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "config.json").write_text("{}")
    (weights / "model.safetensors").write_bytes(b"weights")
    (weights / "tokenizer.json").write_text("{}")
    raw = written(folder)
    raw["models"]["tiny"]["weights"] = str(weights)
    recipe = build_recipe(raw)
    before, writes = prints_of(recipe), {"trees/second", *(f"evaluations/{cell}" for cell in CELLS)}
    engine = ("models.tiny.engine", "vllm")
    assert changed_by(raw, before, engine) == depending(recipe, writes)
    raw["models"]["tiny"]["engine"] = "vllm"
    before = prints_of(recipe := build_recipe(raw))
    for name, value in ("tensor_parallel_size", 2), ("max_num_seqs", 8):
        assert changed_by(raw, before, ("models.tiny.engine_args", {name: value})) == set()
    assert changed_by(raw, before, ("models.tiny.engine_args", {"dtype": "float32"})) == depending(recipe, writes)


def test_the_text_of_a_question_a_row_or_a_reward_counts_and_the_place_of_a_file_does_not(tmp_path: Path) -> None:
    """Own tasks are known by their questions, files by their bytes."""

    def prints(folder: Path) -> Prints:
        own = str(folder / "own.yaml")
        models = {"far": {"url": "http://127.0.0.1:1", "mode": "chat"}, "tiny": {"weights": str(folder / "tiny.gguf")}}
        trees = {"t": {"questions": {own: 2}, "roles": {"thinker": "far"}, "reward": {"function": f"{folder}/r.py:f"}}}
        datasets = {"d": {"file": str(folder / "rows.jsonl"), "rows": "sft", "gates": {"contamination": False}}}
        evaluations = {"e": {"models": ["tiny"], "questions": {own: 2}, "split": "train"}}
        raw = {"name": "x", "models": models, "trees": trees, "datasets": datasets, "evaluations": evaluations}
        return prints_of(build_recipe(raw))

    for folder in (tmp_path / "here", tmp_path / "there"):
        folder.mkdir()
        (folder / "own.yaml").write_text("name: own\ndata: questions.jsonl\nverifier: text\nprompt: '{question}'\n")
        for name in ("tiny.gguf", "rows.jsonl", "r.py"):
            (folder / name).write_text(f"GGUF {name}")
        (folder / "questions.jsonl").write_text(
            "".join(f'{{"id": "{i}", "question": "Why {i}?", "answer": "{i}"}}\n' for i in range(40))
        )
    before, folder = prints(tmp_path / "here"), tmp_path / "there"
    assert prints(folder) == before
    for name, changed in (
        ("questions.jsonl", {"trees/t", "evaluations/e/tiny"}),
        ("tiny.gguf", {"datasets/d", "evaluations/e/tiny"}),
        ("rows.jsonl", {"datasets/d"}),
        ("r.py", {"trees/t"}),
        ("own.yaml", {"trees/t", "evaluations/e/tiny"}),
    ):
        text = (folder / name).read_text()
        other = text.replace('"answer": "', '"answer": "1').replace("verifier: text", "verifier: number")
        (folder / name).write_text(other if other != text else f"{text}!")
        now = prints(folder)
        assert {node for node in now if now[node] != before[node]} == changed, name
        (folder / name).write_text(text)
    assert prints(folder) == before


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_+-]{0,8}", fullmatch=True)


@given(
    new=st.lists(names, min_size=20, max_size=20, unique=True),
    run=st.from_regex(r"[a-z0-9][a-z0-9._-]{0,8}", fullmatch=True),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_names_play_no_part(folder: Path, new: list[str], run: str) -> None:
    raw = written(folder)
    before = prints_of(build_recipe(raw))
    named = iter(new)
    renamed = {(kind, name): next(named) for kind in ("models", *KINDS) for name in raw[kind]}
    known = {key: {name: n for (kind, name), n in renamed.items() if kind in (key, other)}
             for key, other in (("models", "students"), *((kind, kind) for kind in KINDS))}  # fmt: skip
    references = {"trees": "trees", "size_of": "datasets", "questions_of": "datasets", "from": "models",
                  "data": "datasets", "models": "models", "roles": "models", "reward": "models",
                  "model": "models"}  # fmt: skip

    def rename(value: Any, names: Mapping[str, str]) -> Any:
        if isinstance(value, dict):
            return {key: rename(item, names) for key, item in value.items()}
        if isinstance(value, list):
            return [rename(item, names) for item in value]
        return names.get(value, value) if isinstance(value, str) else value

    other: dict[str, Any] = {"name": run, "seed": raw["seed"]}
    other["models"] = {renamed["models", name]: model for name, model in raw["models"].items()}
    for kind in KINDS:
        other[kind] = {
            renamed[kind, name]: {
                key: rename(value, known[kind if key == "tokens_of" else references[key]])
                if key in references or key == "tokens_of"
                else value
                for key, value in entry.items()
            }
            for name, entry in raw[kind].items()
        }
    assert list(prints_of(build_recipe(other)).values()) == list(before.values())


@given(seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_order_of_keys_plays_no_part(folder: Path, seed: int) -> None:
    rng = random.Random(seed)

    def shuffled(value: Any, key: str = "") -> Any:
        if isinstance(value, list):
            return [shuffled(item) for item in value]
        if not isinstance(value, dict):
            return value
        items = list(value.items())
        if key not in PATTERN:  # the order of a pattern's row is that in which thoughts are written
            rng.shuffle(items)
        return {name: shuffled(item, name) for name, item in items}

    raw = written(folder)
    assert prints_of(build_recipe(shuffled(raw))) == prints_of(build_recipe(raw))


def test_the_order_of_a_patterns_row_counts(folder: Path) -> None:
    raw = written(folder)
    recipe = build_recipe(raw)
    row = dict(reversed(PATTERN["sub_task"].items()))
    changed = changed_by(raw, prints_of(recipe), ("trees.train.patterns.mine.sub_task", row))
    assert changed == depending(recipe, {"trees/train"})


def test_a_default_that_is_written_out_changes_nothing(folder: Path) -> None:
    raw = written(folder)
    full = copy.deepcopy(raw)
    full["students"]["sft"] |= SFT().model_dump(mode="json")
    full["students"]["dpo"] |= DPO().model_dump(mode="json", exclude={"lora", "probe"})
    full["datasets"]["chains"] |= {"length": None, "select": "length", "gates": Gates().model_dump(mode="json")}
    full["datasets"]["chains"] |= {"text": "plain", "license": None, "max_tokens": 512, "verified": True}
    full["trees"]["train"] |= {"rollouts": 8, "temperature": 0.8, "adaptive": False, "tokens_of": None}
    full["evaluations"]["test"] |= {"samples": 1, "temperature": 0, "seed": 0, "gguf": "Q8_0", "split": "test"}
    assert prints_of(build_recipe(full)) == prints_of(build_recipe(raw))
