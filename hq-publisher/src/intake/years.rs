//! Years of a store's heartbeats, judged as `serve` judges them: each silence is told once and in time, its end once, and
//! nothing else is told. Only the hours around a silence are lived through; the calm between is passed over.

use super::voices::FLAP;
use super::*;
use crate::alert::{self, Due};
use crate::fleet::{self, Fleet};
use crate::ledger::{Episode, Serials};
use proto::clock::TestClock;
use proto::ids::{RegisterId, StoreId};
use tillcast_tests::Dice;

const REGISTERS: usize = 4;
/// Between two heartbeats, s.
const BEAT: u64 = 60;
/// Between two looks at the fleet, s.
const TICK: u64 = 5;
const STORE_LIMIT: u64 = 300;
const REGISTER_LIMIT: u64 = 1800;
const LONGEST: f64 = 14_400.0;
const YEAR: f64 = 365.25 * 86_400.0;

/// From its beginning up to its end, s.
#[derive(Debug, Clone, Copy)]
struct Silence {
    from: u64,
    until: u64,
}

impl Silence {
    fn covers(self, t: u64) -> bool {
        (self.from..self.until).contains(&t)
    }
}

/// What happens: a silence of the store, of the register at a place, or of both; and when in a minute each reports.
#[derive(Debug)]
struct Trouble {
    store: Option<Silence>,
    register: Option<(usize, Silence)>,
    phases: Vec<u64>,
}

impl Trouble {
    fn draw(dice: &mut Dice) -> Trouble {
        let lasts = |dice: &mut Dice| (60.0 * (LONGEST / 60.0).powf(dice.unit())) as u64;
        let (kind, begins) = (dice.below(3), 200 + dice.below(BEAT));
        let silence = |dice: &mut Dice, from| Silence { from, until: from + lasts(dice) };
        let register = (kind != 0).then(|| (1 + dice.index(REGISTERS), silence(dice, begins)));
        let later = if kind == 2 { dice.below(2 * REGISTER_LIMIT) } else { 0 };
        let store = (kind != 1).then(|| silence(dice, begins + later));
        Trouble { store, register, phases: (0..=REGISTERS).map(|_| dice.below(BEAT)).collect() }
    }

    fn end(&self) -> u64 {
        let all = self.store.into_iter().chain(self.register.map(|(_, s)| s));
        all.map(|s| s.until).max().unwrap() + 2 * REGISTER_LIMIT
    }

    fn is_heard(&self, n: usize, t: u64) -> bool {
        let silence = if n == 0 { self.store } else { self.register.filter(|(m, _)| *m == n).map(|(_, s)| s) };
        t % BEAT == self.phases[n] && !silence.is_some_and(|s| s.covers(t))
    }

    /// The episodes that are to be told: when each begins, and when it ends.
    fn expected(&self) -> BTreeMap<String, (u64, u64)> {
        let last = |n: usize, before: u64| (before - 1 - self.phases[n]) / BEAT * BEAT + self.phases[n];
        let next = |n: usize, from: u64| (from + BEAT - 1 - self.phases[n]) / BEAT * BEAT + self.phases[n];
        let tick = |t: u64| t.div_ceil(TICK) * TICK;
        let mut expected = BTreeMap::new();
        // From the last word before to the first one after; the second one ends it.
        let gap = self.store.map(|s| (last(0, s.from), next(0, s.until)));
        if let Some((lost, back)) = gap.filter(|(lost, back)| tick(lost + STORE_LIMIT) < *back) {
            expected.insert("store-silent/1".to_owned(), (tick(lost + STORE_LIMIT), tick(back + BEAT)));
        }
        if let Some((n, silence)) = self.register {
            let lost = last(n, silence.from);
            // Its relay tells of its return with the next post that arrives.
            let mut posts = (0..).map(|k| next(0, next(n, silence.until)) + k * BEAT);
            let back = posts.find(|t| self.is_heard(0, *t)).unwrap();
            // While the store is silent nobody can tell; when it is back, its register has time: what is left of it, where
            // it was not away for long.
            let away = gap.filter(|(lost, back)| back - lost >= STORE_LIMIT);
            let had = |gone: u64, back: u64| {
                let most = if back - gone < FLAP.as_secs() { REGISTER_LIMIT - STORE_LIMIT } else { 0 };
                gone.saturating_sub(lost).min(most)
            };
            let is_judged = |t: &u64| {
                away.is_none_or(|(gone, back)| {
                    *t < gone + STORE_LIMIT || *t >= back + REGISTER_LIMIT.saturating_sub(had(gone, back))
                })
            };
            let mut looks = (tick(lost + REGISTER_LIMIT)..tick(back)).step_by(TICK as usize);
            let due = looks.find(is_judged);
            expected.extend(due.map(|due| (format!("register-silent/1-{n}"), (due, tick(back)))));
        }
        expected
    }
}

/// A store, and whoever hears it.
struct Chain {
    _dir: tempfile::TempDir,
    intake: Intake,
    clock: Arc<TestClock>,
    ids: Vec<DeviceId>,
    open: Vec<Episode>,
    seq: u64,
    serials: BTreeMap<StoreId, Serials>,
    dice: Dice,
    seconds: u64,
}

impl Chain {
    async fn new(seed: u64) -> Chain {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open_url(&format!("sqlite:{}", dir.path().join("f.db").display())).await.unwrap();
        let clock = Arc::new(TestClock::at("2026-01-01T00:00:00Z"));
        let alerts = AlertsConfig::default();
        let limits = (alerts.store_silent.0.as_secs(), alerts.register_silent.0.as_secs());
        assert_eq!(limits, (STORE_LIMIT, REGISTER_LIMIT));
        let registers = (1..=REGISTERS).map(|n| format!("1-{n}"));
        Chain {
            _dir: dir,
            intake: Intake::open(ledger, clock.clone(), Limits::default(), &alerts).await.unwrap(),
            clock,
            ids: std::iter::once("1".to_owned()).chain(registers).map(|id| id.parse().unwrap()).collect(),
            open: Vec::new(),
            seq: 0,
            serials: BTreeMap::from([("1".parse().unwrap(), Serials { wake: 1, signed: 1 })]),
            dice: Dice::new(seed),
            seconds: 0,
        }
    }

