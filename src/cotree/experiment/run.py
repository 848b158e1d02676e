"""The spine: questions -> trees -> rows -> trained students -> table -> report, each stage resumable.

Invariant: a stage that has finished is never repeated, one that was interrupted goes on from what it left, and what a
stage needs from an earlier one is in the run folder, so every stage can be run by itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cotree.base.atomic import write_json
from cotree.base.errors import UsageError, spoken_for
from cotree.base.numbers import duration
from cotree.base.progress import Output, Update
from cotree.data.build import built_lines
from cotree.experiment.check import preflight, questions
from cotree.experiment.datasets import build_run, student_source
from cotree.experiment.plan import dry_run
from cotree.experiment.recipe import STAGES, Recipe
from cotree.experiment.reuse import reusable, start_from
from cotree.experiment.run_folder import RunFolder, find_run, open_run
from cotree.models.endpoints import check_servers, open_endpoints

if TYPE_CHECKING:
    from cotree.search.calls import Progress
    from cotree.train.trainer import StepLog


def run(
    recipe: Recipe,
    runs_dir: Path = Path("runs"),
    *,
    only: str | None = None,
    dry: bool = False,
    start: Path | None = None,
    output: Output | None = None,
) -> Path:
    """Run all stages of a recipe, or one; calling it again resumes.

    Args:
        recipe: what to run.
        runs_dir: where its folder is.
        only: one stage.
        dry: only say what the stages would cost.
        start: another run, whose finished stages a new one takes over as far as their settings are equal.
        output: where progress is said.

    Returns:
        The run folder.

    Raises:
        UsageError: found before any work: a model, a server, a task or a library is missing, or the folder belongs to
            another recipe.
        CotreeError: work failed after it had started; the same call resumes it.
    """
    output = output or Output()
    if only is not None and only not in STAGES:
        raise UsageError(f"unknown stage `{only}`; stages are {', '.join(STAGES)}")
    wanted = STAGES if only is None else (only,)
    before = find_run(runs_dir, recipe)
    if dry:
        for line in dry_run(before, wanted):
            output.say(line)
        return before.path
    taken = [] if start is None or (before.path / "recipe.yaml").exists() else reusable(start, recipe)
    done = {stage for stage in STAGES if stage in taken or before.done(stage)}
    missing = [stage for stage in STAGES[: STAGES.index(wanted[0])] if stage not in done]
    if missing:
        raise UsageError(f"stage `{wanted[0]}` needs `{missing[0]}` first; run without --only, or that stage")
    ahead = set(wanted) - done
    for _, _, look in preflight(recipe, ahead):
        look()
    if "search" in ahead:
        asyncio.run(check_servers(recipe.used_models()))
    if start is not None and taken:
        start_from(start, before.path, recipe, taken)
        output.say(f"from {start}: {', '.join(taken)}")
    with open_run(runs_dir, recipe) as folder:
        output.log = folder.path / "log.jsonl"
        output.on_update = lambda: folder.beat()
        if all(folder.done(stage) for stage in wanted):
            output.say(f"{folder.path}: all done ({', '.join(wanted)})")
        for stage in wanted:
            if folder.done(stage):
                continue
            started = time.monotonic()
            with spoken_for(), folder.stage(stage) as result:
                _STAGE[stage](folder, result, output)
            output.say(f"  {stage} done in {time.monotonic() - started:.0f} s")
        if only == "build":
            if "build" in done:  # else its counts have just been said
                _say_build(folder.result("build")["counts"], output)
        else:
            _say_results(folder, output)
        return folder.path


def _search(run: RunFolder, result: dict[str, Any], output: Output) -> None:
    from cotree.search.baselines import compare
    from cotree.search.driver import Grower
    from cotree.search.store import TreeStore
    from cotree.search.summary import summarize

    recipe = run.recipe
    asked = questions(recipe, "train")
    output.say(f"search: growing {len(asked)} trees, up to {recipe.search.rollouts} rollouts each")

    async def grow(store: TreeStore) -> tuple[str, list[dict[str, Any]]]:
        async with open_endpoints(recipe.used_models(), widest=recipe.search.widest) as endpoints:
            grower = Grower(store, endpoints, recipe.roles, recipe.search, recipe.seed)
            with output.progress("trees") as update:
                await grower.grow_all(asked, partial(_show_search, update))
            if not recipe.search.baselines:
                return grower.config, []
            with output.progress("best-of-n") as update:
                compared = await compare(grower, asked, update)
            return grower.config, compared

    with TreeStore(run.trees) as store:
        config, compared = asyncio.run(grow(store))
        result.update(summarize(store.trees(config)), config=config, compared=compared)


def _show_search(update: Update, progress: Progress) -> None:
    names = {"correct": "correct", "wrong": "wrong", "no_answer": "cut or without answer"}
    verdicts = ", ".join(f"{n} {names[kind]}" for kind, n in progress.verdicts.items())
    seconds = max(progress.seconds, 1e-9)
    speed = f"{progress.thoughts / seconds:.1f} thoughts/s, {progress.tokens / seconds:.0f} tokens/s"
    cost = f", cost {progress.cost:.2f}" if progress.cost else ""
    left = progress.trees_wanted - progress.trees
    until = duration(seconds / max(progress.trees - progress.trees_before, 1) * left)
    update(progress.trees, progress.trees_wanted, f"{verdicts}; {speed}{cost}; about {until} left")


def _build(run: RunFolder, result: dict[str, Any], output: Output) -> None:
    output.say("build: choosing chains and pairs by relative length")
    built = build_run(run.recipe, run.trees, run.result("search")["config"], run.data)
    result.update(counts=built.counts)
    write_json(run.path / "samples.json", built.samples)
    _say_build(built.counts, output)


def _say_build(counts: dict[str, Any], output: Output) -> None:
    for line in built_lines(counts):
        output.say(f"  {line}")


def _train_sft(run: RunFolder, result: dict[str, Any], output: Output) -> None:
    from cotree.train.sft import train_sft
    from cotree.train.student import load_student

    recipe = run.recipe
    students = ("sft", "control") if recipe.eval.control else ("sft",)
    output.say(f"train_sft: training {' and '.join(students)} on chains")
    base = load_student(student_source(recipe), run.checkpoint("base") / "model")
    trained = 0
    for name in students:
        with output.progress(f"{name} steps") as update:
            trained += train_sft(
                run.data / name / "train.parquet",
                base,
                run.checkpoint(name),
                recipe.train.sft,
                seed=recipe.seed,
                max_tokens=recipe.build.max_tokens,
                on_step=_show_steps(name, update, output),
            ).tokens
    result["tokens"] = {"trained": trained}


def _show_steps(name: str, update: Update, output: Output) -> Callable[[StepLog], None]:
    """Plots the loss and the gauges that there are, a line each, after every step; says warnings."""
    from cotree.base.numbers import sparkline

    seen: dict[str, list[float]] = {}

    def show(log: StepLog) -> None:
        for gauge, value in (log.gauges | {"loss": log.loss}).items():
            seen.setdefault(gauge, []).append(value)
        lines = [f"{gauge:<15} {seen[gauge][-1]:>8.3g}  {sparkline(seen[gauge])}" for gauge in _GAUGES if gauge in seen]
        update(log.step, log.total_steps, "\n".join(lines))
        for warning in log.warnings:
            output.say(f"  warning at {name} step {log.step}: {warning}")

    return show


_GAUGES = (
    "loss", "margin", "accuracy", "chosen_logps", "rejected_logps", "chosen_reward",
    "probe_tokens", "probe_loop", "probe_no_answer",
)  # fmt: skip


def _train_dpo(run: RunFolder, result: dict[str, Any], output: Output) -> None:
    from cotree.train.dpo import train_dpo

    recipe = run.recipe
    output.say("train_dpo: training dpo on pairs, from the sft checkpoint")
    with output.progress("dpo steps") as update:
        trained = train_dpo(
            run.data / "dpo" / "train.parquet",
            run.checkpoint("sft") / "model",
            run.checkpoint("dpo"),
            recipe.train.dpo,
            seed=recipe.seed,
            max_tokens=recipe.build.max_tokens,
            on_step=_show_steps("dpo", update, output),
        )
    result["tokens"] = {"trained": trained.tokens}


def _eval(run: RunFolder, result: dict[str, Any], output: Output) -> None:
    from cotree.eval.asking import Sampling, ask, embedded
    from cotree.eval.outcome import constant_baselines, instruction_scores, outcomes
    from cotree.models.tokenizer import load_tokenizer
    from cotree.report.summary import MODELS
    from cotree.train.export_gguf import export_gguf

    settings, source = run.recipe.eval, student_source(run.recipe)
    tokenizer, asked = load_tokenizer(source), questions(run.recipe, settings.split)
    output.say(f"eval: asking {len(asked)} {settings.split} questions of every model, greedily")
    left_out = {"base+examples": not settings.examples, "control": not settings.control}
    rows: list[dict[str, Any]] = []
    followed: list[dict[str, Any]] = []
    prompt = completion = 0
    for name in MODELS:
        if left_out.get(name):
            continue
        checkpoint, _, examples = name.partition("+")
        gguf = run.path / "student" / f"{checkpoint}-{settings.gguf}.gguf"
        if not gguf.is_file():
            export_gguf(run.checkpoint(checkpoint) / "model", source, gguf, settings.gguf)
        how = Sampling(settings.max_tokens, examples=bool(examples))
        with output.progress(name) as update:
            model = embedded(gguf, tokenizer, asked, how)
            samples = ask(model, asked, run.path / "eval" / f"samples_{name}.jsonl", how, on_sample=update)
        if name not in run.manifest.get("answered", ()):  # in the run that this one began with, at no cost here
            prompt += sum(sample.prompt_tokens for sample in samples)
            completion += sum(sample.tokens for sample in samples)
        rows += [{"model": name, **row} for row in outcomes(asked, samples)]
        followed += [{"model": name, **score} for score in instruction_scores(asked, samples)]
    # The student beside its GGUF as a transformers folder; the weights themselves stay where they were trained.
    folder = run.path / "student" / "transformers"
    if not folder.is_symlink():
        folder.symlink_to(Path("..") / run.checkpoint("dpo").relative_to(run.path) / "model")
    write_json(run.path / "eval" / "results.json", {"eval": rows, "instructions": followed})
    result.update(eval=rows, instructions=followed, baselines=constant_baselines(asked))
    result.update(tokens={"prompt": prompt, "completion": completion})


def _report(run: RunFolder, result: dict[str, Any], output: Output) -> None:
    from cotree.report.html import write_report

    output.say("report: writing report.html")
    started = time.monotonic()
    summary = _summary(run)
    write_json(run.path / "summary.json", summary)
    write_report(run.path)
    summary["seconds"]["report"] = round(time.monotonic() - started, 1)
    write_json(run.path / "summary.json", summary)
    result["report"] = "report.html"


def _summary(run: RunFolder) -> dict[str, Any]:
    """Every number of the printed tables, as far as the stages have come."""
    stages = run.manifest["stages"]
    search, evaluated = run.result("search"), run.result("eval")
    return {
        "name": run.recipe.name,
        "seed": run.recipe.seed,
        "created": run.manifest["created"],
        "student": run.recipe.models[run.recipe.train.student].embedded,
        "split": run.recipe.eval.split,
        "machine": run.manifest["machine"],
        **{part: evaluated.get(part, []) for part in ("eval", "baselines", "instructions")},
        "search": {**search.get("counts", {}), "compared": search.get("compared", [])},
        "data": run.result("build").get("counts", {}),
        # Of this run's own stages: those taken over cost it nothing.
        "seconds": {name: each["seconds"] for name, each in stages.items() if each["done"] and "from" not in each},
        "tokens": {name: stage["result"]["tokens"] for name, stage in stages.items() if "tokens" in stage["result"]},
    }


def _say_results(run: RunFolder, output: Output) -> None:
    from cotree.report.summary import Summary, read_summary
    from cotree.report.table import eval_table, summary_lines

    finished = run.done("report")
    summary = read_summary(run.path) if finished else Summary.model_validate(_summary(run))
    if summary.eval:
        output.say(eval_table(summary))
    for line in summary_lines(summary):
        output.say(line)
    if finished:
        output.say(f"report: {run.path / 'report.html'}")
    else:
        output.say(f"{run.path}; go on with the same command without --only")


_STAGE = {
    "search": _search,
    "build": _build,
    "train_sft": _train_sft,
    "train_dpo": _train_dpo,
    "eval": _eval,
    "report": _report,
}
