//! Any order of publishes, bad packs, missing packs, drifts, holds and kills: readers see published
//! versions only, and in the end everything is there.

use super::kit::*;
use crate::agent::Step;
use proptest::prelude::*;
use proto::layout::PackKind;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

#[derive(Debug, Clone)]
enum Event {
    /// A delta; sometimes a full with it.
    Publish { also_full: bool },
    /// A full only.
    Full,
    /// A delta whose proof is wrong: only a later full leads past it.
    Poison,
    /// The newest pack file vanishes from the source until the end.
    Hide,
    /// A row changes by hand.
    Tamper,
    /// A sale opens during the next cycle.
    Hold,
    /// One cycle.
    Cycle,
    /// One cycle that is killed at a step.
    Kill(usize),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => any::<bool>().prop_map(|also_full| Event::Publish { also_full }),
        1 => Just(Event::Full),
        1 => Just(Event::Poison),
        1 => Just(Event::Hide),
        1 => Just(Event::Tamper),
        1 => Just(Event::Hold),
        4 => Just(Event::Cycle),
        3 => (0usize..12).prop_map(Event::Kill),
    ]
}

const PRICE: &str = "price@zone-east";

struct World {
    hq: Hq,
    r: Register,
    newest: u64,
    /// What readers may see of `price`: every version published, by its one price.
    published: BTreeSet<i64>,
    hidden: Vec<PathBuf>,
    tampered: bool,
}

impl World {
    fn new() -> World {
        let mut hq = Hq::new();
        hq.full(PRICE, 1, &rows(40, 1));
        hq.full("promo@all", 1, &rows(4, 1));
        hq.sign();
        let r = Register::enrolled(&hq, &hq.url(), &[]);
        World { hq, r, newest: 1, published: [1].into(), hidden: Vec::new(), tampered: false }
    }

    fn next(&mut self) -> (u64, Rows) {
        self.newest += 1;
        (self.newest, rows(40, self.newest as i64))
    }

    async fn cycle(&mut self, kill_at: Option<usize>) {
        let steps = AtomicUsize::new(0);
        let observer = kill_at
            .map(|n| -> crate::agent::Observer { Arc::new(move |_: &Step| steps.fetch_add(1, Ordering::Relaxed) < n) });
        let agent = self.r.watched(observer);
        poll_and_cycle(&agent).await;
        self.tampered &=
            !crate::verify::check(agent.db.path(), &Default::default()).unwrap().streams.values().all(|s| s.ok);
    }

    async fn meet(&mut self, event: &Event) {
        match event {
            Event::Publish { also_full } => {
                let (n, state) = self.next();
                self.hq.delta(PRICE, n, &state);
                if *also_full {
                    self.hq.full(PRICE, n, &state);
                }
                self.published.insert(n as i64);
                self.hq.delta("promo@all", n, &rows(4, n as i64));
                self.hq.sign();
            }
            Event::Full => {
                let (n, state) = self.next();
                self.hq.full(PRICE, n, &state);
                self.hq.delta("promo@all", n, &rows(4, n as i64));
                self.published.insert(n as i64);
                self.hq.sign();
            }
            Event::Poison => {
                let (n, state) = self.next();
                self.hq.poisoned_delta(PRICE, n, &state);
                self.hq.delta("promo@all", n, &rows(4, n as i64));
                self.hq.sign();
            }
            Event::Hide => {
                let kind =
                    if self.hq.has(PRICE, self.newest, PackKind::Delta) { PackKind::Delta } else { PackKind::Full };
                let path = self.hq.pack_path(PRICE, self.newest, kind);
                if path.exists() {
                    std::fs::rename(&path, path.with_extension("hidden")).unwrap();
                    self.hidden.push(path);
                }
            }
            Event::Tamper if self.r.config.store_db().exists() && self.r.holds("price") => {
                self.r.tamper("UPDATE price SET cents = -5 WHERE sku = 3");
                self.tampered = true;
            }
            Event::Tamper => {}
            Event::Hold => {
                let agent = self.r.open();
                agent.hold.place(Duration::from_secs(1000), Duration::from_secs(60));
                poll_and_cycle(&agent).await;
            }
            Event::Cycle => self.cycle(None).await,
            Event::Kill(n) => self.cycle(Some(*n)).await,
        }
        if !self.tampered && self.r.config.store_db().exists() && self.r.holds("price") {
            let seen = self.r.rows("price");
            assert!(self.published.iter().any(|n| seen == rows(40, *n)), "a mixture: {seen:?}");
        }
    }

    /// Everything is put right, a full leads past what is bad: the register gets there.
    async fn end(mut self) {
        for path in std::mem::take(&mut self.hidden) {
            std::fs::rename(path.with_extension("hidden"), path).unwrap();
        }
        let (n, state) = self.next();
        self.hq.full(PRICE, n, &state);
        self.hq.delta("promo@all", n, &rows(4, n as i64));
        self.hq.sign();
        // Three deaths in a row make a pack wait for some seconds.
        for _ in 0..2 {
            let agent = self.r.open();
            self.r.clock.advance(Duration::from_secs(60));
            poll_and_cycle(&agent).await;
        }
        assert_eq!(self.r.rows("price"), state);
        assert_eq!(self.r.rows("promo"), rows(4, n as i64));
        assert_eq!(self.r.downloads(), 0);
        let agent = self.r.open();
        assert!(!crate::verify::check(agent.db.path(), &Default::default()).unwrap().drift);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn any_order_of_events_ends_at_the_newest_version(events in proptest::collection::vec(event(), 1..25)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut world = World::new();
            for e in &events {
                world.meet(e).await;
            }
            world.end().await;
        });
    }
}
