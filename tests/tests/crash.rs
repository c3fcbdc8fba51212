//! SIGKILL at every named durable step of the three programs, on real files, alone and in pairs with a second one in the
//! recovery; afterwards what `checker` asks for holds, a second run finishes by itself, and nothing is left behind.
//!
//! Which scenario reaches which point is found by running each once with a log. `proto/src/failpoint.txt` lists all
//! points: one that no scenario reaches, or that is reached and not listed, fails the test.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "test code")]

use rusqlite::Connection;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{LazyLock, Mutex};
use std::time::Duration;
use tillcast_tests::bins::Running;
use tillcast_tests::checker::{self, Checker};
use tillcast_tests::site::{Node, Source};
use tillcast_tests::{
    Asked, Liar, Output, PATIENCE, Product, Say, Site, Smtp, digest, files, forge, http, repository, until,
};

/// Environment of the command that is to die.
type Env<'a> = &'a [(&'a str, &'a str)];

/// One thing that is done, and that may be cut anywhere.
struct Scenario {
    name: &'static str,
    /// Which program dies.
    product: Product,
    base: &'static LazyLock<Site>,
    /// Makes the base into the state in which it is done.
    prepare: fn(&mut Site),
    /// Does it; only what may die gets the environment. Done once more, it recovers.
    act: fn(&Site, Env<'_>),
    /// What is asked for, and mended by hand, after the second run.
    ask: fn(&Site),
    /// The time of reaching a point at which to die there.
    nth: u32,
}

const NOTHING: fn(&Site) = |_| {};

static SMTP: LazyLock<Smtp> = LazyLock::new(Smtp::start);
static HOOK: LazyLock<Liar> = LazyLock::new(|| Liar::start(|_| Say::ok("")));

fn builder() -> tillcast_tests::site::Builder {
    let zero = "'0s'";
    let site = Site::builder().stores(&[("0421", "east")]).registers(1).items(30).hq_service();
    let site = site.hq("publish.deltas", "1").hq("publish.keep", zero).hq("publish.delete_after", zero);
    // A dead publisher must not be waited for.
    let site = site.hq("publish.lease", "'50m'");
    site.relay("grace", zero).relay("tries.limit", "1").relay("tries.crash_pause", zero).agent("poll", "'1s'")
}

/// Settings and a source; nothing was run.
static BARE: LazyLock<Site> = LazyLock::new(|| builder().prepare());
/// Keys and devices; nothing was published.
static FRESH: LazyLock<Site> = LazyLock::new(|| builder().build());
/// Some versions old, everybody at the last.
static LIVE: LazyLock<Site> = LazyLock::new(|| {
    let site = FRESH.copy();
    site.publish();
    for _ in 0..3 {
        news(&site);
        site.publish();
        relay(&site).run(&["once"]).ok();
    }
    register(&site).run(&["once"]).ok();
    site
});
/// As [`LIVE`], from drops.
static INBOX: LazyLock<Site> = LazyLock::new(|| builder().source(Source::Inbox).build());

fn relay(site: &Site) -> &Node {
    site.relay("0421")
}

fn register(site: &Site) -> &Node {
    site.register("0421-01")
}

/// Another row in every stream.
fn news(site: &Site) {
    site.sql(
        "UPDATE price SET price_cents = price_cents + 1 WHERE sku < 'SKU0000004';
         UPDATE staff SET name = name || '.' WHERE id = 2; UPDATE promo SET percent = 1 + percent % 90 WHERE id = 1;
         UPDATE item SET name = name || '.' WHERE sku = 'SKU0000007'",
    );
}

fn published(site: &Site) {
    news(site);
    site.publish();
}

fn publish(site: &Site, env: Env<'_>) {
    site.hq.run_env(&["publish"], env);
}

/// To an address of this site alone: one server does for all.
fn mailing(site: &Site, env: Env<'_>) {
    let to = format!("['{}']", address(site));
    site.hq.run_env(&["publish"], &[env, &[("TILLCAST__MAIL__TO", &to)]].concat());
}

fn telling(site: &Site, env: Env<'_>) {
    let hook = format!("{}/{}", HOOK.url(), address(site));
    site.hq.run_env(&["publish"], &[env, &[("TILLCAST__ALERTS__WEBHOOK", &hook)]].concat());
}

fn mirror(site: &Site, env: Env<'_>) {
    relay(site).run_env(&["once"], env);
}

fn apply(site: &Site, env: Env<'_>) {
    register(site).run_env(&["once"], env);
}

fn ledger(site: &Site) -> Connection {
    let db = Connection::open(site.hq.dir.join("state/fleet.db")).unwrap();
    db.busy_timeout(PATIENCE).unwrap();
    db
}

const HQ: Product = Product::Hq;
const RELAY: Product = Product::Relay;
const AGENT: Product = Product::Agent;

macro_rules! scenario {
    ($name:literal, $product:expr, $base:ident, $prepare:expr, $act:expr) => {
        scenario!($name, $product, $base, $prepare, $act, NOTHING)
    };
    ($name:literal, $product:expr, $base:ident, $prepare:expr, $act:expr, $ask:expr) => {
        scenario!($name, $product, $base, $prepare, $act, $ask, 1)
    };
    ($name:literal, $product:expr, $base:ident, $prepare:expr, $act:expr, $ask:expr, $nth:literal) => {
        Scenario { name: $name, product: $product, base: &$base, prepare: $prepare, act: $act, ask: $ask, nth: $nth }
    };
}

fn scenarios() -> Vec<Scenario> {
    [headquarters(), store(), till()].into_iter().flatten().collect()
}

fn headquarters() -> Vec<Scenario> {
    vec![
        scenario!("init", HQ, BARE, |_| {}, |s, env| drop(s.hq.run_env(&["init"], env)), one_key_of_each),
        scenario!("the first publish", HQ, FRESH, |_| {}, publish),
        scenario!("publish", HQ, LIVE, |s| news(s), publish),
        scenario!(
            "publish, one delta later",
            HQ,
            LIVE,
            |s| {
                published(s);
                news(s)
            },
            publish
        ),
        scenario!("publish after a kill", HQ, LIVE, killed_publish, publish),
        scenario!("publish after a kill past the signature", HQ, LIVE, killed_signed, publish),
        scenario!("publish with the replicas behind", HQ, LIVE, replicas_behind, publish),
        scenario!("publish from drops", HQ, INBOX, dropped, publish, inbox_is_clear),
        scenario!("publish on a new machine", HQ, LIVE, new_machine, publish),
        scenario!("publish to two buckets", HQ, LIVE, two_buckets, publish, buckets_agree),
        scenario!("publish, a mirror behind", HQ, LIVE, mirror_behind, publish, buckets_agree),
        scenario!("a refused publish", HQ, LIVE, |s| refused(s, SMTP.port()), mailing, mailed_once),
        scenario!("a refused publish, no mail server", HQ, LIVE, |s| refused(s, 9), mailing, mailed_once),
        scenario!("a refused publish, a webhook instead", HQ, LIVE, hooked, telling, told_once),
        scenario!("enroll", HQ, LIVE, new_store, |s, env| drop(s.hq.run_env(&["enroll", "0815"], env)), enrolled),
        scenario!("revoke", HQ, LIVE, |_| {}, |s, env| drop(s.hq.run_env(&["revoke", "0421-01"], env)), revoked),
        scenario!("trust rotate", HQ, LIVE, |_| {}, |s, env| drop(s.hq.run_env(&["trust", "rotate"], env))),
        scenario!("trust rotate --root", HQ, LIVE, |_| {}, |s, env| {
            drop(s.hq.run_env(&["trust", "rotate", "--root"], env));
        }),
        scenario!("trust revoke --new-epoch", HQ, LIVE, |_| {}, revoke_key, |s| {
            assert_eq!(s.manifest("0421")["epoch"], 2);
        }),
        scenario!("export", HQ, LIVE, |_| {}, export, stick_is_whole),
        scenario!(
            "receipt",
            HQ,
            LIVE,
            |s| {
                export(s, &[]);
                import(s, &[])
            },
            receipt,
            |s| {
                assert_eq!(ledger(s).query_row("SELECT count(*) FROM receipt", [], |r| r.get::<_, i64>(0)).unwrap(), 1);
            }
        ),
        scenario!("heartbeats at headquarters", HQ, LIVE, |_| {}, |s, env| beats(&s.hq, s, env), kept_at_hq, 2),
        scenario!("serve signs what is due", HQ, LIVE, due, serve_a_moment),
    ]
}

fn store() -> Vec<Scenario> {
    vec![
        scenario!("a relay's enroll", RELAY, LIVE, enrolled_anew, |s, env| enroll(relay(s), s, "0421", env)),
        scenario!("a relay's install", RELAY, LIVE, |s| wiped(s, "0421"), mirror),
        scenario!("mirror", RELAY, LIVE, |s| published(s), mirror),
        scenario!("mirror, two behind", RELAY, LIVE, |s| (0..2).for_each(|_| published(s)), mirror),
        scenario!("mirror, the keys rotated", RELAY, LIVE, |s| drop(s.hq.run(&["trust", "rotate"]).ok()), mirror),
        scenario!("mirror, a register gone", RELAY, LIVE, register_gone, mirror),
        scenario!("mirror, a stream gone", RELAY, LIVE, stream_gone, mirror),
        scenario!("mirror, a bad pack", RELAY, LIVE, bad_pack, mirror, went_round),
        scenario!("mirror, a bad file", RELAY, LIVE, bad_file, mirror, mended_file),
        scenario!("mirror, a pack missing", RELAY, LIVE, pack_missing, mirror, mended_file),
        scenario!(
            "mirror, a pack missing no more",
            RELAY,
            LIVE,
            |s| {
                pack_missing(s);
                mirror(s, &[]);
                mended_file(s);
            },
            mirror
        ),
        scenario!("mirror, a manifest not to be believed", RELAY, LIVE, bad_manifest, mirror, good_manifest),
        scenario!(
            "mirror, a manifest believed again",
            RELAY,
            LIVE,
            |s| {
                bad_manifest(s);
                mirror(s, &[]);
                good_manifest(s);
            },
            mirror
        ),
        scenario!("mirror, the shadow lost", RELAY, LIVE, shadow_lost, mirror),
        scenario!("mirror, its trial was killed", RELAY, LIVE, trial_killed, mirror),
        scenario!("mirror, a part left over", RELAY, LIVE, old_part, mirror),
        scenario!("a relay's retry", RELAY, LIVE, given_up, retry, went_round),
        scenario!("a relay heals", RELAY, LIVE, shadow_drifted, |s, env| {
            relay(s).run_env(&["verify"], env);
            mirror(s, env);
        }),
        scenario!("import", RELAY, LIVE, stick_for_an_island, import),
        scenario!("heartbeats at the relay", RELAY, LIVE, |_| {}, |s, env| beats(relay(s), s, env), kept_at_relay, 2),
    ]
}

fn till() -> Vec<Scenario> {
    vec![
        scenario!("a register's enroll", AGENT, LIVE, enrolled_anew, |s, env| enroll(register(s), s, "0421-01", env)),
        scenario!("a register's install", AGENT, LIVE, |s| wiped(s, "0421-01"), apply),
        scenario!("apply", AGENT, LIVE, |s| published(s), apply),
        scenario!("apply, the keys rotated", AGENT, LIVE, |s| drop(s.hq.run(&["trust", "rotate"]).ok()), apply),
        scenario!(
            "apply from the relay",
            AGENT,
            LIVE,
            |s| {
                published(s);
                mirror(s, &[])
            },
            |s, env| {
                s.with_relays(|| apply(s, env));
            }
        ),
        scenario!("a register heals", AGENT, LIVE, register_drifted, |s, env| {
            register(s).run_env(&["verify"], env);
            apply(s, env);
        }),
        scenario!(
            "a register drifts at a delta",
            AGENT,
            LIVE,
            |s| {
                register_drifted(s);
                published(s)
            },
            apply
        ),
        scenario!("a register's database is damaged", AGENT, LIVE, register_damaged, apply),
        scenario!("apply, a bad pack", AGENT, LIVE, bad_pack, apply, went_round),
        scenario!(
            "apply, a pack the relay refused",
            AGENT,
            LIVE,
            |s| {
                bad_pack(s);
                mirror(s, &[])
            },
            |s, env| {
                s.with_relays(|| apply(s, env));
            },
            went_round
        ),
        scenario!("apply, a stream in the way", AGENT, LIVE, stream_moved, apply),
        scenario!("apply, a download left over", AGENT, LIVE, old_download, apply),
    ]
}

// What they begin with.

fn die_at(point: &str) -> [(&'static str, &str); 1] {
    [("TILLCAST_FAILPOINT", point)]
}

fn killed_publish(site: &mut Site) {
    news(site);
    publish(site, &die_at("publish.packed.after#3"));
}

fn killed_signed(site: &mut Site) {
    news(site);
    publish(site, &die_at("publish.sign.after"));
}

fn trial_killed(site: &mut Site) {
    published(site);
    mirror(site, &die_at("trial.apply.begun"));
}

fn replicas_behind(site: &mut Site) {
    std::fs::remove_dir_all(site.hq.dir.join("state/replicas")).unwrap();
    news(site);
}

fn new_machine(site: &mut Site) {
    site.hq.run(&["trust", "rotate"]).ok();
    replicas_behind(site);
    remove(&site.hq.dir.join("state"), |name| name.starts_with("fleet.db"));
}

/// Removes files of a directory by name.
fn remove(dir: &std::path::Path, is_to_go: impl Fn(&str) -> bool) {
    for name in files::tree(dir).into_keys().filter(|name| is_to_go(name)) {
        std::fs::remove_file(dir.join(name)).unwrap();
    }
}

fn dropped(site: &mut Site) {
    news(site);
    site.drop_all();
    std::fs::write(site.inbox().join("prise.zone-east.price.csv"), "sku\n").unwrap();
}

fn mirror_dir(site: &Site) -> std::path::PathBuf {
    site.dir().join("mirror")
}

fn two_buckets(site: &mut Site) {
    let urls = format!("['file://{}', 'file://{}']", site.bucket().display(), mirror_dir(site).display());
    site.hq.set("objects.urls", &urls);
    news(site);
}

/// The mirror was down while packs came and went.
fn mirror_behind(site: &mut Site) {
    two_buckets(site);
    publish(site, &[]);
    let aside = site.dir().join("mirror-down");
    std::fs::rename(mirror_dir(site), &aside).unwrap();
    std::fs::write(mirror_dir(site), "not mounted").unwrap();
    for _ in 0..4 {
        news(site);
        publish(site, &[]);
    }
    std::fs::remove_file(mirror_dir(site)).unwrap();
    std::fs::rename(&aside, mirror_dir(site)).unwrap();
    news(site);
}

/// A site's own address, which its copies know of.
fn address(site: &Site) -> String {
    let own = format!("{}@example.com", site.dir().file_name().unwrap().to_string_lossy().to_lowercase());
    let mut known = addresses(site);
    if !known.contains(&own) {
        known.push(own.clone());
        std::fs::write(site.dir().join("addresses"), known.join("\n")).unwrap();
    }
    own
}

/// The addresses of the sites that a site was copied from, and its own.
fn addresses(site: &Site) -> Vec<String> {
    let text = std::fs::read_to_string(site.dir().join("addresses")).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

fn refused(site: &mut Site, port: u16) {
    site.hq.set_text("mail.smtp", &format!("smtp://127.0.0.1:{port}"));
    site.hq.set_text("mail.from", "tillcast@example.com");
    site.hq.set("mail.to", "['it@example.com']");
    site.sql("UPDATE item SET name = hex(zeroblob(60)) WHERE sku = 'SKU0000003'");
}

fn hooked(site: &mut Site) {
    refused(site, 9);
    site.hq.set_text("alerts.webhook", &HOOK.url());
    site.hq.set("alerts.webhook_after", "'0s'");
}

fn new_store(site: &mut Site) {
    site.sql(
        "INSERT INTO store VALUES ('0815', 'west', 'north'); INSERT INTO staff VALUES ('0815', 1, 'Ada', 'manager')",
    );
}

fn due(site: &mut Site) {
    ledger(site).execute("UPDATE store SET signed_s = signed_s - 100000000", []).unwrap();
}

fn code_file(site: &Site, id: &str) -> std::path::PathBuf {
    site.dir().join(format!("code-{id}"))
}

fn enrolled_anew(site: &mut Site) {
    for (id, node) in [("0421", relay(site)), ("0421-01", register(site))] {
        let code = site.hq.json(&["enroll", id])["code"].as_str().unwrap().to_owned();
        std::fs::write(code_file(site, id), code).unwrap();
        std::fs::remove_dir_all(node.dir.join("data")).unwrap();
    }
}

fn wiped(site: &mut Site, id: &str) {
    let node = if id == "0421" { relay(site) } else { register(site) };
    remove(&node.dir.join("data"), |name| !name.starts_with("device.db"));
    published(site);
}

fn register_gone(site: &mut Site) {
    beats(relay(site), site, &[]);
    site.hq.run(&["revoke", "0421-01"]).ok();
}

fn stream_gone(site: &mut Site) {
    let streams = site.hq.streams().to_owned();
    let at = streams.find("[[stream]]\nname = 'staff'").unwrap();
    site.hq.set_streams(&streams[..at]);
    news(site);
    site.hq.run(&["publish", "--allow-shrink", "staff"]).ok();
}

/// Another stream has the table now.
fn stream_moved(site: &mut Site) {
    let schema = site.hq.dir.join("schema");
    std::fs::copy(schema.join("staff.sql"), schema.join("people.sql")).unwrap();
    let streams = site.hq.streams().replace("name = 'staff'\naudience", "name = 'people'\naudience");
    site.hq.set_streams(&streams.replace("schema/staff.sql", "schema/people.sql"));
    published(site);
}

/// A delta for a row that is not there, well signed.
fn bad_pack(site: &mut Site) {
    let (_, head) = site.head_pack("0421", "price");
    let mut header: Value = serde_json::from_str(&forge::unpack(&head)[0]).unwrap();
    let version = site.version("0421", "price");
    (header["base"], header["version"], header["kind"]) = (version.into(), (version + 1).into(), "delta".into());
    let section = json!({"table": "price", "op": "update", "columns": ["sku", "price_cents"]});
    let digests = json!({"price": site.expected("0421")["price"]});
    let trailer = format!("{{\"rows\":{},\"digests\":{digests}}}", json!({"delete": 0, "update": 1, "insert": 0}));
    let lines = [header.to_string(), section.to_string(), json!(["nowhere", 1]).to_string(), trailer];
    std::fs::write(site.dir().join("refused"), format!("price@zone-east {}", version + 1)).unwrap();
    site.publish_forged("0421", "price", &forge::pack(&lines));
}

const MANIFEST: &str = "stores/0421/manifest.json";

/// The store's manifest, signed by nobody.
fn bad_manifest(site: &mut Site) {
    let good = site.object(MANIFEST).unwrap();
    std::fs::write(site.dir().join("good.json"), &good).unwrap();
    let mut envelope: Value = serde_json::from_slice(&good).unwrap();
    envelope["signatures"] = json!([]);
    site.put_object(MANIFEST, envelope.to_string().as_bytes());
}

fn good_manifest(site: &Site) {
    site.put_object(MANIFEST, &std::fs::read(site.dir().join("good.json")).unwrap());
}

/// A source of the relay that holds other bytes under the name of the head.
fn bad_file(site: &mut Site) {
    published(site);
    let other = site.dir().join("other");
    files::copy_all(&site.bucket(), &other);
    let (name, mut bytes) = site.head_pack("0421", "price");
    bytes.reverse();
    std::fs::write(other.join(name), bytes).unwrap();
    site.relays.get_mut("0421").unwrap().set("sources", &format!("['file://{}']", other.display()));
}

fn pack_missing(site: &mut Site) {
    published(site);
    let other = site.dir().join("other");
    files::copy_all(&site.bucket(), &other);
    std::fs::remove_file(other.join(site.head_pack("0421", "price").0)).unwrap();
    site.relays.get_mut("0421").unwrap().set("sources", &format!("['file://{}']", other.display()));
}

fn given_up(site: &mut Site) {
    bad_pack(site);
    mirror(site, &[]);
}

fn distrust(site: &Site) -> std::path::PathBuf {
    site.dir().join("distrust")
}

/// Writes into a replica what no program of ours does; its rows say nothing until they are healed.
fn by_hand(site: &Site, database: &std::path::Path) {
    let db = Connection::open(database).unwrap();
    db.busy_timeout(PATIENCE).unwrap();
    assert!(db.execute("UPDATE price SET price_cents = 1 WHERE sku < 'SKU0000004'", []).unwrap() > 0);
    std::fs::write(distrust(site), "").unwrap();
}

fn shadow_drifted(site: &mut Site) {
    by_hand(site, &relay(site).dir.join("data/shadow.db"));
}

fn register_drifted(site: &mut Site) {
    by_hand(site, &site.store_db("0421-01"));
}

fn rubbish(site: &Site, data: &std::path::Path, database: &str) {
    remove(data, |name| name.starts_with(database));
    std::fs::write(data.join(database), "rubbish ".repeat(100)).unwrap();
    std::fs::write(distrust(site), "").unwrap();
}

fn shadow_lost(site: &mut Site) {
    rubbish(site, &relay(site).dir.join("data"), "shadow.db");
}

fn register_damaged(site: &mut Site) {
    rubbish(site, &register(site).dir.join("data"), "store.db");
}

fn stick_for_an_island(site: &mut Site) {
    published(site);
    export(site, &[]);
    site.relays.get_mut("0421").unwrap().set("sources", "[]");
}

/// A download that nobody wants any more.
fn leftover(site: &Site, node: &Node, path: &str) {
    published(site);
    let path = node.dir.join("data").join(path);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, "half").unwrap();
}

fn old_part(site: &mut Site) {
    leftover(site, relay(site), "incoming/packs/price@zone-east/0000000001.full.pack.part");
}

fn old_download(site: &mut Site) {
    leftover(site, register(site), "packs/price@zone-east/0000000001.full.pack");
}

// What they do.

fn enroll(node: &Node, site: &Site, id: &str, env: Env<'_>) {
    node.run_env(&["enroll", &std::fs::read_to_string(code_file(site, id)).unwrap()], env);
}

fn stick(site: &Site) -> String {
    site.dir().join("stick").display().to_string()
}

fn export(site: &Site, env: Env<'_>) {
    site.hq.run_env(&["export", "--store", "0421", &stick(site)], env);
}

fn import(site: &Site, env: Env<'_>) {
    relay(site).run_env(&["import", &stick(site)], env);
}

fn receipt(site: &Site, env: Env<'_>) {
    let name = files::tree(&site.dir().join("stick/receipts")).into_keys().next().unwrap();
    site.hq.run_env(&["receipt", &format!("{}/receipts/{name}", stick(site))], env);
}

fn revoke_key(site: &Site, env: Env<'_>) {
    let key = forge::key_file(&site.hq.dir.join("state/keys/publisher-1.key"));
    let id = forge::sha256(key.verifying_key().as_bytes())[..16].to_owned();
    site.hq.run_env(&["trust", "revoke", &id, "--new-epoch"], env);
}

fn retry(site: &Site, env: Env<'_>) {
    let name = format!("price@zone-east/{:010}.delta.pack", site.version("0421", "price"));
    relay(site).run_env(&["retry", &name], env);
}

/// A daemon that answers, or has died.
fn daemon(node: &Node, env: Env<'_>) -> Running {
    let verb = if node.product == HQ { "serve" } else { "run" };
    let mut running = node.spawn(&[verb], env);
    let url = format!("{}/healthz", node.url());
    until(PATIENCE, "it answers, or is dead", || !running.process.is_running() || http::try_get(&url).is_some());
    running
}

fn end(running: Running) -> Output {
    running.process.signal(rustix::process::Signal::TERM);
    running.finish(PATIENCE)
}

fn serve_a_moment(site: &Site, env: Env<'_>) {
    // `due` took ten times as much away.
    let is_signed = "SELECT signed_s > CAST(strftime('%s', 'now') AS INTEGER) - 10000000 FROM store";
    let is_signed = || -> bool { ledger(site).query_row(is_signed, [], |r| r.get(0)).unwrap() };
    let mut running = daemon(&site.hq, env);
    until(PATIENCE, "signed anew, or dead", || !running.process.is_running() || is_signed());
    end(running);
}

/// The last heartbeat of the register that was answered.
fn acked(site: &Site) -> u64 {
    std::fs::read_to_string(site.dir().join("acked")).map_or(0, |t| t.parse().unwrap())
}

/// Heartbeats of the register, posted to a daemon that may die; first, what it had answered before must be there.
fn beats(node: &Node, site: &Site, env: Env<'_>) {
    let seed: String = fact(&register(site).dir, "seed");
    let key = ed25519_dalek::SigningKey::from_bytes(&hex::decode(seed).unwrap().try_into().unwrap());
    let mut running = daemon(node, env);
    for seq in acked(site) + 1..acked(site) + 4 {
        let beat = json!({"format": 1, "device": "0421-01", "seq": seq, "sent_at": "2026-01-01T00:00:00Z", "program": "test",
            "serial": null, "streams": {}, "network": "online", "errors": [], "disk": null, "clock_skew_s": null});
        let envelope: Value =
            serde_json::from_slice(&forge::seal("heartbeat", beat.to_string().as_bytes(), &[&key])).unwrap();
        let body = json!({"beats": [{"envelope": envelope, "seen_s": 0}]}).to_string();
        let url = format!("{}/v1/heartbeats", node.url());
        let Ok(reply) = http::try_request("POST", &url, &[("content-type", "application/json")], body.as_bytes())
        else {
            break;
        };
        assert_eq!((reply.status, &reply.json()["refused"]), (200, &json!({})), "{}", reply.text());
        std::fs::write(site.dir().join("acked"), seq.to_string()).unwrap();
    }
    if running.process.is_running() {
        end(running);
    }
}

/// A fact of a device's memory.
fn fact(dir: &std::path::Path, name: &str) -> String {
    let db = digest::open_read_only(&dir.join("data/device.db"));
    let text: String = db.query_row("SELECT value FROM fact WHERE name = ?1", [name], |r| r.get(0)).unwrap();
    serde_json::from_str(&text).unwrap()
}

// What is asked for.

fn one_key_of_each(site: &Site) {
    let keys: Vec<String> =
        files::tree(&site.hq.dir.join("state/keys")).into_keys().filter(|n| n.ends_with(".key")).collect();
    assert_eq!(keys, ["publisher-1.key", "root-1.key"]);
    assert!(site.object("trust.json").is_some_and(|t| Some(t) == site.object("trust/0000000001.json")));
}

fn inbox_is_clear(site: &Site) {
    let names: Vec<String> = files::tree(&site.inbox()).into_keys().collect();
    let waits: Vec<&String> = names.iter().filter(|n| !n.starts_with("done/") && !n.starts_with("rejected/")).collect();
    assert!(waits.is_empty(), "still there: {waits:?}");
    let rejected =
        ["prise.zone-east.price.csv", "prise.zone-east.price.csv.reason.txt"].map(|n| format!("rejected/{n}"));
    assert!(rejected.iter().all(|n| names.contains(n)), "{names:?}");
}

fn buckets_agree(site: &Site) {
    assert_eq!(files::tree(&mirror_dir(site)), files::tree(&site.bucket()), "the mirror against the bucket");
}

/// Each mail is sent at least once, at most twice, under one Message-ID.
fn mailed_once(site: &Site) {
    let tell = |site: &Site| {
        // The time that a claim or a pause lasts has gone by.
        ledger(site).execute("UPDATE mail SET claimed_s = 0, next_s = 0", []).unwrap();
        let url = format!("smtp://127.0.0.1:{}", SMTP.port());
        let to = format!("['{}']", address(site));
        site.hq.run_env(&["publish"], &[("TILLCAST__MAIL__SMTP", &url), ("TILLCAST__MAIL__TO", &to)]);
    };
    tell(site);
    site.sql("UPDATE item SET name = 'mended' WHERE sku = 'SKU0000003'");
    tell(site);
    let known = addresses(site);
    let mut mails: BTreeMap<String, BTreeMap<String, usize>> = BTreeMap::new();
    for mail in SMTP.mails().into_iter().filter(|m| known.contains(&m.to[0])) {
        *mails.entry(mail.subject).or_default().entry(mail.message_id).or_default() += 1;
    }
    let waiting: i64 =
        ledger(site).query_row("SELECT count(*) FROM mail WHERE sent_s IS NULL", [], |r| r.get(0)).unwrap();
    assert_eq!((mails.len(), waiting), (2, 0), "{mails:?}");
    assert!(mails.values().all(|ids| ids.len() == 1 && ids.values().all(|n| (1..=2).contains(n))), "{mails:?}");
}

/// What the mail server does not take, the webhook is told at least once, at most twice, under one id.
fn told_once(site: &Site) {
    let tell = |site: &Site| {
        // The time that a claim lasts has gone by.
        ledger(site).execute("UPDATE mail SET told_next_s = 0", []).unwrap();
        telling(site, &[]);
    };
    tell(site);
    site.sql("UPDATE item SET name = 'mended' WHERE sku = 'SKU0000003'");
    tell(site);
    let known = addresses(site);
    let ids: Vec<String> =
        ledger(site).prepare("SELECT id FROM mail").unwrap().query_map([], |r| r.get(0)).unwrap().flatten().collect();
    let of_site = |a: &&Asked| known.iter().any(|k| a.target.ends_with(k));
    let told = |id: &String| {
        let asked = HOOK.asked();
        asked.iter().filter(of_site).filter(|a| String::from_utf8_lossy(&a.body).contains(&**id)).count()
    };
    assert!(ids.len() == 2 && ids.iter().all(|id| (1..=2).contains(&told(id))), "{ids:?}");
}

fn enrolled(site: &Site) {
    assert!(site.manifest("0815")["relay"].is_string());
}

fn revoked(site: &Site) {
    assert_eq!(site.manifest("0421")["registers"], json!({}));
}

fn stick_is_whole(site: &Site) {
    let stick = site.dir().join("stick");
    let envelope = std::fs::read(stick.join("stores/0421/manifest.json")).unwrap();
    for (stream, entry) in forge::payload(&envelope)["streams"].as_object().unwrap() {
        for pack in entry["packs"].as_array().unwrap() {
            let (version, kind) = (pack["version"].as_u64().unwrap(), pack["kind"].as_str().unwrap());
            let name = format!("packs/{stream}@{}/{version:010}.{kind}.pack", entry["audience"].as_str().unwrap());
            assert_eq!(pack["sha256"], forge::sha256(&std::fs::read(stick.join(name)).unwrap()));
        }
    }
    let left: Vec<String> =
        files::tree(&stick).into_keys().filter(|n| !n.ends_with(".json") && !n.ends_with(".pack")).collect();
    assert!(left.is_empty(), "{left:?}");
}

fn kept_at_hq(site: &Site) {
    let seq: i64 = ledger(site).query_row("SELECT seq FROM beat WHERE device = '0421-01'", [], |r| r.get(0)).unwrap();
    assert!(seq as u64 >= acked(site), "answered {}, kept {seq}", acked(site));
}

fn kept_at_relay(site: &Site) {
    let db = digest::open_read_only(&relay(site).dir.join("data/relay.db"));
    let seq: i64 = db.query_row("SELECT seq FROM beat WHERE register = '0421-01'", [], |r| r.get(0)).unwrap();
    assert!(seq as u64 >= acked(site), "answered {}, kept {seq}", acked(site));
}

/// Headquarters learns of what it did not sign, and publishes a way round.
fn went_round(site: &Site) {
    news(site);
    until(PATIENCE, "a publish that goes round", || site.hq.run(&["publish", "--full"]).code == Some(0));
}

fn mended_file(site: &Site) {
    files::copy_all(&site.bucket(), &site.dir().join("other"));
}

// The runs.

/// Everybody of the tier comes to the last version by itself, and nothing is left behind.
#[track_caller]
fn finish(site: &Site, tier: Product) {
    let (node, database) = match tier {
        RELAY => (relay(site), relay(site).dir.join("data/shadow.db")),
        _ => (register(site), site.store_db("0421-01")),
    };
    if tier == HQ {
        site.publish();
        site.hq.run(&["verify"]).ok();
        let unclaimed = checker::unclaimed(site);
        assert!(unclaimed.is_empty(), "in the bucket, and nobody's: {unclaimed:?}");
    }
    let promised = site.promised("0421");
    let model = site.expected("0421");
    assert!(promised.iter().all(|(table, digest)| model.get(table) == Some(digest)), "{promised:?} against {model:?}");
    if node.dir.join("data/device.db").exists() {
        let mut last = String::new();
        for _ in 0..4 {
            let out = node.run(&["once"]);
            if out.code == Some(0) {
                break;
            }
            last = out.text();
        }
        let rows = digest::of_database(&database);
        for (table, digest) in &promised {
            assert_eq!(rows.get(table), Some(digest), "{table} at {}: {last}", node.id);
        }
        node.run(&["verify"]).ok();
    }
    // Idle work: what a cycle left for the next.
    let left = checker::left_behind(site);
    assert!(left.is_empty(), "left behind: {left:?}");
}

/// What was written aside is old by the time that somebody looks.
fn hours_pass(site: &Site) {
    let old = std::time::SystemTime::now() - Duration::from_secs(7200);
    for path in checker::left_behind(site) {
        if let Ok(file) = std::fs::File::options().write(true).open(path) {
            file.set_modified(old).unwrap();
        }
    }
}

/// A scenario with the state in which it begins, and what was seen on the way to it.
struct Ready {
    scenario: Scenario,
    site: Site,
    checker: Checker,
}

/// With the points that it reaches, and how often.
type Traced = (Ready, BTreeMap<String, u32>);

/// The scenarios with their states made ready, and where each point is reached.
struct Work {
    scenarios: Vec<Ready>,
    /// By program and point: the scenarios that reach it, and how often.
    reached: BTreeMap<(&'static str, String), Vec<(usize, u32)>>,
}

fn log_of(site: &Site, name: &str) -> (std::path::PathBuf, String) {
    let path = site.dir().join(name);
    let text = path.display().to_string();
    (path, text)
}

/// The points that a run reaches, each with its count.
fn trace(scenario: &Scenario, site: &Site) -> BTreeMap<String, u32> {
    let (path, text) = log_of(site, "trace");
    (scenario.act)(site, &[("TILLCAST_FAILPOINT_LOG", &text)]);
    let mut points = BTreeMap::new();
    for line in std::fs::read_to_string(path).unwrap_or_default().lines() {
        *points.entry(line.to_owned()).or_default() += 1;
    }
    points
}

/// A run cut at a point; whether it got there.
fn cut(scenario: &Scenario, site: &Site, point: &str, nth: u32, log: &str) -> bool {
    let (path, text) = log_of(site, log);
    let at = format!("{point}#{nth}");
    (scenario.act)(site, &[("TILLCAST_FAILPOINT", &at), ("TILLCAST_FAILPOINT_LOG", &text)]);
    std::fs::read_to_string(path).unwrap_or_default().lines().any(|line| line.ends_with(" killed"))
}

/// After a kill: recover, mend, end.
#[track_caller]
fn recover(scenario: &Scenario, site: &Site, checker: &mut Checker) {
    hours_pass(site);
    (scenario.act)(site, &[]);
    (scenario.ask)(site);
    let _ = std::fs::remove_file(distrust(site));
    checker.allow(site.expected("0421"));
    finish(site, scenario.product);
    checker.look(site);
}

fn text_of(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|t| (*t).to_owned())).unwrap_or_default()
}

/// Runs jobs on a few threads; what failed, by name.
fn all<T: Sync>(jobs: &[T], name: impl Fn(&T) -> String + Sync, job: impl Fn(&T) + Sync) -> Vec<String> {
    let (next, failed) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let threads = std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 8) + 1;
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(one) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| job(one))) {
                        failed.lock().unwrap().push(format!("{}: {}", name(one), text_of(&*panic)));
                    }
                }
            });
        }
    });
    failed.into_inner().unwrap()
}

