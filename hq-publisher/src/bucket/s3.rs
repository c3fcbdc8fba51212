//! A bucket behind the S3 API.
//!
//! Create-only puts rely on If-None-Match where the server honours it (found by a probe, or said by
//! the settings). Where it does not, the name is looked at before the put: then the publisher's lease
//! alone keeps two from writing one name at once.

use super::patience::Patient;
use super::{Content, Inner, Pointer, Put, Trouble};
use crate::config::ObjectsConfig;
use bytes::Bytes;
use futures_util::StreamExt;
use object_store::aws::{AmazonS3, AmazonS3Builder, S3ConditionalPut};
use object_store::list::{PaginatedListOptions, PaginatedListStore};
use object_store::path::Path as Key;
use object_store::{
    Attribute, Attributes, BackoffConfig, ClientOptions, Error, GetResult, ObjectMeta, ObjectStore, ObjectStoreExt,
    PutMode, PutMultipartOptions, PutOptions, PutPayload, RetryConfig, UpdateVersion, WriteMultipart,
};
use proto::digest::{Sha256, Sha256Stream};
use proto::layout::ObjectName;
use proto::shelf::{self, PartFile};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// What is put in one request, in bytes; more goes in parts of this size, four at once.
pub(super) const SMALL: u64 = 8 << 20;

/// Keys in a page of a listing, as servers have them.
const PAGE: usize = 1000;

/// Keys of strangers that are no paths and are passed by in one listing.
const STRAYS: usize = 100;

/// What a server does with conditions on puts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Conditions {
    /// If-None-Match and If-Match hold.
    Honoured,
    /// They are ignored: the second create-only put won silently.
    Ignored,
    /// They are answered by an error (OSS: 501).
    Refused,
}

impl Conditions {
    pub(super) fn word(self) -> &'static str {
        match self {
            Conditions::Honoured => "honoured",
            Conditions::Ignored => "ignored",
            Conditions::Refused => "refused",
        }
    }
    pub(super) fn from_word(word: &str) -> Option<Self> {
        [Conditions::Honoured, Conditions::Ignored, Conditions::Refused].into_iter().find(|c| c.word() == word)
    }
}

#[derive(Debug, Clone)]
pub(super) struct S3 {
    store: Arc<AmazonS3>,
    prefix: Arc<str>,
    endpoint: Arc<str>,
    conditions: bool,
}

impl S3 {
    /// Keys, and what the settings leave open, come from the usual AWS variables.
    pub(super) fn new(url: &str, config: &ObjectsConfig) -> Result<S3, String> {
        S3::build(AmazonS3Builder::from_env(), url, config)
    }

    pub(super) fn build(builder: AmazonS3Builder, url: &str, config: &ObjectsConfig) -> Result<S3, String> {
        let parsed = url::Url::parse(url).map_err(|e| e.to_string())?;
        let bucket = parsed.host_str().filter(|b| !b.is_empty()).ok_or("write s3://bucket/prefix")?;
        let endpoint = config.s3.endpoint.as_deref();
        let client = ClientOptions::new()
            .with_connect_timeout(Duration::from_secs(10))
            .with_timeout_disabled()
            .with_allow_http(endpoint.is_some_and(|e| e.starts_with("http://")));
        let mut builder = builder
            .with_bucket_name(bucket)
            .with_client_options(client)
            .with_http_connector(Patient)
            .with_virtual_hosted_style_request(config.s3.virtual_hosted)
            // One by one: what every server of the kind can do.
            .with_disable_bulk_delete(true)
            // Without a condition the plain mode is all there is; with one, a lost answer comes back
            // as "already there", and the bytes are compared.
            .with_conditional_put(S3ConditionalPut::ETagMatch)
            .with_retry(RetryConfig {
                backoff: BackoffConfig::default(),
                max_retries: 4,
                retry_timeout: Duration::from_secs(30),
            });
        if let Some(endpoint) = endpoint {
            builder = builder.with_endpoint(endpoint);
        }
        if let Some(region) = &config.s3.region {
            builder = builder.with_region(region);
        }
        let prefix = parsed.path().trim_matches('/').to_owned();
        Key::parse(&prefix).map_err(|e| e.to_string())?;
        let store = builder.build().map_err(|e| e.to_string())?;
        Ok(S3 {
            store: Arc::new(store),
            prefix: prefix.into(),
            endpoint: endpoint.unwrap_or_default().into(),
            conditions: config.s3.conditions.unwrap_or(false),
        })
    }

