"""The work of one node of each kind: collects what its package needs from the recipe and the run folder.

Every function fills `Work`: its result (the numbers that tables show) and its files (what must be there for the content
to be whole).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cotree.base.errors import UsageError
from cotree.base.numbers import duration
from cotree.base.progress import Output, Update
from cotree.base.rows import read_rows
from cotree.base.run_folder import RunFolder, Work
from cotree.experiment.fingerprints import Fingerprints
from cotree.experiment.recipe import Node, Recipe
from cotree.models.gguf_format import GGUF
from cotree.models.settings import GGUFType, Model
from cotree.models.weights import gguf_file, tokenizer_source
from cotree.search.store import StoredTree, TreeStore
from cotree.search.thoughts import PATTERNS
from cotree.tasks import Verdict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cotree.search.completer import Progress


class Worker:
    """Works on the nodes of a recipe in its run folder."""

    def __init__(self, recipe: Recipe, run: RunFolder, fingerprints: Fingerprints, output: Output) -> None:
        self.recipe, self.run, self.fingerprints, self.output = recipe, run, fingerprints, output

    def work(self, node: Node, model: str | None, work: Work) -> None:
        """Make the content of a node, or of one model's cell of an evaluation.

        Raises:
            CotreeError: it failed; what was done is kept, and the same call goes on.
        """
        if node.kind == "trees":
            self._grow(node, work)
        elif node.kind == "datasets":
            self._select(node, work)
        elif node.kind == "students":
            self._train(node, work)
        else:
            assert model is not None, "an evaluation is worked on cell by cell"
            self._ask(node, model, work)

    def model(self, name: str, gguf: GGUFType | None = None) -> Model:
        """A model of the recipe, or a student as a model: its weights as GGUF, at the type that is asked for."""
        if name in self.recipe.models:
            model = self.recipe.models[name]
            return model if gguf is None or model.weights is None else model.model_copy(update={"gguf": gguf})
        root = self.recipe.models[self.recipe.root_model(name)]
        kind = gguf or root.gguf
        file = self.run.node(f"students/{name}").path / f"student-{kind}.gguf"
        if not file.is_file():
            from cotree.models.export_gguf import export_gguf

            export_gguf(file.parent / "model", gguf_file(root, root.gguf), file, kind)
        return Model(weights=str(file), gguf=kind, max_in_flight=root.max_in_flight)

    def _grow(self, node: Node, work: Work) -> None:
        from cotree.models.endpoints import open_endpoints
        from cotree.search.journal import Journal
        from cotree.search.summary import compare_methods, summarize
        from cotree.search.trees import grow_trees, trees_left

        settings, asked = node.trees, self.fingerprints.questions(node)
        config = self.fingerprints.of(node.id).base

        async def grow(store: TreeStore, journal: Journal, others: TreeStore | None) -> None:
            models = {name: self.model(name) for name in settings.writers}
            async with open_endpoints(models, widest=settings.widest) as endpoints:
                with self.output.progress(node.name) as update:
                    await grow_trees(
                        store,
                        journal,
                        settings,
                        asked,
                        endpoints=endpoints,
                        config=config,
                        seed=node.seed,
                        others=others,
                        on_progress=partial(_show_search, update),
                    )

        with ExitStack() as opened:
            store = opened.enter_context(TreeStore(work.path / "trees.db"))
            journal = opened.enter_context(Journal(self.run.path / "journal.db"))
            others = None
            if settings.tokens_of is not None:
                others = opened.enter_context(self._store(settings.tokens_of))
            if trees_left(store, asked, config):
                asyncio.run(grow(store, journal, others))
            summary = summarize(store, journal, asked, config)
            work.result |= {"counts": asdict(summary)}
            if settings.tokens_of is not None:
                compared = compare_methods({name: list(self.trees(name)) for name in (settings.tokens_of, node.name)})
                work.result |= {"compared": [asdict(row) for row in compared]}
        work.files.append("trees.db")

    def _store(self, name: str) -> TreeStore:
        return TreeStore(self.run.node(f"trees/{name}").path / "trees.db")

    def trees(self, name: str) -> Iterator[StoredTree]:
        """The trees of a trees node, of its questions only, one at a time."""
        from cotree.search.trees import trees_of

        node = self.recipe.nodes[f"trees/{name}"]
        with self._store(name) as store:
            yield from trees_of(store, self.fingerprints.questions(node), self.fingerprints.of(node.id).base)

    def _select(self, node: Node, work: Work) -> None:
        from cotree.data.build import build_dataset

        settings = node.dataset

        def path_of(name: str | None) -> Path | None:
            return None if name is None else self.run.node(f"datasets/{name}").path / "train.parquet"

        sources = [self.recipe.nodes[f"trees/{name}"] for name in settings.trees]
        patterns = {**PATTERNS}
        for source in sources:
            patterns |= source.trees.patterns
        counts = build_dataset(
            settings,
            work.path,
            name=node.name,
            tokenizer=self.tokenizer(settings.tokenizer),
            seed=node.seed,
            trees=chain.from_iterable(self.trees(source.name) for source in sources),
            rows=self._rows(settings.file, settings.hub),
            contaminated=self.fingerprints.contaminated(node) if settings.gates.contamination and sources else (),
            held_out=self.fingerprints.held_out if settings.gates.contamination else (),
            patterns=patterns,
            judge=self._judge(sources) if settings.reflections == "cut" else None,
            size_of=path_of(settings.size_of),
            questions_of=path_of(settings.questions_of),
            about=self._about(sources),
        )
        work.result |= {"counts": asdict(counts)}
        work.files.append("train.parquet")

    def _rows(self, file: str | None, hub: str | None) -> Iterator[dict[str, Any]] | None:
        if file is not None:
            return read_rows(Path(file))
        if hub is None:
            return None
        from cotree.data.file_rows import hub_rows

        return hub_rows(hub)

    def _about(self, sources: Sequence[Node]) -> dict[str, Any]:
        """What a dataset's card says of where it comes from, without the places of servers and files."""
        recipe = yaml.safe_load(yaml.safe_dump(dict(self.recipe.written)))
        for entry in [*(recipe.get("models") or {}).values(), *(recipe.get("datasets") or {}).values()]:
            for key in ("url", "api_key_env"):
                entry.pop(key, None)
            for key in ("weights", "base", "tokenizer", "file"):
                if str(entry.get(key, "")).startswith("/"):
                    entry[key] = Path(entry[key]).name
        writers = dict.fromkeys(name for source in sources for name in source.trees.writers)
        return {
            "name": self.recipe.name,
            "recipe": yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True),
            "models": {name: self._licence(name) for name in writers},
        }

    def _licence(self, name: str) -> str:
        model = self.recipe.models[self.recipe.root_model(name)]
        trained = "" if name in self.recipe.models else "a student of "
        if model.weights is None:
            return f"{trained}{model.model}, asked of a server; its licence is its publisher's"
        licence = GGUF(gguf_file(model, model.gguf)).get("general.license", "licence not stated")
        return f"{trained}{Path(model.weights).name}, {licence}"

    def _judge(self, sources: Sequence[Node]) -> Callable[[StoredTree, str], Verdict]:
        """The verifier of the trees' questions, for chains whose text was changed."""
        known = {(q.task, q.id): (t, q) for source in sources for t, q in self.fingerprints.questions(source)}

        def judge(tree: StoredTree, text: str) -> Verdict:
            asked, question = known[tree.task, tree.question_id]
            spec = question.later[tree.turn - 1].spec if tree.turn else question.spec
            turn = replace(question, messages=tuple(tree.messages), gold=tree.gold, turn=tree.turn, spec=spec, later=())
            return asked.judge(turn, text)

        return judge

    def tokenizer(self, name: str | None) -> PreTrainedTokenizerBase:
        """The tokenizer of a model of the recipe, or of the model that a student descends from."""
        from cotree.models.tokenizer import load_tokenizer

        assert name is not None, "a loaded recipe has named it"
        source = tokenizer_source(self.recipe.models[self.recipe.root_model(name)])
        if source is None:
            raise UsageError(f"model `{name}` has no tokenizer to count with; give it `tokenizer`")
        return load_tokenizer(source)

    def _train(self, node: Node, work: Work) -> None:
        from cotree.train.display import plot_steps
        from cotree.train.run import resolve, train

        settings = node.student
        training = settings.training.model_copy(update=dict(work.resolved))
        resolved = resolve(training)
        work.resolved |= {"precision": resolved.precision}
        with self.output.progress(f"{node.name} steps") as update:
            result = train(
                settings.method,
                self.run.node(f"datasets/{settings.data}").path / "train.parquet",
                self.weights_folder(settings.parent),
                work.path,
                settings=resolved,
                seed=node.seed,
                on_step=plot_steps(node.name, update, self.output),
                references=self.run.path / "students" / ".references",
            )
        work.result |= {
            "train": asdict(result),
            "tokens": {"trained": result.tokens},
            "parent": settings.parent,
            "method": settings.method,
            "data": settings.data,
            "differs": self._differs(node),
        }
        weights = (work.path / "model").glob("*.safetensors")
        work.files += ["model", *(f"model/{file.name}" for file in weights)]

    def weights_folder(self, name: str) -> Path:
        """A model's or a student's weights as the transformers folder that training starts from."""
        if name not in self.recipe.models:
            return self.run.node(f"students/{name}").path / "model"
        from cotree.train.student import student_folder

        return student_folder(str(self.recipe.models[name].weights))

    def _differs(self, node: Node) -> dict[str, Any]:
        """The entry that a student is like, and the keys in which it differs: {key: [the other's, its own]}."""
        other = next((n for n in self.recipe.of_kind("students") if n.entry == node.like and n.seed == node.seed), None)
        if other is None:
            return {}
        mine, theirs = (_keys(each) for each in (node, other))
        changed = {key: [theirs.get(key), mine.get(key)] for key in mine | theirs if mine.get(key) != theirs.get(key)}
        return {"from": other.id, "keys": changed}

    def _ask(self, node: Node, model: str, work: Work) -> None:
        from cotree.eval.evaluate import evaluate
        from cotree.eval.journal import JOURNAL, read_samples

        settings, budgets = node.evaluation, None
        if settings.tokens_of is not None:
            budgets = dict[tuple[str, str], int]()
            for sample in read_samples(self.run.node(f"evaluations/{settings.tokens_of}", model).path / JOURNAL):
                key = (sample.task, sample.id)
                budgets[key] = budgets.get(key, 0) + sample.tokens
        evaluated = evaluate(
            self.model(model, settings.gguf),
            self.fingerprints.questions(node),
            settings,
            work.path,
            name=model,
            budgets=budgets,
            output=self.output,
        )
        work.result |= asdict(evaluated) | {"asking": settings.model_dump(mode="json", exclude={"models"})}
        work.files.append(JOURNAL)


def _keys(node: Node) -> dict[str, Any]:
    student = node.student
    named = {"from": student.parent, "method": student.method, "data": student.data}
    return named | student.training.model_dump(mode="json")


def _show_search(update: Update, progress: Progress) -> None:
    names = {"correct": "correct", "wrong": "wrong", "no_answer": "cut or without answer"}
    verdicts = ", ".join(f"{n} {names[kind]}" for kind, n in progress.verdicts.items())
    seconds = max(progress.seconds, 1e-9)
    speed = f"{progress.thoughts / seconds:.1f} thoughts/s, {progress.tokens / seconds:.0f} tokens/s"
    cost = f", cost {progress.cost:.2f}" if progress.cost else ""
    left = progress.trees_wanted - progress.trees
    until = duration(seconds / max(progress.trees - progress.trees_before, 1) * left)
    update(progress.trees, progress.trees_wanted, f"{verdicts}; {speed}{cost}; about {until} left")
