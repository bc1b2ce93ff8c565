"""`validate` of a copy of the package in which a kernel is made wrong on purpose, one at a time."""

import json
import re
import subprocess
import sys
from contextlib import contextmanager

from conftest import environment_of

VALIDATE = ("validate", "--quick", "--exitfirst")
FAILED = re.compile(r"\b[1-9]\d* failed")

# Importing torch takes longer than finding most mistakes: it is imported once, and each validation runs in a fork.
FORKS = """
import json, os, sys, tempfile, traceback
import torch

for line in sys.stdin:
    with tempfile.TemporaryFile("w+") as printed:
        child = os.fork()
        if child == 0:
            code = 2
            try:
                os.dup2(printed.fileno(), 1)
                os.dup2(printed.fileno(), 2)
                from kdkernels.__main__ import main
                code = main(json.loads(line))
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        printed.seek(0)
        print(json.dumps([code, printed.read()]), flush=True)
"""


@contextmanager
def validator(tree, **environment):
    """`python -m kdkernels validate` in the tree, as a function of its options that returns its code and its print."""
    environment = environment_of(tree) | {"PYTHONDONTWRITEBYTECODE": "1"} | environment
    command = [sys.executable, "-c", FORKS]
    with subprocess.Popen(
        command, cwd=tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def validate(*options):
            process.stdin.write(json.dumps([*VALIDATE, *options]) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield validate
        process.stdin.close()


def mutate(tree, mutation):
    """Write the mistake, and return what undoes it."""
    path = tree / mutation.file
    source = path.read_text()
    assert source.count(mutation.right) == 1, f"{mutation.file} no longer says once: {mutation.right}"
    path.write_text(source.replace(mutation.right, mutation.wrong))
    return lambda: path.write_text(source)


def only(mutation):
    """The checks of the operators that the mutated file belongs to."""
    return [option for op in mutation.ops for option in ("--op", op)]


def check_passes(result):
    code, printed = result
    assert code == 0, printed


def check_noticed(result):
    code, printed = result
    assert code == 1 and FAILED.search(printed), printed
