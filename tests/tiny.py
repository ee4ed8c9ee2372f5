"Tiny random models: two layers, GQA 8 to 2 heads, one for each family that is tested."
from functools import cache

import torch
from transformers import (AutoModelForCausalLM, CohereConfig, Gemma2Config, Gemma3TextConfig, GemmaConfig, GraniteConfig, LlamaConfig,
                          MistralConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig)

BASE = dict(vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2,
            head_dim=32, max_position_embeddings=1024, bos_token_id=None, eos_token_id=None, pad_token_id=3, tie_word_embeddings=False)
NO_HEAD_DIM = {k: v for k, v in BASE.items() if k != "head_dim"}
CONFIGS = dict(
    llama=LlamaConfig(**BASE),
    mistral=MistralConfig(**BASE, sliding_window=None),
    mistral_window=MistralConfig(**BASE, sliding_window=24),
    qwen2=Qwen2Config(**NO_HEAD_DIM),
    qwen3=Qwen3Config(**BASE),
    gemma=GemmaConfig(**BASE),
    gemma2=Gemma2Config(**BASE, query_pre_attn_scalar=32, sliding_window=24),
    gemma3=Gemma3TextConfig(**BASE, query_pre_attn_scalar=32, sliding_window=24, layer_types=["sliding_attention", "full_attention"]),
    cohere=CohereConfig(**NO_HEAD_DIM),
    granite=GraniteConfig(**NO_HEAD_DIM, attention_multiplier=0.125),
    qwen3_moe=Qwen3MoeConfig(**BASE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64),
)


@cache
def tiny_model(name, attn="eager"):
    "A random model in float32; weights large enough that attention is not uniform."
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32, attn_implementation=attn).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1: p.normal_(0, 0.08)
    return model


def head_dim(model):
    c = model.config
    return getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads


def prompt(batch=1, length=150, seed=0, padding=(0, 31, 70)):
    "Random tokens and their attention mask; rows padded on the left when there are several."
    ids = torch.randint(4, 512, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, pad in enumerate(padding[:batch] if batch > 1 else ()): mask[row, :pad] = 0
    return dict(input_ids=ids.masked_fill(mask == 0, 3), attention_mask=mask)
