"""The studies that are shipped, and the page on study files."""

import re
from pathlib import Path

import pytest
import torch
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from typer.testing import CliRunner

import hq_optuna
from hq_optuna.cli.app import app
from hq_optuna.network.batches import read_batches
from hq_optuna.rises import rise_of_loss
from hq_optuna.settings import SearchSettings
from hq_optuna.space.budget import Budget
from hq_optuna.study_files.study_file import StudyFile, find_study

CHECKOUT = Path(__file__).parents[2]


def test_the_template_runs_as_it_is_and_its_network_is_always_right(tmp_path):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    template = StudyFile.load(find_study("template"))
    parts = template.build(tmp_path, template.parse_options([]))
    assert torch.equal(torch.get_rng_state(), state)
    assert set(template.options) == {"width", "n_calibration"}
    for data, n in ((parts.calibration, 64), (parts.validation, 256)):
        batches = read_batches(data)
        assert batches.n_samples == n
        assert len({int(label) for batch in batches for label in batch.labels}) >= 3
        for batch in batches:
            outputs = parts.network(batch.inputs)
            assert torch.equal(outputs.argmax(dim=1), batch.labels)
            expected = torch.nn.functional.cross_entropy(outputs, batch.labels)
            assert torch.equal(parts.loss(outputs, batch.labels), expected)
    assert rise_of_loss(parts.loss) is not None  # so a copy has the default scorer
    again = template.build(tmp_path, {"n_calibration": 64})
    for name, tensor in parts.network.state_dict().items():
        assert torch.equal(again.network.state_dict()[name], tensor)


@pytest.mark.parametrize("name", ["template", "digits", "cifar10_resnet20"])
def test_shipped_studies_have_a_doc_and_every_required_option_has_help(name):
    shipped = StudyFile.load(find_study(name))
    assert shipped.doc.endswith(".")
    assert all(option.help for option in shipped.options.values())
    assert isinstance(SearchSettings(**shipped.settings).budget, Budget)


def test_the_page_on_study_files_shows_a_study_that_works(tmp_path):
    page = (CHECKOUT / "docs" / "guides" / "study-files.md").read_text()
    path = tmp_path / "my_study.py"
    path.write_text(re.search(r"```python\n(.*?)```", page, re.S)[1])
    mine = StudyFile.load(path)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    torch.save(net.state_dict(), tmp_path / "net.pt")
    torch.save((torch.randn(600, 8), torch.zeros(600, dtype=torch.int64)), tmp_path / "data.pt")
    command = re.search(r"hq-optuna run my_study\.py (.*)", page)[1].split()
    arguments = [str(tmp_path / word) if word.endswith(".pt") else word for word in command]
    parts = mine.build(tmp_path, mine.parse_options(arguments))
    assert read_batches(parts.calibration).n_samples == 512
    assert torch.equal(parts.network[0].weight, net[0].weight)
    result = CliRunner().invoke(app, ["run", str(path), *arguments, "--folder", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "2 layers" in result.output and "the budget is met" in result.output


def test_the_page_on_study_files_searches_a_detector(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (CHECKOUT / "docs" / "guides" / "study-files.md").read_text()
    file, after = (
        re.search(rf"<!-- {name} -->\n```python\n(.*?)```", page, re.S)[1]
        for name in (r"detector\.py", r"after detector\.py")
    )
    (tmp_path / "detector.py").write_text(file)
    torch.manual_seed(0)
    detector = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    for module in detector.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # the statistics of one batch
    image = torch.rand(3, 50, 70)
    with torch.no_grad():
        detector.head(list(detector.backbone(torch.randn(8, 3, 64, 64)).values()))
    detector.eval()
    torch.save(detector.state_dict(), "net.pt")
    torch.save(detector.transform([image, image])[0].tensors[..., :64, :64], "images.pt")
    options = ["--checkpoint", "net.pt", "--images", "images.pt", "--max-evaluations", "3"]
    result = CliRunner().invoke(app, ["run", "detector.py", *options])
    assert result.exit_code == 0, result.output
    assert "98 layers" in result.output and "Warning" not in result.output
    names = {"hq": hq_optuna, "detector": detector, "image": image}
    exec(file + after, names)
    assert names["boxes"].shape == detector([image])[0]["boxes"].shape
    images = torch.load("images.pt", weights_only=True)
    with torch.no_grad():
        plain, found = names["Predictions"](detector)(images), names["found"](images)
    assert 0 < float((found - plain).norm() / plain.norm()) < 0.5  # about 8 bits
