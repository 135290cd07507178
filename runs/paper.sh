#!/usr/bin/env bash
# Train as in the paper, from SD3's weights (Table 1): four stages, each starting from the one before,
# on one node of 8 GPUs.  You can stop at any time: the same command resumes from the newest
# checkpoint, and skips a stage that is done.
#
#   SD3=sd3_medium_incl_clips_t5xxlfp16.safetensors TOKENIZER=tokenizer_3 bash runs/paper.sh [FLAG ...]
#
# Flags go to every stage, such as --checkpoint-activations (not --steps and --out).  On several nodes,
# run the same command on each: LAUNCH="torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d
# --rdzv_endpoint=HOST:29500 --max-restarts=3" bash runs/paper.sh --shard hsdp.  The data sets must be
# at the paths below, in data/.
set -eu
cd "$(dirname "$0")/.."
. runs/stage.sh
launch=${LAUNCH:-torchrun --standalone --nproc_per_node=8 --max-restarts=3}
train="$launch train.py --workers 8 --filtered"
drawn='data/laion_aesthetic/{00000..01999}.tar data/midjourney/{000..199}.tar'
read='data/sharegpt4v.json data/openimages/{000..499}.tar'

# 1. Both losses on re-captioned DataComp, at 256 pixels.
stage out/pretrain 60000 --stage pretrain --init "$SD3" --tokenizer "$TOKENIZER" --micro-batch 8 \
    --image-data 'data/recap/{00000..09999}.tar' "$@"

# 2. The same model together with T5's [MASK], on better images and captions.
stage out/mask-emb 200000 --stage mask-emb --init out/pretrain --micro-batch 8 --image-data $drawn \
    --text-data $read "$@"

# 3. At 512 pixels.
stage out/high-res 80000 --stage high-res --init out/mask-emb --micro-batch 6 --image-data $drawn \
    --text-data $read "$@"

# 4. Questions; the prompt is never masked.
stage out/instruct 50000 --stage instruct --init out/high-res --micro-batch 8 --image-data $drawn --text-data \
    data/llava_v1_5_mix665k.json@data/llava \
    data/v2_OpenEnded_mscoco_train2014_questions.json@data/coco/train2014 \
    data/OpenEnded_mscoco_train2014_questions.json@data/coco/train2014 \
    data/train_balanced_questions.json@data/gqa \
    data/TextVQA_0.5.1_train.json@data/textvqa data/vizwiz/train.json@data/vizwiz/train "$@"

python checkpoint.py export out/instruct out/release --layout release
