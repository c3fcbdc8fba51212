//! Who is told what: pure. Findings and open episodes go in, notices come out: one mail when an
//! episode opens, one when it ends, and one for many that open at once. Writes nothing.

use crate::fleet::{Assessment, DATABASE, Finding, long};
use crate::ledger::Episode;
use proto::clock::{Timestamp, since};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// The episodes that [`crate::publish`] opens and closes itself.
pub const PUBLISH: &str = "publish-";

/// One mail to write, with the episodes that it opens or closes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    /// The episodes: key and the line that people read.
    pub episodes: Vec<(String, String)>,
    /// The mail's subject.
    pub subject: String,
    /// The mail's text.
    pub body: String,
}

/// What is to be told now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Due {
    /// Episodes that begin.
    pub open: Vec<Notice>,
    /// Episodes that end.
    pub close: Vec<Notice>,
}

/// From so many of one kind at once, they share a mail: a carrier's outage is one event.
const FOLD: usize = 6;

/// Lines of a folded mail.
const LISTED: usize = 200;

/// What was told of a few stores is told again from so many on: a device that lasts in it, or is dead, hides nothing that
/// the others get.
const GROWN: [usize; 5] = [5, 50, 500, 5000, 50_000];
/// Between the key of an episode and the number of stores, in the key of one that grew.
const IN: &str = " in ";

/// An episode that so many stores are in: key and text.
fn grown(f: &Finding) -> impl Iterator<Item = (String, String)> {
    let reached = GROWN.into_iter().filter(|n| f.stores >= *n);
    reached.map(|n| (format!("{}{IN}{n}", f.key), format!("{}: {n} stores or more", f.subject)))
}

/// The key of the episode without the number of stores, and that.
fn parts(key: &str) -> (&str, Option<usize>) {
    key.rsplit_once(IN).and_then(|(of, n)| Some((of, Some(n.parse().ok()?)))).unwrap_or((key, None))
}

/// Damages of one device's database that may be open at once: each has the time that the device says.
const DAMAGES: usize = 4;
/// A damage stays open for so long, so that a device that makes them up fills no mailbox.
const DAMAGED_FOR: Duration = Duration::from_secs(3600);

/// Whose database the episode is of, if it is of one.
fn whose_database(key: &str) -> Option<&str> {
    key.strip_prefix(DATABASE)?.split('/').next()
}

/// Compares findings with the open episodes.
pub fn due(assessment: &Assessment, open: &[Episode], now: Timestamp) -> Due {
    let known: BTreeSet<&str> = open.iter().map(|e| e.key.as_str()).collect();
    let mut damages: BTreeMap<String, usize> = BTreeMap::new();
    let mut is_one_more = |key: &str| {
        whose_database(key).is_none_or(|whose| {
            let of_it = damages.entry(whose.to_owned()).or_default();
            *of_it += 1;
            *of_it <= DAMAGES
        })
    };
    for e in open {
        is_one_more(&e.key);
    }
    let begins = assessment.findings.values().filter_map(|f| {
        let first = Some((f.key.clone(), f.subject.clone()));
        let first = first.filter(|(key, _)| !known.contains(key.as_str()) && is_one_more(key.as_str()));
        let more = grown(f).filter(|(key, _)| !known.contains(key.as_str()));
        begin(f, first.into_iter().chain(more).collect())
    });
    let mut ends: BTreeMap<&str, Vec<&Episode>> = BTreeMap::new();
    let is_over = |e: &&Episode| {
        !e.key.starts_with(PUBLISH)
            && (whose_database(&e.key).is_none() || since(now, e.opened_at) >= DAMAGED_FOR)
            && !lasts(assessment, &e.key)
    };
    for e in open.iter().filter(is_over) {
        ends.entry(parts(&e.key).0).or_default().push(e);
    }
    let ends = ends.into_values().filter_map(|together| end_together(&together, now));
    Due { open: fold(begins, ""), close: fold(ends, "Recovered: ") }
}

/// Whether an episode goes on. One that grew does as long as half of the stores are in it: one more or less is neither.
fn lasts(assessment: &Assessment, key: &str) -> bool {
    let (of, stores) = parts(key);
    match assessment.findings.get(of) {
        Some(f) => stores.is_none_or(|n| f.stores * 2 >= n),
        None => assessment.is_undecided(of),
    }
}

