#!/usr/bin/env bash
# Makes certificates by which the nodes of a job speak TLS to each other, or renews those that end soon.
#
#   ./make-certificates.sh FOLDER HOST...      FOLDER: certificates; each HOST as Slurm names it, or HOST=ADDRESS,ADDRESS
#   ./make-certificates.sh certificates $(sinfo -hNo %N -p gpu | sort -u)
#
# A certificate names its host and its addresses: those that are given, or those that the host's name has here (not on that host
# itself, where it may be 127.0.1.1). Run it as often as you like: what holds for RENEW_DAYS more, and is of this authority,
# stays as it is.
#
# DAYS, RENEW_DAYS: how long a certificate holds, and how long before its end it is renewed. Default: 365, 180
# CA_KEY: the authority's key; it signs the next certificates, and no node needs it. Default: FOLDER/ca.key
set -euo pipefail
umask 077

(($# >= 2)) || { sed -n '4,5s/^# *//p' "$0" >&2; exit 2; }
folder=$1
shift
days=${DAYS:-365}
renew_days=${RENEW_DAYS:-180}
ca_key=${CA_KEY:-$folder/ca.key}

mkdir -p "$folder"
key() { openssl genpkey -quiet -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1"; }
holds() { openssl x509 -in "$1" -noout -checkend $(($2 * 86400)) >/dev/null 2>&1; } # certificate, days

# Renewed, it is the same authority to whoever read the older file: its key and its name stay.
if [[ ! -e $ca_key ]]; then
    if [[ -e $folder/ca.crt ]]; then
        echo "the authority's key isn't there. CA_KEY=$ca_key; without it remove $folder/ca.crt, and all certificates are new" >&2
        exit 2
    fi
    key "$ca_key"
fi
if ! holds "$folder/ca.crt" $((2 * days)); then
    openssl req -x509 -new -key "$ca_key" -days $((days + 3650)) -subj "/CN=ckpt nodes" -out "$folder/ca.crt.new" \
        -addext "basicConstraints=critical,CA:TRUE,pathlen:0" -addext "keyUsage=critical,keyCertSign,cRLSign"
    mv "$folder/ca.crt.new" "$folder/ca.crt"
fi

names_of() { # host, its addresses or nothing
    local addresses names="DNS:$1" address
    addresses=$2
    [[ -n $addresses ]] || addresses=$(getent ahosts "$1" | awk '{ print $1 }' | sort -u | paste -sd,) || true
    for address in ${addresses//,/ }; do names+=",IP:$address"; done
    printf '%s' "$names"
}

for one in "$@"; do
    host=${one%%=*} addresses=""
    [[ $one != *=* ]] || addresses=${one#*=}
    if [[ ! $host =~ ^[A-Za-z0-9._:-]+$ ]]; then
        echo "not the name of a host. host=$host" >&2
        exit 2
    fi
    names=$(names_of "$host" "$addresses")
    [[ $names == *,IP:* ]] || echo "$host: no address is known here; its certificate has its name alone: HOSTS_BY=name" >&2
    at=$folder/$host
    if [[ ! -e $at.key ]]; then
        rm -f "$at.crt" # of another key
        key "$at.key"
    fi
    if holds "$at.crt" "$renew_days" && openssl verify -CAfile "$folder/ca.crt" "$at.crt" >/dev/null 2>&1 &&
        [[ $(cat "$at.names" 2>/dev/null) == "$names" ]]; then
        continue
    fi
    said=$(openssl req -new -key "$at.key" -subj "/CN=ckpt node" |
        openssl x509 -req -CA "$folder/ca.crt" -CAkey "$ca_key" -set_serial "0x$(openssl rand -hex 16)" -days "$days" \
            -out "$at.crt.new" -extfile <(printf 'subjectAltName=%s\n' "$names"
                printf '%s\n' extendedKeyUsage=serverAuth,clientAuth keyUsage=critical,digitalSignature) 2>&1) ||
        { echo "$said" >&2; exit 1; }
    mv "$at.crt.new" "$at.crt"
    printf '%s' "$names" >"$at.names"
    echo "made $at.crt: $names"
done
[[ ! -e $folder/ca.key ]] || echo "keep $folder/ca.key where no node reads it: it signs the next certificates"
