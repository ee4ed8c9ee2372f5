#!/usr/bin/env bash
# What needs a GPU, in parts of some minutes each; results to be copied to nbs/results/ and drawn by tools/results.py, tools/pictures.py and tools/readme.py:
#   bash tools/gpu.sh OUT [checks] [models] [speed] [encode] [decode] [tune] [sanitize] [counters] [eval]
# Unsloth has a script of its own: python tests/gpu_unsloth.py session --out OUT
set -uo pipefail
out=${1:?usage: bash tools/gpu.sh OUT [part ...]}; shift
parts=${*:-checks models speed encode decode tune sanitize counters eval}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}.:tests"
mkdir -p "$out"; logs=$(mktemp -d)
say() { printf '== %ss %s\n' "$SECONDS" "$*"; }
bench() { timeout "$2" python3 -m spectral_nb.cli bench "$1" --json "$out/bench_$1.json" 2>&1 | grep -E "^{'|Error" | cut -c1-420; }
merge() { # what parts of it wrote to OUT/NAME_?.json
    python3 - "$out" "$1" <<'E2'
import json, sys
from pathlib import Path
out, name = Path(sys.argv[1]), sys.argv[2]
found = [json.loads(p.read_text()) for p in sorted(out.glob(f"{name}_?.json"))]
if found: (out / f"{name}.json").write_text(json.dumps({**found[0], "rows": [r for f in found for r in f["rows"]]}, indent=1) + "\n")
E2
    rm -f "$out/$1"_?.json
}
small='import torch
from spectral_nb import kernels
from spectral_nb.speed import coded_layer
for b, n in ((1, 32768), (8, 8192)):
    l, s = coded_layer(b, n, device="cuda")
    for _ in range(2): kernels.attend(l, *s)
torch.cuda.synchronize()'

for part in $parts; do
    case $part in
    checks) # every kernel variant in both types, kept launches, decode graphs
        i=0
        for cases in "group4 group1 group2_batch group16" "group7 dim64 dim80 dim96" "dim256 float16 bfloat16 one_bit many_bits" "padded softcap interleaved many_landmarks" "partial_rotary one_page segments no_landmarks" "group16_dim64 biased biased_float16"; do
            i=$((i + 1)); timeout 150 python3 tests/kernels_gpu.py "$out/kernels_$i.json" $cases >"$logs/kernels_$i" 2>&1 &
            timeout 200 python3 tests/chunks.py "$out/chunks_$i.json" $cases >"$logs/chunks_$i" 2>&1 &
        done
        timeout 300 python3 tests/graph_gpu.py "$out/graph.json" >"$logs/graph" 2>&1 &
        timeout 150 python3 tests/kernels_plans.py cuda >"$logs/plans" 2>&1 &
        wait
        for f in "$logs"/{kernels_?,chunks_?,graph,plans}; do echo "$(basename "$f"): $(grep -c "'error'" "$f") cases"; grep -v "'error'" "$f" | tail -n 4 | cut -c1-300; done
        merge kernels; merge chunks;;
    models) # random ones, 8 at a time
        for i in 1 2 3 4 5 6 7 8; do OMP_NUM_THREADS=2 timeout 190 python3 tests/random_models.py "$out/random_models_$i.json" 150 $((RANDOM * 1000)) >"$logs/models_$i" 2>&1 & done
        wait
        tail -qn 3 "$logs"/models_? | cut -c1-400
        merge random_models;;
    speed) bench attention 120; bench queries 150;;
    encode) bench encode 60; timeout 150 python3 tools/encode_7b.py "$out/encode_7b.json" 2>&1 | tail -n 30 | cut -c1-300;;
    decode) bench decode 250;;
    tune) timeout 200 python3 tools/tune_kernels.py "$out/tune.json" 150 2>&1 | cut -c1-300;;
    sanitize) for t in kernels_gpu chunks; do timeout 90 compute-sanitizer --tool memcheck python3 tests/$t.py "$logs/s.json" group4 padded 2>&1; done | tee "$out/sanitizer.txt" | grep -E "SUMMARY|Error" | cut -c1-200;;
    counters) echo "$small" >"$logs/small.py"
        timeout 90 ncu --clock-control none -k regex:"^(prepare|decode|merge)" --launch-skip 3 -c 9 --section SpeedOfLight --section Occupancy --section WarpStateStats python3 "$logs/small.py" >"$out/ncu.txt" 2>&1
        touch "$out/sanitizer.txt" # of the part before, where it ran
        python3 tools/counters.py "$out/ncu.txt" "$out/sanitizer.txt" "$out/kernel_counters.json";;
    eval) # both models; at 4096 tokens every codec and 40 prompts
        few="dense spectral:6x spectral:8x spectral:10x spectral:12x spectral:16x hf-int4 kivi:2/2 turbo:3/3"
        for context in 4096 2048 1024; do
            codecs=$few trials=20; [ $context = 4096 ] && codecs="$few hf-int2 kivi:4/4 turbo:2/2 rank:16/32 rank:32/64" trials=40
            for model in pocket tests/models/qwen3; do
                name=llama; [ $model = pocket ] || name=qwen3
                OMP_NUM_THREADS=2 python3 -m spectral_nb.cli eval --model $model --context $context --trials $trials --seed 1 $(printf -- '--codec %s ' $codecs) --device cuda --json "$out/eval_${name}_$context.json" >"$logs/${name}_$context" 2>&1 &
            done
        done
        wait
        for f in "$logs"/{llama,qwen3}_*; do echo "$(basename "$f")"; grep "^|" "$f" || tail -c 400 "$f"; done;;
    *) echo "unknown part $part" >&2; exit 2;;
    esac
    say "$part"
done