/// The mail of an episode that begins or has grown; none where it is known.
fn begin(f: &Finding, episodes: Vec<(String, String)>) -> Option<Notice> {
    let (key, text) = episodes.first()?;
    let subject = if *key == f.key { text.clone() } else { episodes.last()?.1.clone() };
    let body = format!("{subject}.\n\n{}\n", f.lines.join("\n"));
    Some(Notice { episodes, subject, body })
}

/// One mail for an episode and how it grew, by what is over of it: all of it, or from so many stores on.
fn end_together(together: &[&Episode], now: Timestamp) -> Option<Notice> {
    let least = together.iter().min_by_key(|e| parts(&e.key).1)?;
    let episodes = together.iter().map(|e| (e.key.clone(), e.text.clone())).collect();
    Some(Notice { episodes, ..end(least, now) })
}

/// The notice that an episode is over.
pub fn end(e: &Episode, now: Timestamp) -> Notice {
    let lasted = long(since(now, e.opened_at));
    Notice {
        episodes: vec![(e.key.clone(), e.text.clone())],
        subject: format!("Recovered: {}", e.text),
        body: format!("Over, after {lasted}: {}.\n\nIt began at {}.\n", e.text, e.opened_at),
    }
}

/// Joins the notices of a kind where there are many.
pub fn fold(notices: impl Iterator<Item = Notice>, before: &str) -> Vec<Notice> {
    let mut kinds: BTreeMap<String, Vec<Notice>> = BTreeMap::new();
    for n in notices {
        let key = n.episodes.first().map(|(k, _)| k.as_str()).unwrap_or_default();
        kinds.entry(kind(key).to_owned()).or_default().push(n);
    }
    let joined = kinds
        .into_iter()
        .flat_map(|(kind, some)| if some.len() < FOLD { some } else { vec![join(&kind, some, before)] });
    joined.collect()
}

/// What such an episode is one of. Of a store it is no matter who found it; a notice says it by its first word.
fn kind(key: &str) -> &str {
    let (kind, rest) = key.split_once('/').unwrap_or((key, ""));
    match kind.strip_prefix(PUBLISH) {
        Some("notice") => rest.split([' ', '/']).next().unwrap_or_default(),
        Some("refused") | None => kind,
        Some(kind) => kind,
    }
}

