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
use reqwest::redirect::Policy;
use reqwest::{Client, RequestBuilder};
use std::time::Duration;

/// The longest wait for an answer.
const TRY: Duration = Duration::from_secs(15);

/// Characters of an error that are shown.
const ERROR: usize = 300;

/// Bytes of a mail's text that the webhook is told, twice: with all else it stays below 28 KB, which chats take.
const TOLD: usize = 6 << 10;

/// Refusals that are about the address, the key or the moment, as a redirect is; any other 4xx is about what was sent.
const NOT_OF_THE_MAIL: [u16; 8] = [401, 403, 404, 405, 407, 408, 410, 429];

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
    fn new(url: Secret, redirects: Policy) -> Result<Line, ConfigError> {
        proto::fetch::install_tls();
        let client = Client::builder().timeout(TRY).user_agent(concat!("tillcast/", env!("CARGO_PKG_VERSION")));
        let client = client
            .redirect(redirects)
            .build()
            .map_err(|e| ConfigError(format!("alerts: no HTTP client: {}", with_causes(&e))))?;
        Ok(Line { client, url })
    }
}

impl Hooks {
    /// Reads the settings; connects to nothing.
    pub fn new(alerts: &AlertsConfig) -> Result<Hooks, ConfigError> {
        let line = |url: &Option<Secret>, redirects| url.clone().map(|url| Line::new(url, redirects)).transpose();
        // A redirected POST is asked again without what it was to tell; whatever page answers that would count as told.
        Ok(Hooks { webhook: line(&alerts.webhook, Policy::none())?, ping: line(&alerts.ping, Policy::default())? })
    }

    /// Whether somebody waits for signs of life.
    pub fn has_ping(&self) -> bool {
        self.ping.is_some()
    }

    /// Tells the webhook what a mail says: `{"text":…,"id":…,"subject":…,"body":…,"created_at":…}`; chats show `text`.
    pub async fn tell(&self, mail: &Mail) -> Result<(), SendError> {
        let Some(Line { client, url }) = &self.webhook else { return Ok(()) };
        let body = mail::cut(mail.body.clone(), TOLD);
        let told = serde_json::json!({
            "text": format!("{}\n\n{body}", mail.subject),
            "id": mail.id,
            "subject": mail.subject,
            "body": body,
            "created_at": mail.created_at,
        });
        let Err(Refused { status, text }) = answered(client.post(url.reveal()).json(&told)).await else {
            return Ok(());
        };
        let later = if status.is_some_and(|s| s >= 500) { self.recipients() } else { Vec::new() };
        let down = status.is_none_or(|s| s < 400 || NOT_OF_THE_MAIL.contains(&s));
        Err(SendError { text, later, down, ..SendError::default() })
    }

    /// A sign of life.
    pub async fn ping(&self) -> Result<(), String> {
        let Some(Line { client, url }) = &self.ping else { return Ok(()) };
        answered(client.get(url.reveal())).await.map_err(|e| e.text)
    }
}

/// Why a line did not take something.
struct Refused {
    /// What it answered, where it did.
    status: Option<u16>,
    /// Without the address, which is a key.
    text: String,
}

impl From<reqwest::Error> for Refused {
    fn from(e: reqwest::Error) -> Refused {
        let status = e.status().map(|s| s.as_u16());
        Refused { status, text: mail::one_line(&with_causes(&e.without_url()), ERROR) }
    }
}

