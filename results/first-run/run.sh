#!/usr/bin/env bash
# The first run, from photographs to metrics. Usage: run.sh PHOTOGRAPHS OUT, where PHOTOGRAPHS holds train/ and val/.
# Each command goes on where it was stopped, so the script can be run again. The two variants may run side by side, each
# with VARIANTS set to its name. WAVELATENT names another command, such as "python cli.py".
set -euo pipefail
photographs=$1 out=$2
here=$(cd "$(dirname "$0")" && pwd)
wavelatent=${WAVELATENT:-wavelatent}
train="$out/faces64-train" val="$out/faces64-val"

$wavelatent prepare --data "$photographs/train" --size 64 --out "$train"
$wavelatent prepare --data "$photographs/val" --size 64 --out "$val"
for variant in ${VARIANTS:-kl4 bounded16}; do
    ae="$out/ae-$variant" latents="$out/latents-$variant" unet="$out/unet-$variant" samples="$out/samples-$variant"
    $wavelatent train-ae "$here/ae-$variant.yaml" --data "$train" --out "$ae" --mixed-precision bf16
    $wavelatent encode --ae "$ae" --data "$train" --flips --out "$latents"
    $wavelatent train-diffusion "$here/unet.yaml" --latents "$latents" --out "$unet" --mixed-precision bf16
    $wavelatent sample --run "$unet" --num 2000 --steps 18 --out "$samples"
    $wavelatent evaluate reconstruction --ae "$ae" --data "$val"
    $wavelatent evaluate generation --samples "$samples" --data "$train"
done
