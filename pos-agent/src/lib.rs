//! Brings a register's SQLite database up to date and reports. The spine is `agent`.

pub mod config;

pub mod faults;
pub mod hold;
pub mod metrics;
pub mod pace;
pub mod plan;
pub mod tries;
pub mod verify;

pub mod upstream;

pub mod memory;

pub mod register_db;

pub mod agent;

pub mod status;

pub mod report;

pub mod doctor;
pub mod local_api;
pub mod run;

pub mod cli;

#[cfg(test)]
mod tests;
