"""A Slurm cluster of one node in a folder: Debian's programs, unpacked there and run by root for as long as a block."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGES = ["slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "libmunge2", "libhwloc15"]
CONF = """ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/none
CredType=cred/none
PluginDir={libraries}/slurm-wlm
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmUser=root
SlurmdUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=cpu Nodes={host} Default=YES State=UP
"""


class NoSlurmError(Exception):
    """It cannot be set up here; says why."""


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Start it; yields the environment in which its commands work.

    Raises:
        NoSlurmError: this is no Debian, not root, or its packages are not reached.
    """
    if os.geteuid() != 0 or not all(map(shutil.which, ("apt-get", "dpkg"))):
        raise NoSlurmError("Debian's packages can be unpacked and slurmd started by root on a Debian only")
    root, debs = folder / "root", folder / "debs"
    for path in (debs, folder / "state", folder / "spool"):
        path.mkdir(parents=True)
    done = subprocess.run(["apt-get", "download", *PACKAGES], cwd=debs, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoSlurmError(f"apt-get download: {done.stderr.strip()[-200:]}")
    for deb in debs.glob("*.deb"):
        subprocess.run(["dpkg", "-x", str(deb), str(root)], check=True)
    (libraries,) = {path.parent for path in root.glob("usr/lib/*/slurm-wlm")}
    host = socket.gethostname().partition(".")[0]
    cpus = os.cpu_count()
    (folder / "slurm.conf").write_text(
        CONF.format(host=host, ports=_free_ports(2), libraries=libraries, folder=folder, cpus=cpus)
    )
    environment = {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "LD_LIBRARY_PATH": f"{libraries}:{libraries}/slurm-wlm",
        "PATH": f"{root}/usr/bin:{os.environ['PATH']}",
    }
    daemons = [["slurmctld-wlm", "-D"], ["slurmd-wlm", "-D", "-d", f"{root}/usr/sbin/slurmstepd-wlm"]]
    started: list[subprocess.Popen[bytes]] = []
    try:
        for program, *words in daemons:
            with (folder / f"{program}.log").open("wb") as log:
                command = [f"{root}/usr/sbin/{program}", *words]
                started.append(subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | environment))
        for _ in range(120):
            state = subprocess.run(
                ["sinfo", "-h", "-o", "%T"], capture_output=True, text=True, check=False, env=os.environ | environment
            ).stdout
            if state.startswith("idle"):
                break
            time.sleep(0.5)
        else:
            raise NoSlurmError(f"its node does not come up: {(folder / 'slurmd-wlm.log').read_text()[-300:]}")
        yield environment
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(30)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
