"""Prepares whole models for quantization-aware training, and turns them into quantized ones."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal, cast, get_args

from torch import Tensor, nn
from torch.nn import functional

from dybit.errors import DyBitError, DyBitWarning
from dybit.layers.kinds import has_dynamic_inputs, is_embedding, layer_kind
from dybit.layers.quantized import Quantized, quantized_layers
from dybit.layers.swap import swap_, unswap_
from dybit.models.running import Progress
from dybit.ptq.quantize import quantize_
from dybit.qat.layers import Prepared, prepare_layer_, prepared_layers, unprepare_
from dybit.qat.quantizers import InputQuantizer, Schedule, WeightQuantizer
from dybit.recipe import INPUT_GROUP_SIZE, LayerRecipe, Recipe
from dybit.tensors.quantized_tensor import QuantizedTensor

BatchNorm = Literal["keep", "fold"]
_MIDRISE_WIDTHS = (
    2,
    3,
)  # training at these widths starts from mid-rise variants, whatever the recipe's default; see docs/qat.md


def prepare_qat_(
    model: nn.Module,
    recipe: Recipe,
    calibration: Iterable[Any] | None = None,
    *,
    batch_norm: BatchNorm = "keep",
    learn_scales: bool = True,
    observe: int = 16,
    refresh_every: int = 100,
    freeze_after: int = 1000,
    hysteresis: float = 0.1,
    strict: bool = False,
    progress: Progress | None = None,
) -> nn.Module:
    """Prepares a model for quantization-aware training, in place.

    Rounds in every forward what :func:`dybit.quantize_` would quantize, with straight-through gradients and learned
    scales. Weights stay floating-point parameters. Train the model as usual, with an optimizer made after this call,
    then call :func:`convert_`. In evaluation mode the outputs are those of the converted model, bit for bit.

    Args:
        model: The model, preferably a trained one.
        recipe: How it will be quantized. If it does not set the variants, weights of 2 and 3 bits use mid-rise
            variants, which gain more from training.
        calibration: As for :func:`dybit.quantize_`. Without it, the first training passes observe static inputs, and
            later ones round them.
        batch_norm: ``keep`` keeps batch norms, in training and afterwards. ``fold`` folds them into the convolutions
            before them now, which freezes their running statistics.
        learn_scales: Whether to learn scales and offsets.
        observe: Training passes that observe the inputs of a layer without calibration.
        refresh_every: Training passes of a layer between two updates of its codebooks; 0 for none.
        freeze_after: Training passes of a layer after which its codebooks are no longer updated.
        hysteresis: The relative reduction of the error that a codebook must bring to replace the current one.
        strict: As for :func:`dybit.quantize_`.
        progress: As for :func:`dybit.quantize_`.

    Returns:
        The same model, in the same mode (training or evaluation) as before.

    Raises:
        DyBitError: The model is already prepared, or an argument is out of range; or as for :func:`dybit.quantize_`.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> model = prepare_qat_(model, Recipe(weights=3, activations=4), [torch.randn(32, 64)])
        >>> model(torch.randn(5, 64)).sum().backward()
        >>> convert_(model)[0].quantized_tensor().spec.bits
        3
    """
    if isinstance(recipe, Recipe):
        recipe = _for_training(recipe)
    schedule = Schedule(observe, refresh_every, freeze_after, hysteresis)
    if batch_norm not in get_args(BatchNorm):
        raise DyBitError(f"batch_norm must be one of {', '.join(get_args(BatchNorm))}, not {batch_norm!r}")
    originals: dict[nn.Module, dict[str, nn.Parameter | None]] = {}

    def remember(done: int, total: int, text: str) -> None:
        """Keeps the parameters of the layer that is quantized next."""
        if done < total and text in modules:
            originals[modules[text]] = dict(modules[text]._parameters)
        if progress:
            progress(done, total, text)

    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    modes = {module: module.training for module in modules.values()}
    try:
        for module in modules.values():
            # quantize_ folds in evaluation mode, but no norm that is in training mode.
            module.training = batch_norm == "keep" and module is not model
        start = recipe if calibration is not None else _without_calibration(recipe)
        quantize_(model, start, calibration, strict=strict, progress=remember)
    finally:
        for module in model.modules() if modes else ():
            module.training = modes.get(module, model.training)
    cast(Any, model)._dybit_recipe = recipe
    known: dict[int, WeightQuantizer] = {}
    for name, layer in quantized_layers(model).items():
        layer_recipe = recipe.layer(name, layer_kind(layer))
        assert layer_recipe is not None
        _prepare_layer_(layer, originals[layer], layer_recipe, schedule, learn_scales, known)
    return model


def _for_training(recipe: Recipe) -> Recipe:
    """Returns the recipe with mid-rise weights of 2 and 3 bits, unless it sets the variants."""

    def weights(width: int | str | None, variants: str | None) -> int | str | None:
        return f"dybit{width}mid" if width in _MIDRISE_WIDTHS and variants is None else width

    rules = []
    for pattern, changes in recipe.rules:
        values = dict(changes or ())
        if "weights" in values or "variants" in values:
            width = values.get("weights", recipe.weights)
            values["weights"] = weights(width, values.get("variants", recipe.variants))
        rules.append((pattern, changes and tuple(values.items())))
    return replace(
        recipe,
        weights=weights(recipe.weights, recipe.variants),
        embeddings=weights(recipe.embeddings, recipe.variants),
        rules=tuple(rules),
    )


def _without_calibration(recipe: Recipe) -> Recipe:
    """Returns the recipe with dynamic inputs in place of static ones, which are observed later."""
    group, own = recipe.activation_group_size, {}
    if recipe.activation_mode is None and group is None:
        group, own = INPUT_GROUP_SIZE, {"activation_group_size": None}  # rules with a mode mean one scale a token
    rules = []
    for pattern, changes in recipe.rules:
        values = dict(changes or ())
        mode = values.pop("activation_mode", None)
        if mode == "dynamic":
            values = own | values | {"activation_mode": mode}
        rules.append((pattern, changes and tuple(values.items())))
    return replace(recipe, activation_mode="dynamic", activation_group_size=group, rules=tuple(rules))


def _prepare_layer_(
    layer: Quantized,
    originals: dict[str, nn.Parameter | None],
    recipe: LayerRecipe,
    schedule: Schedule,
    learned: bool,
    known: dict[int, WeightQuantizer],
) -> None:
    """Turns a quantized layer into a layer in training with the same scales."""
    quantizers, refreshed = {}, []
    for name in layer.weight_specs:
        key = id(originals[name])
        if key not in known:
            known[key] = WeightQuantizer(layer.quantized_tensor(name), recipe, schedule, learned)
            refreshed.append(name)
        quantizers[name] = known[key]
    spec = layer.input_spec
    static = None
    kept = is_embedding(layer) or has_dynamic_inputs(layer)  # inner weights have dynamic inputs
    if recipe.has_static_inputs and not kept:
        static = InputQuantizer(recipe, schedule, learned)
        if spec is not None and spec.mode == "static":
            static.set_(spec, cast(Tensor, layer._buffers["input_scale"]), layer._buffers.get("input_offset"))
        spec = None
    unswap_(layer)
    layer._parameters = originals  # the same objects in the same order
    prepare_layer_(layer, quantizers, tuple(refreshed), spec, static)


def convert_(model: nn.Module) -> nn.Module:
    """Turns a prepared model into a quantized one, in place, like one from :func:`dybit.quantize_`.

    Returns:
        The same model. Its layers hold packed codes, and :func:`dybit.save` saves it.

    Raises:
        DyBitError: The model is not prepared, the observation of its inputs is not complete, or a weight or scale is
            not finite. The model is then unchanged.
    """
    layers = prepared_layers(model) if isinstance(model, nn.Module) else {}
    if not layers:
        raise DyBitError(f"model {type(model).__name__} is not prepared: call prepare_qat_ and train it first")
    _check_observed(layers)
    known: dict[int, QuantizedTensor] = {}
    exported = {name: _export(name, layer, known) for name, layer in layers.items()}
    for name, layer in layers.items():
        weights, inputs = exported[name]
        unprepare_(layer)
        swap_(layer, weights, *inputs)
    return model


def _check_observed(layers: dict[str, Prepared]) -> None:
    static = {name: layer.static_input for name, layer in layers.items() if layer.static_input is not None}
    for quantizer in static.values():
        quantizer.settle()
    waiting = {name: quantizer for name, quantizer in static.items() if not quantizer.ready}
    begun = [name for name, quantizer in waiting.items() if quantizer.seen]
    if begun or (waiting and len(waiting) == len(static)):
        name = (begun or list(waiting))[0]
        raise DyBitError(
            f"the inputs of layer {name!r} have been observed in {waiting[name].seen} training passes, "
            f"not observe={waiting[name].schedule.observe}: train longer or pass calibration"
        )
    if waiting:
        warnings.warn(
            f"training never reached {len(waiting)} layers, whose inputs are kept: {', '.join(list(waiting)[:8])}",
            DyBitWarning,
            stacklevel=3,
        )


_Inputs = tuple[Any, ...]  # the last three arguments of swap_


def _export(
    name: str, layer: Prepared, known: dict[int, QuantizedTensor]
) -> tuple[dict[str, QuantizedTensor], _Inputs]:
    """Returns the arguments of :func:`dybit.layers.swap.swap_` for the quantized layer."""
    weights = {}
    try:
        for key in layer.prepared_weights:
            quantizer = layer.weight_quantizer_of(key)
            if id(quantizer) not in known:
                known[id(quantizer)] = quantizer.export(cast(Tensor, layer._parameters[key]))
            weights[key] = known[id(quantizer)]
        static = layer.static_input
        inputs: _Inputs = static.export() if static is not None and static.ready else (layer.input_spec, None, None)
    except DyBitError as error:
        raise DyBitError(f"layer {name!r}: {error}") from None
    return weights, inputs


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """Returns the divergence of a student's predictions from its teacher's (Hinton et al., 2015). Add it to a loss.

    Args:
        student: Logits of shape (..., classes).
        teacher: Logits of the same shape; no gradient flows into them.
        temperature: Divides both logits; above 0.

    Returns:
        KL(teacher ‖ student) · temperature², averaged over all dimensions but the classes.

    Raises:
        DyBitError: ``temperature`` is not above 0.
    """
    if not temperature > 0:
        raise DyBitError(f"temperature must be above 0, not {temperature!r}")
    goal = functional.log_softmax(teacher.detach().float() / temperature, dim=-1)
    found = functional.log_softmax(student.float() / temperature, dim=-1)
    return (goal.exp() * (goal - found)).sum(-1).mean() * temperature**2
