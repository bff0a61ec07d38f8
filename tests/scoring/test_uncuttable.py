"""Networks that cannot be cut between their layers run whole, and say so."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.scoring.side_by_side import IMAGES, ROWS, Mixed, Search
from tests.small_networks import make


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x) if bool((x > 0).any()) else x


class Borrowed(nn.Module):
    """Reads a layer's weight outside the layer: tracing would take it for a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.b(self.a(x)), self.a.weight)


class Overwritten(nn.Module):
    """Writes into a part of what is read later."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x[:, 0].relu_()
        return self.b(x)


@pytest.mark.parametrize("kind", [Branching, Borrowed, Overwritten])
def test_what_cannot_be_cut_runs_whole_and_says_so_once(kind):
    search = Search(make(kind, dtype=torch.float32), ROWS)
    assert search.reusing.reuse is None
    (warning,) = search.reusing.warnings
    assert warning.startswith("Each candidate runs the whole network, because ")
    assert warning.endswith("Scores are the same; they only take longer.")
    search.walk(4)
    assert len(search.reusing.warnings) == 1


class OfLists(nn.Module):
    """Takes a list of images of any sizes, as detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 3, 1), nn.Linear(3, 2)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        pooled = [self.conv(image[None]).mean((2, 3)) for image in images]
        return [{"scores": self.head(torch.relu(x))} for x in pooled]


def test_lists_of_images_run_whole():
    images = [([IMAGES[0], IMAGES[1, :, :4]],), ([IMAGES[2], IMAGES[3, :, :5]],)]
    batches = [(inputs, torch.zeros(2).long()) for inputs in images]
    search = Search(make(OfLists, dtype=torch.float32), batches, correct=False)
    assert len(search.reusing.warnings) == 1
    search.walk(5)


def test_hooks_on_the_network_itself_see_whole_passes():
    search = Search(make(Mixed(["norm"]), 0, torch.float32), IMAGES)
    seen: list[int] = []
    search.prepared.register_forward_hook(lambda *_: seen.append(1))
    search.reusing.score(search.uniform(4), search.uniform(4))
    assert len(seen) == 2 * len(search.data)  # in float, and with these bits
