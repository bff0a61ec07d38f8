"""The format on disk."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hq_optuna import attributes
from hq_optuna.attributes import StudyInfo, Ticket, digest, join, split

json_data = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
tickets = st.builds(
    Ticket,
    kind=st.sampled_from(["candidate", "incumbent", "surplus", "free"]),
    step=st.integers(),
    slot=st.integers(),
    parent=st.text(),
    bits=st.lists(st.integers(1, 16)).map(tuple),
    origin=st.none() | st.integers(),
    variable=st.none() | st.text(),
    from_bits=st.none() | st.integers(),
    worker=st.text(),
)


@settings(max_examples=30, deadline=None)
@given(json_data)
def test_what_is_split_is_joined_again(data):
    assert join("key", split("key", data)) == data


def test_parts_are_short_enough_for_a_mysql_text_column_even_in_four_byte_letters():
    data = {"text": "🜁" * 20_000, "ö": list(range(10_000))}
    parts = split("key", data)
    assert list(parts) == [f"key:{i}" for i in range(len(parts))]
    assert len(parts) > 4
    assert max(len(part.encode()) for part in parts.values()) <= 65_535
    assert join("key", {"key:x": "other", **parts, "keys:0": "other"}) == data


def test_nothing_is_joined_where_nothing_was_split():
    assert join("key", {"other:0": "{}", "key": "1"}) is None


@given(tickets)
def test_a_ticket_survives_the_storage(ticket):
    stored = {attributes.TICKET: json.loads(json.dumps(ticket.to_json()))}
    assert Ticket.read(stored) == ticket


@pytest.mark.parametrize("version", [0, 2, None, "1"])
def test_a_ticket_of_another_protocol_is_treated_as_absent(version):
    ticket = Ticket("candidate", 1, 0, "p", (8,)).to_json()
    assert Ticket.read({attributes.TICKET: ticket}) is not None
    assert Ticket.read({attributes.TICKET: {**ticket, "v": version}}) is None


@pytest.mark.parametrize("lost", ["kind", "step", "slot", "parent", "bits", "origin", "worker"])
def test_a_damaged_ticket_is_treated_as_absent(lost):
    ticket = Ticket("candidate", 1, 0, "p", (8,)).to_json()
    del ticket[lost]
    assert Ticket.read({attributes.TICKET: ticket}) is None
    assert Ticket.read({}) is None


def test_a_digest_depends_on_settings_step_and_state_and_not_on_their_order():
    made = {"seed": 0, "limit": 1.5, "rule": "min"}
    base = digest([made, 3, (8, 4)])
    assert len(base) == 12
    assert base == digest([dict(reversed(made.items())), 3, [8, 4]])
    assert base == digest([json.loads(json.dumps(made)), 3, (8, 4)])
    others = {
        digest([{**made, "seed": 1}, 3, (8, 4)]),
        digest([made, 4, (8, 4)]),
        digest([made, 3, (4, 8)]),
        digest([made, None, None]),
    }
    assert len(others | {base}) == 5


def test_study_info_survives_the_storage():
    info = StudyInfo(
        metric="bops",
        limit=1 / 3,
        budget="0.25 of the all-8-bit bops",
        int8=64.0,
        float32=1024.0,
        settings={"scorer": "trace", "rule": "ratio", "n_candidates": 8, "bits": [8, 4]},
        skipped=(("emb", "Embedding", "no multiply-accumulates"),),
        warnings=("Layer 'x' received no gradient.",),
    )
    assert StudyInfo.from_json(json.loads(json.dumps(dataclasses.asdict(info)))) == info
