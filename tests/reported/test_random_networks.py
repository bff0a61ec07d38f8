"""Random networks: every number that the product says of them, against plain PyTorch.

Networks are drawn from the grammar of `random_networks`, always the same ones; 40 of them, or as
many as ``pytest tests/reported/test_random_networks.py --networks 300`` says. A network that fails
prints as the code that makes it again.
"""

from __future__ import annotations

import copy
import math
from collections import Counter, defaultdict

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from scipy.stats import f as f_distribution
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hq_optuna.errors import HqOptunaError
from tests.reported import product, random_networks
from tests.reported.random_networks import LEFT_OUT, networks

FLOAT = 32
TEMPERATURE = 3.0  # of the softened Gauss-Newton matrix, docs/concepts/score.md
DRAWS = 24
UNLIKELY = 1e-4


# --- by hand -----------------------------------------------------------------------------------


@torch.no_grad()
def outputs_of(network, data, fused=True):
    """Return the outputs on each batch, called as a user calls it; or without fused attention."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fused)
    try:
        return [call(network, inputs) for inputs, _ in data]
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def call(network, inputs):
    if isinstance(inputs, Tensor):
        return network(inputs)
    return network(**inputs) if isinstance(inputs, dict) else network(*inputs)


def parts(tree):
    """Return the tensors in an output of any container, and the classes it is made of."""
    if isinstance(tree, Tensor):
        return [tree], [(tree.dtype, tuple(tree.shape))]
    inside = (
        tree.items()
        if isinstance(tree, dict)
        else vars(tree).items()
        if hasattr(tree, "__dataclass_fields__")
        else enumerate(tree)
    )
    found, kinds = [], [type(tree)]
    for key, value in inside:
        more, classes = parts(value)
        found += more
        kinds += [key, *classes]
    return found, kinds


def entering(args, kwargs):
    """Return what a layer is called with."""
    return args[0] if args else kwargs["input"]


def replaced(args, kwargs, x):
    return ((x, *args[1:]), kwargs) if args else ((), {**kwargs, "input": x})


def bits_of(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def same(one, other):
    """Say whether two outputs are the same, bit for bit, containers too."""
    (a, kinds), (b, others) = parts(one), parts(other)
    pairs = zip(a, b, strict=True)
    return kinds == others and all(torch.equal(bits_of(x), bits_of(y)) for x, y in pairs)


class Uses(TorchFunctionMode):
    """Counts multiply-accumulates by the weight that they are made with, wherever it is used."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.weights = {id(p): p for p in network.parameters() if p.dim() > 1}
        self.kept = []  # an id names a tensor only as long as it lives
        self.macs = defaultdict(Counter)  # weight -> module that used it -> MACs
        self.stack = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        weight = next((id(a) for a in args[:2] if id(a) in self.weights), None)
        if weight is None or not isinstance(result, Tensor):
            return result
        used = next(a for a in args[:2] if id(a) == weight)
        key = id(self.weights[weight])
        here = self.stack[-1] if self.stack else None
        if name.startswith("conv_transpose"):
            self.macs[key][here] += args[0].numel() * used[0].numel()
        elif name.startswith("conv") or name == "linear":
            self.macs[key][here] += result.numel() * used[0].numel()
        elif "matmul" in name:
            self.macs[key][here] += result.numel() * used.shape[0]
        elif result.numel() == used.numel():
            self.weights[id(result)] = self.weights[weight]
            self.kept.append(result)
        return result

    def owners(self, weight):
        """Return the names of the modules that hold a weight, or the parts that it is made of."""
        held = [k for k, p in self.network.named_parameters() if id(p) == weight]
        return [k.split(".parametrizations")[0].removesuffix(".weight") for k in held]

    def count(self, data):
        """Return MACs of all data: weight -> module name -> MACs."""
        handles = []
        for name, module in self.network.named_modules():
            before = lambda m, a, n=name: self.stack.append(n)  # noqa: E731
            handles.append(module.register_forward_pre_hook(before))
            handles.append(
                module.register_forward_hook(lambda m, a, o: (self.stack.pop(), None)[1])
            )
        with self, torch.no_grad():
            for inputs, _ in data:
                call(self.network, inputs)
        for handle in handles:
            handle.remove()
        return self.macs


