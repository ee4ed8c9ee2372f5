"Run by test_kernels.py with TRITON_INTERPRET=1: a decode graph whose replays see what Python saw at its capture, as on a GPU, against single steps."
import contextlib
import copy
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from spectral_nb import kernels
from spectral_nb.cache import SpectralCache
from spectral_nb.codec import SpectralConfig
from spectral_nb.graph import DecodeGraph


class Recorded(DecodeGraph):
    "Stands in for the device: a capture leaves no trace, and a replay runs the step with the lengths that were captured."
    def lengths(self, to=None):
        hot = [o.hot for o in self.cache.layers]
        if to is None: return [h.n for h in hot]
        for h, n in zip(hot, to): h.n = n

    @contextlib.contextmanager
    def recording(self, graph):
        tensors = [t for o in self.cache.layers for t in o.hot.tensors().values()] + [self.counter, self.positions]
        held, self.frozen = [t.clone() for t in tensors], self.lengths()
        yield
        for t, h in zip(tensors, held): t.copy_(h)

    def replay(self):
        now = self.lengths()
        self.lengths(self.frozen)
        for o in self.cache.layers: kernels.counters[o.hot] = self.counter
        self.logits.copy_(self.forward(self.ids, self.positions))
        kernels.counters.clear()
        self.counter += 1
        self.positions += 1
        self.lengths(now)


torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32, vocab_size=100)).eval()
model.set_attn_implementation("spectral")
with torch.no_grad():
    a = SpectralCache(model.config, SpectralConfig(coding="spectral", bits=3., fit_length=256, hot_buffer_size=64))
    model(torch.randint(0, 100, (2, 564)), past_key_values=a)
    assert len(a.layers[0].hot) == 180 and len(a.layers[0].cold) == 384
    b = copy.deepcopy(a)
    graph = Recorded(model, a)
    torch.cuda.synchronize = lambda: None
    torch.cuda.graph = graph.recording
    torch.cuda.CUDAGraph = lambda: type("Graph", (), dict(replay=lambda _: graph.replay()))()
    for i in range(16):
        one = torch.randint(0, 100, (2, 1))
        want = model(one, past_key_values=b).logits[:, -1]
        got = graph(one)
        assert torch.allclose(got, want, atol=1e-5), (i, (got - want).abs().max())
    for wrong in (one[:1], one[:, :0], one.expand(-1, 2)): # one row's token would be given to all
        try: graph(wrong)
        except ValueError as e: assert "input_ids [2, 1]" in str(e)
        else: raise AssertionError(wrong.shape)
    scratch, captures = kernels.scratch.held["mo", torch.device("cpu"), 0], graph.captures
    kernels.scratch("mo", torch.device("cpu"), torch.float32, 2 ** 20) # another cache asks for more than the graph was captured with
    assert any(t is scratch for t in graph.scratch), "memory that the graph writes to could be freed"
    for change in (lambda c: c.reorder_cache(torch.tensor([1, 0])), lambda c: model(one, past_key_values=c)): # between two steps somebody else changes the cache
        for c in (a, b): change(c)
        one = torch.randint(0, 100, (2, 1))
        want = model(one, past_key_values=b).logits[:, -1]
        assert torch.allclose(graph(one), want, atol=1e-5)
    assert graph.captures == captures + 2
    kernels.stream_of = lambda device: 1 # another stream has scratch memory of its own, and a graph of its own
    one = torch.randint(0, 100, (2, 1))
    want = model(one, past_key_values=b).logits[:, -1]
    assert torch.allclose(graph(one), want, atol=1e-5) and graph.captures == captures + 3
    first, second = (kernels.scratch.held["mo", torch.device("cpu"), i] for i in range(2))
    assert first.data_ptr() != second.data_ptr()
    graph.release()
    held, forward, calls = [len(o.hot) for o in a.layers], graph.forward, []
    def failing(*args):
        calls.append(forward(*args))
        if len(calls) == 2: raise RuntimeError("inside the capture")
        return calls[-1]
    graph.forward = failing
    try: graph.capture(one)
    except RuntimeError: pass
    else: raise AssertionError("a capture that fails must raise")
    by_kernels = kernels.decode_attention
    def broken(*args): raise RuntimeError("a kernel that fails")
    graph.forward, kernels.decode_attention = forward, broken
    try: graph.capture(one)
    except RuntimeError as e: assert "PyTorch stands in" in str(e)
    else: raise AssertionError("a step by PyTorch must not be captured")
    kernels.decode_attention = by_kernels
    kernels._broken.clear()
    assert graph.graph is None and [len(o.hot) for o in a.layers] == held and not any(o.hot in kernels.counters for o in a.layers)
assert a.get_seq_length() == b.get_seq_length() == 584 and len(a.layers[0].cold) == len(b.layers[0].cold) > 384 and graph.captures >= 2, (graph.captures, a.layers)
for x, y in zip(a.layers, b.layers):
    for s, t in zip(x.hot.states(), y.hot.states()): assert torch.equal(s, t)
assert not kernels._broken, kernels._broken
print("same logits and hot tiers over", i + 1, "steps and", graph.captures, "captures")
