//! Engines that own their KV memory.

use kvbm::ledger::Verdict;

use super::text::Text;
use crate::core::Core;

pub(super) fn render(text: &mut Text, core: &Core) {
    let (tally, pools) = core.manager.inspect(|ledger| {
        let pools: Vec<_> = ledger
            .engine_pools()
            .map(|(_, pool)| (pool.identity.mode, pool.registered(), pool.writing()))
            .collect();
        (ledger.tally(), pools)
    });
    let help =
        "Pools that engines own, one for each rank, by who copies: the daemon (ipc) or the engine (staged).";
    let mut family = text.family("kvbm_engine_pools", "gauge", help);
    for mode in ["ipc", "staged"] {
        family.value(&[("mode", mode)], pools.iter().filter(|(of, ..)| of.name() == mode).count());
    }
    let registered: usize = pools.iter().map(|(_, registered, _)| registered).sum();
    let help = "Complete blocks of engines that are known and not in host memory.";
    text.gauge("kvbm_registered_blocks", help, registered);
    let writing: usize = pools.iter().map(|(.., writing)| writing).sum();
    text.gauge("kvbm_staged_slots", "Host slots that engines are writing.", writing);
    let fenced = core.manager.stores_fenced();
    text.gauge("kvbm_stores_fenced", "Stores that wait for a word of their engine.", fenced);
    let help = "Blocks, or shards of them, that engines stored, by what became of them.";
    let mut family = text.family("kvbm_store_blocks_total", "counter", help);
    for verdict in Verdict::ALL {
        family.value(&[("verdict", verdict.name())], tally.store_verdicts[verdict.index()]);
    }
    for (name, help, count) in [
        (
            "kvbm_store_drops_total",
            "Blocks given up on their way from an engine to host memory: a copy failed, or a shard or the block before it \
             is missing.",
            tally.store_drops,
        ),
        ("kvbm_shards_late_total", "Blocks whose shards did not all come in time.", tally.shards_late),
        ("kvbm_rescues_total", "Dead engines of whose memory there was something to rescue.", tally.rescues),
        ("kvbm_rescued_blocks_total", "Blocks that arrived from the memory of dead engines.", tally.rescued),
        (
            "kvbm_rescue_left_blocks_total",
            "Blocks that were left in the memory of dead engines when the time was up.",
            tally.rescue_left,
        ),
    ] {
        text.counter(name, help, count);
    }
}
