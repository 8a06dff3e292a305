#!/usr/bin/env bash
# The road on real models and real problems, as `make demo-real` runs it: a 1.5B teacher, 135M and 85M students, GSM8K.
# Hours on two CPU cores (docs/results.md has the measured minutes); every step resumes, so run it again after a stop.
# usage: recipes/demo_real.sh [FOLDER OF distill]      LIMIT=200 HELDOUT=40 QUESTIONS=100 OUT=runs/real may be set
set -euo pipefail
cd "$(dirname "$0")/.."
distill="${1:+$1/}distill"
limit=${LIMIT:-200} heldout=${HELDOUT:-40} questions=${QUESTIONS:-100} out=${OUT:-runs/real}
teacher=models/qwen2.5-coder-1.5b-instruct student=models/smollm2-135m-instruct
pruned="prune:$student?layers=15"
step() { printf '$ distill %s\n' "$*"; "$distill" "$@"; }

step fetch-model qwen2.5-coder-1.5b-instruct --out "$teacher"
step fetch-model smollm2-135m-instruct --out "$student"
step generate --config recipes/gsm8k/generate.yaml --teacher "$teacher" --limit "$limit" --out "$out/traces"
step generate --config recipes/gsm8k/generate.yaml --teacher "$teacher" --limit "$heldout" \
    --prompts recipes/problems/gsm8k_test_100.jsonl --out "$out/heldout"
evaluate() { step eval --config recipes/gsm8k/eval.yaml --limit "$questions" --text "$out/heldout" --arm "$1" --model "$2" --out "$out/eval/$1"; }
evaluate smollm2 "$student"
evaluate pruned "$pruned"
step train --config recipes/gsm8k/hard-labels.yaml --data "$out/traces" --out "$out/hard-labels" --resume
step train --config recipes/gsm8k/soft-logits.yaml --data "$out/traces" --out "$out/soft-logits" --resume
evaluate smollm2-hard-labels "$out/hard-labels"
evaluate pruned-soft-logits "$out/soft-logits"
step compare "$out"/eval/smollm2 "$out"/eval/smollm2-hard-labels "$out"/eval/pruned "$out"/eval/pruned-soft-logits \
    --store "$out/traces" --store "$out/heldout" --out "$out"
