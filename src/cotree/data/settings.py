"""The `datasets` section of a recipe: which chains of trees, or rows of a file or the hub, become dataset rows."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from cotree.base.settings import NOT_CONTENT, Section, require_known

Length = Literal["longest", "medium", "shortest"]
TextForm = Literal["plain", "tags", "think"]
_Share = Annotated[float, Field(ge=0, le=1)]
RowKind = Literal["sft", "dpo", "step_pairs", "stepwise"]


class OnlyFor(tuple[RowKind, ...]):
    """Annotation of a setting that applies only to rows of these kinds selected from trees.

    Setting it for another kind, or for rows of a file (which are not selected), is an error."""


_ANY_KIND = OnlyFor(get_args(RowKind))


def _check_length(given: Any) -> Any:
    """Check that `length` is a known length or a mapping {length: weight}."""
    if given is not None:
        require_known("unknown length", given if isinstance(given, dict) else [given], get_args(Length))
    if isinstance(given, dict) and not all(type(weight) is int and weight >= 1 for weight in given.values()):
        raise ValueError("a weight is a whole number of at least 1")
    return given


class Gates(Section):
    """Filters that remove chains or rows from a dataset; each counts what it removed.

    contamination: drop questions that overlap with an evaluation of the recipe (13-grams of words; generated questions
        as a whole).
    loops, language: drop chains that repeat themselves, and chains in a script that their question does not use.
    duplicates: drop rows with the same prompt and completion.
    rows_per_question: maximum over all trees and turns of a question.
    balance: limit each group (task, difficulty, or both) to `at_most` times the rows of the smallest; difficulty is the
        tree's share of correct answers in thirds.
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

    rows: `sft` (chains), `dpo` (preference pairs), `step_pairs` (pairs that diverge at sibling thoughts), `stepwise`
        (process-reward rows).
    length: which chains of a tree to take, by length relative to the tree (paper, Thoughts Length Balance): longest,
        medium, shortest, or a mixture {longest: 1, shortest: 4}, from which each tree draws one by seed with these
        weights. Default: longest for sft, shortest for dpo.
    select: replaces `length`: `value` takes the best by reward, then by mean v/n along the chain; `random` by seed.
    verified: false takes chains regardless of verdict (a control for training on verified ones).
    per_tree: maximum rows per tree.
    rejected: candidates for the rejected side: `wrong` chains, or correct ones longer than the chosen
        (`longer_correct`, teaches brevity only); the one with the shortest common prefix with the chosen is taken.
    unanswered: paths cut by max_tokens may be rejected too; they have no end of turn (column `rejected_finished`).
    forced: false leaves out chains whose answer the search forced with a prefix.
    solve_rate: only trees whose share of correct answers is in [low, high], neither too easy nor too hard.
    questions_of: only questions of this other dataset.
    size_of: as many rows as this other dataset at most, or with `size_in: tokens` as close to its completion tokens as
        whole rows allow; drawn by seed, one row of each tree before a second one.
    min_gap, min_visits: minimum difference of v/n between the siblings of a step pair, and minimum visits of each.
    label_above: a step of a process-reward row is labelled correct if its v/n exceeds this (0: any correct answer
        below it suffices).
    annotations: use of human annotations (`cotree view`) for SFT chains and the chosen sides of pairs. `drop_rejected`
        leaves out chains that any annotator rejects; `require_accept` keeps only those that one accepts and none
        rejects; `use_fixed` is `drop_rejected`, and replaces a chain by its newest corrected text if the verifier
        judges that correct.
    text: one thought per line (`plain`), thoughts in tags of their types (`tags`), or inside `<think>` (`think`).
    leave_out: thought types whose text is removed.
    reflections: `keep` the wrong thinking before a reflection, or `cut` it and verify the chain again.
    max_tokens: longer rows (prompt included, student's tokens) are left out and counted, never truncated.
    tokenizer: the model whose tokens count; by default the recipe's only one with weights, or the students' own.
    license: hub license identifier for the dataset card.
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
        if self.annotations == "use_fixed":  # a corrected text is not split into thoughts
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
        """Whether settings change chain texts, so that the verifier must judge them again."""
        return self.reflections == "cut" or self.annotations == "use_fixed"

    @property
    def lengths(self) -> dict[Length, int]:
        """{relative length: weight} from `length` or its default."""
        if isinstance(self.length, dict):
            return self.length
        return {self.length or ("shortest" if self.rows == "dpo" else "longest"): 1}
