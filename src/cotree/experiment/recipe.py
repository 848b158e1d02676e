"""The recipe: one YAML file that describes a run, checked before anything is spent.

Invariant: a recipe that loads is complete (defaults filled in, names resolved to models and tasks that exist), and an
unknown key is an error that names the nearest known one. One pydantic model a stage; the resolved recipe is written to
the run folder and its hash decides whether a run may be resumed.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from cotree.base.errors import UsageError

GGUFType = Literal["F32", "F16", "Q8_0"]
Mode = Literal["completions", "chat", "pooling"]
Length = Literal["longest", "medium", "shortest"]
TextForm = Literal["plain", "tags", "think"]
STAGES = ("search", "build", "train_sft", "train_dpo", "eval", "report")


def _known(fault: str, names: Iterable[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"{fault} `{name}`; {hint}")


class Section(BaseModel):
    """A part of the recipe. Unknown keys are errors; a loaded recipe never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _keys_known(cls, given: Any) -> Any:
        if isinstance(given, dict):
            _known("unknown key", given, list(cls.model_fields))
        return given


class Price(Section):
    """What a million tokens cost, in any currency; cached prompt tokens cost as much as others unless said."""

    prompt: float = Field(0.0, ge=0)
    cached: float | None = Field(None, ge=0)
    completion: float = Field(0.0, ge=0)


class Model(Section):
    """Where text comes from: OpenAI-compatible servers (`url`) or a GGUF in this process (`embedded`).

    `embedded` is smollm2-135m-instruct, gemma-3-270m (after `make two-models`), a path to a `.gguf` file, or
    `REPO_ID:FILE.gguf` on the hub. `url` is one server or a list of servers of the same model: a question stays with
    one of them, so that its prompts stay warm there. `tokenizer` (a hub id or folder) renders the chat template for
    `url` models; embedded ones carry their own. `mode: chat` sends the chain so far as an assistant message to be
    continued, for servers that offer only `/v1/chat/completions`; it needs no tokenizer. `mode: pooling` is a process
    reward model behind vLLM's `/pooling`, which writes nothing and scores the steps of a chain. `max_in_flight` counts
    requests a server.
    """

    embedded: str | None = None
    gguf: GGUFType = "Q8_0"
    url: str | tuple[str, ...] | None = None
    model: str = "default"
    tokenizer: str | None = None
    mode: Mode = "completions"
    api_key_env: str | None = None
    max_in_flight: int = Field(16, ge=1)
    price: Price | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Model:
        if (self.embedded is None) == (not self.urls):
            raise ValueError("give exactly one of `embedded` (a GGUF in this process) or `url` (a server)")
        if self.embedded is not None and self.mode != "completions":
            raise ValueError(f"`mode: {self.mode}` is for servers; an embedded model continues text exactly")
        if self.urls and self.mode == "completions" and self.tokenizer is None:
            raise ValueError("a `url` model needs `tokenizer` (hub id or folder): prompts are rendered on this side")
        return self

    @property
    def urls(self) -> tuple[str, ...]:
        """The servers, none for an embedded model."""
        return (self.url,) if isinstance(self.url, str) else self.url or ()


class Writer(Section):
    """A model in a role, and how it samples there; what is not given is the search's."""

    model: str
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)


def _writers(value: Any) -> Any:
    """A role may be given as a name, a writer, or a list of these."""
    given = value if isinstance(value, list | tuple) else [value]
    return tuple({"model": writer} if isinstance(writer, str) else writer for writer in given)


# Of several writers one is drawn by seed for each request.
Role = Annotated[tuple[Writer, ...], BeforeValidator(_writers), Field(min_length=1)]


Count = Annotated[int, Field(ge=1)]


class Tasks(Section):
    """How many questions of each task: `train` is searched, `dev` is for tuning, `eval` is held out."""

    train: dict[str, Count] = Field(min_length=1)
    dev: dict[str, Count] = {}
    eval: dict[str, Count]

    def of(self, split: Literal["train", "dev", "test"]) -> dict[str, int]:
        """What is asked of a split."""
        return {"train": self.train, "dev": self.dev, "test": self.eval}[split]


