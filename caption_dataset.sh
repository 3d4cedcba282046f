#!/usr/bin/env bash
# Have clips captioned by a vision-language model that a server runs, such as vLLM's (assets/captions.md).
#
#   DATA_ROOT=my-clips ./caption_dataset.sh
#   DATA_ROOT=my-clips MODEL=zai-org/CogVideoX-2b TRIGGER=BW_STYLE ./caption_dataset.sh
#   DATA_ROOT=my-clips OUTPUT_ROOT=my-clips-captioned CONTEXT=caption ./caption_dataset.sh
#
# Set the settings below in the environment or here. Arguments of this script are appended to the command. When run
# again, it asks only about what is missing, and keeps captions that were edited. Exit code: that of
# training/caption_dataset.py, 65 if clips were left out. The server's key is read from OPENAI_API_KEY.

set -euf -o pipefail
here="$(dirname "$(realpath "${BASH_SOURCE[0]}")")"

# ---------------------------------------------------------------- settings: clips, server

DATA_ROOT="${DATA_ROOT:-}"          # folder of the videos, with or without captions
DATASET_FILE="${DATASET_FILE:-}"    # a table of the clips; empty: found, or all videos
CAPTION_COLUMN="${CAPTION_COLUMN:-}"  # column or text file of captions, and of videos; empty: found by their names
VIDEO_COLUMN="${VIDEO_COLUMN:-}"
OUTPUT_ROOT="${OUTPUT_ROOT:-}"      # DATA_ROOT of prepare_dataset.sh; empty: DATA_ROOT, if it has no list of clips
BASE_URL="${BASE_URL:-http://localhost:8000/v1}"
CAPTIONER="${CAPTIONER:-}"          # model of the server; empty: the one that it lists
CONCURRENCY="${CONCURRENCY:-8}"     # clips asked about at the same time

# ---------------------------------------------------------------- settings: captions

MODEL="${MODEL:-}"                  # hub id or folder: the model that will be trained, to count its tokens; empty: words
NUM_FRAMES="${NUM_FRAMES:-8}"       # frames shown per clip
SEND="${SEND:-frames}"              # video: the file itself, where the server takes it
PROMPT_FILE="${PROMPT_FILE:-}"      # text file with the question; empty: one for what CogVideoX was trained on
CONTEXT="${CONTEXT:-none}"          # file_name or caption: what else the model is told of a clip
RECAPTION="${RECAPTION:-false}"     # true: also clips that have a caption
TRIGGER="${TRIGGER:-}"              # put in front of every caption of the model
MAX_TOKENS="${MAX_TOKENS:-}"        # longest caption; empty: what MODEL reads, or 226
DRY_RUN="${DRY_RUN:-0}"             # 1 prints the command and does not run it

# ---------------------------------------------------------------- command

describe_run() {
    command+=(
        "$here/training/caption_dataset.py"
        --data_root "$DATA_ROOT"
        --output_dir "${OUTPUT_ROOT:-$DATA_ROOT}"
        --base_url "$BASE_URL"
        --concurrency "$CONCURRENCY"
        --send "$SEND"
        --context "$CONTEXT"
    )
    [[ $SEND == video ]] || command+=(--num_frames "$NUM_FRAMES")
    [[ -z $DATASET_FILE ]] || command+=(--dataset_file "$DATASET_FILE")
    [[ -z $CAPTION_COLUMN ]] || command+=(--caption_column "$CAPTION_COLUMN")
    [[ -z $VIDEO_COLUMN ]] || command+=(--video_column "$VIDEO_COLUMN")
    [[ -z $CAPTIONER ]] || command+=(--model "$CAPTIONER")
    [[ -z $MODEL ]] || command+=(--pretrained_model_name_or_path "$MODEL")
    [[ -z $PROMPT_FILE ]] || command+=(--prompt_file "$PROMPT_FILE")
    [[ -z $TRIGGER ]] || command+=(--trigger "$TRIGGER")
    [[ -z $MAX_TOKENS ]] || command+=(--max_tokens "$MAX_TOKENS")
    [[ $RECAPTION == false ]] || command+=(--recaption)
}

# shellcheck source=/dev/null
source "$here/training/settings.sh"

other_name MODEL_ID MODEL
other_name MODEL_PATH MODEL
other_name OUTPUT_DIR OUTPUT_ROOT
# shellcheck disable=SC2046
one_value $(settings_of describe_run) DRY_RUN
refuse_unread

check_data_root "of the videos"
[[ $RECAPTION == true || $RECAPTION == false ]] || refuse "RECAPTION is true or false, not $RECAPTION"
[[ ! -e $OUTPUT_ROOT || -d $OUTPUT_ROOT ]] || refuse "OUTPUT_ROOT: $OUTPUT_ROOT is a file; give a folder"

command=(python)
describe_run
command+=("$@")
find_output_dir

run_once "${command[@]}"
