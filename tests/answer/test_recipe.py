"""The answer on disk: equal bit for bit, and refused when it is not what was saved."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize

import hq_optuna as hq
from hq_optuna.answer import recipe as module
from hq_optuna.errors import RecipeError
from hq_optuna.objective.fingerprint import network_digest
from hq_optuna.quantization.prepare import float_weight, weight_quantizer
from hq_optuna.quantization.quantizers import QUANTIZERS
from tests.searches import LAYERS, Network, data, search


def saved(folder: Path, **options):
    """Run a search, save its result and return it."""
    by = search(**options)
    result = by.result(by.optimize(n_candidates=2))
    result.save(folder)
    return result


@pytest.fixture(scope="module")
def answer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answer") / "new" / "folder"
    return saved(folder, validation=data(12, seed=3)), folder


@pytest.fixture
def folder(answer, tmp_path) -> Path:
    """A copy of the saved answer that a test may damage."""
    for path in answer[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def edit(folder: Path, change) -> None:
    path = folder / "recipe.json"
    recipe = json.loads(path.read_text())
    change(recipe)
    path.write_text(json.dumps(recipe))


X = data(40, seed=11)[0]


def test_the_loaded_network_equals_the_saved_one_bit_for_bit(answer):
    result, folder = answer
    loaded = hq.load(folder, Network(seed=99))
    assert torch.equal(loaded(X), result.network(X))
    assert not loaded.training
    for name in LAYERS:
        assert torch.equal(
            loaded.get_submodule(name).weight, result.network.get_submodule(name).weight
        )


@pytest.mark.parametrize(
    "options",
    [
        {"activation_bits": None, "budget": hq.Budget.fraction(size_bytes=0.4)},
        {"activation_bits": 8},
        {"activation_bits": (8, 4)},
        {"bits": (8, 1)},
        {"bits": (16, 3)},
        {"tied": [("first", "last")]},
        {"pins": {"middle": (4, 32)}, "budget": hq.Budget.fraction(size_bytes=0.6)},
        {"observer": "min_max", "scorer": "trace"},
        {"budget": hq.Budget.fraction(size_bytes=0.4)},
        {"quantizers": {"*": "midrise"}},
        {"rounding": "in_order", "bits": (8, 3), "quantizers": {"middle": "midrise"}},
        {"quantizers": {"*": "dorefa"}, "bits": (8, 2, 1)},
        {"quantizers": {"*": "midrise"}, "rounding": "nearest", "bits": (8, 3)},
        {"quantizers": {"mid*": "ternary", "last": "dorefa"}, "pins": {"middle": (2, 8)}},
        {"quantizers": {"middle": "binary"}, "pins": {"middle": (1, 8)}, "rounding": "nearest"},
    ],
    ids=str,
)
def test_every_kind_of_answer_comes_back_bit_for_bit(tmp_path, options):
    result = saved(tmp_path, **options)
    loaded = hq.load(tmp_path, Network(seed=5))
    assert torch.equal(loaded(X), result.network(X))
    assert torch.isfinite(loaded(X)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["midrise", "dorefa"])
def test_codes_of_8_bits_come_back_in_every_precision(tmp_path, name, dtype):
    layers = hq.introspect(Network(), X).layers
    prepared = hq.prepare(Network().to(dtype), layers, quantizers=dict.fromkeys(LAYERS, name))
    hq.set_bits(prepared, dict.fromkeys(LAYERS, (8, 32)))
    for layer in LAYERS:
        holder = weight_quantizer(prepared.get_submodule(layer))
        weight = float_weight(prepared.get_submodule(layer)).detach()
        rounded = holder.quantized(weight, 8)
        holder.keep(weight, 8, rounded.flip(-1), holder.scales[8])  # no rounding finds it again
    module.save(tmp_path, prepared, layers, {})
    loaded = hq.load(tmp_path, Network(seed=5).to(dtype))
    for layer in LAYERS:
        assert torch.equal(loaded.get_submodule(layer).weight, prepared.get_submodule(layer).weight)


def test_the_recipe_names_quantizers_and_codes_times_scale_are_the_weights(tmp_path):
    result = saved(
        tmp_path,
        quantizers={"first": "midrise", "middle": "ternary", "last": "dorefa"},
        pins={"middle": (2, 8)},
    )
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    entries = {name: entry["weight_quantizer"] for name, entry in recipe["layers"].items()}
    assert {n: e["name"] for n, e in entries.items()} == {
        "first": "midrise",
        "middle": "ternary",
        "last": "dorefa",
    }
    tensors = load_file(tmp_path / "weights.safetensors")
    for name in LAYERS:
        codes = tensors[f"hq_optuna.weight_codes.{name}"]
        scale = tensors[f"hq_optuna.weight_scale.{name}"].reshape(-1, *[1] * (codes.dim() - 1))
        assert torch.equal(codes * scale, result.network.get_submodule(name).weight)
        assert codes.abs().max() <= entries[name]["quant_max"] == -entries[name]["quant_min"]


def test_a_recipe_with_a_quantizer_of_another_version_is_refused(tmp_path, monkeypatch):
    saved(tmp_path, quantizers={"last": "dorefa"})
    monkeypatch.delitem(QUANTIZERS, "dorefa")
    with pytest.raises(RecipeError, match=r"another version: .*got 'dorefa'\. Update hq_optuna"):
        hq.load(tmp_path, Network())


def test_a_network_with_shared_weights_comes_back_bit_for_bit(tmp_path):
    def twins() -> nn.Sequential:
        network = nn.Sequential(*(nn.Linear(5, 5) for _ in range(3)), nn.Linear(5, 3))
        network[2].weight = network[0].weight
        return network

    x, labels = torch.randn(16, 5), torch.arange(16) % 3
    by = search(model=twins(), calibration=(x, labels))
    result = by.result(by.optimize(n_candidates=2))
    result.save(tmp_path)
    assert torch.equal(hq.load(tmp_path, twins())(x), result.network(x))


def test_a_network_with_parametrized_layers_comes_back_bit_for_bit(tmp_path):
    def normed() -> nn.Sequential:
        normed = parametrize_weight(nn.Linear(5, 5))
        return nn.Sequential(normed, nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))

    def parametrize_weight(layer: nn.Linear) -> nn.Linear:
        return nn.utils.parametrizations.weight_norm(layer)

    x, labels = torch.randn(16, 5), torch.arange(16) % 3
    network = normed()
    by = search(model=network, calibration=(x, labels))
    result = by.result(by.optimize(n_candidates=2))
    result.save(tmp_path)
    assert torch.equal(hq.load(tmp_path, normed())(x), result.network(x))
    assert parametrize.is_parametrized(network[0])


def test_the_network_that_is_given_is_left_as_it_is(answer):
    network = Network(seed=4)
    before, text = network_digest(network), str(network)
    network.requires_grad_(False)
    hq.load(answer[1], network)
    assert (network_digest(network), str(network)) == (before, text)
    assert network.training


def test_the_recipe_holds_bits_ranges_cost_origin_and_versions(answer):
    result, folder = answer
    recipe = json.loads((folder / "recipe.json").read_text())
    assert {
        name: (e["weight_bits"], e["activation_bits"]) for name, e in recipe["layers"].items()
    } == {name: tuple(bits) for name, bits in result.config.items()}
    for entry in recipe["layers"].values():
        bits = entry["activation_bits"]
        grid = entry["activation_quantizer"]
        assert grid["quant_max"] - grid["quant_min"] == 2**bits - 1
        assert grid["quant_min"] <= grid["zero_point"] <= grid["quant_max"]
        assert grid["scale"] > 0
        assert entry["weight_quantizer"]["quant_max"] == 2 ** (entry["weight_bits"] - 1) - 1
    assert recipe["cost"]["value"] == result.cost
    assert recipe["cost"]["budget_met"] is True
    assert recipe["score_nats"]["total"] == result.score
    assert recipe["measured"] == dict(result.facts)
    assert set(recipe["fingerprint"]["versions"]) == {"hq_optuna", "optuna", "torch", "python"}
    assert recipe["fingerprint"]["network"] == network_digest(Network())
    assert str(Path.home()) not in (folder / "recipe.json").read_text()


def test_the_ranges_in_the_recipe_give_the_outputs_of_the_network_by_pytorch_alone(answer):
    """Anyone can use the recipe: PyTorch's own rounding of inputs, codes times scale as weights."""
    result, folder = answer
    recipe = json.loads((folder / "recipe.json").read_text())
    tensors = load_file(folder / "weights.safetensors")
    entry, module_ = recipe["layers"]["last"], result.network.get_submodule("last")
    seen = []
    hook = module_.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    result.network(X)
    hook.remove()
    grid, w = entry["activation_quantizer"], entry["weight_quantizer"]
    x = torch.fake_quantize_per_tensor_affine(
        seen[0][0], grid["scale"], grid["zero_point"], grid["quant_min"], grid["quant_max"]
    )
    codes = tensors["hq_optuna.weight_codes.last"]
    assert w["quant_min"] <= codes.min() and codes.max() <= w["quant_max"]
    weight = codes * tensors["hq_optuna.weight_scale.last"][:, None]
    assert torch.equal(weight, module_.weight)
    bias = tensors["last.bias"] + tensors.get("hq_optuna.output_shift.last", 0)
    torch.testing.assert_close(nn.functional.linear(x, weight, bias), seen[0][1])


