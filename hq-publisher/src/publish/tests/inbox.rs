//! Files that are dropped into the inbox: taken, waited for, refused.

use super::*;
use std::os::unix::fs::FileExt;

/// With an inbox the replica is what a table's rows are kept from, too.
#[tokio::test(flavor = "multi_thread")]
async fn rows_that_no_drop_came_for_are_never_kept_from_a_damaged_replica() {
    for (damage, full) in
        [("UPDATE price SET cents = 1", false), ("UPDATE price SET cents = 1", true), ("a page", false)]
    {
        let w = inbox_world().await;
        w.publish().await;
        let file = w.dir.path().join("state/replicas/price@zone-east.db");
        if damage == "a page" {
            let db = Connection::open(&file).unwrap();
            let root: i64 =
                db.query_row("SELECT rootpage FROM sqlite_schema WHERE name = 'price'", [], |r| r.get(0)).unwrap();
            let size: i64 = db.query_row("PRAGMA page_size", [], |r| r.get(0)).unwrap();
            drop(db);
            let file = fs::OpenOptions::new().write(true).open(&file).unwrap();
            file.write_all_at(&[0xEE; 64], ((root - 1) * size).unsigned_abs()).unwrap();
        } else {
            let db = Connection::open(&file).unwrap();
            db.execute_batch(damage).unwrap();
        }
        drop_file(&w, "price.zone-east.deal.ndjson", "{\"id\":2,\"sku\":\"b\"}\n");
        let r = w.publish_as(PublishOptions { full, ..options() }).await;
        assert_eq!(
            (r.exit_code(), outcome(&r, "price@zone-east")),
            (0, Outcome::Published),
            "{damage}: {:?}",
            r.lines()
        );
        let cents: Vec<i64> = {
            let db = Connection::open(&file).unwrap();
            let mut all = db.prepare("SELECT cents FROM price ORDER BY sku").unwrap();
            all.query_map([], |r| r.get(0)).unwrap().map(Result::unwrap).collect()
        };
        assert_eq!(cents, [100, 200], "{damage}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn drops_are_published_moved_and_refused() {
    let w = inbox_world().await;
    let r = w.publish().await;
    assert_eq!((r.exit_code(), r.signed), (0, 2), "{:?}", r.lines());
    let names = |room: &str| {
        let mut names: Vec<String> = fs::read_dir(w.dir.path().join(room))
            .into_iter()
            .flatten()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    assert_eq!(names("inbox"), ["done"]);
    assert_eq!(names("inbox/done").len(), 6);
    // One table of two: the other keeps its rows. A bad drop goes back with its lines.
    drop_file(&w, "price.zone-east.price.csv", "sku,cents\na,101\nb,200\n");
    drop_file(&w, "catalog.all.item.csv", "sku,name,plu\na,Tea,1\nb,Milk,one\nc,A name that is much too long,3\n");
    drop_file(&w, "price.zone-north.price.csv", "sku,cents\n");
    drop_file(&w, "prices.all.x.csv", "a\n");
    let r = w.publish().await;
    assert_eq!(
        [outcome(&r, "catalog@all"), outcome(&r, "price@zone-east"), outcome(&r, "price@zone-west")],
        [Outcome::Refused, Outcome::Published, Outcome::Unchanged]
    );
    assert_eq!(r.exit_code(), 3);
    assert_eq!(
        names("inbox/rejected"),
        [
            "catalog.all.item.csv",
            "catalog.all.item.csv.reason.txt",
            "price.zone-north.price.csv",
            "price.zone-north.price.csv.reason.txt",
            "prices.all.x.csv",
            "prices.all.x.csv.reason.txt"
        ]
    );
    let reason = fs::read_to_string(w.dir.path().join("inbox/rejected/catalog.all.item.csv.reason.txt")).unwrap();
    let told = &r.instances[&"catalog@all".parse().unwrap()].reason;
    assert_eq!(told, "2 bad rows in catalog.all.item.csv; nothing of stream catalog is published");
    assert!(
        reason.contains("line 3, key sku=\"b\": column plu is \"one\"")
            && reason.contains("line 4")
            && reason.contains("the limit is 20"),
        "{reason}"
    );
    let mut register = w.register("r.db");
    w.follow("0421", &mut register);
    assert_eq!(rows(register.connection(), "SELECT sku || cents FROM price ORDER BY 1"), ["a101", "b200"]);
    assert_eq!(rows(register.connection(), "SELECT id || sku FROM deal"), ["1a"]);
    // Mailed once each, and not well again before a good drop came.
    let ledger = Ledger::open(&w.config).await.unwrap();
    assert_eq!(
        ledger.unsent_mails().await.unwrap().len(),
        3,
        "the stream's refusal, and the two drops that fit nowhere"
    );
    w.publish().await;
    assert_eq!(ledger.unsent_mails().await.unwrap().len(), 3);
    drop_file(&w, "catalog.all.item.csv", "sku,name,plu\na,Tea,1\nb,Milk,2\n");
    assert_eq!(w.publish().await.exit_code(), 0);
    assert_eq!(
        ledger.unsent_mails().await.unwrap().len(),
        6,
        "that stream is well, and nothing else came from nowhere"
    );
    // A drop that empties a table is held where it is, until it is told.
    drop_file(&w, "price.zone-east.deal.ndjson", "\n");
    let r = w.publish().await;
    assert_eq!(
        (outcome(&r, "price@zone-east"), names("inbox")),
        (
            Outcome::Refused,
            vec![
                "done".into(),
                "price.zone-east.deal.ndjson".into(),
                "price.zone-east.deal.ndjson.ok".into(),
                "rejected".into()
            ]
        )
    );
    let r = w.publish_as(PublishOptions { allow_shrink: Some(None), ..options() }).await;
    assert_eq!((outcome(&r, "price@zone-east"), names("inbox").len()), (Outcome::Published, 2));
}

/// Each drop is whole by itself: which comes first is chance.
#[tokio::test(flavor = "multi_thread")]
async fn a_drop_that_refers_to_rows_of_one_that_is_to_come_waits_for_it() {
    let w = inbox_world().await;
    let lines = "CREATE TABLE line (id INTEGER PRIMARY KEY, sku TEXT NOT NULL REFERENCES item (sku)) STRICT;";
    w.write("catalog.sql", &format!("{CATALOG}\n{lines}"));
    drop_file(&w, "catalog.all.line.csv", "id,sku\n1,a\n");
    assert_eq!(w.publish().await.exit_code(), 0);
    let ledger = Ledger::open(&w.config).await.unwrap();
    let catalog = |r: &PublishReport| r.instances[&"catalog@all".parse().unwrap()].clone();
    let waits = |r: &PublishReport| {
        let told = catalog(r);
        assert_eq!((r.exit_code(), told.code), (3, Some("BAD_ROWS")), "{:?}", r.lines());
        let stays = "catalog.all.line.csv stays until a right drop of table item comes";
        assert!(told.reason.contains(stays) && told.faults[0].contains("sku=\"c\""), "{:?}", r.lines());
        assert!(w.exists("inbox/catalog.all.line.csv") && w.exists("inbox/catalog.all.line.csv.ok"));
    };
    drop_file(&w, "catalog.all.line.csv", "id,sku\n1,a\n2,c\n");
    for cents in [101, 102] {
        drop_prices(&w, cents);
        let r = w.publish().await;
        waits(&r);
        assert_eq!((r.rejected.len(), outcome(&r, "price@zone-east")), (0, Outcome::Published), "others go on");
        assert_eq!(ledger.unsent_mails().await.unwrap().len(), 1, "it is mailed once");
    }
    // One whose own rows are bad is not waited for with it.
    drop_file(&w, "catalog.all.item.csv", "sku,name,plu\na,Tea,1\nb,Milk,2\nc,A name that is much too long,3\n");
    let r = w.publish().await;
    waits(&r);
    assert!(w.exists("inbox/rejected/catalog.all.item.csv"));
    drop_file(&w, "catalog.all.item.csv", "sku,name,plu\na,Tea,1\nb,Milk,2\nc,Cake,3\n");
    let r = w.publish().await;
    assert_eq!((r.exit_code(), catalog(&r).outcome), (0, Outcome::Published), "{:?}", r.lines());
    assert!(!w.exists("inbox/catalog.all.line.csv") && w.exists("inbox/done/catalog.all.line.csv"));
    let mut register = w.register("r.db");
    w.follow("0421", &mut register);
    assert_eq!(rows(register.connection(), "SELECT id || sku FROM line ORDER BY 1"), ["1a", "2c"]);
    // Where the other is there, nothing is to come.
    drop_file(&w, "catalog.all.item.csv", "sku,name,plu\na,Tea,1\nb,Milk,2\nc,Cake,4\n");
    drop_file(&w, "catalog.all.line.csv", "id,sku\n1,a\n2,d\n");
    let r = w.publish().await;
    assert_eq!((r.rejected.len(), r.rejected[0].name.as_str()), (1, "catalog.all.line.csv"), "{:?}", r.lines());
    // Nor where the row has a fault of its own.
    drop_file(&w, "catalog.all.line.csv", "id,sku\n1,d\n2,\nx,a\n");
    fs::remove_file(w.dir.path().join("inbox/catalog.all.item.csv")).unwrap();
    let r = w.publish().await;
    assert_eq!((r.rejected.len(), catalog(&r).bad_rows), (1, 3), "{:?}", r.lines());
    // Nor is it waited for without end: its stream waits with it. It counts from the first word, however old a drop is.
    let subjects =
        async || -> Vec<String> { ledger.unsent_mails().await.unwrap().into_iter().map(|m| m.subject).collect() };
    let in_vain = "[Tillcast] catalog.all.line.csv was rejected".to_owned();
    let recovered = "[Tillcast] Recovered: catalog.all.line.csv was rejected".to_owned();
    drop_file(&w, "catalog.all.line.csv", "id,sku\n1,a\n2,d\n");
    let file = fs::File::options().append(true).open(w.dir.path().join("inbox/catalog.all.line.csv")).unwrap();
    file.set_modified(std::time::SystemTime::now() - Duration::from_secs(9 * 3600)).unwrap();
    for (minutes, rejected) in [(0, 0), (30, 0), (29, 0), (1, 1)] {
        w.clock.advance(Duration::from_secs(60 * minutes));
        // Whoever writes it anew begins no new wait.
        if minutes > 1 {
            drop_file(&w, "catalog.all.line.csv", &format!("id,sku\n1,a\n2,d\n{minutes},d\n"));
        }
        let told = subjects().await.len();
        let r = w.publish_as(PublishOptions { clock_is_right: true, ..options() }).await;
        assert_eq!((r.rejected.len(), catalog(&r).code), (rejected, Some("BAD_ROWS")), "{minutes}: {:?}", r.lines());
        assert_eq!(subjects().await.len() - told, rejected, "{minutes}: {:?}", subjects().await);
    }
    assert_eq!(subjects().await.last(), Some(&in_vain));
    assert_eq!(catalog(&w.publish().await).outcome, Outcome::Unchanged, "its stream goes on");
    // What comes without it says nothing of it.
    drop_file(&w, "catalog.all.item.csv", "sku,name,plu\na,Tea,1\nb,Milk,2\nc,Cake,3\nd,Bread,4\n");
    assert_eq!(catalog(&w.publish().await).outcome, Outcome::Published);
    assert!(!subjects().await.contains(&recovered), "{:?}", subjects().await);
    // It is told anew each time it waits.
    drop_file(&w, "catalog.all.line.csv", "id,sku\n1,a\n2,e\n");
    let r = w.publish().await;
    assert_eq!((r.rejected.len(), catalog(&r).code), (0, Some("BAD_ROWS")), "{:?}", r.lines());
    drop_file(&w, "catalog.all.line.csv", "id,sku\n1,a\n2,d\n");
    assert_eq!(catalog(&w.publish().await).outcome, Outcome::Published);
    assert!(subjects().await.contains(&recovered), "{:?}", subjects().await);
}

/// One zone's exporter that leaves a file out holds up no other zone.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_zone_of_which_not_all_drops_came_waits_and_others_go_on() {
    let w = inbox_world().await;
    w.publish().await;
    let ledger = Ledger::open(&w.config).await.unwrap();
    let subjects =
        async || -> Vec<String> { ledger.unsent_mails().await.unwrap().into_iter().map(|m| m.subject).collect() };
    let waits = "[Tillcast] price@zone-north waits for drops".to_owned();
    drop_file(&w, "stores.csv", "id,zone\n0421,east\n0422,west\n0423,north\n");
    for (minutes, cents, mails) in [(0, 101, vec![]), (59, 102, vec![]), (1, 103, vec![waits.clone()])] {
        w.clock.advance(Duration::from_secs(60 * minutes));
        drop_prices(&w, cents);
        // Each is another file.
        drop_file(&w, "price.zone-north.price.csv", &format!("sku,cents\na,{cents}\n"));
        let r = w.publish_as(PublishOptions { clock_is_right: true, ..options() }).await;
        assert_eq!(outcome(&r, "price@zone-east"), Outcome::Published, "{minutes}: {:?}", r.lines());
        let north = &r.instances[&"price@zone-north".parse().unwrap()];
        assert_eq!((north.outcome, north.code, r.rejected.len()), (Outcome::Waiting, None, 0), "{:?}", r.lines());
        assert!(north.reason.starts_with("no drop has come for table deal yet"), "{}", north.reason);
        assert!(w.exists("inbox/price.zone-north.price.csv"), "it stays");
        assert_eq!((r.exit_code(), subjects().await), (if mails.is_empty() { 0 } else { 3 }, mails), "{minutes}");
    }
    let recovered = "[Tillcast] Recovered: price@zone-north waits for drops".to_owned();
    // A wrong one ends nothing.
    drop_file(&w, "price.zone-north.deal.ndjson", "{\"id\":1}\n");
    let r = w.publish().await;
    assert_eq!(outcome(&r, "price@zone-north"), Outcome::Refused, "{:?}", r.lines());
    let r = w.publish().await;
    assert_eq!((r.exit_code(), outcome(&r, "price@zone-north")), (3, Outcome::Waiting), "{:?}", r.lines());
    assert!(!subjects().await.contains(&recovered), "{:?}", subjects().await);
    drop_file(&w, "price.zone-north.deal.ndjson", "{\"id\":1,\"sku\":\"a\"}\n");
    let r = w.publish().await;
    assert_eq!((r.exit_code(), outcome(&r, "price@zone-north")), (0, Outcome::Published), "{:?}", r.lines());
    let told = |subject: &String, all: &[String]| all.iter().filter(|s| *s == subject).count();
    let all = subjects().await;
    assert_eq!((told(&waits, &all), told(&recovered, &all)), (1, 1), "{all:?}");
}

/// An exporter that goes by another list, or a letter wrong in `stores.csv`: its registers have no prices, and look well.
#[tokio::test(flavor = "multi_thread")]
async fn a_zone_of_which_no_drop_comes_is_mailed_where_devices_wait_for_it() {
    let w = inbox_world().await;
    w.publish().await;
    drop_file(&w, "stores.csv", "id,zone\n0421,east\n0422,west\n0423,north\n");
    let ledger = Ledger::open(&w.config).await.unwrap();
    let mails =
        async || -> Vec<String> { ledger.unsent_mails().await.unwrap().into_iter().map(|m| m.subject).collect() };
    let an_hour_on = async || {
        w.clock.advance(Duration::from_secs(3600));
        w.publish().await
    };
    let waits = "[Tillcast] price@zone-north waits for drops".to_owned();
    for (has_devices, told) in [(false, &[0, 0][..]), (true, &[0, 1, 1])] {
        if has_devices {
            let desk = Desk::open(&w.config, w.clock.as_ref(), false).await.unwrap();
            desk.enroll(&"0423".parse().unwrap()).await.unwrap();
        }
        for told in told {
            let r = an_hour_on().await;
            // A stream may be meant for some only: that is no run's failure.
            assert_eq!((r.exit_code(), outcome(&r, "price@zone-north")), (0, Outcome::Waiting), "{:?}", r.lines());
            assert_eq!(mails().await, vec![waits.clone(); *told]);
        }
    }
    drop_file(&w, "price.zone-north.price.csv", "sku,cents\na,100\n");
    drop_file(&w, "price.zone-north.deal.ndjson", "{\"id\":1,\"sku\":\"a\"}\n");
    let r = w.publish().await;
    assert_eq!((r.exit_code(), outcome(&r, "price@zone-north")), (0, Outcome::Published), "{:?}", r.lines());
    assert_eq!(mails().await, [waits, "[Tillcast] Recovered: price@zone-north waits for drops".into()]);
}

/// What is left of its last time is as old as that: it is neither sold by nor compared with.
#[tokio::test(flavor = "multi_thread")]
async fn a_zone_that_comes_back_waits_for_its_drops_and_others_go_on() {
    let w = inbox_world().await;
    let list = |rest: &str| drop_file(&w, "stores.csv", &format!("id,zone\n0421,east\n0422,west\n{rest}"));
    let follows = |store: &str| w.manifest(store).unwrap().streams.get("price").map(|entry| entry.audience.to_string());
    list("0423,north\n0425,east\n");
    drop_file(&w, "price.zone-north.price.csv", "sku,cents\na,100\nb,200\n");
    drop_file(&w, "price.zone-north.deal.csv", "id,sku\n");
    assert_eq!(outcome(&w.publish().await, "price@zone-north"), Outcome::Published);
    list("0425,east\n");
    w.publish().await;
    // One is new there, and one goes over to it.
    list("0424,north\n0425,north\n");
    for (cents, lacks) in [(101, "no drop has come for it yet"), (102, "no drop has come for table deal yet")] {
        drop_prices(&w, cents);
        let r = w.publish().await;
        assert_eq!((r.exit_code(), outcome(&r, "price@zone-east")), (0, Outcome::Published), "{:?}", r.lines());
        let north = &r.instances[&"price@zone-north".parse().unwrap()];
        assert_eq!((north.outcome, north.code), (Outcome::Waiting, None), "{:?}", r.lines());
        assert!(north.reason.starts_with(lacks), "{}", north.reason);
        assert_eq!((follows("0424"), follows("0425").as_deref()), (None, Some("zone-east")));
        drop_file(&w, "price.zone-north.price.csv", "sku,cents\na,300\nb,400\n");
    }
    drop_file(&w, "price.zone-north.deal.ndjson", "{\"id\":1,\"sku\":\"a\"}\n");
    let r = w.publish().await;
    assert_eq!((r.exit_code(), outcome(&r, "price@zone-north")), (0, Outcome::Published), "{:?}", r.lines());
    for store in ["0424", "0425"] {
        assert_eq!(follows(store).as_deref(), Some("zone-north"), "{store}");
    }
}

/// The run that rejects it exits 3 once, and nobody may look at that.
#[tokio::test(flavor = "multi_thread")]
async fn a_drop_with_a_wrong_name_is_mailed_until_drops_come_without_one() {
    let w = inbox_world().await;
    w.publish().await;
    let ledger = Ledger::open(&w.config).await.unwrap();
    let subjects =
        async || -> Vec<String> { ledger.unsent_mails().await.unwrap().into_iter().map(|m| m.subject).collect() };
    let wrong = ["Stores.csv", "price.zone-North.price.csv", "price.zone-east.price (1).csv"];
    wrong.iter().for_each(|name| drop_file(&w, name, "sku,cents\na,101\nb,200\n"));
    let told: Vec<String> = wrong.iter().map(|n| format!("[Tillcast] {n} in the inbox was rejected")).collect();
    for code in [3, 0] {
        let r = w.publish().await;
        assert_eq!(r.exit_code(), code, "{:?}", r.lines());
        assert_eq!(subjects().await, told);
    }
    let body = &ledger.unsent_mails().await.unwrap()[1].body;
    assert!(body.contains("price.zone-North.price.csv was rejected: ") && body.contains("rejected/"), "{body}");
    // Beside a right one it is as wrong.
    drop_prices(&w, 102);
    drop_file(&w, wrong[1], "sku,cents\n");
    assert_eq!(w.publish().await.exit_code(), 3);
    assert_eq!(subjects().await.len(), 5, "the others are over");
    drop_prices(&w, 103);
    assert_eq!(w.publish().await.exit_code(), 0);
    assert_eq!(
        subjects().await.last().unwrap(),
        &format!("[Tillcast] Recovered: {} in the inbox was rejected", wrong[1])
    );
    // An exporter that goes wrong is no flood of mails.
    (0..22).for_each(|n| drop_file(&w, &format!("price.zone-east.price ({n}).csv"), "sku,cents\n"));
    w.publish().await;
    let mails = subjects().await;
    assert_eq!((mails.len(), mails.contains(&"[Tillcast] 2 more files in the inbox were rejected".into())), (27, true));
}

/// It would be waited for without end: it is told by each run, mailed once, and never followed.
#[tokio::test(flavor = "multi_thread")]
async fn what_has_a_drops_name_and_is_no_file_is_told_and_left_alone() {
    let w = inbox_world().await;
    w.publish().await;
    let ledger = Ledger::open(&w.config).await.unwrap();
    let inbox = |name: &str| w.dir.path().join("inbox").join(name);
    w.write("elsewhere.csv", "sku,cents\na,999\n");
    let link = inbox("price.zone-east.price.csv");
    std::os::unix::fs::symlink("../elsewhere.csv", &link).unwrap();
    w.write("inbox/price.zone-east.price.csv.ok", "");
    fs::create_dir(inbox("stores.csv")).unwrap();
    // A link under another name is nobody's drop.
    std::os::unix::fs::symlink("../elsewhere.csv", inbox("README")).unwrap();
    drop_file(&w, "price.zone-north.deal.ndjson", "\n");
    for dry_run in [false, true, false] {
        let r = w.publish_as(PublishOptions { dry_run, ..options() }).await;
        let (link, dir) =
            ("price.zone-east.price.csv in the inbox is a symbolic link", "stores.csv in the inbox is a directory");
        assert!(r.problems.len() == 2 && r.problems[0].starts_with(link), "{:?}", r.lines());
        assert!(r.problems[1].starts_with(dir), "{:?}", r.lines());
        assert_eq!(r.exit_code(), 3);
        assert_eq!(r.notes.len(), 1, "a drop for who may be in the list waits for it");
        assert_eq!(ledger.unsent_mails().await.unwrap().len(), 2);
    }
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink() && w.exists("elsewhere.csv"));
    fs::remove_file(&link).unwrap();
    fs::remove_dir(inbox("stores.csv")).unwrap();
    fs::remove_file(inbox("price.zone-north.deal.ndjson")).unwrap();
    drop_file(&w, "price.zone-east.price.csv", "sku,cents\na,101\nb,200\n");
    assert_eq!(w.publish().await.exit_code(), 0);
    assert_eq!(ledger.unsent_mails().await.unwrap().len(), 4, "one each that it is over");
}

/// Which of them is the newer one only their sender knows: the other would be published by the next run.
#[tokio::test(flavor = "multi_thread")]
async fn two_drops_for_one_table_are_refused_until_one_is_taken_away() {
    let w = inbox_world().await;
    w.publish().await;
    let ledger = Ledger::open(&w.config).await.unwrap();
    let names = ["price.zone-east.deal.ndjson", "price.zone-east.price.csv", "price.zone-east.price.ndjson"];
    drop_file(&w, names[0], "{\"id\":2,\"sku\":\"a\"}\n");
    drop_file(&w, names[1], "sku,cents\na,101\nb,200\n");
    drop_file(&w, names[2], "{\"sku\":\"a\",\"cents\":99}\n{\"sku\":\"b\",\"cents\":99}\n");
    for (plu, dry_run) in [(11, false), (12, true), (12, false)] {
        drop_file(&w, "catalog.all.item.csv", &format!("sku,name,plu\na,Tea,{plu}\nb,Milk,2\n"));
        let r = w.publish_as(PublishOptions { dry_run, ..options() }).await;
        let east = &r.instances[&"price@zone-east".parse().unwrap()];
        assert_eq!((r.exit_code(), east.code), (3, Some("TWO_DROPS")), "{:?}", r.lines());
        assert_eq!(east.reason, format!("{} and {} are for one table: take one away", names[1], names[2]));
        assert_eq!(outcome(&r, "catalog@all"), Outcome::Published, "others go on");
        assert!(names.iter().all(|n| w.exists(&format!("inbox/{n}")) && w.exists(&format!("inbox/{n}.ok"))));
        assert_eq!(ledger.unsent_mails().await.unwrap().len(), 1, "it is mailed once");
    }
    fs::remove_file(w.dir.path().join("inbox").join(names[2])).unwrap();
    assert_eq!(w.publish().await.exit_code(), 0);
    let mut register = w.register("r.db");
    w.follow("0421", &mut register);
    assert_eq!(rows(register.connection(), "SELECT sku || cents FROM price ORDER BY 1"), ["a101", "b200"]);
    assert_eq!(rows(register.connection(), "SELECT id || sku FROM deal"), ["2a"]);
    assert_eq!(ledger.unsent_mails().await.unwrap().len(), 2, "and that it is over");
}

/// Drops a file when all is staged.
struct DropLate<'w>(&'w World, &'static str, &'static str);
impl Steps for DropLate<'_> {
    fn before(&self, step: &Step) -> Result<(), Aborted> {
        if *step == Step::Sign {
            drop_file(self.0, self.1, self.2);
        }
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn drops_of_streams_that_are_not_asked_for_stay_where_they_are() {
    let w = inbox_world().await;
    w.publish().await;
    drop_prices(&w, 101);
    drop_file(&w, "catalog.all.item.csv", "sku,name,plu\na,Tea,7\nb,Milk,2\n");
    let r = w.publish_as(PublishOptions { stream: Some("price".parse().unwrap()), ..options() }).await;
    assert_eq!((r.exit_code(), outcome(&r, "price@zone-east"), r.rejected.len()), (0, Outcome::Published, 0));
    assert!(w.exists("inbox/catalog.all.item.csv") && w.exists("inbox/catalog.all.item.csv.ok"));
    assert!(!w.exists("inbox/price.zone-east.price.csv"));
    assert_eq!(outcome(&w.publish().await, "catalog@all"), Outcome::Published);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_whose_other_drop_comes_while_one_is_published_is_asked_about_by_the_next_run() {
    let w = inbox_world().await;
    w.publish().await;
    drop_file(&w, "price.zone-east.price.csv", "sku,cents\na,101\nb,200\n");
    let late = "{\"sku\":\"a\",\"cents\":99}\n{\"sku\":\"b\",\"cents\":99}\n";
    let r = w.publish_cut(&options(), &DropLate(&w, "price.zone-east.price.ndjson", late)).await.unwrap();
    assert_eq!((r.exit_code(), outcome(&r, "price@zone-east")), (0, Outcome::Published), "{:?}", r.lines());
    assert!(w.exists("inbox/price.zone-east.price.csv"), "the next run finds both");
    let r = w.publish().await;
    assert_eq!(r.instances[&"price@zone-east".parse().unwrap()].code, Some("TWO_DROPS"), "{:?}", r.lines());
    fs::remove_file(w.dir.path().join("inbox/price.zone-east.price.ndjson")).unwrap();
    let r = w.publish().await;
    assert_eq!((r.exit_code(), outcome(&r, "price@zone-east")), (0, Outcome::Unchanged), "{:?}", r.lines());
    assert!(!w.exists("inbox/price.zone-east.price.csv"));
}

#[tokio::test(flavor = "multi_thread")]
async fn drops_for_who_is_not_known_yet_wait_with_the_list() {
    let w = inbox_world().await;
    w.publish().await;
    let north = ["inbox/price.zone-north.price.csv", "inbox/price.zone-north.deal.ndjson"];
    drop_file(&w, "price.zone-north.price.csv", "sku,cents\na,1\n");
    drop_file(&w, "price.zone-north.deal.ndjson", "{\"id\":1,\"sku\":\"a\"}\n");
    // A list that is refused, one that is held: who is in it is not known.
    for (list, code) in [("id,zone\n0421,east\n0422,west\n0423,No rth\n", 3), ("id,zone\n", 3)] {
        drop_file(&w, "stores.csv", list);
        let r = w.publish().await;
        assert_eq!(r.exit_code(), code, "{:?}", r.lines());
        assert!(north.iter().all(|n| w.exists(n) && w.exists(&format!("{n}.ok"))), "{:?}", r.lines());
        assert!(r.notes.iter().any(|n| n.contains("no store has the audience zone-north, and stores.csv waits")));
    }
    // One that is not named so, but meant.
    fs::remove_file(w.dir.path().join("inbox/stores.csv")).unwrap();
    for name in ["Stores.csv", "stores.CSV"] {
        drop_file(&w, name, "id,zone\n0421,east\n0422,west\n0423,north\n");
        let r = w.publish().await;
        assert!(r.exit_code() == 3 && north.iter().all(|n| w.exists(n)), "{name}: {:?}", r.lines());
    }
    fs::remove_file(w.dir.path().join("inbox/stores.CSV")).unwrap();
    let ledger = Ledger::open(&w.config).await.unwrap();
    let subjects = async || -> Vec<String> {
        let mails = ledger.unsent_mails().await.unwrap();
        mails.into_iter().map(|m| m.subject).filter(|s| s.contains("list of stores")).collect()
    };
    let told = [
        "[Tillcast] The list of stores cannot be taken",
        "[Tillcast] Recovered: The list of stores cannot be taken",
        "[Tillcast] publish refused: the list of stores",
    ];
    assert_eq!(subjects().await, told, "one that cannot be taken hides no refusal");
    drop_file(&w, "stores.csv", "id,zone\n0421,east\n0422,west\n0423,north");
    let r = w.publish().await;
    assert_eq!((r.exit_code(), outcome(&r, "price@zone-north")), (0, Outcome::Published), "{:?}", r.lines());
    assert!(!w.exists(north[0]) && !w.exists("inbox/stores.csv"));
    assert_eq!(subjects().await.len(), 4, "and that it is over: {:?}", subjects().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_among_drops_reads_them_once_more() {
    let base = inbox_world().await;
    base.publish().await;
    drop_file(&base, "catalog.all.item.csv", "sku,name,plu\na,Tea,2\nb,Milk,1\n");
    drop_file(&base, "price.zone-east.price.csv", "sku,cents\na,101\nb,200\n");
    for n in 0.. {
        let w = base.twin();
        let cut = CutAt::new(n);
        match w.publish_cut(&options(), &cut).await {
            Err(PublishError::Aborted(_)) => {}
            other => {
                other.unwrap();
                break;
            }
        }
        let r = w.publish().await;
        assert_eq!(r.exit_code(), 0, "{:?}: {:?}", cut.cut, r.lines());
        assert_eq!(w.publish().await.instances.values().filter(|i| i.outcome == Outcome::Published).count(), 0);
        let mut register = w.register("r.db");
        w.follow("0421", &mut register);
        assert_eq!(rows(register.connection(), "SELECT sku || plu FROM item ORDER BY 1"), ["a2", "b1"]);
        assert_eq!(rows(register.connection(), "SELECT sku || cents FROM price ORDER BY 1"), ["a101", "b200"]);
        assert!(
            w.exists("inbox/done/catalog.all.item.csv") && !w.exists("inbox/catalog.all.item.csv"),
            "{:?}",
            cut.cut
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drop_is_waited_for_where_a_zone_was_empty() {
    let w = inbox_world().await;
    w.publish().await;
    for zone in ["east", "west", "west"] {
        drop_file(&w, "stores.csv", &format!("id,zone\n0421,east\n0422,{zone}\n"));
        let r = w.publish().await;
        let follows = w.manifest("0422").unwrap().streams["price"].audience.to_string();
        assert_eq!((r.exit_code(), follows.as_str()), (0, "zone-east"), "{:?}", r.lines());
    }
    // One table of two would leave the other as old as it is.
    drop_file(&w, "price.zone-west.price.csv", "sku,cents\na,100\nb,200\n");
    assert_eq!(outcome(&w.publish().await, "price@zone-west"), Outcome::Waiting);
    assert_eq!(w.manifest("0422").unwrap().streams["price"].audience.to_string(), "zone-east");
    drop_file(&w, "price.zone-west.deal.ndjson", "{\"id\":1,\"sku\":\"a\"}\n");
    assert_eq!(outcome(&w.publish().await, "price@zone-west"), Outcome::Unchanged);
    assert_eq!(w.manifest("0422").unwrap().streams["price"].audience.to_string(), "zone-west");
}
