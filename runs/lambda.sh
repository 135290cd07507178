#!/usr/bin/env bash
# λ, the weight of the text loss, at 0.05, 0.2 (the paper's) and 1 on the emoji set; three seeds.  The same
# command goes on where it was stopped.
#
#   bash runs/lambda.sh                  # 4,000 steps, into out/lambda.json and .md
#   bash runs/lambda.sh --quick          # 50 small steps, a minute a run, to see that it works
set -eu
cd "$(dirname "$0")/.."
exec python runs/claims.py lambda "$@"
