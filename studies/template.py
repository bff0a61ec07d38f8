"""A study to copy: `hq-optuna run studies/template.py` runs as it is, on made-up data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Defaults of this study; the options of `hq-optuna run` go before them. All may be left out.
# Further keys: activation_bits, pin_first_last, pins, allowed, tied, scorer, seed.
SETTINGS = {
    "bits": range(2, 9),  # what a layer may have, here 2 to 8
    "budget": "0.25 bops",  # a quarter of the all-8-bit cost; or "24 GBOPs", "5.8 MiB"
    "n_candidates": 4,  # assignments scored per step
    "rule": "ratio",
}


def network(width: int = 8) -> nn.Module:
    """Return the trained float network. Required.

    The parameters become options on the command line, here --width. Yours may rather be
    ``checkpoint: Path``. A parameter ``folder: Path`` is no option: it is the run's folder, where
    a study may keep files of its own.

    Args:
        width: Channels of the convolutions.
    """
    with torch.random.fork_rng(devices=[]):  # leave the random state as it was
        torch.manual_seed(0)
        net = nn.Sequential(
            *(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4)),
        )
    _pretend_to_train(net)
    # Yours: net.load_state_dict(torch.load(checkpoint, weights_only=True))
    return net.eval()


def calibration(n_calibration: int = 64, width: int = 8) -> tuple[Tensor, Tensor]:
    """Return labelled data that neither trained the network nor will judge it. Required.

    Either ``(inputs, labels)`` tensors, a ``Dataset`` of pairs, or batches such as a
    ``DataLoader``; without shuffling or random augmentation. A few hundred samples are enough.

    Args:
        n_calibration: Images that the score reads.
        width: Channels of the convolutions.
    """
    return _labelled(n_calibration, seed=1, width=width)


def validation(width: int = 8) -> tuple[Tensor, Tensor]:
    """Return the data on which accuracy is measured before and after. May be left out."""
    return _labelled(256, seed=2, width=width)


# The mean loss over the batch, from (outputs, labels). May be left out: this is the default.
# PyTorch's cross_entropy or mse_loss itself lets the search use its best scorer, which knows
# nothing of a function around them. Any other loss is a function loss(outputs, labels) of yours.
loss = nn.functional.cross_entropy


# Three more functions that may be left out:
#
#   rise = hq_optuna.rises.…          for a loss of your own, or data without labels: what it costs
#                                     that outputs move; see docs/guides/fields.md
#   def test(...):                    data read once, when the search is over
#   def evaluate(network, batches):   your own figures on the validation data, for example
#                                     {"dice": 0.91}; the default is {"accuracy": ...}


def _images(n: int, seed: int) -> Tensor:
    """Make up coloured noise, shape ``(n, 3, 12, 12)``."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randn(n, 3, 1, 1, generator=generator)
    return colours + 0.5 * torch.randn(n, 3, 12, 12, generator=generator)


def _pretend_to_train(net: nn.Sequential) -> None:
    """Give the random network batch-norm statistics and confidence. Yours does not need this."""
    for module in net:
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # statistics of one batch
    with torch.no_grad():
        net(_images(256, seed=0))
        net[-1].get_parameter("weight").mul_(10)
        net[-1].get_parameter("bias").zero_()


def _labelled(n: int, seed: int, width: int) -> tuple[Tensor, Tensor]:
    """Return images labelled with what the float network answers: its accuracy is 100 %."""
    images = _images(n, seed)
    with torch.no_grad():
        return images, network(width)(images).argmax(dim=1)
