"""A Python that has imported torch, and a fork of it for each program: most take less time than importing torch."""

import atexit
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from signal import SIGKILL
from subprocess import PIPE, CompletedProcess, Popen, TimeoutExpired
from time import monotonic, sleep
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Start = Callable[..., "Process"]


def environment_of(root: Path) -> dict[str, str]:
    """For a Python of its own: the checkout in `root` first, one thread, and no path of the kernels forced."""
    found = {name: value for name, value in os.environ.items() if name not in ("KDKERNELS_ISA", "KDKERNELS_GEMM")}
    return found | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}


# As `python -c program`, `python -m module` and `python script` do: what they print, and the code they exit with.
SERVER = """
import atexit, importlib, json, os, runpy, sys, tempfile, traceback, types
for module in ("torch", *sys.argv[1:]):
    importlib.import_module(module)

def run(command):
    what, *sys.argv = ["-c", *command] if command[0] == "-c" else command if command[0] == "-m" else ["", *command]
    try:
        if what == "-c":
            program = sys.argv.pop(1)
            sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(program, "<string>", "exec"), vars(sys.modules["__main__"]))
        elif what == "-m":
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, os.path.dirname(sys.argv[0]))
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if not isinstance(end.code, str):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    return 0

def start(command, folder, variables):
    output, errors = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
    child = os.fork()
    if child:
        running[child] = output, errors
        return child
    code = 1
    try:
        for number, file in enumerate((open(os.devnull), output, errors)):
            os.dup2(file.fileno(), number)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(variables)
        sys.path[1:1] = filter(None, variables.get("PYTHONPATH", "").split(os.pathsep))
        code = run(command)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

def finish(child, block):
    if os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT | (0 if block else os.WNOHANG)) is None:
        return None
    code, printed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), []
    for file in running.pop(child):
        with file:
            file.seek(0)
            printed.append(file.read())
    return [code, *printed]

running = {}
for line in sys.stdin:
    what, *arguments = json.loads(line)
    print(json.dumps({"start": start, "finish": finish}[what](*arguments)), flush=True)
"""


class Process:
    """As `subprocess.Popen` of Python with these arguments."""

    OFTEN = 0.01  # seconds between questions

    def __init__(self, ask: Callable[..., Any], command: list[str], folder: Path, environment: dict[str, str]) -> None:
        self.args = [sys.executable, *command]
        self.returncode: int | None = None
        self._ask = ask
        self._asked = 0.0
        self._printed = ("", "")
        self.pid: int = ask("start", command, str(folder), environment)

    def poll(self, block: bool = False) -> int | None:
        """Its code, if it has ended."""
        if self.returncode is None and (block or monotonic() - self._asked > self.OFTEN):
            found = self._ask("finish", self.pid, block)
            self._asked = monotonic()
            if found is not None:
                self.returncode, *printed = found
                self._printed = tuple(printed)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:  # until asked for its code it is there, if only as a zombie
            os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it has printed when it ends."""
        until = None if timeout is None else monotonic() + timeout
        while self.poll(block=until is None) is None:
            if until is not None and monotonic() > until:
                os.kill(self.pid, SIGKILL)
                raise TimeoutExpired(self.args, timeout or 0)
            sleep(self.OFTEN)
        return self._printed


@contextmanager
def forking(environment: dict[str, str], *modules: str, cwd: Path | None = None) -> Iterator[Start]:
    """`start(environment, *arguments, cwd)`: a `Process`.

    What Python, torch and OpenMP read when they start, they read in the environment given here. `modules` are imported
    beforehand too.
    """
    command = [sys.executable, "-c", SERVER, *modules]
    with Popen(command, cwd=cwd, env=environment, stdin=PIPE, stdout=PIPE, text=True) as server:
        assert server.stdin is not None and server.stdout is not None
        asked, answer = server.stdin, server.stdout

        def ask(*what: Any) -> Any:
            asked.write(json.dumps(what) + "\n")
            asked.flush()
            return json.loads(answer.readline())

        yield lambda environment, *arguments, cwd: Process(ask, [str(x) for x in arguments], cwd, environment)
        asked.close()


def finished(process: Process, check: bool = False) -> CompletedProcess[str]:
    """Once it has ended."""
    printed = process.communicate()
    assert process.returncode is not None and not (check and process.returncode), printed[1]
    return CompletedProcess(process.args, process.returncode, *printed)


@cache
def shared() -> Start:
    """For this checkout, as long as this process lives."""
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(forking(environment_of(ROOT)))
