"""How requests and settings of TensorRT-LLM are translated, without an engine. `trtllm_adapter.py`, where the wheel is."""

import ctypes
import json
import pathlib
import tempfile
from array import array
from types import SimpleNamespace as Record

from kvbm_connector import _trtllm_checks as checks
from kvbm_connector import _trtllm_request as requests
from kvbm_connector import Engine, model_fingerprint


def prompt_of(asked: Record) -> tuple:
    return requests.prompt_of(asked)


def request(**fields: object) -> Record:
    return Record(request_id=7, get_tokens=lambda beam: [1, 2, 3], **fields)


def cacheable(**fields: object) -> bool:
    return prompt_of(request(**fields))[1] is not None


def test_requests_are_translated_with_what_is_in_their_key() -> None:
    asked = request()
    assert prompt_of(asked) == (7, asked.get_tokens, None, None, [])
    assert prompt_of(request(lora_task_id=0))[2] == 0
    assert prompt_of(request(cache_salt="s"))[3] == "s"
    # Two versions of the field must never make one key of two salts.
    assert prompt_of(request(cache_salt_id=5))[3] != prompt_of(request(cache_salt="5"))[3]
    words = [1, -1, 2**31 - 1, 0, 0, 0, 0, 9]
    image = dict(multimodal_hashes=[words], multimodal_positions=[1], multimodal_lengths=[2])
    assert prompt_of(request(**image))[4] == [(b"\1\0\0\0\xff\xff\xff\xff\xff\xff\xff\x7f" + bytes(16) + b"\t\0\0\0", 1, 2)]


def test_what_is_not_in_the_key_is_served_without_the_cache() -> None:
    assert cacheable()
    assert not cacheable(multimodal_positions=[1], multimodal_lengths=[2])
    assert not cacheable(multimodal_positions=[1], multimodal_lengths=[2], multimodal_hashes=[[1, 2, 3]])
    assert not cacheable(is_dummy_request=True)
    # An attribute in one version, a method in another.
    assert not cacheable(is_generation_only_request=True)
    assert not cacheable(is_generation_only_request=lambda: True)
    assert cacheable(is_generation_only_request=lambda: False)
    assert not cacheable(prompt_embedding_table=object())


def test_reports_are_those_of_every_line_of_the_interface() -> None:
    flat = Record(request_id=1, new_tokens=[4], new_block_ids=[2], computed_position=3)
    assert requests.report_of(flat) == (1, 0, [4], [[2]], 3, None, None)
    flat.num_scheduled_tokens, flat.priorities, flat.new_block_ids_by_layer_group = 2, [80], []
    assert requests.report_of(flat) == (1, 0, [4], [[2]], 3, 2, [80])
    flat.new_block_ids_by_layer_group = [[2], [-1]]
    assert requests.report_of(flat)[3] == [[2], [-1]]
    flat.new_block_ids_by_layer_group = {1: [-1], 0: [2]}
    assert requests.report_of(flat)[3] == [[2], [-1]]


