#!/usr/bin/env bash
# What is measured here, from photographs to figures. Usage: run.sh PHOTOGRAPHS OUT, where PHOTOGRAPHS/train holds image
# files of one size. What is there is not done again, so the script can be stopped and started as one likes.
#
# STEPS chooses among copies, figures and cost. NUM images are in each half (5000) and FEW in the small ones (700),
# AGAINST names the halves that everything is held against ("b a"), SPOILED the copies (all, or none of them), ROUNDS
# is how often the cost is measured (3). WAVELATENT and PYTHON name other commands; the package must be installed for PYTHON.
set -euo pipefail
photographs=$1 out=$2
here=$(cd "$(dirname "$0")" && pwd)
wavelatent=${WAVELATENT:-wavelatent} python=${PYTHON:-python}
steps=${STEPS:-copies figures cost} num=${NUM:-5000} few=${FEW:-700} against=${AGAINST:-b a} rounds=${ROUNDS:-3}
spoiled=${SPOILED:-jpeg75 jpeg50 blur1 blur2 lanczos box}
[ "$spoiled" = none ] && spoiled=
inception="$out/inception.pth"
export OMP_NUM_THREADS=1

wants() { [[ " $steps " == *" $1 "* ]]; }

kid_subset() { echo $(($1 >= 2000 ? 1000 : $1 / 2)); } # of N images, as wavelatent chooses it

compare() { # N, the samples and the reference: by our command, and by torch-fidelity's with the same settings
    local num=$1 samples=$2 reference=$3
    local folders="$out/copies-$num" name="$2-$3-$1"
    if [ ! -e "$out/ours/$name.json" ]; then
        $wavelatent evaluate generation --samples "$folders/$samples" --data "$folders/$reference" --device cpu \
            --out "$out/ours/$name.json"
    fi
    if [ ! -e "$out/theirs/$name.json" ]; then
        $python "$here/fidelity_command.py" --json --silent --cpu --fid --kid --prc \
            --feature-extractor inception-v3-compat --feature-extractor-weights-path "$inception" \
            --feature-layer-prc 2048 --kid-subset-size "$(kid_subset "$num")" \
            --input1 "$folders/$samples" --input1-cache-name "$samples-$num" \
            --input2 "$folders/$reference" --input2-cache-name "$reference-$num" \
            --cache-root "$out/fidelity-cache" >"$out/theirs/$name.part"
        mv "$out/theirs/$name.part" "$out/theirs/$name.json"
    fi
}

mkdir -p "$out/ours" "$out/theirs"
[ -e "$inception" ] || $python "$here/inception_file.py" "$inception"
if wants copies; then
    $python "$here/make_copies.py" "$photographs/train" "$out/copies-$num" --num "$num"
    $python "$here/make_copies.py" "$photographs/train" "$out/copies-$few" --num "$few" --halves-only
fi
if wants figures; then
    compare "$few" a b
    for reference in $against; do
        if [ "$reference" = b ]; then compare "$num" a b; fi
        for samples in $spoiled; do compare "$num" "$samples" "$reference"; done
    done
fi
if wants cost; then
    cache=$($wavelatent doctor --json | $python -c 'import json, sys; print(json.load(sys.stdin)["cache"])')
    $python "$here/cost.py" --samples "$out/copies-$num/a" --reference "$out/copies-$num/b" --work "$out/cost-$num" \
        --weights "$cache/metric-weights" --inception "$inception" --wavelatent "$wavelatent" \
        --kid-subset-size "$(kid_subset "$num")" --rounds "$rounds"
fi
