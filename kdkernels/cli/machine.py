"""What this machine is: written beside every result."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from kdkernels import __version__

PACKAGES = ("torch", "triton", "numpy", "pybind11", "rich", "matplotlib")


def machine() -> dict[str, Any]:
    """Versions, CPU, threads and CUDA devices."""
    return {
        "kdkernels": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": cuda_devices(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def version(package: str) -> str | None:
    """The installed version, without importing the package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit this package was run from, when that is a checkout."""
    package = Path(__file__).resolve().parents[1]
    if not (package.parent / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(package.parent), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def cpu_name() -> str:
    """The model that the kernel reports, else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cuda_devices() -> list[str]:
    """Name and compute capability of each CUDA device."""
    if not torch.cuda.is_available():
        return []
    return [
        f"{p.name} (sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB)"
        for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
