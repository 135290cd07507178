#!/usr/bin/env bash
# The emoji weights from nothing, in out/text: three stages, some hours of two CPU cores.  Stop it as you like
# (Ctrl-C, kill): the same command goes on from the newest checkpoint, and skips a stage that has all its steps.
#
#   bash runs/emoji.sh
#   bash runs/emoji.sh --decay-from 200      # when time is up: the rate falls from that step of stage 3 on
#
# Flags go to the third stage.  Without a C++ compiler nothing is compiled; a step takes 1.4 times as long.
set -eu
cd "$(dirname "$0")/.."
compile=$(command -v c++ g++ clang++ >/dev/null && echo --compile || true)
steps_of() { sed -n 's/^ "step": \([0-9]*\),$/\1/p' "out/$1/config.json" 2>/dev/null || true; }

# 1. Captions, at a constant rate.
[ "$(steps_of pretrain)" = 5000 ] ||
    python train.py --stage pretrain --steps 5000 --sample-every 1000 $compile
[ "$(steps_of pretrain)" = 5000 ] || exit 1                  # it was stopped, and goes on next time

# 2. Captions and questions; over the last steps the rate falls to zero.
[ "$(steps_of instruct)" = 15000 ] ||
    python train.py --stage instruct --init out/pretrain --steps 15000 --decay-steps 4000 --question-share 0.5 \
        --sample-every 1000 $compile
[ "$(steps_of instruct)" = 15000 ] || exit 1

# 3. The same, of eight texts for each picture that is drawn: what is drawn is learnt first.
python train.py --stage instruct --init out/instruct --out out/text --steps 2600 --decay-steps 2200 --lr 1.5e-3 \
    --image-batch 16 --text-batch 128 --text-weight 4 --text-loss flat --question-share 0.6 \
    --sample-every 1000 $compile "$@"