    /// The relay posts: how long ago it heard each register, and the heartbeats of those who sent one since.
    fn post(&mut self, ages: &[u64]) {
        self.seq += 1;
        let at = self.clock.monotonic();
        let mut state = self.intake.state();
        let mut registers = BTreeMap::new();
        for (id, age) in self.ids[1..].iter().zip(ages) {
            registers.insert(id.as_str().parse().unwrap(), *age);
            if *age <= BEAT {
                let beat = heartbeat(id, self.seq, BTreeMap::new());
                self.intake.hear(&mut state, beat, at, Duration::from_secs(*age));
            }
        }
        let relay = &self.ids[0];
        let beat = heartbeat(relay, self.seq, registers);
        self.intake.hear(&mut state, beat, at, Duration::ZERO);
    }

    /// Looks at the fleet; the episodes that begin and end now.
    fn look(&mut self) -> (Vec<String>, Vec<String>) {
        let now = self.clock.now();
        self.intake.expect(&self.serials);
        let devices = self.intake.news(&self.ids, &[]);
        let fleet = Fleet {
            devices: &devices,
            complaints: &[],
            published: &Published::new(),
            serials: &self.serials,
            expiring: &[],
            own_disk: None,
            deaf_for: Some(Duration::ZERO),
            alerts: &AlertsConfig::default(),
            now,
        };
        let assessment = fleet::assess(&fleet);
        self.intake.note_calm(fleet::calm(&fleet));
        let Due { open, close } = alert::due(&assessment, &self.open, now);
        let keys = |notices: Vec<alert::Notice>| -> Vec<String> {
            notices.into_iter().flat_map(|n| n.episodes).map(|(key, _)| key).collect()
        };
        let (began, ended) = (keys(open), keys(close));
        self.open.retain(|e| !ended.contains(&e.key));
        let episode = |key: &String| Episode { key: key.clone(), text: String::new(), opened_at: now, closed_at: None };
        self.open.extend(began.iter().map(episode));
        (began, ended)
    }

    /// Days in which every heartbeat comes: after them all is as before, but later.
    fn pass_calm_days(&mut self, seconds: u64) {
        let by = Duration::from_secs(seconds);
        self.clock.advance(by);
        let stores = &mut self.intake.state().heard.0;
        stores.values_mut().flat_map(|of| of.devices.values_mut()).for_each(|heard| heard.at += by);
        self.seconds += seconds;
    }

    /// Lives through a trouble; what was told, from when to when.
    fn live(&mut self, trouble: &Trouble) -> BTreeMap<String, (u64, u64)> {
        let (mut began, mut told) = (BTreeMap::new(), BTreeMap::new());
        let mut heard = [0; REGISTERS + 1];
        for t in 0..trouble.end() {
            (1..=REGISTERS).filter(|n| trouble.is_heard(*n, t)).for_each(|n| heard[n] = t);
            if trouble.is_heard(0, t) {
                self.post(&heard[1..].iter().map(|at| t - at).collect::<Vec<_>>());
            }
            if t.is_multiple_of(TICK) && t >= 2 * BEAT {
                let (begin, end) = self.look();
                begin.into_iter().for_each(|key| assert!(began.insert(key, t).is_none(), "told twice: {trouble:?}"));
                for key in end {
                    let span = (began[&key], t);
                    assert!(told.insert(key, span).is_none(), "ends twice: {trouble:?}");
                }
            }
            self.clock.advance(Duration::from_secs(1));
            if self.dice.below(5_000) == 0 {
                // Nobody is silent because a clock was set.
                let leap = self.dice.below(200 * 86_400) as i64 - 100 * 86_400;
                let now = self.clock.now().as_second();
                self.clock.set(Timestamp::from_second(now + leap).unwrap());
            }
        }
        self.seconds += trouble.end();
        assert_eq!(began.len(), told.len(), "something does not end: {trouble:?}");
        told
    }
}

/// Of a device that holds the newest list.
fn heartbeat(id: &DeviceId, seq: u64, registers: BTreeMap<RegisterId, u64>) -> Heartbeat {
    Heartbeat { serial: Some(1), registers, ..Heartbeat::plain(id.clone(), seq) }
}

async fn years(wanted: f64, seed: u64) {
    let mut chain = Chain::new(seed).await;
    let (mut silences, mut told) = (0, 0);
    while (chain.seconds as f64) < wanted * YEAR {
        let calm = chain.dice.below(14 * 86_400);
        chain.pass_calm_days(calm);
        let trouble = Trouble::draw(&mut chain.dice);
        let expected = trouble.expected();
        assert_eq!(chain.live(&trouble), expected, "{trouble:?}");
        silences += usize::from(trouble.store.is_some()) + usize::from(trouble.register.is_some());
        told += expected.len();
    }
    println!("{wanted} years: {silences} silences, {told} of them long enough to be told");
    assert!(told * 4 > silences && told < silences);
}

#[tokio::test]
async fn each_silence_is_told_once_and_in_time_and_nothing_else() {
    years(8.0, 1).await;
}

#[test]
#[ignore = "takes minutes"]
fn each_silence_of_a_thousand_years_is_told_once_and_in_time_and_nothing_else() {
    tillcast_tests::in_parts(8, |n| years(125.0, 2 + n));
}
