//! How many connections there may be, from where.

use super::HttpLimits;
use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// More addresses than a chain has stores, or a store machines; past this, new ones are not remembered.
const MAX_KNOWN: usize = 1 << 16;

/// Counts connections in and out. A flood from one address meets `per_ip`; one from many addresses
/// meets what is left of `connections` after `reserved`, which only known addresses get, where any is known.
#[derive(Debug)]
pub struct Gate {
    limits: HttpLimits,
    slow: &'static [&'static str],
    crowd: Mutex<Crowd>,
    refused: AtomicU64,
}

#[derive(Debug, Default)]
struct Crowd {
    open: usize,
    by_ip: HashMap<IpAddr, usize>,
    known: HashSet<IpAddr>,
}

impl Gate {
    /// An empty one.
    pub fn new(limits: HttpLimits) -> Self {
        Gate { limits, slow: &[], crowd: Mutex::default(), refused: AtomicU64::new(0) }
    }

    /// Paths whose answers may take longer than `answer_timeout`: work that takes as long as it takes, for whoever waits.
    #[must_use]
    pub fn with_slow(self, slow: &'static [&'static str]) -> Self {
        Gate { slow, ..self }
    }

    /// The bounds.
    pub fn limits(&self) -> &HttpLimits {
        &self.limits
    }

    /// Lets an address into the reserved places: it has just proved who it is. Whether it was a stranger before.
    pub fn befriend(&self, ip: IpAddr) -> bool {
        let mut crowd = self.crowd();
        crowd.known.len() < MAX_KNOWN && crowd.known.insert(place(ip))
    }

    /// Connections open now.
    pub fn open(&self) -> usize {
        self.crowd().open
    }

    /// Connections refused so far.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    pub(super) fn admit(self: &Arc<Self>, ip: IpAddr) -> Option<Slot> {
        let place = place(ip);
        let mut crowd = self.crowd();
        let is_stranger = !crowd.known.is_empty() && !crowd.known.contains(&place);
        // A third is left for strangers: whoever is new becomes known by a heartbeat, which needs a connection.
        let reserved = if is_stranger { self.limits.reserved.min(self.limits.connections / 3 * 2) } else { 0 };
        let here = crowd.by_ip.get(&place).copied().unwrap_or(0);
        if crowd.open >= self.limits.connections.saturating_sub(reserved) || here >= self.limits.per_ip {
            self.refused.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        crowd.open += 1;
        crowd.by_ip.insert(place, here + 1);
        Some(Slot { gate: self.clone(), place })
    }

    fn crowd(&self) -> MutexGuard<'_, Crowd> {
        self.crowd.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What counts as one client: an IPv4 address, an IPv6 /64.
fn place(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(v6) => {
            let [a, b, c, d, ..] = v6.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
        v4 => v4,
    }
}

/// A connection's place; given back when dropped.
pub(super) struct Slot {
    gate: Arc<Gate>,
    place: IpAddr,
}

impl Slot {
    pub(super) fn limits(&self) -> &HttpLimits {
        &self.gate.limits
    }
    pub(super) fn slow(&self) -> &'static [&'static str] {
        self.gate.slow
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut crowd = self.gate.crowd();
        crowd.open -= 1;
        if let Some(n) = crowd.by_ip.get_mut(&self.place) {
            *n -= 1;
            if *n == 0 {
                crowd.by_ip.remove(&self.place);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gate(connections: usize, per_ip: usize, reserved: usize) -> Arc<Gate> {
        Arc::new(Gate::new(HttpLimits { connections, per_ip, reserved, ..HttpLimits::default() }))
    }

    #[test]
    fn caps_hold_by_address_and_in_all_and_places_come_back() {
        let gate = gate(4, 2, 0);
        let (a, b, c) = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap(), "10.0.0.3".parse().unwrap());
        let first = gate.admit(a).unwrap();
        let _second = gate.admit(a).unwrap();
        assert!(gate.admit(a).is_none());
        // The same machine by another notation.
        assert!(gate.admit("::ffff:10.0.0.1".parse().unwrap()).is_none());
        let _others = [gate.admit(b).unwrap(), gate.admit(b).unwrap()];
        assert!(gate.admit(c).is_none());
        assert_eq!((gate.open(), gate.refused()), (4, 3));
        drop(first);
        drop(gate.admit(c).unwrap());
        assert_eq!(gate.open(), 3);
        drop(_others);
        assert_eq!(gate.crowd().by_ip.len(), 1, "empty counts are not kept");
    }

    #[test]
    fn a_v6_network_is_one_client() {
        let gate = gate(10, 1, 0);
        let _a = gate.admit("2001:db8::1".parse().unwrap()).unwrap();
        assert!(gate.admit("2001:db8::2".parse().unwrap()).is_none());
        assert!(gate.admit("2001:db8:0:1::1".parse().unwrap()).is_some());
    }

    #[test]
    fn strangers_do_not_get_the_reserved_places() {
        let gate = gate(6, 6, 2);
        let friend: IpAddr = "10.0.0.9".parse().unwrap();
        gate.befriend(friend);
        let crowd: Vec<_> = (1..=6).filter_map(|n| gate.admit(IpAddr::from([10, 1, 0, n]))).collect();
        assert_eq!(crowd.len(), 4);
        assert!(gate.admit(friend).is_some());
    }

    #[test]
    fn where_nobody_is_known_no_place_is_kept() {
        let gate = gate(6, 6, 2);
        let crowd: Vec<_> = (1..=7).filter_map(|n| gate.admit(IpAddr::from([10, 1, 0, n]))).collect();
        assert_eq!(crowd.len(), 6);
    }

    #[test]
    fn a_third_of_the_places_is_left_for_strangers() {
        let gate = gate(6, 6, 170);
        gate.befriend(IpAddr::from([10, 0, 0, 1]));
        let crowd: Vec<_> = (1..=7).filter_map(|n| gate.admit(IpAddr::from([10, 1, 0, n]))).collect();
        assert_eq!(crowd.len(), 2);
        assert!(gate.admit(IpAddr::from([10, 0, 0, 1])).is_some());
    }
}
