#!/usr/bin/env bash
# FID and KID between 200 drawings and the held-out emoji: the whole chain on real pictures.  Inception has
# random weights here, so that the distances mean nothing but that all of it runs: about three minutes of two
# CPU cores.  What was drawn is not drawn again.
#
#   bash runs/fid.sh
#   bash runs/fid.sh pt_inception-2015-12-05-6726825d.pth       # distances that mean something
set -eu
cd "$(dirname "$0")/.."
inception=${1:-random}
mkdir -p out

python evaluate.py draw emoji tone out/tone --limit 200          # captions that were held out
python evaluate.py statistics emoji:tone out/tone.npz --features --inception "$inception"   # their pictures
python evaluate.py fid out/tone out/tone.npz --inception "$inception" --json out/tone-fid.json
python evaluate.py fid emoji:style out/tone.npz --inception "$inception"         # other emoji altogether
