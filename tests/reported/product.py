"""All that reported situations ask of the product, as plain functions: only here is its API named.

Layers go by name, an assignment is `{layer: (weight bits, activation bits)}` or one number for all.
"""

import subprocess
import sys
import warnings
from collections import namedtuple
from pathlib import Path

import optuna
import torch
from torch.nn.functional import cross_entropy

import hq_optuna as hq
from hq_optuna.errors import HqOptunaError, ResumeError, StorageError
from hq_optuna.network.unfused import unfused  # noqa: F401 (tests read it here)
from hq_optuna.report.data import report_data
from hq_optuna.report.page import write_report
from hq_optuna.rises import rise_of_loss
from hq_optuna.search import Limits

optuna.logging.set_verbosity(optuna.logging.CRITICAL)
warnings.simplefilter("ignore")
torch.set_num_threads(1)

Found = namedtuple("Found", "bits share warnings study network facts result")
Looked = namedtuple("Looked", "names macs said ready table samples scores networks")
Parts = namedtuple("Parts", "sampler pruner objective parameters")


def is_refusal(error):
    """Say whether the product refuses what was handed in, on purpose and before it scores."""
    late = getattr(error, "raised_at_work", False)
    return (
        isinstance(error, HqOptunaError)
        and isinstance(error, (ValueError, TypeError, StorageError))
        and not late
    )


def opened(network, data, loss=cross_entropy, **options):
    """Hand network, data and loss over; all that can be wrong with them is to be said here."""
    if "scorer" not in options and not options.get("training"):
        # These situations are told by a pass per candidate, or by gradients of the loss itself.
        by_outputs = rise_of_loss(loss) is not None or options.get("rise") is not None
        options["scorer"] = "gauss_newton" if by_outputs else "diagonal"
        options["measure_candidates"] = True
    return hq.BitSearch(network, data, loss, **{"pin_first_last": None, **options})


def layers(search):
    """Return the names of the layers whose bits are searched or fixed."""
    return [layer.name for layer in search.space.layers]


def assignment(search, bits):
    """Return the product's own form of an assignment."""
    if isinstance(bits, int):
        return hq.BitConfig.uniform(layers(search), bits, bits)
    return hq.BitConfig(bits)


def float_loss(network, data, loss=cross_entropy, **options):
    """Return the float network's mean loss over the calibration data, as the product has it."""
    return opened(network, data, loss, **options).objective.prepare().float_loss()


def rise_table(network, data, loss=cross_entropy, **options):
    """Return `{layer: {"weights" or "activations": {bits: predicted rise}}}`, and all warnings."""
    search = opened(network, data, loss, **options)
    table = search.objective.prepare().sensitivity.to_json()
    numbers = {
        n: {p: {int(b): v for b, v in row.items()} for p, row in parts.items()}
        for n, parts in table.items()
    }
    return numbers, list(search.objective.warnings)


def score(network, data, bits, loss=cross_entropy, **options):
    """Return the predicted loss rise of an assignment."""
    search = opened(network, data, loss, **options)
    return search.objective.prepare().score(assignment(search, bits)).total


def measured_rise(network, data, bits, loss=cross_entropy, **options):
    """Return what an assignment's loss over the calibration data is above the float network's."""
    search = opened(network, data, loss, **options)
    scorer = search.objective.prepare()
    return scorer.score(assignment(search, bits)).calibration_loss - scorer.float_loss()


def quantized(network, data, bits, loss=cross_entropy, **options):
    """Return the network with these bits, as a search would hand it out, and all warnings."""
    search = opened(network, data, loss, **options)
    search.objective.prepare()
    return search.objective.quantized(assignment(search, bits)), list(search.objective.warnings)


