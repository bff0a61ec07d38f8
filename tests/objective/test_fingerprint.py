"""What a search depends on is stored once, and a difference is named."""

from __future__ import annotations

import copy
from functools import partial

import optuna
import pytest
import torch
from torch import nn

from hq_optuna import attributes
from hq_optuna.errors import ResumeError
from hq_optuna.objective.fingerprint import check_or_write, network_digest, versions
from hq_optuna.storages import sqlite_url
from tests.searches import Network, search


def test_equal_networks_have_one_digest_whatever_their_mode_and_gradients():
    network = Network()
    digest = network_digest(network)
    assert len(digest) == 16
    assert digest == network_digest(copy.deepcopy(network).eval()) == network_digest(Network())
    network(torch.ones(2, 1, 7, 7)).sum().backward()
    network.load_state_dict(Network().state_dict())  # the pass moved the batch-norm statistics
    network.first.weight.requires_grad_(False)
    assert network_digest(network) == digest


def test_a_network_in_channels_last_memory_is_the_same_network():
    assert network_digest(Network().to(memory_format=torch.channels_last)) == network_digest(
        Network()
    )


@torch.no_grad()
def test_the_digest_depends_on_every_weight_buffer_and_on_the_structure():
    digests = {network_digest(Network())}
    changed = Network()
    changed.last.bias[2] = changed.last.bias[2].nextafter(torch.tensor(9.0))
    digests.add(network_digest(changed))
    changed = Network()
    changed.norm.running_var[0] += 1
    digests.add(network_digest(changed))
    changed = Network()
    changed.middle.stride = (1, 1)  # same tensors, another computation
    digests.add(network_digest(changed))
    changed = Network()
    changed.norm.eps = 0.1
    digests.add(network_digest(changed))
    digests.add(network_digest(Network().double()))
    digests.add(network_digest(nn.Sequential(*Network().children())))
    assert len(digests) == 7


def test_networks_with_odd_tensors_have_a_digest():
    network = nn.Module()
    for name, tensor in {
        "scalar": torch.tensor(3.0),
        "flags": torch.tensor([True, False]),
        "empty": torch.empty(0, 4),
        "brain": torch.ones(3, dtype=torch.bfloat16),
        "view": torch.arange(12).reshape(3, 4).T,
    }.items():
        network.register_buffer(name, tensor)
    digest = network_digest(network)
    network.get_buffer("flags")[1] = True
    assert network_digest(network) != digest


def test_the_first_search_writes_and_an_equal_one_goes_on():
    study = optuna.create_study(study_name="s")
    mine = {"network": "abc", "seed": 0}
    check_or_write(study, mine)
    stored = study.user_attrs[attributes.FINGERPRINT]
    assert stored == {**mine, "versions": versions()}
    check_or_write(study, dict(mine))
    assert study.user_attrs[attributes.FINGERPRINT] == stored


def test_other_versions_are_recorded_and_no_reason_to_refuse():
    study = optuna.create_study()
    study.set_user_attr(attributes.FINGERPRINT, {"seed": 0, "versions": {"torch": "1.0"}})
    check_or_write(study, {"seed": 0})
    assert set(versions()) == {"hq_optuna", "optuna", "torch", "python"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("network", "the network's weights or structure"),
        ("data", "the calibration data"),
        ("space", "the search space"),
        ("scorer", "the scorer"),
        ("observer", "the observer of activation ranges"),
        ("loss", "the loss function"),
        ("budget", "the budget"),
        ("rule", "the winner rule"),
        ("n_candidates", "the number of candidates a step"),
        ("seed", "the seed"),
        ("something", "something"),
    ],
)
def test_a_change_is_named_in_words_with_both_values(name, words):
    study = optuna.create_study(study_name="mine")
    check_or_write(study, {name: "old", "same": 1})
    before = dict(study.user_attrs)
    with pytest.raises(ResumeError) as error:
        check_or_write(study, {name: "new", "same": 1})
    text = str(error.value)
    assert text.startswith(f"Study 'mine' is another search. Changed: {words}")
    assert "(study: old, now: new)" in text
    assert text.endswith("or give a new study name (--name).")
    assert error.value.changed == (name,)
    assert study.user_attrs == before


def test_all_changes_are_named():
    study = optuna.create_study()
    check_or_write(study, {"seed": 0, "data": "a", "rule": "min"})
    with pytest.raises(ResumeError, match=r"the seed .*; the calibration data") as error:
        check_or_write(study, {"seed": 1, "data": "b", "rule": "min"})
    assert error.value.changed == ("seed", "data")


@pytest.mark.parametrize(
    "other",
    [
        nn.CrossEntropyLoss(label_smoothing=0.3),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0])),
        partial(nn.functional.cross_entropy, label_smoothing=0.3),
        nn.functional.cross_entropy,
    ],
)
def test_a_loss_with_other_settings_is_another_loss(other, tmp_path):
    url = sqlite_url(tmp_path / "s.db")
    for loss in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss()):
        search(loss_fn=loss, scorer="diagonal").open(url, "s")
    with pytest.raises(ResumeError) as caught:
        search(loss_fn=other, scorer="diagonal").open(url, "s")
    assert caught.value.changed == ("loss",)
