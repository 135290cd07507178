#!/usr/bin/env bash
# What the emoji recipe's validation is to be: its first 1,000 steps with three seeds.  The rows of their logs
# with a validation go into assets/emoji/expected, for --compare.  Half an hour of two cores; the same
# command goes on where it was stopped.
#
#   bash runs/expected.sh
set -eu
cd "$(dirname "$0")/.."
compile=$(command -v c++ g++ clang++ >/dev/null && echo --compile || true)
mkdir -p assets/emoji/expected
for seed in 0 1 2; do
    python train.py --stage pretrain --seed $seed --steps 1000 --sample-every 0 --out out/expected_$seed \
        --optimizer muon --lr 2.5e-3 --warmup 50 --image-batch 96 --text-batch 48 --eval-every 250 \
        --save-every 250 $compile
    grep val_nats out/expected_$seed/log.jsonl >assets/emoji/expected/seed_$seed.jsonl
done
