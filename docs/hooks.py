"""Fills the parts of pages that are made from the code, whenever the site is built.

A page says where by a comment, such as ``<!-- cli reference -->``. MkDocs loads this file by
``hooks`` in mkdocs.yml.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from typing import Any


def cli_reference() -> str:
    """Return all commands of ``hq-optuna`` with their arguments and options, as Markdown."""
    from hq_optuna.cli.app import COMMANDS, load

    parts = []
    for name in COMMANDS:
        command = load(name)
        usage = " ".join(
            f"[{p.name.upper()}]" if not p.required else p.name.upper() for p in _arguments(command)
        )
        parts += [f"## hq-optuna {name}", f"```text\nhq-optuna {name} {usage} [OPTIONS]\n```"]
        parts.append(_text(command.help or ""))
        rows = [f"| `{_option(p)}` | {_text(p.help or '', cell=True)} |" for p in _options(command)]
        if rows:
            parts.append("\n".join(["| option | |", "|---|---|", *rows]))
    return "\n\n".join(parts)


def _arguments(command: Any) -> Iterator[Any]:
    return (p for p in command.params if p.param_type_name == "argument")


def _options(command: Any) -> Iterator[Any]:
    return (p for p in command.params if p.param_type_name == "option" and not p.hidden)


def _option(parameter: Any) -> str:
    names = "/".join([*parameter.opts, *parameter.secondary_opts])
    if getattr(parameter, "is_flag", False):
        return names
    return f"{names} {parameter.metavar or 'VALUE'}"


def _text(text: str, *, cell: bool = False) -> str:
    """Return help as Markdown: without Rich's escapes, and on one line within a table."""
    text = text.replace("\\[", "[").replace("\b", "")
    return " ".join(text.split()).replace("|", "\\|") if cell else text.strip()


def settings_table() -> str:
    """Return a table of every setting of a search and of a run, as Markdown."""
    from hq_optuna.settings import RunSettings, SearchSettings, settings_of

    parts = []
    owners = {"A search": SearchSettings, "A run": RunSettings}
    for title, owner in owners.items():
        rows = []
        for one in settings_of(owner).values():
            option = f"`{one.option}`" if one.option else "–"
            kind, unit = one.type.replace(" | ", " or "), one.unit or "–"
            default, said = (_text(word, cell=True) for word in (one.shown_default, one.help))
            rows.append(f"| `{one.name}` | {option} | `{kind}` | {default} | {unit} | {said} |")
        head = "| name | option | type | default | unit | meaning |\n|---|---|---|---|---|---|"
        parts.append("\n".join([f"## {title}\n", head, *rows]))
    return "\n\n".join(parts)


def names_of(room: str) -> str:
    """Return a reference to each public name of a room, for mkdocstrings."""
    found = importlib.import_module(f"hq_optuna.{room}").__all__
    return "\n\n".join(f"::: hq_optuna.{room}.{name}" for name in found)


PARTS: dict[str, Callable[[], str]] = {
    "cli reference": cli_reference,
    "settings table": settings_table,
    "names of rises": lambda: names_of("rises"),
    "names of storages": lambda: names_of("storages"),
    "names of artifacts": lambda: names_of("artifacts"),
    "names of visualization": lambda: names_of("visualization"),
}
"""What a page may ask for by a comment."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace each comment that names a part by the part; MkDocs calls this for every page."""

    def made(match: re.Match[str]) -> str:
        make = PARTS.get(match[1])
        return match[0] if make is None else make()

    return re.sub(r"<!-- ([a-z ]+) -->", made, markdown)
