"""Nsight Compute's counters and compute-sanitizer's verdict as a stored result: nbs/results/kernel_counters.json.

python tools/counters.py NCU.txt SANITIZER.txt OUT.json    (the texts are made by tools/gpu.sh, parts counters and sanitize)
"""
import json
import re
import sys
from pathlib import Path

from spectral_nb.info import stamp

NAMES = {"Duration": "us", "DRAM Throughput": "dram_pct", "L2 Cache Throughput": "l2_pct", "L1/TEX Cache Throughput": "l1_pct", "Compute (SM) Throughput": "compute_pct", "Achieved Occupancy": "occupancy_pct", "Warp Cycles Per Issued Instruction": "cycles_an_instruction"}
SHAPES = ["1 x 32768"] * 3 + ["8 x 8192"] * 6 # nine launches, the second call of the first shape first


def rows(text):
    found = []
    for line in text.splitlines():
        if m := re.match(r"  (\w+) \((\d+), (\d+), 1\)x\((\d+), 1, 1\)", line): found.append(dict(kernel=m[1], programs=int(m[2]) * int(m[3]), threads=int(m[4])))
        elif found and (m := re.match(r"    (\S.*?)\s{2,}\S+\s+([\d.,]+)$", line)) and m[1] in NAMES: found[-1][NAMES[m[1]]] = float(m[2].replace(",", ""))
    return [dict(shape=shape) | row for shape, row in zip(SHAPES, found)]


if __name__ == "__main__":
    ncu, sanitizer = (Path(p).read_text() for p in sys.argv[1:3])
    found = rows(ncu)
    out = dict(**stamp("bash tools/gpu.sh OUT sanitize counters"), sanitizer=dict(tool="memcheck", cases="group4, padded; decode kernels, then the chunk kernel", summary=re.findall(r"ERROR SUMMARY: .*", sanitizer)), rows=found[:3] + found[-3:])
    Path(sys.argv[3]).write_text(json.dumps(out, indent=1) + "\n")
    for r in out["rows"]: print(r)
