"""Workers share what they prepare, piece by piece, and have the same table as one alone."""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.study import Study
from torch import nn

import hq_optuna as hq
from hq_optuna import attributes
from hq_optuna.artifacts.store import Artifacts, open_artifacts
from hq_optuna.cli.status import line
from hq_optuna.dashboard import PreparationNote
from hq_optuna.dashboard.pages import note_in
from hq_optuna.objective import preparation
from hq_optuna.objective.preparation import Preparation
from hq_optuna.optuna_internals import place_of
from hq_optuna.protocol import worker_identity
from hq_optuna.protocol.owners import GRACE_S
from hq_optuna.protocol.pieces import Piece, PieceBoard, PieceState, read_pieces
from hq_optuna.protocol.status import read_status
from hq_optuna.storages import open_storage, sqlite_url
from tests.elsewhere import AWAY, DEAD


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 6, 3, padding=1, groups=3), nn.ReLU(), nn.Flatten(), nn.Linear(384, 5)),
    ).eval()


def search(**changes: object) -> hq.BitSearch:
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(160, 2, 8, 8, generator=generator), torch.arange(160) % 5
    given = {"pin_first_last": None, "budget": "0.3 bops", "batch_size": 16, **changes}
    return hq.BitSearch(network(), data, **given)


@pytest.fixture(autouse=True)
def groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Split small networks too."""
    monkeypatch.setattr(preparation, "GROUP_MACS", 1.0)


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the pieces that are computed, by name."""
    found = Counter[str]()
    compute = Preparation._compute

    def counted(self: Preparation, piece: Piece) -> object:
        found[piece.name] += 1
        return compute(self, piece)

    monkeypatch.setattr(Preparation, "_compute", counted)
    return found


def started(tmp_path: Path, mine: hq.BitSearch) -> Study:
    """Return the study of a search in which nothing is prepared yet."""
    storage = open_storage(sqlite_url(tmp_path / "s.db"))
    given = {"sampler": mine._sampler({}), "load_if_exists": True, "study_name": "s"}
    return optuna.create_study(storage=storage, **given)


def table_of(mine: hq.BitSearch, study: Study, artifacts: Artifacts | None) -> dict[str, Any]:
    return mine.objective.prepare(study, artifacts=artifacts).sensitivity.to_json()


def alone(**changes: object) -> dict[str, Any]:
    return search(**changes).objective.prepare().sensitivity.to_json()


@pytest.mark.parametrize("scorer", ["hessian_trace", "fisher"])
def test_workers_that_prepare_together_have_the_table_of_one(tmp_path, done, scorer):
    expected = alone(scorer=scorer)
    pieces = dict(done)
    assert len(pieces) >= 4
    done.clear()
    files, found, errors = open_artifacts(tmp_path / "files"), list[object](), list[Exception]()
    workers = [search(scorer=scorer) for _ in range(3)]
    started(tmp_path, workers[0])

    def one(mine: hq.BitSearch) -> None:
        try:
            found.append(table_of(mine, started(tmp_path, mine), files))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert found == [expected] * 3
    assert done == pieces, "each piece is computed once"


def test_who_comes_later_computes_nothing_and_measures_the_same(tmp_path, done):
    first, later, files = search(), search(), open_artifacts(tmp_path / "files")
    study = started(tmp_path, first)
    config = first.space.config([4] * len(first.space.variables))
    places = first.objective.setup.set_aside_places
    expected = first.objective.prepare(study, artifacts=files).measured(config, places)
    done.clear()
    scorer = later.objective.prepare(started(tmp_path, later), artifacts=files)
    assert scorer.score(config) == first.objective.prepare(study).score(config)
    assert scorer.measured(config, places) == expected
    assert not done, "codes, ranges and statistics were loaded"
    networks = [one.quantized(config) for one in (first.objective, later.objective)]
    x = torch.ones(1, 2, 8, 8)
    assert torch.equal(networks[0](x), networks[1](x))


def test_without_a_store_each_worker_prepares_for_itself_and_measures_the_same(
    tmp_path, done, caplog
):
    first, later = search(), search()
    study = started(tmp_path, first)
    config = first.space.config([4] * len(first.space.variables))
    places = first.objective.setup.set_aside_places
    with caplog.at_level(logging.INFO, "hq_optuna"):
        expected = first.objective.prepare(study).measured(config, places)
    assert "no artifact store, so this worker prepares for itself" in caplog.text
    done.clear()
    scorer = later.objective.prepare(started(tmp_path, later))
    assert scorer.score(config).total == first.objective.prepare(study).score(config).total
    assert not done, "a look-up needs no network"
    assert scorer.measured(config, places) == expected
    assert not any(name.startswith("table") for name in done)


def test_what_a_dead_worker_was_at_is_taken_over_and_the_rest_is_kept(tmp_path, done):
    class Killed(BaseException):
        pass

    expected = alone()
    pieces = dict(done)
    done.clear()
    victim, files = search(), open_artifacts(tmp_path / "files")
    study = started(tmp_path, victim)
    compute = Preparation._compute

    def dies(self: Preparation, piece: Piece) -> object:
        if sum(done.values()) == 2:
            raise Killed
        return compute(self, piece)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Preparation, "_compute", dies)
        patch.setattr(PieceBoard, "holding", lambda self, piece: contextlib.nullcontext())
        with pytest.raises(Killed):
            table_of(victim, study, files)
    storage, study_id = place_of(study)
    [left] = [p for p in read_pieces(storage.get_study_system_attrs(study_id)) if _at_work(p)]
    key = next(k for k in storage.get_study_system_attrs(study_id) if k.endswith(left.name))
    claim = storage.get_study_system_attrs(study_id)[key]
    storage.set_study_system_attr(study_id, key, {**claim, "worker": DEAD})
    other = search()
    assert table_of(other, started(tmp_path, other), files) == expected
    assert done == pieces, "one piece was lost, before it was done"


