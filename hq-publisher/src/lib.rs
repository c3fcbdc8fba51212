//! Turns the headquarters database into signed data packs in object storage, and watches the fleet
//! that takes them.

pub mod config;

pub mod keys;
pub mod ledger;

pub mod bucket;
pub mod manifests;

pub mod alert;
pub mod fleet;
pub mod hours;
pub mod mail;

pub mod hooks;

pub mod source;

pub mod inbox;
pub mod source_db;

pub mod ahead;
pub mod diff;
pub mod guard;
pub mod plan;
pub mod retention;
pub mod scratch;

pub mod rebuild;

pub mod publish;

pub mod carry;
pub mod doctor;
pub mod enrol;
pub mod intake;
pub mod metrics;
pub mod progress;
pub mod some;
pub mod status;
pub mod verify;
pub mod web;

pub mod cli;
pub mod code;
pub mod commands;
