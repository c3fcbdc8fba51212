//! A headquarters that signs what a case wants, and the server in front of its bucket, which answers as a case says.

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::{self, StreamExt as _};
use http::header::{CONTENT_RANGE, ETAG, IF_NONE_MATCH, RANGE};
use proto::clock::{Timestamp, after};
use proto::digest::Sha256;
use proto::dsse::{self, PayloadType};
use proto::fetch::{Etag, Wire};
use proto::ids::{Instance, Version};
use proto::keys::SecretKey;
use proto::layout::{ObjectName, PackKind, PackName};
use proto::manifest::{Manifest, PackEntry, StreamEntry};
use proto::trust::{PublisherKey, RootKeys, Trust};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::Notify;

pub const DAY: Duration = Duration::from_secs(86_400);

/// When headquarters begins.
pub fn t0() -> Timestamp {
    "2026-01-01T00:00:00Z".parse().unwrap()
}
pub fn key(n: u8) -> SecretKey {
    SecretKey::from_seed([n; 32])
}
pub fn roots(threshold: usize, keys: &[u8]) -> RootKeys {
    RootKeys { threshold, keys: keys.iter().map(|n| key(*n).public()).collect() }
}
/// A publisher's key that is good for a year.
pub fn publisher(n: u8) -> PublisherKey {
    PublisherKey { key: key(n).public(), expires_at: after(t0(), 365 * DAY) }
}
pub fn list_name() -> ObjectName {
    ObjectName::Manifest("0421".parse().unwrap())
}
pub fn trust_name(version: u64) -> ObjectName {
    ObjectName::TrustVersion(version)
}
fn seal(payload_type: PayloadType, payload: &[u8], signers: &[u8]) -> Vec<u8> {
    let keys: Vec<SecretKey> = signers.iter().map(|n| key(*n)).collect();
    dsse::seal(payload_type, payload, &keys.iter().collect::<Vec<_>>())
}

/// What is answered for an object.
#[derive(Debug, Clone)]
pub enum Answer {
    /// As any server would: with its length, an ETag, from where it was asked.
    Bytes(Vec<u8>),
    /// The same in pieces of so many bytes, without a length.
    Pieces(Vec<u8>, usize),
    /// These bytes, and then blanks without end and without a length.
    Endless(Vec<u8>),
    /// A blank now and then.
    Drip,
    /// A head, and nothing after it.
    HeadOnly,
    /// Nothing.
    Silence,
    /// Once the gate is opened.
    Gated(Arc<Gate>, Vec<u8>),
}

/// Lets a case do something between a question and its answer.
#[derive(Debug, Default)]
pub struct Gate {
    pub asked: Notify,
    pub open: Notify,
}

#[derive(Debug, Default)]
pub struct Server {
    answers: Mutex<BTreeMap<String, Answer>>,
    asked: Mutex<Vec<String>>,
    /// Bytes given out of bodies without end.
    given: Arc<AtomicU64>,
}

impl Server {
    pub fn say(&self, name: &ObjectName, answer: Answer) {
        self.answers.lock().unwrap().insert(name.to_string(), answer);
    }
    pub fn put(&self, name: &ObjectName, bytes: &[u8]) {
        self.say(name, Answer::Bytes(bytes.to_vec()));
    }
    pub fn remove(&self, name: &ObjectName) {
        self.answers.lock().unwrap().remove(&name.to_string());
    }
    /// The objects that were asked for since the last call, in order.
    pub fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
    /// The same, packs alone, by their files' names.
    pub fn asked_packs(&self) -> Vec<String> {
        let packs = self.asked().into_iter().filter(|a| a.starts_with("packs/"));
        packs.map(|a| a.rsplit('/').next().unwrap().trim_start_matches('0').to_owned()).collect()
    }
    pub fn given(&self) -> u64 {
        self.given.swap(0, Relaxed)
    }
}

