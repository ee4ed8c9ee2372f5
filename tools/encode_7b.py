"Time and peak memory of spectral coding beside the prefill of a Mistral-7B shape; its last result is nbs/results/encode_7b.json (run then as .dev/encode7b.py)."
import torch,time,json,os,warnings
from transformers import MistralConfig, AutoModelForCausalLM, DynamicCache
from spectral_nb.cache import SpectralCache
from spectral_nb import attention
from spectral_nb.info import stamp
cfg=MistralConfig(vocab_size=32000,hidden_size=4096,intermediate_size=14336,num_hidden_layers=32,num_attention_heads=32,num_key_value_heads=8,head_dim=128,sliding_window=None,max_position_embeddings=131072)
torch.set_default_dtype(torch.float16)
with torch.device('cuda'): m=AutoModelForCausalLM.from_config(cfg,dtype=torch.float16).eval()
torch.set_default_dtype(torch.float32)
print('built',torch.cuda.memory_allocated()/2**30,flush=True)
rows=[]
for T in (8192,):
    ids=torch.randint(0,32000,(1,T),device='cuda')
    for name,impl,mk in (('dense','sdpa',lambda:DynamicCache(config=cfg)),('spectral:8x','spectral',lambda:SpectralCache(cfg,coding='spectral',ratio=8.))):
        m.set_attn_implementation(impl); ts=[]
        for i in range(3):
            c=mk(); torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats(); base=torch.cuda.memory_allocated(); t=time.perf_counter()
            with torch.no_grad(), warnings.catch_warnings(): warnings.simplefilter('ignore'); m(ids,past_key_values=c,logits_to_keep=1)
            torch.cuda.synchronize(); ts.append(time.perf_counter()-t); peak=torch.cuda.max_memory_allocated()-base
        rows.append(dict(codec=name,tokens=T,prefill_ms=round(1e3*sorted(ts)[1],1),all_ms=[round(1e3*x,1) for x in ts],peak_mib_above_weights=round(peak/2**20,1),ratio=round(getattr(c,'ratio',1.),3))); print(rows[-1],flush=True)
    import cProfile,pstats
    c=SpectralCache(cfg,coding='spectral',ratio=8.); p=cProfile.Profile(); torch.cuda.synchronize()
    with torch.no_grad(): p.enable(); m(ids,past_key_values=c,logits_to_keep=1); torch.cuda.synchronize(); p.disable()
    pstats.Stats(p).sort_stats('tottime').print_stats(12)
json.dump(dict(**stamp('python3 .dev/encode7b.py',device='cuda'),rows=rows),open(os.environ['OUT']+'/encode_7b.json','w'),indent=1)
