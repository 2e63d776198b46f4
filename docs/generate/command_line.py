"""The command line's reference, from the commands themselves."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import typer

from shoestring.trainer.cli.app import app

from .markdown import cell, code, page, table

EXIT_CODES = {
    0: "finished",
    1: "failure; the traceback says where",
    2: "bad input; the message says what to change",
    85: "saved - run me again: the same command goes on from the checkpoint",
    86: "this node is bad: run the job again on another one",
}


def page_text() -> str:
    return page(
        "# Command line",
        "`shoestring COMMAND --help` says the same. `python -m shoestring.trainer.cli` is the same program.",
        "## Exit codes",
        table(["code", "meaning"], [[str(number), meaning] for number, meaning in EXIT_CODES.items()]),
        *(part for words, command in commands() for part in _command(words, command)),
    )


def commands() -> list[tuple[str, Any]]:
    """(`runs list`, its command) for every command, in the order of `--help`; groups are opened."""

    def opened(words: str, command: Any) -> Iterator[tuple[str, Any]]:
        if hasattr(command, "commands"):
            for name, inner in command.commands.items():
                if not inner.hidden:
                    yield from opened(f"{words} {name}".strip(), inner)
        else:
            yield words, command

    return list(opened("", typer.main.get_command(app)))


def _command(words: str, command: Any) -> Iterator[str]:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
    usage = " ".join(["shoestring", words, *(_metavar(p) for p in arguments)])
    yield f"(command-{words.replace(' ', '-')})=\n\n## {words}"
    yield f"```text\n{usage}{' [OPTIONS]' if options else ''}\n```"
    yield from (cell(block) for block in inspect.cleandoc(command.help or "").split("\n\n"))
    rows = [[code(_metavar(p)), cell(p.help or "")] for p in arguments]
    rows += [[code(_spelled(p)), cell((p.help or "") + _default(p))] for p in options]
    if rows:
        yield table(["argument or option", "meaning"], rows)


def _metavar(argument: Any) -> str:
    return str(argument.metavar or argument.name.upper())


def _spelled(option: Any) -> str:
    names = ", ".join([*option.opts, *option.secondary_opts])
    return names if option.is_flag else f"{names} {option.metavar or 'VALUE'}"


def _default(option: Any) -> str:
    if option.required:
        return " Must be given."
    shown = option.default is not None and not option.is_flag and option.default not in ((), [])
    return f" Default: {option.default}." if shown and not callable(option.default) else ""
