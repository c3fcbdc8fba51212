//! What to publish, and why. Pure: the facts come in, a plan with its reasons goes out.

use proto::layout::{PackKind, PackName};
use proto::wire::{Fault, fault};
use serde::Serialize;
use std::fmt;

/// What is known of one instance when its new rows have been compared.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts {
    /// Whether anything was published before.
    pub published: bool,
    /// Rows that differ.
    pub changed_rows: u64,
    /// The contract's text changed.
    pub new_contract: bool,
    /// Why the published rows cannot be built on: the contract is not additive.
    pub rebuild: Option<String>,
    /// The trust epoch changed: versions before it count no more.
    pub new_epoch: bool,
    /// The bucket or devices have higher versions than the ledger knows.
    pub ahead: bool,
    /// `--full`.
    pub asked: bool,
    /// The bucket lacks what lists name: it was lost, and could not be made anew at once.
    pub lacked: bool,
    /// A device reported an error or drift that no full answers yet.
    pub reported: Option<Report>,
    /// Deltas since the last full.
    pub deltas: u64,
    /// Their bytes.
    pub delta_bytes: u64,
    /// Bytes of the last full.
    pub full_bytes: u64,
    /// The setting `publish.deltas`.
    pub most_deltas: u64,
}

/// What devices report of an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Who, and the fault's code.
    pub told: String,
    /// Whoever reports gets no further by what is out: a full is made though no row changed.
    pub is_stuck: bool,
}

/// What to make.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// The changes since the version before.
    pub delta: bool,
    /// All rows.
    pub full: bool,
    /// Why, in few words.
    pub reason: String,
}

impl Plan {
    fn new(delta: bool, full: bool, reason: impl Into<String>) -> Self {
        Plan { delta, full, reason: reason.into() }
    }
    /// Whether there is nothing to do.
    pub fn is_nothing(&self) -> bool {
        !self.delta && !self.full
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match (self.delta, self.full) {
            (false, false) => "nothing",
            (true, false) => "delta",
            (false, true) => "full",
            (true, true) => "delta and full",
        };
        write!(f, "{what}: {}", self.reason)
    }
}

/// Decides. Rules stand in order; the first that forbids a delta or asks for a full is the reason.
pub fn plan(facts: &Facts) -> Plan {
    if !facts.published {
        return Plan::new(false, true, "first publish");
    }
    if let Some(why) = &facts.rebuild {
        return Plan::new(false, true, format!("new contract, rebuilt by a full: {why}"));
    }
    if facts.new_epoch {
        return Plan::new(false, true, "a new trust epoch: versions before it do not count");
    }
    let changed = facts.changed_rows > 0 || facts.new_contract;
    if facts.ahead {
        return Plan::new(false, true, "versions are out that the ledger does not know");
    }
    let is_stuck = facts.reported.as_ref().is_some_and(|r| r.is_stuck);
    if !changed && !facts.asked && !facts.lacked && !is_stuck {
        return Plan::new(false, false, "nothing changed");
    }
    let what = match (facts.changed_rows, facts.new_contract) {
        (0, false) => "nothing changed".to_owned(),
        (0, true) => "new contract".to_owned(),
        (n, false) => format!("{n} rows changed"),
        (n, true) => format!("new contract, {n} rows changed"),
    };
    let full = if facts.asked {
        Some("--full".to_owned())
    } else if facts.lacked {
        Some("the bucket lacks what is published".to_owned())
    } else if let Some(report) = &facts.reported {
        Some(format!("reported: {}", report.told))
    } else if facts.full_bytes == 0 {
        Some("no full is listed".to_owned())
    } else if facts.deltas >= facts.most_deltas {
        Some(format!("{} deltas since the last full", facts.deltas))
    } else if facts.delta_bytes > facts.full_bytes {
        Some("the deltas outweigh the last full".to_owned())
    } else {
        None
    };
    match full {
        Some(why) => Plan::new(true, true, format!("{what}; {why}")),
        None => Plan::new(true, false, what),
    }
}

