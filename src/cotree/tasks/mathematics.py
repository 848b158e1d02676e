r"""Mathematics with published answers: `gsm8k`, `math500`, `math` (for training), `aime24`, `aime25`.

Invariant: the prompt is the user's question, a newline, and "Please reason step by step, and put your final answer
within \boxed{}.": the `qwen-boxed` template of Qwen2.5-Math's evaluation (without its system line), which is also the
one that DeepSeek recommends for R1. An answer is right where math-verify says that it equals the gold one
(`math_verdicts.compare`). The worked examples are for the search only; their problems are our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from cotree.base.errors import UsageError
from cotree.tasks.base import Question, Verdict, WorkedExample
from cotree.tasks.benchmark import Benchmark
from cotree.tasks.extract import last_boxed
from cotree.tasks.loading import Row, Source, value
from cotree.tasks.math_verdicts import compare

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


def _example(question: str, sub_task: str, thinking: str, double_check: str, answer: str) -> WorkedExample:
    steps = {"sub_task": sub_task, "thinking": thinking, "double_check": double_check}
    return WorkedExample(f"{question}\n{INSTRUCTION}", steps, answer)


class Mathematics(Benchmark):
    """What the five have in common: the prompt, the fields of a row, the verdict."""

    examples: ClassVar[tuple[WorkedExample, ...]]

    def question(self, row: Row) -> Question:
        """A row of the hub or of a local file."""
        message = {"role": "user", "content": f"{value(row, 'problem', 'question')}\n{INSTRUCTION}"}
        family = str(row.get("subject") or row.get("type") or "")
        return Question(str(value(row, "unique_id", "id")), self.name, (message,), self._gold(row), family)

    def _gold(self, row: Row) -> str:
        return str(value(row, "answer")).strip()

    def verify(self, answer: str, question: Question) -> Verdict:
        """By math-verify; an answer that it cannot compare in the time and memory it gets is wrong, and says so."""
        correct, detail = compare(question.gold, answer)
        return Verdict("correct" if correct else "wrong", float(correct), answer, detail)

    def worked_examples(self, question: Question) -> Sequence[WorkedExample]:
        """The task's three, the same for every question."""
        return self.examples


class GSM8K(Mathematics):
    r"""`gsm8k`: grade-school word problems; the answer is a number (Cobbe et al. 2021).

    Prompt `gsm8k/boxed-1`, for an invented item of the same shape:

        Mia buys 4 packs of 6 pencils and gives 5 pencils to her brother. How many pencils does she keep?
        Please reason step by step, and put your final answer within \boxed{}.

    Rule: the gold is the number after `####`, 19 here; `\boxed{19}`, `\boxed{19.}`, `#### 19` and "The answer is 19."
    are correct, `\boxed{18}` is wrong, "She keeps 19 pencils." has no answer (`lenient` takes its last number, 19).
    """

    name = "gsm8k"
    description = "grade-school word problems; train and dev split too"
    prompt_version = "gsm8k/boxed-1"
    source = Source("gsm8k_test.jsonl", "openai/gsm8k", "MIT", 1319, ("main",), "test", "gsm8k-test-")
    training = Source("gsm8k_train_500.jsonl", "openai/gsm8k", "MIT", 7473, ("main",), "train", "gsm8k-train-")
    examples = (
        _example(
            "A florist ties 9 roses into each bouquet. She makes 7 bouquets and has 4 roses left. "
            "How many roses did she start with?",
            "I find the roses in the bouquets, then add those left.",
            "The bouquets hold 7 * 9 = 63 roses, and with the 4 left that is 63 + 4 = 67.",
            "67 - 4 = 63 and 63 / 9 = 7 bouquets, so 67 is right.",
            "67",
        ),
        _example(
            "Omar reads 15 pages on Monday and twice as many on Tuesday. His book has 120 pages. "
            "How many pages are left?",
            "I find what he read on Tuesday, add both days, and take that from 120.",
            "On Tuesday he reads 2 * 15 = 30 pages, so 15 + 30 = 45 in all, and 120 - 45 = 75 are left.",
            "45 + 75 = 120, so 75 is right.",
            "75",
        ),
        _example(
            "A taxi asks $3 to start and $2 for each mile. Lena pays $19. How many miles did she ride?",
            "I take the start price off and divide by the price of a mile.",
            "Without the start price it is 19 - 3 = 16 dollars, and 16 / 2 = 8 miles.",
            "3 + 8 * 2 = 19, so 8 is right.",
            "8",
        ),
    )

    def _gold(self, row: Row) -> str:
        # The hub's `answer` is the solution, which ends with the number after the hashes.
        return super()._gold(row).rpartition("####")[2].strip().replace(",", "")


