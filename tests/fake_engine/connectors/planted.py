"""Connectors with one bug each. The engine has to catch every one, in the scenario that `PLANTED` names."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from .reference_scheduler import Known, Metadata, ReferenceScheduler
from .reference_worker import LoadJob, ReferenceWorker


class NoSaltScheduler(ReferenceScheduler):
    def scope(self, request: Any) -> bytes:
        return repr((self.args.model, self.size, request.lora_task_id)).encode()


class NoLoraScheduler(ReferenceScheduler):
    def scope(self, request: Any) -> bytes:
        salt = getattr(request, "cache_salt", getattr(request, "cache_salt_id", None))
        return repr((self.args.model, self.size, salt)).encode()


class NoDigestsScheduler(ReferenceScheduler):
    def items(self, request: Any) -> list[tuple[Any, int, int]]:
        return []


class NoChainScheduler(ReferenceScheduler):
    """Each block's own tokens only."""

    def key(self, known: Known, ordinal: int) -> str:
        alone = Known(known.scope, known.items, tokens=known.tokens)
        alone.tokens = known.tokens[ordinal * self.size : (ordinal + 1) * self.size]
        return super().key(alone, 0)


class WholePromptScheduler(ReferenceScheduler):
    """Off by one: leaves no prompt token."""

    def most_blocks(self, prompt_len: int) -> int:
        return prompt_len // self.size


class BeforePassWorker(ReferenceWorker):
    """Takes a block's bytes when its last token is about to be computed."""

    def start_load_kv(self, stream: Any) -> None:
        super().start_load_kv(stream)
        for save in self.metadata.saves if self.metadata is not None else []:
            for key, _, pages in save.blocks:
                for group, page in enumerate(pages):
                    if page >= 0:
                        self.store.put(key, group, self.rank, self.memory.read(group, page), 35)


class NoLeaseScheduler(ReferenceScheduler):
    def take_lease(self, keys: list[str]) -> str:
        return "none"


class NoGenerationWorker(ReferenceWorker):
    def raise_generations(self, metadata: Metadata) -> None:
        return None


class ReleasingScheduler(ReferenceScheduler):
    KEEPS_BLOCKS = False


class NoDrainWorker(ReferenceWorker):
    def drain(self, metadata: Metadata) -> None:
        return None


class WrongShardWorker(ReferenceWorker):
    def shard(self) -> int:
        return 0


class FirstRankWorker(ReferenceWorker):
    """Only rank 0 says that a load is over."""

    def get_finished(self, finished: list[int], started: list[int]) -> tuple[list[int], list[int]]:
        saved, loaded = super().get_finished(finished, started)
        return saved, loaded if self.rank == 0 else []


class SlowRankWorker(ReferenceWorker):
    """Nothing is wrong with it: rank 1 begins a load when one of its blocks has gone, or after a while."""

    HOLDS_S = 0.5

    def _load(self, job: LoadJob) -> None:
        end = time.monotonic() + self.HOLDS_S
        while self.rank == 1 and time.monotonic() < end and self._all_there(job):
            time.sleep(0.002)
        super()._load(job)

    def _all_there(self, job: LoadJob) -> bool:
        return all(self.store.has(key, 0) for key, _, _ in job.load.blocks)


class HastyRankWorker(SlowRankWorker):
    """Rank 0 lets the lease go for all ranks when its own load is over."""

    HOLDS_S = 10.0

    def _load(self, job: LoadJob) -> None:
        super()._load(job)
        if self.rank == 0:
            self.store.release(job.load.lease)


class AtOnceWorker(ReferenceWorker):
    """Says that a load is over when it was started."""

    def get_finished(self, finished: list[int], started: list[int]) -> tuple[list[int], list[int]]:
        saved, _ = super().get_finished(finished, [])
        return saved, list(started)


class TwiceWorker(ReferenceWorker):
    """Reports a finished save twice."""

    def __init__(self, llm_args: Any) -> None:
        super().__init__(llm_args)
        self._again: list[int] = []

    def get_finished(self, finished: list[int], started: list[int]) -> tuple[list[int], list[int]]:
        saved, loaded = super().get_finished(finished, started)
        again, self._again = self._again, saved
        return saved + again, loaded