async fn answered(request: RequestBuilder) -> Result<(), Refused> {
    let status = request.send().await?.error_for_status()?.status();
    if status.is_success() {
        return Ok(());
    }
    let text = format!("it answers {status}, a redirect: put the address that it leads to into the settings");
    Err(Refused { status: Some(status.as_u16()), text })
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
    /// is no server, the webhook gets all, and where there is neither, what has waited for an hour is put aside. What
    /// keeps it from going on.
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
        for Claimed { mail, refused, own_fault: passed, .. } in
            ledger.untold_mails(before(clock.now(), self.webhook_after), clock.now()).await?
        {
            // Another `serve`, or a `publish`, tells it: those after it are its too.
            if !ledger.claim_untold(&mail.id, clock.now(), 2 * TRY).await? {
                break;
            }
            let Err(e) = self.hooks.tell(&mail).await else {
                failpoint::around("mail.hooked", ledger.mail_told(&mail.id, clock.now())).await?;
                most = 0;
                continue;
            };
            let (refused, own_fault) = (refused + u32::from(!e.later.is_empty()), !e.down && e.later.is_empty());
            let next = after(clock.now(), mail::wait(mail.attempts + 1));
            ledger.mail_untold(&mail.id, own_fault, refused, next).await?;
            if e.down || (!own_fault && !passed && mail::holds_up(refused, most)) {
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::config::MailConfig;
    use proto::clock::{TestClock, Timestamp};
    use proto::config::HumanDuration;
    use std::sync::atomic::{AtomicU16, Ordering};
    use tillcast_tests::liar::{Asked, Liar, Say};

    const SECOND: Duration = Duration::from_secs(1);
    const HOUR: Duration = Duration::from_secs(3600);

    fn smtp(url: &str) -> Smtp {
        let config = MailConfig {
            smtp: Secret::new(url),
            from: "a@example.com".into(),
            to: vec!["it@example.com".into()],
            ca_file: None,
            timeout: HumanDuration(SECOND),
        };
        Smtp::new(&config).unwrap()
    }

    fn post(smtp: Option<Smtp>, webhook: Option<&Liar>) -> Post {
        let webhook = webhook.map(|w| Secret::new(w.url()));
        let hooks = Hooks::new(&AlertsConfig { webhook, ..AlertsConfig::default() }).unwrap();
        Post { smtp, hooks, webhook_after: SECOND, self_test: HOUR }
    }

    /// A ledger with a mail of each of these subjects.
    async fn outbox(dir: &tempfile::TempDir, clock: &TestClock, subjects: &[&str]) -> Ledger {
        let ledger = Ledger::open_url(&format!("sqlite:{}", dir.path().join("fleet.db").display())).await.unwrap();
        for subject in subjects {
            add(&ledger, clock, subject).await;
        }
        ledger
    }
    async fn add(ledger: &Ledger, clock: &TestClock, subject: &str) {
        let notice = Notice { episodes: Vec::new(), subject: subject.into(), body: "b".into() };
        ledger.open_episode(subject, "x", &mail::compose(&notice, clock.now()), clock.now()).await.unwrap();
    }

    fn says(asked: &Asked, word: &str) -> bool {
        String::from_utf8_lossy(&asked.body).contains(word)
    }
    /// The last word of the subject that it was told.
    fn subject(asked: &Asked) -> String {
        let told: serde_json::Value = serde_json::from_slice(&asked.body).unwrap();
        told["subject"].as_str().unwrap().rsplit(' ').next().unwrap().to_owned()
    }
    /// What it was told, in order.
    fn told(hook: &Liar) -> Vec<String> {
        hook.asked().iter().map(subject).collect()
    }

    /// Delivers every 2 s for so long.
    async fn deliver_for(time: Duration, post: &Post, ledger: &Ledger, clock: &TestClock) {
        for _ in 0..time.as_secs() / 2 {
            clock.advance(2 * SECOND);
            post.deliver(ledger, clock).await.unwrap();
        }
    }

    /// 413 is about the mail; 502 may be, if it comes again and again; 404 and 429 are not.
    #[tokio::test]
    async fn what_the_webhook_will_not_take_holds_up_no_other_mail() {
        for (dead, status) in
            [(None, 413), (None, 502), (Some("smtp://127.0.0.1:1"), 413), (Some("smtp://127.0.0.1:1"), 502)]
        {
            let dir = tempfile::tempdir().unwrap();
            let clock = TestClock::at("2026-01-01T00:00:00Z");
            let ledger = outbox(&dir, &clock, &["bad", "second", "third"]).await;
            let hook = Liar::start(move |a| match subject(a).as_str() {
                "bad" => Say::Whole(status, String::new(), Vec::new()),
                _ => Say::ok("ok"),
            });
            let post = post(dead.map(smtp), Some(&hook));
            deliver_for(2 * SECOND, &post, &ledger, &clock).await;
            match status {
                413 => assert_eq!(told(&hook), ["bad", "second", "third"], "{dead:?}"),
                _ => assert_eq!(told(&hook), ["bad"], "{dead:?}: the order is kept for a while"),
            }
            deliver_for(HOUR / 6, &post, &ledger, &clock).await;
            let all = told(&hook);
            let times = |subject: &str| all.iter().filter(|s| *s == subject).count();
            assert_eq!((times("second"), times("third")), (1, 1), "{dead:?} {status}: {all:?}");
            assert!((3..=8).contains(&times("bad")), "{dead:?} {status}: {all:?}");
            let waits: Vec<String> = ledger.unsent_mails().await.unwrap().into_iter().map(|m| m.subject).collect();
            match dead {
                Some(_) => assert_eq!(waits.len(), 3, "the mail server has none"),
                None => assert_eq!(waits, ["[Tillcast] bad"]),
            }
        }
    }

    #[tokio::test]
    async fn an_address_that_takes_nothing_keeps_the_order_and_is_not_asked_without_end() {
        for dead in [None, Some("smtp://127.0.0.1:1")] {
            let dir = tempfile::tempdir().unwrap();
            let clock = TestClock::at("2026-01-01T00:00:00Z");
            let ledger = outbox(&dir, &clock, &["first", "second"]).await;
            static STATUS: AtomicU16 = AtomicU16::new(0);
            let hook = Liar::start(|_| Say::Whole(STATUS.load(Ordering::Relaxed), String::new(), Vec::new()));
            let post = post(dead.map(smtp), Some(&hook));
            for status in [404, 429, 503] {
                STATUS.store(status, Ordering::Relaxed);
                let before = told(&hook).len();
                deliver_for(HOUR, &post, &ledger, &clock).await;
                let asked = told(&hook).split_off(before);
                assert!(asked.len() <= 20, "{dead:?} {status}: {}", asked.len());
                assert!(
                    asked[0] == "first" && post.deliver(&ledger, &clock).await.unwrap().is_some(),
                    "{dead:?} {status}"
                );
            }
            STATUS.store(200, Ordering::Relaxed);
            let before = told(&hook).len();
            deliver_for(HOUR / 3, &post, &ledger, &clock).await;
            assert_eq!(told(&hook).split_off(before), ["first", "second"], "{dead:?}");
        }
    }

    #[tokio::test]
    async fn two_that_deliver_at_once_tell_each_mail_once() {
        let dir = tempfile::tempdir().unwrap();
        let clock = TestClock::at("2026-01-01T00:00:00Z");
        let ledger = outbox(&dir, &clock, &["first", "second"]).await;
        clock.advance(2 * SECOND);
        let hook = Liar::start(|_| Say::ok("ok"));
        let post = post(Some(smtp("smtp://127.0.0.1:1")), Some(&hook));
        let (one, other) = tokio::join!(post.deliver(&ledger, &clock), post.deliver(&ledger, &clock));
        assert!(one.unwrap().is_some() && other.unwrap().is_some(), "the mail server is dead");
        // One of them may have found the first one taken, and left the rest to the other.
        post.deliver(&ledger, &clock).await.unwrap();
        assert_eq!(told(&hook), ["first", "second"]);
    }

    /// As nginx leads from `http` to `https`, or to the page of a login: that answers 200, and has read nothing.
    #[tokio::test]
    async fn a_webhook_that_leads_elsewhere_has_taken_nothing() {
        for (status, location) in [(302, "location: /login\r\n"), (307, "location: /login\r\n"), (304, "")] {
            let dir = tempfile::tempdir().unwrap();
            let clock = TestClock::at("2026-01-01T00:00:00Z");
            let ledger = outbox(&dir, &clock, &["first", "second"]).await;
            let hook = Liar::start(move |a| match a.target.as_str() {
                "/login" => Say::ok("who are you?"),
                _ => Say::Whole(status, location.into(), Vec::new()),
            });
            let post = post(None, Some(&hook));
            let held = post.deliver(&ledger, &clock).await.unwrap().unwrap();
            assert!(held.contains("a redirect") && !held.contains(&hook.url()), "{status}: {held}");
            assert_eq!(told(&hook), ["first"], "{status}: what it does not take holds up the others");
            // Its right address is there.
            hook.now(|_| Say::ok("ok"));
            deliver_for(HOUR / 3, &post, &ledger, &clock).await;
            assert_eq!(told(&hook), ["first", "first", "second"], "{status}");
        }
    }

    #[tokio::test]
    async fn the_webhook_is_told_no_more_than_chats_take() {
        let hook = Liar::start(|a| match a.body.len() < 28_000 {
            true => Say::ok("ok"),
            false => Say::Whole(413, String::new(), Vec::new()),
        });
        for body in ["\"\n".repeat(100_000), "ü€".repeat(50_000), "short".into()] {
            let notice = Notice { episodes: Vec::new(), subject: "\"".repeat(1000), body };
            post(None, Some(&hook)).hooks.tell(&mail::compose(&notice, Timestamp::UNIX_EPOCH)).await.unwrap();
        }
        let texts: Vec<bool> = hook.asked().iter().map(|a| says(a, "(cut)")).collect();
        assert_eq!(texts, [true, true, false]);
        assert!(hook.asked().iter().all(|a| says(a, "Written at 1970-01-01T00:00:00Z.")), "it may come late");
    }

    /// A service that began before `[mail]` was in the settings must not throw away what a publish that knows of it wrote.
    #[tokio::test]
    async fn what_nobody_is_to_be_told_of_is_put_aside_after_an_hour() {
        let dir = tempfile::tempdir().unwrap();
        let clock = TestClock::at("2026-01-01T00:00:00Z");
        let ledger = outbox(&dir, &clock, &["old"]).await;
        let waits = async || ledger.unsent_mails().await.unwrap().len();
        clock.advance(HOUR / 2);
        add(&ledger, &clock, "new").await;
        for left in [2, 1, 0] {
            post(None, None).deliver(&ledger, &clock).await.unwrap();
            assert_eq!(waits().await, left);
            clock.advance(HOUR / 2);
        }
        add(&ledger, &clock, "newest").await;
        post(None, None).deliver(&ledger, &clock).await.unwrap();
        // Restarted with the new settings, it finds it.
        let hook = Liar::start(|_| Say::ok("ok"));
        post(None, Some(&hook)).deliver(&ledger, &clock).await.unwrap();
        assert_eq!((told(&hook), waits().await), (vec!["newest".to_owned()], 0));
    }
}
