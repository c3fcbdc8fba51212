//! The scheduler: one queue of what happens when; whatever is next is done to its end, or until it asks the network.

use crate::cdn::Cdn;
use crate::clock::{Machine, Ms, World};
use crate::disk::{self, SmallDisk};
use crate::evil;
use crate::hq::{Hq, Published, STREAMS, store_id};
use crate::log::Log;
use crate::model::{Checked, Model};
use crate::net::{Answer, Fate, Line, Net, Question, Reply, Who};
use crate::store::{Done, Op, PowerCut, RegisterNode, RelayNode, register_does, relay_does};
use crate::trouble::{self, Trouble};
use futures_util::FutureExt as _;
use hq_publisher::publish::PublishOptions;
use http_body_util::BodyExt as _;
use pos_agent::pace::End;
use proto::http::Inbound;
use std::collections::{BTreeMap, BTreeSet};
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, Once};
use std::time::Duration;
use store_relay::stream::Outcome as StreamOutcome;
use store_relay::wake::Asked;
use tillcast_tests::Dice;
use tokio::sync::mpsc;

/// What is published in calm is everywhere within so many cycles of 30 s.
pub const CYCLES: u64 = 3;
/// After the last trouble everything is at what the bucket promises within so many: who could not ask waits up to a
/// minute before he asks again, a relay and then its registers, and a word that was lost before is waited for half a
/// minute.
pub const CALM_CYCLES: u64 = 6;
const CYCLE: Ms = 30_000;

/// Where everybody must come.
#[derive(Debug, Clone, Copy)]
enum Goal {
    /// What the lists in the bucket say.
    Manifest,
    /// What the source holds.
    Source,
}

/// A seed that found something.
#[derive(Debug, Clone)]
pub struct Failure {
    /// Which.
    pub seed: u64,
    /// What is broken.
    pub what: String,
    /// The last things that happened.
    pub last: Vec<String>,
}

/// A seed that ran to its end.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// The log's hash.
    pub hash: String,
    /// Simulated time.
    pub simulated: Ms,
    /// Things that happened.
    pub events: u64,
    /// Looks of the checker.
    pub checks: u64,
    /// Cycles from the last trouble to what the bucket promises; none where a pack on the way is gone or was given up.
    pub calmed: Option<u64>,
    /// Cycles to convergence of what is published in calm, at most.
    pub cycles: u64,
    /// Troubles met, by name.
    pub troubles: BTreeMap<String, u64>,
}

/// Runs one seed in a directory of its own below `scratch`, which becomes this process's directory: packs name the
/// source's path, and must have the same bytes in every run.
pub fn run_seed(seed: u64, scratch: &Path, loud: bool) -> Result<Outcome, Failure> {
    quiet_plugs();
    // `publish` blocks in place, which wants workers; nothing but its clean-up ever runs on this one.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .max_blocking_threads(8)
        .enable_all()
        .build()
        .unwrap();
    std::env::set_current_dir(scratch).unwrap();
    let dir = PathBuf::from(format!("/proc/self/cwd/seed-{seed}"));
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).unwrap();
    let result = runtime.block_on(async {
        let mut sim = Sim::new(seed, &dir, loud).await;
        let ran = sim.run().await;
        sim.actors.clear();
        let outcome = Outcome {
            hash: sim.log.hash(),
            simulated: sim.world.now(),
            events: sim.events,
            checks: sim.model.lock().unwrap().checks,
            calmed: sim.calmed,
            cycles: sim.cycles,
            troubles: std::mem::take(&mut sim.troubles),
        };
        let last = sim.log.lines.len().saturating_sub(60);
        ran.map(|()| outcome).map_err(|what| Failure { seed, what, last: sim.log.lines[last..].to_vec() })
    });
    runtime.shutdown_background();
    let _ = std::fs::remove_dir_all(&dir);
    result
}

/// Plugs that are pulled on purpose are not worth a backtrace.
fn quiet_plugs() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !info.payload().is::<PowerCut>() {
                before(info);
            }
        }));
    });
}

/// What the queue holds.
enum Event {
    /// A machine does something.
    Run(Who, Op),
    /// A question arrives; who waits for the answer (none: it is a double).
    Arrive(Option<u64>, Who, Question),
    /// An answer arrives.
    Deliver(u64, Result<Answer, String>),
    /// Something goes wrong, or right again.
    Trouble(Trouble),
    /// The source changes.
    Change,
}

/// A machine at work, waiting for an answer.
struct Actor {
    who: Who,
    op: Op,
    future: Pin<Box<dyn Future<Output = Done>>>,
    reply: Option<Reply>,
    /// What it asked for.
    path: String,
}

struct Sim {
    dice: Dice,
    world: World,
    log: Log,
    queue: BTreeMap<(Ms, u64), Event>,
    planned: BTreeMap<(Who, Op), (Ms, u64)>,
    actors: BTreeMap<u64, Actor>,
    asked: mpsc::UnboundedReceiver<(Question, Reply)>,
    numbers: u64,
    net: Net,
    cdn: Cdn,
    model: Arc<Mutex<Model>>,
    hq: Hq,
    relays: Vec<RelayNode>,
    registers: Vec<RegisterNode>,
    stick: PathBuf,
    cut_publish: Option<u64>,
    /// When headquarters heard each relay, and since when it listens: milliseconds.
    /// When each relay was last heard at headquarters, and the time before.
    heard: BTreeMap<usize, (Ms, Ms)>,
    listening: Ms,
    calm: bool,
    events: u64,
    calmed: Option<u64>,
    cycles: u64,
    troubles: BTreeMap<String, u64>,
}

impl Sim {
    async fn new(seed: u64, dir: &Path, loud: bool) -> Sim {
        let mut dice = Dice::new(seed);
        let world = World::default();
        let stores = if dice.percent(65) { 1 } else { 2 };
        let per_store = dice.between(1, 2) as usize;
        let (hq, codes) = Hq::new(&dir.join("hq"), Machine::new(&world), stores, per_store, &mut dice).await;
        let (ask, asked) = mpsc::unbounded_channel();
        let (mut relays, mut registers) = (Vec::new(), Vec::new());
        for code in &codes {
            let (line, clock) = (Line(ask.clone()), Machine::new(&world));
            clock.set_skew(dice.between(0, 120) as i64 - 60);
            match relays.len().checked_sub(1) {
                Some(relay) if code.id.to_string().contains('-') => {
                    registers.push(RegisterNode::new(dir, code, registers.len(), relay, line, clock));
                }
                _ => relays.push(RelayNode::new(dir, code, relays.len(), line, clock)),
            }
        }
        Sim {
            model: Arc::new(Mutex::new(Model::new(&hq.dir))),
            cdn: Cdn::new(&hq.bucket()),
            stick: dir.join("stick"),
            dice,
            world,
            log: Log::new(loud),
            queue: BTreeMap::new(),
            planned: BTreeMap::new(),
            actors: BTreeMap::new(),
            asked,
            numbers: 0,
            net: Net::default(),
            hq,
            relays,
            registers,
            cut_publish: None,
            heard: BTreeMap::new(),
            listening: 0,
            calm: false,
            events: 0,
            calmed: None,
            cycles: 0,
            troubles: BTreeMap::new(),
        }
    }

