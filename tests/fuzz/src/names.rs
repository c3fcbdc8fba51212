//! Names from files, manifests and URLs; durations, sizes, versions and digests as text. What is taken prints as it
//! was, and is safe as a path.

use hq_publisher::inbox::{What, parse_name};
use proto::config::{HumanBytes, HumanDuration};
use proto::digest::{Sha256, StateDigest};
use proto::ids::{Audience, ColumnName, DeviceId, Instance, RegisterId, StoreId, StreamName, TableName, Version, Zone};
use proto::keys::PublicKey;
use proto::layout::{ObjectName, PackName};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt::{Debug, Display};
use std::path::{Component, Path};
use std::str::FromStr;
use std::time::Duration;

/// Reads a name in both ways; what it was, if it is one.
fn name<T>(text: &str) -> Option<T>
where
    T: FromStr<Err: Display> + Display + Serialize + DeserializeOwned + PartialEq + Debug,
{
    let json = serde_json::to_string(text).unwrap();
    let (parsed, read) = (text.parse::<T>(), serde_json::from_str::<T>(&json));
    assert_eq!(parsed.is_ok(), read.is_ok(), "{text:?} from text and from JSON");
    let parsed = parsed.map_err(is_one_line).ok()?;
    assert_eq!(read.unwrap(), parsed);
    assert_eq!(parsed.to_string(), text, "one spelling a name");
    assert_eq!(serde_json::to_string(&parsed).unwrap(), json);
    is_harmless(text);
    Some(parsed)
}

/// Errors quote strangers: not their control characters, nor all that they sent.
fn is_one_line(error: impl Display) {
    let text = error.to_string();
    assert!(!text.chars().any(char::is_control) && text.len() < 2000, "{text:?}");
}

/// Neither SQL nor a shell, a log, a URL or a path finds anything of its own in it.
fn is_harmless(text: &str) {
    assert!(!text.is_empty() && text.len() <= 200, "{text:?}");
    assert!(text.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-@./".contains(&b)), "{text:?}");
    let parts: Vec<Component<'_>> = Path::new(text).components().collect();
    assert!(parts.iter().all(|c| matches!(c, Component::Normal(_))), "{text:?}");
    assert_eq!(parts.len(), text.split('/').count(), "{text:?}");
}

pub fn names(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    name::<StoreId>(text);
    if let Some(register) = name::<RegisterId>(text) {
        assert!(text.starts_with(&format!("{}-", register.store())));
    }
    name::<DeviceId>(text);
    let is_plain = name::<ColumnName>(text).is_some();
    assert_eq!(name::<Zone>(text).is_some(), is_plain, "columns and zones have one rule");
    assert_eq!(name::<StreamName>(text).is_some(), is_plain && text != "tillcast", "and so have streams, but for ours");
    assert!(name::<TableName>(text).is_none() || is_plain);
    name::<Audience>(text);
    name::<Instance>(text);
    name::<PackName>(text);
    match text.parse::<ObjectName>() {
        Ok(object) => {
            assert_eq!(object.to_string(), text);
            is_harmless(text);
        }
        Err(e) => is_one_line(e),
    }
    drop_name(text);
    measures(text);
}

fn drop_name(text: &str) {
    match parse_name(text) {
        Some(Ok(What::Table { instance, table, format })) => {
            let ending = if format == hq_publisher::inbox::Format::Csv { "csv" } else { "ndjson" };
            assert_eq!(text, format!("{}.{}.{table}.{ending}", instance.stream, instance.audience));
            is_harmless(text);
        }
        Some(Ok(What::Stores)) => assert_eq!(text, "stores.csv"),
        Some(Err(why)) => is_one_line(why),
        None => assert!(text.starts_with('.') || !text.ends_with(".csv") && !text.ends_with(".ndjson")),
    }
}

fn measures(text: &str) {
    if let Ok(d) = text.parse::<HumanDuration>() {
        assert_eq!(d.to_string().parse(), Ok(d), "{text:?}");
        // Whatever adds it to a time must not overflow.
        assert!(d.0 <= Duration::from_secs(200 * 366 * 86_400), "{text:?}");
    }
    if let Ok(b) = text.parse::<HumanBytes>() {
        assert_eq!(b.to_string().parse(), Ok(b), "{text:?}");
    }
    if let Ok(n) = text.parse::<u64>()
        && let Ok(version) = Version::try_from(n)
    {
        assert!(version.get() == n && version.as_i64() > 0 && version.next().is_none_or(|v| v > version));
    }
    for hex in [text.parse::<Sha256>().map(|d| d.to_string()), text.parse::<StateDigest>().map(|d| d.to_string())] {
        assert!(hex.is_err() || hex.as_deref() == Ok(text));
    }
    if let Ok(key) = text.parse::<PublicKey>() {
        assert_eq!(key.to_string(), text);
        assert!(!key.verifies(b"x", &[0; 64]));
    }
}
