"""`summary.json`: every number of a run that a table or the report shows, collected from the node.json of its nodes.

Fractions are in [0, 1], tokens and rows are counts; what is absent stays absent (None), and is shown as a dash. The
rows of evaluations are checked, and a wrong value is an error that names the file and the key.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, TypeAdapter, ValidationError

from cotree.base.atomic import write_json
from cotree.base.errors import UsageError
from cotree.base.numbers import group_name
from cotree.base.run_folder import KINDS, NodeRecord, RunFolder
from cotree.eval.journal import damaged_lines, read_lines
from cotree.eval.scores import ConstantBaseline, InstructionScores, StrictModel, TaskScores

# One optimizer step of a training's log: `step`, and whatever its method measured.
LogLine = dict[str, Any]
_LOG_LINE = TypeAdapter(Annotated[LogLine, AfterValidator(lambda line: line | {"step": int(line.get("step", "none"))})])
# A node's id ("students/dpo") and the ids of the nodes that it reads.
NodeReads = tuple[str, Sequence[str]]


class EvaluatedModel(StrictModel):
    """Whose scores a row has. evaluation: its node. model: a model, or a student's node ("sft@seed=1").

    student: the same without its seed ("sft"), so rows that differ in the seed alone have it in common.
    fingerprint: of the evaluation of this model.
    """

    evaluation: str
    model: str
    student: str
    seed: int | None = None
    fingerprint: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """All that it may be called by: the student, the model, and the recipe's entry of both."""
        return self.student, self.model, self.student.partition("@")[0]


class EvalRow(TaskScores, EvaluatedModel):
    """One model's scores on one task or later turn. cut_off: `truncated`, under the name that tables have for it."""

    cut_off: float | None = None

    @property
    def section(self) -> str:
        """The section of the table in which it stands: its task."""
        return self.task


class InstructionRow(InstructionScores, EvaluatedModel):
    """The instructions that one model followed, in one of the paper's IF groups."""

    @property
    def section(self) -> str:
        """The section of the table in which it stands: "multi_if IF(En), turn 2"."""
        return group_name(self.task, self.group, self.turn or 0)


class Baseline(ConstantBaseline):
    """The best constant answer of a task that an evaluation asks."""

    evaluation: str


class NodeState(BaseModel):
    """A node of the experiment: whether it is finished, and the seconds of work on it."""

    model_config = StrictModel.model_config

    name: str
    reads: list[str] = []
    done: bool = False
    seconds: float = 0.0


class Summary(BaseModel):
    """`summary.json`; sections of kinds of nodes that there are none of are empty.

    evaluations: how each evaluation asks (`eval.settings.AskSettings`, and its questions and split).
    search: the counts of each trees node. compared: trees nodes at equal tokens (`search.summary.MethodResult`).
    data: the counts of each dataset, and whether its chains are `unverified`.
    train: of each student what it was trained from, on what and how, and the result.
    damaged: nodes and cells whose node.json cannot be read, so that they are in nothing else.
    tokens: by node those of its prompts (`prompt` evaluated, `cached` not), `completion` (generated) and `trained`.
    """

    model_config = StrictModel.model_config

    name: str
    seed: int = 0
    created: str = ""
    machine: dict[str, Any] = {}
    versions: dict[str, str] = {}
    nodes: list[NodeState] = []
    damaged: list[str] = []
    evaluations: dict[str, dict[str, Any]] = {}
    eval: list[EvalRow] = []
    baselines: list[Baseline] = []
    instructions: list[InstructionRow] = []
    search: dict[str, dict[str, Any]] = {}
    compared: list[dict[str, Any]] = []
    data: dict[str, dict[str, Any]] = {}
    train: dict[str, dict[str, Any]] = {}
    seconds: dict[str, float] = {}
    tokens: dict[str, dict[str, int]] = {}

    def names(self, kind: str) -> list[str]:
        """Of the nodes of a kind, without the kind."""
        return [node.name.partition("/")[2] for node in self.nodes if node.name.startswith(f"{kind}/")]

    def tokens_per_second(self, node: str) -> float | None:
        """Generated tokens (trained ones where nothing is generated) over all the seconds of work on a node."""
        tokens, seconds = self.tokens.get(node, {}), self.seconds.get(node)
        made = tokens.get("completion") or tokens.get("trained")
        return made / seconds if made and seconds else None


