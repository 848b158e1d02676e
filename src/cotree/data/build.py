"""Build the datasets of a run: SFT, DPO and control rows as Parquet in TRL's conversational types.

Invariant: the same store and settings give the same bytes; what was left out is counted, with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from cotree.config import Build
from cotree.data.chains import Chain, Pair, chains_of, select_control, select_dpo, select_sft
from cotree.errors import CotreeError
from cotree.store import StoredTree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Built:
    """What a build wrote: counts and means for the summary, and a few pairs to be read by people."""

    counts: dict[str, Any]
    samples: list[dict[str, Any]]


def build(
    trees: Iterable[StoredTree],
    tokenizer: PreTrainedTokenizerBase,
    settings: Build,
    folder: Path,
    *,
    seed: int,
    control: bool,
    left_out: Collection[str] = frozenset(),
) -> Built:
    """Select rows from trees and write `folder/{sft,dpo,control}/train.parquet`.

    left_out: thought types whose text the student does not see.

    Raises:
        CotreeError: no tree gave a correct chain, or none gave both a correct and a wrong one.
    """
    prompts: dict[str, list[dict[str, str]]] = {}
    tasks: dict[str, str] = {}
    usable: list[list[Chain]] = []
    sft: list[Chain] = []
    pairs: list[Pair] = []
    too_long = 0
    for tree in trees:
        prompts[tree.tree_id], tasks[tree.tree_id] = tree.messages, tree.task
        found = chains_of(tree, tokenizer, left_out)
        chains = [c for c in found if c.prompt_tokens + len(c.tokens) <= settings.max_tokens]
        too_long += len(found) - len(chains)
        usable.append(chains)
        sft += select_sft(chains, settings.sft, seed)
        pairs += select_dpo(chains, settings.dpo, seed)
    if not sft:
        raise CotreeError("no tree has a correct chain, so there is nothing to train on; raise search.rollouts")
    if not pairs:
        raise CotreeError("no tree has both a correct and a wrong chain, so there are no pairs; raise search.rollouts")

    ranks = {
        (chain.tree_id, chain.leaf_id): rank
        for chains in usable
        for rank, chain in enumerate(sorted(chains, key=lambda chain: len(chain.tokens)), 1)
    }
    _write(folder / "sft", [_sft_row(chain, prompts, ranks) for chain in sft])
    _write(folder / "dpo", [_dpo_row(pair, prompts) for pair in pairs])
    drawn = select_control(usable, len(sft), seed) if control else []
    if drawn:
        _write(folder / "control", [_sft_row(chain, prompts, ranks) for chain in drawn])
    counts = {
        "chains": sum(map(len, usable)),
        "too_long": too_long,
        "sft_rows": len(sft),
        "control_rows": len(drawn),
        "control_correct": sum(chain.verdict == "correct" for chain in drawn),
        "dpo_pairs": len(pairs),
        "mean_sft_tokens": fmean(len(chain.tokens) for chain in sft),
        "mean_chosen_tokens": fmean(len(pair.chosen.tokens) for pair in pairs),
        "mean_rejected_tokens": fmean(len(pair.rejected.tokens) for pair in pairs),
        "mean_prefix_tokens": fmean(pair.prefix_tokens for pair in pairs),
        "sft_rows_by_task": _by_task(sft, tasks),
        "dpo_pairs_by_task": _by_task([pair.chosen for pair in pairs], tasks),
    }
    shown = {tasks[pair.chosen.tree_id]: pair for pair in reversed(pairs)}
    return Built(counts, [_sample(name, pair, prompts) for name, pair in sorted(shown.items())])


def _by_task(chains: Iterable[Chain], tasks: Mapping[str, str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for chain in chains:
        counts[tasks[chain.tree_id]] = counts.get(tasks[chain.tree_id], 0) + 1
    return dict(sorted(counts.items()))


def _assistant(chain: Chain) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": chain.text}]


def _sft_row(
    chain: Chain, prompts: Mapping[str, list[dict[str, str]]], ranks: Mapping[tuple[str, int], int]
) -> dict[str, Any]:
    """`length_rank` is the chain's place among its tree's chains by length, 1 for the shortest."""
    return {
        "prompt": prompts[chain.tree_id],
        "completion": _assistant(chain),
        "tree_id": chain.tree_id,
        "leaf_id": chain.leaf_id,
        "length_tokens": len(chain.tokens),
        "length_rank": ranks[chain.tree_id, chain.leaf_id],
        "pattern": chain.pattern,
        "reward": chain.reward,
    }


def _dpo_row(pair: Pair, prompts: Mapping[str, list[dict[str, str]]]) -> dict[str, Any]:
    return {
        "prompt": prompts[pair.chosen.tree_id],
        "chosen": _assistant(pair.chosen),
        "rejected": _assistant(pair.rejected),
        "tree_id": pair.chosen.tree_id,
        "chosen_leaf": pair.chosen.leaf_id,
        "rejected_leaf": pair.rejected.leaf_id,
        "prefix_tokens": pair.prefix_tokens,
    }


def _sample(title: str, pair: Pair, prompts: Mapping[str, list[dict[str, str]]]) -> dict[str, Any]:
    sides = (("chosen", pair.chosen), ("rejected", pair.rejected))
    chains = [{"text": chain.text, "verdict": chain.verdict, "kind": kind} for kind, chain in sides]
    return {"title": title, "prompt": prompts[pair.chosen.tree_id][-1]["content"], "chains": chains}


def _write(folder: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, partial = folder / "train.parquet", folder / f"train.parquet.{os.getpid()}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), partial)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        fix = "free some space, then re-run the same command to resume"
        raise CotreeError(f"cannot write {path}: {error.strerror}; {fix}") from None
