//! Mails: written into the ledger's outbox, sent from there.
//!
//! Owns what a mail looks like and how it is handed to the SMTP server. Must never lose one: it leaves
//! the outbox when the server took it. If the power goes between, it is sent again under the same
//! Message-ID. Text from outside (names, reasons) is cleaned before it gets near a header.

use crate::alert::{self, Notice};
use crate::config::MailConfig;
use crate::ledger::{Episode, Ledger, LedgerError, Mail};
use lettre::address::Envelope;
use lettre::message::{Mailbox, header::ContentType};
use lettre::transport::smtp::client::{Certificate, Tls, TlsParameters};
use lettre::{AsyncSmtpTransport, AsyncTransport, Message, Tokio1Executor};
use proto::cli::with_causes;
use proto::clock::{Clock, Timestamp, after};
use proto::config::ConfigError;
use proto::failpoint;
use proto::ids::{Instance, StoreId};
use proto::retry::{Backoff, random_unit};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// Characters of a subject.
const SUBJECT: usize = 140;

/// Bytes of a body.
const BODY: usize = 64 << 10;

/// How long a claimed mail is one sender's; longer than any try.
const CLAIM: Duration = Duration::from_secs(180);

/// The longest try.
const TRY: Duration = Duration::from_secs(120);

/// Between tries of one mail.
const BETWEEN: Backoff = Backoff::new(Duration::from_secs(30), Duration::from_secs(900));

/// Tries at which a "not now" is borne; after them it holds up only the recipient whom it is said of.
const PATIENT: u32 = 5;

/// Why a mail was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct SendError {
    /// Whether this mail, not the server, is to blame: others may go on.
    pub of_this_mail: bool,
    /// What the server or the network said.
    pub text: String,
}

/// Hands one mail on.
pub trait Transport: Send + Sync {
    /// Done when the server took it.
    fn send(&self, mail: &Mail) -> impl Future<Output = Result<(), SendError>> + Send;
}

/// Without control characters (they would begin a new header, or a line that looks like ours), and cut.
pub fn one_line(text: &str, chars: usize) -> String {
    let mut out: String = text
        .chars()
        .map(|c| if c.is_control() || matches!(c, '\u{2028}' | '\u{2029}') { ' ' } else { c })
        .take(chars + 1)
        .collect();
    if out.chars().count() > chars {
        out = out.chars().take(chars - 1).chain(['…']).collect();
    }
    out
}

/// A mail of a notice, with a Message-ID that stays.
pub fn compose(notice: &Notice, now: Timestamp) -> Mail {
    let random = (random_unit().to_bits(), random_unit().to_bits());
    let mut body: String = notice.body.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect();
    if body.len() > BODY {
        let end = (0..=BODY).rev().find(|i| body.is_char_boundary(*i)).unwrap_or(0);
        body.truncate(end);
        body.push_str("\n… (cut)\n");
    }
    Mail {
        id: format!("{:016x}{:016x}@tillcast", random.0, random.1),
        subject: one_line(&format!("[Tillcast] {}", notice.subject), SUBJECT),
        body,
        created_at: now,
        attempts: 0,
        last_error: None,
    }
}

fn refused_key(instance: &Instance) -> String {
    format!("{}refused/{instance}/", alert::PUBLISH)
}

/// The instances of which a refusal is open.
pub async fn refused_instances(ledger: &Ledger) -> Result<BTreeSet<Instance>, LedgerError> {
    let before = format!("{}refused/", alert::PUBLISH);
    let open = ledger.open_episodes(&before).await?;
    Ok(open.iter().filter_map(|e| e.key.strip_prefix(&before)?.split('/').next()?.parse().ok()).collect())
}

