//! The command line: what can be asked, nothing about how it is done.

use clap::{Args, Parser, Subcommand};
use proto::cli::Common;
use proto::ids::{DeviceId, StoreId, StreamName};
use std::path::PathBuf;

/// Turns the headquarters database into signed data packs in object storage.
#[derive(Debug, Parser)]
#[command(name = "hq-publisher", version, about, disable_help_subcommand = true)]
pub struct Cli {
    /// Options of every command.
    #[command(flatten)]
    pub common: Common,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What can be done.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make the state directory, keys and the first trust file; where no settings file is, write a commented one.
    Init,
    /// Publish what changed in the source: diff, validate, pack, sign.
    Publish(Publish),
    /// Wake relays, take heartbeats, send alerts; runs until it is stopped.
    Serve,
    /// Versions, stores behind, devices, faults, mails waiting.
    Status,
    /// Compare the bucket and the published replicas with the ledger.
    Verify {
        /// Put manifests and trust files that are wrong or missing in the bucket back, as they were signed.
        #[arg(long)]
        mend: bool,
    },
    /// Make a code that enrols a store's relay or a register.
    Enroll {
        /// A store (0421) or a register (0421-03).
        id: DeviceId,
        /// Sign though the clock is more than publish.clock_leap past the ledger.
        #[arg(long)]
        clock_is_right: bool,
    },
    /// Take a relay's or register's key out of its store's manifest.
    Revoke {
        /// A store (0421) or a register (0421-03).
        id: DeviceId,
        /// Sign though the clock is more than publish.clock_leap past the ledger.
        #[arg(long)]
        clock_is_right: bool,
    },
    /// Who may sign.
    Trust {
        /// What to do about it.
        #[command(subcommand)]
        command: TrustCommand,
    },
    /// Write a store's objects into a folder, to be carried there by hand.
    Export {
        /// The store.
        #[arg(long)]
        store: StoreId,
        /// The folder.
        dir: PathBuf,
    },
    /// Read back receipts that a relay wrote at an import.
    Receipt {
        /// Receipt files.
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// Read the settings and contracts and say what is wrong with them; touches nothing.
    CheckConfig,
    /// Try source, buckets, mail server, clock, disk and keys.
    Doctor,
    /// Write completions for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Write the man page.
    Man,
}

/// `publish`
#[derive(Debug, Default, Args)]
pub struct Publish {
    /// Only this stream.
    #[arg(long)]
    pub stream: Option<StreamName>,
    /// Tell what would change; publish nothing, mail nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Make a full of each stream, changed or not.
    #[arg(long)]
    pub full: bool,
    /// Let tables lose rows beyond publish.shrink_percent, of one stream or of all; by its name a stream may go that is no
    /// longer in the settings.
    #[arg(long, value_name = "STREAM", num_args = 0..=1)]
    #[allow(clippy::option_option, reason = "absent, bare, or with a stream")]
    pub allow_shrink: Option<Option<StreamName>>,
    /// Let a contract change that is not additive: stores get a full.
    #[arg(long)]
    pub allow_rebuild: bool,
    /// Sign though the clock is more than publish.clock_leap past the ledger.
    #[arg(long)]
    pub clock_is_right: bool,
}

/// `trust …`
#[derive(Debug, Subcommand)]
pub enum TrustCommand {
    /// The newest trust file and where its keys are.
    Show,
    /// Replace the publisher key: trust both, sign all manifests with the new one, trust only that.
    Rotate(Rotate),
    /// Stop trusting a publisher key at once.
    Revoke(RevokeKey),
}

/// `trust rotate`
#[derive(Debug, Default, Args)]
pub struct Rotate {
    /// Replace the root key too: a new one is made, both sign this once.
    #[arg(long, conflicts_with = "publisher_only")]
    pub root: bool,
    /// Replace the publisher key only (as without --root).
    #[arg(long)]
    pub publisher_only: bool,
    /// Files of root keys; without: root-*.key in the keys directory.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub root_key: Vec<PathBuf>,
    /// From now on lists may have these streams only: relays and registers leave others alone, whoever signed them.
    #[arg(long, value_name = "STREAM", value_delimiter = ',', conflicts_with = "finish")]
    pub streams: Vec<StreamName>,
    /// Lists may have any stream again.
    #[arg(long, conflicts_with_all = ["finish", "streams"])]
    pub any_stream: bool,
    /// Stop when all manifests are signed with the new key; the old one stays trusted until --finish.
    #[arg(long, conflicts_with = "finish")]
    pub keep_old: bool,
    /// Only finish a rotation that was begun.
    #[arg(long)]
    pub finish: bool,
    /// Sign though the clock is more than publish.clock_leap past the ledger.
    #[arg(long)]
    pub clock_is_right: bool,
}

/// `trust revoke`
#[derive(Debug, Args)]
pub struct RevokeKey {
    /// The key's id (16 hex digits, as `trust show` prints it).
    pub key: String,
    /// Begin a new epoch: readers forget serials and versions seen before. For a key that was stolen, revoked already or not.
    #[arg(long)]
    pub new_epoch: bool,
    /// Files of root keys; without: root-*.key in the keys directory.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub root_key: Vec<PathBuf>,
    /// Sign though the clock is more than publish.clock_leap past the ledger.
    #[arg(long)]
    pub clock_is_right: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_holds_together() {
        Cli::command().debug_assert();
    }
}
