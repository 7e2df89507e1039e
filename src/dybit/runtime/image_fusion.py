"""Fuses a quantized model layer by layer: between quantized convolutions, activations stay integers.

:mod:`dybit.runtime.activations` fuses linear layers with activations, :mod:`dybit.runtime.feed_forward` whole
feed-forward blocks.

The model is traced with ``torch.fx``. A convolution absorbs the addition and the clamping (ReLU, ReLU6, …) after it,
rounds its results to the input format of the next convolutions, adds their border, and passes them on as an image of
significands (:mod:`dybit.operators.integer_conv`).
"""

from __future__ import annotations

import copy
import operator
import warnings
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from dybit.errors import DyBitError, DyBitWarning
from dybit.layers.forwards import is_convolution
from dybit.layers.quantized import FusedModule, Quantized
from dybit.operators.images import ImageFormat, UnknownError
from dybit.operators.input_rounding import input_format
from dybit.runtime.activations import FusedLinear, fuse_activations
from dybit.runtime.aliases import Aliases, writes_first
from dybit.runtime.feed_forward import FeedForward, fuse_feed_forward
from dybit.runtime.image_layers import FusedConv, Rounding
from dybit.runtime.memory_format import is_visible, origin
from dybit.runtime.trace import Tracer, augment, called, is_bare

_INFINITY = float("inf")
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_RECTIFIERS = (functional.relu, torch.relu, torch.relu_, functional.relu_, "relu", "relu_")
_PADDINGS = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
_CLAMPS = (torch.clamp, torch.clamp_, torch.clip, "clamp", "clamp_", "clip")


