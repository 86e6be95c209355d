#!/usr/bin/env bash
# commlab on the hosts of a file, with MPICH:
#   HOSTS=hosts RANKS_PER_HOST=8 RUN=/shared/run docs/launch/mpich.sh --model gpt2-100m
# ssh to every host works without a password. The environment (COMMLAB_ENV), the data (DATA) and RUN lie at the same
# path on all of them, RUN on a file system that all mount. Given again after it has ended, it goes on from the newest
# checkpoint. IFACE: the network interface, where there are several.
set -euo pipefail

HOSTS=${HOSTS:-hosts}
RUN=${RUN:-run}
RANKS_PER_HOST=${RANKS_PER_HOST:-8}
# shellcheck source=/dev/null
source "${COMMLAB_ENV:-.venv}/bin/activate"
mkdir -p "$RUN"
hosts=$(grep -cvE '^[[:space:]]*(#|$)' "$HOSTS")

exec mpirun -f "$HOSTS" -ppn "$RANKS_PER_HOST" -n "$((hosts * RANKS_PER_HOST))" ${IFACE:+-iface "$IFACE"} \
    "$(command -v python)" -m commlab.train \
    --strategy allreduce \
    ${DATA:+--data "$DATA"} \
    --output "$RUN/model" \
    --metrics "$RUN/metrics.jsonl" \
    --checkpoint-every 100 \
    --checkpoint-dir "$RUN/checkpoints" \
    --resume \
    "$@"
