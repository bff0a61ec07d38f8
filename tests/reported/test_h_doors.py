"""Kind H: what counts is finite and repeatable, and told from what does not count."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hq_optuna.protocol.history import read_history
from tests.reported import product

PLAIN = {"correction": False, "rounding": "nearest"}


@pytest.fixture(autouse=True)
def same_numbers():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def classifier(*after, n=3):
    torch.manual_seed(1)
    middle = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, n)
    return nn.Sequential(*middle, *after).eval()


def segmenter(n=4):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, n, 1)
    ).eval()


def void_images():
    """Five batches of which one is void and one nearly so."""
    x, y = torch.randn(50, 3, 6, 6), torch.randint(0, 4, (50, 6, 6))
    y[20:30] = y[30:39] = 255
    return x, y, [(x[i : i + 10], y[i : i + 10]) for i in range(0, 50, 10)]


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, outputs, labels):
        return self.inner(outputs, labels)


WEIGHT = torch.tensor([1.0, 4.0, 0.5, 2.0])
LOSSES = {
    "module": nn.CrossEntropyLoss(ignore_index=255),
    "weights": nn.CrossEntropyLoss(WEIGHT, ignore_index=255),
    "smoothed": nn.CrossEntropyLoss(WEIGHT, ignore_index=255, label_smoothing=0.2),
    "partial": partial(F.cross_entropy, ignore_index=255, label_smoothing=0.1),
    "nested": Wrapped(Wrapped(nn.CrossEntropyLoss(ignore_index=255))),
    "function": lambda z, y: F.cross_entropy(z, torch.where(y == 255, -100, y)),
    "selected": lambda z, y: F.cross_entropy(z.movedim(1, -1)[y != 255], y[y != 255]),
    "nll": lambda z, y: F.nll_loss(z.log_softmax(1), y, WEIGHT, ignore_index=255),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_counts_by_its_labels_that_count(name):
    """Void and nearly void images: float loss and rise are those of all labels in one tensor."""
    loss, (x, y, data), network = LOSSES[name], void_images(), segmenter()
    with torch.no_grad():
        expected = float(loss(network(x), y))
        assert product.float_loss(network, data, loss) == pytest.approx(expected, rel=1e-5)
        quantized, _ = product.quantized(network, data, 3, loss, **PLAIN)
        rise = float(loss(quantized(x), y)) - expected
    measured = product.measured_rise(network, data, 3, loss, **PLAIN)
    assert measured == pytest.approx(rise, rel=1e-3, abs=1e-6)
    table, _ = product.rise_table(network, data, loss)
    rows = [v for parts in table.values() for row in parts.values() for v in row.values()]
    assert rows and all(map(math.isfinite, rows))


@pytest.mark.parametrize("scorer", ["gauss_newton", "fisher", "diagonal", "hutchinson"])
def test_what_is_ignored_has_no_curvature(scorer):
    """The same images with void ones between them: the same rises, with the other scorers too."""
    x, y, _ = void_images()
    y = torch.where(y == 255, 0, y)
    network, loss = segmenter(), LOSSES["module"]
    data = [(x[i : i + 10], y[i : i + 10]) for i in range(0, 50, 10)]
    void = [pair for a, b in data for pair in ((a, b), (a, torch.full_like(b, 255)))]
    with_void, without = (
        product.score(network, d, 3, loss, scorer=scorer, **PLAIN) for d in (void, data)
    )
    # Signs are drawn anew for the void batches, and the running mean has another window.
    near = {"gauss_newton": 1e-6, "fisher": 0.2, "diagonal": 0.1, "hutchinson": 0.3}[scorer]
    assert with_void == pytest.approx(without, rel=near)


def test_all_that_a_search_records_is_a_number():
    """A search over data with a void batch, validated on them, with a training after each step."""
    x, y, data = void_images()
    loss = LOSSES["module"]
    found = product.search(
        *(segmenter(), data, loss), budget="0.5 bops", validation=data, candidates=2
    )
    facts = [v for t in found.study.trials for v in t.user_attrs.values() if isinstance(v, float)]
    compared = [row["measured"]["loss"] for row in read_history(found.study).facts["compared"]]
    assert all(map(math.isfinite, [*facts, *compared, found.study.best_value]))
    with torch.no_grad():
        right = (found.network(x).argmax(1) == y)[y != 255].float().mean()
        by_hand = float(loss(found.network(x), y))
    assert found.facts["accuracy_after"] == pytest.approx(float(right))
    assert compared[0] == pytest.approx(by_hand, rel=1e-5)


def test_labels_of_which_none_counts_are_refused():
    """All labels are 255: there is no loss, and the sentence says why."""
    x, y, _ = void_images()
    for loss in (LOSSES["module"], LOSSES["nested"]):
        with pytest.raises(ValueError, match="ignores all labels of the calibration data"):
            product.opened(segmenter(), (x, torch.full_like(y, 255)), loss)


def test_a_training_skips_labels_that_do_not_count():
    """Of a training batch that is void only the distance to the float network is left."""
    from hq_optuna.training.losses import training_loss

    z = torch.randn(4, 3, requires_grad=True)
    labels = torch.full((4,), 255)
    nothing = training_loss(z, labels, None, LOSSES["module"], 1.0, 4.0)
    nothing.backward()
    assert float(nothing.detach()) == 0 and not z.grad.any()
    half = training_loss(z, labels, z.detach() + 1, LOSSES["nested"], 0.5, 4.0)
    assert math.isfinite(float(half.detach()))


def test_a_summed_loss_is_taken_as_its_mean():
    """reduction='sum': the loss is not a hundred times as large, and it is said."""
    network, data = classifier(), (torch.randn(96, 8), torch.randint(0, 3, (96,)))
    mean = float(F.cross_entropy(network(data[0]).detach(), data[1]))
    for loss in (nn.CrossEntropyLoss(reduction="sum"), partial(F.cross_entropy, reduction="sum")):
        assert product.float_loss(network, data, loss) == pytest.approx(mean, rel=1e-5)
        assert any(
            "sums over the batch" in w
            for w in product.opened(network, data, loss).objective.warnings
        )


class Drawn(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, outputs, labels):
        return F.cross_entropy(self.drop(outputs), labels)


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, outputs, labels):
        loss = F.cross_entropy(outputs, labels)
        self.mean.mul_(0.9).add_(loss.detach(), alpha=0.1)
        return loss - self.mean


def seeded_loss(outputs, labels):
    generator = torch.Generator().manual_seed(3)
    return F.cross_entropy(outputs + torch.randn(outputs.shape, generator=generator), labels)


def noisy_loss(outputs, labels):
    return F.cross_entropy(outputs + 1e-3 * torch.rand(3), labels)


def test_a_loss_that_is_not_the_same_twice_is_refused():
    """Random numbers, dropout, a running mean: refused; a seed of its own passes."""
    network, data = classifier(), (torch.randn(64, 8), torch.randint(0, 3, (64,)))
    for loss in (noisy_loss, Drawn(), Remembers(), lambda z, y: F.cross_entropy(F.dropout(z), y)):
        state = torch.get_rng_state()
        before = copy.deepcopy(loss.state_dict()) if isinstance(loss, nn.Module) else {}
        with pytest.raises(ValueError, match=r"differs when computed twice.*random|random"):
            product.opened(network, data, loss)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(loss.state_dict()[k], v) for k, v in before.items())
    for loss in (seeded_loss, Drawn().eval()):
        assert product.score(network, data, 4, loss) == product.score(network, data, 4, loss)


def test_a_loss_may_write_into_what_it_is_given():
    """`labels[labels == 255] = -100` inside the loss: neither data nor digest change."""

    def loss(outputs, labels):
        labels[labels == 255] = -100
        return F.cross_entropy(outputs.sub_(1.0), labels)

    x, y, data = void_images()
    kept = y.clone()
    expected = float(F.cross_entropy(segmenter()(x).detach(), y, ignore_index=255))
    search = product.opened(segmenter(), data, loss)
    digest = search.objective.data.digest()
    scorer = search.objective.prepare()
    assert scorer.float_loss() == pytest.approx(expected, rel=1e-5)
    scorer.score(product.assignment(search, 4))
    assert search.objective.data.digest() == digest and torch.equal(y, kept)


class Masked(nn.Module):
    """A third of the classes is never to be taken."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, z):
        return z.masked_fill(torch.arange(z.shape[1]) % 3 == 2, self.value)


