"""A Python that has imported torch, and a fork of it for each program: most take less time than importing torch."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Run = Callable[..., subprocess.CompletedProcess[str]]

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

for line in sys.stdin:
    command, folder, variables = json.loads(line)
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        child = os.fork()
        if child == 0:
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
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for file in (output, errors):
            file.seek(0)
        print(json.dumps([code, output.read(), errors.read()]), flush=True)
"""


@contextmanager
def forking(environment: dict[str, str], *modules: str, cwd: Path | None = None) -> Iterator[Run]:
    """`run(environment, *arguments, cwd)`, as `subprocess.run([python, *arguments], ...)` with what it printed.

    What Python, torch and OpenMP read when they start, they read in the environment given here. `modules` are imported
    beforehand too.
    """
    command = [sys.executable, "-c", SERVER, *modules]
    with subprocess.Popen(
        command, cwd=cwd, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None and server.stdout is not None
        ask, answer = server.stdin, server.stdout

        def run(
            environment: dict[str, str], *arguments: object, cwd: Path, check: bool = False
        ) -> subprocess.CompletedProcess[str]:
            words = [str(x) for x in arguments]
            ask.write(json.dumps([words, str(cwd), environment]) + "\n")
            ask.flush()
            done = subprocess.CompletedProcess([sys.executable, *words], *json.loads(answer.readline()))
            assert not (check and done.returncode), done.stderr
            return done

        yield run
        ask.close()
