"""The model that a search measures, with its layers, their inputs and a judge of its outputs."""

from __future__ import annotations

import copy
import hashlib
import re
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from dybit.errors import DyBitError, DyBitWarning
from dybit.layers.attention import attend
from dybit.layers.kinds import input_places, is_experts, layer_kind, weight_names
from dybit.layers.patched_forward import replaced_forwards
from dybit.layers.quantized import Quantized, is_attention
from dybit.measure.fidelity import Kind, kind_of, kl_divergence
from dybit.mixed_precision.candidate import Candidate, mixed_recipe
from dybit.models.batch_norm import find_pairs, fold_
from dybit.models.calibration import InputStatistics, calibrate
from dybit.models.plan import Plan, Ties, plan_layers
from dybit.models.preparation import bypass_fast_path_, make_plain_
from dybit.models.running import run, run_batch
from dybit.ptq.rounding.nearest import quantize_layer
from dybit.recipe import LayerRecipe, Recipe, matches
from dybit.safe_files import feed
from dybit.tensors.quantized_tensor import QuantizedTensor


class Judge:
    """Measures the difference of a model's outputs from those of its floating-point original.

    The error is the mean Kullback-Leibler divergence in nats if outputs are logits, else the energy of the difference
    over the energy of the original's outputs.

    Args:
        model: The floating-point model.
        batches: The inputs, kept with the outputs.

    Raises:
        DyBitError: There is no batch, one does not fit the model, or an output is not finite.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any]) -> None:
        if not batches:
            raise DyBitError("batches must hold at least one batch of calibration data, but are empty")
        self.batches = list(batches)
        self.kind: Kind = kind_of(model, self.batches[0])
        self.outputs = []
        for index, (_, output) in enumerate(run(model, self.batches)):
            if not bool(torch.isfinite(output).all()):
                raise DyBitError(f"the original's output for batch {index} holds NaN or infinity")
            self.outputs.append(output)

    @property
    def unit(self) -> str:
        """The unit of the error."""
        return "KL divergence, nats" if self.kind == "logits" else "noise-to-signal energy"

    def error(self, model: nn.Module) -> float:
        """Runs a model on the batches and returns its error.

        Raises:
            DyBitError: An output has another shape or is not finite.
        """
        total, weight = 0.0, 0.0
        for (_, output), reference in zip(run(model, self.batches), self.outputs, strict=True):
            if output.shape != reference.shape:
                raise DyBitError(f"the output has shape {tuple(output.shape)}, not {tuple(reference.shape)}")
            if not bool(torch.isfinite(output).all()):
                raise DyBitError("the output holds NaN or infinity")
            if self.kind == "logits":
                vectors = reference.numel() // reference.shape[-1]
                total, weight = total + kl_divergence(reference, output) * vectors, weight + vectors
            else:
                total += float((output - reference).double().square().sum())
                weight += float(reference.double().square().sum())
        return total / weight if weight else 0.0


@dataclass(frozen=True)
class LayerInput:
    """The arguments of a layer's first call, positional and by keyword."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first tensor."""
        return next((tuple(x.shape) for x in (*self.args, *self.kwargs.values()) if isinstance(x, Tensor)), ())


