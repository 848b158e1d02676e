"""`cotree train`: train one student on a rows file, without a recipe; resumable."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cotree.base.atomic import data_sha256
from cotree.base.errors import UsageError
from cotree.base.lock import locked
from cotree.base.numbers import duration
from cotree.base.progress import Output
from cotree.base.run_folder import NodeFolder, NodeRecord
from cotree.base.settings import apply_override, hashed_settings, nearest, parse_section
from cotree.models.checksums import check_weights, file_sha256
from cotree.models.encode import template_hash
from cotree.models.tokenizer import load_tokenizer
from cotree.train.processes import first_process, train_together
from cotree.train.rows import check_fits, encode_file
from cotree.train.run import TrainResult, read_result
from cotree.train.settings import METHODS, TRAINING_VERSION
from cotree.train.student import student_config, student_folder, student_sha256

_OTHER = "choose another --out"


def train_rows(
    method: str,
    student: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    output: Output | None = None,
) -> TrainResult:
    """Train a student on a rows file; the same call resumes, and returns the stored result of a finished training.

    Works under torchrun.

    Args:
        method: `sft` or `dpo`.
        student: a transformers folder, a `.gguf` file, a packaged name, or `REPO_ID:FILE.gguf` on the hub.
        data: rows of the method's kind (TRL's conversational prompt-completion or preference rows), Parquet or JSONL.
        out: output folder: `model/`, `result.json`, `log.jsonl`, `node.json`. Content from other settings, rows or
            student moves to `out`/older, and back when they are used again.
        overrides: `key=value` settings of the method ("epochs=2", "lora.rank=8"), and `seed=N` (default 0).
        output: shows progress.

    Raises:
        UsageError: invalid method, settings, student or rows, or another process trains in `out`.
        CotreeError: training failed after it started; the same call resumes it.
    """
    data, out = Path(data), Path(out)
    with first_process() as first:
        if first:
            return _train_rows(method, str(student), data, out, overrides=overrides, output=output or Output())
    return read_result(out)


def _train_rows(
    method: str, student: str, data: Path, out: Path, *, overrides: Sequence[str], output: Output
) -> TrainResult:
    if method not in METHODS:
        raise UsageError(f"unknown method `{method}`; {nearest(method, METHODS)}")
    raw: dict[str, Any] = {}
    for override in overrides:
        apply_override(raw, override, "epochs=2")
    seed = raw.pop("seed", 0)
    if type(seed) is not int:
        raise UsageError(f"`seed` must be a whole number, not {seed!r}")
    settings = parse_section(METHODS[method], raw, "")
    node = NodeFolder(out)
    node.check_owned(other=_OTHER)
    folder = student_folder(student)
    tokenizer = load_tokenizer(folder)
    check_fits(encode_file(data, tokenizer, settings).rows, student_config(folder))
    parts = {
        "version": TRAINING_VERSION,
        "method": method,
        "settings": hashed_settings(settings),
        "seed": seed,
        "data": file_sha256(data),
        "student": student_sha256(folder),
        "template": template_hash(tokenizer),
    }
    fingerprint = data_sha256(parts)[:16]
    with locked(out, other=_OTHER):
        record = NodeRecord(fingerprint, fingerprint, parts)
        if line := node.explain_missing_record(record, "a training of this student on these rows with these settings"):
            output.print(line)
        record = node.begin(record)
        if record.done:
            check_weights(out / "model")
            output.print(f"{out} is done: this student on these rows with these settings")
            return TrainResult(**record.result["train"])
        with node.working(record) as work:
            output.on_update = work.save_periodically
            result = train_together(
                work, method, method, rows=data, student=folder, settings=settings, seed=seed, output=output
            )
            work.add_files("result.json")
    memory = f", {result.peak_bytes / 1e9:.1f} GB of memory at the peak" if result.peak_bytes else ""
    done = f"{result.steps} steps on {result.rows} rows, {duration(result.seconds)}{memory}"
    output.print(f"{out / 'model'}: {method}, {done}")
    return result