class DraftsScheduler(ReferenceScheduler):
    """Takes draft tokens for accepted ones: the bytes of a block are taken while its last tokens are guesses."""

    def known_good(self, known: Known, start: int, scheduled: int) -> int:
        return start + scheduled

    def _save(self, known: Known, data: Any, history: int, upto: int) -> None:
        # Keys are made from the tokens that come later; the bytes are of now.
        early = upto // self.size
        if early * self.size > len(known.tokens):
            missing = early * self.size - len(known.tokens)
            self._guesses = getattr(self, "_guesses", {})
            self._guesses[data.request_id] = missing
            known.tokens += self._said(known, missing)
            super()._save(known, data, history, upto)
            del known.tokens[-missing:]
            return
        super()._save(known, data, history, upto)

    def _said(self, known: Known, count: int) -> list[int]:
        """What will be accepted is not known here; an oracle stands for a connector that makes keys later."""
        return ORACLE(known.tokens, count)


def ORACLE(tokens: list[int], count: int) -> list[int]:  # noqa: N802
    from ..content import Digests

    said = list(tokens)
    digests = Digests(None, None, ())
    for _ in range(count):
        digests.extend(said, len(said))
        said.append(digests.next_token(len(said)))
    return said[len(tokens) :]


class HooksWorker(ReferenceWorker):
    """Saves from the per-layer hook, which CUDA graphs do not call."""

    def save_kv_layer(self, layer_idx: int, stream: Any) -> None:
        if layer_idx == self.layers - 1:
            super().wait_for_save(stream)

    def wait_for_save(self, stream: Any) -> None:
        return None

    @property
    def layers(self) -> int:
        return int(self.memory.groups and 2)


class ForgetfulScheduler(ReferenceScheduler):
    """Says at each end that a save is under way."""

    def request_finished(self, request: Any, cache_block_ids: list[int]) -> bool:
        known = self.known[request.request_id]
        return known.any_saved


class StrictWorker(ReferenceWorker):
    """Takes metadata for granted."""

    def bind_connector_meta(self, metadata: object) -> None:
        assert isinstance(metadata, Metadata), f"metadata is {metadata!r}"
        super().bind_connector_meta(metadata)


class LastPageScheduler(ReferenceScheduler):
    """Uses -1 as a page: in Python that is the last one."""

    def update_state_after_alloc_by_layer_group(self, request: Any, groups: list[list[int]]) -> None:
        super().update_state_after_alloc_by_layer_group(request, groups)
        for load in self.metadata.loads:
            for _, _, pages in load.blocks:
                pages[:] = [63 if page < 0 else page for page in pages]


class OneGroupWorker(ReferenceWorker):
    """Loads the first layer group only."""

    def _load(self, job: LoadJob) -> None:
        for _, _, pages in job.load.blocks:
            pages[1:] = [-1] * (len(pages) - 1)
        super()._load(job)


class AsyncZeroScheduler(ReferenceScheduler):
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        count, _ = super().get_num_new_matched_tokens(request, num_computed_tokens)
        return count, True


class LocalScheduler(ReferenceScheduler):
    """Counts its offer from the prompt's start, not from where the engine's own match ends."""

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        return super().get_num_new_matched_tokens(request, 0)


class RaisingScheduler(ReferenceScheduler):
    def build_connector_meta(self, scheduler_output: Any) -> object:
        raise ConnectionError("the cache is away")


class UnpicklableScheduler(ReferenceScheduler):
    def build_connector_meta(self, scheduler_output: Any) -> object:
        return lambda: None


class NeverSavedWorker(ReferenceWorker):
    """Never says that a save is over."""

    def get_finished(self, finished: list[int], started: list[int]) -> tuple[list[int], list[int]]:
        _, loaded = super().get_finished([], started)
        return [], loaded


class ColdScheduler(ReferenceScheduler):
    """Never offers anything."""

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        super().get_num_new_matched_tokens(request, num_computed_tokens)
        return 0, False


class MistrustlessScheduler(ReferenceScheduler):
    """Believes the block size of the arguments."""

    @property
    def trusted(self) -> bool:
        return True

    @trusted.setter
    def trusted(self, value: bool) -> None:
        return None


@dataclass(frozen=True)
class Bug:
    """Caught in `scenario`, seen as `kind`, or as `or_as` where that is a matter of time."""

    scenario: str
    kind: str
    scheduler: str = "ReferenceScheduler"
    worker: str = "ReferenceWorker"
    options: dict[str, Any] = field(default_factory=dict)
    or_as: str | None = None


