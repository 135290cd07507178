#!/usr/bin/env bash
# Train on the shapes world from scratch, into out/shapes.  You can stop at any time (Ctrl-C, kill): the
# same command resumes.
#
#   bash runs/shapes.sh                                                     # 22000 steps
#   bash runs/shapes.sh --steps 3600 --decay-steps 1500 --out out/short     # 20 minutes of two cores
#   python evaluate.py shapes --checkpoint out/shapes
#
# Flags go to train.py.  On a GPU, each step runs as one CUDA graph.  On a CPU, networks this small
# are fastest in float32, and compiling them gains nothing.
set -eu
cd "$(dirname "$0")/.."
flags="--log-every 50 --eval-every 500 --save-every 250 --sample-every 1000 --dtype float32"
if nvidia-smi -L >/dev/null 2>&1; then
    flags="--cuda-graph --workers 12 --log-every 100 --eval-every 1000 --save-every 5000 --sample-every 5000"
fi
# Captions and questions from the start: a question's answer is one word, and needs no stage of its own.
python train.py --out out/shapes --preset shapes --stage instruct --text-weight 0.5 \
    --image-data shapes --text-data shapes-any-order --text-batch 24 \
    --steps 17000 --decay-steps 7000 $flags "$@"
