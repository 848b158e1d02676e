"""Export datasets and trees: JSON lines, LLaMA-Factory, axolotl, trees as Parquet, the hub.

Invariant: an export changes the format, never the content; prompts stay conversations, so that the other trainer
applies its own chat template, once.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any, get_type_hints
from urllib.parse import unquote

import yaml

from cotree.base.atomic import write_json, write_text
from cotree.base.errors import CotreeError, UsageError
from cotree.base.progress import one_line
from cotree.base.rows import Row, read_rows, write_jsonl
from cotree.base.run_folder import RunFolder, check_against_record, find_run
from cotree.base.shards import shards_of, stores_of
from cotree.data.annotations import annotation_rows
from cotree.data.kinds import check_file, write_parquet
from cotree.search.parquet import TREES_PER_GROUP
from cotree.search.store import StoredTree
from cotree.search.stores import TreeStores

# {trainer: how it treats earlier replies by default, and how to change that}. (TRL scores completions only.)
_EARLIER_REPLIES = {
    "llamafactory": "LLaMA-Factory would train too: set `mask_history: true` in its config",
    "axolotl": 'axolotl would train too: write `"train": false` into these messages, `message_field_training: train` '
    "into the dataset's part of the config",
}


def export_to(source: Path, to: str, out: str) -> list[str]:
    """Export a run, a folder of datasets, one dataset or one file to the format `to`; returns a report line per file.

    llamafactory: JSON lines and `dataset_info.json`, for its `dataset_dir` and `dataset`. axolotl: JSON lines and a
    `NAME.yml` with the `datasets:` part of its config. trees: from a `trees.db`, its folder, or a run with one.
    annotations: of a run, JSON lines. hub: one dataset; `out` is OWNER/NAME.

    Raises:
        UsageError: nothing to export, or an invalid row.
        CotreeError: writing or uploading failed.
    """
    if to == "trees":
        return [f"{out}: {export_trees(source, Path(out))} trees"]
    if to == "annotations":
        return [f"{out}: {write_jsonl(Path(out), annotation_rows(find_run(source)))} annotations"]
    if to == "hub":
        return [push(source, out)]
    trainers = yaml.safe_load((files("cotree.data") / "trainers.yaml").read_text("utf-8"))
    if to not in ("jsonl", *trainers):
        raise UsageError(f"unknown form `{to}`; known: jsonl, {', '.join(trainers)}, trees, annotations, hub")
    if source.suffix == ".db":
        raise UsageError(f"{source} holds trees; export it with --to trees, or a dataset that was made of it")
    information, written, left_out, notes = dict[str, Any](), list[Path](), list[str](), list[str]()
    for file in _files(source, "datasets", "train.parquet"):
        name = file.resolve().parent.name if file.name == "train.parquet" else file.stem.split(".")[0]
        kind, _ = check_file(file)
        if to != "jsonl" and kind not in trainers[to]:
            left_out.append(f"{file} is left out: {to} trains no process rewards; export it --to jsonl")
            continue
        path = Path(out) / f"{name}.jsonl"
        if path.resolve() == file.resolve():
            raise UsageError(f"the export would replace {file} itself; name another folder with -o")
        write_jsonl(path, read_rows(file) if to == "jsonl" else map(_trainer_row, read_rows(file)))
        written.append(path)
        if to in _EARLIER_REPLIES and kind == "sft" and any(map(_has_earlier_reply, read_rows(file))):
            notes.append(f"{path}: has conversations whose earlier replies {_EARLIER_REPLIES[to]}")
        if to == "llamafactory":
            information[f"cotree_{name}"] = {"file_name": path.name, **trainers[to][kind]}
        if to == "axolotl":
            config = trainers[to][kind]
            config["datasets"] = [{"path": path.name, **dataset} for dataset in config["datasets"]]
            written.append(path.with_suffix(".yml"))
            write_text(written[-1], yaml.safe_dump(config, sort_keys=False))
    if not written:
        raise UsageError("; ".join(left_out))
    if information:
        written.append(path := Path(out) / "dataset_info.json")
        try:  # the folder may already have one, with other datasets
            known = dict(json.loads(path.read_text("utf-8")) if path.is_file() else {})
        except (ValueError, TypeError):
            mend = "mend it or name another folder"
            raise UsageError(f"{path} is no JSON object, so nothing can be added to it; {mend}") from None
        write_json(path, known | information)
    return [*map(str, written), *left_out, *notes]


def _has_earlier_reply(row: Row) -> bool:
    return any(message["role"] == "assistant" for message in row["prompt"])


def _files(source: Path, kind: str, name: str) -> list[Path]:
    """Find files by name in a run, a folder of nodes or one node; a file is returned as it is.

    kind: the subfolder of a run: `datasets` or `trees`.
    """
    if not source.is_dir():
        return [source]
    for pattern in (name, f"{kind}/*/{name}", f"*/{name}"):
        if found := sorted(source.glob(pattern)):
            return found
    raise UsageError(f"no {kind} in {source}; give a run, a folder of {kind}, or one with a {name}")


def _trainer_row(row: Row) -> Row:
    """Convert a row for LLaMA-Factory and axolotl: one conversation; for a pair the prompt and both replies."""
    if "completion" in row:
        return {"messages": [*row["prompt"], *row["completion"]]}
    if row.get("rejected_finished") is False:
        raise UsageError(
            "a rejected side was cut off by max_tokens, and another trainer would end its turn; make the dataset with "
            "`unanswered: false`, or export it --to jsonl"
        )
    return {"messages": row["prompt"], "chosen": row["chosen"][0], "rejected": row["rejected"][0]}


def export_trees(source: Path, out: Path) -> int:
    """Write all trees of a store (a run with shards, a node, or a path) as Parquet, one row per tree with nested nodes;
    returns the number of trees."""
    if source.is_dir() and source.resolve().parent.name == "trees":  # of a node
        run, pattern = RunFolder(source.resolve().parents[1]), f"trees/{source.resolve().name}/trees.db"
    else:
        run, pattern = RunFolder(source), "trees/*/trees.db"
    names = {path.parent.name for part in (run, *shards_of(run)) for path in part.path.glob(pattern)}
    if len(names) > 1:
        nodes = ", ".join(str(source / "trees" / name) for name in sorted(names))
        raise UsageError(f"{source} has several stores of trees; name one of {nodes}")
    stores = stores_of(run, unquote(names.pop())) if names else _files(source, "trees", "trees.db")
    if not stores[0].is_file():
        raise UsageError(f"no store at {stores[0]}")
    with TreeStores(stores) as trees:
        columns, rows = get_type_hints(StoredTree), map(asdict, trees.trees())
        return write_parquet(out, columns, rows, {}, rows_per_group=TREES_PER_GROUP, checksums=True)


def push(folder: Path, repository: str) -> str:
    """Upload a dataset folder with its card to a private hub dataset, with the environment's token.

    Raises:
        UsageError: not a dataset folder, or the name is not OWNER/NAME.
        CotreeError: the hub is unreachable or refuses.
    """
    if not (folder / "README.md").is_file() or not (folder / "train.parquet").is_file():
        raise UsageError(f"{folder} has no README.md with a train.parquet; push the folder of one dataset of a run")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UsageError(f"`{repository}` is no dataset of the hub; write it as -o OWNER/NAME")
    check_against_record(folder / "train.parquet")
    from huggingface_hub import HfApi

    where: dict[str, Any] = {"repo_id": repository, "repo_type": "dataset"}
    pushed = ["README.md", "train.parquet", "figures/*"]  # without node.json, which describes the run
    try:
        HfApi().create_repo(**where, private=True, exist_ok=True)
        return str(HfApi().upload_folder(**where, folder_path=folder, allow_patterns=pushed))
    except Exception as error:  # noqa: BLE001 - the hub client raises dozens of unrelated types
        reason = one_line(str(error))[:200] or type(error).__name__
        raise CotreeError(f"cannot push to {repository}: {reason}; is the hub reached, and HF_TOKEN set?") from None