fn join(kind: &str, some: Vec<Notice>, before: &str) -> Notice {
    let subject = format!("{before}{} at once: {}", some.len(), kind.replace('-', " "));
    let mut lines: Vec<&str> =
        some.iter().flat_map(|n| &n.episodes).map(|(_, text)| text.as_str()).take(LISTED).collect();
    let more = format!("… and {} more", some.len().saturating_sub(LISTED));
    if some.len() > LISTED {
        lines.push(&more);
    }
    let first = some.first().map(|n| n.body.as_str()).unwrap_or_default();
    let body = format!("{subject}.\n\n{}\n\nThe first of them:\n\n{first}", lines.join("\n"));
    Notice { subject, body, episodes: some.into_iter().flat_map(|n| n.episodes).collect() }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn finding(key: &str) -> Finding {
        Finding { key: key.into(), subject: format!("{key} is wrong"), lines: vec!["because".into()], stores: 1 }
    }
    fn wrong(keys: &[&str], undecided: &[&str]) -> Assessment {
        Assessment {
            findings: keys.iter().map(|k| ((*k).to_owned(), finding(k))).collect(),
            undecided: undecided.iter().map(|k| (*k).to_owned()).collect(),
            ..Assessment::default()
        }
    }
    fn open(keys: &[&str]) -> Vec<Episode> {
        let episode = |k: &&str| Episode {
            key: (*k).to_owned(),
            text: format!("{k} is wrong"),
            opened_at: Timestamp::UNIX_EPOCH,
            closed_at: None,
        };
        keys.iter().map(episode).collect()
    }
    fn now() -> Timestamp {
        Timestamp::from_second(600).unwrap()
    }

    #[test]
    fn first_again_over_and_unknown() {
        type Case<'a> = (&'a str, Assessment, &'a [&'a str], &'a [&'a str], &'a [&'a str]);
        let table: &[Case<'_>] = &[
            ("first", wrong(&["a/1"], &[]), &[], &["a/1 is wrong"], &[]),
            ("again", wrong(&["a/1"], &[]), &["a/1"], &[], &[]),
            ("over", wrong(&[], &[]), &["a/1"], &[], &["Recovered: a/1 is wrong"]),
            ("cannot be told", wrong(&[], &["a/1"]), &["a/1"], &[], &[]),
            ("not ours to close", wrong(&[], &[]), &["publish-refused/price@all/SHRINK"], &[], &[]),
            ("one begins, one ends", wrong(&["a/2"], &[]), &["a/1"], &["a/2 is wrong"], &["Recovered: a/1 is wrong"]),
        ];
        for (name, assessment, known, opened, closed) in table {
            let due = due(assessment, &open(known), now());
            let subjects = |n: &[Notice]| n.iter().map(|n| n.subject.clone()).collect::<Vec<_>>();
            assert_eq!(subjects(&due.open), *opened, "{name}");
            assert_eq!(subjects(&due.close), *closed, "{name}");
        }
        let over = due(&wrong(&[], &[]), &open(&["a/1"]), now());
        assert!(over.close[0].body.contains("after 10 min"), "{}", over.close[0].body);
    }

    /// One register has been in error for a month, or is dead; then a pack of the same stream dies in all stores.
    #[test]
    fn what_a_few_have_had_for_long_hides_nothing_that_many_get() {
        let (mut known, mut mails): (Vec<String>, Vec<String>) = (Vec::new(), Vec::new());
        let mut look = |stores: usize| {
            let mut found = wrong(&["pack/a", "store-silent/5"], &[]);
            found.findings.get_mut("pack/a").unwrap().stores = stores;
            if stores == 0 {
                found.findings.remove("pack/a");
            }
            let due = due(&found, &open(&known.iter().map(String::as_str).collect::<Vec<_>>()), now());
            let keys = |n: &[Notice]| n.iter().flat_map(|n| &n.episodes).map(|(k, _)| k.clone()).collect::<Vec<_>>();
            known.extend(keys(&due.open));
            let over = keys(&due.close);
            known.retain(|k| !over.contains(k));
            mails.extend(due.open.into_iter().chain(due.close).map(|n| n.subject));
            std::mem::take(&mut mails)
        };
        assert_eq!(look(1), ["pack/a is wrong", "store-silent/5 is wrong"]);
        assert_eq!(look(4), [""; 0]);
        assert_eq!(look(600), ["pack/a is wrong: 500 stores or more"], "one mail for 5, 50 and 500");
        for stores in [499, 250, 700] {
            assert_eq!(look(stores), [""; 0], "{stores}");
        }
        assert_eq!(look(249).len(), 1);
        assert_eq!(look(2), ["Recovered: pack/a in 5 is wrong"], "and in 50: one mail");
        assert_eq!(look(7), ["pack/a is wrong: 5 stores or more"]);
        assert_eq!(look(0), ["Recovered: pack/a is wrong"]);
        assert_eq!(look(60), ["pack/a is wrong"], "all at once are one mail");
        assert_eq!(look(0), ["Recovered: pack/a is wrong"]);
    }

    /// A stolen register says another time in each heartbeat.
    #[test]
    fn a_device_that_makes_up_damages_fills_no_mailbox() {
        let key = |of: &str, n: usize| format!("database/{of}/{n}");
        let (mut known, mut mails) = (Vec::new(), 0);
        for n in 0..200 {
            let keys = [key("1-1", n), key("1-1", n + 1000), key("1-2", 7)];
            let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
            // Each of them is ten minutes old.
            let due = due(&wrong(&keys, &[]), &open(&known.iter().map(String::as_str).collect::<Vec<_>>()), now());
            assert!(due.close.is_empty());
            mails += due.open.len();
            known.extend(due.open.into_iter().flat_map(|n| n.episodes).map(|(key, _)| key));
        }
        assert_eq!((mails, known.len()), (DAMAGES + 1, DAMAGES + 1));
        let later = Timestamp::from_second(3600).unwrap();
        let over = due(&wrong(&[], &[]), &open(&known.iter().map(String::as_str).collect::<Vec<_>>()), later);
        assert_eq!(over.close.len(), DAMAGES + 1);
    }

    #[test]
    fn ten_thousand_stores_at_once_are_one_mail_each_way() {
        let keys: Vec<String> = (0..10_000).map(|n| format!("store-silent/{n}")).collect();
        let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
        let mut all = keys.clone();
        all.push("register-silent/x-1");
        let begun = due(&wrong(&all, &[]), &[], now());
        assert_eq!(begun.open.len(), 2);
        assert_eq!(begun.open[1].subject, "10000 at once: store silent");
        assert_eq!(begun.open[1].episodes.len(), 10_000);
        assert!(begun.open[1].body.lines().count() < 250);
        let ended = due(&wrong(&[], &[]), &open(&keys), now());
        assert_eq!((ended.close.len(), ended.close[0].subject.as_str()), (1, "Recovered: 10000 at once: store silent"));
    }
}
