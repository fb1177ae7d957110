"""How requests, tensors and settings of vLLM are translated, with a stand-in for its classes.

`vllm_adapter.py`, where the wheel is.
"""

import ctypes
import itertools
import sys
from dataclasses import dataclass, field
from types import ModuleType
from types import SimpleNamespace as Record


class Base:
    def __init__(self, vllm_config: object, role: object, kv_cache_config: object) -> None:
        self.bound: object = None

    def bind_connector_metadata(self, metadata: object) -> None:
        self.bound = metadata


class Hybrid: ...


class Metadata: ...


class WorkerMetadata: ...


class Handshake: ...


@dataclass
class Stats:
    data: dict[str, object] = field(default_factory=dict)


class Prom:
    def __init__(
        self, config: object, types: dict[str, object], names: list[str], labels: dict[int, list[object]]
    ) -> None:
        self._counter_cls = types["counter"]


def stand_in() -> None:
    """The modules of vLLM that the adapter imports."""
    place = "vllm.distributed.kv_transfer.kv_connector.v1"
    base = dict(
        KVConnectorBase_V1=Base,
        SupportsHMA=Hybrid,
        KVConnectorMetadata=Metadata,
        KVConnectorWorkerMetadata=WorkerMetadata,
        KVConnectorHandshakeMetadata=Handshake,
    )
    metrics = dict(KVConnectorStats=Stats, KVConnectorPromMetrics=Prom)
    parts = place.split(".")
    names = [".".join(parts[:end]) for end in range(1, len(parts) + 1)] + ["vllm.distributed.parallel_state"]
    for name in [*names, f"{place}.base", f"{place}.metrics"]:
        sys.modules[name] = ModuleType(name)
    for name in names + [f"{place}.base", f"{place}.metrics"]:
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])
    vars(sys.modules[f"{place}.base"]).update(base)
    vars(sys.modules[f"{place}.metrics"]).update(metrics)
    vars(sys.modules["vllm.distributed.parallel_state"]).update(get_tensor_model_parallel_rank=lambda: 0)


stand_in()
from kvbm_connector import _vllm_checks as checks  # noqa: E402
from kvbm_connector import _vllm_layout as layout  # noqa: E402
from kvbm_connector import _vllm_request as requests  # noqa: E402
from kvbm_connector import vllm  # noqa: E402
from kvbm_connector._vllm_metadata import KvbmWorkerMetadata  # noqa: E402
from kvbm_connector._vllm_scheduler import SchedulerHalf  # noqa: E402
from kvbm_connector._vllm_stats import KvbmPromMetrics, KvbmStats  # noqa: E402


class Tensor:
    """Memory of some shape, whose dimensions lie in `order`, outermost first."""

    device = Record(type="cpu", index=None)
    dtype = "torch.bfloat16"

    def __init__(
        self, shape: tuple[int, ...], order: tuple[int, ...] | None = None, at: int = 4096, gap: int = 0
    ) -> None:
        self.shape, self._at, strides, step = shape, at, [0] * len(shape), 1
        for place in reversed(order or tuple(range(len(shape)))):
            strides[place] = step
            step = step * shape[place] + (gap if place != (order or (0,))[0] else 0)
        self._strides = strides

    def stride(self) -> tuple[int, ...]:
        return tuple(self._strides)

    def element_size(self) -> int:
        return 2

    def data_ptr(self) -> int:
        return self._at


def bytes_of(tensor: Tensor, dimension: int, blocks: range) -> set[int]:
    """Addresses of a block's elements, counted one by one."""
    ranges = [blocks if at == dimension else range(size) for at, size in enumerate(tensor.shape)]
    places = (sum(i * s for i, s in zip(index, tensor.stride(), strict=True)) for index in itertools.product(*ranges))
    return {tensor.data_ptr() + 2 * place + byte for place in places for byte in (0, 1)}


