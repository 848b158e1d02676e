"""The `trees` section of a recipe: who writes thoughts, on which questions, and how a tree is searched."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from cotree.base.errors import UsageError
from cotree.base.settings import NOT_CONTENT, Section, require_known
from cotree.search.thoughts import DEFAULT_PATTERNS, PATTERNS, THOUGHT_TYPES, check_pattern
from cotree.tasks.base import Split

Count = Annotated[int, Field(ge=1)]
Matrix = dict[str, dict[str, Count]]


class Writer(Section):
    """A model in a role with its temperature and top_p there; by default those of the search."""

    model: str
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)


def _list_of_writers(value: Any) -> Any:
    """Turn a model name, a writer or a list of these into a tuple of writers."""
    given = value if isinstance(value, list | tuple) else [value]
    return tuple({"model": writer} if isinstance(writer, str) else writer for writer in given)


# With several writers, each request draws one by seed.
Role = Annotated[tuple[Writer, ...], BeforeValidator(_list_of_writers), Field(min_length=1)]


class Thought(Section):
    """Overrides how one thought type is generated, or defines a new type of the recipe's own.

    prefixes: possible first words, one drawn by seed; a new type needs them (or a `text`).
    role: who writes it; by default the reflector writes reflections and double checks, the thinker everything else.
    text: fixed text; no model is called.
    max_tokens: replaces the search's `max_thought_tokens`; a longer line or paragraph is cut and ends its chain.
    ends: where a thought ends, by default as in the search: `line` at a newline; `paragraph` at a blank line; `open`
        where the model starts its answer or ends its turn; `tokens` after `thought_tokens` tokens, even mid-line,
        and the next thought continues there (mini-steps).
    """

    text: str | None = Field(None, min_length=1)
    prefixes: tuple[str, ...] | None = Field(None, min_length=1)
    role: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    ends: Literal["line", "paragraph", "open", "tokens"] | None = None
    thought_tokens: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> Thought:
        if self.text is not None and (self.prefixes or self.role or self.max_tokens or self.ends):
            raise ValueError("a fixed `text` is not written by a model: leave out prefixes, role, max_tokens and ends")
        if self.text is not None and "\n" in self.text.strip():
            raise ValueError("a fixed `text` is one line")
        if (self.ends == "tokens") != (self.thought_tokens is not None):
            raise ValueError("`ends: tokens` and `thought_tokens`, after how many tokens, go together")
        if self.max_tokens is not None and self.ends in ("open", "tokens"):
            fix = "thought_tokens" if self.ends == "tokens" else "the search's max_chain_tokens"
            raise ValueError(f"max_tokens cuts lines and paragraphs; for `ends: {self.ends}` use {fix}")
        return self


# For types that the recipe does not mention; shared, because every request of a search reads it.
_DEFAULT_THOUGHT = Thought()


class Stop(Section):
    """Conditions that stop a tree before its rollouts are spent.

    correct, wrong: stop at this many distinct correct and this many distinct wrong chains.
    easy: stop after this many judged chains if all are correct. hopeless: after this many if none is.
    tokens: generated tokens. seconds: a deadline; with one the trees depend on the speed of the machine.
    """

    correct: int = Field(0, ge=0)
    wrong: int = Field(0, ge=0)
    easy: int | None = Field(None, ge=1)
    hopeless: int | None = Field(None, ge=1)
    tokens: int | None = Field(None, ge=1)
    seconds: float | None = Field(None, gt=0)


class Reward(Section):
    """A reward in [0, 1] that guides the search instead of the verifier's; verdicts stay the verifier's.

    function: `module:name` or `path/to/file.py:name`, called as f(question, text, verdict).
    judge: a model of the recipe, asked `samples` times whether the answer is right; the reward is the share of yes.
    process: a process reward model of the recipe (`mode: pooling`); it scores each thought, with `separator` after it,
        and `combine` reduces the scores to one: the least, their product, or the last.
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


def _with_shipped_patterns(value: Any, info: ValidationInfo) -> Any:
    """Resolve the names of shipped patterns, given as a list or as {name: null}, to their matrices."""
    if value == "default":
        value = DEFAULT_PATTERNS[info.data.get("ends", "paragraph")]
    names = isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
    given = dict.fromkeys(value) if names else value
    if not isinstance(given, dict):
        return given
    require_known("unknown pattern", [name for name, matrix in given.items() if matrix is None], list(PATTERNS))
    return {name: PATTERNS[name] if matrix is None else matrix for name, matrix in given.items()}


