"""GPTQ of a whole model, block by block: each block is rounded for the inputs that the rounded blocks give."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dybit.errors import DyBitError
from dybit.layers.kinds import has_dynamic_inputs, is_embedding, layout, weight_names
from dybit.models.calibration import InputStatistics
from dybit.models.plan import Plan, Ties, weight_spec
from dybit.models.running import Progress, evaluating, observing, run_batch
from dybit.ptq.rounding import blocks
from dybit.ptq.rounding.gptq import DEFAULTS, Settings, gptq
from dybit.ptq.rounding.hessian import Hessians, size
from dybit.ptq.rounding.nearest import observe, quantize_layer
from dybit.ptq.rounding.store import Store
from dybit.tensors.quantized_tensor import QuantizedTensor, TensorSpec

_GATHERED = 1 << 30  # bytes of Hessians gathered at once for layers outside of blocks
_FACTORS = 7  # memory to factorize a Hessian, in its own size: double precision, thrice, and the result


def gptq_(
    model: nn.Module,
    plans: Sequence[Plan],
    batches: Sequence[Any],
    *,
    settings: Settings = DEFAULTS,
    workdir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> None:
    """Quantizes the layers of a plan in place by GPTQ.

    Where the model is a sequence of blocks (see ``find``), a block is given what the quantized
    blocks before it return, and only its Hessians are in memory. Layers outside of the blocks, or all where there are
    none, are given the inputs of the model as it is then, in portions of a gigabyte of Hessians. Layers that
    calibration does not reach are rounded to the nearest.

    Args:
        model: The model.
        plans: The layers.
        batches: Calibration batches.
        settings: How weights are rounded.
        workdir: Where finished layers are kept, and looked up first; None keeps nothing.
        progress: Called with (done, total, text) before every layer.

    Raises:
        DyBitError: Calibration does not fit, or the Hessians do not fit into memory.
    """
    with evaluating(model), blocks.without_cache(model):
        _Run(model, plans, batches, settings, workdir, progress).run()


class _Run:
    """GPTQ of one model."""

    def __init__(
        self,
        model: nn.Module,
        plans: Sequence[Plan],
        batches: Sequence[Any],
        settings: Settings,
        workdir: str | os.PathLike[str] | None,
        progress: Progress | None,
    ) -> None:
        self.model, self.plans, self.batches, self.settings = model, plans, batches, settings
        self.report = progress or (lambda done, total, text: None)
        self.done = 0
        self.ties = Ties(plans)
        recipes = [(plan.name, plan.recipe) for plan in plans]
        self.store = Store(workdir, model, recipes, settings, list(batches))
        self.statistics: dict[str, InputStatistics] = {}
        sizes = {
            plan.name: sum(getattr(plan.module, key).numel() for key in weight_names(plan.module)) for plan in plans
        }
        targets = [plan.name for plan in plans if _is_target(plan)]
        self.recording = blocks.Recording(blocks.find(model, batches[0], {name: sizes[name] for name in targets}))

    def run(self) -> None:
        inside = [[plan for plan in self.plans if _within(plan, block)] for block in self.recording.blocks]
        held = {plan.name for part in inside for plan in part}
        portions = _portions([plan for plan in self.plans if plan.name not in held])
        for part in [*inside, *portions]:
            _check_memory(part)
        first = portions[0] if portions else []
        with self._gathering(first) as hessians, self.recording.capturing():
            found = observe(self.model, self.plans, self.batches, lambda text: self.report(0, len(self.plans), text))
        self.statistics = dict(found)
        for index, part in enumerate(inside):
            self._quantize_block(index, part, last=index + 1 == len(inside))
        for number, part in enumerate(portions):
            if number:
                with self._gathering(part) as hessians, torch.no_grad():
                    for place, batch in enumerate(self.batches):
                        run_batch(self.model, batch, f"calibration batch {place}")
            self._quantize(part, hessians)

    def _quantize_block(self, index: int, part: Sequence[Plan], last: bool) -> None:
        hessians = Hessians()
        if any(
            self._kept(plan, name) is None for plan in part if _is_target(plan) for name in weight_names(plan.module)
        ):
            with self._gathering(part) as hessians:
                self.recording.step(index, keep=False)
        self._quantize(part, hessians)
        if not last:
            self.recording.step(index, keep=True)

    def _quantize(self, part: Sequence[Plan], hessians: Hessians) -> None:
        for plan in part:
            self.report(self.done, len(self.plans), plan.name)
            self.done += 1
            choose = partial(self._choose, plan, hessians) if _is_target(plan) else None
            quantize_layer(plan, self.statistics.get(plan.name), self.ties, choose)

    def _choose(
        self, plan: Plan, hessians: Hessians, weight: Tensor, name: str, spec: TensorSpec
    ) -> QuantizedTensor | None:
        kept = self._kept(plan, name)
        hessian = None if kept else hessians.of(plan.name, name, spec, shrinkage=self.settings.shrinkage)
        if hessian is None:
            return kept
        recipe = plan.recipe
        found = gptq(weight, spec, hessian, method=recipe.method, percentile=recipe.percentile, settings=self.settings)
        self.store.put(f"{plan.name}.{name}", found)
        return found

    def _kept(self, plan: Plan, name: str) -> QuantizedTensor | None:
        """A weight that an earlier run finished."""
        shape = tuple(getattr(plan.module, name).shape)
        return self.store.get(f"{plan.name}.{name}", weight_spec(plan.recipe, shape, **layout(plan.module)))

    @contextmanager
    def _gathering(self, part: Sequence[Plan]) -> Iterator[Hessians]:
        """Gathers the Hessians of some layers while the body runs them."""
        hessians = Hessians()
        layers = {plan.name: plan.module for plan in part if _is_target(plan)}
        with ExitStack() as stack:
            if layers:
                stack.enter_context(observing(layers, hessians.observe))
            yield hessians


def _is_target(plan: Plan) -> bool:
    kept = is_embedding(plan.module) or has_dynamic_inputs(plan.module)  # these are rounded to the nearest
    return plan.recipe.weight_family is not None and not kept


def _within(plan: Plan, block: blocks.Block) -> bool:
    return plan.name == block.name or plan.name.startswith(block.name + ".")


def _needs(plan: Plan) -> int:
    """Bytes of the Hessians of a layer."""
    if not _is_target(plan):
        return 0
    names = weight_names(plan.module)
    return sum(
        size(plan.module, weight_spec(plan.recipe, tuple(getattr(plan.module, n).shape), **layout(plan.module)))
        for n in names
    )


def _portions(plans: Sequence[Plan]) -> list[list[Plan]]:
    """Layers in portions whose Hessians are gathered at once."""
    portions: list[list[Plan]] = []
    room = 0
    for plan in plans:
        need = _needs(plan)
        if not portions or (need > room and portions[-1]):
            portions.append([])
            room = _GATHERED
        portions[-1].append(plan)
        room -= need
    return portions


def _check_memory(part: Sequence[Plan]) -> None:
    """Checks, before any work, that the Hessians of some layers fit into the memory that is free."""
    if not part:
        return
    widest = max(part, key=_needs)
    need, free = sum(_needs(plan) for plan in part) + _FACTORS * _needs(widest), _free_memory()
    if free is not None and need > free:
        raise DyBitError(
            f"algorithm 'gptq' needs up to {need / 1e9:.1f} GB for Hessians, most of it for layer {widest.name!r}, but "
            f"{free / 1e9:.1f} GB are free; keep that layer by a rule, or use algorithm 'rtn'"
        )


def _free_memory() -> int | None:
    """Bytes of memory that can be had, where the system says so."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return None
