#!/usr/bin/env bash
# Two workers, each request at the one that has most of its prompt. Further arguments go to `kvbm up`.
source "$(dirname "$0")/common.sh"
exec "$KVBM" up --workers 2 --router-mode kv "$@"
