//! How long an S3 server is waited for.
//!
//! A client's read timeout runs from the start of a request to the head of its answer, the upload included, and would
//! fail every large put on a slow line for good. Puts have a deadline by their size instead.

use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpService, ReqwestConnector,
};
use proto::fetch::BoundedErrors;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

/// A server may be silent for so long.
const SILENCE: Duration = Duration::from_secs(60);

/// Bytes a second that a line takes at least, for all puts under way together.
const SLOW: u32 = 64 << 10;

/// No put takes longer.
const MOST: Duration = Duration::from_secs(3600);

/// How long a put of so many bytes may take, of so many under way.
fn patience(bytes: usize, puts: usize) -> Duration {
    let all = u32::try_from(bytes.saturating_mul(puts)).unwrap_or(u32::MAX);
    (SILENCE + Duration::from_secs(u64::from(all / SLOW))).min(MOST)
}

/// Makes clients that wait so.
#[derive(Debug)]
pub(super) struct Patient;

impl HttpConnector for Patient {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let client = |options: &ClientOptions| {
            Ok::<_, object_store::Error>(HttpClient::new(BoundedErrors(ReqwestConnector::default().connect(options)?)))
        };
        let others = client(&options.clone().with_read_timeout(SILENCE))?;
        // What an error says is read within the deadline, too.
        let puts = Puts { client: client(options)?, under_way: Arc::default(), patience };
        Ok(HttpClient::new(Split { puts, others }))
    }
}

#[derive(Debug)]
struct Split {
    puts: Puts,
    others: HttpClient,
}

type Answer<'a> = Pin<Box<dyn Future<Output = Result<HttpResponse, HttpError>> + Send + 'a>>;

impl HttpService for Split {
    fn call<'a, 'b>(&'a self, request: HttpRequest) -> Answer<'b>
    where
        'a: 'b,
        Self: 'b,
    {
        if request.method() == http::Method::PUT {
            Box::pin(self.puts.put(request))
        } else {
            Box::pin(self.others.execute(request))
        }
    }
}

#[derive(Debug)]
struct Puts {
    client: HttpClient,
    /// One more for each put under way.
    under_way: Arc<()>,
    patience: fn(usize, usize) -> Duration,
}

impl Puts {
    async fn put(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let one = Arc::clone(&self.under_way);
        let (bytes, began) = (request.body().content_length(), Instant::now());
        let allowed = || (self.patience)(bytes, Arc::strong_count(&one) - 1);
        let mut answer = pin!(self.client.execute(request));
        let mut wait = allowed();
        loop {
            match timeout_at(began + wait, &mut answer).await {
                Ok(answer) => return answer,
                // More puts came to share the line.
                Err(_) if allowed() > wait => wait = allowed(),
                Err(late) => return Err(HttpError::new(HttpErrorKind::Timeout, late)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_slow_line_has_time_and_a_silent_server_an_end() {
        assert_eq!(patience(4000, 1), SILENCE);
        assert_eq!(patience(8 << 20, 1), SILENCE + Duration::from_secs(128));
        assert_eq!(patience(8 << 20, 4), SILENCE + Duration::from_secs(512));
        assert_eq!(patience(8 << 20, 128), MOST);
        assert_eq!(patience(usize::MAX, 2), MOST);
    }

    /// Never answers.
    #[derive(Debug)]
    struct Silent;
    impl HttpService for Silent {
        fn call<'a, 'b>(&'a self, _: HttpRequest) -> Answer<'b>
        where
            'a: 'b,
            Self: 'b,
        {
            Box::pin(std::future::pending())
        }
    }

    #[tokio::test]
    async fn a_put_waits_for_the_others_and_ends() {
        // Alone it has no time at all, beside another a moment.
        let patience = |_, puts: usize| Duration::from_millis(50 * (puts as u64 - 1));
        let puts = Puts { client: HttpClient::new(Silent), under_way: Arc::default(), patience };
        let request = || http::Request::put("http://s/b").body("x".to_owned().into()).unwrap();
        let began = Instant::now();
        assert_eq!(puts.put(request()).await.unwrap_err().kind(), HttpErrorKind::Timeout);
        let (a, b) = tokio::join!(puts.put(request()), puts.put(request()));
        assert!(a.is_err() && b.is_err() && began.elapsed() >= Duration::from_millis(50));
    }
}