PLANTED: dict[str, Bug] = {
    "key without salt": Bug("salt_isolation", "bad load", "NoSaltScheduler"),
    "key without LoRA": Bug("lora_isolation", "bad load", "NoLoraScheduler"),
    "key without multimodal digests": Bug("multimodal", "bad load", "NoDigestsScheduler"),
    "key of the block alone": Bug("same_middle", "bad load", "NoChainScheduler"),
    "no prompt token left": Bug("cold_warm", "protocol", "WholePromptScheduler"),
    "last token has no KV yet": Bug("conversation", "bad load", worker="BeforePassWorker"),
    "drafts saved before they are accepted": Bug("speculative", "bad load", "DraftsScheduler"),
    "lease ignored": Bug("pressure", "bad load", "NoLeaseScheduler"),
    "lease let go by the rank that is done first": Bug(
        "pressure", "bad load", worker="HastyRankWorker", options={"ranks": 2, "patience_s": 20.0}
    ),
    "generation not raised": Bug(
        "finish_and_reuse", "bad load", "ReleasingScheduler", "NoGenerationWorker"
    ),
    "generation not raised, prefill cancelled": Bug("cancel_prefill", "bad load", worker="NoGenerationWorker"),
    # What is written late meets a block's next owner, or a block that is still free.
    "no drain on cancel": Bug("cancel_parked", "wrong bytes", worker="NoDrainWorker", or_as="stray write"),
    "wrong shard": Bug("cold_warm", "bad load", worker="WrongShardWorker", options={"ranks": 2}),
    "one rank says a load is over": Bug("cold_warm", "expectation", worker="FirstRankWorker", options={"ranks": 2}),
    "load over before its bytes are there": Bug("concurrent_prefix", "bad load", worker="AtOnceWorker"),
    "save reported twice": Bug("cold_warm", "protocol", worker="TwiceWorker"),
    "save never reported": Bug("async_save", "expectation", worker="NeverSavedWorker"),
    "end told twice, kept twice": Bug("stop_words", "protocol", "ForgetfulScheduler", options={"overlap": True}),
    "saves in per-layer hooks": Bug("graphs", "expectation", worker="HooksWorker"),
    "metadata taken for granted": Bug("empty_metadata", "raised", worker="StrictWorker"),
    "page -1 used": Bug("sliding_window", "stray write", "LastPageScheduler", options={"api": "L2"}),
    "one layer group loaded": Bug("sliding_window", "bad load", worker="OneGroupWorker", options={"api": "L2"}),
    "(0, True)": Bug("cold_warm", "protocol", "AsyncZeroScheduler"),
    "offer ignores the local match": Bug("mixed", "protocol", "LocalScheduler"),
    "callback raises": Bug("cold_warm", "raised", "RaisingScheduler"),
    "metadata cannot be pickled": Bug("cold_warm", "protocol", "UnpicklableScheduler"),
    "never a hit": Bug("cold_warm", "expectation", "ColdScheduler"),
    "block size believed": Bug("block_size_mismatch", "bad load", "MistrustlessScheduler"),
}

NOT_WRONG: dict[str, Bug] = {
    "lease held until the slower rank is done": Bug(
        "pressure", "nothing", worker="SlowRankWorker", options={"ranks": 2, "patience_s": 20.0}
    ),
}
"""What makes a planted bug show is no fault by itself."""

PLANTED_FOR_DRILLS: dict[str, Bug] = {
    "waits for a stopped daemon": Bug("stop", "too slow", "PatientScheduler", "Worker", {"callbacks": [0, 67]}),
    "waits for the deadline each time": Bug("stop", "too slow", "NoBreakerScheduler", "Worker", {"callbacks": [0, 67]}),
    "passes the loss of the daemon on": Bug("kill", "raised", "RaisingScheduler", "Worker", {"callbacks": [0, 67]}),
    "saves held until a stopped daemon runs again": Bug(
        "stop", "expectation", "Scheduler", "HoldingWorker", {"callbacks": [20], "patience_s": 3.0}
    ),
    "promise that needs the daemon": Bug(
        "kill", "bad load", "Scheduler", "DependentWorker", {"callbacks": list(range(60, 130, 6))}
    ),
}
"""In `scenario` the fault, struck at these callbacks. Of `with_daemon.py`."""
