"""Whole layers on the hardware: outputs bit for bit against integers, cycles against the simulator's formula."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from rtl_accelerator_cases import MEMORIES, UNSIGNED, check

from dybit import Recipe, quantize_
from dybit.accelerator import Config
from dybit.accelerator.datapath import PIPE
from dybit.errors import DyBitError
from dybit.formats.format import Format, variants
from dybit.rtl.accelerator import check_hardware
from dybit.rtl.model import Requantizer
from dybit.rtl.program import Program, random_program


def test_signed_variants_promoted_and_narrow_codes():
    config = Config(rows=2, columns=3, **MEMORIES)
    programs = []
    pairs = [
        (Format(8, True), variants(8), Format(8)),
        (Format(8, True, 3), variants(4), Format(8, True, 3)),
        (Format(4, True, spare=True), variants(4), Format(4, True, 1)),
        (Format(4, False, 2), variants(8), Format(4, False, 2)),  # promoted to the container of the weights
        (Format(2, False), variants(4), Format(6, True, 2)),
        (Format(5, False, 3), variants(3), Format(5, False)),  # 5 bits in a container of 8, 3 bits in one of 4
        (Format(7, True), variants(6), Format(3, True, 2)),
        (Format(2, True), variants(2), Format(2, True)),
        (Format(2, True, spare=True), variants(2), Format(4)),
        (Format(8, True), variants(2), Format(8)),
    ]
    for seed, formats in enumerate(pairs):
        programs.append(random_program(config, (1, 4, 9, 8), formats, seed, relu=seed % 2 == 1))
    check(config, programs)


def im2col(images, kernel, stride, padding):
    """Codes (channels, height, width) as a matrix (positions, channels · kernel area); padding is code 0."""
    padded = np.pad(images, ((0, 0), (padding, padding), (padding, padding)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), axis=(1, 2))[:, ::stride, ::stride]
    return windows.transpose(1, 2, 0, 3, 4).reshape(windows.shape[1] * windows.shape[2], -1)


def test_a_whole_convolution_equals_the_float_computation_of_its_values():
    """Strided, padded, several K folds, tiles of rows, nothing divides anything, every variant of 4-bit weights."""
    rng = np.random.default_rng(5)
    config = Config(rows=3, columns=2, activation_sram=4096, weight_sram=8192, sum_sram=4096)
    images, kernels = rng.integers(0, 16, (3, 9, 7)), rng.integers(0, 16, (11, 3, 3, 3))
    x, y = Format(4, signed=False), Format(4, signed=False, max_run=3)
    formats = tuple(variants(4)[i % 9] for i in range(11))
    scale_x, scale_y = 2.0**-3, 0.25
    scales = [(0.5 + i / 16) * (-1 if fmt.spare else 1) for i, fmt in enumerate(formats)]
    biases = rng.integers(-200, 200, 11)
    unit = 2.0**-3 * 2.0**-3  # of both operands in containers of 4 bits
    requantizers = tuple(
        Requantizer.of(scale_x * scale * unit / scale_y, int(bias)) for scale, bias in zip(scales, biases, strict=True)
    )
    matrix = im2col(images, 3, 2, 1)
    program = Program(
        config, matrix[None], x, kernels.reshape(11, -1).T[None], formats, requantizers, y, relu=True, tile=7
    )
    assert (program.m, program.k, program.k_folds, program.n_folds) == (20, 27, 5, 3)

    # The layer as software sees it: real values, scales, a convolution, the codes of its result.
    values = x.values[images] * scale_x
    padded = np.pad(values, ((0, 0), (1, 1), (1, 1)))
    expected = np.empty((20, 11), dtype=np.uint8)
    for channel, fmt in enumerate(formats):
        kernel = fmt.values[kernels[channel]] * scales[channel]
        for position in range(20):
            i, j = divmod(position, 4)
            total = (padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3] * kernel).sum()
            total += biases[channel] * unit * scale_x * scales[channel]
            expected[position, channel] = y.encode(max(total, 0.0) / scale_y)
    assert np.array_equal(program.outputs[0], expected)
    check(config, [program])
    assert len(np.unique(expected)) > 8


def test_a_whole_convolution_equals_the_quantized_layer_of_a_torch_model():
    """What quantize_ makes of two convolutions, run by torch, against the first one's codes on the array.

    With powers of two for scales torch's float sums are exact, so nothing may differ by a single code.
    """
    torch.manual_seed(3)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 11, 3, stride=2, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(11, 2, 1)
    ).eval()
    images = torch.rand(1, 3, 9, 7) * 6
    quantize_(model, Recipe(weights=4, activations=4, variants="all", scale="pow2"), [images])
    first, second = model[0], model[2]
    first.input_scale.fill_(2.0**-1)
    second.input_scale.fill_(2.0**-2)
    weight = first.quantized_tensor()
    scales = weight.scales().numpy()[:, 0].astype(float)
    formats = tuple(weight.spec.formats.books[i] for i in weight.choices()[:, 0].tolist())
    assert len(set(formats)) > 2
    unit = 2.0**-3 * 2.0**-3  # of both operands in containers of 4 bits
    biases = np.random.default_rng(1).integers(-200, 200, 11)
    first.bias.data = torch.from_numpy(biases * unit * 0.5 * scales).float()

    x, y = Format.parse(first.input_spec.format), Format.parse(second.input_spec.format)
    assert not x.signed and not y.signed
    with torch.no_grad():
        seen = second.round_input(model[1](first(images)))[0].flatten(1).T.numpy()  # (positions, channels)
    matrix = im2col(x.encode(images[0].numpy() / 0.5), 3, 2, 1)
    requantizers = tuple(
        Requantizer.of(0.5 * scale * unit / 0.25, int(bias)) for scale, bias in zip(scales, biases, strict=True)
    )
    config = Config(rows=3, columns=2, **MEMORIES)
    program = Program(
        config, matrix[None], x, weight.codes().numpy().T[None], formats, requantizers, y, relu=True, tile=7
    )
    assert np.array_equal(y.values[program.outputs[0]] * 0.25, seen)
    check(config, [program])


def test_the_formula_is_the_documented_one():
    config = Config(rows=4, columns=4, **MEMORIES)
    program = random_program(config, (1, 10, 9, 9), (UNSIGNED[8], variants(8), UNSIGNED[8]), 0)
    assert program.cycles == (9 - 1) * 10 + 10 + 4 + 4 + PIPE


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fuse": "together"}, "hardware needs fuse='split' and schedule='jit', not 'together'"),
        ({"schedule": "scalesim"}, "not 'split', 'scalesim'"),
        ({"narrowest": 8}, "narrowest must be 2 or 4 for the hardware, whose elements are fused, not 8"),
        ({"weight_port": 16}, "weight_port must be at least 32 bits for the hardware, not 16"),
    ],
)
def test_hardware_refuses_what_it_does_not_do(changes, words):
    with pytest.raises(DyBitError, match=words):
        check_hardware(replace(Config(), **changes))
