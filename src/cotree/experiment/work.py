"""Do the work of one node: collect its inputs from the recipe and the run folder, and call its package.

Every method fills `Work`: the result (numbers for tables) and the files that make the content complete.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cotree.base.numbers import duration
from cotree.base.progress import Output, Update
from cotree.base.rows import read_rows
from cotree.base.run_folder import Kind, NodeRecord, RunFolder, Work
from cotree.base.shards import ShardFolder, parts_beside
from cotree.data.settings import Dataset
from cotree.eval.settings import Evaluation
from cotree.experiment.fingerprints import Fingerprints
from cotree.experiment.recipe import Node, Recipe, Student
from cotree.models.checksums import check_weights, is_whole
from cotree.models.gguf_files import GGUF
from cotree.models.resolve import engine_of, tokenizer_source
from cotree.models.settings import GGUFType, Model
from cotree.models.tokenizer import load_tokenizer
from cotree.models.weights import locate
from cotree.search.settings import Trees
from cotree.search.store import StoredTree, TreeStore
from cotree.search.stores import TreeStores
from cotree.search.thoughts import PATTERNS
from cotree.tasks import Verdict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cotree.search.journal import Progress


def tokenizer_of(recipe: Recipe, name: str, *, chats: bool = True) -> PreTrainedTokenizerBase:
    """The tokenizer of a model of the recipe, or of a student's root model.

    Args:
        chats: require a chat template.

    Raises:
        UsageError: it is missing, or has no chat template.
    """
    source = tokenizer_source(recipe.models[recipe.root_model(name)])
    assert source is not None, "weights carry one, and a recipe that loads counts with no model that has none"
    return load_tokenizer(source, chats=chats)


def _without_folders(value: Any) -> Any:
    """Replace each absolute path in plain data by its file name."""
    if isinstance(value, dict):
        return {_without_folders(key): _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [*map(_without_folders, value)]
    return value.rpartition("/")[2] if isinstance(value, str) and re.fullmatch(r"(/[^/\n]+)+", value) else value


class Worker:
    """Computes the nodes of a recipe in its run folder."""

    def __init__(
        self, recipe: Recipe, run: RunFolder, fingerprints: Fingerprints, output: Output, *, scratch: Path | None = None
    ) -> None:
        """scratch: a folder on a local disk for stores and journals (`search.scratch`)."""
        self.recipe, self.run, self.fingerprints, self.output, self.scratch = recipe, run, fingerprints, output, scratch

    def work(self, node: Node[Any], model: str | None, work: Work) -> None:
        """Compute the content of a node, or of one model's cell of an evaluation.

        Raises:
            CotreeError: it failed; partial work is kept, and the same call resumes.
        """
        if model is not None:
            self._evaluate(node, model, work)
        else:
            make: dict[Kind, Callable[[Node[Any], Work], None]]
            make = {"trees": self._grow, "datasets": self._build, "students": self._train}
            make[node.kind](node, work)

    def model(self, name: str, gguf: GGUFType | None = None) -> Model:
        """A model of the recipe, or a student as a model for its root model's engine: its folder for vLLM, a GGUF of
        the given type for llama.cpp."""
        if name in self.recipe.models:
            model = self.recipe.models[name]
            return model if gguf is None or model.weights is None else model.model_copy(update={"gguf": gguf})
        root = self.recipe.models[self.recipe.root_model(name)]
        kind = gguf or root.gguf
        settings: dict[str, Any] = {"max_in_flight": root.max_in_flight, "timeout": root.timeout}
        if engine_of(root) == "vllm":
            folder = self.run.node(f"students/{name}").path / "model"
            return Model(weights=str(folder), engine="vllm", engine_args=root.engine_args, **settings)
        file = self.run.node(f"students/{name}").path / f"student-{kind}.gguf"
        if not is_whole(file):
            from cotree.models.gguf_export import export_gguf

            check_weights(file.parent / "model")
            export_gguf(file.parent / "model", file, kind)
        return Model(weights=str(file), engine="llama.cpp", gguf=kind, **settings)

    def _grow(self, node: Node[Trees], work: Work) -> None:
        from cotree.models.endpoints import open_endpoints
        from cotree.search.index import TreeIndex
        from cotree.search.journal import Journal, Progress
        from cotree.search.merge import take_completions
        from cotree.search.scratch import Scratch
        from cotree.search.summary import compare_methods, summarize
        from cotree.search.trees import TreeGrower, unfinished_turns

        settings, asked = node.settings, self.fingerprints.questions(node)
        if settings.file is not None:
            self._import(node, work)
            return
        config, budgets = self.fingerprints.of(node.id).base, None
        # Known to readers of the run while it grows.
        work.record = replace(work.record, files={str(path): "" for path in settings.parquet_files()})
        if settings.tokens_of is not None:
            budgets = {tree.question_name: tree.completion_tokens for tree in self.trees(settings.tokens_of)}

        async def grow(store: TreeStores, journal: Journal, on_tree: Callable[[StoredTree], None]) -> Progress:
            models = {name: self.model(name) for name in settings.writers}
            async with open_endpoints(models, widest=settings.widest, logs=work.path) as endpoints:
                with self.output.progress(node.name) as update:
                    grower = TreeGrower(
                        store,
                        journal,
                        settings,
                        endpoints=endpoints,
                        config=config,
                        seed=node.seed,
                        budgets=budgets,
                        on_tree=on_tree,
                        on_progress=partial(_show_search, update),
                    )
                    return await grower.grow(asked)

        beside = parts_beside(self.run)
        journals = [*filter(Path.is_file, (part.path / "journal.db" for part in beside))]
        with (
            Scratch(self.run.path, self.scratch) as scratch,
            TreeStore(scratch.path(work.path / "trees.db")) as own,
            Journal(scratch.path(self.run.path / "journal.db")) as journal,
            TreeStores(self._stores(node.id)[1:], own) as store,
        ):
            gone = journal.is_new and own.finished()
            lost = "journal.db is gone; requests that it had answers to are paid again where trees need them"
            for line in filter(None, (own.rescued, journal.rescued, lost if gone else "")):
                self.output.print(f"{node.id}: {line}")
            found = Progress()
            if left := unfinished_turns(store, asked, config):
                take_completions(journals, journal, left)

                def on_tree(tree: StoredTree) -> None:
                    index.add([tree])
                    scratch.count_tree()

                with TreeIndex(own) as index:
                    found = asyncio.run(grow(store, journal, on_tree))
            counts = summarize(store, journal, asked, config, beside=journals)
            troubles = Counter(repeats=found.repeats, misreported=found.misreported)
            for record in _records_of_shards(beside, node.id):
                troubles.update({key: record.result.get("counts", {}).get(key, 0) for key in troubles})
                work.seconds_of_shards += record.seconds
            work.result["counts"] = counts | troubles
            shards = (path for path in store.paths_with(config) if str(path) not in work.record.files)
            work.files += [*work.record.files, *(os.path.relpath(path, work.path) for path in shards)]
        if settings.tokens_of is not None:
            shared = {tree.question_name for tree in self.trees(node.name)}
            methods = {
                name: [tree for tree in self.trees(name) if tree.question_name in shared]
                for name in (settings.tokens_of, node.name)
            }
            work.result["compared"] = [asdict(row) for row in compare_methods(methods)]
        work.add_files("trees.db")

    def _import(self, node: Node[Trees], work: Work) -> None:
        """Build the missing trees of a file of rollouts."""
        from cotree.data.rollouts import RolloutTask, read_rollouts
        from cotree.data.shared_tokens import tree_of_rollouts
        from cotree.search.index import TreeIndex
        from cotree.search.journal import Journal
        from cotree.search.summary import summarize
        from cotree.search.trees import turns_of

        settings, config, asked = node.settings, self.fingerprints.of(node.id).base, self.fingerprints.questions(node)
        rollouts, tokenizer = read_rollouts(Path(str(settings.file)), settings.task), None
        for line in rollouts.lines():
            self.output.print(f"{node.id}: {line}")
        with (
            TreeStore(work.path / "trees.db") as own,
            TreeStores(self._stores(node.id)[1:], own) as store,
            TreeIndex(own) as index,
            Journal(self.run.path / "journal.db") as journal,
            self.output.progress(node.name) as update,
        ):
            if own.rescued:
                self.output.print(f"{node.id}: {own.rescued}")
            for number, turn in enumerate(turns_of(store, asked, config)):
                if not turn.finished:
                    tokenizer = tokenizer or tokenizer_of(self.recipe, str(settings.tokenizer), chats=False)
                    assert isinstance(turn.task, RolloutTask)
                    tree = tree_of_rollouts(
                        turn.task,
                        turn.question,
                        rollouts.of[turn.question.task, turn.question.id],
                        tokenizer=tokenizer,
                        config=config,
                        correct_at=settings.correct_at,
                    )
                    own.put(tree)
                    index.add([tree])
                update(number + 1, len(asked), "trees of rollouts")
            left_out = {"left_out": dict(rollouts.left_out), "columns_left_out": dict(rollouts.columns_left_out)}
            work.result["counts"] = summarize(store, journal, asked, config) | left_out
            work.files += [os.path.relpath(path, work.path) for path in store.paths_with(config)]
        work.add_files("trees.db")

    def trees(self, name: str) -> Iterator[StoredTree]:
        """Iterate over the trees of a trees node for its current questions, including those in shards."""
        from cotree.search.trees import trees_of

        node = self.recipe.nodes[f"trees/{name}"]
        with TreeStores(self._stores(node.id)) as store:
            yield from trees_of(store, self.fingerprints.questions(node), self.fingerprints.of(node.id).base)

    def _stores(self, node: str) -> list[Path]:
        """The store of a node, the existing ones in the run's other parts (shards), and Parquet files of trees."""
        own, *others = (part.node(node).path / "trees.db" for part in (self.run, *parts_beside(self.run)))
        return [own, *filter(Path.is_file, others), *self.recipe.nodes[node].settings.parquet_files()]

    def _build(self, node: Node[Dataset], work: Work) -> None:
        from cotree.data.build import build_dataset
        from cotree.data.file_rows import hub_rows
        from cotree.data.gates import Rules

        settings = node.settings

        def path_of(name: str | None) -> Path | None:
            return None if name is None else self.run.node(f"datasets/{name}").path / "train.parquet"

        sources = [self.recipe.nodes[f"trees/{name}"] for name in settings.trees]
        patterns = {**PATTERNS}
        for source in sources:
            patterns |= source.settings.patterns
        rules = Rules(
            settings,
            tokenizer_of(self.recipe, str(settings.tokenizer)),
            node.seed,
            patterns,
            judge=self._judge(sources) if settings.judges_again else None,
            annotations=None if settings.annotations is None else self.fingerprints.annotations(node),
            contaminated=self.fingerprints.contaminated(node) if settings.gates.contamination and sources else (),
            held_out=self.fingerprints.held_out if settings.gates.contamination else (),
            size_of=path_of(settings.size_of),
            questions_of=path_of(settings.questions_of),
        )
        trees = chain.from_iterable(self.trees(source.name) for source in sources)
        rows = read_rows(Path(settings.file)) if settings.file else hub_rows(settings.hub) if settings.hub else None
        counts = build_dataset(rules, work.path, name=node.name, trees=trees, rows=rows, about=self._about(sources))
        work.result["counts"] = asdict(counts)
        work.add_files("train.parquet", "README.md", "figures/*")

    def _about(self, sources: Sequence[Node[Trees]]) -> dict[str, Any]:
        """Provenance for a dataset's card, without addresses of servers and paths."""
        recipe = _without_folders(yaml.safe_load(yaml.safe_dump(dict(self.recipe.written))))
        for entry in (recipe.get("models") or {}).values():
            for key in ("url", "api_key_env"):
                entry.pop(key, None)
        writers = dict.fromkeys(name for source in sources for name in source.settings.writers)
        return {
            "name": self.recipe.name,
            "recipe": yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True),
            "models": {name: self._licence(name) for name in writers},
        }

    def _licence(self, name: str) -> str:
        """The licence recorded in the weights of a model or student that wrote trees."""
        model = self.recipe.models[self.recipe.root_model(name)]
        trained = "" if name in self.recipe.models else "a student of "
        if model.weights is None:
            return f"{trained}{model.model}, asked of a server; its licence is its publisher's"
        weights, licence = locate(model.weights), "licence not stated"
        if not weights.is_dir():
            licence = GGUF(weights).get("general.license", licence)
        return f"{trained}{Path(model.weights).name}, {licence}"

    def _judge(self, sources: Sequence[Node[Trees]]) -> Callable[[StoredTree, str], Verdict]:
        """A verifier for changed chain texts, by the trees' questions."""
        known = {(q.task, q.id): (t, q) for source in sources for t, q in self.fingerprints.questions(source)}

        def judge(tree: StoredTree, text: str) -> Verdict:
            asked, question = known[tree.task, tree.question_id]
            spec = question.later[tree.turn - 1].spec if tree.turn else question.spec
            turn = replace(question, messages=tuple(tree.messages), gold=tree.gold, turn=tree.turn, spec=spec, later=())
            return asked.judge(turn, text)

        return judge

    def _train(self, node: Node[Student], work: Work) -> None:
        from cotree.train.processes import train_together
        from cotree.train.student import student_folder

        settings = node.settings
        if settings.parent in self.recipe.models:
            weights = str(self.recipe.models[settings.parent].weights)
        else:
            weights = str(self.run.node(f"students/{settings.parent}").path / "model")
        train_together(
            work,
            node.name,
            settings.method,
            rows=self.run.node(f"datasets/{settings.data}").path / "train.parquet",
            student=student_folder(weights),
            settings=settings.training,
            seed=node.seed,
            output=self.output,
            references=self.run.path / "students" / ".references",
        )
        work.result |= {"parent": settings.parent, "data": settings.data, "differs": self._differs(node)}

    def _differs(self, node: Node[Student]) -> dict[str, Any]:
        """The entry that a student is like, and the keys that differ: {key: [the other's value, its own]}."""
        other = next((n for n in self.recipe.of_kind("students") if n.entry == node.like and n.seed == node.seed), None)
        if other is None:
            return {}
        mine, theirs = _all_settings(node.settings), _all_settings(other.settings)
        changed = {key: [theirs.get(key), mine.get(key)] for key in mine | theirs if mine.get(key) != theirs.get(key)}
        return {"from": other.id, "keys": changed}

    def _evaluate(self, node: Node[Evaluation], model: str, work: Work) -> None:
        from cotree.eval.evaluate import FILES, evaluate
        from cotree.eval.journal import JOURNAL, read_samples, take_samples

        settings, budgets = node.settings, None
        if settings.tokens_of is not None:
            budgets = Counter[tuple[str, str]]()
            for sample in read_samples(self.run.node(f"evaluations/{settings.tokens_of}", model).path / JOURNAL):
                budgets[sample.task, sample.id] += sample.tokens
        asked, questions = self.model(model, settings.gguf), self.fingerprints.questions(node)
        beside = parts_beside(self.run)
        journals = [part.node(node.id, model).path / JOURNAL for part in beside]
        take_samples(journals, work.path / JOURNAL, {(question.task, question.id) for _, question in questions})
        work.seconds_of_shards = sum(record.seconds for record in _records_of_shards(beside, node.id, model))
        evaluated = evaluate(asked, questions, settings, work.path, name=model, budgets=budgets, output=self.output)
        work.result |= evaluated.model_dump() | {"asking": settings.model_dump(mode="json", exclude={"models"})}
        work.add_files(*FILES)


