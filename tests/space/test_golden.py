"""Costs of well-known networks against published and independently counted numbers.

torchvision ships the counts of its own tool with its weights' descriptions (`meta`, read without
downloading anything). ResNet-18 is also counted by hand, from the layer table of He et al., 2016,
doi 10.1109/CVPR.2016.90.
"""

import pytest
import torch
from torch import nn

from hq_optuna.network.introspection import introspect
from hq_optuna.space.cost import CostModel, format_cost
from hq_optuna.space.search_space import SearchSpace

torchvision = pytest.importorskip("torchvision", reason="torchvision is an extra for studies")
models = torchvision.models


def look(name, size=224):
    return introspect(models.get_model(name, weights=None), torch.zeros(1, 3, size, size))


def published(name):
    """Return torchvision's own figures: `_ops` in 10⁹ MACs and `num_params`."""
    return next(iter(models.get_model_weights(name))).meta


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
def test_macs_and_parameters_agree_with_torchvision(name):
    found = look(name)
    assert round(found.macs / 1e9, 3) == published(name)["_ops"]
    assert found.n_parameters == published(name)["num_params"]


@pytest.fixture(scope="module")
def resnet18():
    return look("resnet18")


def resnet18_by_hand():
    """Return (MACs, weights) of each layer in calling order, from the table in the paper."""
    table = [(112 * 112 * 64 * 3 * 49, 64 * 3 * 49)]
    size, before = 56, 64
    for channels in (64, 128, 256, 512):
        if channels != before:
            size //= 2
        for block in range(2):
            entering = before if block == 0 else channels
            for cin in (entering, channels):
                table.append((size * size * channels * cin * 9, channels * cin * 9))
            if entering != channels:
                table.append((size * size * channels * entering, channels * entering))
        before = channels
    return [*table, (512 * 1000, 512 * 1000)]


def test_resnet18_agrees_with_the_paper_layer_by_layer(resnet18):
    assert [(x.macs, x.n_weights) for x in resnet18.layers] == resnet18_by_hand()
    assert len(resnet18.layers) == 21
    assert resnet18.macs == 1_814_073_344
    assert resnet18.n_weights == 11_678_912
    assert resnet18.skipped == ()
    assert (resnet18.layers[0].name, resnet18.layers[-1].name) == ("conv1", "fc")


def test_resnet18_costs_what_the_literature_says(resnet18):
    bops, size = CostModel(resnet18.layers), CostModel(resnet18.layers, "size_bytes")
    assert bops.float32 == 1_814_073_344 * 1024
    assert bops.int8 == 1_814_073_344 * 64
    space = SearchSpace.build(resnet18.layers, bits=(8, 4))  # first and last layer stay at 8
    w4a4 = space.config(space.bottom)
    ends = resnet18.layers[0].macs + resnet18.layers[-1].macs
    assert bops.cost(w4a4) == (1_814_073_344 - ends) * 16 + ends * 64
    for cost, text in ((bops.float32, 1857.6), (bops.int8, 116.1), (bops.cost(w4a4), 34.7)):
        assert round(cost / 1e9, 1) == text
    for cost, text in ((size.float32, 44.55), (size.int8, 11.14), (size.cost(w4a4), 5.82)):
        assert round(cost / 2**20, 2) == text
    assert format_cost(bops.int8, "bops") == "116.1 GBOPs"


def test_resnet50_has_the_macs_of_version_1_5():
    found = look("resnet50")
    assert found.macs == 4_089_184_256
    assert len(found.layers) == 54


def test_mobilenet_v2_counts_depthwise_layers():
    found = look("mobilenet_v2")
    assert found.macs == 300_774_272
    assert found.n_weights == 3_469_760
    assert len(found.layers) == 53
    depthwise = [x for x in found.layers if x.weight_shape[1:] == (1, 3, 3)]
    assert len(depthwise) == 17
    assert all(x.macs % (9 * x.weight_shape[0]) == 0 for x in depthwise)


def test_vit_has_the_layers_of_its_attention_and_the_published_operations():
    found = look("vit_b_16")
    # 14 · 14 patches; 197 tokens through 12 blocks: four projections of 768, and 768 → 3072 → 768.
    blocks = 12 * 197 * 768 * (4 * 768 + 2 * 3072)
    assert found.macs == 196 * 768 * 768 + blocks + 768 * 1000
    assert len(found.layers) == 1 + 12 * 6 + 1
    products = sum(other.macs for other in found.others)
    assert products == 12 * 2 * 197 * 197 * 768
    assert round((found.macs + products) / 1e9, 3) == published("vit_b_16")["_ops"]
    skipped = {s.name: s.reason for s in found.skipped}
    attention = [f"encoder.layers.encoder_layer_{i}.self_attention" for i in range(12)]
    assert set(skipped) == {"encoder", *attention}
    assert "products of activations (attention)" in skipped[attention[0]]
    assert "pos_embedding (1, 197, 768)" in skipped["encoder"]


def test_a_detector_takes_a_list_of_images():
    name = "ssdlite320_mobilenet_v3_large"
    network = models.get_model(name, weights=None, weights_backbone=None)
    one = introspect(network, ([torch.zeros(3, 320, 320)],))
    two = introspect(network, ([torch.zeros(3, 320, 320), torch.zeros(3, 240, 300)],))
    assert one.layers == two.layers  # both images are resized to 320²
    assert round(one.macs / 1e9, 3) == published(name)["_ops"]
    assert one.n_parameters == published(name)["num_params"]
    assert one.skipped == ()
    assert {x.name.split(".")[0] for x in one.layers} == {"backbone", "head"}
    assert network.training


def test_an_inactive_auxiliary_classifier_is_listed():
    network = models.googlenet(weights=None, init_weights=False, aux_logits=True)
    found = introspect(network, torch.zeros(1, 3, 224, 224))
    names = [s.name for s in found.skipped]
    assert names == [f"aux{i}.{part}" for i in (1, 2) for part in ("conv.conv", "fc1", "fc2")]
    assert round(found.macs / 1e9, 3) == published("googlenet")["_ops"]
    assert network.training


def test_super_resolution_counts_each_layer_at_its_own_resolution():
    network = nn.Sequential(
        nn.Conv2d(1, 8, 5, padding=2),  # 10 · 12
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1, groups=2),  # to 20 · 24
        nn.Conv2d(8, 9, 3, padding=1),
        nn.PixelShuffle(3),  # to 60 · 72
        nn.Conv2d(1, 1, 3, padding=1),
    )
    found = introspect(network, torch.zeros(3, 1, 10, 12))
    assert [(x.name, x.macs) for x in found.layers] == [
        ("0", 120 * 8 * 25),
        ("2", 120 * 8 * 4 * 16),
        ("3", 480 * 9 * 8 * 9),
        ("5", 4320 * 9),
    ]
    assert [x.n_inputs for x in found.layers] == [120, 960, 3840, 4320]
    space = SearchSpace.build(found.layers, bits=(8, 2))
    cheapest = CostModel(found.layers).per_layer(space.config(space.bottom))
    assert cheapest.tolist() == [
        x.macs * bits for x, bits in zip(found.layers, (64, 4, 4, 64), strict=True)
    ]
