"""What a study is told once about its search."""

from __future__ import annotations

import optuna
import pytest

from hq_optuna import attributes
from hq_optuna.artifacts.store import attached, open_artifacts
from hq_optuna.attributes import StudyInfo
from hq_optuna.errors import ArtifactError, ResumeError
from hq_optuna.objective.publish import (
    publish,
    publish_facts,
    refuse_foreign_study,
    stored_sensitivity,
)
from hq_optuna.scoring import Sensitivity
from hq_optuna.space.search_space import SearchSpace
from tests.fake_search import fake_space
from tests.searches import LAYERS, facts, search


def info(**changes: object) -> StudyInfo:
    values = {"metric": "bops", "limit": 1.0, "budget": "b", "int8": 4.0, "float32": 64.0}
    settings = {"scorer": "trace", "rule": "min", "n_candidates": 3, "seed": 0, **changes}
    return StudyInfo(**values, settings=settings)


def sensitivity(space: SearchSpace) -> Sensitivity:
    """Return numbers that only an exact round trip brings back."""
    table = {
        layer.name: {b: (i + 1) / 3 * 0.1**b for b in (2, 4, 8)}
        for i, layer in enumerate(space.layers)
    }
    return Sensitivity(table, {name: {8: 1e-300} for name in table})


def test_another_worker_reads_the_same_sensitivity_bit_for_bit(tmp_path):
    space = fake_space(6)
    storage = f"sqlite:///{tmp_path}/study.db"
    study = optuna.create_study(study_name="s", storage=storage)
    assert stored_sensitivity(study) is None
    publish(study, space, info(), sensitivity(space))
    other = optuna.load_study(study_name="s", storage=storage)
    assert stored_sensitivity(other) == sensitivity(space)
    system = other._storage.get_study_system_attrs(other._study_id)
    assert SearchSpace.from_json(attributes.join(attributes.SPACE, system)) == space
    assert StudyInfo.from_json(other.user_attrs[attributes.INFO]) == info()
    assert other.metric_names == ["score_nats"]


def test_a_large_network_is_published_in_parts_that_every_storage_takes():
    space = SearchSpace.build(fake_space(200).layers, bits=range(2, 9))
    study = optuna.create_study()
    publish(study, space, info(), sensitivity(space))
    system = study._storage.get_study_system_attrs(study._study_id)
    assert f"{attributes.SPACE}:1" in system
    assert all(
        len(part) <= attributes.PART_CHARACTERS for part in system.values() if type(part) is str
    )
    assert stored_sensitivity(study) == sensitivity(space)


def test_what_is_published_is_not_written_again():
    space = fake_space(5)
    study = optuna.create_study()
    publish(study, space, info(), sensitivity(space))
    publish(study, fake_space(6), info(seed=9), sensitivity(fake_space(6)))
    assert study.user_attrs[attributes.INFO]["settings"]["seed"] == 0
    assert stored_sensitivity(study) == sensitivity(space)


def test_a_publication_that_was_interrupted_is_not_believed_and_is_made_again(monkeypatch):
    space = fake_space(5)
    study = optuna.create_study()
    with monkeypatch.context() as patch:

        def stop(self: optuna.Study, names: list[str]) -> None:
            raise KeyboardInterrupt

        patch.setattr(optuna.Study, "set_metric_names", stop)
        with pytest.raises(KeyboardInterrupt):
            publish(study, space, info(), sensitivity(space))
    assert stored_sensitivity(study) is None
    publish(study, space, info(), sensitivity(space))
    assert stored_sensitivity(study) == sensitivity(space)


def test_facts_are_written_by_name_and_only_when_they_change(monkeypatch):
    study = optuna.create_study()
    publish_facts(study, {"accuracy_before": 0.5, "samples": 3})
    assert study.user_attrs == {"hq:report:accuracy_before": 0.5, "hq:report:samples": 3}
    written = []
    monkeypatch.setattr(optuna.Study, "set_user_attr", lambda self, *pair: written.append(pair))
    publish_facts(study, {"accuracy_before": 0.5, "samples": 4})
    assert written == [("hq:report:samples", 4)]


def test_a_new_study_and_one_of_ours_are_not_refused():
    study = optuna.create_study()
    refuse_foreign_study(study)
    study.set_user_attr(attributes.FINGERPRINT, {})
    study.optimize(lambda trial: 0.0, n_trials=1)
    refuse_foreign_study(study)


@pytest.mark.parametrize(
    "directions", [["minimize"], ["maximize"], ["minimize", "minimize"], ["maximize", "minimize"]]
)
def test_a_study_of_another_kind_is_refused_by_name(directions):
    study = optuna.create_study(study_name="theirs", directions=directions)
    study.optimize(lambda trial: [0.0] * len(directions), n_trials=1)
    with pytest.raises(ResumeError, match=r"'theirs' .* another kind of study.*--name") as error:
        refuse_foreign_study(study)
    assert error.value.changed == ("kind of study",)


def test_a_study_with_another_direction_is_refused_even_when_empty():
    with pytest.raises(ResumeError, match="another kind of study"):
        refuse_foreign_study(optuna.create_study(direction="maximize"))


def test_a_copy_of_the_table_is_an_artifact_that_equals_what_workers_read(tmp_path):
    store = tmp_path / "artifacts"
    study = search().optimize(artifacts=store)
    system = study._storage.get_study_system_attrs(study._study_id)
    copy = open_artifacts(store).get_json(attached(study, "sensitivity"))
    assert copy == attributes.join(attributes.SENSITIVITY, system)
    assert set(copy) == set(LAYERS)
    listed, _csv = optuna.artifacts.get_all_artifact_meta(study)
    assert listed.filename == "sensitivity.json"


def test_workers_need_the_storage_alone(tmp_path):
    storage = f"sqlite:///{tmp_path / 's.db'}"
    store = tmp_path / "artifacts"
    search().optimize(storage, "s", artifacts=store)
    for file in store.iterdir():
        file.unlink()
    resumed = search()
    study = resumed.optimize(storage, "s")  # no store, and the copy is gone
    assert facts(study) == facts(search().optimize())
    with pytest.raises(ArtifactError, match="is missing in"):
        open_artifacts(store).get_json(attached(study, "sensitivity"))
