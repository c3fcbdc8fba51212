//! Random damage to `store.db` and its log: `verify` finds it, or what is read is whole all the same; and the agent that
//! meets it has the newest version again after some cycles.

use super::kit::*;
use crate::agent::Agent;
use crate::verify;
use proto::limits::Limits;
use rusqlite::{Connection, OpenFlags};
use std::fs;
use std::path::Path;
use std::time::Duration;
use tillcast_tests::Dice;

const PAGE: usize = 4096;

/// Both files, as a register has them in the middle of its work.
type Files = [Vec<u8>; 2];

/// Does something to one of the files; what, for the failure's text.
fn damage(dice: &mut Dice, files: &mut Files) -> String {
    let of = usize::from(!files[1].is_empty() && dice.index(3) == 0);
    let length = files[of].len();
    let at = dice.index(length);
    let page = at / PAGE * PAGE..(at / PAGE * PAGE + PAGE).min(length);
    let what = match dice.index(6) {
        0 => {
            let bit = 1 << dice.index(8);
            files[of][at] ^= bit;
            format!("bit {bit} of byte {at}")
        }
        1 => {
            let end = (at + 1 + dice.index(64)).min(length);
            files[of][at..end].iter_mut().for_each(|b| *b = dice.any() as u8);
            format!("bytes {at} to {end}")
        }
        2 => {
            files[of][page].fill(0);
            format!("zeros in the page of {at}")
        }
        3 => {
            let other = dice.index(length / PAGE) * PAGE;
            let bytes = files[of][other..other + PAGE.min(length - other)].to_vec();
            let end = (page.start + bytes.len()).min(length);
            files[of][page.start..end].copy_from_slice(&bytes[..end - page.start]);
            format!("the page at {other} also at {}", page.start)
        }
        4 => {
            files[of].truncate(at);
            format!("cut at {at}")
        }
        _ => {
            files[of].drain(page.clone());
            format!("without the page at {}", page.start)
        }
    };
    format!("{}: {what}", ["store.db", "store.db-wal"][of])
}

/// Rows of both streams, if they can be read.
fn rows_of_both(path: &Path) -> rusqlite::Result<[Rows; 2]> {
    let db = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    let rows = |table: &str| -> rusqlite::Result<Rows> {
        let mut all = db.prepare(&format!("SELECT sku, cents FROM {table}"))?;
        all.query_map([], |r| Ok((r.get(0)?, r.get(1)?)))?.collect()
    };
    Ok([rows("price")?, rows("promo")?])
}

/// Whether an agent that starts on these files has the newest version after some cycles; what it lacks if not.
async fn recovers(r: &Register, files: &Files, newest: &[Rows; 2]) -> Result<(), String> {
    let path = r.config.store_db();
    let _ = fs::remove_file(path.with_extension("db-shm"));
    fs::write(&path, &files[0]).unwrap();
    fs::write(path.with_extension("db-wal"), &files[1]).unwrap();
    // What an earlier round blamed is tried again.
    r.clock.advance(Duration::from_secs(3601));
    let agent = match Agent::open(r.config.clone(), r.clock.clone(), None) {
        Ok(agent) => agent,
        Err(e) => return Err(format!("it does not start: {e}")),
    };
    for _ in 0..4 {
        // As its loop does at each start, and now and then.
        let _ = agent.verify().await;
        poll_and_cycle(&agent).await;
    }
    match rows_of_both(&path) {
        Ok(rows) if &rows == newest && agent.verify().await.is_ok_and(|v| !v.drift) => Ok(()),
        other => Err(format!(
            "{:?}, {:?}, {:?}",
            other.map(|r| r.map(|r| r.len())),
            agent.memory.look(|f| f.open()),
            agent.shown().waits
        )),
    }
}

async fn damaged(rounds: usize, seed: u64) {
    let mut hq = Hq::new();
    hq.full("price@zone-east", 50, &rows(600, 100));
    hq.full("promo@all", 7, &rows(100, 1));
    hq.sign();
    let r = Register::enrolled(&hq, &hq.url(), &[]);
    let agent = r.open();
    poll_and_cycle(&agent).await;
    cycle(&agent).await;
    let path = agent.db.path().to_owned();
    let mut whole = vec![rows_of_both(&path).unwrap()];
    // The log of a change is not brought home yet.
    hq.delta("price@zone-east", 51, &rows(590, 101));
    hq.sign();
    cycle(&agent).await;
    whole.push(rows_of_both(&path).unwrap());
    let wal = |path: &Path| path.with_extension("db-wal");
    let files = || -> Files { [&path, &wal(&path)].map(|file| fs::read(file).unwrap()) };
    let full_log = files();
    cycle(&agent).await;
    let states = [full_log, files()];
    assert!(states[0][1].len() > 2 * PAGE && states[1][1].is_empty() && states[1][0].len() > 8 * PAGE);

    drop(agent);
    let dir = tempfile::tempdir().unwrap();
    let (copy, limits) = (dir.path().join("store.db"), Limits::default());
    let mut dice = Dice::new(seed);
    let (mut found, mut harmless, mut wrong, mut lost) = (0, 0, Vec::new(), Vec::new());
    for round in 0..rounds {
        let mut files = states[round % 2].clone();
        let what = damage(&mut dice, &mut files);
        let _ = fs::remove_file(copy.with_extension("db-shm"));
        fs::write(&copy, &files[0]).unwrap();
        fs::write(wal(&copy), &files[1]).unwrap();
        match verify::check(&copy, &limits) {
            Ok(report) if !report.drift && report.streams.len() == 2 => {
                harmless += 1;
                if !rows_of_both(&copy).is_ok_and(|rows| whole.contains(&rows)) {
                    wrong.push(format!("round {round}: {what}"));
                }
            }
            _ => {
                found += 1;
                if found % (rounds / 50) == 0
                    && let Err(why) = recovers(&r, &files, &whole[1]).await
                {
                    lost.push(format!("round {round}: {what}: {why}"));
                }
            }
        }
    }
    assert!(lost.is_empty(), "{} were not healed: {lost:#?}", lost.len());
    println!("{rounds} damages: {found} found, {harmless} without effect");
    assert!(wrong.is_empty(), "{} were not found: {wrong:?}", wrong.len());
    assert!(found > rounds / 4 && harmless > 0);
}

#[tokio::test]
async fn random_damage_is_found_or_has_no_effect() {
    damaged(1_000, 1).await;
}

#[test]
#[ignore = "a hundred thousand take minutes"]
fn much_random_damage_is_found_or_has_no_effect() {
    tillcast_tests::in_parts(8, |n| damaged(12_500, 2 + n));
}
