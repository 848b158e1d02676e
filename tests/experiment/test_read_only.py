"""A run that cannot be written, another user's or a snapshot, is read by every verb and left as it is."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.experiment.conftest import Done

# Calls `main` for each list of words and prints the exit codes, the last line of stderr with each.
VERBS = """
import contextlib, io, json, sys
from cotree.cli import main
found = []
for words in json.loads(sys.argv[1]):
    sys.argv = ["cotree", *words]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as left:
            found.append([left.code, err.getvalue()])
print(json.dumps(found))
"""


def bind_permissions() -> None:
    """Give up what lets root write everywhere (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH) in what is executed next."""
    for capability in (1, 2):
        if os.geteuid() == 0 and ctypes.CDLL(None).prctl(24, capability, 0, 0, 0):  # PR_CAPBSET_DROP
            os._exit(99)


def run_verbs(*verbs: list[object]) -> list[tuple[int, str]]:
    """The exit code and what stderr says of each verb, in a process that permissions hold for."""
    words = json.dumps([[str(word) for word in verb] for verb in verbs])
    done = subprocess.run(
        [sys.executable, "-c", VERBS, words],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=bind_permissions,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 0, done.stderr
    return [(code or 0, text) for code, text in json.loads(done.stdout)]


@contextmanager
def read_only(path: Path) -> Iterator[None]:
    entries = [path, *path.rglob("*")]
    for entry in entries:
        entry.chmod(entry.stat().st_mode & ~0o222)
    try:
        yield
    finally:
        for entry in entries:
            entry.chmod(entry.stat().st_mode | 0o200)


def test_every_verb_reads_it_and_leaves_nothing_there(done: Done, tmp_path: Path) -> None:
    _, runs = done
    run, new = runs / "steps", tmp_path / "new"
    new.mkdir()
    cells = run / "evaluations" / "test"
    readers: list[list[object]] = [
        ["show", run, "--best"],
        ["table", run],
        ["report", run, "-o", new / "page.html"],
        ["report", run, run, "-o", new / "pages.html"],
        ["compare", cells / "sft", cells / "joint"],
        ["export", run, "--to", "jsonl", "-o", new / "rows"],
        ["export", run, "--to", "trees", "-o", new / "trees.parquet"],
        ["preview", run, "pairs"],
        ["check-data", run / "datasets" / "pairs" / "train.parquet"],
        ["diagnose", run],
        ["plan", run],
        ["clean", run, "--dry-run"],
        ["run", run, "name=mine", "--runs-dir", new, "--from", run],
    ]
    writers: list[list[object]] = [["run", run], ["report", run], ["clean", run]]
    before = sorted(run.rglob("*"))
    with read_only(run):
        found = run_verbs(*readers, *writers)
        assert sorted(run.rglob("*")) == before
    for verb, (code, text) in zip(readers, found, strict=False):
        assert (code, text) == (0, ""), verb
    for verb, (code, text) in zip(writers, found[len(readers) :], strict=True):
        assert code in (1, 2) and text.startswith("cotree: ") and text.count("\n") == 1, verb
        assert "cannot write" in text and "ermission denied" in text, text
    assert (new / "page.html").is_file() and (new / "mine" / "summary.json").is_file()
    with (new / "mine" / "evaluations" / "test" / "sft" / "journal.jsonl").open("a"):
        pass  # a copy can be written, whatever its source
    assert os.access(new / "mine" / "trees" / "train" / "trees.db", os.W_OK)
    assert (new / "mine" / "trees" / "train" / "trees.db").stat().st_mode & 0o200