@pytest.mark.parametrize("scorer", ["gauss_newton", "fisher", "diagonal"])
def test_masked_classes_have_no_part_in_a_score(scorer):
    """Scores of −inf, as for actions that are not allowed: as with a very low number instead."""
    x, y = torch.randn(96, 8), torch.randint(0, 2, (96,))
    infinite, low = (
        product.score(classifier(Masked(v), n=6), (x, y), 3, scorer=scorer, **PLAIN)
        for v in (-torch.inf, -1e4)
    )
    assert infinite == pytest.approx(low, rel=1e-5) and infinite > 0


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.out = nn.Linear(8, 3)

    def forward(self, x, mask):
        weights = (self.q(x) @ self.k(x).mT + mask).softmax(-1)
        return self.out((weights @ self.v(x)).mean(1))


def test_infinity_passes_where_it_does_not_count():
    """−inf in an attention mask passes; in an image, in labels to predict, and NaN anywhere no."""
    mask = torch.full((5, 5), -torch.inf).triu(1).expand(32, 5, 5).clone()
    x, y = torch.randn(32, 5, 8), torch.randint(0, 3, (32,))
    assert math.isfinite(product.score(Attention(), [((x, mask), y)], 4))
    with pytest.raises(ValueError, match=r"inputs hold NaN.*batch 0"):
        product.opened(Attention(), [((x, mask * torch.nan), y)])
    images = torch.randn(32, 8)
    for bad in (torch.nan, torch.inf, -torch.inf):
        spoiled = images.clone()
        spoiled[20, 3] = bad
        with pytest.raises(ValueError, match=r"inputs hold NaN or infinity \(batch 1\)"):
            product.opened(classifier(), [(images, y), (spoiled, y)])
        numbers = images[:, :3].clone()
        numbers[20, 1] = bad
        with pytest.raises(ValueError, match=r"labels hold NaN or infinity \(batch 0\)"):
            product.opened(classifier(), [(images, numbers)], F.mse_loss)


