"""Datasets and trees in the forms of others: JSON lines, LLaMA-Factory, axolotl, trees as Parquet, the hub.

Invariant: an export changes the form and never the rows; prompts stay conversations, so that the other trainer applies
its own chat template, once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from cotree.base.atomic import write_text
from cotree.base.errors import CotreeError, UsageError
from cotree.base.rows import Row, read_rows, write_jsonl
from cotree.data.kinds import check_file, write_columns
from cotree.search.store import StoredTree, TreeStore


def export_to(source: Path, to: str, out: str) -> list[str]:
    """Export a build's folder (or one file) to a form by its name; returns what was written, a line each.

    llamafactory: JSON lines and `dataset_info.json`, to be named in its `dataset_dir` and `dataset`. axolotl: JSON
    lines and a `KIND.yml` with the `datasets:` part of its config. trees: of a `trees.db`. hub: `out` is OWNER/NAME.

    Raises:
        UsageError: nothing to export, or a row is faulty.
        CotreeError: it cannot be written or pushed.
    """
    if to == "trees":
        return [f"{out}: {export_trees(source, Path(out))} trees"]
    if to == "hub":
        return [push(source, out)]
    if to not in _FORMS:
        raise UsageError(f"unknown form `{to}`; known: {', '.join(_FORMS)}, trees, hub")
    if source.suffix == ".db":
        raise UsageError(
            f"{source} holds trees; export it with --to trees, or the datasets that `cotree build` made of it"
        )
    files = sorted(source.glob("*/train.parquet")) if source.is_dir() else [source]
    if not files:
        raise UsageError(f"no datasets in {source}; expected KIND/train.parquet below it")
    information: dict[str, Any] = {}
    folder, written = Path(out), list[Path]()
    for file in files:
        kind, _ = check_file(file)
        name = file.resolve().parent.name if file.name == "train.parquet" else file.stem.split(".")[0]
        if kind == "stepwise" and to != "jsonl":
            continue  # neither trains process rewards
        written.append(folder / f"{name}.jsonl")
        if written[-1].resolve() == file.resolve():
            raise UsageError(f"the export would replace {file} itself; name another folder with -o")
        write_jsonl(written[-1], map(_FORMS[to], read_rows(file)))
        if to == "llamafactory":
            information[f"cotree_{name}"] = {"file_name": f"{name}.jsonl", **_information(kind)}
        if to == "axolotl":
            written.append(folder / f"{name}.yml")
            write_text(written[-1], yaml.safe_dump(_axolotl(name, kind), sort_keys=False))
    if information:
        written.append(folder / "dataset_info.json")
        write_text(written[-1], json.dumps(_known(written[-1]) | information, indent=2, ensure_ascii=False) + "\n")
    return [str(path) for path in written]


def _known(path: Path) -> dict[str, Any]:
    """The datasets that a `dataset_info.json` names already: LLaMA-Factory's own folder has one with many."""
    if not path.is_file():
        return {}
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        known = None
    if not isinstance(known, dict):
        raise UsageError(f"{path} is no JSON object, so nothing can be added to it; mend it or name another folder")
    return known


def _messages(row: Row) -> Row:
    """`messages` through the answer; for a preference, up to the answer, and both answers."""
    if "completion" in row:
        return {"messages": [*row["prompt"], *row["completion"]]}
    if row.get("rejected_finished") is False:
        raise UsageError(
            "a rejected side was cut off by max_tokens, and another trainer would end its turn; build with "
            "build.dpo.unanswered=false, or export --to jsonl"
        )
    return {"messages": row["prompt"], "chosen": row["chosen"][0], "rejected": row["rejected"][0]}


_FORMS: Mapping[str, Callable[[Row], Row]] = {"jsonl": dict, "llamafactory": _messages, "axolotl": _messages}


def _information(kind: str) -> dict[str, Any]:
    columns = {"messages": "messages"} | ({"chosen": "chosen", "rejected": "rejected"} if kind == "dpo" else {})
    tags = {f"{part}_tag": part for part in ("role", "content")}
    tags |= {f"{role}_tag": role for role in ("user", "assistant", "system")}
    return {"formatting": "sharegpt", **({"ranking": True} if kind == "dpo" else {}), "columns": columns, "tags": tags}


def _axolotl(name: str, kind: str) -> dict[str, Any]:
    dataset: dict[str, Any] = {"path": f"{name}.jsonl", "ds_type": "json", "field_messages": "messages"}
    if kind == "dpo":
        fields = {"field_chosen": "chosen", "field_rejected": "rejected"}
        return {"rl": "dpo", "datasets": [{**dataset, "type": "chat_template.default", "split": "train", **fields}]}
    return {"datasets": [{**dataset, "type": "chat_template", "roles_to_train": ["assistant"]}]}


def export_trees(store: Path, out: Path) -> int:
    """All trees of a store as Parquet, a row each with its nodes nested; returns how many."""
    if not store.is_file():
        raise UsageError(f"no store at {store}")
    with TreeStore(store) as trees:
        return write_columns(out, get_type_hints(StoredTree), map(asdict, trees.trees()), {})


def push(folder: Path, repository: str) -> str:
    """Upload a build's folder, card included, to a private dataset of the hub; the token is the environment's.

    Raises:
        UsageError: the folder has no card, so it is no build; or the name is no OWNER/NAME.
        CotreeError: the hub cannot be reached, or refuses.
    """
    if not (folder / "README.md").is_file():
        raise UsageError(f"{folder} has no README.md; push the folder that `cotree build` wrote")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UsageError(f"`{repository}` is no dataset of the hub; write it as -o OWNER/NAME")
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, repo_type="dataset", private=True, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, repo_type="dataset", folder_path=folder))
    except Exception as error:  # noqa: BLE001 - the hub client raises dozens of unrelated types
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CotreeError(f"cannot push to {repository}: {reason}; is the hub reached, and HF_TOKEN set?") from None
