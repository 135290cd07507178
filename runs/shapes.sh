#!/usr/bin/env bash
# Train on the shapes world from scratch, into out/shapes: 22000 steps in two stages.  You can stop at
# any time (Ctrl-C, kill): the same command resumes, and skips a stage that is done.
#
#   bash runs/shapes.sh
#   python evaluate.py shapes --checkpoint out/shapes
#
# At first, captions name two objects in any order, so the network must tell them apart by shape and
# colour.  Then the image loss has captions in reading order, which decides each object's cell.
# Flags go to both stages (not --steps and --out).  On a GPU, each step runs as one CUDA graph.  On a
# CPU, networks this small are fastest in float32, and compiling them gains nothing.
set -eu
cd "$(dirname "$0")/.."
. runs/stage.sh
flags="--log-every 50 --eval-every 500 --save-every 250 --sample-every 1000 --dtype float32"
if nvidia-smi -L >/dev/null 2>&1; then
    flags="--cuda-graph --workers 12 --log-every 100 --eval-every 1000 --save-every 5000 --sample-every 5000"
fi
train="python train.py --stage instruct $flags"
stage out/shapes_any 14000 --preset shapes --image-data shapes-any-order "$@"
stage out/shapes 8000 --init out/shapes_any --image-data shapes --text-data shapes-any-order \
    --decay-steps 6000 "$@"
