"""Installs the built wheel where there is neither a compiler nor an engine, and imports it. `wheel.py FOLDER`."""

import os
import pathlib
import subprocess
import sys
import tempfile
import venv

CHECKS = """
import sys
import kvbm_connector
from kvbm_connector import trtllm, vllm

for absent in ("torch", "tensorrt_llm", "vllm", "numpy"):
    assert absent not in sys.modules, absent
try:
    vllm.KvbmConnector(None, None, None)
except ImportError as error:
    assert "needs vLLM" in str(error), error
else:
    raise AssertionError("a connector of vLLM was made without vLLM")
assert trtllm.DynamoKVBMConnectorLeader is trtllm.KvbmConnectorScheduler
assert trtllm.DynamoKVBMConnectorWorker is trtllm.KvbmConnectorWorker
for adapter in (trtllm.KvbmConnectorScheduler, trtllm.KvbmConnectorWorker):
    try:
        adapter(None)
    except ImportError as error:
        assert "needs TensorRT-LLM" in str(error), error
    else:
        raise AssertionError(f"{adapter} was made without an engine")

assert str(kvbm_connector.socket_of("unix:/run/kvbm/kvbm.sock")) == "/run/kvbm/kvbm.sock"
try:
    kvbm_connector.socket_of("tcp://localhost:5555")
except ValueError as error:
    assert "Unix socket" in str(error), error
else:
    raise AssertionError("a TCP address was accepted")

# Without a daemon every answer is: nothing found, nothing kept, go on.
engine = kvbm_connector.Engine(
    socket="/nonexistent/kvbm.sock", client="test", model="tiny", revision="", kv_dtype="f16", tokens_per_block=4,
    rank=0, rank_count=1, shard=0, shard_count=1, lora_scope="",
)
pool = bytearray(16 * 64)
address = __import__("ctypes").addressof(__import__("ctypes").c_char.from_buffer(pool))
engine.register_memory([[(address, 64, 64, 16)]], "test", "cpu:0", False, False, False, pool, None)
tokens = list(range(9))
assert engine.query(1, lambda beam: tokens, None, None, [], 0) == (0, False)
engine.allocated(1, [[0, 1, 2]])
engine.bind(engine.build([(1, 0, tokens, [[0, 1, 2]], 0, 9, None)], []))
engine.start_loads(0)
engine.pass_done(0)
assert engine.request_finished(1) is False
assert engine.get_finished([], []) == ([], [])
assert engine.figures()["attached"] == 0 and not engine.attached
engine.close()
"""


def old_names(python: str, bare: dict[str, str], folder: str) -> None:
    """The modules of KVBM's names come and go, but not where those of somebody else are."""
    manage = [python, "-m", "kvbm_connector.dynamo_names"]
    use = [python, "-c", "from dynamo.llm.trtllm_integration.connector import DynamoKVBMConnectorLeader\n"
           "from kvbm.trtllm_integration.connector import DynamoKVBMConnectorWorker"]
    subprocess.run([*manage, "install"], check=True, env=bare, cwd=folder)
    subprocess.run(use, check=True, env=bare, cwd=folder)
    subprocess.run([*manage, "remove"], check=True, env=bare, cwd=folder)
    assert subprocess.run(use, env=bare, cwd=folder, stderr=subprocess.DEVNULL).returncode != 0
    original = next(pathlib.Path(folder).glob("lib/python*/site-packages")) / "kvbm"
    original.mkdir()
    (original / "__init__.py").write_text("original = True\n")
    refused = subprocess.run([*manage, "install"], env=bare, cwd=folder, stderr=subprocess.PIPE, text=True)
    assert refused.returncode == 1 and "kvbm is installed already" in refused.stderr, refused
    assert (original / "__init__.py").read_text() == "original = True\n"
    assert not (original.parent / "dynamo").exists()


def main() -> None:
    wheels = sorted(pathlib.Path(sys.argv[1]).glob("kvbm_connector-*.whl"), key=os.path.getmtime)
    assert wheels, f"no wheel in {sys.argv[1]}: run make wheel"
    assert "-cp310-abi3-" in wheels[-1].name, wheels[-1].name
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = f"{folder}/bin/python"
        bare = {"PATH": f"{folder}/bin", "HOME": folder}
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--only-binary=:all:"]
        subprocess.run([*pip, wheels[-1].resolve()], check=True, env=bare)
        subprocess.run([python, "-c", CHECKS], check=True, env=bare, cwd=folder)
        for name in ("trtllm_adapter.py", "vllm_adapter.py"):
            adapter = pathlib.Path(__file__).resolve().with_name(name)
            subprocess.run([python, adapter], check=True, env=bare, cwd=folder)
        old_names(python, bare, folder)
    print(f"wheel {wheels[-1].name}: passed")


if __name__ == "__main__":
    main()
