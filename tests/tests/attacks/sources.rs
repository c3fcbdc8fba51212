//! Whoever holds the bucket, the CDN or the line to it, without a key.

use super::*;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tillcast_tests::site::{Node, Objects};
use tillcast_tests::{Liar, Nginx, PATIENCE, S3, Say, Watch, files, http, until};

/// A site whose relay and register read a liar in front of the bucket; the register's own relay is nowhere.
struct Between {
    site: Site,
    bucket: Nginx,
    liar: Liar,
    watch: Watch,
}

impl Between {
    fn new(site: Builder) -> Between {
        let (mut watch, site) = Watch::over(site);
        let mut site = site.relay("tries.limit", "1").relay("tries.refetch", "'1s'").build();
        site.publish();
        watch.start(&site);
        let bucket = Nginx::serve(&site.bucket());
        let url = bucket.url();
        let liar = Liar::start(move |_| Say::As(url.clone()));
        set_sources(&mut site, &[&liar.url()]);
        let between = Between { site, bucket, liar, watch };
        between.both(|node| drop(node.run(&["once"]).ok()));
        assert_eq!(rows(&between.site, "0421-01"), between.site.expected("0421"));
        between
    }

    fn both(&self, mut each: impl FnMut(&Node)) {
        [self.site.relay("0421"), self.site.register("0421-01")].into_iter().for_each(&mut each);
    }

    fn honest(&self) {
        let url = self.bucket.url();
        self.liar.now(move |_| Say::As(url.clone()));
    }

    /// Lies about paths with this part; else it is honest.
    fn lie(&self, part: &'static str, say: Say) {
        let url = self.bucket.url();
        self.liar.now(move |a| if a.target.contains(part) { say.clone() } else { Say::As(url.clone()) });
    }

    /// The relay meets the lie before there is something to get: the mail has the reason that it told last.
    fn relay_tells(&self) {
        drop(self.site.relay("0421").run(&["once"]));
    }

    /// What headquarters mails while the attack lasts.
    #[track_caller]
    fn is_mailed(&self, subject: &str, reason: &str) {
        let text = self.watch.tells(subject, || self.relay_tells());
        assert!(text.contains(reason), "{subject}: {reason} is not in:\n{text}");
    }

    /// After an attack: good news come in.
    #[track_caller]
    fn recovers(&self) {
        self.honest();
        news(&self.site);
        self.both(|node| {
            until(PATIENCE, "the attack is over", || node.run(&["once"]).code == Some(0));
            assert_eq!(node.status()["errors"], json!([]), "{}", node.id);
        });
        assert_eq!(self.site.relay("0421").digests(), self.site.expected("0421"));
        assert_eq!(rows(&self.site, "0421-01"), self.site.expected("0421"));
        self.watch.is_calm(|| self.relay_tells());
    }
}

/// The mail on a store that an attack keeps from what is published.
const STUCK: &str = "Store 0421 does not get what is published";
/// The mail on a pack that is refused.
const PRICE_IN_ERROR: &str = "A pack of price@zone-east is in error";

fn set_sources(site: &mut Site, urls: &[&str]) {
    let list = format!("['{}']", urls.join("', '"));
    site.relays.values_mut().for_each(|r| r.set("sources", &list));
    let nowhere = format!("http://127.0.0.1:{}", tillcast_tests::quiet_port());
    for register in site.registers.values_mut() {
        register.set("fallback", &list);
        register.set_text("relay", &nowhere);
    }
}

fn bytes_below(dir: &Path) -> u64 {
    let walk = std::fs::read_dir(dir).into_iter().flatten().flatten();
    walk.map(|e| if e.path().is_dir() { bytes_below(&e.path()) } else { e.metadata().map_or(0, |m| m.len()) }).sum()
}

#[test]
fn data_without_end_is_cut_where_the_limit_is() {
    let b = Between::new(small());
    for (part, told) in [
        ("manifest.json", "more than 4194304 bytes"),
        ("trust.json", "more than 65536 bytes"),
        (".delta.pack", "more than"),
    ] {
        for length in [false, true] {
            b.lie(part, Say::Endless(length));
            b.relay_tells();
            news(&b.site);
            let before = rows(&b.site, "0421-01");
            b.both(|node| {
                let (begun, held) = (Instant::now(), bytes_below(&node.dir));
                let out = node.run(&["once", "--json"]);
                assert!(matches!(out.code, Some(1 | 3)), "{part}: {}", out.text());
                let errors = node.status()["errors"].to_string() + &out.text();
                assert!(errors.contains(told), "{}, {part}: {errors}", node.id);
                no_panic(&out.text());
                assert!(begun.elapsed() < PATIENCE, "{part}: {:?}", begun.elapsed());
                assert!(bytes_below(&node.dir) < held + (2 << 20), "{}, {part}: it stays on the disk", node.id);
            });
            assert_eq!(rows(&b.site, "0421-01"), before, "{part}");
            if part == ".delta.pack" {
                b.is_mailed(PRICE_IN_ERROR, told)
            } else {
                b.is_mailed(STUCK, told)
            }
            b.recovers();
        }
    }
}