class Rise:
    """½ Δzᵀ H_z Δz of the mean loss, by hand: squared error, or softened cross-entropy."""

    def __init__(self, description, outputs, data):
        self.squared = "mse" in description.loss.lower()
        self.outputs = [z.double() for z in outputs]
        self.labels = [labels for _, labels in data]
        loss = description.loss_function
        self.ignored = getattr(loss, "ignore_index", -100)
        self.weight = getattr(loss, "weight", None)
        self.n = [float(self.counts(b).sum()) for b in range(len(outputs))]
        own, softened = (self.mean(lambda b, t=t: self.spread(b, t)) for t in (1.0, TEMPERATURE))
        self.scale = 1.0 if self.squared else own / softened

    def mean(self, of_batch):
        values = [float(of_batch(b)) * n for b, n in enumerate(self.n)]
        return math.fsum(values) / sum(self.n)

    def counted(self, b, values):
        """Return the mean over the places that count in a cross-entropy."""
        w = self.counts(b)
        return (values * w).sum() / w.sum()

    def counts(self, b):
        """Return what each place of a batch counts; the loss is the mean over those of all data."""
        if self.squared:
            return torch.ones(self.outputs[b].shape[0])
        w = (self.labels[b] != self.ignored).double()
        return w if self.weight is None else w * self.weight.double()[self.labels[b]]

    def spread(self, b, temperature):
        if self.squared:
            return 1.0
        p = torch.softmax(self.outputs[b] / temperature, 1)
        return self.counted(b, 1 - p.square().sum(1))

    def of_batch(self, b, moved):
        change = moved.double() - self.outputs[b]
        if self.squared:
            return change.square().mean()
        p = torch.softmax(self.outputs[b] / TEMPERATURE, 1)
        spread = (p * change.square()).sum(1) - (p * change).sum(1).square()
        return self.scale * 0.5 * self.counted(b, spread)

    def of(self, moved):
        return self.mean(lambda b: self.of_batch(b, moved[b]))


def in_double(description, network, data):
    def up(x):
        return x.double() if x.is_floating_point() else x

    copied = copy.deepcopy(network).eval().double()
    doubled = []
    for inputs, labels in data:
        if isinstance(inputs, Tensor):
            inputs = up(inputs)
        elif isinstance(inputs, dict):
            inputs = {k: up(v) for k, v in inputs.items()}
        else:
            inputs = tuple(map(up, inputs))
        doubled.append((inputs, labels))
    return copied, doubled


SMALL = 1e-6


