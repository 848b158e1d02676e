"""`summary.json`: all numbers of a run for tables and the report, collected from its node.json files.

Fractions are in [0, 1], tokens and rows are counts; missing values are None, shown as a dash. Evaluation rows are
validated; an invalid value is an error that names the file and the key.
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

# One optimizer step of a training log: `step` and the method's metrics.
LogLine = dict[str, Any]
_LOG_LINE = TypeAdapter(Annotated[LogLine, AfterValidator(lambda line: line | {"step": int(line.get("step", "none"))})])
# (node id ("students/dpo"), ids of the nodes that it reads)
NodeReads = tuple[str, Sequence[str]]


class EvaluatedModel(StrictModel):
    """The evaluation and model of a table row. model: a model, or a student's node ("sft@seed=1").

    student: the same without seed ("sft"), shared by the rows of all seeds. fingerprint: of the evaluation's cell.
    """

    evaluation: str
    model: str
    student: str
    seed: int | None = None
    fingerprint: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """All names that select this row: student, model, and their recipe entries."""
        return self.student, self.model, self.student.partition("@")[0]


class EvalRow(TaskScores, EvaluatedModel):
    """One model's scores on one task or later turn. cut_off: `truncated`, as tables name it."""

    cut_off: float | None = None

    @property
    def section(self) -> str:
        """Its section of the table: the task."""
        return self.task


class InstructionRow(InstructionScores, EvaluatedModel):
    """One model's instruction-following scores in one of the paper's IF groups."""

    @property
    def section(self) -> str:
        """Its section of the table: "multi_if IF(En), turn 2"."""
        return group_name(self.task, self.group, self.turn or 0)


class Baseline(ConstantBaseline):
    """The constant-answer baseline of a task in an evaluation."""

    evaluation: str


class NodeState(BaseModel):
    """A node's state: whether it is finished, and the seconds of work on it."""

    model_config = StrictModel.model_config

    name: str
    reads: list[str] = []
    done: bool = False
    seconds: float = 0.0


class Summary(BaseModel):
    """The content of `summary.json`.

    evaluations: settings of each evaluation (`eval.settings.AskSettings`, questions and split).
    search: counts of each trees node. compared: trees nodes at equal tokens (`search.summary.MethodResult`).
    data: counts of each dataset, and whether its chains are `unverified`.
    train: parent, data, settings and result of each student.
    damaged: nodes and cells with an unreadable node.json, missing from all else.
    tokens: {node: `prompt` (uncached), `cached`, `completion` (generated) and `trained` tokens}.
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
        """The names of the nodes of a kind."""
        return [node.name.partition("/")[2] for node in self.nodes if node.name.startswith(f"{kind}/")]

    def tokens_per_second(self, node: str) -> float | None:
        """Generated (else trained) tokens per second of work on a node."""
        tokens, seconds = self.tokens.get(node, {}), self.seconds.get(node)
        made = tokens.get("completion") or tokens.get("trained")
        return made / seconds if made and seconds else None


def summarize_run(run: RunFolder, nodes: Sequence[NodeReads] | None = None) -> Summary:
    """Summarize a run from its node.json files, without content of outdated settings.

    Args:
        nodes: the experiment's nodes in order with their dependencies, including models of evaluations
            ("models/small"); by default the nodes of the folder's recipe that have content.

    Raises:
        UsageError: a file is damaged, or of another version.
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
    """Summarize one evaluated model, from its record (`eval.scores.ModelScores` as plain data).

    Args:
        evaluation: its node; "" for `cotree eval`.
        file: source of the numbers, for errors.

    Raises:
        UsageError: an invalid value; names file and key.
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
    """Read a run's recipe as plain data: name, seed, and a section per kind of entry.

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
    """The recipe's nodes that have content, in written order."""
    reads: dict[str, Sequence[str]] = {name: record.reads for name, record in records.items()}
    for (evaluation, _), record in cells.items():  # records do not list models
        models = [f"models/{model}" for model in recipe["models"] if (evaluation, model) in cells]
        reads[f"evaluations/{evaluation}"] = [*models, *record.reads]
    places = [f"{kind}/{entry}" for kind in KINDS for entry in recipe[kind]]
    there = [name for name in reads if name.partition("@")[0] in places]
    there.sort(key=lambda name: (places.index(name.partition("@")[0]), natural_sort_key(name)))
    return [(name, reads[name]) for name in there]


def natural_sort_key(name: str) -> list[tuple[float, str]]:
    """A key for natural sorting: "q-9" before "q-10"."""
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
    """Read a trainer's `log.jsonl`, one line per step; empty if missing; starts with a warning if lines are damaged.

    A resumed training repeats steps after its last checkpoint; the later line counts.
    """
    lines, damaged = read_lines(path, _LOG_LINE.validate_python)
    by_step = {line["step"]: line for line in lines}
    warning: list[LogLine] = (
        [{"step": 0, "warning": f"{damaged_lines(damaged)} of {path.name} left out"}] if damaged else []
    )
    return warning + [by_step[step] for step in sorted(by_step)]
