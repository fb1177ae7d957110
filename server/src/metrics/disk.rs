//! Figures of the disk tier.

use kvbm::DiskState;

use super::text::Text;
use crate::core::Core;

pub(super) fn render(text: &mut Text, core: &Core) {
    let Some(disk) = core.manager.disk() else { return };
    let (turned_away, dropped, backlog) = core.manager.inspect(|ledger| {
        let (tally, dropped) = ledger.disk_turned_away();
        (tally, dropped, ledger.demote_backlog())
    });
    let help = "1 while blocks on disk are found.";
    text.gauge("kvbm_disk_in_service", help, u8::from(disk.state == DiskState::On));
    text.counter("kvbm_disk_outages_total", "Times that the disk tier went out of service.", disk.outages);
    let help = "Blocks on disk whose bytes or entry were not those stored: misses, and their slots are not used again.";
    text.counter("kvbm_disk_checksum_failures_total", help, disk.corrupt);
    text.counter("kvbm_disk_read_failures_total", "Blocks that could not be read.", disk.read_failures);
    text.counter("kvbm_disk_write_failures_total", "Blocks that could not be written.", disk.write_failures);
    text.counter("kvbm_disk_scrubbed_bytes_total", "Bytes looked at in the background.", disk.scrubbed_bytes);
    let help = "Requests to the drive, by where they are.";
    let mut family = text.family("kvbm_disk_io_requests", "gauge", help);
    for (state, count) in
        [("kernel", disk.load.in_flight), ("waiting", disk.load.waiting), ("overdue", disk.load.overdue)]
    {
        family.value(&[("state", state)], count);
    }
    let help = "Bytes that the kernel is reading or writing.";
    text.gauge("kvbm_disk_io_bytes_in_flight", help, disk.load.bytes_in_flight);
    let help = "Blocks admitted that wait to be written.";
    text.gauge("kvbm_disk_backlog_blocks", help, backlog);
    let help = "Blocks not written to disk, by reason; budget counts the times that a batch had to wait.";
    let mut family = text.family("kvbm_disk_not_admitted_total", "counter", help);
    for (reason, count) in [
        ("infrequent", turned_away.infrequent),
        ("priority", turned_away.unimportant),
        ("budget", turned_away.over_budget),
        ("backlog", dropped),
    ] {
        family.value(&[("reason", reason)], count);
    }
    let recovery = disk.recovery;
    text.gauge("kvbm_disk_recovered_blocks", "Blocks found when the tier was opened.", recovery.blocks);
    let help = "Entries found damaged when the tier was opened.";
    text.gauge("kvbm_disk_recovery_damaged_entries", help, recovery.damaged);
    let help = "Blocks left out when the tier was opened, because one before them was missing.";
    text.gauge("kvbm_disk_recovery_left_out_blocks", help, recovery.left_out);
    let help = "Segments and pieces of tables that could not be read when the tier was opened.";
    text.gauge("kvbm_disk_recovery_unreadable", help, recovery.unreadable);
    let help = "1 if the daemon before did not close the disk cache's files.";
    text.gauge("kvbm_disk_recovery_unclean", help, u8::from(recovery.unclean));
    text.gauge("kvbm_disk_recovery_seconds", "Time that opening the tier took.", recovery.seconds);
}
