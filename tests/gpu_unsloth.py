"""Unsloth on a GPU, stock against patched; writes JSON after every row. Not collected by pytest.

    python tests/gpu_unsloth.py session --out DIR [--seconds 300] [--stages parity fp16 4bit]   the below in one process, what matters most first: what is over at the end of its
                                                                           time is on disk; about 45 s of it go into the import. The checkpoint (14.5 GB) goes to --model, default /dev/shm/u7b
    python tests/gpu_unsloth.py parity --json parity.json                  six families and the pocket model, float16 and bfloat16
    python tests/gpu_unsloth.py make --model DIR [--layers 32]             a checkpoint in the shape of Mistral 7B, random weights, float16
    python tests/gpu_unsloth.py bench --model DIR --json bench.json [--four-bit] [--lengths 4096 16384 32768] [--batches 1 4]
Before a session, in seconds: python tests/kernels_plans.py cuda (launches that are kept read no stale address).
With --small all of them also run on a CPU, through tests/unsloth_cpu.py, in seconds: a rehearsal. Results belong in nbs/results/ (unsloth_gpu_parity.json, _fp16.json, _4bit.json), which 06_integration shows:
copy them there and run the notebook.
"""
import argparse
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

START = time.time()
sys.path.insert(0, str(Path(__file__).parent))
import torch

if torch.cuda.is_available(): import unsloth  # noqa: F401
else: import unsloth_cpu  # noqa: F401
from tiny import CONFIGS, head_dim, prompt, tiny_model
from tokenizers import Tokenizer, models
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, PreTrainedTokenizerFast, StoppingCriteria
from unsloth import FastLanguageModel

from spectral_nb.codec import SpectralConfig
from spectral_nb.integration import spectral

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = dict(float16=torch.float16, bfloat16=torch.bfloat16, float32=torch.float32)


def say(*what): print(f"{time.time() - START:6.1f}s", *what, flush=True)


class Rows(list):
    "Rows of a table, on disk as soon as they are known."
    def __init__(self, args):
        super().__init__()
        versions = {m: __import__(m).__version__ for m in ("torch", "transformers", "unsloth")}
        self.path, self.head = Path(args.json), dict(device=torch.cuda.get_device_name() if CUDA else "cpu", **versions, command=" ".join(sys.argv))

    def add(self, **row):
        self.append(row)
        say(row)
        self.path.write_text(json.dumps(self.head | dict(rows=self), indent=1) + "\n")


