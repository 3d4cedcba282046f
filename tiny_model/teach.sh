#!/usr/bin/env bash
# Teach the small model a concept that it has never seen, with the project's wrappers, and show what it learned.
#
#   tiny_model/teach.sh              # a LoRA of "pink", a colour
#   tiny_model/teach.sh striped      # a pattern
#   METHOD=sft tiny_model/teach.sh pink
#
# Runs on a CPU. Output goes to OUT, which is deleted first.
set -euo pipefail
cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.."

concept="${1:-pink}"                       # pink, striped or star
METHOD="${METHOD:-lora}"                   # lora or sft
MODEL="${MODEL:-assets/tiny-cogvideox}"
OUT="${OUT:-outputs/teach-$METHOD-$concept}"
NUM_CLIPS="${NUM_CLIPS:-12}"               # clips of the concept
KNOWN_CLIPS="${KNOWN_CLIPS:-12}"           # clips of what the model knows, mixed in so that it does not forget it
STEPS="${STEPS:-240}"
BATCH_SIZE="${BATCH_SIZE:-4}"
MEASURED_CLIPS="${MEASURED_CLIPS:-24}"     # test clips of the concept, and as many of what the model knew
AT_LEAST="${AT_LEAST:-0}"                  # share of the concept's new captions that must be obeyed afterwards
if [[ $METHOD == lora ]]; then
    LEARNING_RATE="${LEARNING_RATE:-1e-3}"
else
    LEARNING_RATE="${LEARNING_RATE:-1e-4}"
fi
export MODEL NUM_WORKERS=0
# Tensors this small gain nothing from a second thread.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

say() {
    printf '\n==== %s\n' "$*"
}

# `make install` puts everything into .venv; an active environment takes precedence.
if ! command -v accelerate > /dev/null && [[ -x .venv/bin/accelerate ]]; then
    PATH="$PWD/.venv/bin:$PATH"
fi
[[ $METHOD == lora || $METHOD == sft ]] || { echo "METHOD is lora or sft, not $METHOD" >&2; exit 2; }
rm -rf "$OUT"
mkdir -p "$OUT"

say "1/4  $NUM_CLIPS clips of $concept and $KNOWN_CLIPS of what the model knows, with captions"
python tiny_model/world.py "$OUT/clips" --concept "$concept" --num_clips "$NUM_CLIPS" \
    --num_known "$KNOWN_CLIPS"

say "2/4  clips and captions to moments and embeddings"
DATA_ROOT="$OUT/clips" OUTPUT_ROOT="$OUT/prepared" HEIGHT_BUCKETS=64 WIDTH_BUCKETS=64 FRAME_BUCKETS=9 \
    MAX_NUM_FRAMES=9 DTYPE=fp32 ./prepare_dataset.sh --max_sequence_length 32

say "3/4  training"
DATA_ROOT="$OUT/prepared" OUTPUT_ROOT="$OUT" MIXED_PRECISION=no LEARNING_RATES="$LEARNING_RATE" LR_SCHEDULES=cosine \
    OPTIMIZERS=adamw MAX_TRAIN_STEPS="$STEPS" LR_WARMUP_STEPS=20 CHECKPOINTING_STEPS=100000 \
    "./train_text_to_video_$METHOD.sh" --train_batch_size "$BATCH_SIZE" --stratified_timesteps
run=$(echo "$OUT/cogvideox-$METHOD"__*)

python assets/plot_loss.py "$run/metrics.jsonl" "$OUT/loss.png"

say "4/4  the same captions and noise before and after"
result=(--lora "$run")
[[ $METHOD == lora ]] || result=(--transformer "$run")
python tiny_model/compare.py --model "$MODEL" "${result[@]}" --concept "$concept" --out "$OUT" \
    --num_clips "$MEASURED_CLIPS" --at_least "$AT_LEAST"

say "done"
cat << END
contact sheet   $OUT/contact_sheet.webp  (moves: open it in a browser)
video           $OUT/before_and_after.mp4
accuracies      $OUT/numbers.json
clips           $OUT/clips
prepared data   $OUT/prepared
result          $run
loss curve      $OUT/loss.png
END