class Spoils(nn.Module):
    """Returns two outputs, of which the second is spoiled where an image is large."""

    def __init__(self, bad):
        super().__init__()
        self.inner, self.bad = classifier(), bad

    def forward(self, x):
        z = self.inner(x)
        return z, torch.where(x.amax() > 50, z * self.bad, z)


def test_nan_in_any_batch_is_found_before_the_search():
    """Outputs of the third batch alone are NaN: refused, with the batch and the output named."""
    data = [(torch.randn(16, 8), torch.randint(0, 3, (16,))) for _ in range(4)]
    data[2][0][3, 0] = 100
    with pytest.raises(ValueError, match=r"NaN or infinity \(batch 2, tensor 2 of 2\)"):
        product.opened(Spoils(torch.nan), data, lambda z, y: F.cross_entropy(z[0], y))
    # An infinity that the loss does not read does not count, and one that it reads does.
    product.opened(Spoils(torch.inf), data, lambda z, y: F.cross_entropy(z[0], y))
    with pytest.raises(ValueError, match=r"\(batch 2|calibration batch 2"):
        product.opened(Spoils(torch.inf), data, lambda z, y: F.cross_entropy(z[1], y))


def test_a_loss_that_is_nan_on_a_later_batch_is_refused_by_its_number():
    """A mean of one's own over no pixel at all is 0 / 0, which only its author can mend."""

    def own(outputs, labels):
        each = F.cross_entropy(outputs, labels, ignore_index=255, reduction="none")
        return each.sum() / (labels != 255).sum()

    _, _, data = void_images()
    with pytest.raises(ValueError, match=r"calibration batch 2 is nan.*leave such a batch out"):
        product.opened(segmenter(), data, own)


