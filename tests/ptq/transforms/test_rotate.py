import copy

import pytest
import torch
from helpers import decoder, error, outliers_

import dybit
from dybit.errors import DyBitError, DyBitWarning
from dybit.models.attachments import attachments
from dybit.ptq.transforms.rotate import rotate_

BATCHES = [{"input_ids": torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(i))} for i in range(2)]
INT4 = {"weights": "int4", "activations": "int4", "activation_mode": "dynamic", "embeddings": None}


def names(model):
    return [name for name, _ in model.named_modules()]


def rotated(kind="Llama", **options):
    model = decoder(kind, **options)
    rotate_(model, names(model), BATCHES)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3", "Mistral"])
def test_the_function_stays(kind, tied):
    model, reference = rotated(kind, tied=tied), decoder(kind, tied=tied)
    assert error(model, reference, BATCHES) < 1e-5
    down = {f"model.layers.{i}.mlp.down_proj": "rotate_input" for i in range(2)}
    ends = {"model.embed_tokens": "rotate_output", "model.norm": "restore_input"} if tied else {}
    assert {name: entry["kind"] for name, entry in attachments(model).items()} == {**ends, **down}
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert torch.equal(model.lm_head.weight, reference.lm_head.weight) == tied
    for new, old in zip(model.model.layers, reference.model.layers, strict=True):
        assert torch.equal(new.input_layernorm.weight, torch.ones(48))
        for part in ("self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
            assert not torch.allclose(new.get_submodule(part).weight, old.get_submodule(part).weight, atol=0.05)


def test_biases_and_the_body_alone():
    model = decoder(attention_bias=True, mlp_bias=True).model
    reference = copy.deepcopy(model)
    rotate_(model, names(model), BATCHES)
    assert error(model, reference, BATCHES) < 1e-5
    assert "embed_tokens" in attachments(model)  # no output layer takes the rotation up


def test_outliers_are_spread():
    model = decoder()
    for layer in model.model.layers:
        outliers_(layer.input_layernorm)

    def peaks(model):
        found = []
        hook = model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda _, args: found.append(args[0]))
        with torch.no_grad():
            model(**BATCHES[0])
        hook.remove()
        return float((found[0].abs().amax(-1) / found[0].square().mean(-1).sqrt()).mean())

    before = peaks(model)
    rotate_(model, names(model), BATCHES)
    assert before > 4 > peaks(model)


def test_quantized_with_a_scale_for_every_token():
    def quantized(algorithm):
        model = decoder()
        for layer in model.model.layers:
            outliers_(layer.input_layernorm)
        reference = copy.deepcopy(model)
        dybit.quantize_(model, dybit.Recipe(**{**INT4, "weights": None}), BATCHES, algorithm=algorithm)
        return error(model, reference, BATCHES)

    assert quantized("rotate") < 0.8 * quantized(None)


@pytest.mark.parametrize("tied", [False, True])
def test_checkpoints_and_compilation(tied, tmp_path):
    recipe = dybit.Recipe(**{**INT4, "embeddings": "int8"})
    model = dybit.quantize_(decoder(tied=tied), recipe, BATCHES, algorithm="rotate")
    dybit.save(model, tmp_path / "out")
    loaded = dybit.load(tmp_path / "out", decoder(tied=tied))
    with torch.no_grad():
        expected = model(**BATCHES[0]).logits
        assert torch.equal(loaded(**BATCHES[0]).logits, expected)
        compiled = torch.compile(loaded, backend="aot_eager")
        torch.testing.assert_close(compiled(**BATCHES[0], use_cache=False).logits, expected)
    assert loaded.model.layers[0].mlp.down_proj.rotation.dtype == torch.float32
    assert loaded.bfloat16().model.layers[0].mlp.down_proj.rotation.dtype == torch.float32


def test_inputs_of_down_proj_where_they_are_quantized():
    model = decoder()
    rotate_(model, ["model.layers.1.mlp.down_proj"], BATCHES)
    assert set(attachments(model)) == {"model.layers.1.mlp.down_proj"}


def test_half_precision():
    model, reference = decoder().bfloat16(), decoder().bfloat16()
    rotate_(model, names(model), BATCHES)
    assert 0 < error(model, reference, BATCHES) < 0.05


def test_twice():
    model = rotated()
    with pytest.raises(DyBitError, match=r"layer 'model\.layers\.0\.mlp\.down_proj' is already transformed"):
        rotate_(model, names(model), BATCHES)


UNKNOWN = {
    "GPT2LMHeadModel": "is not a decoder with embed_tokens, layers and norm",
    "BertModel": "is not a decoder with embed_tokens, layers and norm",
    "GemmaForCausalLM": "has input_layernorm, which is not an RMSNorm",
    "Gemma2ForCausalLM": "consists of input_layernorm, mlp, post_attention_layernorm, post_feedforward_layernorm",
    "MixtralForCausalLM": "has mlp of experts, gate",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_structures(name):
    import transformers

    model = getattr(transformers, name)
    options = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = model(model.config_class(vocab_size=97, bos_token_id=0, eos_token_id=0, pad_token_id=0, **options))
    with pytest.raises(DyBitError, match=rf"rotate does not support {name}: .*{UNKNOWN[name]}"):
        rotate_(model, names(model), BATCHES)


def test_parameters_of_a_layers_own():
    model = decoder()
    model.model.layers[1].mlp.gain = torch.nn.Parameter(torch.ones(()))
    with pytest.raises(DyBitError, match=r"layer model\.layers\.1 has parameters in mlp"):
        rotate_(model, names(model), BATCHES)
    model = decoder()
    model.model.norm = torch.nn.LayerNorm(48)
    with pytest.raises(DyBitError, match="its last norm is not an RMSNorm"):
        rotate_(model, names(model), BATCHES)


def test_undone_where_the_output_changes():
    model = decoder()
    embedding, reference = model.model.embed_tokens, decoder()
    embedding.forward = lambda ids: torch.nn.Embedding.forward(embedding, ids) + 1  # the stream has a constant part
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(DyBitWarning, match="rotate is left out: it would change the model's output by"):
        rotate_(model, names(model), BATCHES)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.state_dict().keys() == reference.state_dict().keys()


def test_progress():
    calls = []
    rotate_(decoder(), [], BATCHES, progress=lambda *call: calls.append(call))
    assert calls == [(0, 2, "model.layers.0"), (1, 2, "model.layers.1")]
