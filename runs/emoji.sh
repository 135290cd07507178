#!/usr/bin/env bash
# The emoji weights from nothing, in out/each: four stages, some hours of two CPU cores.  Stop it as you like
# (Ctrl-C, kill): the same command goes on from the newest checkpoint, and skips a stage that has all its steps.
#
#   bash runs/emoji.sh
#   bash runs/emoji.sh --decay-from 200      # when time is up: the rate falls from that step of stage 4 on
#
# Flags go to the last stage.  Without a C++ compiler nothing is compiled; a step takes 1.4 times as long.
set -eu
cd "$(dirname "$0")/.."
compile=$(command -v c++ g++ clang++ >/dev/null && echo --compile || true)
steps_of() { sed -n 's/^ "step": \([0-9]*\),$/\1/p' "out/$1/config.json" 2>/dev/null || true; }
stage() {                                                    # NAME STEPS FLAG ...
    local name=$1 steps=$2; shift 2
    [ "$(steps_of "$name")" = "$steps" ] ||
        python train.py --out "out/$name" --steps "$steps" --sample-every 1000 $compile "$@"
    [ "$(steps_of "$name")" = "$steps" ] || exit 1           # it was stopped, and goes on next time
}

# 1. Captions, at a constant rate.
stage pretrain 5000 --stage pretrain

# 2. Captions and questions; over the last steps the rate falls to zero.
stage instruct 15000 --stage instruct --init out/pretrain --decay-steps 4000 --question-share 0.5

# 3. The same, of eight texts for each picture that is drawn: what is drawn is learnt first.
texts="--stage instruct --text-weight 4 --text-loss flat --question-share 0.6 --lr 1.5e-3"
stage text 2600 $texts --init out/instruct --decay-steps 2200 --image-batch 16 --text-batch 128

# 4. Each picture read as often: two people come in 25 pairs of tones, of which an epoch had one until here.
python train.py --out out/each --steps 3000 $texts --init out/text --decay-steps 2800 --image-batch 48 \
    --text-batch 96 --text-data assets/emoji.tar.gz@each --sample-every 1000 $compile "$@"