/// A byte now and then, for ever: given up at the rate floor, the next source is asked.
#[test]
fn a_source_that_drips_is_left_for_the_next() {
    let site = small().relay("source.read_timeout", "'15s'").relay("rate.window", "'4s'");
    let mut b = Between::new(site.agent("source_options.read_timeout", "'15s'").agent("rate.window", "'4s'"));
    let (slow, good) = (b.liar.url(), b.bucket.url());
    set_sources(&mut b.site, &[&slow, &good]);
    for part in ["manifest.json", "trust.json", ".delta.pack"] {
        news(&b.site);
        b.lie(part, Say::Drip(b"{".to_vec(), Duration::from_millis(100)));
        b.both(|node| {
            let begun = Instant::now();
            let out = node.run(&["once", "--json"]).text();
            // Of a pack that came from elsewhere nobody needs to hear.
            let told = out.contains("slower than 1024 bytes/s") || part == ".delta.pack";
            assert!(told, "{}, {part}: {out}", node.id);
            assert!(begun.elapsed() < PATIENCE, "{}, {part}: {:?}", node.id, begun.elapsed());
        });
        assert_eq!(b.site.relay("0421").digests(), b.site.expected("0421"), "{part}");
        assert_eq!(rows(&b.site, "0421-01"), b.site.expected("0421"), "{part}");
    }
    b.watch.is_calm(|| drop(b.site.relay("0421").run(&["once"])));
    // Where there is no other source people are told, and why. The relay says so before there is something that it lacks.
    set_sources(&mut b.site, &[&slow]);
    let before = rows(&b.site, "0421-01");
    b.lie("manifest.json", Say::Drip(b"{".to_vec(), Duration::from_millis(100)));
    b.both(|node| drop(node.run(&["once"])));
    news(&b.site);
    b.is_mailed(STUCK, "slower than 1024 bytes/s");
    assert_eq!(rows(&b.site, "0421-01"), before);
    b.recovers();
}

/// Yesterday's bucket, well signed, served for ever: nobody can tell it from a quiet day but headquarters, which
/// hears what the store holds. That it ends by expiry is in `trust.rs`.
#[test]
fn a_frozen_store_keeps_its_rows_and_headquarters_sees_it() {
    let b = Between::new(small());
    let old = tillcast_tests::temp_dir("frozen");
    for name in files::tree(&b.site.bucket()).into_keys() {
        let to = old.path().join(&name);
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        std::fs::copy(b.site.bucket().join(&name), to).unwrap();
    }
    let frozen = Nginx::serve(old.path());
    let url = frozen.url();
    b.liar.now(move |_| Say::As(url.clone()));
    let before = rows(&b.site, "0421-01");
    news(&b.site);
    b.site.relay("0421").run(&["once"]).ok();
    b.site.register("0421-01").run(&["once"]).ok();
    assert_eq!(rows(&b.site, "0421-01"), before, "nothing is lost");
    until(PATIENCE, "headquarters' page says that the store is behind", || {
        http::get(&b.site.hq.url()).text().contains("behind in price")
    });
    b.is_mailed(STUCK, "which is not the newest");
    // A register that is new to the store takes what there is; then the thaw.
    b.recovers();
    b.site.relay("0421").run(&["once"]).ok();
    until(PATIENCE, "nothing is behind", || !http::get(&b.site.hq.url()).text().contains("behind in"));
}

/// Each pack is good, and not the one that is listed.
#[test]
fn packs_mixed_and_matched_are_refused_by_their_hash() {
    let b = Between::new(Site::builder().registers(1).items(ITEMS));
    let site = &b.site;
    news(site);
    for (wrong, right) in [
        ("packs/price@zone-west/0000000001.full.pack", "price@zone-east"),
        ("packs/price@zone-east/0000000001.full.pack", "price@zone-east"),
        ("packs/catalog@all/0000000001.full.pack", "price@zone-east"),
        ("packs/price@zone-west/0000000002.delta.pack", "price@zone-east"),
        ("trust/0000000001.json", "price@zone-east"),
    ] {
        news(site);
        site.sql("UPDATE staff SET name = name || '.' WHERE id = 3 AND store = '0421'");
        site.publish();
        let before = rows(site, "0421-01");
        let wrong = site.object(wrong).unwrap();
        let url = b.bucket.url();
        b.liar.now(move |a| {
            // Of what headquarters hears, it makes a full next: a way round.
            let hit = a.target.contains(right) && a.target.ends_with(".pack");
            if hit { Say::ok(wrong.clone()) } else { Say::As(url.clone()) }
        });
        b.both(|node| {
            let out = node.run(&["once"]).code(3).text();
            no_panic(&out);
            let errors = node.status()["errors"].to_string();
            assert!(errors.contains(right), "{}, {errors}", node.id);
        });
        let now = rows(site, "0421-01");
        assert_eq!(now["price"], before["price"]);
        assert_eq!(now["staff"], site.expected("0421")["staff"], "other streams go on");
        b.is_mailed(&format!("A pack of {right} is in error"), &format!("packs/{right}/"));
        b.honest();
        b.both(|node| until(PATIENCE, "well again", || node.run(&["once"]).code == Some(0)));
    }
    b.recovers();
}

