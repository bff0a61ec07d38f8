"""Workers that live and die as told: no processes, no time."""

from __future__ import annotations

from typing import Any

import pytest

from hq_optuna.errors import WorkerError
from hq_optuna.workers import supervisor as crew_module
from hq_optuna.workers.supervisor import (
    DEATHS_UNTIL_GIVEN_UP,
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    Supervisor,
)


class FakeLife:
    def __init__(self) -> None:
        self.code: int | None = None
        self.told: list[dict[str, Any]] = []
        self.words: list[str] = []
        self.asked: list[str] = []
        self.obeys = True

    def tell(self, event: str, **facts: Any) -> None:
        self.told.append({"event": event, "worker": "box:7", **facts})

    def poll(self) -> int | None:
        return self.code

    def events(self) -> list[dict[str, Any]]:
        told, self.told = self.told, []
        return told

    def last_lines(self) -> list[str]:
        return self.words

    def terminate(self) -> None:
        self.asked.append("terminate")
        if self.obeys:
            self.code = 130

    def kill(self) -> None:
        self.asked.append("kill")
        self.code = -9

    def close(self) -> None:
        self.asked.append("close")


class World:
    """Lives in the order they were started, by worker; a clock; the news."""

    def __init__(self, n_workers: int) -> None:
        self.now = 0.0
        self.news: list[str] = []
        self.lives: list[list[FakeLife]] = [[] for _ in range(n_workers)]
        self.supervisor = Supervisor(
            self.start, n_workers, on_news=self.news.append, clock=lambda: self.now
        )
        self.supervisor.poll()

    def start(self, index: int) -> FakeLife:
        self.lives[index].append(FakeLife())
        return self.lives[index][-1]

    def die(self, index: int, code: int = -9, words: tuple[str, ...] = ("Killed",)) -> None:
        self.lives[index][-1].words = list(words)
        self.lives[index][-1].code = code


def test_all_are_started_and_the_crew_is_done_when_all_are():
    world = World(3)
    assert [len(lives) for lives in world.lives] == [1, 1, 1]
    for lives in world.lives:
        assert world.supervisor.poll()
        lives[0].tell("done", scored=4)
        lives[0].code = 0
    assert not world.supervisor.poll()
    assert [(m.doing, m.scored, m.name) for m in world.supervisor.members] == [
        ("done", 4, "box:7")
    ] * 3
    assert all(lives[0].asked == ["close"] for lives in world.lives)
    assert world.news == []


def test_who_dies_is_started_again_after_a_pause():
    world = World(2)
    world.lives[1][0].tell("scored", scored=3)
    world.die(1)
    world.supervisor.poll()
    assert world.news == [
        f"Worker 2 (box:7) died (SIGKILL) and is started again in {FIRST_PAUSE_S:g} s"
    ]
    assert world.supervisor.members[1].doing == "died"
    world.supervisor.poll()
    assert len(world.lives[1]) == 1
    world.now += FIRST_PAUSE_S
    world.supervisor.poll()
    assert len(world.lives[1]) == 2
    world.lives[1][1].tell("scored", scored=2)
    world.supervisor.poll()
    member = world.supervisor.members[1]
    assert (member.scored, member.restarts, member.doing) == (5, 1, "scored")


def test_pauses_grow_while_nothing_is_scored_and_shrink_once_something_is():
    world = World(2)
    pauses = []
    for death in range(DEATHS_UNTIL_GIVEN_UP + 2):
        if death == 3:
            world.lives[0][-1].tell("scored", scored=1)
        world.die(0)
        world.supervisor.poll()
        pauses.append(float(world.news[-1].split()[-2]))
        world.now += pauses[-1]
        world.supervisor.poll()
        if world.supervisor.members[0].doing == "given up":
            break
    assert pauses[:5] == [0.5, 1.0, 2.0, 0.5, 1.0]
    assert max(pauses) <= LONGEST_PAUSE_S


def test_who_dies_at_once_again_and_again_is_given_up_while_others_go_on():
    world = World(2)
    for _ in range(DEATHS_UNTIL_GIVEN_UP):
        world.die(0, code=1, words=("first", "CUDA error: out of memory"))
        world.supervisor.poll()
        world.now += LONGEST_PAUSE_S
        world.supervisor.poll()
    assert len(world.lives[0]) == DEATHS_UNTIL_GIVEN_UP
    assert world.supervisor.members[0].doing == "given up"
    assert "is given up: CUDA error: out of memory" in world.news[-1]
    world.lives[1][0].code = 0
    assert not world.supervisor.poll()


def test_when_all_are_given_up_the_error_has_their_last_words():
    world = World(2)
    with pytest.raises(WorkerError) as raised:
        for _ in range(DEATHS_UNTIL_GIVEN_UP):
            for index in (0, 1):
                world.die(index, words=("Traceback", "ImportError: libfoo.so.1"))
            world.supervisor.poll()
            world.now += LONGEST_PAUSE_S
            world.supervisor.poll()
    assert "Every worker died 5 times without scoring a candidate" in str(raised.value)
    assert str(raised.value).endswith("Traceback\nImportError: libfoo.so.1")


def test_what_a_worker_says_is_wrong_ends_the_crew():
    world = World(2)
    life = world.lives[0][0]
    life.told.append({"error": "ResumeError", "message": "Changed: the calibration data."})
    life.code = 1
    with pytest.raises(WorkerError, match="Changed: the calibration data"):
        world.supervisor.poll()


def test_json_that_a_study_file_prints_says_nothing_of_its_worker():
    world = World(1)
    life = world.lives[0][0]
    life.tell("scored", scored=3)
    life.told += [{"epoch": 1, "error": 0.25}, {"epoch": 2, "loss": 0.1}]
    life.code = -9
    world.supervisor.poll()
    assert "died (SIGKILL) and is started again" in world.news[0]
    assert world.supervisor.members[0].scored == 3


def test_a_worker_that_somebody_interrupted_is_started_again():
    world = World(1)
    life = world.lives[0][0]
    life.told.append({"error": "Interrupted", "message": "Interrupted."})
    life.code = 130
    world.supervisor.poll()
    assert "exit status 130" in world.news[0]
    assert world.supervisor.members[0].doing == "died"


def test_nobody_is_started_again_once_one_says_the_search_is_over():
    world = World(2)
    world.die(0)
    world.supervisor.poll()
    world.lives[1][0].code = 0
    assert not world.supervisor.poll()
    assert [m.doing for m in world.supervisor.members] == ["done", "done"]


def test_all_are_asked_to_end_and_who_does_not_is_killed(monkeypatch):
    world = World(2)
    world.lives[1][0].obeys = False

    def sleep(seconds: float) -> None:
        world.now += 1

    monkeypatch.setattr(crew_module.time, "sleep", sleep)
    world.supervisor.end(grace_s=5)
    assert world.lives[0][0].asked == ["terminate", "close"]
    assert world.lives[1][0].asked == ["terminate", "kill", "close"]
    assert 5 <= world.now < 8


def test_a_second_ctrl_c_kills_at_once(monkeypatch):
    world = World(1)
    world.lives[0][0].obeys = False

    def sleep(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(crew_module.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        world.supervisor.end()
    assert world.lives[0][0].asked == ["terminate", "kill", "close"]
