//! Objects in S3 and what speaks like it.

use super::{Etag, FetchErrorKind, Opened, Small, SourceOptions, Trouble};
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpRequest, HttpResponse, HttpService, ReqwestConnector,
};
use object_store::path::Path;
use object_store::{
    BackoffConfig, Certificate, ClientOptions, GetOptions, GetRange, GetResult, ObjectStore, ObjectStoreExt,
    RetryConfig,
};
use std::sync::Arc;
use std::time::Duration;

const ERROR: usize = 16 << 10;
/// The time that an answer which is an error has for its body: what came by then is told.
const ERROR_TIME: Duration = Duration::from_secs(5);

/// Connects as usual, and reads no more than the beginning of errors.
#[derive(Debug)]
struct Bounded;

impl HttpConnector for Bounded {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(BoundedErrors(ReqwestConnector::default().connect(options)?)))
    }
}

/// A client for buckets that reads 16 KiB, and for 5 s, of an answer that is an error: object_store keeps all of it as
/// text, and no rate floor watches it.
#[derive(Debug)]
pub struct BoundedErrors(pub HttpClient);

// As async_trait writes it.
impl HttpService for BoundedErrors {
    fn call<'s, 'f>(&'s self, request: HttpRequest) -> BoxFuture<'f, Result<HttpResponse, HttpError>>
    where
        's: 'f,
        Self: 'f,
    {
        Box::pin(async move {
            let response = self.0.execute(request).await?;
            if response.status().is_success() {
                return Ok(response);
            }
            let (head, body) = response.into_parts();
            let (mut body, mut bytes) = (body.bytes_stream(), Vec::new());
            let read = async {
                while bytes.len() < ERROR
                    && let Some(chunk) = body.next().await
                {
                    bytes.extend_from_slice(&chunk?);
                }
                Ok::<(), HttpError>(())
            };
            tokio::time::timeout(ERROR_TIME, read).await.unwrap_or(Ok(()))?;
            bytes.truncate(ERROR);
            // What is no text, or was cut within a character, would hide the status.
            Ok(HttpResponse::from_parts(head, String::from_utf8_lossy(&bytes).into_owned().into()))
        })
    }
}

#[derive(Debug, Clone)]
pub(super) struct Bucket {
    store: Arc<AmazonS3>,
    prefix: Arc<str>,
    read_timeout: Duration,
}

impl Bucket {
    /// Keys, and what the options leave open, come from the usual AWS variables.
    pub(super) fn new(url: &url::Url, options: &SourceOptions) -> Result<Self, String> {
        Bucket::build(AmazonS3Builder::from_env(), url, options)
    }

    pub(super) fn build(builder: AmazonS3Builder, url: &url::Url, options: &SourceOptions) -> Result<Self, String> {
        super::install_tls();
        let bucket = url.host_str().filter(|b| !b.is_empty()).ok_or("write s3://bucket/prefix")?;
        let mut client = ClientOptions::new()
            .with_connect_timeout(options.connect_timeout.0)
            .with_read_timeout(options.read_timeout.0)
            // The whole download may take hours; the rate floor watches it.
            .with_timeout_disabled();
        if let Some(pem) = super::web::ca_pem(options)? {
            for ca in Certificate::from_pem_bundle(&pem).map_err(|e| format!("ca_file: {e}"))? {
                client = client.with_root_certificate(ca);
            }
        }
        let endpoint = options.s3.endpoint.as_deref();
        let plain = endpoint.is_some_and(|e| e.starts_with("http://"));
        let mut builder = builder
            .with_bucket_name(bucket)
            .with_http_connector(Bounded)
            .with_client_options(client.with_allow_http(plain))
            .with_virtual_hosted_style_request(options.s3.virtual_hosted)
            // Loops retry; this only bridges a dropped connection.
            .with_retry(RetryConfig {
                backoff: BackoffConfig::default(),
                max_retries: 1,
                retry_timeout: Duration::from_secs(10),
            });
        if let Some(endpoint) = endpoint {
            builder = builder.with_endpoint(endpoint);
        }
        if let Some(region) = &options.s3.region {
            builder = builder.with_region(region);
        }
        let prefix = url.path().trim_matches('/').to_owned();
        Path::parse(&prefix).map_err(|e| e.to_string())?;
        let store = builder.build().map_err(|e| e.to_string())?;
        Ok(Bucket { store: Arc::new(store), prefix: prefix.into(), read_timeout: options.read_timeout.0 })
    }

