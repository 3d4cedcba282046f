# shellcheck shell=bash
# Shared by the four training wrappers: checks the settings, starts one run per combination of the swept ones, and
# prints a table of how they ended. Sourced at the end of a wrapper, whose arguments are appended to every training
# command. The wrapper has `set -euf -o pipefail`, its settings, $here (this repository), and describe_run, which sets
# $output_dir and the array `command` for a given learning rate, schedule, optimizer and number of steps.
# shellcheck disable=SC2154

# ---------------------------------------------------------------- settings

# shellcheck source=/dev/null
source "$here/training/settings.sh"

other_name MODEL_ID MODEL
other_name MODEL_PATH MODEL
join_words " " LEARNING_RATES LR_SCHEDULES OPTIMIZERS MAX_TRAIN_STEPS HEIGHT_BUCKETS WIDTH_BUCKETS FRAME_BUCKETS
join_words , REPORT_TO
read_gpus
join_texts ::: VALIDATION_PROMPT VALIDATION_IMAGES
# shellcheck disable=SC2046
one_value $(settings_of describe_run) DRY_RUN
refuse_unread

# ---------------------------------------------------------------- checks

check_data_root "that prepare_dataset.sh wrote"
if [[ $LOAD_TENSORS == auto ]]; then
    LOAD_TENSORS=true
    if [[ ! -d $DATA_ROOT/video_latents ]]; then
        LOAD_TENSORS=false
        echo "$(basename "$0"): $DATA_ROOT holds no video_latents: its videos are encoded in every step" >&2
    fi
fi
[[ $LOAD_TENSORS == true || $LOAD_TENSORS == false ]] || refuse "LOAD_TENSORS is true, false or auto, not $LOAD_TENSORS"
value="${DROP_LEARNED_POSITIONS-false}"  # unset for text-to-video
[[ $value == true || $value == false ]] || refuse "DROP_LEARNED_POSITIONS is true or false, not $value"
[[ ! -e $OUTPUT_ROOT || -d $OUTPUT_ROOT ]] || refuse "OUTPUT_ROOT: $OUTPUT_ROOT is a file; give a folder"
# A relative path is looked up in the working directory, then in this repository.
[[ -r $ACCELERATE_CONFIG_FILE || ! -r $here/$ACCELERATE_CONFIG_FILE ]] ||
    ACCELERATE_CONFIG_FILE="$here/$ACCELERATE_CONFIG_FILE"
[[ -r $ACCELERATE_CONFIG_FILE ]] || refuse "ACCELERATE_CONFIG_FILE: there is no $ACCELERATE_CONFIG_FILE"

# One process per GPU: otherwise accelerate leaves a GPU idle, or stops with a traceback.
processes="$(sed -n 's/^num_processes: *\([0-9]*\).*/\1/p' "$ACCELERATE_CONFIG_FILE")"
if [[ $GPU_IDS != all && ${processes:-${#gpus[@]}} != "${#gpus[@]}" ]] &&
    grep -q '^num_machines: 1$' "$ACCELERATE_CONFIG_FILE"; then
    refuse "GPU_IDS=$GPU_IDS names ${#gpus[@]} but num_processes is $processes in $ACCELERATE_CONFIG_FILE"
fi

runs=1
differing=()  # flags that differ between the runs
for name in learning_rate:LEARNING_RATES lr_scheduler:LR_SCHEDULES optimizer:OPTIMIZERS max_train_steps:MAX_TRAIN_STEPS; do
    list="${name#*:}"
    read -r -a values <<< "${!list}"
    runs=$((runs * ${#values[@]}))
    ((${#values[@]} < 2)) || differing+=("${name%:*}")
done
((runs > 0)) || refuse "LEARNING_RATES, LR_SCHEDULES, OPTIMIZERS and MAX_TRAIN_STEPS each need a value"
for argument; do
    case "${argument%%=*}" in
        --output_dir | --hub_model_id)
            ((runs == 1)) || refuse "${argument%%=*} names one place for $runs runs; leave it out, each has its own name"
            ;;
    esac
done

[[ $DRY_RUN != 0 ]] || command -v accelerate > /dev/null || refuse "accelerate is not installed: run make install"

# ---------------------------------------------------------------- dry run

# The output is a shell script: it can be pasted whole or in part, or saved.
number=0
show_run() {
    local name
    if ((runs > 1)); then
        number=$((number + 1))
        printf '# run %s of %s:' "$number" "$runs"
        for name in "${differing[@]}"; do
            find_value "$name"
            printf ' --%s %q' "$name" "$value"
        done
        echo
    fi
    print_command "${command[@]}"
    echo
}

show_sum() {
    local text="1 run" last=$((${#differing[@]} - 1))
    if ((runs > 1)); then
        printf -v text '%s, ' "${differing[@]}"
        text="$runs runs, differing in ${text%, }"
        ((last < 1)) || text="${text%", ${differing[last]}"} and ${differing[last]}"
    fi
    echo "# $text"
}

# ---------------------------------------------------------------- one run

table=()
exit_code=0
interrupted=
child=
# A signal is forwarded to the launcher's children, which save and exit; no further run is started. The launcher itself
# would die at once, and this script would then end before the checkpoint is written.
pass_on() {
    interrupted=1
    [[ -z $child ]] || pkill -TERM -P "$child" 2> /dev/null || kill -TERM "$child" 2> /dev/null || true
}
trap pass_on INT TERM USR1

# accelerate-launch is the same as `accelerate launch` without the imports of accelerate's other commands (transformers
# among them): saves 3 to 5 s per start.
start() {
    local launcher
    launcher="$(command -v accelerate)-launch"
    if [[ "$1 $2" == "accelerate launch" && -x $launcher ]]; then
        shift 2
        set -- "$launcher" "$@"
    fi
    "$@" & child=$!  # in the background: in the foreground bash would handle signals only after the run
}

run() {  # the arguments are the command
    local state code step
    printf '\n== %s\n' "$output_dir"
    new_run_id
    start "$@"
    while :; do
        wait "$child" && code=0 || code=$?
        kill -0 "$child" 2> /dev/null || break  # still alive: a signal ended the wait
    done
    child=
    read_ending "$code"
    [[ $code != 75 ]] || interrupted=1
    [[ $code == 0 ]] || echo "$(basename "$0"): $state with exit code $code: $output_dir" >&2
    [[ $exit_code != 0 ]] || exit_code="${code:-1}"
    table+=("$(printf '%-12s %4s %6s  %s' "$state" "$code" "$step" "$output_dir")")
}

# ---------------------------------------------------------------- all runs

for learning_rate in $LEARNING_RATES; do
    for lr_schedule in $LR_SCHEDULES; do
        for optimizer in $OPTIMIZERS; do
            for steps in $MAX_TRAIN_STEPS; do
                describe_run "$learning_rate" "$lr_schedule" "$optimizer" "$steps"
                command+=("$@")
                find_output_dir
                if [[ $DRY_RUN != 0 ]]; then
                    show_run
                elif [[ -n $interrupted ]]; then
                    table+=("$(printf '%-12s %4s %6s  %s' 'not started' - - "$output_dir")")
                else
                    run "${command[@]}"
                fi
            done
        done
    done
done

if [[ $DRY_RUN != 0 ]]; then
    show_sum
    exit 0
fi
[[ -z $interrupted ]] || exit_code=75
printf '\n%-12s %4s %6s  %s\n' state exit step output_dir
printf '%s\n' "${table[@]}"
exit "$exit_code"
