#!/usr/bin/env bash
# The paper's Table 4 on the emoji set: a dual model that starts from a text-to-image model, against one from
# scratch, at equal steps; three seeds.  The same command goes on where it was stopped.
#
#   bash runs/table4.sh                  # 4,000 steps a stage, into out/table4.json and .md
#   bash runs/table4.sh --quick          # 50 small steps a stage, a minute a run, to see that it works
set -eu
cd "$(dirname "$0")/.."
exec python runs/claims.py table4 "$@"
