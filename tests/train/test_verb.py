"""`cotree train`: own rows and an own student, resumed by the same command; other settings lose nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.support.tiny_student import dpo_row, same, sft_row, tiny_model, tiny_tokenizer, weights, write_tiny_gguf
from transformers import AutoModelForCausalLM

from cotree.base.errors import UsageError
from cotree.base.progress import Output, Update
from cotree.cli import main
from cotree.train import verb
from cotree.train.verb import train_rows

SETTINGS = ["batch_size=4", "epochs=2", "learning_rate=1e-3", "save_steps=2"]


class Recorder(Output):
    """Keeps what is printed and which steps are shown; Ctrl-C comes at step `stop`."""

    def __init__(self, stop: int = 0) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.steps: list[int] = []
        self.stop = stop

    def print(self, line: object = "") -> None:
        self.lines.append(str(line))

    @contextmanager
    def progress(self, title: str) -> Iterator[Update]:
        def update(done: int, total: int, remark: str) -> None:
            self.steps.append(done)
            if done == self.stop:
                raise KeyboardInterrupt

        yield update


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of rows in a working directory with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(sft_row(index)) + "\n" for index in range(11)))
    return path


def test_the_same_command_trains_resumes_and_is_done(student: Path, rows: Path, tmp_path: Path) -> None:
    whole = train_rows("sft", student, rows, Path("whole"), overrides=SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        train_rows("sft", student, rows, Path("trained"), overrides=SETTINGS, output=Recorder(stop=3))
    resumed = Recorder()
    result = train_rows("sft", student, rows, Path("trained"), overrides=SETTINGS, output=resumed)
    assert resumed.steps == [3, 4, 5, 6]
    said = r"trained/model: sft, 6 steps on 11 rows, [\d.]+ s, \d\.\d GB of memory at the peak"
    assert re.fullmatch(said, resumed.lines[-1]) and 10**8 < result.peak_bytes < 10**10
    assert same(weights(Path("trained")), weights(Path("whole")))
    assert (result.steps, result.tokens) == (whole.steps, whole.tokens)
    record = json.loads(Path("trained/node.json").read_text())
    assert record["done"]
    assert record["parts"]["settings"] == {"batch_size": 4, "epochs": 2.0, "learning_rate": 1e-3}
    assert record["resolved"] == {"precision": "fp32"}
    assert record["result"]["train"]["steps"] == 6

    again = Recorder()
    for change in ([], ["save_steps=5", "pack_tokens=100"]):  # how fast is no other training
        assert train_rows("sft", student, rows, Path("trained"), overrides=SETTINGS + change, output=again) == result
    assert again.steps == []
    assert again.lines == ["trained is done: this student on these rows with these settings"] * 2
    assert {path.name for path in Path.cwd().iterdir()} == {"whole", "trained"}


def test_what_becomes_of_a_training_whose_record_is_damaged_is_one_line(student: Path, rows: Path) -> None:
    out, told = Path("trained"), Recorder()
    first = train_rows("sft", student, rows, out, overrides=SETTINGS)
    (out / "node.json").write_bytes(b"\x00" * 20)
    assert train_rows("sft", student, rows, out, overrides=SETTINGS, output=told) == first
    fault = "trained: node.json is damaged; "
    assert told.lines[0] == f"{fault}taken for a training of this student on these rows with these settings"
    assert told.steps == []
    with pytest.raises(KeyboardInterrupt):
        train_rows("sft", student, rows, out, overrides=[*SETTINGS, "seed=1"], output=Recorder(stop=1))
    (out / "node.json").write_bytes(b"{")
    again = Recorder()
    train_rows("sft", student, rows, out, overrides=SETTINGS, output=again)
    assert again.lines[0] == f"{fault}moved to older/unknown" and again.steps == []
    assert (out / "older" / "unknown").is_dir()


def test_other_settings_keep_the_old_content_which_comes_back(student: Path, rows: Path) -> None:
    out = Path("trained")
    first = train_rows("sft", student, rows, out, overrides=SETTINGS)
    kept = weights(out)
    with pytest.raises(KeyboardInterrupt):
        train_rows("sft", student, rows, out, overrides=[*SETTINGS, "seed=1"], output=Recorder(stop=3))
    assert not (out / "model").exists()
    assert len(list((out / "older").iterdir())) == 1
    assert train_rows("sft", student, rows, out, overrides=SETTINGS) == first
    assert same(weights(out), kept)
    resumed = Recorder()
    train_rows("sft", student, rows, out, overrides=[*SETTINGS, "seed=1"], output=resumed)
    assert resumed.steps[0] == 3, "and what was begun goes on"
    assert not same(weights(out), kept)
    rows.write_text(rows.read_text().replace("Now", "So"))
    changed = Recorder()
    train_rows("sft", student, rows, out, overrides=SETTINGS, output=changed)
    assert changed.steps == [1, 2, 3, 4, 5, 6], "other rows are another training"
    assert len(list((out / "older").iterdir())) == 2


@pytest.mark.parametrize("back", [False, True])
def test_a_kill_while_content_is_moved_mixes_nothing(back: bool, student: Path, rows: Path) -> None:
    out = Path("trained")
    train_rows("sft", student, rows, out, overrides=SETTINGS)
    kept = weights(out)
    base = json.loads((out / "node.json").read_text())["base"]
    if back:
        train_rows("sft", student, rows, out, overrides=[*SETTINGS, "seed=1"])
        other = json.loads((out / "node.json").read_text())["base"]
        (out / "older" / other).mkdir()
        for name in ("log.jsonl", "model", "node.json", "result.json"):
            (out / name).rename(out / "older" / other / name)
        (out / "older" / base / "node.json").rename(out / "node.json")  # and here the kill comes
    else:
        (out / "older" / base).mkdir(parents=True)
        (out / "model").rename(out / "older" / base / "model")
    (out / "older" / "moving.json").write_text(json.dumps({"base": base, "away": not back}))
    train_rows("sft", student, rows, out, overrides=[*SETTINGS, "seed=2", "epochs=1"])
    assert not same(weights(out), kept)
    untouched = Recorder()
    train_rows("sft", student, rows, out, overrides=SETTINGS, output=untouched)
    assert untouched.steps == []
    assert same(weights(out), kept)


def test_a_gguf_is_converted_once_and_pairs_train_from_it(rows: Path, tmp_path: Path) -> None:
    file = write_tiny_gguf(tiny_model(), tiny_tokenizer(), tmp_path / "tiny.gguf")
    train_rows("sft", str(file), rows, Path("sft"), overrides=SETTINGS)
    (made,) = (tmp_path / "cache" / "cotree").glob("tiny-*-transformers")
    stamp = (made / "model.safetensors").stat().st_mtime_ns
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(dpo_row(index)) + "\n" for index in range(6)))
    result = train_rows("dpo", file, pairs, Path("dpo"), overrides=["lora.rank=4", "alpha=0.5"])
    assert result.first["dpo_loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert (made / "model.safetensors").stat().st_mtime_ns == stamp
    assert sorted(path.name for path in Path("dpo").glob("[!.]*")) == ["log.jsonl", "model", "node.json", "result.json"]
    assert {path.name for path in Path.cwd().iterdir()} == {"sft", "dpo"}
    AutoModelForCausalLM.from_pretrained("dpo/model")


def test_two_processes_cannot_train_in_one_folder(
    student: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first holds the folder from its start to its end, and its steps are not disturbed."""
    command = ["cotree", "train", "sft", "--student", str(student), "--data", str(rows), "-o", "trained", *SETTINGS]
    monkeypatch.setattr("sys.argv", command)
    codes: list[object] = []

    class Second(Recorder):
        @contextmanager
        def progress(self, title: str) -> Iterator[Update]:
            with pytest.raises(SystemExit) as ended:
                main()
            codes.append(ended.value.code)
            with super().progress(title) as update:
                yield update

    first = Second()
    train_rows("sft", student, rows, Path("trained"), overrides=SETTINGS, output=first)
    assert codes == [2]
    assert capsys.readouterr().err == (
        "cotree: another cotree works in trained; wait for it, or choose another --out\n"
    )
    assert first.steps == [1, 2, 3, 4, 5, 6]
    train_rows("sft", student, rows, Path("trained"), overrides=SETTINGS, output=first)
    assert first.lines[-1] == "trained is done: this student on these rows with these settings"