def test_a_block_is_all_its_bytes_in_whatever_order_they_lie() -> None:
    cases = [
        (Tensor((10, 2, 4, 6)), 0, 1, 1),  # each block in one place
        (Tensor((2, 10, 4, 6)), 1, 1, 2),  # all keys, then all values
        (Tensor((2, 10, 4, 6), (1, 0, 2, 3)), 1, 1, 1),  # the same shape, blocks outermost
        (Tensor((3, 2, 10, 4), (2, 0, 1, 3)), 2, 1, 1),  # all layers of a block
        (Tensor((3, 10, 2, 4), (1, 2, 0, 3)), 1, 1, 1),
        (Tensor((20, 3, 4)), 0, 2, 1),  # kernels with half the block
        (Tensor((2, 20, 4)), 1, 2, 2),
        (Tensor((10, 3, 4), gap=8), 0, 1, 3),  # rows with something between them
    ]
    for tensor, dimension, steps, pieces in cases:
        regions = layout.regions_of(tensor, 10)
        assert len(regions) == pieces and all(region[3] == 10 for region in regions), (tensor.shape, regions)
        for block in (0, 3, 9):
            told = {base + block * stride + byte for base, size, stride, _ in regions for byte in range(size)}
            assert told == bytes_of(tensor, dimension, range(block * steps, (block + 1) * steps)), (tensor.shape, block)


def test_neighbours_become_one_piece_and_shared_layers_count_once() -> None:
    # A block of all layers lies in one place: each layer's tensor is a part of it.
    packed = {f"l{at}": Tensor((10, 2, 4), at=4096 + 16 * at) for at in range(3)}
    for tensor in packed.values():
        tensor._strides[0] = 24
    assert layout.layout_of(packed, 10)[0] == [(4096, 48, 48, 10)]
    apart = {f"l{at}": Tensor((10, 2, 4), at=4096 + 1000 * at) for at in range(3)}
    regions, name = layout.layout_of({**apart, "shared": apart["l1"]}, 10)
    assert len(regions) == 3 and regions[2][0] == 6096
    assert name != layout.layout_of(packed, 10)[1]
    assert name == layout.layout_of({**apart, "shared": apart["l1"]}, 10)[1]
    more = {f"l{at}": Tensor((20, 2, 4), at=4096 + 1000 * at) for at in range(3)}
    assert layout.layout_of(apart, 10)[1] == layout.layout_of(more, 20)[1], "an engine with more memory finds the same"


def test_a_layers_place_in_a_block_is_known_where_layers_lie_one_behind_the_other() -> None:
    names = ["a", "b", "c"]
    places = {"a": 0, "b": 1, "c": 2}
    # One tensor of all layers, blocks outermost: layers next, or heads before them.
    assert layout.layers_of({"all": Tensor((10, 3, 4, 2, 8))}, 10, names) == places
    assert layout.layers_of({"all": Tensor((10, 2, 3, 4, 8))}, 10, names) == {}, "each head has all layers"
    assert layout.layers_of({"all": Tensor((10, 3, 3, 4, 8))}, 10, names) == {}, "which of them are the layers?"
    assert layout.layers_of({"all": Tensor((3, 10, 4, 2, 8))}, 10, names) == {}, "blocks lie in several places"
    assert layout.layers_of({"all": Tensor((10, 3, 4, 2, 8))}, 10, names[:2]) == {}
    # A tensor for each, apart or as parts of one block.
    apart = {name: Tensor((10, 2, 4), at=4096 + 1000 * at) for at, name in enumerate(names)}
    assert layout.layers_of(apart, 10, []) == places
    packed = {name: Tensor((10, 2, 4), at=4096 + 16 * at) for at, name in enumerate(names)}
    for tensor in packed.values():
        tensor._strides[0] = 24
    assert layout.layers_of(packed, 10, []) == places
    assert layout.layers_of({**apart, "shared": apart["b"]}, 10, []) == {}, "two have the same memory"
    assert layout.layers_of({**apart, "b": Tensor((10, 2, 8), at=9000)}, 10, []) == {}, "one is larger"
    config_032 = Record(kv_cache_tensors=[Record(layers=["a", "b"]), Record(layers=["c"])])
    config_026 = Record(kv_cache_tensors=[Record(shared_by=["a", "x"]), Record(shared_by=["b"])])
    assert checks.layer_names(config_032) == names and checks.layer_names(config_026) == ["a", "b"]


def test_passes_of_which_a_graph_has_the_attention_do_not_ask_for_layers() -> None:
    def kind(mode: str | None, attention: object = (), **more: object) -> str | None:
        return vllm.kind_of_pass(Record(attn_metadata=attention, cudagraph_runtime_mode=mode and Record(name=mode), **more))

    assert kind("NONE") and kind("PIECEWISE") and kind("NONE") != kind("PIECEWISE")
    assert kind("NONE") != kind("NONE", skip_compiled=True)
    assert kind("FULL") is None and kind("NONE", None) is None and vllm.kind_of_pass(None) is None
    assert checks.waits_for_layers(config(), "cuda") and not checks.waits_for_layers(config(), "cpu")
    asked = config({"kvbm.by_layer": "true"})
    assert checks.waits_for_layers(asked, "cpu")
    assert not checks.waits_for_layers(config({"kvbm.by_layer": "false"}), "cuda")
    asked.speculative_config = Record()
    assert not checks.waits_for_layers(asked, "cuda")


