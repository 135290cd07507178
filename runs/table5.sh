#!/usr/bin/env bash
# The paper's Table 5 on the emoji set: instruction tuning with no, some and all of the image-generation data;
# three seeds.  The same command goes on where it was stopped.
#
#   bash runs/table5.sh                  # 4,000 steps a stage, into out/table5.json and .md
#   bash runs/table5.sh --quick          # 50 small steps a stage, a minute a run, to see that it works
set -eu
cd "$(dirname "$0")/.."
exec python runs/claims.py table5 "$@"