impl Wire for Server {
    fn ask(&self, request: reqwest::Request) -> BoxFuture<'static, Result<reqwest::Response, String>> {
        let path = request.url().path().trim_start_matches('/').replace("%40", "@");
        let query = request.url().query().map(|q| format!("?{q}")).unwrap_or_default();
        let answer = self.answers.lock().unwrap().get(&path).cloned();
        let range = request.headers().get(RANGE).map(|r| format!(" {}", r.to_str().unwrap())).unwrap_or_default();
        self.asked.lock().unwrap().push(path + &query + &range);
        let given = self.given.clone();
        async move {
            match answer {
                None => Ok(respond(404, reqwest::Body::from("no"))),
                Some(Answer::Bytes(bytes)) => Ok(whole(&request, bytes)),
                Some(Answer::Pieces(bytes, size)) => {
                    let pieces: Vec<_> = bytes.chunks(size).map(|c| Ok::<_, std::io::Error>(c.to_vec())).collect();
                    Ok(respond(200, reqwest::Body::wrap_stream(stream::iter(pieces))))
                }
                Some(Answer::Endless(begin)) => {
                    let blanks = std::iter::repeat_with(|| vec![b' '; 4096]);
                    let body = stream::iter(std::iter::once(begin).chain(blanks)).map(move |chunk| {
                        given.fetch_add(chunk.len() as u64, Relaxed);
                        Ok::<_, std::io::Error>(chunk)
                    });
                    Ok(respond(200, reqwest::Body::wrap_stream(body)))
                }
                Some(Answer::Drip) => {
                    let body = stream::repeat(()).then(|()| async {
                        tokio::time::sleep(Duration::from_millis(10)).await;
                        Ok::<_, std::io::Error>(" ")
                    });
                    Ok(respond(200, reqwest::Body::wrap_stream(body)))
                }
                Some(Answer::HeadOnly) => {
                    let body = stream::pending::<Result<Vec<u8>, std::io::Error>>();
                    Ok(respond(200, reqwest::Body::wrap_stream(body)))
                }
                Some(Answer::Silence) => std::future::pending().await,
                Some(Answer::Gated(gate, bytes)) => {
                    gate.asked.notify_one();
                    gate.open.notified().await;
                    Ok(whole(&request, bytes))
                }
            }
        }
        .boxed()
    }
}

fn respond(status: u16, body: reqwest::Body) -> reqwest::Response {
    http::Response::builder().status(status).body(body).unwrap().into()
}

fn whole(request: &reqwest::Request, bytes: Vec<u8>) -> reqwest::Response {
    let header = |name| request.headers().get(name).map(|v| v.to_str().unwrap());
    let etag = Etag::of(&bytes).0;
    if header(IF_NONE_MATCH) == Some(&etag) {
        return respond(304, reqwest::Body::from(""));
    }
    let from = header(RANGE).map(|r| r["bytes=".len()..r.len() - 1].parse::<usize>().unwrap());
    let range = from.map(|from| format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len()));
    let mut response = http::Response::builder().status(if from.is_some() { 206 } else { 200 }).header(ETAG, etag);
    if let Some(range) = range {
        response = response.header(CONTENT_RANGE, range);
    }
    response.body(reqwest::Body::from(bytes[from.unwrap_or(0)..].to_vec())).unwrap().into()
}

/// A headquarters: what it signed last, and its bucket.
pub struct Repo {
    pub server: Arc<Server>,
    pub trust: Trust,
    pub list: Manifest,
    /// Who signs trust files.
    pub root_signers: Vec<u8>,
    /// Who signs lists.
    pub signer: u8,
    /// By its clock.
    pub now: Timestamp,
    bucket: BTreeMap<ObjectName, Vec<u8>>,
}

impl Repo {
    /// Trust file 1 by root key 1, list 1 by key 11.
    pub fn new() -> Repo {
        let trust = Trust {
            format: 1,
            version: 0,
            epoch: 1,
            created_at: t0(),
            root: roots(1, &[1]),
            publishers: vec![publisher(11)],
            streams: Default::default(),
        };
        let list = Manifest {
            format: 1,
            store: "0421".parse().unwrap(),
            serial: 0,
            epoch: 1,
            created_at: t0(),
            expires_at: t0(),
            streams: BTreeMap::new(),
            relay: None,
            registers: BTreeMap::new(),
            unread: BTreeMap::new(),
        };
        let (server, bucket) = (Arc::default(), BTreeMap::new());
        let mut repo = Repo { server, trust, list, root_signers: vec![1], signer: 11, now: t0(), bucket };
        repo.put_trust(|_| ());
        repo.put_list(|_| ());
        repo
    }

