"""Which file systems are of several machines, and where locks are seen by one of them only."""

from __future__ import annotations

from pathlib import Path

import pytest

from cotree.base import disk

MOUNTS = r"""24 1 8:1 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 24 0:50 / /home rw,relatime shared:2 - nfs4 server:/home rw,vers=4.2,local_lock=none
31 24 0:51 / /scratch rw,noatime - lustre mds@tcp:/scratch rw,localflock
32 30 8:2 / /home/ann/local\040disk rw - xfs /dev/sdb rw
33 24 0:52 / /old rw - nfs server:/old rw,vers=3,nolock
34 24 0:53 / /share rw master:5 - cifs //server/share rw
35 24 0:54 / /gpfs rw - gpfs gpfs rw
36 24 0:55 / /both rw - nfs4 server:/both rw
37 36 8:3 / /both rw - ext4 /dev/sdc rw
"""


@pytest.mark.parametrize(
    ("path", "kind", "option"),
    [
        ("/home/ann/runs", "nfs4", ""),
        ("/homework", "", ""),
        ("/home/ann/local disk/runs", "", ""),
        ("/scratch/ann", "lustre", "localflock"),
        ("/old", "nfs", "nolock"),
        ("/share/runs", "cifs", ""),
        ("/gpfs/x/y", "gpfs", ""),
        ("/both/runs", "", ""),
        ("/tmp", "", ""),
    ],
)
def test_the_kind_of_a_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, kind: str, option: str
) -> None:
    (tmp_path / "mountinfo").write_text(MOUNTS)
    monkeypatch.setattr(disk, "_MOUNTS", tmp_path / "mountinfo")
    assert (disk.shared_file_system(Path(path)), disk.one_machine_locks(Path(path))) == (kind, option)


def test_a_system_that_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert disk.shared_file_system(Path("/proc")) == ""
    monkeypatch.setattr(disk, "_MOUNTS", tmp_path / "none")
    assert disk.shared_file_system(tmp_path) == disk.one_machine_locks(tmp_path) == ""
