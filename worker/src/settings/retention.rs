//! What blocks are kept like when a request says nothing: the model's YAML file, then flags over it.

use std::path::Path;
use std::time::Duration;

use kvbm_hash::{Retention, RetentionConfig};
use serde_json::{Map, Value};

use crate::WorkerError;

const PRIORITY: &str = "--local-kv-retention-priority";
const DURATION: &str = "--local-kv-retention-duration";
/// The part of the file that is read.
const SECTION: &str = "kv_cache_retention_config";

/// Flags that override the file.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct RetentionArgs {
    /// Retention priority of blocks of requests that name none, 0 to 100; higher stays longer [default: 35]
    #[arg(long, env = "KVBM_LOCAL_KV_RETENTION_PRIORITY", value_name = "N", allow_negative_numbers = true)]
    pub local_kv_retention_priority: Option<i64>,
    /// Milliseconds for which that priority holds after the last use [default: for ever]
    #[arg(long, env = "KVBM_LOCAL_KV_RETENTION_DURATION", value_name = "MS", allow_negative_numbers = true)]
    pub local_kv_retention_duration: Option<i64>,
}

impl RetentionArgs {
    /// What flags and file say together; `None` when neither says anything.
    pub fn over(&self, file: Option<&Path>) -> Result<Option<RetentionConfig>, WorkerError> {
        let priority = self.local_kv_retention_priority.map(|given| priority(PRIORITY, given));
        let duration = self.local_kv_retention_duration.map(|given| duration(DURATION, given));
        let (priority, duration) = (priority.transpose()?, duration.transpose()?);
        let in_file = file.map(read).transpose()?.flatten();
        if in_file.is_none() && priority.is_none() && duration.is_none() {
            return Ok(None);
        }
        let below = in_file.unwrap_or_default();
        let retention =
            Retention { priority: priority.unwrap_or(below.priority), duration: duration.or(below.duration) };
        Ok(Some(RetentionConfig::uniform(retention).expect("both were checked")))
    }
}

fn priority(setting: &'static str, given: i64) -> Result<u8, WorkerError> {
    let most = Retention::PRIORITY_MAX;
    let priority = u8::try_from(given).ok().filter(|priority| *priority <= most);
    priority.ok_or_else(|| WorkerError::invalid(setting, given, format!("0 to {most}")))
}

fn duration(setting: &'static str, given: i64) -> Result<Duration, WorkerError> {
    let most = Retention::DURATION_MS_MAX;
    let ms = u64::try_from(given).ok().filter(|ms| *ms <= most);
    let expected = || format!("milliseconds, 0 to {most}");
    ms.map(Duration::from_millis).ok_or_else(|| WorkerError::invalid(setting, given, expected()))
}

/// The retention in a YAML file; `None` if it has none.
fn read(path: &Path) -> Result<Option<Retention>, WorkerError> {
    let wrong = |expected: String| WorkerError::invalid("--config", path.display(), expected);
    let text = std::fs::read_to_string(path).map_err(|error| wrong(format!("a file ({error})")))?;
    let parsed: Result<Value, _> = serde_saphyr::from_str(&text);
    let document = parsed.map_err(|error| {
        let error = error.to_string();
        wrong(format!("YAML ({})", error.lines().next().unwrap_or_default()))
    })?;
    let mut document = match document {
        Value::Null => return Ok(None),
        Value::Object(document) => document,
        _ => return Err(wrong("YAML with names and values".into())),
    };
    let section = document.remove(SECTION).unwrap_or(Value::Null);
    if !document.is_empty() {
        let ignored: Vec<&String> = document.keys().collect();
        tracing::info!(?ignored, file = %path.display(), "of this file only {SECTION} has an effect here");
    }
    match section {
        Value::Null => Ok(None),
        Value::Object(section) => retention(section).map(Some),
        other => Err(WorkerError::invalid(SECTION, other, "priority and duration_ms")),
    }
}

