//! What is made anew from the bucket: replicas that were lost or damaged, and the ledger of a new machine.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn lost_damaged_and_drifted_replicas_are_made_from_the_bucket() {
    let base = World::new().await;
    base.publish().await;
    base.sql(CHANGE);
    base.publish().await;
    base.sql("UPDATE item SET name = 'x' WHERE sku = 'sku5'; UPDATE price SET cents = 1 WHERE sku = 'sku5'");
    for damage in 0..7 {
        let w = base.twin();
        let path = w.dir.path().join("state/replicas/catalog@all.db");
        match damage {
            0 => fs::remove_dir_all(w.dir.path().join("state/replicas")).unwrap(),
            1 => {
                fs::write(&path, b"this is no database at all, but it is long enough to be looked at as one..")
                    .unwrap();
                let _ = fs::remove_file(path.with_extension("db-wal"));
            }
            2 => Connection::open(&path)
                .unwrap()
                .execute_batch(
                    "UPDATE item SET name = 'by hand' WHERE sku = 'sku5'; DELETE FROM item WHERE sku = 'sku6'",
                )
                .unwrap(),
            3 => Connection::open(&path).unwrap().execute_batch("UPDATE tillcast_stream SET version = 1").unwrap(),
            4 => Connection::open(&path).unwrap().execute_batch("DROP TABLE item").unwrap(),
            5 => {
                Connection::open(&path).unwrap().execute_batch("ALTER TABLE item RENAME COLUMN name TO title").unwrap()
            }
            _ => Connection::open(&path).unwrap().execute_batch("DROP TABLE tillcast_table").unwrap(),
        }
        let r = w.publish().await;
        assert_eq!(r.exit_code(), 0, "{damage}: {:?}", r.lines());
        let item = &r.instances[&"catalog@all".parse().unwrap()];
        assert_eq!((item.outcome, item.packs.len()), (Outcome::Published, 1), "{damage}: {:?}", r.lines());
        w.all_is_well();
    }
    // A pack that vanished from the bucket: nothing can be rebuilt without saying so.
    let w = base.twin();
    fs::remove_dir_all(w.dir.path().join("state/replicas")).unwrap();
    fs::remove_file(w.dir.path().join("objects/packs/catalog@all/0000000001.full.pack")).unwrap();
    let r = w.publish().await;
    let refused = &r.instances[&"catalog@all".parse().unwrap()];
    assert!(refused.code == Some("REPLICA") && refused.reason.contains("--full"), "{:?}", r.lines());
    assert_eq!(w.publish_as(PublishOptions { full: true, ..options() }).await.exit_code(), 0);
    w.all_is_well();
}

/// What its lists said of the zones counts until the source says more.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_machine_with_an_inbox_empties_no_list() {
    let w = inbox_world().await;
    w.publish().await;
    let before = ["0421", "0422"].map(|store| listed(&w, store));
    w.lose_ledger();
    // The source fails first: who puts by himself has nothing to sign by.
    w.write("inbox/stores.csv", "id,zone\n0421,east\n0421,west\n");
    w.write("inbox/stores.csv.ok", "");
    let _ = w.publish_cut(&options(), &Quiet).await;
    let (_stop, stopping) = tokio::sync::watch::channel(false);
    let serve = crate::web::App::open(&w.config, w.clock.clone(), stopping).await.unwrap();
    crate::web::ticks::manifests(&serve).await.unwrap();
    assert_eq!(["0421", "0422"].map(|store| listed(&w, store)), before);
    for file in fs::read_dir(w.dir.path().join("inbox")).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_file()) {
        fs::remove_file(file).unwrap();
    }
    drop_file(&w, "price.zone-east.price.csv", "sku,cents\na,300\nb,200\n");
    let r = w.publish().await;
    assert_eq!((r.exit_code(), outcome(&r, "price@zone-east")), (0, Outcome::Published), "{:?}", r.lines());
    assert_eq!(["0421", "0422"].map(|store| listed(&w, store)), before);
    let heads = Ledger::open(&w.config).await.unwrap().heads().await.unwrap();
    assert!(heads.values().all(|h| !h.retired), "{heads:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_machine_goes_on_from_the_bucket() {
    let w = World::new().await;
    w.publish().await;
    w.sql(CHANGE);
    w.publish().await;
    let mut register = w.register("register.db");
    w.follow("0421", &mut register);
    let serial = w.manifest("0421").unwrap().serial;
    for gone in ["state/scratch", "state/packs"] {
        fs::remove_dir_all(w.dir.path().join(gone)).unwrap();
    }
    w.lose_ledger();
    w.sql("UPDATE item SET name = 'x' WHERE sku = 'sku5'");
    let r = w.publish().await;
    assert_eq!((r.exit_code(), outcome(&r, "price@zone-west")), (0, Outcome::Unchanged), "{:?}", r.lines());
    let item = &r.instances[&"catalog@all".parse().unwrap()];
    assert_eq!((item.version.unwrap().get(), item.packs[0].kind), (3, PackKind::Delta));
    assert!(w.manifest("0421").unwrap().serial > serial);
    w.follow("0421", &mut register);
    w.check_rows(&register, "east");
    w.all_is_well();
}

