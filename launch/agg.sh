#!/usr/bin/env bash
# One worker computes prompts and answers. Further arguments go to `kvbm up`, --model and --http-port for example.
source "$(dirname "$0")/common.sh"
exec "$KVBM" up --workers 1 "$@"