class Thought(Section):
    """How a thought type is written, where that differs from the shipped way.

    text: fixed words; no model is called. prefixes: the words it may begin with, one drawn by seed.
    in_student: false leaves its text out of what the student is trained on.
    max_tokens: instead of the search's `max_thought_tokens`.
    ends: `line` (a thought is a line; one that is cut by max_tokens is a dead end) or `tokens` (a mini-step: it ends
        after max_tokens tokens, wherever that is, and the next one continues its very words).
    """

    text: str | None = Field(None, min_length=1)
    prefixes: tuple[str, ...] | None = Field(None, min_length=1)
    in_student: bool = True
    max_tokens: int | None = Field(None, ge=1)
    ends: Literal["line", "tokens"] = "line"

    @model_validator(mode="after")
    def _fixed_or_written(self) -> Thought:
        if self.text is not None and (self.prefixes or self.max_tokens or self.ends != "line"):
            raise ValueError("a fixed `text` is not written by a model: leave out prefixes, max_tokens and ends")
        if self.text is not None and "\n" in self.text.strip():
            raise ValueError("a fixed `text` is one line")
        return self


class Stop(Section):
    """When a tree has had enough before its rollouts are spent. Chains count once however often they were written.

    correct, wrong: enough when there are this many distinct correct and this many distinct wrong chains.
    easy: give up after this many judged chains that are all correct. hopeless: after this many without a correct one.
    tokens: generated tokens. seconds: a deadline; with one the trees depend on the speed of the machine.
    """

    correct: int = Field(0, ge=0)
    wrong: int = Field(0, ge=0)
    easy: int | None = Field(None, ge=1)
    hopeless: int | None = Field(None, ge=1)
    tokens: int | None = Field(None, ge=1)
    seconds: float | None = Field(None, gt=0)


class Reward(Section):
    """A reward other than the task's rule, in [0, 1], for the search only: verdicts stay the task's.

    function: `module:name` or `path/to/file.py:name`, called as f(question, text, verdict).
    judge: a model of the recipe that is asked, `samples` times, whether the answer is right; the share of yes.
    process: a process reward model of the recipe (`mode: pooling`); it scores each thought of the chain, which
        `separator` ends, and `combine` makes one number of them: the least, their product, or the last one's.
    """

    function: str | None = Field(None, pattern=r"^.+:[A-Za-z_][A-Za-z0-9_]*$")
    judge: str | None = None
    samples: int = Field(4, ge=1)
    process: str | None = None
    separator: str = Field("<extra_0>", min_length=1)
    combine: Literal["least", "product", "last"] = "least"

    @model_validator(mode="after")
    def _one_source(self) -> Reward:
        if sum(source is not None for source in (self.function, self.judge, self.process)) != 1:
            raise ValueError("give exactly one of `function` (Python), `judge` or `process` (a model)")
        return self


