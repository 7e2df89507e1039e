"""Rows looked up in a packed table against the dequantized table."""

import pytest
import torch

from dybit.errors import DyBitError
from dybit.kernels import extension
from dybit.operators.embedding import BAGS, PreparedTable, embedding
from dybit.tensors.encoding import quantize
from dybit.tensors.quantized_tensor import TensorSpec


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("family", ["dybit2", "dybit4", "dybit5", "s8", "nf4"])
@pytest.mark.parametrize(
    ("granularity", "choice", "size"),
    [("tensor", "tensor", None), ("channel", "tensor", None), ("channel", "channel", None), ("group", "group", 12),
     ("group", "channel", 40), ("group", "tensor", 7)],
)  # fmt: skip
@pytest.mark.parametrize("scale", ["fp32", "e4m3", "pow2"])
def test_rows_are_those_of_the_table(family, granularity, choice, size, scale, kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr(extension, "load", lambda: None)
    torch.manual_seed(0)
    spec = TensorSpec(family, (13, 40), granularity, size, scale, choice)
    weight = quantize(torch.randn(13, 40), spec, method="absmax")
    table = weight.dequantize()
    for index in (
        torch.randint(0, 13, (3, 5)),
        torch.tensor(7),
        torch.zeros(0, dtype=torch.long),
        torch.arange(13).int(),
    ):
        assert torch.equal(embedding(index, weight), table[index.long()])


def test_opcheck_and_compile():
    weight = quantize(torch.randn(13, 40), TensorSpec("dybit4", (13, 40)), method="absmax")
    index = torch.randint(0, 13, (3, 5))
    parts = (index, weight.packed, weight.scale, weight.choice, weight.tensor_scale, weight.spec.key)
    torch.library.opcheck(torch.ops.dybit.embedding, parts)
    compiled = torch.compile(lambda i: embedding(i, weight), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(index), embedding(index, weight))


@pytest.mark.parametrize("index", [13, -1])
def test_an_index_out_of_range_is_an_error(index):
    weight = quantize(torch.randn(13, 40), TensorSpec("dybit4", (13, 40)), method="absmax")
    with pytest.raises(IndexError):
        embedding(torch.tensor([0, index]), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int8, torch.uint8, torch.int16])
def test_an_index_of_another_type_is_refused_as_by_torch(dtype):
    index = torch.tensor([1]).to(dtype)
    with pytest.raises(RuntimeError):
        torch.nn.functional.embedding(index, torch.zeros(3, 4))
    with pytest.raises(DyBitError, match=f"index must be int64 or int32, not {dtype}"):
        embedding(index, quantize(torch.randn(3, 4), TensorSpec("dybit4", (3, 4))))


@pytest.mark.parametrize("family", ["dybit2", "dybit3", "dybit8plain", "dybit8", "s8", "nf4"])
@pytest.mark.parametrize(("granularity", "size"), [("tensor", None), ("channel", None), ("group", 12)])
@pytest.mark.parametrize("columns", [40, 300])
@pytest.mark.usefixtures("restore_isa")
def test_prepared_rows_are_those_of_the_table(family, granularity, size, columns):
    torch.manual_seed(0)
    spec = TensorSpec(family, (13, columns), granularity, size, "fp32", "channel" if size else granularity)
    weight = quantize(torch.randn(13, columns) * torch.rand(13, 1), spec, method="absmax")
    table = weight.dequantize()
    for isa in extension.available()[1:]:
        extension.use(isa)
        prepared = PreparedTable(weight)
        for index in (
            torch.randint(0, 13, (3, 5)),
            torch.tensor(7),
            torch.zeros(0, dtype=torch.long),
            torch.arange(13).int(),
        ):
            assert torch.equal(prepared.rows(index), table[index.long()])
        assert torch.equal(prepared.values(), table)
        index, starts = torch.randint(0, 13, (11,)), torch.tensor([0, 4, 4, 9])
        for kind in BAGS:
            for given in ((index, starts), (index[:10].view(2, 5), None)):
                expected = torch.nn.functional.embedding_bag(given[0], table, given[1], mode=kind)
                torch.testing.assert_close(prepared.bags(*given, kind), expected)


@pytest.mark.skipif(not extension.available()[1:], reason="no compiled kernels")
def test_bags_that_are_refused():
    prepared = PreparedTable(quantize(torch.randn(13, 40), TensorSpec("dybit4", (13, 40))))
    index = torch.arange(6)
    assert prepared.bags(index, torch.tensor([0, 2]), "sum") is not None
    for starts in ([1, 2], [0, 3, 2], [0, 7], [-1, 2]):
        assert prepared.bags(index, torch.tensor(starts), "sum") is None
    for wrong in (torch.tensor([0, 13]), torch.tensor([0, -1])):
        assert prepared.bags(wrong, torch.tensor([0]), "sum") is None
        with pytest.raises(IndexError):
            prepared.rows(wrong)
    assert prepared.bags(index, None, "sum") is None and prepared.bags(index.float(), torch.tensor([0]), "sum") is None
