#!/usr/bin/env bash
# One worker computes prompts, one answers: the KV goes through the daemon. Further arguments go to `kvbm up`.
source "$(dirname "$0")/common.sh"
exec "$KVBM" up --workers 1 --prefill-workers 1 "$@"