def save(model, path, vocab):
    model.save_pretrained(path, max_shard_size="3GB")
    tok = Tokenizer(models.WordLevel(vocab={f"t{i}": i for i in range(vocab)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=tok, unk_token="t0", bos_token="t1", eos_token="t2", pad_token="t3").save_pretrained(path)


def load(path, length, dtype, four_bit=False):
    model = FastLanguageModel.from_pretrained(str(path), dtype=dtype, load_in_4bit=four_bit, max_seq_length=length, use_gradient_checkpointing=False)[0]
    FastLanguageModel.for_inference(model)
    return model


def sync(): torch.cuda.synchronize() if CUDA else None


def clean(model=None):
    "Drop what Unsloth keeps on its modules, and what the allocator holds."
    for layer in model.model.layers if model is not None else ():
        for name in ("paged_attention_K", "paged_attention_V", "paged_attention", "temp_QA", "temp_KV", "RH_Q", "attention", "temp_O"): layer.self_attn.__dict__.pop(name, None)
    gc.collect()
    if CUDA: torch.cuda.empty_cache()


def generate(model, ids, new, mask=None, pad=3, **kw):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=pad, return_dict_in_generate=True, **kw)


# --- nothing may be lost

def late(args): return time.time() - START > getattr(args, "until", float("inf"))


def parity(args):
    "Lossless setting: stock and patched, both plans, one row and a left-padded batch, real kernels."
    rows = Rows(args)
    dtypes = args.dtypes if CUDA else ["float32"]
    for dtype in dtypes:
        try: pocket(rows, dtype, args)
        except Exception as e: rows.add(what="pocket", dtype=dtype, error=repr(e)[:300])
        clean()
    for dtype in dtypes:
        for name in "llama mistral qwen3 qwen2 mistral_window gemma gemma2".split()[:2 if args.small else None]: # the last one compiles for half a minute
            if late(args):
                rows.add(what="lossless", family=name, dtype=dtype, skipped="no time was left")
                continue
            with tempfile.TemporaryDirectory() as d:
                save(tiny_model.__wrapped__(name), d, CONFIGS[name].vocab_size)
                model = load(d, 512, DTYPES[dtype])
            for batch in (1, 3):
                inputs = {k: v.to(DEVICE) for k, v in prompt(batch).items()}
                kw = dict(mask=inputs["attention_mask"], output_logits=True)
                stock = generate(model, inputs["input_ids"], 24, **kw)
                for plan in "AB":
                    row = dict(what="lossless", family=name, dtype=dtype, batch=batch, plan=plan)
                    try:
                        with spectral(model, spectral_config=SpectralConfig.lossless(head_dim(model), coding="rank", block_size=32, hot_buffer_size=16), plan=plan) as patched:
                            ours = generate(model, inputs["input_ids"], 24, **kw)
                        err = lambda i: ((ours.logits[i] - stock.logits[i]).float().abs().max() / stock.logits[i].float().abs().max()).item()
                        row |= dict(same_tokens=(ours.sequences == stock.sequences).float().mean().item(), first_logits=err(0), second_logits=err(1), prefill=patched.prefill, decode=patched.decode)
                    except Exception as e: row |= dict(error=repr(e)[:300])
                    rows.add(**row)
                again = generate(model, inputs["input_ids"], 24, **kw)
                rows.add(what="unpatched again", family=name, dtype=dtype, batch=batch, bit_for_bit=torch.equal(torch.stack(again.logits), torch.stack(stock.logits)))
            del model, stock, ours, again
            clean()
    return rows


def pocket(rows, dtype, args):
    "Recall of the trained model of the wheel, where its weights are at hand."
    from spectral_nb.needle import answer_matches, make_needles, plant
    from spectral_nb.pocket import data_path, haystack
    tok, model = AutoTokenizer.from_pretrained(data_path()), load(data_path(), 4096, DTYPES[dtype])
    rng, trials, length = random.Random(0), [], 1000 if args.small else 3000
    for depth in (.1, .3, .5, .7, .9):
        needle = make_needles(1, rng)[0]
        trials.append((plant(tok, haystack("report")[0], needle, depth, length).ids, needle))
    ids = torch.tensor([t for t, _ in trials], device=DEVICE)
    ways = dict(stock=None, rank=dict(coding="rank", block_size=128, k_rank_keys=64, k_rank_values=128), spectral6=dict(ratio=6), spectral8=dict(ratio=8), spectral8_torch=dict(ratio=8, use_triton_kernel=False))
    for way, kw in ways.items():
        row = dict(what="pocket", way=way, dtype=dtype, length=length)
        try:
            if kw is None: out = generate(model, ids, 8, pad=2)
            else:
                with spectral(model, **kw): out = generate(model, ids, 8, pad=2)
                row |= dict(ratio=out.past_key_values.ratio)
            row |= dict(recall=sum(answer_matches(tok.decode(o[length:]), n) for o, (_, n) in zip(out.sequences, trials)) / len(trials))
        except Exception as e: row |= dict(error=repr(e)[:300])
        rows.add(**row)


# --- memory and time

def make(args):
    shape = dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=32768, num_hidden_layers=args.layers)
    if args.small: shape |= dict(hidden_size=256, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, vocab_size=512, num_hidden_layers=2)
    config = MistralConfig(**shape, max_position_embeddings=33792, sliding_window=None, rope_parameters=dict(rope_type="default", rope_theta=1e6), bos_token_id=1, eos_token_id=2, pad_token_id=3)
    with torch.device(DEVICE): model = AutoModelForCausalLM.from_config(config, dtype=torch.float16 if CUDA else torch.float32)
    say("made")
    save(model, args.model, config.vocab_size)
    say("saved")


