import pytest
import torch

import dybit
from dybit.integrations.config import describe, stored_spec
from dybit.tensors.quantized_tensor import TensorSpec


def test_bad_arguments():
    with pytest.raises(dybit.DyBitError, match="activations=8 are static and need calibration"):
        dybit.DyBitConfig(weights=4, activations=8, activation_mode="static")
    with pytest.raises(dybit.DyBitError, match="recipe has no field 'groupsize'; did you mean 'group_size'"):
        dybit.DyBitConfig(weights=4, groupsize=64)
    with pytest.raises(dybit.DyBitError, match="give a recipe or its fields, not both: weights"):
        dybit.DyBitConfig(dybit.Recipe(), weights=4)
    with pytest.raises(dybit.DyBitError, match="quant_method must be 'dybit', not 'gptq'"):
        dybit.DyBitConfig(quant_method="gptq")


def test_a_family_that_has_grown_is_read_as_it_was_stored():
    """``dybit2`` had two members: a configuration which does not say how many means these."""
    layer = torch.nn.Linear(6, 12)
    for members, said in ((2, None), (3, 3)):
        spec = TensorSpec("dybit2", (12, 6), members=members)
        weights = describe([("layer", {"weight": spec}, None)])[0]["weights"]
        assert weights.get("members") == said
        assert stored_spec(weights, (12, 6), layer) == spec


MALFORMED = [
    {"checksums": 5}, {"checksums": ["a"]}, {"checksums": {"a": 5}}, {"tied": 5}, {"tied": ["a"]}, {"tied": {"a": []}},
    {"layers": 5}, {"layers": {"a": 1}}, {"layers": "x"}, {"recipe": 5}, {"recipe": []}, {"format_version": None},
    {"coverage": 5}, {"coverage": {"quantized": 1}}, {"coverage": {"quantized": 1, "total": -1, "left": []}},
    {"nonsense": 1}, {"self": 1}, {"strict": 1, "recipe": {}, "weights": 4},
]  # fmt: skip


@pytest.mark.parametrize("fields", MALFORMED, ids=str)
def test_malformed_fields_of_a_configuration(fields):
    with pytest.raises(dybit.CheckpointError) as error:
        dybit.DyBitConfig.from_dict({"quant_method": "dybit", **fields})
    assert "\n" not in str(error.value) and "has no attribute" not in str(error.value)
