import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hq_optuna.errors import StudyFileError
from hq_optuna.network.batches import read_batches
from hq_optuna.space.budget import parse_budget
from hq_optuna.study_files.study_file import StudyFile, find_study

datasets = pytest.importorskip("sklearn.datasets", reason="the digits study needs scikit-learn")

FILE = "digits-network.safetensors"


@pytest.fixture(scope="module")
def digits():
    return StudyFile.load(find_study("digits"))


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """Return the folder and the parts of one run with the default options."""
    folder = tmp_path_factory.mktemp("digits")
    return folder, digits.build(folder, digits.parse_options([]))


def accuracy_and_confidence(network, data):
    images, labels = data
    with torch.no_grad():
        outputs = network(images)
    right = (outputs.argmax(dim=1) == labels).double().mean().item()
    return right, outputs.softmax(dim=1).amax(dim=1).double().mean().item()


def test_the_trained_network_is_accurate_and_no_surer_than_it_is_right(trained):
    _, parts = trained
    validation, confidence = accuracy_and_confidence(parts.network, parts.validation)
    assert validation >= 0.975
    # Seen on 300 images: three standard errors at 98 % are 2.4 points.
    assert confidence <= validation + 0.024
    test, _ = accuracy_and_confidence(parts.network, parts.test())
    assert test >= 0.965


def test_the_network_has_ten_layers_of_several_kinds_and_comes_in_evaluation_mode(trained):
    _, parts = trained
    modules = list(parts.network.modules())
    convolutions = [m for m in modules if isinstance(m, torch.nn.Conv2d)]
    assert (len(convolutions), sum(isinstance(m, torch.nn.Linear) for m in modules)) == (9, 1)
    assert sum(c.groups == c.in_channels > 1 for c in convolutions) == 2
    assert sum(c.kernel_size == (1, 1) for c in convolutions) == 2
    assert not any(m.training for m in modules)
    # By hand: convolutions 144 + 4·(16²·9 or 32²·9) + 9·(16 + 32) + 16·32 + 32·64, batch norms
    # 2·(16·4 + 32·3 + 32 + 64), linear 640 + 10.
    weights = 144 + 2 * 2304 + 2 * 9216 + 9 * 48 + 512 + 2048
    assert sum(p.numel() for p in parts.network.parameters()) == weights + 2 * 256 + 650


def test_the_parts_are_the_whole_data_set_without_overlap(digits, trained):
    _, parts = trained
    named = [parts.calibration, parts.validation, parts.test(), digits._module.train()]
    assert [len(labels) for _, labels in named] == [256, 300, 300, 941]
    images = torch.cat([images for images, _ in named])
    assert (images.dtype, images.shape, images.min(), images.max()) == (
        torch.float32,
        (1797, 1, 8, 8),
        0,
        1,
    )
    data = datasets.load_digits()
    rows = (images * 16).reshape(1797, 64).tolist()
    labels = torch.cat([labels for _, labels in named]).tolist()
    ours = sorted(zip(rows, labels, strict=True))
    assert ours == sorted(zip(data.data.tolist(), data.target.tolist(), strict=True))


def test_calibration_reads_as_batches_and_comes_out_the_same_twice(digits, trained):
    folder, parts = trained
    again = digits.build(folder, {})
    assert read_batches(parts.calibration).digest() == read_batches(again.calibration).digest()


def test_trained_weights_are_kept_and_used_again(digits, tmp_path):
    first = digits.build(tmp_path, {"epochs": 1}).network
    path = tmp_path / FILE
    assert [p.name for p in tmp_path.iterdir()] == [FILE]
    kept = load_file(path)
    assert all(torch.equal(kept[name], tensor) for name, tensor in first.state_dict().items())
    # Marked weights in the file show up in the next network, so it was read, not trained.
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    kept["head.bias"] = torch.full((10,), 7.0)
    save_file(kept, path, metadata=metadata)
    again = digits.build(tmp_path, {"epochs": 1}).network
    assert again.head.bias.tolist() == [7.0] * 10


def test_weights_of_other_training_settings_or_a_broken_file_are_trained_anew(digits, tmp_path):
    path = tmp_path / FILE
    digits.build(tmp_path, {"epochs": 2})
    two = path.read_bytes()
    digits.build(tmp_path, {"epochs": 1})
    one = path.read_bytes()
    assert one != two
    for broken in (b"", one[:100], one[:-1], b"\xff" * 64):
        path.write_bytes(broken)
        digits.build(tmp_path, {"epochs": 1})
        assert path.read_bytes() == one
    save_file(load_file(path), path)  # whole, but nothing says how it was trained
    digits.build(tmp_path, {"epochs": 1})
    assert path.read_bytes() == one


@pytest.mark.parametrize("n_threads", [1, 2])
def test_training_gives_the_same_file_whatever_the_random_state_and_threads(
    digits, tmp_path, n_threads
):
    before = torch.get_num_threads()
    digits.build(tmp_path / "a", {"epochs": 1})
    try:
        torch.set_num_threads(n_threads)
        torch.manual_seed(99)
        state = torch.get_rng_state()
        with torch.no_grad():
            digits.build(tmp_path / "b", {"epochs": 1})
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.get_num_threads() == n_threads
    finally:
        torch.set_num_threads(before)
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(digits, tmp_path, monkeypatch):
    path = tmp_path / FILE
    path.write_bytes(b"old")
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(StudyFileError, match=r"network\(\) of .*digits\.py.*OSError: full"):
        digits.build(tmp_path, {"epochs": 1})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {FILE: b"old"}


def test_shifted_images_are_the_padded_image_cut_elsewhere(digits):
    images = torch.rand(200, 1, 8, 8)
    shifted = digits._module.augment(images, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    seen = set()
    for image, source in zip(shifted, padded, strict=True):
        matches = [
            (y, x)
            for y in range(3)
            for x in range(3)
            if torch.equal(image[0], source[0, y : y + 8, x : x + 8])
        ]
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) == 9


def test_settings_are_those_of_the_default_run(digits):
    assert dict(digits.settings, bits=tuple(digits.settings["bits"])) == {
        "bits": (2, 3, 4, 5, 6, 7, 8),
        "activation_bits": "same",
        "budget": "0.25 bops",
        "n_candidates": 8,
        "rule": "ratio",
    }
    assert parse_budget(digits.settings["budget"]).value == 0.25


def test_epochs_below_one_are_refused(digits, tmp_path):
    with pytest.raises(StudyFileError, match="--epochs is at least 1; got 0"):
        digits.build(tmp_path, digits.parse_options(["--epochs", "0"]))


def test_without_scikit_learn_the_message_says_what_to_install(digits, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(StudyFileError, match=r"pip install 'hq_optuna\[studies\]'"):
        digits.build(tmp_path, {})
