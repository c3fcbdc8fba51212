//! Chance, from a seed: the only source of it in a simulation, and in whatever else tries many things.

/// A generator of numbers (splitmix64); the same seed gives the same numbers, for ever.
#[derive(Debug, Clone)]
pub struct Dice(u64);

impl Dice {
    /// Dice that fall as the seed says.
    pub fn new(seed: u64) -> Dice {
        Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5851_f42d_4c95_7f2d)
    }
    /// Dice of a seed for one of many who throw.
    pub fn of(seed: u64, who: u64) -> Dice {
        Dice::new(seed ^ who.wrapping_mul(0xd6e8_feb8_6659_fd93))
    }

    /// Any number.
    pub fn any(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// From 0 up to, not including, `n`; 0 of nothing.
    pub fn below(&mut self, n: u64) -> u64 {
        if n == 0 { 0 } else { self.any() % n }
    }
    /// From `a` to `b`, both included.
    pub fn between(&mut self, a: u64, b: u64) -> u64 {
        a + self.below(b - a + 1)
    }
    /// True in so many of a hundred cases.
    pub fn percent(&mut self, p: u64) -> bool {
        self.below(100) < p
    }
    /// From 0 up to, not including, 1.
    pub fn unit(&mut self) -> f64 {
        (self.any() >> 11) as f64 / (1u64 << 53) as f64
    }
    /// From `a` up to, not including, `b`.
    pub fn stretch(&mut self, a: f64, b: f64) -> f64 {
        a + (b - a) * self.unit()
    }
    /// One of them.
    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len() as u64) as usize]
    }
    /// A place in a list.
    pub fn index(&mut self, len: usize) -> usize {
        self.below(len as u64) as usize
    }
    /// Puts a list into an order by chance.
    pub fn shuffle<T>(&mut self, list: &mut [T]) {
        (1..list.len()).rev().for_each(|i| list.swap(i, self.index(i + 1)));
    }
    /// A key's seed.
    pub fn key(&mut self) -> [u8; 32] {
        let mut key = [0; 32];
        key.chunks_mut(8).for_each(|c| c.copy_from_slice(&self.any().to_be_bytes()));
        key
    }
}
