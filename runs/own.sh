#!/usr/bin/env bash
# A small fine-tune of the shipped weights on a folder of your own pictures (photo.jpg with photo.txt beside
# it), some minutes of two CPU cores; then a prompt is drawn, and the drawing captioned, with the result.
#
#   bash runs/own.sh FOLDER "a prompt"
set -eu
cd "$(dirname "$0")/.."
mkdir -p out
python data.py show "$1" --pixels 64 --out out/own_page.png      # what the model will see
python train.py --init assets/emoji --image-data "$1" assets/emoji.tar.gz:0.2 --steps "${STEPS:-300}" \
    --lr 5e-4 --ema 0.99 --image-batch 32 --text-batch 32 --save-every 100 --sample-every 100 --out out/own
python sample.py --checkpoint out/own --prompt "$2" --out out/own_drawn.png
python sample.py --checkpoint out/own --image out/own_drawn.png
