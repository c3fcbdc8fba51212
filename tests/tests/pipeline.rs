//! The main job: a row changed at headquarters is on every register of every store, provably the same.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "test code")]

use std::sync::{Arc, LazyLock};
use tillcast_tests::servers::{Conditions, StandIn};
use tillcast_tests::site::{Objects, Source};
use tillcast_tests::{MariaDb, Nginx, PATIENCE, Postgres, Product, S3, Site, http, until};

/// First install, a change that touches each stream and operation, and nothing to do.
fn full_story(site: &Site) {
    site.publish();
    site.bring_down();
    site.assert_all_proven();

    change(site);
    site.publish();
    site.bring_down();
    site.assert_all_proven();

    let before = (site.manifest("0421")["serial"].clone(), site.version("0421", "price"));
    site.publish();
    assert_eq!((site.manifest("0421")["serial"].clone(), site.version("0421", "price")), before, "nothing changed");
}

fn change(site: &Site) {
    site.sql(
        "UPDATE price SET price_cents = price_cents + 1 WHERE sku < 'SKU0000010';
         DELETE FROM promo WHERE id = 3;
         INSERT INTO item VALUES ('NEW1', 'brand new', 7, 1.25, NULL);
         UPDATE item SET weight = NULL WHERE sku = 'SKU0000011';
         UPDATE staff SET role = 'manager' WHERE id = 1 AND store = '0421'",
    );
}

#[test]
fn from_sqlite_by_a_directory() {
    let site = Site::small();
    full_story(&site);
    let east = |id: &str| site.read(id, "SELECT price_cents FROM price WHERE sku = 'SKU0000001'");
    assert_eq!(east("0421-01"), east("0421-02"));
    assert_ne!(east("0421-01"), east("0815-01"), "zones have their own prices");
}

/// A web server gives the bucket out, by a user of its own.
#[test]
fn what_a_command_by_hand_puts_is_for_readers_whatever_its_umask() {
    use std::os::unix::fs::PermissionsExt as _;
    let site = Site::small();
    std::fs::set_permissions(site.dir(), std::fs::Permissions::from_mode(0o755)).unwrap();
    for made in [site.bucket(), site.hq.dir.join("state")] {
        std::fs::remove_dir_all(made).unwrap();
    }
    let mut shell = std::process::Command::new("/bin/sh");
    shell.args(["-c", "umask 027; exec \"$0\" init"]).arg(Product::Hq.path()).current_dir(&site.hq.dir);
    assert!(shell.status().unwrap().success());
    let mode = |p: &std::path::Path| std::fs::metadata(p).unwrap().permissions().mode() & 0o777;
    let objects = ["", "trust.json", "trust", "trust/0000000001.json"].map(|name| mode(&site.bucket().join(name)));
    assert_eq!(objects, [0o755, 0o644, 0o755, 0o644]);
    assert_eq!(mode(&site.hq.dir.join("state")) & 0o007, 0, "what is no bucket is as narrow as the umask has it");
}

static POSTGRES: LazyLock<Arc<Postgres>> = LazyLock::new(|| Arc::new(Postgres::start()));

#[test]
fn from_postgres() {
    full_story(&Site::builder().source(Source::Postgres(POSTGRES.clone())).build());
}

#[test]
fn with_the_ledger_in_postgres() {
    let url = POSTGRES.create_database("ledger");
    full_story(&Site::builder().hq("state.database", &format!("'{url}'")).build());
}

#[test]
fn from_mariadb() {
    full_story(&Site::builder().source(Source::MariaDb(Arc::new(MariaDb::start()))).build());
}

#[test]
fn from_file_drops() {
    let site = Site::builder().source(Source::Inbox).build();
    site.bring_down();
    site.assert_all_proven();
    change(&site);
    site.drop_all();
    site.publish();
    site.bring_down();
    site.assert_all_proven();
}

#[test]
fn by_s3_that_keeps_conditions() {
    full_story(&Site::builder().objects(Objects::S3(Arc::new(S3::moto()))).prefix("chain/a").build());
}

