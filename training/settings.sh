# shellcheck shell=bash
# Shared by all wrappers: reading settings in any notation, and how a command ended. Sourced by a wrapper that has
# `set -euf -o pipefail` and $here (this repository).
# shellcheck disable=SC2034,SC2154

refuse() {
    echo "$(basename "$0"): ${*//$'\n'/ }" >&2
    exit 2
}

# ---------------------------------------------------------------- values

# Sets the array `values` to the values of setting $1: one for a string, all for an array.
read_values() {
    local reference="$1[@]"
    values=(${!reference+"${!reference}"})
}

is_array() {
    [[ $(declare -p "$1" 2> /dev/null) =~ ^declare\ -[A-Za-z]*a ]]
}

set_text() {
    ! is_array "$1" || unset "$1"  # otherwise the string would become element 0 of the array
    printf -v "$1" '%s' "$2"
}

# join_words SEPARATOR NAME...: joins settings of several words, arrays or strings with white space, into strings with
# SEPARATOR between the words. In front of a command, bash passes LEARNING_RATES=(1e-4 1e-3) as "(1e-4 1e-3)".
join_words() {
    local separator="$1" name text values
    shift
    for name; do
        declare -p "$name" > /dev/null 2>&1 || continue
        read_values "$name"
        text="${values[*]-}"
        text="${text//[()\"\']/ }"
        [[ $separator == " " ]] || text="${text//"$separator"/ }"
        # Unquoted: split at white space.
        # shellcheck disable=SC2086
        printf -v text "%s$separator" $text
        set_text "$name" "${text%"$separator"}"
    done
}

# join_texts SEPARATOR NAME...: the same for strings that may contain white space.
join_texts() {
    local separator="$1" name text values
    shift
    for name; do
        [[ ${!name-} != "("*")" ]] || refuse "$name=${!name}: an array in front of the command; write $separator between texts"
        is_array "$name" || continue
        read_values "$name"
        printf -v text "%s$separator" ${values[@]+"${values[@]}"}
        set_text "$name" "${text%"$separator"}"
    done
}

