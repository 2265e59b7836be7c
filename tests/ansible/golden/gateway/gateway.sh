#!/bin/bash
# Ansible managed
# gateway.sh note     write down what nginx is about to load
# gateway.sh state    whether that is what lies on the disk: loaded or stale
# gateway.sh reload   make nginx load what lies there; ends well only when it did and the old workers take nothing new. Streams go on in them.
# gateway.sh look     reload where a certificate or a configuration was renewed, and write figures for /metrics
set -euo pipefail

tree=/etc/vllm-gateway/main
run=/run/vllm-gateway-main
certificate=/etc/vllm-gateway/main-tls/certificate.pem
key=/etc/vllm-gateway/main-tls/key.pem
unit=vllm-gateway@main.service

sum() {
    { readlink -f "$tree"; cat "$tree"/*.conf "$certificate" "$key"; } | sha256sum | cut -d ' ' -f 1
}

note() { # note SUM
    (umask 077 && printf '%s\n' "$1" >"$run/loaded.new" && mv "$run/loaded.new" "$run/loaded")
}

state() {
    [[ -e $run/nginx.pid && -e $run/loaded && $(sum) == "$(<"$run/loaded")" ]] && echo loaded || echo stale
}

accepted() {
    nginx -t -q -c "$tree/nginx.conf"
}

# Whether a worker still takes connections. Its title changes just before it closes its listeners, and nothing between the two can sleep: one that sleeps
# after the change has closed them.
accepts() { # accepts PID
    local title stat
    { title=$(tr '\0' ' ' <"/proc/$1/cmdline") && stat=$(<"/proc/$1/stat"); } 2>/dev/null || return 1
    stat=${stat##*) }
    [[ $stat != Z* && ($title != *"is shutting down"* || $stat != S*) ]]
}

reload() {
    local main before seen new old
    accepted
    seen=$(sum)
    main=$(<"$run/nginx.pid")
    before=$(pgrep --parent "$main" || true)
    kill -HUP "$main"
    for _ in {1..300}; do
        new=$(pgrep --parent "$main" | grep --invert-match --line-regexp --fixed-strings "$before" || true)
        old=$(for worker in $before; do accepts "$worker" && echo "$worker"; done || true)
        if [[ -n $new && -z $old ]]; then
            note "$seen"
            return
        fi
        sleep 0.1
    done
    echo "nginx goes on with what it had loaded before, in the processes ${old//$'\n'/ }: see /var/log/vllm-gateway/main/error.log" >&2
    return 1
}

served_until() {
    local end
    end=$(openssl s_client -connect 127.0.0.1:443 </dev/null 2>/dev/null | openssl x509 -noout -enddate 2>/dev/null) || return 1
    date --date "${end#notAfter=}" +%s
}

look() {
    local current=1 until
    if [[ $(state) != loaded ]]; then
        systemctl reload "$unit" || current=0
    fi
    {
        echo "# HELP lowmem_gateway_configuration_loaded Whether nginx serves what lies on its disk: certificate, keys, routes."
        echo "# TYPE lowmem_gateway_configuration_loaded gauge"
        echo "lowmem_gateway_configuration_loaded $current"
        if until=$(served_until); then
            echo "# HELP lowmem_gateway_certificate_not_after_seconds When the certificate that is served ends, in seconds since 1970."
            echo "# TYPE lowmem_gateway_certificate_not_after_seconds gauge"
            echo "lowmem_gateway_certificate_not_after_seconds $until"
        fi
        echo "# HELP lowmem_gateway_firewall_loaded Whether the rules that hide the engine's own listeners are in force."
        echo "# TYPE lowmem_gateway_firewall_loaded gauge"
        echo "lowmem_gateway_firewall_loaded $(nft list table inet vllm_gateway_main >/dev/null 2>&1 && echo 1 || echo 0)"
        echo "# HELP lowmem_gateway_looked_seconds When these figures were written, in seconds since 1970."
        echo "# TYPE lowmem_gateway_looked_seconds gauge"
        echo "lowmem_gateway_looked_seconds $(date +%s)"
    } >"$run/figures.new"
    chmod 0644 "$run/figures.new"
    mv "$run/figures.new" "$run/figures.prom"
    ((current)) || { echo "nginx refuses what lies on the disk, and goes on with what it had: see above, and /var/log/vllm-gateway/main/error.log" >&2; exit 1; }
}

case ${1:-} in
note) note "$(sum)" ;;
state) state ;;
reload) reload ;;
look) look ;;
*)
    echo "usage: gateway.sh note|state|reload|look" >&2
    exit 1
    ;;
esac
