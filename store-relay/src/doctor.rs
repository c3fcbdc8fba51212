//! `doctor`: tries what the relay needs, and says what to do. Makes nothing: it may be run by another user than the
//! service's.

use crate::config::Config;
use crate::control::{self, Order};
use crate::shelves::Room;
use proto::device::{self, Device, DeviceError};
use proto::fetch::{FetchError, FetchErrorKind, Small, Source};
use proto::ids::DeviceId;
use proto::layout::{ObjectName, PackName};
use proto::{owner, shelf};
use serde::Serialize;
use std::collections::BTreeMap;

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What.
    pub what: String,
    /// Whether it is as it should be.
    pub well: bool,
    /// What was found, and the remedy.
    pub text: String,
}

impl Finding {
    fn of(what: impl Into<String>, found: Result<String, String>) -> Finding {
        let well = found.is_ok();
        Finding { what: what.into(), well, text: found.unwrap_or_else(|e| e) }
    }
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}: {}", if self.well { "ok  " } else { "FAIL" }, self.what, self.text)
    }
}

/// Less room than this is told.
const ROOM: u64 = 64 << 20;
/// So many listed packs are looked for.
const LOOKS: usize = 64;

/// Tries everything. Also whether a relay runs here.
pub async fn examine(config: &Config) -> anyhow::Result<(bool, Vec<Finding>)> {
    let running = control::ask(&config.data_dir, &Order::Status).await?.is_some();
    let files = Finding::of("files", files(config));
    // Whoever may not write there would only hear that again, and leave files that the service cannot.
    let enrolment = files.well.then(|| Finding::of("enrolment", enrolment(config)));
    let held = if files.well { held(config) } else { None };
    let mut findings = vec![Finding::of(format!("data directory {}", config.data_dir.display()), room(config)), files];
    findings.extend(enrolment);
    let mut sources = config.sources()?;
    let mut lists = BTreeMap::new();
    for source in &sources {
        let list = manifest(config, source).await;
        let found = list.as_ref().map(|(said, _)| said.clone()).map_err(String::clone);
        findings.push(Finding::of(format!("source {}", source.url()), found));
        lists.extend(list.ok().map(|(_, list)| (source.url().to_owned(), list)));
    }
    // Of an older list the packs may be gone by right.
    if let Some((list, not_here)) = held
        && !not_here.is_empty()
        && lists.values().any(|l| *l == list)
    {
        sources.retain(|s| lists.contains_key(s.url()));
        findings.push(Finding::of("listed packs", packs(&not_here, &sources).await));
    }
    if let Some(hq) = config.hq_source()? {
        let query = [("store", config.store.as_str())];
        let answer = hq.long_poll("v1/wake", &query, 0, None).await;
        let found = answer.map(|_| "answers".to_owned()).map_err(|e| e.to_string());
        findings.push(Finding::of(format!("headquarters {}", hq.url()), found));
    }
    if !running {
        let bound = std::net::TcpListener::bind(config.listen);
        let found = bound.map(|_| "free".to_owned()).map_err(|e| e.to_string());
        findings.push(Finding::of(format!("address {}", config.listen), found));
    }
    Ok((running, findings))
}

fn room(config: &Config) -> Result<String, String> {
    let space = shelf::free_space(&config.data_dir).map_err(|e| match e.is_not_found() {
        true => DeviceError::NotEnrolled(config.data_dir.display().to_string()).to_string(),
        false => e.to_string(),
    })?;
    let text = format!("{} MiB free", space.free >> 20);
    if space.free > ROOM { Ok(text) } else { Err(format!("{text}: make room")) }
}

fn files(config: &Config) -> Result<String, String> {
    owner::check(&config.data_dir, device::FILE)?;
    Ok(format!("all may be written by {}", owner::User::me()))
}

fn enrolment(config: &Config) -> Result<String, String> {
    let id = DeviceId::Relay(config.store.clone());
    let device = Device::open(&config.data_dir, &id, &config.limits).map_err(|e| e.to_string())?;
    if let Some(why) = device.manifest().and_then(|m| m.disowns(&id, &device.key().public())) {
        return Err(why);
    }
    Ok(format!("{id}, trust {}, serial {}", device.trust().version(), device.seen().serial))
}

/// A source's list: what is said of it, and its bytes.
async fn manifest(config: &Config, source: &Source) -> Result<(String, Vec<u8>), String> {
    let name = ObjectName::Manifest(config.store.clone());
    match source.get_small(&name, None, None, config.limits.manifest_bytes).await {
        Ok(Small::Body { bytes, .. }) => Ok((format!("{name}: {} bytes", bytes.len()), bytes.into())),
        Ok(Small::Unchanged) => Ok((format!("{name}: there"), Vec::new())),
        Err(e) => Err(e.to_string()),
    }
}

/// The held list, and packs that it names and that are not served yet.
fn held(config: &Config) -> Option<(Vec<u8>, Vec<PackName>)> {
    let device = Device::open(&config.data_dir, &DeviceId::Relay(config.store.clone()), &config.limits).ok()?;
    let ok = config.data_dir.join(Room::Ok.dir());
    let manifest = device.manifest()?;
    let named = manifest.instances().flat_map(|(i, e)| e.packs.iter().map(move |p| p.name(&i)));
    let not_here = named.filter(|name| !ok.join(ObjectName::Pack(name.clone()).to_string()).is_file());
    let not_here = not_here.take(LOOKS).collect();
    Some((manifest.envelope().to_vec(), not_here))
}