class Subject:
    """A copy of a model, prepared as in ``quantize_``: parametrizations made permanent, batch norms folded.

    Args:
        model: The model. It is not changed.
        batches: Calibration batches, each a tensor, a tuple or list of arguments, or a mapping of keyword arguments.
        recipe: Everything but the formats: group sizes, scales, rules. Layers that a rule keeps in floating point are
            not searched.

    Attributes:
        model: The copy.
        batches: The batches.
        recipe: The recipe.
        layers: The layers of the search, by qualified name. Tied layers count as one, by the first name.
        ties: The other layers with the same weight, by the first.
        kinds: What decides the defaults of each of all these (see :meth:`dybit.recipe.Recipe.layer`).
        embeddings: The names of embedding tables among all these.
        folded: Bytes that folding a batch norm saves, by convolution. A convolution in floating point keeps its norm.

    Raises:
        DyBitError: ``model`` is not a module or has nothing to quantize, or there is no batch.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any], recipe: Recipe | None = None) -> None:
        self.recipe = recipe or Recipe()
        if not isinstance(batches, Iterable) or isinstance(batches, Tensor | Mapping | str):
            raise DyBitError(f"batches must be an iterable of batches, such as a list, not {type(batches).__name__}")
        self.batches = list(batches)
        if not self.batches:
            raise DyBitError("batches must hold at least one batch of calibration data, but are empty")
        keep = tuple((pattern, None) for pattern, changes in self.recipe.rules if changes is None)
        every = replace(self.recipe, weights=8, activations=None, embeddings=8, criterion="auto", rules=keep)
        # Checks the model before it is copied. Experts are left out: which run, and with how many rows, is not known.
        layers = [plan.name for plan in plan_layers(model, every) if not is_experts(plan.module)]
        self.model = copy.deepcopy(model).eval()
        found = {name: self.model.get_submodule(name) for name in layers}
        for module in found.values():
            make_plain_(module)
        pairs = [pair for pair in find_pairs(self.model) if pair[0] in found]
        before = {pair[0]: _nbytes(self.model, pair) for pair in pairs}
        fold_(self.model, pairs)
        self.folded = {pair[0]: before[pair[0]] - _nbytes(self.model, pair) for pair in pairs}
        bypass_fast_path_(self.model, found.values())
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        self.kinds = {name: layer_kind(module) for name, module in found.items()}
        self.embeddings = frozenset(name for name, kind in self.kinds.items() if kind == "embedding")
        owners: dict[int, str] = {}
        self.layers: dict[str, nn.Module] = {}
        self.ties: dict[str, tuple[str, ...]] = {}
        for name, module in found.items():
            first = owners.setdefault(id(getattr(module, weight_names(module)[0])), name)
            if first == name:
                self.layers[name], self.ties[name] = module, ()
            else:
                self.ties[first] = (*self.ties[first], name)

    def __getstate__(self) -> dict[str, Any]:
        """Drops the recorded inputs when the subject is sent to a worker."""
        return {key: value for key, value in self.__dict__.items() if key != "_record"}

    @cached_property
    def judge(self) -> Judge:
        """The judge on the calibration batches."""
        return Judge(self.model, self.batches)

    @cached_property
    def statistics(self) -> dict[str, InputStatistics]:
        """Statistics of the inputs of every layer but embeddings."""
        names = [name for first in self.layers for name in (first, *self.ties[first]) if name not in self.embeddings]
        seen = calibrate(self.model, {name: self.model.get_submodule(name) for name in names}, self.batches)
        missed = [name for name, statistics in seen.items() if not statistics.seen]
        if missed:
            warnings.warn(
                f"calibration never reached {len(missed)} layers, whose error counts as zero: {', '.join(missed[:8])}",
                DyBitWarning,
                stacklevel=2,
            )
        return seen

    @cached_property
    def signature(self) -> str:
        """Hashes everything that measurements depend on: structure, weights and calibration data."""
        digest = hashlib.sha256(repr(self.model).encode())
        feed(digest, [self.model.state_dict(), self.batches])
        return digest.hexdigest()

    def layer_recipes(self, name: str, candidate: Candidate) -> dict[str, LayerRecipe | None]:
        """Returns how a candidate quantizes a layer and the layers tied to it; None if it keeps them."""
        recipe = self.mixed({name: candidate})
        return {one: recipe.layer(one, self.kinds[one]) for one in (name, *self.ties[name])}

    def mixed(self, choices: Mapping[str, Candidate]) -> Recipe:
        """Returns the recipe that gives every layer, and the layers tied to it, its candidate."""
        every = {one: candidate for name, candidate in choices.items() for one in (name, *self.ties[name])}
        return mixed_recipe(self.recipe, every, self.embeddings)

    def quantized(
        self, name: str, recipe: LayerRecipe, weights: Mapping[str, QuantizedTensor] | None = None
    ) -> Quantized:
        """Makes a quantized twin of a layer, which shares the layer's other tensors and its hooks."""
        module = self.model.get_submodule(name)
        twin = module.__class__.__new__(module.__class__)
        twin.__dict__.update(_state(module))
        kept = weights or {}
        quantize_layer(
            Plan(name, twin, recipe), self.statistics.get(name), Ties([]), lambda _, key, spec: kept.get(key)
        )
        return cast(Quantized, twin)

    @contextmanager
    def replaced(self, twins: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
        """Within the body, replaces layers of the model by their twins, in place."""
        before = []
        try:
            for name, twin in twins.items():
                module = self.model.get_submodule(name)
                before.append((module, module.__class__, module.__dict__))
                module.__class__ = twin.__class__
                module.__dict__ = dict(twin.__dict__)
            yield self.model
        finally:
            for module, cls, state in reversed(before):
                module.__class__, module.__dict__ = cls, state

    @contextmanager
    def plain_attention(self) -> Iterator[None]:
        """Within the body, torch's attention calls its ``out_proj`` instead of multiplying by its weight."""
        layers = [module for module in self.model.modules() if is_attention(module)]
        with replaced_forwards({layer: partial(attend, layer) for layer in layers}):
            yield

    @cached_property
    def _record(self) -> tuple[dict[str, LayerInput], list[tuple[str, ...]]]:
        """Records the first input of every layer on the first batch, and which layers got the same tensor."""
        inputs: dict[str, LayerInput] = {}
        shared: list[tuple[weakref.ref[Tensor], int, list[str]]] = []

        def enter(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name in inputs:
                return
            places = input_places(module, args, kwargs)
            inputs[name] = LayerInput(_detached(args), {key: _detached((x,))[0] for key, x in kwargs.items()})
            if places and name not in self.embeddings:
                x: Tensor = args[places[0]] if isinstance(places[0], int) else kwargs[places[0]]
                for known, version, names in shared:
                    if known() is x and version == x._version:
                        names.append(name)
                        return
                shared.append((weakref.ref(x), x._version, [name]))

        handles = [m.register_forward_pre_hook(partial(enter, n), with_kwargs=True) for n, m in self.layers.items()]
        try:
            with torch.no_grad(), self.plain_attention():
                run_batch(self.model, self.batches[0], "batch 0")
        finally:
            for handle in handles:
                handle.remove()
        return inputs, [tuple(names) for _, _, names in shared if len(names) > 1]

    @property
    def inputs(self) -> dict[str, LayerInput]:
        """The first call of every layer that runs on the first batch."""
        return self._record[0]

    def groups(self, patterns: Iterable[str] = (), shared_inputs: bool = True) -> list[tuple[str, ...]]:
        r"""Returns groups of layers that must take the same candidate. Every layer is in exactly one group.

        Args:
            patterns: Layers that match a pattern form a group: a glob, or a regular expression after ``re:``, with one
                group per value of the captured parts (``re:(.*)\.mlp\..*`` makes a group of every block).
            shared_inputs: Whether layers with the same input tensor form a group, such as query, key and value.

        Raises:
            DyBitError: A pattern matches no layer, or is no regular expression.
        """
        # Torch's attention multiplies by its out_proj itself, and rounds the inputs of both or of neither.
        attention = [(name, f"{name}.out_proj") for name, module in self.layers.items() if is_attention(module)]
        known: list[tuple[str, ...]] = [pair for pair in attention if pair[1] in self.layers]
        known += self._record[1] if shared_inputs else []
        return agree(list(self.layers), known, patterns)


def agree(
    names: Sequence[str], known: Iterable[Sequence[str]] = (), patterns: Iterable[str] = ()
) -> list[tuple[str, ...]]:
    """Groups names that are known to belong together or match a pattern; see :meth:`Subject.groups`."""
    group = {name: index for index, name in enumerate(names)}
    together = [list(part) for part in known]
    for pattern in patterns:
        keys: dict[tuple[str | None, ...], list[str]] = {}
        for name in names:
            try:
                hit = matches(pattern, name)
            except re.error as error:
                raise DyBitError(f"groups: {pattern!r} is not a regular expression: {error}") from None
            if hit:
                match = re.fullmatch(pattern[3:], name) if pattern.startswith("re:") else None
                keys.setdefault(match.groups() if match else (), []).append(name)
        if not keys:
            raise DyBitError(f"groups: {pattern!r} matches no layer")
        together += list(keys.values())
    for part in together:
        first, merged = group[part[0]], {group[name] for name in part}
        group = {name: first if index in merged else index for name, index in group.items()}
    result: dict[int, list[str]] = {}
    for name in names:
        result.setdefault(group[name], []).append(name)
    return [tuple(part) for part in result.values()]


def _nbytes(model: nn.Module, names: Iterable[str]) -> int:
    return sum(t.nbytes for name in names for t in model.get_submodule(name).state_dict().values())


def _state(module: nn.Module) -> dict[str, Any]:
    """Returns the attributes of a module, with copied tables of parameters and buffers."""
    copied = {name: dict(module.__dict__[name]) for name in ("_parameters", "_buffers", "_modules")}
    return {**module.__dict__, **copied}


def _detached(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.detach() if isinstance(x, Tensor) else x for x in values)
