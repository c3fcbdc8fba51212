//! What went wrong and has not been mended. Owns the list and its memory over restarts; a fault
//! that matters to HQ is told at least once, even when it was mended before the next heartbeat.

use proto::clock::Timestamp;
use proto::ids::Instance;
use proto::wire::{Fault, brief, fault, rank};
use serde::{Deserialize, Serialize};

/// Faults kept and reported at most: they must fit into a heartbeat of 64 KiB.
const MOST: usize = 40;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Noted {
    fault: Fault,
    /// The first heartbeat that carried it and was taken.
    #[serde(default)]
    told_in: Option<u64>,
    /// HQ has that one.
    #[serde(default)]
    told: bool,
    #[serde(default)]
    mended: bool,
}

/// The list.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Faults(Vec<Noted>);

/// Faults that HQ acts on: told although mended.
fn must_be_told(code: &str) -> bool {
    [fault::DRIFT, fault::PACK_IN_ERROR].contains(&code)
}

impl Faults {
    /// Notes a fault; one of the same code, stream and object keeps its beginning. Whether
    /// anything changed.
    pub fn raise(
        &mut self,
        code: &str,
        instance: Option<&Instance>,
        object: Option<&str>,
        text: &str,
        now: Timestamp,
    ) -> bool {
        let text = brief(text).to_owned();
        let same = |n: &&mut Noted| {
            n.fault.code == code && n.fault.instance.as_ref() == instance && n.fault.object.as_deref() == object
        };
        if let Some(n) = self.0.iter_mut().find(same) {
            if n.mended {
                n.fault.since = now;
                (n.told_in, n.told) = (None, false);
            }
            let changed = n.mended || n.fault.text != text;
            n.mended = false;
            n.fault.text = text;
            return changed;
        }
        if self.0.len() >= MOST {
            // A list this long says enough. What is there stays, unless it is over or matters less: each cycle would put it
            // back as new in the place of the next.
            let weight = |n: &Noted| (n.mended, rank(&n.fault.code));
            let last = self.0.iter().enumerate().max_by_key(|(_, n)| weight(n));
            match last.filter(|(_, n)| weight(n) > (false, rank(code))).map(|(at, _)| at) {
                Some(at) => drop(self.0.remove(at)),
                None => return false,
            }
        }
        let fault = Fault {
            code: code.to_owned(),
            instance: instance.cloned(),
            object: object.map(str::to_owned),
            text,
            since: now,
        };
        self.0.push(Noted { fault, told_in: None, told: false, mended: false });
        true
    }

    /// Ends all faults of a code that `which` admits. Whether there were any.
    pub fn mend(&mut self, code: &str, which: impl Fn(&Fault) -> bool) -> bool {
        let before = self.0.len();
        let mut changed = false;
        for n in self.0.iter_mut().filter(|n| n.fault.code == code && !n.mended && which(&n.fault)) {
            n.mended = true;
            changed = true;
        }
        self.0.retain(|n| !n.mended || (must_be_told(&n.fault.code) && !n.told));
        changed || before != self.0.len()
    }

    /// What has not been mended.
    pub fn open(&self) -> Vec<Fault> {
        self.0.iter().filter(|n| !n.mended).map(|n| n.fault.clone()).collect()
    }

    /// What a heartbeat carries: also what was mended before it could be told.
    pub fn to_tell(&self) -> Vec<Fault> {
        let text = |n: &Noted| if n.mended { format!("{} (mended)", n.fault.text) } else { n.fault.text.clone() };
        self.0.iter().map(|n| Fault { text: text(n), ..n.fault.clone() }).collect()
    }