def test_float_weights_go_by_the_names_users_know(answer):
    tensors = load_file(answer[1] / "weights.safetensors")
    plain = {name: tensor for name, tensor in tensors.items() if not name.startswith("hq_optuna.")}
    assert set(plain) == set(Network().state_dict())
    assert torch.equal(plain["first.weight"], Network().first.weight)


def test_a_second_save_replaces_the_first(answer, tmp_path):
    result, _ = answer
    saved(tmp_path, bits=(8, 4), budget=hq.Budget.fraction(bops=0.9))
    result.save(tmp_path)
    assert torch.equal(hq.load(tmp_path, Network())(X), result.network(X))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "recipe.json",
        "weights.safetensors",
    ]


def test_a_save_that_is_interrupted_leaves_nothing_half_written(answer, folder, monkeypatch):
    result, _ = answer
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def interrupt(file: int) -> None:  # when the new file is written beside the old one
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        result.save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_saved_network_is_not_changed_by_saving(answer, tmp_path):
    result, _ = answer
    twin = copy.deepcopy(result.network)
    before = twin(X)
    result.save(tmp_path)
    assert torch.equal(result.network(X), before)


# What is refused


def test_a_folder_without_a_recipe_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "nosuch"):
        with pytest.raises(RecipeError, match=r"holds no recipe.json; give a folder a result was"):
            hq.load(folder, Network())


