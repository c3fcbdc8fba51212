//! What the tiers of Tillcast share: names, packs, trust, replicas, durable files, and the words
//! that they say to each other. A room looks only at rooms above it in this list.

pub mod failpoint;

pub mod ids;

pub mod clock;
pub mod limits;
pub mod retry;
pub mod value;

pub mod digest;
pub mod layout;

pub mod keys;

pub mod dsse;

pub mod chain;
pub mod manifest;

pub mod trust;

pub mod schema;

pub mod pack;

pub mod shelf;

pub mod owner;

pub mod fetch;
pub mod replica;

pub mod wire;

pub mod runs;

pub mod device;

pub mod disk;

pub mod follow;

pub mod cli;
pub mod config;
pub mod http;
