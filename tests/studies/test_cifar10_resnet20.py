import hashlib
import pickle
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hq_optuna.errors import DataError, NetworkError, StudyFileError
from hq_optuna.study_files.study_file import StudyFile, find_study
from tests.real_data import shared_data

torchvision = pytest.importorskip("torchvision", reason="the CIFAR-10 study needs torchvision")
Image = pytest.importorskip("PIL.Image", reason="torchvision reads images with Pillow")

CHECKOUT = Path(__file__).parents[2]
CLASSES = [
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
]
N_TRAIN, N_TEST = 1010, 20  # of the made-up data below: 1000 for validation, 10 to calibrate


@pytest.fixture(scope="session")
def pixels():
    """Return made-up images and labels, by class: ``{"train": (uint8 (N, 32, 32, 3), labels)}``."""
    random = np.random.default_rng(0)
    return {
        part: (
            random.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8),
            np.sort(np.arange(n) % 10),
        )
        for part, n in (("train", N_TRAIN), ("test", N_TEST))
    }


@pytest.fixture(scope="session")
def image_folder(pixels, tmp_path_factory):
    """Write the made-up images as ImageFolder reads them, in the same order."""
    root = tmp_path_factory.mktemp("image_folder")
    for part, (images, labels) in pixels.items():
        for name in CLASSES:
            (root / part / name).mkdir(parents=True)
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = root / part / CLASSES[label] / f"{index:05d}.png"
            Image.fromarray(image).save(path, compress_level=1)
    return root


@pytest.fixture(scope="module")
def study():
    return StudyFile.load(find_study("cifar10_resnet20"))


@pytest.fixture
def checkpoint(study, tmp_path):
    """Return the path of a state dict with random weights."""
    torch.save(study._module.ResNet20().state_dict(), tmp_path / "random.pt")
    return tmp_path / "random.pt"


def normalized(images):
    """Return what the network should see, written out the long way in float64."""
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return torch.from_numpy(((images / 255.0 - mean) / std).transpose(0, 3, 1, 2))


# --- the network ----------------------------------------------------------------------------


def test_the_published_checkpoint_has_the_published_accuracy_on_the_846_test_images(
    study, subset, tmp_path
):
    options = ["--data", str(subset), "--checkpoint", str(shared_data("resnet20_cifar10.pt"))]
    parts = study.build(tmp_path, study.parse_options(options))
    images, labels = parts.test()
    with torch.no_grad():
        answers = torch.cat([parts.network(part).argmax(dim=1) for part in images.split(282)])
    # 91.73 % is the published network's accuracy on these images in float.
    assert (len(labels), round(100 * (answers == labels).double().mean().item(), 2)) == (846, 91.73)
    calibration, validation = parts.calibration, parts.validation
    assert (calibration[0].shape, len(validation[1])) == ((512, 3, 32, 32), 1000)
    assert calibration[1].bincount(minlength=10).min() > 0


