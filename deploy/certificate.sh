#!/usr/bin/env bash
# Makes the certificate of one pod, signed by the CA in /ca, in the folder /tls. An init container runs it: the pod's
# other containers have no access to the key of the CA. Ray checks that the certificate of a peer names the address
# that it called, and pods call each other by address, and the head by the name FQ_RAY_IP, too (KubeRay sets it).
set -euo pipefail
umask 077

role=$1  # head or worker
names="IP:127.0.0.1,DNS:localhost,IP:$POD_IP"
if [ "$role" = head ]; then
  names+=",DNS:$FQ_RAY_IP"
fi

# The key is in memory and ends with its pod, so the certificate may last longer than any pod.
openssl req -x509 -CA "${CA:-/ca}/ca.crt" -CAkey "${CA:-/ca}/ca.key" -days 3650 \
  -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -subj "/CN=bcd-$role" \
  -addext "subjectAltName=$names" -addext basicConstraints=critical,CA:FALSE \
  -addext extendedKeyUsage=serverAuth,clientAuth \
  -keyout "${TLS:-/tls}/tls.key" -out "${TLS:-/tls}/tls.crt"
cp "${CA:-/ca}/ca.crt" "${TLS:-/tls}/ca.crt"
