#!/usr/bin/env bash
# commlab on the hosts of a file, with Open MPI:
#   HOSTS=hosts RANKS_PER_HOST=8 RUN=/shared/run docs/launch/openmpi.sh --model gpt2-100m
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

# By its full path, so that the other hosts look for Open MPI's own programs there. Not bound: each rank may use all
# cores of its share.
exec "$(command -v mpirun)" --hostfile "$HOSTS" --map-by "ppr:$RANKS_PER_HOST:node" --bind-to none \
    -n "$((hosts * RANKS_PER_HOST))" ${IFACE:+--mca btl_tcp_if_include "$IFACE"} \
    "$(command -v python)" -m commlab.train \
    --strategy allreduce \
    ${DATA:+--data "$DATA"} \
    --output "$RUN/model" \
    --metrics "$RUN/metrics.jsonl" \
    --checkpoint-every 100 \
    --checkpoint-dir "$RUN/checkpoints" \
    --resume \
    "$@"
