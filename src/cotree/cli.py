"""The command line: each verb parses its words and calls the public function of the same name.

Invariant: there is no logic here. A user's mistake ends in one line on stderr and exit code 2, failed work in one line
and exit code 1; a traceback is always a bug of cotree.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cotree import __version__
from cotree.base.errors import CotreeError, UsageError, spoken_for
from cotree.base.progress import Output

if TYPE_CHECKING:
    from cotree.experiment.recipe import Recipe

_INTERRUPTED = 130

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file, e.g. recipes/laptop.yaml.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="a.b=c", help="Overrides of recipe values.")]
RunsDir = Annotated[Path, typer.Option(help="Where run folders are kept.")]
Served = Annotated[str, typer.Option(help="The model's name at a server.")]
Tokenizer = Annotated[str | None, typer.Option(help="Renders a server's prompts: hub id or folder.")]
KeyVariable = Annotated[str | None, typer.Option(help="The variable that holds a server's key.")]
Boxed = Annotated[bool, typer.Option("--boxed", help="Answers are short, in a box, and can vote; else free text.")]
Strategy = Literal["mcts", "vote", "best_of_n", "beam"]
StrategyName = Annotated[Strategy, typer.Option(help="How answers are searched for.")]
ValueName = Annotated[
    Literal["vote", "likelihood", "verifier"] | None, typer.Option(help="What they go by; verifier: search.reward=...")
]
Budget = Annotated[int | None, typer.Option(min=1, help="About how many tokens to generate.")]
Rollouts = Annotated[int | None, typer.Option(min=1, help="At most so many chains.")]
Seed = Annotated[int, typer.Option(help="Of the search.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]


@app.callback(invoke_without_command=True)
def cotree(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Say the version.")] = False
) -> None:
    """Grow trees of thought with Monte Carlo tree search, and train small models on them."""
    if version:
        typer.echo(f"cotree {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(UsageError.exit_code)


@app.command(epilog="Example: cotree run recipes/laptop.yaml search.rollouts=4 name=quick")
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    only: Annotated[str | None, typer.Option(help="Run one stage: search, build, train_sft, ...")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what each stage would cost.")] = False,
    start: Annotated[Path | None, typer.Option("--from", help="Take over this run's stages of equal settings.")] = None,
    runs_dir: RunsDir = Path("runs"),
    quiet: Quiet = False,
) -> None:
    """Questions to trees to datasets to a trained student to a table. The same command resumes."""
    from cotree.experiment.run import run as run_recipe

    loaded = _recipe(recipe, overrides)
    if start is not None and dry_run:
        raise UsageError("--from makes the new run; leave out --dry-run, or ask it of the run afterwards")
    run_recipe(loaded, runs_dir, only=only, dry=dry_run, start=start, output=Output(quiet=quiet))


@app.command(epilog="Example: cotree build recipes/laptop.yaml build.dpo.length=longest --out datasets/long")
def build(
    context: typer.Context,
    recipe: Annotated[Path | None, typer.Argument(metavar="RECIPE", help="A recipe file.")] = None,
    overrides: Overrides = None,
    check: Annotated[Path | None, typer.Option(help="Only check a dataset file: .parquet or .jsonl.")] = None,
    out: Annotated[Path | None, typer.Option(help="Build from the run's trees into this folder instead.")] = None,
    runs_dir: RunsDir = Path("runs"),
    quiet: Quiet = False,
) -> None:
    """Build the datasets of a run from its trees; with other `build.` values and --out, others from the same trees."""
    from cotree.data.build import built_lines
    from cotree.data.kinds import check_file
    from cotree.experiment.datasets import build_beside
    from cotree.experiment.run import run as run_recipe

    if check is not None:
        _alone(context, "--check", "check")
        typer.echo("{}: {} faultless {} rows".format(check, *reversed(check_file(check))))
    elif recipe is None:
        raise UsageError("name a recipe, or a file with --check")
    elif out is not None:
        built = build_beside(_recipe(recipe, overrides), runs_dir, out)
        Output(quiet=quiet).say("\n".join([f"{out}:", *built_lines(built.counts)]))
    else:
        run_recipe(_recipe(recipe, overrides), runs_dir, only="build", output=Output(quiet=quiet))


@app.command(epilog="Example: cotree preview recipes/laptop.yaml --kind dpo --rows 2")
def preview(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    kind: Annotated[str, typer.Option(help="sft, dpo, control, step_pairs or stepwise.")] = "sft",
    rows: Annotated[int, typer.Option(min=1, help="How many rows to show.")] = 3,
    data: Annotated[Path | None, typer.Option(help="A folder that `cotree build --out` wrote.")] = None,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Show a run's rows as the trainer sees them: loss mask, shared prefix, special tokens, lengths."""
    from cotree.experiment.datasets import preview_run

    loaded = _recipe(recipe, overrides)
    Output().say(preview_run(loaded, data or runs_dir / loaded.name / "data", kind, rows))


