#!/usr/bin/env bash
# Beside Ray on a spot machine: AWS says two minutes ahead that it takes the machine back, and this tells Ray. Actors then
# hand their shards back, and gangs save and leave, as they do wherever a node is drained.
set -euo pipefail
metadata=${METADATA:-http://169.254.169.254}/latest

ask() { wget --quiet --timeout=2 --tries=1 --output-document=- "$@"; }

taken() {
  local token
  token=$(ask --method=PUT --header="X-aws-ec2-metadata-token-ttl-seconds: 60" "$metadata/api/token") &&
    ask --header="X-aws-ec2-metadata-token: $token" "$metadata/meta-data/spot/instance-action" >/dev/null
}

until taken; do sleep "${SECONDS_BETWEEN:-5}"; done
exec ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "AWS takes this spot machine back" \
  --deadline-remaining-seconds 110
