"""What the report says of accuracies, intervals, ends of searches, ranks and artifacts."""

import json
import math
import re
import statistics
from dataclasses import replace

import pytest
import torch

from hq_optuna import attributes
from hq_optuna.answer.agreement import agreement
from hq_optuna.answer.intervals import paired, wilson
from hq_optuna.artifacts.store import Reference
from hq_optuna.attributes import LIMITS
from hq_optuna.protocol.history import read_history
from hq_optuna.protocol.start_options import StartOptions
from hq_optuna.report.data import report_data
from hq_optuna.report.text import headline, render_markdown
from hq_optuna.space.budget import Budget
from tests.fake_search import fake_space, fake_study
from tests.report.reported import known
from tests.searches import Network, data, search

COUNTED = {
    **{"accuracy_before": 0.9, "accuracy_after": 0.88, "validation_samples": 200},
    **{"validation_lost": 6, "validation_gained": 2},
}


# Accuracies


def test_lost_and_gained_samples_are_counted_on_the_same_data():
    mine = search(validation=data(40, seed=5))
    study = mine.optimize()
    facts = mine.result(study).facts
    inputs, labels = data(40, seed=5)
    with torch.no_grad():
        before = Network().eval()(inputs).argmax(1) == labels
        after = mine.result(study).network(inputs).argmax(1) == labels
    assert facts["validation_lost"] == sum(b and not a for b, a in zip(before, after, strict=True))
    assert facts["validation_gained"] == sum(
        a and not b for b, a in zip(before, after, strict=True)
    )
    assert facts["accuracy_before"] == float(before.double().mean())
    assert facts["accuracy_after"] == float(after.double().mean())


def test_a_study_that_measures_figures_of_its_own_has_no_counts_and_no_intervals():
    mine = search(validation=data(40, seed=5), evaluate=lambda network, batches: {"accuracy": 0.5})
    study = mine.optimize()
    facts = mine.result(study).facts
    assert facts["accuracy_before"] == 0.5
    assert not {"validation_lost", "validation_gained"} & set(facts)
    found = report_data(study)
    assert found["accuracies"] == {}
    assert "No intervals" in render_markdown(found)
    assert "[" not in render_markdown(found).split("## Layers")[0].split("## Cost")[1]


def test_intervals_follow_from_the_counts():
    found = report_data(known(facts=COUNTED))["accuracies"]["validation"]
    assert found["samples"], found["lost"] == (200, 6)
    low, high = wilson(176, 200)
    assert found["after"] == {"value": 0.88, "low": low, "high": high}
    low, high = paired(6, 2, 200)
    assert found["difference"] == {"value": -0.02, "low": low, "high": high}


def test_headline_and_tables_say_the_intervals():
    found = report_data(known(facts=COUNTED))
    low, high = (f"{100 * end:+.1f}".replace("-", "−") for end in paired(6, 2, 200))
    assert found["headline"].endswith(
        f"validation accuracy 90.0 % → 88.0 % (−2.0 points, 95 % interval {low} to {high}); "
        "most of the predicted rise is in layer1.0.conv (66 %), layer3.1.conv (33 %)."
    )
    text = render_markdown(found)
    assert (
        f"difference −2.0 \\[{low}, {high}\\] points: of 200 samples 6 lost, 2 gained" in text
        or (f"difference −2.0 [{low}, {high}] points: of 200 samples 6 lost, 2 gained" in text)
    )
    assert "validation lost" not in text  # said in words already


# Beside


def test_costs_stand_beside_float_8_bits_and_uniform_bits_without_a_network():
    study = fake_study(fake_space(6), budget=Budget.fraction(bops=0.4))
    rows = {row["name"]: row for row in report_data(study)["beside"]}
    assert list(rows) == ["float", "8 bits everywhere", "uniform 4 bits", "this answer"]
    layers = read_history(study).space.layers
    macs, weights = (sum(getattr(layer, k) for layer in layers) for k in ("macs", "n_weights"))
    assert (rows["float"]["bops"], rows["float"]["size_bytes"]) == (1024 * macs, 4 * weights)
    assert (rows["8 bits everywhere"]["bops"], rows["8 bits everywhere"]["of_int8"]) == (
        64 * macs,
        1.0,
    )
    inner = sum(layer.macs for layer in layers[1:-1])
    assert rows["uniform 4 bits"]["bops"] == 64 * (macs - inner) + 16 * inner
    assert rows["this answer"]["bops"] == read_history(study).incumbent.winner.cost
    assert {row["accuracy"] for row in rows.values()} == {None}


