//! What goes wrong, when, and for how long: drawn from the seed before anything begins. Each seed knows only some
//! kinds of trouble, so that those do not hide each other.

use crate::clock::Ms;
use crate::net::Who;
use tillcast_tests::Dice;

/// One trouble.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trouble {
    /// Nothing passes between the two.
    Partition(Who, Who, Ms),
    /// The way between the two loses, delays, doubles and bends.
    Bad(Who, Who, Ms),
    /// The CDN is so old, for so long.
    Lag(Ms, Ms),
    /// The CDN's copy of a pack goes wrong.
    Spoil,
    /// The CDN is right again.
    Purge,
    /// A machine dies; is it the power; for how long.
    Crash(Who, bool, Ms),
    /// A machine's power goes at its n-th durable step from now.
    Cut(Who, u64),
    /// The next publish is cut at its n-th step.
    CutPublish(u64),
    /// A wall clock is wrong by so many seconds, for so long.
    Clock(Who, i64, Ms),
    /// It is right again.
    ClockRight(Who),
    /// A signed and bad pack for a store.
    Poison(usize),
    /// A bad row in the source.
    BadRow,
    /// It is mended.
    MendRow,
    /// Rows of a machine are changed by hand, and its `verify` is called.
    Tamper(Who),
    /// A relay's shadow is lost.
    LoseShadow(usize),
    /// A sale is open at a register, s.
    Hold(usize, u64),
    /// `serve` is down.
    ServeDown(Ms),
    /// `serve` comes back.
    ServeUp,
    /// A store changes its zone.
    Zone(usize),
    /// A stick is carried to a store.
    Stick(usize),
    /// The publisher key is replaced.
    Rotate,
    /// The publisher key was stolen: a store's list jumps ahead.
    Theft(usize),
    /// The stolen key is revoked, with a new epoch.
    Revoke,
    /// A contract gets a column.
    Contract,
    /// A file that a relay serves rots, and its `verify` is called.
    Rot(usize),
    /// Headquarters' power goes at the n-th step of the next publish.
    HqPower(u64),
    /// A pack is gone from the bucket.
    Lose,
    /// A machine's disk is full but for so many pages, for so long (headquarters': during a publish).
    Full(Who, u64, Ms),
    /// There is room again.
    Room(Who),
}

/// The kinds, by number, in the order of [`draw`].
const KINDS: u64 = 25;

/// The troubles of a seed, by time.
pub fn plan(stores: usize, registers: usize, until: Ms, dice: &mut Dice) -> Vec<(Ms, Trouble)> {
    let mut kinds: Vec<u64> = (0..KINDS).filter(|_| dice.percent(40)).collect();
    if kinds.is_empty() {
        kinds.push(dice.below(KINDS));
    }
    let mut all = Vec::new();
    for _ in 0..dice.between(2, 12) {
        let at = dice.below(until);
        let kind = *dice.pick(&kinds);
        all.push((at, draw(kind, stores, registers, dice)));
    }
    all.sort_by_key(|(at, _)| *at);
    all
}

fn draw(kind: u64, stores: usize, registers: usize, dice: &mut Dice) -> Trouble {
    let relay = Who::Relay(dice.index(stores));
    let register_n = dice.index(stores * registers);
    let register = Who::Register(register_n);
    let any = if dice.percent(50) { relay } else { register };
    let way = |dice: &mut Dice| match any {
        Who::Relay(_) => (any, *dice.pick(&[Who::Hq, Who::Cdn, Who::Bucket, Who::Cdn])),
        _ if dice.percent(70) => (any, Who::Relay(register_n / registers)),
        _ => (any, Who::Cdn),
    };
    let (from, to) = way(dice);
    let a_while = dice.between(5_000, 400_000);
    match kind {
        // Long enough, often, for a store to fall silent.
        0 if to == Who::Hq => Trouble::Partition(from, to, a_while * 2),
        0 => Trouble::Partition(from, to, a_while),
        1 | 2 => Trouble::Bad(from, to, a_while),
        3 => Trouble::Lag(dice.between(5_000, 300_000), a_while),
        4 => Trouble::Spoil,
        5 => {
            let (power, off) = (dice.percent(60), dice.between(500, 90_000));
            Trouble::Crash(any, power, if power && any == relay { off * 6 } else { off })
        }
        6 | 7 => Trouble::Cut(any, dice.below(14)),
        8 => Trouble::CutPublish(dice.below(40)),
        9 => {
            let leap = *dice.pick(&[-86_400 * 400, -7200, -90, 90, 7200, 80_000, 86_400 * 5, 86_400 * 400]);
            Trouble::Clock(*dice.pick(&[any, any, Who::Hq]), leap, a_while)
        }
        10 => Trouble::Poison(dice.index(stores)),
        11 => Trouble::BadRow,
        12 => Trouble::Tamper(any),
        13 => Trouble::LoseShadow(dice.index(stores)),
        14 => Trouble::Hold(register_n, dice.between(5, 1200)),
        15 => Trouble::ServeDown(a_while),
        16 => Trouble::Zone(dice.index(stores)),
        17 => Trouble::Stick(dice.index(stores)),
        18 => Trouble::Rotate,
        19 => Trouble::Theft(dice.index(stores)),
        20 => Trouble::Contract,
        21 => Trouble::Rot(dice.index(stores)),
        22 => Trouble::HqPower(dice.below(40)),
        23 => Trouble::Lose,
        _ => {
            let pages = if dice.percent(50) { 0 } else { dice.below(100) };
            Trouble::Full(*dice.pick(&[any, any, Who::Hq]), pages, a_while)
        }
    }
}
