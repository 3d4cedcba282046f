#!/usr/bin/env bash
# From clips to a LoRA in a few minutes, with a tiny model and without a GPU: every step that a real run takes.
# `make quickstart` installs what it needs and runs it. Everything lands in quickstart-output/, made anew each time.
set -euo pipefail
cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")"
out=quickstart-output
# Tensors this small are not worth a second thread.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
prompt="A red circle moves from left to right."

say() {
    printf '\n==== %s\n' "$*"
}

# With the small model that really draws: it is taught what it has never seen, and the contact sheet shows it.
if [[ -e assets/tiny-cogvideox/model_index.json ]]; then
    OUT="$out" AT_LEAST=0.5 exec tiny_model/teach.sh star
fi

rm -rf "$out"
mkdir "$out"

say "1/5  a tiny pipeline with random weights"
python tests/tiny_pipeline.py "$out/model" --kind 5b

say "2/5  clips and captions to moments and embeddings"
export MODEL="$out/model" NUM_WORKERS=0
DATA_ROOT=assets/tests OUTPUT_ROOT="$out/prepared" HEIGHT_BUCKETS=64 WIDTH_BUCKETS="64 96" FRAME_BUCKETS=9 \
    MAX_NUM_FRAMES=9 DTYPE=fp32 ./prepare_dataset.sh

say "3/5  training"
# The weights are random, not trained: the learning rate is 30 times that of a real run.
DATA_ROOT="$out/prepared" OUTPUT_ROOT="$out" MIXED_PRECISION=no LEARNING_RATES=3e-3 LR_SCHEDULES=constant \
    OPTIMIZERS=adamw MAX_TRAIN_STEPS=200 LR_WARMUP_STEPS=0 CHECKPOINTING_STEPS=100 ./train_text_to_video_lora.sh
run="$out/cogvideox-lora__optimizer_adamw__steps_200__lr-schedule_constant__learning-rate_3e-3"

say "4/5  the same prompt and seed without the LoRA, with it, and with it at weight 0"
render() {  # file, further flags
    python tests/test_lora_inference.py --prompt "$prompt" --model_path "$out/model" --output_file "$out/$1" \
        --fps 8 --seed 0 --num_frames 9 --height 64 --width 96 --num_inference_steps 10 "${@:2}"
}
render without_lora.mp4
render with_lora.mp4 --lora_path "$run" --lora_name quickstart
render lora_at_weight_0.mp4 --lora_path "$run" --lora_name quickstart --lora_weight 0
python - "$out" << 'PYTHON'
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np

names = ("without_lora", "with_lora", "lora_at_weight_0")
without, trained, at_weight_0 = (iio.imread(Path(sys.argv[1], f"{name}.mp4")).astype(float) for name in names)
change = np.abs(trained - without).mean()
print(f"mean change of a pixel: {change:.2f} of 255 with the LoRA, {np.abs(at_weight_0 - without).max():.2f} at weight 0")
if not np.array_equal(at_weight_0, without):
    sys.exit("error: at weight 0 the video should be that of the model without the LoRA")
if change < 0.1:
    sys.exit("error: the video with the LoRA should differ from that without it")
PYTHON

say "5/5  the loss"
python assets/plot_loss.py "$run/metrics.jsonl" "$out/loss.png"

say "done"
cat << END
prepared data   $out/prepared
LoRA            $run/pytorch_lora_weights.safetensors
metrics         $run/metrics.jsonl
loss curve      $out/loss.png
videos          $out/without_lora.mp4, $out/with_lora.mp4, $out/lora_at_weight_0.mp4
END
