# shellcheck shell=bash
# What the four training wrappers share: checks of the settings, one run for every combination of the swept ones, and a
# table of how they ended. Sourced at the end of a wrapper, whose arguments end every training command. The wrapper has
# `set -euf -o pipefail`, its settings, $here (this repository), and describe_run, which sets $output_dir and the array
# `command` for the learning rate, schedule, optimizer and number of steps that it is given.
# shellcheck disable=SC2154

# ---------------------------------------------------------------- checks

refuse() {
    echo "$(basename "$0"): $*" >&2
    exit 2
}

[[ -n $DATA_ROOT ]] || refuse "fill in DATA_ROOT: the folder that prepare_dataset.sh wrote"
for name in LOAD_TENSORS DROP_LEARNED_POSITIONS; do
    value="${!name-false}"  # text-to-video has no learned positions to drop
    [[ $value == true || $value == false ]] || refuse "$name is true or false, not $value"
done
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
started="$(mktemp)"
trap 'rm -f "$started"' EXIT

read_status() {
    sed -n "s/.*\"$1\": *\"\{0,1\}\([^\",}]*\).*/\1/p" "$output_dir/status.json"
}

run() {  # the arguments are the command
    local state=complete code=0 step=-
    printf '\n== %s\n' "$output_dir"
    touch "$started"
    "$@" & child=$!  # not in the foreground: bash would look at a signal only after the run
    while :; do
        wait "$child" && code=0 || code=$?
        kill -0 "$child" 2> /dev/null || break  # it was a signal that ended the wait
    done
    child=
    [[ $code == 0 ]] || state=failed
    # The launcher turns every exit code into 1; the real one is in status.json, unless that is of an earlier run.
    if [[ $output_dir/status.json -nt $started ]]; then
        state="$(read_status state)" code="$(read_status exit_code)" step="$(read_status step)"
    elif [[ $code == 0 && -r $output_dir/status.json ]]; then
        step="$(read_status step)"  # it was complete: nothing was done
    elif [[ -n $interrupted ]]; then
        state=interrupted code=75
    fi
    [[ $code != 75 ]] || interrupted=1
    [[ $code == 0 ]] || echo "$(basename "$0"): $state with exit code $code: $output_dir" >&2
    [[ $exit_code != 0 ]] || exit_code="${code:-1}"
    table+=("$(printf '%-12s %4s %6s  %s' "$state" "$code" "$step" "$output_dir")")
}

# ---------------------------------------------------------------- all runs

runs=0
for learning_rate in $LEARNING_RATES; do
    for lr_schedule in $LR_SCHEDULES; do
        for optimizer in $OPTIMIZERS; do
            for steps in $MAX_TRAIN_STEPS; do
                describe_run "$learning_rate" "$lr_schedule" "$optimizer" "$steps"
                command+=("$@")
                runs=$((runs + 1))
                if [[ $DRY_RUN != 0 ]]; then
                    printf -v line '%q ' "${command[@]}"
                    printf '%s\n' "${line% }"
                elif [[ -n $interrupted ]]; then
                    table+=("$(printf '%-12s %4s %6s  %s' 'not started' - - "$output_dir")")
                else
                    run "${command[@]}"
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