    fn path(&self, name: &str) -> Result<Path, Trouble> {
        let full = if self.prefix.is_empty() { name.to_owned() } else { format!("{}/{name}", self.prefix) };
        Path::parse(full).map_err(|e| Trouble::new(FetchErrorKind::Network, e.to_string()))
    }

    pub(super) async fn get_small(&self, name: &str, known: Option<&Etag>, max: u64) -> Result<Small, Trouble> {
        let options = GetOptions { if_none_match: known.map(|k| k.0.clone()), ..GetOptions::default() };
        let got = match self.store.get_opts(&self.path(name)?, options).await {
            Ok(got) => got,
            Err(object_store::Error::NotModified { .. }) if known.is_some() => return Ok(Small::Unchanged),
            Err(e) => return Err(trouble(&e)),
        };
        let etag = got.meta.e_tag.clone().map(Etag);
        if etag.is_some() && etag.as_ref() == known {
            // A server that ignores the condition.
            return Ok(Small::Unchanged);
        }
        if got.meta.size > max {
            return Err(Trouble::too_long(max));
        }
        let bytes = super::whole(self.chunks(got), max, self.read_timeout).await?;
        Ok(Small::Body { bytes: bytes.into(), etag })
    }

    pub(super) async fn open(&self, name: &str, start: u64) -> Result<Opened, Trouble> {
        let path = self.path(name)?;
        let options = GetOptions { range: (start > 0).then_some(GetRange::Offset(start)), ..GetOptions::default() };
        let got = match self.store.get_opts(&path, options).await {
            // A range past the end comes as an error of no kind; the length tells.
            Err(e) if start > 0 && matches!(e, object_store::Error::Generic { .. }) => {
                match self.store.head(&path).await {
                    Ok(meta) if meta.size <= start => {
                        return Ok(Opened {
                            start: 0,
                            total: Some(meta.size),
                            body: futures_util::stream::empty().boxed(),
                        });
                    }
                    _ => return Err(trouble(&e)),
                }
            }
            other => other.map_err(|e| trouble(&e))?,
        };
        let (start, total) = (got.range.start, Some(got.meta.size));
        Ok(Opened { start, total, body: self.chunks(got).boxed() })
    }

    fn chunks(
        &self,
        got: GetResult,
    ) -> impl futures_util::Stream<Item = Result<bytes::Bytes, Trouble>> + Send + Unpin + use<> {
        let not_whole = |e: object_store::Error| Trouble::new(FetchErrorKind::NotWhole, causes(&e));
        super::web::within(self.read_timeout, got.into_stream().map(move |c| c.map_err(not_whole)))
    }
}

fn trouble(e: &object_store::Error) -> Trouble {
    use object_store::Error as E;
    let kind = match e {
        E::NotFound { .. } => FetchErrorKind::NotFound,
        E::PermissionDenied { .. } | E::Unauthenticated { .. } => FetchErrorKind::Unauthorized,
        _ => FetchErrorKind::Network,
    };
    Trouble::new(kind, causes(e))
}

/// An error with its causes; many of them repeat each other.
pub(super) fn causes(e: &dyn std::error::Error) -> String {
    let mut text = e.to_string();
    let mut cause = e.source();
    while let Some(e) = cause {
        let more = e.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = e.source();
    }
    text
}
