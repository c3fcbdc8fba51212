//! The damage matrix: every kind of file, damaged in every way, while the programs are stopped and while they run.
//! Each cell shows what the table says (which `docs/FAILURES.md` prints), never sells a row that was not published,
//! never serves a damaged pack, and heals as the table says.
//!
//! `TILLCAST_BLESS=1` writes the table into the document. `TILLCAST_CELLS=TEXT` runs the cells whose names contain
//! the text; `TILLCAST_EXPLORE=1` prints what cells come to instead of judging them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "test code")]

mod flow;
mod places;
mod table;

use flow::Outcome;
use places::{Prepared, TARGETS, Target, faults, prepared};
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::sync::Mutex;
use table::Cell;

/// Cells at work at once: they wait more than they work.
const HANDS: usize = 4;

/// Runs cells on a few threads; all that went wrong, by the cells' names.
fn all(cells: Vec<Cell>) {
    let prepared = prepared();
    let wanted = std::env::var("TILLCAST_CELLS").unwrap_or_default();
    let cells: Vec<Cell> = cells.into_iter().filter(|c| !c.cannot_be() && c.name().contains(&wanted)).collect();
    println!("{} cells", cells.len());
    let (left, failed) = (Mutex::new(cells), Mutex::new(Vec::new()));
    std::thread::scope(|s| {
        for _ in 0..HANDS {
            s.spawn(|| {
                loop {
                    let Some(cell) = left.lock().unwrap().pop() else { return };
                    let target = TARGETS.iter().find(|t| t.name == cell.target).unwrap();
                    if let Err(why) = judged(&cell, target, &prepared) {
                        failed.lock().unwrap().push(format!("{}: {why}", cell.name()));
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "{} cells failed:\n\n{}", failed.len(), failed.join("\n\n"));
}

fn judged(cell: &Cell, target: &Target, prepared: &Prepared) -> Result<(), String> {
    let explore = std::env::var_os("TILLCAST_EXPLORE").is_some();
    let run = std::panic::AssertUnwindSafe(|| flow::run(cell, target, prepared, explore));
    let outcome = match std::panic::catch_unwind(run) {
        Ok(outcome) => outcome,
        Err(panic) => Err(panic.downcast_ref::<String>().cloned().unwrap_or_default()),
    };
    if explore {
        print(cell, &outcome);
        return Ok(());
    }
    judge(cell, &outcome?)
}

/// The codes that a table's row has all of; the reasons behind them may be more than it names.
const FAULTS: [&str; 17] = [
    "PACK_IN_ERROR",
    "PACK_MISSING",
    "DRIFT",
    "REFUSED",
    "SOURCE",
    "DISK_FULL",
    "HALTED",
    "LOCAL_FILES",
    "BIT_ROT",
    "SHADOW_LOST",
    "SPOOL_LOST",
    "LOG_STUCK",
    "CRASH_LOOP",
    "POWER_UNSTABLE",
    "IDENTITY_CLONE",
    "STREAM_REFUSED",
    "NOT_CHECKED",
];
const PASSING: [&str; 2] = ["REFUSED", "SOURCE"];

fn judge(cell: &Cell, outcome: &Outcome) -> Result<(), String> {
    let mut wrong = String::new();
    let mut expected = cell.expected();
    for (who, shown) in &outcome.shown {
        let e = expected.remove(who).unwrap_or_default();
        // Daemons end by being killed; at headquarters it is a command all the same.
        let may_be = shown.exit.is_some_and(|exit| e.maybe.contains(&exit.to_string()));
        if (!cell.running || *who == "hq") && shown.exit != Some(e.exit.unwrap_or(0)) && !may_be {
            writeln!(wrong, "{who} exits with {:?}, not {:?}", shown.exit, e.exit).unwrap();
        }
        for word in e.words.iter().filter(|w| !shown.codes.contains(*w) && !shown.text.contains(*w)) {
            writeln!(wrong, "{who} does not say {word}").unwrap();
        }
        for code in
            shown.codes.iter().filter(|c| FAULTS.contains(&c.as_str()) && !e.words.contains(c) && !e.maybe.contains(c))
        {
            // Where all run, a register meets what its relay goes through, and is told nothing that it must act on.
            if !(cell.running && *who == "register" && PASSING.contains(&code.as_str())) {
                writeln!(wrong, "{who} says {code}").unwrap();
            }
        }
        if !wrong.is_empty() {
            writeln!(wrong, "{:?}\n{}", shown.codes, &shown.text[shown.text.len().saturating_sub(3000)..]).unwrap();
        }
    }
    for who in expected.keys() {
        writeln!(wrong, "{who} says nothing").unwrap();
    }
    if outcome.healed.as_deref() != Some(cell.healed) {
        writeln!(wrong, "it is not healed by: {}\n{}", cell.healed, outcome.left).unwrap();
    }
    if wrong.is_empty() { Ok(()) } else { Err(wrong) }
}

fn print(cell: &Cell, outcome: &Result<Outcome, String>) {
    match outcome {
        Err(why) => println!("== {}: BROKEN {why}", cell.name()),
        Ok(o) => {
            let mut line = String::new();
            for (who, s) in &o.shown {
                write!(line, "{who} {:?} {} ", s.exit, s.codes.iter().cloned().collect::<Vec<_>>().join(" ")).unwrap();
                let errors: Vec<&str> = s.text.lines().filter(|l| l.contains("rror")).take(2).collect();
                write!(line, "{errors:.300?}; ").unwrap();
            }
            println!("== {} | {line}| {}", cell.name(), o.healed.as_ref().unwrap_or(&format!("NOT HEALED {}", o.left)));
        }
    }
}

/// Cells of some targets.
fn of(targets: &[&str], running: bool) -> Vec<Cell> {
    if std::env::var_os("TILLCAST_EXPLORE").is_some() {
        return every(targets, running);
    }
    table::cells().into_iter().filter(|c| targets.contains(&c.target) && c.running == running).collect()
}

/// Every cell that can be thought of, whether the table has it or not.
fn every(targets: &[&str], running: bool) -> Vec<Cell> {
    let of = |t: &'static Target| {
        let cell = move |fault| Cell { target: t.name, fault, running, seen: "quiet", healed: table::ITSELF };
        faults(t.kind).into_iter().map(cell)
    };
    static ALL: [Target; TARGETS.len()] = TARGETS;
    ALL.iter().filter(|t| targets.contains(&t.name)).flat_map(of).collect()
}

const BUCKET: [&str; 4] = ["trust.json", "trust file", "manifest", "pack"];
const DIRECTORIES: [&str; 15] = [
    "served manifest",
    "served trust.json",
    "served trust file",
    "incoming/",
    "ready/",
    "ok/",
    "error/",
    "reason file",
    "import/",
    "receipt",
    "incoming/ as a whole",
    "ready/ as a whole",
    "ok/ as a whole",
    "error/ as a whole",
    "import/ as a whole",
];
const DATABASES: [&str; 11] = [
    "shadow.db",
    "shadow.db's log",
    "relay.db",
    "relay's device.db",
    "store.db",
    "store.db's log",
    "store.db's log's index",
    "register's device.db",
    "published replica",
    "fleet.db",
    "publisher key",
];

#[test]
fn objects_in_the_bucket_while_stopped() {
    all(of(&BUCKET, false));
}

#[test]
fn objects_in_the_bucket_while_running() {
    all(of(&BUCKET, true));
}

#[test]
fn directories_while_stopped() {
    all(of(&DIRECTORIES, false));
}

#[test]
fn directories_while_running() {
    all(of(&DIRECTORIES, true));
}

#[test]
fn databases_while_stopped() {
    all(of(&DATABASES, false));
}

#[test]
fn databases_while_running() {
    all(of(&DATABASES, true));
}

#[test]
fn the_table_has_every_cell_and_the_document_has_the_table() {
    let listed: BTreeSet<(&str, &str)> = table::cells().iter().map(|c| (c.target, c.fault)).collect();
    let wanted: BTreeSet<(&str, &str)> =
        TARGETS.iter().flat_map(|t| faults(t.kind).into_iter().map(|f| (t.name, f))).collect();
    assert_eq!(listed, wanted);
    assert_eq!(TARGETS.iter().map(|t| t.name).collect::<Vec<_>>(), [&BUCKET[..], &DIRECTORIES, &DATABASES].concat());

    let path = tillcast_tests::repository().join("docs/FAILURES.md");
    let text = fs::read_to_string(&path).unwrap();
    let (begin, end) = ("<!-- written by tests/tests/damage: begin -->\n", "<!-- end -->");
    let (before, rest) = text.split_once(begin).unwrap();
    let (found, after) = rest.split_once(end).unwrap();
    let table = table::document();
    if std::env::var_os("TILLCAST_BLESS").is_some() {
        fs::write(&path, format!("{before}{begin}{table}\n{end}{after}")).unwrap();
    } else {
        assert_eq!(found.trim(), table.trim(), "run with TILLCAST_BLESS=1 to write the table into docs/FAILURES.md");
    }
}

/// Names of tests are told from other words by their length: three underscores.
#[test]
fn the_tests_that_the_document_names_are_there() {
    let root = tillcast_tests::repository();
    let mut sources = String::new();
    for dir in ["proto", "hq-publisher", "store-relay", "pos-agent", "tests"] {
        let files = tillcast_tests::files::tree(&root.join(dir)).into_keys().filter(|f| f.ends_with(".rs"));
        files.for_each(|f| sources += &fs::read_to_string(root.join(dir).join(f)).unwrap());
    }
    let text = fs::read_to_string(root.join("docs/FAILURES.md")).unwrap();
    let is_name = |w: &&str| w.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "_:".contains(c));
    let is_ours = |w: &&str| w.matches('_').count() >= 3 && !w.starts_with("test_") && !w.starts_with("tillcast_");
    let named: BTreeSet<&str> = text.split('`').filter(is_name).filter(is_ours).collect();
    assert!(named.len() > 150, "only {} tests are named", named.len());
    let is_missing = |name: &&&str| !sources.contains(&format!("fn {}(", name.rsplit("::").next().unwrap()));
    let missing: Vec<_> = named.iter().filter(is_missing).collect();
    assert!(missing.is_empty(), "docs/FAILURES.md names tests that are not there: {missing:?}");
}
