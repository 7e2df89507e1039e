"""Models to quantize, and what quantization should make of them, written with NumPy and without dybit's fast paths."""

import random
from functools import partial

import numpy as np
import recurrent
import torch
from torch import nn

from dybit.errors import CheckpointError, DyBitError
from dybit.formats import catalogue
from dybit.formats.packing import unpack
from dybit.layers.attention import attend
from dybit.layers.quantized import quantized_layers


def numpy_codes(weight):
    """The codes of a quantized tensor, unpacked by the portable packing: (rows, columns)."""
    spec = weight.spec
    packed = weight.packed.numpy().reshape(spec.rows, -1)
    return unpack(packed, spec.columns, spec.bits, spec.group_size)


def numpy_units(units, spec):
    """A table with an entry a unit, (1 or rows, 1 or groups), spread over all elements."""
    units = np.asarray(units)
    width = spec.group_size or spec.columns
    if units.shape[1] > 1:  # a column a group
        units = np.repeat(units, width, axis=1)[:, : spec.columns]
    return np.broadcast_to(units, (spec.rows, spec.columns))


def numpy_weight(weight):
    """float32(scale) · float32(value), in the shape of the weight."""
    spec = weight.spec
    books = catalogue.family(spec.family).books
    codes = numpy_codes(weight)
    choice = np.zeros((1, 1), int) if weight.choice is None else weight.choices().numpy()
    choice = numpy_units(choice, spec)
    values = np.stack([book.values for book in books]).astype(np.float32)[choice, codes]
    return from_matrix(values * numpy_units(weight.scales().numpy(), spec).astype(np.float32), spec)


def from_matrix(matrix, spec):
    """Rows of output channels back to the weight's shape, element by element."""
    if not spec.transposed:
        return matrix.reshape(spec.shape)
    groups, inputs, outputs = spec.transposed, spec.shape[0] // spec.transposed, spec.shape[1]
    rest = spec.shape[2:]
    weight = np.empty(spec.shape, matrix.dtype)
    rows = matrix.reshape(groups, outputs, inputs, *rest)
    for g in range(groups):
        for o in range(outputs):
            for i in range(inputs):
                weight[g * inputs + i, o] = rows[g, o, i]
    return weight


def numpy_round(x, book, scale, offset=None):
    """x rounded at a scale in float32 arithmetic, by the exact encoder."""
    x, scale = x.astype(np.float32), np.asarray(scale, np.float32)
    shifted = x if offset is None else x - np.float32(offset)
    value = book.values.astype(np.float32)[book.encode(shifted / scale)] * scale
    return value if offset is None else value + np.float32(offset)


def numpy_round_dynamic(x, book, reach, group_size=None):
    """As torch.ops.dybit.fake_quantize_dynamic, group by group."""
    x = x.astype(np.float32)
    step = group_size or x.shape[-1]
    parts = []
    for start in range(0, x.shape[-1], step):
        part = x[..., start : start + step]
        scale = np.abs(part).max(-1, keepdims=True) / np.float32(reach)
        parts.append(numpy_round(part, book, np.maximum(scale, np.float32(2.0**-126))))
    return np.concatenate(parts, axis=-1)


def rounded_input(layer, x):
    """What a quantized layer should make of its input."""
    spec = layer.input_spec
    book = catalogue.family(spec.format).books[0]
    array = x.detach().float().numpy()
    if spec.mode == "static":
        offset = layer.input_offset.item() if spec.offset else None
        out = numpy_round(array, book, layer.input_scale.item(), offset)
    elif isinstance(layer, nn.modules.conv._ConvNd):
        spatial = len(layer.kernel_size)
        flat = array.reshape(*array.shape[: array.ndim - spatial - 1], -1)
        out = numpy_round_dynamic(flat, book, spec.reach).reshape(array.shape)
    else:
        out = numpy_round_dynamic(array, book, spec.reach, spec.group_size)
    return torch.from_numpy(np.ascontiguousarray(out)).to(x.dtype)


