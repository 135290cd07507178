# Define `stage FOLDER STEPS FLAG ...` for the scripts that source this file: train a run in FOLDER with
# the command in $train, unless it has all its STEPS.  If the run is stopped, the script ends.
steps_of() { sed -n 's/^ "step": \([0-9]*\),$/\1/p' "$1/config.json" 2>/dev/null || true; }
stage() {
    local out=$1 steps=$2; shift 2
    [ "$(steps_of "$out")" = "$steps" ] || $train --out "$out" --steps "$steps" "$@"
    [ "$(steps_of "$out")" = "$steps" ] || {
        echo "$out: not yet at step $steps; the same command resumes it" >&2
        exit 1
    }
}
