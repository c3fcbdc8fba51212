//! The SMTP server of the settings: a mail is one transaction for all, or one for each.
//!
//! Owns what is said to the server, and what its answers mean for whom. Must never wait without end, nor ask for
//! somebody who has the mail. Knows nothing of the ledger: what follows from an answer is `mail`'s.

use super::{SUBJECT, SendError, Transport, one_line};
use crate::config::MailConfig;
use crate::ledger::Mail;
use lettre::address::{Address, Envelope};
use lettre::message::{Mailbox, header::ContentType};
use lettre::transport::smtp::client::{Certificate, Tls, TlsParameters};
use lettre::{AsyncSmtpTransport, AsyncTransport, Message, Tokio1Executor};
use proto::cli::with_causes;
use proto::config::{ConfigError, HumanDuration};
use std::time::Duration;
use tokio::time::{Instant, timeout, timeout_at};

/// The longest that a server is waited for.
const TRY: Duration = Duration::from_secs(120);

/// How long into a try recipients are still asked one by one; who is left is asked at the next.
const ALONE: Duration = Duration::from_secs(60);

/// The SMTP server of the settings.
#[derive(Debug, Clone)]
pub struct Smtp {
    transport: AsyncSmtpTransport<Tokio1Executor>,
    from: Mailbox,
    to: Vec<Mailbox>,
    /// `mail.timeout`. The library holds to it while it connects, and waits for each answer without end.
    pub(super) timeout: HumanDuration,
    /// [`TRY`].
    pub(super) longest: Duration,
    /// [`ALONE`].
    pub(super) alone: Duration,
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
        let mailbox = |text: &str, what| {
            let mailbox = one_line(text, 320).parse::<Mailbox>().map_err(|e| e.to_string());
            mailbox.and_then(in_ascii).map_err(|e| bad(what, &format!("`{text}`: {e}")))
        };
        Ok(Smtp {
            transport: builder.build(),
            from: mailbox(&config.from, "from")?,
            to: config.to.iter().map(|t| mailbox(t, "to")).collect::<Result<_, _>>()?,
            timeout: config.timeout,
            longest: TRY,
            alone: ALONE,
        })
    }

    /// Says EHLO (and starts TLS, and logs in): for `doctor`.
    pub async fn test(&self) -> Result<(), String> {
        match timeout(self.timeout.0, self.transport.test_connection()).await {
            Ok(Ok(true)) => Ok(()),
            Ok(Ok(false)) => Err("the server does not answer NOOP".into()),
            Ok(Err(e)) => Err(with_causes(&e)),
            Err(_) => Err(format!("no answer within {} (mail.timeout); port 465 is for smtps://", self.timeout)),
        }
    }

    pub(super) fn message(&self, mail: &Mail) -> Result<Message, String> {
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
    /// asked for each recipient alone, so that a dead address silences nobody else. Where there is no time for all, the
    /// others are asked at the next try: who has it already must not get it again and again.
    async fn deliver(&self, mail: &Mail, to: &[String]) -> Result<(), SendError> {
        let began = Instant::now();
        let until = began + self.longest;
        let message = self.message(mail).map_err(|text| SendError { text, ..SendError::default() })?;
        let (from, bytes) = (message.envelope().from(), message.formatted());
        let mut to: Vec<Address> =
            self.to.iter().map(|m| m.email.clone()).filter(|a| to.contains(&a.to_string())).collect();
        let Err(refused) = self.ask(from, &to, &bytes, until).await else { return Ok(()) };
        if to.len() < 2 || refused.down {
            return Err(refused);
        }
        // Each try begins with another one: those that are refused may take all its time.
        let first = mail.attempts.saturating_sub(1) as usize % to.len();
        to.rotate_left(first);
        let mut all = SendError::default();
        for (n, one) in to.iter().enumerate() {
            if n > 0 && began.elapsed() >= self.alone {
                all.later.extend(to.iter().skip(n).map(ToString::to_string));
                all.text = format!("the server is slow: {} recipients are asked at the next try", to.len() - n);
                break;
            }
            // The first has a whole try's time: else a server that is as slow as that would never get a mail.
            let until = if n == 0 { Instant::now() + self.longest } else { until };
            match self.ask(from, std::slice::from_ref(one), &bytes, until).await {
                Ok(()) => all.taken.push(one.to_string()),
                Err(e) => {
                    tracing::warn!(to = %one, error = %e, "a recipient of mails was refused");
                    all.later.extend(e.later);
                    (all.text, all.down) = (e.text, e.down);
                }
            }
            if all.down {
                break;
            }
        }
        if all.text.is_empty() { Ok(()) } else { Err(all) }
    }

    async fn ask(&self, from: Option<&Address>, to: &[Address], bytes: &[u8], until: Instant) -> Result<(), SendError> {
        let bad = |text: String| SendError { text, ..SendError::default() };
        let envelope = Envelope::new(from.cloned(), to.to_vec()).map_err(|e| bad(e.to_string()))?;
        let Ok(sent) = timeout_at(until, self.transport.send_raw(&envelope, bytes)).await else {
            let text = format!("the server did not take it within {} s", self.longest.as_secs());
            return Err(SendError { down: true, ..bad(text) });
        };
        let Err(e) = sent else { return Ok(()) };
        let down = e.status().is_none_or(|s| LOGIN.contains(&u16::from(s)));
        let later = if e.is_transient() { to.iter().map(ToString::to_string).collect() } else { Vec::new() };
        Err(SendError { later, down, ..bad(with_causes(&e)) })
    }
}

/// What servers answer to a login that they do not take: all mails wait for it. Any other answer is about a mail's sender,
/// recipient or text.
const LOGIN: [u16; 6] = [432, 454, 530, 534, 535, 538];

/// With the domain's name as DNS has it. What few servers take would stand in the head of everybody's mail.
fn in_ascii(mailbox: Mailbox) -> Result<Mailbox, String> {
    let (user, domain) = (mailbox.email.user(), mailbox.email.domain());
    if !user.is_ascii() {
        return Err("few mail servers take letters beyond ASCII before the @; name another address of theirs".into());
    }
    if domain.is_ascii() {
        return Ok(mailbox);
    }
    let domain = url::Host::parse(domain).map_err(|e| e.to_string())?.to_string();
    let email = Address::new(user, domain).map_err(|e| e.to_string())?;
    Ok(Mailbox::new(mailbox.name, email))
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
    fn recipients(&self) -> Vec<String> {
        self.to.iter().map(|m| m.email.to_string()).collect()
    }

    async fn send(&self, mail: &Mail, to: &[String]) -> Result<(), SendError> {
        let (smtp, mail, to) = (self.clone(), mail.clone(), to.to_vec());
        // A task of its own: what a mail library does with odd text must not take the service down.
        let work = tokio::spawn(async move { smtp.deliver(&mail, &to).await });
        work.await.unwrap_or_else(|panic| {
            let text = format!("the mail could not be built: {panic}");
            Err(SendError { text, ..SendError::default() })
        })
    }
}