class Clock(StoppingCriteria):
    "Stops nothing: marks the time of every token, the peak memory of the prompt, and what one step launches."
    def __init__(self, profiled): self.times, self.step, self.profiled, self.prof, self.prompt_peak, self.launched = [], 0, profiled, None, None, None

    def mark(self):
        if not CUDA: return self.times.append(time.perf_counter())
        self.times.append(torch.cuda.Event(enable_timing=True))
        self.times[-1].record()

    def __call__(self, input_ids, scores, **kwargs):
        self.mark()
        if len(self.times) == 2 and CUDA: # the first of them was the start
            self.prompt_peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        self.step += 1
        if self.step == self.profiled + 1:
            sync()
            self.prof.__exit__(None, None, None)
            self.launched = self.count()
        if self.step == self.profiled:
            sync()
            self.prof = profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * CUDA)
            self.prof.__enter__()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def count(self):
        events = self.prof.key_averages()
        count = lambda *names: sum(e.count for e in events if any(n in e.key for n in names))
        out = dict(launches=count("LaunchKernel"), synchronizations=count("StreamSynchronize", "DeviceSynchronize"), items=count("aten::_local_scalar_dense"), ops=count("aten::"))
        if CUDA: out |= dict(gpu_busy_ms=sum(e.self_device_time_total for e in events) / 1e3, top={e.key[:60]: [e.count, round(e.self_device_time_total / 1e3, 3)] for e in
                                                                                            sorted(events, key=lambda e: -e.self_device_time_total)[:6]})
        self.prof = None
        return out

    def milliseconds(self):
        sync()
        return [a.elapsed_time(b) if CUDA else 1e3 * (b - a) for a, b in zip(self.times, self.times[1:])]


def held_nbytes(cache):
    "Bytes of the storages behind a stock cache."
    if hasattr(cache, "nbytes"): return cache.nbytes
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for pair in cache for t in pair}.values())


