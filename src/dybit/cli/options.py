"""The options that make a recipe, shared by ``quantize`` and ``evaluate``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from dybit.errors import DyBitError
from dybit.formats import catalogue
from dybit.recipe import Recipe
from dybit.safe_files import check_regular

Weights = Annotated[
    str | None,
    typer.Option(metavar="BITS|NAME", help="Format of weights: 2 to 8 bits, a name such as nf4, or none. [4]"),
]
Activations = Annotated[
    str | None, typer.Option(metavar="BITS|NAME", help="Format of layer inputs: 2 to 8 bits, a name, or none. [none]")
]
Embeddings = Annotated[
    str | None, typer.Option(metavar="BITS|NAME", help="Format of embedding tables and layers tied to them. [8]")
]
KeepEmbeddings = Annotated[bool, typer.Option("--keep-embeddings", help="The same as --embeddings none.")]
GroupSize = Annotated[
    int | None, typer.Option(help="Number of weights that share a scale. [none: one scale per output channel]")
]
Granularity = Annotated[str | None, typer.Option(help="What shares a scale: tensor, channel or group.")]
Scale = Annotated[str | None, typer.Option(help="Type of the scales: fp32, bf16, pow2 or e4m3. [fp32]")]
Variants = Annotated[
    str | None, typer.Option(help="DyBit variants to choose from: plain, spare, midrise or all. [by width]")
]
Method = Annotated[str | None, typer.Option(help="How weight scales are chosen: mse, absmax or percentile. [mse]")]
Criterion = Annotated[
    str | None, typer.Option(help="Error that mse minimises: of weights, of outputs (activation), or auto. [auto]")
]
ActivationMode = Annotated[
    str | None, typer.Option(help="Input scales: static (from calibration) or dynamic (per token). [by layer]")
]
Algorithm = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES", help="Post-training algorithms in order, separated by commas (rtn, gptq, …), or auto. [rtn]"
    ),
]
Algorithms = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAMES",
        help="Algorithms as in dybit quantize. For one row per chain, separate chains by +, or repeat the option; "
        "rtn,gptq (rounding methods only) also gives two rows. [rtn]",
    ),
]
Workdir = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Directory for finished layers of gptq, to resume after an interruption."),
]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="Fail if weights stay in floating point without a rule of the recipe."),
]
Tokenizer = Annotated[
    str | None, typer.Option(help="Tokenizer for text: a transformers directory, tokenizer.json, or module:function.")
]
Batches = Annotated[int | None, typer.Option(min=1, help="Largest number of batches to use.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Inputs per batch, for .npy and .safetensors data.")]


def alternatives(words: Sequence[str]) -> list[str]:
    """Reads several chains of algorithms, separated by ``+``; or several rounding methods, separated by commas.

    Returns:
        The chains, not checked, each once.
    """
    from dybit.ptq import chain

    found: list[str] = []
    for word in (part for given in words for part in given.split("+")):
        names = [name.strip() for name in word.split(",") if name.strip()]
        apart = all(
            name == "auto" or (name in chain.ALGORITHMS and chain.ALGORITHMS[name].stage == 1) for name in names
        )
        found += names if names and apart else [word]
    return list(dict.fromkeys(found))


def chain(word: str | None, calibrated: bool) -> str | tuple[str, ...] | None:
    """Reads a chain of algorithms, checked: names separated by commas, or ``"auto"``.

    Raises:
        DyBitError: It is not a chain, or needs calibration.
    """
    if word is None or word == "auto":
        return word
    from dybit.ptq import chain

    names = tuple(name.strip() for name in word.split(",") if name.strip())
    try:
        if not names:
            raise DyBitError("it names no algorithm")
        chain.resolve(names, None, calibrated=calibrated)
    except DyBitError as error:
        raise DyBitError(f"--algorithm {word!r}: {error}") from None
    return names


def read_recipe(path: Path) -> Recipe:
    """Reads a recipe from a JSON file.

    Raises:
        DyBitError: It cannot be read, or is not a recipe.
    """
    try:
        return Recipe.from_json(check_regular(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DyBitError(f"--recipe {str(path)!r} cannot be read: {error.strerror}") from None
    except (DyBitError, UnicodeDecodeError) as error:
        raise DyBitError(f"--recipe {str(path)!r}: {error}") from None


FIELDS = (
    "weights",
    "activations",
    "embeddings",
    "group_size",
    "granularity",
    "scale",
    "variants",
    "method",
    "criterion",
    "activation_mode",
)


def recipe_fields(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a recipe among the arguments of a command; None where they were not given."""
    fields = {name: arguments[name] for name in FIELDS if name in arguments}
    if arguments.get("keep_embeddings"):
        fields["embeddings"] = "none"
    return fields


def make_recipe(recipe: Path | None, **values: Any) -> Recipe:  # noqa: ANN401
    """Makes a recipe from options, or reads it from a file.

    Args:
        recipe: The file, or None.
        **values: Fields as the command line gave them; None where it did not. Widths are words.

    Raises:
        DyBitError: Both a file and fields were given, or a value is bad.
    """
    given = {name: value for name, value in values.items() if value is not None}
    if recipe is not None:
        if given:
            first = next(iter(given)).replace("_", "-")
            raise DyBitError(f"--{first} and --recipe {str(recipe)!r} exclude each other; set it in the recipe file")
        return read_recipe(recipe)
    if given.get("granularity") == "group" and with_prescribed(given).get("group_size") is None:
        raise DyBitError("--granularity group needs --group-size")
    for name in ("weights", "activations", "embeddings"):
        if name in given:
            given[name] = width(name, given[name])
    return Recipe(**with_prescribed(given))


def with_prescribed(given: dict[str, Any]) -> dict[str, Any]:
    """Fields of a recipe, with the group size that the format of the weights prescribes (mxfp4, nvfp4)."""
    name = given.get("weights")
    family = catalogue.family(name) if isinstance(name, str) else None
    if family and family.group_size and given.get("group_size") is None:
        return {**given, "group_size": family.group_size}
    return given


def width(option: str, word: str) -> int | str | None:
    """Reads ``"4"``, ``"nf4"`` or ``"none"``.

    Raises:
        DyBitError: It is no width and no format.
    """
    if word.lower() in ("none", "fp32"):
        return None
    if word.lstrip("-").isdigit():
        if not 2 <= int(word) <= 8:
            raise DyBitError(f"--{option} must be 2 to 8 bits, the name of a format, or none, not {word!r}")
        return int(word)
    try:
        return catalogue.family(word).name
    except DyBitError as error:
        raise DyBitError(f"--{option} {word!r}: {error}") from None
