"""Shards on many processes: whatever dies, no answer is paid twice, and the trees are those of one run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web
from tests.support.experiment import KeptOutput, changed_recipe
from tests.support.fake_server import FakeServer, FakeServerThread, Fault
from tests.support.knowing import knowing_reply
from tests.support.search import content
from tests.support.slurm import NoSlurmError, slurm_cluster

import cotree
from cotree.base.errors import CotreeError, UsageError
from cotree.base.run_folder import RunFolder
from cotree.experiment.fleet import Fleet, SlurmJob, sbatch_file
from cotree.experiment.plan import plan, plan_lines
from cotree.experiment.recipe import build_recipe
from cotree.experiment.run import run, search_shard


class KillingServer(FakeServer):
    """Kills the process that asks, at some of its requests, before it answers them.

    kills: how many times more. Every client has one request in flight, so all that was answered is in its journal.
    """

    kills = 0
    rate = 0.15

    async def _answer(self, request: web.Request, body: dict[str, Any], fault: Fault | None) -> web.StreamResponse:
        if self.kills > 0 and random.random() < self.rate:
            self.kills -= 1
            assert request.transport is not None
            os.kill(process_at(request.transport.get_extra_info("peername")[1]), signal.SIGKILL)
            return web.Response(status=500)  # nobody is there to be answered
        return await super()._answer(request, body, fault)


def process_at(port: int) -> int:
    """The process whose connection to this machine's loopback has the local port."""
    lines = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    sockets = {f"socket:[{words[9]}]" for words in lines if int(words[1].partition(":")[2], 16) == port}
    for folder in Path("/proc").glob("[0-9]*/fd"):
        try:
            if sockets & {os.readlink(file) for file in folder.iterdir()}:
                return int(folder.parent.name)
        except OSError:
            continue
    raise AssertionError(f"nobody is at port {port}")


@pytest.fixture
def server() -> Iterator[KillingServer]:
    thread = FakeServerThread(reply=knowing_reply)
    thread.server = KillingServer(reply=knowing_reply)
    with thread:
        yield thread.server


@pytest.fixture
def recipe(server: FakeServer) -> dict[str, Any]:
    trees = {
        "questions": {"letters": 16, "arithmetic": 8}, "roles": {"thinker": "far"}, "rollouts": 3,
        "patterns": ["plain"], "trees_in_flight": 1,
    }  # fmt: skip
    far = {"url": server.url, "model": "fake", "mode": "chat", "max_in_flight": 1}
    evaluations = {"test": {"models": ["far"], "questions": {"letters": 6}, "max_tokens": 8}}
    return {"name": "many", "models": {"far": far}, "trees": {"train": trees}, "evaluations": evaluations}


def fleet(recipe: dict[str, Any], runs: Path, on: str, shards: int, only: str = "trees/train") -> list[str]:
    output = KeptOutput()
    run(build_recipe(recipe), runs, only=only, on=on, shards=shards, output=output)
    return output.lines


def asked(server: FakeServer) -> Counter[str]:
    return Counter(json.dumps(body, sort_keys=True) for body in server.answered)


def check_equal_to_one_run(recipe: dict[str, Any], server: KillingServer, runs: Path, in_flight: int = 0) -> None:
    """The shards' trees are those of one process, and the server answered each request of theirs once.

    in_flight: so many replies may have been on their way to a process when it died.
    """
    paid = asked(server)
    server.answered.clear()
    run(build_recipe(recipe | {"name": "one"}), runs, only="trees/train", output=KeptOutput())
    assert paid.keys() == asked(server).keys(), "other requests were sent"
    assert sum((paid - asked(server)).values()) <= in_flight, "an answered request was sent again"
    trees = [sorted(cotree.open_run(runs / name).trees("train"), key=lambda t: t.tree_id) for name in ("many", "one")]
    assert content(trees[0]) == content(trees[1]) and len(trees[0]) == 24
    folder = RunFolder(runs / "many")
    cotree.merge([*folder.path.glob("shards/*/trees/train")], runs / "merged.db")
    from cotree.search.store import TreeStore

    with TreeStore(runs / "merged.db", reading=True) as store:
        assert content(store.trees()) == content(trees[1])


