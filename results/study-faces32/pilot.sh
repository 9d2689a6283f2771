#!/usr/bin/env bash
# One cell of the study, its reference kl-4 at seed 0, for longer than a cell is trained: how loss and KID fall with
# steps at 64 and at 32 px, to choose the size, the networks and the steps. Usage:
#
#     pilot.sh PHOTOGRAPHS OUT    PHOTOGRAPHS holds train/ and val/
#     tabulate_pilot.py OUT       pilot.json, pilot.md and pilot.png, beside the scripts
#
# Every command goes on where it was stopped, so the script can be run again, with more STEPS too. SIZES chooses a part,
# and parts may run side by side, each with OMP_NUM_THREADS=1. AE_STEPS holds one or several lengths of stage one, each
# with a stage two of its own. WAVELATENT names another command, such as "python cli.py".
set -euo pipefail
photographs=$1 out=$2
wavelatent=${WAVELATENT:-wavelatent}
train=${TRAIN:-$photographs/train} validation=${VALIDATION:-$photographs/val}
precision="--mixed-precision ${PRECISION:-bf16}"
quick="{every: ${EVERY:-1000}, num_samples: ${NUM:-1000}, num_reference: ${REFERENCE:-5000}}"

for size in ${SIZES:-64 32}; do
    $wavelatent prepare --data "$train" --size "$size" --out "$out/train-$size"
    $wavelatent prepare --data "$validation" --size "$size" --out "$out/val-$size"
    for ae_steps in ${AE_STEPS:-2000}; do
        run="$out/$size-$ae_steps"
        # shellcheck disable=SC2086  # the precision is two words
        $wavelatent train-ae study-ae train.steps="$ae_steps" --seed 0 \
            --data "$out/train-$size" --out "$run/ae" $precision
        $wavelatent evaluate reconstruction --ae "$run/ae" --data "$out/val-$size"
        $wavelatent encode --ae "$run/ae" --data "$out/train-$size" --flips --out "$run/latents"
        # shellcheck disable=SC2086
        $wavelatent train-diffusion study-unet train.steps="${STEPS:-20000}" "train.quick_evaluation=$quick" --seed 0 \
            --latents "$run/latents" --out "$run/unet" $precision
    done
done
