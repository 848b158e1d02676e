"""The `datasets` section of a recipe: which chains become rows, from trees, a file or the hub."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from cotree.base.settings import NOT_CONTENT, Section, require_known

Length = Literal["longest", "medium", "shortest"]
TextForm = Literal["plain", "tags", "think"]
_Share = Annotated[float, Field(ge=0, le=1)]
RowKind = Literal["sft", "dpo", "step_pairs", "stepwise"]


class OnlyFor(tuple[RowKind, ...]):
    """Marks a setting that chooses among the chains of trees, for these kinds of rows. Given for another kind, or for
    the rows of a file, which are taken as they are, it would be ignored, so it is refused."""


_ANY_KIND = OnlyFor(get_args(RowKind))


def _check_length(given: Any) -> Any:
    """What was given as `length`, if it is a length or weights of lengths."""
    if given is not None:
        require_known("unknown length", given if isinstance(given, dict) else [given], get_args(Length))
    if isinstance(given, dict) and not all(type(weight) is int and weight >= 1 for weight in given.values()):
        raise ValueError("a weight is a whole number of at least 1")
    return given


class Gates(Section):
    """What keeps a chain or a row out of a dataset; every gate counts what it removed.

    contamination: trees, and rows of a file, whose question repeats one that an evaluation of the recipe asks (13-grams
        of words; a generated question as a whole).
    loops, language: chains that repeat themselves, and chains in a script that their question does not use.
    duplicates: the same prompt and completion from another tree.
    rows_per_question: at most so many, over all its trees and turns.
    balance: no group (task, difficulty, or both) has more than `at_most` times the rows of the smallest one; difficulty
        is the tree's share of correct answers in thirds.
    """

    contamination: bool = True
    loops: bool = True
    language: bool = True
    duplicates: bool = True
    rows_per_question: int | None = Field(None, ge=1)
    balance: tuple[Literal["task", "difficulty"], ...] = ()
    at_most: float = Field(1.0, ge=1)


class Dataset(Section):
    """A `datasets` node: rows of one kind, from `trees` (one name or several), a `file`, or the `hub` (OWNER/NAME or
    OWNER/NAME@REVISION).

    rows: `sft` (chains), `dpo` (pairs), `step_pairs` (pairs that part at sibling thoughts), `stepwise` (process-reward
        rows).
    length: which chains of a tree, by their relative length in it (paper, Thoughts Length Balance): longest, medium,
        shortest, or a mixture {longest: 1, shortest: 4}, of which each tree draws one by seed, with these weights. By
        default longest for sft, shortest for dpo.
    select: instead of by `length`: `value` takes the best by reward, then by the mean of v/n along the chain; `random`
        draws by seed.
    verified: false takes chains right or wrong: what training on verified ones has to beat.
    per_tree: rows of a tree, at most.
    rejected: of the chains that can be rejected, the one that shares the fewest tokens with the chosen one (shortest
        common prefix): a `wrong` one, or a correct one that is longer than the chosen one (`longer_correct`), to prefer
        brevity alone.
    unanswered: a path that max_tokens cut off may be rejected too; its turn has no end (`rejected_finished` says so).
    forced: false leaves out chains whose answer's first words the search wrote, not the model.
    solve_rate: only trees whose share of correct answers is in [low, high]: leaves out what is too easy or too hard.
    questions_of: only questions that this other dataset has.
    size_of: at most as many rows as this other dataset has, or, with `size_in: tokens`, as near its completion tokens
        as whole rows come; drawn by seed, a row of each tree before a second one of any.
    min_gap, min_visits: step pairs part at siblings whose v/n differ by this much, each judged this often.
    label_above: a step of a process-reward row is right if its v/n is above this (0: one answer below it was right).
    annotations: of the run's annotators (`cotree view`), for the chains that are learned from: of pairs the correct
        ones. `drop_rejected` leaves out what any of them rejects; `require_accept` takes only what one accepts and none
        rejects; `use_fixed` is `drop_rejected`, and takes the newest corrected text in the place of a chain's own, if
        the task judges that text correct.
    text: thoughts a line each (`plain`), between the tags of their types (`tags`), or inside `<think>` (`think`).
    leave_out: thought types whose text the student does not see.
    reflections: `keep` the wrong thinking before a reflection, or `cut` it; a chain that was cut is verified again.
    max_tokens: rows over this (prompt included, student's tokens) are left out and counted, never cut.
    tokenizer: the model whose tokens count; by default the recipe's only one with weights, or the students' own.
    license: of the dataset, an identifier of the hub, for its card.
    """

    trees: Annotated[tuple[str, ...], BeforeValidator(lambda names: (names,) if isinstance(names, str) else names)] = ()
    file: str | None = None
    hub: str | None = Field(None, pattern=r"^[\w.-]+/[\w.-]+(@[\w.-]+)?$")
    rows: RowKind
    length: Annotated[Length | dict[Length, int] | None, BeforeValidator(_check_length), OnlyFor(("sft", "dpo"))] = None
    select: Annotated[Literal["length", "value", "random"], OnlyFor(("sft",))] = "length"
    verified: Annotated[bool, OnlyFor(("sft",))] = True
    per_tree: Annotated[int, _ANY_KIND] = Field(1, ge=1)
    rejected: Annotated[Literal["wrong", "longer_correct"], OnlyFor(("dpo",))] = "wrong"
    unanswered: Annotated[bool, OnlyFor(("dpo",))] = False
    forced: Annotated[bool, _ANY_KIND] = True
    solve_rate: Annotated[tuple[_Share, _Share] | None, _ANY_KIND] = None
    questions_of: str | None = None
    size_of: str | None = None
    size_in: Literal["rows", "tokens"] = "rows"
    min_gap: Annotated[float, OnlyFor(("step_pairs",))] = Field(0.5, gt=0, le=1)
    min_visits: Annotated[int, OnlyFor(("step_pairs",))] = Field(2, ge=1)
    label_above: Annotated[float, OnlyFor(("stepwise",))] = Field(0.0, ge=0, lt=1)
    annotations: Annotated[Literal["require_accept", "drop_rejected", "use_fixed"] | None, _ANY_KIND] = None
    text: Annotated[TextForm, _ANY_KIND] = "plain"
    leave_out: Annotated[tuple[str, ...], _ANY_KIND] = ()
    reflections: Annotated[Literal["keep", "cut"], _ANY_KIND] = "keep"
    max_tokens: int = Field(512, ge=8)
    gates: Gates = Gates()
    tokenizer: str | None = None
    license: Annotated[str | None, NOT_CONTENT] = None

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Dataset:
        if bool(self.trees) + (self.file is not None) + (self.hub is not None) != 1:
            raise ValueError("give exactly one of `trees`, `file` or `hub`")
        if not self.trees and self.rows not in ("sft", "dpo"):
            raise ValueError(f"rows of a file or the hub are sft or dpo; {self.rows} come from trees")
        for name in sorted(self.model_fields_set):
            for kinds in (mark for mark in type(self).model_fields[name].metadata if isinstance(mark, OnlyFor)):
                if not self.trees:
                    raise ValueError(f"`{name}` chooses chains of trees; the rows of a file are taken as they are")
                if self.rows not in kinds:
                    raise ValueError(f"`{name}` is for rows: {' or '.join(kinds)}, not {self.rows}")
        if self.select != "length" and self.length is not None:
            raise ValueError(f"give `length`, or `select: {self.select}`, not both")
        if self.unanswered and self.rejected == "longer_correct":
            raise ValueError("`unanswered` is for rejected: wrong; longer correct chains have all been answered")
        if "answer" in self.leave_out:
            raise ValueError("`leave_out`: the answer cannot be left out; it is what was judged")
        if self.annotations == "use_fixed":  # a corrected text has no thoughts
            needs = {"rows: sft or dpo": self.rows in ("sft", "dpo"), "text: plain or think": self.text != "tags"}
            needs |= {"no `leave_out`": not self.leave_out, "reflections: keep": self.reflections == "keep"}
            if lacking := [need for need, met in needs.items() if not met]:
                raise ValueError(f"`annotations: use_fixed` needs {lacking[0]}; a corrected text has no thoughts")
        if self.size_in == "tokens" and (self.size_of is None or self.rows == "stepwise"):
            raise ValueError("`size_in: tokens` needs `size_of`, and completions: for stepwise rows use size_in: rows")
        if self.solve_rate is not None and self.solve_rate[0] > self.solve_rate[1]:
            raise ValueError("`solve_rate` is [low, high], both in [0, 1]")
        return self

    @property
    def judges_again(self) -> bool:
        """Whether it changes texts of chains, which are then judged again."""
        return self.reflections == "cut" or self.annotations == "use_fixed"

    @property
    def lengths(self) -> dict[Length, int]:
        """The relative lengths that are chosen, with their weights."""
        if isinstance(self.length, dict):
            return self.length
        return {self.length or ("shortest" if self.rows == "dpo" else "longest"): 1}
