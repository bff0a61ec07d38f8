"""Bit searches without PyTorch: an additive table stands in for the network.

The study is written as the runner writes it (search space, sensitivity, study info), and its trials
carry the same attributes as those of a real objective, so that everything that reads a study can be
tested in milliseconds.

    study = fake_study(layers=6, budget=Budget.fraction(bops=0.4))
"""

from __future__ import annotations

import dataclasses
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import TrialState

from hq_optuna import attributes
from hq_optuna.attributes import StudyInfo
from hq_optuna.protocol.claims import write_facts
from hq_optuna.protocol.history import assignment
from hq_optuna.protocol.tickets import facts as facts_of
from hq_optuna.samplers import ProgressiveBitSampler
from hq_optuna.settings import SearchSettings
from hq_optuna.space.assignment import BitConfig
from hq_optuna.space.budget import Budget
from hq_optuna.space.cost import CostModel
from hq_optuna.space.layers import FLOAT_BITS, LayerSpec
from hq_optuna.space.search_space import SearchSpace

Table = dict[str, dict[str, dict[int, float]]]
"""``{layer: {"weights": {bits: nats}, "activations": {bits: nats}}}``."""


def fake_layers(n: int) -> list[LayerSpec]:
    """Return ``n`` layers as in a convolutional network: ``conv1``, ``layer1.0.conv``, …, ``fc``.

    Channels double and the image halves on the way, so early layers have MACs and late ones
    weights.
    """
    layers = [LayerSpec("conv1", "Conv2d", (16, 3, 3, 3), 0, 432 * 1024, 1, 3072)]
    for i in range(n - 2):
        stage = min(3, 4 * i // max(1, n - 2))
        channels, pixels = 16 << stage, 1024 >> (2 * stage)
        shape = (channels, channels, 3, 3)
        name = f"layer{stage + 1}.{i}.conv"
        weights = channels * channels * 9
        layers.append(LayerSpec(name, "Conv2d", shape, 0, weights * pixels, 1, channels * pixels))
    return [*layers, LayerSpec("fc", "Linear", (10, 128), 0, 1280, 1, 128)][:n]


def fake_table(space: SearchSpace) -> Table:
    """Return a sensitivity table: a rise of ``s·4**-bits`` nats, s different in every layer."""
    widths = {b for v in space.variables for b in v.bits}
    widths |= {b for pair in space.start.values() for b in pair}
    widths = sorted(widths - {FLOAT_BITS})
    table: Table = {}
    for i, layer in enumerate(space.layers):
        s = 0.25 * (1 + (7 * i) % 11)
        table[layer.name] = {
            "weights": {b: s * 4.0**-b for b in widths},
            "activations": {b: 0.5 * s * 4.0**-b for b in widths},
        }
    return table


def fake_score(table: Table, config: BitConfig) -> tuple[float, float]:
    """Return the weights' and the activations' part of the score, nats; float adds nothing."""
    return (
        sum(table[name]["weights"].get(bits.weight_bits, 0.0) for name, bits in config.items()),
        sum(
            table[name]["activations"].get(bits.activation_bits, 0.0)
            for name, bits in config.items()
        ),
    )


def fake_space(layers: int = 6, **choices: Any) -> SearchSpace:
    """Return `SearchSpace.build` of `fake_layers`; 8, 4 and 2 bits unless ``choices`` says more."""
    return SearchSpace.build(fake_layers(layers), **{"bits": (8, 4, 2), **choices})


def fake_study(
    space: SearchSpace | int = 6,
    *,
    budget: Budget | None = None,
    n_candidates: int = 4,
    rule: Any = "ratio",
    seed: int = 0,
    encoding: Any = "layers",
    n_trials: int | None = None,
    facts: dict[str, Any] | None = None,
    skipped: tuple[tuple[str, str, str], ...] = (),
    warnings: tuple[str, ...] = (),
    sensitivity: bool = True,
    storage: BaseStorage | str | None = None,
    name: str = "fake",
    bare: bool = False,
    train_every: int = 0,
    final: bool = False,
) -> Study:
    """Return a study of a search on an additive table, finished unless ``n_trials`` says less.

    Args:
        space: The search space, or a number of layers for `fake_space`.
        budget: Default: 40 % of the all-8-bit BOPs.
        n_candidates: Of the sampler, as are ``rule``, ``seed`` and ``encoding``.
        n_trials: Stop after so many trials, 0 for a study without any.
        train_every: Of the sampler, as is ``final``. See `fake_training`.
        facts: What was measured at the end, ``{"accuracy_before": 0.98, …}``.
        skipped: ``(name, kind, reason)`` of modules that are not quantized.
        warnings: Sentences of the study info.
        sensitivity: Whether the table is stored.
        storage: Default: in memory.
        name: Name of the study.
        bare: Leave trials without user attributes and without calibration loss, as an objective of
            somebody else would.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if isinstance(space, int):
        space = fake_space(space)
    budget = budget or Budget.fraction(bops=0.4)
    sampler = ProgressiveBitSampler(
        space, budget=budget, n_candidates=n_candidates, rule=rule, seed=seed, encoding=encoding,
        train_every=train_every, final=final,
    )  # fmt: skip
    study = optuna.create_study(study_name=name, storage=storage, sampler=sampler)
    table, model = fake_table(space), CostModel(space.layers, budget.metric)
    info = StudyInfo(
        metric=budget.metric,
        limit=budget.limit(space),
        budget=str(budget),
        int8=model.int8,
        float32=model.float32,
        settings={
            **SearchSettings().to_json(),
            **{"scorer": "table", "rule": rule, "n_candidates": n_candidates, "seed": seed},
        },
        skipped=skipped,
        warnings=warnings,
        training={"every": train_every} if train_every or final else None,
    )
    written = attributes.split(attributes.SPACE, space.to_json())
    if sensitivity:
        written |= attributes.split(attributes.SENSITIVITY, table)
    for key, value in written.items():
        study._storage.set_study_system_attr(study._study_id, key, value)
    study.set_user_attr(attributes.INFO, dataclasses.asdict(info))
    for key, value in (facts or {}).items():
        study.set_user_attr(f"{attributes.REPORT}:{key}", value)

    def objective(trial: optuna.Trial) -> float:
        if encoding == "layers":
            state = [trial.suggest_categorical(v.name, v.bits) for v in space.variables]
            config = space.config(state)
        else:
            config = assignment(trial)
        weights, activations = fake_score(table, config)
        loss = 0.5 + weights + activations
        ticket = sampler.ticket(study, trial)
        if ticket is not None and (ticket.trains or trained):
            if ticket.trains:
                trained.append((weights, activations))
            weights, activations = weights - trained[-1][0], activations - trained[-1][1]
            loss = 0.5 - 0.1 * len(trained) + weights + activations
            if ticket.trains and not bare:
                said = fake_training(ticket.step, len(trained), is_final=is_final(study))
                shown = facts_of(ticket, space, {model.metric: model.cost(config)})
                for key, value in {**shown, attributes.TRAINING: said}.items():
                    trial.set_user_attr(key, value)
        if not bare:
            trial.set_user_attr(attributes.SCORE_WEIGHTS, weights)
            trial.set_user_attr(attributes.SCORE_ACTIVATIONS, activations)
            trial.set_user_attr(attributes.CALIBRATION_LOSS, loss)
            trial.set_user_attr(attributes.COST, model.cost(config))
            trial.set_user_attr(attributes.SECONDS, 0.25)
            trial.set_user_attr(attributes.WORKER, "box:1234")
        return weights + activations

    trained: list[tuple[float, float]] = []

    def is_final(study: Study) -> bool:
        step = sampler.log(study).open
        return step is not None and step.final

    if n_trials != 0:
        study.optimize(objective, n_trials=n_trials)
    return study


def fake_training(step: int, n: int, *, is_final: bool = False) -> dict[str, Any]:
    """Return what the record of the ``n``-th training of a fake search says.

    A trained network's weights are the rounded ones: its own score is 0, the candidates made from
    it have what they add to that, and every training takes 0.1 nats from the loss.
    """
    return {
        "kind": "final" if is_final else "step",
        "score": 0.0,
        "epochs": 5 if is_final else 2,
        "seconds": 1.5 + n,
        "samples": 640,
        "loss_first": 0.25,
        "loss_last": 0.125,
        "curvature": "second moments of training",
        "clipped": 0,
        "loss_before": round(0.5 - 0.1 * (n - 1) + 0.01 * step, 6),
        "accuracy_before": round(0.9 - 0.01 * step, 6),
        "loss_after": round(0.5 - 0.1 * n, 6),
        "accuracy_after": round(0.9 + 0.01 * n, 6),
        "weights": {"id": f"w{step}", "sha256": "00", "bytes": 1},
        "sensitivity": {"id": f"s{step}", "sha256": "00", "bytes": 1},
    }


def score(study: Study, space: SearchSpace, n_trials: int | None = None) -> None:
    """Run trials of a `fake_study` as workers do: claimed whole, their facts written at the end.

    Args:
        study: With its sampler.
        space: Its search space.
        n_trials: Stop after so many, or when the search is over.
    """
    sampler, table = study.sampler, fake_table(space)
    assert isinstance(sampler, ProgressiveBitSampler)
    done = 0
    while n_trials is None or done < n_trials:
        trial = sampler.ask(study)
        if trial is None:
            return
        ticket = sampler.ticket(study, trial)
        assert ticket is not None
        weights, activations = fake_score(table, space.config(ticket.bits))
        facts = {attributes.SCORE_WEIGHTS: weights, attributes.SCORE_ACTIVATIONS: activations}
        facts |= {
            attributes.CALIBRATION_LOSS: 0.5 + weights + activations,
            attributes.SECONDS: 0.25,
        }
        write_facts(trial, facts)
        trial.finish(TrialState.COMPLETE, weights + activations)
        done += 1