def _at_work(piece: PieceState) -> bool:
    return bool(piece.worker) and not piece.done


def test_what_the_store_lost_is_computed_again(tmp_path, done, caplog):
    first, later, files = search(), search(), open_artifacts(tmp_path / "files")
    study = started(tmp_path, first)
    config = first.space.config([4] * len(first.space.variables))
    places = first.objective.setup.set_aside_places
    expected = first.objective.prepare(study, artifacts=files).measured(config, places)
    done.clear()
    shutil.rmtree(tmp_path / "files")
    scorer = later.objective.prepare(started(tmp_path, later), artifacts=files)
    assert scorer.measured(config, places) == expected
    assert done and not any(name.startswith("table") for name in done)
    assert "is computed here again" in caplog.text


def test_a_study_says_which_pieces_are_done_and_who_is_at_them(tmp_path):
    study = optuna.create_study(storage=open_storage(sqlite_url(tmp_path / "s.db")))
    storage, study_id = place_of(study)
    pieces = (Piece("a", 2.0), Piece("b", 1.0), Piece("c", 4.0, stage=1))
    board = PieceBoard(study, "search", pieces)
    assert read_pieces(storage.get_study_system_attrs(study_id)) == ()
    board.announce()
    assert board.read() == {}
    first = board.claim()
    assert first is not None
    assert board.finish(first, {"x": 1}, 2.5) == {"x": 1}
    second = board.claim()
    assert second is not None and {first.name, second.name} == {"a", "b"}
    assert board.claim() is None, "the second stage waits for the first"
    told = {piece.name: piece for piece in read_pieces(storage.get_study_system_attrs(study_id))}
    assert [told[first.name].done, told[second.name].done, told["c"].worker] == [True, False, ""]
    assert told[first.name].seconds == 2.5
    assert told[second.name].worker == worker_identity.worker_id()
    board.finish(second, {"x": 2}, 1.0)
    board.read()
    assert board.claim() == pieces[2]


def test_of_two_results_the_first_counts_and_claims_of_another_host_are_kept_while_they_change(
    tmp_path, monkeypatch
):
    now = [0.0]
    monkeypatch.setattr("hq_optuna.protocol.pieces.time.monotonic", lambda: now[0])
    study = optuna.create_study(storage=open_storage(sqlite_url(tmp_path / "s.db")))
    storage, study_id = place_of(study)
    mine, theirs = (PieceBoard(study, "search", (Piece("a", 1.0),)) for _ in range(2))
    key = f"{attributes.PIECE}:search:a"

    def beat(count: int) -> None:
        claim = {"worker": AWAY, "claim": 1, "beats": count}
        storage.set_study_system_attr(study_id, key, claim)

    for count in range(4):
        beat(count)
        now[0] += GRACE_S - 1
        assert mine.read() == {} and mine.claim() is None
    now[0] += 2 * GRACE_S
    mine.read()
    piece = mine.claim()
    assert piece is not None, "who is silent is dead"
    theirs._stored["a"] = {"worker": AWAY, "claim": 1, "beats": 3}  # it was only slow
    assert theirs.finish(piece, {"of": "theirs"}, 1.0) == {"of": "theirs"}
    assert mine.finish(piece, {"of": "mine"}, 1.0) == {"of": "theirs"}


def test_a_piece_that_fails_is_given_back(tmp_path):
    study = optuna.create_study(storage=open_storage(sqlite_url(tmp_path / "s.db")))
    board = PieceBoard(study, "search", (Piece("a", 1.0),))
    board.read()
    piece = board.claim()
    assert piece is not None
    with pytest.raises(KeyboardInterrupt), board.holding(piece):
        raise KeyboardInterrupt
    other = PieceBoard(study, "search", (Piece("a", 1.0),))
    other.read()
    assert other.claim() == piece


def test_the_note_and_the_status_of_a_study_say_how_far_its_preparation_is(tmp_path, monkeypatch):
    monkeypatch.setattr("hq_optuna.dashboard.writer.REST", 0)
    mine, files = search(), open_artifacts(tmp_path / "files")
    study = started(tmp_path, mine)
    note, lines = PreparationNote(study, every_s=0.0), list[str]()

    def look(what: str, done: int, of: int) -> None:
        note()
        lines.append(line(read_status(study)))

    mine.objective.prepare(study, artifacts=files, progress=look)
    storage, study_id = place_of(study)
    text = note_in(storage.get_study_system_attrs(study_id))
    n = len(read_pieces(storage.get_study_system_attrs(study_id)))
    assert f"of {n} pieces are done" in text
    assert "| layers:0 | done | " in text
    assert lines[0].startswith(f"preparing: 0 of {n} pieces, 0 % of the work")
    assert f"preparing: {n - 1} of {n} pieces" in lines[-2]
    assert "1 worker" in lines[-2]
