"""The build of a recipe's run: its trees, its student's tokenizer, its judge, and what the card says of its models.

Invariant: a build reads a run's trees and nothing else of it, so any number of datasets come from one search.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from cotree.base.errors import UsageError
from cotree.data.build import Built, build
from cotree.data.chains import Judge, Reading
from cotree.data.kinds import COLUMNS
from cotree.data.preview import preview
from cotree.experiment.recipe import Model, Recipe
from cotree.experiment.run_folder import RunFolder, changed_keys
from cotree.models.embedded import locate
from cotree.models.gguf_file import GGUF
from cotree.models.tokenizer import load_tokenizer
from cotree.search.store import StoredTree, TreeStore
from cotree.search.thoughts import PATTERNS
from cotree.tasks import Verdict, task
from cotree.tasks.decontamination import contaminated

if TYPE_CHECKING:
    from rich.text import Text


def build_run(recipe: Recipe, store: Path, config: str, folder: Path) -> Built:
    """Build a recipe's datasets from the trees that a search left in a store under a config hash."""
    reading = Reading(
        left_out={kind for kind, thought in recipe.search.thoughts.items() if not thought.in_student},
        patterns={**PATTERNS, **recipe.search.own_patterns},
        judge=judge_of(recipe) if recipe.build.reflections == "cut" else None,
    )
    # Where servers are is nobody's business.
    told = recipe.model_dump(mode="json", exclude={"models": {"__all__": {"url", "api_key_env"}}})
    about = {
        "name": recipe.name,
        "recipe": yaml.safe_dump({"name": recipe.name} | told, sort_keys=False, allow_unicode=True),
        "models": {name: _licence(model) for name, model in recipe.used_models().items()},
    }
    with TreeStore(store) as trees:
        return build(
            trees.trees(config),
            load_tokenizer(student_source(recipe)),
            recipe.build,
            folder,
            seed=recipe.seed,
            control=recipe.eval.control,
            reading=reading,
            contaminated=contaminated_questions(recipe) if recipe.build.gates.contamination else (),
            about=about,
        )


def build_beside(recipe: Recipe, runs_dir: Path, folder: Path) -> Built:
    """Build other datasets from a run's trees into a folder of their own; the run stays as it is.

    Raises:
        UsageError: there is no run of the recipe's name whose search has finished, or it differs in more than a build
            reads.
    """
    run = RunFolder(runs_dir / recipe.name, recipe)
    if not run.done("search"):
        raise UsageError(f"{run.path} has no finished search; run `cotree run RECIPE --only search` first")
    read = ("build.", "tasks.dev", "tasks.eval", "train.student", "eval.control")
    others = [key for key in changed_keys(run.path, recipe) if not key.startswith(read)]
    if others:
        raise UsageError(f"only `build.` values can differ from those of {run.path}: leave out {', '.join(others)}")
    return build_run(recipe, run.trees, run.result("search")["config"], folder)


def preview_run(recipe: Recipe, folder: Path, kind: str, rows: int) -> Text:
    """A build's rows as the recipe's trainer sees them (`data.preview`)."""
    if kind not in COLUMNS:
        raise UsageError(f"unknown kind `{kind}`; known: {', '.join(COLUMNS)}")
    path = folder / kind / "train.parquet"
    if not path.is_file():
        section = f" with a `build.{kind}` section" if kind in ("step_pairs", "stepwise") else ""
        raise UsageError(f"no rows at {path}; run `cotree build` first{section}")
    return preview(path, load_tokenizer(student_source(recipe)), recipe.build.max_tokens, rows)


def student_source(recipe: Recipe) -> Path:
    """The student's GGUF; a recipe's student is always embedded."""
    return locate(str(recipe.models[recipe.train.student].embedded))


def contaminated_questions(recipe: Recipe) -> set[tuple[str, str]]:
    """(task, id) of the training questions that repeat a dev or held-out question."""
    held_out = [q for name, n in recipe.tasks.eval.items() for q in task(name).questions("test", n)]
    held_out += [q for name, n in recipe.tasks.dev.items() for q in task(name).questions("dev", n)]
    found: set[tuple[str, str]] = set()
    for name, n in recipe.tasks.train.items():
        asked = task(name)
        generated = [asked.name] if asked.generated else []
        found |= {(asked.name, id) for id in contaminated(asked.questions("train", n), held_out, generated=generated)}
    return found


def judge_of(recipe: Recipe) -> Judge:
    """The verifier of the trees of a recipe, for chains whose text was changed."""
    known = {(q.task, q.id): (t, q) for name, n in recipe.tasks.train.items()
             for t in [task(name)] for q in t.questions("train", n)}  # fmt: skip

    def judge(tree: StoredTree, text: str) -> Verdict:
        asked, question = known[tree.task, tree.question_id]
        spec = question.later[tree.turn - 1].spec if tree.turn else question.spec
        turn = replace(question, messages=tuple(tree.messages), gold=tree.gold, turn=tree.turn, spec=spec, later=())
        return asked.judge(turn, text)

    return judge


def _licence(model: Model) -> str:
    if model.embedded is None:
        return f"{model.model}, asked of a server; its licence is its publisher's"
    return f"{model.embedded}, {GGUF(locate(model.embedded)).get('general.license', 'licence not stated')}"