def measure(model, batch, length, new):
    "One generate: seconds to the first token, milliseconds a token after it, peak memory over the weights, bytes of the cache."
    ids = torch.randint(4, 512, (batch, length), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    clean(model)
    if CUDA: torch.cuda.reset_peak_memory_stats()
    base, clock = torch.cuda.memory_allocated() if CUDA else 0, Clock(new // 2)
    sync()
    clock.mark()
    out = generate(model, ids, new, stopping_criteria=[clock])
    first, *steps = clock.milliseconds()
    steps = [t for i, t in enumerate(steps[2:], 2) if abs(i - new // 2) > 2] # without warm-up and the profiled steps
    row = dict(prompt_s=first / 1e3, ms_per_token=statistics.median(steps), ms_per_token_mean=statistics.mean(steps), cache_nbytes=held_nbytes(out.past_key_values), **clock.launched)
    if CUDA: row |= dict(prompt_peak_nbytes=clock.prompt_peak - base, decode_peak_nbytes=torch.cuda.max_memory_allocated() - base, peak_nbytes=max(clock.prompt_peak, torch.cuda.max_memory_allocated()) - base, weights_nbytes=base)
    return row


def cells(args):
    "Batches and lengths, those that matter most first: smallest, largest, longest for one row, largest batch of the shortest, the rest."
    (b0, *_), (*_, b1), (l0, *_), (*_, l1) = args.batches, args.batches, args.lengths, args.lengths
    return list(dict.fromkeys([(b0, l0), (b1, l1), (b0, l1), (b1, l0), *((b, n) for n in args.lengths for b in args.batches)]))


def bench(args):
    rows = Rows(args)
    model = load(args.model, max(args.lengths) + 512, torch.float16 if CUDA else torch.float32, args.four_bit)
    say("loaded")
    ways = dict(stock=None, spectral=dict(ratio=args.ratio), spectral_torch=dict(ratio=args.ratio, use_triton_kernel=False)) # the first with the kernels
    compiled = set()
    for batch, length in cells(args):
        found = {way: [] for way in args.ways if way != "spectral_torch" or length == min(args.lengths)}
        def run(way):
            for _ in range(2 if (batch, way) not in compiled else 0): generate(model, torch.full((batch, 1024 if CUDA else 300), 7, device=DEVICE), 4) # kernels are compiled and tuned here
            compiled.add((batch, way))
            found[way].append(measure(model, batch, length, args.new))
        for turn in range(args.turns): # stock and patched take turns: the host's speed changes from minute to minute
            for way in found:
                if late(args) or found[way][:1] == ["failed"]: continue
                try:
                    if ways[way] is None: run(way)
                    else:
                        with spectral(model, **ways[way], layer_weights="equal"): run(way)
                except Exception as e: found[way] = ["failed", repr(e)[:300]]
                clean(model)
        for way, turns in found.items():
            row = dict(way=way, four_bit=args.four_bit, batch=batch, length=length, new=args.new)
            if ways[way]: row |= dict(ratio=args.ratio, layer_weights="not measured: every layer gets the same share")
            if turns[:1] == ["failed"]: row |= dict(error=turns[1])
            elif not turns: row |= dict(error="no time was left")
            else:
                middle = lambda n: statistics.median(t[n] for t in turns)
                row |= turns[-1] | dict(prompt_s=middle("prompt_s"), ms_per_token=middle("ms_per_token"), ms_per_token_mean=middle("ms_per_token_mean"), turns=[round(t["ms_per_token"], 2) for t in turns])
            rows.add(**row)
    return rows


def session(args):
    "Stages in one process, within `--seconds` of the start of this process, with an equal share of the time for each."
    out, model = Path(args.out), Path(args.model or ("/dev/shm/u7b" if CUDA else tempfile.mkdtemp()))
    out.mkdir(parents=True, exist_ok=True)
    args.model, args.new, args.ways = str(model), min(args.new, 48), ["stock", "spectral"]
    begun = time.time() - START
    def stage(name, f, until, **kw):
        say("==", name)
        try: f(argparse.Namespace(**vars(args) | dict(json=out / f"unsloth_gpu_{name}.json", until=until) | kw))
        except Exception as e: say("==", name, "failed:", repr(e)[:500])
        clean()
    for i, name in enumerate(args.stages, 1):
        until = begun + (args.seconds - begun) * i / len(args.stages)
        if name == "parity": stage(name, parity, until, dtypes=["bfloat16", "float16"])
        else:
            if not (model / "config.json").exists(): stage("make", make, until)
            stage(name, bench, until, four_bit=name == "4bit")


if __name__ == "__main__":
    p = argparse.ArgumentParser()
    p.add_argument("what", choices=["session", "parity", "make", "bench"])
    p.add_argument("--json", default=os.devnull)
    p.add_argument("--out", default=".")
    p.add_argument("--stages", nargs="+", default=["parity", "fp16", "4bit"])
    p.add_argument("--seconds", type=float, default=300)
    p.add_argument("--model")
    p.add_argument("--small", action="store_true")
    p.add_argument("--four-bit", action="store_true")
    p.add_argument("--dtypes", nargs="+", default=["float16", "bfloat16"])
    p.add_argument("--layers", type=int, default=32)
    p.add_argument("--ratio", type=float, default=8)
    p.add_argument("--new", type=int, default=80)
    p.add_argument("--turns", type=int, default=3)
    p.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 32768])
    p.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    p.add_argument("--ways", nargs="+", default=["stock", "spectral", "spectral_torch"])
    args = p.parse_args()
    dict(session=session, parity=parity, make=make, bench=bench)[args.what](args)
