"""The one exception whose message is meant for the person at the keyboard."""


class RunError(Exception):
    """The run cannot start or go on; the message says why and what to do."""