def test_another_version_of_training_trains_again(student: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_rows("sft", student, rows, Path("trained"), overrides=SETTINGS)
    monkeypatch.setattr(verb, "TRAINING_VERSION", 2)
    again = Recorder()
    train_rows("sft", student, rows, Path("trained"), overrides=SETTINGS, output=again)
    assert again.steps == [1, 2, 3, 4, 5, 6]
    assert json.loads(Path("trained/node.json").read_text())["parts"]["version"] == 2
    assert len(list(Path("trained/older").iterdir())) == 1, "and what the other version made is kept"


@pytest.mark.parametrize(
    ("method", "overrides", "fault"),
    [
        ("stf", [], "unknown method `stf`; did you mean `sft`"),
        ("sft", ["epoch=2"], "unknown key `epoch`; did you mean `epochs`"),
        ("sft", ["epochs=0"], "`epochs`: .*greater than 0"),
        ("sft", ["epochs"], "`epochs` is no setting; write it as key=value"),
        ("sft", ["seed=one"], "`seed` must be a whole number, not 'one'"),
        ("sft", ["seed=1", "seed.x=2"], "`seed.x`: `seed` is a value"),
        ("sft", ["beta=0.1"], "unknown key `beta`"),
        ("sft", ["max_tokens=8"], "all 11 rows are over 8 tokens: raise max_tokens"),
        ("dpo", [], "has no dpo rows: their columns are prompt, completion"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    method: str, overrides: list[str], fault: str, student: Path, rows: Path
) -> None:
    with pytest.raises(UsageError, match=fault):
        train_rows(method, student, rows, Path("out"), overrides=overrides)
    assert list(Path.cwd().iterdir()) == []


def test_students_and_folders_that_are_none_are_refused(student: Path, rows: Path) -> None:
    with pytest.raises(UsageError, match=r"no weights `nowhere.gguf` are here; give a packaged model"):
        train_rows("sft", "nowhere.gguf", rows, Path("out"))
    Path("full").mkdir()
    (Path("full") / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="full holds other files; choose another --out"):
        train_rows("sft", student, rows, Path("full"))
    assert [path.name for path in Path("full").iterdir()] == ["thesis.tex"]
    with pytest.raises(UsageError, match=r"no file at .*gone"):
        train_rows("sft", student, rows.with_name("gone.jsonl"), Path("out"))
