# Sourced by the scripts beside it: from a fresh clone, the binary is built first. KVBM names another one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -z "${KVBM:-}" ]; then
  KVBM=target/ci/kvbm
  make --silent build
fi
