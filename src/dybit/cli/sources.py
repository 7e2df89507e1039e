"""Models, data and recipes from the words of a command line."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dybit.errors import DyBitError, MissingExtraError
from dybit.safe_files import check_regular

if TYPE_CHECKING:
    from torch import Tensor, nn

TEXT_LENGTH = 512


def is_reference(spec: str) -> bool:
    """Whether a word is of the form ``module:function`` and no existing path."""
    module, colon, name = spec.partition(":")
    dotted = all(part.isidentifier() for part in (*module.split("."), *name.split(".")))
    return bool(colon) and dotted and not Path(spec).exists()


def call(spec: str, argument: str, **keywords: object) -> Any:  # noqa: ANN401
    """Imports ``module:function`` and calls it, with those keywords that it has parameters for.

    Args:
        spec: The word; the working directory is searched first, as with ``python -m``.
        argument: Name of the command line's argument, for errors.
        **keywords: Offered to the function.

    Returns:
        What the function returned, or the object itself if it cannot be called, or is a module of torch.

    Raises:
        DyBitError: It cannot be imported, or the function raises.
    """
    target = _import(spec, argument)
    if not callable(target) or (not inspect.isclass(target) and _is_module(target)):
        return target
    known = _parameters(target)
    with _naming(f"{argument} {spec!r} raised"):
        return target(**{name: value for name, value in keywords.items() if name in known})


def function(spec: str, argument: str) -> Callable[..., Any]:
    """Imports the function of ``module:function``.

    Raises:
        DyBitError: It cannot be imported, or is no function.
    """
    target = _import(spec, argument)
    if not callable(target):
        raise DyBitError(f"{argument} {spec!r} must be a function, not {target!r:.100}")
    return target  # type: ignore[no-any-return]


def takes_split(spec: str | None) -> bool:
    """Whether ``module:function`` has a parameter ``split``."""
    if spec is None or not is_reference(spec):
        return False
    target = _import(spec, "DATA")
    return callable(target) and "split" in _parameters(target)


def _parameters(target: Callable[..., Any]) -> Collection[str]:
    """The names of the parameters of a function; none for some that are not written in Python."""
    try:
        return inspect.signature(target).parameters
    except (TypeError, ValueError):
        return ()


def _import(spec: str, argument: str) -> Any:  # noqa: ANN401
    module, _, name = spec.partition(":")
    _search_here()
    with _naming(f"{argument} {spec!r} cannot be imported:"):
        target: Any = importlib.import_module(module)
    for part in name.split("."):
        try:
            with _naming(f"{argument} {spec!r} cannot be imported:", AttributeError):
                target = getattr(target, part)
        except AttributeError:
            raise DyBitError(f"{argument} {spec!r}: module {module!r} has no function {name!r}") from None
    return target


def _search_here() -> None:
    """Lets modules in the working directory be imported."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))