impl Work {
    fn prepare() -> Work {
        for base in [&BARE, &FRESH, &LIVE, &INBOX] {
            LazyLock::force(base);
        }
        let ready: Vec<Mutex<Option<Traced>>> = scenarios().iter().map(|_| Mutex::default()).collect();
        let list: Vec<usize> = (0..ready.len()).collect();
        let failed = all(
            &list,
            |n| scenarios()[*n].name.into(),
            |n| {
                let scenario = scenarios().swap_remove(*n);
                let (mut site, mut checker) = (scenario.base.copy(), Checker::default());
                checker.allow(site.expected("0421"));
                checker.objects(&site);
                (scenario.prepare)(&mut site);
                checker.allow(site.expected("0421"));
                if site.object("stores/0421/manifest.json").is_some() {
                    checker.allow(site.promised("0421"));
                }
                checker.look(&site);
                let points = trace(&scenario, &site.copy());
                *ready[*n].lock().unwrap() = Some((Ready { scenario, site, checker }, points));
            },
        );
        assert!(failed.is_empty(), "scenarios that do not work:\n{}", failed.join("\n"));
        let mut work = Work { scenarios: Vec::new(), reached: BTreeMap::new() };
        for (n, one) in ready.into_iter().enumerate() {
            let (ready, points) = one.into_inner().unwrap().unwrap();
            for (point, count) in points {
                work.reached.entry((ready.scenario.product.name(), point)).or_default().push((n, count));
            }
            work.scenarios.push(ready);
        }
        work
    }