@pytest.mark.parametrize("text", ["", "{", "\x00\x01", '{"format": "hq_optuna recipe",'])
def test_a_damaged_recipe_is_refused(folder, text):
    (folder / "recipe.json").write_text(text)
    with pytest.raises(RecipeError, match=r"recipe.json is damaged: "):
        hq.load(folder, Network())


def test_a_recipe_that_is_no_text_is_refused(folder):
    (folder / "recipe.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"recipe.json is damaged: "):
        hq.load(folder, Network())


@pytest.mark.parametrize("text", ["[]", "{}", "3", '{"format": "another"}'])
def test_another_json_file_is_refused(folder, text):
    (folder / "recipe.json").write_text(text)
    with pytest.raises(RecipeError, match=r"is not a recipe of hq_optuna"):
        hq.load(folder, Network())


def test_a_newer_format_is_refused(folder):
    edit(folder, lambda recipe: recipe.update(format_version=99))
    with pytest.raises(RecipeError, match=r"format 99, this version reads up to 1. Update hq_opt"):
        hq.load(folder, Network())


@pytest.mark.parametrize("name", ["format_version", "layers", "layers_sha256", "weights"])
def test_a_recipe_that_lacks_a_part_is_refused(folder, name):
    edit(folder, lambda recipe: recipe.pop(name))
    with pytest.raises(RecipeError, match=f"recipe.json is damaged: it lacks '{name}'"):
        hq.load(folder, Network())


@pytest.mark.parametrize("weights", [{}, {"file": "weights.safetensors"}, [], None, "x"])
def test_a_recipe_that_does_not_name_its_weights_is_refused(folder, weights):
    edit(folder, lambda recipe: recipe.update(weights=weights))
    with pytest.raises(RecipeError, match="does not name its weights"):
        hq.load(folder, Network())


@pytest.mark.parametrize(
    "change",
    [
        lambda layers: layers["middle"].update(weight_bits=7),
        lambda layers: layers["middle"]["activation_quantizer"].update(scale=1.0),
        lambda layers: layers.pop("middle"),
        lambda layers: layers["middle"].pop("kind"),
    ],
)
def test_layers_that_were_edited_are_refused(folder, change):
    edit(folder, lambda recipe: change(recipe["layers"]))
    with pytest.raises(RecipeError, match="was altered after it was saved: the hash of its layers"):
        hq.load(folder, Network())


def test_what_people_add_to_the_rest_of_a_recipe_does_not_matter(folder):
    edit(folder, lambda recipe: recipe.update(note="shipped on Monday"))
    hq.load(folder, Network())


def test_missing_weights_are_refused(folder):
    (folder / "weights.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"weights.safetensors is missing"):
        hq.load(folder, Network())


@pytest.mark.parametrize("damage", ["flip", "cut", "replace"])
def test_altered_weights_are_refused(folder, damage):
    path = folder / "weights.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
    path.write_bytes({"flip": content, "cut": content[:-10], "replace": b"x"}[damage])
    with pytest.raises(RecipeError, match="was altered after it was saved: its hash differs"):
        hq.load(folder, Network())


class Wider(Network):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(16, 4)


@pytest.mark.parametrize("network", [Wider(), nn.Sequential(nn.Linear(3, 3)), nn.Identity()])
def test_a_network_of_another_structure_is_refused(folder, network):
    with pytest.raises(RecipeError, match="belongs to a network of another structure: "):
        hq.load(folder, network)
