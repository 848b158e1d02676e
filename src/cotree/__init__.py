r"""Grow trees of thought with Monte Carlo tree search over language models, and train small models on them.

Judge and diagnose what a model wrote:

    import cotree

    task = cotree.task("arithmetic")            # `cotree tasks` lists them; "mine.yaml" is a task of your own
    question = task.questions("test", 1)[0]
    verdict = task.judge(question, "It is \\boxed{7}.")
    print(verdict.kind, verdict.answer)         # "correct", "wrong" or "no_answer", and the extracted answer
    print(cotree.diagnose("Wait, let me check. " * 200).loop)

Run an experiment, which is a recipe of named trees, datasets, students and evaluations; the same call resumes:

    from pathlib import Path

    recipe = cotree.load_recipe(Path("recipes/laptop.yaml"), ["trees.train.rollouts=8"])
    for node in cotree.plan(recipe):            # each node's state and estimated cost; calls no model
        print(node.name, node.state)
    cotree.run(recipe)

Read the results:

    run = cotree.open_run("runs/laptop")
    for tree in run.trees("train"):
        print(tree.question_id, [node.verdict for node in tree.nodes if node.verdict])
    print(next(run.dataset("pairs"))["chosen"])
    print(cotree.table(["runs/laptop"]).render("markdown"))

Single steps: `evaluate` a model on tasks, `compare` two evaluations question by question, `train` a student on a file
of rows, `decode` one question by search.

Bad input raises `UsageError` before any work; work that fails later raises `CotreeError`. Messages are one line.
Importing cotree loads no heavy library: names are imported at first use. `train` needs the extra `cotree[train]`,
models in this process need `cotree[local]`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from cotree.base.errors import CotreeError, UsageError

if TYPE_CHECKING:
    from cotree.decode.answer import decode
    from cotree.eval.compare import compare_evaluations as compare
    from cotree.eval.evaluate import evaluate_model as evaluate
    from cotree.experiment.merge import merge
    from cotree.experiment.opened import open_run
    from cotree.experiment.plan import plan
    from cotree.experiment.recipe import build_recipe, load_recipe
    from cotree.experiment.run import run, search_shard
    from cotree.report.table import table_of as table
    from cotree.tasks import Question, Task, Verdict, WorkedExample, task
    from cotree.tasks.diagnosis import diagnose
    from cotree.train.verb import train_rows as train

__version__ = "0.1.0"
__all__ = [
    "CotreeError",
    "Question",
    "Task",
    "UsageError",
    "Verdict",
    "WorkedExample",
    "__version__",
    "build_recipe",
    "compare",
    "decode",
    "diagnose",
    "evaluate",
    "load_recipe",
    "merge",
    "open_run",
    "plan",
    "run",
    "search_shard",
    "table",
    "task",
    "train",
]
# The API's lazily imported names: {name: "module:attribute"}.
_LAZY = {
    "Question": "cotree.tasks:Question",
    "Task": "cotree.tasks:Task",
    "Verdict": "cotree.tasks:Verdict",
    "WorkedExample": "cotree.tasks:WorkedExample",
    "build_recipe": "cotree.experiment.recipe:build_recipe",
    "compare": "cotree.eval.compare:compare_evaluations",
    "decode": "cotree.decode.answer:decode",
    "diagnose": "cotree.tasks.diagnosis:diagnose",
    "evaluate": "cotree.eval.evaluate:evaluate_model",
    "load_recipe": "cotree.experiment.recipe:load_recipe",
    "merge": "cotree.experiment.merge:merge",
    "open_run": "cotree.experiment.opened:open_run",
    "plan": "cotree.experiment.plan:plan",
    "run": "cotree.experiment.run:run",
    "search_shard": "cotree.experiment.run:search_shard",
    "table": "cotree.report.table:table_of",
    "task": "cotree.tasks:task",
    "train": "cotree.train.verb:train_rows",
}


class _LazyModule(ModuleType):
    """The type of the module `cotree`, which imports names of its API at first use."""

    def __getattr__(self, name: str) -> Any:
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module, _, attribute = _LAZY[name].partition(":")
        try:
            return getattr(import_module(module), attribute)
        except ModuleNotFoundError as error:
            # An AttributeError, so that `help(cotree)` and `hasattr` work without the extras.
            missing = f"{error.name} is not installed; pip install 'cotree[local,train]'"
            raise AttributeError(f"cotree.{name} cannot be used: {missing}") from error

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing the package `cotree.decode` must not replace the function `cotree.decode`.
        if name not in _LAZY or not isinstance(value, ModuleType):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*__all__, *(name for name in super().__dir__() if name.startswith("__"))})


sys.modules[__name__].__class__ = _LazyModule