def test_resnet20_has_twenty_layers_and_the_known_number_of_parameters(study):
    net = study._module.ResNet20()
    layers = [m for m in net.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert len(layers) == 20
    # He et al. 2016, table 6, give 0.27 M; here convolutions and batch norms by width, and 650.
    widths = [(3, 16)] + [(16, 16)] * 6 + [(16, 32)] + [(32, 32)] * 5 + [(32, 64)] + [(64, 64)] * 5
    expected = sum(9 * a * b + 2 * b for a, b in widths) + 650
    assert sum(p.numel() for p in net.parameters()) == expected == 269_722
    blocks = {
        f"layer{i}.{j}.{kind}{k}"
        for i in (1, 2, 3)
        for j in (0, 1, 2)
        for k in (1, 2)
        for kind in ("conv", "bn")
    }
    stems = {name.rpartition(".")[0] for name in net.state_dict()}
    assert stems == blocks | {"conv1", "bn1", "linear"}


@pytest.mark.parametrize(("width", "out", "stride"), [(16, 16, 1), (16, 32, 2), (32, 64, 2)])
def test_a_block_with_no_convolutions_left_is_its_option_a_shortcut(study, width, out, stride):
    block = study._module.Block(width, out, stride).eval()
    for parameter in block.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.rand(2, width, 8, 8)
    y = block(x)
    assert y.shape == (2, out, 8 // stride, 8 // stride)
    expected = torch.zeros_like(y)
    before = (out - width) // 2
    assert before in (0, out // 4)
    for row in range(8 // stride):
        for column in range(8 // stride):
            pixel = x[:, :, row * stride, column * stride]
            expected[:, before : before + width, row, column] = pixel
    assert torch.equal(y, expected)


# --- checkpoints ----------------------------------------------------------------------------


def variants(state, folder):
    """Save one state dict in all the ways the study reads."""
    prefixed = {f"module.{name}": tensor for name, tensor in state.items()}
    old = {name: tensor for name, tensor in state.items() if "num_batches" not in name}
    torch.save(state, folder / "plain.pt")
    torch.save(old, folder / "old.th")
    torch.save({"state_dict": prefixed, "best_prec1": 91.7}, folder / "nested.pt")
    save_file(state, folder / "plain.safetensors")
    save_file(prefixed, folder / "prefixed.safetensors")
    return ["plain.pt", "old.th", "nested.pt", "plain.safetensors", "prefixed.safetensors"]


def test_checkpoints_are_read_in_every_common_form(study, tmp_path):
    source = study._module.ResNet20()
    state = torch.get_rng_state()
    for name in variants(source.state_dict(), tmp_path):
        net = study._module.network(tmp_path / name)
        assert not net.training
        for key, tensor in source.state_dict().items():
            assert torch.equal(net.state_dict()[key], tensor), (name, key)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_checkpoint_of_another_network_is_refused_by_name_and_shape(study, tmp_path):
    path = tmp_path / "other.pt"
    good = study._module.ResNet20().state_dict()
    torch.save({k.replace("linear", "fc"): v for k, v in good.items()}, path)
    with pytest.raises(
        NetworkError,
        match=r"no ResNet-20 of this study: missing linear\.weight, linear\.bias, unexpected fc\.w",
    ):
        study._module.network(path)
    torch.save(torchvision.models.resnet18().state_dict(), path)
    with pytest.raises(NetworkError, match=r"unexpected .*, …\. Give the checkpoint"):
        study._module.network(path)
    torch.save({**good, "linear.weight": torch.zeros(100, 64)}, path)
    words = r"linear\.weight has the shape \(100, 64\), expected \(10, 64\)"
    with pytest.raises(NetworkError, match=words):
        study._module.network(path)


def test_a_file_that_is_no_checkpoint_is_refused(study, tmp_path):
    with pytest.raises(NetworkError, match=r"--checkpoint .*none\.pt does not exist"):
        study._module.network(tmp_path / "none.pt")
    for name in ("text.pt", "text.safetensors"):
        (tmp_path / name).write_text("not a checkpoint")
        with pytest.raises(NetworkError, match=f"--checkpoint .*{name} cannot be read"):
            study._module.network(tmp_path / name)
    # A whole module is code, which weights_only=True does not run.
    torch.save(study._module.ResNet20(), tmp_path / "module.pt")
    with pytest.raises(NetworkError, match=r"module\.pt cannot be read.*[Uu]npickling"):
        study._module.network(tmp_path / "module.pt")
    torch.save([torch.zeros(3)], tmp_path / "list.pt")
    with pytest.raises(NetworkError, match="holds no state dict but a list"):
        study._module.network(tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "dict.pt")
    with pytest.raises(NetworkError, match=r"holds no state dict.*Save network\.state_dict\(\)"):
        study._module.network(tmp_path / "dict.pt")


# --- images ---------------------------------------------------------------------------------


def test_images_are_normalized_and_labelled_in_alphabetical_order(study, image_folder, pixels):
    images, labels = study._module.test(image_folder)
    expected, numbers = pixels["test"]
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert labels.tolist() == numbers.tolist()
    # Three float32 operations on values up to 2.7: a few units in the last place.
    torch.testing.assert_close(images.double(), normalized(expected), rtol=0, atol=1e-6)


def test_calibration_and_validation_are_different_training_images(study, image_folder, pixels):
    calibration = study._module.calibration(image_folder, n_calibration=10)
    validation = study._module.validation(image_folder)
    assert (len(calibration[1]), len(validation[1])) == (10, 1000)

    def names(images):
        return [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in images]

    both = names(calibration[0]) + names(validation[0])
    everything, _ = pixels["train"]
    assert len(set(both)) == N_TRAIN
    total = torch.cat([calibration[0], validation[0]]).double().sum(dim=0)
    torch.testing.assert_close(total, normalized(everything).sum(dim=0), rtol=0, atol=1e-3)


def test_training_images_are_those_that_neither_calibrate_nor_validate(study, image_folder):
    parts = [
        study._module.train(image_folder, n_calibration=4),
        study._module.calibration(image_folder, n_calibration=4),
        study._module.validation(image_folder),
    ]
    assert [len(labels) for _, labels in parts] == [6, 4, 1000]
    images = torch.cat([images for images, _ in parts])
    assert len({hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in images}) == N_TRAIN
    with pytest.raises(DataError, match="10 of them calibrate and 1000 validate, so none are left"):
        study._module.train(image_folder, n_calibration=10)


def test_augmented_images_are_the_padded_image_cut_elsewhere_and_mirrored(study):
    black = -torch.tensor(study._module.MEAN) / torch.tensor(study._module.STD)
    images = torch.randn(60, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    changed = study._module.augment(images, torch.Generator().manual_seed(1))
    assert torch.equal(images, before) and changed.shape == images.shape
    padded = black.reshape(1, 3, 1, 1).repeat(60, 1, 40, 40)
    padded[:, :, 4:36, 4:36] = images
    seen = []
    for image, source in zip(changed, padded, strict=True):
        matches = [
            (y, x, mirrored)
            for y in range(9)
            for x in range(9)
            for mirrored in (False, True)
            if torch.equal(image.flip(2) if mirrored else image, source[:, y : y + 32, x : x + 32])
        ]
        assert len(matches) == 1
        seen += matches
    assert [len(set(values)) for values in zip(*seen, strict=True)] == [9, 9, 2]
    again = study._module.augment(images, torch.Generator().manual_seed(1))
    assert torch.equal(again, changed)


def test_the_seed_alone_decides_which_images_and_fewer_are_the_first_of_more(study, image_folder):
    calibration = study._module.calibration
    ten = calibration(image_folder, n_calibration=10)
    assert torch.equal(calibration(image_folder, n_calibration=10)[0], ten[0])
    assert torch.equal(calibration(image_folder, n_calibration=4)[0], ten[0][:4])
    assert not torch.equal(calibration(image_folder, n_calibration=10, split_seed=1)[0], ten[0])


def test_torchvisions_cifar10_gives_the_same_tensors_as_an_image_folder(
    study, image_folder, pixels, tmp_path, monkeypatch
):
    from torchvision.datasets import CIFAR10

    def write(name, content):
        path = tmp_path / "cifar-10-batches-py" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pickle.dumps(content))
        return name, hashlib.md5(path.read_bytes()).hexdigest()

    def batch(part):
        images, labels = pixels[part]
        rows = images.transpose(0, 3, 1, 2).reshape(len(images), 3072)  # CIFAR's own layout
        return {"data": rows, "labels": labels.tolist()}

    monkeypatch.setattr(CIFAR10, "train_list", [write("data_batch_1", batch("train"))])
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", batch("test"))])
    name, md5 = write("batches.meta", {"label_names": CLASSES})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})

    for function, more in (
        ("calibration", {"n_calibration": 10}),
        ("validation", {}),
        ("test", {}),
    ):
        ours = getattr(study._module, function)(tmp_path, **more)
        theirs = getattr(study._module, function)(image_folder, **more)
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


def test_the_options_are_data_checkpoint_and_the_split(study):
    shown = [str(option) for option in study.options.values()]
    assert shown == [
        "--checkpoint PATH (required)",
        "--data PATH (required)",
        "--download/--no-download",
        "--n-calibration INT",
        "--split-seed INT",
    ]
    defaults = {name: option.default for name, option in study.options.items()}
    assert (defaults["n_calibration"], defaults["split_seed"], defaults["download"]) == (
        512,
        0,
        False,
    )
    with pytest.raises(StudyFileError, match="needs --data"):
        study.parse_options(["--checkpoint=x"])


def test_too_many_or_no_calibration_images_are_refused(study, image_folder, checkpoint, tmp_path):
    for n in ("11", "0", "-1"):
        options = study.parse_options(
            ["--data", str(image_folder), "--checkpoint", str(checkpoint), "--n-calibration", n]
        )
        words = rf"--n-calibration is 1 to 10: .* has 1010 training images, .*; got {n}\."
        with pytest.raises(DataError, match=words):
            study.build(tmp_path, options)


def test_a_folder_without_images_is_refused_with_what_it_should_hold(study, tmp_path):
    for function in (study._module.calibration, study._module.validation):
        with pytest.raises(DataError, match=r"holds neither train/ .* nor cifar-10-batches-py"):
            function(tmp_path)
    with pytest.raises(DataError, match="holds neither test/"):
        study._module.test(tmp_path / "missing")
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="--data: Couldn't find any class folder"):
        study._module.calibration(tmp_path)
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(DataError, match=r"could not be read in .* with --data"):
        study._module.calibration(tmp_path)


def small_folder(root, classes, n, size=(32, 32)):
    for name in classes:
        (root / "train" / name).mkdir(parents=True)
        for index in range(n):
            Image.new("RGB", size).save(root / "train" / name / f"{index}.png")
    return root


def test_other_classes_other_sizes_and_too_few_images_are_refused(study, tmp_path):
    root = small_folder(tmp_path / "classes", ["cat", "dog"], 1)
    with pytest.raises(DataError, match=r"classes in .* are cat, dog; the checkpoint's are airpl"):
        study._module.calibration(root)
    root = small_folder(tmp_path / "few", CLASSES, 2)
    with pytest.raises(DataError, match="has 20 training images; this study sets 1000 aside"):
        study._module.validation(root)
    root = small_folder(tmp_path / "size", CLASSES, 1, size=(28, 28))
    (root / "train").rename(root / "test")
    with pytest.raises(DataError, match=r"32x32 pixels; got \(28, 28\)"):
        study._module.test(root)


@pytest.mark.parametrize("error", [URLError("no route"), RuntimeError("File not found")])
def test_a_download_that_fails_ends_in_a_sentence_that_names_data(
    study, checkpoint, tmp_path, monkeypatch, error
):
    def download(self):
        raise error

    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", download)
    arguments = ["--data", str(tmp_path / "new"), "--checkpoint", str(checkpoint), "--download"]
    with pytest.raises(
        DataError, match=r"could not be downloaded to .*new .* with --data"
    ) as caught:
        study.build(tmp_path, study.parse_options(arguments))
    assert caught.value.__cause__ is error


def test_without_torchvision_the_message_says_what_to_install(study, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(DataError, match=r"pip install 'hq_optuna\[studies\]'"):
        study._module.test(tmp_path)