def _records_of_shards(parts: Sequence[RunFolder], node: str, model: str | None = None) -> list[NodeRecord]:
    """The records of a node in the shards among these parts of a run."""
    records = (part.node(node, model).record() for part in parts if isinstance(part, ShardFolder))
    return [record for record in records if record is not None and not record.outdated]


def _all_settings(student: Student) -> dict[str, Any]:
    named = {"from": student.parent, "method": student.method, "data": student.data}
    return named | student.training.model_dump(mode="json")


def _show_search(update: Update, progress: Progress) -> None:
    """Show the number of trees, verdicts, speed, cost and remaining time."""
    verdicts = ", ".join(
        f"{n} {'cut or without answer' if kind == 'no_answer' else kind}" for kind, n in progress.verdicts.items()
    )
    seconds = max(progress.seconds, 1e-9)
    speed = f"{progress.thoughts / seconds:.1f} thoughts/s, {progress.tokens / seconds:.0f} tokens/s"
    cost = f", cost {progress.cost:.2f}" if progress.cost else ""
    cost += f", {progress.repeats} requests sent again after failures" if progress.repeats else ""
    cost += f", {progress.misreported} replies with impossible usage" if progress.misreported else ""
    cost += "".join(f"; others are asked in place of {server}" for server in progress.lost)
    left = progress.trees_wanted - progress.trees
    until = duration(seconds / max(progress.trees - progress.trees_before, 1) * left)
    update(progress.trees, progress.trees_wanted, f"{verdicts}; {speed}{cost}; about {until} left")