fn retention(mut section: Map<String, Value>) -> Result<Retention, WorkerError> {
    let mut whole = |name, setting, expected: String| match section.remove(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_i64() {
            Some(whole) => Ok(Some(whole)),
            None => Err(WorkerError::invalid(setting, value, expected)),
        },
    };
    const FILE_PRIORITY: &str = "kv_cache_retention_config.priority";
    const FILE_DURATION: &str = "kv_cache_retention_config.duration_ms";
    let of_priority = format!("0 to {}", Retention::PRIORITY_MAX);
    let of_duration = format!("milliseconds, 0 to {}", Retention::DURATION_MS_MAX);
    let given = whole("priority", FILE_PRIORITY, of_priority)?;
    let lasting = whole("duration_ms", FILE_DURATION, of_duration)?;
    if let Some((name, _)) = section.iter().next() {
        return Err(WorkerError::invalid(SECTION, name, "priority and duration_ms"));
    }
    let default = Retention::default();
    Ok(Retention {
        priority: given.map_or(Ok(default.priority), |given| priority(FILE_PRIORITY, given))?,
        duration: lasting.map(|lasting| duration(FILE_DURATION, lasting)).transpose()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn over(
        yaml: Option<&str>,
        priority: Option<i64>,
        duration: Option<i64>,
    ) -> Result<Option<Retention>, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.yaml");
        yaml.iter().for_each(|yaml| std::fs::write(&path, yaml).unwrap());
        let args =
            RetentionArgs { local_kv_retention_priority: priority, local_kv_retention_duration: duration };
        let config = args.over(yaml.is_some().then_some(path.as_path()));
        let all = |config: RetentionConfig| {
            let decode = config.decode();
            assert_eq!(config.per_block(16, 20), [Some(decode); 2]);
            decode
        };
        config.map(|config| config.map(all)).map_err(|error| {
            assert_eq!(error.exit_code(), 2);
            error.to_string().replace(&path.display().to_string(), "FILE")
        })
    }

    fn kept(priority: u8, duration_ms: Option<u64>) -> Option<Retention> {
        Some(Retention { priority, duration: duration_ms.map(Duration::from_millis) })
    }

    const YAML: &str = "# a model\nmax_batch_size: 8\nkv_cache_retention_config:\n  priority: 50        # 0-100\n  duration_ms: 30000\n";

    #[test]
    fn flags_override_the_file_each_for_itself() {
        assert_eq!(over(None, None, None), Ok(None));
        assert_eq!(over(Some("max_batch_size: 8\n"), None, None), Ok(None));
        assert_eq!(over(Some(""), None, None), Ok(None));
        assert_eq!(over(Some(YAML), None, None), Ok(kept(50, Some(30_000))));
        assert_eq!(over(Some(YAML), Some(0), None), Ok(kept(0, Some(30_000))));
        assert_eq!(over(Some(YAML), None, Some(60_000)), Ok(kept(50, Some(60_000))));
        assert_eq!(over(None, Some(50), Some(60_000)), Ok(kept(50, Some(60_000))));
        assert_eq!(over(None, None, Some(5)), Ok(kept(35, Some(5))));
        assert_eq!(over(Some("kv_cache_retention_config: {priority: 90}"), None, None), Ok(kept(90, None)));
    }

    #[test]
    fn what_is_wrong_is_one_line_with_setting_value_and_range() {
        let section = |inside: &str| format!("kv_cache_retention_config:\n  {inside}\n");
        for (yaml, priority, duration, expected) in [
            (None, Some(101), None, "--local-kv-retention-priority 101: expected 0 to 100"),
            (None, Some(-1), None, "--local-kv-retention-priority -1: expected 0 to 100"),
            (
                None,
                None,
                Some(-5),
                "--local-kv-retention-duration -5: expected milliseconds, 0 to 3155760000000",
            ),
            (
                Some(section("priority: 101")),
                None,
                None,
                "kv_cache_retention_config.priority 101: expected 0 to 100",
            ),
            (
                Some(section("priority: high")),
                None,
                None,
                "kv_cache_retention_config.priority \"high\": expected 0 to 100",
            ),
            (
                Some(section("duration_ms: 1.5")),
                None,
                None,
                "kv_cache_retention_config.duration_ms 1.5: expected milliseconds, 0 to 3155760000000",
            ),
            (
                Some(section("duration: 5")),
                None,
                None,
                "kv_cache_retention_config duration: expected priority and duration_ms",
            ),
            (
                Some("kv_cache_retention_config: 50".into()),
                None,
                None,
                "kv_cache_retention_config 50: expected priority and duration_ms",
            ),
            (Some("- 1".into()), None, None, "--config FILE: expected YAML with names and values"),
        ] {
            assert_eq!(over(yaml.as_deref(), priority, duration).unwrap_err(), expected);
        }
        let broken = over(Some("a: [1"), None, None).unwrap_err();
        assert!(broken.starts_with("--config FILE: expected YAML (") && !broken.contains('\n'), "{broken}");
        let args = RetentionArgs::default();
        let missing = args.over(Some(Path::new("/nowhere/model.yaml"))).unwrap_err().to_string();
        assert!(missing.starts_with("--config /nowhere/model.yaml: expected a file ("), "{missing}");
    }
}