    /// The endpoint, as set; empty where it is AWS's.
    pub(super) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    pub(super) fn set_conditions(&mut self, found: Conditions) {
        self.conditions = found == Conditions::Honoured;
    }

    pub(super) fn honours_conditions(&self) -> bool {
        self.conditions
    }

    fn key(&self, name: &str) -> Inner<Key> {
        let full = if self.prefix.is_empty() { name.to_owned() } else { format!("{}/{name}", self.prefix) };
        Ok(Key::parse(full)?)
    }

    pub(super) async fn put_new(&self, name: &str, object: Option<&ObjectName>, content: &Content<'_>) -> Inner<Put> {
        let key = self.key(name)?;
        let small = content.length() <= SMALL;
        if !(self.conditions && small) {
            match self.store.head(&key).await {
                Ok(_) => return self.compare(&key, content).await,
                Err(Error::NotFound { .. }) => {}
                Err(e) => return Err(e.into()),
            }
        }
        if !small {
            return self.put_in_parts(&key, object, content).await;
        }
        let bytes = read_whole(content).await?;
        let mode = if self.conditions { PutMode::Create } else { PutMode::Overwrite };
        match self.store.put_opts(&key, bytes.into(), put_options(object, mode)).await {
            Ok(_) => Ok(Put::New),
            Err(Error::AlreadyExists { .. } | Error::Precondition { .. }) => self.compare(&key, content).await,
            Err(e) => Err(e.into()),
        }
    }

    async fn put_in_parts(&self, key: &Key, object: Option<&ObjectName>, content: &Content<'_>) -> Inner<Put> {
        let options = PutMultipartOptions { attributes: attributes(object), ..PutMultipartOptions::default() };
        let upload = self.store.put_multipart_opts(key, options).await?;
        let mut writer = WriteMultipart::new_with_chunk_size(upload, usize::try_from(SMALL).unwrap_or(8 << 20));
        let outcome = async {
            match content {
                Content::Bytes(b) => writer.put(b.clone()),
                Content::File { path, .. } => {
                    let mut file = tokio::fs::File::from_std(shelf::open_regular(path)?);
                    let mut hash = Sha256Stream::default();
                    let mut chunk = vec![0; 1 << 20];
                    loop {
                        writer.wait_for_capacity(4).await?;
                        let n = tokio::io::AsyncReadExt::read(&mut file, &mut chunk).await?;
                        if n == 0 {
                            break;
                        }
                        hash.update(&chunk[..n]);
                        writer.write(&chunk[..n]);
                    }
                    if hash.finish() != content.sha256() {
                        return Err(Trouble::Failed(format!("{} changed while it was read", path.display())));
                    }
                }
            }
            Ok(())
        };
        match outcome.await {
            Ok(()) => {
                writer.finish().await?;
                Ok(Put::New)
            }
            Err(e) => {
                // Parts left behind cost money; a bucket rule is the second net.
                let _ = writer.abort().await;
                Err(e)
            }
        }
    }

    /// The name is taken: by the same bytes?
    async fn compare(&self, key: &Key, content: &Content<'_>) -> Inner<Put> {
        let there = self.store.get(key).await?;
        if there.meta.size == content.length() && hash_all(there).await? == (content.length(), content.sha256()) {
            Ok(Put::SameThere)
        } else {
            Err(Trouble::OtherBytesThere)
        }
    }