    fn now(&self) -> Ms {
        self.world.now()
    }
    fn say(&mut self, line: impl AsRef<str>) {
        let now = self.now();
        self.log.write(now, line.as_ref());
    }
    fn soon(&mut self, from: Ms, to: Ms) -> Ms {
        self.now() + self.dice.between(from, to)
    }
    fn put(&mut self, at: Ms, event: Event) -> (Ms, u64) {
        self.numbers += 1;
        let key = (at, self.numbers);
        self.queue.insert(key, event);
        key
    }

    /// Lets a machine do something at a time, or earlier if it was to do it anyway.
    fn plan(&mut self, who: Who, op: Op, at: Ms) {
        let known = self.planned.get(&(who, op.clone())).copied();
        if known.is_some_and(|(then, _)| then <= at) {
            return;
        }
        if let Some(known) = known {
            self.queue.remove(&known);
        }
        let key = self.put(at, Event::Run(who, op.clone()));
        self.planned.insert((who, op), key);
    }

    fn unplan(&mut self, who: Who) {
        let of: Vec<(Who, Op)> = self.planned.keys().filter(|(w, _)| *w == who).cloned().collect();
        for key in of {
            if let Some(at) = self.planned.remove(&key) {
                self.queue.remove(&at);
            }
        }
    }

    /// The whole story: trouble, then calm.
    async fn run(&mut self) -> Checked {
        // 1. A chain that works.
        self.hq.serve().await;
        self.publish(None, true).await?;
        for n in 0..self.relays.len() {
            let at = self.soon(0, 2000);
            self.plan(Who::Relay(n), Op::Start, at);
        }
        for n in 0..self.registers.len() {
            let at = self.soon(0, 60_000);
            self.plan(Who::Register(n), Op::Start, at);
        }
        self.plan(Who::Hq, Op::Judge, 5_000);
        // 2. Trouble.
        let until = self.dice.between(120_000, 600_000);
        let (stores, per_store) = (self.relays.len(), self.registers.len() / self.relays.len());
        for (at, trouble) in trouble::plan(stores, per_store, until, &mut self.dice) {
            self.put(at, Event::Trouble(trouble));
        }
        for _ in 0..self.dice.between(2, 8) {
            let at = self.dice.below(until);
            self.put(at, Event::Change);
        }
        self.go_until(until).await?;
        // 3. Calm: the last trouble is over, and headquarters is told how all stand.
        self.calm_down().await?;
        let (calm, mut arrived) = (self.now(), None);
        while self.now() < calm + 100_000 {
            let next = self.now() + CYCLE / 3;
            self.go_until(next).await?;
            if arrived.is_none() && self.behind(Goal::Manifest)?.is_none() {
                arrived = Some((self.now() - calm).div_ceil(CYCLE));
            }
        }
        // 4. What is in the bucket arrives by itself, unless a pack on the way is gone or was given up: then by a full, as
        // people are told. And what the source holds arrives with a publish though nothing changed.
        let never_whole = ["Poison", "Lose", "Theft"].iter().any(|kind| self.troubles.contains_key(*kind));
        let full = never_whole || !self.model.lock().unwrap().given_up.is_empty();
        if !full {
            // What got there may have been left behind again by what was still on its way.
            let last = self.converge(Goal::Manifest, calm, CALM_CYCLES).await?;
            self.calmed = arrived.map_or(Some(last), |first| Some(first.max(last)));
            self.say(format!("everything is at what the bucket promises, cycle {}", self.calmed.unwrap_or(0)));
        }
        self.publish_as(PublishOptions { full, ..PublishOptions::default() }, None, true).await?;
        let by_a_publish = self.converge(Goal::Source, self.now(), CYCLES).await?;
        self.say("everything is at what the source holds");
        // 5. Everything changes, and everybody must come there.
        for _ in 0..2 {
            self.hq.change_all(self.relays.len());
            self.publish(None, true).await?;
        }
        self.cycles = self.converge(Goal::Source, self.now(), CYCLES).await?.max(by_a_publish);
        self.say(format!("everything is at headquarters' versions, cycle {}", self.cycles));
        if !self.model.lock().unwrap().saw_required() {
            return Err("no list says what promo requires".into());
        }
        // 6. People hear that it is over.
        let told = self.now() + 130_000;
        self.go_until(told).await?;
        self.no_rot_is_served().await?;
        self.last_look()
    }

    /// Goes on until nobody is behind; the cycles that it took since then, which are no more than `most`.
    async fn converge(&mut self, goal: Goal, since: Ms, most: u64) -> Result<u64, String> {
        let mut cycles = 0;
        while let Some(why) = self.behind(goal)? {
            cycles = (self.now() - since) / CYCLE + 1;
            if self.now() > since + most * CYCLE {
                return Err(format!("no convergence to {goal:?} within {most} cycles: {why}"));
            }
            let next = self.now() + CYCLE / 3;
            self.go_until(next).await?;
        }
        Ok(cycles)
    }

    /// Does what is due until a time.
    async fn go_until(&mut self, until: Ms) -> Checked {
        while let Some(entry) = self.queue.first_entry() {
            let at = entry.key().0;
            if at > until {
                break;
            }
            let event = entry.remove();
            self.world.set(at);
            self.events += 1;
            match event {
                Event::Run(who, op) => {
                    self.planned.remove(&(who, op.clone()));
                    self.start(who, op).await?;
                }
                Event::Arrive(actor, from, question) => self.arrive(actor, from, question).await,
                Event::Deliver(actor, answer) => self.deliver(actor, answer).await?,
                Event::Trouble(trouble) => self.trouble(trouble).await?,
                Event::Change => self.change().await?,
            }
        }
        self.world.set(until.max(self.now()));
        Ok(())
    }

    // Machines at work.

