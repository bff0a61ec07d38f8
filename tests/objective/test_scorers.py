"""Every scorer drives a whole search, and the study says what its curvature was made from."""

import pytest
import torch

from hq_optuna.protocol.history import read_history
from hq_optuna.report.page import write_report
from hq_optuna.scoring import LAYER_SUMS, SCORERS
from tests.searches import data, search


@pytest.mark.parametrize("scorer", SCORERS)
def test_every_scorer_ends_within_the_budget(scorer):
    made = search(scorer=scorer)
    history = read_history(made.optimize(n_candidates=2))
    assert history.met
    assert history.info.settings["scorer"] == scorer
    facts = history.facts
    assert 1 <= facts["curvature_samples"] <= 24
    probed_again = scorer == "hutchinson"  # one batch, once, has no standard error
    assert ("curvature_standard_error" in facts) == probed_again
    winner = history.records[-1].winner
    added = winner.score_weights + winner.score_activations
    assert (winner.score == pytest.approx(added, rel=1e-12)) == (scorer in LAYER_SUMS)


def test_the_report_says_how_many_samples_the_curvature_read(tmp_path):
    study = search(scorer="fisher", batch_size=4).optimize(n_candidates=2)
    assert 0 < read_history(study).facts["curvature_standard_error"] < 10
    write_report(study, tmp_path / "report.md")
    assert "curvature samples" in (tmp_path / "report.md").read_text()


def test_fisher_refuses_a_loss_whose_hessian_it_does_not_know():
    with pytest.raises(ValueError, match="'fisher' knows cross-entropy and squared error"):
        search(scorer="fisher", loss_fn=lambda z, y: z.square().mean())


def test_a_scorer_by_loss_prefers_what_measures_better():
    made = search(scorer="loss", calibration=data(48))
    study = made.optimize(n_candidates=3)
    for candidate in read_history(study).candidates:
        if candidate.counted:
            assert candidate.score == pytest.approx(
                candidate.calibration_loss - made.objective.prepare(study).float_loss(), abs=1e-8
            )
    assert torch.get_default_dtype() == torch.float32
