# shellcheck shell=bash
# Sourced by pod.sh, jobset.sh and scripts/gpu_nodes.sh: settings files, quoting, and the dry run. For bash 3.2 and newer.

DRY_RUN=""

die() {
    echo "error: $*" >&2
    exit 2
}

# The words as a shell wants to read them, so that a printed command can be pasted.
quote() {
    local word option tick="'" escaped="'\\''" between=""
    for word in "$@"; do
        option=""
        if [[ $word =~ ^--[a-z-]+= ]]; then
            option=${BASH_REMATCH[0]}
            word=${word#"$option"}
        fi
        if [[ ! $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
            word=\'${word//$tick/"$escaped"}\'
        fi
        printf '%s' "$between$option$word"
        between=" "
    done
}

# Runs a command, or prints it in a dry run.
run() {
    if [ -n "$DRY_RUN" ]; then
        quote "$@"
        printf '\n'
    else
        "$@"
    fi
}

# read_settings FILE NAME... : sets the variables that the file's lines NAME=value name. The file is read, not executed.
read_settings() {
    local file=$1 line name value
    shift
    [ -f "$file" ] || die "$file: no such file; copy its example in tpu/ and fill it in, or name another with --env FILE"
    while IFS= read -r line || [ -n "$line" ]; do
        line=${line%$'\r'}
        case $line in
            "" | "#"*) continue ;;
            *=*) ;;
            *) die "$file: wanted lines NAME=value, came '$line'" ;;
        esac
        name=${line%%=*}
        value=${line#*=}
        case " $* " in
            *" $name "*) printf -v "$name" '%s' "$value" ;;
            *) die "$file: no setting is called '$name'; there are $*" ;;
        esac
    done <"$file"
}

# check_setting FILE NAME REGULAR_EXPRESSION EXAMPLE
check_setting() {
    [ -n "${!2}" ] || die "$1: $2 is missing; wanted something like $2=$4"
    [[ ${!2} =~ ^($3)$ ]] || die "$1: $2=${!2}: wanted something like $4"
}
