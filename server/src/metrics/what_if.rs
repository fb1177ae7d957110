//! What is found, and what other capacities would find.

use super::text::Text;
use crate::status::Status;

/// Tiers of which nothing was asked have no samples: 0 would be a lie.
pub(super) fn render(text: &mut Text, status: &Status) {
    let tiers = || status.what_if.iter().filter(|tier| tier.blocks > 0);
    let help = "Share of the blocks asked for that was found, by the lowest tier that counts; see \
                kvbm_what_if_window_seconds.";
    let mut family = text.family("kvbm_what_if_measured_hit_rate", "gauge", help);
    tiers().for_each(|tier| family.value(&[("tier", &tier.tier)], tier.hit_rate));
    let help = "Share that would have been found by least recently used with so many times the capacity of now, by \
                sampled stack distances.";
    let mut family = text.family("kvbm_what_if_hit_rate", "gauge", help);
    for tier in tiers() {
        for (capacity, rate) in &tier.estimates {
            family.value(&[("tier", &tier.tier), ("capacity", capacity)], rate);
        }
    }
    let help = "Share of keys that these estimates look at.";
    let mut family = text.family("kvbm_what_if_sampled_share", "gauge", help);
    status.what_if.iter().for_each(|tier| family.value(&[("tier", &tier.tier)], tier.sampled));
    let window = status.what_if.first().map_or(0.0, |tier| tier.window_s);
    text.gauge("kvbm_what_if_window_seconds", "How far back these figures look.", window);
}
