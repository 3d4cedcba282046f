#!/usr/bin/env bash
# Fine-tune every weight of a text-to-video model (SFT): one run per combination of the swept settings.
#
#   MODEL=zai-org/CogVideoX-2b DATA_ROOT=clips OUTPUT_ROOT=clips-prepared ./prepare_dataset.sh
#   DATA_ROOT=clips-prepared ./train_text_to_video_sft.sh
#   DATA_ROOT=clips-prepared LEARNING_RATES="1e-5 5e-6" DRY_RUN=1 ./train_text_to_video_sft.sh
#   DATA_ROOT=clips-prepared ./train_text_to_video_sft.sh --checkpoints_total_limit 1
#
# Prepared data belongs to one model: use a different folder for another MODEL.
#
# Hardware: with prepared data of 49x480x720 at batch 1, MEMORY=balanced takes 25.8 GiB of GPU memory for CogVideoX-2b,
# 76.5 GiB for 5b; with MEMORY= it is about as much. MEMORY=offload keeps optimizer states, gradients and
# activations in host memory: 6.2 GiB of GPU and 25 GiB of host memory for 2b, 1.02 s per update on an H200; 15.0 GiB,
# 73 GiB and 3.13 s for 5b. If nothing fits, the script exits with one line. MEMORY=plan estimates all
# levels for your data. A checkpoint of CogVideoX-2b takes 22 GiB of disk, the result 3.2 GiB.
#
# Set the settings below in the environment or here. Arguments of this script are appended to every training command
# and override its flags: --use_8bit, --push_to_hub, --checkpoints_total_limit 2.
# Exit code: 0, that of the first failed run, or 75 after an interruption.

# -f: lists are split at white space, without globbing.
set -euf -o pipefail
here="$(dirname "$(realpath "${BASH_SOURCE[0]}")")"

# ---------------------------------------------------------------- settings: data, sweep, GPUs

DATA_ROOT="${DATA_ROOT:-}"                       # what prepare_dataset.sh wrote, or a folder of videos
CAPTION_COLUMN="${CAPTION_COLUMN:-}"             # only for a folder of videos: a file or column, where two could be meant
VIDEO_COLUMN="${VIDEO_COLUMN:-}"

# Swept: one run per value, given as "1e-4 1e-3" or ("1e-4" "1e-3").
LEARNING_RATES="${LEARNING_RATES:-1e-5}"
LR_SCHEDULES="${LR_SCHEDULES:-cosine_with_restarts}"
OPTIMIZERS="${OPTIMIZERS:-adamw}"
MAX_TRAIN_STEPS="${MAX_TRAIN_STEPS:-3000}"

GPU_IDS="${GPU_IDS:-0}"  # "0,1" together with accelerate_configs/uncompiled_2.yaml
ACCELERATE_CONFIG_FILE="${ACCELERATE_CONFIG_FILE:-$here/accelerate_configs/uncompiled_1.yaml}"

# ---------------------------------------------------------------- settings: model, training

MODEL="${MODEL:-zai-org/CogVideoX-2b}"  # hub id or folder
# true: prepared data; false: videos, encoded in every step; auto: whichever DATA_ROOT holds
LOAD_TENSORS="${LOAD_TENSORS:-auto}"
OUTPUT_ROOT="${OUTPUT_ROOT:-outputs}"  # each run gets its own folder in it
ID_TOKEN="${ID_TOKEN:-}"               # put in front of every caption; the same as for prepare_dataset.sh

MIXED_PRECISION="${MIXED_PRECISION:-bf16}"  # "no" on a CPU
# auto: the fastest of speed, balanced, offload and stream that fits; plan: print what each takes; empty: gradient
# checkpointing only
MEMORY="${MEMORY-auto}"
LR_WARMUP_STEPS="${LR_WARMUP_STEPS:-200}"
TEXT_DROPOUT="${TEXT_DROPOUT:-0.1}"
CHECKPOINTING_STEPS="${CHECKPOINTING_STEPS:-1000}"
SEED="${SEED:-42}"
NUM_WORKERS="${NUM_WORKERS:-2}"             # data loader processes

# Validation videos, rendered before the first step, at every interval and at the end; none without a prompt. Several
# prompts: an array, or one string with ::: between them. Put a prompt with quotes or dollar signs in single quotes.
VALIDATION_PROMPT="${VALIDATION_PROMPT:-}"
VALIDATION_EPOCHS="${VALIDATION_EPOCHS:-10}"         # epochs between validations
VALIDATION_STEPS="${VALIDATION_STEPS:-}"             # updates between validations, instead of epochs
NUM_VALIDATION_VIDEOS="${NUM_VALIDATION_VIDEOS:-1}"  # per prompt

