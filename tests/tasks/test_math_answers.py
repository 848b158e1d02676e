r"""Spellings of right and wrong mathematical answers, as models and graders' test suites have them."""

from __future__ import annotations

import pytest

import cotree
from cotree.tasks import Question

CORRECT = [
    # LaTeX's spaces are spaces.
    ("(3,5)", r"\boxed{(3,\ 5)}"),
    ("1,-2", r"\boxed{-2,\ 1}"),
    ("1,2", r"\boxed{x = 1\ \text{or}\ x = 2}"),
    (r"\{1,2,3\}", r"\boxed{\{1,\ 2,\ 3\}}"),
    ("90", r"\boxed{90\ ^\circ}"),
    # Groups of digits.
    ("12345", "\\boxed{12\u202f345}"),
    ("12345", r"\boxed{12\;345}"),
    ("12345", r"\boxed{12'345}"),
    ("12345", r"\boxed{12{,}345}"),
    (r"11,\! 111,\! 100", r"\boxed{11111100}"),
    ("12345", r"\boxed{12.345 thousand}"),
    # Forms of one number.
    (r"\frac{40}{9}", r"\boxed{4 4/9}"),
    (r"\frac{3}{2}", r"\boxed{1\tfrac{1}{2}}"),
    ("0.5", r"\boxed{½}"),
    ("300000000", r"\boxed{3e8}"),
    (r"3 \times 10^8", r"\boxed{3e8}"),
    (r"\frac{1}{3}", r"\boxed{0.\overline{3}}"),
    ("1101_2", r"\boxed{(1101)_2}"),
    (r"\sqrt{2}", r"\boxed{√2}"),
    (r"3\sqrt{3}", r"\boxed{3√3}"),
    (r"\sqrt[3]{2}", r"\boxed{∛2}"),
    ("2∛(x+1)", r"\boxed{2\sqrt[3]{x+1}}"),
    (r"\sqrt[4]{12}", r"\boxed{∜12}"),
    (r"\sqrt5", r"\boxed{5^{0.5}}"),
    ("5^{.5}", r"\boxed{\sqrt5}"),
    (r"\sqrt{5}", r"\boxed{5^0.5}"),
    (r"\sqrt[4]{8}", r"\boxed{2^{0.75}}"),
    (r"\frac{1}{\sqrt{x}}", r"\boxed{x^{-0.5}}"),
    (r"\frac{\pi}{4}", r"\boxed{pi/4}"),
    (r"2\pi", r"\boxed{2*pi}"),
    ("e", r"\boxed{\text{e}}"),
    (r"2+\mathrm{i}", r"\boxed{2+i}"),
    ("1+2i", r"\boxed{i(2-i)}"),
    # Percentages.
    (r"25\%", r"\boxed{0.25}"),
    ("0.25", r"\boxed{25\%}"),
    (r"33\frac{1}{3}\%", r"\boxed{\frac{1}{3}}"),
    # Approximations.
    ("0.333", r"\boxed{\frac{1}{3}}"),
    ("1.414", r"\boxed{\sqrt{2}}"),
    (r"x \approx 3.1", r"\boxed{3.14}"),
    # Units.
    ("10", r"\boxed{10 cm^2}"),
    ("10", r"\boxed{10 m/s}"),
    ("70", r"\boxed{70 km/h}"),
    (r"9\pi", r"\boxed{9\pi cm^3}"),
    (r"2\sqrt{3}", r"\boxed{2\sqrt{3}\text{ cm}}"),
    # Sets and relations.
    ("[0,1)", r"\boxed{0 \le x < 1}"),
    (r"(-\infty,-1)\cup(1,\infty)", r"\boxed{x<-1 \text{ or } x>1}"),
    (r"(1,\infty)", r"\boxed{(1,∞)}"),
    (r"\emptyset", r"\boxed{\varnothing}"),
    (r"x^2+y^2=4", r"\boxed{x^2+y^2-4=0}"),
    # Words and choices.
    ("A", r"\boxed{A)}"),
    (r"\text{(C)}", r"\boxed{C}"),
    (r"\text{June 20}", r"\boxed{June 20}"),
    (r"\text{no solution}", r"\boxed{No solution}"),
    # Where the answer stands.
    ("1,2", r"\boxed{1} and \boxed{2}"),
    ("1,2", r"so $x = \boxed{1}$ or $x = \boxed{2}$."),
    ("7", r"\boxed{7\\}"),
    ("0.5", "The answer is .5"),
    ("-12", "The answer is −12."),
    ("12", "The answer is 1 + 11 = 12."),
    ("12", "\\boxed{12}<|im_end|>\n<|im_start|>user\nAnd \\boxed{13}?"),
    # Other spellings of the same kinds.
    ("-2,1", r"\boxed{1 or -2}"),
    (r"\frac12,-2", r"\boxed{-2 \text{ or } \frac12}"),
    ("19, 46, 82", r"\boxed{19, 46, \text{ and } 82}"),
    ("(1,2),(3,4)", r"\boxed{\{(1,2),(3,4)\}}"),
    ("100, 200", r"\boxed{200, 100}"),
    ("100, 200", r"\boxed{100 \text{ and } 200}"),
    (r"\frac{5}{8}", r"\boxed{⅝}"),
    ("x^{10}", r"\boxed{x¹⁰}"),
    ("10^{-7}", r"\boxed{10⁻⁷}"),
    ("300000000", r"\boxed{3 x 10^8}"),
    (r"\frac{1}{3}", r"\boxed{0.\bar{3}}"),
    (r"\frac{1}{6}", r"\boxed{0.1(6)}"),
    ("1.5\\text{ million}", r"\boxed{1500000}"),
    ("0.1", r"\boxed{10 percent}"),
    ("0.1", r"\boxed{10 pct}"),
    ("40/900", r"\boxed{4 4/9percentage}"),
    ("2.75", r"\boxed{2,75}"),
    ("37", r"\boxed{37^\circ C}"),
    ("10", r"\boxed{\text{10 apples}}"),
    ("50", r"\boxed{50 miles/hour}"),
    ("5", r"\boxed{\text{The answer is 5}}"),
    ("5", r"\boxed{\textcolor{red}{5}}"),
    (r"\ln 2", r"\boxed{\log_e 2}"),
    (r"\sin x", r"\boxed{\operatorname{sin} x}"),
    ("[0,9)", r"\boxed{x \ge 0 \text{ and } x < 9}"),
    (r"x<-1 \text{ or } x>1", r"\boxed{(-\infty,-1)\cup(1,\infty)}"),
    ("-1<x<1", r"\boxed{|x|<1}"),
    ("A", r"\boxed{\textbf{(A)}\ 12}"),
    (r"\textbf{(B)}\ 12", r"\boxed{B}"),
    ("A", r"\boxed{\text{Choice A}}"),
    ("1,2", r"\boxed{1} \quad \text{and} \quad \boxed{2}"),
    ("3,4", r"\boxed{3} apples and \boxed{4} pears"),
    ("12", "\\boxed{12}<|start_header_id|>user<|end_header_id|>And \\boxed{13}?"),
    # The whole of a value without delimiters, not its first number.
    (r"2\pi", "The answer is 2π."),
    (r"2\sqrt3", "The answer is 2√3."),
    (r"3\sqrt2", "The answer is 3√2 cm."),
    ("1.5", "The answer is 1½."),
    (r"\frac43", "The answer is 1 ⅓."),
    ("2.5", "The answer is 2 1/2."),
    ("25", "The answer is 5²."),
    ("1000000", "The answer is 10⁶."),
    ("120", "The answer is 5!"),
    ("12", "The answer is **12**!"),
    ("12000000", "The answer is 12 million."),
    ("144", "The answer is 12 dozen eggs."),
    ("12345", "The answer is 12\u00a0345."),
    ("12345", "The answer is 12\u202f345."),
    ("1000", "The answer is 1'000."),
    ("3,4", "The answer is 3 or 4."),
    ("3,4", "The answer is 3 and 4."),
    ("3,4", r"The answer is \(3\) or \(4\)."),
    ("3,4", "答案是3或4。"),
    ("3,4", "答案是3、4。"),
    ("5,6", "The answer is $5 or $6."),
    ("(5,7)", "The answer is 5 < x < 7."),
    ("[5,7]", "The answer is 5 ≤ x ≤ 7."),
    ("[5,7]", r"The answer is 5 \le x \le 7."),
    ("2:1", "The answer is 2:1."),
    ("0.25", "The answer is 25%."),
    ("-5", "The answer is –5."),
    ("5", "The answer is about 5."),
    ("5", "The answer is 5 apples."),
    ("12", "The answer is 12 cm"),
    ("70", "The answer is 70 km/h."),
    ("1234", "The answer is 1,234"),
    ("37", "The answer is 37°C."),
    ("12", "The answer is 12 because 3 + 9 = 12."),
    ("12", "The answer is 12 – the sum of all."),
    ("12", "The answer is 12 to 2 decimal places."),
    # Words that multiply a number, and units.
    ("3/2", r"\boxed{3 halves}"),
    ("2/3", r"\boxed{2\text{ thirds}}"),
    ("1/3", r"\boxed{1 third}"),
    ("1.5", r"\boxed{1\text{ and a half}}"),
    (r"5\pi", r"\boxed{5\text{ pi}}"),
    ("3", r"\boxed{3 third graders}"),
    ("5", r"\boxed{5 more apples}"),
    ("3", r"\boxed{3 times}"),
    ("10", r"\boxed{10 meters squared}"),
    ("5", r"\boxed{5 square meters}"),
    ("3", r"\boxed{3 hours}"),
    ("10", r"\boxed{10\text{ cm}^2}"),
    ("9.8", r"\boxed{9.8\text{ m}/\text{s}^2}"),
    (r"5\text{ or more}", r"\boxed{5 or more}"),
]
WRONG = [
    ("2", r"x = \boxed{1} or x = \boxed{2}"),
    (r"\frac1{2^{99}}", r"\boxed{\frac1{2^{98}}}"),
    (r"\frac{1}{20!}", r"\boxed{\frac{1}{21!}}"),
    ("0.1", r"\boxed{0.1000001}"),
    ("0.0000001", r"\boxed{0.0000002}"),
    ("0.333", r"\boxed{0.33}"),
    ("3.14", r"\boxed{\pi}"),
    (r"1+\frac1{\mathrm e}", r"\boxed{1-\frac1{\mathrm e}}"),
    (r"\{0,9\}", r"\boxed{(0,9)}"),
    ("(0,9)", r"\boxed{\{0,9\}}"),
    ("10", r"\boxed{1000\%}"),
    (r"25\%", r"\boxed{2500}"),
    ("(1,2)", r"\boxed{(2,\ 1)}"),
    (r"\text{odd}", r"\boxed{even}"),
    (r"\text{June 20}", r"\boxed{July 20}"),
    ("x>3", r"\boxed{x \ge 3}"),
    ("204_5", r"\boxed{204_6}"),
    ("7", r"\boxed{7x}"),
    ("12.345", r"\boxed{12,345}"),
    ("12345", r"\boxed{12'34'5}"),
    ("12345", r"\boxed{123'45}"),
    (r"\sqrt{2}", r"\boxed{∛2}"),
    (r"\sqrt5", r"\boxed{5^{0.51}}"),
    (r"\sqrt5", r"\boxed{5^{0.6}}"),
    ("32349", r"\boxed{32, 349}"),
    ("100, 200", r"\boxed{100200}"),
    ("(1,2),(3,4)", r"\boxed{\{(1,2),(4,3)\}}"),
    (r"x<-1 \text{ or } x>1", r"\boxed{x<-1 \text{ or } x \ge 1}"),
    ("A", r"\boxed{(A) and (B)}"),
    ("A", r"\boxed{(B) 12}"),
    ("10", r"\boxed{\text{10 apples and 3 pears}}"),
    ("12", r"\boxed{\text{12 million}}"),
    ("2", r"$\boxed{1}$, $\boxed{2}$, and $\boxed{3}$"),
    # More than the first number of the answer.
    ("5", r"\boxed{5 or more}"),
    ("5", r"\boxed{5\text{ or more}}"),
    ("3", r"\boxed{3 halves}"),
    ("2", r"\boxed{2 thirds}"),
    ("1", r"\boxed{1 half}"),
    ("5", r"\boxed{5 squared}"),
    ("5", r"\boxed{5\text{ squared}}"),
    ("5", r"\boxed{5 plus}"),
    ("2", r"\boxed{2 plus three}"),
    ("2", r"\boxed{2\text{ pi}}"),
    ("1", r"\boxed{1\text{ and a half}}"),
    ("12", r"\boxed{12\text{ (or } 13)}"),
    ("12", r"\boxed{12\text{ when }n\text{ is even}}"),
    ("5", r"\boxed{5\text{ not }}"),
    ("6", r"\boxed{6\text{ feet }3\text{ inches}}"),
    ("2", r"\boxed{2\text{ hours }30\text{ minutes}}"),
]