class Fused(FusedModule):
    """A model with fused convolutions; :func:`fuse_layers` makes it.

    The model runs layer by layer if an activation is NaN, if inputs are not float32 or have no batch, if gradients are
    recorded, and if an absorbed layer has got hooks or another forward. Hooks of the model run. Under ``torch.compile``
    and ``torch.export``, which see only the graph, NaN and unbatched inputs raise :class:`DyBitError`.

    Attributes:
        graph: The fused graph, a ``torch.fx.GraphModule``.
        fused: The number of convolutions that pass on integers.

    Args:
        model: The model that runs layer by layer.
        absorbed: Modules that the graph does not call. The graph computes what they do without hooks.
        writes: Whether the graph may write to its inputs or attributes.
    """

    def __init__(
        self, graph: fx.GraphModule, model: nn.Module, fused: int, absorbed: tuple[nn.Module, ...], writes: bool
    ) -> None:
        super().__init__()
        self.graph = graph
        self.fused = fused
        self._model = (model,)  # not registered as a submodule: the graph has the same layers
        self._absorbed, self._writes = absorbed, writes

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  # the model's own signature
        """As the model."""
        if torch.compiler.is_compiling():
            return self.graph(*args, **kwargs)
        (model,) = self._model
        if is_bare(model):
            return self._run(*args, **kwargs)
        if "forward" not in vars(model):
            model = copy.copy(model)  # which has the same hooks
            vars(model)["forward"] = self._run
        return model(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Computes the model without its hooks."""
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        watched = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        (model,) = self._model
        if (
            watched
            or any(x.is_floating_point() and x.dtype != torch.float32 for x in tensors)
            or not all(map(is_bare, self._absorbed))
        ):
            return model.forward(*args, **kwargs)
        before = [(x, x.detach().clone()) for x in (tensors + self._attributes() if self._writes else ())]
        try:
            return self.graph(*args, **kwargs)
        except UnknownError:
            for x, value in before:
                x.detach().copy_(value)
            return model.forward(*args, **kwargs)

    def _attributes(self) -> list[Tensor]:
        """Returns the parameters and buffers that the graph reads as such."""
        read = {str(node.target) for node in self.graph.graph.nodes if node.op == "get_attr"}
        return [x for x in (operator.attrgetter(name)(self.graph) for name in sorted(read)) if isinstance(x, Tensor)]


class _Tracer(Tracer):
    """Treats quantized layers as leaves."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Quantized | FusedLinear | FeedForward) or super().is_leaf_module(m, module_qualified_name)


@dataclass
class _Stage:
    """A convolution in the graph and the nodes it absorbs."""

    conv: fx.Node
    layer: Quantized
    source: fx.Node  # before padding
    padding: tuple[int, ...]
    pads: tuple[fx.Node, ...]
    addend: fx.Node | None = None
    limits: tuple[float, float] = (-_INFINITY, _INFINITY)
    taken: list[fx.Node] = field(default_factory=list)  # addition and clamp

    @property
    def result(self) -> fx.Node:
        """The node whose value other nodes use."""
        return self.taken[-1] if self.taken else self.conv

    @property
    def rounding(self) -> tuple[str, float, float | None]:
        """Format, scale and offset of the input. Convolutions that agree can share an image."""
        spec, (scale, offset) = self.layer.input_spec, self.scales
        assert spec is not None
        return spec.format, float(scale), None if offset is None else float(offset)

    @property
    def scales(self) -> tuple[Tensor, Tensor | None]:
        """Scale and offset of its input."""
        return cast(Tensor, self.layer.input_scale), self.layer._buffers.get("input_offset")


def fuse_layers(model: nn.Module) -> nn.Module:
    """Fuses what follows each layer into it.

    Convolutions with static input scales absorb the residual addition and the ReLU, ReLU6 or clamp after them. They
    pass their results on as integers to the next such convolutions, also through zero padding. If other modules use
    the results, they are also computed in floating point. With the compiled kernels, results equal those of the model
    bit for bit. Other modules between convolutions may get channels-last values, which torch may round differently in
    the last bit. In plain torch, floating-point sums may differ in their order.

    A quantized linear layer absorbs a ReLU, GELU, SiLU or quick GELU in the same parent module that is its only user.
    The kernels compute it within 2e-7 of the exact function. Feed-forward blocks of transformers (two layers in a row,
    or the product of two layers followed by a third) become one kernel call with the same results.

    Args:
        model: A quantized model, not fused. It is not changed; layers are shared with it.

    Returns:
        A :class:`Fused` model if it has convolutions with static input scales, else one of its own class. If nothing
        can be fused, ``model`` itself, with a warning.

    Raises:
        DyBitError: ``torch.fx`` cannot trace the model.
    """
    linear, activations = fuse_activations(model)
    if activations:
        linear = fuse_feed_forward(linear)
    if not any(_takes_images(module) for module in model.modules()):
        if activations:
            return linear
        return _unchanged(
            model, "no convolution has a static input scale, and no linear layer is followed by an activation"
        )
    tracer = _Tracer()
    try:
        graph = tracer.trace(linear)
    except Exception as error:  # tracing runs the model's own code on proxies, and that fails in any way it likes
        raise DyBitError(f"model cannot be traced by torch.fx: {error}") from error
    module = fx.GraphModule(linear, graph, type(model).__name__)
    absorbed = [*tracer.entered, *_drop_identities(module)]
    aliases = Aliases(module)
    stages = _stages(module, aliases)
    if not any(stage.result is not stage.conv for stage in stages) and not _links(stages):
        return linear if activations else _unchanged(model, _obstacle(stages, module))
    for stage in stages:
        modules = (called(node, module) for node in (stage.conv, *stage.taken, *stage.pads))
        absorbed += (m for m in modules if m is not None)
    fused = _rewrite(module, stages, aliases)
    writes = bool(aliases.writes_outside())
    return Fused(module, model, fused, tuple(dict.fromkeys(absorbed)), writes).train(model.training)


def _unchanged(model: nn.Module, why: str) -> nn.Module:
    warnings.warn(f"fuse found nothing to do: {why}", DyBitWarning, stacklevel=4)
    return model


def _obstacle(stages: list[_Stage], module: fx.GraphModule) -> str:
    """Why none of the convolutions can be fused."""
    for stage in stages:
        if any(isinstance(called(user, module), nn.modules.batchnorm._BatchNorm) for user in stage.result.users):
            return (
                f"convolution {stage.conv.target!r} is followed by a batch norm that is not merged into it; "
                "call model.eval() before quantize_, which then merges it"
            )
    return (
        "no convolution is followed by a ReLU, clamp or addition, or by another convolution with a static input scale"
    )


def _drop_identities(module: fx.GraphModule) -> list[nn.Module]:
    """Removes identities, such as those in place of folded batch norms, and returns them."""
    dropped: list[nn.Module] = []
    for node in list(module.graph.nodes):
        identity = called(node, module)
        if type(identity) is nn.Identity and is_bare(identity) and len(node.all_input_nodes) == 1:
            node.replace_all_uses_with(node.all_input_nodes[0])
            module.graph.erase_node(node)
            dropped.append(identity)
    return dropped


def _takes_images(module: nn.Module) -> bool:
    """Whether a module is a convolution whose inputs can be images."""
    if not isinstance(module, Quantized) or not is_convolution(module) or module.input_spec is None:
        return False
    if not is_bare(module):
        return False
    conv, spec = cast(nn.Conv2d, module), module.input_spec
    return (
        spec.mode == "static"
        and conv.padding_mode == "zeros"
        and (not any(conv._reversed_padding_repeated_twice) or module.input_rounding().keeps_zero())
        and module.float_dtype == torch.float32
        and input_format(spec.format) is not None
    )


def _stages(module: fx.GraphModule, aliases: Aliases) -> list[_Stage]:
    """Returns the convolutions that take images, each with the nodes it absorbs, in an order in which they can run."""
    stages = []
    for node in module.graph.nodes:
        layer = called(node, module)
        if layer is None or not _takes_images(layer) or len(node.all_input_nodes) != 1:
            continue
        padding = _paired(cast(nn.Conv2d, layer)._reversed_padding_repeated_twice)
        source, pads = node.all_input_nodes[0], []
        whole = cast(Quantized, layer).input_rounding().keeps_zero()
        while whole and (added := _zeros(source, module, len(padding))) is not None:
            padding = tuple(a + b for a, b in zip(padding, added, strict=True))
            pads.append(source)
            source = source.all_input_nodes[0]
        stage = _Stage(node, cast(Quantized, layer), source, padding, tuple(pads))
        if _is_steady(stage, aliases):
            stages.append(stage)
    own = {stage.conv for stage in stages}
    for stage in stages:
        _take_up(stage, module, aliases, own)
    return sorted(stages, key=lambda stage: aliases.order[stage.result])


def _is_steady(stage: _Stage, aliases: Aliases) -> bool:
    """Whether what a convolution reads stays the same from its source to its result, where the fused one runs."""
    end, own = stage.result, stage.taken
    inputs = all(aliases.holds(value, stage.source, end, own) for value in (stage.source, *stage.pads))
    return inputs and aliases.holds_outside(stage.conv, end, own)  # as a bias


def _take_up(stage: _Stage, module: fx.GraphModule, aliases: Aliases, own: set[fx.Node]) -> None:
    """Lets a convolution absorb an addition and a clamp that are its only users."""
    order = aliases.order
    user = _only_user(stage.result)
    if user is not None and _is_addition(user):
        others = [arg for arg in user.args[:2] if arg is not stage.result]
        other = others[0] if len(others) == 1 else None
        # Of two convolutions the later one adds, since the other has already run.
        rival = other in own and len(other.users) == 1 and order[other] > order[stage.conv]  # type: ignore[union-attr,index]
        if isinstance(other, fx.Node) and not rival:
            changed = user.args[0] is other and writes_first(user, module)  # then the result must be all that is read
            if not changed or aliases.is_last(other, user):
                _take(stage, user, aliases, addend=other)
    user = _only_user(stage.result)
    limits = None if user is None else _limits(user, module)
    if user is not None and limits is not None and _take(stage, user, aliases):
        stage.limits = limits


def _take(stage: _Stage, node: fx.Node, aliases: Aliases, addend: fx.Node | None = None) -> bool:
    """Absorbs a node if nothing changes in between what the convolution and the addition read."""
    stage.taken.append(node)
    stage.addend = stage.addend or addend
    steady = stage.addend is None or aliases.holds(stage.addend, stage.taken[0], node, stage.taken)
    if steady and _is_steady(stage, aliases):
        return True
    stage.taken.pop()
    stage.addend = stage.addend if stage.taken else None
    return False


def _is_addition(node: fx.Node) -> bool:
    """Whether a node adds its first two arguments and does nothing else."""
    if node.op == "call_module" or node.kwargs:
        return False
    if node.target is augment:
        return node.args[2] == "iadd"
    return node.target in _ADDITIONS and len(node.args) == 2


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _limits(node: fx.Node, root: nn.Module) -> tuple[float, float] | None:
    """Returns the limits between which a node clamps its only tensor; None if it does something else."""
    module = called(node, root)
    if module is not None and not is_bare(module):
        return None
    if module is not None:
        if type(module) is nn.ReLU:
            return 0.0, _INFINITY
        if type(module) in (nn.ReLU6, nn.Hardtanh):
            clamp = cast(nn.Hardtanh, module)
            return float(clamp.min_val), float(clamp.max_val)
        return None
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target in _RECTIFIERS:
        return 0.0, _INFINITY
    if node.target is functional.relu6:
        return 0.0, 6.0
    values = [*node.args[1:3]]
    defaults: list[Any]
    if node.target is functional.hardtanh:
        names, defaults = ("min_val", "max_val"), [-1.0, 1.0]
    elif node.target in _CLAMPS:
        names, defaults = ("min", "max"), [None, None]
    else:
        return None
    given = [*values, *defaults[len(values) :]]
    low, high = (node.kwargs.get(name, value) for name, value in zip(names, given, strict=True))
    low, high = -_INFINITY if low is None else low, _INFINITY if high is None else high
    if not (isinstance(low, int | float) and isinstance(high, int | float) and low <= high):
        return None
    return float(low), float(high)


def _zeros(node: fx.Node, root: nn.Module, count: int) -> tuple[int, ...] | None:
    """Returns the zeros that a node adds before and after each of the last dimensions; None for other nodes."""
    module = called(node, root)
    if type(module) in _PADDINGS and is_bare(module):  # type: ignore[arg-type]
        padding: Any = module.padding  # type: ignore[union-attr]
        value: Any = module.value  # type: ignore[union-attr]
    elif node.op == "call_function" and node.target is functional.pad:
        named = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | node.kwargs
        if named.get("mode", "constant") != "constant":
            return None
        padding, value = named["pad"], named.get("value")
    else:
        return None
    whole = (
        isinstance(padding, tuple | list)
        and len(padding) <= count
        and all(isinstance(n, int) and n >= 0 for n in padding)
    )
    return _paired([*padding, *(0,) * (count - len(padding))]) if whole and not value else None


def _paired(padding: Any) -> tuple[int, ...]:  # noqa: ANN401
    """Reverses the order of padding: torch lists the last dimension first."""
    return tuple(n for i in range(len(padding) - 2, -1, -2) for n in padding[i : i + 2])


def _links(stages: list[_Stage]) -> bool:
    """Whether a convolution uses the result of another."""
    results = {stage.result for stage in stages}
    return any(stage.source in results for stage in stages)


def _border(stages: list[_Stage]) -> tuple[int, ...]:
    """Returns the border that an image needs for all of its convolutions."""
    return tuple(max(sizes) for sizes in zip(*(stage.padding for stage in stages), strict=True))


def _rewrite(module: fx.GraphModule, stages: list[_Stage], aliases: Aliases) -> int:
    """Replaces the stages by fused convolutions. Returns how many produce an image."""
    graph = module.graph
    consumers: dict[fx.Node, list[_Stage]] = {}
    for stage in stages:
        consumers.setdefault(stage.source, []).append(stage)
    images: dict[tuple[fx.Node, tuple[Any, ...]], tuple[fx.Node, ImageFormat]] = {}
    values: dict[fx.Node, fx.Node] = {}  # floating-point results by the nodes that they replace
    inputs: dict[fx.Node, fx.Node] = {}  # whose memory format the results have in the model
    absorbed = {node for stage in stages for node in (stage.conv, *stage.taken)}
    fused = 0

    def add(name: str, made: nn.Module, *args: fx.Node | None) -> fx.Node:
        module.add_submodule(name, made)
        return graph.call_module(name, tuple(arg and values.get(arg, arg) for arg in args))

    for i, stage in enumerate(stages):
        graph.inserting_before(stage.result)
        key = (stage.source, stage.rounding)
        if key not in images:
            sharers = [other for other in consumers[stage.source] if other.rounding == stage.rounding]
            made = ImageFormat(stage.rounding[0], _border(sharers))
            images[key] = add(f"rounding_{i}", Rounding(*stage.scales, made), stage.source), made
        image, source = images[key]
        following = consumers.get(stage.result, [])
        sharers = [other for other in following if other.rounding == following[0].rounding]
        out: ImageFormat | None = None
        scales: tuple[Tensor | None, Tensor | None] = (None, None)
        if sharers:
            out, scales = ImageFormat(following[0].rounding[0], _border(sharers)), following[0].scales
            fused += 1
        keep = out is None or not all(_leads_to(user, sharers) for user in stage.result.users)
        stage.layer.inputs_fixed = True  # share and pass on images between convolutions whose scales agree
        conv = FusedConv(stage.layer, source, stage.padding, stage.limits, keep, out, *scales)
        start = inputs[stage.result] = origin(stage.source, module, inputs)
        like = start if is_visible(stage.result, module, aliases, absorbed) else None
        call = add(f"conv_{i}", conv, image, stage.addend, like)
        if keep:
            values[stage.result] = graph.call_function(operator.getitem, (call, 0))
        if out is not None:
            images[stage.result, following[0].rounding] = graph.call_function(operator.getitem, (call, 1)), out
    for old, new in values.items():
        old.replace_all_uses_with(new)
    replaced = {node for stage in stages for node in (stage.conv, *stage.taken, *stage.pads)}
    for node in reversed(list(graph.nodes)):
        if node in replaced and not node.users:
            graph.erase_node(node)
    module.delete_all_unused_submodules()
    graph.lint()
    module.recompile()
    return fused


def _leads_to(node: fx.Node, stages: list[_Stage]) -> bool:
    """Whether a user of a value is one of the given convolutions, or a padding used only by them."""
    if any(node is stage.conv for stage in stages):
        return True
    return any(node in stage.pads for stage in stages) and all(_leads_to(user, stages) for user in node.users)