/// A well signed list that takes one stream from an older one: readers never go back.
#[test]
fn one_streams_entry_of_an_older_list_moves_nobody_back() {
    let b = Between::new(small());
    let site = &b.site;
    let old = site.manifest("0421")["streams"]["price"].clone();
    news(site);
    b.both(|node| drop(node.run(&["once"]).ok()));
    let expected = site.expected("0421");
    site.resign("0421", |m| m["streams"]["price"] = old);
    b.both(|node| no_panic(&node.run(&["once"]).text()));
    assert_eq!(rows(site, "0421-01"), expected);
    site.relay("0421").run(&["verify"]).ok();
    b.is_mailed("Store 0421 holds a list that headquarters did not sign", "somebody else has a publisher's key");
    // It is told of what is in the bucket too, and then gone above.
    site.hq.run(&["publish"]).code(1).says(&["signed by our key"]);
    b.recovers();
}

/// A whole headquarters of the attacker's own: root, keys, list and packs all fit each other, and the store's name.
#[test]
fn another_headquarters_installs_nothing() {
    let b = Between::new(small());
    let evil = small().build();
    evil.sql("UPDATE price SET price_cents = 1");
    evil.publish();
    let evil_bucket = Nginx::serve(&evil.bucket());
    let expected = b.site.expected("0421");
    let mut site = b.site;
    // Devices that hold data, and one that is new.
    set_sources(&mut site, &[&evil_bucket.url()]);
    site.relay("0421").run(&["once"]);
    news(&site);
    for round in 0..2 {
        for node in [site.relay("0421"), site.register("0421-01")] {
            let out = node.run(&["once", "--json"]);
            assert!(matches!(out.code, Some(1 | 3)), "{}", out.text());
            assert!(out.text().contains("BAD_SIGNATURE"), "{}: {}", node.id, out.text());
        }
        let told = b.watch.tells(STUCK, || drop(site.relay("0421").run(&["once"])));
        assert!(told.contains("BAD_SIGNATURE"), "{told}");
        let served = files::tree(&site.relay("0421").dir.join("data/ok"));
        if round == 0 {
            assert_eq!(rows(&site, "0421-01"), expected);
            std::fs::remove_dir_all(site.register("0421-01").dir.join("data")).unwrap();
            std::fs::remove_dir_all(site.relay("0421").dir.join("data")).unwrap();
            ["0421", "0421-01"].iter().for_each(|id| site.enroll(id));
        } else {
            assert!(!served.keys().any(|name| name.ends_with(".pack")), "{served:?}");
            assert!(site.try_read("0421-01", "SELECT count(*) FROM price").is_err(), "nothing was installed");
        }
    }
    let good = b.bucket.url();
    set_sources(&mut site, &[&evil_bucket.url(), &good]);
    for node in [site.relay("0421"), site.register("0421-01")] {
        node.run(&["once"]).code(3);
    }
    assert_eq!(site.relay("0421").digests(), site.expected("0421"));
    assert_eq!(rows(&site, "0421-01"), site.expected("0421"));
}

/// `trust.json` is not signed in what it claims: how far to walk.
#[test]
fn a_walk_that_is_claimed_to_be_endless_is_not_begun() {
    let b = Between::new(small());
    let mut trust = forge::payload(&b.site.object("trust.json").unwrap());
    for version in [2000u64, 1 << 62, u64::MAX] {
        trust["version"] = version.into();
        let claim = forge::seal("trust", &serde_json::to_vec(&trust).unwrap(), &[&forge::strange_key(7)]);
        b.lie("trust.json", Say::ok(claim));
        b.relay_tells();
        let asked = b.liar.asked().len();
        news(&b.site);
        b.both(|node| no_panic(&node.run(&["once"]).text()));
        assert!(b.liar.asked().len() - asked < 30, "{version}: it walks");
        b.is_mailed(STUCK, "trust");
        b.recovers();
    }
}

/// Whoever may put objects can put one whose key is no path: it must not stop headquarters.
#[test]
fn stray_keys_in_a_bucket_stop_nothing() {
    let s3 = Arc::new(S3::moto());
    let mut site = small().objects(Objects::S3(s3.clone())).prefix("chain").build();
    site.publish();
    for key in ["packs/price@zone-east//x", "packs/price@zone-east/../../../etc/passwd", "packs//", "stores/../x"] {
        s3.put(&format!("chain/{key}"), b"evil");
    }
    site.sql("UPDATE price SET price_cents = 7 WHERE sku = 'SKU0000002'");
    site.publish().says(&["a stray key in the bucket", "packs/price@zone-east//x"]);
    // A ledger that was lost is rebuilt from the bucket, by listing it.
    std::fs::remove_file(site.hq.dir.join("state/fleet.db")).unwrap();
    news(&site);
    ["0421", "0421-01"].iter().for_each(|id| site.enroll(id));
    site.bring_down();
    site.assert_proven("0421");
}