/// Packs that are gone from the bucket hold up nobody else on a new machine.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_machine_goes_on_without_packs_that_are_gone() {
    let base = World::new().await;
    base.publish().await;
    base.sql(CHANGE);
    base.publish().await;
    for gone in [&["price@zone-east"][..], &["price@zone-east", "price@zone-west"]] {
        let w = base.twin();
        w.lose_ledger();
        let packs = w.dir.path().join("objects/packs");
        for instance in gone {
            fs::remove_dir_all(packs.join(instance)).unwrap();
        }
        w.sql("UPDATE item SET name = 'x' WHERE sku = 'sku5'");
        let r = w.publish().await;
        // Only new rows mend it: nothing is begun anew below what stores hold.
        for instance in gone {
            let refused = &r.instances[&instance.parse().unwrap()];
            let names_it = refused.reason.contains(&format!("{instance}/0000000001.full.pack"));
            assert!(refused.code == Some("REPLICA") && names_it, "{:?}", r.lines());
        }
        assert_eq!((r.exit_code(), outcome(&r, "catalog@all")), (3, Outcome::Published), "{:?}", r.lines());
        let at = |instance: &str| {
            w.manifest("0421").unwrap().instances().find(|(i, _)| i.to_string() == instance).unwrap().1.version.get()
        };
        assert_eq!((at("catalog@all"), at("price@zone-east")), (3, 2));
        let full = PublishOptions { full: true, stream: Some("price".parse().unwrap()), ..options() };
        let r = w.publish_as(full).await;
        assert_eq!((r.exit_code(), at("price@zone-east")), (0, 3), "{:?}", r.lines());
        w.all_is_well();
    }
    // One that rotted: known by its older pack.
    let w = base.twin();
    w.lose_ledger();
    w.write("objects/packs/catalog@all/0000000002.delta.pack", "rotten");
    let r = w.publish().await;
    assert_eq!(r.instances[&"catalog@all".parse().unwrap()].code, Some("REPLICA"), "{:?}", r.lines());
    assert_eq!(outcome(&r, "price@zone-west"), Outcome::Unchanged);
    let full = PublishOptions { full: true, stream: Some("catalog".parse().unwrap()), ..options() };
    assert_eq!(w.publish_as(full).await.exit_code(), 0);
    w.all_is_well();
}

/// A ledger that knows serials and no versions would sign manifests that empty the stores' lists.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_signs_before_a_new_machine_knows_what_was_published() {
    let w = World::new().await;
    w.publish().await;
    let desk = async || Desk::open(&w.config, w.clock.as_ref(), false).await.unwrap();
    let [relay, till, new] = ["0421", "0421-03", "0421-04"].map(|id| id.parse().unwrap());
    for id in [&relay, &till] {
        desk().await.enroll(id).await.unwrap();
    }
    let before = w.objects();
    w.lose_ledger();
    desk().await.init().await.unwrap();
    for _ in 0..2 {
        let e = desk().await.enroll(&new).await.unwrap_err().to_string();
        assert!(e.contains("Run publish first"), "{e}");
        let e = desk().await.revoke(&till).await.unwrap_err().to_string();
        assert!(e.contains("Run publish first"), "{e}");
        let e = desk().await.rotate(&Default::default()).await.unwrap_err().to_string();
        assert!(e.contains("Run publish first"), "{e}");
        for new_epoch in [false, true] {
            let e = revoke_key(&w, new_epoch).await.unwrap_err().to_string();
            assert!(e.contains("Run publish first"), "{new_epoch}: {e}");
        }
    }
    // A publisher that cannot read all it needs leaves nothing half taken over.
    let (pack, aside) = ("objects/packs/price@zone-east/0000000001.full.pack", "objects/aside");
    fs::rename(w.dir.path().join(pack), w.dir.path().join(aside)).unwrap();
    fs::create_dir(w.dir.path().join(pack)).unwrap();
    w.publish_cut(&options(), &Quiet).await.unwrap_err();
    let ledger = desk().await.ledger;
    assert!(ledger.heads().await.unwrap().is_empty() && ledger.devices().await.unwrap().is_empty());
    assert!(ledger.stores().await.unwrap().iter().all(|s| s.next_serial == 1));
    fs::remove_dir(w.dir.path().join(pack)).unwrap();
    fs::rename(w.dir.path().join(aside), w.dir.path().join(pack)).unwrap();
    assert_eq!(w.objects(), before);

    w.publish().await;
    desk().await.enroll(&new).await.unwrap();
    let m = w.manifest("0421").unwrap();
    assert_eq!((m.streams.len(), m.registers.len(), m.relay.is_some()), (2, 2, true));
    w.all_is_well();
}

