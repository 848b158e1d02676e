"""The command line: each command parses its arguments and calls one function; there is no other logic here.

Bad input ends in one line on stderr and exit code 2, failed work in one line and exit code 1; a traceback is always a
bug of cotree.
"""

from __future__ import annotations

import errno
import inspect
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer

import cotree
from cotree.base.errors import CotreeError, UsageError, first_cotree_error
from cotree.base.progress import Output, SafeStream

_INTERRUPTED = 130

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

RecipeArgument = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A recipe file, e.g. recipes/laptop.yaml, or a run folder.")
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="a.b.c=v", help="Overrides of recipe values.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, e.g. runs/laptop.")]
RunsDir = Annotated[Path, typer.Option(help="The parent of run folders.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="The output file or folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Format = Annotated[Literal["terminal", "markdown", "latex", "html"], typer.Option("--format", help="Of the table.")]
Strategy = Literal["mcts", "vote", "best_of_n", "beam"]
Budget = Annotated[int | None, typer.Option(min=1, help="Approximate tokens to generate.")]
Seed = Annotated[int, typer.Option(help="Sampling seed.")]
Verb = TypeVar("Verb", bound=Callable[..., None])


def with_options(*groups: Callable[..., None]) -> Callable[[Verb], Verb]:
    """Add the parameters of other functions to a command's options; it gets them as `**options`."""

    def add(verb: Verb) -> Verb:
        declared: list[Callable[..., None]] = [verb, *groups]
        found = [inspect.signature(each, eval_str=True).parameters.values() for each in declared]
        named = [parameter for each in found for parameter in each if parameter.kind != parameter.VAR_KEYWORD]
        verb.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
        return verb

    return add


def _model_options(
    served: Annotated[str, typer.Option(help="The model's name at a server.")] = "default",
    tokenizer: Annotated[str | None, typer.Option(help="Renders a server's prompts: hub id or folder.")] = None,
    api_key_env: Annotated[str | None, typer.Option(help="Environment variable with the API key.")] = None,
    engine: Annotated[
        Literal["llama.cpp", "vllm"] | None, typer.Option(help="Engine for weights; default: vllm with a GPU.")
    ] = None,
    engine_args: Annotated[
        list[str] | None,
        typer.Option("--engine-arg", metavar="key=value", help="An argument of vllm serve; repeatable."),
    ] = None,
) -> None:
    """Options of a model (`models.resolve.parse_model`)."""


def _search_options(
    boxed: Annotated[
        bool, typer.Option("--boxed", help="Short answers in a box, which can vote; else free text.")
    ] = False,
    strategy: Annotated[Strategy, typer.Option(help="Search strategy.")] = "mcts",
    value: Annotated[
        Literal["vote", "likelihood", "verifier"] | None,
        typer.Option(help="How answers are ranked; verifier: reward=..."),
    ] = None,
    budget_tokens: Budget = None,
    rollouts: Annotated[int | None, typer.Option(min=1, help="Maximum number of chains.")] = None,
    seed: Seed = 0,
) -> None:
    """Options of decoding (`decode.answer.decode`)."""


def _evaluation_options(
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens of a reply.")] = 1024,
    samples: Annotated[int, typer.Option(min=1, help="Completions per question.")] = 1,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling; 1 is off.")] = 1.0,
    seed: Seed = 0,
    examples: Annotated[
        bool, typer.Option("--examples", help="Put the task's worked examples before the question.")
    ] = False,
    data: Annotated[str | None, typer.Option(help="Source of the rows: file, folder or hub id.")] = None,
    split: Annotated[Literal["train", "dev", "test"], typer.Option(help="Split of the questions.")] = "test",
    family: Annotated[str | None, typer.Option(help='Only this family of questions: "3 blocks", English, ...')] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first N questions of each task.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model in tables.")] = None,
    out: Annotated[Path | None, typer.Option(help="The folder of the results; runs/evals/NAME by default.")] = None,
    gguf: Annotated[str | None, typer.Option(help="Convert weights to F32, F16 or Q8_0 before serving.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="The server renders the prompts.")] = False,
    max_in_flight: Annotated[int, typer.Option(min=1, help="Concurrent requests per server.")] = 16,
    strategy: Annotated[Strategy | None, typer.Option(help="Decode by search.")] = None,
    value: Annotated[Literal["vote", "likelihood"] | None, typer.Option(help="How answers are ranked.")] = None,
    budget_tokens: Budget = None,
) -> None:
    """Options of evaluation (`eval.evaluate.evaluate_model`)."""


@app.callback(invoke_without_command=True)
def main_command(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """Grow trees of thought with Monte Carlo tree search, and train small models on them."""
    if version:
        typer.echo(f"cotree {cotree.__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(UsageError.exit_code)


@app.command(epilog="Example: cotree run recipes/laptop.yaml name=mine students.dpo.beta=0.3 --from runs/laptop")
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    only: Annotated[
        list[str] | None, typer.Option(help="A node (students/dpo) or kind (trees), with its dependencies.")
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--from", help="Copy content with equal settings from this run.")
    ] = None,
    regrow: Annotated[
        bool, typer.Option("--regrow", help="Grow finished trees again if their settings changed.")
    ] = False,
    shard: Annotated[
        str | None, typer.Option(metavar="K/N", help="Only this shard of the questions: 0/8 is the first of eight.")
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(metavar="WHERE", help="Run shards on local:PROCESSES, slurm:FILE.yaml or ray:ADDRESS."),
    ] = None,
    shards: Annotated[int | None, typer.Option(min=1, help="Number of shards.")] = None,
    scratch: Annotated[
        str | None, typer.Option(metavar="DIR", help="A folder on a local disk for databases, if runs are on NFS.")
    ] = None,
    runs_dir: RunsDir = Path("runs"),
    quiet: Quiet = False,
) -> None:
    """Run a recipe: compute every node that is not up to date, in order. The same command resumes."""
    from cotree.base.shards import Shard

    cotree.run(
        cotree.load_recipe(recipe, overrides or ()),
        runs_dir,
        only=only or (),
        source=source,
        regrow=regrow,
        shard=None if shard is None else Shard.parse(shard),
        on=on,
        shards=shards,
        scratch=scratch,
        output=Output(quiet=quiet),
    )


@app.command(epilog="Example: cotree plan recipes/laptop.yaml students.dpo.beta=0.3")
def plan(
    recipe: RecipeArgument, overrides: Overrides = None, as_json: AsJson = False, runs_dir: RunsDir = Path("runs")
) -> None:
    """Show each node's state, changed settings, and the estimated cost of a run. Calls no model, uses no network."""
    from cotree.experiment.plan import plan_lines

    nodes = cotree.plan(cotree.load_recipe(recipe, overrides or ()), runs_dir)
    if as_json:
        typer.echo(json.dumps({"nodes": [node.to_json() for node in nodes]}, indent=1))
    else:
        Output().print("\n".join(plan_lines(nodes)))


@app.command(epilog="Example: cotree check recipes/laptop.yaml")
def check(
    recipe: RecipeArgument, overrides: Overrides = None, runs_dir: RunsDir = Path("runs"), quiet: Quiet = False
) -> None:
    """Test a recipe's models and servers, and check questions, packages and disk, before a run."""
    from cotree.experiment.check import check as check_recipe

    check_recipe(cotree.load_recipe(recipe, overrides or ()), Output(quiet=quiet), runs_dir)


@app.command(epilog="Example: cotree show runs/laptop --question sum-17")
def show(
    run: RunArgument,
    question: Annotated[str | None, typer.Option(help="The id of a question whose tree to draw.")] = None,
    trees: Annotated[str | None, typer.Option(help="The trees node, if a run has several.")] = None,
    best: Annotated[bool, typer.Option("--best", help="Draw the most instructive tree.")] = False,
) -> None:
    """Show the trees of a run: a list, or one tree with its thoughts, verdicts, values and chosen chains."""
    from cotree.base.run_folder import find_run
    from cotree.report.show import show_run

    Output().print(show_run(find_run(run), trees, question, best))


@app.command(epilog="Example: cotree view runs/laptop --annotator anna")
def view(
    run: RunArgument,
    annotator: Annotated[str | None, typer.Option(help="Your name, for annotations; else the page asks.")] = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="Disable annotations.")] = False,
    host: Annotated[str, typer.Option(help="Beyond loopback the URL has a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 0,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")] = True,
) -> None:
    """Show a run in the browser: trees, chains, annotations, datasets, students and tables."""
    from cotree.experiment.run import view_run

    view_run(run, host=host, port=port, browser=browser, read_only=read_only, annotator=annotator)


@app.command(epilog="Example: cotree preview recipes/laptop.yaml pairs --rows 2")
def preview(
    recipe: RecipeArgument,
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="The name of a dataset in the recipe.")],
    rows: Annotated[int, typer.Option(min=1, help="How many rows to show.")] = 3,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Show a dataset's rows as the trainer sees them: loss mask, shared prefix, special tokens, lengths."""
    from cotree.experiment.opened import preview_dataset

    Output().print(preview_dataset(cotree.load_recipe(recipe), runs_dir, dataset, rows))


@app.command(name="eval", epilog="Example: cotree eval --model smollm2-135m-instruct --task gsm8k --limit 100")
@with_options(_evaluation_options, _model_options)
def eval_(
    model: Annotated[str, typer.Option(help="A URL, .gguf, transformers folder, packaged name or hub id.")],
    task: Annotated[list[str], typer.Option(help="A task to evaluate on; may be repeated.")],
    format_: Format = "terminal",
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Evaluate any one model, no recipe needed. The same command resumes."""
    output = Output(quiet=quiet)
    evaluated = cotree.evaluate(model, task, output=output, **options)
    output.print(cotree.table([str(evaluated.folder)]).render(format_))


@app.command(epilog="Example: cotree compare runs/laptop/evaluations/test/sft runs/laptop/evaluations/test/dpo")
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="runs/NAME/evaluations/NODE/MODEL or runs/evals/NAME.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another, with the same questions.")],
) -> None:
    """Compare two models on the same questions: paired tests, and the questions gained and lost."""
    for difference in cotree.compare(first, second):
        Output().print("\n".join(difference.lines()))


@app.command(epilog="Example: cotree table runs/laptop runs/mine:dpo --format markdown")
def table(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN[:STUDENT]...", help="Run folders, or those of `cotree eval`.")
    ],
    format_: Format = "terminal",
    as_json: AsJson = False,
) -> None:
    """Show the evaluations of runs in one table, without duplicates."""
    found = cotree.table(runs)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=1))
    else:
        Output().print(found.render(format_))


@app.command(epilog="Example: cotree train sft --student smollm2-135m-instruct --data rows.jsonl -o trained epochs=2")
def train(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="sft or dpo.")],
    student: Annotated[str, typer.Option(help="A transformers folder, a .gguf, a packaged name or a hub id.")],
    data: Annotated[Path, typer.Option(help="TRL's SFT or preference rows: .parquet or .jsonl.")],
    out: Out,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="key=value", help="Settings of the method.")] = None,
    quiet: Quiet = False,
) -> None:
    """Train one student on your own rows, no recipe needed. The same command resumes."""
    cotree.train(method, student, data, out, overrides=overrides or [], output=Output(quiet=quiet))


@app.command(epilog="Example: cotree diagnose runs/laptop/evaluations/test/dpo")
def diagnose(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Parquet, JSON lines, a hub id, a run, an evaluation.")],
    field: Annotated[str | None, typer.Option(help="The column with the text.")] = None,
    shown: Annotated[int, typer.Option(help="Number of worst texts to show.")] = 3,
) -> None:
    """Count loops, over-reflection and missing answers in long chains of thought, by source and language."""
    from cotree.eval.diagnose import diagnose_file

    for line in diagnose_file(file, field, shown):
        Output().print(line)


@app.command(name="import", epilog="Example: cotree import sky_t1.jsonl --student smollm2-135m-instruct -o sky.parquet")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Conversations, messages, or prompts with responses.")],
    student: Annotated[str, typer.Option(help="Its tokens count: a packaged name, a .gguf, a folder or a hub id.")],
    out: Out,
    as_: Annotated[Literal["rows", "trees"], typer.Option("--as", help="trees: rollouts; -o is a run.")] = "rows",
    task: Annotated[str | None, typer.Option(help="The task that verifies texts with a gold answer.")] = None,
    held_out: Annotated[list[str] | None, typer.Option(help="A task whose questions are excluded.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Per row, default 16384; longer ones are left out.")] = None,
) -> None:
    """Convert other datasets to filtered, verified rows; or rollouts to trees."""
    from cotree.experiment.imported import import_as

    for line in import_as(as_, file, student, out, task=task, held_out=held_out or [], max_tokens=max_tokens):
        Output().print(line)


@app.command(epilog="Example: cotree export runs/laptop --to llamafactory -o LLaMA-Factory/data")
def export(
    source: Annotated[Path, typer.Argument(metavar="PATH", help="A run, a dataset's folder or file, or trees.")],
    to: Annotated[str, typer.Option(help="jsonl, llamafactory, axolotl, trees, annotations or hub.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Folder; file for trees, annotations; OWNER/NAME for hub.")],
) -> None:
    """Write datasets for other trainers, trees as Parquet, or push a dataset to the hub (private)."""
    from cotree.data.export import export_to

    for written in export_to(source, to, out):
        Output().print(written)


@app.command(name="check-data", epilog="Example: cotree check-data rows.jsonl")
def check_data(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Dataset files: .parquet or .jsonl.")],
) -> None:
    """Validate every row of dataset files; reports row and column of each fault."""
    from cotree.data.kinds import check_file

    for file in files:
        kind, rows = check_file(file)
        Output().print(f"{file}: {rows} faultless {kind} rows")


@app.command(epilog="Example: cotree merge runs/mine/shards/*/trees/train -o merged.db")
def merge(
    stores: Annotated[
        list[Path], typer.Argument(metavar="STORE...", help="Stores of trees, their folders, or journals.")
    ],
    out: Out,
) -> None:
    """Merge several tree stores, or several journals, into one, without duplicates."""
    Output().print(cotree.merge(stores, out))


@app.command(epilog="Example: cotree clean runs/laptop --dry-run")
def clean(
    run: RunArgument,
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Only show what would be removed.")] = False,
) -> None:
    """Delete content that a run's recipe no longer uses; the journal of completions stays."""
    from cotree.base.run_folder import find_run
    from cotree.experiment.clean import clean as clean_run
    from cotree.experiment.clean import removed_lines, unused_content

    found = find_run(run)
    Output().print("\n".join(removed_lines(unused_content(found) if dry_run else clean_run(found), dry_run)))


@app.command(epilog="Example: cotree report runs/laptop runs/mine -o comparison.html")
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN [RUN]", help="A run folder, or two to compare.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Output file; default: RUN/report.html, or comparison.html.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Write a run's report.html again, or a page that compares two runs."""
    from cotree.experiment.run import rewrite_report
    from cotree.report.html import write_comparison

    written = rewrite_report(runs[0], out) if len(runs) == 1 else write_comparison(runs, out or Path("comparison.html"))
    Output(quiet=quiet).print(str(written))


@app.command(epilog="Example: cotree decode --task arithmetic --id sum-0 --budget-tokens 300 temperature=1.0")
@with_options(_search_options, _model_options)
def decode(
    question: Annotated[str | None, typer.Argument(metavar="[QUESTION]", help="Its text; or --task and --id.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="a.b=v", help="Settings of the search.")] = None,
    model: Annotated[
        str, typer.Option(help="A server's URL, a .gguf, a packaged name or a hub id.")
    ] = "smollm2-135m-instruct",
    task: Annotated[str | None, typer.Option(help="The task of the question.")] = None,
    id_: Annotated[str | None, typer.Option("--id", help="The question's id in its task.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the answer, and errors.")] = False,
    **options: Any,
) -> None:
    """Answer one question by search, without a gold answer."""
    # An override holds `=`; with --task there is no question before it.
    given = [question] if task is not None and question is not None and "=" in question else []
    options |= {"task": task, "question_id": id_, "overrides": [*given, *(overrides or [])]}
    found = cotree.decode(None if given else question, model, output=Output(quiet=quiet), **options)
    if quiet:
        Output().print(str(found.answer))


@app.command(epilog="Example: cotree serve http://gpu1:8000 --served Qwen/Qwen3-8B --budget-tokens 4000")
@with_options(_search_options, _model_options)
def serve(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Server URLs, .gguf files, packaged names.")],
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="a.b=v", help="Settings of the search.")] = None,
    at_once: Annotated[int, typer.Option(min=1, help="Concurrent searches; others wait.")] = 8,
    host: Annotated[str, typer.Option(help="Beyond loopback COTREE_TOKEN must be set.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8000,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Serve an OpenAI-compatible endpoint that answers with search."""
    from cotree.decode.server import serve as serve_models

    options |= {"overrides": set_ or [], "at_once": at_once, "host": host, "port": port}
    serve_models(models, output=Output(quiet=quiet), **options)


@app.command(epilog="Example: cotree init mine.yaml")
def init(
    path: Annotated[Path, typer.Argument(metavar="[FILE]", help="The recipe file to write.")] = Path("recipe.yaml"),
) -> None:
    """Write a commented recipe to start from."""
    from cotree.experiment.recipe import write_starter

    Output().print(write_starter(path))


@app.command(epilog="Example: cotree tasks")
def tasks() -> None:
    """List the tasks with size, licence and source."""
    from cotree.tasks import task_table

    typer.echo(task_table())


@app.command(epilog="Example: cotree patterns")
def patterns() -> None:
    """List the thought patterns: which types may follow which, and how many children."""
    from cotree.search.thoughts import PATTERNS

    for name, pattern in PATTERNS.items():
        rows = "; ".join(f"{k} > {', '.join(f'{n} {t}' for t, n in row.items())}" for k, row in pattern.items())
        typer.echo(f"{name:12} {rows}")


@app.command(epilog="Example: cotree models")
def models() -> None:
    """List the packaged models, which recipes can use by name."""
    from cotree.models.weights import packaged_models

    typer.echo(packaged_models())


def main() -> None:
    """The `cotree` command."""
    sys.stderr = SafeStream(sys.stderr)  # also filters the interpreter and libraries
    # Without a network the hub's client would warn at each retry; the final error is one line.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    # Tokenizers need no torch, so do not warn about its absence.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        # typer returns Ctrl-C and exits as an exit code.
        with first_cotree_error():
            code = app(prog_name="cotree", standalone_mode=False)
        if code == _INTERRUPTED:
            _fail("stopped; nothing is lost: run the same command again to resume", _INTERRUPTED)
        sys.exit(code if isinstance(code, int) else 0)
    except CotreeError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            _fail(f"the name {str(error.filename)[-300:]} is too long for a file; shorten it", UsageError.exit_code)
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
    """Exit with one line on stderr, with passwords in URLs masked."""
    line = re.sub(r"(?<=/)[^/\s@]+:[^/\s@]+@", "***@", " ".join(message.split()))
    print(f"cotree: {line}", file=sys.stderr, flush=True)
    # The engine's threads may be in a long decode; all results are on disk already.
    if code == _INTERRUPTED:
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
