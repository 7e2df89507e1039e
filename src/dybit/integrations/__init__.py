"""Makes dybit known to transformers.

After both are imported, in any order, ``from_pretrained`` loads checkpoints of dybit. Without transformers nothing
happens.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from dybit.errors import MissingExtraError

# This module of transformers holds the registries. It is imported before a model is loaded, after torch.
_REGISTRIES = "transformers.quantizers.auto"


class _AfterImport(MetaPathFinder, Loader):
    """Runs :func:`_register` after transformers' registries are imported, and removes itself."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _REGISTRIES:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        _register()


def watch() -> None:
    """Registers dybit with transformers, now or when transformers loads its first model."""
    if _REGISTRIES in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterImport())


def _register() -> None:
    """Imports the module that registers dybit. An unsupported version of transformers must still work without dybit."""
    try:
        import_module("dybit.integrations.transformers")
    except MissingExtraError:
        pass  # an older transformers, which dybit does not support
    except Exception as error:
        logging.getLogger("dybit").warning("transformers cannot load checkpoints of dybit: %s", error)