    /// Every point of the list is reached, and no other.
    fn assert_complete(&self) {
        let text = std::fs::read_to_string(repository().join("proto/src/failpoint.txt")).unwrap();
        let lines = text.lines().filter(|l| !l.is_empty() && !l.starts_with('#'));
        let point = |line: &str| {
            let (step, points) = line.split_once(':').unwrap_or_else(|| panic!("no points in {line:?}"));
            let step = step.trim().to_owned();
            points.split_whitespace().map(|p| format!("{step}.{p}")).collect::<Vec<_>>()
        };
        let listed: BTreeSet<String> = lines.flat_map(point).collect();
        let reached: BTreeSet<String> = self.reached.keys().map(|(_, point)| point.clone()).collect();
        let unreached: Vec<_> = listed.difference(&reached).collect();
        let unlisted: Vec<_> = reached.difference(&listed).collect();
        assert!(
            unreached.is_empty() && unlisted.is_empty(),
            "no scenario reaches {unreached:?}; not listed: {unlisted:?}"
        );
    }
}

/// One kill.
struct Job<'w> {
    at: &'w (&'static str, String),
    ready: &'w Ready,
    nth: u32,
}

impl Work {
    fn job<'w>(&'w self, at: &'w (&'static str, String), (n, count): (usize, u32)) -> Job<'w> {
        let ready = &self.scenarios[n];
        Job { at, ready, nth: count.min(ready.scenario.nth) }
    }
}

