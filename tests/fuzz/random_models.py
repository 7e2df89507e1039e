"""Quantizes random models and compares every layer with an independent computation; `make fuzz`, once a release.

The reference is plain torch in float64, with weights and rounded inputs from the NumPy oracle. Every case follows from
its number: `python tests/fuzz/random_models.py --first 17 --cases 1` repeats case 17.
"""

import argparse
import copy
import pickle
import random
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

import helpers
import recurrent
import torch
from mixture import Mixture
from torch import nn
from torch.nn.utils import parametrizations

import dybit
from dybit.layers.quantized import Quantized, quantized_layers

WIDTH = 8  # of features between steps
TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
FORMATS = [2, 3, 4, 5, 6, 7, 8, "nf4", "int4", "int8", "s4r2", "posit5es2", "int4asym"]


class Step(nn.Module):
    """A layer between features (batch, length, width), whatever shape it takes itself."""

    def __init__(self, layer, shape="features", residual=False):
        super().__init__()
        self.layer, self.shape, self.residual = layer, shape, residual

    def forward(self, x):
        return x + self.run(x) if self.residual else self.run(x)

    def run(self, x):
        if self.shape == "channels":
            return self.layer(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        if self.shape in ("image", "channels_last"):
            image = x.transpose(1, 2).unflatten(-1, (-1, 1)).expand(-1, -1, -1, 3)
            if self.shape == "channels_last":
                image = image.contiguous(memory_format=torch.channels_last)
            return self.layer(image).mean(-1).transpose(1, 2)
        if self.shape == "volume":
            return self.layer(x.transpose(1, 2)[..., None, None]).flatten(2).transpose(1, 2)
        if self.shape == "sequence":
            return self.layer(x)[0]
        if self.shape == "attention":
            return self.layer(x, x, x)[0]
        if self.shape == "cell":
            found = self.layer(x.flatten(0, 1))
            return (found if isinstance(found, torch.Tensor) else found[0]).view(x.shape)
        if self.shape == "experts":
            rows = x.flatten(0, 1)
            share, index = rows[:, :4].float().softmax(-1).topk(2)
            return self.layer(rows, index, share.to(x.dtype)).view(x.shape)
        return self.layer(x.contiguous() if self.shape == "contiguous" else x)


class Start(nn.Module):
    """From token numbers to features."""

    def __init__(self, kind):
        super().__init__()
        self.table = kind(20, WIDTH, padding_idx=3)

    def forward(self, tokens):
        if isinstance(self.table, nn.EmbeddingBag):
            return self.table(tokens.flatten(0, 1)[:, None].expand(-1, 2)).view(*tokens.shape, WIDTH)
        return self.table(tokens)


def layer(pick):
    """A random step."""
    bias, residual = pick.random() < 0.7, pick.random() < 0.3
    kind = pick.choice(
        ["linear", "linear", "wide", "conv1d", "transposed", "conv2d", "conv2d", "conv3d", "lstm", "gru", "rnn", "cell",
         "attention", "transformers", "experts", "norm", "nested"]
    )  # fmt: skip
    if kind == "linear":
        return Step(nn.Linear(WIDTH, WIDTH, bias=bias), residual=residual)
    if kind == "wide":
        inside = pick.choice([5, 33, 70])
        parts = [
            nn.Linear(WIDTH, inside, bias=bias),
            pick.choice([nn.GELU, nn.ReLU, nn.SiLU])(),
            nn.Linear(inside, WIDTH),
        ]
        return Step(nn.Sequential(*parts), residual=residual)
    groups = pick.choice([1, 2, WIDTH])
    options = {"groups": groups, "bias": bias}
    if kind == "conv1d":
        mode = pick.choice(["zeros", "reflect", "replicate", "circular"])
        return Step(nn.Conv1d(WIDTH, WIDTH, 3, padding=1, padding_mode=mode, **options), "channels", residual)
    if kind == "transposed":
        return Step(nn.ConvTranspose1d(WIDTH, WIDTH, 3, padding=1, **options), "channels", residual)
    if kind == "conv2d":
        conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, **options)
        conv = nn.Sequential(conv, nn.BatchNorm2d(WIDTH)) if pick.random() < 0.4 else conv
        return Step(conv, pick.choice(["image", "channels_last"]), residual)
    if kind == "conv3d":
        return Step(nn.Conv3d(WIDTH, WIDTH, (3, 1, 1), padding=(1, 0, 0), **options), "volume", residual)
    if kind in ("lstm", "gru", "rnn"):
        both = pick.random() < 0.5
        options = {"num_layers": pick.choice([1, 2]), "bidirectional": both, "batch_first": True, "bias": bias}
        return Step(getattr(nn, kind.upper())(WIDTH, WIDTH // (1 + both), **options), "sequence", residual)
    if kind == "cell":
        return Step(pick.choice([nn.LSTMCell, nn.GRUCell, nn.RNNCell])(WIDTH, WIDTH, bias=bias), "cell", residual)
    if kind == "attention":
        return Step(nn.MultiheadAttention(WIDTH, 2, bias=bias, batch_first=True), "attention", residual)
    if kind == "transformers":
        from transformers.pytorch_utils import Conv1D

        return Step(Conv1D(WIDTH, WIDTH), "contiguous", residual)
    if kind == "experts":
        marks = {name: pick.random() < 0.5 for name in ("gate", "transposed", "bias", "norm")}
        mixture = Mixture(**marks, sizes=(WIDTH, 6))
        return Step(mixture, "experts", residual)
    if kind == "norm":
        return Step(nn.LayerNorm(WIDTH))
    return nn.Sequential(*(layer(pick) for _ in range(pick.choice([0, 1, 2]))))


def model(pick):
    """A random model, and whether it takes tokens."""
    steps = [layer(pick) for _ in range(pick.randint(1, 4))]
    plain = [module for step in steps for module in step.modules() if type(module) is nn.Linear]
    if steps and pick.random() < 0.2:
        steps.append(steps[0])  # shared
    square = [module for module in plain if tuple(module.weight.shape) == (WIDTH, WIDTH)]
    if len(square) > 1 and pick.random() < 0.5:
        square[0].weight = square[1].weight  # tied
    elif plain and pick.random() < 0.2:
        pick.choice([parametrizations.weight_norm, parametrizations.spectral_norm])(plain[0])
    tokens = pick.random() < 0.3
    if tokens:
        steps.insert(0, Start(pick.choice([nn.Embedding, nn.EmbeddingBag])))
    else:
        steps.insert(0, Step(nn.Linear(WIDTH, WIDTH)))
    found = nn.Sequential(*steps)
    for parameter in found.parameters():
        if parameter.ndim == 1 and pick.random() < 0.5:
            nn.init.normal_(parameter)
        if pick.random() < 0.2:
            parameter.requires_grad_(False)
    return found.eval(), tokens


def recipe(pick):
    """A random recipe."""
    fields = {"weights": pick.choice(FORMATS), "embeddings": pick.choice(FORMATS)}
    if pick.random() < 0.5:
        fields["group_size"] = pick.choice([3, 4, 16])
    elif pick.random() < 0.3:
        fields["granularity"] = "tensor"
    fields["scale"] = pick.choice([None, "bf16", "pow2", "fp32"])
    if pick.random() < 0.6:
        fields |= {"activations": pick.choice([4, 6, 8, "int8"]), "activation_mode": pick.choice(["static", "dynamic"])}
    fields["method"] = pick.choice(["mse", "mse", "absmax"])
    return dybit.Recipe(**fields)


def check_layers(quantized, run):
    """Compares what every layer computes, while the model runs, with the reference for the same arguments."""
    seen = []

    def keep(name, module, args, kwargs, output):
        seen.append((name, module, args, kwargs, output))

    handles = [
        module.register_forward_hook(lambda *call, name=name: keep(name, *call), with_kwargs=True)
        for name, module in quantized_layers(quantized).items()
    ]
    try:
        output = run(quantized)
    finally:
        for handle in handles:
            handle.remove()
    for name, module, args, kwargs, found in seen:
        check_layer(name, module, args, kwargs, found)
    return output


def check_layer(name, module, args, kwargs, found):
    found, first = first_tensor(found), args[0]
    if first.numel() == 0:
        return  # that it runs is enough
    expected = first_tensor(reference(module, args, kwargs))
    if expected is None or not expected.abs().max() < torch.finfo(found.dtype).max:
        return  # beyond the range of half precision there is nothing to compare
    tolerance = TOLERANCES[found.dtype]
    if module.input_spec is not None and isinstance(module, (nn.RNNBase, nn.RNNCellBase, Mixture)):
        tolerance = max(tolerance, 0.2)  # a code of a state may flip where sums differ by their order
    error = float((found.double() - expected).norm() / expected.norm().clamp(min=1e-9))
    largest = float(found.double().abs().max())
    assert error < tolerance or largest < 1e-6, f"{name} {module} differs by {error:.2g} for {tuple(first.shape)}"


def first_tensor(found):
    return found if found is None or isinstance(found, torch.Tensor) else found[0]


def reference(module, args, kwargs):
    """What a layer should return, in float64; None for attention with rounded inputs, whose parts are checked."""
    plain = copy.deepcopy(module)
    specs = {key: (layer, dict(layer.weight_specs)) for key, layer in quantized_layers(plain).items()}
    weights = {
        (key, name): torch.from_numpy(helpers.numpy_weight(layer.quantized_tensor(name)))
        if layer.weight_specs[name].row_dims == 1
        else experts_weight(layer.quantized_tensor(name))
        for key, (layer, names) in specs.items()
        for name in names
    }
    rounded = any(layer.input_spec is not None for layer, _ in specs.values())
    if isinstance(module, nn.MultiheadAttention) and rounded:
        return None
    plain._forward_hooks.clear()
    plain._forward_hooks_with_kwargs.clear()
    dybit.dequantize_(plain)
    for (key, name), weight in weights.items():
        owner = plain.get_submodule(key)
        setattr(owner, name, nn.Parameter(weight.reshape(getattr(owner, name).shape), requires_grad=False))
    plain = plain.double()

    def widen(x):
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    if module.input_spec is not None:

        def round_input(x):
            return helpers.rounded_input(module, x.float()).double()

        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            return recurrent.reference(plain, widen(args[0]), round_input=round_input)
        if isinstance(module, Mixture):
            multiply = plain.multiply
            plain.multiply = lambda name, number, state: multiply(name, number, round_input(state[None])[0])
        else:
            args = (helpers.rounded_input(module, args[0].float()), *args[1:])
    return plain(*map(widen, args), **{key: widen(value) for key, value in kwargs.items()})


def experts_weight(weight):
    """The values of stacked matrices: the rows of all of them, in the shape of the weight."""
    spec = weight.spec
    flat = copy.copy(spec)
    for field, value in {"transposed": 0, "shape": (spec.rows, spec.columns)}.items():
        object.__setattr__(flat, field, value)
    matrix = torch.from_numpy(helpers.numpy_weight(type(weight)(flat, *list(vars(weight).values())[1:])))
    if not spec.transposed:
        return matrix.view(spec.shape)
    return matrix.view(spec.shape[0], spec.shape[2], spec.shape[1]).mT.contiguous()


def case(number):
    """Runs one case.

    Raises:
        Exception: Something is wrong.
    """
    pick = random.Random(number)
    torch.manual_seed(number)
    made, tokens = model(pick)
    how = recipe(pick)
    dtype = pick.choice([torch.float32] * 4 + [torch.float64, torch.float16, torch.bfloat16])
    made = made.to(dtype)
    inference, empty, meta = (pick.random() < p for p in (0.2, 0.1, 0.2))

    def batch(count=2):
        if tokens:
            return torch.randint(0, 20, (count, 6))
        return torch.randn(count, 6, WIDTH).to(dtype) * 3

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fresh = copy.deepcopy(made)
        calibration = [batch(), batch(3)] if how.activations is not None or pick.random() < 0.5 else None
        context = torch.inference_mode if inference else torch.no_grad
        with context():
            quantized = dybit.quantize_(made, how, calibration)
            x = batch()
            output = check_layers(quantized, lambda net: net(x))
            if empty:
                check_layers(quantized, lambda net: net(batch(0)))
        with torch.no_grad():
            y = quantized(x.clone())
            if dtype == torch.float16 and torch.isnan(output).any():
                return  # the product inside an expert is beyond the range of half precision, as in the original
            assert torch.equal(y, output) and not torch.isnan(y).any()
            if meta:
                fresh = fresh.to("meta")
            twins = [copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))]
            with tempfile.TemporaryDirectory() as folder:
                twins.append(dybit.load(dybit.save(quantized, Path(folder) / "q"), fresh))
            for twin in twins:
                assert torch.equal(twin(x.clone()), y), "a copy computes something else"
            assert all(isinstance(a, Quantized) == isinstance(b, Quantized)
                       for a, b in zip(twins[2].modules(), quantized.modules(), strict=True))  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    failed = []
    for number in range(options.first, options.first + options.cases):
        try:
            case(number)
        except Exception as error:
            failed.append(number)
            where = traceback.extract_tb(error.__traceback__)[-1]
            print(
                f"case {number}: {type(error).__name__}: {str(error)[:300]} ({where.filename}:{where.lineno})",
                flush=True,
            )
    print(f"{options.cases} cases, {len(failed)} failed {failed[:50]}")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
