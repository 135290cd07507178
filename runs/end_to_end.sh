#!/usr/bin/env bash
# Train the end-to-end variant (Table 4 of the paper): 1.1 B parameters from scratch; only the
# autoencoder is SD3's.  The stages are text only, then images and captions, then a filtered subset,
# then questions.  You can stop at any time: the same command resumes, and skips what is done.
#
#   VAE=sd3_medium.safetensors bash runs/end_to_end.sh [FLAG ...]       # LAUNCH as in runs/paper.sh
#
# Flags go to every stage: not --steps and --out, and none that only images need, such as --filtered.
# data/openwebtext*.jsonl.gz is converted to tokens once, and the shards of re-captioned DataComp to
# latents.  For several nodes, prepare these on one of them first: with LAUNCH=true, the script ends
# after that.
#
# The paper gives 350 B tokens of text, 400,000 and 100,000 steps.  It gives no batch sizes, learning
# rates or questions.  We chose batches of 2,048 texts at a learning rate of 1e-4, with documents
# packed end to end; then 2,560 pairs at 5e-5; and the questions of runs/paper.sh, at 256 pixels.
# 400,000 steps of 2,560 pairs are an epoch of the 1.02 B pairs of DataComp-Recap-1B with images that,
# as we assume, can still be downloaded.
set -eu
cd "$(dirname "$0")/.."
. runs/stage.sh
launch=${LAUNCH:-torchrun --standalone --nproc_per_node=8 --max-restarts=3}
train="$launch train.py"
[ -f data/text.safetensors ] || python data.py pack 'data/openwebtext*.jsonl.gz' data/text.safetensors
python data.py latents 'data/recap/{00000..09999}.tar' data/latents --vae "$VAE" --pixels 256   # resumes, too

stage out/text 667000 --stage text --preset e2e-1.1b --vae "$VAE" --text-data data/text.safetensors \
    --micro-batch 32 "$@"
stage out/e2e 400000 --stage pretrain --init out/text --image-data data/latents --micro-batch 8 "$@"
stage out/e2e_filtered 100000 --stage pretrain --init out/e2e --image-data 'data/filtered/{0000..0999}.tar' \
    --micro-batch 8 --workers 8 "$@"
stage out/e2e_instruct 50000 --stage instruct --init out/e2e_filtered --micro-batch 8 --workers 8 \
    --image-data 'data/filtered/{0000..0999}.tar' --text-data \
    data/llava_v1_5_mix665k.json@data/llava \
    data/v2_OpenEnded_mscoco_train2014_questions.json@data/coco/train2014 \
    data/OpenEnded_mscoco_train2014_questions.json@data/coco/train2014 \
    data/train_balanced_questions.json@data/gqa \
    data/TextVQA_0.5.1_train.json@data/textvqa data/vizwiz/train.json@data/vizwiz/train "$@"
