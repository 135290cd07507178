#!/usr/bin/env bash
# Compute FID and KID between 200 drawings and the held-out emoji, to test the whole evaluation on real
# images.  By default Inception has random weights; then the distances only show that everything runs.
# It takes about three minutes on two CPU cores.  Existing drawings are not drawn again.
#
#   bash runs/fid.sh
#   bash runs/fid.sh pt_inception-2015-12-05-6726825d.pth       # real FID and KID
set -eu
cd "$(dirname "$0")/.."
inception=${1:-random}
mkdir -p out

python evaluate.py draw emoji tone out/tone --limit 200          # held-out captions
python evaluate.py statistics emoji:tone out/tone.npz --features --inception "$inception"   # their images
python evaluate.py fid out/tone out/tone.npz --inception "$inception" --json out/tone-fid.json
python evaluate.py fid emoji:style out/tone.npz --inception "$inception"         # for comparison: other emoji
