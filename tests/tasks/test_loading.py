"""Rows come from a file, a folder, COTREE_DATA or the hub's layout on disk, the same rows each way; else one line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from datasets import Dataset

from cotree.base.errors import UsageError
from cotree.tasks.loading import Source, field_value, load_rows

ROWS = [{"id": f"r-{i}", "question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(5)]
SOURCE = Source("sums.jsonl", "nobody/sums", "MIT", 5, ("main",), "test")


def write_lines(path: Path) -> Path:
    text = "\n".join(map(json.dumps, ROWS)) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def as_on_the_hub(folder: Path, configs: dict[str, list[str]]) -> Path:
    """A data set as a repository on the hub holds it: Parquet files, and a card that names configs and splits."""
    card = ["---", "configs:"]
    for config, splits in configs.items():
        card += [f"- config_name: {config}", "  data_files:"]
        for split in splits:
            (folder / config).mkdir(parents=True, exist_ok=True)
            rows = [row | {"id": f"{config}/{split}/{row['id']}"} for row in ROWS]
            Dataset.from_list(rows).to_parquet(folder / config / f"{split}.parquet")
            card += [f"  - split: {split}", f"    path: {config}/{split}.parquet"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))
    return folder


@pytest.mark.parametrize("name", ["sums.jsonl", "sums.jsonl.gz"])
def test_a_file_a_folder_and_the_environment_give_the_same_rows(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_lines(tmp_path / name)
    monkeypatch.setenv("COTREE_DATA", str(tmp_path))
    assert load_rows(SOURCE) == load_rows(SOURCE, file) == load_rows(SOURCE, str(tmp_path)) == ROWS


def test_parquet(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).to_parquet(tmp_path / "own.parquet")
    assert load_rows(SOURCE, tmp_path / "own.parquet") == ROWS


def test_the_layout_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    one = as_on_the_hub(tmp_path / "one", {"main": ["train", "test"], "other": ["test"]})
    assert [row["id"] for row in load_rows(SOURCE, one)] == [f"main/test/r-{i}" for i in range(5)]
    several = Source("sums.jsonl", "nobody/sums", "MIT", 10, ("other", "main"), "test")
    assert [row["id"].split("/")[0] for row in load_rows(several, one)] == ["other"] * 5 + ["main"] * 5
    renamed = as_on_the_hub(tmp_path / "renamed", {"default": ["latest"]})
    assert load_rows(SOURCE, renamed)[0]["id"] == "default/latest/r-0"
    no_split = Source("sums.jsonl", "nobody/sums", "MIT", 5, ("main",), "dev")
    with pytest.raises(UsageError, match="the splits train, test, and not `dev`"):
        load_rows(no_split, one)
    # An own task names no split: all its rows are meant.
    every = load_rows(Source("sums.jsonl", "nobody/sums", "MIT", 10, ("main",)), one)
    assert [row["id"].split("/")[1] for row in every] == ["train"] * 5 + ["test"] * 5
    with pytest.raises(UsageError, match="configurations main, other, and which"):
        load_rows(Source("sums.jsonl", "nobody/sums", "MIT", 5), one)


def test_what_is_missing_or_broken_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COTREE_DATA", str(tmp_path))
    # A closed port on this machine is a hub that cannot be reached.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UsageError) as missing:
        load_rows(SOURCE)
    for words in ("sums.jsonl", "nobody/sums", "COTREE_DATA"):
        assert words in str(missing.value)
    assert "\n" not in str(missing.value)
    (tmp_path / "rows.jsonl").write_text('{"id": 1}')
    monkeypatch.setenv("COTREE_DATA", str(tmp_path / "rows.jsonl"))
    with pytest.raises(UsageError, match="COTREE_DATA"):
        load_rows(SOURCE)
    with pytest.raises(UsageError, match=r"no file or folder at .*none\.jsonl"):
        load_rows(SOURCE, tmp_path / "none.jsonl")
    (tmp_path / "half.jsonl").write_text('{"id": 1}\n{"id": ')
    with pytest.raises(UsageError, match=r"half\.jsonl: line 2: no JSON row"):
        load_rows(SOURCE, tmp_path / "half.jsonl")
    (tmp_path / "list.jsonl").write_text("[1]\n")
    with pytest.raises(UsageError, match=r"list\.jsonl: line 1: .*a row must be an object"):
        load_rows(SOURCE, tmp_path / "list.jsonl")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"id": 1}\n' * 1000)[:40])
    with pytest.raises(UsageError, match=r"cut\.jsonl\.gz"):
        load_rows(SOURCE, tmp_path / "cut.jsonl.gz")
    with pytest.raises(UsageError, match="no field `problem` or `text`; its fields: id, question, answer"):
        field_value(ROWS[0], "problem", "text")
