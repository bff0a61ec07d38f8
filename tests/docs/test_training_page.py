"""The code of docs/guides/training.md, as it stands there."""

import re
from pathlib import Path

from torch.nn import functional as F

from hq_optuna.curvature import Curvature
from tests.training.examples import BITS, float_net, labelled
from tests.training.short import flipped

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "training.md"


def test_one_assignment_is_trained_and_its_curvature_read_as_the_page_says(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    code = [block for block in blocks if "prepared" in block]
    assert len(code) == 2
    images, labels = labelled(64)
    names = {
        "network": float_net(),
        "calibration_images": images[:32],
        "calibration_labels": labels[:32],
        "images": images,
        "labels": labels,
        "assignment": BITS,
        "augment": flipped,
        "loss_fn": F.cross_entropy,
    }
    for block in code:
        exec(block, names)
    assert len(capsys.readouterr().out.splitlines()) == 6  # epochs
    assert Path("training.safetensors").exists()
    curvature = names["curvature"]
    assert isinstance(curvature, Curvature) and set(curvature.weights) == set(BITS)
