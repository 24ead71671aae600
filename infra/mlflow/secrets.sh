#!/usr/bin/env bash
# Make the passwords of a shared MLflow, once: a folder of files that compose.yaml, or a Kubernetes Secret, is made from.
# What is there already stays.
set -euo pipefail

folder=${1:-$(dirname "$0")/secrets}
umask 077
mkdir -p "$folder"
for name in postgres_password storage_key storage_secret admin_password session_key; do
  if [[ ! -s $folder/$name ]]; then
    # Without a newline, which would be part of a password where a file is taken as it is.
    head -c 24 /dev/urandom | od -An -tx1 | tr -d ' \n' > "$folder/$name"
  fi
done
# Containers read them as other users than the one who made them; others on this machine can't enter the folder.
chmod 644 "$folder"/*
echo "secrets.sh: in $folder; MLflow's first login is admin with the password of admin_password"
