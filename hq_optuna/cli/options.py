"""Options that several commands share, written once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from hq_optuna.storages import RETRY_FOR_S

ArtifactsAt = Annotated[
    str | None,
    typer.Option(
        "--artifacts",
        help="Folder or s3://bucket/prefix for files of the study. "
        "\\[default: artifacts in the run's folder]",
        show_default=False,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Threads of PyTorch. \\[default: what the network keeps busy]",
        show_default=False,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="Where the network runs: cpu, cuda, cuda:1. \\[default: where network() puts it]",
        show_default=False,
    ),
]
MaxTrials = Annotated[
    int | None,
    typer.Option(min=1, help="Trials (candidates and step records) at most.", show_default=False),
]
MaxEvaluations = Annotated[
    int | None, typer.Option(min=1, help="Candidates scored at most.", show_default=False)
]
MaxSeconds = Annotated[
    float | None,
    typer.Option(
        min=0.001,
        help="Seconds of work of all workers together at most; where that ends depends on the "
        "machine.",
        show_default=False,
    ),
]
RetryFor = Annotated[
    float,
    typer.Option(
        min=0, help="Seconds to try again when the storage does not answer, or its disk is full."
    ),
]
RETRY_FOR = RETRY_FOR_S


def _search(
    budget: Annotated[
        str | None,
        typer.Option(
            help="'0.25 bops' (of all-8-bit), '40% size_bytes', '24 GBOPs', '64 KiB'.",
            show_default=False,
        ),
    ] = None,
    candidates: Annotated[
        int | None, typer.Option(help="Candidates a step. \\[default: 8]", show_default=False)
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(
            help="ratio (score per cost) or min (the patent's). \\[default: ratio]",
            show_default=False,
        ),
    ] = None,
    scorer: Annotated[
        str | None,
        typer.Option(
            help="gauss_newton, loss, or a sum over layers: diagonal, trace, fisher, hutchinson. "
            "\\[default: gauss_newton, for losses it knows]",
            show_default=False,
        ),
    ] = None,
    bits: Annotated[
        str | None, typer.Option(help="'2-8' or '8,4,2'. \\[default: 2-8]", show_default=False)
    ] = None,
    activation_bits: Annotated[
        str | None,
        typer.Option(
            help="same, float, a number, or bits searched apart ('4,8'). \\[default: same]",
            show_default=False,
        ),
    ] = None,
    pin_first_last: Annotated[
        str | None,
        typer.Option(
            help="Bits of first and last layer, or none. \\[default: 8]", show_default=False
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the draws. \\[default: 0]", show_default=False)
    ] = None,
    rounding: Annotated[
        str | None,
        typer.Option(
            help="How weights are rounded: compensated (errors make up for each other) or nearest. "
            "\\[default: compensated]",
            show_default=False,
        ),
    ] = None,
    quantizer: Annotated[
        list[str] | None,
        typer.Option(
            help="How weights of some layers are rounded: 'layer3.*=midrise', again for more "
            "layers; uniform, binary (1 bit), ternary (2 bits), midrise or dorefa. "
            "\\[default: uniform]",
            show_default=False,
            metavar="GLOB=NAME",
        ),
    ] = None,
    correction: Annotated[
        bool | None,
        typer.Option(
            help="Correct batch-norm statistics and biases for the bits. \\[default: correction]",
            show_default=False,
        ),
    ] = None,
    refine: Annotated[
        bool | None,
        typer.Option(
            help="Refine the answer by swaps once the budget is met. \\[default: refine]",
            show_default=False,
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="Of candidates' forward passes: float32 or bfloat16. \\[default: float32]",
            show_default=False,
        ),
    ] = None,
    train_every: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Steps after which their winner is trained: 1 as in the patent. "
            "\\[default: never]",
            show_default=False,
        ),
    ] = None,
    train_epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Epochs of that. \\[default: 2]", show_default=False),
    ] = None,
    final_epochs: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Epochs in which the answer is trained; 0 for none. "
            "\\[default: 20 with --train-every, else 0]",
            show_default=False,
        ),
    ] = None,
    max_trials: MaxTrials = None,
    max_evaluations: MaxEvaluations = None,
    max_seconds: MaxSeconds = None,
) -> None: ...


_SETTING_OF = {"candidates": "n_candidates", "quantizer": "quantizers"}
"""Options whose setting has another name."""


def searches(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of a search; it receives those given as the mapping ``given``."""
    options = inspect.signature(_search, eval_str=True).parameters
    own = [
        parameter
        for name, parameter in inspect.signature(command, eval_str=True).parameters.items()
        if name != "given"
    ]

    @functools.wraps(command)
    def called(*arguments: Any, **values: Any) -> Any:
        given = {_SETTING_OF.get(name, name): values.pop(name) for name in options}
        set_ = {name: value for name, value in given.items() if value not in (None, [])}
        return command(*arguments, given=set_, **values)

    parameters = [*own, *options.values()]
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {p.name: p.annotation for p in parameters}
    return called


Given = Mapping[str, Any]
"""Settings of the search from the command line, by name."""
