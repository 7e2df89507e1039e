"""The estimates of sensitivity by name. Each is a function of one layer's quantized twins."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dybit.layers.kinds import input_places, weight_names
from dybit.layers.quantized import Quantized
from dybit.mixed_precision.candidate import Candidate
from dybit.mixed_precision.measured_model import Subject
from dybit.mixed_precision.replay import Replay
from dybit.models.running import output_tensor, run_batch
from dybit.recipe import LayerRecipe
from dybit.tensors.quantized_tensor import QuantizedTensor

_SEED = 0x5E45
_DRAWS = 2  # draws of labels or projections per batch, for the Fisher information

Estimator = Callable[[Mapping[str, Quantized], str], float]


class Twins:
    """Makes quantized twins of layers. Keeps the weights of the last layer, which several candidates share."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._name = ""
        self._weights: dict[tuple[str, LayerRecipe], dict[str, QuantizedTensor]] = {}

    def of(self, name: str, candidate: Candidate) -> dict[str, Quantized]:
        """Returns the twins of a layer and of the layers tied to it, for a candidate."""
        if self._name != name:
            self._name, self._weights = name, {}
        twins = {}
        for one, recipe in self.subject.layer_recipes(name, candidate).items():
            if recipe is None:
                continue
            # Tied layers have the codes of the first of them, even if their inputs differ.
            key = (name, replace(recipe, activations=None))
            twin = self.subject.quantized(one, recipe, self._weights.get(key))
            self._weights[key] = {weight: twin.quantized_tensor(weight) for weight in twin.weight_specs}
            twins[one] = twin
        return twins


def kl(subject: Subject, cells: Sequence[tuple[str, Candidate]]) -> Estimator:
    """Measures the error of the model's output with one layer quantized. Blocks before the layer are not run again."""
    judge, replay = subject.judge, Replay(subject)

    def estimate(twins: Mapping[str, Quantized], name: str) -> float:
        with replay.before(twins), subject.replaced(twins) as model:
            return judge.error(model)

    return estimate


def rmse(subject: Subject, cells: Sequence[tuple[str, Candidate]]) -> Estimator:
    """Returns RMSE of weights plus RMSE of inputs, each over its standard deviation (search of the DyBit paper)."""

    def estimate(twins: Mapping[str, Quantized], name: str) -> float:
        total = 0.0
        for one, twin in twins.items():
            module = subject.model.get_submodule(one)
            noise = signal = 0.0
            for weight in twin.weight_specs:
                exact, rounded = getattr(module, weight).double(), getattr(twin, weight).double()
                noise += float((rounded - exact).square().sum())
                signal += float((exact - exact.mean()).square().sum())
            total += math.sqrt(noise / signal) if signal else 0.0
            seen = subject.statistics.get(one)
            if twin.input_spec is not None and seen is not None and seen.samples:
                x = _as_input(module, seen.positions())
                spread = float(x.double().std(correction=0))
                error = float((twin.round_input(x) - x).double().square().mean())
                total += math.sqrt(error) / spread if spread else 0.0
        return total

    return estimate