REPORT_TO="${REPORT_TO:-}"        # wandb, tensorboard, trackio or all; empty: metrics.jsonl only
TRACKER_NAME="${TRACKER_NAME:-}"  # the tracker's project; empty: the task's name

# Only for a folder of videos; prepared data keeps its sizes.
DATASET_FILE="${DATASET_FILE:-}"  # a CSV instead of the two text files
HEIGHT_BUCKETS="${HEIGHT_BUCKETS:-480}"
WIDTH_BUCKETS="${WIDTH_BUCKETS:-720}"
FRAME_BUCKETS="${FRAME_BUCKETS:-49}"
MAX_NUM_FRAMES="${MAX_NUM_FRAMES:-49}"

DRY_RUN="${DRY_RUN:-0}"  # 1 prints the commands and runs none

# export TORCH_LOGS="+dynamo,recompiles,graph_breaks"  # log why torch.compile recompiles or breaks a graph
# export TORCHDYNAMO_VERBOSE=1                # longer errors from torch.compile
# export WANDB_MODE=offline                   # keep Weights & Biases runs on this machine; upload with `wandb sync`
# export NCCL_P2P_DISABLE=1                   # GPUs communicate through host memory, if peer access hangs or fails
# export TORCH_NCCL_ENABLE_MONITORING=0       # no watchdog that kills the process if a collective takes too long

# ---------------------------------------------------------------- command

describe_run() {  # called once per combination of the swept settings
    local learning_rate="$1" lr_schedule="$2" optimizer="$3" steps="$4"
    output_dir="$OUTPUT_ROOT/cogvideox-sft__optimizer_${optimizer}__steps_${steps}"
    output_dir+="__lr-schedule_${lr_schedule}__learning-rate_${learning_rate}"
    command=(
        accelerate launch --quiet --config_file "$ACCELERATE_CONFIG_FILE" --gpu_ids "$GPU_IDS"
        "$here/training/cogvideox_text_to_video_sft.py"
        --pretrained_model_name_or_path "$MODEL"
        --data_root "$DATA_ROOT"
        --output_dir "$output_dir"
        --mixed_precision "$MIXED_PRECISION"
        --train_batch_size 1
        --gradient_accumulation_steps 1
        --max_train_steps "$steps"
        --optimizer "$optimizer"
        --learning_rate "$learning_rate"
        --lr_scheduler "$lr_schedule"
        --lr_warmup_steps "$LR_WARMUP_STEPS"
        --lr_num_cycles 1
        --beta1 0.9
        --beta2 0.95
        --weight_decay 0.001
        --max_grad_norm 1.0
        --text_dropout "$TEXT_DROPOUT"
        --checkpointing_steps "$CHECKPOINTING_STEPS"
        --dataloader_num_workers "$NUM_WORKERS"
        --pin_memory
        --seed "$SEED"
        --allow_tf32
        --nccl_timeout 1800
    )
    if [[ -n $MEMORY ]]; then
        command+=(--memory "$MEMORY")
    else
        command+=(--gradient_checkpointing)
    fi
    if [[ $LOAD_TENSORS == true ]]; then
        command+=(--load_tensors)
    else
        # Unquoted: one argument per size.
        # shellcheck disable=SC2206
        command+=(--height_buckets $HEIGHT_BUCKETS --width_buckets $WIDTH_BUCKETS --frame_buckets $FRAME_BUCKETS)
        command+=(--max_num_frames "$MAX_NUM_FRAMES")
        [[ -z $DATASET_FILE ]] || command+=(--dataset_file "$DATASET_FILE")
    fi
    [[ -z $CAPTION_COLUMN ]] || command+=(--caption_column "$CAPTION_COLUMN")
    [[ -z $VIDEO_COLUMN ]] || command+=(--video_column "$VIDEO_COLUMN")
    [[ -z $ID_TOKEN ]] || command+=(--id_token "$ID_TOKEN")
    if [[ -n $VALIDATION_PROMPT ]]; then
        command+=(--validation_prompt "$VALIDATION_PROMPT" --validation_prompt_separator ":::")
        command+=(--num_validation_videos "$NUM_VALIDATION_VIDEOS")
        if [[ -n $VALIDATION_STEPS ]]; then
            command+=(--validation_steps "$VALIDATION_STEPS")
        else
            command+=(--validation_epochs "$VALIDATION_EPOCHS")
        fi
    fi
    if [[ -n $REPORT_TO ]]; then
        command+=(--report_to "$REPORT_TO")
        [[ -z $TRACKER_NAME ]] || command+=(--tracker_name "$TRACKER_NAME")
    fi
}

# shellcheck source=/dev/null
source "$here/training/sweep.sh"  # checks the settings and runs the combinations
