# shellcheck shell=bash
# What the four training wrappers share: checks of the settings, one run for every combination of the swept ones, and a
# table of how they ended. Sourced at the end of a wrapper, whose arguments end every training command. The wrapper has
# `set -euf -o pipefail`, its settings, $here (this repository), and describe_run, which sets $output_dir and the array
# `command` for the learning rate, schedule, optimizer and number of steps that it is given.
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
value="${DROP_LEARNED_POSITIONS-false}"  # text-to-video has none to drop
[[ $value == true || $value == false ]] || refuse "DROP_LEARNED_POSITIONS is true or false, not $value"
[[ ! -e $OUTPUT_ROOT || -d $OUTPUT_ROOT ]] || refuse "OUTPUT_ROOT: $OUTPUT_ROOT is a file; give a folder"
# A relative path means this repository's where the working directory has no such file.
[[ -r $ACCELERATE_CONFIG_FILE || ! -r $here/$ACCELERATE_CONFIG_FILE ]] ||
    ACCELERATE_CONFIG_FILE="$here/$ACCELERATE_CONFIG_FILE"
[[ -r $ACCELERATE_CONFIG_FILE ]] || refuse "ACCELERATE_CONFIG_FILE: there is no $ACCELERATE_CONFIG_FILE"

# One process a GPU: accelerate would leave the second GPU idle, or stop with a traceback.
processes="$(sed -n 's/^num_processes: *\([0-9]*\).*/\1/p' "$ACCELERATE_CONFIG_FILE")"
if [[ $GPU_IDS != all && ${processes:-${#gpus[@]}} != "${#gpus[@]}" ]] &&
    grep -q '^num_machines: 1$' "$ACCELERATE_CONFIG_FILE"; then
    refuse "GPU_IDS=$GPU_IDS names ${#gpus[@]} but num_processes is $processes in $ACCELERATE_CONFIG_FILE"
fi

runs=1
differing=()  # flags of which the runs have different values
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

# What is printed is a shell script: it can be pasted whole or in part, or kept in a file.
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
# A signal is passed on to the launcher's children, which save and leave; after it no other run is started. The launcher
# itself would die of it at once, and this script then end before the checkpoint is written.
pass_on() {
    interrupted=1
    [[ -z $child ]] || pkill -TERM -P "$child" 2> /dev/null || kill -TERM "$child" 2> /dev/null || true
}
trap pass_on INT TERM USR1

# `accelerate launch` is in a program of its own too, accelerate-launch, which spares the imports of accelerate's other
# commands, transformers among them: 3 to 5 s of every start.
start() {
    local launcher
    launcher="$(command -v accelerate)-launch"
    if [[ "$1 $2" == "accelerate launch" && -x $launcher ]]; then
        shift 2
        set -- "$launcher" "$@"
    fi
    "$@" & child=$!  # not in the foreground: bash would look at a signal only after the run
}

run() {  # the arguments are the command
    local state code step
    printf '\n== %s\n' "$output_dir"
    new_run_id
    start "$@"
    while :; do
        wait "$child" && code=0 || code=$?
        kill -0 "$child" 2> /dev/null || break  # it was a signal that ended the wait
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