    /// The next trust file, changed, as JSON: nobody has signed it.
    pub fn next_trust(&self, change: impl FnOnce(&mut Trust)) -> Trust {
        let mut trust = Trust { version: self.trust.version + 1, created_at: self.now, ..self.trust.clone() };
        change(&mut trust);
        trust
    }
    /// The next list, changed.
    pub fn next_list(&self, change: impl FnOnce(&mut Manifest)) -> Manifest {
        let mut list = Manifest {
            serial: self.list.serial + 1,
            created_at: self.now,
            expires_at: after(self.now, 30 * DAY),
            ..self.list.clone()
        };
        change(&mut list);
        list
    }
    /// The next trust file, changed, by whatever keys.
    pub fn trust_by(&self, signers: &[u8], change: impl FnOnce(&mut Trust)) -> Vec<u8> {
        let payload = serde_json::to_vec(&self.next_trust(change)).unwrap();
        self.sealed(PayloadType::Trust, &payload, signers)
    }
    /// The next list, changed, by whatever keys.
    pub fn list_by(&self, signers: &[u8], change: impl FnOnce(&mut Manifest)) -> Vec<u8> {
        let payload = self.next_list(change).to_payload().unwrap();
        self.sealed(PayloadType::Manifest, &payload, signers)
    }
    pub fn sealed(&self, payload_type: PayloadType, payload: &[u8], signers: &[u8]) -> Vec<u8> {
        seal(payload_type, payload, signers)
    }

    /// Headquarters publishes its next trust file.
    pub fn put_trust(&mut self, change: impl FnOnce(&mut Trust)) {
        self.trust = self.next_trust(change);
        let bytes = seal(PayloadType::Trust, &serde_json::to_vec(&self.trust).unwrap(), &self.root_signers);
        self.put(trust_name(self.trust.version), bytes.clone());
        self.put(ObjectName::Trust, bytes);
    }
    /// Headquarters publishes its next list.
    pub fn put_list(&mut self, change: impl FnOnce(&mut Manifest)) {
        self.list = self.next_list(change);
        let bytes = seal(PayloadType::Manifest, &self.list.to_payload().unwrap(), &[self.signer]);
        self.put(list_name(), bytes);
    }
    /// A new publisher's key, and no other; a list by it.
    pub fn rotate(&mut self, signer: u8) {
        self.signer = signer;
        self.put_trust(|t| t.publishers = vec![publisher(signer)]);
        self.put_list(|_| ());
    }

    /// The server shows this as the next trust file; headquarters knows nothing of it.
    pub fn forge_trust(&self, bytes: &[u8]) {
        self.server.put(&trust_name(self.trust.version + 1), bytes);
        self.server.put(&ObjectName::Trust, bytes);
    }
    /// The server shows this as the list.
    pub fn forge_list(&self, bytes: &[u8]) {
        self.server.put(&list_name(), bytes);
    }
    /// The server shows what headquarters put, and nothing else.
    pub fn restore(&self) {
        let answers = self.bucket.iter().map(|(n, b)| (n.to_string(), Answer::Bytes(b.clone())));
        *self.server.answers.lock().unwrap() = answers.collect();
    }

    /// The bytes that headquarters put.
    pub fn object(&self, name: &ObjectName) -> &[u8] {
        &self.bucket[name]
    }
    /// The bucket as a directory.
    pub fn write_to(&self, dir: &Path) {
        for (name, bytes) in &self.bucket {
            let path = dir.join(name.to_string());
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, bytes).unwrap();
        }
    }
    fn put(&mut self, name: ObjectName, bytes: Vec<u8>) {
        self.server.put(&name, &bytes);
        self.bucket.insert(name, bytes);
    }

    /// A pack that the next list names, as the newest of its stream.
    pub fn add_pack(&mut self, instance: &str, base: Option<u64>, version: u64, content: &[u8]) -> PackName {
        let instance: Instance = instance.parse().unwrap();
        let entry = entry(base, version, content);
        let name = entry.name(&instance);
        let stream = self.list.streams.entry(instance.stream).or_insert_with(|| StreamEntry {
            audience: instance.audience,
            version: entry.version,
            schema: 1,
            digests: BTreeMap::new(),
            packs: Vec::new(),
            requires: BTreeMap::new(),
        });
        stream.version = entry.version;
        stream.packs.push(entry);
        self.put(name.clone().into(), content.to_vec());
        name
    }
}

/// What a list says of a pack with this content.
pub fn entry(base: Option<u64>, version: u64, content: &[u8]) -> PackEntry {
    let number = |n| Version::try_from(n).unwrap();
    PackEntry {
        version: number(version),
        kind: if base.is_some() { PackKind::Delta } else { PackKind::Full },
        base: base.map(number),
        bytes: content.len() as u64,
        unpacked: content.len() as u64,
        sha256: Sha256::of(content),
    }
}