class Search(Section):
    """Monte Carlo tree search over thoughts (paper, section on MCTS-based CoT data construction).

    ends: where thoughts end by default: `paragraph` at a blank line, for models that write solutions unprompted;
        `line` at a newline, for small models that imitate the worked examples.
    examples: number of worked examples (few-shot) in the prompt; more shorten chains and make answers likelier. By
        default 3, and 0 for a reasoning model, whose thinking they would cut short.
    patterns: one is drawn for each tree: a list of shipped names, or {name: matrix} with a matrix of type -> {next
        type: number of children}, null for a shipped one; by default the shipped ones for `ends`.
    thoughts: overrides for thought types, and new types.
    rollouts: descents to a judged leaf, at most. leaves_per_round: concurrent rollouts, spread by virtual loss.
    exploration: C of UCB; higher spreads rollouts over branches, lower exploits branches with correct answers.
    seek: what UCB exploits: `correct`, a high share of correct chains (the paper's v/n), or `pairs`, nodes with both
        correct and wrong chains: v/n is replaced by 2 min(v/n, 1 - v/n).
    widen: a node with all children of its pattern's row may get more: UCB chooses between adding children and
        descending into one (adaptive branching, as in AB-MCTS).
    temperature, top_p: defaults for writers that set none.
    max_thought_tokens: longest single line or paragraph. max_chain_tokens: longest chain written in one request.
    max_reflections: wrong answers per tree that get a reflection.
    adaptive: give rollouts that early-stopped trees left over to trees with correct and wrong chains; at most
        doubles theirs.
    trees_in_flight: trees grown concurrently; affects speed only.
    """

    rollouts: int = Field(8, ge=1)
    leaves_per_round: int = Field(2, ge=1)
    exploration: float = Field(1.0, ge=0)
    widen: bool = False
    seek: Literal["correct", "pairs"] = "correct"
    ends: Literal["line", "paragraph"] = "paragraph"
    examples: int | None = Field(None, ge=0)
    patterns: Annotated[dict[str, Matrix], BeforeValidator(_with_shipped_patterns)] = Field(
        "default",
        min_length=1,
        validate_default=True,
    )
    thoughts: dict[str, Thought] = Field({})
    temperature: float = Field(0.8, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_thought_tokens: int = Field(64, ge=1)
    max_chain_tokens: int = Field(512, ge=1)
    max_depth: int = Field(10, ge=3)
    max_reflections: int = Field(2, ge=0)
    stop: Stop = Stop()
    adaptive: bool = False
    reward: Reward | None = None
    trees_in_flight: Annotated[int, NOT_CONTENT] = Field(8, ge=1)

    def thought(self, thought_type: str) -> Thought:
        """The recipe's settings for a thought type, or the defaults."""
        return self.thoughts.get(thought_type, _DEFAULT_THOUGHT)

    def ends_of(self, thought_type: str) -> str:
        """Where thoughts of a type end (`Thought.ends`); answers and fixed texts are always lines."""
        thought = self.thought(thought_type)
        return "line" if thought_type == "answer" or thought.text is not None else thought.ends or self.ends

    @property
    def widest(self) -> int:
        """The largest `n` (samples per request) that a tree uses."""
        widest = max(count for pattern in self.patterns.values() for row in pattern.values() for count in row.values())
        return max(widest, self.reward.samples if self.reward is not None else 1)

    @model_validator(mode="after")
    def _patterns_lead_to_an_answer(self) -> Search:
        own = [kind for kind in self.thoughts if kind not in THOUGHT_TYPES]
        for kind in own:
            if not self.thoughts[kind].prefixes and self.thoughts[kind].text is None:
                known = ", ".join(THOUGHT_TYPES)
                raise ValueError(f"thoughts: own type `{kind}` needs `prefixes`, its first words (shipped: {known})")
        for name, pattern in self.patterns.items():
            if name == "sampling":
                raise ValueError("pattern `sampling`: trees of `method: sampling` are called so; choose another name")
            known_types = (*THOUGHT_TYPES, *own)
            answering = [kind for kind in known_types if self.ends_of(kind) in ("paragraph", "open")]
            check_pattern(name, pattern, known_types, answering)
            if self.max_reflections and "reflection" not in pattern:
                raise ValueError(
                    f"pattern `{name}`: the row `reflection` is missing, and a wrong answer adds one; add e.g. "
                    "reflection: {thinking: 1}, or set max_reflections to 0"
                )
        # The task's answer format decides where an answer ends.
        answer = self.thought("answer")
        if answer.text is not None or answer.ends is not None:
            raise ValueError("thoughts.answer: only prefixes, role and max_tokens can change; it ends by itself")
        for prefix in answer.prefixes or ():
            if not prefix.endswith("\\boxed{"):
                raise ValueError(f"thoughts.answer: `{prefix}` opens no box; end it with \\boxed{{")
        return self


class SearchWithRoles(Search):
    """Search settings plus the models that write.

    roles: {role: model, student, or a list of them}. `thinker` writes every type that no other role covers.
    """

    roles: dict[str, Role]

    @model_validator(mode="after")
    def _roles_known(self) -> Self:
        if "thinker" not in self.roles and getattr(self, "file", None) is None:
            raise ValueError("roles: `thinker` is missing; name the model that writes thoughts")
        named = [thought.role for thought in self.thoughts.values() if thought.role is not None]
        known = list(dict.fromkeys(["thinker", "reflector", *THOUGHT_TYPES, *self.thoughts, *named]))
        require_known("roles: unknown role", self.roles, known)
        require_known("thoughts: unknown role", named, list(self.roles))
        return self

    @property
    def writers(self) -> tuple[str, ...]:
        """The models and students that are asked: those of a role, and the one that gives the reward."""
        names = [writer.model for role in self.roles.values() for writer in role]
        if self.reward is not None:
            names += [name for name in (self.reward.judge, self.reward.process) if name is not None]
        return tuple(dict.fromkeys(names))


class Trees(SearchWithRoles):
    """A `trees` node: one search tree per question, or imported rollouts merged into trees.

    file: rollouts from elsewhere (JSON lines, lm-eval's or verifiers' samples, an inspect log), merged into one tree
        per question by shared token prefixes; `tokenizer`: the model or student whose tokens count. `task`: its
        verifier judges them; without it a reward of `correct_at` or more is correct. No model is called, so no search
        setting is allowed.
    questions: {task: count}, the first of `split`; each turn of a conversation gets its own tree.
    method: `mcts`, or `sampling`: independent whole chains (rejection sampling, best-of-n) with the same worked
        examples, first thought and thinker, up to `rollouts` or a stop condition. It ignores the rest of the pattern,
        exploration, leaves_per_round, max_depth, max_reflections and adaptive.
    parquet: files of finished trees (`cotree export --to trees`), or patterns like `trees-*.parquet`: trees of these
        settings are read from them, and only those that they lack are grown.
    tokens_of: for sampling, another `trees` node: sample each question until it has cost as many generated tokens as
        its tree there, to the nearest chain; replaces `rollouts` and stop conditions.
    """

    questions: dict[str, Count] = Field({})
    roles: dict[str, Role] = Field({})
    file: str | None = None
    tokenizer: str | None = None
    task: str | None = None
    correct_at: float = Field(1.0, gt=0)
    split: Split = "train"
    method: Literal["mcts", "sampling"] = "mcts"
    parquet: Annotated[
        tuple[str, ...], BeforeValidator(lambda given: (given,) if isinstance(given, str) else given)
    ] = ()
    tokens_of: str | None = None

    @model_validator(mode="after")
    def _questions_or_file(self) -> Trees:
        of_file = {"file", "tokenizer", "task", "correct_at"}
        if self.file is None and not self.questions:
            raise ValueError("`questions` is missing; give {task: how many}, or a `file` of rollouts")
        if self.file is not None and self.tokenizer is None:
            raise ValueError("a `file` of rollouts needs `tokenizer`: the model whose tokens they share")
        if wrong := self.model_fields_set & of_file if self.file is None else self.model_fields_set - of_file:
            where = (
                "of rollouts" if self.file is None else "of a search, and the rollouts of a `file` are there already"
            )
            raise ValueError(f"`{min(wrong)}` is {where}; leave it out")
        return self

    @field_validator("parquet")
    @classmethod
    def _parquet_by_name(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if not name.endswith(".parquet"):
                raise ValueError(f"`{name}` must end with .parquet")
        return names

    def parquet_files(self) -> list[Path]:
        """The files that `parquet` names.

        Raises:
            UsageError: a name or pattern finds none.
        """
        found: dict[Path, None] = {}
        for pattern in self.parquet:
            files = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern))
            if not files:
                raise UsageError(f"no file at {pattern}")
            found |= dict.fromkeys(map(Path, files))
        return list(found)

    @model_validator(mode="after")
    def _tokens_of_sampling(self) -> Trees:
        if self.tokens_of is not None and self.method != "sampling":
            raise ValueError(
                "`tokens_of` is for `method: sampling`, which spends what other trees spent; use stop.tokens"
            )
        return self
