//! Pins and tenants.

use super::text::Text;
use crate::status::{Status, TenantStatus};

pub(super) fn render(text: &mut Text, status: &Status) {
    text.gauge("kvbm_pins", "Pins that operators have set.", status.pins.len());
    let bytes: u64 = status.pins.iter().map(|pin| pin.bytes).sum();
    let help = "Bytes that they keep, in all tiers; what two of them keep counts twice.";
    text.gauge("kvbm_pinned_bytes", help, bytes);
    let mut by_tier = |name, kind, help: &str, value: fn(&TenantStatus) -> u64| {
        let mut family = text.family(name, kind, help);
        for tenant in &status.tenants {
            family.value(&[("tenant", &tenant.tenant), ("tier", &tenant.tier)], value(tenant));
        }
    };
    let help = "Bytes of slots that a tenant uses; tenants without a quota are one, under no name.";
    by_tier("kvbm_tenant_used_bytes", "gauge", help, |tenant| tenant.used_bytes);
    let help = "Blocks of a tenant that found no place because of quotas.";
    by_tier("kvbm_tenant_refused_total", "counter", help, |tenant| tenant.refused);
    let help = "Blocks of a tenant that were evicted to make room.";
    by_tier("kvbm_tenant_evicted_total", "counter", help, |tenant| tenant.evicted);
}
