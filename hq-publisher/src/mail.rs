//! Mails: written into the ledger's outbox, sent from there.
//!
//! Owns what a mail looks like and how it is handed to the SMTP server. Must never lose one: it leaves
//! the outbox when the server took it for all (but who is refused for good, or for a day). If the power
//! goes between, it is sent again under the same Message-ID. Text from outside (names, reasons) is cleaned
//! before it gets near a header.

use crate::alert::{self, Notice};
use crate::config::MailConfig;
use crate::ledger::{Claimed, Episode, Failed, Ledger, LedgerError, Mail, Taken};
use lettre::address::{Address, Envelope};
use lettre::message::{Mailbox, header::ContentType};
use lettre::transport::smtp::client::{Certificate, Tls, TlsParameters};
use lettre::{AsyncSmtpTransport, AsyncTransport, Message, Tokio1Executor};
use proto::cli::with_causes;
use proto::clock::{Clock, Timestamp, after, since};
use proto::config::{ConfigError, HumanDuration};
use proto::failpoint;
use proto::ids::{Instance, StoreId};
use proto::retry::{Backoff, random_unit};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tokio::time::{Instant, timeout, timeout_at};

/// Characters of an error that are kept.
const ERROR: usize = 500;

/// Characters of a subject.
const SUBJECT: usize = 140;

/// Bytes of a body.
const BODY: usize = 64 << 10;

/// How long a claimed mail is one sender's; longer than any try, which asks for all and then for one alone at least.
const CLAIM: Duration = Duration::from_secs(300);

/// The longest that a server is waited for.
const TRY: Duration = Duration::from_secs(120);

/// How long into a try recipients are still asked one by one; who is left is asked at the next.
const ALONE: Duration = Duration::from_secs(60);

/// Between tries of one mail.
const BETWEEN: Backoff = Backoff::new(Duration::from_secs(30), Duration::from_secs(900));

/// How often a "not now" to a mail holds up those behind it; after that the next one is tried too.
const PATIENT: u32 = 3;

/// Whether those behind a mail that is not taken now, for the so-many-th time, are held up. `most`: times of one before it
/// that holds up nobody any more; where the receiver takes none, each round goes one mail further.
pub fn holds_up(refused: u32, most: u32) -> bool {
    refused <= if most > PATIENT { 1 } else { PATIENT }
}

/// How long a "not now" of some recipients is borne when others have the mail.
const PATIENCE: Duration = Duration::from_secs(86_400);

/// The wait after so many tries.
pub fn wait(tries: u32) -> Duration {
    BETWEEN.delay(tries.saturating_sub(1), 0.5 + random_unit() / 2.0)
}

/// Why a mail was not taken by all. Where it is neither `later` nor `down`, it was refused for good.
#[derive(Debug, Clone, Default, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct SendError {
    /// What the server or the network said.
    pub text: String,
    /// Who took it nevertheless.
    pub taken: Vec<String>,
    /// Who said "not now", or could not be asked in this try.
    pub later: Vec<String>,
    /// Whether the server cannot be used: no other mail need be tried.
    pub down: bool,
}

/// Hands mails on.
pub trait Transport: Send + Sync {
    /// Who is to get each mail.
    fn recipients(&self) -> Vec<String>;
    /// Hands one to these of them; done when all took it.
    fn send(&self, mail: &Mail, to: &[String]) -> impl Future<Output = Result<(), SendError>> + Send;
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

/// At most so many bytes of a text, and a line that says so.
pub fn cut(mut text: String, bytes: usize) -> String {
    if text.len() > bytes {
        let end = (0..=bytes).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0);
        text.truncate(end);
        text.push_str("\n… (cut)\n");
    }
    text
}

/// A mail of a notice, with a Message-ID that stays. It says first when it was written, which no cut takes away: "for 5 min"
/// is of then, and mail servers date it when they get it.
pub fn compose(notice: &Notice, now: Timestamp) -> Mail {
    let random = (random_unit().to_bits(), random_unit().to_bits());
    let body: String = notice.body.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect();
    Mail {
        id: format!("{:016x}{:016x}@tillcast", random.0, random.1),
        subject: one_line(&format!("[Tillcast] {}", notice.subject), SUBJECT),
        body: cut(format!("Written at {now}.\n\n{body}"), BODY),
        created_at: now,
        attempts: 0,
        last_error: None,
    }
}

fn refused_key() -> String {
    format!("{}refused/", alert::PUBLISH)
}

/// The refusals that are open, with their instances.
async fn refusals(ledger: &Ledger) -> Result<Vec<(Instance, Episode)>, LedgerError> {
    let before = refused_key();
    let of = |e: Episode| Some((e.key.strip_prefix(&before)?.split('/').next()?.parse::<Instance>().ok()?, e));
    Ok(ledger.open_episodes(&before).await?.into_iter().filter_map(of).collect())
}

/// The instances of which a refusal is open, for whatever reason but this.
pub async fn refused_instances(ledger: &Ledger, but: Option<&str>) -> Result<BTreeSet<Instance>, LedgerError> {
    let counts = |e: &Episode| but.is_none_or(|but| !e.key.ends_with(&format!("/{but}")));
    Ok(refusals(ledger).await?.into_iter().filter(|(_, e)| counts(e)).map(|(instance, _)| instance).collect())
}

