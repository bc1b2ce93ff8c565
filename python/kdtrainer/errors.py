"""What ends a run: a fault that the person at the keyboard can mend, or that person."""


class RunError(Exception):
    """The run cannot start or go on; the message says why and what to do."""


class Interrupted(Exception):
    """Ctrl-C, after the step was finished and its checkpoint written."""
