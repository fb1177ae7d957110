#!/usr/bin/env bash
# Two workers compute prompts, two answer; prompts go where most of them is. Further arguments go to `kvbm up`.
source "$(dirname "$0")/common.sh"
exec "$KVBM" up --workers 2 --prefill-workers 2 --router-mode kv "$@"
