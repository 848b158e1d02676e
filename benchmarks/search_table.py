"""A result of the search benchmark as a table for people: what, cotree, what stands beside it, the ratio."""

from __future__ import annotations

from typing import Any

Row = tuple[str, str, str, str]


def table(result: dict[str, Any]) -> str:
    """One line a comparison. Goals are the project's own; a ratio is said in the direction that its line names."""
    rows: list[Row] = [("", "cotree", "beside it", "ratio"), *_stub(result), *_one_tree(result), *_embedded(result)]
    for size, ms in result["tree_ms_per_thought"].items():
        rows.append((f"tree operations, {int(size):,} thoughts", f"{ms:.4f} ms a thought", "goal: at most 0.1 ms", ""))
    rows.append(("memory", f"{result['memory_bytes_per_thought']:.0f} bytes a thought", "", ""))
    if "treequest" in result:
        rows += _treequest(result, result["treequest"])
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _stub(r: dict[str, Any]) -> list[Row]:
    rate, bare_rate, bare = r["stub_requests_per_second"], r["bare_requests_per_second"], r["bare_cpu_ms_per_request"]
    rows = [("many trees, 50 ms a request", f"{r['stub_thoughts_per_second']:.0f} thoughts/s", "goal: 1500", "")]
    rows.append(("  requests", f"{rate:.0f} /s", f"bare client {bare_rate:.0f} /s", f"{rate / bare_rate:.2f}"))
    for what, goal in (("thought", " (goal: at most 3)"), ("request", "")):
        ours = r[f"cpu_ms_per_{what}"]
        name = f"  CPU a {what} / a bare request{goal}"
        rows.append((name, f"{ours:.3f} ms", f"bare client {bare:.3f} ms", f"{ours / bare:.2f}"))
    return rows


def _one_tree(r: dict[str, Any]) -> list[Row]:
    seconds = {int(k): taken for k, taken in r["one_tree_seconds"].items()}
    serial, most = seconds.pop(1), max(seconds)
    rows = []
    for k, taken in seconds.items():
        what = f"one tree, {r['one_tree_rollouts']} rollouts, {k} leaves a round{' (goal: 4)' * (k == most)}"
        rows.append((what, f"{taken:.2f} s", f"1 leaf a round {serial:.2f} s", f"{serial / taken:.2f}"))
    return rows


def _embedded(r: dict[str, Any]) -> list[Row]:
    rates = r["embedded_tokens_per_second"]
    ours = rates["search"]
    rows = []
    for name, what, other in (
        ("raw", "embedded model, output tokens (goal: 0.9)", "raw, as many in flight"),
        ("raw_all_slots", "", "raw, all slots in use"),
        ("evaluation", "  beside an evaluation (goal: 0.8)", "same prompts"),
    ):
        rows.append((what, f"{ours:.0f} /s", f"{other} {rates[name]:.0f} /s", f"{ours / rates[name]:.2f}"))
    return rows


def _treequest(r: dict[str, Any], peer: dict[str, Any]) -> list[Row]:
    """A ratio above 1 says how many times better cotree is."""
    name = f"treequest {peer['version']}"
    rows = []
    for what, key, unit in (("rollouts, many trees", "rollouts", "/s"), ("  requests", "requests", "/s")):
        ours, theirs = r[f"stub_{key}_per_second"], peer[f"{key}_per_second"]
        rows.append((what, f"{ours:.0f} {unit}", f"{name} {theirs:.0f} {unit}", f"{ours / theirs:.2f}"))
    for what in ("rollout", "request"):
        ours, theirs = r[f"cpu_ms_per_{what}"], peer[f"cpu_ms_per_{what}"]
        rows.append((f"  CPU a {what}", f"{ours:.3f} ms", f"{name} {theirs:.3f} ms", f"{theirs / ours:.2f}"))
    fastest = min(r["one_tree_seconds"].values())
    for how, seconds in peer["one_tree_seconds"].items():
        what = f"one tree, {r['one_tree_rollouts']} rollouts"
        rows.append((what, f"{fastest:.2f} s", f"{name} {how} {seconds:.2f} s", f"{seconds / fastest:.1f}"))
    most = max(r["tree_ms_per_thought"].values())
    for how, found in peer["ms_per_node"].items():
        for size, ms in found.items():
            other = f"{name} {how} {ms:.3g} ms"
            rows.append((f"tree operations, {int(size):,} nodes", f"{most:.3f} ms at most", other, f"{ms / most:.0f}"))
    memory, theirs = r["memory_bytes_per_thought"], peer["memory_bytes_per_node"]
    rows.append(("memory a node", f"{memory:.0f} bytes", f"{name} {theirs:.0f} bytes", f"{theirs / memory:.2f}"))
    return rows
