"""Parquet files of trees in the place of stores: the same datasets and readers, no request, and one line where they are
not what they should be."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from tests.support.fake_server import FakeServerThread
from tests.support.knowing import knowing_reply
from tests.support.search import content

import cotree
from cotree.base.errors import UsageError
from cotree.base.progress import Output
from cotree.base.run_folder import RunFolder
from cotree.base.shards import Shard
from cotree.data.export import export_trees
from cotree.data.kinds import write_parquet
from cotree.experiment.plan import plan
from cotree.experiment.recipe import build_recipe, load_recipe
from cotree.experiment.run import run
from cotree.report.tree_view import views_of
from cotree.search.index import TreeQuery
from cotree.search.parquet import ParquetTrees
from cotree.search.store import StoredTree, TreeStore
from cotree.view.trees import TreesOfRun

SHARDS, QUESTIONS = 3, 12
ROWS = {"chains": "sft", "pairs": "dpo"}


def written(url: str, student: Path, **more: Any) -> dict[str, Any]:
    trees = {"questions": {"letters": 6, "arithmetic": 6}, "roles": {"thinker": "far"}, "patterns": ["plain"]}
    return {
        "name": "many",
        "models": {"far": {"url": url, "model": "fake", "mode": "chat"}, "tiny": {"weights": str(student)}},
        "trees": {"train": trees | {"rollouts": 4} | more},
        "datasets": {name: {"trees": "train", "rows": rows, "tokenizer": "tiny"} for name, rows in ROWS.items()},
    }


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory, student: Path) -> Path:
    """A folder of runs with one that was grown in shards, and the Parquet file of each shard."""
    folder = tmp_path_factory.mktemp("grown")
    with FakeServerThread(reply=knowing_reply) as server:
        recipe = build_recipe(written(server.url, student))
        for rank in range(SHARDS):
            shard = Shard(SHARDS, rank)
            run(recipe, folder, only="trees/train", shard=shard, output=Output(quiet=True))
        run(recipe, folder, output=Output(quiet=True))
    sizes = [
        export_trees(store, folder / f"trees-{store.parents[1].name}.parquet")
        for store in sorted((folder / "many/shards").glob("*/trees/train"))
    ]
    assert len(sizes) == SHARDS and min(sizes) > 0 and sum(sizes) == QUESTIONS
    return folder


@pytest.fixture
def shards(grown: Path, tmp_path: Path) -> Path:
    """A folder with copies of the Parquet files."""
    for path in grown.glob("*.parquet"):
        shutil.copy(path, tmp_path)
    return tmp_path


@pytest.fixture
def recipe(shards: Path, student: Path) -> dict[str, Any]:
    """The recipe, without a server and with the files in the place of stores."""
    return written("http://127.0.0.1:9", student, parquet=[str(shards / "trees-*.parquet")])


def built(recipe: dict[str, Any], runs: Path) -> RunFolder:
    return run(build_recipe(recipe), runs, output=Output(quiet=True))


def states(recipe: dict[str, Any], runs: Path) -> dict[str, str]:
    return {each.name: each.state for each in plan(build_recipe(recipe), runs)}


def rows_of(runs: Path) -> dict[str, bytes]:
    return {name: (runs / f"many/datasets/{name}/train.parquet").read_bytes() for name in ROWS}


def test_datasets_of_parquet_are_those_of_stores(grown: Path, recipe: dict[str, Any], tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    built(recipe, runs)
    assert rows_of(runs) == rows_of(grown)
    assert all(pq.read_table(runs / f"many/datasets/{name}/train.parquet").num_rows > 3 for name in ROWS)
    with TreeStore(runs / "many/trees/train/trees.db", reading=True) as own:
        assert not own.finished()
    assert set(states(recipe, runs).values()) == {"done"}

    shutil.copytree(grown / "many", tmp_path / "kept" / "many")
    for store in (tmp_path / "kept").rglob("trees.db*"):
        store.unlink()
    built(recipe, tmp_path / "kept")
    assert rows_of(tmp_path / "kept") == rows_of(grown)
    assert set(states(recipe, tmp_path / "kept").values()) == {"done"}


def test_what_reads_a_run_reads_its_parquet(grown: Path, recipe: dict[str, Any], tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    folder = built(recipe, runs)
    stored, read = (list(cotree.open_run(where / "many").trees("train")) for where in (grown, runs))
    assert read == stored and content(read) == content(stored) and len(read) == QUESTIONS
    assert export_trees(folder.path, tmp_path / "again.parquet") == QUESTIONS
    assert list(export_rows(tmp_path / "again.parquet")) == stored
    with TreesOfRun(folder) as shown:
        assert shown.page("train", TreeQuery(), 0, 100)["total"] == QUESTIONS
        assert shown.tree("train", stored[3].tree_id)["annotations"] == []
    assert [view.tree for view in views_of(folder, ["train"], question=stored[3].question_id)] == [stored[3]]
    taken = run(build_recipe(recipe | {"name": "other"}), runs, source=folder.path, output=Output(quiet=True))
    assert len(list(cotree.open_run(taken.path).trees("train"))) == QUESTIONS


def export_rows(path: Path) -> list[Any]:
    file = ParquetTrees(path)
    return [file.tree(tree_id) for tree_id in file.finished()]


def test_only_trees_that_parquet_lacks_are_grown(grown: Path, shards: Path, student: Path) -> None:
    gone = shards / f"trees-0-of-{SHARDS}.parquet"
    lacking = pq.read_metadata(gone).num_rows
    gone.unlink()
    with FakeServerThread(reply=knowing_reply) as server:
        recipe = written(server.url, student, parquet=str(shards / "*.parquet"))
        built(recipe, shards / "runs")
        assert server.calls > 0
    with TreeStore(shards / "runs/many/trees/train/trees.db", reading=True) as own:
        assert len(own.finished()) == lacking
    assert rows_of(shards / "runs") == rows_of(grown)


def test_a_changed_file_makes_what_is_made_of_it_stale(recipe: dict[str, Any], shards: Path) -> None:
    runs = shards / "runs"
    built(recipe, runs)
    path = shards / f"trees-1-of-{SHARDS}.parquet"
    moved = shards / "elsewhere" / path.name
    moved.parent.mkdir()
    path.rename(moved)
    recipe["trees"]["train"]["parquet"].append(str(moved))
    assert states(recipe, runs) == {"trees/train": "partial", "datasets/chains": "done", "datasets/pairs": "done"}
    with pytest.raises(UsageError, match="is missing"):
        list(cotree.open_run(runs / "many").trees("train"))
    built(recipe, runs)  # which notes the new place
    assert len(list(cotree.open_run(runs / "many").trees("train"))) == QUESTIONS

    before = rows_of(runs)
    table = pq.read_table(moved)
    words = [message | {"content": f"Please: {message['content']}"} for (message,) in table["messages"].to_pylist()]
    at = table.schema.get_field_index("messages")
    asked = pa.array([[message] for message in words], table.schema.field(at).type)
    pq.write_table(table.set_column(at, table.schema.field(at), asked), moved)
    assert states(recipe, runs) == {
        "trees/train": "partial", "datasets/chains": "changed", "datasets/pairs": "changed",
    }  # fmt: skip
    (trees,) = (each for each in plan(build_recipe(recipe), runs) if each.name == "trees/train")
    assert [*trees.why] == ["parquet"]
    built(recipe, runs)
    assert rows_of(runs)["chains"] != before["chains"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


def flip(path: Path) -> None:
    """Other bits in the middle of the pages of the thoughts' texts."""
    column = next(
        chunk for n in range(99) if "text" in (chunk := pq.read_metadata(path).row_group(0).column(n)).path_in_schema
    )
    content = bytearray(path.read_bytes())
    place = column.data_page_offset + column.total_compressed_size // 2
    content[place] ^= 0xFF
    path.write_bytes(content)


