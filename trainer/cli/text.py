"""The commands that let a trained model speak: generate continues a text or answers once, chat keeps a conversation."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from .options import AllowCode, complete_run

if TYPE_CHECKING:
    from ..export.generation import TextModel

Model = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="A run, an export to hf or peft, a Hugging Face folder.", autocompletion=complete_run
    ),
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", help="The most tokens of an answer.")]
Temperature = Annotated[float, typer.Option("--temperature", help="0: the likeliest token each time.")]
TopP = Annotated[float, typer.Option("--top-p", help="Draw from the likeliest tokens that have this share.")]
Seed = Annotated[int, typer.Option("--seed", help="The same seed gives the same text.")]
System = Annotated[str | None, typer.Option("--system", help="A message of the system, before all others.")]
Best = Annotated[bool, typer.Option("--best", help="The weights of the best evaluation (checkpoint.best).")]


def generate(
    run: Model,
    prompt: Annotated[str | None, typer.Argument(metavar="[PROMPT]", help="Left out: what is piped in.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text, also where there is a chat template.")] = False,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    seed: Seed = 0,
    system: System = None,
    best: Best = False,
    allow_code: AllowCode = False,
) -> None:
    """Print what a trained language model says to a prompt, as it is generated.

    A model with a chat template, as tuning on chats leaves it, is asked the prompt; any other continues it.
    """
    from ..export.generation import Sampling
    from ..export.trained import CannotExport

    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    if prompt is None:
        if sys.stdin.isatty():
            raise CannotExport("generate needs a prompt: shoestring generate RUN 'Once upon a time', or one piped in.")
        prompt = sys.stdin.read()
    model = _opened(run, best, allow_code)
    if raw or not model.chats:
        model.complete(prompt, sampling, _say)
    else:
        model.answer([*_system(system), {"role": "user", "content": prompt}], sampling, _say)
    typer.echo()


def chat(
    run: Model,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    seed: Seed = 0,
    system: System = None,
    best: Best = False,
    allow_code: AllowCode = False,
) -> None:
    """Talk with a model that was trained on chats. It remembers the conversation; /exit or Ctrl-D ends it.

    Where lines are piped in, each is a message, and only the answers are printed.
    """
    from ..export.generation import Sampling

    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    model = _opened(run, best, allow_code)
    model.require_chats()
    messages = _system(system)
    for line in _lines():
        messages.append({"role": "user", "content": line})
        said, dropped = model.answer(messages, sampling, _say)
        typer.echo()
        messages.append({"role": "assistant", "content": said})
        if dropped:
            typer.echo(f"(the first {2 * dropped} messages no longer fit into its {model.window:,} tokens)", err=True)


def _opened(run: str, best: bool, allow_code: bool) -> TextModel:
    from ..export.generation import open_text_model
    from ..machine.quiet import quiet
    from .options import stdout_to_stderr

    quiet()
    with stdout_to_stderr(True):
        return open_text_model(run, best=best, allow_code=allow_code)


def _lines() -> Iterator[str]:
    """Messages from the keyboard or a pipe, up to its end or `/exit`; empty lines are none."""
    interactive = sys.stdin.isatty()
    while True:
        try:
            line = input("> ") if interactive else next(sys.stdin).rstrip("\n")
        except (EOFError, StopIteration, KeyboardInterrupt):
            return
        if line.strip() == "/exit":
            return
        if line.strip():
            yield line


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _system(text: str | None) -> list[dict[str, str]]:
    return [] if text is None else [{"role": "system", "content": text}]
