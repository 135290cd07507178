#!/usr/bin/env bash
# Fine-tune the shipped weights on a folder of your own images (photo.jpg, with its caption in
# photo.txt), in two to ten minutes on two CPU cores.  Then draw a prompt with the result, and
# caption the drawing.
#
#   bash runs/own.sh FOLDER PROMPT [FLAG ...]        # other flags go to train.py, such as --steps 600
set -eu
if [ $# -lt 2 ]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
folder=$1 prompt=$2; shift 2
[ ! -e "$folder" ] || folder=$(realpath "$folder")
out=out/own_$(basename "$folder")
cd "$(dirname "$0")/.."
mkdir -p out
python data.py show "$folder" --pixels 64 --tokenizer assets/emoji --out "$out.png"   # what the model will see
# the emoji are a sixth of the mixture, whatever the number of images
weight=$(python -c 'import sys, data
own, emoji = [len(data.open_source(path, 64)) for path in sys.argv[1:]]
print(f"{5 * emoji / own:.4f}")' "$folder" assets/emoji.tar.gz)
python train.py --init assets/emoji --image-data "$folder:$weight" assets/emoji.tar.gz --steps 300 --lr 5e-4 \
    --ema 0.99 --image-batch 32 --text-batch 32 --save-every 100 --sample-every 100 --eval-every 250 \
    --optimizer muon "$@" --out "$out"                      # Ctrl-C: draws with what is trained so far
python sample.py --checkpoint "$out" --prompt "$prompt" --out "${out}_drawn.png"
python sample.py --checkpoint "$out" --image "${out}_drawn.png"
