//! Mails: written into the ledger's outbox, sent from there.
//!
//! Owns what a mail looks like and when it goes; `smtp` hands it to the server. Must never lose one: it leaves
//! the outbox when the server took it for all (but who is refused for good, or for a day). If the power
//! goes between, it is sent again under the same Message-ID. Text from outside (names, reasons) is cleaned
//! before it gets near a header.

mod smtp;
#[cfg(test)]
mod tests;

use crate::alert::{self, Notice};
use crate::ledger::{Claimed, Episode, Failed, Ledger, LedgerError, Mail, Taken};
use proto::clock::{Clock, Timestamp, after, since};
use proto::failpoint;
use proto::ids::{Instance, StoreId};
use proto::retry::{Backoff, random_unit};
pub use smtp::Smtp;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// Characters of an error that are kept.
const ERROR: usize = 500;

/// Characters of a subject.
const SUBJECT: usize = 140;

/// Bytes of a body.
const BODY: usize = 64 << 10;

/// How long a claimed mail is one sender's; longer than any try, which asks for all and then for one alone at least.
const CLAIM: Duration = Duration::from_secs(300);

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
