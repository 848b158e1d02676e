"""The evaluation table of a run and the lines under it, for the terminal (`eval/tables.py` has the other forms).

Invariants: every number shown is in summary.json; nothing is computed here but percents, differences and rates. A
method of search is called ahead only where its 95% interval lies wholly above the other's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cotree.base.numbers import duration, group_name, interval, number, percent, signed
from cotree.base.statistics import wilson
from cotree.report.summary import MODELS, Summary

if TYPE_CHECKING:
    from rich.table import Table

_SHARES = ("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose")
_HEAD = ("accuracy\n%", "95%\ninterval", "no\nanswer\n%", "cut\noff\n%", "if\nanswered\n%", "tokens", "n")


def eval_table(summary: Summary | Mapping[str, Any]) -> Table:
    """The evaluation as a rich table of 80 columns: models under their task, constant-answer baselines as rows."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    summary = Summary.model_validate(summary)
    table = Table(
        box=box.SIMPLE_HEAD, caption=_note(summary), caption_justify="left", show_edge=False, padding=(0, 1, 0, 0)
    )
    table.add_column("model", min_width=max(map(len, MODELS)), vertical="bottom")
    for head in _HEAD:
        table.add_column(head, justify="right", no_wrap=True)
    for task in summary.tasks():
        # Text, so that brackets in a name are no markup.
        table.add_row(Text(task, style="bold"))
        for row in summary.rows(task):
            ratios = map(percent, (row.no_answer, row.truncated, row.accuracy_answered))
            sizes = (number(float(row.mean_tokens)), number(row.n))
            table.add_row(Text(row.model), percent(row.accuracy), interval(row), *ratios, *sizes)
        if baseline := summary.baseline(task):
            table.add_row(Text(f"always “{baseline.answer}”"), percent(baseline.accuracy))
        table.add_section()
    return table


def _note(summary: Summary) -> str:
    limits = ", ".join(map(str, sorted({row.max_tokens for row in summary.eval})))
    constant = "".join(f"; on {row.task} {row.constant}" for row in summary.eval if row.constant)
    return (
        f"{summary.questions}, greedy, max_tokens {limits}; "
        f"cut off: no answer, not in a loop, because max_tokens came first{constant}"
    )


def summary_lines(summary: Summary | Mapping[str, Any]) -> list[str]:
    """What search, data and each stage came to, one line each; parts that have not run are left out."""
    summary = Summary.model_validate(summary)
    search, data = summary.search, summary.data
    lines = []
    if "trees" in search:
        lines += [
            f"search: {number(search['trees'])} trees, {number(search['thoughts'])} thoughts, "
            f"{number(search['answers'])} answers "
            f"({number(search['correct'])} correct, {number(search['wrong'])} wrong, "
            f"{number(search['no_answer'])} no answer), {number(search['cut'])} thoughts cut",
            f"        {percent(search['questions_with_correct'])}% of questions have a correct chain, "
            f"{percent(search['questions_with_both'])}% both kinds; "
            f"{number(search['reflections'])} reflections, {number(search['repaired'])} repaired",
        ]
        told = [*model_lines(search["by_model"]), *comparison_lines(search["compared"])]
        lines += [f"        {line}" for line in told]
        ended = ", ".join(f"{number(count)} {reason}" for reason, count in search["stopped"].items())
        lines.append(f"        trees ended: {ended} ({number(search['rollouts'])} rollouts)")
    if data:
        lines += [
            f"data:   {number(data['sft_rows'])} SFT rows ({number(data['mean_sft_tokens'])} tokens), "
            f"{number(data['control_rows'])} control rows, {number(data['dpo_pairs'])} DPO pairs",
            f"        chosen {number(data['mean_chosen_tokens'])} tokens, "
            f"rejected {number(data['mean_rejected_tokens'])}, "
            f"difference {signed(length_gap(data))}, shared prefix {number(data['mean_prefix_tokens'])}",
        ]
    if summary.instructions:
        lines.append("instructions followed, %: prompts strict / loose, single ones strict / loose, mean of these")
        for row in summary.instructions:
            strict_loose = "{} / {}, {} / {}".format(*(percent(row[share]) for share in _SHARES))
            lines.append(f"  {row['model']:<13} {group_name(row)}: {strict_loose}, {percent(row['average'])}")
    width = max((len(stage) for stage in summary.seconds), default=0)
    lines += [
        f"{stage:<{width}}  {duration(seconds):>12}  {_work(summary, stage)}".rstrip()
        for stage, seconds in summary.seconds.items()
    ]
    if len(summary.seconds) > 1:
        lines.append(f"{'total':<{width}}  {duration(sum(summary.seconds.values())):>12}")
    return lines