    async fn start(&mut self, who: Who, op: Op) -> Checked {
        match (who, &op) {
            (Who::Hq, Op::Judge) => return self.judge().await,
            (Who::Hq, _) => return self.publish(None, false).await,
            (_, Op::Start) => return self.switch_on(who).await,
            _ => {}
        }
        if self.must_wait(who, &op) {
            let at = self.now() + 500;
            self.plan(who, op, at);
            return Ok(());
        }
        let did = op.clone();
        let work: Pin<Box<dyn Future<Output = Done>>> = match who {
            Who::Relay(n) => {
                let node = &self.relays[n];
                let Some(relay) = node.relay.clone() else { return Ok(()) };
                Box::pin(relay_does(relay, node.hq.clone(), node.woken.clone(), op))
            }
            Who::Register(n) => {
                let node = &self.registers[n];
                let Some(agent) = node.agent.clone() else { return Ok(()) };
                Box::pin(register_does(agent, node.news.subscribe(), op))
            }
            _ => return Ok(()),
        };
        let guarded = async move {
            match AssertUnwindSafe(work).catch_unwind().await {
                Ok(done) => done,
                Err(panic) if panic.is::<PowerCut>() => Done::Cut,
                Err(panic) => Done::Panicked(what_panicked(&*panic)),
            }
        };
        self.numbers += 1;
        let number = self.numbers;
        self.go_on(number, Actor { who, op: did, future: Box::pin(guarded), reply: None, path: String::new() }).await
    }

    /// Nothing is done twice at once; idle work and steps do not meet, as in the relay's own loop.
    fn must_wait(&self, who: Who, op: &Op) -> bool {
        if self.actors.values().any(|a| a.who == who && a.op == *op) {
            return true;
        }
        let busy = |f: fn(&Op) -> bool| self.actors.values().any(|a| a.who == who && f(&a.op));
        match op {
            Op::Spare => busy(|o| matches!(o, Op::Step(_) | Op::Look | Op::Spare | Op::Verify)),
            Op::Step(_) => busy(|o| matches!(o, Op::Spare | Op::Verify)),
            Op::Verify => busy(|_| true),
            _ => false,
        }
    }

    /// Polls a machine's work until it asks the network or ends.
    async fn go_on(&mut self, number: u64, mut actor: Actor) -> Checked {
        let patience = Duration::from_secs(60);
        let step = async {
            tokio::select! {
                biased;
                done = &mut actor.future => Ok(done),
                Some(asked) = self.asked.recv() => Err(asked),
            }
        };
        match tokio::time::timeout(patience, step).await {
            Err(_) => Err(format!("{} hangs in {:?} without asking anybody", actor.who, actor.op)),
            Ok(Err((question, reply))) => {
                actor.reply = Some(reply);
                actor.path.clone_from(&question.path);
                let from = actor.who;
                self.actors.insert(number, actor);
                self.ask(number, from, question);
                // As whoever reads its files sees them while it waits.
                self.look_at_files(from)
            }
            Ok(Ok(done)) => {
                let (who, op) = (actor.who, actor.op.clone());
                drop(actor);
                // What it asked and then did not wait for.
                while self.asked.try_recv().is_ok() {}
                self.ended(who, op, done).await
            }
        }
    }

    fn ask(&mut self, number: u64, from: Who, question: Question) {
        let now = self.now();
        let fate = self.net.fate(from, question.to, now, &mut self.dice);
        self.say(format!("{from} asks {}: {} {} ({fate:?})", question.to, question.method, question.path));
        match fate {
            Fate::Lost(after) => {
                self.put(now + after, Event::Deliver(number, Err("no answer".into())));
            }
            Fate::Arrives(after) => {
                self.put(now + after, Event::Arrive(Some(number), from, question));
            }
            Fate::Twice(one, two) => {
                self.put(now + one, Event::Arrive(Some(number), from, question.clone()));
                self.put(now + two, Event::Arrive(None, from, question));
            }
        }
    }

    async fn arrive(&mut self, actor: Option<u64>, from: Who, question: Question) {
        let now = self.now();
        let answer = match question.to {
            Who::Cdn => Ok(self.cdn.answer(&question, true, now)),
            Who::Bucket => Ok(self.cdn.answer(&question, false, now)),
            Who::Hq => self.ask_hq(from, &question).await,
            Who::Relay(n) => self.ask_relay(n, &question).await,
            Who::Register(_) => Err("nobody listens".into()),
        };
        let (to, path) = (question.to, &question.path);
        let told = answer.as_ref().map_or_else(String::clone, |a| a.status.to_string());
        self.say(format!("{to} answers {from}: {path}: {told}{}", if actor.is_none() { " (a double)" } else { "" }));
        let Some(actor) = actor else { return };
        let (mut answer, fate) = (answer, self.net.fate(from, to, now, &mut self.dice));
        if let Ok(a) = &mut answer
            && let Some(how) = self.net.harm(from, to, now, a, &mut self.dice)
        {
            self.say(format!("the answer for {from} is {how}"));
        }
        match fate {
            Fate::Lost(after) => self.put(now + after, Event::Deliver(actor, Err("no answer".into()))),
            Fate::Arrives(after) | Fate::Twice(after, _) => self.put(now + after, Event::Deliver(actor, answer)),
        };
    }

    async fn ask_hq(&mut self, from: Who, question: &Question) -> Result<Answer, String> {
        if self.hq.app.is_none() {
            return Err("connection refused".into());
        }
        let answer = self.hq.answer(question).await;
        if let Who::Relay(n) = from
            && question.path.starts_with("/v1/heartbeats")
            && answer.status == 200
        {
            let now = self.now();
            let before = self.heard.get(&n).map_or(now, |(last, _)| *last);
            self.heard.insert(n, (now, before));
        }
        Ok(answer)
    }

    async fn ask_relay(&mut self, n: usize, question: &Question) -> Result<Answer, String> {
        let Some(relay) = self.relays[n].relay.clone() else { return Err("connection refused".into()) };
        let mut request = http::Request::builder().method(question.method.clone()).uri(&question.path);
        for (name, value) in &question.headers {
            request = request.header(name, value);
        }
        let request = request.body(Inbound::from(question.body.clone())).unwrap();
        let from = std::net::Ipv4Addr::LOCALHOST.into();
        let response = store_relay::lan::answer(Arc::clone(&relay.hall), request, from).await;
        let mut answer = Answer::new(response.status().as_u16(), "");
        for (name, value) in response.headers() {
            answer = answer.with(name.as_str(), value.to_str().unwrap_or_default());
        }
        answer.body = response.into_body().collect().await.map_err(|e| e.to_string())?.to_bytes();
        drop(relay);
        self.hear_relay(n);
        Ok(answer)
    }