class Noise:
    """Rises of a float network with noise in one layer, per draw and batch, by hand."""

    def __init__(self, description, network, data, seed=0):
        self.network, self.data = in_double(description, network, data)
        self.float_outputs = outputs_of(self.network, self.data)
        self.rise = Rise(description, self.float_outputs, data)
        self.generator = torch.Generator().manual_seed(seed)

    def randn(self, shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def rises(self, draws):
        found = []
        for _ in range(draws):
            moved = outputs_of(self.network, self.data)
            row = [float(self.rise.of_batch(b, z)) / SMALL**2 for b, z in enumerate(moved)]
            found.append(row)
        return torch.tensor(found, dtype=torch.float64)  # (draws, batches)

    def in_weights(self, layer, squared, draws):
        """Return rises with noise in a layer's weight whose squares sum to ``squared``."""
        module = self.network.get_submodule(layer)
        weight = module.weight
        size = SMALL * math.sqrt(squared / weight.numel())
        found = []
        try:
            for _ in range(draws):
                module.weight = nn.Parameter(weight.detach() + size * self.randn(weight.shape))
                found.append(self.rises(1))
        finally:
            module.weight = weight
        return torch.cat(found)

    def in_inputs(self, layer, mean_squares, draws):
        """Return rises with noise in a layer's input, of a mean square for each of its calls."""
        calls = []

        def add(_module, args, kwargs):
            size = SMALL * math.sqrt(mean_squares[len(calls)])
            calls.append(None)
            x = entering(args, kwargs)
            return replaced(args, kwargs, x + size * self.randn(x.shape))

        def start(_module, _args):
            calls.clear()

        handles = [
            self.network.get_submodule(layer).register_forward_pre_hook(add, with_kwargs=True),
            self.network.register_forward_pre_hook(start),
        ]
        try:
            return self.rises(draws)
        finally:
            for handle in handles:
                handle.remove()


def close(table, draws, sizes, measurements, negligible):
    """Say how likely a table's rise is, that of `draws` ``(draws, batches)`` being right.

    Both are means of squares of normal numbers, nearly: the table's of as many measurements as it
    took, ours of our draws. So their ratio is distributed as F, with degrees of freedom that the
    spread of our draws tells: 2 · mean² / variance. The table's measurement of a batch spreads as
    our draws in that batch do (uᵀ J Jᵀ u as δᵀ Jᵀ J δ), and batches differ.
    """
    weights = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    total = draws @ weights
    mean = float(total.mean())
    if max(mean, table) < negligible:
        return 1.0, mean
    if not mean or not table:
        return 0.0, mean
    ours = 2 * len(draws) / max(float(total.var()) / mean**2, 1e-9)
    inside = float((draws.var(0) * weights).sum()) / mean**2
    between = float(draws.mean(0).var()) / mean**2
    theirs = 2 * measurements / max(inside + between, 1e-9)
    ratio = f_distribution(theirs, ours)
    return 2 * min(ratio.cdf(table / mean * SLACK), ratio.sf(table / mean / SLACK)), mean


SLACK = 1.05  # of 4-bit rounding of ours, and of single precision
NEGLIGIBLE = {"bfloat16": 1e-8}  # nats: what roundoff leaves of a rise of nothing


# --- as found ----------------------------------------------------------------------------------


def snapshot(network, data):
    """Return all that the product must leave as it is."""
    tensors = [(n, t, bits_of(t).clone()) for n, t in network.state_dict(keep_vars=True).items()]
    tensors += [(n, t, bits_of(t).clone()) for n, t in network.named_buffers()]
    return {
        "values": [(n, v) for n, _, v in tensors],
        "identity": [(n, id(t)) for n, t, _ in tensors],
        "gradients": [
            (n, p.requires_grad, id(p.grad), None if p.grad is None else bits_of(p.grad).clone())
            for n, p in network.named_parameters()
        ],
        "attributes": [
            (name, key, id(value), list(value) if isinstance(value, (dict, list)) else None)
            for name, module in network.named_modules()
            for key, value in vars(module).items()
        ],
        "modes": [(name, module.training) for name, module in network.named_modules()],
        "data": [bits_of(t).clone() for b in data for x in b for t in parts(x)[0]],
        "random": torch.get_rng_state(),
        "settings": (torch.get_default_dtype(), torch.is_grad_enabled()),
    }


def difference(before, after):
    """Return what a snapshot has otherwise than another."""

    def equal(a, b):
        if isinstance(a, Tensor) or isinstance(b, Tensor):
            return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
        if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
            return len(a) == len(b) and all(map(equal, a, b))
        return a == b

    return [key for key in before if not equal(before[key], after[key])]


# --- the checks --------------------------------------------------------------------------------


def one_layer_each(names):
    """Return all layers in float; then three layers' weights, and their inputs, at 4 bits alone."""
    every = dict.fromkeys(names, (FLOAT, FLOAT))
    alone = [{**every, n: bits} for n in watched(names) for bits in ((4, FLOAT), (FLOAT, 4))]
    return [every, *alone]


def watched(names):
    """Return the first, a middle and the last layer."""
    return list(dict.fromkeys((names[0], names[len(names) // 2], names[-1])))


def check_apart(network, apart, data):
    """What is taken apart computes the same, but for roundoff."""
    if apart is network:
        return
    pairs = zip(
        outputs_of(apart, data), outputs_of(copy.deepcopy(network).eval(), data), strict=True
    )
    for one, other in pairs:
        for x, y in zip(parts(one)[0], parts(other)[0], strict=True):
            roundoff = 64 * torch.finfo(x.dtype).eps * max(1.0, float(y.abs().max()))
            assert torch.allclose(x, y, rtol=0, atol=roundoff), "taken apart, outputs differ"


def check_float(description, network, data, looked):
    """Prepared with all layers in float, outputs are the network's, bit for bit."""
    floats = outputs_of(copy.deepcopy(network).eval(), data)
    corrected = "corrected in float" in LEFT_OUT and description.correction
    for ready in (looked.ready, *([] if corrected else looked.networks[:1])):
        for one, other in zip(outputs_of(ready, data), floats, strict=True):
            assert same(one, other), "float outputs differ"


def check_cost(network, data, looked):
    """MACs are those of all uses of a weight over all data, a sample; or it is said what is not."""
    counted = Uses(copy.deepcopy(network).eval())
    uses = counted.count(data)
    n = sum(labels.shape[0] for _, labels in data)
    names = list(counted.network.named_modules(remove_duplicate=False))
    known = set()
    for name, macs in looked.macs.items():
        module = counted.network.get_submodule(name)
        known.add(id(module.weight))
        found = uses[id(module.weight)]
        if macs != -(-sum(found.values()) // n):
            aliases = [k for k, m in names if m is module]
            own, others = sum(found[a] for a in aliases), set(found) - set(aliases)
            assert macs == -(-own // n), f"{name}: {macs} MACs, by hand {dict(found)} of {n}"
            assert is_named(others, looked), f"{name}: uses by {others} are not told"
    for weight, found in uses.items():
        if weight not in known and sum(found.values()):
            owners = counted.owners(weight)
            assert is_named(owners, looked), f"{owners} neither counted nor told"


def is_named(names, looked):
    return any(repr(name) in looked.said for name in names)


def check_rises(description, network, data, loss, looked):
    """Scores are ½ ΔzᵀHΔz of the outputs; the table is its mean over errors of that size.

    Of a loss that is not known the table is the squared gradient's, by hand too.
    """
    floats = outputs_of(copy.deepcopy(network).eval(), data, fused=False)
    rough = description.dtype == "bfloat16"
    if description.loss.startswith("unknown"):
        check_squared_gradients(description, data, loss, looked, floats, rough)
        return
    assert abs(looked.scores[0]) < 1e-12, f"rise of the float network: {looked.scores[0]}"
    rise, noise = Rise(description, floats, data), Noise(description, network, data)
    for i, layer in enumerate(watched(looked.names)):
        for part in ("weights", "activations"):
            at = 1 + 2 * i + (part == "activations")
            by_hand = rise.of(outputs_of(looked.networks[at], data, fused=False))
            near = pytest.approx(by_hand, rel=0.05 if rough else 2e-3, abs=1e-11)
            assert looked.scores[at] == near, f"score of {layer!r} {part}"
            if is_measured(looked, layer):
                if not description.correction:
                    assert looked.table[layer][part][4] == near, f"measured {layer!r} {part}"
            elif "before no gradient" not in LEFT_OUT or "gradient" not in looked.said:
                check_table(description, layer, part, looked, at, noise, data)


def is_measured(looked, layer):
    """Say whether the product told that the rises of a layer are measured, not from gradients."""
    return any(repr(layer) in w and "gradient" in w for w in looked.said.splitlines())


REPEATS = 4  # of the data, for so many more random signs


def check_squared_gradients(description, data, loss, looked, floats, rough):
    chosen = watched(looked.names)
    told = [layer for layer in chosen if not is_measured(looked, layer)]
    by_hand = SquaredGradients(description, data, loss, told) if told else None
    n = sum(labels.shape[0] for _, labels in data)

    def mean_loss(outputs):
        with torch.no_grad():
            losses = [
                float(loss(z, y)) * y.shape[0] for z, (_, y) in zip(outputs, data, strict=True)
            ]
        return math.fsum(losses) / n

    for i, layer in enumerate(chosen):
        for part in ("weights", "activations"):
            moved = looked.networks[1 + 2 * i + (part == "activations")]
            table = looked.table[layer][part][4]
            if is_measured(looked, layer):
                change = abs(mean_loss(outputs_of(moved, data, fused=False)) - mean_loss(floats))
                near = pytest.approx(change, rel=0.1 if rough else 1e-3, abs=1e-8)
                assert description.correction or table == near, f"measured {layer!r} {part}"
                continue
            right = getattr(by_hand, part)(layer, moved)
            near = pytest.approx(right, rel=0.1 if rough else 1e-3, abs=1e-12)
            assert table == near, f"table of {layer!r} {part}"


class SquaredGradients:
    """The calibration Adam's table by hand: autograd on the network without recomputation."""

    def __init__(self, description, data, loss, layers):
        plain = product.unfused(description.plain().make())
        self.network = plain.eval().requires_grad_(False)
        self.sizes = [labels.shape[0] for _, labels in data]
        self.calls = {layer: [] for layer in layers}  # batch -> call -> input and its gradient
        self.gradients = {layer: [] for layer in layers}
        modules = {layer: self.network.get_submodule(layer) for layer in layers}
        seen = []

        def take(layer):
            def hook(_module, args, kwargs):
                x = entering(args, kwargs).clone()
                x = x if x.requires_grad else x.detach().requires_grad_(True)
                seen.append((layer, x))
                return replaced(args, kwargs, x)

            return hook

        for layer, module in modules.items():
            module.weight = nn.Parameter(module.weight.detach().clone())
            module.register_forward_pre_hook(take(layer), with_kwargs=True)
        for inputs, labels in data:
            seen.clear()
            with torch.enable_grad():
                value = loss(call(self.network, inputs), labels)
                at = [m.weight for m in modules.values()] + [x for _, x in seen]
                found = torch.autograd.grad(value, at, allow_unused=True)
            for layer, gradient in zip(modules, found, strict=False):
                self.gradients[layer].append(gradient)
                inside = zip(seen, found[len(modules) :], strict=True)
                self.calls[layer].append(
                    [(x.detach(), g) for (name, x), g in inside if name == layer]
                )

    def weights(self, layer, moved):
        change = moved.get_submodule(layer).weight.detach().double()
        change = change - self.network.get_submodule(layer).weight.detach().double()
        beta, moment, first = 0.999, torch.zeros_like(change), self.sizes[0]
        steps = len(self.sizes) * REPEATS
        for i in range(steps):
            b = i % len(self.sizes)
            g = self.gradients[layer][b]
            g = 0.0 if g is None else g.double() * math.sqrt(self.sizes[b] / first)
            moment = beta * moment + (1 - beta) * g**2
        h = first * moment / (1 - beta**steps)
        return 0.5 * float((h * change.square()).sum())

    def activations(self, layer, moved):
        batches = self.calls[layer]
        total = 0.0
        for c in range(max(map(len, batches))):
            curvatures, errors = [], []
            for n, calls in zip(self.sizes, batches, strict=True):
                if c < len(calls):
                    x, g = calls[c]
                    g = torch.zeros_like(x) if g is None else g
                    error = product.rounded_input(moved, layer, x).double() - x.double()
                    errors.append((n, error.square()))
                    curvatures.append((n, (g.double() * n).square()))
            fits = {x.numel() / n if len(x) % n == 0 else None for n, x in curvatures}
            if len(fits) == 1 and None not in fits:
                h = sum(x.reshape(n, -1).sum(0) for n, x in curvatures)
                e = sum(x.reshape(n, -1).sum(0) for n, x in errors)
                total += float((h * e).sum()) / sum(n for n, _ in curvatures)
            else:
                h = sum(float(x.sum()) for _, x in curvatures)
                e = sum(float(x.sum()) for _, x in errors)
                total += h * e / max(sum(x.numel() for _, x in curvatures), 1)
        return 0.5 * total / sum(self.sizes)


def check_table(description, layer, part, looked, at, noise, data):
    quantized = looked.networks[at].get_submodule(layer)
    table = looked.table[layer][part][4]
    sizes = [labels.shape[0] for _, labels in data]
    if part == "weights":
        change = quantized.weight.detach().double() - noise.network.get_submodule(layer).weight
        squares = float(change.detach().square().sum())
    else:
        squares = input_errors(noise, looked.networks[at], layer, description)
    measurements = looked.samples * len(sizes) / sum(sizes)
    draws, negligible = DRAWS, NEGLIGIBLE.get(description.dtype, 1e-12)
    while True:
        rises = (noise.in_weights if part == "weights" else noise.in_inputs)(layer, squares, draws)
        p, mean = close(table, rises, noise.rise.n, measurements, negligible)
        if p > UNLIKELY or draws >= 16 * DRAWS:
            break
        draws *= 4
    assert p > UNLIKELY, (
        f"table of {layer!r} {part}: {table:.3g}, measured {mean:.3g} "
        f"({table / mean if mean else math.inf:.3g} times, p {p:.1g})"
    )


def input_errors(noise, network, layer, description):
    """Return the mean square of what rounding adds to a layer's input, of each of its calls."""
    dtype = getattr(torch, description.dtype)
    calls, sums, counts = [], Counter(), Counter()

    def see(_module, args, kwargs):
        x = entering(args, kwargs).to(dtype)
        rounded = product.rounded_input(network, layer, x)
        sums[len(calls)] += float((rounded.double() - x.double()).square().sum())
        counts[len(calls)] += x.numel()
        calls.append(None)

    handle = noise.network.get_submodule(layer).register_forward_pre_hook(see, with_kwargs=True)
    for inputs, _ in noise.data:
        calls.clear()
        with torch.no_grad():
            call(noise.network, inputs)
    handle.remove()
    return [sums[c] / max(counts[c], 1) for c in range(max(counts, default=0) + 1)]


def check_saved(description, network, data, loss, folder):
    """A searched network that is saved and loaded has the same outputs, bit for bit."""
    found = product.search(
        network, data, loss, budget="0.5 bops", candidates=2, limit=4, bits=(8, 4)
    )
    loaded = product.saved_and_loaded(found, description.make(description.seed + 1), folder)
    for one, other in zip(outputs_of(found.network, data), outputs_of(loaded, data), strict=True):
        assert same(one, other), "loaded outputs differ"


def may_refuse(network, data):
    """Return words of the sentences with which this network may be refused, by plain PyTorch."""
    words = []
    inputs = data[0][0]
    if not differentiable(network, data):
        words.append("in place")
    copied = copy.deepcopy(network).eval()
    fresh = copy.deepcopy(inputs)
    versions = [t._version for t in parts(fresh)[0]]
    with torch.no_grad():
        call(copied, fresh)
    if [t._version for t in parts(fresh)[0]] != versions:
        words.append("writes into its input")
    if any(isinstance(module, random_networks.Odd) for module in network.modules()):
        words.append("Two forward passes")
    return words


def differentiable(network, data):
    """Say whether plain PyTorch can go back through the network."""
    try:
        outputs = call(copy.deepcopy(network).eval().requires_grad_(True), data[0][0])
        sum(z.sum() for z in parts(outputs)[0] if z.requires_grad).backward()
    except RuntimeError:
        return False
    return True


def runs(description):
    """Say whether plain PyTorch runs the network on its data."""
    try:
        outputs_of(description.make().eval(), description.data())
    except (RuntimeError, NotImplementedError, ValueError):
        return False
    wanted = "no backward pass" not in LEFT_OUT
    return wanted or differentiable(description.make(), description.data())


def check(description, folder):
    """Hold all that the product says of a network against plain PyTorch."""
    network, data, loss = description.make(), description.data(), description.loss_function
    for parameter in list(network.parameters())[::2]:
        parameter.grad = torch.ones_like(parameter)
    words, before = may_refuse(network, data), snapshot(network, data)
    options = {"bits": (8, 4), "rounding": "nearest", "correction": description.correction}
    try:
        search = product.opened(network, data * REPEATS, loss, **options)
    except HqOptunaError as error:
        refused = product.is_refusal(error) and any(word in str(error) for word in words)
        assert refused, f"refused: {error}"
    else:
        looked = product.looked_at(search, one_layer_each)
        # Fused modules are layers of their own from here on, with sums in another order.
        apart = product.unfused(network)
        check_apart(network, apart, data)
        check_float(description, apart, data, looked)
        check_cost(apart, data, looked)
        check_rises(description, apart, data, loss, looked)
        check_saved(description, network, data, loss, folder)
    changed = difference(before, snapshot(network, data))
    assert not changed, f"the user's {', '.join(changed)} are not as they were found"


def test_random_networks_are_right_or_refused(request, tmp_path_factory):
    """Float outputs, scores, tables, cost, saving and the user's network, of each network drawn.

    Only one network of a signature is drawn, or half of them would be near copies; until one fails,
    and hypothesis looks for the smallest that does.
    """
    seen, failed = {}, []

    @settings(
        max_examples=request.config.getoption("networks"),
        **{"derandomize": True, "database": None, "deadline": None},
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(networks())
    def run(description):
        if failed:
            assume(description in failed or len(repr(description)) < len(repr(failed[-1])))
        else:
            assume(seen.setdefault(description.signature, description) == description)
        assume(runs(description))
        assert eval(repr(description), vars(random_networks)) == description
        try:
            check(description, tmp_path_factory.mktemp("answer"))
        except Exception:
            failed.append(description)
            raise

    run()