def oracle(floating, quantized):
    """Turns the floating-point original of a quantized model into what it should compute, with plain torch layers."""
    for name, layer in quantized_layers(quantized).items():
        module = floating.get_submodule(name)
        for key in layer.weight_specs:
            weight = torch.from_numpy(numpy_weight(layer.quantized_tensor(key)))
            setattr(module, key, nn.Parameter(weight.to(layer.float_dtype), requires_grad=False))
        if layer.input_spec is None:
            continue
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            module.forward = partial(recurrent.reference, module, round_input=partial(rounded_input, layer))
            continue
        if isinstance(module, nn.MultiheadAttention):
            module.forward = partial(attend, module)

        def round_inputs(_, args, kwargs, layer=layer):
            count = 3 if isinstance(layer, nn.MultiheadAttention) else 1
            args = [rounded_input(layer, x) if i < count else x for i, x in enumerate(args)]
            return tuple(args), kwargs

        module.register_forward_pre_hook(round_inputs, with_kwargs=True)
    for module in floating.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # dybit runs the layers one by one, and so does the oracle
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    return floating


class SelfAttention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **options)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class CrossAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=5, vdim=6, bias=False, batch_first=True)

    def forward(self, query, key, value):
        return self.attention(query, key, value, need_weights=False)[0]


class Padded(nn.Conv2d):
    """A convolution with a forward of its own."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (1, 0, 1, 0)))


def conv1d():
    from transformers.pytorch_utils import Conv1D

    module = Conv1D(7, 9)
    nn.init.normal_(module.weight)
    return module


class Tied(nn.Module):
    """A language model in small: an embedding, a layer, and a head with the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 12)
        self.hidden = nn.Linear(12, 12)
        self.head = nn.Linear(12, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.hidden(self.embedding(tokens))))


def tokens(high=11):
    return torch.randint(0, high, (3, 5))


def decoder(kind="Llama", tied=False, **options):
    """A tiny transformers language model of Llama's structure, its norms with factors that matter."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=97, hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, tie_word_embeddings=tied, **options,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 2.0)
        elif "proj" in name:
            nn.init.normal_(parameter, std=0.15)
    return model.eval()


def outliers_(layer, channels=(1, 7), factor=30.0):
    """Makes some channels of a norm or layer much larger, as in trained transformers."""
    with torch.no_grad():
        for parameter in layer.parameters(recurse=False):
            parameter[list(channels)] *= factor
    return layer


def error(model, reference, batches):
    """The relative error of a model's first outputs against a reference's."""
    with torch.no_grad():
        pairs = [(first_output(model, batch), first_output(reference, batch)) for batch in batches]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)) ** 0.5


def first_output(model, batch):
    """What a model returns for a batch; of transformers' outputs the first tensor."""
    output = model(**batch) if isinstance(batch, dict) else model(batch)
    return output if isinstance(output, torch.Tensor) else output[0]