/// Whether a full may be a way round what a device reports. Where it refuses a full for what it is itself (an older build,
/// lower `[limits]`, too little memory), it refuses the next one as well, as a rule.
pub fn full_may_help(f: &Fault) -> bool {
    let of_its_own = ["BAD_SCHEMA", "UNKNOWN_FORMAT", "TOO_MUCH", "CRASH"];
    let refused = f.object.as_deref().and_then(|o| o.parse::<PackName>().ok());
    f.code != fault::PACK_IN_ERROR
        || refused.is_none_or(|pack| pack.kind == PackKind::Delta)
        || !f.text.split(':').next().is_some_and(|reason| of_its_own.contains(&reason))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn usual() -> Facts {
        Facts {
            published: true,
            changed_rows: 3,
            full_bytes: 1000,
            delta_bytes: 10,
            deltas: 1,
            most_deltas: 64,
            ..Facts::default()
        }
    }
    fn what(facts: Facts) -> String {
        plan(&facts).to_string()
    }

    #[test]
    fn no_full_is_made_for_who_refuses_each() {
        let reported = |code: &str, pack: &str, text: &str| Fault {
            code: code.into(),
            instance: Some("price@zone-east".parse().unwrap()),
            object: Some(format!("price@zone-east/{pack}.pack")),
            text: text.into(),
            since: proto::clock::Timestamp::UNIX_EPOCH,
        };
        for (pack, text, helps) in [
            ("0000000002.delta", "DIGEST: table price has digest", true),
            ("0000000002.full", "WRONG_HASH: x", true),
            ("0000000002.delta", "UNKNOWN_FORMAT: x", true),
            ("0000000002.delta", "BAD_SCHEMA: x", true),
            ("0000000002.full", "UNKNOWN_FORMAT: x", false),
            ("0000000002.full", "TOO_MUCH: line 9: over limits.rows = 8", false),
            ("0000000002.full", "BAD_SCHEMA: x", false),
            ("0000000002.full", "CRASH: x", false),
            ("0000000002.full", "CRASH: this agent died 5 times while applying it", false),
        ] {
            assert_eq!(full_may_help(&reported(fault::PACK_IN_ERROR, pack, text)), helps, "{pack} {text}");
        }
        assert!(full_may_help(&reported(fault::PACK_MISSING, "0000000002.full", "BAD_SCHEMA: x")));
    }

    #[test]
    fn each_rule_has_its_plan_and_reason() {
        assert_eq!(what(usual()), "delta: 3 rows changed");
        assert_eq!(what(Facts { changed_rows: 0, ..usual() }), "nothing: nothing changed");
        assert_eq!(what(Facts { published: false, ..usual() }), "full: first publish");
        assert_eq!(what(Facts { new_contract: true, changed_rows: 0, ..usual() }), "delta: new contract");
        assert!(
            what(Facts { rebuild: Some("x".into()), changed_rows: 0, ..usual() }).starts_with("full: new contract")
        );
        assert!(what(Facts { new_epoch: true, ..usual() }).starts_with("full: a new trust epoch"));
        assert!(what(Facts { deltas: 64, ..usual() }).starts_with("delta and full: 3 rows changed; 64 deltas"));
        assert!(!plan(&Facts { deltas: 63, ..usual() }).full);
        assert!(what(Facts { delta_bytes: 1001, ..usual() }).contains("outweigh"));
        assert!(!plan(&Facts { delta_bytes: 1000, ..usual() }).full);
        assert_eq!(what(Facts { asked: true, changed_rows: 0, ..usual() }), "delta and full: nothing changed; --full");
        let reported = |is_stuck| Some(Report { told: "0421 DRIFT".into(), is_stuck });
        assert!(what(Facts { reported: reported(false), ..usual() }).contains("reported: 0421 DRIFT"));
        assert!(plan(&Facts { reported: reported(false), changed_rows: 0, ..usual() }).is_nothing());
        let stuck = Facts { reported: reported(true), changed_rows: 0, ..usual() };
        assert_eq!(what(stuck), "delta and full: nothing changed; reported: 0421 DRIFT");
        assert!(plan(&Facts { deltas: 99, changed_rows: 0, ..usual() }).is_nothing());
        let lacked = Facts { lacked: true, changed_rows: 0, ..usual() };
        assert_eq!(what(lacked), "delta and full: nothing changed; the bucket lacks what is published");
        assert!(what(Facts { ahead: true, ..usual() }).starts_with("full: versions are out"));
    }
}