    pub(super) async fn hash(&self, name: &str) -> Inner<Option<(u64, Sha256)>> {
        match self.store.get(&self.key(name)?).await {
            Ok(there) => Ok(Some(hash_all(there).await?)),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// `seen`: the ETag that the object must still have, where conditions hold.
    pub(super) async fn put_pointer(
        &self,
        name: &str,
        object: &ObjectName,
        bytes: Bytes,
        seen: Option<&str>,
    ) -> Inner<Pointer> {
        let mode = match seen.filter(|_| self.conditions) {
            Some(etag) => PutMode::Update(UpdateVersion { e_tag: Some(etag.to_owned()), version: None }),
            None => PutMode::Overwrite,
        };
        match self.store.put_opts(&self.key(name)?, bytes.into(), put_options(Some(object), mode)).await {
            Ok(put) => Ok(Pointer::Put(put.e_tag)),
            Err(Error::Precondition { .. } | Error::NotFound { .. }) if seen.is_some() => Ok(Pointer::Changed),
            Err(e) => Err(e.into()),
        }
    }

    pub(super) async fn get(&self, name: &str, max: u64) -> Inner<Option<Bytes>> {
        let got = match self.store.get(&self.key(name)?).await {
            Ok(got) => got,
            Err(Error::NotFound { .. }) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        let mut all = Vec::new();
        let mut body = got.into_stream();
        while let Some(chunk) = body.next().await {
            all.extend_from_slice(&chunk?);
            if all.len() as u64 > max {
                return Err(Trouble::TooLong(max));
            }
        }
        Ok(Some(all.into()))
    }

    pub(super) async fn get_to_file(&self, name: &str, to: &Path) -> Inner<Option<(u64, Sha256)>> {
        let got = match self.store.get(&self.key(name)?).await {
            Ok(got) => got,
            Err(Error::NotFound { .. }) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        let mut part = PartFile::open(to)?;
        part.restart()?;
        let (mut length, mut hash) = (0, Sha256Stream::default());
        let mut body = got.into_stream();
        while let Some(chunk) = body.next().await {
            let chunk = chunk?;
            hash.update(&chunk);
            length += chunk.len() as u64;
            part.write(&chunk)?;
        }
        part.finish()?;
        Ok(Some((length, hash.finish())))
    }

    pub(super) async fn list(&self, prefix: &str) -> Inner<Vec<(String, u64)>> {
        Ok(self.list_all(prefix).await?.into_iter().map(|(name, object)| (name, object.size)).collect())
    }

    pub(super) async fn etags(&self, prefix: &str) -> Inner<Vec<(String, String)>> {
        let all = self.list_all(prefix).await?;
        Ok(all.into_iter().filter_map(|(name, object)| Some((name, object.e_tag?))).collect())
    }

    async fn list_all(&self, prefix: &str) -> Inner<Vec<(String, ObjectMeta)>> {
        let room = match (self.prefix.is_empty(), prefix.trim_end_matches('/')) {
            (true, "") => String::new(),
            (true, room) => format!("{room}/"),
            (false, "") => format!("{}/", self.prefix),
            (false, room) => format!("{}/{room}/", self.prefix),
        };
        let mut found = Vec::new();
        let (mut from, mut page, mut strays) = (PaginatedListOptions::default(), None, 0);
        loop {
            let asked = PaginatedListOptions { max_keys: page, ..from.clone() };
            let listed = match self.store.list_paginated(Some(&*room).filter(|r| !r.is_empty()), asked).await {
                Ok(listed) => listed,
                Err(e) => {
                    let Some(key) = stray_key(&e) else { return Err(e.into()) };
                    // Such a key fails its whole page: it is closed in on, and passed by.
                    page = Some(page.unwrap_or(PAGE) / 2);
                    if page == Some(0) {
                        strays += 1;
                        if strays > STRAYS {
                            let many = format!("more than {STRAYS} keys in it are no paths, the last is `{key}`");
                            return Err(Trouble::Failed(many));
                        }
                        tracing::warn!(key, "a stray key in the bucket is left out; delete it");
                        (from, page) = (PaginatedListOptions { offset: Some(key), ..Default::default() }, Some(1));
                    }
                    continue;
                }
            };
            for object in listed.result.objects {
                let key = object.location.as_ref();
                let name = key.strip_prefix(&*self.prefix).map_or(key, |n| n.trim_start_matches('/'));
                found.push((name.to_owned(), object));
            }
            if listed.page_token.is_none() {
                return Ok(found);
            }
            from = PaginatedListOptions { page_token: listed.page_token, ..Default::default() };
            page = page.map(|n| n * 2).filter(|n| *n < PAGE);
        }
    }

    pub(super) async fn delete(&self, name: &str) -> Inner<()> {
        match self.store.delete(&self.key(name)?).await {
            Ok(()) | Err(Error::NotFound { .. }) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Puts one name twice as create-only, then over a version that is not there any more. Fails where that cannot be
    /// found out now.
    pub(super) async fn probe(&self) -> Inner<Conditions> {
        let random = proto::retry::random_unit().to_bits();
        let key = self.key(&format!("probe/{random:016x}"))?;
        let found = self.try_conditions(&key).await;
        let deleted = self.delete_key(&key).await;
        let found = found?;
        deleted?;
        Ok(found)
    }

    async fn try_conditions(&self, key: &Key) -> Inner<Conditions> {
        let put = |bytes: &'static str, mode| {
            self.store.put_opts(key, PutPayload::from_static(bytes.as_bytes()), put_options(None, mode))
        };
        let first = match put("first", PutMode::Create).await {
            Err(e) if is_refusal(&e) => {
                // Either conditions are refused, or nothing can be written at all.
                put("plain", PutMode::Overwrite).await?;
                tracing::info!("conditions on puts are refused: {e}");
                return Ok(Conditions::Refused);
            }
            first => first?,
        };
        let second = put("second", PutMode::Create).await;
        let stale = UpdateVersion { e_tag: first.e_tag, version: None };
        put("third", PutMode::Overwrite).await?;
        let late = put("fourth", PutMode::Update(stale)).await;
        let held = |e: &Error| matches!(e, Error::AlreadyExists { .. } | Error::Precondition { .. });
        match (second, late) {
            (Ok(_), _) | (_, Ok(_)) => Ok(Conditions::Ignored),
            (Err(e), Err(Error::Precondition { .. })) if held(&e) => Ok(Conditions::Honoured),
            (Err(e), Err(late)) if is_refusal(&e) || is_refusal(&late) => Ok(Conditions::Refused),
            (Err(e), Err(late)) => Err(if held(&e) { late } else { e }.into()),
        }
    }

    async fn delete_key(&self, key: &Key) -> Inner<()> {
        match self.store.delete(key).await {
            Ok(()) | Err(Error::NotFound { .. }) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// The `Date` header of the server's answer to anything.
    pub(super) async fn date(&self) -> Option<jiff::Timestamp> {
        if self.endpoint.is_empty() {
            return None;
        }
        let client = reqwest::Client::builder().timeout(Duration::from_secs(10)).build().ok()?;
        let answer = client.head(&*self.endpoint).send().await.ok()?;
        let date = answer.headers().get("date")?.to_str().ok()?;
        Some(jiff::fmt::rfc2822::parse(date).ok()?.timestamp())
    }
}

/// Whether a put was refused for what it asks, and not for what ails the server or the line just now.
fn is_refusal(e: &Error) -> bool {
    // The status is kept in words only.
    let text = e.to_string();
    let status = text.split_once("status code: ").and_then(|(_, rest)| rest.get(..3)?.parse::<u16>().ok());
    status.is_some_and(|s| s == 501 || ((400..500).contains(&s) && ![408, 409, 412, 429].contains(&s)))
}

/// What to do where nobody gave keys and there are none to be had.
pub(super) const KEYLESS: &str = "AWS_ACCESS_KEY_ID is not set (the units read /etc/tillcast/hq.env, a command by hand does \
                                  not by itself), and the machine has no keys of its own";

/// Whether an error is of the pages by which a cloud gives its machines keys: without any in the settings they are asked.
pub(super) fn is_keyless(reason: &str) -> bool {
    ["/latest/api/token", "/latest/meta-data/"].iter().any(|page| reason.contains(page))
}

/// The key that is no path, where that is why a listing failed.
fn stray_key(e: &Error) -> Option<String> {
    use object_store::path::Error as Bad;
    match e {
        Error::InvalidPath { source: Bad::EmptySegment { path } | Bad::BadSegment { path, .. } } => Some(path.clone()),
        _ => None,
    }
}

/// Length and hash of an answer's body.
async fn hash_all(there: GetResult) -> Inner<(u64, Sha256)> {
    let mut body = there.into_stream();
    let (mut length, mut hash) = (0, Sha256Stream::default());
    while let Some(chunk) = body.next().await {
        let chunk = chunk?;
        length += chunk.len() as u64;
        hash.update(&chunk);
    }
    Ok((length, hash.finish()))
}

fn attributes(object: Option<&ObjectName>) -> Attributes {
    let mut attributes = Attributes::new();
    if let Some(object) = object {
        attributes.insert(Attribute::ContentType, object.content_type().into());
        attributes.insert(Attribute::CacheControl, object.cache_control().into());
    }
    attributes
}

fn put_options(object: Option<&ObjectName>, mode: PutMode) -> PutOptions {
    PutOptions { mode, attributes: attributes(object), ..PutOptions::default() }
}

/// The bytes of small content.
async fn read_whole(content: &Content<'_>) -> Inner<Bytes> {
    match content {
        Content::Bytes(b) => Ok(b.clone()),
        Content::File { path, sha256, .. } => {
            let (path, sha256) = (path.to_path_buf(), *sha256);
            let bytes = tokio::task::spawn_blocking(move || shelf::read_bounded(&path, SMALL)).await??;
            if Sha256::of(&bytes) != sha256 {
                return Err(Trouble::Failed("the file changed after it was written".into()));
            }
            Ok(bytes.into())
        }
    }
}
