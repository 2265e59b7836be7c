#!/usr/bin/env bash
# Ansible managed
# supervise.sh start|stop|restart|state: the supervisor and its service, where PID 1 is not systemd. One at a time; a stop lets running requests end.
set -euo pipefail

root=/srv/vllm-lowmem
# Any version of it speaks to any other: what started the supervisor may be gone from `current` already.
bin=$(readlink -f "$root/current/env")/bin
control() { "$bin/supervisorctl" -c "$root/etc/supervisord.conf" "$@"; }

stop() {
    local pid
    pid=$(control pid) || return 0
    [[ $pid =~ ^[0-9]+$ ]] || return 0
    control shutdown
    for ((waited = 0; waited < 82; waited++)); do
        [[ -e /proc/$pid ]] || return 0
        sleep 1
    done
    echo "supervisor $pid did not stop within $waited s" >&2
    return 1
}

# With a clean environment, as a systemd unit has one: what the service sees is what its release says.
start() {
    env --ignore-environment HOME="$root" PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 \
        "$bin/supervisord" --configuration "$root/etc/supervisord.conf" 9>&-
}

case ${1:-} in
state) control status vllm ;;
start | stop | restart)
    exec 9>"$root/run/supervise.lock"
    flock 9
    [[ $1 == start ]] || stop
    [[ $1 == stop ]] || start
    ;;
*)
    echo "usage: ${0##*/} start|stop|restart|state" >&2
    exit 2
    ;;
esac