def test_a_pass_asks_for_its_layers_until_it_is_known_that_it_does() -> None:
    by_layer = config({"kvbm.by_layer": "true"})
    worker = vllm.KvbmConnector(by_layer, Record(name="WORKER"), cache(FullAttentionSpec(), blocks=16))
    pool = (ctypes.c_char * (2 * 16 * 64))()
    at = ctypes.addressof(pool)
    worker.register_kv_caches({name: Tensor((16, 4, 8), at=at + 1024 * n) for n, name in enumerate("ab")})
    asked: list[tuple[int, int]] = []
    native, real = worker._worker.engine, worker._worker.engine.layer

    class Watched:
        def layer(self, *arguments: int) -> None:
            asked.append(arguments)
            real(*arguments)

        def __getattr__(self, name: str) -> object:
            return getattr(native, name)

    worker._worker.engine = Watched()
    eager = Record(attn_metadata=(), cudagraph_runtime_mode=Record(name="NONE"))
    for expected in ([(0, 0), (1, 0), (2, 0)], []):
        asked.clear()
        worker.start_load_kv(eager)
        for layer in ("a", "b", "of a layer without memory"):
            worker.wait_for_layer_load(layer)
        worker.wait_for_save()
        assert asked == expected, asked
    worker.shutdown()


def test_tensors_that_do_not_say_which_dimension_counts_blocks_are_refused() -> None:
    refused("no dimension", layout.regions_of, Tensor((7, 3)), 10)
    refused("several dimensions", layout.regions_of, Tensor((10, 10)), 10)


def refused(said: str, check: object, *args: object) -> None:
    try:
        check(*args)
    except NotImplementedError as error:
        assert said in str(error), error
    else:
        raise AssertionError(f"{said} was accepted")


class FullAttentionSpec:
    block_size = 4


class MLAAttentionSpec:
    block_size = 4


class SlidingWindowSpec:
    block_size = 4


def cache(*specs: object, blocks: int = 10) -> Record:
    return Record(num_blocks=blocks, kv_cache_groups=[Record(kv_cache_spec=spec) for spec in specs])


def config(extra: dict[str, object] | None = None, **parallel: int) -> Record:
    given = {"kvbm.endpoint": "unix:/nonexistent/kvbm.sock", **(extra or {})}
    return Record(
        kv_transfer_config=Record(kv_role="kv_both", kv_connector_extra_config=given, engine_id="an engine"),
        parallel_config=Record(**{"tensor_parallel_size": 1, **parallel}),
        model_config=Record(model="some/name", revision=None, dtype="bfloat16"),
        cache_config=Record(cache_dtype="auto"),
    )


def test_what_cannot_work_is_refused_by_its_name() -> None:
    full = cache(FullAttentionSpec())
    checks.check(config(), full)
    refused("hybrid", checks.check, config(), cache(FullAttentionSpec(), SlidingWindowSpec()))
    refused("SlidingWindowSpec", checks.check, config(), cache(SlidingWindowSpec()))
    refused("pipeline_parallel_size", checks.check, config(pipeline_parallel_size=2), full)
    refused("decode_context_parallel_size", checks.check, config(decode_context_parallel_size=2), full)
    consumer = config()
    consumer.kv_transfer_config.kv_role = "kv_consumer"
    refused("kv_role", checks.check, consumer, full)
    ahead = config({"kvbm.load": "in-pass"})
    ahead.scheduler_config = Record(async_scheduling=True)
    refused("--no-async-scheduling", checks.load_options, ahead)
    ahead.kv_transfer_config.kv_connector_extra_config.pop("kvbm.load")
    assert checks.load_options(ahead)["load"] == "parked"
    assert "load" not in checks.load_options(config())
    refused("kvbm.modle", checks.options_of, config({"kvbm.modle": "x"}))
    assert checks.options_of(config({"somebody.else": 1, "kvbm.tenant": "t"}))["tenant"] == "t"
    assert checks.is_replicated(MLAAttentionSpec()) and not checks.is_replicated(FullAttentionSpec())


def request(name: str = "a", tokens: int = 9, **fields: object) -> Record:
    whole = {"mm_features": [], "lora_request": None, "cache_salt": None, "prompt_embeds": None, **fields}
    return Record(request_id=name, all_token_ids=list(range(tokens)), num_tokens=tokens, **whole)