# one_value NAME...: settings that take one value; an array of several would silently lose all but the first.
one_value() {
    local name values
    for name; do
        # in front of a command, bash passes NAME=(a b) as this string
        [[ ${!name-} != "("*")" ]] || refuse "$name=${!name}: an array in front of the command; write its text without ( )"
        is_array "$name" || continue
        read_values "$name"
        ((${#values[@]} < 2)) || refuse "$name takes one value, not ${#values[@]} (${values[*]})"
        set_text "$name" "${values[0]-}"
    done
}

# Sets GPU_IDS to a comma-separated list, and the array `gpus`.
read_gpus() {
    join_words , GPU_IDS
    IFS=, read -r -a gpus <<< "$GPU_IDS"
}

# Prints the settings that function $1 reads.
settings_of() {
    declare -f "$1" | grep -oE '\$\{?[A-Z][A-Z0-9_]*' | tr -d '{$' | sort -u
}

# ---------------------------------------------------------------- names

# other_name THEIRS OURS: accepts THEIRS, the original wrappers' name for setting OURS.
other_name() {
    local theirs="$1" ours="$2"
    one_value "$theirs"
    [[ -n ${!theirs-} && ${!theirs} != "${!ours-}" ]] || return 0
    # Both set in the environment; a value in the file is only a default.
    [[ $(declare -p "$ours" 2> /dev/null) != "declare -x"* ]] ||
        refuse "$theirs=${!theirs} and $ours=${!ours} are one setting: give one of them"
    echo "$(basename "$0"): $ours is ${!theirs}, given as $theirs" >&2
    set_text "$ours" "${!theirs}"
}

# Refuses settings that are never read: they are misspelt, or belong to another wrapper.
refuse_unread() {
    local names name text others
    names="$(sed -n 's/^\([A-Z][A-Z0-9_]*\)=.*/\1/p' "$0")"
    text="$(cat "$0" "$here/training/settings.sh" "$here/training/sweep.sh")"
    for name in $names; do
        others="${text//$'\n'$name=/ }"
        others="${others//"\${$name"[:-]/ }"  # its default
        [[ $others =~ [^A-Z0-9_]${name}[^A-Z0-9_] ]] || refuse "$name is no setting of this file"
    done
}

# ---------------------------------------------------------------- checks

# check_data_root WHAT: DATA_ROOT is set, and is a folder; WHAT describes that folder in messages.
check_data_root() {
    [[ -n $DATA_ROOT ]] || refuse "fill in DATA_ROOT: the folder $1"
    [[ -d $DATA_ROOT ]] || refuse "DATA_ROOT: there is no folder $DATA_ROOT; give the folder $1"
}

# ---------------------------------------------------------------- command

# `make install` puts everything into .venv; an active environment takes precedence.
if ! command -v accelerate > /dev/null && [[ -x $here/.venv/bin/accelerate ]]; then
    PATH="$here/.venv/bin:$PATH"
fi

# find_value NAME: sets $value to the last value of --NAME in the array `command`; arguments of the wrapper come last.
find_value() {
    local index
    value=
    for ((index = 0; index < ${#command[@]}; index++)); do
        case "${command[index]}" in
            "--$1") value="${command[index + 1]-}" ;;
            "--$1="*) value="${command[index]#*=}" ;;
        esac
    done
}

# Sets $output_dir from the array `command`.
find_output_dir() {
    find_value output_dir
    output_dir="$value"
}

# print_command WORD...: prints the command for pasting into a shell, with the script and each flag on its own line.
print_command() {
    local word text=
    for word; do
        case "$word" in
            --* | "$here"/training/*.py) text+=$' \\\n    ' ;;
            *) text+=" " ;;
        esac
        case "$word" in
            *[[:cntrl:]]* | *\'*) printf -v word '%q' "$word" ;;
            "" | *[!A-Za-z0-9_./:,=@%+-]*) word="'$word'" ;;
        esac
        text+="$word"
    done
    printf '%s\n' "${text# }"
}

# Sets a new id for the next run; its processes write it to status.json.
new_run_id() {
    COGVIDEOX_RUN_ID="$(uname -n)-$$-$RANDOM$RANDOM-$(date +%s)"
    export COGVIDEOX_RUN_ID
}

# status_value INDENT NAME: prints a value of status.json, whose first level is indented by two spaces.
status_value() {
    sed -n "s/^$1\"$2\": *\"\{0,1\}\([^\",}]*\).*/\1/p" "$output_dir/status.json" 2> /dev/null || true
}

# read_ending CODE: sets $state, $code and $step for a run whose launcher exited with CODE. Launchers turn every exit
# code into 1; the real one is in status.json, unless that belongs to an earlier run.
read_ending() {
    code="$1" state=failed step=-
    if [[ $(status_value "  " run) == "$COGVIDEOX_RUN_ID" ]]; then
        state="$(status_value "  " state)" code="$(status_value "  " exit_code)" step="$(status_value "  " step)"
    elif [[ $code == 2 || $(status_value "    " run) == "$COGVIDEOX_RUN_ID" ]]; then
        code="$(status_value "    " exit_code)" code="${code:-2}"
        [[ $code != 2 ]] || state=refused
    elif [[ $code == 0 ]]; then
        state=complete  # the run was complete already: nothing was done
        [[ $(status_value "  " state) != complete ]] || step="$(status_value "  " step)"
    elif [[ -n ${interrupted-} ]]; then
        state=interrupted code=75  # before it could write its status
    fi
}

# Runs the command of a wrapper that makes one run, or prints it with DRY_RUN=1; ends the wrapper with its exit code.
run_once() {
    local code=0
    if [[ $DRY_RUN != 0 ]]; then
        print_command "$@"
        printf '\n# 1 run\n'
        exit 0
    fi
    new_run_id
    "$@" || code=$?
    read_ending "$code"
    exit "$code"
}
