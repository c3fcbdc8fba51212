//! The table: what each cell is expected to show and what heals it, as `docs/FAILURES.md` prints it.

use std::collections::BTreeMap;
use std::fmt::Write as _;

/// One cell.
#[derive(Debug, Clone)]
pub struct Cell {
    /// The target's name.
    pub target: &'static str,
    pub fault: &'static str,
    /// Whether the programs run while it happens.
    pub running: bool,
    /// What is seen.
    pub seen: &'static str,
    /// What heals it.
    pub healed: &'static str,
}

/// By itself, within a few cycles.
pub const ITSELF: &str = "itself";
const CANNOT: &str = "cannot be:";

impl Cell {
    /// `TARGET: FAULT while running`.
    pub fn name(&self) -> String {
        format!("{}: {} while {}", self.target, self.fault, if self.running { "running" } else { "stopped" })
    }
    /// Whether there is no such thing, and the table says why.
    pub fn cannot_be(&self) -> bool {
        self.seen.starts_with(CANNOT)
    }
    /// What each program shows: exit code, where it is told, and words.
    pub fn expected(&self) -> BTreeMap<&'static str, Expected> {
        if self.seen == "quiet" { BTreeMap::new() } else { self.seen.split("; ").map(Expected::parse).collect() }
    }
}

/// What one program shows.
#[derive(Debug, Clone, Default)]
pub struct Expected {
    pub exit: Option<i32>,
    pub words: Vec<String>,
    /// What may be seen or not, as chance has it, an exit code too; in round brackets.
    pub maybe: Vec<String>,
}

impl Expected {
    /// `relay 3 REFUSED "a phrase"`.
    fn parse(text: &'static str) -> (&'static str, Expected) {
        let (who, mut rest) = text.split_once(' ').unwrap_or((text, ""));
        let mut expected = Expected::default();
        while !rest.is_empty() {
            let (word, after) = match rest.strip_prefix('"') {
                Some(quoted) => quoted.split_once('"').unwrap_or_else(|| panic!("an open quote in {text}")),
                None => rest.split_once(' ').unwrap_or((rest, "")),
            };
            rest = after.trim_start();
            match word.parse() {
                Ok(exit) => expected.exit = Some(exit),
                Err(_) => match word.strip_prefix('(').and_then(|w| w.strip_suffix(')')) {
                    Some(maybe) => expected.maybe.push(maybe.to_owned()),
                    None => expected.words.push(word.to_owned()),
                },
            }
        }
        (who, expected)
    }
}

/// All cells, those that cannot be included.
pub fn cells() -> Vec<Cell> {
    let mut cells = Vec::new();
    let mut target = "";
    for line in TABLE.lines().map(str::trim).filter(|l| !l.is_empty()) {
        if let Some(name) = line.strip_prefix("# ") {
            target = name;
            continue;
        }
        let columns: Vec<&str> = line.split(" | ").map(str::trim).collect();
        let (fault, [stopped, healed, running, healed_running]) = match columns[..] {
            [fault, why] if why.starts_with(CANNOT) => (fault, [why, "", why, ""]),
            [fault, seen, healed, why] if why.starts_with(CANNOT) => (fault, [seen, healed, why, ""]),
            [fault, a, b, c, d] => (fault, [a, b, c, d]),
            _ => panic!("not a row of the table: {line}"),
        };
        cells.push(Cell { target, fault, running: false, seen: stopped, healed });
        cells.push(Cell { target, fault, running: true, seen: running, healed: healed_running });
    }
    cells
}

/// The table as `docs/FAILURES.md` has it.
pub fn document() -> String {
    let mut out = String::new();
    let mut target = "";
    for pair in cells().chunks(2) {
        let (stopped, running) = (&pair[0], &pair[1]);
        if stopped.target != target {
            target = stopped.target;
            write!(out, "\n**{target}**\n\n| fault | while stopped | healed by | while running | healed by |\n| --- | --- | --- | --- | --- |\n").unwrap();
        }
        let cell = |text: &str| text.replace('|', "\\|");
        let columns = [stopped.fault, stopped.seen, stopped.healed, running.seen, running.healed].map(cell);
        if stopped.cannot_be() {
            writeln!(out, "| {} | {} | | | |", columns[0], columns[1]).unwrap();
        } else {
            writeln!(out, "| {} |", columns.join(" | ")).unwrap();
        }
    }
    out
}