    async fn deliver(&mut self, number: u64, answer: Result<Answer, String>) -> Checked {
        let Some(mut actor) = self.actors.remove(&number) else { return Ok(()) };
        if let Some(reply) = actor.reply.take() {
            let _ = reply.send(answer.map(Answer::arrive));
        }
        self.go_on(number, actor).await
    }

    /// What follows when a machine has done something.
    async fn ended(&mut self, who: Who, op: Op, done: Done) -> Checked {
        self.say(format!("{who} has done {op:?}: {}", in_short(&done)));
        if let Done::Panicked(what) = &done {
            return Err(format!("{who} panicked in {op:?}: {what}"));
        }
        let blown = match who {
            Who::Relay(n) => matches!(done, Done::Cut) || self.relays[n].fuse.is_blown(),
            Who::Register(n) => self.registers[n].fuse.is_blown(),
            _ => false,
        };
        if blown {
            // As whoever reads its files sees them now.
            self.look_at_files(who)?;
            let power = self.dice.percent(60);
            let off = self.dice.between(500, 60_000);
            self.switch_off(who, power, off);
            return Ok(());
        }
        self.look_at(who)?;
        match who {
            Who::Relay(n) => self.relay_did(n, op, done),
            Who::Register(n) if self.register_did(n, op, done) => return self.break_off(n).await,
            _ => {}
        }
        Ok(())
    }

    /// News break off a download.
    async fn break_off(&mut self, n: usize) -> Checked {
        let waits = |a: &Actor| a.who == Who::Register(n) && a.op == Op::Cycle && a.path.starts_with("/packs/");
        let Some(number) = self.actors.iter().find(|(_, a)| waits(a)).map(|(number, _)| *number) else { return Ok(()) };
        self.registers[n].news.send_modify(|n| *n += 1);
        let Some(actor) = self.actors.remove(&number) else { return Ok(()) };
        Box::pin(self.go_on(number, actor)).await
    }

    fn relay_did(&mut self, n: usize, op: Op, done: Done) {
        let who = Who::Relay(n);
        match (op, done) {
            (Op::Look, _) => {
                let relay = self.relays[n].relay.clone();
                let awaited = relay.as_ref().is_some_and(|r| r.hall.state().awaited().is_some());
                let (mut at, now) = (self.now() + CYCLE, self.now());
                if awaited && self.relays[n].relooks > 0 {
                    self.relays[n].relooks -= 1;
                    at = now + 1000;
                }
                self.plan(who, Op::Look, at);
                for s in relay.map(|r| r.streams()).unwrap_or_default() {
                    self.plan(who, Op::Step(s.to_string()), now);
                }
                self.relays[n].spare_wanted = true;
            }
            (Op::Step(stream), Done::Stepped(StreamOutcome::Again(pause, _))) => {
                let at = self.now() + pause.mul_f64(1.0 + self.dice.unit() / 4.0).as_millis() as Ms;
                self.plan(who, Op::Step(stream), at);
                self.relays[n].spare_wanted = true;
            }
            (Op::Report, Done::Told(arrived)) => {
                let failures = &mut self.relays[n].failures;
                *failures = if arrived { 0 } else { *failures + 1 };
                let at = if arrived { self.now() + 60_000 } else { self.soon(1000, 60_000) };
                self.plan(who, Op::Report, at);
            }
            (Op::Wake, Done::Woken(asked)) => {
                let at = match asked {
                    // A long poll would be answered at the next publish, which plans the next one.
                    Ok(Asked::Quiet(etag) | Asked::News(etag)) => {
                        self.relays[n].woken = etag;
                        self.now() + 240_000
                    }
                    Ok(Asked::NoPage) => self.now() + 300_000,
                    Err(()) => self.soon(1000, 60_000),
                };
                self.plan(who, Op::Wake, at);
            }
            (Op::Spare, _) => self.relays[n].spare_wanted = false,
            _ => {}
        }
        self.hear_relay(n);
    }

    /// What the relay's own loop would hear: bells, news for its registers, time to spare.
    fn hear_relay(&mut self, n: usize) {
        let who = Who::Relay(n);
        let Some(relay) = self.relays[n].relay.clone() else { return };
        let (wake, report) = (relay.hall.wake.notified().now_or_never(), relay.hall.report.notified().now_or_never());
        let now = self.now();
        if wake.is_some() {
            self.relays[n].relooks = 12;
            self.plan(who, Op::Look, now);
        }
        if report.is_some() && self.relays[n].failures == 0 {
            self.plan(who, Op::Report, now + 300);
        }
        let adopted = relay.hall.state().adopted;
        if adopted != self.relays[n].adopted {
            self.relays[n].adopted = adopted;
            for s in relay.streams() {
                self.plan(who, Op::Step(s.to_string()), now);
            }
        }
        let listing = relay.hall.versions().borrow().etag.clone();
        if listing != self.relays[n].listing {
            self.relays[n].listing = listing;
            for r in 0..self.registers.len() {
                if self.registers[r].relay == n {
                    let at = self.soon(1, 300);
                    self.plan(Who::Register(r), Op::Poll, at);
                }
            }
        }
        let idle = !self.actors.values().any(|a| a.who == who && matches!(a.op, Op::Step(_) | Op::Spare));
        if idle && self.relays[n].spare_wanted {
            self.relays[n].spare_wanted = false;
            self.plan(who, Op::Spare, now + 1);
        }
    }

    /// What the agent's loops would do next; whether there is news.
    fn register_did(&mut self, n: usize, op: Op, done: Done) -> bool {
        let who = Who::Register(n);
        let Some(agent) = self.registers[n].agent.clone() else { return false };
        let mut news = false;
        let rules = agent.upstream.rules().clone();
        match (op, done) {
            (Op::Poll, Done::Heard(heard)) => {
                let node = &mut self.registers[n];
                let was_silent = node.silences > 0;
                node.silences = if heard == "silence" { node.silences + 1 } else { 0 };
                let back = was_silent && node.silences == 0;
                if std::mem::take(&mut node.first) || heard == "news" || back {
                    news = true;
                    let now = self.now();
                    self.plan(who, Op::Cycle, now);
                }
                let silent = self.registers[n].silences > 0;
                let at = if silent { self.soon(500, 10_000) } else { self.now() + rules.poll_wait().as_millis() as Ms };
                self.plan(who, Op::Poll, at);
            }
            (Op::Cycle, Done::Cycled(end)) => {
                let node = &mut self.registers[n];
                node.failures = if end == End::Retry { node.failures + 1 } else { 0 };
                let attempt = node.failures.max(1) - 1;
                let (seen, share) = agent.upstream.seen();
                let wait = rules.wait(agent.clock.monotonic(), &seen, &end, attempt, share, self.dice.unit());
                let at = self.now() + (wait.as_millis() as Ms).max(50);
                self.plan(who, Op::Cycle, at);
            }
            (Op::Beat, Done::Told(arrived)) => {
                let failed = &mut self.registers[n].beats_failed;
                *failed = if arrived { 0 } else { *failed + 1 };
                let at = if arrived { self.now() + 60_000 } else { self.soon(250, 30_000) };
                self.plan(who, Op::Beat, at);
            }
            _ => {}
        }
        let now = self.now();
        if agent.wake.notified().now_or_never().is_some() {
            self.plan(who, Op::Cycle, now);
        }
        if agent.tell.notified().now_or_never().is_some() {
            self.plan(who, Op::Beat, now + 250);
        }
        news
    }