def summarize_run(run: RunFolder, nodes: Sequence[NodeReads] | None = None) -> Summary:
    """The numbers of a run, from its node.json files; content of other settings than the recipe's is left out.

    Args:
        nodes: the experiment's nodes in order with what they read, the models of evaluations included ("models/small");
            by default those that the folder's recipe names and that have content.

    Raises:
        UsageError: a file is damaged, or its numbers are not those of this version.
    """
    recipe = read_recipe(run)
    records = {name: record for name, record in run.nodes().items() if not record.outdated}
    cells = {name: record for name, record in run.cells().items() if not record.outdated}
    summary = _validated({"name": recipe["name"], "seed": recipe["seed"]}, run.path / "recipe.yaml")
    used: list[NodeRecord] = []
    for name, reads in _nodes_with_content(records, cells, recipe) if nodes is None else nodes:
        kind, _, short = name.partition("/")
        contents = {short: records.get(name)}
        if kind == "evaluations":
            models = [read.partition("/")[2] for read in reads if read.startswith(("models/", "students/"))]
            contents = {model: cells.get((short, model)) for model in models}
        own = {part: record for part, record in contents.items() if record is not None}
        for part, record in own.items():
            if kind == "evaluations":
                _add_evaluation(summary, summarize_model(short, part, record, run.node(name, part).path / "node.json"))
            else:
                _add_node(summary, kind, short, record)
        seconds = round(sum(record.seconds for record in own.values()), 1)
        done = bool(own) and len(own) == len(contents) and all(record.done for record in own.values())
        without_models = [read for read in reads if not read.startswith("models/")]
        summary.nodes.append(NodeState(name=name, reads=without_models, done=done, seconds=seconds))
        if own:
            summary.seconds[name] = seconds
        tokens: Counter[str] = Counter()
        for record in own.values():
            tokens.update(record.result.get("tokens") or record.result.get("counts", {}).get("tokens") or {})
        if tokens:
            summary.tokens[name] = dict(tokens)
        used += own.values()
    created = min((record.created for record in used if record.created), default="")
    last = used[-1] if used else NodeRecord("", "")
    about = {
        "created": created,
        "damaged": run.damaged(),
        "machine": dict(last.machine),
        "versions": dict(last.versions),
    }
    return summary.model_copy(update=about)


def summarize_model(evaluation: str, model: str, record: NodeRecord, file: Path) -> Summary:
    """A summary of one evaluated model alone, from what its evaluation left (`eval.scores.ModelScores` as plain data).

    Args:
        evaluation: its node; "" for an evaluation of its own (`cotree eval`).
        file: where the numbers are from, for errors.

    Raises:
        UsageError: names the file and the key of a wrong value.
    """
    student, seed = split_seed(model) if evaluation else (model, None)
    named = {"evaluation": evaluation, "model": model, "student": student, "seed": seed}
    named, result = {**named, "fingerprint": record.fingerprint}, record.result
    try:
        content = {
            "name": "",
            "evaluations": {evaluation: result.get("asking") or {}},
            "eval": [{**row, "cut_off": row.get("truncated"), **named} for row in result.get("rows", ())],
            "instructions": [{**row, **named} for row in result.get("instructions", ())],
            "baselines": [{**row, "evaluation": evaluation} for row in result.get("baselines", ())],
        }
    except (TypeError, AttributeError) as error:
        raise UsageError(
            f"{file} holds no scores of an evaluation ({error}); the same evaluation makes it again"
        ) from None
    return _validated(content, file)