#[test]
fn by_s3_that_ignores_conditions() {
    full_story(&Site::builder().objects(Objects::S3(Arc::new(S3::ignoring_conditions()))).build());
}

#[test]
fn by_a_bucket_that_answers_501_to_conditions() {
    let oss = Arc::new(StandIn::start(Conditions::Refused));
    full_story(&Site::builder().objects(Objects::StandIn(oss)).build());
}

#[test]
fn a_static_server_of_the_bucket_or_of_ok_serves_relays_and_registers() {
    let mut site = Site::small();
    site.publish();
    let cdn = Nginx::serve(&site.bucket());
    site.relays.get_mut("0421").unwrap().set("sources", &format!("[\"{}\"]", cdn.url()));
    site.relay("0421").run(&["once"]).ok();
    // The relay's machine is dead, its directory is served by nginx: the layout is static.
    let nginx = Nginx::serve(&site.relay("0421").dir.join("data/ok"));
    for id in ["0421-01", "0421-02"] {
        let register = site.registers.get_mut(id).unwrap();
        register.set_text("relay", &nginx.url());
        register.set("fallback", "[]");
        site.register(id).run(&["once"]).ok();
    }
    site.assert_proven("0421");
}

#[test]
fn daemons_carry_a_change_within_seconds() {
    let site = Site::builder().hq_service().build();
    site.publish();
    let hq = site.hq.start_ready();
    let relays: Vec<_> = site.relays.values().map(|r| r.start_ready()).collect();
    let registers: Vec<_> = site.registers.values().map(|r| r.start_ready()).collect();
    site.sql("UPDATE price SET price_cents = 1234 WHERE sku = 'SKU0000005'");
    site.publish();
    // One that was not installed yet may get prices before all else.
    until(PATIENCE, "all registers have the price", || {
        site.registers.iter().all(|(id, r)| r.digests() == site.expected(&id[..4]))
    });
    site.assert_all_proven();
    let versions = http::get(&format!("{}/v1/versions", site.relay("0421").url())).expect_status(200).json();
    assert_eq!(versions["price@zone-east"], site.version("0421", "price"));
    [registers, relays, vec![hq]].into_iter().flatten().for_each(tillcast_tests::Daemon::term);
}

/// A snapshot older than a TRUNCATE sees the list of stores empty: who was in it before is published to.
#[test]
fn a_list_of_stores_made_anew_under_the_snapshot_keeps_nothing_from_anybody() {
    let site = Site::builder().source(Source::Postgres(POSTGRES.clone())).build();
    site.publish();
    let database = site.database();
    let holds = |what: &str| {
        let locks = "FROM pg_locks WHERE database = (SELECT oid FROM pg_database WHERE datname = current_database())";
        POSTGRES.sql(database, &format!("SELECT count(*) {locks} AND {what}")).trim() != "0"
    };
    site.sql("UPDATE price SET price_cents = 4321 WHERE sku = 'SKU0000005'");
    let refused = std::thread::scope(|s| {
        // Held until publish, whose snapshot is taken by then, waits for it.
        let reload =
            "SET LOCAL statement_timeout = '60s'; CREATE TEMP TABLE kept AS SELECT * FROM store; TRUNCATE store;
            INSERT INTO store SELECT * FROM kept;
            DO $$ BEGIN WHILE NOT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND relation = 'store'::regclass)
                LOOP PERFORM pg_sleep(0.01); END LOOP; END $$";
        s.spawn(move || POSTGRES.sql(database, reload));
        until(PATIENCE, "the list is being made anew", || {
            holds("granted AND mode = 'AccessExclusiveLock' AND relation = 'store'::regclass")
        });
        site.hq.run(&["publish"])
    });
    refused.code(3).says(&["the list of stores in the source is not taken", "store"]);
    site.bring_down();
    site.assert_all_proven();
    assert_eq!(site.read("0421-01", "SELECT price_cents FROM price WHERE sku = 'SKU0000005'").as_deref(), Some("4321"));
    site.publish();
}
