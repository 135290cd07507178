#!/usr/bin/env bash
# The end-to-end variant, 1.1 B parameters from nothing but SD3's autoencoder (Table 4): text alone, then
# pictures and captions, then a filtered subset, then questions.  Stop it as you like: the same command goes
# on, and skips what is done.
#
#   VAE=sd3_medium.safetensors bash runs/end_to_end.sh           # LAUNCH as in runs/paper.sh
#
# data/openwebtext*.jsonl.gz and the shards of re-captioned DataComp are read once, as tokens and as latents.
#
# The paper gives 350 B tokens of text, 400,000 and 100,000 steps; it gives no batches, rates or questions.
# Ours: batches of 2,048 texts at 1e-4, documents packed end to end; then 2,560 pairs at 5e-5, for 400,000 steps
# of that are an epoch of the 1.02 B pairs of DataComp-Recap-1B whose image we assume can still be fetched;
# questions as in runs/paper.sh, at 256 pixels.
set -eu
cd "$(dirname "$0")/.."
launch=${LAUNCH:-torchrun --standalone --nproc_per_node=8 --max-restarts=3}
steps_of() { sed -n 's/^ "step": \([0-9]*\),$/\1/p' "$1/config.json" 2>/dev/null || true; }
stage() {   # FOLDER STEPS FLAGS ...
    [ "$(steps_of "$1")" = "$2" ] || $launch train.py --out "$1" --steps "$2" "${@:3}"
    [ "$(steps_of "$1")" = "$2" ] || exit 1                      # it was stopped, and goes on next time
}
[ -f data/text.safetensors ] || python data.py pack 'data/openwebtext*.jsonl.gz' data/text.safetensors
python data.py latents 'data/recap/{00000..09999}.tar' data/latents --vae "$VAE" --pixels 256   # goes on, too

stage out/text 667000 --stage text --preset e2e-1.1b --vae "$VAE" --text-data data/text.safetensors \
    --micro-batch 32
stage out/e2e 400000 --stage pretrain --init out/text --image-data data/latents --micro-batch 8
stage out/e2e_filtered 100000 --stage pretrain --init out/e2e --image-data 'data/filtered/{0000..0999}.tar' \
    --micro-batch 8 --workers 8
stage out/e2e_instruct 50000 --stage instruct --init out/e2e_filtered --micro-batch 8 --workers 8 \
    --image-data 'data/filtered/{0000..0999}.tar' --text-data \
    data/llava_v1_5_mix665k.json@data/llava \
    data/v2_OpenEnded_mscoco_train2014_questions.json@data/coco/train2014 \
    data/OpenEnded_mscoco_train2014_questions.json@data/coco/train2014 \
    data/train_balanced_questions.json@data/gqa \
    data/TextVQA_0.5.1_train.json@data/textvqa data/vizwiz/train.json@data/vizwiz/train
