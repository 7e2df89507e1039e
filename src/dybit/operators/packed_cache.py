"""The cache of packed weights, and snapshots that tell whether tensors have changed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor

from dybit.kernels import extension
from dybit.operators.input_rounding import KEPT, InputRounding
from dybit.tensors.quantized_tensor import QuantizedTensor

_T = TypeVar("_T")


class Snapshot:
    """Records tensors, to tell later whether they have been replaced or written to.

    Writes through ``tensor.data`` and through NumPy arrays cannot be detected. Nor can writes to tensors that were made
    in inference mode, so a snapshot of such a tensor never holds (see :func:`ordinary`).

    Args:
        parts: The tensors by name; None for missing ones. They are not kept alive.
    """

    __slots__ = ("_absent", "_isa", "_present", "_unknown")

    def __init__(self, parts: Mapping[str, Tensor | None]) -> None:
        given = {name: part for name, part in parts.items() if part is not None}
        self._absent = [name for name in parts if name not in given]
        self._unknown = any(part.is_inference() for part in given.values())
        self._present = [
            (name, weakref.ref(part), part._version, part.data_ptr())
            for name, part in given.items()
            if not self._unknown
        ]
        self._isa = extension.isa()

    @property
    def alive(self) -> bool:
        """Whether all tensors still exist. If one is gone, the snapshot can never hold again."""
        return not self._unknown and all(ref() is not None for _, ref, _, _ in self._present)

    def holds(self, parts: Mapping[str, Tensor | None]) -> bool:
        """Whether these are the same tensors, unchanged since, and the same kernels are selected.

        Args:
            parts: Tensors by name. Names that the snapshot does not have are ignored.
        """
        get = parts.get
        for name, ref, version, address in self._present:
            part = get(name)
            if part is None or ref() is not part or part._version != version or part.data_ptr() != address:
                return False
        for name in self._absent:
            if get(name) is not None:
                return False
        return not self._unknown and self._isa == extension.isa()


class LayerSnapshot:
    """Records what a layer computes with: its weight, its bias, and the scale and offset of its inputs."""

    __slots__ = ("_bias", "_own", "_stored")

    def __init__(self, weight: QuantizedTensor, bias: Tensor | None = None, rounding: InputRounding = KEPT) -> None:
        stored = {f"weight{suffix}": part for suffix, part in weight.parts().items()}
        self._stored = Snapshot(stored | {"input_scale": rounding.scale, "input_offset": rounding.offset})
        self._bias, self._own = bias, Snapshot({"bias": bias})

    def holds(self, buffers: Mapping[str, Tensor | None], bias: Tensor | None = None) -> bool:
        """Whether buffers and bias of a layer are the recorded ones, unchanged since."""
        return self._bias is bias and self._stored.holds(buffers) and (bias is None or self._own.holds({"bias": bias}))


def ordinary(tensor: Tensor) -> Tensor:
    """Returns a copy of a tensor that was made in inference mode, and any other tensor itself.

    Writes to ordinary tensors can be detected, even in inference mode, and autograd can save them.
    """
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


class PackedCache(Generic[_T]):
    """Keeps packed weights as long as the weights live. They are never in a state dict, copy or pickle."""

    def __init__(self) -> None:
        self._entries: dict[tuple[object, ...], tuple[Snapshot, _T | None]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, weight: QuantizedTensor, key: tuple[object, ...], make: Callable[[], _T | None]) -> _T | None:
        """Returns the cached result of ``make`` for a weight and a key; calls ``make`` if it is missing or outdated.

        Args:
            weight: The weight.
            key: Everything else that the result depends on.
            make: Packs the weight; returns None if the kernels cannot compute with it.

        Returns:
            The packed weight; None without the kernels, or if ``make`` returned None.
        """
        whole = (id(weight.packed), *key)
        parts = weight.parts()
        entry = self._entries.get(whole)
        if entry is not None and entry[0].holds(parts):
            return entry[1]
        if extension.isa() == extension.FALLBACK or not weight.packed.is_cpu:
            return None
        with torch.inference_mode(False), torch.no_grad():  # the result may itself be a key of this cache
            packed = make()
        if entry is None:
            weakref.finalize(weight.packed, self._entries.pop, whole, None).atexit = False
        self._entries[whole] = Snapshot(parts), packed
        return packed
