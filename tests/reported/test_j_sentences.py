"""Kind J: modes around a search, names in settings, what is no network: right, or refused."""

import logging
import os
import random
import re
import signal
import sys
import threading
import traceback
import warnings
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

import hq_optuna as hq
from hq_optuna.errors import DataError, NetworkError, RecipeError, SpaceError
from hq_optuna.network.batches import forward
from hq_optuna.space.layers import LayerSpec
from tests.reported import product


def made():
    """Return a small network and data."""
    torch.manual_seed(0)
    convolution = (nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten())
    data = torch.randn(32, 1, 4, 4), torch.randint(0, 3, (32,))
    return nn.Sequential(*convolution, nn.Linear(8, 3)), data


SMALL = {"budget": "0.4 bops", "bits": (8, 5, 3), "candidates": 2}


def found(network, data, scorer=None):
    """Return bits, scores and accuracies of a search, and the answer's outputs after a load."""
    found = product.search(network, data, scorer=scorer, validation=data, **SMALL)
    facts = {n: v for n, v in found.facts.items() if n.startswith("accuracy")}
    return found.bits, product.history(found.study), found.result.score, facts


@contextmanager
def default(setter, value, before):
    setter(value)
    try:
        yield
    finally:
        setter(before)


class Watches(TorchFunctionMode):
    """A mode of the user's that lets all pass."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@contextmanager
def warnings_as_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


AROUND = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64": lambda: default(torch.set_default_dtype, torch.float64, torch.float32),
    "device": lambda: default(torch.set_default_device, "meta", None),
    "deterministic": lambda: default(torch.use_deterministic_algorithms, True, False),
    "anomaly": torch.autograd.detect_anomaly,
    "function mode": Watches,
    "strict warnings": warnings_as_errors,
    "saved tensors": torch.autograd.graph.save_on_cpu,
}


@pytest.fixture(scope="module")
def expected():
    return {scorer: found(*made(), scorer) for scorer in (None, "hutchinson")}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("name", AROUND)
def test_a_search_in_any_mode_of_pytorch_is_the_same(name, expected):
    """Whatever is set around it (QuEST#14: gradients off): the answer of a search without."""
    network, data = made()
    with AROUND[name]():
        assert found(network, data, "hutchinson") == expected["hutchinson"]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("scorer", [None, "hutchinson"])
def test_network_and_data_may_be_made_in_inference_mode(scorer, expected):
    """Tensors made there cannot be saved for a gradient: the search works on copies that can."""
    with torch.inference_mode():
        network, data = made()
        inside = found(network, data, scorer)
    assert inside == found(network, data, scorer) == expected[scorer]
    assert network[0].weight.is_inference()


def test_a_thread_of_its_own_may_search(expected):
    """Signals and modes belong to threads; the answer does not."""
    answers = []
    thread = threading.Thread(target=lambda: answers.append(found(*made())))
    thread.start()
    thread.join()
    assert answers == [expected[None]]


def test_weights_kept_by_a_cache_are_refused():
    """In parametrize.cached() a weight stays as it was rounded first, whatever bits follow."""
    with parametrize.cached(), pytest.raises(NetworkError, match=r"cached\(\).*Leave that block"):
        product.opened(*made())


def specs(*names, aliases=()):
    return [LayerSpec(n, "Linear", (1, 1), 0, 1, 1, 1, aliases) for n in names]


def pins(layers, setting, **others):
    """Return which layers a setting pins, to which weight bits."""
    spare = specs("spare")
    space = hq.SearchSpace.build([*layers, *spare], pins=setting, pin_first_last=None, **others)
    free = {name for variable in space.variables for name in variable.layers}
    return {name: bits.weight_bits for name, bits in space.start.items() if name not in free}


@pytest.mark.parametrize(
    "name", ["stage[0]", "a*", "what?", "two words", "größe", "[!x]", "a=b", "a:weights", "x\\y"]
)
def test_every_setting_takes_a_layers_name_as_it_is(name, tmp_path):
    """Names hold what globs use (nncf#640): a setting that gives one is for that layer."""
    torch.manual_seed(0)
    layers = [(name, nn.Linear(4, 4)), ("relu", nn.ReLU()), ("head", nn.Linear(4, 3))]
    network = nn.Sequential(OrderedDict(layers))
    data = torch.randn(16, 4), torch.randint(0, 3, (16,))
    options = {**SMALL, "budget": "0.9 bops"}
    whole = product.search(network, data, pins={name: 7}, **options)
    assert whole.bits[name] == (7, 7)
    loaded = product.saved_and_loaded(whole, network, tmp_path)
    assert torch.equal(loaded(data[0]), whole.network(data[0]))
    allowed = product.search(network, data, allowed={name: (6, 4)}, **options)
    assert allowed.bits[name][0] in (6, 4)
    settings = {"bits": (8, 5), "budget": "0.9 bops"}
    search = product.opened(network, data, quantizers={name: "midrise"}, **settings)
    assert search.objective.setup.quantizers == {name: "midrise"}


def test_a_name_goes_before_globs_wherever_it_stands():
    """sglang#15594: what names a layer is not overruled by a pattern that comes later."""
    layers = specs("head", "body.0", "body.1")
    allowed = {"head": (6, 2), "*": (4, 2), "body.*": (5, 2)}
    space = hq.SearchSpace.build(layers, allowed=allowed, pin_first_last=None)
    assert space.top == (6, 5, 5)


def test_brackets_in_a_glob_are_those_of_the_names_where_names_have_them():
    """`stage[0].*` means the layers in stage[0], and `stage[01].*` those in stage0 and stage1."""
    layers = specs("stage[0].fc", "stage0.fc", "stage1.fc")
    assert pins(layers, {"stage[0].*": 4}) == {"stage[0].fc": 4}
    assert pins(layers, {"stage[01].*": 4}) == {"stage0.fc": 4, "stage1.fc": 4}
    assert pins(layers[1:], {"stage[0].*": 4}) == {"stage0.fc": 4}
    assert pins(layers, {"stage[[]*": 4}) == {"stage[0].fc": 4}


def test_a_module_under_two_names_goes_by_either():
    """A layer that is registered twice is one layer; its second name is not unknown."""
    layers = specs("encoder.fc", aliases=("decoder.fc",))
    assert pins(layers, {"decoder.fc": 4}) == pins(layers, {"decoder.*": 4}) == {"encoder.fc": 4}
    with pytest.raises(SpaceError, match="one module under two names, with two values"):
        pins(layers, {"decoder.fc": 4, "encoder.fc": 5})


def test_what_allowed_says_of_a_layer_by_name_is_not_left_out_unsaid():
    """The default pin of first and last layer gives way to it; a pin to other bits is refused."""
    space = hq.SearchSpace.build(specs("stem", "body", "head"), allowed={"head": (6, 4)})
    assert [(v.name, v.bits[0], v.bits[-1]) for v in space.variables] == [
        ("body", 8, 2),
        ("head", 6, 4),
    ]
    with pytest.raises(SpaceError, match=r"allowed\['head'\] allows .*pins\['\*'\] fixes"):
        pins(specs("body", "head"), {"*": 8}, allowed={"head": (6, 4)})


def test_the_name_of_what_holds_layers_is_told_how_to_write_it():
    """`layer1` is a block and no layer: the sentence gives the glob for what is in it."""
    with pytest.raises(SpaceError, match=r"'block' matches no layer.* write 'block\.\*'"):
        pins(specs("block.0", "block.1"), {"block": 4})


@pytest.mark.parametrize("name", ["a=b", "a:weights"])
def test_a_name_that_is_a_parameter_of_other_layers_is_refused(name):
    """Optuna knows what is tied as `a=b`, and a part as `a:weights`: one name for one thing."""
    with pytest.raises(SpaceError, match=f"layer {name!r} has the name of a parameter"):
        pins(specs("a", "b", name), {}, tied=[("a", "b")])


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


class Functional(nn.Module):
    """A network whose layer is a function."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3, 6))

    def forward(self, x):
        return functional.linear(x, self.w)


class Activation(nn.Module):
    """Nothing with weights."""

    def forward(self, x):
        return x.relu()


def observed(convert):
    stubs = torch.ao.quantization.QuantStub(), torch.ao.quantization.DeQuantStub()
    network = nn.Sequential(stubs[0], *mlp(), stubs[1]).eval()
    network.qconfig = torch.ao.quantization.get_default_qconfig("x86")
    network = torch.ao.quantization.prepare(network)
    network(torch.ones(2, 6))
    return torch.ao.quantization.convert(network) if convert else network


def one_parameter(change):
    network = mlp()
    network[2].weight = nn.Parameter(change(network[2].weight.detach()), requires_grad=False)
    return network


def dynamic(layers):
    return torch.ao.quantization.quantize_dynamic(mlp(), layers)


def dotted():
    network = mlp()
    setattr(network, "3.x", nn.Linear(3, 3))
    return network


EXAMPLE = (torch.ones(2, 6),)
REFUSED = {
    "scripted": (lambda: torch.jit.script(mlp()), r"TorchScript.*as it was before"),
    "traced": (lambda: torch.jit.trace(mlp(), EXAMPLE), r"TorchScript.*as it was before"),
    "frozen": (lambda: torch.jit.freeze(torch.jit.script(mlp())), "TorchScript"),
    "scripted part": (lambda: nn.Sequential(torch.jit.script(mlp())), "'0' is a TorchScript"),
    "exported": (lambda: torch.export.export(mlp(), EXAMPLE), r"torch.export.*that was exported"),
    "exported module": (
        lambda: torch.export.export(mlp(), EXAMPLE).module(),
        r"a graph .*calls linear.default with '0.weight' as a function",
    ),
    "functions": (lambda: torch.fx.symbolic_trace(Functional()), r"calls linear with 'w'"),
    "data parallel": (lambda: nn.DataParallel(mlp()), r"in DataParallel.*its \.module"),
    "dynamic": (lambda: dynamic({nn.Linear}), "'0' is quantized by PyTorch already.*float network"),
    "one dynamic": (lambda: dynamic({"2"}), "'2' is quantized by PyTorch already"),
    "static": (lambda: observed(True), "quantized by PyTorch already"),
    "observed": (lambda: observed(False), r"prepared for PyTorch's own.*before .*prepare"),
    "prepared": (
        lambda: hq.prepare(mlp(), hq.introspect(mlp(), EXAMPLE).layers),
        "quantized by hq_optuna already. Give the float network",
    ),
    "meta": (lambda: mlp().to("meta"), r"'0.weight' is on the meta device.*load_state_dict"),
    "sparse": (
        lambda: one_parameter(torch.Tensor.to_sparse),
        r"sparse tensor .to_dense.*plain weights",
    ),
    "eight bits": (
        lambda: one_parameter(lambda w: w.to(torch.float8_e4m3fn)),
        "float8_e4m3fn.*network.float",
    ),
    "list": (lambda: list(mlp()), r"list of 3. Give nn.Sequential\(\*modules\)"),
    "module list": (lambda: nn.ModuleList(mlp()), r"ModuleList without a forward.*nn.Sequential"),
    "class": (lambda: nn.Linear, "the class Linear itself. Make one and load its weights"),
    "weights": (lambda: mlp().state_dict(), r"state_dict.*network.load_state_dict\(weights\)"),
    "path": (lambda: "net.pt", r"the path 'net.pt'.*weights_only=True"),
    "function": (lambda: functional.relu, "function 'relu'. Give the module whose layers it calls"),
    "nothing": (lambda: None, "got NoneType. Give the trained network itself"),
    "dotted": (dotted, r"under the name '3\.x', whose dot"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_hides_its_layers_or_is_no_network_is_refused_with_the_way_out(kind):
    """Before any work, as an error of the network, with what it is and what to give instead."""
    make, words = REFUSED[kind]
    with pytest.raises(NetworkError, match=words):
        product.opened(make(), (torch.ones(4, 6), torch.zeros(4, dtype=torch.long)))


class Sharded(torch.Tensor):
    """Named as PyTorch's own, which needs processes to be made."""


Sharded.__name__ = "DTensor"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", ["fx", "scripted activation", "stubs", "averaged", "half"])
def test_what_still_shows_its_layers_is_searched(change):
    """A graph that calls modules, a scripted activation, unused stubs, averages, half precision."""
    stubs = torch.ao.quantization.QuantStub, torch.ao.quantization.DeQuantStub
    network = {
        "fx": lambda: torch.fx.symbolic_trace(mlp()),
        "scripted activation": lambda: nn.Sequential(mlp(), torch.jit.script(Activation())),
        "stubs": lambda: nn.Sequential(stubs[0](), *mlp(), stubs[1]()),
        "averaged": lambda: torch.optim.swa_utils.AveragedModel(mlp()),
        "half": lambda: mlp().half(),
    }[change]()
    x = torch.ones(4, 6, dtype=torch.float16 if change == "half" else torch.float32)
    search = product.opened(network, (x, torch.zeros(4, dtype=torch.long)))
    assert len(product.layers(search)) == 2


def test_sharded_weights_are_refused():
    """A DTensor (FSDP, tensor parallelism) holds a part of the weight: take the full one."""
    network = mlp()
    network[0].weight = nn.Parameter(network[0].weight.detach().as_subclass(Sharded))
    with pytest.raises(NetworkError, match=r"'0.weight' is a DTensor.*full_tensor\(\)"):
        product.opened(network, (torch.ones(4, 6), torch.zeros(4, dtype=torch.long)))


def test_the_space_of_another_network_is_refused():
    """Layers go by name: a space whose layers the network has not is not taken for its own."""
    space = hq.SearchSpace.build(specs("0", "head"), pin_first_last=None)
    with pytest.raises(NetworkError, match=r"layer '0' with weights of shape \(1, 1\).*introspect"):
        hq.HessianObjective(mlp(), (torch.ones(4, 6), torch.zeros(4, dtype=torch.long)), space)


@pytest.mark.parametrize("scorer", [None, "loss"])
def test_one_calibration_sample_tells_bits_apart(scorer):
    """Statistics of one value are none: corrected by them, any bits would score 0."""
    network, data = made()
    one = data[0][:1], data[1][:1]
    options = {"scorer": scorer, "correction": True, "budget": "0.9 bops"}
    rises = {bits: product.score(network, one, bits, **options) for bits in (8, 3)}
    assert abs(rises[3]) > 10 * abs(rises[8]) > 0
    assert product.score(network, one, 3, **options) == rises[3]


# Errors in the user's own code


class Trap:
    """Raises in one of the user's functions, from one of our steps on."""

    def __init__(self, where, step):
        self.place, self.now = (where, step), "door"

    def __call__(self, where):
        if (where, self.now) == self.place:
            raise KeyError("the user's own words")


def trapped(where, step):
    """Search with a trap in one of the functions that are the user's."""
    trap = Trap(where, step)
    inner, data = mlp(), (torch.randn(16, 6), torch.randint(0, 3, (16,)))

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            trap("network")
            return self.inner(x)

    class Samples(torch.utils.data.Dataset):
        def __len__(self):
            return 16

        def __getitem__(self, index):
            trap("data")
            return data[0][index], data[1][index]

    def loss(outputs, labels):
        trap("loss")
        return functional.cross_entropy(outputs, labels)

    def evaluate(network, batches):
        trap("evaluate")
        return {"f1": 0.5}

    def test():
        trap("test")
        return data

    options = {"bits": (8, 4, 2), "pin_first_last": None, "budget": "0.3 bops"}
    options |= {"scorer": "diagonal", "measure_candidates": True}
    search = hq.BitSearch(Network(), Samples(), loss, validation=data, evaluate=evaluate, **options)
    trap.now = "preparing"
    study = search.open(seed=0, n_candidates=3)
    trap.now = "scoring"
    search.work(study, on_progress=lambda log: trap("progress"))
    trap.now = "answer"
    search.result(study, test=test)


def frames(error):
    found = []
    while error is not None:
        found += [frame.name for frame in traceback.extract_tb(error.__traceback__)]
        error = error.__cause__
    return found


@pytest.mark.parametrize(
    ("where", "step", "kind", "words"),
    [
        ("network", "door", NetworkError, "network does not run on .*KeyError: .*own words"),
        ("loss", "door", DataError, "The loss function failed on .*KeyError: .*own words"),
        ("data", "door", DataError, "calibration data cannot be read: KeyError: .*own words"),
        ("network", "preparing", KeyError, "forward"),
        ("network", "scoring", KeyError, "forward"),
        ("loss", "preparing", KeyError, "loss"),
        ("loss", "scoring", KeyError, "loss"),
        ("progress", "scoring", KeyError, "hq_optuna"),
        ("evaluate", "answer", DataError, "cannot be measured on the validation data: KeyError"),
        ("test", "answer", KeyError, "_measured"),
    ],
)
def test_an_error_in_the_users_code_keeps_its_traceback_and_names_our_call(
    where, step, kind, words
):
    """At the door a sentence of ours around it; later the error itself, with a note of ours."""
    with pytest.raises((KeyError, NetworkError, DataError)) as caught:
        trapped(where, step)
    error = caught.value
    assert "__call__" in frames(error)  # the line in the user's code
    if isinstance(error, KeyError):
        said = error.__notes__[-1]
        assert said.startswith("hq_optuna called the code that raised this from hq_optuna.")
    else:
        said = str(error)
    assert isinstance(error, kind)
    assert re.search(words, said, re.S)


# Nothing of the user's is changed


class Counting(nn.Module):
    """A loss that counts its calls in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, outputs, labels):
        self.calls += 1
        return functional.cross_entropy(outputs, labels)


class Remembering(nn.Module):
    """A network that keeps what it saw, with a frozen layer, one in evaluation, and hooks."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.drop, self.last = nn.Dropout(0.5), nn.Linear(8, 3)
        self.seen, self.memory, self.n = [], {}, 0
        self.first.weight.requires_grad_(False)
        self.last.weight.grad = torch.randn(3, 8)
        self.norm.eval()
        for module in (self.first, self.last):
            module.register_forward_hook(lambda module, args, output: None)
            module.register_forward_pre_hook(lambda module, args: None)
        self.last.weight.register_hook(lambda gradient: gradient)

    def forward(self, x):
        self.n += 1
        self.seen.append(len(x))
        self.memory[len(x)] = x
        return self.last(self.drop(self.norm(self.first(x)).relu()))


def of_module(module):
    tensors = [*module.named_parameters(), *module.named_buffers()]
    gradients = [(id(p.grad), None if p.grad is None else p.grad.tolist(), p.requires_grad)
                 for p in module.parameters()]  # fmt: skip
    attributes = [
        {k: list(v) if isinstance(v, (list, dict)) else id(v) for k, v in vars(m).items()}
        for m in module.modules()
    ]
    return (
        [(name, id(t), t.data_ptr(), t._version, t.tolist()) for name, t in tensors],
        gradients,
        [m.training for m in module.modules()],
        attributes,
    )


def of_process():
    backends = torch.backends
    loggers = [logging.getLogger(name) for name in ("", "optuna", "torch", "sqlalchemy")]
    return {
        "random": (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()),
        "default": (torch.get_default_dtype(), torch.get_default_device()),
        "threads": (torch.get_num_threads(), [t.name for t in threading.enumerate()]),
        "warnings": [str(each) for each in warnings.filters],
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "backends": (
            *(backends.cudnn.benchmark, backends.cudnn.deterministic, backends.cudnn.enabled),
            *(backends.mha.get_fastpath_enabled(), torch.get_float32_matmul_precision()),
            *(backends.cuda.flash_sdp_enabled(), backends.cuda.math_sdp_enabled()),
        ),
        "environment": dict(os.environ),
        "folder": Path.cwd(),
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
        "logs": [(log.level, list(log.handlers), log.disabled) for log in loggers],
        "path": list(sys.path),
        "numpy": (np.geterr(), str(np.get_printoptions())),
    }


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """All that libraries set when they are imported, before anything is compared."""
    network, data = made()
    search = product.opened(network, data, budget="0.5 bops", bits=(8, 4))
    folder = tmp_path_factory.mktemp("first")
    study = search.optimize(f"sqlite:///{folder / 'study.db'}", "s", seed=0, n_candidates=2)
    hq.pareto(study)


@pytest.mark.parametrize("in_a_thread", [False, True])
@pytest.mark.parametrize("trains", [False, True])
def test_all_of_the_users_is_as_it_was(in_a_thread, trains, imported, tmp_path):
    """Network, gradients, hooks, loss, data and all switches of the process after a search."""
    torch.manual_seed(0)
    network, loss = Remembering(), Counting()
    batches = [(torch.randn(8, 6), torch.randint(0, 3, (8,))) for _ in range(2)]
    kept = [(x, y, x.clone(), y.clone(), x._version) for x, y in batches]

    def search():
        options = product.training(list(batches), every=2) if trains else {}
        found = product.search(
            *(network, batches, loss),
            **{**SMALL, "validation": batches, "storage": f"sqlite:///{tmp_path / 'study.db'}"},
            **{"name": "s", "artifacts": tmp_path / "artifacts", **options},
        )
        product.saved_and_loaded(found, network, tmp_path / "answer")

    before = of_module(network), of_module(loss), of_process()
    if in_a_thread:
        thread = threading.Thread(target=search)
        thread.start()
        thread.join()
    else:
        search()
    assert (tmp_path / "answer").exists()
    assert (of_module(network), of_module(loss), of_process()) == before
    for (x, y), (same_x, same_y, values, labels, version) in zip(batches, kept, strict=True):
        assert x is same_x and y is same_y
        assert torch.equal(x, values) and torch.equal(y, labels) and x._version == version


def test_what_is_switched_for_all_threads_is_put_back_by_the_last():
    """Two threads in a forward pass at once: fused attention is on again when both are out."""
    inside, go = threading.Barrier(2), threading.Event()

    class Waits(nn.Module):
        def __init__(self, first):
            super().__init__()
            self.first = first

        def forward(self, x):
            inside.wait(20)
            go.wait(20) if self.first else None
            return x

    threads = [
        threading.Thread(target=forward, args=(Waits(first), torch.ones(1)))
        for first in (True, False)
    ]
    for thread in threads:
        thread.start()
    threads[1].join()
    assert not torch.backends.mha.get_fastpath_enabled()
    go.set()
    threads[0].join()
    assert torch.backends.mha.get_fastpath_enabled()


# Results on disk


@pytest.fixture(scope="module")
def answer():
    network = mlp()
    data = torch.randn(16, 6), torch.randint(0, 3, (16,))
    return product.search(network, data, budget="0.6 bops", bits=(8, 4), candidates=2).result


@pytest.mark.parametrize("change", [str, lambda path: path])
def test_a_result_goes_to_any_path_and_comes_back(change, answer, tmp_path):
    """Text or pathlib.Path, a folder that does not exist yet, letters that globs use."""
    folder = change(tmp_path / "a" / "größe [0] *")
    for _ in range(2):
        answer.save(folder)
    x = torch.randn(4, 6)
    assert torch.equal(hq.load(folder, mlp())(x), answer.network(x))


def full(path, data):
    raise OSError(28, "No space left on device", str(path))


def test_a_place_that_cannot_be_written_is_named(answer, tmp_path, monkeypatch):
    """A file in place of the folder, and a disk without room."""
    (tmp_path / "file").write_text("")
    for place in ("file", "file/inside"):
        with pytest.raises(RecipeError, match=r"cannot be saved in .*file.* room for [\d,]+ bytes"):
            answer.save(tmp_path / place)
    monkeypatch.setattr("hq_optuna.answer.recipe.write_atomically", full)
    with pytest.raises(RecipeError, match="No space left on device") as caught:
        answer.save(tmp_path / "new")
    assert isinstance(caught.value.__cause__, OSError)


def test_a_file_that_cannot_be_read_is_not_said_to_be_missing(answer, tmp_path, monkeypatch):
    """No right to read, a file given for its folder, and no such folder are three causes."""
    answer.save(tmp_path)
    with pytest.raises(RecipeError, match=r"holds no recipe.json; give the folder this file lies"):
        hq.load(tmp_path / "recipe.json", mlp())
    with pytest.raises(RecipeError, match=r"holds no recipe.json; give a folder a result was"):
        hq.load(tmp_path / "none", mlp())

    def denied(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(RecipeError, match=r"weights.safetensors cannot be read: .*denied"):
        hq.load(tmp_path, mlp())
    monkeypatch.setattr(Path, "read_text", denied)
    with pytest.raises(RecipeError, match=r"recipe.json cannot be read: .*denied"):
        hq.load(tmp_path, mlp())


@pytest.mark.parametrize(
    ("network", "kind", "words"),
    [
        (lambda: None, NetworkError, "got NoneType"),
        (lambda: mlp().state_dict(), NetworkError, "network.load_state_dict"),
        (lambda: nn.DataParallel(mlp()), NetworkError, "Give what it wraps"),
        (lambda: mlp().to("meta"), NetworkError, "on the meta device"),
        (lambda: mlp().half(), RecipeError, r"in torch.float32, .*Give network.to\(torch.float32"),
        (lambda: mlp().double(), RecipeError, "of this one is torch.float64"),
        (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Other()), RecipeError, "a Other here"),
    ],
)
def test_a_network_in_which_the_result_would_compute_otherwise_is_refused(
    network, kind, words, answer, tmp_path
):
    """What `load` returns has the saved outputs bit for bit, or nothing is returned."""
    answer.save(tmp_path)
    with pytest.raises(kind, match=words):
        hq.load(tmp_path, network())


class Other(nn.Module):
    """Weights as a linear layer has them, and another computation."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(3, 8)), nn.Parameter(torch.ones(3))

    def forward(self, x):
        return functional.linear(x, self.weight**2, self.bias)
