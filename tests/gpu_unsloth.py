"""Unsloth on a GPU, stock against patched; writes JSON. Not collected by pytest.

    python tests/gpu_unsloth.py parity  --json nbs/results/unsloth_gpu_parity.json
    python tests/gpu_unsloth.py bench   --json nbs/results/unsloth_gpu.json [--four-bit] [--layers 32] [--lengths 4096 16384 32768] [--batches 1 4]
    python tests/gpu_unsloth.py --small bench --json /tmp/x.json        a rehearsal with a tiny model (CPU too, through tests/unsloth_cpu.py)
"""
import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import torch

if torch.cuda.is_available(): import unsloth  # noqa: F401
else: import unsloth_cpu  # noqa: F401
from tiny import CONFIGS, head_dim, prompt, tiny_model
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedTokenizerFast
from unsloth import FastLanguageModel

from spectral_nb.codec import SpectralConfig
from spectral_nb.integration import spectral

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16 if DEVICE == "cuda" else torch.float32


def save(model, path, vocab):
    model.save_pretrained(path, max_shard_size="4GB")
    tok = Tokenizer(models.WordLevel(vocab={f"t{i}": i for i in range(vocab)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=tok, unk_token="t0", bos_token="t1", eos_token="t2", pad_token="t3").save_pretrained(path)


def load(path, length, four_bit=False):
    model = FastLanguageModel.from_pretrained(str(path), dtype=DTYPE, load_in_4bit=four_bit, max_seq_length=length, use_gradient_checkpointing=False)[0]
    FastLanguageModel.for_inference(model)
    return model


def sync(): torch.cuda.synchronize() if DEVICE == "cuda" else None


def generate(model, ids, new, mask=None):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=3, return_dict_in_generate=True, output_logits=True)


def parity():
    "Nothing lost: stock and patched, both plans, left-padded batch, half precision and real kernels."
    rows = []
    for name in "llama mistral mistral_window qwen2 qwen3 gemma gemma2".split():
        with tempfile.TemporaryDirectory() as d:
            save(tiny_model.__wrapped__(name), d, CONFIGS[name].vocab_size)
            model = load(d, 512)
            for batch in (1, 3):
                inputs = {k: v.to(DEVICE) for k, v in prompt(batch).items()}
                stock = generate(model, inputs["input_ids"], 24, inputs["attention_mask"])
                for plan in "AB":
                    with spectral(model, spectral_config=SpectralConfig.lossless(head_dim(model), coding="rank", block_size=32, hot_buffer_size=16), plan=plan) as patched:
                        ours = generate(model, inputs["input_ids"], 24, inputs["attention_mask"])
                    a, b = ours.logits[0].float(), stock.logits[0].float()
                    rows.append(dict(family=name, batch=batch, plan=plan, same_tokens=(ours.sequences == stock.sequences).float().mean().item(),
                                     second_logits=((ours.logits[1] - stock.logits[1]).float().abs().max() / b.abs().max()).item(),
                                     first_logits=((a - b).abs().max() / b.abs().max()).item(), prefill=patched.prefill, decode=patched.decode))
                    print(rows[-1], flush=True)
    return rows


def held_nbytes(cache):
    "Bytes of the storages behind a stock cache."
    if hasattr(cache, "nbytes"): return cache.nbytes
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for pair in cache for t in pair}.values())


def launches(model, ids, cache):
    "Kernels that one decode step launches."
    if DEVICE != "cuda": return None
    from torch.profiler import ProfilerActivity, profile
    n = cache.get_seq_length() if hasattr(cache, "get_seq_length") else cache[0][0].shape[2]
    with torch.inference_mode(), torch.autocast("cuda", dtype=DTYPE), profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as prof:
        model(input_ids=ids[:, -1:], past_key_values=cache, position_ids=torch.full((len(ids), 1), n, device=ids.device), use_cache=True, return_dict=True)
    return sum(e.count for e in prof.key_averages() if "LaunchKernel" in e.key)


def measure(model, batch, length, new):
    "Peak memory over the weights, bytes of the cache, milliseconds a decoded token."
    ids = torch.randint(4, 512, (batch, length), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    generate(model, ids, 2)
    times = []
    for n in (1, new + 1):
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            base = torch.cuda.memory_allocated()
        sync()
        start = time.perf_counter()
        out = generate(model, ids, n)
        sync()
        times.append(time.perf_counter() - start)
    cache = out.past_key_values
    row = dict(batch=batch, length=length, prompt_s=times[0], ms_per_token=1e3 * (times[1] - times[0]) / new, cache_nbytes=held_nbytes(cache))
    if DEVICE == "cuda": row |= dict(peak_nbytes=torch.cuda.max_memory_allocated() - base, peak_with_weights=torch.cuda.max_memory_allocated())
    del out
    return row | dict(launches=launches(model, ids, cache))


def bench(args):
    shape = dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=32768, num_hidden_layers=args.layers)
    if args.small: shape |= dict(hidden_size=256, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, vocab_size=512, num_hidden_layers=2)
    longest, rows = max(args.lengths) + 512, []
    config = MistralConfig(**shape, max_position_embeddings=longest, sliding_window=None, rope_parameters=dict(rope_type="default", rope_theta=1e6), bos_token_id=1, eos_token_id=2, pad_token_id=3)
    with tempfile.TemporaryDirectory() as d:
        with torch.device(DEVICE): model = AutoModelForCausalLM.from_config(config, dtype=DTYPE)
        save(model, d, config.vocab_size)
        del model
        if DEVICE == "cuda": torch.cuda.empty_cache()
        model = load(d, longest, args.four_bit)
    for batch in args.batches:
        for length in args.lengths:
            for way, kw in dict(stock=None, spectral={}, spectral_triton=dict(use_triton_kernel=True)).items():
                row = dict(way=way, four_bit=args.four_bit)
                try:
                    if kw is None: row |= measure(model, batch, length, args.new)
                    else:
                        with spectral(model, ratio=args.ratio, **kw): row |= measure(model, batch, length, args.new)
                except torch.cuda.OutOfMemoryError: row |= dict(batch=batch, length=length, error="out of memory")
                rows.append(row)
                print(row, flush=True)
                for layer in model.model.layers: # the stock path keeps its buffers on the modules
                    for name in ("paged_attention_K", "paged_attention_V", "paged_attention"): layer.self_attn.__dict__.pop(name, None)
    return rows


if __name__ == "__main__":
    p = argparse.ArgumentParser()
    p.add_argument("what", choices=["parity", "bench"])
    p.add_argument("--json", required=True)
    p.add_argument("--small", action="store_true")
    p.add_argument("--four-bit", action="store_true")
    p.add_argument("--layers", type=int, default=32)
    p.add_argument("--ratio", type=float, default=8)
    p.add_argument("--new", type=int, default=64)
    p.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 32768])
    p.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    args = p.parse_args()
    rows = parity() if args.what == "parity" else bench(args)
    versions = {m: __import__(m).__version__ for m in ("torch", "transformers", "unsloth")}
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    Path(args.json).write_text(json.dumps(dict(device=device, **versions, ratio=args.ratio, rows=rows), indent=1) + "\n")