@app.command(name="eval", epilog="Example: cotree eval --model smollm2-135m-instruct --task gsm8k --limit 100")
def eval_(
    context: typer.Context,
    recipe: Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="The eval stage of this recipe.")] = None,
    overrides: Overrides = None,
    model: Annotated[str | None, typer.Option(help="A URL, .gguf, transformers folder or embedded name.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="A task to evaluate on; may be repeated.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of a reply.")] = 1024,
    samples: Annotated[int, typer.Option(min=1, help="Completions a question.")] = 1,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    data: Annotated[str | None, typer.Option(help="Where the rows are: file, folder or hub id.")] = None,
    family: Annotated[str | None, typer.Option(help='Only these questions: "3 blocks", English, ...')] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many questions of a task.")] = None,
    name: Annotated[str | None, typer.Option(help="What tables call the model.")] = None,
    out: Annotated[Path | None, typer.Option(help="The folder of the results; runs/evals/NAME by default.")] = None,
    gguf: Annotated[str | None, typer.Option(help="F32, F16 or Q8_0 instead of a file as it is.")] = None,
    base: Annotated[str, typer.Option(help="What a folder was trained from.")] = "smollm2-135m-instruct",
    served: Served = "default",
    tokenizer: Tokenizer = None,
    chat: Annotated[bool, typer.Option("--chat", help="The server renders the prompts.")] = False,
    api_key_env: KeyVariable = None,
    max_in_flight: Annotated[int, typer.Option(min=1, help="Requests to a server at once.")] = 16,
    strategy: Annotated[Strategy | None, typer.Option(help="Decode by search.")] = None,
    value: ValueName = None,
    budget_tokens: Budget = None,
    compare: Annotated[tuple[Path, Path] | None, typer.Option(help="Compare two evaluations instead.")] = None,
    table: Annotated[list[Path] | None, typer.Option(help="Show this evaluation or run; may be repeated.")] = None,
    format_: Annotated[str, typer.Option("--format", help="terminal, markdown, latex or html.")] = "terminal",
    runs_dir: RunsDir = Path("runs"),
    quiet: Quiet = False,
) -> None:
    """Evaluate a recipe's models, or any one model; compare two evaluations; make tables."""
    from cotree.eval.compare import compare as compare_two
    from cotree.eval.evaluate import evaluate
    from cotree.eval.results import read_evaluations
    from cotree.report.paper_table import paper_table

    output = Output(quiet=quiet)
    if compare is not None:
        _alone(context, "--compare", "compare", "quiet")
        for difference in compare_two(*compare):
            Output().say("\n".join(difference.lines()))
    elif table:
        _alone(context, "--table", "table", "format_", "quiet")
        typer.echo(paper_table(read_evaluations(table), format_))
    elif model is not None:
        if recipe is not None:
            raise UsageError(f"--model does not go with a recipe, or an override: leave out {recipe}")
        found = evaluate(
            model, task or [], max_tokens=max_tokens, samples=samples, temperature=temperature, top_p=top_p, seed=seed,
            data=data, family=family, limit=limit, name=name, out=out, gguf=gguf, base=base, served=served,
            tokenizer=tokenizer, chat=chat, api_key_env=api_key_env, max_in_flight=max_in_flight,
            strategy=strategy, value=value, budget_tokens=budget_tokens, output=output,
        )  # fmt: skip
        output.say(paper_table([found], format_))
    elif recipe is None:
        raise UsageError("name a recipe, or --model with --task")
    else:
        from cotree.experiment.run import run as run_recipe

        _alone(context, "a recipe", "recipe", "overrides", "runs_dir", "quiet")
        run_recipe(_recipe(recipe, overrides), runs_dir, only="eval", output=output)


@app.command(epilog="Example: cotree diagnose runs/laptop/eval/samples_dpo.jsonl")
def diagnose(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Parquet, JSON lines, a hub id, a run, an evaluation.")],
    field: Annotated[str | None, typer.Option(help="The column that holds the text.")] = None,
    shown: Annotated[int, typer.Option(help="How many of the worst texts to show.")] = 3,
) -> None:
    """Count loops, over-reflection and missing answers in long chains of thought, by source and language."""
    from cotree.eval.survey import diagnose_file

    for line in diagnose_file(file, field, shown):
        Output().say(line)


@app.command(name="import", epilog="Example: cotree import sky_t1.jsonl --student smollm2-135m-instruct -o sky.parquet")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Conversations, messages, or prompts with responses.")],
    student: Annotated[str, typer.Option(help="Whose tokens count: an embedded name, a .gguf, a folder or a hub id.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The Parquet file of SFT rows.")],
    task: Annotated[str | None, typer.Option(help="The task that verifies where a gold answer is known.")] = None,
    held_out: Annotated[list[str] | None, typer.Option(help="A task whose questions must not be in it.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Rows over this many tokens are left out and counted.")] = 16_384,
) -> None:
    """Turn long chains of thought that others distilled into SFT rows, gated and verified."""
    from cotree.data.external import import_file

    typer.echo(import_file(file, student, out, task, held_out or [], max_tokens))