/// A stream's publish was refused: opens the episode of (instance, reason) and writes its mail,
/// unless that episode is open. `reason` is a short stable name (`BAD_ROWS`, `SHRINK`, …), `text`
/// what people read (rows, counts, remedy).
pub async fn publish_refused(
    ledger: &Ledger,
    clock: &dyn Clock,
    instance: &Instance,
    reason: &str,
    text: &str,
) -> Result<(), LedgerError> {
    let now = clock.now();
    let subject = format!("Publishing {instance} was refused ({reason})");
    let body = format!("{subject}.\n\n{text}\n\nThe version before stays in the stores; other streams go on.\n");
    let notice = Notice { episodes: Vec::new(), subject: subject.clone(), body };
    let key = format!("{}{}", refused_key(instance), one_line(reason, 40));
    if ledger.open_episode(&key, &subject, &compose(&notice, now), now).await? {
        tracing::info!(%key, "mail written");
    }
    Ok(())
}

/// A stream was published, or had nothing to do: closes its episodes, with a mail for each.
pub async fn publish_recovered(ledger: &Ledger, clock: &dyn Clock, instance: &Instance) -> Result<(), LedgerError> {
    let now = clock.now();
    for episode in ledger.open_episodes(&refused_key(instance)).await? {
        ledger.close_episode(&episode.key, &compose(&alert::end(&episode, now), now), now).await?;
    }
    Ok(())
}

/// Opens the episode of anything else that a publish found (a mirror that lags, stores that vanished),
/// or closes it. `what` names it, e.g. `mirror`.
pub async fn publish_notice(
    ledger: &Ledger,
    clock: &dyn Clock,
    what: &str,
    problem: Option<(&str, &str)>,
) -> Result<(), LedgerError> {
    let now = clock.now();
    let key = format!("{}notice/{what}", alert::PUBLISH);
    match problem {
        Some((subject, text)) => {
            let notice =
                Notice { episodes: Vec::new(), subject: subject.to_owned(), body: format!("{subject}.\n\n{text}\n") };
            ledger.open_episode(&key, subject, &compose(&notice, now), now).await?;
        }
        None => {
            for episode in ledger.open_episodes(&key).await?.into_iter().filter(|e| e.key == key) {
                ledger.close_episode(&key, &compose(&alert::end(&episode, now), now), now).await?;
            }
        }
    }
    Ok(())
}

/// Opens an episode of each of these problems (by `what`, with subject and text), and closes those open ones whose `what`
/// begins so and is not among them.
pub async fn publish_notices(
    ledger: &Ledger,
    clock: &dyn Clock,
    begins: &str,
    problems: &BTreeMap<String, (String, String)>,
) -> Result<(), LedgerError> {
    for (what, (subject, text)) in problems {
        publish_notice(ledger, clock, what, Some((subject, text))).await?;
    }
    let before = format!("{}notice/", alert::PUBLISH);
    for episode in ledger.open_episodes(&format!("{before}{begins}")).await? {
        match episode.key.strip_prefix(&before) {
            Some(what) if !problems.contains_key(what) => publish_notice(ledger, clock, what, None).await?,
            _ => {}
        }
    }
    Ok(())
}

fn overtaken_key(store: &str) -> String {
    format!("{}notice/overtaken/{store}", alert::PUBLISH)
}

/// The bucket is ahead of the ledger for these stores: an episode of each that has none open, and one mail.
pub async fn publish_overtaken(
    ledger: &Ledger,
    clock: &dyn Clock,
    stores: &[&StoreId],
    text: &str,
) -> Result<(), LedgerError> {
    let now = clock.now();
    let open: BTreeSet<String> = ledger.open_episodes(&overtaken_key("")).await?.into_iter().map(|e| e.key).collect();
    let keys: Vec<String> =
        stores.iter().map(|s| overtaken_key(s.as_str())).filter(|key| !open.contains(key)).collect();
    let Some(first) = keys.first() else { return Ok(()) };
    let first = first.trim_start_matches(&overtaken_key(""));
    let subject = match keys.len() {
        1 => format!("The bucket is ahead of the ledger for store {first}"),
        n => format!("The bucket is ahead of the ledger for store {first} and {} more", n - 1),
    };
    let body = format!("{subject}.\n\n{text}\n");
    let notice = Notice { episodes: Vec::new(), subject: subject.clone(), body };
    let episodes: Vec<(String, String)> = keys.into_iter().map(|key| (key, subject.clone())).collect();
    ledger.open_many(&episodes, &compose(&notice, now), now).await?;
    Ok(())
}

