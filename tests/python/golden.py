"""Checks the golden vectors of docs/wire.md with a second implementation. `golden.py FILE [--write]`."""

import json
import struct
import sys

from blake3 import blake3

BASES = [
    {"model": "tiny", "revision": "r1", "kv_dtype": "bf16", "layout": "l", "tokens_per_block": 32, "parallel": "tp1"},
    {"model": "Llama-3.1-8B", "revision": "", "kv_dtype": "fp8", "layout": "HND", "tokens_per_block": 16, "parallel": "tp8"},
]
REQUESTS = [
    {"lora": "", "salt": "", "tenant": ""},
    {"lora": "sql-adapter", "salt": "", "tenant": ""},
    {"lora": "", "salt": "tenant-7", "tenant": ""},
    {"lora": "", "salt": "", "tenant": "tenant-7"},
]
BLOCKS = 3


def field(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def base_digest(base: dict) -> bytes:
    fields = [base[name].encode() for name in ("model", "revision", "kv_dtype", "layout")]
    fields += [struct.pack("<I", base["tokens_per_block"]), base["parallel"].encode()]
    return blake3(b"".join(map(field, fields)), derive_key_context="kvbm v1 base namespace").digest()


def namespace_digest(base: bytes, lora: str, salt: str, tenant: str) -> bytes:
    data = field(base) + field(lora.encode()) + field(salt.encode())
    namespace = blake3(data, derive_key_context="kvbm v1 request namespace").digest()
    if not tenant:
        return namespace
    data = field(namespace) + field(tenant.encode())
    return blake3(data, derive_key_context="kvbm v1 tenant namespace").digest()


def keys(namespace: bytes, tokens: list[int], size: int, items: list[dict]) -> list[str]:
    chain, out = namespace, []
    for start in range(0, len(tokens) - size + 1, size):
        data = struct.pack(f"<{size}I", *tokens[start : start + size])
        for item in items:
            if item["block"] == start // size:
                data += bytes.fromhex(item["digest"]) + struct.pack("<i", item["offset"])
        chain = blake3(data, key=chain).digest()
        out.append(chain[:16].hex())
    return out


def vectors() -> list[dict]:
    out = []
    for base in BASES:
        digest, size = base_digest(base), base["tokens_per_block"]
        tokens = [(i * 2654435761) % 128256 for i in range(size * BLOCKS + 5)]
        items = [{"block": 1, "digest": bytes(range(32)).hex(), "offset": -3}]
        for request in REQUESTS:
            namespace = namespace_digest(digest, **request)
            out.append({
                "base": base, "base_digest": digest.hex(), **request, "namespace_digest": namespace.hex(), "tokens": tokens,
                "keys": keys(namespace, tokens, size, []), "items": items, "keys_with_items": keys(namespace, tokens, size, items),
            })
    return out


def main() -> None:
    path = sys.argv[1]
    if "--write" in sys.argv:
        with open(path, "w") as file:
            json.dump(vectors(), file)
            file.write("\n")
    with open(path) as file:
        golden = json.load(file)
    assert golden == vectors(), f"{path} does not hold what this implementation computes"
    print(f"golden vectors: {len(golden)} passed, 0 failed")


if __name__ == "__main__":
    main()
