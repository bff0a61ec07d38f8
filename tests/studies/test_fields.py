"""The studies of other fields: their float figures on the published data, and what they say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks.zoo import unpacked
from hq_optuna.errors import DataError
from hq_optuna.network.batches import Batch, Batches, read_batches
from hq_optuna.network.evaluation import Accuracy
from hq_optuna.settings import SearchSettings
from hq_optuna.study_files.study_file import StudyFile, StudyParts, find_study
from tests.real_data import shared_data

FIELDS = (
    *("keywords", "visual_wake_words", "efficientnet_lite0", "super_resolution", "fastestdet"),
    *("espnet", "sentences", "imagefolder", "torchvision_detection", "faster_rcnn"),
)


@pytest.fixture(scope="module")
def zoo() -> Iterator[Path]:
    with unpacked(shared_data("zoo.tar").parent) as folder:
        yield folder


@pytest.mark.parametrize("name", FIELDS)
def test_every_study_has_a_doc_and_its_options_have_help(name: str) -> None:
    shipped = StudyFile.load(find_study(name))
    assert shipped.doc.endswith(".")
    assert all(option.help for option in shipped.options.values())
    SearchSettings(**shipped.settings)


@pytest.mark.parametrize(
    ("name", "arguments", "named"),
    [
        *((n, ["--data", "nowhere"], "--data") for n in FIELDS[:6]),
        ("sentences", ["--model", "nowhere"], "--model"),
        ("imagefolder", ["--data", "nowhere", "--checkpoint", "no.pt"], "--checkpoint"),
        *(
            (n, ["--images", "no", "--annotations", "no", "--checkpoint", "no.pt"], "--checkpoint")
            for n in ("torchvision_detection", "faster_rcnn")
        ),
    ],
)
def test_data_that_are_missing_are_named_with_the_option(
    name: str, arguments: list[str], named: str, tmp_path: Path
) -> None:
    shipped = StudyFile.load(find_study(name))
    with pytest.raises(DataError, match=named):
        shipped.build(tmp_path, shipped.parse_options(arguments))


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        # Of data/zoo/README.md and the references there, or of these parts of the data: 91.4 % of
        # the 500 clips, 86.0 % of the 500 crops, 32.08 and 32.03 dB, AP50 38.1.
        ("keywords", [], 0.9033),
        ("visual_wake_words", [], 0.8667),
        ("super_resolution", [], 32.08),
        ("super_resolution", ["--model", "mobilesr"], 32.03),
        ("fastestdet", [], 38.1),
    ],
)
@torch.no_grad()
def test_the_float_figure_is_the_published_one(
    name: str, options: list[str], expected: float, zoo: Path, tmp_path: Path
) -> None:
    shipped = StudyFile.load(find_study(name))
    parts = shipped.build(tmp_path, shipped.parse_options(["--data", str(zoo), *options]))
    data = read_batches(parts.validation, batch_size=64)
    evaluate = parts.evaluate or Accuracy(parts.loss)
    (found,) = evaluate(parts.network, data).values()
    assert found == pytest.approx(expected, abs=1e-3 if expected < 1 else 0.05)
    seen = read_batches(parts.calibration, batch_size=8, labelled=False)
    told = {tuple(x.flatten()[::31].tolist()) for b in seen for x in b.inputs}
    judged = {tuple(x.flatten()[::31].tolist()) for b in data for x in b.inputs}
    assert not told & judged


def test_average_precision_is_that_of_a_hand_made_case() -> None:
    from studies.fastestdet import average_precision, matched_by_coco, mean_precision

    truth = [(torch.tensor([[0.0, 0.0, 1.0, 1.0], [2.0, 2.0, 3.0, 3.0]]), torch.tensor([0, 0]))]
    right = torch.tensor([0.0, 0.0, 1.0, 1.0])
    wrong = torch.tensor([5.0, 5.0, 6.0, 6.0])
    found = [(torch.stack([wrong, right]), torch.tensor([0.9, 0.8]), torch.tensor([0, 0]))]
    records = matched_by_coco(found, truth, [0, 1])
    # One of two found, at a precision of 1/2 up to a recall of 1/2: 51 of COCO's 101 points.
    assert average_precision(records) == pytest.approx(100 * 0.5 * 51 / 101)
    assert mean_precision(records) == pytest.approx(100 * 0.5 * 51 / 101)
    # Moved by a tenth of its side, the box overlaps by 0.9 / 1.1: right up to 0.8, seven of ten.
    found[0][0][1, [0, 2]] += 0.1
    records = matched_by_coco(found, truth, [0, 1])
    assert average_precision(records) == pytest.approx(100 * 0.5 * 51 / 101)
    assert mean_precision(records) == pytest.approx(0.7 * 100 * 0.5 * 51 / 101)


def test_similarity_and_the_five_likeliest_are_those_of_hand_made_cases() -> None:
    from studies.efficientnet_lite0 import top5
    from studies.super_resolution import similarity

    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pairs = Batches([Batch(image, image, 1), Batch(image, 1 - image, 1)])
    same, opposite = similarity.per_sample(nn.Identity(), pairs)  # type: ignore[misc]
    assert same == pytest.approx(1)
    assert opposite < 0
    scores = torch.arange(8.0).expand(3, -1)
    found = top5(nn.Identity(), Batches([Batch(scores, torch.tensor([7, 3, 2]), 3)]))
    assert found == {"top-5": pytest.approx(200 / 3)}


def test_mean_iou_is_that_of_a_hand_made_table() -> None:
    from studies.espnet import mean_iou

    table = torch.tensor([[3, 1, 0], [0, 2, 0], [0, 0, 0]])
    assert mean_iou([table]) == pytest.approx(100 * (3 / 4 + 2 / 3) / 2)


def save(pixels: torch.Tensor, path: Path) -> None:
    Image.fromarray(pixels.byte().movedim(0, -1).numpy()).save(path)


def detector_of(name: str, study: str, folder: Path, n_calibration: int = 2) -> StudyParts:
    """Return the parts of a study of a detector with random weights, on four images and boxes."""
    import json

    from torchvision.models import get_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = get_model(name, weights=None, weights_backbone=None)
    torch.save(net.state_dict(), folder / "net.pt")
    images, boxes = [], []
    for place in range(4):
        size = (3, 40, 60 - 8 * (place % 2))
        pixels = torch.randint(0, 256, size, generator=torch.Generator().manual_seed(place))
        save(pixels, folder / f"{place}.png")
        images.append({"id": place, "file_name": f"{place}.png"})
        each = {"image_id": place, "category_id": 1}
        boxes += [{**each, "bbox": [1 + i, 2, 10, 10]} for i in range(place)]
    text = json.dumps({"images": images, "annotations": boxes})
    (folder / "boxes.json").write_text(text)
    shipped = StudyFile.load(find_study(study))
    options: list[Any] = ["--checkpoint", folder / "net.pt", "--images", folder]
    options += ["--annotations", folder / "boxes.json", "--n-calibration", n_calibration]
    return shipped.build(folder, shipped.parse_options([*map(str, options)]))


def test_a_detector_of_torchvision_is_searched_by_what_its_head_returns(tmp_path: Path) -> None:
    import hq_optuna

    parts = detector_of("ssdlite320_mobilenet_v3_large", "torchvision_detection", tmp_path)
    assert isinstance(parts.network, nn.Module)
    assert read_batches(parts.validation).n_samples == 2
    search = hq_optuna.BitSearch(
        parts.network, parts.calibration, rise=parts.rise, bits=(8, 4), budget="0.5 bops"
    )
    table = search.objective.prepare().sensitivity
    # First and last layer are pinned; boxes are decoded from every other one.
    assert sum(table.weights[name].get(4, 0.0) > 0 for name in table.weights) > 60


def test_faster_rcnn_is_searched_by_both_of_its_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import functools

    import torchvision.models

    import hq_optuna

    small = functools.partial(torchvision.models.get_model, min_size=64, max_size=96)
    monkeypatch.setattr(torchvision.models, "get_model", small)
    parts = detector_of("fasterrcnn_mobilenet_v3_large_320_fpn", "faster_rcnn", tmp_path)
    network: Any = parts.network
    read = read_batches(parts.validation)
    found = parts.evaluate(network, read)
    assert found == {"AP50": pytest.approx(0, abs=5)}  # of random weights
    search = hq_optuna.BitSearch(
        *(network, parts.calibration),
        rise=parts.rise,
        **{
            "bits": (8, 4),
            "budget": "0.5 bops",
            "rounding": "nearest",
            "correction": False,
        },  # which is fast
    )
    table = search.objective.prepare().sensitivity
    told = {name for name in table.weights if table.weights[name].get(4, 0.0) > 0}
    stages = {"rpn.head.cls_logits", "roi_heads.box_head.fc6", "roi_heads.box_head.fc7"}
    assert stages <= told
    assert len(told) > 60
    rounded = search.quantized(search.space.config(search.space.bottom))
    # Rounded, the first stage selects other regions, in another number, which is no error.
    assert parts.evaluate(rounded, read) == {"AP50": pytest.approx(0, abs=5)}
    assert not network.rpn._forward_hooks


def test_any_classifier_of_torchvision_runs_from_a_checkpoint(tmp_path: Path) -> None:
    from torchvision.models import squeezenet1_1

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(squeezenet1_1(num_classes=2).state_dict(), tmp_path / "net.pt")
    for place in range(6):
        folder = tmp_path / "images" / "ab"[place % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (3, 80, 90), generator=torch.Generator().manual_seed(place))
        save(pixels, folder / f"{place}.png")
    shipped = StudyFile.load(find_study("imagefolder"))
    typed = f"--data {tmp_path / 'images'} --checkpoint {tmp_path / 'net.pt'} --size 64"
    more = ["--model", "squeezenet1_1", "--n-classes", "2", "--n-calibration", "4"]
    parts = shipped.build(tmp_path, shipped.parse_options([*typed.split(), *more]))
    assert (read_batches(parts.calibration).n_samples, parts.validation.n_samples) == (4, 2)
    assert parts.network(parts.calibration[0].inputs).shape == (4, 2)