/// An instance whose publish was refused.
#[derive(Debug, Clone)]
pub struct Refused {
    /// Which.
    pub instance: Instance,
    /// A short stable name (`BAD_ROWS`, `SHRINK`, …).
    pub reason: String,
    /// What people read (rows, counts, remedy).
    pub text: String,
}

/// Publishes were refused: opens the episode of each (instance, reason) that is not open. Many of one reason share a
/// mail: a column that was renamed at the source is one event.
pub async fn publish_refused(ledger: &Ledger, clock: &dyn Clock, all: &[Refused]) -> Result<(), LedgerError> {
    if all.is_empty() {
        return Ok(());
    }
    let now = clock.now();
    let open = ledger.open_episodes(&refused_key()).await?;
    let known: BTreeSet<&str> = open.iter().map(|e| e.key.as_str()).collect();
    let mut begin: BTreeMap<&str, BTreeMap<String, Notice>> = BTreeMap::new();
    for Refused { instance, reason, text } in all {
        let key = format!("{}{instance}/{}", refused_key(), one_line(reason, 40));
        if known.contains(key.as_str()) {
            continue;
        }
        let subject = format!("Publishing {instance} was refused ({reason})");
        let body = format!("{subject}.\n\n{text}\n\nThe version before stays in the stores; other streams go on.\n");
        let notice = Notice { episodes: vec![(key.clone(), subject.clone())], subject, body };
        begin.entry(reason).or_default().entry(key).or_insert(notice);
    }
    for of_reason in begin.into_values() {
        open_all(ledger, of_reason.into_values(), now).await?;
    }
    Ok(())
}

/// These were published, or had nothing to do: closes their episodes. Many at once share a mail.
pub async fn publish_recovered(
    ledger: &Ledger,
    clock: &dyn Clock,
    instances: &BTreeSet<Instance>,
) -> Result<(), LedgerError> {
    let now = clock.now();
    let open = refusals(ledger).await?;
    close_all(ledger, open.iter().filter(|(i, _)| instances.contains(i)).map(|(_, e)| e), now).await
}

/// Opens the episode of anything else that a publish found (a mirror that lags, a list that is not taken),
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
/// begins so and is not among them. Many at once share a mail.
pub async fn publish_notices(
    ledger: &Ledger,
    clock: &dyn Clock,
    begins: &str,
    problems: &BTreeMap<String, (String, String)>,
) -> Result<(), LedgerError> {
    let before = format!("{}notice/", alert::PUBLISH);
    let begin = |(what, (subject, text)): (&String, &(String, String))| {
        let (key, body) = (format!("{before}{what}"), format!("{subject}.\n\n{text}\n"));
        (key.clone(), Notice { episodes: vec![(key, subject.clone())], subject: subject.clone(), body })
    };
    agree(ledger, clock, &format!("{before}{begins}"), problems.iter().map(begin).collect()).await
}

/// Opens the episodes of these notices; many at once share a mail.
async fn open_all(ledger: &Ledger, all: impl Iterator<Item = Notice>, now: Timestamp) -> Result<(), LedgerError> {
    for n in alert::fold(all, "") {
        if ledger.open_many(&n.episodes, &compose(&n, now), now).await? {
            tracing::info!(subject = %n.subject, "mail written");
        }
    }
    Ok(())
}

/// Closes these episodes, likewise.
async fn close_all<'e>(
    ledger: &Ledger,
    over: impl Iterator<Item = &'e Episode>,
    now: Timestamp,
) -> Result<(), LedgerError> {
    for n in alert::fold(over.map(|e| alert::end(e, now)), "Recovered: ") {
        ledger.close_many(&n.episodes, &compose(&n, now), now).await?;
    }
    Ok(())
}

/// Makes the open episodes whose keys begin so agree with these notices.
async fn agree(
    ledger: &Ledger,
    clock: &dyn Clock,
    begins: &str,
    mut all: BTreeMap<String, Notice>,
) -> Result<(), LedgerError> {
    let now = clock.now();
    let mut over = ledger.open_episodes(begins).await?;
    over.retain(|e| all.remove(&e.key).is_none());
    open_all(ledger, all.into_values(), now).await?;
    close_all(ledger, over.iter(), now).await
}

/// What the open episodes of [`publish_notice`] are of, as far as that begins so.
pub async fn open_notices(ledger: &Ledger, begins: &str) -> Result<Vec<String>, LedgerError> {
    let before = format!("{}notice/", alert::PUBLISH);
    let open = ledger.open_episodes(&format!("{before}{begins}")).await?;
    Ok(open.iter().filter_map(|e| Some(e.key.strip_prefix(&before)?.to_owned())).collect())
}

