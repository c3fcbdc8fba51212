//! The page at `/`, in plain words, for whoever stands in the store with a phone or at a till.

use crate::hall::Hall;
use crate::spool::Event;
use http::header::{self, HeaderValue};
use http::{Response, StatusCode};
use maud::{DOCTYPE, Markup, html};
use proto::http::Body;
use proto::wire::{Network, Status, StreamState};

/// No script, nothing from elsewhere, in nobody's frame: what a register says in its texts stays text.
const POLICY: &str =
    "default-src 'none'; style-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'";

/// Characters of a text from a device on the page.
const TOLD: usize = 300;

/// `/style.css`.
pub const STYLE: &str = "body{font:16px/1.5 system-ui,sans-serif;max-width:46em;margin:1em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:.3em .6em .3em 0;border-bottom:1px solid #ddd}
.good{color:#176b2c}.bad{color:#a11}.dim{color:#666}@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}
.good{color:#6c6}.bad{color:#f88}.dim{color:#999}td,th{border-color:#444}}";

/// The page as it is answered.
pub fn answer(hall: &Hall) -> Response<Body> {
    let mut response = super::text(StatusCode::OK, "text/html; charset=utf-8", page(hall));
    response.headers_mut().insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    response
}

/// The whole page. Blocks on the disk, briefly.
pub fn page(hall: &Hall) -> String {
    let (status, events) = (hall.status(), hall.events());
    let registers = registers(hall);
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta http-equiv="refresh" content="10";
                title { "Store " (hall.config.store) }
                link rel="stylesheet" href="/style.css";
            }
            body {
                h1 { "Store " (hall.config.store) }
                (summary(hall, &status))
                (streams(hall, &status))
                h2 { "Registers" }
                (registers)
                (troubles(&status))
                (log(&events))
                p.dim {
                    "Data list " @if let Some(serial) = status.serial { (serial) } @else { "not received yet" }
                    @if let Some(disk) = status.disk { " · " (disk.free >> 20) " MiB free on the disk" }
                    " · store-relay " (env!("CARGO_PKG_VERSION"))
                }
            }
        }
    }
    .into_string()
}

fn summary(hall: &Hall, status: &Status) -> Markup {
    let all_well = status.errors.is_empty() && status.debts.is_empty() && status.serial.is_some();
    html! {
        @if all_well {
            p.good { "All data is up to date." }
        } @else if status.serial.is_none() {
            p.bad { "No data was received yet." }
        } @else if status.errors.is_empty() {
            p { "New data is on its way. The registers sell with what they have." }
        } @else {
            p.bad { "Something needs attention, see below. The registers go on selling with what they have." }
        }
        p {
            @match status.network {
                // Without headquarters' service nothing is known of headquarters.
                Network::Online if hall.config.hq.is_none() => "The place that the data comes from answers.",
                Network::Online => "Headquarters is connected.",
                Network::InStore | Network::OnlineRelayDown => "Headquarters cannot be reached; data still arrives by the other way.",
                Network::Offline => "There is no connection out of the store. The registers go on selling.",
                Network::Unknown => "",
            }
            @if let Some(s) = status.hq_seen_s { " Last contact " (ago(s)) "." }
        }
    }
}

fn streams(hall: &Hall, status: &Status) -> Markup {
    let heads: std::collections::BTreeMap<_, _> = hall.state().instances().map(|(i, e)| (i, e.version)).collect();
    html! {
        h2 { "Data" }
        table {
            tr { th { "What" } th { "Version here" } th { "Newest" } th { "" } }
            @for (instance, report) in &status.streams {
                tr {
                    td { (instance.stream) " " span.dim { (instance.audience) } }
                    td { @if let Some(v) = report.version { (v) } @else { "none" } }
                    td { @if let Some(v) = heads.get(instance) { (v) } }
                    td { @match report.state {
                        StreamState::Ok => span.good { "up to date" },
                        StreamState::Behind => "on its way",
                        StreamState::Waiting => "not here yet",
                        StreamState::Error => span.bad { "a delivery is damaged or refused" },
                        StreamState::Drift => span.bad { "being repaired" },
                        StreamState::Unknown => "",
                    } }
                }
            }
        }
    }
}

fn registers(hall: &Hall) -> Markup {
    let now = hall.clock.monotonic();
    let state = hall.state();
    let known = state.manifest.iter().flat_map(|m| m.registers.keys());
    html! {
        table {
            tr { th { "Register" } th { "Last heard" } th { "" } }
            @for register in known {
                tr {
                    td { (register) }
                    @match state.registers.get(register) {
                        Some(heard) => {
                            @let behind = heard.beat.streams.values().any(|s| s.state != StreamState::Ok);
                            td { (ago(heard.ago(now).as_secs())) }
                            td {
                                @if !heard.beat.errors.is_empty() { span.bad { (cut(&heard.beat.errors[0].text)) } }
                                @else if behind { "getting new data" }
                                @else { span.good { "up to date" } }
                            }
                        }
                        None => { td { "never" } td { "" } }
                    }
                }
            }
        }
    }
}

fn troubles(status: &Status) -> Markup {
    html! {
        @if !status.errors.is_empty() {
            h2 { "What is wrong" }
            ul { @for fault in &status.errors {
                li {
                    b { (fault.code) } " "
                    @if let Some(object) = &fault.object { (object) ": " }
                    (fault.text) " " span.dim { "since " (fault.since) }
                }
            } }
        }
        @if !status.debts.is_empty() {
            h2 { "What is still to come" }
            ul { @for debt in &status.debts { li { (debt) } } }
        }
    }
}

fn log(events: &[Event]) -> Markup {
    html! {
        @if !events.is_empty() {
            h2 { "What happened" }
            table {
                tr { th { "When" } th { "What" } th { "Of what" } th { "" } }
                @for event in events {
                    tr {
                        td { (event.at.strftime("%Y-%m-%d %H:%M:%SZ")) }
                        td { (event.code) }
                        td { (cut(&event.subject)) }
                        td { (cut(&event.text)) }
                    }
                }
            }
        }
    }
}

fn cut(text: &str) -> String {
    text.chars().take(TOLD).collect()
}

fn ago(seconds: u64) -> String {
    match seconds {
        0..=1 => "just now".into(),
        2..=119 => format!("{seconds} seconds ago"),
        120..=7199 => format!("{} minutes ago", seconds / 60),
        7200..=172_799 => format!("{} hours ago", seconds / 3600),
        _ => format!("{} days ago", seconds / 86_400),
    }
}
