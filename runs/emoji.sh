#!/usr/bin/env bash
# Train the emoji weights from scratch, into out/emoji/each.  The three stages take a quarter of an
# hour on an H200, or most of a day on two CPU cores.  You can stop at any time (Ctrl-C, kill): the
# same command resumes from the newest checkpoint, and skips a stage that has all its steps.
#
#   bash runs/emoji.sh
#   bash runs/emoji.sh --steps 6000 --decay-steps 3000      # if time is short: stage 3 ends at step
#                                                           # 6000; its learning rate falls to zero
#                                                           # from step 3000 on
#
# Flags go to the last stage.  On a GPU, each step runs as one CUDA graph (--cuda-graph).  On a CPU
# without a C++ compiler, nothing is compiled, and a step takes 1.1 to 1.4 times as long.
set -eu
cd "$(dirname "$0")/.."
. runs/stage.sh
compile=$(command -v ${CXX:-g++} >/dev/null && echo --compile || true)
flags="--eval-every 250 --save-every 250 --sample-every 1000 $compile"
if nvidia-smi -L >/dev/null 2>&1; then
    flags="--cuda-graph --workers 12 --log-every 50 --eval-every 1000 --save-every 5000 --sample-every 5000"
fi
train="python train.py"
recipe="$flags --optimizer muon --lr 2.5e-3 --warmup 50"
batches="--image-batch 96 --text-batch 48"

# 1. Captions, at a constant learning rate.
stage out/emoji/pretrain 5000 --stage pretrain $recipe $batches

# 2. Captions and questions; over the last steps the learning rate falls to zero.  The shipped weights
#    were trained with a lambda of 1, and of 2 in the last stage, when the text loss was the mean over
#    answers only.  Now it is the mean over all positions; 79 % and 75 % of them are answers.  So 1.26
#    and 2.66 give answers the same weight as before.
stage out/emoji/instruct 15000 --stage instruct --init out/emoji/pretrain $recipe $batches \
    --decay-steps 4000 --question-share 0.5 --text-weight 1.26

# 3. The same with more texts, the same weight for each masked token, and each image equally often.  An
#    emoji of two people has 25 images with different pairs of skin tones; in stages 1 and 2 an epoch
#    has only one of them.
$train --out out/emoji/each --steps 25000 --stage instruct --init out/emoji/instruct $recipe \
    --decay-steps 15000 --question-share 0.6 --text-weight 2.66 --text-loss flat --image-batch 64 --text-batch 96 \
    --text-data assets/emoji.tar.gz@each "$@"
