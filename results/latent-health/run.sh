#!/usr/bin/env bash
# The latent health of three autoencoders. Usage: run.sh AE_KL4 AE_BOUNDED16 IMAGES OUT [OPTION...], where the first two
# are the runs of ../first-run, IMAGES their training images prepared at 64 px, and any OPTION one of `diagnose`. A
# report that is there is not made again. WAVELATENT and PYTHON name other commands; the package and its extra
# `diffusers` must be installed for PYTHON.
set -euo pipefail
kl4=$1 bounded16=$2 images=$3 out=$4
shift 4
here=$(cd "$(dirname "$0")" && pwd)
wavelatent=${WAVELATENT:-wavelatent} python=${PYTHON:-python}
export OMP_NUM_THREADS=1

random="$out/random-weights"
[ -e "$random/config.json" ] || $python "$here/make_random.py" "$random"

diagnose() { # a name and an autoencoder, then options
    local report="$out/health-$1" ae=$2
    shift 2
    [ -e "$report/health.html" ] || $wavelatent diagnose --ae "$ae" --data "$images" --out "$report" --device cpu "$@"
}

diagnose kl4 "$kl4" "$@"
diagnose bounded16 "$bounded16" "$@"
diagnose random "diffusers:$random" "$@"
