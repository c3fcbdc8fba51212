//! The store's server: mirrors headquarters' packs, proves each on a shadow database with the code that the
//! registers run, and serves what passed on the LAN. A room looks only at rooms above it in this list.

pub mod config;
pub mod steps;

pub mod trial;
pub mod tries;

pub mod shelves;
pub mod spool;

pub mod debts;
pub mod shadow;

pub mod metrics;

pub mod hall;

pub mod beats;
pub mod lan;

pub mod report;
pub mod wake;

pub mod relay;

pub mod import;
pub mod spare;
pub mod stream;
pub mod trust_files;

pub mod control;
pub mod doctor;
pub mod run;

pub mod cli;

#[cfg(test)]
mod kit;