const TABLE: &str = r#"
# trust.json
truncate | relay 3 REFUSED NOT_AN_ENVELOPE | `verify --mend` | relay REFUSED NOT_AN_ENVELOPE | `verify --mend`
empty | relay 3 REFUSED NOT_AN_ENVELOPE | `verify --mend` | relay REFUSED NOT_AN_ENVELOPE | `verify --mend`
delete | relay 1 SOURCE | `publish` | relay SOURCE | `publish`
flip payload | quiet | itself | quiet | itself
flip signature | quiet | itself | quiet | itself
swap | relay 3 REFUSED NOT_AN_ENVELOPE | `verify --mend` | relay REFUSED NOT_AN_ENVELOPE | `verify --mend`
duplicate | quiet | itself | quiet | itself
roll back | relay 3 REFUSED BAD_SIGNATURE | `verify --mend` | relay REFUSED BAD_SIGNATURE | `verify --mend`
future version | quiet | itself | quiet | itself
wrong owner | relay 1 SOURCE | `verify --mend` | relay SOURCE | `verify --mend`
read-only | quiet | itself | quiet | itself
# trust file
truncate | relay 3 REFUSED NOT_AN_ENVELOPE | `verify --mend` | relay REFUSED NOT_AN_ENVELOPE | `verify --mend`
empty | relay 3 REFUSED NOT_AN_ENVELOPE | `verify --mend` | relay REFUSED NOT_AN_ENVELOPE | `verify --mend`
delete | relay 1 SOURCE | `verify --mend` | relay SOURCE | `verify --mend`
flip payload | relay 3 REFUSED BAD_SIGNATURE | `verify --mend` | relay REFUSED BAD_SIGNATURE | `verify --mend`
flip signature | relay 3 REFUSED BAD_SIGNATURE | `verify --mend` | relay REFUSED BAD_SIGNATURE | `verify --mend`
swap | relay 3 REFUSED BAD_TRUST | `verify --mend` | relay REFUSED BAD_TRUST | `verify --mend`
duplicate | quiet | itself | quiet | itself
roll back | cannot be: it has one version for ever; other bytes are a swap
future version | relay 3 REFUSED BAD_TRUST | `verify --mend` | relay REFUSED BAD_TRUST | `verify --mend`
wrong owner | relay 1 SOURCE | `verify --mend` | relay SOURCE | `verify --mend`
read-only | quiet | itself | quiet | itself
# manifest
truncate | relay 3 REFUSED NOT_AN_ENVELOPE; register 3 REFUSED BAD_SIGNATURE | `publish` | relay REFUSED NOT_AN_ENVELOPE | `publish`
empty | relay 3 REFUSED NOT_AN_ENVELOPE; register 3 REFUSED BAD_SIGNATURE | `publish` | relay REFUSED NOT_AN_ENVELOPE | `publish`
delete | relay 1 SOURCE | `publish` | relay SOURCE | `publish`
flip payload | relay 3 REFUSED BAD_SIGNATURE; register 3 REFUSED BAD_SIGNATURE | `publish` | relay REFUSED BAD_SIGNATURE | `publish`
flip signature | relay 3 REFUSED BAD_SIGNATURE; register 3 REFUSED BAD_SIGNATURE | `publish` | relay REFUSED BAD_SIGNATURE | `publish`
swap | relay 3 REFUSED OTHER_STORE; register 3 REFUSED BAD_SIGNATURE | `publish` | relay REFUSED OTHER_STORE | `publish`
duplicate | quiet | itself | quiet | itself
roll back | relay 3 REFUSED BAD_SIGNATURE; register 3 REFUSED BAD_SIGNATURE | `publish` | relay REFUSED BAD_SIGNATURE | `publish`
future version | relay 3 REFUSED UNKNOWN_FORMAT; register 3 REFUSED BAD_SIGNATURE | `verify --mend` | relay REFUSED UNKNOWN_FORMAT | `verify --mend`
wrong owner | relay 1 SOURCE | `verify --mend` | relay SOURCE | `verify --mend`
read-only | quiet | itself | quiet | itself
# pack
truncate | relay 3 PACK_IN_ERROR TOO_SHORT | `publish --full` | relay PACK_IN_ERROR TOO_SHORT | `publish --full`
empty | relay 3 PACK_IN_ERROR TOO_SHORT | `publish --full` | relay PACK_IN_ERROR TOO_SHORT | `publish --full`
delete | relay 3 "headquarters is at 3" | `publish --full` | relay "headquarters is at 3" | `publish --full`
flip header | relay 3 PACK_IN_ERROR WRONG_HASH | `publish --full` | relay PACK_IN_ERROR WRONG_HASH | `publish --full`
flip schema | relay 3 PACK_IN_ERROR WRONG_HASH | `publish --full` | relay PACK_IN_ERROR WRONG_HASH | `publish --full`
flip rows | relay 3 PACK_IN_ERROR WRONG_HASH | `publish --full` | relay PACK_IN_ERROR WRONG_HASH | `publish --full`
flip trailer | relay 3 PACK_IN_ERROR WRONG_HASH | `publish --full` | relay PACK_IN_ERROR WRONG_HASH | `publish --full`
swap | relay 3 PACK_IN_ERROR | `publish --full` | relay PACK_IN_ERROR | `publish --full`
duplicate | quiet | itself | quiet | itself
roll back | cannot be: it has one version for ever; other bytes are a swap
future version | relay 3 PACK_IN_ERROR UNKNOWN_FORMAT | `publish --full` | relay PACK_IN_ERROR UNKNOWN_FORMAT | `publish --full`
wrong owner | relay 3 "headquarters is at 3" | `publish --full` | relay "headquarters is at 3" | `publish --full`
read-only | quiet | itself | quiet | itself
# served manifest
truncate | quiet | itself | quiet | itself
empty | quiet | itself | quiet | itself
delete | quiet | itself | quiet | itself
flip payload | quiet | itself | quiet | itself
flip signature | quiet | itself | quiet | itself
swap | quiet | itself | quiet | itself
duplicate | quiet | itself | quiet | itself
roll back | quiet | itself | quiet | itself
future version | quiet | itself | quiet | itself
wrong owner | quiet | itself | quiet | itself
read-only | quiet | itself | quiet | itself
# served trust.json
truncate | relay BIT_ROT | itself | quiet | itself
empty | relay BIT_ROT | itself | quiet | itself
delete | quiet | itself | quiet | itself
flip payload | relay BIT_ROT | itself | quiet | itself
flip signature | relay BIT_ROT | itself | quiet | itself
swap | relay BIT_ROT | itself | quiet | itself
duplicate | quiet | itself | quiet | itself
roll back | quiet | itself | quiet | itself
future version | relay BIT_ROT | itself | quiet | itself
wrong owner | relay BIT_ROT | itself | quiet | itself
read-only | quiet | itself | quiet | itself
# served trust file
truncate | relay BIT_ROT | itself | relay BIT_ROT | itself
empty | relay BIT_ROT | itself | relay BIT_ROT | itself
delete | quiet | itself | quiet | itself
flip payload | relay BIT_ROT | itself | relay BIT_ROT | itself
flip signature | relay BIT_ROT | itself | relay BIT_ROT | itself
swap | relay BIT_ROT | itself | relay BIT_ROT | itself
duplicate | quiet | itself | quiet | itself
roll back | cannot be: it has one version for ever; other bytes are a swap
future version | relay BIT_ROT | itself | relay BIT_ROT | itself
wrong owner | relay BIT_ROT | itself | relay BIT_ROT | itself
read-only | quiet | itself | quiet | itself
# incoming/
truncate | quiet | itself | cannot be: a part lies there for moments; see the directory as a whole
empty | quiet | itself | cannot be: a part lies there for moments; see the directory as a whole
delete | quiet | itself | cannot be: a part lies there for moments; see the directory as a whole
flip header | quiet | itself | cannot be: a part lies there for moments; see the directory as a whole
flip schema | quiet | itself | cannot be: a part lies there for moments; see the directory as a whole
flip rows | quiet | itself | cannot be: a part lies there for moments; see the directory as a whole
flip trailer | quiet | itself | cannot be: a part lies there for moments; see the directory as a whole
swap | quiet | itself | cannot be: a part lies there for moments; see the directory as a whole
duplicate | quiet | itself | cannot be: a part lies there for moments; see the directory as a whole
roll back | cannot be: it has one version for ever; other bytes are a swap
future version | cannot be: a file that is not the listed one is but a swap
wrong owner | relay 3 LOCAL_FILES | itself | cannot be: a part lies there for moments; see the directory as a whole
read-only | relay 3 LOCAL_FILES | itself | cannot be: a part lies there for moments; see the directory as a whole
# ready/
truncate | quiet | itself | cannot be: a pack lies there for moments; see the directory as a whole
empty | quiet | itself | cannot be: a pack lies there for moments; see the directory as a whole
delete | quiet | itself | cannot be: a pack lies there for moments; see the directory as a whole
flip header | relay BIT_ROT | itself | cannot be: a pack lies there for moments; see the directory as a whole
flip schema | relay BIT_ROT | itself | cannot be: a pack lies there for moments; see the directory as a whole
flip rows | relay BIT_ROT | itself | cannot be: a pack lies there for moments; see the directory as a whole
flip trailer | relay BIT_ROT | itself | cannot be: a pack lies there for moments; see the directory as a whole
swap | quiet | itself | cannot be: a pack lies there for moments; see the directory as a whole
duplicate | quiet | itself | cannot be: a pack lies there for moments; see the directory as a whole
roll back | cannot be: it has one version for ever; other bytes are a swap
future version | cannot be: a file that is not the listed one is but a swap
wrong owner | relay 3 LOCAL_FILES | owner and mode put right, and a restart | cannot be: a pack lies there for moments; see the directory as a whole
read-only | quiet | itself | cannot be: a pack lies there for moments; see the directory as a whole
# ok/
truncate | quiet | itself | relay BIT_ROT | itself
empty | quiet | itself | relay BIT_ROT | itself
delete | quiet | itself | relay BIT_ROT | itself
flip header | relay BIT_ROT | itself | relay BIT_ROT | itself
flip schema | relay BIT_ROT | itself | relay BIT_ROT | itself
flip rows | relay BIT_ROT | itself | relay BIT_ROT | itself
flip trailer | relay BIT_ROT | itself | relay BIT_ROT | itself
swap | quiet | itself | relay BIT_ROT | itself
duplicate | quiet | itself | quiet | itself
roll back | cannot be: it has one version for ever; other bytes are a swap
future version | cannot be: a file that is not the listed one is but a swap
wrong owner | relay BIT_ROT | itself | relay BIT_ROT | itself
read-only | quiet | itself | quiet | itself
# error/
truncate | relay 3 PACK_IN_ERROR | the next publish | relay PACK_IN_ERROR | the next publish
empty | relay 3 PACK_IN_ERROR | the next publish | relay PACK_IN_ERROR | the next publish
delete | relay 3 PACK_IN_ERROR | the next publish | relay PACK_IN_ERROR | the next publish
flip header | relay 3 PACK_IN_ERROR | the next publish | relay PACK_IN_ERROR | the next publish
flip schema | relay 3 PACK_IN_ERROR | the next publish | relay PACK_IN_ERROR | the next publish
flip rows | relay 3 PACK_IN_ERROR | the next publish | relay PACK_IN_ERROR | the next publish
flip trailer | relay 3 PACK_IN_ERROR | the next publish | relay PACK_IN_ERROR | the next publish
swap | relay 3 PACK_IN_ERROR | the next publish | relay PACK_IN_ERROR | the next publish
duplicate | relay 3 PACK_IN_ERROR | the next publish | relay PACK_IN_ERROR | the next publish
roll back | cannot be: it has one version for ever; other bytes are a swap
future version | cannot be: it was refused; nobody reads its bytes again
wrong owner | relay 3 PACK_IN_ERROR | the next publish | relay PACK_IN_ERROR | the next publish
read-only | relay 3 PACK_IN_ERROR | the next publish | relay PACK_IN_ERROR | the next publish
# reason file
truncate | relay 3 PACK_IN_ERROR | the next publish | relay PACK_IN_ERROR | the next publish
empty | relay 3 PACK_IN_ERROR | the next publish | relay PACK_IN_ERROR | the next publish
delete | relay 3 PACK_IN_ERROR | the next publish | relay PACK_IN_ERROR | the next publish
flip | relay 3 PACK_IN_ERROR | the next publish | relay PACK_IN_ERROR | the next publish
swap | relay 3 PACK_IN_ERROR | the next publish | relay PACK_IN_ERROR | the next publish
duplicate | relay 3 PACK_IN_ERROR | the next publish | relay PACK_IN_ERROR | the next publish
roll back | cannot be: it is written once a refusal
future version | cannot be: it is for people and has no version
wrong owner | relay 3 PACK_IN_ERROR | the next publish | relay PACK_IN_ERROR | the next publish
read-only | relay 3 PACK_IN_ERROR | the next publish | relay PACK_IN_ERROR | the next publish
# import/
truncate | relay 3 "headquarters is at 3" | `store-relay import` again | cannot be: it is filled and emptied within one import
empty | relay 3 "headquarters is at 3" | `store-relay import` again | cannot be: it is filled and emptied within one import
delete | relay 3 "headquarters is at 3" | `store-relay import` again | cannot be: it is filled and emptied within one import
flip header | relay 3 "headquarters is at 3" | `store-relay import` again | cannot be: it is filled and emptied within one import
flip schema | relay 3 "headquarters is at 3" | `store-relay import` again | cannot be: it is filled and emptied within one import
flip rows | relay 3 "headquarters is at 3" | `store-relay import` again | cannot be: it is filled and emptied within one import
flip trailer | relay 3 "headquarters is at 3" | `store-relay import` again | cannot be: it is filled and emptied within one import
swap | relay 3 "headquarters is at 3" | `store-relay import` again | cannot be: it is filled and emptied within one import
duplicate | quiet | itself | cannot be: it is filled and emptied within one import
roll back | cannot be: it has one version for ever; other bytes are a swap
future version | cannot be: a file that is not the listed one is but a swap
wrong owner | relay 3 "headquarters is at 3" | `store-relay import` again | cannot be: it is filled and emptied within one import
read-only | quiet | itself | cannot be: it is filled and emptied within one import
# receipt
truncate | hq 1 "refused" | `store-relay import` again | hq 1 "refused" | `store-relay import` again
empty | hq 1 "refused" | `store-relay import` again | hq 1 "refused" | `store-relay import` again
delete | hq 1 "refused" | `store-relay import` again | hq 1 "refused" | `store-relay import` again
flip payload | hq 1 "refused" | `store-relay import` again | hq 1 "refused" | `store-relay import` again
flip signature | hq 1 "refused" | `store-relay import` again | hq 1 "refused" | `store-relay import` again
swap | hq 1 "refused" | `store-relay import` again | hq 1 "refused" | `store-relay import` again
duplicate | quiet | itself | quiet | itself
roll back | quiet | `store-relay import` again | quiet | `store-relay import` again
future version | hq 1 "refused" | `store-relay import` again | hq 1 "refused" | `store-relay import` again
wrong owner | hq 1 "refused" | `store-relay import` again | hq 1 "refused" | `store-relay import` again
read-only | quiet | itself | quiet | itself
# incoming/ as a whole
delete | quiet | itself | quiet | itself
swap | quiet | itself | quiet | itself
roll back | cannot be: it is empty between downloads and imports
wrong owner | relay 1 "Permission denied" | owner and mode put right, and a restart | relay LOCAL_FILES | owner and mode put right, and a restart
read-only | quiet | itself | quiet | itself
# ready/ as a whole
delete | quiet | itself | quiet | itself
swap | quiet | itself | relay BIT_ROT | itself
roll back | cannot be: it is empty between downloads and imports
wrong owner | relay 1 "Permission denied" | owner and mode put right, and a restart | relay LOCAL_FILES | owner and mode put right, and a restart
read-only | quiet | itself | quiet | itself
# ok/ as a whole
delete | quiet | itself | relay BIT_ROT | itself
swap | quiet | itself | relay BIT_ROT | itself
roll back | quiet | itself | relay BIT_ROT | itself
wrong owner | relay 1 "Permission denied" | owner and mode put right, and a restart | relay LOCAL_FILES (BIT_ROT) | owner and mode put right, and a restart
read-only | relay 3 LOCAL_FILES | itself | relay LOCAL_FILES | owner and mode put right, and a restart
# error/ as a whole
delete | relay 3 PACK_IN_ERROR | the next publish | relay PACK_IN_ERROR | the next publish
swap | relay 3 PACK_IN_ERROR | the next publish | relay PACK_IN_ERROR | the next publish
roll back | relay 3 PACK_IN_ERROR | the next publish | relay PACK_IN_ERROR | the next publish
wrong owner | relay 1 (PACK_IN_ERROR) "Permission denied"; register 1 SOURCE | owner and mode put right, a restart, and the next publish | relay PACK_IN_ERROR | owner and mode put right, a restart, and the next publish
read-only | relay 3 PACK_IN_ERROR | the next publish | relay PACK_IN_ERROR | the next publish
# import/ as a whole
delete | quiet | itself | quiet | itself
swap | quiet | itself | quiet | itself
roll back | cannot be: it is empty between downloads and imports
wrong owner | relay 1 "Permission denied" | owner and mode put right, and a restart | quiet | itself
read-only | quiet | itself | quiet | itself
# shadow.db
truncate | relay SHADOW_LOST | itself | relay SHADOW_LOST (LOCAL_FILES) | itself
empty | quiet | itself | relay (SHADOW_LOST) (LOCAL_FILES) | itself
delete | quiet | itself | relay (SHADOW_LOST) (LOCAL_FILES) | itself
flip header | relay SHADOW_LOST | itself | relay SHADOW_LOST (LOCAL_FILES) | itself
flip schema | relay SHADOW_LOST | itself | relay SHADOW_LOST (LOCAL_FILES) | itself
flip row | quiet | itself | quiet | itself
flip index | relay DRIFT | itself | relay DRIFT | itself
flip end | relay (DRIFT) | itself | relay (DRIFT) | itself
swap | quiet | itself | quiet | itself
duplicate | quiet | itself | quiet | itself
roll back | quiet | itself | quiet | itself
future version | relay 1 "update this program" | the file moved away, and a restart | relay LOCAL_FILES | the file moved away, and a restart
wrong owner | relay 1 "unable to open database file" | owner and mode put right, and a restart | relay LOCAL_FILES | owner and mode put right, and a restart
read-only | relay 1 "it cannot be written" | owner and mode put right, and a restart | relay LOCAL_FILES | owner and mode put right, and a restart
# shadow.db's log
truncate | quiet | itself | cannot be: it is open, and cut when there is nothing else to do; of one that is deleted or replaced the notes below tell
empty | quiet | itself | cannot be: it is open, and cut when there is nothing else to do; of one that is deleted or replaced the notes below tell
delete | quiet | itself | cannot be: it is open, and cut when there is nothing else to do; of one that is deleted or replaced the notes below tell
flip header | quiet | itself | cannot be: it is open, and cut when there is nothing else to do; of one that is deleted or replaced the notes below tell
flip frame | quiet | itself | cannot be: it is open, and cut when there is nothing else to do; of one that is deleted or replaced the notes below tell
flip end | quiet | itself | cannot be: it is open, and cut when there is nothing else to do; of one that is deleted or replaced the notes below tell
swap | relay (3) (SHADOW_LOST) (LOCAL_FILES) | itself | cannot be: it is open, and cut when there is nothing else to do; of one that is deleted or replaced the notes below tell
duplicate | quiet | itself | cannot be: it is open, and cut when there is nothing else to do; of one that is deleted or replaced the notes below tell
roll back | quiet | itself | cannot be: it is open, and cut when there is nothing else to do; of one that is deleted or replaced the notes below tell
future version | cannot be: its form is SQLite's, the same since 2010
wrong owner | relay 1 "unable to open database file" | owner and mode put right, and a restart | cannot be: it is open, and cut when there is nothing else to do; of one that is deleted or replaced the notes below tell
read-only | relay LOCAL_FILES | owner and mode put right, and a restart | cannot be: it is open, and cut when there is nothing else to do; of one that is deleted or replaced the notes below tell
# relay.db
truncate | relay SPOOL_LOST | itself | relay (SPOOL_LOST) (LOCAL_FILES) | itself
empty | quiet | itself | relay (SPOOL_LOST) (LOCAL_FILES) | itself
delete | quiet | itself | quiet | itself
flip header | relay SPOOL_LOST | itself | relay (SPOOL_LOST) (LOCAL_FILES) | itself
flip schema | relay SPOOL_LOST | itself | relay (SPOOL_LOST) (LOCAL_FILES) | itself
flip row | quiet | itself | relay (SPOOL_LOST) (LOCAL_FILES) | itself
flip index | quiet | itself | relay (SPOOL_LOST) (LOCAL_FILES) | itself
flip end | quiet | itself | relay (SPOOL_LOST) (LOCAL_FILES) | itself
swap | quiet | itself | relay (SPOOL_LOST) (LOCAL_FILES) | itself
duplicate | quiet | itself | quiet | itself
roll back | quiet | itself | relay (SPOOL_LOST) (LOCAL_FILES) | itself
future version | relay SPOOL_LOST | itself | quiet | itself
wrong owner | relay 1 "unable to open database file" | owner and mode put right, and a restart | quiet | itself
read-only | relay 1 "it cannot be written" | owner and mode put right, and a restart | quiet | itself
# relay's device.db
truncate | relay 1 "malformed" | the relay enrolled anew | quiet | itself
empty | relay 2 "holds no enrolment" | the relay enrolled anew | quiet | itself
delete | relay 2 "holds no enrolment" | the relay enrolled anew | quiet | itself
flip header | relay 1 "not a database" | the relay enrolled anew | quiet | itself
flip schema | relay 1 "malformed" | the relay enrolled anew | quiet | itself
flip row | quiet | itself | quiet | itself
flip index | relay 1 "id is damaged" | the relay enrolled anew | quiet | itself
flip end | quiet | itself | quiet | itself
swap | relay 2 "is enrolled as" | the relay enrolled anew | quiet | itself
duplicate | quiet | itself | quiet | itself
roll back | quiet | itself | quiet | itself
future version | relay 1 "update this program" | the relay enrolled anew | quiet | itself
wrong owner | relay 1 "unable to open database file" | owner and mode put right, and a restart | quiet | itself
read-only | relay 1 "it cannot be written" | owner and mode put right, and a restart | quiet | itself
# store.db
truncate | quiet | itself | register DRIFT | itself
empty | quiet | itself | register DRIFT | itself
delete | quiet | itself | register (DRIFT) | itself
flip header | quiet | itself | quiet | a restart
flip schema | quiet | itself | quiet | itself
flip row | quiet | `pos-agent verify` | quiet | `pos-agent verify`
flip index | quiet | itself | register (DRIFT) | itself
flip end | quiet | itself | quiet | itself
swap | quiet | itself | register (DRIFT) | a restart
duplicate | quiet | itself | quiet | itself
roll back | quiet | itself | register (DRIFT) | a restart
future version | register 1 "update this program" | the file moved away, and a restart | quiet | itself
wrong owner | register 1 "unable to open database file" | owner and mode put right, and a restart | quiet | itself
read-only | register 1 "it cannot be written" | owner and mode put right, and a restart | quiet | itself
# store.db's log
truncate | quiet | itself | cannot be: it is open, and cut when there is nothing else to do; of one that is deleted or replaced the notes below tell
empty | quiet | itself | cannot be: it is open, and cut when there is nothing else to do; of one that is deleted or replaced the notes below tell
delete | quiet | itself | cannot be: it is open, and cut when there is nothing else to do; of one that is deleted or replaced the notes below tell
flip header | quiet | itself | cannot be: it is open, and cut when there is nothing else to do; of one that is deleted or replaced the notes below tell
flip frame | quiet | itself | cannot be: it is open, and cut when there is nothing else to do; of one that is deleted or replaced the notes below tell
flip end | quiet | itself | cannot be: it is open, and cut when there is nothing else to do; of one that is deleted or replaced the notes below tell
swap | quiet | itself | cannot be: it is open, and cut when there is nothing else to do; of one that is deleted or replaced the notes below tell
duplicate | quiet | itself | cannot be: it is open, and cut when there is nothing else to do; of one that is deleted or replaced the notes below tell
roll back | quiet | itself | cannot be: it is open, and cut when there is nothing else to do; of one that is deleted or replaced the notes below tell
future version | cannot be: its form is SQLite's, the same since 2010
wrong owner | register 1 "unable to open database file" | owner and mode put right, and a restart | cannot be: it is open, and cut when there is nothing else to do; of one that is deleted or replaced the notes below tell
read-only | quiet | itself | cannot be: it is open, and cut when there is nothing else to do; of one that is deleted or replaced the notes below tell
# store.db's log's index
truncate | quiet | itself | cannot be: it is open, and cut when there is nothing else to do; of one that is deleted or replaced the notes below tell
empty | quiet | itself | cannot be: it is open, and cut when there is nothing else to do; of one that is deleted or replaced the notes below tell
delete | quiet | itself | cannot be: it is open, and cut when there is nothing else to do; of one that is deleted or replaced the notes below tell
flip header | quiet | itself | cannot be: it is open, and cut when there is nothing else to do; of one that is deleted or replaced the notes below tell
flip frame | quiet | itself | cannot be: it is open, and cut when there is nothing else to do; of one that is deleted or replaced the notes below tell
flip end | quiet | itself | cannot be: it is open, and cut when there is nothing else to do; of one that is deleted or replaced the notes below tell
swap | quiet | itself | cannot be: it is open, and cut when there is nothing else to do; of one that is deleted or replaced the notes below tell
duplicate | quiet | itself | cannot be: it is open, and cut when there is nothing else to do; of one that is deleted or replaced the notes below tell
roll back | quiet | itself | cannot be: it is open, and cut when there is nothing else to do; of one that is deleted or replaced the notes below tell
future version | cannot be: its form is SQLite's, the same since 2010
wrong owner | register 1 "unable to open database file" | owner and mode put right, and a restart | cannot be: it is open, and cut when there is nothing else to do; of one that is deleted or replaced the notes below tell
read-only | quiet | itself | cannot be: it is open, and cut when there is nothing else to do; of one that is deleted or replaced the notes below tell
# register's device.db
truncate | register 1 "malformed" | the register enrolled anew | quiet | itself
empty | register 2 "holds no enrolment" | the register enrolled anew | quiet | itself
delete | register 2 "holds no enrolment" | the register enrolled anew | quiet | itself
flip header | register 1 "not a database" | the register enrolled anew | quiet | itself
flip schema | register 1 "malformed" | the register enrolled anew | quiet | itself
flip row | quiet | itself | quiet | itself
flip index | register 1 "id is damaged" | the register enrolled anew | quiet | itself
flip end | quiet | itself | quiet | itself
swap | register 2 "is enrolled as" | the register enrolled anew | quiet | itself
duplicate | quiet | itself | quiet | itself
roll back | register REFUSED | itself | quiet | itself
future version | register 1 "update this program" | the register enrolled anew | quiet | itself
wrong owner | register 1 "unable to open database file" | owner and mode put right, and a restart | quiet | itself
read-only | register 1 "it cannot be written" | owner and mode put right, and a restart | quiet | itself
# published replica
truncate | quiet | itself | quiet | itself
empty | quiet | itself | quiet | itself
delete | quiet | itself | quiet | itself
flip header | quiet | itself | quiet | itself
flip schema | quiet | itself | quiet | itself
flip row | quiet | itself | quiet | itself
flip index | quiet | itself | quiet | itself
flip end | quiet | itself | quiet | itself
swap | quiet | itself | quiet | itself
duplicate | quiet | itself | quiet | itself
roll back | quiet | itself | quiet | itself
future version | hq 1 "update this program" | the file moved away, and `publish` | hq 1 "update this program" | the file moved away, and `publish`
wrong owner | hq 1 "unable to open database file" | owner and mode put right, and a restart | hq 1 "unable to open database file" | owner and mode put right, and a restart
read-only | hq 1 "it cannot be written" | owner and mode put right, and a restart | hq 1 "it cannot be written" | owner and mode put right, and a restart
# fleet.db
truncate | hq 1 "malformed" | the file moved away, and `publish` | hq 1 "malformed" | the file moved away, and `publish`
empty | quiet | itself | hq 1 "was emptied" | a restart
delete | quiet | itself | quiet | itself
flip header | hq 1 "not a database" | the file moved away, and `publish` | hq 1 "not a database" | the file moved away, and `publish`
flip schema | hq 1 "malformed" | the file moved away, and `publish` | hq 1 "malformed" | the file moved away, and `publish`
flip row | quiet | itself | quiet | itself
flip index | quiet | itself | quiet | itself
flip end | quiet | itself | quiet | itself
swap | quiet | itself | quiet | itself
duplicate | quiet | itself | quiet | itself
roll back | hq 1 "run `publish`" | itself | hq 1 "run `publish`" | itself
future version | hq 1 "update it" | the file moved away, and `publish` | hq 1 "update it" | the file moved away, and `publish`
wrong owner | hq 1 "unable to open database file" | owner and mode put right, and a restart | hq 1 "unable to open database file" | owner and mode put right, and a restart
read-only | hq 1 "readonly database" | owner and mode put right, and a restart | hq 1 "readonly database" | owner and mode put right, and a restart
# publisher key
truncate | hq 1 "it is no key file" | the key file put back, and `publish` | hq 1 "it is no key file" | the key file put back, and `publish`
empty | hq 1 "it is no key file" | the key file put back, and `publish` | hq 1 "it is no key file" | the key file put back, and `publish`
delete | hq 1 "none of the publisher keys" | the key file put back, and `publish` | hq 1 "none of the publisher keys" | the key file put back, and `publish`
flip | hq 1 "none of the publisher keys" | the key file put back, and `publish` | hq 1 "none of the publisher keys" | the key file put back, and `publish`
swap | hq 1 "none of the publisher keys" | the key file put back, and `publish` | hq 1 "none of the publisher keys" | the key file put back, and `publish`
duplicate | quiet | itself | quiet | itself
roll back | cannot be: it is written once
future version | cannot be: it has no version
wrong owner | hq 1 "Permission denied" | owner and mode put right, and a restart | hq 1 "Permission denied" | owner and mode put right, and a restart
read-only | quiet | itself | quiet | itself
"#;