# name: (a model, the arguments of a call)
LAYERS = {
    "linear": (lambda: nn.Linear(19, 6), lambda: (torch.randn(4, 19),)),
    "linear_no_bias": (lambda: nn.Linear(16, 5, bias=False), lambda: (torch.randn(2, 3, 16),)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, stride=2, groups=2), lambda: (torch.randn(2, 6, 11),)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1, dilation=2), lambda: (torch.randn(2, 4, 9, 9),)),
    "conv2d_depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), lambda: (torch.randn(2, 6, 7, 7),)),
    "conv2d_same": (lambda: nn.Conv2d(3, 5, (3, 2), padding="same"), lambda: (torch.randn(2, 3, 7, 6),)),
    "conv2d_reflect": (
        lambda: nn.Conv2d(3, 5, 3, padding=2, padding_mode="reflect"),
        lambda: (torch.randn(2, 3, 7, 7),),
    ),
    "conv2d_replicate": (
        lambda: nn.Conv2d(3, 5, 3, padding=2, padding_mode="replicate"),
        lambda: (torch.randn(2, 3, 7, 7),),
    ),
    "conv2d_circular": (
        lambda: nn.Conv2d(3, 5, 3, padding=2, padding_mode="circular"),
        lambda: (torch.randn(2, 3, 7, 7),),
    ),
    "conv2d_unbatched": (lambda: nn.Conv2d(3, 5, 3), lambda: (torch.randn(3, 7, 7),)),
    "conv2d_subclass": (lambda: Padded(3, 5, 3, stride=2), lambda: (torch.randn(2, 3, 7, 7),)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, padding=1), lambda: (torch.randn(2, 2, 4, 4, 4),)),
    "transposed1d": (lambda: nn.ConvTranspose1d(6, 4, 3, stride=2, groups=2), lambda: (torch.randn(2, 6, 5),)),
    "transposed2d": (
        lambda: nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, output_padding=1, groups=2),
        lambda: (torch.randn(2, 6, 5, 5),),
    ),
    "transposed3d": (lambda: nn.ConvTranspose3d(3, 2, 2, dilation=2), lambda: (torch.randn(1, 3, 3, 3, 3),)),
    "embedding": (lambda: nn.Embedding(13, 10, padding_idx=3), lambda: (tokens(13),)),
    "attention": (lambda: SelfAttention(batch_first=True), lambda: (torch.randn(2, 5, 8),)),
    "attention_extra": (
        lambda: SelfAttention(add_bias_kv=True, add_zero_attn=True, bias=False),
        lambda: (torch.randn(5, 2, 8),),
    ),
    "attention_cross": (CrossAttention, lambda: (torch.randn(2, 4, 8), torch.randn(2, 5, 5), torch.randn(2, 5, 6))),
    "transformers_conv1d": (conv1d, lambda: (torch.randn(2, 4, 9),)),
    "lstm": (
        lambda: recurrent.Sequence(nn.LSTM, num_layers=2, bidirectional=True, batch_first=True),
        lambda: (torch.randn(2, 4, 6),),
    ),
    "lstm_projected": (lambda: recurrent.Sequence(nn.LSTM, proj_size=3), lambda: (torch.randn(5, 2, 6),)),
    "lstm_packed": (
        lambda: recurrent.Sequence(nn.LSTM, packed=True, bidirectional=True),
        lambda: (torch.randn(4, 3, 6),),
    ),
    "gru": (lambda: recurrent.Sequence(nn.GRU, num_layers=2, bias=False), lambda: (torch.randn(4, 2, 6),)),
    "rnn": (lambda: recurrent.Sequence(nn.RNN, nonlinearity="relu"), lambda: (torch.randn(4, 2, 6),)),
    "cells": (recurrent.Cells, lambda: (torch.randn(3, 2, 6),)),
    "bag": (lambda: nn.EmbeddingBag(13, 10, padding_idx=3, mode="mean"), lambda: (tokens(13),)),
    "bag_offsets": (
        lambda: nn.EmbeddingBag(13, 10, mode="sum", include_last_offset=True),
        lambda: (tokens(13).flatten(), torch.tensor([0, 4, 4, 15]), torch.rand(15)),
    ),
    "tied": (Tied, lambda: (tokens(),)),
    "encoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu"), 2, enable_nested_tensor=False
        ),
        lambda: (torch.randn(2, 5, 8),),
    ),
}


def build(name, seed=0):
    """A model of LAYERS in evaluation mode."""
    torch.manual_seed(seed)
    return LAYERS[name][0]().eval()


def inputs(name, seed=1):
    """Its arguments."""
    torch.manual_seed(seed)
    return LAYERS[name][1]()


def flips(data, count=1000, seed=0, first=None):
    """Contents of a file with a single bit flipped, anywhere; every second one within the first bytes, if given."""
    shuffle = random.Random(seed)
    for number in range(count):
        changed = bytearray(data)
        changed[shuffle.randrange(first if first and number % 2 else len(data))] ^= 1 << shuffle.randrange(8)
        yield bytes(changed)


def header_flips(data, count):
    """The same for a safetensors file, every second one within its header."""
    return flips(data, count, first=8 + int.from_bytes(data[:8], "little"))


def cuts(data, count=100):
    """Beginnings of a file."""
    yield from (data[: len(data) * index // count] for index in range(count))
    yield data[:-1]


def damaged(file, contents, read, errors=DyBitError):
    """How many of some contents of a file are refused; the others must be read to the same bits as the file itself.

    Args:
        file: The file, which is the same again afterwards.
        contents: From :func:`flips` or :func:`cuts`.
        read: Reads the file to tensors by name.
        errors: How it may refuse.
    """
    good, data, refused = _bits(read()), file.read_bytes(), 0
    for changed in [*contents(data), data]:
        file.unlink()  # what was read may be a map of the file
        file.write_bytes(changed)
        try:
            found = _bits(read())
        except errors as error:
            refused += 1
            said = str(error)
            assert not isinstance(error, DyBitError) or ("\n" not in said and len(said) < 1000), said
            named = str(file.parent), file.name, "quantization_config"
            assert not isinstance(error, CheckpointError) or any(name in said for name in named), said
            continue
        places = [place for place, (a, b) in enumerate(zip(changed, data, strict=False)) if a != b]
        assert found == good, (places, data[max(0, places[0] - 40) : places[0] + 8] if places else len(changed))
    assert found == good  # the last was the file itself
    return refused


def _bits(tensors):
    return {
        key: (value.dtype, tuple(value.shape), value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for key, value in tensors.items()
    }