class Bypassed:
    """A native engine without a daemon, and how many of its requests are served without the cache."""

    PAGES, PAGE_BYTES = 4096, 16

    def __init__(self) -> None:
        self.engine = Engine(
            socket="/nowhere.sock", client="test", model="m", revision="", kv_dtype="f16", tokens_per_block=8, rank=0,
            rank_count=1, shard=0, shard_count=1, lora_scope="",
        )
        pool = bytearray(self.PAGES * self.PAGE_BYTES)
        address = ctypes.addressof(ctypes.c_char.from_buffer(pool))
        region = (address, self.PAGE_BYTES, self.PAGE_BYTES, self.PAGES)
        self.engine.register_memory([[region]], "test", "cpu:0", False, False, True, pool, None)
        self.requests = 0

    def count(self) -> int:
        return self.engine.figures()["bypassed_requests"]

    def is_(self, asked: object, reported: object = None) -> bool:
        """Whether a request is, that was asked about with some tokens and is reported with others."""
        self.requests += 1
        before = self.count()
        self.engine.query(self.requests, lambda beam: asked, None, None, [], 0)
        reported = asked if reported is None else reported
        pages = list(range(-(-len(reported) // 8)))
        self.engine.build([(self.requests, 0, reported, [pages], 0, len(reported), None)], [])
        return self.count() > before


class Number:
    """A number of another library."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


def test_a_request_with_something_that_is_no_token_is_served_without_the_cache() -> None:
    bypassed = Bypassed()
    assert not bypassed.is_([1, 2, 2**32 - 1]) and not bypassed.is_([])
    for same in ([1, Number(2), True], (1, 2, 1), array("q", [1, 2, 1])):
        assert not bypassed.is_([1, 2, 1], same) and not bypassed.is_(same, [1, 2, 1]), same
        assert bypassed.is_([1, 2, 2], same), same
    for strange in (-5, 2**32, 2**64 - 1, 2**64, None, "x", 1.5, Number(-1), Number(2**32)):
        assert bypassed.is_([1, strange, 3]), strange
        assert bypassed.is_([1, 2, 3], [1, 2, 3, strange]), strange


def test_a_request_that_is_reported_with_other_tokens_than_it_was_asked_about_is_too() -> None:
    bypassed = Bypassed()
    assert not bypassed.is_([1, 2, 3]) and not bypassed.is_([1, 2, 3], [1, 2, 3, 4])
    assert not bypassed.is_([1, 2, 3], [1, 2, 3, Number(4)])
    for other in ([1, 2, 4], [1, 2], []):
        assert bypassed.is_([1, 2, 3], other), other
    prompt = list(range(30_000))
    for at in (0, 1, 4999, 29_999):
        assert bypassed.is_(prompt, [*prompt[:at], 77_777, *prompt[at + 1 :]]), at
    assert not bypassed.is_(prompt)


def settings(**fields: object) -> Record:
    cache = {name[3:]: fields.pop(name) for name in list(fields) if name.startswith("kv_")}
    return Record(kv_cache_config=Record(**{"tokens_per_block": 32, **cache}), **fields)


def refused(setting: str, check: object, *args: object) -> None:
    try:
        check(*args)
    except NotImplementedError as error:
        assert setting in str(error), error
    else:
        raise AssertionError(f"{setting} was accepted")


def test_what_cannot_work_is_refused_by_the_name_of_the_setting() -> None:
    checks.check_llm_args(settings())
    for fields in (
        {"pipeline_parallel_size": 2}, {"context_parallel_size": 2}, {"enable_attention_dp": True}, {"max_beam_width": 2},
        {"sparse_attention_config": object()}, {"backend": "tensorrt"},
    ):
        refused(next(iter(fields)), checks.check_llm_args, settings(**fields))
    refused("kv_cache_config.host_cache_size", checks.check_llm_args, settings(kv_host_cache_size=1))
    refused("kv_cache_config.dtype", checks.check_llm_args, settings(kv_dtype="NVFP4"))


def pool(*shape: int, dtype: str = "torch.float16") -> Record:
    return Record(shape=shape, dtype=dtype, is_contiguous=lambda: True)


def test_a_pool_that_is_not_what_the_settings_say_is_refused() -> None:
    config = {"num_hidden_layers": 4, "num_key_value_heads": 8, "head_dim": 64}
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(config))
        args = settings(model=folder)
        checks.check_pool(args, pool(10, 4, 2, 8 * 32 * 64))
        refused("tokens_per_block", checks.check_pool, args, pool(10, 4, 2, 8 * 64 * 64))
        refused("4 layers", checks.check_pool, args, pool(10, 3, 2, 8 * 32 * 64))
        refused("kv_cache_config.dtype", checks.check_pool, args, pool(10, 4, 2, 8 * 32 * 32, dtype="torch.int8"))
        refused("max_attention_window", checks.check_pool, settings(kv_max_attention_window=[64, 128]), pool(10, 4, 2, 1))
        two = settings(model=folder, tensor_parallel_size=2)
        checks.check_pool(two, pool(10, 4, 2, 4 * 32 * 64))
    checks.check_pool(settings(model="some/name"), pool(10, 4, 2, 12345))


def test_a_fingerprint_tells_weights_apart() -> None:
    with tempfile.TemporaryDirectory() as folder:
        weights = pathlib.Path(folder) / "model.safetensors"
        (pathlib.Path(folder) / "config.json").write_text("{}")
        seen = set()
        for content in (bytes(1 << 20), b"\1" + bytes((1 << 20) - 1), bytes((1 << 20) - 1) + b"\1", bytes((1 << 20) + 1)):
            weights.write_bytes(content)
            seen.add(model_fingerprint(folder))
        weights.write_bytes(bytes(1 << 20))
        assert len(seen) == 4 and model_fingerprint(folder) in seen
        (pathlib.Path(folder) / "config.json").write_text("{ }")
        assert model_fingerprint(folder) not in seen


def main() -> None:
    tests = [test for name, test in sorted(globals().items()) if name.startswith("test_")]
    for test in tests:
        test()
    print(f"adapter of TensorRT-LLM: {len(tests)} passed, 0 failed")


if __name__ == "__main__":
    main()
