r"""Mathematics with published answers: `gsm8k`, `math500`, `math` (for training), `aime24`, `aime25`.

The prompt is the user's question, a newline, and "Please reason step by step, and put your final answer within
\boxed{}.": the `qwen-boxed` template of Qwen2.5-Math's evaluation (without its system line), which DeepSeek recommends
for R1 too. An answer is correct where math-verify says that it equals the gold one (`math_verdicts`).
"""

from __future__ import annotations

from collections.abc import Sequence

from cotree.base.errors import UsageError
from cotree.base.rows import Row
from cotree.tasks.base import Question, Verdict, WorkedExample, user_prompt
from cotree.tasks.benchmark import Benchmark, shipped_examples
from cotree.tasks.extract import last_boxed
from cotree.tasks.loading import Source, field_value
from cotree.tasks.math_verdicts import check_math_answer, gold_problem

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


class Mathematics(Benchmark):
    """Base class of the mathematics tasks: prompt, row fields, verifier.

    examples_section: section of `worked_examples.yaml` with their worked examples.
    """

    examples_section = "competition"

    def question(self, row: Row) -> Question:
        """The question of a row of the hub or of a local file."""
        prompt = user_prompt(f"{field_value(row, 'problem', 'question')}\n{INSTRUCTION}")
        family = str(row.get("subject") or row.get("type") or "")
        return Question(str(field_value(row, "unique_id", "id")), self.name, prompt, self._gold(row), family=family)

    def _gold(self, row: Row) -> str:
        return str(field_value(row, "answer")).strip()

    def verify(self, answer: str, question: Question) -> Verdict:
        """Verify with math-verify; undecided if the comparison exceeds its time or memory limit."""
        correct, detail = check_math_answer(question.gold, answer)
        return Verdict.of(correct, answer, detail)

    def _gold_problem(self, question: Question) -> str:
        return gold_problem(question.gold)

    def worked_examples(self, question: Question) -> Sequence[WorkedExample]:
        """Three examples, the same for every question of the task."""
        return shipped_examples(self.examples_section, f"{{question}}\n{INSTRUCTION}")


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
    examples_section = "gsm8k"

    def _gold(self, row: Row) -> str:
        # On the hub, `answer` is the whole solution, which ends with the number after `####`.
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
    source = Source("math500.jsonl", "HuggingFaceH4/MATH-500", "MIT", 500, split="test")


_SUBJECTS = "algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra precalculus"
_CONFIGS = tuple(_SUBJECTS.split())


class MATHTraining(Mathematics):
    r"""`math`: MATH problems for search and training; splits train and dev. Prompt and rule are those of `math500`.

    The hub's rows are MATH's own train set. The file `math_train_500.jsonl` has problems of MATH's *test* set that are
    not in MATH500: after training on them report MATH500, never a score on the full MATH test set.
    """

    name = "math"
    description = "competition mathematics for training; evaluate on math500"
    prompt_version = "math/boxed-1"
    source = training = Source(
        "math_train_500.jsonl", "EleutherAI/hendrycks_math", "MIT", 7500, _CONFIGS, "train", "math-train-"
    )

    def _gold(self, row: Row) -> str:
        gold = row.get("answer") or last_boxed(field_value(row, "solution"))
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


class AIME25(AIME24):
    """`aime25`: the 30 problems of AIME 2025 I and II. Prompt (`aime25/boxed-1`) and rule are those of `aime24`."""

    name = "aime25"
    description = "AIME 2025 I and II; integers from 0 to 999"
    prompt_version = "aime25/boxed-1"
    source = Source("aime_2025.jsonl", "math-ai/aime25", "problems: MAA", 30)


MATHEMATICS = (GSM8K, MATH500, MATHTraining, AIME24, AIME25)
