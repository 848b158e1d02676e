"""What can be known to fail before anything is spent, without asking a model."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from cotree.base.errors import UsageError
from cotree.eval.asking import check_lengths
from cotree.eval.settings import Evaluation
from cotree.experiment.fingerprints import Fingerprints
from cotree.experiment.recipe import Node, Recipe, Student
from cotree.models.tokenizer import load_tokenizer
from cotree.models.weights import gguf_file, tokenizer_source
from cotree.search.reward import load_reward_function
from cotree.search.settings import Trees

# A subject, what is checked of it, and the check itself: it returns a remark, or raises CotreeError.
Check = tuple[str, str, Callable[[], str]]


def preflight(recipe: Recipe, fingerprints: Fingerprints, nodes: Sequence[Node]) -> Iterator[Check]:
    """The checks of these nodes: packages, questions, models' tokenizers and lengths, reward functions."""
    nodes = list({node.id: node for node in nodes}.values())
    if not nodes:
        return
    yield "packages", "installed", partial(_packages, recipe, nodes)
    for node in nodes:
        if isinstance(node.settings, Trees | Evaluation):
            yield node.id, f"{node.settings.split} questions", partial(_questions, fingerprints, node)
        if isinstance(node.settings, Trees) and node.settings.reward is not None and node.settings.reward.function:
            yield node.id, "reward function", partial(_function, node.settings.reward.function)
        if isinstance(node.settings, Student):
            yield node.id, "student", partial(_trainable, recipe, node)
        if isinstance(node.settings, Evaluation):
            for name in {recipe.root_model(model) for model in node.settings.models}:
                if recipe.models[name].weights is not None:
                    yield node.id, f"questions fit into `{name}`", partial(_lengths, recipe, fingerprints, node, name)
    if any(node.dataset.gates.contamination for node in nodes if node.kind == "datasets"):
        yield "datasets", "contamination", partial(_contamination, fingerprints, nodes)


def _packages(recipe: Recipe, nodes: Sequence[Node]) -> str:
    asked = [name for node in nodes if isinstance(node.settings, Trees) for name in node.settings.writers]
    asked += [name for node in nodes if isinstance(node.settings, Evaluation) for name in node.settings.models]
    serves = any(recipe.models[recipe.root_model(name)].weights is not None for name in asked)
    students = [node.settings.training for node in nodes if isinstance(node.settings, Student)]
    trained = ["torch", "accelerate"] if students else []
    trained += ["peft"] if any(training.lora for training in students) else []
    needed = ({"xllamacpp": "local"} if serves else {}) | dict.fromkeys(trained, "train")
    for package, extra in needed.items():
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"{package} is not installed; pip install 'cotree[{extra}]', or use `make demo`")
    return ", ".join(needed) or "none needed"


def _questions(fingerprints: Fingerprints, node: Node) -> str:
    return f"{len(fingerprints.questions(node))} there"


def _function(name: str) -> str:
    load_reward_function(name)
    return f"{name} loads"


def _trainable(recipe: Recipe, node: Node) -> str:
    """That the student has a chat template."""
    model = recipe.models[recipe.root_model(node.name)]
    source = tokenizer_source(model)
    assert source is not None, "a student's weights are here"
    load_tokenizer(source)
    return "has a chat template"


def _lengths(recipe: Recipe, fingerprints: Fingerprints, node: Node, name: str) -> str:
    """That every question and its reply fit into a model's context."""
    model = recipe.models[name]
    source = gguf_file(model, node.evaluation.gguf)
    tokenizer = tokenizer_source(model)
    assert tokenizer is not None, "weights carry a tokenizer"
    check_lengths(
        source, load_tokenizer(tokenizer, chats=False), fingerprints.questions(node), node.evaluation, name=name
    )
    return "they do"


def _contamination(fingerprints: Fingerprints, nodes: Sequence[Node]) -> str:
    """How many questions repeat one of an evaluation; that not all do."""
    found = []
    for node in nodes:
        if node.kind != "datasets" or not node.dataset.gates.contamination or not node.dataset.trees:
            continue
        trees = [fingerprints.recipe.nodes[f"trees/{name}"] for name in node.dataset.trees]
        asked = sum(len(fingerprints.questions(each)) for each in trees)
        repeated = len(fingerprints.contaminated(node))
        if repeated >= asked:
            raise UsageError(
                f"datasets.{node.name}: all {asked} questions of its trees repeat one of an evaluation, so nothing is "
                "left; ask the evaluation another split, or set gates.contamination: false"
            )
        found.append(f"{node.name}: {repeated} of {asked} questions repeat one of an evaluation")
    return "; ".join(found) or "files are checked as they are read"