class MATH500(Mathematics):
    r"""`math500`: 500 competition problems of the MATH test set (Hendrycks et al. 2021; choice: Lightman et al. 2023).

    Prompt `math500/boxed-1`, for an invented item of the same shape:

        What is the smallest value of $x^2 - 6x + 13$ for real $x$?
        Please reason step by step, and put your final answer within \boxed{}.

    Rule: the gold is `4`; `\boxed{4}`, `\boxed{\frac{8}{2}}` and "The answer is $4$." are correct, `\boxed{13}` is
    wrong. Units and degree signs do not count, `10\%` is `10` and `0.1`, sets have no order, tuples have one.
    """

    name = "math500"
    description = "competition mathematics with LaTeX answers"
    prompt_version = "math500/boxed-1"
    source = Source("math500.jsonl", "HuggingFaceH4/MATH-500", "MIT", 500, (), "test")
    examples = (
        _example(
            "Solve $\\frac{x}{3} + \\frac{1}{2} = 2$ for $x$.",
            "I bring the constant to the right, then multiply.",
            "$\\frac{x}{3} = 2 - \\frac{1}{2} = \\frac{3}{2}$, so $x = \\frac{9}{2}$.",
            "$\\frac{9}{2} \\cdot \\frac{1}{3} + \\frac{1}{2} = \\frac{3}{2} + \\frac{1}{2} = 2$, as it should be.",
            "\\frac{9}{2}",
        ),
        _example(
            "For which real $x$ is $x^2 - 4x < 0$? Give the answer as an interval.",
            "I factor and look at the signs between the roots.",
            "$x^2 - 4x = x(x - 4)$ is negative where exactly one factor is, that is for $0 < x < 4$.",
            "At $x = 1$ it is $-3 < 0$, at $x = 5$ it is $5 > 0$, and at the ends it is $0$, so the interval is open.",
            "(0,4)",
        ),
        _example(
            "Two fair dice are rolled. What is the probability that the sum is 10?",
            "I count the pairs with sum 10 among all pairs.",
            "The pairs are $(4,6), (5,5), (6,4)$, so $3$ of $36$, which is $\\frac{1}{12}$.",
            "No other pair of numbers up to 6 has the sum 10, and $3/36 = 1/12$.",
            "\\frac{1}{12}",
        ),
    )


_SUBJECTS = "algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra precalculus"


class MATHTraining(Mathematics):
    r"""`math`: MATH problems for search and training; splits train and dev. Prompt and rule are those of `math500`.

    The hub's rows are MATH's own train set. The file `math_train_500.jsonl` has problems of MATH's *test* set that are
    not in MATH500: after training on them report MATH500, never a score on the full MATH test set.
    """

    name = "math"
    description = "competition mathematics for training; evaluate on math500"
    prompt_version = "math/boxed-1"
    source = training = Source(
        "math_train_500.jsonl",
        "EleutherAI/hendrycks_math",
        "MIT",
        7500,
        tuple(_SUBJECTS.split()),
        "train",
        "math-train-",
    )
    examples = MATH500.examples

    def _gold(self, row: Row) -> str:
        gold = row.get("answer") or last_boxed(value(row, "solution"))
        if gold is None:
            raise UsageError("a row of `math` has neither an `answer` nor a \\boxed{} in its `solution`")
        return str(gold).strip()


class AIME24(Mathematics):
    r"""`aime24`: the 30 problems of AIME 2024 I and II; answers are integers from 0 to 999.

    Prompt `aime24/boxed-1`, for an invented item of the same shape:

        Find the number of positive integers less than $100$ that are divisible by $3$ but not by $9$.
        Please reason step by step, and put your final answer within \boxed{}.

    Rule: the gold is `22`; `\boxed{22}` and `\boxed{022}` are correct, `\boxed{33}` is wrong.
    """

    name = "aime24"
    description = "AIME 2024 I and II; integers from 0 to 999"
    prompt_version = "aime24/boxed-1"
    source = Source("aime_2024.jsonl", "HuggingFaceH4/aime_2024", "problems: MAA", 30)
    examples = MATH500.examples


class AIME25(AIME24):
    """`aime25`: the 30 problems of AIME 2025 I and II. Prompt (`aime25/boxed-1`) and rule are those of `aime24`."""

    name = "aime25"
    description = "AIME 2025 I and II; integers from 0 to 999"
    prompt_version = "aime25/boxed-1"
    source = Source("aime_2025.jsonl", "math-ai/aime25", "problems: MAA", 30)