class Search(Section):
    """Monte Carlo tree search over thoughts (paper, section on MCTS-based CoT data construction).

    `patterns` are drawn from, a tree each; `own_patterns` defines more: type -> {next type: number of children}.
    `adaptive` gives the rollouts that stopped trees left over to trees that have both kinds of chains, up to as many
    again as they had. `baselines` adds best-of-n and its majority vote at equal tokens to the summary.

    rollouts: descents to a judged leaf, at most. leaves_per_round: how many go at once, kept apart by virtual loss.
    exploration: C of UCB. temperature, top_p: of every writer that names none. trees_in_flight: trees at once; changes
    the speed and nothing else.
    """

    rollouts: int = Field(8, ge=1)
    leaves_per_round: int = Field(2, ge=1)
    exploration: float = Field(1.0, ge=0)
    patterns: list[str] = Field(["plain", "hypothesis", "double_check", "reclarify"], min_length=1)
    own_patterns: dict[str, dict[str, dict[str, Count]]] = {}
    thoughts: dict[str, Thought] = {}
    temperature: float = Field(0.8, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_thought_tokens: int = Field(64, ge=1)
    max_depth: int = Field(10, ge=3)
    max_reflections: int = Field(2, ge=0)
    trees_in_flight: int = Field(8, ge=1)
    stop: Stop = Stop()
    adaptive: bool = False
    reward: Reward | None = None
    baselines: bool = True

    @property
    def widest(self) -> int:
        """The most samples that one request of a tree asks for."""
        from cotree.search.thoughts import PATTERNS

        patterns = [self.own_patterns.get(name) or PATTERNS[name] for name in self.patterns]
        widest = max(count for pattern in patterns for row in pattern.values() for count in row.values())
        return max(widest, self.reward.samples if self.reward is not None else 1)


class BuildSFT(Section):
    """Correct chains of a tree, by relative length (paper, Thoughts Length Balance: the longest for SFT) or by value:
    reward, then the mean of v/n along the chain."""

    select: Literal["length", "value"] = "length"
    length: Length = "longest"
    chains_per_tree: int = Field(1, ge=1)


class BuildDPO(Section):
    """Pairs with the shortest common prefix (paper, data extraction: shortest chosen for DPO).

    `unanswered`: a path that max_tokens cut off may be rejected too. Its turn has no end, which the row's
    `rejected_finished` says; trainers other than cotree's would give it one.
    """

    length: Length = "shortest"
    pairs_per_tree: int = Field(1, ge=1)
    unanswered: bool = False


class BuildStepPairs(Section):
    """Pairs that part at sibling thoughts whose v/n differ by `min_gap`, each judged at least `min_visits` times."""

    min_gap: float = Field(0.5, gt=0, le=1)
    min_visits: int = Field(2, ge=1)
    pairs_per_tree: int = Field(1, ge=1)


class BuildStepwise(Section):
    """Process-reward rows: a step is right if its v/n is above `label_above` (0: one answer below it was right)."""

    label_above: float = Field(0.0, ge=0, lt=1)
    chains_per_tree: int = Field(2, ge=1)


class Gates(Section):
    """What keeps a chain or a row out of the datasets; every gate counts what it removed.

    contamination: trees whose question repeats one of `tasks.eval` or `tasks.dev` (13-grams of words; a generated
        question as a whole).
    loops, language: chains that repeat themselves, and chains in a script that their question does not use.
    duplicates: the same prompt and completion from another tree. rows_per_question: over all its trees and turns.
    balance: no group (task, difficulty, or both) has more than `at_most` times the rows of the smallest one; difficulty
        is the tree's pass rate in thirds.
    """

    contamination: bool = True
    loops: bool = True
    language: bool = True
    duplicates: bool = True
    rows_per_question: int | None = Field(None, ge=1)
    balance: tuple[Literal["task", "difficulty"], ...] = ()
    at_most: float = Field(1.0, ge=1)


class Build(Section):
    """From trees to rows. Chains over `max_tokens` (prompt included, student's tokens) are left out and counted, never
    cut.

    text: thoughts a line each (`plain`), between the tags of their types (`tags`), or inside `<think>` (`think`).
    reflections: `keep` the wrong thinking before a reflection, or `cut` it; a chain that was cut is verified again.
    step_pairs, stepwise: datasets beyond the paper's, made when their section is there.
    license: of the datasets, an identifier of the hub, for their card.
    """

    sft: BuildSFT = BuildSFT()
    dpo: BuildDPO = BuildDPO()
    step_pairs: BuildStepPairs | None = None
    stepwise: BuildStepwise | None = None
    text: TextForm = "plain"
    reflections: Literal["keep", "cut"] = "keep"
    gates: Gates = Gates()
    max_tokens: int = Field(512, ge=8)
    license: str | None = None


class LoRA(Section):
    """Train low-rank adapters on all linear layers instead of the weights; `model/` is stored merged all the same."""

    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)


class Probe(Section):
    """Ask the student `questions` of the training prompts every `every` steps, greedily, and diagnose what it writes.

    stop_rise: stop training when the no-answer ratio is more than this above that of the first probe.
    keep: `best` makes the student of the probe with the fewest missing answers (then the fewest loops; of equals the
        last) the trained one, instead of that of the last step.
    """

    every: int = Field(50, ge=1)
    questions: int = Field(8, ge=1)
    max_tokens: int = Field(256, ge=1)
    stop_rise: float | None = Field(None, gt=0, le=1)
    keep: Literal["last", "best"] = "last"


class Optimizer(Section):
    """What SFT and DPO share. `batch_size` counts chains (SFT) or pairs (DPO) in one optimizer step.

    A step is computed in packs of at most `pack_tokens` tokens, shared ones counted once: it changes memory and time,
    never the gradient. The learning rate rises over `warmup_ratio` of the steps, from 0 as in transformers, then falls
    to 0 in a line. `precision: auto` is bf16 autocast on CUDA and fp32 on CPU. `compile` is torch.compile on all
    but the attention. `report_to` names Trainer's reporters (tensorboard, wandb, ...).
    """

    learning_rate: float = Field(5e-5, gt=0)
    epochs: float = Field(1.0, gt=0)
    batch_size: int = Field(8, ge=1)
    pack_tokens: int = Field(2048, ge=1)
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    save_steps: int = Field(20, ge=1)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False
    lora: LoRA | None = None
    report_to: tuple[str, ...] = ()
    probe: Probe | None = None


class TrainSFT(Optimizer):
    """Supervised fine-tuning on chains: token-mean cross-entropy over the completion.

    `sft_scope: dedup` counts a token that several chains of a step share once instead of once for each.
    """

    sft_scope: Literal["full", "dedup"] = "full"


