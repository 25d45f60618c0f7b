#!/usr/bin/env bash
# Makes what kustomization.yaml puts into Secrets: the job's secret, and certificates for etcd and its clients.
#
#   ./make-secrets.sh [FOLDER]      FOLDER: secrets, which must not exist yet
#
# NAMESPACE, ETCD_NAMES: where etcd runs and the names of its members, as in etcd.yaml. DAYS: how long certificates hold.
# EXTRA_NAMES: more names of etcd's certificate, as openssl writes them (IP:10.0.0.1,DNS:etcd.example.com).
set -euo pipefail
umask 077

folder=${1:-secrets}
namespace=${NAMESPACE:-ckpt}
members=${ETCD_NAMES:-etcd-0 etcd-1 etcd-2}
days=${DAYS:-365}

mkdir "$folder"
cd "$folder"
ckpt key new job.secret

names="DNS:localhost,IP:127.0.0.1"
for member in $members; do
    names+=",DNS:$member.etcd.$namespace.svc"
done
names+="${EXTRA_NAMES:+,$EXTRA_NAMES}"

key() { openssl genpkey -quiet -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1"; }

key ca.key
openssl req -x509 -new -key ca.key -days 3650 -subj "/CN=ckpt etcd" -out ca.crt \
    -addext "basicConstraints=critical,CA:TRUE,pathlen:0" -addext "keyUsage=critical,keyCertSign,cRLSign"

# Members call each other and themselves, so their certificate is a client's too.
sign() { # name, subject, extensions
    key "$1.key"
    openssl req -new -key "$1.key" -subj "$2" -out "$1.csr"
    openssl x509 -req -in "$1.csr" -CA ca.crt -CAkey ca.key -CAcreateserial -days "$days" -out "$1.crt" \
        -extfile <(printf '%s\n' "$3") 2>/dev/null
    rm "$1.csr"
}
sign etcd "/CN=etcd" "subjectAltName=$names
extendedKeyUsage=serverAuth,clientAuth"
sign client "/CN=ckpt" "extendedKeyUsage=clientAuth"
rm -f ca.srl

echo "made in $PWD: $(echo *)"
echo "keep ca.key where no pod reads it: it signs the next certificates"
