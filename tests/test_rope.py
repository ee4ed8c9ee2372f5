"Our tables and rotations against transformers' own modules, for every type of scaling and both layouts."
import importlib

import pytest
import torch
from transformers import AutoConfig

from spectral_nb.rope import apply_rope, rope_table, turn_back, unapply_rope

COMMON = dict(hidden_size=256, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, max_position_embeddings=512)
TYPES = dict(
    default={},
    linear=dict(factor=4.),
    dynamic=dict(factor=2.),
    llama3=dict(factor=8., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=256),
    yarn=dict(factor=4., original_max_position_embeddings=128),
    longrope=dict(factor=4., original_max_position_embeddings=128, short_factor=[1.1] * 32, long_factor=[4.] * 32),
)
CLASSES = dict(llama="Llama", mistral="Mistral", qwen2="Qwen2", qwen3="Qwen3", gemma="Gemma", gemma2="Gemma2", cohere="Cohere", granite="Granite",
               phi3="Phi3", stablelm="StableLm", glm="Glm", olmo2="Olmo2", mixtral="Mixtral", starcoder2="Starcoder2", phi="Phi")


def rotate(config, x, positions, layer_type=None):
    mod = importlib.import_module(f"transformers.models.{config.model_type.removesuffix('_text')}.modeling_{config.model_type.removesuffix('_text')}")
    name = {"gemma3_text": "Gemma3"}.get(config.model_type) or CLASSES[config.model_type]
    emb = getattr(mod, f"{name}RotaryEmbedding")(config)
    cos, sin = emb(x, positions, **({"layer_type": layer_type} if layer_type else {}))
    d = cos.shape[-1]
    try: out = mod.apply_rotary_pos_emb(x, x, cos, sin)[1]
    except RuntimeError: out = torch.cat([mod.apply_rotary_pos_emb(x[..., :d], x[..., :d], cos, sin)[1], x[..., d:]], -1)
    return out


def check(config, layer_idx=0, seq_len=None, layer_type=None, length=300):
    positions = torch.stack([torch.arange(length), torch.arange(17, 17 + length)])
    table = rope_table(config, layer_idx, seq_len=seq_len)
    x = torch.randn(2, 2, length, table.head_dim, generator=torch.Generator().manual_seed(0))
    turned = apply_rope(x, positions, table)
    torch.testing.assert_close(turned, rotate(config, x, positions, layer_type), atol=2e-4, rtol=1e-5)
    torch.testing.assert_close(unapply_rope(turned, positions, table), x, atol=2e-4, rtol=1e-5)
    q = turned[:1, :1, -1:]
    scores = (turn_back(q, positions[0], table) * x[:1, :1]).sum(-1)
    torch.testing.assert_close(scores[0, 0], (q @ turned[:1, :1].mT)[0, 0, 0], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("kind", TYPES)
def test_types(kind):
    config = AutoConfig.for_model("llama", **COMMON, rope_parameters=dict(rope_type=kind, rope_theta=1e4, **TYPES[kind]))
    check(config, seq_len=317 if kind == "longrope" else None)


def test_dynamic_beyond_its_length():
    config = AutoConfig.for_model("llama", **COMMON, rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.))
    check(config, seq_len=617, length=600)


@pytest.mark.parametrize("family", CLASSES)
def test_families(family): check(AutoConfig.for_model(family, **COMMON))


@pytest.mark.parametrize("layer_idx", [0, 1])
def test_layers_that_differ(layer_idx):
    kinds = ["sliding_attention", "full_attention"]
    check(AutoConfig.for_model("gemma3_text", **COMMON, layer_types=kinds), layer_idx, layer_type=kinds[layer_idx])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype(dtype):
    table = rope_table(AutoConfig.for_model("llama", **COMMON))
    x = torch.randn(1, 2, 50, 64).to(dtype)
    back = unapply_rope(apply_rope(x, torch.arange(50), table), torch.arange(50), table)
    assert back.dtype == dtype
    torch.testing.assert_close(back, x, atol=3e-2, rtol=3e-2)