# What is measured by default


def fitted(network, x, y, loss, steps=30):
    """Train a network a little, so that some classes are right."""
    optimizer = torch.optim.Adam(network.parameters(), 2e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(network(x), y).backward()
        optimizer.step()
    return network.eval()


def measured(network, x, y, loss):
    """Return the accuracy of the float network that a search measures, or ``None``."""
    data = [(x[i : i + 20], y[i : i + 20]) for i in range(0, len(x), 20)]
    found = product.opened(network, data, loss, validation=data)
    facts = found.before_and_after(network, found.validation, "validation")
    return facts.get("accuracy_before"), facts


def tagger(vocabulary=6, n=6):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Embedding(vocabulary, 12), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, n)
    )


def flat(z, y):
    return F.cross_entropy(z.flatten(0, 1), y.flatten(), ignore_index=0)


def turned(z, y):
    return F.cross_entropy(z.transpose(1, 2), y)


def shifted(z, y):
    return F.cross_entropy(z[:, :-1].flatten(0, 1), y[:, 1:].flatten())


@pytest.mark.parametrize("n_tokens", [6, 5])
@pytest.mark.parametrize(
    ("loss", "by_hand"),
    [
        (flat, lambda z, y: (z.argmax(2) == y)[y != 0]),
        (turned, lambda z, y: z.argmax(2) == y),
        (shifted, lambda z, y: z[:, :-1].argmax(2) == y[:, 1:]),
        (F.cross_entropy, lambda z, y: z.argmax(1) == y),
    ],
)
def test_accuracy_of_tokens_is_along_the_axis_that_the_loss_takes(n_tokens, loss, by_hand):
    """As many tokens as classes and one fewer; the loss flattens, transposes or shifts them."""
    if loss is F.cross_entropy and n_tokens == 5:
        return  # which PyTorch refuses
    x = torch.randint(0, 6, (60, n_tokens))
    y = torch.where(torch.rand(x.shape) < 0.3, torch.randint(0, 6, x.shape), (x * 5 + 1) % 6)
    network = fitted(tagger(), x, y, loss, 12)
    expected = float(by_hand(network(x), y).float().mean())
    assert 0.1 < expected < 1
    assert measured(network, x, y, loss)[0] == pytest.approx(expected)


def test_accuracy_is_of_what_counts_or_there_is_none():
    """Ignored labels, one logit, several labels a sample, dice with void pixels, numbers."""
    x = torch.randn(60, 8)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    void = y.clone()
    void[::3] = 255
    loss = nn.CrossEntropyLoss(ignore_index=255)
    network = fitted(classifier(), x, void, loss)
    right = network(x).argmax(1) == void
    got, facts = measured(network, x, void, loss)
    assert got == pytest.approx(float(right[void != 255].float().mean()))
    assert facts["validation_lost"] == 0
    own = lambda z, y: F.multi_margin_loss(z, y)  # noqa: E731
    assert measured(network, x, y, own)[0] == pytest.approx(
        float((network(x).argmax(1) == y).float().mean())
    )

    def one_logit(z, y):
        return F.binary_cross_entropy_with_logits(z[:, 0], (y > 0).float())

    def several(z, y):
        return F.binary_cross_entropy_with_logits(z, y.float())

    def dice(z, y):
        p, valid = z.softmax(1), y != 255
        hit = F.one_hot(torch.where(valid, y, 0), 4).movedim(-1, 1) * valid.unsqueeze(1)
        return 1 - 2 * (p * hit).sum() / (p * valid.unsqueeze(1) + hit).sum()

    assert measured(classifier(n=1), x, y, one_logit)[0] is None
    assert measured(classifier(), x, F.one_hot(y, 3), several)[0] is None
    assert measured(classifier(), x, x[:, :3], F.mse_loss)[0] is None
    images, labels, _ = void_images()
    assert measured(segmenter(), images, labels, dice)[0] is None


