"""What must hold on a GPU, each as one function of the name of its device.

``python -m tests.devices.scenarios DEVICE`` runs them all, on ``cuda`` or on ``simulated``, and
prints a JSON object of what went wrong by name.
"""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hq_optuna as hq
from hq_optuna.errors import NetworkError
from hq_optuna.network.batches import read_batches
from hq_optuna.network.containers import tensors
from hq_optuna.network.copies import preserve_network
from hq_optuna.network.introspection import introspect
from hq_optuna.protocol.history import read_history
from hq_optuna.quantization.quantizers import QUANTIZERS
from hq_optuna.scoring import SCORERS
from hq_optuna.search import Limits
from hq_optuna.training import Trainer, TrainingSettings, trained_tensors
from tests.cli.conftest import STUDY
from tests.cli.test_training_command import TRAIN
from tests.devices import simulated_gpu
from tests.searches import Network, data, facts
from tests.small_networks import seeded
from tests.training.examples import float_net, labelled, prepared_net
from tests.training.short import flipped
from tests.training_searches import plan, search

SAME_KERNELS = {"simulated"}
"""Devices that give the CPU's digits, but for last ones that training makes more of."""


def tensors_mix_as_on_cuda(device: str) -> None:
    """What the simulation refuses and lets pass is what CUDA refuses and lets pass."""
    here, there = torch.arange(6.0).reshape(2, 3), torch.ones(2, 3, device=device)
    index, whole = torch.tensor([1, 0]), torch.ones(2, 2, dtype=torch.int64, device=device)
    for refused in (
        lambda: here + there,
        lambda: there.add_(here),
        lambda: torch.cat([there, here]),
        lambda: there @ here.T,
        lambda: nn.Linear(3, 2)(there),
        lambda: torch.equal(here, there),
        lambda: here[index.to(device)],
        lambda: whole @ whole,
        lambda: torch.rand(2, generator=seeded(0), device=device),
    ):
        with pytest.raises((RuntimeError, NotImplementedError)):
            refused()
    for refused in (there.numpy, lambda: there.__array__()):
        with pytest.raises((TypeError, RuntimeError)):
            refused()
    for value in (there + torch.tensor(2.0), there[index], there.copy_(here), there.double()):
        assert value.device.type == device
    assert there.cpu().equal(here)
    assert there.sum().item() == 15.0 and there[0].tolist() == [0.0, 1.0, 2.0]
    layer = nn.Linear(3, 2).to(device)
    layer(there).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.device.type == device
    with torch.autocast(device, torch.bfloat16):
        assert layer(there).dtype == torch.bfloat16


def a_training_goes_on_from_its_checkpoint(device: str) -> None:
    for precision in ("float32", "bfloat16"):
        settings = TrainingSettings(
            **{"epochs": 2, "batch_size": 8, "warmup_epochs": 0, "teacher_views": 2, "blend": 0.5},
            precision=precision,
        )
        network = prepared_net().to(device)
        fresh = copy.deepcopy(network)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "training.safetensors"

            def trainer(net: nn.Module, path: Path = path, settings: Any = settings) -> Trainer:
                options = {"teacher": float_net(), "augment": flipped, "checkpoint": path}
                return Trainer(net, labelled(), settings, **options)

            first = next(trainer(network).epochs())
            (second,) = trainer(fresh).epochs()
        assert (first.epoch, second.epoch) == (1, 2)
        assert math.isfinite(first.loss) and math.isfinite(second.loss)
        assert {p.device.type for p in fresh.parameters()} == {device}


def a_search_that_trains_gives_the_answer_of_the_cpu(device: str) -> None:
    def answer(where: str, folder: str) -> tuple[Any, Any]:
        options = {"training": plan(every=2), "validation": data(30, 2), "budget": "0.3 bops"}
        run = search(model=Network().to(where), **options)
        study = run.optimize(artifacts=Path(folder) / where)
        found = run.result(study, test=lambda: data(12, 3))
        assert {t.device.type for t in found.network.state_dict().values()} == {where}
        assert found.network(data()[0].to(where)).device.type == where
        assert any(record.training for record in read_history(study).records)
        return study, trained_tensors(found.network)

    with tempfile.TemporaryDirectory() as folder:
        (here, weights), (there, on_gpu) = answer("cpu", folder), answer(device, folder)
    if device in SAME_KERNELS:
        one, other = ([c[:4] for c in facts(s)[0]] for s in (here, there))  # scores have 9 digits
        assert (one, facts(here)[1]) == (other, facts(there)[1])
        for name, tensor in weights.items():
            torch.testing.assert_close(on_gpu[name].cpu(), tensor, rtol=0.01, atol=1e-3)
    else:  # the first step comes before any training
        one, other = (
            {c.slot: c.score for c in read_history(s).candidates if c.step == 1}
            for s in (here, there)
        )
        assert one == pytest.approx(other, rel=1e-2)


