#!/usr/bin/env bash
# What is measured here, from two latent caches to metrics. Usage:
#
#     run.sh train    CACHES OUT           every variant and seed
#     run.sh evaluate CACHES OUT IMAGES    FID of each, 5,000 samples by DPM-Solver++ 2M at 20 steps
#     run.sh samplers CACHES OUT IMAGES    FID of one run by every sampler and number of steps
#
# CACHES holds latents-kl4 and latents-kl32 (see README.md), IMAGES is what they were made from, prepared at 64 px.
# Every command goes on where it was stopped, so the script can be run again; VARIANTS and SEEDS choose a part, and
# parts may run side by side. WAVELATENT names another command, such as "python cli.py".
set -euo pipefail
stage=$1 caches=$2 out=$3
here=$(cd "$(dirname "$0")" && pwd)
wavelatent=${WAVELATENT:-wavelatent}
seeds=${SEEDS:-0 1}
variants=${VARIANTS:-edm flow flow-uniform eps v edm-unshifted flow-unshifted edm-32 edm-32-unshifted}

# The noise shifts are what `auto` was when this was begun: the root of the latent's values over 32x32x4.
settings() { # the cache of a variant, and what it changes
    case $1 in
    edm) echo kl4 objective.noise_shift=0.5 ;;
    flow) echo kl4 objective.kind=flow objective.noise_shift=0.5 ;;
    flow-uniform) echo kl4 objective.kind=flow objective.times=uniform objective.noise_shift=0.5 ;;
    eps) echo kl4 objective.kind=eps objective.noise_shift=0.5 ;;
    v) echo kl4 objective.kind=v objective.schedule=cosine objective.noise_shift=0.5 ;;
    edm-unshifted) echo kl4 objective.noise_shift=1 ;;
    flow-unshifted) echo kl4 objective.kind=flow objective.noise_shift=1 ;;
    edm-32) echo kl32 objective.noise_shift=1.4142135623730951 ;;
    edm-32-unshifted) echo kl32 objective.noise_shift=1 ;;
    *) echo "no variant $1" >&2 && exit 2 ;;
    esac
}

generation() { # a run, its images, a name, and how it is sampled
    local run=$1 images=$2 name=$3
    shift 3
    $wavelatent evaluate generation --run "$run" --num 5000 --data "$images" --mixed-precision bf16 \
        --out "$run/$name.json" "$@"
}

if [ "$stage" = samplers ]; then
    for steps in ${STEPS:-8 16 32}; do
        for sampler in ${SAMPLERS:-heun euler euler_ancestral dpmpp_2m dpmpp_2m_sde}; do
            # An equal number of network evaluations: Heun takes two in every step but the last.
            levels=$steps && [ "$sampler" = heun ] && levels=$((steps / 2))
            generation "$out/edm-seed0" "$4" "sampler-$sampler-$levels" --sampler "$sampler" --steps "$levels"
        done
    done
    exit
fi
for seed in $seeds; do
    for variant in $variants; do
        read -r latents overrides <<<"$(settings "$variant")"
        if [ "$stage" = train ]; then
            # shellcheck disable=SC2086  # overrides are words
            $wavelatent train-diffusion "$here/unet.yaml" $overrides --seed "$seed" \
                --latents "$caches/latents-$latents" --out "$out/$variant-seed$seed" --mixed-precision bf16
        else
            generation "$out/$variant-seed$seed" "$4" evaluation --sampler dpmpp_2m --steps 20
        fi
    done
done