def test_measured_figures_stand_beside_with_their_differences():
    mine = search(validation=data(40, seed=5))
    study = mine.optimize()
    mine.result(study)
    found = report_data(study)
    compared = {r["method"]: r for r in found["compared"]}
    rows = {row["name"]: row for row in found["beside"]}
    for name, method in (("8 bits everywhere", "8 bits"), ("uniform 4 bits", "uniform")):
        pairs = compared[method]["pairs"]
        assert rows[name]["accuracy"]["value"] == compared[method]["measured"]["accuracy"]
        assert (
            rows[name]["over_answer"]["value"]
            == (pairs["only_this"] - pairs["only_answer"]) / pairs["samples"]
        )
        assert rows[name]["loss"] == compared[method]["measured"]["loss"]
    assert rows["float"]["over_answer"]["value"] == pytest.approx(
        rows["float"]["accuracy"]["value"] - rows["this answer"]["accuracy"]["value"]
    )
    assert rows["this answer"]["over_answer"] is None
    assert json.loads(json.dumps(found, allow_nan=False)) == found


# The end


def test_the_report_says_why_the_search_ended():
    found = report_data(known())
    assert (found["state"]["over"], found["state"]["reason"]) == (True, "the budget is met")
    assert "| the search ended | the budget is met |" in render_markdown(found)


def test_a_search_that_a_limit_stopped_says_which_and_how_far_it_came():
    study = known(n_trials=3)
    study.set_user_attr(LIMITS, {"max_evaluations": 2})
    found = report_data(study)
    assert found["state"]["over"]
    assert found["headline"].startswith(
        "Stopped by a limit, at most 2 evaluations (--max-evaluations), 0.0 % of the way"
    )
    assert re.search(
        r"the search ended \| at most 2 evaluations .*; the budget is not met",
        render_markdown(found),
    )


def test_a_search_that_goes_on_says_so():
    found = report_data(known(n_trials=3))
    assert not found["state"]["over"]
    assert "| the search ended | not yet |" in render_markdown(found)


def test_an_answer_that_swaps_still_refine_says_so():
    found = report_data(known())
    found["state"] |= {"over": False, "reason": ""}
    assert headline(found).endswith("; swaps still refine it.")
    assert "not yet: the budget is met, swaps still refine" in render_markdown(found)


# Ranks


def test_agreement_is_perfect_where_the_loss_is_the_score():
    found = agreement(read_history(fake_study(9)))
    assert found["spearman"] == pytest.approx(1.0)
    assert found["within_steps"] == pytest.approx(1.0)
    history = read_history(fake_study(9))
    assert found["candidates"] == sum(c.counted for c in history.candidates) - 1  # the start


def by_ranks(one, other):
    """Spearman's formula for values that are all different."""

    def ranks(values):
        return [sorted(values).index(value) for value in values]

    n = len(one)
    d2 = sum((a - b) ** 2 for a, b in zip(ranks(one), ranks(other), strict=True))
    return 1 - 6 * d2 / (n * (n**2 - 1))


def test_agreement_is_spearmans_formula_overall_and_within_steps():
    history = read_history(fake_study(9, n_candidates=5))
    noisy = [
        replace(
            c,
            score=c.score * (1 + 1e-6 * c.number),  # no ties
            calibration_loss=c.score * (1.5 + math.sin(7.0 * c.number)),
        )
        for c in history.candidates
    ]
    found = agreement(replace(history, candidates=tuple(noisy)))
    noisy = [c for c in noisy if c.step > 0]
    scores, losses = [c.score for c in noisy], [c.calibration_loss for c in noisy]
    assert len(set(scores)) == len(scores)
    assert found["spearman"] == pytest.approx(by_ranks(scores, losses))
    steps = {}
    for c in noisy:
        steps.setdefault(c.step, []).append((c.score, c.calibration_loss))
    within = [by_ranks(*zip(*pairs, strict=True)) for pairs in steps.values() if len(pairs) >= 3]
    assert found["steps"] == len(within) > 3
    assert found["within_steps"] == pytest.approx(statistics.median(within))