def verdict(gold: str, response: str) -> str:
    return cotree.task("math500").judge(Question("q", "math500", (), gold), response).kind


@pytest.mark.parametrize(("gold", "response"), CORRECT)
def test_a_right_answer_is_correct_however_it_is_written(gold: str, response: str) -> None:
    assert verdict(gold, response) == "correct"


@pytest.mark.parametrize(("gold", "response"), WRONG)
def test_what_only_looks_like_the_gold_answer_is_wrong(gold: str, response: str) -> None:
    assert verdict(gold, response) == "wrong"


@pytest.mark.parametrize(
    "answer",
    [
        *("2π", "2√3", "3√2 cm", "1½", "1 ⅓", "5²", "5!", "12 million", "12 dozen", "5 mod 7", "6 feet 3 inches"),
        *("3 or 4", "3 and 4", "3 o 4", "3 или 4", "3 à 4", "3或4", "$3 or $4", "$3$ or $4$", r"\(3\) or \(4\)"),
        *("12 to 15", "12–15", "5 < x < 7", "5 ≤ x", r"5 \le x \le 7", "12:30", "12\u00a0345", "1'000", "2 1/2"),
        *("5 x 10^3", "5 or more", "5 ± 1", "3、4", "3 halves", "2 plus 3", "$3$ million", "1 and a half"),
    ],
)
def test_the_first_number_of_a_longer_value_is_not_the_answer(answer: str) -> None:
    for first in ("1", "2", "3", "5", "6", "12"):
        assert verdict(first, f"The answer is {answer}.") in ("wrong", "no_answer")


@pytest.mark.parametrize(
    "gold", ["proof", "N/A", "", '{"answer": 4}', "See the solution.", r"\text{N/A}", "[]", "no answer", "?"]
)
def test_a_gold_that_cannot_be_compared_with_makes_no_answer_wrong(gold: str) -> None:
    assert verdict(gold, r"\boxed{4}") == "undecided"
    assert verdict(gold, "I do not know.") == "undecided"