/// These stores have devices and are not in the list any more: opens an episode of each, and closes those of others. Many
/// at once share a mail.
pub async fn publish_unlisted(ledger: &Ledger, clock: &dyn Clock, stores: &[&StoreId]) -> Result<(), LedgerError> {
    let begins = format!("{}store-not-listed/", alert::PUBLISH);
    let begin = |store: &&StoreId| {
        let key = format!("{begins}{store}");
        let subject = format!("Store {store} is no longer in the list");
        let body = format!(
            "{subject}.\n\nIts devices are enrolled, and go on with what they follow: of what is made for this store alone, or for \
             a zone that no other store has, nothing new comes, and nobody there sees it. Put it back into the list of stores; \
             or, if it is closed for good, `hq-publisher revoke` its relay and each register.\n"
        );
        (key.clone(), Notice { episodes: vec![(key, subject.clone())], subject, body })
    };
    agree(ledger, clock, &begins, stores.iter().map(begin).collect()).await
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

/// One way through the outbox, oldest mail first.
struct Round {
    /// Who is to get each mail.
    all: Vec<String>,
    /// Of them, who is asked no more: what waits for them must not be overtaken.
    resting: BTreeSet<String>,
    /// Why, and until when.
    why: String,
    next: Timestamp,
    /// The mail that was tried last.
    above: i64,
    /// How often one was refused that nobody has, at most, since somebody took one.
    refused: u32,
}

impl Round {
    /// Whether somebody is to be asked to take it, or nobody lacks it (the settings are others now).
    fn wants(&self, taken: &Taken) -> bool {
        let mut lacking = self.all.iter().filter(|r| !taken.contains_key(*r)).peekable();
        lacking.peek().is_none() || lacking.any(|r| !self.resting.contains(r))
    }

    /// Tries the next mail; false when there is none.
    async fn step(
        &mut self,
        ledger: &Ledger,
        transport: &impl Transport,
        clock: &dyn Clock,
    ) -> Result<bool, LedgerError> {
        let claim = ledger.claim_mail(clock.now(), CLAIM, self.above, |taken| self.wants(taken));
        let Some(Claimed { n, mail, mut taken, mut refused, own_fault: passed }) =
            failpoint::around("mail.claim", claim).await?
        else {
            return Ok(false);
        };
        self.above = n;
        let lacking = self.all.iter().filter(|r| !taken.contains_key(*r)).cloned();
        let (left, to): (Vec<_>, Vec<_>) = lacking.partition(|r| self.resting.contains(r));
        let sent = match to.is_empty() {
            true => Ok(()),
            false => failpoint::around("mail.send", transport.send(&mail, &to)).await,
        };
        let now = clock.now();
        let took = sent.as_ref().map_or_else(|e| &e.taken, |()| &to);
        if !took.is_empty() {
            self.refused = 0;
        }
        taken.extend(took.iter().map(|r| (r.clone(), now)));
        let error = sent.err();
        if left.is_empty() && error.as_ref().is_none_or(|e| is_borne(e, &taken, now)) {
            if let Some(e) = error {
                tracing::warn!(id = %mail.id, "some recipients do not get a mail: {e}");
            }
            failpoint::around("mail.sent", ledger.mail_sent(&mail.id, now)).await?;
            return Ok(true);
        }
        let (text, own_fault, holds, next) = match error {
            // Those that are left are asked again after what they did not take before.
            None => (self.why.clone(), false, false, self.next),
            Some(e) if e.down || !e.later.is_empty() => {
                refused += u32::from(!e.down);
                // A mail that somebody has tells nothing of the server.
                let most = if taken.is_empty() { self.refused.max(refused) } else { refused };
                let next = after(now, wait(if e.down { mail.attempts } else { most }));
                let holds = e.down || (!passed && holds_up(refused, self.refused));
                self.refused = if taken.is_empty() { most } else { self.refused };
                if holds {
                    self.resting.extend(if e.down { self.all.clone() } else { e.later });
                    (self.why, self.next) = (e.text.clone(), next);
                }
                (e.text, false, holds, next)
            }
            Some(e) if left.is_empty() => {
                tracing::warn!("a mail was refused, it is tried again later: {e}");
                (e.text, true, false, after(now, wait(mail.attempts)))
            }
            Some(e) => (e.text, false, false, self.next),
        };
        let failed = Failed { error: &one_line(&text, ERROR), own_fault, holds, refused, next, taken: &taken };
        failpoint::around("mail.failed", ledger.mail_failed(&mail.id, failed)).await?;
        Ok(true)
    }
}

/// Whether a mail is done though not all took it: others have it, and who lacks it refused it for good, or all too long.
/// A try that brought it to somebody is not the last one: it may have had no time for the others.
fn is_borne(e: &SendError, taken: &Taken, now: Timestamp) -> bool {
    let too_long = e.taken.is_empty() && taken.values().min().is_some_and(|first| since(now, *first) >= PATIENCE);
    !e.down && !taken.is_empty() && (e.later.is_empty() || too_long)
}

/// Sends what is due, oldest first; what keeps those from going that nobody has.
///
/// A server that is down, and a mail that is not taken now, hold up what is behind them, all until the same time; but a
/// new mail has the oldest tried at once. Recipients are apart: who says "not now" to one mail is asked for none behind it
/// until it is taken, or was refused a few times; the others go on.
pub async fn drain(
    ledger: &Ledger,
    transport: &impl Transport,
    clock: &dyn Clock,
) -> Result<Option<String>, LedgerError> {
    let (all, next) = (transport.recipients(), clock.now());
    let mut round = Round { all, resting: BTreeSet::new(), why: String::new(), next, above: 0, refused: 0 };
    while round.step(ledger, transport, clock).await? {}
    ledger.mails_held().await
}

/// The SMTP server of the settings.
#[derive(Debug, Clone)]
pub struct Smtp {
    transport: AsyncSmtpTransport<Tokio1Executor>,
    from: Mailbox,
    to: Vec<Mailbox>,
    /// `mail.timeout`. The library holds to it while it connects, and waits for each answer without end.
    timeout: HumanDuration,
    /// [`TRY`].
    longest: Duration,
    /// [`ALONE`].
    alone: Duration,
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proto::clock::TestClock;
    use std::sync::{Arc, Mutex};
    use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};

    #[derive(Clone, Copy, PartialEq)]
    enum Says {
        Yes,
        NotNow,
        Never,
        Down,
    }
    use Says::{Down, Never, NotNow, Yes};

    type Answer = Box<dyn Fn(&Mail, &str) -> Says + Send>;

    /// Answers for each recipient as told; keeps what was asked of whom, and what was taken.
    struct Fake {
        to: Vec<&'static str>,
        answer: Mutex<Answer>,
        asked: Mutex<Vec<(Mail, String, Says)>>,
    }
    impl Transport for Fake {
        fn recipients(&self) -> Vec<String> {
            self.to.iter().map(|r| (*r).to_owned()).collect()
        }
        async fn send(&self, mail: &Mail, to: &[String]) -> Result<(), SendError> {
            let mut error = SendError::default();
            for one in to {
                let says = self.answer.lock().unwrap()(mail, one);
                self.asked.lock().unwrap().push((mail.clone(), one.clone(), says));
                match says {
                    Yes => error.taken.push(one.clone()),
                    NotNow => error.later.push(one.clone()),
                    Never => {}
                    Down => error.down = true,
                }
                if says != Yes {
                    error.text = "no".into();
                }
                if says == Down {
                    break;
                }
            }
            if error.text.is_empty() { Ok(()) } else { Err(error) }
        }
    }
    impl Fake {
        fn to(to: &[&'static str]) -> Fake {
            Fake { to: to.to_vec(), answer: Mutex::new(Box::new(|_, _| Yes)), asked: Mutex::default() }
        }
        fn now(&self, answer: impl Fn(&Mail, &str) -> Says + Send + 'static) {
            *self.answer.lock().unwrap() = Box::new(answer);
        }
        fn tries(&self) -> usize {
            self.asked.lock().unwrap().len()
        }
        fn taken_mails(&self, by: &str) -> Vec<Mail> {
            let asked = self.asked.lock().unwrap();
            asked.iter().filter(|(_, who, says)| who == by && *says == Yes).map(|(mail, ..)| mail.clone()).collect()
        }
        /// What this one took: the reason of each mail, with a mark where it is over.
        fn taken(&self, by: &str) -> String {
            self.taken_mails(by).iter().map(|m| reason(&m.subject)).collect::<Vec<_>>().join(" ")
        }
        fn subjects(&self) -> Vec<String> {
            self.taken_mails("it").into_iter().map(|m| m.subject).collect()
        }
    }

    fn reason(subject: &str) -> String {
        let mark = if subject.contains("Recovered") { "-" } else { "" };
        format!("{mark}{}", subject.split(['(', ')']).nth(1).unwrap())
    }

    /// Drains for so long, every 2 s or 300 times.
    async fn drain_for(time: Duration, l: &Ledger, transport: &impl Transport, clock: &TestClock) {
        let step = (time / 300).max(Duration::from_secs(2));
        for _ in 0..time.as_secs() / step.as_secs() {
            drain(l, transport, clock).await.unwrap();
            clock.advance(step);
        }
    }

    async fn write(l: &Ledger, clock: &TestClock, reasons: &[&str]) {
        for reason in reasons {
            publish_refused(l, clock, &[refused(&price(), reason, "x")]).await.unwrap();
        }
    }

    fn refused(instance: &Instance, reason: &str, text: &str) -> Refused {
        Refused { instance: instance.clone(), reason: reason.into(), text: text.into() }
    }

    async fn recovered(l: &Ledger, clock: &TestClock, instance: Instance) {
        publish_recovered(l, clock, &BTreeSet::from([instance])).await.unwrap();
    }

    async fn ledger(dir: &tempfile::TempDir) -> Ledger {
        Ledger::open_url(&format!("sqlite:{}", dir.path().join("fleet.db").display())).await.unwrap()
    }
    fn price() -> Instance {
        "price@zone-east".parse().unwrap()
    }
    const MINUTE: Duration = Duration::from_secs(60);
    const HOUR: Duration = Duration::from_secs(3600);

    #[tokio::test]
    async fn many_stores_that_left_the_list_at_once_share_a_mail() {
        let dir = tempfile::tempdir().unwrap();
        let (l, clock) = (ledger(&dir).await, TestClock::at("2026-01-01T00:00:00Z"));
        let stores: Vec<StoreId> = (0..300).map(|n| format!("s{n:03}").parse().unwrap()).collect();
        let tell = async |some: &[StoreId]| {
            publish_unlisted(&l, &clock, &some.iter().collect::<Vec<_>>()).await.unwrap();
            l.unsent_mails().await.unwrap()
        };
        assert_eq!(tell(&stores).await[0].subject, "[Tillcast] 300 at once: store not listed");
        assert_eq!(tell(&stores).await.len(), 1);
        let mails = tell(&stores[..2]).await;
        assert_eq!(mails.last().unwrap().subject, "[Tillcast] Recovered: 298 at once: store not listed");
        assert_eq!((mails.len(), tell(&[]).await.len()), (2, 4));
    }

    #[tokio::test]
    async fn many_notices_at_once_share_a_mail_and_so_do_their_ends() {
        let dir = tempfile::tempdir().unwrap();
        let (l, clock) = (ledger(&dir).await, TestClock::at("2026-01-01T00:00:00Z"));
        let begins = "waits-for-drops ";
        let notice = |n: usize| (format!("price@zone-z{n} waits for drops"), "No drop has come.".to_owned());
        let mut all: BTreeMap<_, _> = (0..30).map(|n| (format!("{begins}price@zone-z{n}"), notice(n))).collect();
        for _ in 0..2 {
            publish_notices(&l, &clock, begins, &all).await.unwrap();
        }
        // Who is known needs no text.
        all.values_mut().for_each(|told| *told = Default::default());
        all.pop_last();
        for _ in 0..2 {
            publish_notices(&l, &clock, begins, &all).await.unwrap();
        }
        publish_notices(&l, &clock, begins, &BTreeMap::new()).await.unwrap();
        let subjects: Vec<String> = l.unsent_mails().await.unwrap().into_iter().map(|m| m.subject).collect();
        let (many, one) = ("30 at once: waits for drops", "Recovered: price@zone-z9 waits for drops");
        let last = "Recovered: 29 at once: waits for drops";
        assert_eq!(subjects, [many, one, last].map(|s| format!("[Tillcast] {s}")));
    }

    #[tokio::test]
    async fn many_refusals_at_once_share_a_mail_for_each_reason() {
        let dir = tempfile::tempdir().unwrap();
        let (l, clock) = (ledger(&dir).await, TestClock::at("2026-01-01T00:00:00Z"));
        let zone = |n: usize| format!("price@zone-z{n:03}").parse::<Instance>().unwrap();
        let many = |reason: &str| (0..300).map(|n| refused(&zone(n), reason, &format!("row {n}"))).collect::<Vec<_>>();
        let mut all = many("BAD_ROWS");
        all.push(refused(&price(), "SHRINK", "900 of 1000 rows would go"));
        for _ in 0..2 {
            publish_refused(&l, &clock, &all).await.unwrap();
        }
        let mails = l.unsent_mails().await.unwrap();
        let subjects: Vec<&str> = mails.iter().map(|m| m.subject.as_str()).collect();
        let shrunk = "[Tillcast] Publishing price@zone-east was refused (SHRINK)";
        assert_eq!(subjects, ["[Tillcast] 300 at once: publish refused", shrunk]);
        let body = &mails[0].body;
        assert!(body.contains("Publishing price@zone-z199 was refused (BAD_ROWS)\n… and 100 more"), "{body}");
        assert!(body.contains("\nThe first of them:\n") && body.contains("\nrow 0\n"), "what is wrong: {body}");
        assert_eq!(refused_instances(&l, None).await.unwrap().len(), 301, "each is an episode");
        publish_recovered(&l, &clock, &(0..298).map(zone).collect()).await.unwrap();
        assert_eq!(l.unsent_mails().await.unwrap()[2].subject, "[Tillcast] Recovered: 298 at once: publish refused");
        let left = BTreeSet::from([zone(298), zone(299), price()]);
        assert_eq!(refused_instances(&l, None).await.unwrap(), left);
        publish_recovered(&l, &clock, &left).await.unwrap();
        assert_eq!((l.unsent_mails().await.unwrap().len(), refused_instances(&l, None).await.unwrap().len()), (6, 0));
    }

    #[tokio::test]
    async fn one_mail_for_a_refusal_one_for_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let (l, clock, fake) = (ledger(&dir).await, TestClock::at("2026-01-01T00:00:00Z"), Fake::to(&["it"]));
        for _ in 0..3 {
            let long = refused(&price(), "BAD_ROWS", "row 7: name is too long");
            publish_refused(&l, &clock, &[long]).await.unwrap();
            clock.advance(HOUR);
        }
        let few = refused(&price(), "SHRINK", "900 of 1000 rows would go");
        publish_refused(&l, &clock, &[few.clone(), few]).await.unwrap();
        recovered(&l, &clock, "price@all".parse().unwrap()).await;
        assert_eq!(drain(&l, &fake, &clock).await.unwrap(), None);
        assert_eq!(
            fake.subjects(),
            [
                "[Tillcast] Publishing price@zone-east was refused (BAD_ROWS)",
                "[Tillcast] Publishing price@zone-east was refused (SHRINK)"
            ]
        );
        recovered(&l, &clock, price()).await;
        recovered(&l, &clock, price()).await;
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
        let (l, clock, fake) = (ledger(&dir).await, TestClock::at("2026-01-01T00:00:00Z"), Fake::to(&["it"]));
        write(&l, &clock, &["A", "B"]).await;
        fake.now(|_, _| Down);
        for n in 1..=20 {
            assert!(drain(&l, &fake, &clock).await.unwrap().is_some());
            assert_eq!(fake.tries(), n, "stops at the first");
            clock.advance(HOUR);
        }
        // Restarted, the server back: each once, under the Message-ID that it had.
        let before: Vec<String> = l.unsent_mails().await.unwrap().into_iter().map(|m| m.id).collect();
        let l = ledger(&dir).await;
        fake.now(|_, _| Yes);
        drain(&l, &fake, &clock).await.unwrap();
        let after: Vec<String> = fake.taken_mails("it").into_iter().map(|m| m.id).collect();
        assert_eq!(after, before);
        assert_eq!(drain(&l, &fake, &clock).await.unwrap(), None);

        // Down again for one; what comes meanwhile does not overtake it.
        for reason in ["D", "E"] {
            write(&l, &clock, &[reason]).await;
            fake.now(|_, _| Down);
            drain(&l, &fake, &clock).await.unwrap();
        }
        fake.now(|_, _| Yes);
        write(&l, &clock, &["F"]).await;
        drain(&l, &fake, &clock).await.unwrap();
        assert_eq!(fake.taken("it"), "A B D E F");

        write(&l, &clock, &["C", "G"]).await;
        fake.now(|mail, _| if mail.subject.contains("(C)") { Never } else { Yes });
        assert_eq!(drain(&l, &fake, &clock).await.unwrap(), None, "put off, the others go on");
        assert_eq!(fake.taken("it"), "A B D E F G");
        assert_eq!(l.unsent_mails().await.unwrap()[0].last_error.as_deref(), Some("no"));
    }

    #[tokio::test]
    async fn a_server_that_is_down_is_asked_ever_more_rarely_for_all_mails_together() {
        let dir = tempfile::tempdir().unwrap();
        let (l, clock, fake) = (ledger(&dir).await, TestClock::at("2026-01-01T00:00:00Z"), Fake::to(&["it"]));
        fake.now(|_, _| Down);
        write(&l, &clock, &["A", "B", "C"]).await;
        drain_for(10 * MINUTE, &l, &fake, &clock).await;
        assert!((5..=7).contains(&fake.tries()), "{}", fake.tries());
        assert!(drain(&l, &fake, &clock).await.unwrap().is_some(), "it is said why all the while");
        // A new one has the oldest tried once.
        let before = fake.tries();
        write(&l, &clock, &["D"]).await;
        drain_for(MINUTE, &l, &fake, &clock).await;
        assert_eq!(fake.tries(), before + 1);
        fake.now(|_, _| Yes);
        drain_for(15 * MINUTE, &l, &fake, &clock).await;
        assert_eq!(fake.taken("it"), "A B C D");
    }

    #[tokio::test]
    async fn a_mail_that_is_never_taken_now_is_passed_after_a_few_tries() {
        let dir = tempfile::tempdir().unwrap();
        let (l, clock, fake) = (ledger(&dir).await, TestClock::at("2026-01-01T00:00:00Z"), Fake::to(&["it", "b"]));
        let bad = |mail: &Mail, _: &str| if mail.subject.contains("(BAD") { NotNow } else { Yes };
        fake.now(bad);
        write(&l, &clock, &["BAD", "BADDER", "C"]).await;
        recovered(&l, &clock, price()).await;
        drain_for(MINUTE, &l, &fake, &clock).await;
        assert_eq!(fake.taken("it"), "", "the order is kept as long as it may be a hiccup");
        drain_for(20 * MINUTE, &l, &fake, &clock).await;
        assert_eq!((fake.taken("it"), fake.taken("b")), ("C -C".into(), "C -C".into()));
        // New ones go past at once, and do not have the bad ones tried.
        let before = fake.tries();
        write(&l, &clock, &["D"]).await;
        drain(&l, &fake, &clock).await.unwrap();
        assert!(fake.taken("it").ends_with("-C D") && fake.tries() <= before + 2 * 5, "{}", fake.taken("it"));
        // They are tried on, and taken at last.
        fake.now(|_, _| Yes);
        drain_for(16 * MINUTE, &l, &fake, &clock).await;
        assert_eq!((fake.taken("it").split(' ').count(), l.unsent_mails().await.unwrap().len()), (7, 0));
    }

    #[tokio::test]
    async fn a_server_that_takes_nothing_now_gets_all_in_their_order_when_it_does() {
        let dir = tempfile::tempdir().unwrap();
        let (l, clock, fake) = (ledger(&dir).await, TestClock::at("2026-01-01T00:00:00Z"), Fake::to(&["it"]));
        fake.now(|_, _| NotNow);
        write(&l, &clock, &["A", "B", "C"]).await;
        recovered(&l, &clock, price()).await;
        drain_for(6 * HOUR, &l, &fake, &clock).await;
        assert!(fake.tries() < 350, "{}", fake.tries());
        fake.now(|_, _| Yes);
        drain_for(15 * MINUTE, &l, &fake, &clock).await;
        assert_eq!(fake.taken("it"), "A B C -A -B -C");
    }

    #[tokio::test]
    async fn a_recipient_that_says_not_now_gets_all_in_their_order_and_holds_up_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let (l, clock, fake) =
            (ledger(&dir).await, TestClock::at("2026-01-01T00:00:00Z"), Fake::to(&["dead", "b", "it"]));
        let refused = |b: Says| {
            move |_: &Mail, who: &str| match who {
                "b" => b,
                "dead" => Never,
                _ => Yes,
            }
        };
        // An outage first: its tries do not count against who is asked later.
        fake.now(|_, _| Down);
        write(&l, &clock, &["A"]).await;
        drain_for(48 * HOUR, &l, &fake, &clock).await;
        fake.now(refused(NotNow));
        recovered(&l, &clock, price()).await;
        let before = fake.tries();
        drain_for(MINUTE / 6, &l, &fake, &clock).await;
        assert_eq!(fake.taken("it"), "A -A");
        assert!(fake.tries() <= before + 6, "not every 2 s");
        for n in 0..30 {
            write(&l, &clock, &[&format!("N{n}")]).await;
            drain_for(2 * MINUTE, &l, &fake, &clock).await;
            assert!(fake.taken("it").ends_with(&format!(" N{n}")));
        }
        assert_eq!(drain(&l, &fake, &clock).await.unwrap(), None, "somebody has each");
        // An hour later it takes them.
        fake.now(refused(Yes));
        drain_for(15 * MINUTE, &l, &fake, &clock).await;
        assert_eq!(fake.taken("b"), fake.taken("it"));
        assert_eq!((fake.taken("it").split(' ').count(), l.unsent_mails().await.unwrap().len()), (32, 0));

        // But not for ever, after it is had by somebody.
        fake.now(refused(NotNow));
        write(&l, &clock, &["Z"]).await;
        drain_for(23 * HOUR, &l, &fake, &clock).await;
        assert_eq!(l.unsent_mails().await.unwrap().len(), 1);
        drain_for(2 * HOUR, &l, &fake, &clock).await;
        assert_eq!(l.unsent_mails().await.unwrap().len(), 0);
        assert!(fake.taken("it").ends_with("N29 Z") && fake.taken("b").ends_with("N29"));
    }

    #[tokio::test]
    async fn one_mail_that_a_recipient_never_takes_now_keeps_no_later_one_from_it() {
        let dir = tempfile::tempdir().unwrap();
        let (l, clock, fake) = (ledger(&dir).await, TestClock::at("2026-01-01T00:00:00Z"), Fake::to(&["it", "b"]));
        fake.now(|mail, who| if who == "b" && mail.subject.contains("(BAD)") { NotNow } else { Yes });
        write(&l, &clock, &["BAD", "C", "D"]).await;
        drain_for(MINUTE, &l, &fake, &clock).await;
        assert_eq!((fake.taken("it"), fake.taken("b")), ("BAD C D".into(), "".into()));
        drain_for(20 * MINUTE, &l, &fake, &clock).await;
        assert_eq!((fake.taken("it"), fake.taken("b")), ("BAD C D".into(), "C D".into()));
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
        assert!(mail.body.starts_with("Written at 1970-01-01T00:00:00Z.\n\nline one"), "{:.60}", mail.body);
        let text = String::from_utf8(smtp.message(&mail).unwrap().formatted()).unwrap();
        let head = text.split("\r\n\r\n").next().unwrap();
        assert!(!head.lines().any(|l| l.starts_with("Bcc")), "{head}");
        assert!(head.contains(&format!("Message-ID: <{}>", mail.id)), "{head}");
    }

    /// A mail server that answers `reply` to recipients whose address begins with `dead` and to mails of odd text, and
    /// nothing to those that begin with `silent`; whom it took each mail for.
    #[derive(Clone)]
    struct Server {
        url: String,
        reply: Arc<Mutex<&'static str>>,
        taken: Arc<Mutex<Vec<Vec<String>>>>,
    }

    async fn server(reply: &'static str) -> Server {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("smtp://{}", listener.local_addr().unwrap());
        let server = Server { url, reply: Arc::new(Mutex::new(reply)), taken: Arc::default() };
        let of = server.clone();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                tokio::spawn(session(stream, of.clone()));
            }
        });
        server
    }

    async fn session(stream: tokio::net::TcpStream, server: Server) {
        let (read, mut write) = stream.into_split();
        let mut lines = BufReader::new(read).lines();
        let (mut to, mut in_data, mut odd) = (Vec::new(), false, false);
        write.write_all(b"220 test\r\n").await.unwrap();
        while let Ok(Some(line)) = lines.next_line().await {
            let reply = *server.reply.lock().unwrap();
            let answer = match line.split([':', ' ']).next().unwrap_or_default() {
                "." if in_data => {
                    in_data = false;
                    if !odd {
                        server.taken.lock().unwrap().push(std::mem::take(&mut to));
                    }
                    if odd { reply } else { "250 taken" }
                }
                _ if in_data => {
                    odd |= line == "odd";
                    continue;
                }
                "MAIL" => {
                    to.clear();
                    "250 ok"
                }
                "RCPT" if line.contains("<dead") => reply,
                "RCPT" if line.contains("<silent") => continue,
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

    fn smtp(server: &Server, to: &[&str]) -> Smtp {
        let config = MailConfig {
            smtp: proto::config::Secret::new(&server.url),
            from: "a@example.com".into(),
            to: to.iter().map(|t| (*t).to_owned()).collect(),
            ca_file: None,
            timeout: proto::config::HumanDuration(Duration::from_secs(10)),
        };
        Smtp::new(&config).unwrap()
    }

    async fn send(server: &Server, to: &[&str], body: &str) -> Result<(), SendError> {
        let notice = Notice { episodes: Vec::new(), subject: "s".into(), body: body.into() };
        let smtp = smtp(server, to);
        smtp.send(&compose(&notice, Timestamp::UNIX_EPOCH), &smtp.recipients()).await
    }

    #[tokio::test]
    async fn a_dead_recipient_silences_nobody_else() {
        let all = ["it@example.com", "dead@example.com", "b@example.com"];
        let alone = [["it@example.com"], ["b@example.com"]];
        // A full mailbox may have room again soon.
        for (reply, later) in [("550 no such user", &[][..]), ("452 mailbox full", &["dead@example.com"])] {
            let server = server(reply).await;
            let e = send(&server, &all, "b").await.unwrap_err();
            assert!(e.taken == alone.concat() && e.later == later && !e.down, "{e:?}");
            assert_eq!(*server.taken.lock().unwrap(), alone);
            let nobody = send(&server, &["dead@example.com", "dead2@example.com"], "b").await.unwrap_err();
            assert!(nobody.taken.is_empty() && nobody.text.contains(&reply[4..]), "{nobody:?}");
            send(&server, &["it@example.com", "b@example.com"], "b").await.unwrap();
            let last = server.taken.lock().unwrap().split_off(2);
            assert_eq!(last, [["it@example.com", "b@example.com"]], "one for all, if all are taken");
            let odd = send(&server, &all[..1], "odd").await.unwrap_err();
            assert_eq!((odd.later.len(), odd.down), (later.len(), false), "{odd:?}");
        }
        // Who is not let in can send nothing.
        let e = send(&server("454 no login now").await, &all, "b").await.unwrap_err();
        assert!(e.down && e.taken.is_empty(), "{e:?}");
    }

    /// There is time for one of them alone at each try.
    #[tokio::test]
    async fn a_slow_server_gets_each_mail_once_for_each_though_some_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (l, clock, server) =
            (ledger(&dir).await, TestClock::at("2026-01-01T00:00:00Z"), server("550 no such user").await);
        let mut smtp = smtp(&server, &["it@example.com", "dead@example.com", "b@example.com", "c@example.com"]);
        smtp.alone = Duration::ZERO;
        write(&l, &clock, &["A", "B"]).await;
        drain_for(HOUR / 2, &l, &smtp, &clock).await;
        let mut all = server.taken.lock().unwrap().concat();
        all.sort();
        let twice = ["b@example.com", "c@example.com", "it@example.com"].map(|who| [who, who]);
        assert_eq!(all, twice.concat());
        assert_eq!(l.unsent_mails().await.unwrap().len(), 0);
    }

    #[test]
    fn a_mail_that_waited_for_a_day_goes_on_while_somebody_gets_it() {
        let day_old = Taken::from([("it".to_owned(), Timestamp::UNIX_EPOCH)]);
        let now = after(Timestamp::UNIX_EPOCH, PATIENCE);
        let slow = SendError { later: vec!["c".into()], ..SendError::default() };
        assert!(is_borne(&slow, &day_old, now));
        assert!(!is_borne(&SendError { taken: vec!["b".into()], ..slow }, &day_old, now));
    }

    #[tokio::test]
    async fn a_server_that_falls_silent_is_left_and_who_took_a_mail_has_it() {
        let server = server("550 no such user").await;
        let mut half = smtp(&server, &["dead@example.com", "it@example.com", "silent@example.com", "b@example.com"]);
        half.longest = Duration::from_secs(8);
        let notice = Notice { episodes: Vec::new(), subject: "s".into(), body: "b".into() };
        let mail = compose(&notice, Timestamp::UNIX_EPOCH);
        let e = half.send(&mail, &half.recipients()).await.unwrap_err();
        assert!(e.down && e.taken == ["it@example.com"], "{e:?}");

        // One that does not even greet: it sees that it was left, by `doctor` too.
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mute = Server { url: format!("smtp://{}", listener.local_addr().unwrap()), ..server };
        let is_left = async || listener.accept().await.unwrap().0.read(&mut [0]).await.unwrap() == 0;
        let mut smtp = smtp(&mute, &["it@example.com"]);
        (smtp.timeout, smtp.longest) = (HumanDuration(Duration::from_secs(1)), Duration::from_secs(1));
        let asked = async {
            let (tested, left) = tokio::join!(smtp.test(), is_left());
            assert!(tested.is_err_and(|e| e.contains("mail.timeout")) && left);
            let to = smtp.recipients();
            let (sent, left) = tokio::join!(smtp.send(&mail, &to), is_left());
            assert!(sent.is_err_and(|e| e.down && e.taken.is_empty()) && left);
        };
        timeout(MINUTE, asked).await.unwrap();
    }

    #[tokio::test]
    async fn a_greylisted_recipient_gets_its_mails_when_it_is_let_in() {
        let dir = tempfile::tempdir().unwrap();
        let (l, clock) = (ledger(&dir).await, TestClock::at("2026-01-01T00:00:00Z"));
        let server = server("450 greylisted").await;
        let smtp = smtp(&server, &["it@example.com", "dead@example.com"]);
        write(&l, &clock, &["A", "B"]).await;
        drain_for(MINUTE / 6, &l, &smtp, &clock).await;
        assert_eq!(*server.taken.lock().unwrap(), [["it@example.com"], ["it@example.com"]]);
        *server.reply.lock().unwrap() = "250 ok";
        drain_for(MINUTE, &l, &smtp, &clock).await;
        assert_eq!(server.taken.lock().unwrap().len(), 4);
        assert_eq!(l.unsent_mails().await.unwrap().len(), 0);
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
        // One of these would keep each mail from all.
        let e = Smtp::new(&config("smtp://h", "Jörg <jörg@example.com>")).unwrap_err().to_string();
        assert!(e.starts_with("mail.to") && e.contains("ASCII"), "{e}");
        let smtp = Smtp::new(&config("smtp://h", "Jörg <it@bücher.example>")).unwrap();
        assert_eq!(smtp.recipients(), ["it@xn--bcher-kva.example"]);
        let notice = Notice { episodes: Vec::new(), subject: "s".into(), body: "b".into() };
        let mail = compose(&notice, Timestamp::UNIX_EPOCH);
        assert!(smtp.message(&mail).unwrap().formatted().is_ascii());
    }
}
