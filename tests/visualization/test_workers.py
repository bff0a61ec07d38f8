"""`plot_workers`."""

import dataclasses
import os
import socket
from datetime import UTC, datetime, timedelta

import pytest
from optuna.trial import TrialState

from hq_optuna.protocol import worker_identity
from hq_optuna.protocol.history import Run, read_history
from hq_optuna.space.budget import Budget
from hq_optuna.visualization.workers import (
    WorkersInfo,
    WorkerSpan,
    plot_workers,
    workers_figure,
    workers_info,
)
from tests.fake_search import fake_space, fake_study

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
ANN, BOB = "far/1/11/1", "far/1/22/1"


def run(number, worker, start_s, end_s, **more):
    ended = None if end_s is None else NOON + timedelta(seconds=end_s)
    known = {
        **{"kind": "candidate", "step": 1, "slot": number, "state": TrialState.COMPLETE},
        **{"seconds": None, "counted": True, **more},
    }
    return Run(number, worker, started=NOON + timedelta(seconds=start_s), ended=ended, **known)


def info_of(*runs):
    history = read_history(fake_study(4, n_trials=0))
    return workers_info(dataclasses.replace(history, runs=runs))


def test_each_trial_is_a_span_on_the_row_of_its_worker():
    lost = {"state": TrialState.FAIL, "counted": False}
    info = info_of(
        run(0, BOB, 0, 2, step=0),
        run(1, ANN, 1, 3),
        run(2, BOB, 2.5, 4, kind="incumbent", slot=1),
        run(3, ANN, 3.5, 9, **lost),
        run(4, BOB, 4, 5, counted=False),
    )
    assert info == WorkersInfo(
        workers=("far:22", "far:11"),
        begin=NOON,
        spans=(
            WorkerSpan(0, 0, "candidate", 0, "trial 0: candidate 1 of step 0", 0.0, 2.0),
            WorkerSpan(1, 1, "candidate", 1, "trial 1: candidate 2 of step 1", 1.0, 2.0),
            WorkerSpan(0, 2, "record", 1, "trial 2: record of step 1", 2.5, 1.5),
            WorkerSpan(
                *(1, 3, "lost", 1),
                "trial 3: candidate 4 of step 1; its worker died or was interrupted",
                *(3.5, 5.5),
            ),
            WorkerSpan(0, 4, "surplus", 1, "trial 4: candidate 5 of step 1; not needed", 4.0, 1.0),
        ),
        pauses=(),
    )


def test_a_training_is_a_bar_for_as_long_as_it_took():
    info = info_of(
        run(0, ANN, 0, 1, step=0),
        run(1, ANN, 1, 9, kind="incumbent", slot=0, trains=True),
        run(2, ANN, 9, 9.1, kind="incumbent", slot=0, step=2),
    )
    assert [span.what for span in info.spans] == ["candidate", "training", "record"]
    assert info.spans[1].text == "trial 1: training and record of step 1"
    (bar,) = (trace for trace in workers_figure(info).data if trace.name == "training")
    assert bar.x == (8000,)
    assert info.pauses == ()


def test_who_went_on_after_a_failed_trial_did_not_die():
    info = info_of(run(0, ANN, 0, 1, state=TrialState.FAIL), run(1, ANN, 2, 3))
    assert [span.what for span in info.spans] == ["failed", "candidate"]


def test_what_runs_ends_at_the_last_sign_of_anybody():
    info = info_of(run(0, ANN, 0, None, state=TrialState.RUNNING), run(1, BOB, 1, 7))
    assert (info.spans[0].what, info.spans[0].seconds) == ("running", 7.0)


def test_what_runs_on_this_host_without_its_process_is_a_death():
    _, namespace, pid, _ = worker_identity.worker_id().split("/")
    gone = f"{socket.gethostname()}/{namespace}/{pid}/0"  # same pid, another start
    here = run(0, worker_identity.worker_id(), 0, None, state=TrialState.RUNNING)
    assert str(os.getpid()) == pid
    assert info_of(here).spans[0].what == "running"
    assert info_of(dataclasses.replace(here, worker=gone)).spans[0].what == "lost"


@pytest.mark.parametrize(
    ("state", "kind", "what"),
    [
        (TrialState.PRUNED, "candidate", "surplus"),
        (TrialState.PRUNED, "surplus", "surplus"),
        (TrialState.COMPLETE, "free", "other"),
    ],
)
def test_other_trials_are_told_apart(state, kind, what):
    assert info_of(run(0, ANN, 0, 1, state=state, kind=kind)).spans[0].what == what


def test_two_processes_with_the_same_name_have_two_rows():
    info = info_of(run(0, "far/1/11/1", 0, 1), run(1, "far/1/11/9", 1, 2), run(2, "", 2, 3))
    assert info.workers == ("far:11", "far:11 (2)", "unknown")


def test_what_a_launcher_handed_out_is_work_of_who_scored_it_while_it_did():
    info = info_of(
        run(0, "far:33", 0, 10, handed=True, seconds=2.0),
        run(1, ANN, 10, 11, kind="incumbent"),
    )
    assert info.workers == ("far:33", "far:11")
    assert (info.spans[0].start_s, info.spans[0].seconds) == (8.0, 2.0)


