"""Lets mkdocstrings read the sections ``Example:`` of our docstrings as code.

Griffe knows them as ``Examples:``; others it takes for prose. Loaded by mkdocs.yml.
"""

from __future__ import annotations

from typing import Any

from griffe import Extension, Object


class ExampleSections(Extension):
    """Renames the sections before they are parsed."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rename the section in the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:", "\nExamples:")