    // Power.

    async fn switch_on(&mut self, who: Who) -> Checked {
        let now = self.now();
        let started = std::panic::catch_unwind(AssertUnwindSafe(|| match who {
            Who::Relay(n) if self.relays[n].relay.is_none() => self.relays[n].start().map_err(|e| e.to_string()),
            Who::Register(n) if self.registers[n].agent.is_none() => {
                self.registers[n].start().map_err(|e| e.to_string())
            }
            _ => Ok(()),
        }));
        match started {
            Ok(Ok(())) => {}
            Ok(Err(e)) if self.disk(who).is_some_and(SmallDisk::is_filled) => {
                let why = self.anonymous(&e);
                self.say(format!("{who} does not start: {why}"));
                self.plan(who, Op::Start, now + 5_000);
                return Ok(());
            }
            Ok(Err(e)) => return Err(format!("{who} does not start: {e}")),
            Err(panic) if panic.is::<PowerCut>() => {
                self.say(format!("{who} is cut while it starts"));
                let off = self.dice.between(500, 30_000);
                self.switch_off(who, true, off);
                return Ok(());
            }
            Err(panic) => return Err(format!("{who} panicked at its start: {}", what_panicked(&*panic))),
        }
        self.say(format!("{who} starts"));
        self.look_at(who)?;
        let ops: &[Op] = match who {
            Who::Relay(_) => &[Op::Look, Op::Wake, Op::Report],
            _ => &[Op::Poll, Op::Cycle, Op::Beat],
        };
        for (i, op) in ops.iter().enumerate() {
            self.plan(who, op.clone(), now + 20 * (i as Ms + 1));
        }
        Ok(())
    }

    /// A machine dies, by a kill or with its power, and comes back after a while.
    fn switch_off(&mut self, who: Who, power: bool, off: Ms) {
        self.say(format!("{who} dies{}", if power { " with its power" } else { "" }));
        self.actors.retain(|_, a| a.who != who);
        self.unplan(who);
        let (data, clock) = match who {
            Who::Relay(n) => {
                let node = &mut self.relays[n];
                (node.relay, node.adopted) = (None, None);
                node.fuse.replace();
                (node.data.clone(), Arc::clone(&node.clock))
            }
            Who::Register(n) => {
                let node = &mut self.registers[n];
                node.agent = None;
                node.fuse.replace();
                (node.data.clone(), Arc::clone(&node.clock))
            }
            _ => return,
        };
        if power {
            disk::power_cut(&data, &mut self.dice);
            clock.reboot();
        }
        let at = self.now() + off;
        self.plan(who, Op::Start, at);
    }

    // Headquarters.

    async fn change(&mut self) -> Checked {
        let stores = self.relays.len();
        for _ in 0..self.dice.between(1, 4) {
            self.hq.change(&mut self.dice, stores);
        }
        let cut = self.cut_publish.take();
        self.publish(cut, false).await
    }

    async fn publish(&mut self, cut: Option<u64>, insist: bool) -> Checked {
        self.publish_as(PublishOptions::default(), cut, insist).await
    }

    /// One run; with `insist` once more if the first one finds that something was put behind its back.
    async fn publish_as(&mut self, options: PublishOptions, cut: Option<u64>, insist: bool) -> Checked {
        let options = PublishOptions { allow_shrink: Some(None), clock_is_right: self.calm, ..options };
        let mut tries = if insist { 3 } else { 1 };
        loop {
            let published = self.hq.publish(&options, cut, &self.model).await;
            let line = match &published {
                Published::Ended(report) => {
                    let of = |i: &hq_publisher::publish::report::InstanceReport| {
                        format!("{:?} {}", i.outcome, i.version.map_or(0, proto::ids::Version::get))
                    };
                    let all = report.instances.iter().map(|(name, i)| format!("{name} {}", of(i)));
                    format!("published: {}", all.collect::<Vec<_>>().join(", "))
                }
                Published::Failed(e) => format!("publish failed: {}", self.anonymous(&e.to_string())),
                Published::Cut => "publish is cut".to_owned(),
            };
            self.say(&line);
            self.look_at_hq()?;
            if let Published::Ended(report) = &published {
                self.check_refusals(report)?;
            }
            tries -= 1;
            if tries == 0 || matches!(published, Published::Ended(_)) {
                if insist && !matches!(published, Published::Ended(_)) {
                    return Err(format!("headquarters cannot publish: {line}"));
                }
                break;
            }
        }
        for n in 0..self.relays.len() {
            if self.relays[n].relay.is_some() {
                let at = self.soon(50, 400);
                self.plan(Who::Relay(n), Op::Wake, at);
            }
        }
        Ok(())
    }

    /// A bad row is refused with its stream, and told once.
    fn check_refusals(&self, report: &hq_publisher::publish::PublishReport) -> Checked {
        use hq_publisher::publish::report::Outcome::{HeldBack, Refused};
        for s in &STREAMS {
            let of: Vec<_> = report.instances.iter().filter(|(i, _)| i.stream.as_str() == s.name).collect();
            let stopped = of.iter().any(|(_, r)| matches!(r.outcome, Refused));
            let bad = self.hq.bad == Some(s.name) && self.bad_row_is_read();
            if stopped != bad {
                return Err(format!("{}: bad row in the source: {bad}; refused: {stopped}", s.name));
            }
            for (instance, r) in &of {
                let about = format!("Publishing {instance} was refused (BAD_ROWS)");
                let told = self.model.lock().unwrap().is_open(&about);
                let should = matches!(r.outcome, Refused);
                if told != should && !matches!(r.outcome, HeldBack) {
                    return Err(format!("“{about}”: told {told}, should be {should}"));
                }
            }
        }
        Ok(())
    }

