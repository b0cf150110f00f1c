#!/bin/bash
# Measurements on a GPU, for results.md. From the repository's root:
#
#   bash docs/gpu.sh kernel OUT              the tests on the chip, the kernel's table
#   bash docs/gpu.sh step OUT                a training step at the paper's size, random weights
#   bash docs/gpu.sh train OUT DATA WEIGHTS  the recipes, the baselines, the ablation, eight at a time
#   bash docs/gpu.sh paper OUT DATA          the paper's command for two epochs, random weights
#
# DATA holds CUB_200_2011, for results.md's tables its classes 1 to 40; WEIGHTS is a ViT's file.
# OUT gets one text a piece. "train" stops after LIMIT seconds (default 500); it leaves metrics and
# log of every run there, in one archive. "paper" leaves its weights, the GPU's load and the run; the
# epochs' seconds are in its log.jsonl, those of the steps alone in the text of "step".
set -uo pipefail
case "${1:-}" in
    kernel | step | train | paper) ;;
    *) echo "usage: see the top of $0" >&2; exit 2 ;;
esac
piece=$1 out=${2:?the folder OUT}
mkdir -p "$out"

kernel() {
    nvidia-smi --query-gpu=name,driver_version --format=csv
    python -m pytest -q test_ivpt.py -k "gpu"
    python explore/bench.py --kernel
}

step() {
    for words in "--recipe paper" "--recipe released" "--method parts"; do
        python explore/bench.py --data cub $words --batch-size 16 | tail -n 3
    done
    timeout 400 python explore/bench.py --data cub --recipe paper --batch-size 16 --compile |
        tail -n 3
}

one_run() {  # NAME SEED OPTIONS...
    local name=$1 seed=$2
    shift 2
    OMP_NUM_THREADS=1 python train.py --data cub --data-root "$data" --weights "$weights" \
        --image-size 224 --epochs 16 --workers 2 --seed "$seed" --out "$runs/${name}_$seed" "$@" \
        > "$runs/${name}_$seed.txt" 2>&1
}

train() {
    data=$1 weights=$2 runs=$(mktemp -d)
    {
        for recipe in paper released; do
            for seed in 42 43 44; do
                echo "$recipe $seed --recipe $recipe"
            done
        done
        for method in $(python -c "import methods; print(*methods.METHODS)"); do
            for seed in 42 43 44; do
                echo "$method $seed --method $method"
            done
        done
        for seed in 42 43 44; do
            echo "no-fusion $seed --recipe paper --no-fusion"
            echo "no-cross $seed --recipe paper --no-cross-layer"
            echo "no-regions $seed --recipe paper --no-cross-layer --no-regions"
            echo "no-bias $seed --recipe paper --no-cross-layer --no-regions --no-bias"
        done
    } > "$runs/list"
    export -f one_run
    export data weights runs
    timeout "${LIMIT:-500}" xargs -a "$runs/list" -L 1 -P 8 bash -c 'one_run "$@"' one_run
    (cd "$runs" && tar czf - ./*.txt ./*/metrics.json ./*/log.jsonl) > "$out/runs.tgz"
    for run in $(cut -d " " -f 1,2 --output-delimiter _ "$runs/list"); do
        if [ ! -f "$runs/$run/metrics.json" ]; then
            echo "$run has no result:"
            tail -n 3 "$runs/$run.txt"
        fi
    done
}

paper() {
    local run=$out/paper
    nvidia-smi --query-gpu=timestamp,utilization.gpu,memory.used --format=csv,noheader --loop=1 \
        > "$out/busy.txt" &
    python train.py --data cub --data-root "$1" --weights "$out/vitb14_reg4.pth" --epochs 2 \
        --image-size 518 --out "$run" --overwrite
    kill $!
    python evaluate.py --ckpt "$run/last.pt" --workers 8 --visualize "$run/pictures"
}

if [ "$piece" = paper ]; then  # the backbone's file holds random numbers: no network is needed
    python - "$out/vitb14_reg4.pth" <<'PYTHON'
import sys, torch, model
backbone = model.VisionTransformer(**model.ARCHITECTURES["vitb14_reg4"])
torch.save(backbone.state_dict(), sys.argv[1])
PYTHON
fi
"$piece" "${@:3}" 2>&1 | tee "$out/$piece.txt"