@pytest.mark.slow
def test_random_kills_cost_nothing_that_was_answered(
    recipe: dict[str, Any], server: KillingServer, tmp_path: Path
) -> None:
    """8 shards on 2 processes, 10 of which are killed at random; then run again until all is done."""
    server.kills, failures = 10, 0
    lines: list[str] = []
    while not lines and failures < 10:
        with suppress(CotreeError):
            lines = fleet(recipe, tmp_path, "local:2", 8)
        failures += not lines
    assert server.kills == 0, "all of them were killed"
    assert any("trees/train done" in line for line in lines)
    print(f"10 kills, {failures} runs given up, {server.calls} requests, {len(server.answered)} answered")
    check_equal_to_one_run(recipe, server, tmp_path)


def test_what_failed_is_tried_again_and_bad_input_is_not(
    recipe: dict[str, Any], server: KillingServer, tmp_path: Path, hold: Any
) -> None:
    release = hold(tmp_path / "many" / "shards" / "1-of-2")
    server.faults = {0: "400"}
    recipe = changed_recipe(recipe, ("trees.train.questions", {"letters": 4}))
    (tmp_path / "many" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "many" / ".lock").touch()
    message = r"1 of 2 shards are not done \(shard 1/2: another cotree works in .*leave this shard to it\); re-run"
    with pytest.raises(CotreeError, match=message):
        fleet(recipe, tmp_path, "local:2", 2)
    (line,) = plan_lines([node for node in plan(build_recipe(recipe), tmp_path) if node.name == "trees/train"])[1:2]
    assert line.strip().startswith("1 of 2 shards done, ") and line.endswith("of 4 questions")
    release()
    before = len(server.answered)
    lines = fleet(recipe, tmp_path, "local:2", 2)
    assert lines[0].startswith("trees/train: 1 of 2 shards done")
    assert len(server.answered) > before
    assert RunFolder(tmp_path / "many").nodes()["trees/train"].done
    paid = server.calls
    fleet(recipe, tmp_path, "local:1", 2, "evaluations/test")
    assert server.calls == paid + 6 and RunFolder(tmp_path / "many").cells()["test", "far"].done


GOLDEN = """#!/bin/bash
#SBATCH --job-name=cotree-many
#SBATCH --output=RUN/shards/logs/%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --partition=cpu
#SBATCH --time=24:00:00
#SBATCH --array=0,2,3%64
. /shared/venv/bin/activate
PYTHON -m cotree.cli run RUN --only trees/train --regrow -q --shard "$((1000 + SLURM_ARRAY_TASK_ID))/2048"
code=$?
if [ $code != 0 ] && [ $code != 2 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 2 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
"""


def test_the_script_for_slurm(tmp_path: Path) -> None:
    folder: Any = RunFolder(tmp_path / "many")
    options: Any = {"work": None, "states": None, "world_size": 2048, "output": KeptOutput()}
    job = SlurmJob(sbatch={"partition": "cpu", "time": "24:00:00"}, setup=". /shared/venv/bin/activate\n", at_once=64)
    found = sbatch_file(Fleet(folder, ["trees/train"], ["--regrow"], **options), job, [0, 2, 3], 1000)
    golden = GOLDEN.replace("RUN", str(tmp_path / "many")).replace("PYTHON", sys.executable)
    assert found == golden


# Runs the tasks of an array here, one after the other, a task that asks for it up to two times more.
SBATCH = r"""#!/bin/bash
file=$2
echo "$file" >> "$SUBMITTED"
for task in $(sed -n 's/^#SBATCH --array=\([0-9,]*\).*/\1/p' "$file" | tr , ' '); do
    for count in 0 1 2; do
        rm -f "$SUBMITTED.again"
        SLURM_ARRAY_TASK_ID=$task SLURM_JOB_ID=$task SLURM_RESTART_COUNT=$count bash "$file" >&2
        [ -e "$SUBMITTED.again" ] || break
    done
done
echo 17
"""