impl Job<'_> {
    fn name(&self) -> String {
        format!("{} at {} in `{}`", self.at.0, self.at.1, self.ready.scenario.name)
    }

    /// What it leaves, looked at.
    #[track_caller]
    fn kill(&self) -> (Site, Checker) {
        let (site, mut checker) = (self.ready.site.copy(), self.ready.checker.clone());
        assert!(cut(&self.ready.scenario, &site, &self.at.1, self.nth, "first"), "it did not get there");
        checker.look(&site);
        (site, checker)
    }
}

#[test]
fn killed_at_every_point() {
    let work = Work::prepare();
    work.assert_complete();
    let jobs: Vec<Job<'_>> = work.reached.iter().map(|(at, by)| work.job(at, by[0])).collect();
    let failed = all(&jobs, Job::name, |job| {
        let (site, mut checker) = job.kill();
        recover(&job.ready.scenario, &site, &mut checker);
    });
    let points = work.reached.keys().map(|(_, point)| point).collect::<BTreeSet<_>>().len();
    println!("{points} points, {} kills in {} scenarios", jobs.len(), work.scenarios.len());
    assert!(failed.is_empty(), "{} of {} kills:\n{}", failed.len(), jobs.len(), failed.join("\n\n"));
}

/// A second kill, at points that the recovery from each first one reaches: at some of them, spread over all, or as many
/// as `TILLCAST_CRASH_EACH` says.
#[test]
#[ignore = "pairs: minutes"]
fn killed_again_in_the_recovery() {
    let work = Work::prepare();
    let jobs: Vec<Job<'_>> = work.reached.iter().map(|(at, by)| work.job(at, by[0])).collect();
    let each = std::env::var("TILLCAST_CRASH_EACH").map_or(2, |n| n.parse().expect("TILLCAST_CRASH_EACH is a number"));
    let (pairs, turn) = (AtomicUsize::new(0), AtomicUsize::new(0));
    // What a first kill leaves is kept once, and copied for each second one.
    let failed = all(&jobs, Job::name, |job| {
        let scenario = &job.ready.scenario;
        let (site, checker) = job.kill();
        let points: Vec<String> = trace(scenario, &site.copy()).into_keys().collect();
        // Other points for each first kill; a recovery may have nothing left to do.
        let (many, from) = (points.len(), turn.fetch_add(1, Ordering::Relaxed));
        let seconds: BTreeSet<usize> =
            (0..each.min(many)).map(|n| (from * 7 + n * many / each.min(many)) % many).collect();
        for point in seconds.into_iter().map(|n| points[n].clone()) {
            let (site, mut checker) = (site.copy(), checker.clone());
            let name = || format!("then at {point}");
            hours_pass(&site);
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                assert!(cut(scenario, &site, &point, 1, "second"), "it did not get there");
                checker.look(&site);
                recover(scenario, &site, &mut checker);
            }));
            pairs.fetch_add(1, Ordering::Relaxed);
            if let Err(panic) = outcome {
                panic!("{}: {}", name(), text_of(&*panic));
            }
        }
    });
    println!("{} pairs after {} first kills", pairs.into_inner(), jobs.len());
    assert!(failed.is_empty(), "{} of {} first kills:\n{}", failed.len(), jobs.len(), failed.join("\n\n"));
}
