"""The `trees` section of a recipe: who writes thoughts, on which questions, and how a tree is searched."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from cotree.base.settings import NOT_CONTENT, Section, require_known
from cotree.search.thoughts import DEFAULT_PATTERNS, PATTERNS, THOUGHT_TYPES, check_pattern
from cotree.tasks.base import Split

Count = Annotated[int, Field(ge=1)]
Matrix = dict[str, dict[str, Count]]


class Writer(Section):
    """A model in a role, and how it samples there; what is not given is the search's."""

    model: str
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)


def _list_of_writers(value: Any) -> Any:
    """A role may be given as a name, a writer, or a list of these."""
    given = value if isinstance(value, list | tuple) else [value]
    return tuple({"model": writer} if isinstance(writer, str) else writer for writer in given)


# Of several writers one is drawn by seed for each request.
Role = Annotated[tuple[Writer, ...], BeforeValidator(_list_of_writers), Field(min_length=1)]


class Thought(Section):
    """How a thought type is written, where that differs from the shipped way; a new name is a type of the recipe's own.

    prefixes: the words it may begin with, one drawn by seed; an own type needs them (or a `text`).
    role: who writes it; by default the reflector writes reflections and double checks, the thinker everything else.
    text: fixed words; no model is called.
    max_tokens: instead of the search's `max_thought_tokens`; a line or paragraph that is longer is cut, a dead end.
    ends: where a thought ends, by default where the search's thoughts do: `line` at a line's end; `paragraph` at a
        blank line; `open` where the model turns to the answer or ends its turn; `tokens` after `thought_tokens` tokens,
        wherever that is, and the next one continues its very words (mini-steps).
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


# Of the types that a recipe says nothing of; every request of a search looks at it.
_SHIPPED_WAY = Thought()


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


def _with_shipped_patterns(value: Any, info: ValidationInfo) -> Any:
    """Names of shipped patterns, or a mapping in which an own pattern has its matrix and a shipped one null."""
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

    ends: where thoughts end that say nothing else: `paragraph` at a blank line, for models that write solutions of
        their own; `line` at a line's end, for small ones that follow the worked examples.
    examples: how many worked examples the prompt shows; more of them shorten chains and bring answers. By default 3,
        and none for a reasoning model, whose thinking they would cut short.
    patterns: one is drawn for each tree: a list of shipped names, or {name: matrix} with a matrix of type -> {next
        type: number of children}, and null for a shipped one; by default the shipped ones for `ends`.
    thoughts: how thought types are written, own types included.
    rollouts: descents to a judged leaf, at most. leaves_per_round: how many go at once, kept apart by virtual loss.
    exploration: C of UCB; more of it spreads rollouts over branches, less returns to what was right.
    seek: where UCB goes back to: `correct`, where many chains were right (the paper's v/n), or `pairs`, where right and
        wrong ones part: v/n is replaced by twice the smaller of v/n and 1 - v/n.
    widen: where a node has all children of its pattern's row, more of them compete with those that are there, so that a
        node is widened or deepened by what its children brought (adaptive branching, as in AB-MCTS).
    temperature, top_p: of every writer that names none.
    max_thought_tokens: the longest line or paragraph that is asked for by itself. max_chain_tokens: the longest chain
        that is written in one request.
    max_reflections: how many wrong answers of a tree earn a reflection.
    adaptive: rollouts that stopped trees left over go to trees that have both kinds of chains, up to as many again as
        they had.
    trees_in_flight: trees grown at once; changes the speed and nothing else.
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
        """How thoughts of a type are written; by default the shipped way."""
        return self.thoughts.get(thought_type, _SHIPPED_WAY)

    def ends_of(self, thought_type: str) -> str:
        """Where thoughts of a type end; an answer, and fixed words, are lines."""
        thought = self.thought(thought_type)
        return "line" if thought_type == "answer" or thought.text is not None else thought.ends or self.ends

    @property
    def widest(self) -> int:
        """The most samples that one request of a tree asks for."""
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
        # An answer is judged, and ends by itself.
        answer = self.thought("answer")
        if answer.text is not None or answer.ends is not None:
            raise ValueError("thoughts.answer: only prefixes, role and max_tokens can change; it ends by itself")
        for prefix in answer.prefixes or ():
            if not prefix.endswith("\\boxed{"):
                raise ValueError(f"thoughts.answer: `{prefix}` opens no box; end it with \\boxed{{")
        return self


class SearchWithRoles(Search):
    """A search with its models.

    roles: {role: model, student, or a list of them}. `thinker` writes everything that no other role writes.
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
    """A `trees` node: one tree for each question, or for each question of a `file` of rollouts.

    file: rollouts of others (JSON lines, lm-eval's or verifiers' samples, an inspect log), which are made into trees by
        the tokens that they share; `tokenizer`: whose tokens, a model or student with weights. `task`: judges them,
        instead of their rewards, of which `correct_at` is the least of a correct one. No model is asked, so nothing of
        a search can be set.
    questions: {task: how many}, the first so many of `split`; of conversations each turn is a tree.
    method: `mcts`, or `sampling`: independent whole chains (rejection sampling, best-of-n) with the same worked
        examples, first thought and thinker, up to `rollouts` of them and the stop conditions. What shapes a tree has no
        part in it: all of a pattern but its first type, exploration, leaves_per_round, max_depth, max_reflections,
        adaptive.
    tokens_of: for sampling, another node: each question is sampled until it has cost what its tree there has cost, to
        the nearest chain, instead of `rollouts` and stop conditions.
    """

    questions: dict[str, Count] = Field({})
    roles: dict[str, Role] = Field({})
    file: str | None = None
    tokenizer: str | None = None
    task: str | None = None
    correct_at: float = Field(1.0, gt=0)
    split: Split = "train"
    method: Literal["mcts", "sampling"] = "mcts"
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

    @model_validator(mode="after")
    def _tokens_of_sampling(self) -> Trees:
        if self.tokens_of is not None and self.method != "sampling":
            raise ValueError(
                "`tokens_of` is for `method: sampling`, which spends what other trees spent; use stop.tokens"
            )
        return self
