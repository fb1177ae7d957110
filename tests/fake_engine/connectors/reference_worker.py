"""Worker half of the reference connector: one thread loads, one saves."""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from .directory_store import DirectoryStore
from .pages import Pages
from .reference_scheduler import Load, Metadata, Save


@dataclass
class LoadJob:
    load: Load
    event: Any
    """Recorded on the engine's stream: passes launched before may still write into pages that are loaded now."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    cancelled: bool = False
    done: bool = False

    def pages(self, group: int) -> set[int]:
        return {pages[group] for _, _, pages in self.load.blocks}


@dataclass
class SaveJob:
    save: Save
    generations: list[list[int]]
    event: Any


class ReferenceWorker:
    def __init__(self, llm_args: Any) -> None:
        mapping = llm_args.parallel_config.to_mapping()
        self.rank: int = mapping.tp_rank
        self.store = self.make_store(llm_args.kv_connector_config.server_url, mapping.tp_size)
        self.metadata: Metadata | None = None
        self.generations: dict[tuple[int, int], int] = {}
        self.load_jobs: dict[int, LoadJob] = {}
        self.saving: dict[int, int] = {}
        self.saving_lock = threading.Lock()
        self.asked_saving: set[int] = set()
        self.asked_loading: set[int] = set()
        self._loads: queue.SimpleQueue[LoadJob] = queue.SimpleQueue()
        self._saves: queue.SimpleQueue[SaveJob] = queue.SimpleQueue()
        for work in (self._load_thread, self._save_thread):
            threading.Thread(target=work, daemon=True).start()

    def make_store(self, url: str, ranks: int) -> DirectoryStore:
        return DirectoryStore(url, ranks)

    def register_forward_pass_callable(self) -> Any:
        return None

    def register_kv_caches(self, tensor: Any) -> None:
        self.memory = Pages.of_tensor(tensor)

    def register_kv_cache_layout(self, layout: Any) -> None:
        self.memory = Pages.of_layout(layout)

    def bind_connector_meta(self, metadata: object) -> None:
        self.metadata = metadata if isinstance(metadata, Metadata) else None
        if self.metadata is not None:
            self.raise_generations(self.metadata)

    def raise_generations(self, metadata: Metadata) -> None:
        """Before the pass that may overwrite them: what is read from these pages from now on is not the old content."""
        for group, pages in enumerate(metadata.allocated):
            for page in pages:
                self.generations[group, page] = self.generations.get((group, page), 0) + 1

    def start_load_kv(self, stream: Any) -> None:
        if self.metadata is None:
            return
        self.drain(self.metadata)
        for load in self.metadata.loads:
            job = LoadJob(load, stream.record_event())
            if load.asynchronous:
                self.load_jobs[load.request_id] = job
                self._loads.put(job)
            else:
                self._load(job)
        self.metadata.loads = []

    def drain(self, metadata: Metadata) -> None:
        """Loads into pages that have a new owner are those of requests that vanished: no write may come after this."""
        for job in self.load_jobs.values():
            if not job.done and any(job.pages(g) & set(pages) for g, pages in enumerate(metadata.allocated)):
                job.cancelled = True
                with job.lock:
                    pass

    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None:
        return None

    def save_kv_layer(self, layer_idx: int, stream: Any) -> None:
        return None

    def wait_for_save(self, stream: Any) -> None:
        if self.metadata is None:
            return
        for save in self.metadata.saves:
            self._enqueue_save(save, stream)
        self.metadata.saves = []

    def _enqueue_save(self, save: Save, stream: Any) -> None:
        generations = [
            [self.generations.get((group, page), 0) for group, page in enumerate(pages)] for _, _, pages in save.blocks
        ]
        with self.saving_lock:
            self.saving[save.request_id] = self.saving.get(save.request_id, 0) + 1
        self._saves.put(SaveJob(save, generations, stream.record_event()))

    def get_finished(
        self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]
    ) -> tuple[list[int], list[int]]:
        self.asked_saving |= set(finished_gen_req_ids)
        self.asked_loading |= set(started_loading_req_ids)
        with self.saving_lock:
            saved = [id_ for id_ in self.asked_saving if not self.saving.get(id_)]
        loaded = [id_ for id_ in self.asked_loading if id_ not in self.load_jobs or self.load_jobs[id_].done]
        self.asked_saving -= set(saved)
        self.asked_loading -= set(loaded)
        for id_ in loaded:
            self.load_jobs.pop(id_, None)
        return saved, loaded

    # Threads.

    def _load_thread(self) -> None:
        while True:
            job = self._loads.get()
            self._load(job)
            job.done = True

    def _load(self, job: LoadJob) -> None:
        self.memory.wait_for(job.event)
        for key, _, pages in job.load.blocks:
            time.sleep(self.store.load_s * (1 + self.rank))
            for group, page in enumerate(pages):
                data = self.store.get(key, group, self.shard()) if page >= 0 else None
                with job.lock:
                    if data is not None and not job.cancelled:
                        self.memory.write(group, page, data)

    def shard(self) -> int:
        return self.rank

    def _save_thread(self) -> None:
        while True:
            job = self._saves.get()
            self.memory.wait_for(job.event)
            for (key, _, pages), generations, priority in zip(
                job.save.blocks, job.generations, job.save.priorities, strict=True
            ):
                time.sleep(self.store.save_s)
                for group, page in enumerate(pages):
                    if page >= 0:
                        self._save_page(key, group, page, generations[group], priority)
            with self.saving_lock:
                self.saving[job.save.request_id] -= 1

    def _save_page(self, key: str, group: int, page: int, generation: int, priority: int) -> None:
        data = self.memory.read(group, page)
        if self.generations.get((group, page), 0) == generation:
            self.store.put(key, group, self.rank, data, priority)