def of_others(path: Path) -> None:
    pq.write_table(pa.table({"tree_id": ["a"], "nodes": [1]}), path)


def no_parquet(path: Path) -> None:
    path.write_text("no parquet")


def of_other_settings(path: Path) -> None:
    table = pq.read_table(path)
    at = table.schema.get_field_index("config")
    pq.write_table(table.set_column(at, "config", pa.array(["other"] * table.num_rows)), path)


def remove(path: Path) -> None:
    for file in path.parent.glob("*.parquet"):
        file.unlink()


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (cut, "is damaged or no Parquet file of trees"),
        (flip, "is damaged or no Parquet file of trees"),
        (no_parquet, "is damaged or no Parquet file of trees"),
        (of_others, "holds no trees: the columns lack task, question_id"),
        (of_other_settings, "was grown under these settings"),
        (remove, "no file at"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_file_that_cannot_be_read_is_one_line(
    recipe: dict[str, Any], shards: Path, harm: Callable[[Path], None], words: str
) -> None:
    harm(shards / f"trees-0-of-{SHARDS}.parquet")
    with pytest.raises(UsageError, match=words) as raised:
        built(recipe, shards / "runs")
    assert "\n" not in str(raised.value) and "parquet" in str(raised.value)
    assert not (shards / "runs/many/datasets").exists()


def test_paths_and_settings(recipe: dict[str, Any], shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry, file = recipe["trees"]["train"], shards / "mine.yaml"
    entry["parquet"] = "trees-*.parquet"
    file.write_text(yaml.safe_dump(recipe))
    assert len(load_recipe(file).nodes["trees/train"].settings.parquet_files()) == SHARDS
    monkeypatch.chdir(shards.parent)
    loaded = load_recipe(
        file, [f"trees.train.parquet=[{shards.name}/trees-*.parquet, {shards.name}/trees-1-*.parquet]"]
    )
    assert len(loaded.nodes["trees/train"].settings.parquet_files()) == SHARDS
    assert loaded.written["trees"]["train"]["parquet"][0] == str(shards / "trees-*.parquet")
    with pytest.raises(UsageError, match=r"must end with \.parquet"):
        build_recipe(recipe | {"trees": {"train": entry | {"parquet": "trees.db"}}})


def test_the_file_is_read_in_parts(grown: Path, tmp_path: Path) -> None:
    """Many row groups, read in any order, give what the store gives."""
    trees = list(cotree.open_run(grown / "many").trees("train"))
    write_parquet(tmp_path / "x.parquet", get_type_hints(StoredTree), map(asdict, trees), {}, rows_per_group=4)
    file = ParquetTrees(tmp_path / "x.parquet")
    assert [file.tree(tree.tree_id) for tree in trees[::-1]] == trees[::-1]
    assert file.finished(trees[0].config) == {tree.tree_id: tree.rollouts for tree in trees}
    assert file.finished("other") == {}