/// A publish went above what was there: closes these episodes, with a mail for each that told of them.
pub async fn publish_caught_up(ledger: &Ledger, clock: &dyn Clock) -> Result<(), LedgerError> {
    let now = clock.now();
    let mut mails: BTreeMap<String, Vec<Episode>> = BTreeMap::new();
    for episode in ledger.open_episodes(&overtaken_key("")).await? {
        mails.entry(episode.text.clone()).or_default().push(episode);
    }
    for episodes in mails.into_values() {
        let Some(notice) = episodes.first().map(|e| alert::end(e, now)) else { continue };
        let all: Vec<(String, String)> = episodes.into_iter().map(|e| (e.key, e.text)).collect();
        ledger.close_many(&all, &compose(&notice, now), now).await?;
    }
    Ok(())
}

/// What [`send_one`] did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sent {
    /// Nothing was due.
    Nothing,
    /// One was taken.
    One,
    /// This one was not taken; others may be.
    Refused(String),
    /// The server cannot be used now.
    Down(String),
}

/// Sends the next mail that is due.
pub async fn send_one(ledger: &Ledger, transport: &impl Transport, clock: &dyn Clock) -> Result<Sent, LedgerError> {
    let claim = failpoint::around("mail.claim", ledger.claim_mail(clock.now(), CLAIM));
    let Some(mail) = claim.await? else { return Ok(Sent::Nothing) };
    let error = match failpoint::around("mail.send", transport.send(&mail)).await {
        Ok(()) => {
            failpoint::around("mail.sent", ledger.mail_sent(&mail.id, clock.now())).await?;
            return Ok(Sent::One);
        }
        Err(e) => e,
    };
    let wait = BETWEEN.delay(mail.attempts.saturating_sub(1), 0.5 + random_unit() / 2.0);
    let text = one_line(&error.text, 500);
    let failed = ledger.mail_failed(&mail.id, &text, error.of_this_mail, after(clock.now(), wait));
    failpoint::around("mail.failed", failed).await?;
    Ok(if error.of_this_mail { Sent::Refused(error.text) } else { Sent::Down(error.text) })
}

/// Sends what is due, until nothing is or the server cannot be used; what kept it from going on.
pub async fn drain(
    ledger: &Ledger,
    transport: &impl Transport,
    clock: &dyn Clock,
) -> Result<Option<String>, LedgerError> {
    loop {
        match send_one(ledger, transport, clock).await? {
            Sent::Nothing => return Ok(None),
            Sent::One => {}
            Sent::Refused(why) => tracing::warn!("a mail was refused, it is tried again later: {why}"),
            Sent::Down(why) => return Ok(Some(why)),
        }
    }
}

/// The SMTP server of the settings.
#[derive(Debug, Clone)]
pub struct Smtp {
    transport: AsyncSmtpTransport<Tokio1Executor>,
    from: Mailbox,
    to: Vec<Mailbox>,
}

impl Smtp {
    /// Reads the settings; connects to nothing.
    pub fn new(config: &MailConfig) -> Result<Smtp, ConfigError> {
        let bad = |what: &str, e: &dyn std::fmt::Display| ConfigError(format!("mail.{what}: {e}"));
        let url = config.smtp.reveal();
        let mut builder = AsyncSmtpTransport::<Tokio1Executor>::from_url(url)
            .map_err(|e| {
                bad(
                    "smtp",
                    &format!("{e}; write smtp://host:25, smtp://user:password@host:587?tls=required or smtps://…"),
                )
            })?
            .timeout(Some(config.timeout.0));
        if let Some(tls) = own_tls(url, config)? {
            builder = builder.tls(tls);
        }
        let mailbox =
            |text: &str, what| one_line(text, 320).parse::<Mailbox>().map_err(|e| bad(what, &format!("`{text}`: {e}")));
        Ok(Smtp {
            transport: builder.build(),
            from: mailbox(&config.from, "from")?,
            to: config.to.iter().map(|t| mailbox(t, "to")).collect::<Result<_, _>>()?,
        })
    }

