"""Run the shards of a recipe in many processes: on this machine, on a Slurm cluster, or on a Ray cluster.

Slurm, Ray or a local thread pool schedules shards and restarts failed ones. Progress is recorded only in the shards'
folders, so a shard may be started any number of times: it resumes, or exits at once if nothing is left.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import PositiveInt

from cotree.base.atomic import explain_write_errors, write_text
from cotree.base.errors import CotreeError, UsageError
from cotree.base.progress import Output
from cotree.base.run_folder import RunFolder
from cotree.base.settings import Section, parse_section
from cotree.base.shards import Shard
from cotree.experiment.shard_states import ShardStates

_ATTEMPTS = 3  # for a shard whose process died or whose work failed; bad input is not retried
_LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class Fleet:
    """The nodes to run in shards.

    options: further arguments for `cotree run`. work: runs a shard in this process, called with `rank` and `output`.
    """

    run: RunFolder
    only: Sequence[str]
    options: Sequence[str]
    work: Callable[..., Any]
    states: ShardStates
    world_size: int
    output: Output

    def command(self, shard: str) -> list[str]:
        """The command of one shard."""
        nodes = [word for node in self.only for word in ("--only", node)]
        return ["-m", "cotree.cli", "run", str(self.run.path.resolve()), *nodes, *self.options, "-q", "--shard", shard]


def run_shards(fleet: Fleet, where: str) -> bool:
    """Run all unfinished shards; returns whether they are finished (with Slurm they are only submitted).

    Args:
        where: `local:PROCESSES`, `ray:ADDRESS` (`ray:local` starts a local cluster) or `slurm:FILE.yaml`.

    Raises:
        UsageError: invalid `where`, or its software is missing.
        CotreeError: some shards failed; the same call resumes them.
    """
    kind, _, place = where.partition(":")
    if kind == "local" and place.isdigit() and int(place) > 0:
        start: Callable[[Fleet, str], bool] = _run_here
    elif kind in ("ray", "slurm") and place:
        start = _run_on_ray if kind == "ray" else _submit
    else:
        raise UsageError(f"--on {where}: write local:PROCESSES, slurm:FILE.yaml or ray:ADDRESS")
    seen = fleet.states.look()
    if not fleet.states.left:
        return True
    fleet.output.print(f"{', '.join(fleet.only)}: {seen}")
    return start(fleet, place)


def _run_here(fleet: Fleet, place: str) -> bool:
    """Run shards in local processes, `place` at a time."""
    running: set[subprocess.Popen[str]] = set()
    stopped = threading.Event()

    def work(rank: int) -> str:
        """Run one shard; returns why it failed, "" if it did not."""
        command, words = [sys.executable, *fleet.command(f"{rank}/{fleet.world_size}")], ""
        for _ in range(_ATTEMPTS):
            if stopped.is_set():
                return "stopped"
            # In a group of its own, so that Ctrl-C reaches it once: from here.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                process_group=0,
            )  # fmt: skip
            running.add(process)
            _, said = process.communicate()
            running.discard(process)
            if process.returncode == 0:
                return ""
            words = (said.strip().splitlines() or [f"its process ended by signal {-process.returncode}"])[-1]
            if process.returncode == UsageError.exit_code:
                break
        return words.removeprefix("cotree: ")

    with ThreadPoolExecutor(int(place)) as pool:
        futures: dict[Any, int] = {pool.submit(work, rank): rank for rank in fleet.states.left}
        try:
            _watch(fleet, futures, _wait_for_threads, Future.result)
        finally:
            stopped.set()
            for process in [*running]:
                process.send_signal(signal.SIGINT)
    return True


def _wait_for_threads(futures: Sequence[Any]) -> Sequence[Any]:
    return [*wait(futures, timeout=_LOOK_SECONDS, return_when=FIRST_COMPLETED).done]


def _run_on_ray(fleet: Fleet, place: str) -> bool:
    """Run shards as Ray tasks; Ray restarts tasks whose worker or node died."""
    try:
        import ray
    except ModuleNotFoundError:
        raise UsageError("ray is not installed; pip install 'cotree[fleet]'") from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    here: dict[str, Any] = {"include_dashboard": False} if place == "local" else {"address": place}
    try:
        ray.init(**here, ignore_reinit_error=True, logging_level="ERROR", log_to_driver=False)
    except (ConnectionError, ValueError) as error:
        raise UsageError(f"--on ray:{place}: {' '.join(str(error).split())[:200]}") from None
    options: Mapping[str, Any] = {"num_cpus": 1, "max_retries": _ATTEMPTS - 1, "retry_exceptions": [CotreeError]}
    task = ray.remote(**options)(_work_on_ray)

    def result(found: Any) -> str:
        try:
            return str(ray.get(found))
        except ray.exceptions.RayError as error:
            return str(getattr(error, "cause", None) or error).strip().splitlines()[0]

    def wait_for_tasks(tasks: Sequence[Any]) -> Sequence[Any]:
        return list(ray.wait(list(tasks), num_returns=1, timeout=_LOOK_SECONDS)[0])

    try:
        tasks = {task.remote(fleet.work, rank): rank for rank in fleet.states.left}
        _watch(fleet, tasks, wait_for_tasks, result)
    finally:
        ray.shutdown()
    return True


def _work_on_ray(work: Callable[..., Any], rank: int) -> str:
    """Run one shard in a worker; returns the error for bad input, which a retry would not fix."""
    try:
        work(rank=rank, output=Output(quiet=True))
    except UsageError as error:
        return str(error)
    except CotreeError as error:  # only this base class, which unpickles everywhere
        raise CotreeError(str(error)) from None
    return ""


def _watch(
    fleet: Fleet,
    futures: dict[Any, int],
    wait_for: Callable[[Sequence[Any]], Sequence[Any]],
    result: Callable[[Any], str],
) -> None:
    """Show the progress of all shards in one line until they end.

    Args:
        futures: {future of a shard: rank}.
        wait_for: waits for a while; returns the finished futures.
        result: returns why a finished future failed, "" if it did not.

    Raises:
        CotreeError: shards failed.
    """
    failed: dict[int, str] = {}
    with fleet.output.progress(", ".join(fleet.only)) as update:
        while futures:
            for ended in wait_for([*futures]):
                rank = futures.pop(ended)
                if why := result(ended):
                    failed[rank] = why
                    fleet.output.print(f"shard {Shard(fleet.world_size, rank)} failed: {why}")
            seen = fleet.states.look()
            update(seen.questions, seen.wanted, f"{seen}{f', {len(failed)} failed' if failed else ''}")
    if failed:
        rank, why = next(iter(failed.items()))
        shard = Shard(fleet.world_size, rank)
        raise CotreeError(
            f"{len(failed)} of {fleet.world_size} shards are not done (shard {shard}: {why}); re-run the same command "
            "to resume"
        )


class SlurmJob(Section):
    """The file of `--on slurm:FILE.yaml`.

    sbatch: long options of sbatch ({partition: cpu, time: "24:00:00"}); `true` for one without a value.
    setup: shell lines before the command, for example to activate an environment.
    at_once: maximum shards running at a time. array_size: maximum tasks of a job array on this cluster.
    """

    sbatch: Mapping[str, str | int | bool] = {}
    setup: str = ""
    at_once: PositiveInt | None = None
    array_size: PositiveInt = 1000


def _submit(fleet: Fleet, place: str) -> bool:
    """Submit the shards to Slurm as job arrays of at most `array_size` tasks."""
    try:
        written = yaml.safe_load(Path(place).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {place}: {' '.join(str(error).split())}") from None
    job = parse_section(SlurmJob, written, "")
    if shutil.which("sbatch") is None:
        raise UsageError("there is no sbatch here; run this where Slurm's commands are")
    folder = fleet.run.path.resolve() / "shards"
    with explain_write_errors(folder):
        (folder / "logs").mkdir(parents=True, exist_ok=True)
    for first in range(0, fleet.world_size, job.array_size):
        ranks = [rank - first for rank in fleet.states.left if first <= rank < first + job.array_size]
        if not ranks:
            continue
        file = folder / f"array-{first}.sbatch"
        write_text(file, sbatch_file(fleet, job, ranks, first))
        done = subprocess.run(["sbatch", "--parsable", str(file)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise CotreeError(f"sbatch {file}: {' '.join(done.stderr.split())}")
        fleet.output.print(f"submitted {len(ranks)} shards as job array {done.stdout.strip()}: {file}")
    fleet.output.print(
        f"`cotree plan {fleet.run.path}` shows how far they are; the same command submits again what is left, and "
        "goes on once all are done"
    )
    return False


def sbatch_file(fleet: Fleet, job: SlurmJob, ranks: Sequence[int], first: int) -> str:
    """The sbatch script of a job array whose task n runs shard `first` + n; a failed task is requeued twice."""
    at_once = f"%{job.at_once}" if job.at_once else ""
    options: dict[str, str | int | bool] = {
        "job-name": f"cotree-{fleet.run.path.name}",
        "output": str(fleet.run.path.resolve() / "shards" / "logs" / "%A_%a.log"),
        "open-mode": "append",
        "requeue": True,
        **job.sbatch,
        "array": ",".join(map(str, ranks)) + at_once,
    }
    lines = [f"#SBATCH --{name}" if value is True else f"#SBATCH --{name}={value}" for name, value in options.items()]
    command = shlex.join([sys.executable, *fleet.command("SHARD")])
    shard = f'"$(({first} + SLURM_ARRAY_TASK_ID))/{fleet.world_size}"'
    setup = [job.setup.rstrip()] if job.setup.strip() else []
    ended_badly = f"[ $code != 0 ] && [ $code != {UsageError.exit_code} ]"
    again = f'if {ended_badly} && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {_ATTEMPTS - 1} ]; then'
    return "\n".join(
        [
            "#!/bin/bash",
            *lines,
            *setup,
            command.removesuffix("SHARD") + shard,
            "code=$?",
            again,
            '    scontrol requeue "$SLURM_JOB_ID"',
            "fi",
            "exit $code",
            "",
        ]
    )
