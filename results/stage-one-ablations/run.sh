#!/usr/bin/env bash
# All tables: run.sh PHOTOGRAPHS OUT, with PHOTOGRAPHS/train and PHOTOGRAPHS/val. Stops and goes on at any point; start it
# in several terminals to use several cores.
set -euo pipefail
photographs=$1 out=$2
export OMP_NUM_THREADS=1

for split in train val; do
    wavelatent prepare --data "$photographs/$split" --size 64 --out "$out/faces64-$split"
done
for table in discriminator gan-loss adaptive-weight high-frequency smc wavelet resolution; do
    wavelatent ablate "ablation-$table" --data "$out/faces64-train" --eval-data "$out/faces64-val" \
        --out "$out/ablations" --mixed-precision bf16
done
