"""Detect network file systems on Linux, where SQLite's WAL and file locks are not safe."""

from __future__ import annotations

import os
from pathlib import Path

# File systems that several machines may share, FUSE included; SQLite's shared memory works on one machine only.
_SHARED = {
    "nfs", "nfs4", "lustre", "gpfs", "cifs", "smb3", "smbfs", "ceph", "beegfs", "beegfs_nodev", "glusterfs", "afs",
    "orangefs", "pvfs2", "panfs", "wekafs", "9p", "fuse.sshfs", "fuse.ceph", "fuse.ceph-fuse", "fuse.glusterfs",
    "fuse.beegfs", "fuse.gpfs", "fuse.juicefs", "fuse.s3fs", "fuse.gcsfuse", "fuse.rclone", "fuse.mfs",
}  # fmt: skip
_LOCAL_LOCKS = {"nolock", "local_lock=flock", "local_lock=all", "localflock"}
_MOUNTS = Path("/proc/self/mountinfo")


def shared_file_system(path: Path) -> str:
    """The type of a path's file system if several machines may share it; "" if not, or if unknown. The path need not
    exist."""
    kind, _ = _mount_of(path)
    return kind if kind in _SHARED else ""


def sqlite_journal_mode(path: Path) -> str:
    """The `PRAGMA journal_mode` that is safe for a SQLite file at a path: WAL on a local disk, else DELETE.

    WAL keeps its index in shared memory, which machines do not share. DELETE needs file locks alone, but each commit
    waits for the disk.
    """
    return "DELETE" if shared_file_system(path) else "WAL"


def one_machine_locks(path: Path) -> str:
    """The mount option that makes `flock` at a path local to this machine, or ""."""
    kind, options = _mount_of(path)
    return next(iter(sorted(_LOCAL_LOCKS & options)), "") if kind in _SHARED else ""


def _mount_of(path: Path) -> tuple[str, set[str]]:
    """Type and options of a path's mount."""
    try:
        lines = _MOUNTS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return "", set()
    place, found, depth = os.path.realpath(path), ("", set[str]()), -1
    for line in lines:
        before, _, after = line.partition(" - ")
        point = before.split(" ")[4].encode().decode("unicode_escape")  # a space is \040
        kind, _, super_options = after.split(" ", 2)
        above = place == point or place.startswith(point.rstrip("/") + "/")
        if above and len(point) >= depth:  # of two at the same point the later one is on top
            found, depth = (kind, {*before.split(" ")[5].split(","), *super_options.split(",")}), len(point)
    return found