@contextmanager
def _naming(prefix: str, *keep: type[Exception]) -> Iterator[None]:
    """Turns any exception of foreign code into a sentence that names the argument."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, (*keep, MissingExtraError)):
            raise
        reason = (str(error).strip().splitlines() or [""])[0]
        word = "" if isinstance(error, DyBitError | ImportError) else f" {type(error).__name__}:"
        raise DyBitError(f"{prefix}{word} {reason}".rstrip(" :")) from error


def load_model(spec: str, argument: str = "MODEL") -> nn.Module:
    """Builds a floating-point model, in evaluation mode.

    Args:
        spec: A transformers directory (``config.json`` and weights), or ``module:function`` returning an ``nn.Module``.
        argument: Name of the command line's argument, for errors.

    Raises:
        DyBitError: There is no such model, or it cannot be built.
    """
    if is_reference(spec):
        model = call(spec, argument)
        if not _is_module(model):
            raise DyBitError(f"{argument} {spec!r} must return a torch.nn.Module, not {type(model).__name__}")
        return model.eval()  # type: ignore[no-any-return]
    if (Path(spec) / "config.json").is_file():
        return _from_transformers(Path(spec), argument)
    if (Path(spec) / "dybit.json").is_file():
        raise DyBitError(f"{argument} {spec!r} is a dybit checkpoint; name the floating-point model it was made from")
    what = "does not exist" if not Path(spec).exists() else "is none of these"
    raise DyBitError(
        f"{argument} must be a transformers directory or module:function returning an nn.Module, "
        f"but {_python(spec) or f'{spec!r} {what}'}"
    )


def load_language_model(directory: str, argument: str) -> Any:  # noqa: ANN401  # a model of transformers
    """As :func:`load_model`, for a model that has ``generate``.

    Raises:
        DyBitError: It has not; or as :func:`load_model`.
    """
    model: Any = load_model(directory, argument)
    if not hasattr(model, "generate") or not model.can_generate():
        raise DyBitError(f"{argument} {directory!r} must be a language model, not a {type(model).__name__}")
    return model


def _python(spec: str) -> str:
    """What is wrong with a word that means a function in a module; empty if it does not look so."""
    if spec.endswith(".py"):
        module = spec.removesuffix(".py").replace("/", ".")
        return f"{spec!r} is a Python file; name a function in it, as in {module}:FUNCTION"
    module, _, name = spec.rpartition(".")
    if not is_reference(f"{module}:{name}") or Path(spec).exists():
        return ""
    _search_here()
    try:
        known = importlib.util.find_spec(module) is not None
    except Exception:  # importing the packages around it runs their code
        known = False
    return f"{spec!r} does not exist; did you mean '{module}:{name}'?" if known else ""


def _from_transformers(folder: Path, argument: str) -> nn.Module:
    transformers = _transformers(argument)
    import torch

    with _naming(f"{argument} {str(folder)!r} cannot be loaded by transformers:"):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        names = config.architectures or []
        architecture = getattr(transformers, names[0], None) if names else transformers.AutoModel
        if architecture is None:
            raise DyBitError(f"{argument} {str(folder)!r} needs {names[0]!r}, which transformers does not have")
        model: nn.Module = architecture.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        return model.eval()


def _transformers(argument: str) -> Any:  # noqa: ANN401
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        raise MissingExtraError(
            f'{argument} is a transformers directory, which needs: pip install "dybit[transformers]"'
        ) from None
    transformers.logging.disable_progress_bar()
    return transformers


def _is_module(value: object) -> bool:
    torch = sys.modules.get("torch")  # a module exists only if torch is loaded
    return torch is not None and isinstance(value, torch.nn.Module)


def load_batches(
    spec: str,
    argument: str,
    *,
    split: str,
    limit: int | None = None,
    model: str = "",
    tokenizer: str | None = None,
    batch_size: int = 16,
) -> list[Any]:
    """Loads batches of inputs.

    Args:
        spec: ``module:function`` returning an iterable of batches (called with ``split`` if it takes one), a text file,
            or a ``.npy`` or ``.safetensors`` file whose first dimension counts inputs.
        argument: Name of the command line's argument, for errors.
        split: ``calibration`` or ``evaluation``.
        limit: At most so many batches.
        model: The model's word: a transformers directory has the tokenizer for text.
        tokenizer: A directory, ``tokenizer.json`` or ``module:function``, for text.
        batch_size: Inputs in a batch, for files of inputs.

    Raises:
        DyBitError: The data cannot be loaded or hold no batch.
    """
    path = Path(spec)
    if is_reference(spec):
        found = call(spec, argument, split=split)
        if _is_tensor(found) or isinstance(found, Mapping | str) or not isinstance(found, Iterable):
            raise DyBitError(f"{argument} {spec!r} must return an iterable of batches, not a {type(found).__name__}")
        with _naming(f"{argument} {spec!r} raised"):
            batches = list(islice(found, limit))
    elif not path.is_file():
        what = "is a directory" if path.is_dir() else "is no file" if path.exists() else "does not exist"
        what = _python(spec) or f"{spec!r} {what}"
        raise DyBitError(f"{argument} must be module:function, a text file, .npy or .safetensors, but {what}")
    elif path.suffix in (".npy", ".safetensors"):
        batches = list(islice(_array_batches(path, argument, batch_size), limit))
    else:
        batches = list(islice(_text_batches(path, argument, model, tokenizer), limit))
    if not batches:
        raise DyBitError(f"{argument} {spec!r} yields no batch")
    return batches


def _is_tensor(value: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _array_batches(path: Path, argument: str, batch_size: int) -> Iterator[Any]:
    """Batches of a tensor, or of several as keyword arguments."""
    import torch

    if path.suffix == ".npy":
        import numpy as np

        with _naming(f"{argument} {str(path)!r} cannot be read:"):
            tensors = {"": torch.from_numpy(np.load(path, allow_pickle=False))}
    else:
        tensors = read_safetensors(path, argument)
    tensors = {k: v.float() if v.dtype in (torch.float64, torch.float16) else v for k, v in tensors.items()}
    lengths = {len(tensor) if tensor.ndim else 0 for tensor in tensors.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise DyBitError(
            f"{argument} {str(path)!r} must hold tensors with the same first dimension, found {sorted(lengths)}"
        )
    for start in range(0, lengths.pop(), batch_size):
        part = {name: tensor[start : start + batch_size] for name, tensor in tensors.items()}
        yield next(iter(part.values())) if len(part) == 1 else part


def _text_batches(path: Path, argument: str, model: str, tokenizer: str | None) -> Iterator[dict[str, Tensor]]:
    """Windows of contiguous text."""
    import torch

    with _naming(f"{argument} {str(path)!r} is not a UTF-8 text file:"):
        text = path.read_text(encoding="utf-8")
    ids = torch.tensor(_encoder(argument, model, tokenizer)(text), dtype=torch.int64, device="cpu")
    windows = ids.split(TEXT_LENGTH)
    for window in windows if len(windows) == 1 else windows[: len(ids) // TEXT_LENGTH]:
        if len(window) > 1:
            yield {"input_ids": window[None]}


def _encoder(argument: str, model: str, tokenizer: str | None) -> Callable[[str], list[int]]:
    """A function from text to token ids."""
    word = tokenizer or (model if (Path(model) / "config.json").is_file() else None)
    if word is None:
        raise DyBitError(f"{argument} is a text file and MODEL {model!r} has no tokenizer; give --tokenizer")
    found: Any
    if is_reference(word):
        found = call(word, "--tokenizer")
    elif Path(word).is_file():
        with _naming(f"--tokenizer {word!r} cannot be read:"):
            found = importlib.import_module("tokenizers").Tokenizer.from_file(word)
    else:
        transformers = _transformers(argument)
        with _naming(f"the tokenizer of {word!r} cannot be loaded:"):
            found = transformers.AutoTokenizer.from_pretrained(word, local_files_only=True)

    def encode(text: str) -> list[int]:
        encoded = found.encode(text)
        return list(getattr(encoded, "ids", encoded))

    return encode


def read_safetensors(path: str | Path, argument: str, pattern: str = "*") -> dict[str, Tensor]:
    """Reads the tensors of a safetensors file whose names match a glob.

    Raises:
        DyBitError: The file is missing or no safetensors file, or no name matches.
    """
    from safetensors import safe_open

    if not check_regular(path).is_file():
        raise DyBitError(f"{argument} {str(path)!r} does not exist")
    with _naming(f"{argument} {str(path)!r} is not a safetensors file:"), safe_open(path, framework="pt") as file:
        names = list(file.keys())
        tensors = {name: file.get_tensor(name) for name in names if fnmatchcase(name, pattern)}
    if not tensors:
        from difflib import get_close_matches

        near = get_close_matches(pattern, names, n=1, cutoff=0.1) if names else []
        hint = f"; it has for example {near[0] if near else names[0]!r}" if names else "; it is empty"
        raise DyBitError(f"{argument} {str(path)!r} has no tensor that matches {pattern!r}{hint}")
    return tensors
