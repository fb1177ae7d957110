//! Quotas of tenants as users write them: `NAME:TIER:min=2GB,max=10GB`, or tables of the settings file.

use std::collections::BTreeMap;

use kvbm::{Quotas, TenantQuota, TierQuota};

/// What may be written on the command line and in the environment.
pub(super) const PERMITTED: &str = "NAME:TIER:min=SIZE,max=SIZE, separated by semicolons; TIER is device, host or disk, \
                                    SIZE as in 500MB or 2GB, and one of min and max may be left out";

/// Reads one or the other form; fails with what is wrong with it.
pub(super) fn parse(text: &str) -> Result<Quotas, String> {
    let text = text.trim();
    let mut quotas = Quotas::default();
    if text.starts_with('{') {
        let table: toml::Table =
            format!("tenants = {text}").parse().map_err(|_| "a table of tenants".to_owned())?;
        for (tenant, tiers) in as_table("tenants", &table["tenants"])? {
            for (tier, limits) in as_table(tenant, tiers)? {
                let place = format!("tenants.{tenant}.{tier}");
                for (bound, value) in as_table(&place, limits)? {
                    let size = match value {
                        toml::Value::String(text) => text.clone(),
                        other => other.to_string(),
                    };
                    set(&mut quotas, tenant, tier, bound, &size)
                        .map_err(|wrong| format!("{wrong} ({place})"))?;
                }
            }
        }
    } else {
        for entry in entries(text) {
            let wrong = |why: String| format!("{why} (in {entry:?})");
            let mut parts = entry.rsplitn(3, ':');
            let (Some(limits), Some(tier), Some(tenant)) = (parts.next(), parts.next(), parts.next()) else {
                return Err(wrong(PERMITTED.to_owned()));
            };
            for limit in limits.split(',').map(str::trim).filter(|limit| !limit.is_empty()) {
                let (bound, size) = limit.split_once('=').ok_or_else(|| wrong(PERMITTED.to_owned()))?;
                set(&mut quotas, tenant.trim(), tier.trim(), bound.trim(), size).map_err(wrong)?;
            }
        }
    }
    check(&quotas)?;
    Ok(quotas)
}

/// Entries are separated by semicolons, or by commas: what is no limit begins the next one.
fn entries(text: &str) -> Vec<String> {
    let mut entries: Vec<String> = Vec::new();
    for group in text.split(';').map(str::trim).filter(|group| !group.is_empty()) {
        let mut first = true;
        for part in group.split(',').map(str::trim) {
            match entries.last_mut().filter(|_| !first && !part.contains(':')) {
                Some(entry) => {
                    entry.push(',');
                    entry.push_str(part);
                }
                None => entries.push(part.to_owned()),
            }
            first = false;
        }
    }
    entries
}

fn as_table<'a>(place: &str, value: &'a toml::Value) -> Result<&'a toml::Table, String> {
    value.as_table().ok_or_else(|| format!("a table, as in [tenants.NAME.host] ({place})"))
}

fn set(quotas: &mut Quotas, tenant: &str, tier: &str, bound: &str, size: &str) -> Result<(), String> {
    if tenant.is_empty() {
        return Err("the name of a tenant, which is not empty".to_owned());
    }
    let bytes =
        size_of(size).ok_or_else(|| format!("a size as in 500MB, 2GB or 0, not {:?}", size.trim()))?;
    let quota: &mut TenantQuota = quotas.tenants.entry(tenant.to_owned()).or_default();
    let quota: &mut TierQuota = match tier {
        "device" => &mut quota.device,
        "host" => &mut quota.host,
        "disk" => &mut quota.disk,
        other => return Err(format!("one of the tiers device, host and disk, not {other:?}")),
    };
    match bound {
        "min" if quota.min_bytes == 0 => quota.min_bytes = bytes,
        "max" if quota.max_bytes.is_none() => quota.max_bytes = Some(bytes),
        "min" | "max" => return Err(format!("one {bound} for each tenant and tier")),
        other => return Err(format!("min or max, not {other:?}")),
    }
    Ok(())
}

fn check(quotas: &Quotas) -> Result<(), String> {
    quotas.validate().map_err(|refused| refused.to_string())
}

/// Decimal units, as everywhere. A bare number would be read as bytes by some and as GB by others.
fn size_of(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: f64 = number.parse().ok()?;
    let times = match unit.trim().to_ascii_uppercase().as_str() {
        "" if number == 0.0 => 1.0,
        "B" => 1.0,
        "KB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        "TB" => 1e12,
        _ => return None,
    };
    let bytes = (number * times).round();
    (bytes <= 1e18).then_some(bytes as u64)
}

