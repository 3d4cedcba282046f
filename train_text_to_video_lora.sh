#!/usr/bin/env bash
# Train text-to-video LoRAs: one run for every combination of the swept settings.
#
#   DATA_ROOT=disney-prepared ./train_text_to_video_lora.sh
#   DATA_ROOT=disney-prepared LEARNING_RATES="1e-4 1e-3" DRY_RUN=1 ./train_text_to_video_lora.sh
#   DATA_ROOT=disney-prepared ./train_text_to_video_lora.sh --checkpoints_total_limit 2
#
# Set the settings below in the environment or here. Arguments of this file end every training command.
# Exit code: 0, or that of the first run that failed, or 75 after an interruption.

# -f: the swept settings are split at white space, never taken for file patterns.
set -euf -o pipefail
here="$(dirname "$(realpath "${BASH_SOURCE[0]}")")"

# ---------------------------------------------------------------- settings

MODEL="${MODEL:-zai-org/CogVideoX-5b}"    # hub id or folder
DATA_ROOT="${DATA_ROOT:-}"                # what prepare_dataset.sh wrote; with LOAD_TENSORS=false a folder of videos
LOAD_TENSORS="${LOAD_TENSORS:-true}"      # false: encode the videos in every step, with T5 and the VAE in memory
OUTPUT_ROOT="${OUTPUT_ROOT:-outputs}"     # every run gets a folder in it
ID_TOKEN="${ID_TOKEN:-}"                  # put in front of every caption; the one given to prepare_dataset.sh
VALIDATION_PROMPT="${VALIDATION_PROMPT:-}"  # written here, it goes between single quotes: VALIDATION_PROMPT='A "cat"'

# Swept: several values, separated by spaces, are several runs.
LEARNING_RATES="${LEARNING_RATES:-1e-4}"
LR_SCHEDULES="${LR_SCHEDULES:-cosine_with_restarts}"
OPTIMIZERS="${OPTIMIZERS:-adamw}"
MAX_TRAIN_STEPS="${MAX_TRAIN_STEPS:-3000}"

LORA_RANK="${LORA_RANK:-64}"
LORA_ALPHA="${LORA_ALPHA:-64}"
MIXED_PRECISION="${MIXED_PRECISION:-bf16}"  # no on a CPU
LR_WARMUP_STEPS="${LR_WARMUP_STEPS:-200}"
TEXT_DROPOUT="${TEXT_DROPOUT:-0.1}"
CHECKPOINTING_STEPS="${CHECKPOINTING_STEPS:-1000}"
SEED="${SEED:-42}"
NUM_WORKERS="${NUM_WORKERS:-2}"             # processes that read data

# Videos of LOAD_TENSORS=false only; prepared data keeps the names and sizes it was prepared with.
DATASET_FILE="${DATASET_FILE:-}"  # a CSV in place of the two text files
CAPTION_COLUMN="${CAPTION_COLUMN:-prompts.txt}"
VIDEO_COLUMN="${VIDEO_COLUMN:-videos.txt}"
HEIGHT_BUCKETS="${HEIGHT_BUCKETS:-480}"
WIDTH_BUCKETS="${WIDTH_BUCKETS:-720}"
FRAME_BUCKETS="${FRAME_BUCKETS:-49}"
MAX_NUM_FRAMES="${MAX_NUM_FRAMES:-49}"

GPU_IDS="${GPU_IDS:-0}"  # "0,1" together with accelerate_configs/uncompiled_2.yaml
ACCELERATE_CONFIG_FILE="${ACCELERATE_CONFIG_FILE:-$here/accelerate_configs/uncompiled_1.yaml}"
DRY_RUN="${DRY_RUN:-0}"  # 1 prints the commands and runs none

# export TORCH_LOGS="+dynamo,recompiles,graph_breaks"  # say why torch.compile compiles again or splits a graph
# export TORCHDYNAMO_VERBOSE=1                # longer errors from torch.compile
# export WANDB_MODE=offline                   # keep Weights & Biases' records on this machine; `wandb sync` sends them
# export NCCL_P2P_DISABLE=1                   # GPUs exchange through host memory: where direct access hangs or fails
# export TORCH_NCCL_ENABLE_MONITORING=0       # no watchdog that ends the process when a collective takes too long

# ---------------------------------------------------------------- checks

refuse() {
    echo "$(basename "$0"): $*" >&2
    exit 2
}

[[ -n $DATA_ROOT ]] || refuse "fill in DATA_ROOT: the folder that prepare_dataset.sh wrote"
[[ $LOAD_TENSORS == true || $LOAD_TENSORS == false ]] || refuse "LOAD_TENSORS is true or false, not $LOAD_TENSORS"
[[ -r $ACCELERATE_CONFIG_FILE ]] || refuse "ACCELERATE_CONFIG_FILE: there is no $ACCELERATE_CONFIG_FILE"