@app.command(epilog="Example: cotree export runs/laptop/data --to llamafactory -o LLaMA-Factory/data")
def export(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A build's folder, a dataset file, or trees.db.")],
    to: Annotated[str, typer.Option(help="jsonl, llamafactory, axolotl, trees (of a trees.db) or hub.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Folder; Parquet file for trees; OWNER/NAME for hub.")],
) -> None:
    """Write datasets for other trainers, trees as Parquet, or push a build to a private dataset of the hub."""
    from cotree.data.export import export_to

    for written in export_to(source, to, out):
        typer.echo(written)


@app.command(epilog="Example: cotree check recipes/laptop.yaml")
def check(
    recipe: RecipeArgument, overrides: Overrides = None, runs_dir: RunsDir = Path("runs"), quiet: Quiet = False
) -> None:
    """Check a recipe, its questions, models and servers, and the disk before anything is spent."""
    from cotree.experiment.check import check as check_recipe

    check_recipe(_recipe(recipe, overrides), Output(quiet=quiet), runs_dir)


@app.command(epilog='Example: cotree decode "What is 31 + 12?" --boxed --budget-tokens 400 search.temperature=1.0')
def decode(
    question: Annotated[str | None, typer.Argument(metavar="[QUESTION]", help="Its words; or --task and --id.")] = None,
    overrides: Overrides = None,
    model: Annotated[str, typer.Option(help="A server's URL, a .gguf or an embedded name.")] = "smollm2-135m-instruct",
    task: Annotated[str | None, typer.Option(help="The task of the question.")] = None,
    id_: Annotated[str | None, typer.Option("--id", help="The question's id in its task.")] = None,
    boxed: Boxed = False,
    strategy: StrategyName = "mcts",
    value: ValueName = None,
    budget_tokens: Budget = None,
    rollouts: Rollouts = None,
    seed: Seed = 0,
    served: Served = "default",
    tokenizer: Tokenizer = None,
    api_key_env: KeyVariable = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but the answer, and errors.")] = False,
) -> None:
    """Answer one question by search that knows no gold answer."""
    from cotree.decode.answer import decode as decode_one

    # An override holds `=`; with --task there is no question before it.
    given = [question] if task is not None and question is not None else []
    found = decode_one(
        None if given else question, model, task=task, question_id=id_, boxed=boxed, strategy=strategy, value=value,
        budget_tokens=budget_tokens, rollouts=rollouts, seed=seed, overrides=[*given, *(overrides or [])],
        served=served, tokenizer=tokenizer, api_key_env=api_key_env, output=Output(quiet=quiet),
    )  # fmt: skip
    if quiet and found.answer is not None:
        Output().say(found.answer)


