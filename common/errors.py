"""The failures a user can meet, each with the exit code the command line returns for it.

A message is one line that says what is wrong and what to do about it; ``--debug`` adds the traceback.
"""


class WavelatentError(Exception):
    """An expected failure: bad data, missing weights, a run that cannot go on."""

    exit_code = 1


class Diverged(WavelatentError):  # noqa: N818 - a state, not a mistake
    """Something that was trained, or what it makes, is not finite: only another training of it would help."""


class UsageError(WavelatentError):
    """A wrong option or configuration; the message names the key and the nearest valid one."""

    exit_code = 2


class Stopped(WavelatentError):  # noqa: N818 - not an error: everything is saved
    """Stopped early with everything saved: the same command goes on from there."""

    exit_code = 75
