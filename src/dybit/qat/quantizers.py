"""Quantizers of the weights and inputs of layers in training: learned scales, codebooks, and when to update them.

All state is in parameters and buffers, so that a state dict resumes training. Choices made from data are in buffers,
which distributed training copies from the first process to the others. A scale is the product of a chosen scale (a
buffer) and a learned factor (the exponential of a parameter): its sign never changes, and weight decay pulls it
towards the chosen scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from dybit.errors import DyBitError
from dybit.formats import catalogue
from dybit.formats.codebook import Family
from dybit.kernels.transforms import outside_transforms, refuse_transformed
from dybit.layers.description import KEY, read_text, text_tensor
from dybit.layers.input_spec import InputSpec
from dybit.models.calibration import InputStatistics, choose_input
from dybit.qat.gradients import Layout, round_input, round_weight, spacing
from dybit.recipe import LayerRecipe
from dybit.tensors.encoding import check_weight, encode_matrix
from dybit.tensors.quantized_tensor import QuantizedTensor
from dybit.tensors.scale_search import Scales, choose_scales
from dybit.tensors.scale_types import largest_scale, nearest_scale

_SAMPLE = 1 << 14  # observed elements of an input that are kept
_SEED = 0x0DB17
_ROUNDING = 1 - 2.0**-10  # a scale that exceeds the factor by rounding only does not need a larger one


@dataclass(frozen=True)
class Schedule:
    """When training passes observe inputs and update codebooks.

    Args:
        observe: Passes that observe the inputs of a layer before its scale is chosen, without calibration.
        refresh_every: Passes between two updates of codebooks; 0 to keep the first codebooks.
        freeze_after: The last pass that updates codebooks.
        hysteresis: The relative reduction of the error that a codebook must bring to replace the current one.

    Raises:
        DyBitError: A value is out of range.
    """

    observe: int = 16
    refresh_every: int = 100
    freeze_after: int = 1000
    hysteresis: float = 0.1

    def __post_init__(self) -> None:
        """Checks the values."""
        for name, least in (("observe", 1), ("refresh_every", 0), ("freeze_after", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise DyBitError(f"{name} must be an integer of at least {least}, not {value!r}")
        if not isinstance(self.hysteresis, int | float) or not 0 <= self.hysteresis < 1:
            raise DyBitError(f"hysteresis must be at least 0 and below 1, not {self.hysteresis!r}")

    def due(self, passes: int) -> bool:
        """Whether a pass, counted from 1, updates codebooks."""
        return self.refresh_every > 0 and passes <= self.freeze_after and passes % self.refresh_every == 0


class _Quantizer(nn.Module):
    """Base of both quantizers: counts passes and keeps its tensors in float32."""

    passes: Tensor
    log_scale: nn.Parameter

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64, device="cpu"))

    def count(self) -> bool:
        """Counts a training pass and returns whether to update codebooks.

        A pass that gradient checkpointing repeats during the backward pass is not counted again.
        """
        if not self.training or in_backward():
            return False
        with outside_transforms():
            return self.schedule.due(int(self.passes.add_(1)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Quantizer:
        """Moves tensors but keeps their types: half precision would change the scales."""
        before = [(table, name, table[name]) for table in (self._buffers, self._parameters) for name in table]
        before = [(table, name, old.data if old is not None else None) for table, name, old in before]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for table, name, old in before:
            new = table[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                new.data = old.to(new.device)
        return self


def in_backward() -> bool:
    """Whether the backward pass is running."""
    return bool(torch._C._current_graph_task_id() != -1)


class WeightQuantizer(_Quantizer):
    """Rounds a weight with learned scales.

    Args:
        weight: The quantized weight to start from.
        recipe: How codebooks are chosen: its ``method`` and ``percentile``.
        schedule: When codebooks are chosen.
        learned: Whether to learn scales.

    Attributes:
        log_scale: Logarithm of the learned factors, float32 of shape ``spec.scale_shape``.
        scale: The chosen scales, of the same shape.
        choice: The codebook of every scale, uint8 of the same shape; None for a family of one.
        tensor_scale: The factor of E4M3 scales, float32 of shape (1,), or None.
    """

    scale: Tensor
    choice: Tensor | None
    tensor_scale: Tensor | None

    def __init__(self, weight: QuantizedTensor, recipe: LayerRecipe, schedule: Schedule, learned: bool = True) -> None:
        super().__init__(schedule)
        self.spec = weight.spec
        self.method, self.percentile = recipe.method, recipe.percentile
        scale, choice = weight.scales(), weight.choices()
        self.log_scale = nn.Parameter(torch.zeros_like(scale), requires_grad=learned)
        self.register_buffer("scale", scale.clone())
        self.register_buffer("choice", None if choice is None else choice.expand(scale.shape).clone())
        self.register_buffer("tensor_scale", weight.tensor_scale)

    @torch.no_grad()
    def scales(self) -> Tensor:
        """Returns the scales in use, rounded to the scale type: float32 of shape ``spec.scale_shape``."""
        return nearest_scale(self.scale * self.log_scale.exp(), self.spec.scale, self.factor())

    @torch.no_grad()
    def factor(self) -> Tensor | None:
        """Returns the factor of E4M3 scales in use: the chosen one, times a power of two if scales have outgrown it."""
        if self.tensor_scale is None:
            return None
        ratio = (self.scale * self.log_scale.exp()).abs().amax() / largest_scale("e4m3") / self.tensor_scale
        return torch.ldexp(self.tensor_scale, (ratio * _ROUNDING).log2().ceil().clamp(min=0))

    def forward(self, weight: Tensor) -> Tensor:
        """Rounds a weight of shape ``spec.shape`` to the values of its codes."""
        refuse_transformed(weight, self.log_scale)
        with outside_transforms():
            return round_weight(weight, self.log_scale, self.scales(), self.scale, self.choice, Layout(self.spec))

    def lookup(self, rows: Tensor, index: Tensor) -> Tensor:
        """Rounds some rows of the matrix, (count, columns), selected by ``index`` of shape (count,)."""
        refuse_transformed(rows, self.log_scale)
        log_scale, scale, chosen, choice = self.log_scale, self.scales(), self.scale, self.choice
        if chosen.shape[0] > 1:
            log_scale, scale, chosen = (table.index_select(0, index) for table in (log_scale, scale, chosen))  # type: ignore[assignment]
            choice = None if choice is None else choice.index_select(0, index)
        return round_weight(rows, log_scale, scale, chosen, choice, Layout(self.spec, rows=True))

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> None:
        """Updates codebooks, and the scale of every codebook that changes."""
        matrix = self.spec.to_matrix(weight.detach()).float()
        if self.choice is None or not bool(torch.isfinite(matrix).all()):
            return
        chosen = choose_scales(
            matrix,
            self.spec.formats,
            granularity=self.spec.granularity,
            group_size=self.spec.group_size,
            scale_type=self.spec.scale,
            choice_granularity=self.spec.choice,
            method=self.method,
            percentile=self.percentile,
            incumbent=self.choice,
            hysteresis=self.schedule.hysteresis,
        )
        assert chosen.choice is not None
        changed = chosen.choice != self.choice
        # The learned factor stays: distributed training copies only buffers from process to process. They are
        # replaced and not written to, since a backward pass may still need the old ones.
        self.scale = torch.where(changed, chosen.scale / self.log_scale.exp(), self.scale)
        self.choice = chosen.choice
        if self.tensor_scale is not None:
            self.tensor_scale = torch.full_like(self.tensor_scale, chosen.tensor_scale)

    def export(self, weight: Tensor) -> QuantizedTensor:
        """Packs the weight into codes, with the values that :meth:`forward` returns.

        Raises:
            DyBitError: The weight or a scale is not finite.
        """
        weight = weight.detach()
        check_weight(weight, self.spec.shape)
        scale = self.scales()
        check_scale(scale)
        factor = self.factor()
        scales = Scales(scale, self.choice, 1.0 if factor is None else float(factor), 0.0)
        return encode_matrix(self.spec.to_matrix(weight), self.spec, scales)

    def extra_repr(self) -> str:
        """The family and the granularity of the scales."""
        return f"{self.spec.family}/{self.spec.group_size or self.spec.granularity}"


class InputQuantizer(_Quantizer):
    """Rounds an input with a learned static scale, after observing inputs to choose the first one.

    Args:
        recipe: How the format, the scale and the offset are chosen.
        schedule: When they are chosen.
        learned: Whether to learn scale and offset.

    Attributes:
        log_scale: Logarithm of the learned factor, float32 of shape (1,).
        shift: The learned part of the offset, in steps of the chosen scale: float32 of shape (1,); None if the recipe
            allows no offset.
        scale: The chosen scale, float32 of shape (1,).
        offset: The chosen offset, float32 of shape (1,).
        choice: Index of the chosen candidate, int64 of shape (); -1 before there is one.
        candidates: Every possible choice: (format, whether it has an offset).
        dybit_spec: Always None. Distributed checkpoints look the keys of a state dict up as attributes.
    """

    scale: Tensor
    offset: Tensor
    choice: Tensor
    shift: nn.Parameter | None
    dybit_spec: Tensor | None = None

    def __init__(self, recipe: LayerRecipe, schedule: Schedule, learned: bool = True) -> None:
        super().__init__(schedule)
        assert recipe.activation_families is not None
        self.families: tuple[Family, Family | None] = recipe.activation_families
        self.method, self.percentile = recipe.activation_method, recipe.percentile
        unsigned = self.families[1]
        self.offsets = recipe.activation_offset and unsigned is not None
        self.candidates = [(book.name, False) for family in self.families if family for book in family.books]
        if self.offsets:
            self.candidates += [(book.name, True) for book in cast(Family, unsigned).books]
        zero = torch.zeros(1, dtype=torch.float32, device="cpu")
        self.log_scale = nn.Parameter(zero, requires_grad=learned)
        shift = nn.Parameter(zero.clone(), requires_grad=learned) if self.offsets else None
        self.register_parameter("shift", shift)
        self.register_buffer("scale", zero + 1)
        self.register_buffer("offset", zero.clone())
        self.register_buffer("choice", torch.tensor(-1, dtype=torch.int64, device="cpu"))
        # Not buffers, since processes may see batches of different sizes; a resumed run starts observing again.
        self.seen = 0
        self._sample = torch.empty(0, dtype=torch.float32, device="cpu")
        self._extremes = (0.0, 0.0)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:  # noqa: ANN401
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + KEY] = text_tensor(self.candidates)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:  # noqa: ANN401
        """Refuses a choice from other candidates, which would be another format here."""
        stored, choice, errors = state_dict.pop(prefix + KEY, None), state_dict.get(prefix + "choice"), rest[-1]
        try:
            if stored is not None and not (isinstance(stored, Tensor) and stored.is_meta):
                found = read_text(stored)
                own = [list(candidate) for candidate in self.candidates]
                if found != own:
                    raise DyBitError(
                        f"static inputs choose from {found!r:.100} in the state dict and from {own!r:.100} in the "
                        "model; prepare with the same recipe"
                    )
            known = isinstance(choice, Tensor) and choice.numel() == 1 and not choice.is_meta
            if known and not -1 <= int(choice) < len(self.candidates):
                raise DyBitError(f"choice must be below {len(self.candidates)}, not {int(choice)}")
        except DyBitError as error:
            errors.append(f"{prefix.rstrip('.')!r} stays as it is: {error}")
            return
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @property
    def ready(self) -> bool:
        """Whether a scale has been chosen."""
        return int(self.choice) >= 0

    def set_(self, spec: InputSpec, scale: Tensor, offset: Tensor | None) -> None:
        """Sets format, scale and offset. Training then changes the scale by a factor and the offset by steps."""
        self.choice = torch.full_like(self.choice, self.candidates.index((spec.format, spec.offset)))
        self.scale = scale.to(self.scale.device) / self.log_scale.detach().exp()
        if offset is not None:
            self.offset = offset.to(self.offset.device) - self._moved()

    def export(self) -> tuple[InputSpec, Tensor, Tensor | None]:
        """Returns the format, the scale and the offset in use, float32 of shape (1,) or None.

        Raises:
            DyBitError: The scale or the offset is not finite.
        """
        name, has_offset = self.candidates[int(self.choice)]
        scale = nearest_scale(self.scale * self.log_scale.detach().exp(), "fp32")
        check_scale(scale)
        offset = self.offset + self._moved() if has_offset else None
        check_scale(offset)
        return InputSpec(name, offset=has_offset), scale, offset

    def _moved(self) -> Tensor:
        assert self.shift is not None
        book = catalogue.family(self.candidates[int(self.choice)][0]).books[0]
        return self.shift.detach() * (self.scale * spacing(book))

    def forward(self, x: Tensor) -> Tensor:
        """Rounds an input, floating point of any shape. Before a scale is chosen, returns the values unchanged."""
        refuse_transformed(x, self.log_scale)
        due = self.count() and x.numel() > 0
        if not self.ready:
            self.settle()
        if not self.ready:
            if self.training and not in_backward() and x.numel():
                self._observe(x.detach())
            idle = self.log_scale if self.shift is None else self.log_scale + self.shift
            return x + (idle.sum() * 0.0).to(x.dtype)  # distributed training requires that every parameter is used
        if due:
            self._refresh(x.detach())
        name, has_offset = self.candidates[int(self.choice)]
        scale = nearest_scale(self.scale * self.log_scale.detach().exp(), "fp32")
        offset = self.offset + self._moved() if has_offset else None
        return round_input(x, self.log_scale, self.shift, scale, self.scale, offset, name)

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        """Adds a batch to an exponential moving sample."""
        low, high = float(x.min()), float(x.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise DyBitError(f"the input of a layer ranges from {low} to {high} while it is observed")
        self.seen += 1
        new = _draw(x, self.seen)
        if self.seen == 1:
            self._sample, self._extremes = new, (low, high)
        else:
            # Every batch replaces an equal share of the sample, so that old batches fade out.
            count = min(len(new), max(1, 2 * len(self._sample) // (self.schedule.observe + 1)))
            generator = torch.Generator().manual_seed(_SEED + self.seen)
            places = torch.randperm(len(self._sample), generator=generator, dtype=torch.int64, device="cpu")[:count]
            self._sample[places] = new[: len(places)]
            self._extremes = min(low, self._extremes[0]), max(high, self._extremes[1])

    @torch.no_grad()
    def settle(self) -> None:
        """Chooses format, scale and offset after the last observing pass.

        It is called in the pass after it, since gradient checkpointing may repeat the last observing pass.
        """
        if not self.ready and self.seen >= self.schedule.observe and not in_backward():
            statistics = InputStatistics(low=self._extremes[0], high=self._extremes[1], samples=[self._sample[:, None]])
            options = {"method": self.method, "percentile": self.percentile, "offset": self.offsets}
            self.set_(*choose_input(statistics, self.families, **options))  # type: ignore[arg-type]
            self._sample = torch.empty(0, dtype=torch.float32, device="cpu")

    @torch.no_grad()
    def _refresh(self, x: Tensor) -> None:
        """Updates the format within its kind, and the scale if the format changes. The offset stays."""
        spec, _, offset = self.export()
        family = next(f for f in self.families if f and any(book.name == spec.format for book in f.books))
        sample = _draw(x, int(self.passes))
        if len(family.books) == 1 or not bool(torch.isfinite(sample).all()):
            return
        current = next(index for index, book in enumerate(family.books) if book.name == spec.format)
        chosen = choose_scales(
            (sample if offset is None else sample - offset.cpu())[None],
            family,
            granularity="tensor",
            method=self.method,
            percentile=self.percentile,
            incumbent=torch.tensor([[current]], dtype=torch.int64, device="cpu"),
            hysteresis=self.schedule.hysteresis,
        )
        assert chosen.choice is not None
        if int(chosen.choice) != current:
            name = family.books[int(chosen.choice)].name
            self.set_(InputSpec(name, offset=spec.offset), chosen.scale.reshape(1), offset)

    def extra_repr(self) -> str:
        """The format, or how far observation is."""
        return self.candidates[int(self.choice)][0] if self.ready else f"seen={self.seen}"


def _draw(x: Tensor, seed: int) -> Tensor:
    """Draws elements of a tensor: float32 of shape (at most _SAMPLE,)."""
    flat = x.reshape(-1)
    if len(flat) > _SAMPLE:
        generator = torch.Generator().manual_seed(_SEED + seed)
        flat = flat[
            torch.randint(len(flat), (_SAMPLE,), generator=generator, dtype=torch.int64, device="cpu").to(x.device)
        ]
    return flat.float().cpu().clone()


def check_scale(scale: Tensor | None) -> None:
    """Checks that a learned scale or offset is finite.

    Raises:
        DyBitError: It is not.
    """
    if scale is not None and not bool(torch.isfinite(scale).all()):
        bad = scale[~torch.isfinite(scale)][0].item()
        raise DyBitError(f"a learned scale or offset is {bad}: training has diverged")