    /// Says EHLO (and starts TLS, and logs in): for `doctor`.
    pub async fn test(&self) -> Result<(), String> {
        match self.transport.test_connection().await {
            Ok(true) => Ok(()),
            Ok(false) => Err("the server does not answer NOOP".into()),
            Err(e) => Err(with_causes(&e)),
        }
    }

    fn message(&self, mail: &Mail) -> Result<Message, String> {
        let mut builder = Message::builder()
            .from(self.from.clone())
            .subject(one_line(&mail.subject, SUBJECT))
            .message_id(Some(format!("<{}>", mail.id)))
            .header(ContentType::TEXT_PLAIN);
        for to in &self.to {
            builder = builder.to(to.clone());
        }
        builder.body(mail.body.clone()).map_err(|e| e.to_string())
    }

    /// One transaction for all; a server that refuses it (lettre gives up at the first recipient that is refused) is
    /// asked for each recipient alone, so that a dead address silences nobody else.
    async fn deliver(&self, message: &Message, attempts: u32) -> Result<(), SendError> {
        let bytes = message.formatted();
        let (from, all) = (message.envelope().from(), message.envelope().to());
        let Err(refused) = self.transport.send_raw(message.envelope(), &bytes).await else { return Ok(()) };
        let of_a_recipient = is_of_mail(&refused) || (attempts > PATIENT && refused.is_transient());
        if all.len() < 2 || !of_a_recipient {
            return Err(send_error(&refused));
        }
        let (mut taken, mut later, mut error) = (false, false, send_error(&refused));
        for to in all {
            let alone = Envelope::new(from.cloned(), vec![to.clone()])
                .map_err(|e| SendError { of_this_mail: true, text: e.to_string() })?;
            match self.transport.send_raw(&alone, &bytes).await {
                Ok(_) => taken = true,
                Err(e) => {
                    error = send_error(&e);
                    later |= !is_of_mail(&e);
                    tracing::warn!(%to, error = %error, "a recipient of mails was refused");
                }
            }
        }
        // Who could not be asked now is asked again for a while; the others may get it twice then, under one id.
        if taken && !(later && attempts <= PATIENT) { Ok(()) } else { Err(error) }
    }
}

/// A 5xx to this sender, recipient or text; while logging in it is the server's.
fn is_of_mail(e: &lettre::transport::smtp::Error) -> bool {
    e.is_permanent() && e.status().is_some_and(|s| u16::from(s) != 535 && u16::from(s) != 530)
}

fn send_error(e: &lettre::transport::smtp::Error) -> SendError {
    SendError { of_this_mail: is_of_mail(e), text: with_causes(e) }
}

/// TLS with certificates of one's own, in the way that the URL asks for.
fn own_tls(url: &str, config: &MailConfig) -> Result<Option<Tls>, ConfigError> {
    let Some(file) = &config.ca_file else { return Ok(None) };
    let bad = |e: &dyn std::fmt::Display| ConfigError(format!("mail.ca_file {}: {e}", file.display()));
    let parsed = url::Url::parse(url).map_err(|e| ConfigError(format!("mail.smtp: {e}")))?;
    let pem = proto::shelf::read_bounded(file, 1 << 20).map_err(|e| bad(&e))?;
    let host = parsed.host_str().unwrap_or_default().to_owned();
    let ca = Certificate::from_pem(&pem).map_err(|e| bad(&e))?;
    let parameters = TlsParameters::builder(host).add_root_certificate(ca).build().map_err(|e| bad(&e))?;
    let asked = parsed.query_pairs().find(|(k, _)| k == "tls").map(|(_, v)| v.into_owned());
    Ok(match (parsed.scheme(), asked.as_deref()) {
        ("smtps", _) => Some(Tls::Wrapper(parameters)),
        (_, Some("required")) => Some(Tls::Required(parameters)),
        (_, Some("opportunistic")) => Some(Tls::Opportunistic(parameters)),
        _ => None,
    })
}

