//! Real data through all tiers: rows, bytes, times; the pack against the source file as `gzip -9` sends it; and the digest,
//! which must be that of a script that knows the source file alone.

use crate::Options;
use crate::measure::{Line, Results, Spread, Target};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;
use tillcast_tests::real_data::{self, PRICE_STORES, PROMOS, SNAPSHOTS};
use tillcast_tests::{Site, digest};

/// What packs of real data are compared with.
pub const PEER: &str = "its file by `gzip -9`";

/// The item master's snapshots, a promotion stream's days, four stores' price lists.
pub fn real(_: &Options, results: &mut Results) {
    let Some(data) = real_data::folder() else {
        results.table("Real data: none (TILLCAST_TEST_DATA names its folder), nothing measured.".into());
        return;
    };
    let mut table = String::from(
        "| real data | rows | pack | bytes | a row | publish | relay | register | digest everywhere |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n",
    );
    let mut run = Run { table: &mut table, results };
    let site = real_data::items_and_promotions();
    for (n, name) in PROMOS.iter().enumerate() {
        real_data::load_promos(&site, &data, name);
        let digest = real_data::promo_digest(&data, n + 1);
        let wanted = Wanted::new("0204", "promo", "promotion", digest, data.join("il-promos").join(name));
        run.step(&site, &format!("il-promos {name}"), &[wanted]);
    }
    for name in SNAPSHOTS {
        real_data::load_snapshot(&site, &data, name);
        let digest = real_data::snapshot_digest(&data, name);
        let wanted = Wanted::new("0204", "catalog", "product", digest, data.join("off-products").join(name));
        run.step(&site, &format!("off-products {name}"), &[wanted]);
    }
    let site = real_data::shelf_prices(&data);
    let store =
        |s| Wanted::new(s, "price", "shelf_price", real_data::price_digest(&data, s), real_data::price_file(&data, s));
    run.step(&site, "konzum-hr", &PRICE_STORES.map(store));
    results.table(table);
}

/// What a store must have in the end.
struct Wanted {
    store: &'static str,
    stream: &'static str,
    table: &'static str,
    digest: String,
    /// What its rows were read from.
    file: PathBuf,
}

impl Wanted {
    fn new(store: &'static str, stream: &'static str, table: &'static str, digest: String, file: PathBuf) -> Wanted {
        Wanted { store, stream, table, digest, file }
    }
}

struct Run<'a> {
    table: &'a mut String,
    results: &'a mut Results,
}

impl Run<'_> {
    /// Publishes, brings it down tier by tier, and proves it.
    fn step(&mut self, site: &Site, what: &str, stores: &[Wanted]) {
        let seconds = |f: &dyn Fn()| {
            let start = Instant::now();
            f();
            start.elapsed().as_secs_f64()
        };
        let published = seconds(&|| drop(site.publish()));
        for (n, wanted) in stores.iter().enumerate() {
            let Wanted { store, stream, table, digest: right, file } = wanted;
            let relayed = seconds(&|| drop(site.relay(store).run(&["once"]).ok()));
            let register = format!("{store}-01");
            let daemon = site.relay(store).start_ready();
            let applied = seconds(&|| drop(site.register(&register).run(&["once"]).ok()));
            daemon.term();
            let rows = digest::of_database(&site.store_db(&register))[*table].clone();
            let all = [
                &site.promised(store)[*table],
                &site.relay(store).digests()[*table],
                &site.register(&register).digests()[*table],
                &rows,
            ]
            .map(String::clone);
            assert!(all.iter().all(|d| d == right), "{what} at {store}: {all:?}, the script says {right}");
            let count = site.read(&register, &format!("SELECT count(*) FROM {table}")).unwrap();
            let (pack, bytes) = site.head_pack(store, stream);
            let kind = if pack.ends_with("full.pack") { "full" } else { "delta" };
            let changed = changed_rows(&bytes);
            let publish = if n == 0 { format!("{published:.2} s") } else { "the same run".into() };
            let each = bytes.len() as f64 / changed as f64;
            let what = if stores.len() == 1 { what.to_owned() } else { format!("{what} {store}") };
            let bytes = bytes.len();
            let first = &all[0][..12];
            writeln!(self.table, "| {what} | {count} | {kind} of {changed} | {bytes} | {each:.1} | {publish} | {relayed:.2} s | {applied:.2} s | `{first}…` |").unwrap();
            let gzipped = gzipped(file);
            self.results.line(Line {
                what: format!("{kind} of {what}, {PEER}"),
                target: Target::None,
                figure: Spread::of([bytes as f64 / gzipped as f64]),
                unit: "×",
                behind: format!("{bytes} bytes against {gzipped}"),
            });
        }
    }
}

/// The bytes of a file as `gzip -9` packs it.
fn gzipped(file: &Path) -> usize {
    let out = Command::new("gzip").args(["-9", "-c"]).arg(file).output().unwrap();
    assert!(out.status.success(), "gzip of {}: {}", file.display(), out.status);
    out.stdout.len()
}

/// The rows that a pack's trailer counts.
fn changed_rows(pack: &[u8]) -> u64 {
    let lines = tillcast_tests::forge::unpack(pack);
    let trailer: serde_json::Value = serde_json::from_str(lines.last().unwrap()).unwrap();
    trailer["rows"].as_object().unwrap().values().map(|n| n.as_u64().unwrap()).sum()
}
