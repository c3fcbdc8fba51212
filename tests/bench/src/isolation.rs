//! One stream of twenty whose every delta is bad: how much later the others reach the last register.

use crate::Options;
use crate::measure::{Line, Results, Spread, Target};
use crate::stage::{STORE, own_source};
use rusqlite::Connection;
use serde_json::Value;
use std::time::{Duration, Instant};
use tillcast_tests::{Daemon, Nginx, Site, digest, files, forge};

const STREAMS: usize = 20;
const REGISTERS: usize = 10;
/// Rows of a stream, and of these as many change at each publish.
const ROWS: i64 = 5000;
const CHANGED: i64 = 50;

/// Publishes in turn with and without the bad pack, so that both meet the same machine.
pub fn isolation(options: &Options, results: &mut Results) {
    let mut shop = Shop::open();
    shop.publish(1, false);
    let (mut well, mut ill) = (Vec::new(), Vec::new());
    for n in (0i64..).take(options.publishes) {
        let price = 2 + 2 * n;
        well.push(shop.publish(price, false));
        ill.push(shop.publish(price + 1, true));
    }
    let (well, ill) = (Spread::of(well), Spread::of(ill));
    let each = |of: fn(&Spread) -> f64| of(&ill) / of(&well);
    results.line(Line {
        what: format!(
            "{} streams of {ROWS} rows, {CHANGED} changed, to the last of {REGISTERS} registers while one more stream's pack is bad, against all good",
            STREAMS - 1
        ),
        target: Target::AtMost(1.1),
        figure: Spread::of([each(|s| s.min), each(|s| s.median), each(|s| s.max)]),
        unit: "×",
        behind: format!("{ill:.0} ms against {well:.0} ms of {} publishes each, in turn", options.publishes),
    });
    shop.end();
}

/// The site; its relay reads a copy of the bucket, so that a pack can be spoilt before anybody sees it.
struct Shop {
    site: Site,
    source: Connection,
    daemons: Vec<Daemon>,
    registers: Vec<Connection>,
    cdn: tempfile::TempDir,
    /// Manifests put so far.
    lists: usize,
    _nginx: Nginx,
}

impl Shop {
    fn open() -> Shop {
        let builder = Site::builder().stores(&[(STORE, "east")]).registers(REGISTERS).items(1);
        let mut site = builder.relay("http.per_ip", "512").build();
        let (mut streams, mut fill) = (String::new(), String::new());
        for table in tables() {
            let ddl = format!(
                "CREATE TABLE {table} (id INTEGER PRIMARY KEY, price INTEGER NOT NULL CHECK (price >= 0), name TEXT NOT NULL) STRICT;\n"
            );
            streams += &format!(
                "[[stream]]\nname = '{table}'\naudience = 'all'\nschema = 'schema/{table}.sql'\n\
                 [[stream.table]]\nname = '{table}'\nquery = 'SELECT id, price, name FROM {table}'\n"
            );
            fill += &format!(
                "{ddl} WITH RECURSIVE n (id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM n WHERE id < {ROWS})
                 INSERT INTO {table} SELECT id, 0, 'Name of the item ' || id FROM n;"
            );
            std::fs::write(site.hq.dir.join(format!("schema/{table}.sql")), ddl).unwrap();
        }
        let source = own_source(&mut site, &streams, &format!("BEGIN; {fill} COMMIT;"));
        let cdn = tillcast_tests::temp_dir("cdn");
        let nginx = Nginx::with(cdn.path(), "access_log off;");
        let relay = site.relays.get_mut(STORE).unwrap();
        relay.set("sources", &format!("[\"{}\"]", nginx.url()));
        relay.set_text("poll", "200ms");
        site.publish();
        files::copy_all(&site.bucket(), cdn.path());
        site.relay(STORE).run(&["once"]).ok();
        let ids: Vec<String> = site.registers.keys().cloned().collect();
        ids.iter().for_each(|id| drop(site.register(id).run(&["once"]).ok()));
        let mut daemons = vec![site.relay(STORE).start_ready()];
        daemons.extend(ids.iter().map(|id| site.register(id).start_ready()));
        let registers = ids.iter().map(|id| digest::open_read_only(&site.store_db(id))).collect();
        Shop { site, source, daemons, registers, cdn, lists: 0, _nginx: nginx }
    }

