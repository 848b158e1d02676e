"""`cotree train`: one student on own rows, no recipe. The same command resumes; other settings keep the old content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cotree.base.errors import UsageError
from cotree.base.numbers import duration
from cotree.base.progress import Output
from cotree.base.run_folder import NodeFolder, NodeRecord
from cotree.base.settings import apply_override, content_of, nearest, parse_section
from cotree.models.cache import file_sha256
from cotree.models.encode import template_hash
from cotree.models.tokenizer import load_tokenizer
from cotree.train.arguments import resolve
from cotree.train.display import plot_steps
from cotree.train.methods import METHODS
from cotree.train.result import StepLog, TrainResult
from cotree.train.rows import check_fits, encode_file
from cotree.train.run import train
from cotree.train.student import student_config, student_folder, student_sha256


def train_rows(
    method: str,
    student: str | Path,
    data: Path,
    out: Path,
    *,
    overrides: Sequence[str] = (),
    output: Output | None = None,
) -> TrainResult:
    """Train a student on a file of rows; the same call goes on after an interruption, and returns the result when done.

    Args:
        method: `sft` or `dpo`.
        student: a transformers folder, a `.gguf` file, a packaged name, or `REPO_ID:FILE.gguf` on the hub.
        data: rows of the method's kind (TRL's conversational prompt-completion or preference rows), Parquet or JSONL.
        out: the folder of this training: `model/`, `result.json`, `log.jsonl`, `node.json`. Content of other settings,
            rows or student moves to `out`/older and comes back with them.
        overrides: `key=value` settings of the method ("epochs=2", "lora.rank=8"), and `seed=N` (default 0).
        output: where progress is shown.

    Raises:
        UsageError: method, settings, student or rows cannot be trained with.
        CotreeError: training failed after it had started; the same call resumes it.
    """
    if method not in METHODS:
        raise UsageError(f"unknown method `{method}`; {nearest(method, METHODS)}")
    output = output or Output()
    raw: dict[str, Any] = {}
    for override in overrides:
        apply_override(raw, override, "epochs=2")
    seed = raw.pop("seed", 0)
    if type(seed) is not int:
        raise UsageError(f"`seed` must be a whole number, not {seed!r}")
    settings = parse_section(METHODS[method].settings, raw, "")
    if out.is_dir() and not (out / "older").is_dir() and not (out / "node.json").is_file() and any(out.iterdir()):
        raise UsageError(f"{out} holds other files; choose another folder, or one that `cotree train` made")
    folder = student_folder(str(student))
    tokenizer = load_tokenizer(folder)
    check_fits(encode_file(data, tokenizer, settings).rows, student_config(folder))
    parts = {
        "method": method,
        "settings": content_of(settings),
        "seed": seed,
        "data": file_sha256(data),
        "student": student_sha256(folder),
        "template": template_hash(tokenizer),
    }
    fingerprint = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    node = NodeFolder(out, out / "older")
    record = node.begin(NodeRecord(fingerprint, fingerprint, parts))
    if record.done:
        output.print(f"{out} is done: this student on these rows with these settings")
        return TrainResult(**record.result["train"])
    with node.working(record) as work, output.progress(f"{method} steps") as update:
        show = plot_steps(method, update, output)

        def on_step(log: StepLog) -> None:
            work.beat()
            show(log)

        resolved = resolve(settings.model_copy(update=work.resolved))
        work.resolved["precision"] = resolved.precision
        result = train(method, data, folder, out, settings=resolved, seed=seed, on_step=on_step)
        work.result |= {"train": asdict(result), "tokens": {"trained": result.tokens}, "method": method}
        work.files += ["result.json", *(f"model/{file.name}" for file in (out / "model").glob("*.safetensors"))]
    output.print(f"{out / 'model'}: {method}, {result.steps} steps on {result.rows} rows, {duration(result.seconds)}")
    return result