def _add_evaluation(summary: Summary, of_model: Summary) -> None:
    summary.eval.extend(of_model.eval)
    summary.instructions.extend(of_model.instructions)
    summary.baselines.extend(best for best in of_model.baselines if best not in summary.baselines)
    for evaluation, asking in of_model.evaluations.items():
        summary.evaluations.setdefault(evaluation, {}).update(asking)


def _add_node(summary: Summary, kind: str, name: str, record: NodeRecord) -> None:
    result = record.result
    if kind == "students" and "train" in result:
        about = {key: result.get(key) for key in ("parent", "method", "data", "differs")}
        summary.train[name] = about | result["train"]
    elif kind == "datasets" and "counts" in result:
        summary.data[name] = {**result["counts"], "unverified": record.parts.get("verified") is False}
    elif "counts" in result:
        summary.search[name] = result["counts"]
        summary.compared.extend({"trees": name, **row} for row in result.get("compared", ()))


def _validated(content: Mapping[str, Any], file: Path) -> Summary:
    try:
        return Summary.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UsageError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def read_recipe(run: RunFolder) -> dict[str, Any]:
    """The recipe of a run as it is written there: its name, its seed, and a section for each kind of entry.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        raw = yaml.safe_load((run.path / "recipe.yaml").read_text(encoding="utf-8"))
        sections = {key: dict(raw.get(key) or {}) for key in ("models", *KINDS)}
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UsageError(f"cannot read {run.path / 'recipe.yaml'}: {' '.join(str(error).split())}") from None
    return {"name": str(raw.get("name") or run.path.name), "seed": raw.get("seed") or 0, **sections}


def _nodes_with_content(
    records: Mapping[str, NodeRecord], cells: Mapping[tuple[str, str], NodeRecord], recipe: Mapping[str, Any]
) -> list[NodeReads]:
    """The nodes that have content and whose entry is in the recipe, in the order in which it is written."""
    reads: dict[str, Sequence[str]] = {name: record.reads for name, record in records.items()}
    for (evaluation, _), record in cells.items():  # records do not name models
        models = [f"models/{model}" for model in recipe["models"] if (evaluation, model) in cells]
        reads[f"evaluations/{evaluation}"] = [*models, *record.reads]
    places = [f"{kind}/{entry}" for kind in KINDS for entry in recipe[kind]]
    there = [name for name in reads if name.partition("@")[0] in places]
    there.sort(key=lambda name: (places.index(name.partition("@")[0]), natural_sort_key(name)))
    return [(name, reads[name]) for name in there]


def natural_sort_key(name: str) -> list[tuple[float, str]]:
    """A sort key by which "q-9" comes before "q-10"."""
    parts = re.split(r"(\d+(?:\.\d+)?)", name)
    return [(float(part), "") if part[:1].isdigit() else (0.0, part) for part in parts if part]


def split_seed(name: str) -> tuple[str, int | None]:
    """A student's name without its seed, and the seed: "alpha@alpha=0.5,seed=1" -> ("alpha@alpha=0.5", 1)."""
    found = re.fullmatch(r"(.+)[@,]seed=(-?\d+)", name)
    return (found[1], int(found[2])) if found else (name, None)


def write_summary(run: RunFolder, summary: Summary) -> Path:
    """Write `summary.json` into the run folder; returns its path."""
    path = run.path / "summary.json"
    write_json(path, summary.model_dump())
    return path


def read_log(path: Path) -> list[LogLine]:
    """A trainer's `log.jsonl`, one line a step, empty when there is none; first a warning, where lines are damaged.

    A resumed training repeats the steps since its last checkpoint: the later line counts.
    """
    lines, damaged = read_lines(path, _LOG_LINE.validate_python)
    by_step = {line["step"]: line for line in lines}
    warning: list[LogLine] = (
        [{"step": 0, "warning": f"{damaged_lines(damaged)} of {path.name} left out"}] if damaged else []
    )
    return warning + [by_step[step] for step in sorted(by_step)]