class TrainDPO(Optimizer):
    """L = cDPO(beta, label_smoothing) + alpha * L_SFT(chosen) (paper, Fine-grained DPO and Joint Post-training).

    `mask_prefix` leaves the tokens that chosen and rejected share out of the margin; in the sigmoid margin they cancel
    exactly, so what it changes is the default of `sft_scope` (`suffix`) and the logged rewards.
    `sft_norm`: `token` = mean over all scored tokens of the step, `pair` = mean over pairs of per-pair token means.
    `sft_scope`: `full` completions, the `suffix` after the shared prefix, or `dedup`: shared tokens of a step once.
    `loss`: the margin's form (docs/training.md); `simpo_gamma` is SimPO's target margin, `ld_alpha` LD-DPO's weight of
    tokens beyond the shorter side's length. `reference_free` drops the reference; SimPO never has one.
    """

    learning_rate: float = Field(5e-6, gt=0)
    batch_size: int = Field(4, ge=1)
    loss: Literal["sigmoid", "length_normalised", "simpo", "ld_dpo"] = "sigmoid"
    beta: float = Field(0.1, gt=0)
    label_smoothing: float = Field(0.1, ge=0, lt=0.5)
    simpo_gamma: float = Field(0.5, ge=0)
    ld_alpha: float = Field(0.5, ge=0, le=1)
    reference_free: bool = False
    alpha: float = Field(1.0, ge=0)
    mask_prefix: bool = True
    sft_norm: Literal["token", "pair"] = "token"
    sft_scope: Literal["full", "suffix", "dedup"] | None = None

    @property
    def scope(self) -> Literal["full", "suffix", "dedup"]:
        """The SFT term's scope: an explicit one wins, else masking decides."""
        return self.sft_scope or ("suffix" if self.mask_prefix else "full")

    @property
    def has_reference(self) -> bool:
        """Whether the margin is relative to the SFT checkpoint."""
        return self.loss != "simpo" and not self.reference_free


class Train(Section):
    """`student` names the model whose weights are trained."""

    student: str
    sft: TrainSFT = TrainSFT()
    dpo: TrainDPO = TrainDPO()


class Eval(Section):
    """Greedy evaluation: every model in one engine, at one GGUF type, with one plain prompt and one max_tokens.

    `examples` adds the base model with the search's worked examples; `control` trains and evaluates a student on the
    same number of unverified chains. Both say how much of a win is merely learning to answer. `split: dev` asks the
    questions of `tasks.dev` instead of the held-out ones of `tasks.eval`: tune with it.
    """

    split: Literal["test", "dev"] = "test"
    max_tokens: int = Field(128, ge=1)
    gguf: GGUFType = "Q8_0"
    examples: bool = True
    control: bool = True


class SearchRecipe(Section):
    """What a search reads of a recipe, and all that decoding does: models, who writes what, how to search."""

    seed: int = 0
    models: dict[str, Model]
    roles: dict[str, Role]
    search: Search = Search()

    @model_validator(mode="after")
    def _search_possible(self) -> Self:
        from cotree.search.thoughts import PATTERNS, THOUGHT_TYPES, check_pattern

        if "thinker" not in self.roles:
            raise ValueError("roles: `thinker` is missing; name the model that writes thoughts")
        _known("roles: unknown role", self.roles, ["thinker", "reflector", *THOUGHT_TYPES])
        writing = [name for name, model in self.models.items() if model.mode != "pooling"]
        scoring = [name for name in self.models if name not in writing]
        for writer in (writer for role in self.roles.values() for writer in role):
            if writer.model in scoring:
                raise ValueError(f"roles: `{writer.model}` is `mode: pooling`, which scores and writes nothing")
            _known("roles: unknown model", [writer.model], writing)
        search = self.search
        for name, pattern in search.own_patterns.items():
            if name in PATTERNS:
                raise ValueError(f"search.own_patterns: `{name}` is a shipped pattern; give yours another name")
            check_pattern(name, pattern)
            if search.max_reflections and "reflection" not in pattern:
                raise ValueError(
                    f"pattern `{name}`: the row `reflection` is missing, and a wrong answer adds one; add e.g. "
                    "reflection: {thinking: 1}, or set search.max_reflections to 0"
                )
        _known("search.patterns: unknown pattern", search.patterns, [*PATTERNS, *search.own_patterns])
        _known("search.thoughts: unknown type", search.thoughts, list(THOUGHT_TYPES))
        # An answer is judged, and ends by itself.
        answer = search.thoughts.get("answer", Thought())
        if answer.text is not None or answer.ends != "line" or not answer.in_student:
            raise ValueError("search.thoughts.answer: only `prefixes` and `max_tokens` can change; it ends by itself")
        for prefix in answer.prefixes or ():
            if not prefix.endswith("\\boxed{"):
                raise ValueError(f"search.thoughts.answer: `{prefix}` opens no box; end it with \\boxed{{")
        judge, process = (search.reward.judge, search.reward.process) if search.reward else (None, None)
        _known("search.reward.judge: unknown model", [judge] if judge else [], writing)
        _known("search.reward.process: unknown `mode: pooling` model", [process] if process else [], scoring)
        return self

    def used_models(self) -> dict[str, Model]:
        """The models that the search asks: those of a role, and the one that gives the reward."""
        names: set[str | None] = {writer.model for role in self.roles.values() for writer in role}
        if self.search.reward is not None:
            names |= {self.search.reward.judge, self.search.reward.process}
        return {name: model for name, model in self.models.items() if name in names}

    @classmethod
    def parse(cls, raw: dict[str, Any], where: str, overrides: Sequence[str] = ()) -> Self:
        """From plain data, which the `a.b=c` overrides change (values are YAML); `where` names it in errors.

        Raises:
            UsageError: one line that names the keys and the fix.
        """
        for override in overrides:
            _override(raw, override)
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise UsageError(f"{where}: {'; '.join(_explain(problem) for problem in error.errors())}") from None


