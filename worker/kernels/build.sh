#!/bin/sh
# Makes llama.ptx, which is checked in. Wants nvcc of CUDA 13.0: drivers from 580 on compile what it makes, but not what a
# newer one would. Without the toolkit, in a Python environment:
#   pip install 'nvidia-cuda-nvcc==13.0.*' 'nvidia-nvvm==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-cuda-cccl==13.0.*' \
#       'nvidia-cuda-runtime==13.0.*'
#   NVCC=<environment>/lib/python3.*/site-packages/nvidia/cu13/bin/nvcc worker/kernels/build.sh
# Also wants b3sum, or the Python package blake3. A test of the crate compares the digest with the sources.
set -eu
cd "$(dirname "$0")"
nvcc=${NVCC:-nvcc}
case $("$nvcc" --version) in
*"release 13.0"*) ;;
*) echo "$nvcc is not of CUDA 13.0" >&2 && exit 1 ;;
esac
# The order is that of bytes, wherever this runs.
sources=$(LC_ALL=C ls ./*.cu ./*.cuh | LC_ALL=C sort)
if command -v b3sum >/dev/null; then
    # shellcheck disable=SC2086
    digest=$(cat $sources | b3sum --no-names)
else
    # shellcheck disable=SC2086
    digest=$(cat $sources | python3 -c 'import blake3, sys; print(blake3.blake3(sys.stdin.buffer.read()).hexdigest())')
fi
"$nvcc" -std=c++17 -O3 -arch=compute_80 --ptx -I. -o llama.ptx.new llama.cu
# The tool's own header says when and by which build; it would differ every time.
{ printf '// Made by build.sh, CUDA 13.0.\n// sources: %s\n' "$digest" && grep -v '^//' llama.ptx.new; } >llama.ptx
rm llama.ptx.new
