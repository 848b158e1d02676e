"""Probes on a student that really forgets to answer: what they report, when they stop a run, whom they keep."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.tiny_student import message, same, sft_row, weights
from transformers import AutoTokenizer

from cotree.base.errors import CotreeError
from cotree.base.progress import Output, Update
from cotree.base.rows import read_rows
from cotree.train.callback import WINDOW, StepLog, best_step, chosen_falls, no_answer_rises, plot_steps
from cotree.train.model import load_model, probe_answers
from cotree.train.rows import encode_file
from cotree.train.run import TrainResult, train
from cotree.train.settings import SFT, LoRA, Probe

PROBE = Probe(every=1, questions=2, max_tokens=32)
# At this rate two epochs make a student that answers into one that goes on and on.
FORGETS = SFT(batch_size=2, epochs=2, learning_rate=1e-2, save_steps=3, probe=PROBE)


def rows(text: str, path: Path) -> Path:
    table = [sft_row(index) | {"completion": message("assistant", text)} for index in range(8)]
    pq.write_table(pa.Table.from_pylist(table), path)
    return path


@pytest.fixture(scope="module")
def answering(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student that answers every question."""
    folder = tmp_path_factory.mktemp("answering")
    learns = SFT(batch_size=8, epochs=16, learning_rate=1e-2)
    train(
        "sft",
        rows("The answer is: \\boxed{7}", folder / "rows.parquet"),
        student,
        folder / "run",
        settings=learns,
        seed=0,
    )
    return folder / "run" / "model"


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that teach not to answer."""
    return rows("So on and on " * 9, tmp_path_factory.mktemp("endless") / "rows.parquet")


@pytest.fixture(scope="module")
def whole(answering: Path, endless: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainResult, Path]:
    """A run that was not interrupted and kept its best student."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return train("sft", endless, answering, out, settings=changed(keep="best"), seed=0), out


def changed(**probe: Any) -> SFT:
    return FORGETS.model_copy(update={"probe": PROBE.model_copy(update=probe)})


def test_a_probe_reports_also_at_the_end_and_changes_nothing(student: Path, sft_rows: Path, tmp_path: Path) -> None:
    logs: list[StepLog] = []
    settings = SFT(batch_size=3, learning_rate=1e-2, probe=Probe(every=2, questions=2, max_tokens=6))
    train("sft", sft_rows, student, tmp_path / "run", settings=settings, seed=0, on_step=logs.append)
    assert ["probe_no_answer" in log.metrics for log in logs] == [True, False, True, True]
    assert all(0 < log.metrics["probe_tokens"] <= 6 for log in logs if "probe_tokens" in log.metrics)
    train("sft", sft_rows, student, tmp_path / "plain", settings=settings.model_copy(update={"probe": None}), seed=0)
    assert same(weights(tmp_path / "run"), weights(tmp_path / "plain"))


def test_a_rising_no_answer_ratio_stops_where_asked(answering: Path, endless: Path, tmp_path: Path) -> None:
    logs: list[StepLog] = []
    result = train(
        "sft", endless, answering, tmp_path / "run", settings=changed(stop_rise=0.4), seed=0, on_step=logs.append
    )
    assert 1 < result.steps == len(logs) < logs[0].total_steps
    ratios = [log.metrics["probe_no_answer"] for log in logs]
    assert ratios[-1] > 0.4 > max(ratios[:-1])
    assert logs[-1].warning == f"no_answer_rises: by {ratios[-1]:.2f} since the first probe; training stops here"
    assert not any(log.warning for log in logs[:-1])
    assert (tmp_path / "run" / "model").exists()


def test_a_run_that_was_to_stop_stops_again_after_a_crash(answering: Path, endless: Path, tmp_path: Path) -> None:
    settings = changed(stop_rise=0.4).model_copy(update={"save_steps": 1})
    whole = train("sft", endless, answering, tmp_path / "whole", settings=settings, seed=0)

    (tmp_path / "run" / "result.json").mkdir(parents=True)  # so that what was trained cannot be stored
    with pytest.raises(CotreeError, match="cannot write"):
        train("sft", endless, answering, tmp_path / "run", settings=settings, seed=0)
    (tmp_path / "run" / "result.json").rmdir()
    resumed = train("sft", endless, answering, tmp_path / "run", settings=settings, seed=0)
    assert (resumed.steps, resumed.tokens) == (whole.steps, whole.tokens)
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


