"What a decode step costs the host, measured without a GPU: kernels that do nothing stand for the compiled ones, everything around them is real."
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from spectral_nb import chunk_kernels, encode_kernels, kernels  # noqa: F401  (all are made before kernels are replaced)
from spectral_nb.cache import HotTier

SHAPE = dict(vocab_size=512, hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=4096,
             bos_token_id=None, eos_token_id=None, pad_token_id=3, tie_word_embeddings=False)


class NoKernel:
    "Stands for a Triton kernel, before and after it is compiled; counts its launches."
    function, packed_metadata = 0, ()

    def __init__(self, f, launched):
        code = getattr(f, "fn", f).__code__
        self.name, self.arg_names, self.launched, self.given = code.co_name, list(code.co_varnames[:code.co_argcount]), launched, None

    def __getitem__(self, grid): return self.first

    def first(self, *args, **kwargs):
        self.launched[self.name] += 1
        return self

    def run(self, x, y, z, stream, function, metadata, a, b, c, *args): # as the launchers that Triton compiles take them
        self.launched[self.name] += 1
        self.given = args


@contextmanager
def no_kernels():
    "Decode attention takes the path of a GPU; yields the number of launches by kernel."
    launched, old = Counter(), {n: getattr(kernels, n) for n in ("triton", "interpreted", "prepare", "decode", "merge", "_write", "decode_attention", "_check")}
    reserve = HotTier.reserve
    kernels.triton, kernels.interpreted = old["triton"] or SimpleNamespace(errors=SimpleNamespace(TritonError=RuntimeError)), lambda: True
    for n in ("prepare", "decode", "merge", "_write"): setattr(kernels, n, NoKernel(old[n], launched))
    kernels._check = lambda *args: None # what kernels that do nothing put out is not compared with PyTorch
    kernels.decode_attention = lambda *args: old["decode_attention"](*args).zero_() # nothing has been written there; `CountOps` leaves this out
    def zeroed(tier, room):
        reserve(tier, room)
        for t in tier.tensors().values(): t[:, :, tier.n:] = 0
    HotTier.reserve = zeroed
    try: yield launched
    finally:
        HotTier.reserve = reserve
        for n, f in old.items(): setattr(kernels, n, f)


class CountOps(TorchDispatchMode):
    "Counts torch's operations by name."
    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (name := func.overloadpacket.__name__) != "zero_": self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def tiny(layers, kind="llama"):
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, num_hidden_layers=layers) if kind == "llama" else MistralConfig(**SHAPE, num_hidden_layers=layers, sliding_window=None)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def steps(step, n=40, warm=8):
    "Median seconds of a step."
    times = []
    for i in range(n + warm):
        t = time.thread_time()
        step()
        times.append(time.thread_time() - t)
    return sorted(times[warm:])[n // 2]


class LiveBytes(TorchDispatchMode):
    "Bytes of the storages that are alive, of those made while this lasts: `now`, `peak`, and the innermost of the functions watched at the peak."
    def __init__(self, watched=()): # Triples of owner, name, label
        super().__init__()
        self.live, self.now, self.peak, self.stages, self.at, self.watched = {}, 0, 0, [], "", watched

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in known: self.hold(t.untyped_storage())
        return out

    def hold(self, storage):
        ref = StorageWeakRef(storage)
        if ref.cdata in self.live and not self.live[ref.cdata][0].expired(): return
        self.live[ref.cdata] = ref, storage.nbytes()
        self.now = sum(n for r, n in self.live.values() if not r.expired())
        if self.now > self.peak: self.peak, self.at = self.now, " < ".join(self.stages[::-1][:3])

    def __enter__(self):
        self.undo = [(o, n, getattr(o, n)) for o, n, _ in self.watched]
        for o, n, label in self.watched:
            def named(*args, inner=getattr(o, n), label=label, **kwargs):
                self.stages.append(label)
                try: return inner(*args, **kwargs)
                finally: self.stages.pop()
            setattr(o, n, named)
        return super().__enter__()

    def __exit__(self, *exc):
        for o in self.undo: setattr(*o)
        return super().__exit__(*exc)
