"""The command line: `shoestring`, or `python -m shoestring.trainer.cli`."""

from .app import main as main
