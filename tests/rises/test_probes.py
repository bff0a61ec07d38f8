"""Every rise against exact Hessians: its value, and the covariance of the probes that it draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hq_optuna import rises
from hq_optuna.errors import DataError
from hq_optuna.network.batches import Batch
from hq_optuna.rises.base import Rise
from tests.small_networks import seeded


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


PROBABLE = torch.cat([drawn(5, 1, 3).sigmoid(), drawn(5, 4, 3), drawn(5, 3, 3).softmax(1)], 1)

CASES: dict[str, tuple[Rise, Any]] = {
    "classes": (rises.CrossEntropy(), drawn(6, 4)),
    "pixels": (rises.CrossEntropy(), drawn(3, 4, 5)),
    "tokens": (rises.CrossEntropy(-1), drawn(3, 5, 4)),
    "probabilities": (rises.CrossEntropy(probabilities=True), drawn(6, 4).softmax(1)),
    "several labels at once": (rises.Binary(), drawn(6, 4)),
    "chances": (rises.Binary(probabilities=True), drawn(6, 4).sigmoid()),
    "numbers": (rises.SquaredError(), 3 * drawn(6, 4)),
    "relative": (rises.SquaredError(relative=True), 3 * drawn(6, 2, 2) + 1),
    "embeddings": (rises.Cosine(), drawn(6, 4)),
    "one in a dictionary": (rises.CrossEntropy(), {"logits": drawn(6, 4)}),
    "heads": (
        rises.Heads(
            {"boxes": rises.SquaredError(relative=True), "scores.0": rises.CrossEntropy()},
            {"boxes": 0.25},
        ),
        {"boxes": 5 * drawn(4, 3), "scores": (drawn(4, 3),), "ignored": drawn(4, 2)},
    ),
    "a detector": (rises.Detection(0, (1, 5), (5, 8)), drawn(5, 8, 3)),
    "a detector's probabilities": (
        rises.Detection(0, (1, 5), (5, 8), probabilities=True, weights={"boxes": 2.0}),
        PROBABLE,
    ),
}


def flat(outputs: Any) -> Tensor:
    return torch.cat([z.reshape(len(z), -1) for z in rises.parts_of(outputs).values()], 1)


def rebuilt(like: Any, z: Tensor) -> Any:
    """Put the numbers of `flat` back into outputs of that kind."""
    if isinstance(like, Tensor):
        return z.reshape(like.shape)
    parts = rises.parts_of(like)
    sizes = [part[0].numel() for part in parts.values()]
    new = dict(zip(parts, z.split(sizes, 1), strict=True))
    shaped = {name: new[name].reshape(parts[name].shape) for name in parts}
    if "scores.0" in shaped:
        shaped["scores"] = (shaped.pop("scores.0"),)
    return shaped


def exact_hessian(rise: Rise, outputs: Any, n: int) -> Tensor:
    """The mean over samples of the exact Hessian of what each costs, by automatic derivatives."""
    z = flat(outputs)
    batch = Batch((), None, n)

    def cost(moved: Tensor) -> Tensor:
        return rise.of_samples(outputs, rebuilt(outputs, moved), batch).sum()

    d = z.shape[1]
    full = torch.func.hessian(cost)(z.clone())
    return torch.stack([full[i, :, i, :] for i in range(n)]).reshape(n, d, d)


def by_place(rise: Rise, outputs: Any, hessian: Tensor) -> Tensor:
    """Sum the blocks of places on the diagonal: H̄ of classes is a mean over places, too."""
    if not (isinstance(rise, rises.CrossEntropy) and isinstance(outputs, Tensor)):
        return hessian
    if outputs.dim() < 3:
        return hessian
    c = outputs.shape[rise.axis]
    split = hessian.reshape(2 * [*outputs.shape[1:]])
    return (
        split.diagonal(dim1=0, dim2=2).sum(-1)
        if rise.axis == -1
        else (split.diagonal(dim1=1, dim2=3).sum(-1).reshape(c, c))
    )


@pytest.mark.parametrize("name", [n for n in CASES if "prob" not in n and n != "chances"])
def test_probes_have_the_covariance_of_the_mean_exact_hessian(name: str) -> None:
    rise, outputs = CASES[name]
    n = len(flat(outputs))
    batch, generator = Batch((), None, n), seeded(0)
    fitted = rise.fitted([outputs], [batch])
    expected = by_place(rise, outputs, exact_hessian(fitted, outputs, n).mean(0))
    z = flat(outputs).clone().requires_grad_(True)
    total, draws = torch.zeros(z.shape[1], z.shape[1], dtype=torch.float64), 3000
    for _ in range(draws):
        (g,) = torch.autograd.grad(
            fitted.projected(rebuilt(outputs, z), batch, generator), z, retain_graph=False
        )
        total += g.T @ g / n
    scale = float(expected.diagonal().mean())
    # 3,000 draws of n samples: a relative standard error of at most 1.4 / √(3000 · 3) = 1.5 %.
    found = by_place(rise, outputs, total / draws)
    torch.testing.assert_close(found, expected, rtol=0.08, atol=0.08 * scale)


@pytest.mark.parametrize(
    ("of_scores", "of_chances", "chances"),
    [
        (rises.CrossEntropy(), rises.CrossEntropy(probabilities=True), lambda z: z.softmax(1)),
        (rises.Binary(), rises.Binary(probabilities=True), torch.sigmoid),
    ],
)
def test_probes_of_probabilities_are_those_of_their_scores(of_scores, of_chances, chances) -> None:
    z, batch = drawn(6, 4).requires_grad_(True), Batch((), None, 6)
    gradients = []
    for rise, outputs in ((of_scores, z), (of_chances, chances(z))):
        told = rise.fitted([outputs.detach()]).projected(outputs, batch, seeded(0))
        gradients.append(torch.autograd.grad(told, z)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_outputs_that_do_not_move_cost_nothing_and_others_something(name: str) -> None:
    rise, outputs = CASES[name]
    batch = Batch((), None, len(flat(outputs)))
    fitted = rise.fitted([outputs], [batch])
    assert float(fitted(outputs, outputs)) == 0.0
    moved = rebuilt(outputs, flat(outputs) * (1 + 0.1 * flat(outputs).sin()))
    each = fitted.of_samples(outputs, moved, batch)
    assert each.shape == (batch.n,)
    assert bool((each > 0).all())
    assert float(each.sum()) == pytest.approx(fitted.of_batch(outputs, moved, batch))


@pytest.mark.parametrize("name", CASES)
def test_fitting_in_batches_is_fitting_at_once(name: str) -> None:
    rise, outputs = CASES[name]
    z, n = flat(outputs), len(flat(outputs))
    cut = n // 2

    def part(at: slice) -> Any:
        rows = rises.parts_of(outputs)
        like = {k: v[at] for k, v in rows.items()}
        if isinstance(outputs, Tensor):
            return outputs[at]
        if "scores.0" in like:
            like["scores"] = (like.pop("scores.0"),)
        return like

    parts = [part(slice(0, cut)), part(slice(cut, n))]
    if isinstance(rise, rises.Detection):
        pytest.skip("presence is relative to the mean of a batch while it is fitted")
    moved = rebuilt(outputs, z + 0.05 * drawn(*z.shape, seed=3))
    batches = [Batch((), None, cut), Batch((), None, n - cut)]
    halves, whole = rise.fitted(parts, batches), rise.fitted([outputs], [Batch((), None, n)])
    assert float(halves(outputs, moved)) == pytest.approx(float(whole(outputs, moved)), rel=1e-9)


def test_the_divergence_of_probabilities_is_that_of_their_scores() -> None:
    z, moved = drawn(50, 5), drawn(50, 5) + 0.01 * drawn(50, 5, seed=1)
    of_scores = rises.CrossEntropy()(z, moved)
    of_chances = rises.CrossEntropy(probabilities=True)(z.softmax(1), moved.softmax(1))
    assert float(of_chances) == pytest.approx(float(of_scores), rel=1e-9)


def test_chances_of_yes_and_no_diverge_as_two_classes_do() -> None:
    z, change = drawn(40, 1), 1e-3 * drawn(40, 1, seed=1)
    p, q = z.sigmoid(), (z + change).sigmoid()
    exact = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum()
    assert float(rises.Binary(temperature=1.0)(z, z + change)) == pytest.approx(
        float(exact), rel=5e-3
    )


def test_of_many_classes_no_matrix_is_held_and_the_covariance_is_the_same(monkeypatch) -> None:
    z, batch = drawn(6, 4), Batch((), None, 6)
    with_matrix = rises.CrossEntropy().fitted([z], [batch])
    monkeypatch.setattr("hq_optuna.rises.places.MOST_CLASSES", 3)
    without = rises.CrossEntropy().fitted([z], [batch])
    assert without.factor is None
    generator, total = seeded(0), torch.zeros(4, 4, dtype=torch.float64)
    for _ in range(4000):
        (probe,) = without.draw(z, batch, generator)
        total += probe.u.T @ probe.u / 6
    expected = with_matrix.factor @ with_matrix.factor.T
    torch.testing.assert_close(total / 4000, expected, rtol=0.08, atol=0.08 * float(expected.max()))


def test_objects_count_and_empty_places_hardly() -> None:
    z = torch.zeros(1, 8, 2, dtype=torch.float64)
    z[0, 0] = torch.tensor([6.0, -6.0])  # an object, and nothing
    rise = rises.Detection(0, (1, 5), (5, 8)).fitted([z])
    costs = []
    for place in (0, 1):
        moved = z.clone()
        moved[0, 1, place] += 1  # the box
        costs.append(float(rise(z, moved)))
    assert costs[1] == pytest.approx(costs[0] * 0.01 / torch.tensor(6.0).sigmoid().item(), rel=0.01)


@dataclass
class Found:
    boxes: Tensor
    n_found: int


@pytest.mark.parametrize(
    ("outputs", "names"),
    [
        (torch.zeros(2, 3), [""]),
        ({"a": torch.zeros(2), "b": [torch.zeros(2), torch.zeros(2)]}, ["a", "b.0", "b.1"]),
        (Found(torch.zeros(2, 4), 3), ["boxes"]),
        ((torch.zeros(2), torch.zeros(2, dtype=torch.long)), ["0"]),
        ([{"boxes": torch.zeros(7, 4)}, {"boxes": torch.ones(7, 4)}], ["boxes"]),
    ],
)
def test_outputs_of_any_kind_have_names(outputs: Any, names: list[str]) -> None:
    assert list(rises.parts_of(outputs, 2)) == names


def test_boxes_that_were_selected_are_refused_with_what_to_do() -> None:
    outputs = [{"boxes": torch.zeros(7, 4)}, {"boxes": torch.zeros(5, 4)}]
    with pytest.raises(DataError, match=r"different shapes .* rise=hq_optuna.rises.At"):
        rises.parts_of(outputs, 2)


def test_an_output_that_is_not_there_is_told_with_those_that_are() -> None:
    rise = rises.Heads({"box": rises.SquaredError()})
    with pytest.raises(DataError, match=r"no 'box'.*'boxes'"):
        rise({"boxes": torch.zeros(2, 4)}, {"boxes": torch.zeros(2, 4)})


def test_what_modules_return_is_compared_where_the_network_selects() -> None:
    class Selects(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> list[Tensor]:
            scores = self.head(x)
            return [row[row > 0] for row in scores]

    network, x = Selects(), torch.randn(5, 4, generator=seeded(0))
    rise = rises.At({"head": rises.SquaredError()})
    z = rise.run(network, x)
    assert torch.equal(z["head"], network.head(x))
    assert not network.head._forward_hooks
    moved = {"head": z["head"] + 1}
    assert float(rise(z, moved)) == pytest.approx(5.0)
    with pytest.raises(DataError, match="'neck'"):
        rises.At({"neck": rises.SquaredError()}).run(network, x)


def sure(*shape: int) -> Tensor:
    z = torch.randn(*shape, generator=seeded(1))
    return 20 * z


@pytest.mark.parametrize(
    ("outputs", "labels", "kind", "said"),
    [
        (torch.randn(40, 5), torch.arange(40) % 5, rises.CrossEntropy, "labels name"),
        (torch.randn(40, 5).softmax(1), None, rises.CrossEntropy, "probabilities"),
        (torch.randn(40, 5).log_softmax(1), None, rises.CrossEntropy, "log-probabilities"),
        (sure(40, 10), None, rises.CrossEntropy, "class scores"),
        (sure(4, 10, 6, 6), None, rises.CrossEntropy, "class scores"),
        (sure(4, 3, 6, 6), None, rises.SquaredError, "own variance"),  # colours
        (functional.normalize(torch.randn(40, 16)), None, rises.Cosine, "embeddings"),
        (torch.randn(40, 2), None, rises.SquaredError, "own variance"),
        (torch.randn(40, 16), None, rises.SquaredError, "own variance"),
        ({"a": torch.randn(40, 2), "b": sure(40, 10)}, None, rises.Heads, "a: .*; b: "),
    ],
)
def test_the_rise_is_chosen_by_the_outputs(outputs, labels, kind, said: str) -> None:
    n = len(next(iter(rises.parts_of(outputs).values())))
    found, reason = rises.rise_of_outputs([outputs], (Batch((), labels, n),))
    assert isinstance(found, kind)
    assert pytest.importorskip("re").search(said, reason)


class HoldsItself:
    """Its logits, and itself: as an object that keeps what it came from does."""

    def __init__(self, z: Tensor) -> None:
        self.logits, self.owner = z, self


def test_an_object_that_holds_itself_has_its_tensors_once() -> None:
    z = torch.zeros(4, 3)
    assert {name: part is z for name, part in rises.parts_of(HoldsItself(z)).items()} == {
        "logits": True
    }
