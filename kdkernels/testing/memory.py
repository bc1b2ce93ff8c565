"""Peak memory of one step beyond what it returns, measured in a process of its own.

On a CPU the high-water mark of the resident set (VmHWM, reset through /proc/self/clear_refs) sees every allocation,
torch's and C++'s. The baseline is taken after a small run has loaded the libraries and before the first full one, so
buffers that are kept for the next step count; for torch.compile it is taken after a full run, or the compiler counted.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from kdkernels.testing import suite
from kdkernels.testing.compare import Outcome

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# Every buffer of a megabyte or more is returned to the system when freed: it cannot hide a later one.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": "0"}


def peak_extra_bytes(op: str, case: str, variant: str, device: str, *, quick: bool = False) -> int | None:
    """Run `variant` of the case in a fresh process; None where the system does not tell."""
    command = [sys.executable, "-m", __name__, op, case, variant, device, str(torch.get_num_threads())]
    command += ["--quick"] * quick
    done = subprocess.run(command, env=os.environ | ALLOCATOR, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {case!r}, {variant} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(op: str, case: str, variant: str, device: str, quick: bool) -> int | None:
    """The high-water mark of the second step, over the baseline and the gradients it returns."""
    workloads = suite(op).workloads
    if device == "cpu" and not os.access(CLEAR_REFS, os.W_OK):
        return None
    index = [workload.name for workload in workloads(quick, device)].index(case)
    if variant != "torch.compile":
        workloads(True, device)[index].open(device).variants()[variant]()
    session = workloads(quick, device)[index].open(device)
    step = session.variants()[variant]
    if variant == "torch.compile":
        step()
    session.refresh()
    before = in_use(device)
    if variant != "torch.compile":
        step()
        session.refresh()
    reset_peak(device)
    outcome = step()
    return max(peak(device) - before - returned(outcome), 0)


def returned(outcome: Outcome) -> int:
    """Bytes of the loss and the gradients."""
    return sum(x.numel() * x.element_size() for x in outcome.tensors().values())


def status(key: str) -> int:
    """A size of /proc/self/status in bytes."""
    found = re.search(rf"^{key}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{STATUS} has no {key}")
    return int(found[1]) * 1024


def in_use(device: str) -> int:
    """Bytes in use now."""
    return torch.cuda.memory_allocated() if device == "cuda" else status("VmRSS")


def peak(device: str) -> int:
    """Most bytes in use since `reset_peak`."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else status("VmHWM")


def reset_peak(device: str) -> None:
    """Begin a new high-water mark."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        CLEAR_REFS.write_text("5")


def main() -> None:
    """The child's side of `peak_extra_bytes`."""
    parser = argparse.ArgumentParser(description=peak_extra_bytes.__doc__)
    for name in ("op", "case", "variant", "device"):
        parser.add_argument(name)
    parser.add_argument("threads", type=int)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(json.dumps(measure(arguments.op, arguments.case, arguments.variant, arguments.device, arguments.quick)))


if __name__ == "__main__":
    main()