def test_who_scored_a_trial_is_read_from_what_it_recorded():
    # The objective of a fake study says that it runs elsewhere than where trials are claimed.
    study = fake_study(4)
    runs = read_history(study).runs
    assert {(r.worker, r.handed) for r in runs} == {("box:1234", True)}
    own = read_history(fake_study(4, bare=True)).runs
    assert {(r.worker, r.handed) for r in own} == {(worker_identity.worker_id(), False)}


def test_clocks_that_differ_never_make_a_negative_time():
    assert info_of(run(0, ANN, 5, 4.5)).spans[0].seconds == 0.0


def test_where_a_storage_keeps_whole_seconds_the_objective_says_how_long():
    assert info_of(run(0, ANN, 5, 5, seconds=0.25)).spans[0].seconds == 0.25
    assert info_of(run(0, ANN, 5.1, 5.2, seconds=9.0)).spans[0].seconds == pytest.approx(0.1)


def test_a_pause_of_all_is_cut_out_but_not_one_of_some():
    work = [run(i, (ANN, BOB)[i % 2], 10 * i, 10 * i + 15) for i in range(6)]
    later = [run(6, ANN, 1000, 1010), run(7, ANN, 1010.5, 1020)]
    info = info_of(*work, *later)
    assert info.pauses == ((65.0, 1000.0),)
    axis = workers_figure(info).layout.xaxis
    (cut,) = axis.rangebreaks
    assert "2026-03-01 12:01:05.000" < cut.bounds[0] < cut.bounds[1] < "2026-03-01 12:16:40.000"
    for tick in axis.tickvals:
        assert not cut.bounds[0] < tick < cut.bounds[1]
    assert info_of(*work).pauses == ()


def test_a_death_that_was_found_out_the_next_day_does_not_hide_the_pause():
    dead = run(1, BOB, 5, 90_000, state=TrialState.FAIL)
    info = info_of(run(0, ANN, 0, 10), dead, run(2, ANN, 90_000, 90_010))
    assert info.pauses == ((10.0, 90_000.0),)


def test_bars_stand_at_their_times_in_milliseconds_of_a_date_axis():
    figure = workers_figure(info_of(run(0, ANN, 0, 2, step=0), run(1, ANN, 2.25, 3)))
    even, odd = figure.data
    assert (even.name, odd.name) == ("even steps", "odd steps")
    assert (even.base, even.x) == (("2026-03-01 12:00:00.000",), (2000.0,))
    assert (odd.base, odd.x) == (("2026-03-01 12:00:02.250",), (750.0,))
    assert "UTC" in figure.layout.xaxis.title.text
    assert list(odd.customdata[0]) == [
        "trial 1: candidate 2 of step 1",
        "2026-03-01 12:00:02.250",
        "750 ms",
    ]


def test_deaths_and_closed_steps_are_marked_where_they_begin():
    figure = workers_figure(
        info_of(
            run(0, ANN, 0, 1),
            run(1, ANN, 2, 3, kind="incumbent"),
            run(2, ANN, 4, 60, state=TrialState.FAIL),
        )
    )
    marks = {trace.name: trace for trace in figure.data if trace.type == "scatter"}
    assert marks["step closed"].x == ("2026-03-01 12:00:02.000",)
    assert marks["died or stopped"].x == ("2026-03-01 12:00:04.000",)


def test_candidates_say_what_they_change_and_all_trials_are_there():
    space = fake_space(4, bits=(8, 4))
    study = fake_study(space, budget=Budget.fraction(bops=0.32))
    info = workers_info(read_history(study))
    assert [span.number for span in info.spans] == [t.number for t in study.trials]
    assert len(info.workers) == 1
    assert "trial 2: candidate 1 of step 1, layer" in info.spans[2].text
    assert " 8 → 4" in info.spans[2].text


@pytest.mark.parametrize("n", [1, 20, 150])
def test_rows_and_legend_fit_the_height(n):
    runs = [run(i, f"far/1/{i}/1", i % 7, 100 + i, state=TrialState.FAIL) for i in range(n)]
    figure = workers_figure(info_of(*runs))
    assert len(figure.layout.yaxis.ticktext) == n
    assert figure.layout.height >= 20 * len(figure.data)


def test_trials_of_a_database_and_of_memory_have_their_times_in_utc(tmp_path):
    before = datetime.now(UTC)
    stored = fake_study(4, storage=f"sqlite:///{tmp_path}/a.db")
    kept = fake_study(4)
    after = datetime.now(UTC)
    for study in (stored, kept):
        runs = read_history(study).runs
        assert len(runs) == len(study.trials)
        for trial, r in zip(study.trials, runs, strict=True):
            assert before - timedelta(seconds=1) <= r.started <= r.ended <= after
            assert r.started == trial.datetime_start.astimezone(UTC)
            assert r.ended == trial.datetime_complete.astimezone(UTC)
    assert len(plot_workers(stored).data) == len(plot_workers(kept).data)
