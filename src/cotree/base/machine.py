"""This machine and what is installed on it: the cores that a process may use, for tables the processor and versions."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("cotree", "torch", "transformers", "xllamacpp", "aiohttp", "trl")


def usable_cores() -> int:
    """The cores that this process may use: fewer than the machine has under Slurm, a container or `taskset`."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_bytes() -> int:
    """The most memory that this process has had since `forget_peak`, in bytes; 0 where there is no /proc.

    `ru_maxrss` would not do: it begins with what the parent had when this process started.
    """
    with suppress(OSError):
        status = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text("utf-8"), re.MULTILINE)
        return 1024 * int(status[1]) if status else 0
    return 0


def forget_peak() -> None:
    """Begin to measure `peak_bytes` anew, where the system allows it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", "utf-8")


def machine_class() -> dict[str, Any]:
    """The class of this machine, for tables: nothing that names it."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3
    return {"cpu": _cpu(), "cores": usable_cores(), "memory_gb": round(memory, 1)}


def _cpu() -> str:
    with suppress(OSError):
        if found := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE):
            return found[1].strip()
    return platform.machine()


def versions() -> dict[str, str]:
    """The versions of Python, of cotree and of the packages that decide its numbers, and the commit of its checkout."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    if commit := _git():
        found["git"] = commit
    return found


def _git() -> str:
    """The commit of cotree's own checkout, "" where it is none."""
    here = Path(__file__).resolve().parent
    if not (here.parents[2] / "pyproject.toml").is_file():
        return ""  # installed: the repository around it, if any, is the user's
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    with suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=5, check=False).stdout.strip()
    return ""
