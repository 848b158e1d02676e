"""Distributed training: starts one process per GPU, or uses the processes of torchrun or accelerate.

Invariant: rank 0 does all other work (search, datasets, evaluation). Processes started here train one student and exit,
and never outlive their parent, however it ends. A launcher's other ranks wait for rank 0's next training until it ends.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cotree.base.atomic import explain_write_errors
from cotree.base.errors import CotreeError, UsageError
from cotree.base.progress import Output
from cotree.base.run_folder import Work
from cotree.train.settings import METHODS, Optimizer

if TYPE_CHECKING:
    from cotree.train.callback import StepLog
    from cotree.train.run import TrainResult

Training = dict[str, Any]  # the arguments of `run.train`, as JSON
_RESUMES = "the same command goes on from the last checkpoint"


@contextmanager
def first_process() -> Iterator[bool]:
    """Yield True on rank 0 and without a launcher (torchrun); False on other ranks, after rank 0's block has ended.

    Until then the other ranks take part in rank 0's trainings.

    Raises:
        CotreeError: another process ended early.
    """
    if launched() == 1:
        yield True
    elif os.environ["RANK"] == "0":
        _waiting_group()
        yield True
        _broadcast_training(None)
    else:
        with _explain_lost_process():
            while (training := _broadcast_training(None)) is not None:
                _train(training)
        yield False


def train_together(
    work: Work,
    name: str,
    method: str,
    *,
    rows: Path,
    student: Path,
    settings: Optimizer,
    seed: int,
    output: Output,
    references: Path | None = None,
) -> TrainResult:
    """Run `run.train` for a student's node in `gpus` processes, or in all of a launcher's.

    The gradient does not depend on their number. The result goes into the node's record, with the resolved precision.
    Output of processes started here goes to the node's folder `processes`, one file per rank.

    Args:
        work: of the student's node.
        name: of the student, for plots and warnings.
        rows, student, references: as in `run.train`.

    Raises:
        UsageError: as `run.train`, or `gpus` exceeds those of the machine.
        CotreeError: as `run.train`, or a process ended; the same call resumes from the last checkpoint.
    """
    from cotree.train.callback import plot_steps
    from cotree.train.trainer import resolve_precision

    settings = resolve_precision(settings.model_copy(update=dict(work.resolved)))
    work.resolved["precision"] = settings.precision
    places = {"rows": rows, "student": student, "out": work.path, "references": references}
    training: Training = {place: path and str(path) for place, path in places.items()}
    training |= {"method": method, "settings": settings.model_dump(mode="json"), "seed": seed}
    with output.progress(f"{name} steps") as update, _explain_lost_process():
        on_step = plot_steps(name, update, output)
        if launched() > 1:
            _broadcast_training(training)
            result = _train(training, on_step, output)
        elif (count := process_count(settings)) > 1:
            result = _start(count, training, on_step, output)
        else:
            result = _train(training, on_step, output)
    work.result |= {"train": asdict(result), "tokens": {"trained": result.tokens}, "method": method}
    work.add_files("model", "model/*.safetensors")
    return result


def process_count(settings: Optimizer) -> int:
    """The number of training processes: the launcher's, else as `gpus` says.

    Raises:
        UsageError: it exceeds the number of GPUs or of rows in a step.
    """
    import torch

    if (processes := launched()) > 1:
        if settings.batch_size < processes:
            fix = f"set batch_size to {processes} at least, or start fewer"
            raise UsageError(f"{processes} processes were started, and a step has {settings.batch_size} rows; {fix}")
        return processes
    here = torch.cuda.device_count()
    if settings.gpus == "all":
        return max(1, min(here, settings.batch_size))  # at least one row of a step for each
    if 0 < here < settings.gpus:
        raise UsageError(f"gpus is {settings.gpus}, but {here} are here; set gpus={here} or gpus=all")
    if settings.gpus > settings.batch_size:
        raise UsageError(
            f"gpus is {settings.gpus}, and a step has {settings.batch_size} rows; set gpus to at most that"
        )
    return settings.gpus


def _train(
    training: Training, on_step: Callable[[StepLog], None] | None = None, output: Output | None = None
) -> TrainResult:
    from cotree.train.run import train

    return train(
        training["method"],
        *(Path(training[name]) for name in ("rows", "student", "out")),
        settings=METHODS[training["method"]].model_validate(training["settings"]),
        seed=training["seed"],
        on_step=on_step,
        references=training["references"] and Path(training["references"]),
        output=output,
    )


def _start(
    count: int, training: Training, on_step: Callable[[StepLog], None] | None, output: Output | None
) -> TrainResult:
    """Start training processes on this machine and watch them until they end."""
    import torch
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    from cotree.train.callback import StepLog
    from cotree.train.run import read_result

    folder = Path(training["out"]) / "processes"
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "told.jsonl").write_text("")
    if output is not None:
        output.print(f"  {count} processes train; what each prints is in {folder}")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # rendezvous, as with torchrun
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    shared |= {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // count))}
    command = [sys.executable, "-m", "cotree.train.processes", str(os.getpid()), json.dumps(training)]
    started: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(count):
            environment = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with _log(folder, rank).open("ab") as log:
                streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
                started.append(subprocess.Popen(command, env=environment, start_new_session=True, **streams))
        with (folder / "told.jsonl").open(encoding="utf-8") as told:
            codes: list[int | None] = [None]
            while None in codes and not any(codes):
                time.sleep(0.1)
                codes = [process.poll() for process in started]  # before reading logs, so that none is missed
                for event in map(json.loads, iter(told.readline, "")):
                    if "error" in event:
                        raise (UsageError if event["code"] == UsageError.exit_code else CotreeError)(event["error"])
                    if "line" in event and output is not None:
                        output.print(event["line"])
                    if "step" in event and on_step is not None:
                        on_step(StepLog(**event))
        if ended := {rank: code for rank, code in enumerate(codes) if code}:
            rank = min(ended, key=lambda rank: ended[rank] or 0)  # a killed process rather than those that lost it
            how = f"by signal {-ended[rank]}" if ended[rank] < 0 else f"with exit code {ended[rank]}"
            fault = f"process {rank} of the {count} that trained ended {how}"
            raise CotreeError(f"{fault}; its log is {_log(folder, rank)}; {_RESUMES}")
        return read_result(Path(training["out"]))
    finally:
        for process in started:  # safe: unfinished checkpoints are ignored
            process.kill()
            process.wait()


def _log(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.log"


def _main() -> None:
    """Entry point of a process that `_start` started."""
    parent, training = int(sys.argv[1]), json.loads(sys.argv[2])
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()
    output = Output(quiet=True)
    output.log = Path(training["out"]) / "processes" / "told.jsonl"

    def tell(**event: Any) -> None:
        with Path(training["out"], "processes", "told.jsonl").open("a", encoding="utf-8") as told:
            told.write(json.dumps(event) + "\n")

    try:
        _train(training, on_step=lambda step: tell(**asdict(step)), output=output)
    except CotreeError as error:
        tell(error=str(error), code=error.exit_code)
        raise


def _exit_with_parent(parent: int) -> None:
    """Exit this process when its parent is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def launched() -> int:
    """The world size of torchrun or accelerate; 1 without them."""
    named = [os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")]
    if not all(named) or not all(word.isdecimal() for word in named[:2]):
        return 1  # not a launcher's complete environment
    return int(named[0])


@cache
def _waiting_group() -> Any:
    """The process group in which other ranks wait for rank 0, with a long timeout, as it may grow trees for days."""
    import torch
    from torch import distributed

    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    atexit.register(_destroy_groups)
    return distributed.new_group(backend="gloo", timeout=timedelta(days=365))


def _destroy_groups() -> None:
    """Destroy the process groups before Python shuts down, because their threads would abort the process."""
    from torch import distributed

    _waiting_group.cache_clear()
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _broadcast_training(training: Training | None) -> Training | None:
    """Broadcast rank 0's next training to all ranks; None at its end."""
    from torch import distributed

    box = [training]
    distributed.broadcast_object_list(box, src=0, group=_waiting_group())
    return box[0]


@contextmanager
def _explain_lost_process() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        from torch.distributed import DistError

        if not isinstance(error, DistError) and "gloo" not in str(error):
            raise
        raise CotreeError(f"another process ended, its own last lines say why; {_RESUMES}") from error


if __name__ == "__main__":
    _main()