impl Transport for Smtp {
    async fn send(&self, mail: &Mail) -> Result<(), SendError> {
        let this = |text: String| SendError { of_this_mail: true, text };
        let server = |text: String| SendError { of_this_mail: false, text };
        let (smtp, mail) = (self.clone(), mail.clone());
        // A task of its own: what a mail library does with odd text must not take the service down.
        let work = tokio::spawn(async move {
            let message = smtp.message(&mail).map_err(this)?;
            smtp.deliver(&message, mail.attempts).await
        });
        match tokio::time::timeout(TRY, work).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(panic)) => Err(this(format!("the mail could not be built: {panic}"))),
            Err(_) => Err(server(format!("no answer within {} s", TRY.as_secs()))),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proto::clock::TestClock;
    use std::sync::{Arc, Mutex};
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

    /// Takes mails, or fails as told.
    #[derive(Default)]
    struct Fake {
        taken: Mutex<Vec<Mail>>,
        fail: Mutex<Option<SendError>>,
    }
    impl Transport for Fake {
        async fn send(&self, mail: &Mail) -> Result<(), SendError> {
            if let Some(e) = self.fail.lock().unwrap().clone() {
                return Err(e);
            }
            self.taken.lock().unwrap().push(mail.clone());
            Ok(())
        }
    }
    impl Fake {
        fn fail(&self, of_this_mail: bool) {
            *self.fail.lock().unwrap() = Some(SendError { of_this_mail, text: "no".into() });
        }
        fn work(&self) {
            *self.fail.lock().unwrap() = None;
        }
        fn subjects(&self) -> Vec<String> {
            self.taken.lock().unwrap().iter().map(|m| m.subject.clone()).collect()
        }
    }

    async fn ledger(dir: &tempfile::TempDir) -> Ledger {
        Ledger::open_url(&format!("sqlite:{}", dir.path().join("fleet.db").display())).await.unwrap()
    }
    fn price() -> Instance {
        "price@zone-east".parse().unwrap()
    }
    const HOUR: Duration = Duration::from_secs(3600);