    /// A zone without a store is not read.
    fn bad_row_is_read(&self) -> bool {
        let sql = "SELECT EXISTS (SELECT 1 FROM promo WHERE id = 99) OR EXISTS \
                   (SELECT 1 FROM price JOIN store USING (zone) WHERE cents < 0 OR length(sku) > 12)";
        self.hq.source().query_row(sql, [], |r| r.get(0)).unwrap()
    }

    async fn judge(&mut self) -> Checked {
        let manifests = self.dice.percent(15);
        if let Err(e) = self.hq.judge(manifests).await {
            return Err(format!("headquarters cannot judge: {e}"));
        }
        self.say("headquarters judges");
        self.look_at_hq()?;
        self.check_silence()?;
        let at = self.now() + 40_000;
        self.plan(Who::Hq, Op::Judge, at);
        Ok(())
    }

    /// A store that was not heard for five minutes is told of, and no other.
    fn check_silence(&self) -> Checked {
        if self.hq.app.is_none() {
            return Ok(());
        }
        let now = self.now();
        for (n, (heard, before)) in &self.heard {
            let about = format!("Store {} is silent", self.relays[*n].store);
            let (told, silent) = (self.model.lock().unwrap().is_open(&about), now - heard);
            if silent >= 302_000 && now - self.listening >= 302_000 && !told {
                return Err(format!("“{about}” was not told, after {} s", silent / 1000));
            }
            // One word of a line that comes and goes ends nothing.
            if silent < 298_000 && heard - before < 298_000 && told {
                return Err(format!("“{about}” is told, {} s after it was heard", silent / 1000));
            }
        }
        Ok(())
    }

    fn look_at_hq(&mut self) -> Checked {
        let now = self.now();
        self.cdn.look(now);
        let checked = {
            let mut model = self.model.lock().unwrap();
            model.look_at_bucket().and_then(|()| model.look_at_mails())
        };
        let news = std::mem::take(&mut self.model.lock().unwrap().news);
        news.iter().for_each(|subject| self.say(format!("MAIL {subject}")));
        checked
    }

    // Looking.

    fn look_at(&mut self, who: Who) -> Checked {
        let (name, faults) = match who {
            Who::Relay(n) => {
                let relay = self.relays[n].relay.as_ref();
                (&self.relays[n].store, relay.map(|r| r.hall.state().all_faults()))
            }
            Who::Register(n) => {
                let agent = self.registers[n].agent.as_ref();
                (&self.registers[n].id, agent.map(|a| a.memory.look(|f| f.open())))
            }
            _ => return Ok(()),
        };
        self.model.lock().unwrap().complains(name, &faults.unwrap_or_default());
        self.look_at_files(who)
    }

    fn look_at_files(&mut self, who: Who) -> Checked {
        let mut model = self.model.lock().unwrap();
        match who {
            Who::Relay(n) => {
                let node = &mut self.relays[n];
                model.look_at_relay(&node.store, &node.data, &mut node.unproved)
            }
            Who::Register(n) => {
                let node = &self.registers[n];
                model.look_at_register(&node.id, &node.data)
            }
            _ => Ok(()),
        }
    }

    /// Who is not yet at headquarters' versions.
    fn behind(&mut self, goal: Goal) -> Result<Option<String>, String> {
        let model = self.model.lock().unwrap();
        let mut files: Vec<(String, String, PathBuf)> = Vec::new();
        for r in &self.relays {
            files.push((r.store.clone(), r.store.clone(), r.data.join("shadow.db")));
        }
        for r in &self.registers {
            files.push((r.id.clone(), self.relays[r.relay].store.clone(), r.data.join("store.db")));
        }
        for (name, store, file) in files {
            if !file.exists() {
                return Ok(Some(format!("{name} has nothing")));
            }
            let holds = model.holds(&file);
            let wanted = match goal {
                Goal::Source => model.wanted(&store),
                Goal::Manifest => model.promised(&store),
            };
            for (instance, digest) in wanted {
                match holds.get(&instance) {
                    Some((_, d)) if *d == digest => {}
                    Some((v, _)) => return Ok(Some(format!("{name} is at {instance} {v}"))),
                    None => return Ok(Some(format!("{name} lacks {instance}"))),
                }
            }
        }
        Ok(None)
    }

    /// Files that rotted were fetched anew, or are asked for in vain: without a proof and a place in the list they lie
    /// there until their time is over.
    async fn no_rot_is_served(&mut self) -> Checked {
        let rotten: Vec<PathBuf> = self.model.lock().unwrap().still_rotten().into_iter().cloned().collect();
        for path in rotten {
            let at = |r: &RelayNode| Some(format!("/{}", path.strip_prefix(r.data.join("ok")).ok()?.display()));
            let Some((n, path)) = self.relays.iter().enumerate().find_map(|(n, r)| Some((n, at(r)?))) else { continue };
            let answer = self.ask_relay(n, &Question::get(Who::Relay(n), &path)).await?;
            if answer.status == 200 {
                return Err(format!("relay {n} still serves rot: {path}"));
            }
        }
        Ok(())
    }

    /// All is over: nothing is told as wrong any more, and nothing was kept silent.
    fn last_look(&mut self) -> Checked {
        let model = self.model.lock().unwrap();
        let open = model.all_open();
        if !open.is_empty() {
            return Err(format!("still told as wrong: {}", open.join("; ")));
        }
        for instance in &model.given_up {
            let about = format!("A pack of {instance} is in error");
            if !model.told.contains_key(&about) {
                return Err(format!("“{about}” was never told"));
            }
        }
        model.told_as_said()?;
        for node in &self.relays {
            model.look_at_chains(&node.store, &node.data)?;
            if let Some(fault) = node.relay.as_ref().and_then(|r| r.hall.state().all_faults().pop()) {
                return Err(format!("{} still says {}: {}", node.store, fault.code, fault.text));
            }
        }
        for node in &self.registers {
            if let Some(fault) = node.agent.as_ref().and_then(|a| a.memory.look(|f| f.open()).pop()) {
                return Err(format!("{} still says {}: {}", node.id, fault.code, fault.text));
            }
        }
        Ok(())
    }

    // Trouble.

