"""Properties of this machine: usable cores, peak memory, processor class, and installed versions."""

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
    """The number of cores that this process may use, which Slurm, containers and `taskset` limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_bytes() -> int:
    """Peak memory of this process in bytes since `reset_peak`; 0 without /proc.

    Not `ru_maxrss`, which starts with the parent's memory at fork.
    """
    with suppress(OSError):
        status = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text("utf-8"), re.MULTILINE)
        return 1024 * int(status[1]) if status else 0
    return 0


def reset_peak() -> None:
    """Reset `peak_bytes`, if the system allows it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", "utf-8")


def machine_class() -> dict[str, Any]:
    """This machine's class for tables (processor, cores, memory), without identifying it."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3
    return {"cpu": _cpu(), "cores": usable_cores(), "memory_gb": round(memory, 1)}


def _cpu() -> str:
    with suppress(OSError):
        if found := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE):
            return found[1].strip()
    return platform.machine()


def versions() -> dict[str, str]:
    """Versions of Python, cotree and the packages that affect its numbers, and the commit of cotree's checkout."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    if commit := _git():
        found["git"] = commit
    return found


def _git() -> str:
    """The commit of cotree's checkout, with "-dirty" if files of its package are changed; or ""."""
    package = Path(__file__).resolve().parents[1]
    if not (package.parents[1] / "pyproject.toml").is_file():
        return ""  # installed: any surrounding repository is the user's
    commands = (["describe", "--always", "--exclude=*"], ["status", "--porcelain", "--untracked-files=no", "--", "."])
    with suppress(OSError, subprocess.TimeoutExpired, subprocess.CalledProcessError):
        commit, changed = (
            subprocess.run(["git", *words], cwd=package, capture_output=True, text=True, timeout=5, check=True).stdout
            for words in commands
        )
        return commit.strip() + "-dirty" * bool(changed)
    return ""