def length_gap(data: Mapping[str, Any]) -> float:
    """Mean tokens of chosen minus rejected: DPO also learns length, so the gap belongs beside the data."""
    return float(data["mean_chosen_tokens"] - data["mean_rejected_tokens"])


def tokens_per_second(summary: Summary, stage: str) -> float | None:
    """Generated tokens (trained ones where nothing is generated) over the stage's whole wall time."""
    tokens, seconds = summary.tokens.get(stage, {}), summary.seconds.get(stage)
    made = tokens.get("completion") or tokens.get("trained")
    return made / seconds if made and seconds else None


def _work(summary: Summary, stage: str) -> str:
    tokens, rate = summary.tokens.get(stage, {}), tokens_per_second(summary, stage)
    if rate is None:
        return ""
    if "completion" not in tokens:
        return f"{number(tokens['trained'])} tokens trained ({rate:,.0f}/s)"
    cached = f" + {number(tokens['cached'])} cached" if tokens.get("cached") else ""
    return f"{number(tokens['prompt'])} prompt{cached}, {number(tokens['completion'])} generated tokens ({rate:,.0f}/s)"


def model_lines(by_model: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Who wrote what, where more than one model wrote."""
    lines = []
    for name, own in by_model.items() if len(by_model) > 1 else ():
        repaired = f"{number(own['repaired'])} of its {number(own['reflections'])} reflections"
        if own["reflections"]:
            rate = own["repaired"] / own["reflections"]
            repaired += f": {share([rate, *wilson(own['repaired'], own['reflections'])])}"
        told = f"{name} wrote {number(own['thoughts'])} thoughts ({number(own['tokens'])} tokens)"
        lines.append(f"{told}; a correct answer followed {repaired}")
    return lines


def comparison_lines(compared: Sequence[Mapping[str, Any]]) -> list[str]:
    """The search beside best-of-n at equal generated tokens: what each found, and who is ahead where one is."""
    lines = [
        f"{row['method']:<9}  correct chain {share(row['correct'])}  both kinds {share(row['both'])}  "
        f"vote {share(row['vote'])}  pairs a question {row['pairs_per_question']:.2f}  tokens a pair "
        f"{number(row['tokens_per_pair'] and round(row['tokens_per_pair']))}  ({number(row['tokens'])} generated, "
        f"{number(row['uncached_prompt_tokens'])} prompt tokens)"
        for row in compared
    ]
    return [*lines, f"at equal tokens: {verdict(compared)}"] if lines else []


def verdict(compared: Sequence[Mapping[str, Any]]) -> str:
    """Where one method is ahead of the other with intervals that do not overlap; that none is, otherwise."""
    mcts, other = compared
    ahead = []
    for name, key in (
        ("questions with a correct chain", "correct"), ("questions with both kinds", "both"), ("majority vote", "vote"),
    ):  # fmt: skip
        for row, behind in ((mcts, other), (other, mcts)):
            if row[key][1] > behind[key][2]:
                ahead.append(f"{row['method']} is ahead in {name}")
    return "; ".join(ahead) if ahead else "no interval tells the two apart"


def share(values: Sequence[float]) -> str:
    """A share with its interval, in percent."""
    share, low, high = values
    return f"{percent(share)}% ({percent(low)}–{percent(high)})"