    async fn trouble(&mut self, trouble: Trouble) -> Checked {
        let name = format!("{trouble:?}");
        let kind = name.split('(').next().unwrap_or_default().to_owned();
        *self.troubles.entry(kind).or_default() += 1;
        self.say(format!("TROUBLE {name}"));
        let now = self.now();
        match trouble {
            Trouble::Partition(a, b, long) => self.net.way(a, b).down_until = now + long,
            Trouble::Bad(a, b, long) => self.net.way(a, b).bad_until = now + long,
            Trouble::Lag(old, long) => (self.cdn.lag, self.cdn.lag_until) = (old, now + long),
            Trouble::Spoil => {
                let packs = self.cdn.packs();
                if !packs.is_empty() {
                    let name = self.dice.pick(&packs).clone();
                    self.cdn.spoil(&name, &mut self.dice);
                    let at = self.soon(10_000, 300_000);
                    self.put(at, Event::Trouble(Trouble::Purge));
                }
            }
            Trouble::Purge => self.cdn.purge(),
            Trouble::Crash(who, power, off) => self.switch_off(who, power, off),
            Trouble::Cut(Who::Relay(n), steps) => self.relays[n].fuse.light(steps),
            Trouble::Cut(Who::Register(n), steps) => self.registers[n].fuse.light(steps),
            Trouble::Cut(..) => {}
            Trouble::CutPublish(steps) => {
                self.cut_publish = Some(steps);
                self.put(now, Event::Change);
            }
            Trouble::Clock(who, leap, long) => {
                self.set_clock(who, leap);
                self.put(now + long, Event::Trouble(Trouble::ClockRight(who)));
            }
            Trouble::ClockRight(who) => self.set_clock(who, 0),
            Trouble::Poison(store) => {
                let id = store_id(store);
                let made = evil::poison(&self.hq, &id, &mut self.dice, &mut self.model.lock().unwrap());
                self.say(format!("poison for {id}: {made:?}"));
                self.look_at_hq()?;
            }
            Trouble::BadRow => {
                if self.hq.bad.is_none() {
                    self.hq.spoil_row(&mut self.dice);
                    let at = self.soon(20_000, 300_000);
                    self.put(at, Event::Trouble(Trouble::MendRow));
                    for _ in 0..self.dice.between(1, 3) {
                        let at = self.soon(0, 100_000);
                        self.put(at, Event::Change);
                    }
                }
            }
            Trouble::MendRow => {
                self.hq.mend_row();
                self.put(now, Event::Change);
            }
            Trouble::Tamper(who) => self.tamper(who),
            Trouble::LoseShadow(n) => self.lose_shadow(n),
            Trouble::Hold(n, seconds) => {
                if let Some(agent) = &self.registers[n].agent {
                    agent.hold.place(agent.clock.monotonic(), Duration::from_secs(seconds));
                }
            }
            Trouble::ServeDown(long) => {
                self.hq.stop_serving();
                self.put(now + long, Event::Trouble(Trouble::ServeUp));
            }
            Trouble::ServeUp => {
                if self.hq.app.is_none() {
                    self.hq.serve().await;
                    self.listening = now;
                }
            }
            Trouble::Zone(store) => {
                let sql = "UPDATE store SET zone = CASE zone WHEN 'east' THEN 'west' ELSE 'east' END WHERE id = ?1";
                self.hq.source().execute(sql, [store_id(store)]).unwrap();
                self.put(now, Event::Change);
            }
            Trouble::Stick(store) => self.carry(store).await?,
            Trouble::Rotate if self.hq.stolen.is_some() => {}
            Trouble::Rotate => {
                let rotated = self.hq.rotate(&mut self.dice).await;
                let told = rotated.map_or_else(|e| self.anonymous(&e), |v| format!("trust {v}"));
                self.say(format!("rotated: {told}"));
                self.put(now, Event::Change);
            }
            Trouble::Theft(store) => {
                let jumped = evil::jump(&self.hq, &store_id(store), &mut self.model.lock().unwrap());
                self.say(format!("a thief signs serial {jumped:?}"));
                if jumped.is_some() {
                    self.hq.stolen = Some(self.hq.key_in_use().await?);
                }
                let at = self.soon(1_000, 200_000);
                self.put(at, Event::Trouble(Trouble::Revoke));
            }
            Trouble::Revoke => self.revoke().await?,
            Trouble::Contract => {
                let columns = self.hq.add_column();
                self.say(format!("promo has {columns} columns more"));
                if self.hq.app.is_some() {
                    self.hq.serve().await;
                    self.listening = now;
                }
                self.put(now, Event::Change);
            }
            Trouble::Rot(n) => self.rot(n),
            Trouble::Lose => {
                let packs = disk::files(&self.hq.bucket().join("packs"));
                if !packs.is_empty() {
                    std::fs::remove_file(self.dice.pick(&packs)).unwrap();
                    self.cdn.look(now);
                }
            }
            Trouble::Full(Who::Hq, pages, _) => {
                self.hq.change(&mut self.dice, self.relays.len());
                self.hq.room = Some(pages);
                self.publish(None, false).await?;
                self.put(now, Event::Change);
            }
            Trouble::Full(who, pages, long) => {
                self.disk(who).into_iter().for_each(|d| d.fill(pages));
                self.put(now + long, Event::Trouble(Trouble::Room(who)));
            }
            Trouble::Room(who) => self.disk(who).into_iter().for_each(SmallDisk::empty),
            Trouble::HqPower(steps) => {
                self.change_cut(steps).await?;
                self.hq.stop_serving();
                disk::power_cut_at_hq(&self.hq.dir, &mut self.dice);
                let at = self.soon(500, 60_000);
                self.put(at, Event::Trouble(Trouble::ServeUp));
                self.put(at, Event::Change);
            }
        }
        Ok(())
    }

    /// The disk of a machine of a store.
    fn disk(&self, who: Who) -> Option<&SmallDisk> {
        match who {
            Who::Relay(n) => Some(&self.relays[n].disk),
            Who::Register(n) => Some(&self.registers[n].disk),
            _ => None,
        }
    }

    /// The power goes while headquarters publishes.
    async fn change_cut(&mut self, steps: u64) -> Checked {
        self.hq.change(&mut self.dice, self.relays.len());
        self.publish(Some(steps), false).await
    }

    async fn revoke(&mut self) -> Checked {
        if self.hq.stolen.is_none() {
            return Ok(());
        }
        let mut revoked = self.hq.revoke(&mut self.dice).await?;
        if revoked.is_none() {
            self.publish(None, self.calm).await?;
            revoked = self.hq.revoke(&mut self.dice).await?;
        }
        let now = self.now();
        match revoked {
            Some(version) => {
                self.say(format!("the stolen key is revoked: trust {version}"));
                self.put(now, Event::Change);
            }
            None if self.calm => return Err("the stolen key's epoch does not end".to_owned()),
            None => {
                let at = self.soon(1_000, 200_000);
                self.put(at, Event::Trouble(Trouble::Revoke));
            }
        }
        Ok(())
    }