@pytest.mark.parametrize("lora", [None, LoRA(rank=8, alpha=64)])
def test_the_best_student_of_the_probes_is_kept_where_asked(
    lora: LoRA | None, answering: Path, endless: Path, tmp_path: Path
) -> None:
    last, best = (changed(keep=keep).model_copy(update={"lora": lora}) for keep in ("last", "best"))
    logs: list[StepLog] = []
    ended = train("sft", endless, answering, tmp_path / "last", settings=last, seed=0, on_step=logs.append)
    kept = train("sft", endless, answering, tmp_path / "best", settings=best, seed=0)
    ratios = [log.metrics["probe_no_answer"] for log in logs]
    answered = max(step for step, ratio in enumerate(ratios, 1) if ratio == min(ratios))
    assert (ended.steps, ended.kept) == (8, 8)
    assert (kept.steps, kept.kept) == (8, answered)
    assert 1 < answered < 8
    tokenizer = AutoTokenizer.from_pretrained(answering)
    encoded = encode_file(endless, tokenizer, last).rows
    prompts = list({tuple(row.prompt): row.prompt for row in encoded}.values())
    for out, step in (("last", 8), ("best", answered)):
        found = probe_answers(load_model(tmp_path / out / "model"), tokenizer, prompts, PROBE)
        assert found["probe_no_answer"] == ratios[step - 1]
    assert ratios[7] > ratios[answered - 1]


def test_a_probe_in_batches_is_one_of_single_prompts(answering: Path, endless: Path) -> None:
    """Prompts of several lengths, more of them than a batch holds, and replies that end at several places."""
    tokenizer, model = AutoTokenizer.from_pretrained(answering), load_model(answering)
    prompts = [row.prompt for row in encode_file(endless, tokenizer, FORGETS).rows]
    prompts = [prompt[cut:] for prompt in prompts[:4] for cut in (0, 3, 7)]
    settings = Probe(questions=11, max_tokens=40)
    singles = [probe_answers(model, tokenizer, [prompt], settings) for prompt in prompts[:11]]
    assert len({single["probe_tokens"] for single in singles}) > 1
    mean = {key: fmean(single[key] for single in singles) for key in singles[0]}
    assert probe_answers(model, tokenizer, prompts, settings) == pytest.approx(mean)


