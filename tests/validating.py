"""`validate` of a copy of the package in which a kernel is made wrong on purpose, one at a time."""

import re
from contextlib import contextmanager

from forks import environment_of, finished, forking

VALIDATE = ("validate", "--quick", "--exitfirst")
FAILED = re.compile(r"\b[1-9]\d* failed")


@contextmanager
def validator(tree, *modules, **environment):
    """`python -m kdkernels validate` in the tree, as a function of its options that returns its code and its print.

    Each time in a fork of a process that has imported these modules: it takes longer than finding most mistakes.
    """
    environment = environment_of(tree) | {"PYTHONDONTWRITEBYTECODE": "1"} | environment
    with forking(environment, *modules, cwd=tree) as start:

        def validate(*options):
            done = finished(start(environment, "-m", "kdkernels", *VALIDATE, *options, cwd=tree))
            return done.returncode, done.stdout + done.stderr

        yield validate


def mutate(tree, mutation):
    """Write the mistake, and return what undoes it."""
    path = tree / mutation.file
    source = path.read_text()
    assert source.count(mutation.right) == 1, f"{mutation.file} no longer says once: {mutation.right}"
    path.write_text(source.replace(mutation.right, mutation.wrong))
    return lambda: path.write_text(source)


def only(mutation):
    """The checks of the operators that the mutated file belongs to, of the case where the mistake shows."""
    return ["--case", mutation.case, *(option for op in mutation.ops for option in ("--op", op))]


def check_passes(result):
    code, printed = result
    assert code == 0, printed


def check_noticed(result):
    code, printed = result
    assert code == 1 and FAILED.search(printed), printed
