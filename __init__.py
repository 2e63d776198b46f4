"""Shoestring: train and fine-tune models on less money, time and memory.

`recipes` says what, `callbacks` says how to be thrifty, `cluster` says where; `trainer` brings them together.
This file imports nothing: `import shoestring` costs nothing, and each package loads what it needs.
"""

__version__ = "0.1.0"


class ShoestringError(Exception):
    """Root of every error a user can fix; the command line prints it without a traceback and exits with `exit_code`."""

    exit_code = 2  # bad input, see exits.py


class IncompatibleTechniques(ShoestringError):
    """These techniques cannot run together, or not here. The message says what to keep or change.

    Example:
        >>> from shoestring.callbacks import GradualPruning, compose
        >>> compose([GradualPruning(), GradualPruning()])
        Traceback (most recent call last):
            ...
        shoestring.IncompatibleTechniques: gradual_pruning is given twice. Keep one.
    """