# Settings


def closing_over(value):
    def loss(outputs, labels):
        return value * F.cross_entropy(outputs, labels)

    return loss


def default_of(value):
    def loss(outputs, labels, *, power=value):
        return F.cross_entropy(outputs, labels) ** power

    return loss


class Callable:
    def __init__(self, gamma):
        self.settings = {"gamma": [gamma]}

    def __call__(self, outputs, labels):
        return self.settings["gamma"][0] * F.cross_entropy(outputs, labels)

    def bound(self, outputs, labels):
        return self(outputs, labels)


def hooked(factor):
    loss = nn.CrossEntropyLoss()
    loss.register_forward_hook(lambda module, given, found: factor * found)
    return loss


MADE = {
    "nested": lambda v: Wrapped(nn.Sequential(Wrapped(nn.CrossEntropyLoss(label_smoothing=v)))),
    "partial of nested": lambda v: partial(Wrapped(nn.Identity()), nn.NLLLoss(torch.ones(3) * v)),
    "callable": Callable,
    "bound": lambda v: Callable(v).bound,
    "closure": closing_over,
    "closure of a module": lambda v: closing_over(nn.CrossEntropyLoss(label_smoothing=v)),
    "closure of a large tensor": lambda v: closing_over(torch.full((1000, 100), v)),
    "default": default_of,
    "hook": hooked,
}


@pytest.mark.parametrize("kind", MADE)
def test_a_setting_anywhere_in_a_loss_tells_searches_apart(kind):
    """Two losses made alike have one name without addresses; another setting has another one."""
    from hq_optuna.objective.functions import name_of

    names = [name_of(MADE[kind](value)) for value in (0.25, 0.25, 0.75)]
    assert names[0] == names[1] != names[2]
    assert "0x" not in names[0] and len(names[0]) < 300


def test_a_study_of_a_loss_with_another_nested_setting_is_refused(tmp_path):
    """Resumed with another smoothing inside a module inside a module: the loss is named."""
    data = torch.randn(64, 8), torch.randint(0, 3, (64,))
    url = f"sqlite:///{tmp_path / 'study.db'}"

    def found(value):
        loss = Wrapped(Wrapped(nn.CrossEntropyLoss(label_smoothing=value)))
        return product.search(classifier(), data, loss, storage=url, name="s", limit=4)

    assert product.history(found(0.1).study) == product.history(found(0.1).study)
    with pytest.raises(ValueError, match="the loss function"):
        found(0.2)


def test_what_a_loss_writes_down_is_no_setting(tmp_path):
    """A loss that counts its calls and keeps a log goes on with its own study."""
    log, data = [], (torch.randn(64, 8), torch.randint(0, 3, (64,)))

    class Counts:
        def __init__(self):
            self.n, self.gamma = 0, 2.0

        def __call__(self, outputs, labels):
            self.n += 1
            log.append(self.n)
            return self.gamma * F.cross_entropy(outputs, labels)

    loss, url = Counts(), f"sqlite:///{tmp_path / 'study.db'}"
    network = classifier()
    _, again = (product.search(network, data, loss, storage=url, name="s", limit=n) for n in (3, 6))
    assert len(again.study.trials) > 3 and loss.n > 3
    loss.gamma = 3.0
    with pytest.raises(ValueError, match="the loss function"):
        product.search(network, data, loss, storage=url, name="s", limit=9)
