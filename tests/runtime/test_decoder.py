import pytest
import torch
from decoders import decoder
from torch import nn

import dybit
from dybit.runtime.decoder import FAMILIES, Family, ModelDecoder, UnknownDecoderError, family_of, product_of

W4 = {"weights": 4, "group_size": 32, "method": "absmax"}


def quantized(family="Llama", recipe=W4, **fields):
    return dybit.quantize_(decoder(family, **fields), dybit.Recipe(**recipe))


def read(model):
    return ModelDecoder(model.base_model, family_of(model.base_model), model.get_output_embeddings(), 0.0)


def test_families_are_found_by_the_class_of_transformers():
    assert family_of(decoder("Qwen3").model) == FAMILIES["Qwen3Model"] == Family(query_norm="q_norm", key_norm="k_norm")
    assert family_of(type("LlamaModel", (nn.Module,), {})()) is None
    assert family_of(decoder("GPT2")) is None  # the base is known, not the model with its head


def test_a_tied_table_is_packed_once():
    made = read(quantized("Qwen2"))
    assert made.decoder._kept[1] is made.decoder._kept[4].weight
    assert read(quantized()).decoder._kept[1] is not made.decoder._kept[1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "depend on the length"),
        ({"hidden_act": "tanh"}, "do not have the activation"),
        ({"recipe": W4 | {"rules": {"*.down_proj": None}}}, "'down_proj' of LlamaMLP is not a layer"),
        ({"family": "GPT2", "add_cross_attention": True}, "cross-attention"),
        ({"family": "Gemma3Text", "use_bidirectional_attention": True}, "looks ahead"),
    ],
)
def test_what_the_kernels_do_not_compute_is_refused(fields, message):
    with pytest.raises(UnknownDecoderError, match=message):
        read(quantized(**fields))


def test_norms_and_embeddings_in_half_precision_are_refused():
    model = quantized()
    model.model.norm.bfloat16()
    with pytest.raises(UnknownDecoderError, match="norm of float32"):
        read(model)
    model = quantized().bfloat16()
    with pytest.raises(UnknownDecoderError):
        read(model)


def test_tables_of_positions_grow():
    made = read(quantized(max_position_embeddings=2048))
    for places in (10, 1500):
        made.reach(places)
        cosine, _ = made.decoder._rotary[-1]
        assert len(cosine) >= places
    expected = made._model.rotary_emb(torch.zeros(1, 1, 1), torch.tensor([[1499]]))[0]
    assert torch.equal(cosine[1499], expected[0, 0, :8])


def test_products_of_layers():
    model = quantized()
    layer = model.model.layers[0].mlp.up_proj
    assert product_of(layer) is layer.prepared().product
    assert product_of(nn.Linear(2, 3)) is None and product_of(None) is None
    handle = layer.register_forward_hook(lambda *_: None)
    assert product_of(layer) is None
    handle.remove()