    /// Gives rows of every stream a new price and publishes; milliseconds from when the relay can see it to the last good
    /// stream of the last register. The last stream's pack is made anew either way, `bad` or as it was.
    fn publish(&mut self, price: i64, bad: bool) -> f64 {
        let from = 1 + price * CHANGED % ROWS;
        let rows = format!("id >= {from} AND id < {}", from + CHANGED);
        let update: String = tables().map(|t| format!("UPDATE {t} SET price = {price} WHERE {rows};")).collect();
        self.source.execute_batch(&format!("BEGIN; {update} COMMIT")).unwrap();
        self.site.publish();
        let bucket = self.site.bucket();
        for table in tables() {
            files::copy_all(
                &bucket.join(format!("packs/{table}@all")),
                &self.cdn.path().join(format!("packs/{table}@all")),
            );
        }
        self.list(bad);
        let took = self.wait(tables().take(STREAMS - 1), from, price);
        if bad {
            self.list(false);
        }
        self.wait(tables(), from, price);
        took
    }

    /// Puts the last stream's pack and the manifest where the relay looks.
    fn list(&mut self, bad: bool) {
        let last = tables().last().unwrap();
        let (name, pack) = self.site.head_pack(STORE, &last);
        let mut lines = forge::unpack(&pack);
        if bad {
            // What the contract's CHECK forbids: only a trial can know.
            let row = lines.len() - 2;
            let id = serde_json::from_str::<Value>(&lines[row]).unwrap()[0].clone();
            lines[row] = format!("[{id},-1]");
        }
        let pack = forge::pack(&lines);
        let cdn = self.cdn.path();
        std::fs::write(cdn.join(&name), &pack).unwrap();
        let mut manifest = self.site.manifest(STORE);
        self.lists += 1;
        manifest["serial"] = (1000 + self.lists).into();
        *manifest["streams"][&last]["packs"].as_array_mut().unwrap().last_mut().unwrap() = forge::entry(&pack);
        // nginx tells files apart by second and length; in base64 three bytes are the least that shows.
        let payload = format!("{manifest}{}", " ".repeat(3 * (self.lists % 50)));
        let envelope = forge::seal("manifest", payload.as_bytes(), &[&self.site.signing_key("publisher")]);
        let (new, place) = (cdn.join("manifest.new"), cdn.join(format!("stores/{STORE}/manifest.json")));
        std::fs::write(&new, envelope).unwrap();
        std::fs::rename(new, place).unwrap();
    }

    /// Milliseconds until a row has a price in these tables of all registers.
    fn wait(&self, tables: impl Iterator<Item = String> + Clone, row: i64, price: i64) -> f64 {
        let start = Instant::now();
        let mut waiting: Vec<(&Connection, String)> =
            self.registers.iter().flat_map(|r| tables.clone().map(move |t| (r, t))).collect();
        while !waiting.is_empty() {
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "{} wait for {price}, {} the first: {:#}",
                waiting.len(),
                waiting[0].1,
                self.site.relay(STORE).status()
            );
            waiting.retain(|(db, table)| {
                let mut held = db.prepare_cached(&format!("SELECT price FROM {table} WHERE id = ?1")).unwrap();
                held.query_row([row], |r| r.get::<_, i64>(0)).unwrap() != price
            });
            std::thread::sleep(Duration::from_millis(2));
        }
        start.elapsed().as_secs_f64() * 1000.0
    }

    fn end(self) {
        self.daemons.into_iter().rev().for_each(Daemon::term);
    }
}

fn tables() -> impl Iterator<Item = String> + Clone {
    (1..=STREAMS).map(|n| format!("t{n:02}"))
}