/// Whether these sources, whose lists can be had, have the packs, too.
async fn packs(names: &[PackName], sources: &[Source]) -> Result<String, String> {
    for name in names {
        if let Err(errors) = is_had(name, sources).await {
            let gone = if errors.iter().all(FetchError::may_be_absent) {
                "; it is gone (a bucket that may not be listed says so by 403), and the next publish goes round it"
            } else {
                ""
            };
            let errors: Vec<String> = errors.iter().map(ToString::to_string).collect();
            return Err(format!("no source gives {name}: {}{gone}", errors.join("; ")));
        }
    }
    Ok(format!("{} that are not served yet may be had", names.len()))
}

async fn is_had(name: &PackName, sources: &[Source]) -> Result<(), Vec<FetchError>> {
    let mut errors = Vec::new();
    for source in sources {
        // No byte of it is wanted: what is there is "too long".
        match source.get_small(&name.clone().into(), None, None, 0).await {
            Err(e) if e.kind != FetchErrorKind::TooLong => errors.push(e),
            _ => return Ok(()),
        }
    }
    Err(errors)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::disallowed_methods)]
    use super::*;
    use crate::kit::{Hq, Store};
    use std::os::unix::fs::PermissionsExt;

    async fn found(store: &Store) -> Vec<Finding> {
        examine(&store.config).await.unwrap().1
    }
    fn of<'f>(found: &'f [Finding], what: &str) -> &'f Finding {
        found.iter().find(|f| f.what.starts_with(what)).unwrap_or_else(|| panic!("{what}: {found:?}"))
    }

    #[tokio::test]
    async fn doctor_makes_nothing_and_names_what_keeps_the_relay_from_starting() {
        let mut store = Store::enrolled(&[]);
        assert!(found(&store).await.iter().all(|f| f.well));
        let spool = store.data().join("relay.db");
        std::fs::write(&spool, "").unwrap();
        if owner::User::me().0 != 0 {
            std::fs::set_permissions(&spool, std::fs::Permissions::from_mode(0o400)).unwrap();
            let found = found(&store).await;
            assert!(!of(&found, "files").well && of(&found, "files").text.contains("relay.db"), "{found:?}");
        } else {
            std::os::unix::fs::chown(&spool, Some(65_533), None).unwrap();
            let found = found(&store).await;
            assert!(!of(&found, "files").well && of(&found, "files").text.contains("relay.db"), "{found:?}");
        }
        store.config.data_dir = store.dir.path().join("elsewhere");
        let found = found(&store).await;
        assert!(of(&found, "data directory").text.contains("enroll") && !of(&found, "files").well, "{found:?}");
        assert!(!store.data().exists());
    }

    #[tokio::test]
    async fn a_listed_pack_that_no_source_gives_is_told() {
        let mut hq = Hq::new();
        hq.follow("price", "all");
        hq.publish("price", &[(1, Some("a"))], crate::kit::Make::Full);
        hq.publish("price", &[(1, Some("b"))], crate::kit::Make::Delta);
        hq.sign();
        let delta = hq.path(&hq.pack("price", 2, proto::layout::PackKind::Delta).into());
        let good = std::fs::read(&delta).unwrap();
        std::fs::remove_file(&delta).unwrap();
        let bucket = hq.unlisted().await;
        let store = Store::enrolled(&[bucket.url]);
        let relay = store.open();
        relay.mirror_once(crate::relay::Pace::Once).await;
        drop(relay);
        let told = found(&store).await;
        let packs = of(&told, "listed packs");
        assert!(of(&told, "source").well && !packs.well, "{told:?}");
        assert!(packs.text.contains("0000000002.delta.pack") && packs.text.contains("403"), "{told:?}");
        std::fs::write(&delta, good).unwrap();
        assert!(of(&found(&store).await, "listed packs").well);
        // What a newer list names no more may be gone.
        std::fs::remove_file(&delta).unwrap();
        hq.publish("price", &[(1, Some("c"))], crate::kit::Make::Full);
        hq.sign();
        assert!(found(&store).await.iter().all(|f| f.well));
    }

    #[tokio::test]
    async fn a_device_that_was_enrolled_elsewhere_or_revoked_is_told() {
        let mut hq = Hq::new();
        hq.follow("price", "all");
        hq.publish("price", &[(1, Some("a"))], crate::kit::Make::Full);
        hq.sign();
        let store = Store::enrolled(&[hq.url()]);
        let relay = store.open();
        relay.mirror_once(crate::relay::Pace::Once).await;
        drop(relay);
        let id = DeviceId::Relay(store.config.store.clone());
        let device = Device::open(store.data(), &id, &store.config.limits).unwrap();
        let mut manifest = (**device.manifest().unwrap()).clone();
        assert_eq!(manifest.disowns(&id, &device.key().public()), None);
        assert!(of(&found(&store).await, "enrolment").well);
        manifest.relay = None;
        let told = manifest.disowns(&id, &device.key().public()).unwrap();
        assert!(told.contains("was revoked") && told.contains("enroll this device anew"), "{told}");
        // The same directory with the key of an earlier code.
        let earlier = proto::keys::SecretKey::generate().unwrap().to_secret_text();
        Device::enrol(store.data(), &proto::trust::EnrolCode { seed: earlier, ..crate::kit::code() }).unwrap();
        let found = found(&store).await;
        assert!(!of(&found, "enrolment").well && of(&found, "enrolment").text.contains("another key"), "{found:?}");
    }
}