@app.command(epilog="Example: cotree serve http://gpu1:8000 --served Qwen/Qwen3-8B --budget-tokens 4000")
def serve(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Server URLs, .gguf files, embedded names.")],
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="a.b=c", help="Overrides of a recipe.")] = None,
    boxed: Boxed = False,
    strategy: StrategyName = "mcts",
    value: ValueName = None,
    budget_tokens: Budget = None,
    rollouts: Rollouts = None,
    seed: Seed = 0,
    at_once: Annotated[int, typer.Option(min=1, help="Searches at once; others wait.")] = 8,
    host: Annotated[str, typer.Option(help="Beyond loopback COTREE_TOKEN must be set.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8000,
    served: Served = "default",
    tokenizer: Tokenizer = None,
    api_key_env: KeyVariable = None,
    quiet: Quiet = False,
) -> None:
    """Serve an OpenAI-compatible endpoint whose answers are decoded with search."""
    from cotree.decode.answer import Backend
    from cotree.decode.server import serve as serve_models

    backend = Backend(models, set_ or [], served, tokenizer, api_key_env, budget_tokens, rollouts, seed)
    serve_models(
        backend, strategy=strategy, value=value, boxed=boxed, at_once=at_once, host=host, port=port,
        output=Output(quiet=quiet),
    )  # fmt: skip


@app.command(epilog="Example: cotree report runs/laptop")
def report(run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]) -> None:
    """Write one self-contained HTML page about a finished run."""
    from cotree.report.html import write_report

    typer.echo(write_report(run_folder))


@app.command(epilog="Example: cotree tasks")
def tasks() -> None:
    """List the tasks with size, licence and source."""
    from cotree.tasks import listing

    typer.echo(listing())


@app.command(epilog="Example: cotree patterns")
def patterns() -> None:
    """List the thought patterns: which type may follow which, and how many."""
    from cotree.search.thoughts import PATTERNS

    for name, pattern in PATTERNS.items():
        rows = "; ".join(f"{k} > {', '.join(f'{n} {t}' for t, n in row.items())}" for k, row in pattern.items())
        typer.echo(f"{name:12} {rows}")


def _recipe(path: Path, overrides: list[str] | None) -> Recipe:
    from cotree.experiment.recipe import load_recipe

    return load_recipe(path, overrides or [])


def _alone(context: typer.Context, way: str, *taken: str) -> None:
    """Refuse what a way of using a verb would ignore."""
    given = [
        param.opts[0]
        for param in context.command.params
        if param.name not in taken and (source := context.get_parameter_source(param.name or "")) is not None
        if source.name == "COMMANDLINE"
    ]
    if given:
        raise UsageError(f"{way} does not go with {', '.join(given)}")


def main() -> None:
    """The `cotree` command."""
    # Without a network the hub's client would warn of each of its retries; what fails in the end is said in one line.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    try:
        # typer turns Ctrl-C and exits into a number that it returns.
        with spoken_for():
            code = app(prog_name="cotree", standalone_mode=False)
        if code == _INTERRUPTED:
            _fail("stopped; nothing is lost: run the same command again to resume", _INTERRUPTED)
        sys.exit(code if isinstance(code, int) else 0)
    except CotreeError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _fail(f"the disk is full ({error.filename or ''}); free some space, then re-run the same command to resume", 1)
    except Exception as error:
        # typer carries its own copy of click, whose exceptions have no public name.
        context, message = (getattr(error, name, None) for name in ("ctx", "format_message"))
        if message is None:
            raise
        verb = "cotree" if context is None else context.command_path
        _fail(f"{message().replace('Value error, ', '')} (see {verb} --help)", UsageError.exit_code)


def _fail(message: str, code: int) -> None:
    print(f"cotree: {message}", file=sys.stderr, flush=True)
    # The embedded engine's threads may be inside a long decode; what matters is on disk already.
    if code == _INTERRUPTED:
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