class Recipe(SearchRecipe):
    """A run: who writes and how to search, questions, and one section a stage."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    tasks: Tasks
    build: Build = Build()
    train: Train
    eval: Eval = Eval()

    @model_validator(mode="after")
    def _names_known(self) -> Self:
        from cotree.tasks import TASKS, is_own

        for split in (self.tasks.train, self.tasks.dev, self.tasks.eval):
            _known("tasks: unknown task", [name for name in split if not is_own(name)], list(TASKS))
        if self.train.student not in self.models:
            mine = "models.mine.embedded=PATH.gguf (or REPO_ID:FILE.gguf) train.student=mine"
            raise ValueError(
                f"train.student: unknown model `{self.train.student}`; known: {', '.join(self.models)}; for another "
                f"GGUF: {mine}"
            )
        if self.models[self.train.student].embedded is None:
            raise ValueError(f"train.student: `{self.train.student}` is a server; a student's weights must be here")
        return self


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, apply `a.b=c` overrides, fill in defaults, check.

    Raises:
        UsageError: one line that names the file, the key and the fix.
    """
    if path.is_dir():
        of_run = path / "recipe.yaml"
        raise UsageError(f"{path} is a folder; name a recipe{f': its own is {of_run}' * of_run.is_file()}")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"no recipe at {path}; `recipes/laptop.yaml` is a good start") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UsageError(f"{path} holds no recipe: expected keys like `name`, `models`, `tasks`")
    return Recipe.parse(raw, str(path), overrides)


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UsageError(f"`{override}` is no override; write it as key.subkey=value, e.g. search.rollouts=16")
    step: Any = raw
    *parents, last = key.split(".")
    for parent in parents:
        step = step.setdefault(parent, {})
        if not isinstance(step, dict):
            raise UsageError(f"`{override}`: `{parent}` is a value, not a section")
    try:
        step[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UsageError(f"`{override}`: the value is not YAML; quote it") from None


# How pydantic puts things, and how a recipe's writer does.
_PLAIN = (
    ("^Value error, ", ""),
    ("^[A-Z][a-z]+ should ", "must "),
    (" after validation, .*|, unable to .*|, got .*| or instance of .*", ""),
    ("a valid dictionary", "a section of keys, like {}"),
    ("a valid integer", "a whole number"),
    ("a valid boolean", "true or false"),
    ("a valid (tuple|list)", "a list"),
    ("a valid ", "a "),
)


def _explain(problem: Any) -> str:
    """One pydantic problem as `a.b: what is wrong`."""
    key, message = ".".join(map(str, problem["loc"])), problem["msg"]
    if problem["type"] == "missing":
        return f"`{key}` is missing"
    for pattern, plain in _PLAIN:
        message = re.sub(pattern, plain, message)
    return f"`{key}`: {message}" if key else message


def recipe_yaml(recipe: Recipe) -> str:
    """The resolved recipe, every default written out."""
    return yaml.safe_dump({"name": recipe.name} | recipe.model_dump(), sort_keys=False, allow_unicode=True)


def recipe_hash(recipe: Recipe) -> str:
    """16 hex digits over everything in the recipe."""
    return hashlib.sha256(json.dumps(recipe.model_dump(), sort_keys=True).encode()).hexdigest()[:16]