/// Exactly, in the largest unit that fits.
fn written(bytes: u64) -> toml::Value {
    let units = [(1_000_000_000_000, "TB"), (1_000_000_000, "GB"), (1_000_000, "MB"), (1000, "kB")];
    let unit = units.into_iter().find(|(unit, _)| bytes > 0 && bytes.is_multiple_of(*unit));
    let (unit, name) = unit.unwrap_or((1, "B"));
    toml::Value::String(format!("{}{name}", bytes / unit))
}

/// As a table of the settings file.
pub(super) fn table(quotas: &Quotas) -> toml::Value {
    let limits = |quota: &TierQuota| {
        let min = Some(quota.min_bytes).filter(|min| *min > 0).map(|min| ("min".to_owned(), written(min)));
        let max = quota.max_bytes.map(|max| ("max".to_owned(), written(max)));
        min.into_iter().chain(max).collect::<toml::Table>()
    };
    let tiers = |quota: &TenantQuota| {
        let tiers = [("device", &quota.device), ("host", &quota.host), ("disk", &quota.disk)];
        let tiers = tiers.map(|(tier, quota)| (tier.to_owned(), limits(quota)));
        let set = tiers.into_iter().filter(|(_, limits)| !limits.is_empty());
        toml::Value::Table(set.map(|(tier, limits)| (tier, toml::Value::Table(limits))).collect())
    };
    toml::Value::Table(quotas.tenants.iter().map(|(tenant, quota)| (tenant.clone(), tiers(quota))).collect())
}

/// Guarantees that cannot all be kept: whoever comes first has his.
pub(super) fn warnings(quotas: &Quotas, capacities: &BTreeMap<&'static str, Option<u64>>) -> Vec<String> {
    let of = |tier: &str, quota: &TenantQuota| match tier {
        "host" => quota.host,
        _ => quota.disk,
    };
    let mut warnings = Vec::new();
    for (tier, capacity) in capacities {
        let Some(capacity) = capacity else { continue };
        let minimums: u64 = quotas.tenants.values().map(|quota| of(tier, quota).min_bytes).sum();
        if minimums > *capacity {
            warnings.push(format!(
                "the minimums of all tenants in {tier} add up to {minimums} bytes, it has {capacity}: who comes \
                 later may be left without his (tenants)"
            ));
        }
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_mean_the_same_and_what_is_written_reads_the_same() {
        let one = parse("blue:host:min=2GB,max=10GB; blue:disk:max=1.5TB;a:b:device:min=500 MB").unwrap();
        let blue = one.tenants["blue"];
        assert_eq!(blue.host, TierQuota { min_bytes: 2_000_000_000, max_bytes: Some(10_000_000_000) });
        assert_eq!(blue.disk, TierQuota { min_bytes: 0, max_bytes: Some(1_500_000_000_000) });
        assert_eq!(one.tenants["a:b"].device.min_bytes, 500_000_000);
        assert_eq!(
            parse("blue:host:min=2GB,max=10GB,blue:disk:max=1.5TB,a:b:device:min=500MB").unwrap(),
            one
        );
        assert_eq!(parse(&table(&one).to_string()).unwrap(), one);
        assert_eq!(parse("").unwrap(), Quotas::default());
        assert_eq!(parse(&table(&Quotas::default()).to_string()).unwrap(), Quotas::default());
        let none = parse("x:host:max=0").unwrap();
        assert_eq!(parse(&table(&none).to_string()).unwrap(), none);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, part) in [
            ("blue", "NAME:TIER"),
            ("blue:host", "NAME:TIER"),
            (":host:min=1GB", "not empty"),
            ("blue:gpu:min=1GB", "device, host and disk, not \"gpu\""),
            ("blue:host:most=1GB", "min or max, not \"most\""),
            ("blue:host:min=1", "500MB, 2GB or 0, not \"1\""),
            ("blue:host:min=-1GB", "not \"-1GB\""),
            ("blue:host:min=1GB,min=2GB", "one min"),
            ("blue:host:min=3GB,max=2GB", "minimum"),
            ("{ blue = { host = { min = 5 } } }", "tenants.blue.host"),
            ("{ blue = 3 }", "[tenants.NAME.host]"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(part) && !error.contains('\n'), "{text}: {error}");
        }
    }

    #[test]
    fn more_guarantees_than_memory_are_told() {
        let quotas = parse("a:host:min=6GB;b:host:min=6GB;a:disk:min=1GB").unwrap();
        let has = |host, disk| warnings(&quotas, &[("host", host), ("disk", disk)].into());
        assert_eq!(has(Some(12_000_000_000), Some(1_000_000_000)), Vec::<String>::new());
        assert_eq!(has(Some(11_000_000_000), None).len(), 1);
        assert_eq!(has(None, Some(0)).len(), 1);
    }
}