    /// A relay took the heartbeat of this number that carried `told`; HQ has those up to `passed_on` (none: the relay
    /// does not say, what it took counts). Until HQ has one that carried it, a mended fault is carried on: the relay
    /// passes on the latest heartbeat alone. Whether that changed the list.
    pub fn told(&mut self, told: &[Fault], seq: u64, passed_on: Option<u64>) -> bool {
        let before = self.clone();
        for n in &mut self.0 {
            let carried = told.iter().any(|f| {
                f.code == n.fault.code
                    && f.instance == n.fault.instance
                    && f.object == n.fault.object
                    && f.since == n.fault.since
            });
            if carried {
                let first = *n.told_in.get_or_insert(seq);
                n.told |= passed_on.is_none_or(|p| p >= first);
            }
        }
        self.0.retain(|n| !(n.mended && n.told));
        *self != before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn t(s: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + s).unwrap()
    }

    #[test]
    fn a_fault_keeps_its_beginning_and_ends_when_mended() {
        let mut f = Faults::default();
        assert!(f.raise(fault::DISK_FULL, None, None, "no room", t(0)));
        assert!(!f.raise(fault::DISK_FULL, None, None, "no room", t(9)));
        assert!(f.raise(fault::DISK_FULL, None, None, "still no room", t(10)));
        assert_eq!(f.open()[0].since, t(0));
        assert!(f.mend(fault::DISK_FULL, |_| true));
        assert!(f.open().is_empty() && f.to_tell().is_empty());
    }

    #[test]
    fn drift_is_told_once_though_healed_before_the_heartbeat() {
        let price: Instance = "price@all".parse().unwrap();
        let mut f = Faults::default();
        f.raise(fault::DRIFT, Some(&price), None, "a row differs", t(0));
        f.mend(fault::DRIFT, |_| true);
        assert!(f.open().is_empty());
        let carried = f.to_tell();
        assert_eq!(carried[0].text, "a row differs (mended)");
        f.raise(fault::DRIFT, Some(&price), None, "a row differs", t(5));
        f.mend(fault::DRIFT, |_| true);
        f.told(&carried, 1, None);
        assert_eq!(f.to_tell().len(), 1, "the second drift was not in that heartbeat");
        let carried = f.to_tell();
        assert!(f.told(&carried, 2, None));
        assert!(f.to_tell().is_empty());
    }

    #[test]
    fn a_mended_fault_is_carried_until_headquarters_has_a_heartbeat_with_it() {
        let mut f = Faults::default();
        f.raise(fault::DRIFT, None, None, "a row differs", t(0));
        f.mend(fault::DRIFT, |_| true);
        let carried = f.to_tell();
        assert!(f.told(&carried, 7, Some(6)), "which heartbeat was the first is kept over restarts");
        assert_eq!(f.to_tell(), carried, "the relay has it, headquarters has not");
        assert!(!f.told(&carried, 8, Some(6)));
        assert_eq!(f.to_tell(), carried);
        assert!(f.told(&carried, 9, Some(8)), "the latest that it has carried it");
        assert!(f.to_tell().is_empty());
    }

    #[test]
    fn the_list_is_bounded() {
        let mut f = Faults::default();
        for n in 0..200 {
            f.raise(fault::SOURCE, None, Some(&n.to_string()), &"ä€".repeat(9999), t(n));
        }
        assert_eq!(f.open().len(), MOST);
        assert!(f.open().iter().all(|f| (497..=500).contains(&f.text.len())));
    }

    #[test]
    fn a_list_that_is_full_is_not_made_anew_by_each_cycle_and_what_matters_has_a_place() {
        let mut f = Faults::default();
        let cycle = |f: &mut Faults, now| {
            (0..60).fold(false, |changed, n| f.raise(fault::REFUSED, None, Some(&n.to_string()), "", t(now)) | changed)
        };
        assert!(cycle(&mut f, 0));
        for code in [fault::PACK_IN_ERROR, fault::HALTED] {
            assert!(f.raise(code, None, None, "", t(1)));
            assert!(!cycle(&mut f, 2), "{code}");
        }
        assert_eq!((f.open().len(), f.open().iter().filter(|f| f.since == t(0)).count()), (MOST, MOST - 2));
        f.mend(fault::PACK_IN_ERROR, |_| true);
        assert!(cycle(&mut f, 3) && !cycle(&mut f, 4), "what is over gives way");
        assert_eq!(f.to_tell().len(), MOST);
    }
}