@pytest.mark.parametrize("stopped", [2, 5, 8])
def test_what_is_kept_survives_a_stop_bit_for_bit(
    stopped: int,
    answering: Path,
    endless: Path,
    whole: tuple[TrainResult, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before, at and after the best step; and the run's folder may be named otherwise when it goes on."""

    def stop(log: StepLog) -> None:
        if log.step == stopped:
            raise KeyboardInterrupt

    settings, (result, uninterrupted) = changed(keep="best"), whole
    with pytest.raises(KeyboardInterrupt):
        train("sft", endless, answering, tmp_path / "run", settings=settings, seed=0, on_step=stop)
    stored = {int(path.name.split("-")[1]) for path in (tmp_path / "run" / "trainer").iterdir()}
    assert len(stored) <= 4  # the last two, and the best as of each
    assert (result.kept in stored) == (stopped > result.kept)
    (tmp_path / "run").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    resumed = train("sft", endless, answering, Path("moved"), settings=settings, seed=0)
    assert resumed.kept == result.kept
    assert same(weights(Path("moved")), weights(uninterrupted))
    assert sorted(path.name for path in Path("moved").iterdir()) == ["log.jsonl", "model", "result.json"]


def test_a_best_student_that_is_damaged_before_the_end_is_one_line_and_made_again(
    answering: Path, endless: Path, whole: tuple[TrainResult, Path], tmp_path: Path
) -> None:
    settings, (result, uninterrupted) = changed(keep="best"), whole
    best = tmp_path / "run" / "trainer" / f"checkpoint-{result.kept}" / "model.safetensors"

    def harm(log: StepLog) -> None:
        if log.step == 8:
            content = best.read_bytes()
            best.write_bytes(content[:-1] + bytes([content[-1] ^ 4]))

    with pytest.raises(CotreeError, match=rf"checkpoint-{result.kept} is damaged \(.*; run the same command again"):
        train("sft", endless, answering, tmp_path / "run", settings=settings, seed=0, on_step=harm)
    output = Recorder()
    resumed = train("sft", endless, answering, tmp_path / "run", settings=settings, seed=0, output=output)
    assert all(f"(checkpoint-{result.kept}/model.safetensors has other content" in line for line in output.lines)
    assert output.lines
    assert resumed.kept == result.kept
    assert same(weights(tmp_path / "run"), weights(uninterrupted))


class Recorder(Output):
    """Keeps what a run prints and shows."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.remarks: list[str] = []

    def print(self, line: object = "") -> None:
        self.lines.append(str(line))

    @contextmanager
    def progress(self, title: str) -> Iterator[Update]:
        yield lambda done, total, remark: self.remarks.append(f"{title} {done}/{total} {remark}")


def test_warnings_are_printed_and_metrics_shown_while_it_trains(answering: Path, endless: Path, tmp_path: Path) -> None:
    output = Recorder()
    with output.progress("sft steps") as update:
        settings = changed(every=2, stop_rise=0.4)
        show = plot_steps("sft", update, output)
        train("sft", endless, answering, tmp_path / "run", settings=settings, seed=0, on_step=show)
    log = list(read_rows(tmp_path / "run" / "log.jsonl"))
    (stopped,) = (line for line in log if line.get("warning"))
    assert f"  warning at sft step {stopped['step']}: {stopped['warning']}" in output.lines
    assert len(output.remarks) == len(log)
    assert re.sub(r" +[▁-█]*\n?", " ", output.remarks[1]).strip() == (  # the probe's figures stay until the next one
        f"sft steps 2/8 loss {log[1]['loss']:.3g} probe_tokens {log[0]['probe_tokens']:.3g} "
        f"probe_loop {log[0]['probe_loop']:.3g} probe_no_answer {log[0]['probe_no_answer']:.3g}"
    )


def test_a_training_is_plotted_while_it_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cotree.base.progress._PLAIN_SECONDS", 0.0)
    output = Output()
    with output.progress("dpo steps") as update:
        show = plot_steps("dpo", update, output)
        show(StepLog(1, 3, 1.5, {"margin": 0.0, "probe_no_answer": 0.5, "tokens": 9}))
        show(StepLog(2, 3, 1.25, {"margin": 0.5}))
        show(StepLog(3, 3, 1.0, {"margin": 0.25}, "chosen_falls: lower learning_rate"))
    *_, last, warning = capsys.readouterr().out.splitlines()
    assert last == "  dpo steps 3/3  loss 1 █▅▁, margin 0.25 ▁█▅, probe_no_answer 0.5 ▁"
    assert warning == "  warning at dpo step 3: chosen_falls: lower learning_rate"


ratio = st.sampled_from([0.0, 0.5, 1.0])


@given(probed=st.lists(st.tuples(ratio, ratio, st.integers(1, 3)), min_size=1, max_size=9), stop=ratio)
def test_the_best_step_and_the_rise_are_those_of_the_definition(
    probed: list[tuple[float, float, int]], stop: float
) -> None:
    history: list[dict[str, Any]] = []
    for no_answer, loop, pause in probed:
        history += [{"step": len(history) + 1 + at, "loss": 1.0} for at in range(pause)]
        history[-1] |= {"probe_no_answer": no_answer, "probe_loop": loop}
    best = next(entry for entry in history if entry["step"] == best_step(history))
    for entry in history:
        if "probe_loop" in entry:
            mine, other = ((each["probe_no_answer"], each["probe_loop"]) for each in (best, entry))
            assert mine < other or (mine == other and best["step"] >= entry["step"])
    warned = no_answer_rises(history, stop)
    assert (warned is not None) == (probed[-1][0] - probed[0][0] > stop)


def test_falling_chosen_chains_are_named() -> None:
    falling = [{"chosen_reward": -0.1 * at} for at in range(WINDOW)]
    assert (chosen_falls(falling) or "").startswith("chosen_falls: over the last 10 steps")
    assert chosen_falls(falling[1:]) is None
    assert chosen_falls([{"chosen_reward": 0.1}] * WINDOW) is None
    assert chosen_falls([{"loss": 1.0}] * WINDOW) is None