def search(
    network, data, loss=cross_entropy, *, budget="0.25 bops", storage=None, name=None,
    candidates=3, limit=None, during=None, after=5, artifacts=None, **options
):  # fmt: skip
    """Search; `during(study)` is called after so many trials; `limit` is the most of scores."""
    whole = opened(network, data, loss, budget=budget, **options)
    limits = None if limit is None else Limits(max_evaluations=limit)
    study = whole.open(
        storage, name, seed=0, n_candidates=candidates, limits=limits, artifacts=artifacts
    )
    calls = []

    def progress(log):
        calls.append(log)
        if during is not None and len(calls) == after:
            during(study)

    try:
        whole.work(study, on_progress=progress)
    except HqOptunaError as error:  # of a storage or of others' trials it may come at any time
        error.raised_at_work = not isinstance(error, (StorageError, ResumeError))
        raise
    result = whole.result(study)
    bits = {n: tuple(b) for n, b in result.config.items()}
    return Found(
        bits,
        result.cost / result.cost_int8,
        list(whole.objective.warnings),
        study,
        result.network,
        dict(result.facts),
        result,
    )


def training(data, every, epochs=1):
    """Return the options of a search that trains each so-many-th winner on these data."""
    settings = hq.TrainingSettings(epochs=epochs)
    return {"training": hq.TrainingPlan(data=data, every=every, settings=settings, final=None)}


def storage(url):
    """Return the Optuna storage that the product opens for a URL."""
    return hq.storages.open_storage(url)


def history(study):
    """Return a study's own scored trials as (bits, value), sorted; no trials of others."""
    done = [
        t for t in study.trials if t.state.name == "COMPLETE" and "score_weights" in t.user_attrs
    ]
    return sorted((tuple(sorted(t.params.items())), t.value) for t in done)


def looked_at(search, choose):
    """Return what an opened search tells of its network: names, MACs and tables by layer; a copy
    made ready in float; scores and networks of the assignments that `choose(names)` returns."""
    scorer = search.objective.prepare()
    names = layers(search)
    bits = [assignment(search, chosen) for chosen in choose(names)]
    table = {
        name: {part: {int(b): v for b, v in row.items()} for part, row in parts.items()}
        for name, parts in scorer.sensitivity.to_json().items()
    }
    said = [*map(str, search.objective.skipped), *search.objective.warnings]
    return Looked(
        names,
        {layer.name: layer.macs for layer in search.space.layers},
        "\n".join(said),
        hq.prepare(search.objective.model, search.space.layers),
        table,
        search.objective._facts["curvature_samples"],
        [scorer.score(each).total for each in bits],
        [search.objective.quantized(each) for each in bits],
    )


def rounded_input(network, layer, x):
    """Return what a layer of a quantized network makes of its input before it computes."""
    return network.get_submodule(layer).input_fake_quantize(x)


def macs(network, data, loss=cross_entropy):
    """Return MACs a sample of each layer; then skipped layers and warnings as one text."""
    search = opened(network, data, loss)
    search.objective.prepare()
    said = [*map(str, search.objective.skipped), *search.objective.warnings]
    return {layer.name: layer.macs for layer in search.space.layers}, "\n".join(said)


def parts(network, data, budget, bits):
    """Return sampler, pruner and objective for plain Optuna, and its parameters by name."""
    space = hq.SearchSpace.build(
        hq.introspect(network, data[0]).layers, bits=bits, pin_first_last=None
    )
    limit = hq.Budget.fraction(bops=budget)
    return Parts(
        hq.samplers.ProgressiveBitSampler(space, budget=limit, n_candidates=4, seed=0),
        hq.pruners.CostBudgetPruner(space, limit),
        hq.HessianObjective(network, data, space),
        {variable.name: variable.bits for variable in space.variables},
    )


def best(study, network, data):
    """Return bits by layer of the study's best trial, and their share of the cost of all 8 bits."""
    found = hq.assignment(study.best_trial, study)
    cost = hq.CostModel(hq.introspect(network, data[0]).layers, "bops")
    return {name: tuple(bits) for name, bits in found.items()}, cost.cost(found) / cost.int8


def saved_and_loaded(found, network, folder):
    """Return the network of an answer after a round through a folder."""
    found.result.save(folder)
    return hq.load(folder, network)


def reports(study, page):
    """Return a study's report as data, and write and return it as a page."""
    write_report(study, page)
    return report_data(study), page.read_text()


def command(*words, folder, through=()):
    """Run the command line in a folder, behind words of another program; return status, text."""
    program = str(Path(sys.executable).with_name("hq-optuna"))
    done = subprocess.run(
        [*through, program, *words], cwd=folder, capture_output=True, text=True, timeout=100
    )
    return done.returncode, done.stdout + done.stderr