/// A number that was burnt leaves a pack as one does that was out: nobody can tell them apart.
#[tokio::test(flavor = "multi_thread")]
async fn a_pack_above_all_lists_makes_a_full_on_a_new_machine_once() {
    let w = World::new().await;
    w.publish().await;
    w.write("objects/packs/price@zone-east/0000000002.delta.pack", "of a run that was cut short");
    w.lose_ledger();
    for (outcomes, version) in [(Outcome::Published, 3), (Outcome::Unchanged, 3)] {
        let r = w.publish().await;
        assert_eq!((r.exit_code(), outcome(&r, "price@zone-east")), (0, outcomes), "{:?}", r.lines());
        assert_eq!(outcome(&r, "price@zone-west"), Outcome::Unchanged);
        assert_eq!(w.manifest("0421").unwrap().streams["price"].version.get(), version);
    }
    w.all_is_well();
}

/// What a run puts after the ledger was taken over makes no instance of which the bucket had no newer one seem behind.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_is_cut_on_a_new_machine_with_an_inbox_is_finished_by_the_next() {
    let base = inbox_world().await;
    base.publish().await;
    for n in 0.. {
        let w = base.twin();
        w.lose_ledger();
        // One of the stream's two tables.
        drop_file(&w, "price.zone-east.price.csv", "sku,cents\na,200\nb,200\n");
        if w.publish_cut(&options(), &CutAt::new(n)).await.is_ok() {
            break;
        }
        let r = w.publish().await;
        assert_eq!(r.exit_code(), 0, "{n}: {:?}", r.lines());
    }
}

/// A new machine reads what is out, whatever its limits: they are for what is published next.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_is_made_from_packs_that_are_over_lowered_limits() {
    let mut w = World::new().await;
    w.sql(
        "WITH RECURSIVE n(i) AS (SELECT 1001 UNION ALL SELECT i + 1 FROM n WHERE i < 9000)
         INSERT INTO item SELECT 'sku' || i, hex(randomblob(10)), NULL FROM n",
    );
    w.publish().await;
    w.sql("DELETE FROM item WHERE plu IS NULL");
    w.publish_as(PublishOptions { allow_shrink: Some(None), ..options() }).await;
    set(&mut w, &format!("{CONFIG}\n[limits]\nunpacked_bytes = 65536\nrows = 500\n"));
    w.lose_ledger();
    let r = w.publish().await;
    assert_eq!((r.exit_code(), outcome(&r, "catalog@all")), (0, Outcome::Unchanged), "{:?}", r.lines());
    w.all_is_well();
    // Rows that come, and those that go, are too many for one pack of readers with these limits: a full has the former
    // alone.
    w.sql("DELETE FROM price WHERE zone = 'west'; INSERT INTO price SELECT 'west', 'new' || plu, 5 FROM item");
    let r = w.publish_as(PublishOptions { allow_shrink: Some(None), ..options() }).await;
    let price = &r.instances[&"price@zone-west".parse().unwrap()];
    assert_eq!((r.exit_code(), price.outcome), (0, Outcome::Published), "{:?}", r.lines());
    assert_eq!(price.packs.iter().map(|p| (p.kind, p.rows)).collect::<Vec<_>>(), [(PackKind::Full, 401)]);
    assert!(price.plan.as_ref().unwrap().reason.ends_with("; the delta is over the limits"), "{:?}", price.plan);
    w.all_is_well();
    // Where that is too large as well, the limit is to be raised.
    w.sql(
        "DELETE FROM price WHERE zone = 'west'; INSERT INTO price SELECT 'west', 'more' || plu, 5 FROM item;
         INSERT INTO deal SELECT 'west', plu + 1000, sku FROM item",
    );
    let r = w.publish_as(PublishOptions { allow_shrink: Some(None), ..options() }).await;
    let told = &r.instances[&"price@zone-west".parse().unwrap()];
    assert_eq!((r.exit_code(), told.code), (3, Some("PACK_LIMITS")), "{:?}", r.lines());
    assert!(told.reason.contains("limits.rows = 500"), "{}", told.reason);
}

/// A newer headquarters published it: an older one on a new machine must not sign lists without it.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_machine_signs_nothing_where_it_cannot_read_a_stream() {
    use crate::keys::{Keyring, Role};
    let w = World::new().await;
    w.publish().await;
    let path = w.dir.path().join("objects/stores/0421/manifest.json");
    let payload = dsse::peek_payload(&fs::read(&path).unwrap(), 1 << 20).unwrap();
    let mut list: serde_json::Value = serde_json::from_slice(&payload).unwrap();
    list["streams"]["catalog"]["packs"][0]["kind"] = "patch".into();
    let keys = Keyring::new(w.config.state.keys()).keys(Role::Publisher).unwrap();
    let list = serde_json::to_vec(&list).unwrap();
    fs::write(&path, dsse::seal(dsse::PayloadType::Manifest, &list, &[&keys[0].key])).unwrap();
    w.lose_ledger();
    let before = w.objects();
    for _ in 0..2 {
        let e = w.publish_cut(&options(), &Quiet).await.unwrap_err();
        assert!(e.to_string().contains("lists stream catalog in a way that this build cannot read"), "{e}");
        assert_eq!(w.objects(), before);
    }
}