    #[tokio::test]
    async fn one_mail_for_a_refusal_one_for_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let (l, clock, fake) = (ledger(&dir).await, TestClock::at("2026-01-01T00:00:00Z"), Fake::default());
        for _ in 0..3 {
            publish_refused(&l, &clock, &price(), "BAD_ROWS", "row 7: name is too long").await.unwrap();
            clock.advance(HOUR);
        }
        publish_refused(&l, &clock, &price(), "SHRINK", "900 of 1000 rows would go").await.unwrap();
        publish_recovered(&l, &clock, &"price@all".parse().unwrap()).await.unwrap();
        assert_eq!(drain(&l, &fake, &clock).await.unwrap(), None);
        assert_eq!(
            fake.subjects(),
            [
                "[Tillcast] Publishing price@zone-east was refused (BAD_ROWS)",
                "[Tillcast] Publishing price@zone-east was refused (SHRINK)"
            ]
        );
        publish_recovered(&l, &clock, &price()).await.unwrap();
        publish_recovered(&l, &clock, &price()).await.unwrap();
        drain(&l, &fake, &clock).await.unwrap();
        assert_eq!(fake.subjects().len(), 4);
        assert!(fake.subjects()[2].starts_with("[Tillcast] Recovered: Publishing price@zone-east"));
        publish_notice(&l, &clock, "mirror", Some(("A mirror lags", "s3://b"))).await.unwrap();
        publish_notice(&l, &clock, "mirror", Some(("A mirror lags", "s3://b"))).await.unwrap();
        publish_notice(&l, &clock, "mirror", None).await.unwrap();
        publish_notice(&l, &clock, "mirror", None).await.unwrap();
        drain(&l, &fake, &clock).await.unwrap();
        assert_eq!(fake.subjects().len(), 6);
    }

    #[tokio::test]
    async fn a_dead_server_loses_nothing_and_a_bad_mail_holds_nobody_up() {
        let dir = tempfile::tempdir().unwrap();
        let (l, clock, fake) = (ledger(&dir).await, TestClock::at("2026-01-01T00:00:00Z"), Fake::default());
        for reason in ["A", "B"] {
            publish_refused(&l, &clock, &price(), reason, "x").await.unwrap();
        }
        fake.fail(false);
        for _ in 0..20 {
            assert!(drain(&l, &fake, &clock).await.unwrap().is_some(), "stops at the first");
            clock.advance(HOUR);
        }
        // Restarted, the server back: each once, under the Message-ID that it had.
        let before: Vec<String> = l.unsent_mails().await.unwrap().into_iter().map(|m| m.id).collect();
        let l = ledger(&dir).await;
        fake.work();
        drain(&l, &fake, &clock).await.unwrap();
        let after: Vec<String> = fake.taken.lock().unwrap().iter().map(|m| m.id.clone()).collect();
        assert_eq!(after, before);
        assert_eq!(drain(&l, &fake, &clock).await.unwrap(), None);
        assert_eq!(fake.subjects().len(), 2);

        // Down again for one; what comes meanwhile does not overtake it.
        for reason in ["D", "E"] {
            publish_refused(&l, &clock, &price(), reason, "x").await.unwrap();
            fake.fail(false);
            drain(&l, &fake, &clock).await.unwrap();
        }
        fake.work();
        publish_refused(&l, &clock, &price(), "F", "x").await.unwrap();
        drain(&l, &fake, &clock).await.unwrap();
        let last: Vec<String> =
            fake.subjects().split_off(2).iter().map(|s| s.replace(')', "").split_off(s.len() - 2)).collect();
        assert_eq!(last, ["D", "E", "F"]);

        publish_refused(&l, &clock, &price(), "C", "x").await.unwrap();
        fake.fail(true);
        assert_eq!(drain(&l, &fake, &clock).await.unwrap(), None, "put off, the others go on");
        assert_eq!(l.unsent_mails().await.unwrap()[0].last_error.as_deref(), Some("no"));
    }

    #[test]
    fn hostile_text_stays_out_of_headers() {
        let config = MailConfig {
            smtp: proto::config::Secret::new("smtp://127.0.0.1:1"),
            from: "Till\r\nBcc: x@y.z <tillcast@example.com>".into(),
            to: vec!["IT <it@example.com>".into(), "b@example.com".into()],
            ca_file: None,
            timeout: proto::config::HumanDuration(Duration::from_secs(1)),
        };
        // A name that will not do is refused, or harmless; it never panics.
        let config = match Smtp::new(&config) {
            Ok(_) | Err(_) => MailConfig { from: "Tillcast <tillcast@example.com>".into(), ..config },
        };
        let smtp = Smtp::new(&config).unwrap();
        let notice = Notice {
            episodes: Vec::new(),
            subject: format!("Zürich\r\nBcc: x@y.z\u{2028}{}", "a".repeat(200_000)),
            body: format!("line one\r\n.\r\nline\u{0} two {}", "é".repeat(100_000)),
        };
        let mail = compose(&notice, Timestamp::UNIX_EPOCH);
        assert!(mail.subject.chars().count() <= SUBJECT && mail.body.len() < BODY + 20);
        let text = String::from_utf8(smtp.message(&mail).unwrap().formatted()).unwrap();
        let head = text.split("\r\n\r\n").next().unwrap();
        assert!(!head.lines().any(|l| l.starts_with("Bcc")), "{head}");
        assert!(head.contains(&format!("Message-ID: <{}>", mail.id)), "{head}");
    }

    /// A mail server that answers `reply` to recipients whose address begins with `dead`; whom it took each mail for.
    async fn server(reply: &'static str) -> (String, Arc<Mutex<Vec<Vec<String>>>>) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("smtp://{}", listener.local_addr().unwrap());
        let taken = Arc::new(Mutex::new(Vec::new()));
        let mails = taken.clone();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                tokio::spawn(session(stream, reply, mails.clone()));
            }
        });
        (url, taken)
    }

    async fn session(stream: tokio::net::TcpStream, reply: &str, mails: Arc<Mutex<Vec<Vec<String>>>>) {
        let (read, mut write) = stream.into_split();
        let mut lines = BufReader::new(read).lines();
        let (mut to, mut in_data) = (Vec::new(), false);
        write.write_all(b"220 test\r\n").await.unwrap();
        while let Ok(Some(line)) = lines.next_line().await {
            let answer = match line.split([':', ' ']).next().unwrap_or_default() {
                "." if in_data => {
                    in_data = false;
                    mails.lock().unwrap().push(std::mem::take(&mut to));
                    "250 taken"
                }
                _ if in_data => continue,
                "MAIL" => {
                    to.clear();
                    "250 ok"
                }
                "RCPT" if line.contains("<dead") => reply,
                "RCPT" => {
                    to.push(line.split(['<', '>']).nth(1).unwrap().to_owned());
                    "250 ok"
                }
                "DATA" => {
                    in_data = true;
                    "354 go on"
                }
                "QUIT" => return,
                _ => "250 ok",
            };
            if write.write_all(format!("{answer}\r\n").as_bytes()).await.is_err() {
                return;
            }
        }
    }

    fn smtp(url: &str, to: &[&str]) -> Smtp {
        let config = MailConfig {
            smtp: proto::config::Secret::new(url),
            from: "a@example.com".into(),
            to: to.iter().map(|t| (*t).to_owned()).collect(),
            ca_file: None,
            timeout: proto::config::HumanDuration(Duration::from_secs(10)),
        };
        Smtp::new(&config).unwrap()
    }

    #[tokio::test]
    async fn a_dead_recipient_silences_nobody_else() {
        let mail = |attempts| {
            let notice = Notice { episodes: Vec::new(), subject: "s".into(), body: "b".into() };
            Mail { attempts, ..compose(&notice, Timestamp::UNIX_EPOCH) }
        };
        let all = ["it@example.com", "dead@example.com", "b@example.com"];
        let alone = [["it@example.com"], ["b@example.com"]];
        let (url, taken) = server("550 no such user").await;
        smtp(&url, &all).send(&mail(1)).await.unwrap();
        assert_eq!(*taken.lock().unwrap(), alone);
        let nobody = smtp(&url, &["dead@example.com", "dead2@example.com"]).send(&mail(1)).await.unwrap_err();
        assert!(nobody.of_this_mail && nobody.text.contains("no such user"), "{nobody:?}");
        smtp(&url, &["it@example.com", "b@example.com"]).send(&mail(1)).await.unwrap();
        assert_eq!(taken.lock().unwrap()[2..], [["it@example.com", "b@example.com"]], "one for all, if all are taken");

        // A full mailbox may have room again soon; but not for ever.
        let (url, taken) = server("452 mailbox full").await;
        let full = smtp(&url, &all).send(&mail(PATIENT)).await.unwrap_err();
        assert!(!full.of_this_mail && taken.lock().unwrap().is_empty(), "{full:?}");
        smtp(&url, &all).send(&mail(PATIENT + 1)).await.unwrap();
        assert_eq!(*taken.lock().unwrap(), alone);
    }

    #[test]
    fn addresses_and_servers_that_cannot_be_are_told() {
        let config = |smtp: &str, to: &str| MailConfig {
            smtp: proto::config::Secret::new(smtp),
            from: "a@example.com".into(),
            to: vec![to.into()],
            ca_file: None,
            timeout: proto::config::HumanDuration(Duration::from_secs(1)),
        };
        assert!(Smtp::new(&config("smtp://u:p%40ss@h:587?tls=required", "it@example.com")).is_ok());
        assert!(Smtp::new(&config("smtps://h", "it@example.com")).is_ok());
        let e = Smtp::new(&config("http://h", "it@example.com")).unwrap_err().to_string();
        assert!(e.starts_with("mail.smtp"), "{e}");
        let e = Smtp::new(&config("smtp://h", "nobody")).unwrap_err().to_string();
        assert!(e.starts_with("mail.to") && e.contains("nobody"), "{e}");
    }
}
