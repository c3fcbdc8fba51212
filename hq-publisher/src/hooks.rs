//! Ways to people beside mail: a webhook that gets what the mail server does not take, and a sign of life for whoever
//! watches the watcher.
//!
//! Owns what goes over these lines. Must never show their addresses: they are keys. A mail that was told here and could
//! not be marked (the power went) is told again, under the same id.

use crate::alert::Notice;
use crate::config::{AlertsConfig, Config};
use crate::ledger::{Claimed, Ledger, LedgerError, Mail};
use crate::mail::{self, SendError, Smtp, Transport};
use proto::cli::with_causes;
use proto::clock::{Clock, after, before};
use proto::config::{ConfigError, Secret};
use proto::failpoint;
use reqwest::{Client, RequestBuilder};
use std::time::Duration;

/// The longest wait for an answer.
const TRY: Duration = Duration::from_secs(15);

/// Characters of an error that are shown.
const ERROR: usize = 300;

/// The lines of the settings.
#[derive(Debug, Clone)]
pub struct Hooks {
    webhook: Option<Line>,
    ping: Option<Line>,
}

#[derive(Debug, Clone)]
struct Line {
    client: Client,
    url: Secret,
}

impl Line {
    /// Only for a line that is wanted: a client needs the machine's certificates.
    fn new(url: Secret) -> Result<Line, ConfigError> {
        proto::fetch::install_tls();
        let client = Client::builder().timeout(TRY).user_agent(concat!("tillcast/", env!("CARGO_PKG_VERSION"))).build();
        let client = client.map_err(|e| ConfigError(format!("alerts: no HTTP client: {}", with_causes(&e))))?;
        Ok(Line { client, url })
    }
}

impl Hooks {
    /// Reads the settings; connects to nothing.
    pub fn new(alerts: &AlertsConfig) -> Result<Hooks, ConfigError> {
        let line = |url: &Option<Secret>| url.clone().map(Line::new).transpose();
        Ok(Hooks { webhook: line(&alerts.webhook)?, ping: line(&alerts.ping)? })
    }

    /// Whether somebody waits for signs of life.
    pub fn has_ping(&self) -> bool {
        self.ping.is_some()
    }

    /// Tells the webhook what a mail says: `{"text":…,"id":…,"subject":…,"body":…,"created_at":…}`; chats show `text`.
    pub async fn tell(&self, mail: &Mail) -> Result<(), SendError> {
        let Some(Line { client, url }) = &self.webhook else { return Ok(()) };
        let body = serde_json::json!({
            "text": format!("{}\n\n{}", mail.subject, mail.body),
            "id": mail.id,
            "subject": mail.subject,
            "body": mail.body,
            "created_at": mail.created_at,
        });
        let told = answered(client.post(url.reveal()).json(&body)).await;
        told.map_err(|e| SendError { text: shown(e), down: true, ..SendError::default() })
    }

    /// A sign of life.
    pub async fn ping(&self) -> Result<(), String> {
        let Some(Line { client, url }) = &self.ping else { return Ok(()) };
        answered(client.get(url.reveal())).await.map_err(shown)
    }
}

async fn answered(request: RequestBuilder) -> Result<(), reqwest::Error> {
    request.send().await.and_then(reqwest::Response::error_for_status).map(drop)
}

/// Without the address, which is a key.
fn shown(e: reqwest::Error) -> String {
    mail::one_line(&with_causes(&e.without_url()), ERROR)
}

/// Where there is no mail server, the webhook gets all.
impl Transport for Hooks {
    fn recipients(&self) -> Vec<String> {
        vec!["alerts.webhook".to_owned()]
    }

    async fn send(&self, mail: &Mail, _: &[String]) -> Result<(), SendError> {
        self.tell(mail).await
    }
}

/// All ways to people.
#[derive(Debug, Clone)]
pub struct Post {
    smtp: Option<Smtp>,
    hooks: Hooks,
    webhook_after: Duration,
    self_test: Duration,
}

/// The subject of the mail that only says that mails arrive.
const SELF_TEST: &str = "Alerts arrive";

impl Post {
    /// Reads the settings; connects to nothing.
    pub fn new(config: &Config) -> Result<Post, ConfigError> {
        Ok(Post {
            smtp: config.mail.as_ref().map(Smtp::new).transpose()?,
            hooks: Hooks::new(&config.alerts)?,
            webhook_after: config.alerts.webhook_after.0,
            self_test: config.alerts.self_test.0,
        })
    }

    /// Whoever watches the watcher.
    pub fn hooks(&self) -> &Hooks {
        &self.hooks
    }

    /// Sends what is in the outbox: to the mail server, and to the webhook what that has not taken for long; where there
    /// is no server, the webhook gets all, and where there is neither, what waits is put aside. What keeps it from going
    /// on.
    pub async fn deliver(&self, ledger: &Ledger, clock: &dyn Clock) -> Result<Option<String>, LedgerError> {
        let Some(smtp) = &self.smtp else {
            return match self.hooks.webhook {
                Some(_) => mail::drain(ledger, &self.hooks, clock).await,
                None => ledger.discard_mails(clock.now()).await.map(|()| None),
            };
        };
        let down = mail::drain(ledger, smtp, clock).await?;
        if self.hooks.webhook.is_none() {
            return Ok(down);
        }
        let mut most = 0;
        for Claimed { mail, refused, .. } in
            ledger.untold_mails(before(clock.now(), self.webhook_after), clock.now()).await?
        {
            let Err(e) = self.hooks.tell(&mail).await else {
                failpoint::around("mail.hooked", ledger.mail_told(&mail.id, clock.now())).await?;
                most = 0;
                continue;
            };
            let (refused, own_fault) = (refused + u32::from(!e.later.is_empty()), !e.down && e.later.is_empty());
            let next = after(clock.now(), mail::wait(mail.attempts + 1));
            ledger.mail_untold(&mail.id, own_fault, refused, next).await?;
            if e.down || (!own_fault && mail::holds_up(refused, most)) {
                let down = down.as_deref().unwrap_or("mails wait");
                return Ok(Some(format!("{down}; nor does the webhook (alerts.webhook) take them: {e}")));
            }
            most = most.max(if own_fault { 0 } else { refused });
            tracing::warn!(id = %mail.id, "the webhook (alerts.webhook) refused a mail, it is tried again later: {e}");
        }
        Ok(down)
    }

    /// Writes the mail that says that mails arrive, where none was written for so long: whoever misses it on its day
    /// knows that alerts do not arrive.
    pub async fn self_test(&self, ledger: &Ledger, clock: &dyn Clock) -> Result<(), LedgerError> {
        if self.smtp.is_none() || self.self_test.is_zero() {
            return Ok(());
        }
        let now = clock.now();
        let body = format!(
            "Nothing is wrong: this mail says that alerts arrive. The next one comes in {} (alerts.self_test); if it does \
             not, alerts do not either.\n",
            crate::fleet::long(self.self_test)
        );
        let notice = Notice { episodes: Vec::new(), subject: SELF_TEST.to_owned(), body };
        ledger.mail_now_and_then(&mail::compose(&notice, now), now, before(now, self.self_test)).await
    }
}