def test_agreement_counts_rises_from_the_network_that_was_trained_last():
    # Every training of a fake search takes 0.1 nats and begins the scores anew, at 0: losses fall
    # from training to training, whatever the scores do.
    history = read_history(fake_study(6, train_every=1, n_candidates=3))
    assert sum(record.trained is not None for record in history.records) >= 3
    assert agreement(history)["spearman"] == pytest.approx(1.0)
    blind = replace(history, records=tuple(replace(r, trained=None) for r in history.records))
    assert agreement(blind)["spearman"] < 0.9


# Trainings


def test_the_report_says_which_training_was_not_kept():
    data = report_data(known(train_every=1, final=True, facts=COUNTED))
    said = "A training that did not lower the score is not kept"
    assert said not in render_markdown(data)
    data["trainings"][0]["kept"] = False
    text = render_markdown(data)
    assert said in text
    assert "| step 1, not kept |" in text and "| the answer |" in text


def test_the_report_tells_what_each_training_gave():
    study = known(train_every=1, final=True, facts=COUNTED)
    step, answer = report_data(study)["trainings"]
    assert (step["step"], step["kind"], step["epochs"], step["seconds"]) == (1, "step", 2, 2.5)
    assert (answer["step"], answer["kind"], answer["epochs"]) == (3, "final", 5)
    assert (step["before"]["loss"], step["after"]["loss"]) == (0.51, 0.4)
    low, high = wilson(182, 200)
    assert step["after"]["accuracy"] == {"value": 0.91, "low": low, "high": high}
    assert step["weights"]["id"] == "w1"
    text = render_markdown(report_data(study))
    row = next(line for line in text.splitlines() if line.startswith("| the answer |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2].startswith("87.00 [")
    assert cells[3].startswith("92.00 [")
    assert cells[4:] == ["0.43", "0.3", "0", "5", "3.5 s"]
    assert "| 0.3; before its training 0.412 |" in text  # loss on the calibration set
    assert "Sensitivities are those of the network before any training." in text
    assert "all of the network before any training |" in text  # the gap to the exact optimum
    assert "| time in trainings | 6 s |" in text


def test_a_search_without_trainings_has_no_table_of_them():
    study = known()
    assert report_data(study)["trainings"] == []
    text = render_markdown(report_data(study))
    assert not [
        word for word in ("Trained steps", "before any training", "in trainings") if word in text
    ]


def test_trainings_without_counted_samples_have_no_intervals():
    step, _ = report_data(known(train_every=1, final=True))["trainings"]
    assert step["after"]["accuracy"] == {"value": 0.91, "low": None, "high": None}


def test_a_score_that_is_the_measured_loss_is_not_compared_with_itself():
    history = read_history(fake_study(9))
    settings = {**history.info.settings, "scorer": "loss"}
    assert agreement(replace(history, info=replace(history.info, settings=settings))) is None


def test_without_losses_there_is_no_agreement_and_the_report_says_not_measured():
    study = known(bare=True)
    assert agreement(read_history(study)) is None
    text = render_markdown(report_data(study))
    assert "| does the score rank as the measured loss? | not measured |" in text


# Reproduction


def test_hashes_of_artifacts_are_there_but_not_the_reports_own():
    study = known()
    for name, digit in (("sensitivity", "a"), ("report", "b")):
        reference = Reference("x", digit * 64, 10).to_json()
        study._storage.set_study_system_attr(
            study._study_id, f"{attributes.ARTIFACT}:{name}", reference
        )
    found = report_data(study)
    assert list(found["artifacts"]) == ["sensitivity"]
    assert f"| artifact: sensitivity | SHA-256 {'a' * 64}, 10 bytes |" in render_markdown(found)


def test_the_study_tells_the_command_that_started_it():
    study = known(n_trials=0)
    StartOptions.of({}, {}, "hq-optuna run x --storage mysql://me:secret@db/hq").remember(study)
    study.set_user_attr(attributes.FINGERPRINT, {"seed": 0})
    assert report_data(study)["command"] == "hq-optuna run x --storage 'mysql://me:***@db/hq'"
    assert "secret" not in json.dumps(dict(study.user_attrs))
    assert report_data(study, command="another")["command"] == "another"
