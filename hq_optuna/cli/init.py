"""``hq-optuna init``: a study file to fill in, with every setting and its default."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from hq_optuna.cli.options import errors, say
from hq_optuna.errors import StudyFileError
from hq_optuna.settings import SearchSettings, settings_of

TEMPLATE = '''"""My network on my data."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

# What is searched, and how. Uncomment a line to change a default; options of the command line go
# before what stands here.
SETTINGS = {{
{settings}
}}


def network(checkpoint: Path) -> nn.Module:
    """Return the trained float network.

    The parameters become options on the command line, here --checkpoint.

    Args:
        checkpoint: State dict saved by torch.save.
    """
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))  # yours
    net.load_state_dict(torch.load(checkpoint, weights_only=True))
    return net.eval()


def calibration(data: Path, n_calibration: int = 256):
    """Return labelled samples that the score reads, no training and no test data.

    Args:
        data: Tensors (inputs, labels) saved by torch.save.
        n_calibration: How many samples are read.
    """
    inputs, labels = torch.load(data, weights_only=True)
    return inputs[:n_calibration], labels[:n_calibration]


def validation(data: Path, n_calibration: int = 256):
    """Return labelled samples on which the answer is measured. May be left out."""
    inputs, labels = torch.load(data, weights_only=True)
    return inputs[n_calibration:], labels[n_calibration:]


# The mean loss over a batch, from (outputs, labels). PyTorch's cross_entropy or mse_loss itself
# lets the search use its best scorer.
loss = nn.functional.cross_entropy

# Further functions that may be defined: test, train, augment, rise, evaluate.
'''


def template() -> str:
    """Return the text of a study file with every setting as a comment."""
    lines = []
    for one in settings_of(SearchSettings).values():
        unit = f" ({one.unit})" if one.unit else ""
        comment = f"{one.help} Default{unit}: {one.shown_default}."
        lines += textwrap.wrap(comment, 94, initial_indent="    # ", subsequent_indent="    # ")
        lines.append(f'    # "{one.name}": {one.example},')
    return TEMPLATE.format(settings="\n".join(lines))


def init(
    file: Annotated[Path, typer.Argument(help="Where to write it.", show_default=False)] = Path(
        "study.py"
    ),
) -> None:
    """Write a study file to fill in. Never writes over a file."""
    with errors(as_json=False):
        if file.suffix != ".py":
            raise StudyFileError(f"A study file is a Python file; got {file}. Write {file}.py.")
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with file.open("x", encoding="utf-8") as opened:
                opened.write(template())
        except FileExistsError:
            raise StudyFileError(
                f"{file} exists, and is not written over. Name another file."
            ) from None
        name = escape(str(file))
        next_step = f"Fill in network() and calibration(), then: hq-optuna run {name}"
        say(Console(), f"Wrote {name}. {next_step}")