def test_shards_are_submitted_to_slurm(
    recipe: dict[str, Any], server: KillingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = changed_recipe(recipe, ("trees.train.questions", {"letters": 4}))
    job = tmp_path / "job.yaml"
    job.write_text("sbatch: {partition: cpu}\narray_size: 2\n")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    if shutil.which("sbatch") is None:
        with pytest.raises(UsageError, match="there is no sbatch here"):
            fleet(recipe, tmp_path, f"slurm:{job}", 3)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("sbatch", SBATCH), ("scontrol", '#!/bin/bash\ntouch "$SUBMITTED.again"\n')):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("SUBMITTED", str(tmp_path / "submitted"))
    server.faults = {server.calls: "400"}
    output = KeptOutput()
    where: dict[str, Any] = {"on": f"slurm:{job}", "shards": 3, "scratch": "$SCRATCH_OF_NODE/here"}
    monkeypatch.setenv("SCRATCH_OF_NODE", str(tmp_path / "node"))
    run(build_recipe(recipe), tmp_path, only="trees/train", output=output, **where)
    assert (tmp_path / "node" / "here").is_dir()
    assert "'$SCRATCH_OF_NODE/here'" in (tmp_path / "many" / "shards" / "array-0.sbatch").read_text()
    lines = output.lines
    assert [line.rpartition(": ")[0] for line in lines[1:3]] == [
        "submitted 2 shards as job array 17",
        "submitted 1 shards as job array 17",
    ]
    assert not RunFolder(tmp_path / "many").nodes()["trees/train"].done
    calls = server.calls
    fleet(recipe, tmp_path, f"slurm:{job}", 3)
    assert server.calls == calls and len((tmp_path / "submitted").read_text().splitlines()) == 2
    assert RunFolder(tmp_path / "many").nodes()["trees/train"].done


@pytest.mark.parametrize(
    ("text", "message"),
    [("array: 3", "unknown key `array`"), ("at_once: 0", "at_once"), (": [", "cannot read"), (None, "cannot read")],
)
def test_a_wrong_file_for_slurm_is_refused(
    recipe: dict[str, Any], tmp_path: Path, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        fleet(recipe, tmp_path, f"slurm:{tmp_path / 'job.yaml'}", 3)


@pytest.mark.slow
def test_a_ray_cluster_loses_a_node(recipe: dict[str, Any], server: KillingServer, tmp_path: Path) -> None:
    """Two nodes' processes on this machine; a worker is killed, then a whole node with its workers."""
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'cotree[fleet]'")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        second = cluster.add_node(num_cpus=1)
        server.kills, server.rate, server.latency = 1, 0.05, 0.05

        def lose() -> None:
            while len(server.answered) < 20:
                time.sleep(0.02)
            cluster.remove_node(second, allow_graceful=False)

        loser = threading.Thread(target=lose)
        loser.start()
        lines = fleet(recipe, tmp_path, f"ray:{cluster.address}", 8)
        loser.join()
        assert not ray.is_initialized()
        assert any("trees/train done" in line for line in lines)
        print(f"{server.calls} requests, {len(server.answered)} answered")
    finally:
        cluster.shutdown()
    server.latency, server.kills = 0.0, 0
    check_equal_to_one_run(recipe, server, tmp_path, in_flight=1)


def test_ray_is_missing_or_not_reached(recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"ray is not installed; pip install 'cotree\[fleet\]'"):
        fleet(recipe, tmp_path, "ray:local", 2)


def test_a_function_under_any_scheduler(recipe: dict[str, Any], server: KillingServer, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    folders = [
        search_shard(tmp_path / "r.yaml", "trees/train", rank, 2, runs_dir=tmp_path, output=KeptOutput())
        for rank in (0, 1)
    ]
    assert [folder.name for folder in folders] == ["0-of-2", "1-of-2"]
    check_equal_to_one_run(recipe, server, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)  # Slurm waits two minutes before it starts a task again
def test_a_real_job_array(
    recipe: dict[str, Any], server: KillingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm itself runs the shards; one of its processes is killed, and sent again by its script."""
    (tmp_path / "job.yaml").write_text("sbatch: {partition: cpu, cpus-per-task: 1}\nat_once: 2\n")
    on = f"slurm:{tmp_path / 'job.yaml'}"
    try:
        with slurm_cluster(tmp_path / "slurm") as environment:
            for name, value in environment.items():
                monkeypatch.setenv(name, value)
            server.kills = 1
            assert any("submitted" in line for line in fleet(recipe, tmp_path, on, 4))
            while subprocess.run(["squeue", "-h"], capture_output=True, check=True).stdout:
                time.sleep(0.5)
            lines = fleet(recipe, tmp_path, on, 4)
    except NoSlurmError as error:
        pytest.skip(str(error))
    assert server.kills == 0 and any("trees/train done" in line for line in lines)
    print(f"{server.calls} requests, {len(server.answered)} answered")
    check_equal_to_one_run(recipe, server, tmp_path)