def output(subject: Subject, cells: Sequence[tuple[str, Candidate]]) -> Estimator:
    """Returns the energy of the error of the layer's output on its exact inputs, over the energy of the output.

    One run of the model per layer covers all its candidates.
    """
    known: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}

    def record(name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        if name not in known:
            known.clear()  # keeps the inputs of one layer at a time
            calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
            module = subject.model.get_submodule(name)
            handle = module.register_forward_pre_hook(
                lambda _, args, kwargs: calls.append((args, dict(kwargs))), with_kwargs=True
            )
            try:
                with torch.no_grad(), subject.plain_attention():
                    for batch in subject.batches:
                        run_batch(subject.model, batch)
            finally:
                handle.remove()
            known[name] = calls
        return known[name]

    def estimate(twins: Mapping[str, Quantized], name: str) -> float:
        total = 0.0
        for one, twin in twins.items():
            module, noise, signal = subject.model.get_submodule(one), 0.0, 0.0
            with torch.no_grad():
                for args, kwargs in record(one):
                    exact = output_tensor(module.forward(*args, **kwargs)).double()
                    rounded = output_tensor(twin.forward(*args, **kwargs)).double()
                    noise += float((rounded - exact).square().sum())
                    signal += float(exact.square().sum())
            total += noise / signal if signal else 0.0
        return total

    return estimate


def fisher(subject: Subject, cells: Sequence[tuple[str, Candidate]]) -> Estimator:
    """Returns half the squared errors of weights and inputs, weighted by the diagonal of the Fisher information.

    For logits, labels are drawn from the model's own predictions. Other outputs are projected on random signs, which
    gives the diagonal of Jᵀ·J. One forward and backward pass per batch and draw covers all layers and cells.
    """
    rounders: dict[str, dict[LayerRecipe, Quantized]] = {}
    for name, candidate in cells:
        for one, recipe in subject.layer_recipes(name, candidate).items():
            if recipe is not None and recipe.activations is not None and one not in subject.embeddings:
                only = replace(recipe, weights=None)
                if only not in rounders.setdefault(one, {}):
                    rounders[one][only] = subject.quantized(one, only)
    passes = _FisherPasses(subject, rounders, {name for name, _ in cells})

    def estimate(twins: Mapping[str, Quantized], name: str) -> float:
        weights, inputs = passes.result()
        total = 0.0
        for one, twin in twins.items():
            module = subject.model.get_submodule(one)
            for weight in twin.weight_specs:
                difference = getattr(twin, weight).double() - getattr(module, weight).double()
                total += float((weights[one, weight] * difference.square()).sum())
            recipe = next((r for r in rounders.get(one, {}) if rounders[one][r].input_spec == twin.input_spec), None)
            if recipe is not None:
                total += inputs.get((one, recipe), 0.0)
        return total

    return estimate


class _FisherPasses:
    """Accumulates squared gradients of weights, and of inputs times their squared rounding errors, over all batches."""

    def __init__(
        self, subject: Subject, rounders: Mapping[str, Mapping[LayerRecipe, Quantized]], names: set[str]
    ) -> None:
        self._subject, self._rounders = subject, rounders
        self._names = [one for name in subject.layers if name in names for one in (name, *subject.ties[name])]
        self._done: tuple[dict[tuple[str, str], Tensor], dict[tuple[str, LayerRecipe], float]] | None = None

    def result(self) -> tuple[dict[tuple[str, str], Tensor], dict[tuple[str, LayerRecipe], float]]:
        """Returns the sums, per output vector or per unit of output energy, halved for KL divergences."""
        if self._done is None:
            self._done = self._run()
        return self._done

    def _run(self) -> tuple[dict[tuple[str, str], Tensor], dict[tuple[str, LayerRecipe], float]]:
        subject, model = self._subject, self._subject.model
        generator = torch.Generator().manual_seed(_SEED)
        inputs: dict[tuple[str, LayerRecipe], float] = {}
        parameters: dict[tuple[str, str], nn.Parameter] = {}
        handles = []
        for one in self._names:
            module = model.get_submodule(one)
            for weight in weight_names(module):
                parameters[one, weight] = getattr(module, weight)
            handles.append(module.register_forward_pre_hook(partial(self._watch, one, inputs), with_kwargs=True))
        sums = {key: torch.zeros_like(parameter) for key, parameter in parameters.items()}
        scale = 0.0
        try:
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            with torch.enable_grad(), subject.plain_attention():
                for batch, reference in zip(subject.batches, subject.judge.outputs, strict=True):
                    for _ in range(_DRAWS):
                        result = output_tensor(run_batch(model, batch))
                        self._surprise(result.float(), generator).backward()
                        for key, parameter in parameters.items():
                            if parameter.grad is not None:
                                sums[key] += parameter.grad.square()
                                parameter.grad = None
                    logits = subject.judge.kind == "logits"
                    # KL is half the quadratic form of the Fisher information; other errors are the form itself.
                    scale += 2.0 * (reference.numel() / reference.shape[-1]) if logits else _energy(reference)
        finally:
            for handle in handles:
                handle.remove()
            for parameter in parameters.values():
                parameter.requires_grad_(False).grad = None
        factor = 1.0 / (_DRAWS * scale) if scale else 0.0
        return {k: v * factor for k, v in sums.items()}, {k: v * factor for k, v in inputs.items()}

    def _surprise(self, result: Tensor, generator: torch.Generator) -> Tensor:
        """Returns a scalar whose squared gradients have the diagonal of the Fisher information as expectation."""
        if self._subject.judge.kind == "logits":
            logs = result.reshape(-1, result.shape[-1]).log_softmax(-1)
            labels = torch.multinomial(logs.detach().exp(), 1, generator=generator)
            return -logs.gather(1, labels).sum()
        signs = (
            torch.randint(0, 2, result.shape, generator=generator, dtype=torch.int64, device="cpu").to(result.dtype) * 2
            - 1
        )
        return (result * signs).sum()

    def _watch(
        self,
        name: str,
        inputs: dict[tuple[str, LayerRecipe], float],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Runs before a layer: requests the gradient of its input as a weight of rounding errors."""
        places = input_places(module, args, kwargs)
        if not places or not self._rounders.get(name):
            return None
        place = places[0]
        x = args[place] if isinstance(place, int) else kwargs[place]
        watched = x.detach().requires_grad_(True) if not x.requires_grad else x.view_as(x)
        exact = x.detach()

        def weigh(grad: Tensor) -> None:
            for recipe, twin in self._rounders[name].items():
                if twin.input_spec is not None:
                    error = (twin.round_input(exact) - exact).square() * grad.square()
                    inputs[name, recipe] = inputs.get((name, recipe), 0.0) + float(error.sum(dtype=torch.float64))

        watched.register_hook(weigh)
        if isinstance(place, int):
            return (*args[:place], watched, *args[place + 1 :]), kwargs
        return args, {**kwargs, place: watched}


def _energy(x: Tensor) -> float:
    return float(x.double().square().sum())


def _as_input(module: nn.Module, positions: Tensor) -> Tensor:
    """Converts positions (n, channels) to the layout of the module's inputs."""
    spatial = len(getattr(module, "kernel_size", ()))  # of convolutions
    if not spatial:
        return positions
    return positions.T.reshape(1, positions.shape[1], len(positions), *[1] * (spatial - 1))


ESTIMATORS: dict[str, Callable[[Subject, Sequence[tuple[str, Candidate]]], Estimator]] = {
    "rmse": rmse,
    "fisher": fisher,
    "output": output,
    "kl": kl,
}