# One process a GPU: accelerate would leave the second GPU idle, or stop with a traceback.
IFS=, read -r -a gpus <<< "$GPU_IDS"
processes="$(sed -n 's/^num_processes: *\([0-9]*\).*/\1/p' "$ACCELERATE_CONFIG_FILE")"
if [[ $GPU_IDS != all && ${processes:-${#gpus[@]}} != "${#gpus[@]}" ]] &&
    grep -q '^num_machines: 1$' "$ACCELERATE_CONFIG_FILE"; then
    refuse "GPU_IDS=$GPU_IDS names ${#gpus[@]} but num_processes is $processes in $ACCELERATE_CONFIG_FILE"
fi

# `make install` puts everything into .venv; an active environment goes first.
if ! command -v accelerate > /dev/null && [[ -x $here/.venv/bin/accelerate ]]; then
    PATH="$here/.venv/bin:$PATH"
fi
[[ $DRY_RUN != 0 ]] || command -v accelerate > /dev/null || refuse "accelerate is not installed: run make install"

# ---------------------------------------------------------------- command

command=(
    accelerate launch --quiet --config_file "$ACCELERATE_CONFIG_FILE" --gpu_ids "$GPU_IDS"
    "$here/training/cogvideox_text_to_video_lora.py"
    --pretrained_model_name_or_path "$MODEL"
    --data_root "$DATA_ROOT"
    --caption_column "$CAPTION_COLUMN"
    --video_column "$VIDEO_COLUMN"
    --rank "$LORA_RANK"
    --lora_alpha "$LORA_ALPHA"
    --mixed_precision "$MIXED_PRECISION"
    --gradient_checkpointing
    --train_batch_size 1
    --gradient_accumulation_steps 1
    --max_grad_norm 1.0
    --lr_warmup_steps "$LR_WARMUP_STEPS"
    --weight_decay 0.001
    --text_dropout "$TEXT_DROPOUT"
    --checkpointing_steps "$CHECKPOINTING_STEPS"
    --dataloader_num_workers "$NUM_WORKERS"
    --seed "$SEED"
    --allow_tf32
    --nccl_timeout 1800
)
if [[ $LOAD_TENSORS == true ]]; then
    command+=(--load_tensors)
else
    # Unquoted: several sizes are several arguments.
    # shellcheck disable=SC2206
    command+=(--height_buckets $HEIGHT_BUCKETS --width_buckets $WIDTH_BUCKETS --frame_buckets $FRAME_BUCKETS)
    command+=(--max_num_frames "$MAX_NUM_FRAMES")
    [[ -z $DATASET_FILE ]] || command+=(--dataset_file "$DATASET_FILE")
fi
[[ -z $ID_TOKEN ]] || command+=(--id_token "$ID_TOKEN")
[[ -z $VALIDATION_PROMPT ]] || command+=(--validation_prompt "$VALIDATION_PROMPT")

# ---------------------------------------------------------------- runs

table=()
exit_code=0
interrupted=
# Ctrl-C reaches the training script too; after it no other run is started.
trap 'interrupted=1' INT TERM
started="$(mktemp)"
trap 'rm -f "$started"' EXIT

read_status() {
    sed -n "s/.*\"$1\": *\"\{0,1\}\([^\",}]*\).*/\1/p" "$output_dir/status.json"
}

run() {  # the arguments are the command
    local state=complete code=0 step=-
    printf '\n== %s\n' "$output_dir"
    touch "$started"
    "$@" || { code=$?; state=failed; }
    # The launcher turns every exit code into 1; the real one is in status.json, unless that is of an earlier run.
    if [[ $output_dir/status.json -nt $started ]]; then
        state="$(read_status state)" code="$(read_status exit_code)" step="$(read_status step)"
    elif [[ -n $interrupted ]]; then
        state=interrupted code=75
    fi
    [[ $code != 75 ]] || interrupted=1
    [[ $code == 0 ]] || echo "$(basename "$0"): $state with exit code $code: $output_dir" >&2
    [[ $exit_code != 0 ]] || exit_code="${code:-1}"
    table+=("$(printf '%-12s %4s %6s  %s' "$state" "$code" "$step" "$output_dir")")
}

runs=0
for learning_rate in $LEARNING_RATES; do
    for lr_schedule in $LR_SCHEDULES; do
        for optimizer in $OPTIMIZERS; do
            for steps in $MAX_TRAIN_STEPS; do
                output_dir="$OUTPUT_ROOT/cogvideox-lora__optimizer_${optimizer}__steps_${steps}"
                output_dir+="__lr-schedule_${lr_schedule}__learning-rate_${learning_rate}"
                one=(
                    "${command[@]}"
                    --learning_rate "$learning_rate"
                    --lr_scheduler "$lr_schedule"
                    --optimizer "$optimizer"
                    --max_train_steps "$steps"
                    --output_dir "$output_dir"
                    "$@"
                )
                runs=$((runs + 1))
                if [[ $DRY_RUN != 0 ]]; then
                    printf -v line '%q ' "${one[@]}"
                    printf '%s\n' "${line% }"
                elif [[ -n $interrupted ]]; then
                    table+=("$(printf '%-12s %4s %6s  %s' 'not started' - - "$output_dir")")
                else
                    run "${one[@]}"
                fi
            done
        done
    done
done

((runs > 0)) || refuse "LEARNING_RATES, LR_SCHEDULES, OPTIMIZERS and MAX_TRAIN_STEPS each need a value"
[[ $DRY_RUN == 0 ]] || exit 0
[[ -z $interrupted ]] || exit_code=75
printf '\n%-12s %4s %6s  %s\n' state exit step output_dir
printf '%s\n' "${table[@]}"
exit "$exit_code"