def every_scorer_gives_the_scores_of_the_cpu(device: str) -> None:
    for scorer in SCORERS:
        scores = []
        for where in ("cpu", device):
            run = search(model=Network().to(where), scorer=scorer)
            study = run.optimize(limits=Limits(max_evaluations=4), refine=False)
            found = read_history(study).candidates
            scores.append([c.score for c in found if c.step == 1])
        close = 1e-9 if device in SAME_KERNELS else 1e-2
        assert scores[0] == pytest.approx(scores[1], rel=close), scorer


def every_quantizer_is_searched_and_trained(device: str) -> None:
    for quantizer in QUANTIZERS:
        bits = QUANTIZERS[quantizer].all_bits
        run = search(
            model=Network().to(device),
            quantizers={"middle": quantizer},
            allowed={"middle": [b for b in (8, 4, 2, 1) if b in bits]},
            training=plan(every=0),
            budget="0.4 bops",
        )
        with tempfile.TemporaryDirectory() as folder:
            network = run.result(run.optimize(artifacts=folder, refine=False)).network
        assert {t.device.type for t in network.parameters()} == {device}


def random_states_are_left_as_found(device: str) -> None:
    module = torch.get_device_module(device)
    network = Network().to(device).train()  # with dropout
    before = module.get_rng_state()
    n_restored = getattr(module, "restored", 0)
    with preserve_network(network):
        network(data()[0].to(device))
    assert torch.equal(module.get_rng_state(), before)
    if device == "simulated":
        assert module.restored == n_restored + 1


def all_tensors_may_be_made_there_by_default(device: str) -> None:
    """As after ``torch.set_default_device("cuda")``."""
    torch.set_default_device(device)
    try:
        _search_made_there(device)
    finally:
        torch.set_default_device("cpu")


def _search_made_there(device: str) -> None:
    generator = torch.Generator(device) if device == "cuda" else None
    images = torch.randn(24, 1, 7, 7, generator=generator)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    network.append(nn.Linear(100, 3))
    labels = torch.arange(24) % 3
    trained = hq.TrainingPlan(data=(images, labels), every=2, final=plan().final)
    options = {"bits": (8, 4, 2), "pin_first_last": None, "training": trained}
    run = hq.BitSearch(network, (images, labels), **options)
    with tempfile.TemporaryDirectory() as folder:
        answer = run.result(run.optimize(artifacts=folder)).network
    assert answer(images).device.type == device


def a_device_without_double_precision_is_refused(device: str) -> None:
    if device == "simulated":
        simulated_gpu.refused_types.add(torch.float64)
        with pytest.raises(NetworkError, match="no double precision"):
            introspect(Network().to(device), data()[0])
        simulated_gpu.refused_types.clear()


def the_commands_run_there(device: str) -> None:
    """``run`` and ``launch``, whose workers are processes of their own."""
    simulating = "\nfrom tests.devices.simulated_gpu import simulate\nsimulate()\n"
    text = STUDY + TRAIN + (simulating if device == "simulated" else "")
    text += "\ndef evaluate(network, data):\n"
    text += f"    assert data[0].inputs.device.type == {device!r}\n    return {{'n': data[0].n}}\n"
    found = []
    for words in (["run"], ["launch", "--workers", "2"]):
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "tiny.py").write_text(text)
            command = [sys.executable, "-m", "hq_optuna", words[0], "tiny.py", *words[1:]]
            options = ["--device", device, "--final-epochs", "1", "--json"]
            done = subprocess.run(
                [*command, *options],
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
                **{"cwd": folder, "capture_output": True, "text": True, "check": False},
            )
        assert done.returncode == 0, done.stdout + done.stderr
        found.append([row["weight_bits"] for row in json.loads(done.stdout)["layers"]])
    assert found[0] == found[1]


def batches_move_as_a_whole(device: str) -> None:
    inputs = {"x": torch.ones(4, 2), "pair": (torch.ones(4), torch.ones(4))}
    moved = read_batches([(inputs, torch.arange(4))]).to(torch.device(device))
    assert {t.device.type for t in tensors(moved[0].inputs)} == {device}


SCENARIOS = {
    name: value
    for name, value in vars().items()
    if getattr(value, "__module__", None) == __name__ and not name.startswith("_")
}


def run_all(device: str) -> dict[str, str]:
    """Return of each scenario what went wrong; nothing where all is well."""
    found = {}
    for name, scenario in SCENARIOS.items():
        try:
            scenario(device)
            found[name] = ""
        except BaseException:
            found[name] = traceback.format_exc()
    return found


if __name__ == "__main__":
    if sys.argv[1] == "simulated":
        simulated_gpu.simulate()
    print(json.dumps(run_all(sys.argv[1])))