def feature(identity: str | None, offset: int = 1, length: int = 2, modality: str = "image") -> Record:
    return Record(identifier=identity, modality=modality, mm_position=Record(offset=offset, length=length))


def test_requests_are_translated_with_what_is_in_their_key() -> None:
    asked = requests.prompt_of(request(tokens=2, cache_salt="s"))
    assert asked == (b"\0\0\0\0\1\0\0\0", None, "s", [])
    one, other = (requests.prompt_of(request(mm_features=[feature(identity)]))[3][0] for identity in ("x", "y"))
    assert len(one[0]) == 32 and one[0] != other[0] and one[1:] == (1, 2)
    for opaque in (
        {"prompt_embeds": object()},
        {"resumable": True},
        {"skip_reading_prefix_cache": True},
        {"mm_features": [feature(None)]},
    ):
        assert requests.prompt_of(request(**opaque))[0] is None, opaque
    adapter = Record(lora_name="poet", lora_int_id=1, lora_path="no/folder")
    named = requests.prompt_of(request(lora_request=adapter))[1]
    again = requests.prompt_of(request(lora_request=adapter))[1]
    assert (
        named == again
        and named != requests.prompt_of(request(lora_request=Record(**{**vars(adapter), "lora_int_id": 2})))[1]
    )


class Told:
    """A native module that notes what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def look_up(self, *arguments: object) -> tuple[int, bool]:
        self.calls.append(("look_up", arguments[0], arguments[-2], arguments[-1]))
        return 4, True

    def build(self, new: list[object], cached: list[object]) -> bytes:
        self.calls.append(("build", new, cached))
        return b"payload"

    def __getattr__(self, name: str) -> object:
        return lambda *arguments: self.calls.append((name, *arguments))


def output(
    new: list[Record] | None = None,
    running: list[tuple[str, object, int]] | None = None,
    resumed: set[str] | None = None,
    **scheduled: int,
) -> Record:
    running = running or []
    return Record(
        scheduled_new_reqs=new or [],
        num_scheduled_tokens=scheduled,
        scheduled_cached_reqs=Record(
            req_ids=[name for name, _, _ in running],
            resumed_req_ids=resumed or set(),
            new_block_ids=[pages for _, pages, _ in running],
            num_computed_tokens=[computed for _, _, computed in running],
        ),
    )


def test_a_request_is_reported_when_it_begins_takes_blocks_or_completes_one() -> None:
    told = Told()
    half, one = SchedulerHalf(told, 4), request(tokens=9)
    assert half.look_up(one, 0) == (4, True)
    assert half.look_up(request("other"), 8) == (4, True) and told.calls[-1] == ("look_up", 2, 8, 1)
    half.allocated(one, Record(get_block_ids=lambda: ([5, 6, 7],)), 4, parked=True)
    assert told.calls[-1] == ("allocated", 1, [[5, 6, 7]])
    waiting = half.build(output())
    assert (waiting.payload, waiting.loading, waiting.idle) == (b"payload", {1: "a"}, True)
    begun = half.build(output([Record(req_id="a", block_ids=([5, 6, 7],), num_computed_tokens=4)], a=5))
    assert begun.loading == {} and not begun.idle
    number, known, tokens, pages, computed, scheduled, _ = told.calls[-1][1][0]
    assert (number, known, tokens, pages, computed, scheduled) == (1, 9, [], [[5, 6, 7]], 4, 5), "tokens are told once"
    # Two tokens that complete nothing are not worth a word; the third completes the block, and the next needs another.
    for tokens_now, pages_now, reported in ((10, None, False), (11, None, False), (12, None, True), (13, ([8],), True)):
        one.all_token_ids, one.num_tokens = list(range(tokens_now)), tokens_now
        half.build(output(running=[("a", pages_now, tokens_now - 1)], a=1))
        cached = told.calls[-1][2]
        assert bool(cached) == reported, (tokens_now, cached)
    assert cached[0][3] == [[8]] and len(cached[0][2]) == 1
    # Its blocks were taken from it: it begins again with others.
    half.look_up(one, 0)
    one.all_token_ids, one.num_tokens = list(range(14)), 14
    half.build(output(running=[("a", ([1, 2, 3, 4],), 0)], resumed={"a"}, a=13))
    assert told.calls[-1][1][0][1:4] == (13, [13], [[1, 2, 3, 4]])
    half.finished(one)
    assert told.calls[-1] == ("request_finished", 1)
    # Of a request that nobody asked about only the blocks are told: they have changed hands.
    half.build(output([Record(req_id="b", block_ids=([9],), num_computed_tokens=0)], b=1))
    assert told.calls[-1][1][0][:4] == (0, 0, None, [[9]])


def test_an_offer_that_is_not_taken_up_is_given_back_and_failures_are_passed_on() -> None:
    told = Told()
    half = SchedulerHalf(told, 4)
    half.look_up(request(), 0)
    half.allocated(request(), Record(get_block_ids=lambda: ([5],)), 0, parked=True)
    assert told.calls[-1] == ("declined", 1) and half.build(output()).loading == {}
    half.told(Record(invalid_block_ids={3}, kv_connector_worker_meta=None))
    assert told.calls[-1] == ("told", [3], [], 0)
    half.told(Record(invalid_block_ids=set(), kv_connector_worker_meta=None))
    assert told.calls[-1] == ("told", [3], [], 0)
    ranks = KvbmWorkerMetadata(set(), 70).aggregate(KvbmWorkerMetadata({4}, 90))
    half.told(Record(invalid_block_ids=set(), kv_connector_worker_meta=ranks))
    assert told.calls[-1] == ("told", [], [4], 90)


def test_without_a_daemon_every_answer_is_that_there_is_nothing() -> None:
    full = cache(FullAttentionSpec(), blocks=16)
    scheduler = vllm.KvbmConnector(config(), Record(name="SCHEDULER"), full)
    worker = vllm.KvbmConnector(config(), Record(name="WORKER"), full)
    pool = (ctypes.c_char * (16 * 64))()
    worker.register_kv_caches({"layer": Tensor((16, 4, 8), at=ctypes.addressof(pool))})
    scheduler.set_xfer_handshake_metadata({0: worker.get_handshake_metadata()})
    one = request()
    assert scheduler.get_num_new_matched_tokens(one, 0) == (0, False)
    scheduler.update_state_after_alloc(one, Record(get_block_ids=lambda: ([1, 2, 3],)), 0)
    of_pass = output([Record(req_id="a", block_ids=([1, 2, 3],), num_computed_tokens=0)], a=9)
    of_pass.has_sync_kv_loads = False
    metadata = scheduler.build_connector_meta(of_pass)
    assert of_pass.has_sync_kv_loads, "loads are to begin before the pass"
    empty = Record(**{**vars(output()), "has_sync_kv_loads": False})
    scheduler.build_connector_meta(empty)
    assert not empty.has_sync_kv_loads, "nothing is computed in it"
    of_old_version = output(a=1)
    scheduler.build_connector_meta(of_old_version)
    assert not hasattr(of_old_version, "has_sync_kv_loads")
    worker.bind_connector_metadata(metadata)
    worker.start_load_kv(None)
    worker.wait_for_save()
    assert worker.get_finished({"a"}) == (None, None) and worker.get_block_ids_with_load_errors() == set()
    assert scheduler.request_finished_all_groups(one, ([1, 2, 3],)) == (False, None)
    assert scheduler.get_kv_connector_stats().data == {"queries": 1, "lookups_skipped": 1}
    assert scheduler.get_kv_connector_stats() is None
    assert scheduler.figures()["attached"] == 0
    for half in (scheduler, worker):
        half.shutdown()


def test_what_was_counted_goes_to_the_engines_metrics() -> None:
    counted: dict[tuple[str, int], int] = {}

    class Counter:
        def __init__(self, name: str, **_: object) -> None:
            self.name = name

        def labels(self, engine: int) -> Record:
            return Record(
                inc=lambda count: counted.__setitem__((self.name, engine), counted.get((self.name, engine), 0) + count)
            )

    metrics = KvbmPromMetrics(None, {"counter": Counter}, ["engine"], {0: [0], 1: [1]})
    both = KvbmStats(data={"queries": 2}).aggregate(KvbmStats(data={"queries": 1, "loaded_blocks": 4}))
    assert both.reduce() == {"queries": 3, "loaded_blocks": 4} and not both.is_empty()
    metrics.observe(both.data, 1)
    metrics.observe({"queries": 1, "of another version": 7}, 1)
    assert counted == {("vllm:kvbm_queries", 1): 4, ("vllm:kvbm_loaded_blocks", 1): 4}


def main() -> None:
    tests = [test for name, test in sorted(globals().items()) if name.startswith("test_")]
    for test in tests:
        test()
    print(f"adapter of vLLM: {len(tests)} passed, 0 failed")


if __name__ == "__main__":
    main()
