#!/usr/bin/env bash
# Encode videos and captions for training: VAE moments and prompt embeddings.
#
#   DATA_ROOT=video-dataset-disney ./prepare_dataset.sh
#   MODEL=zai-org/CogVideoX-5b-I2V IMAGE_LATENTS=true DATA_ROOT=clips ./prepare_dataset.sh
#   DATA_ROOT=videos DATASET_FILE=videos/metadata.csv CAPTION_COLUMN=caption VIDEO_COLUMN=path ./prepare_dataset.sh
#
# Set the settings below in the environment or here. Arguments of this script are appended to the command. When run
# again, it makes only what is missing. Exit code: that of training/prepare_dataset.py, 65 if clips were left out.

# -f: lists of sizes are split at white space, without globbing.
set -euf -o pipefail
here="$(dirname "$(realpath "${BASH_SOURCE[0]}")")"

# ---------------------------------------------------------------- settings: clips, sizes

MODEL="${MODEL:-zai-org/CogVideoX-5b}"  # hub id or folder: the model that will be trained
DATA_ROOT="${DATA_ROOT:-}"              # folder with the videos and their captions
CAPTION_COLUMN="${CAPTION_COLUMN:-}"    # a file or column, where two could be meant
VIDEO_COLUMN="${VIDEO_COLUMN:-}"
OUTPUT_ROOT="${OUTPUT_ROOT:-}"          # DATA_ROOT of the training wrapper; empty: <DATA_ROOT>-prepared

# Clips are resized to the nearest size. CogVideoX 1.0 was trained at 480x720 with 49 frames, 1.5 at 768x1360 with 81.
# Several values: "480 720" or (480 720).
HEIGHT_BUCKETS="${HEIGHT_BUCKETS:-480}"
WIDTH_BUCKETS="${WIDTH_BUCKETS:-720}"
FRAME_BUCKETS="${FRAME_BUCKETS:-49}"
MAX_NUM_FRAMES="${MAX_NUM_FRAMES:-49}"
MAX_SEQUENCE_LENGTH="${MAX_SEQUENCE_LENGTH:-}"  # tokens of a caption; empty: 226
TARGET_FPS="${TARGET_FPS:-}"                    # empty: the model's own rate, 8 for 1.0, 16 for 1.5
BATCH_SIZE="${BATCH_SIZE:-1}"
DTYPE="${DTYPE:-bf16}"                          # fp32 on a CPU

# ---------------------------------------------------------------- settings: the rest

DATASET_FILE="${DATASET_FILE:-}"         # a CSV or JSON with the columns above, if DATA_ROOT has several
ID_TOKEN="${ID_TOKEN:-}"                 # put in front of every caption
IMAGE_LATENTS="${IMAGE_LATENTS:-false}"  # true: encode noised first frames too, for image-to-video
NUM_WORKERS="${NUM_WORKERS:-2}"          # processes that decode videos
GPU_IDS="${GPU_IDS:-0}"                  # "0,1" splits the clips over two GPUs
DRY_RUN="${DRY_RUN:-0}"                  # 1 prints the command and does not run it

# ---------------------------------------------------------------- command

describe_run() {
    output_dir="$OUTPUT_ROOT"
    # Unquoted: one argument per size.
    # shellcheck disable=SC2206
    command+=(
        "$here/training/prepare_dataset.py"
        --model_id "$MODEL"
        --data_root "$DATA_ROOT"
        --output_dir "$output_dir"
        --save_latents_and_embeddings
        --height_buckets $HEIGHT_BUCKETS
        --width_buckets $WIDTH_BUCKETS
        --frame_buckets $FRAME_BUCKETS
        --max_num_frames "$MAX_NUM_FRAMES"
        --dtype "$DTYPE"
        --batch_size "$BATCH_SIZE"
        --dataloader_num_workers "$NUM_WORKERS"
    )
    [[ $IMAGE_LATENTS == false ]] || command+=(--save_image_latents)
    [[ -z $DATASET_FILE ]] || command+=(--dataset_file "$DATASET_FILE")
    [[ -z $CAPTION_COLUMN ]] || command+=(--caption_column "$CAPTION_COLUMN")
    [[ -z $VIDEO_COLUMN ]] || command+=(--video_column "$VIDEO_COLUMN")
    [[ -z $ID_TOKEN ]] || command+=(--id_token "$ID_TOKEN")
    [[ -z $TARGET_FPS ]] || command+=(--target_fps "$TARGET_FPS")
    [[ -z $MAX_SEQUENCE_LENGTH ]] || command+=(--max_sequence_length "$MAX_SEQUENCE_LENGTH")
}

# shellcheck source=/dev/null
source "$here/training/settings.sh"

other_name MODEL_ID MODEL
other_name MODEL_PATH MODEL
other_name OUTPUT_DIR OUTPUT_ROOT
one_value NUM_GPUS
join_words " " HEIGHT_BUCKETS WIDTH_BUCKETS FRAME_BUCKETS
# shellcheck disable=SC2046
one_value $(settings_of describe_run) DRY_RUN
refuse_unread

check_data_root "of the captions and videos"
[[ $IMAGE_LATENTS == true || $IMAGE_LATENTS == false ]] || refuse "IMAGE_LATENTS is true or false, not $IMAGE_LATENTS"
OUTPUT_ROOT="${OUTPUT_ROOT:-${DATA_ROOT%/}-prepared}"
[[ ! -e $OUTPUT_ROOT || -d $OUTPUT_ROOT ]] || refuse "OUTPUT_ROOT: $OUTPUT_ROOT is a file; give a folder"

read_gpus
if [[ -n ${NUM_GPUS-} ]]; then  # the original's setting: a number of GPUs, counted from 0
    [[ $NUM_GPUS =~ ^[1-9][0-9]*$ ]] || refuse "NUM_GPUS is a number of GPUs, not $NUM_GPUS"
    [[ $GPU_IDS != 0 ]] || GPU_IDS="$(seq 0 $((NUM_GPUS - 1)))"
    read_gpus
fi
((${NUM_GPUS:-${#gpus[@]}} == ${#gpus[@]})) || refuse "NUM_GPUS is $NUM_GPUS but GPU_IDS=$GPU_IDS names ${#gpus[@]}"
export CUDA_VISIBLE_DEVICES="$GPU_IDS"

command=(python)
((${#gpus[@]} < 2)) || command=(torchrun --standalone --nproc_per_node "${#gpus[@]}")
describe_run
command+=("$@")
find_output_dir

if [[ $DRY_RUN != 0 ]]; then
    printf 'CUDA_VISIBLE_DEVICES=%q ' "$GPU_IDS"
fi
run_once "${command[@]}"