    /// A bit of a file that a relay serves turns.
    fn rot(&mut self, n: usize) {
        let served = disk::files(&self.relays[n].data.join("ok/packs"));
        if served.is_empty() || self.relays[n].relay.is_none() {
            return;
        }
        let path = self.dice.pick(&served).clone();
        disk::flip(&path, &mut self.dice);
        self.model.lock().unwrap().rots(&path);
        let now = self.now();
        self.plan(Who::Relay(n), Op::Verify, now);
    }

    /// A stick is carried to a store: a new one, an old one, or one that has suffered.
    async fn carry(&mut self, n: usize) -> Checked {
        let who = Who::Relay(n);
        let Some(relay) = self.relays[n].relay.clone() else { return Ok(()) };
        if self.actors.values().any(|a| a.who == who) {
            // It goes by itself, so that its steps come in the same order each time.
            let at = self.soon(100, 2000);
            self.put(at, Event::Trouble(Trouble::Stick(n)));
            return Ok(());
        }
        let (stick, store) = (self.stick.join(n.to_string()), store_id(n));
        std::fs::create_dir_all(&stick).unwrap();
        let kept = self.dice.percent(40) && stick.join("trust.json").exists();
        if !kept {
            if !self.hq.export(&store, &stick).await {
                return Ok(());
            }
            self.model.lock().unwrap().look_at_stick(&stick)?;
        }
        if self.dice.percent(30) {
            disk::tear_one(&stick, &mut self.dice);
        }
        let left = self.relays[n].fuse.hold();
        let imported = relay.import(&stick).await;
        self.relays[n].fuse.give_back(left);
        let told = imported.map_or_else(
            |_| "not taken".into(),
            |i| format!("{} taken, {} refused", i.taken.len(), i.receipt.refusals.len()),
        );
        self.say(format!("{who} imports a stick: {told}"));
        drop(relay);
        self.look_at(who)?;
        self.hear_relay(n);
        Ok(())
    }

    fn set_clock(&mut self, who: Who, skew: i64) {
        match who {
            Who::Hq => self.hq.clock.set_skew(skew),
            Who::Relay(n) => self.relays[n].clock.set_skew(skew),
            Who::Register(n) => self.registers[n].clock.set_skew(skew),
            _ => {}
        }
    }

    fn tamper(&mut self, who: Who) {
        let (name, file, up) = match who {
            Who::Relay(n) => {
                (self.relays[n].store.clone(), self.relays[n].data.join("shadow.db"), self.relays[n].relay.is_some())
            }
            Who::Register(n) => (
                self.registers[n].id.clone(),
                self.registers[n].data.join("store.db"),
                self.registers[n].agent.is_some(),
            ),
            _ => return,
        };
        let stream = self.dice.pick(&STREAMS).name;
        if !up || !file.exists() {
            return;
        }
        let db = rusqlite::Connection::open(&file).unwrap();
        db.busy_timeout(Duration::from_secs(5)).unwrap();
        let sql = match (stream, self.dice.below(2)) {
            ("price", 0) => "UPDATE price SET cents = cents + 1",
            ("price", _) => "DELETE FROM price WHERE rowid = (SELECT min(rowid) FROM price)",
            ("promo", _) => "UPDATE promo SET text = 'by hand'",
            _ => "UPDATE staff SET rights = rights + 1",
        };
        if db.execute(sql, []).is_ok_and(|n| n > 0) {
            self.model.lock().unwrap().tampered(&name, stream);
            let now = self.now();
            self.plan(who, Op::Verify, now);
        }
    }

    fn lose_shadow(&mut self, n: usize) {
        self.switch_off(Who::Relay(n), true, 1000);
        for end in ["", "-wal", "-shm"] {
            let _ = std::fs::remove_file(self.relays[n].data.join(format!("shadow.db{end}")));
        }
        let ok = self.relays[n].data.join("ok/packs");
        let name = |path: PathBuf| path.strip_prefix(&ok).unwrap().to_string_lossy().into_owned();
        self.relays[n].unproved = disk::files(&ok).into_iter().map(name).collect();
        self.model.lock().unwrap().lost(&self.relays[n].store);
    }

    /// The last trouble is over.
    async fn calm_down(&mut self) -> Checked {
        self.say("CALM");
        self.calm = true;
        self.queue.retain(|_, e| !matches!(e, Event::Trouble(_) | Event::Change));
        self.net.heal();
        self.cdn.purge();
        self.hq.mend_row();
        self.set_clock(Who::Hq, 0);
        self.revoke().await?;
        if self.hq.app.is_none() {
            self.hq.serve().await;
            self.listening = self.now();
        }
        let all = (0..self.relays.len()).map(Who::Relay).chain((0..self.registers.len()).map(Who::Register));
        for who in all.collect::<BTreeSet<_>>() {
            self.set_clock(who, 0);
            self.disk(who).into_iter().for_each(SmallDisk::empty);
            let now = self.now();
            match who {
                Who::Relay(n) => {
                    self.relays[n].fuse.replace();
                    if self.relays[n].relay.is_none() {
                        self.plan(who, Op::Start, now);
                    }
                    if !self.model.lock().unwrap().still_rotten().is_empty() {
                        // The order to verify may have died with the relay: it is given again.
                        self.plan(who, Op::Verify, now + 1000);
                    }
                }
                Who::Register(n) => {
                    self.registers[n].fuse.replace();
                    match &self.registers[n].agent {
                        Some(agent) => agent.hold.end(),
                        None => self.plan(who, Op::Start, now),
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// A text without this run's own directory.
    fn anonymous(&self, text: &str) -> String {
        text.replace(&*self.hq.dir.parent().unwrap().to_string_lossy(), "…")
            .replace(&std::process::id().to_string(), "PID")
    }
}

fn what_panicked(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "?".into())
}

/// For the log: nothing that differs from run to run.
fn in_short(done: &Done) -> String {
    match done {
        Done::Stepped(StreamOutcome::Again(pause, _)) => format!("again in {} s", pause.as_secs()),
        Done::Stepped(StreamOutcome::NoWay(_)) => "no way".into(),
        Done::Stepped(outcome) => format!("{outcome:?}"),
        Done::Woken(Ok(Asked::News(_))) => "news".into(),
        Done::Woken(_) => "nothing".into(),
        Done::Cycled(End::Held { .. }) => "held".into(),
        Done::Cycled(end) => format!("{end:?}"),
        other => format!("{other:?}"),
    }
}
